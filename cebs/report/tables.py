"""The tables of a report, and the sentences that say what they rest on and what can be seen in them."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cebs.errors import InputError
from cebs.files import read_text
from cebs.metrics import EXPOSURE_GROUPS, HIGHER_IS_BETTER
from cebs.report.inputs import Estimate, Material, Method, comparable_methods, named

# Tables of figures: file, title, and the metrics that are its columns
FIGURE_TABLES = (
    ("accuracy", "Accuracy", ("NDCG", "HR")),
    ("diversity", "Diversity and concentration", ("Diversity", "DivRatio", "Coverage", "ORRatio", "Gini")),
    ("genres", "Genre fairness and validity", ("DGU", "MGU", "NotInRatio")),
    ("exposure-ndcg", "NDCG by the target's exposure", tuple(f"NDCG_{group}" for group in EXPOSURE_GROUPS)),
    ("exposure-hr", "HR by the target's exposure", tuple(f"HR_{group}" for group in EXPOSURE_GROUPS)),
)
PROTOCOLS = {
    "grounded": "grounded (the k titles of the catalogue nearest to the predicted title, by the sentence encoder)",
    "ranked": "ranked (the method's own ranking of the catalogue, without an encoder)",
    "mixed": "mixed (some records grounded, some with a ranking of their own)",
}
NO_HISTORY = ", no history"  # behind a protocol


# ---------------------------------------------------------------------------------------------------------------------
# A table, before it is HTML, Markdown or LaTeX
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell: text, the ends of an interval behind it, and whether it differs significantly from the reference."""

    text: str
    interval: tuple[str, str] | None = None
    differs: bool = False


@dataclass(frozen=True)
class Column:
    """A column: its name, which way is better (`up`, `down`, or empty), and whether it holds numbers."""

    name: str
    better: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name (`str`): of its file.
        title (`str`): its caption.
        columns (`list[Column]`): what stands above.
        rows (`list[list[Cell]]`): a row for each method, as long as `columns`.
        notes (`list[str]`): sentences below it.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


NOTHING = Cell("–")
METHOD_COLUMNS = [Column("#"), Column("Method", is_number=False)]


def make_tables(material: Material, k: int) -> list[Table]:
    """Returns the tables of a data set at k; a column or a table without any figure is left out."""
    tables = []
    for name, title, metrics in FIGURE_TABLES:
        columns = {metric if metric == "NotInRatio" else f"{metric}@{k}": metric for metric in metrics}
        present = {
            column: metric
            for column, metric in columns.items()
            if any(column in method.estimates for method in material.methods)
        }
        if present:
            tables.append(_figure_table(material, name, f"{title}, k = {k}", present))
    return [*tables, _basis_table(material.methods)]


def _figure_table(material: Material, name: str, title: str, columns: dict[str, str]) -> Table:
    methods, is_accuracy = material.methods, name == "accuracy"
    with_tests = is_accuracy and any(method.test for method in methods)
    header = [Column(column, "up" if HIGHER_IS_BETTER[metric] else "down") for column, metric in columns.items()]
    rows = []
    for method in methods:
        differs = {"NDCG": method.test.ndcg_differs, "HR": method.test.hr_differs} if method.test else {}
        rows.append(
            [
                *_method_cells(method),
                *(
                    _figure_cell(method.estimates.get(column), metric, is_accuracy and differs.get(metric, False))
                    for column, metric in columns.items()
                ),
                *(_p_cells(method) if with_tests else []),
            ]
        )
    notes = [*_figure_notes(methods, columns), *(_test_notes(material) if is_accuracy else [])]
    tests = [Column("p, NDCG"), Column("p, HR")] if with_tests else []
    return Table(name, title, [*METHOD_COLUMNS, *header, *tests], rows, notes)


def _method_cells(method: Method) -> list[Cell]:
    return [Cell(str(method.number)), Cell(method.name)]


def _figure_cell(estimate: Estimate | None, metric: str, differs: bool) -> Cell:
    if estimate is None:
        return NOTHING
    figure, deviation = ("{:,.0f}", "{:,.1f}") if metric == "Diversity" else ("{:.4f}", "{:.4f}")
    text = figure.format(estimate.value)
    if estimate.std is not None:
        text += f" ± {deviation.format(estimate.std)}"
    return Cell(text, estimate.interval and tuple(map(figure.format, estimate.interval)), differs)


def _p_cells(method: Method) -> list[Cell]:
    if method.test is None:
        return [NOTHING, NOTHING]
    return [Cell("< 0.001" if p < 0.001 else f"{p:.3f}") for p in (method.test.ndcg_p, method.test.hr_p)]


def _figure_notes(methods: Sequence[Method], columns: Iterable[str]) -> list[str]:
    estimates = [method.estimates[column] for method in methods for column in columns if column in method.estimates]
    notes = []
    if any(estimate.interval for estimate in estimates):
        notes.append("In brackets: the 95 % interval, from a bootstrap over users.")
    else:
        notes.append("The CSV has no intervals for these figures.")
    if any(estimate.std is not None for estimate in estimates):
        notes.append("Behind ±: the standard deviation over seeds.")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# What the tests show
# ---------------------------------------------------------------------------------------------------------------------


def _test_notes(material: Material) -> list[str]:
    methods, reference = material.methods, material.tested.reference
    own = next((method for method in methods if method.name == reference), None)
    if own is None:
        return [f"There is no row {reference} to test the others against; --reference names another row."]
    tested = [method for method in methods if method.test]
    other_encoder = [method for method in methods if method not in comparable_methods(methods, own.facts["Encoder"])]
    notes = []
    if tested:
        notes += [
            f"A dagger marks what differs significantly from {reference} ({own.number}), the reference. NDCG is tested "
            "by a permutation test on users, HR by McNemar's exact test (by the permutation test where records share a "
            "user, or over seeds); p-values are two-sided, after Holm's correction over "
            f"{len(tested)} row{'s' if len(tested) > 1 else ''}, and significant below 0.05.",
            _outcome(
                "NDCG", [(method, method.test.ndcg_difference, method.test.ndcg_differs) for method in tested], own
            ),
            _outcome("HR", [(method, method.test.hr_difference, method.test.hr_differs) for method in tested], own),
            _sensitivity(tested),
        ]
        other_protocol = [method for method in tested if method.facts["Protocol"] != own.facts["Protocol"]]
        if other_protocol:
            notes.append(
                f"Of another protocol than {reference}, so that a difference may come from the protocol: "
                f"{named(other_protocol)}."
            )
    else:
        notes.append(f"No row could be tested against {reference}.")
    left = [method for method in methods if method.per_user and not method.test and method not in (own, *other_encoder)]
    if left and own.per_user:
        notes.append(f"Not tested, for they were not evaluated on the same records as {reference}: {named(left)}.")
    if other_encoder:
        notes.append(f"Not tested, for another encoder than that of {reference} was used: {named(other_encoder)}.")
    return notes


def _outcome(metric: str, found: Sequence[tuple[Method, float, bool]], reference: Method) -> str:
    users = f"{found[0][0].test.num_users:,}"
    higher = [method for method, difference, differs in found if differs and difference > 0]
    lower = [method for method, difference, differs in found if differs and difference < 0]
    unseen = len(found) - len(higher) - len(lower)
    if not higher and not lower:
        return f"{metric}: no difference from {reference.name} can be seen with this many users ({users})."
    words = [
        f"{word} than {reference.name} in {named(some)}"
        for word, some in (("higher", higher), ("lower", lower))
        if some
    ]
    rest = f"; for the other {unseen} no difference can be seen with this many users ({users})" if unseen else ""
    return f"{metric}: {'; '.join(words)}{rest}."


def _sensitivity(tested: Sequence[Method]) -> str:
    smallest = [method.test.smallest_hr_difference for method in tested]
    if math.isinf(min(smallest)):
        return "With this many users no difference in HR, however large, would have been shown."
    low, high = f"{min(smallest):.4f}", f"{max(smallest):.4f}"
    span = low if low == high else f"{low} to {high if math.isfinite(max(smallest)) else 'none at all'}, by the row"
    return f"The smallest difference in HR that this test set would have shown in 80 of 100 cases: {span}."


# ---------------------------------------------------------------------------------------------------------------------
# What rows rest on
# ---------------------------------------------------------------------------------------------------------------------


def _basis_table(methods: Sequence[Method]) -> Table:
    rows = [
        [
            *_method_cells(method),
            *(Cell(method.facts[fact]) if method.facts[fact] else NOTHING for fact in ("Users", "Protocol", "Encoder")),
            Cell(_seeds(method)) if _seeds(method) else NOTHING,
        ]
        for method in methods
    ]
    text = [Column(name, is_number=False) for name in ("Protocol", "Encoder", "Seeds")]
    columns = [*METHOD_COLUMNS, Column("Test records"), *text]
    return Table("basis", "What each row rests on", columns, rows, _basis_notes(methods))


def _seeds(method: Method) -> str:
    """Returns the seeds of a row, or how many there were where the files per user do not tell."""
    seeds = sorted({content["seed"] for content in method.per_user if isinstance(content.get("seed"), int)})
    return ", ".join(map(str, seeds)) or (method.facts["Seeds"] and f"{method.facts['Seeds']} in number")


def _basis_notes(methods: Sequence[Method]) -> list[str]:
    notes = []
    users, encoders, protocols = (_groups(methods, fact) for fact in ("Users", "Encoder", "Protocol"))
    if len(users) == 1:
        notes.append(f"All rows are over {next(iter(users))} test records.")
    elif users:
        notes.append(
            f"The rows are over different numbers of test records ({_described(users)}): figures cannot be compared "
            "across these, counts of distinct titles least of all."
        )
    kinds = dict.fromkeys(protocol.removesuffix(NO_HISTORY) for protocol in protocols)
    meanings = "; ".join(PROTOCOLS[kind] for kind in kinds if kind in PROTOCOLS)
    if len(protocols) == 1:
        notes.append(f"The protocol of all rows is {meanings or next(iter(protocols))}.")
    elif protocols:
        notes.append(f"The protocols differ: {meanings}.")
    without_history = [method for method in methods if method.facts["Protocol"].endswith(NO_HISTORY)]
    if without_history:
        notes.append(
            f"Titles of the record's history were left out of the recommendations of {named(without_history)}"
            f"{'' if len(without_history) == len(methods) else ', and not of the others'}."
        )
    if len(encoders) == 1:
        notes.append(f"The encoder of every grounded row is {next(iter(encoders))}.")
    elif encoders:
        notes.append(
            f"Rows by different encoders cannot be compared with each other ({_described(encoders)}), for the encoder "
            "decides which titles are recommended."
        )
    unknown = [method for method in methods if not method.facts["Users"] and not method.facts["Protocol"]]
    if unknown:
        notes.append(f"The CSV does not say what these rest on: {named(unknown)}.")
    of_one_seed = [method for method in methods if len(method.per_user) == 1]
    if of_one_seed:
        which = "Every row" if len(of_one_seed) == len(methods) else f"Each of {named(of_one_seed)}"
        notes.append(f"{which} is of one seed: how much another would change is not known.")
    notes += [
        f"{method.name} ({method.number}): {method.facts['Notes']}." for method in methods if method.facts["Notes"]
    ]
    return notes


def _groups(methods: Sequence[Method], fact: str) -> dict[str, list[Method]]:
    groups: dict[str, list[Method]] = {}
    for method in methods:
        if method.facts[fact]:
            groups.setdefault(method.facts[fact], []).append(method)
    return groups


def _described(groups: dict[str, list[Method]]) -> str:
    return "; ".join(f"{value}: {named(methods)}" for value, methods in groups.items())


# ---------------------------------------------------------------------------------------------------------------------
# Published figures
# ---------------------------------------------------------------------------------------------------------------------


def published_table(path: str | Path) -> Table:
    """Returns a CSV of published figures as a table, cell by cell.

    Raises:
        `InputError`: if it cannot be read, or has no column Model.
    """
    text = read_text(path, missing="give --published a CSV with a column Model")
    try:
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path}: cannot be read as CSV: {' '.join(str(error).split())}; mend the file") from error
    if "Model" not in frame.columns:
        raise InputError(f"{path}: has no column Model; give --published a CSV with one row a method")
    arrows = {True: "up", False: "down", None: ""}
    is_better = [HIGHER_IS_BETTER.get(column.split("@")[0]) for column in frame.columns]
    columns = [
        Column(column, arrows[higher], is_number=higher is not None)
        for column, higher in zip(frame.columns, is_better, strict=True)
    ]
    rows = [[Cell(value.strip()) if value.strip() else NOTHING for value in row] for row in frame.to_numpy()]
    notes = [
        "As published, not measured here. These are to be set beside the figures above and cannot be compared with "
        "them: model, encoder and test set may be others, and there are no intervals."
    ]
    return Table("published", f"From {Path(path).name}", columns, rows, notes)
