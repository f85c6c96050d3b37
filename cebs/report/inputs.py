"""What a report is made from: the rows of the CSV, and what lies beside it.

A row alone gives the tables. Files per user (`cebs.per_user`) add tests, genre shares and exposure; the logs of the
training runs add learning curves; the `run.json` of the negatives' runs adds rounds of candidates. What is not there
is left out, with a note that says so.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cebs.catalogue import CATALOGUE_FILES, exposure_counts, load_catalogue
from cebs.errors import InputError
from cebs.files import read_json, read_list, sha256
from cebs.metrics import genre_shares, genre_weights, recommendation_counts
from cebs.per_user import check_same_records, find_per_user, mean_over_seeds
from cebs.prompts import quoted_titles, read_records
from cebs.results import FACTS, ReferenceTests, ResultsTable, check_agreement, compare_with_reference
from cebs.runs import recorded_runs
from cebs.statistics import PairedTest

BASELINES = ("random", "popularity", "itemknn", "sasrec")  # first in every table, in this order
CANDIDATES_SCRIPT = "dataset_generate_cluster_batch.py"
SPLITS = ("train", "valid")


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure of a row, with its interval and its standard deviation over seeds where the CSV has them."""

    value: float
    low: float | None
    high: float | None
    std: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass
class Method:
    """A row of the CSV and what belongs to it.

    Args:
        number (`int`): its number in the tables and plots, from 1.
        name (`str`): the method's name.
        is_baseline (`bool`): a method without a language model; these come first.
        estimates (`dict[str, Estimate]`): by column of the CSV, `NDCG@10` for example.
        facts (`dict[str, str]`): what the row rests on: Users, Encoder, Protocol, Seeds, Notes.
        per_user (`list[dict]`): the content of its file per user, one for each seed.
        test (`PairedTest`, *optional*): the row against the reference.
        logs (`list[list[dict]]`): the training log of each seed.
    """

    number: int
    name: str
    is_baseline: bool
    estimates: dict[str, Estimate]
    facts: dict[str, str]
    per_user: list[dict[str, Any]] = field(default_factory=list)
    test: PairedTest | None = None
    logs: list[list[dict[str, Any]]] = field(default_factory=list)

    def value(self, column: str) -> float:
        """Returns a figure; NaN where the row has none."""
        return self.estimates[column].value if column in self.estimates else math.nan

    @property
    def run_dirs(self) -> list[Path]:
        """The folders of the runs that made its predictions, `<run>/predictions/`."""
        folders = [Path(content["predictions"]["file"]).parent for content in self.per_user]
        return [folder.parent for folder in folders if folder.name == "predictions"]


def read_methods(table: ResultsTable, dataset: str) -> list[Method]:
    """Returns the rows of a data set: baselines first, then the others in the order of the CSV."""
    rows: dict[str, list[str]] = {}
    for row in table.dataset_rows(dataset):
        rows.setdefault(table.name(row, "Model"), row)  # of two rows of a name the first counts
    names = sorted(filter(None, rows), key=_baseline_place)
    return [
        Method(
            number,
            name,
            is_baseline=_baseline_place(name) < len(BASELINES),
            estimates=_estimates(table, rows[name]),
            facts={fact: table.name(rows[name], fact) for fact in (*FACTS, "Seeds", "Notes")},
        )
        for number, name in enumerate(names, start=1)
    ]


def _baseline_place(name: str) -> int:
    plain = re.sub(r"[^a-z0-9]", "", re.split(r"[(,]", name.lower())[0])  # what is added behind the name does not count
    return BASELINES.index(plain) if plain in BASELINES else len(BASELINES)


def _estimates(table: ResultsTable, row: list[str]) -> dict[str, Estimate]:
    figures = {column: table.number(row, column) for column in table.header}
    return {
        column: Estimate(figure, *(figures.get(f"{column}_{end}") for end in ("low", "high", "std")))
        for column, figure in figures.items()
        if figure is not None
    }


def read_per_user_files(methods: Sequence[Method], table: ResultsTable, results_csv: Path, dataset: str) -> list[str]:
    """Gives each method its files per user, where they agree with the CSV; returns notes on those that do not."""
    notes = []
    for method in methods:
        contents = find_per_user(results_csv, dataset, method.name)
        for content in contents:
            _check_origin(content)
        try:
            if contents:
                check_agreement(table, table.method_rows(dataset, method.name)[0], mean_over_seeds(contents))
                method.per_user = contents
        except InputError as error:
            notes.append(f"{error}.")
    without = [method for method in methods if not method.per_user]
    if without:
        notes.append(
            f"No files per user that belong to the row were found for {named(without)}: not tested, and not in the "
            "plots of genres and exposure."
        )
    return notes


def _check_origin(content: dict[str, Any]) -> None:
    place = f"the file per user of {content['dataset']}, {content['method']}"
    predictions = content.get("predictions")
    file = predictions.get("file") if isinstance(predictions, dict) else None
    if not isinstance(content.get("data_dir"), str) or not isinstance(file, str):
        raise InputError(f"{place}: does not say where it comes from (data_dir, predictions); evaluate again")
    for index, user in enumerate(content["users"]):
        titles = user.get("recommended")
        if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
            raise InputError(f"{place}: user {index}: 'recommended' must be a list of titles; evaluate again")


def attach_tests(
    methods: Sequence[Method], table: ResultsTable, results_csv: Path, dataset: str, reference: str, k: int
) -> ReferenceTests:
    """Gives each method its test against the reference, and returns all that was tested.

    Rows by another encoder than the reference's, or without figures at k, are no part of the tests.
    """
    encoder = next((method.facts["Encoder"] for method in methods if method.name == reference), "")
    comparable = {method.name for method in comparable_methods(methods, encoder) if f"NDCG@{k}" in method.estimates}
    rows = [row for row in table.dataset_rows(dataset) if table.name(row, "Model") in comparable]
    tested = compare_with_reference(results_csv, replace(table, rows=rows), dataset, reference)
    for method in methods:
        method.test = tested.at_k.get(k, {}).get(method.name)
    return tested


def comparable_methods(methods: Sequence[Method], encoder: str) -> list[Method]:
    """Returns the methods whose figures can be compared with those by an encoder; a ranking needs no encoder."""
    return [method for method in methods if not encoder or method.facts["Encoder"] in (encoder, "")]


def named(methods: Sequence[Method]) -> str:
    """Returns methods as a sentence has them, with their numbers, since names may hold commas: `a (1) and b (2)`."""
    *others, last = [f"{method.name} ({method.number})" for method in methods]
    return f"{', '.join(others)} and {last}" if others else last


# ---------------------------------------------------------------------------------------------------------------------
# Genres and exposure
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommendations:
    """The recommendations of each method, against the histories and the training records.

    Args:
        genres (`list[str]`): the G genres counted.
        history (`np.ndarray` of shape `[G]`): genre shares of the histories (H); NaN where they are not known.
        shares (`dict[int, np.ndarray]`): genre shares of the recommendations (P, `[G]`), by the method's number.
        exposure (`np.ndarray` of shape `[M]`): how often each title occurs in the training records.
        counts (`dict[int, np.ndarray]`): how often each title is recommended (`[M]`), by the method's number.
    """

    genres: list[str]
    history: np.ndarray
    shares: dict[int, np.ndarray]
    exposure: np.ndarray
    counts: dict[int, np.ndarray]


def data_files(data_dir: Path) -> list[Path]:
    """Returns the files of a data folder that `read_recommendations` reads."""
    return [data_dir / name for name in ("train_sample.json", *CATALOGUE_FILES)]


def find_predictions(methods: Sequence[Method]) -> tuple[Path, dict[str, Any]] | None:
    """Returns the first predictions that are still what was evaluated, and the content of their file per user."""
    for content in (content for method in methods for content in method.per_user):
        path = Path(content["predictions"]["file"])
        if path.is_file() and sha256(path) == content["predictions"].get("sha256"):
            return path, content
    return None


def read_recommendations(
    methods: Sequence[Method], data_dir: Path, predictions: tuple[Path, dict[str, Any]] | None, k: int
) -> tuple[Recommendations | None, list[str]]:
    """Counts titles and genres as `evaluate.py` does.

    Recommendations count where the record's target is in the catalogue, over all seeds of a method; histories are
    those of all prompts, which are the same for every method.

    Args:
        methods: those with files per user are counted.
        data_dir: the data folder that was evaluated on.
        predictions: where the prompts are, see `find_predictions`.
        k: how many titles are recommended.

    Returns:
        The recommendations (`None` where there is nothing to count), and notes on what is not among them.
    """
    catalogue = load_catalogue(data_dir)
    ids = {title: index for index, title in enumerate(catalogue.titles)}
    weights = genre_weights(map(catalogue.genres_of, catalogue.titles), catalogue.counted_genres)  # [M, G]
    exposed = exposure_counts(read_records(data_dir / "train_sample.json"))
    history: Counter[str] = Counter()
    notes = []
    if predictions:
        for record in read_list(predictions[0], ["prompt"]):
            history.update(quoted_titles(record["prompt"]))
    else:
        notes.append("Genres are not shown: no predictions, whose prompts hold the histories, are where they were.")
    counts: dict[int, np.ndarray] = {}
    for method in methods:
        users = [user for content in method.per_user for user in content["users"]]
        if not all(title in ids for user in users for title in user["recommended"]):
            notes.append(f"{method.name} recommends titles that are not in {data_dir}: not in these plots.")
            continue
        if predictions and any(_other_records(predictions[1], content) for content in method.per_user):
            notes.append(f"{method.name} was evaluated on other test records than the rest: not in these plots.")
            continue
        recommended = [ids[title] for user in users if user["target"] in ids for title in user["recommended"][:k]]
        if recommended:
            counts[method.number] = recommendation_counts(np.array(recommended), len(ids))
    if not counts:
        return None, notes
    return Recommendations(
        genres=catalogue.counted_genres,
        history=genre_shares(np.array([history[title] for title in catalogue.titles]), weights),
        shares={number: genre_shares(count, weights) for number, count in counts.items()},
        exposure=np.array([exposed[title] for title in catalogue.titles]),
        counts=counts,
    ), notes


def _other_records(one: dict[str, Any], other: dict[str, Any]) -> bool:
    try:
        check_same_records(one, other)
    except InputError:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Training runs
# ---------------------------------------------------------------------------------------------------------------------


def training_log(run_dir: Path) -> Path | None:
    """Returns the file with the training log of a run: its own, or that of the last checkpoint."""
    checkpoints = sorted(run_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: _step(path.parent.name))
    files = [*checkpoints, run_dir / "training_log.json"]
    return next((path for path in reversed(files) if path.is_file()), None)


def _step(checkpoint: str) -> int:
    step = checkpoint.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def read_training_log(path: Path) -> list[dict[str, Any]]:
    """Reads the `log_history` of a training run.

    Raises:
        `InputError`: if the file has another form.
    """
    log = read_json(path, finite=False)
    if path.name != "training_log.json":
        log = log.get("log_history") if isinstance(log, dict) else None
        if not isinstance(log, list):
            raise InputError(f"{path}: has no list 'log_history'; remove the checkpoint, which was cut short")
    if not isinstance(log, list):
        raise InputError(f"{path}: expected a JSON list; train again")
    for index, entry in enumerate(log):
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise InputError(f"{path}: record {index}: 'step' must be a whole number; train again")
    return log


def curve(log: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one quantity of a training log: `curve(log, "rewards/margins")`."""
    points = [
        (entry["step"], entry[name])
        for entry in log
        if type(entry.get(name)) in (int, float) and math.isfinite(entry[name])
    ]
    return [step for step, _ in points], [value for _, value in points]


# ---------------------------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateRun:
    """How many rounds of candidates the records of a split needed.

    Args:
        path (`Path`): the `run.json`.
        name (`str`): folder of the run, from the folder of the CSV on.
        split (`str`): train or valid.
        per_round (`int`): candidates of one round.
        rounds (`dict[int, int]`): records by the number of rounds.
        without_match (`int`): records that had none inside the cluster after the last round.
    """

    path: Path
    name: str
    split: str
    per_round: int
    rounds: dict[int, int]
    without_match: int

    @property
    def records(self) -> int:
        return sum(self.rounds.values())

    @property
    def candidates_per_record(self) -> float:
        """The mean number of candidates."""
        return sum(number * records for number, records in self.rounds.items()) * self.per_round / self.records


def find_candidate_runs(folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the finished runs that made candidates, by their `run.json`, anywhere below a folder."""
    found = {}
    for path in sorted(folder.rglob("run.json")):
        try:
            run = recorded_runs(path.parent).get(CANDIDATES_SCRIPT)
        except InputError:  # of another program
            continue
        if run is not None and run["state"] == "done" and not run["arguments"].get("candidates"):
            found[path] = run
    return found


def read_candidate_runs(runs: dict[Path, dict[str, Any]], folder: Path, data_names: set[str]) -> list[CandidateRun]:
    """Returns the rounds of the runs whose data folder has one of these names (in lower case).

    Raises:
        `InputError`: naming the `run.json` that does not count rounds.
    """
    found = []
    for path, run in runs.items():
        try:
            if Path(run["arguments"]["data_dir"]).name.casefold() not in data_names:
                continue
            for split in SPLITS:
                counts = run["counts"][split]
                found.append(
                    CandidateRun(
                        path=path,
                        name=str(path.parent.relative_to(folder)),
                        split=split,
                        per_round=int(run["arguments"]["num_candidates"]),
                        rounds={int(number): int(records) for number, records in counts["rounds"].items()},
                        without_match=int(counts["records"]) - int(counts["with_match"]),
                    )
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: does not count rounds as {CANDIDATES_SCRIPT} does ({error!r})") from error
    return [run for run in found if run.records]


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """All that is known of one data set.

    Args:
        dataset (`str`): the name in the CSV.
        methods (`list[Method]`): the rows.
        tested (`ReferenceTests`): the rows against the reference.
        recommendations (`Recommendations`, *optional*): genres and exposure.
        candidates (`list[CandidateRun]`): rounds of candidates.
        notes (`list[str]`): what is left out, and why.
        inputs (`list[Path]`): the files that were read.
    """

    dataset: str
    methods: list[Method]
    tested: ReferenceTests
    recommendations: Recommendations | None
    candidates: list[CandidateRun]
    notes: list[str]
    inputs: list[Path]


def read_material(results_csv: Path, table: ResultsTable, dataset: str, reference: str, k: int) -> Material:
    """Reads what there is of a data set, and notes what there is not."""
    folder = results_csv.parent
    methods = read_methods(table, dataset)
    notes = read_per_user_files(methods, table, results_csv, dataset)
    tested = attach_tests(methods, table, results_csv, dataset, reference, k)
    inputs = sorted([*folder.glob("per_user/*/*.json"), *folder.glob("seed_*/per_user/*/*.json")])

    recommendations = None
    data_dirs = list(dict.fromkeys(Path(content["data_dir"]) for method in methods for content in method.per_user))
    data_dir = next((path for path in data_dirs if all(file.is_file() for file in data_files(path))), None)
    if data_dir:
        predictions = find_predictions(methods)
        recommendations, more_notes = read_recommendations(methods, data_dir, predictions, k)
        notes += more_notes
        inputs += [*data_files(data_dir), *([predictions[0]] if predictions else [])]
    elif data_dirs:
        notes.append(f"Genres and exposure are not shown: the data folder {data_dirs[0]} is not there.")

    for method in methods:
        files = list(filter(None, map(training_log, method.run_dirs)))
        method.logs = [read_training_log(file) for file in files]
        inputs += files
    without = [method for method in methods if not method.logs and not method.is_baseline]
    if without:
        notes.append(f"No training logs were found for {named(without)}.")

    data_names = {dataset.casefold(), *(path.name.casefold() for path in data_dirs)}
    candidates = read_candidate_runs(find_candidate_runs(folder), folder, data_names)
    inputs += [run.path for run in candidates]
    if not candidates:
        notes.append(f"No finished run of {CANDIDATES_SCRIPT} on this data was found below {folder}.")
    return Material(dataset, methods, tested, recommendations, candidates, notes, list(dict.fromkeys(inputs)))
