"""The one CSV of all methods: a row for each (data set, method), updated in place, and the table printed from it.

```bash
python -m cebs.results output/results.csv
python -m cebs.results output/results.csv --dataset Goodreads --reference SFT

# one table of several seeds: means and standard deviations
python -m cebs.results --aggregate output/results.csv output/seed_1/results.csv output/seed_2/results.csv
```

Under the figures stand paired tests of each row against the reference, from the files per user beside the CSV
(`cebs.per_user`): a dagger marks a figure that differs, and where none can be seen the words say so.

The file belongs to whoever edits it, too: columns and rows that this module does not know, and the order of both, stay
as they are. Cells are never parsed, so that what is not updated stays as it was written.
"""

import codecs
import csv
import io
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from cebs.commands import OneLineParser
from cebs.errors import InputError, errors_in_one_line
from cebs.files import named_by_the_user, read_text, write_text
from cebs.metrics import HIGHER_IS_BETTER, METRICS_AT_K, TAIL_METRICS_AT_K
from cebs.per_user import check_same_records, find_per_user, mean_over_seeds
from cebs.statistics import PairedTest, test_rows

NAMES = ("Dataset", "Model")  # what tells a row from another
FACTS = ("Users", "Encoder", "Protocol")  # what a row's figures rest on
DEFAULT_REFERENCE = "SFT"
# a figure, an end of its interval, or its standard deviation over seeds
FIGURE_AT_K = re.compile(
    rf"(?:{'|'.join((*METRICS_AT_K, *TAIL_METRICS_AT_K))})@([1-9][0-9]{{0,8}})(?P<of>_low|_high|_std)?"
)
FIGURES_AGREE = 5e-5  # of the CSV, which a spreadsheet may have rounded to four decimals, and a file per user
FORMULA_STARTS = ("=", "+", "-", "@")
LOCK_TIMEOUT_S = 120


def results_columns(topk: Iterable[int]) -> list[str]:
    """Returns the columns that `evaluate.py` writes, in order: figures, what they rest on, the tail, and intervals."""
    topk = sorted(set(topk))
    figures = [f"{metric}@{k}" for k in topk for metric in METRICS_AT_K]
    tail = [f"{metric}@{k}" for k in topk for metric in TAIL_METRICS_AT_K]
    intervals = [f"{figure}_{end}" for figure in (*figures, "NotInRatio", *tail) for end in ("low", "high")]
    return [*NAMES, *figures, "NotInRatio", *FACTS, *tail, *intervals, "Notes"]


def seeds_columns(topk: Iterable[int]) -> list[str]:
    """Returns the columns that a table of several seeds has besides, in order."""
    figures = [column for column in results_columns(topk) if _is_figure(column)]
    return [*(f"{figure}_std" for figure in figures), "Seeds"]


def _is_figure(column: str) -> bool:
    match = FIGURE_AT_K.fullmatch(column)
    return column == "NotInRatio" or (match is not None and match["of"] is None)


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

    def number(self, row: list[str], column: str) -> float | None:
        """Returns a cell that holds a number, with a decimal comma where a spreadsheet wrote one; else `None`."""
        cell = self.cell(row, column)
        try:
            number = float(cell if self.delimiter == "," else cell.replace(",", "."))
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    def topk(self) -> list[int]:
        """Returns the values of k that the table has figures for."""
        return sorted({int(match[1]) for match in map(FIGURE_AT_K.fullmatch, self.header) if match})

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
        topk = [int(match[1]) for match in map(FIGURE_AT_K.fullmatch, [*self.header, *columns]) if match]
        order = [*results_columns(topk), *seeds_columns(topk)]
        for column in columns:
            before = order[: order.index(column)]
            place = 1 + self.header.index(next(name for name in reversed(before) if name in self.header))
            self.header.insert(place, column)
            for row in self.rows:
                if len(row) >= place:
                    row.insert(place, "")

    def dataset_rows(self, dataset: str) -> list[list[str]]:
        return [row for row in self.rows if self.name(row, "Dataset") == dataset]

    def method_rows(self, dataset: str, method: str) -> list[list[str]]:
        return [row for row in self.dataset_rows(dataset) if self.name(row, "Model") == method]

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
    text = read_text(path) if os.path.exists(path) else ""
    if not text.strip():
        return ResultsTable(results_columns([]), [])
    try:
        headers = {sign: next(csv.reader(io.StringIO(text, newline=""), delimiter=sign)) for sign in ",;\t"}
        delimiter = next((sign for sign, header in headers.items() if set(NAMES) <= set(header)), None)
        if delimiter is None:
            raise InputError(
                f"{path}: the first line has no columns Dataset and Model; give another path to start a new table"
            )
        # strict: a quote that is never closed would make one cell of all that follows
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}; mend the file or give another path") from error
    for column, times in Counter(header).items():
        if times > 1 and (column in (*NAMES, *FACTS) or FIGURE_AT_K.fullmatch(column)):
            raise InputError(f"{path}: has the column {column} {times} times; keep one")
    return ResultsTable(
        header,
        rows,
        delimiter=delimiter,
        line_end="\r\n" if "\r\n" in text else "\n",
        encoding="utf-8-sig" if path.read_bytes().startswith(codecs.BOM_UTF8) else "utf-8",
    )


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
    with named_by_the_user(path, "give another --results_csv"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_TIMEOUT_S):
                table = read_results(path)
                notices = _update(table, cells)
                write_text(path, table.to_text())
        except Timeout as error:
            busy = f"another process has been writing there for {LOCK_TIMEOUT_S} s"
            raise InputError(f"{path}: {busy}; try again") from error
    return notices


def _update(table: ResultsTable, cells: Mapping[str, str]) -> list[str]:
    dataset, model, encoder = (_unguarded(cells[column]) for column in (*NAMES, "Encoder"))
    notices = []
    table.add_columns(cells)
    same = table.method_rows(dataset, model)
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
    return FIGURE_AT_K.fullmatch(column) if column not in cells and table.cell(row, column) else None


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"'{value.strip()}" if value.strip().startswith(FORMULA_STARTS) else value.strip()
    return repr(value) if math.isfinite(value) else ""


def _unguarded(name: str) -> str:
    return name[1:] if name.startswith("'") and name[1:].startswith(FORMULA_STARTS) else name


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds
# ---------------------------------------------------------------------------------------------------------------------


def aggregate_seeds(paths: Sequence[str | Path], output: str | Path) -> list[str]:
    """Writes one table of several seeds, and returns what its reader should know: see `mean_rows`.

    Rows are updated as `update_results` does it, so that what was added to the output by hand stays.

    Raises:
        `InputError`: if a table is not there or cannot be read, or the output is one of them.
    """
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; evaluate.py writes it")
        if os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"{path}: is the output and an input; give --aggregate another file")
    notices = [update_results(output, row) for row in mean_rows([read_results(path) for path in paths])]
    return list(dict.fromkeys(notice for found in notices for notice in found))


def mean_rows(tables: Sequence[ResultsTable]) -> list[dict[str, str | int | float]]:
    """Returns each method's figures as means over seeds, with the sample standard deviation in `<figure>_std`.

    A figure that a seed's row lacks is NaN, and so is a deviation of one seed. Intervals are of one seed's users and
    have no mean. Facts in which the seeds differ are listed.

    Args:
        tables: a table for each seed; a method may be missing in some, `Seeds` counts those that have it.
    """
    names = dict.fromkeys(tuple(table.name(row, name) for name in NAMES) for table in tables for row in table.rows)
    figures = [name for name in results_columns({k for table in tables for k in table.topk()}) if _is_figure(name)]
    rows: list[dict[str, str | int | float]] = []
    for dataset, method in names:
        if not (dataset and method):
            continue
        found = [(table, row) for table in tables for row in table.method_rows(dataset, method)[:1]]
        facts = {fact: " | ".join(dict.fromkeys(table.name(row, fact) for table, row in found)) for fact in FACTS}
        mean: dict[str, str | int | float] = {"Dataset": dataset, "Model": method, **facts, "Seeds": len(found)}
        for figure in figures:
            of_seeds = np.array([table.number(row, figure) for table, row in found], float)  # None becomes NaN
            mean[figure] = float(of_seeds.mean())
            mean[f"{figure}_std"] = float(of_seeds.std(ddof=1)) if len(found) > 1 else math.nan
        rows.append(mean)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceTests:
    """Paired tests of a data set's rows against the reference.

    Args:
        reference (`str`): the reference's name.
        at_k (`dict[int, dict[str, PairedTest]]`): for each k the tested methods, p-values corrected over them.
        notes (`list[str]`): what was not tested and why.
    """

    reference: str
    at_k: dict[int, dict[str, PairedTest]]
    notes: list[str]


def compare_with_reference(path: str | Path, table: ResultsTable, dataset: str, reference: str) -> ReferenceTests:
    """Tests each row of a data set against the reference, from the files per user beside the CSV.

    A row whose file is not there, or gives another figure than the row, is left out with a note.
    """
    names = list(dict.fromkeys(table.name(row, "Model") for row in table.dataset_rows(dataset)))
    if len(names) < 2:
        return ReferenceTests(reference, {}, [])
    if reference not in names:
        return ReferenceTests(reference, {}, [f"no row {reference}: nothing is tested; --reference names another row"])
    contents, notes = {}, []
    for name in (reference, *(name for name in names if name != reference)):
        try:
            of_seeds = find_per_user(path, dataset, name)
            if not of_seeds:
                raise InputError(f"{name}: not tested, there is no file per user; evaluate its predictions to have one")
            contents[name] = mean_over_seeds(of_seeds)
            check_agreement(table, table.method_rows(dataset, name)[0], contents[name])
            check_same_records(contents[name], contents[reference])
        except InputError as error:
            notes.append(str(error))
            contents.pop(name, None)
            if name == reference:
                break
    tested = [name for name in contents if name != reference]
    if not tested:
        return ReferenceTests(reference, {}, notes)
    topk = sorted(set.intersection(*(set(content["topk"]) for content in contents.values())))
    at_k = {}
    for k in topk:
        tests = test_rows(contents[reference], [contents[name] for name in tested], k)
        at_k[k] = dict(zip(tested, tests, strict=True))
    return ReferenceTests(reference, at_k, notes)


def check_agreement(table: ResultsTable, row: list[str], content: Mapping[str, Any]) -> None:
    for k in content["topk"]:
        for metric, measure in (("NDCG", "ndcg"), ("HR", "hit")):
            mean = np.mean([user[measure][str(k)] for user in content["users"]])
            figure = table.number(row, f"{metric}@{k}")
            if figure is not None and abs(figure - mean) > FIGURES_AGREE:
                raise InputError(
                    f"{content['method']}: not tested, its file per user is of another evaluation ({metric}@{k} "
                    f"{mean:.4f} there, {figure:.4f} in the CSV); evaluate its predictions again"
                )


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def print_results(path: str | Path, dataset: str | None = None, reference: str | None = None) -> None:
    """Prints the table of a data set, or of all, with arrows in the headers that say which way is better.

    Raises:
        `InputError`: if the CSV is not there or cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; evaluate.py writes it")
    table = read_results(path)
    names = dict.fromkeys(table.name(row, "Dataset") for row in table.rows)
    for name in [dataset] if dataset is not None else filter(None, names):
        tested = compare_with_reference(path, table, name, reference or DEFAULT_REFERENCE)
        for line in format_results(table, name, tested):
            print(_for_terminal(line))


def format_results(table: ResultsTable, dataset: str, tested: ReferenceTests) -> list[str]:
    """Returns the lines of a data set's table: for each k the figures, the tail, and what the tests say."""
    rows = table.dataset_rows(dataset)
    if not rows:
        return [f"{dataset}: no rows"]
    facts = {fact: [table.name(row, fact) for row in rows] for fact in FACTS}
    shared = [f"{fact.lower()} {values[0]}" for fact, values in facts.items() if len(set(values)) == 1 and values[0]]
    varying = [fact for fact, values in facts.items() if len(set(values)) > 1]
    lines = []
    for k in table.topk():
        columns = {f"{metric}@{k}": f"{metric}{_arrow(metric)}" for metric in METRICS_AT_K}
        if not any(table.cell(row, column) for row in rows for column in columns):
            continue
        columns["NotInRatio"] = f"NotInRatio{_arrow('NotInRatio')}"
        tests = tested.at_k.get(k, {})
        body = [
            [
                *(
                    _figure(table.cell(row, column)) + _dagger(tests, table.name(row, "Model"), column)
                    for column in columns
                ),
                *(table.name(row, fact) or "-" for fact in varying),
            ]
            for row in rows
        ]
        lines += ["", ", ".join([f"{dataset}, the first {k} titles", *shared])]
        lines += _with_names(table, rows, [*columns.values(), *varying], body)
        lines += _uncertainty_and_tail(table, rows, k)
        lines += ["", *(test.in_words(name, tested.reference) for name, test in tests.items())] if tests else []
    lines += ["", "↑ more is better, ↓ less is better"]
    if tested.at_k:
        lines.append(
            f"† differs from {tested.reference}: p < 0.05 after Holm's correction over the rows (NDCG: permutation "
            "test, HR: McNemar's exact test, or the permutation test where records share a user)"
        )
    return [*lines, *(f"note: {note}" for note in tested.notes)]


def _uncertainty_and_tail(table: ResultsTable, rows: list[list[str]], k: int) -> list[str]:
    """Returns a second block: 95 % intervals or deviations over seeds of the accuracy, and the figures of the tail."""
    spreads = [metric for metric in ("NDCG", "HR") if any(_spread(table, row, f"{metric}@{k}") != "-" for row in rows)]
    tail = [name for name in TAIL_METRICS_AT_K if any(table.cell(row, f"{name}@{k}") for row in rows)]
    if not spreads and not tail:
        return []
    body = [
        [
            *(_spread(table, row, f"{metric}@{k}") for metric in spreads),
            *(_figure(table.cell(row, f"{name}@{k}")) for name in tail),
        ]
        for row in rows
    ]
    header = [*(f"{metric}, 95 %" for metric in spreads), *(f"{name}{_arrow(name)}" for name in tail)]
    return ["", *_with_names(table, rows, header, body)]


def _spread(table: ResultsTable, row: list[str], figure: str) -> str:
    """Returns the interval of a figure, or its deviation over seeds; `-` where there is neither."""
    low, high, deviation = (table.number(row, f"{figure}_{end}") for end in ("low", "high", "std"))
    if low is not None and high is not None:
        return f"{low:.4f} to {high:.4f}"
    return f"± {deviation:.4f} (seeds)" if deviation is not None else "-"


def _dagger(tests: Mapping[str, PairedTest], name: str, column: str) -> str:
    """Returns what stands behind a figure: a dagger, or a blank that keeps the digits of a tested column in line."""
    if not tests:
        return ""
    metric = column.split("@")[0]
    differs = name in tests and {"NDCG": tests[name].ndcg_differs, "HR": tests[name].hr_differs}.get(metric, False)
    return "†" if differs else " " if metric in ("NDCG", "HR") else ""


def _with_names(table: ResultsTable, rows: list[list[str]], header: list[str], body: list[list[str]]) -> list[str]:
    """Returns a block of the table, with the methods' names in front."""
    names = [[table.name(row, "Model")] for row in rows]
    return _aligned([["Model", *header], *([*name, *cells] for name, cells in zip(names, body, strict=True))])


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
    """Returns the line as standard output can show it: with + and - for arrows and * for daggers where it has none."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        "↑↓†".encode(encoding)
    except UnicodeEncodeError:
        line = line.replace("↑", "+").replace("↓", "-").replace("†", "*")
    return line.encode(encoding, "replace").decode(encoding)


def main() -> None:
    parser = OneLineParser(
        prog="python -m cebs.results", description="Prints the table of a results CSV, or makes one of several seeds."
    )
    parser.add_argument("results_csv", nargs="+", help="the CSV that evaluate.py writes; with --aggregate, several")
    parser.add_argument("--dataset", help="only the rows of this data set")
    parser.add_argument("--reference", help=f"the row that others are tested against; left out, {DEFAULT_REFERENCE}")
    parser.add_argument("--aggregate", metavar="OUT", help="write means over the CSVs, one a seed, to this CSV")
    with errors_in_one_line("cebs.results"):
        arguments = parser.parse_args()
        path = arguments.aggregate or arguments.results_csv[0]
        notices = aggregate_seeds(arguments.results_csv, path) if arguments.aggregate else []
        if not arguments.aggregate and len(arguments.results_csv) > 1:
            raise InputError("give one CSV, or --aggregate OUT.csv to make one of several")
        print_results(path, arguments.dataset, arguments.reference)
        print(*(f"note: {notice}" for notice in notices), sep="\n", end="\n" if notices else "")


if __name__ == "__main__":
    main()
