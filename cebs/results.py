"""The one CSV of all methods: a row for each (data set, method), updated in place, and the table printed from it.

```bash
python -m cebs.results output/results.csv
python -m cebs.results output/results.csv --dataset Goodreads
```

The file belongs to whoever edits it, too: columns and rows that this module does not know, and the order of both, stay
as they are. Cells are never parsed, so that what is not updated stays as it was written.
"""

import argparse
import csv
import io
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cebs.metrics import HIGHER_IS_BETTER, METRICS_AT_K
from utils import InputError, write_text

NAMES = ("Dataset", "Model")  # what tells a row from another
FACTS = ("Users", "Encoder", "Protocol")  # what a row's figures rest on
FIGURE_AT_K = re.compile(rf"(?:{'|'.join(METRICS_AT_K)})@(\d+)")
FORMULA_STARTS = ("=", "+", "-", "@")
LOCK_TIMEOUT_S = 120


def results_columns(topk: Iterable[int]) -> list[str]:
    """Returns the columns of the CSV, in order."""
    figures = [f"{metric}@{k}" for k in sorted(set(topk)) for metric in METRICS_AT_K]
    return [*NAMES, *figures, "NotInRatio", *FACTS]


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ResultsTable:
    """The CSV as it stands.

    Args:
        header (`list[str]`): the names of the columns.
        rows (`list[list[str]]`): the cells; a row may be shorter or longer than the header.
        delimiter (`str`): what stands between cells; some spreadsheets write a semicolon or a tab.
        line_end (`str`): what ends a line.
        encoding (`str`): `utf-8`, or `utf-8-sig` where the file starts with a byte order mark.
    """

    header: list[str]
    rows: list[list[str]]
    delimiter: str = ","
    line_end: str = "\n"
    encoding: str = "utf-8"

    def cell(self, row: list[str], column: str) -> str:
        """Returns a cell, stripped; empty where the row or the table does not have it."""
        place = self.header.index(column) if column in self.header else len(row)
        return row[place].strip() if place < len(row) else ""

    def name(self, row: list[str], column: str) -> str:
        """Returns a cell that holds a name, without the guard against formulas."""
        return _unguarded(self.cell(row, column))

    def set_cell(self, row: list[str], column: str, value: str) -> None:
        place = self.header.index(column)
        row += [""] * (place + 1 - len(row))
        row[place] = value

    def add_columns(self, columns: Iterable[str]) -> None:
        """Adds the columns that are not there, each behind the one that it follows in a table written from scratch."""
        columns = [column for column in columns if column not in self.header]
        order = results_columns([int(match[1]) for match in map(FIGURE_AT_K.match, [*self.header, *columns]) if match])
        for column in columns:
            before = order[: order.index(column)]
            place = 1 + self.header.index(next(name for name in reversed(before) if name in self.header))
            self.header.insert(place, column)
            for row in self.rows:
                if len(row) >= place:
                    row.insert(place, "")

    def dataset_rows(self, dataset: str) -> list[list[str]]:
        return [row for row in self.rows if self.name(row, "Dataset") == dataset]

    def to_text(self) -> str:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=self.delimiter, lineterminator=self.line_end)
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return ("\ufeff" if self.encoding == "utf-8-sig" else "") + text.getvalue()


def read_results(path: str | Path) -> ResultsTable:
    """Reads the CSV; one that is not there yet, or is empty, is a table without rows.

    Raises:
        `InputError`: if it cannot be read, or has no columns Dataset and Model.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raw, text = b"", ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give the path of a CSV file") from error
    if not text.strip():
        return ResultsTable(results_columns([]), [])
    try:
        for delimiter in ",;\t":
            header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            if set(NAMES) <= set(header):
                return ResultsTable(
                    header,
                    rows,
                    delimiter=delimiter,
                    line_end="\r\n" if "\r\n" in text else "\n",
                    encoding="utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8",
                )
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}; mend the file or give another path") from error
    raise InputError(f"{path}: the first line has no columns Dataset and Model; give another path to start a new table")


def update_results(path: str | Path, figures: Mapping[str, str | int | float]) -> list[str]:
    """Writes one row: in place of the row of the same (Dataset, Model), or at the end.

    Figures at a k that is not among the new ones are emptied, for they belong to the row's earlier predictions.
    Several processes may call this at once: each holds the file's lock from reading to writing.

    Args:
        path: the CSV, made if need be.
        figures: the row, by column (see `results_columns`); a number that is not finite becomes an empty cell.

    Returns:
        `list[str]`: what the reader of the table should know, a line for each.

    Raises:
        `InputError`: if the CSV cannot be read or written.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    cells = {column: _cell(value) for column, value in figures.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_TIMEOUT_S):
            table = read_results(path)
            notices = _update(table, cells)
            write_text(path, table.to_text())
    except Timeout as error:
        raise InputError(f"{path}: another process has been writing there for {LOCK_TIMEOUT_S} s; try again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; give another --results_csv") from error
    return notices


def _update(table: ResultsTable, cells: Mapping[str, str]) -> list[str]:
    dataset, model, encoder = (_unguarded(cells[column]) for column in (*NAMES, "Encoder"))
    notices = []
    table.add_columns(cells)
    same = [row for row in table.dataset_rows(dataset) if table.name(row, "Model") == model]
    if not same:
        table.rows.append([""] * len(table.header))
    row = same[0] if same else table.rows[-1]
    if len(same) > 1:
        notices.append(f"{dataset}, {model}: has {len(same)} rows; the first is updated, the others are left")

    before = table.name(row, "Encoder")
    if before and encoder and before != encoder:
        notices.append(f"{dataset}, {model}: its figures were by the encoder {before}; they are replaced")
    emptied = sorted({int(match[1]) for column in table.header if (match := _emptied(table, row, column, cells))})
    if emptied:
        where = ", ".join(f"@{k}" for k in emptied)
        notices.append(f"{dataset}, {model}: earlier figures {where} are emptied; add these k to --topk to have them")
    for column in table.header:
        if _emptied(table, row, column, cells):
            table.set_cell(row, column, "")
    for column, value in cells.items():
        table.set_cell(row, column, value)

    others = {table.name(other, "Encoder") for other in table.dataset_rows(dataset)} - {encoder, ""}
    if encoder and others:
        notices.append(
            f"{dataset}: other rows are by the encoder {', '.join(sorted(others))}, not by {encoder}; "
            "their figures cannot be compared with this one's"
        )
    return notices


def _emptied(table: ResultsTable, row: list[str], column: str, cells: Mapping[str, str]) -> re.Match | None:
    """Matches a column that holds a figure of the row's earlier evaluation and gets none from this one."""
    return FIGURE_AT_K.match(column) if column not in cells and table.cell(row, column) else None


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"'{value.strip()}" if value.strip().startswith(FORMULA_STARTS) else value.strip()
    return repr(value) if math.isfinite(value) else ""


def _unguarded(name: str) -> str:
    return name[1:] if name.startswith("'") and name[1:].startswith(FORMULA_STARTS) else name


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def print_results(path: str | Path, dataset: str | None = None) -> None:
    """Prints the table of a data set, or of all, with arrows in the headers that say which way is better.

    Raises:
        `InputError`: if the CSV is not there or cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; evaluate.py writes it")
    table = read_results(path)
    names = dict.fromkeys(table.name(row, "Dataset") for row in table.rows)
    for name in [dataset] if dataset is not None else filter(None, names):
        for line in format_results(table, name):
            print(_for_terminal(line))


def format_results(table: ResultsTable, dataset: str) -> list[str]:
    """Returns the lines of a data set's table: for each k a block, with a row for each method."""
    rows = table.dataset_rows(dataset)
    if not rows:
        return [f"{dataset}: no rows"]
    facts = {fact: [table.name(row, fact) for row in rows] for fact in FACTS}
    shared = [f"{fact.lower()} {values[0]}" for fact, values in facts.items() if len(set(values)) == 1 and values[0]]
    varying = [fact for fact, values in facts.items() if len(set(values)) > 1]
    lines = []
    for k in sorted({int(match[1]) for match in map(FIGURE_AT_K.match, table.header) if match}):
        columns = {f"{metric}@{k}": f"{metric}{_arrow(metric)}" for metric in METRICS_AT_K}
        columns["NotInRatio"] = f"NotInRatio{_arrow('NotInRatio')}"
        if not any(table.cell(row, column) for row in rows for column in columns if column != "NotInRatio"):
            continue
        header = ["Model", *columns.values(), *varying]
        body = [
            [
                table.name(row, "Model"),
                *(_figure(table.cell(row, column)) for column in columns),
                *(table.name(row, fact) or "-" for fact in varying),
            ]
            for row in rows
        ]
        lines += ["", ", ".join([f"{dataset}, the first {k} titles", *shared]), *_aligned([header, *body])]
    return [*lines, "", "↑ more is better, ↓ less is better"]


def _arrow(metric: str) -> str:
    return "↑" if HIGHER_IS_BETTER[metric] else "↓"


def _figure(cell: str) -> str:
    """Returns a figure with four decimals, a whole number as it is, and what is no number as it stands."""
    try:
        return cell if float(cell) == int(float(cell)) and "." not in cell else f"{float(cell):.4f}"
    except (ValueError, OverflowError):
        return cell or "-"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Returns the rows as lines: the first column flush left, the others flush right."""
    rows = [["".join(char if char.isprintable() else " " for char in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _for_terminal(line: str) -> str:
    """Returns the line as standard output can show it: with + and - for arrows where it has none."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        "↑↓".encode(encoding)
    except UnicodeEncodeError:
        line = line.replace("↑", "+").replace("↓", "-")
    return line.encode(encoding, "replace").decode(encoding)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cebs.results", description="Prints the table of a results CSV.")
    parser.add_argument("results_csv", help="the CSV that evaluate.py writes")
    parser.add_argument("--dataset", help="only the rows of this data set")
    arguments = parser.parse_args()
    try:
        print_results(arguments.results_csv, arguments.dataset)
    except InputError as error:
        print(f"cebs.results: error: {error}", file=sys.stderr)
        sys.exit(2)
