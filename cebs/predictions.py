"""Prediction records: what stage 4 writes and `evaluate.py` reads."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cebs.errors import InputError
from cebs.files import read_list, write_json
from cebs.prompts import Record, read_user
from cebs.runs import Run, recorded_runs, require_done

PREDICTING = ("generate_predict_batch.py", "predict_baselines.py", "fuse_predictions.py")
PREDICTION_FILES = "predictions/raw_results_*.json"  # in a run folder; the star is the number of records


def check_histories(path: Path, records: Iterable[Record], titles: Iterable[str]) -> None:
    """Checks that a title is left to recommend to each record where those of its history are left out.

    Raises:
        `InputError`: naming the first record whose history is the whole catalogue.
    """
    catalogue = set(titles)
    for index, record in enumerate(records):
        if catalogue.issubset(record.history):
            raise InputError(f"{path}: record {index}: its history is the whole catalogue; nothing is left")


def prediction_record(record: Record, prediction: str, ranking: list[str] | None = None) -> dict[str, Any]:
    """Returns what is written for a record; `user` and `ranking` only where there are any."""
    return (
        {"prompt": record.prompt, "prediction": prediction, "ground_truth": record.target}
        | ({"user": record.user} if record.user else {})
        | ({"ranking": ranking} if ranking is not None else {})
    )


def write_predictions(run: Run, results: Sequence[dict[str, Any]]) -> None:
    """Writes what a run predicted, to a file whose name has the number of records."""
    write_json(run.path / PREDICTION_FILES.replace("*", str(len(results))), results)


def find_predictions(path: str) -> Path:
    """Returns the file of predictions: the path itself, or the one file in the folder that it names.

    Raises:
        `InputError`: if the folder has no file of predictions, or several.
    """
    if not Path(path).is_dir():
        return Path(path)
    files = sorted(Path(path).glob(Path(PREDICTION_FILES).name))
    if not files:
        raise InputError(f"{path}: no raw_results_*.json in this folder; generate_predict_batch.py writes one")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{path}: holds {len(files)} files of predictions ({names}); give the path of one")
    return files[0]


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Reads prediction records; `user` is empty where a record does not say whose it is.

    Raises:
        `InputError`: if the run that writes them is not finished; naming the first record that lacks a key or holds
            something else than text.
    """
    require_done(path, *PREDICTING)
    keys = ("prompt", "prediction", "ground_truth")
    records = read_list(path, keys)
    for index, record in enumerate(records):
        for key in keys:
            if not isinstance(record[key], str):
                raise InputError(f"{path}: record {index}: {key!r} must be text, not {type(record[key]).__name__}")
        record["user"] = read_user(record, f"{path}: record {index}")
    return records


def read_rankings(
    path: Path, records: list[dict[str, Any]], ids: dict[str, int], excluded: Sequence[set[int]], k: int
) -> dict[int, list[int]]:
    """Returns the first k title ids of each record that has a ranking, without those excluded, by the record's place.

    Raises:
        `InputError`: naming the record whose ranking is too short, or holds a title twice or one not in the catalogue.
    """
    rankings = {}
    for index, record in enumerate(records):
        if "ranking" not in record:
            continue
        ranking = _ranking(record, f"{path}: record {index}")
        for title in ranking:
            if title not in ids:
                raise InputError(f"{path}: record {index}: {title!r} of its ranking is not in the catalogue")
        left = [ids[title] for title in ranking if ids[title] not in excluded[index]]
        if len(left) < min(k, len(ids) - len(excluded[index])):
            which = " that are not in its history" if excluded[index] else ""
            raise InputError(
                f"{path}: record {index}: its ranking has {len(left)} titles{which}, fewer than --topk {k}; "
                "rank more titles or give a smaller --topk"
            )
        rankings[index] = left[:k]
    return rankings


def _ranking(record: dict[str, Any], place: str) -> list[str]:
    ranking = record.get("ranking")
    if not isinstance(ranking, list) or not all(isinstance(title, str) for title in ranking):
        raise InputError(f"{place}: 'ranking' must be a list of titles")
    if len(set(ranking)) < len(ranking):
        twice = Counter(ranking).most_common(1)[0][0]
        raise InputError(f"{place}: its ranking has {twice!r} more than once; keep the first")
    return ranking


def rankings_of_same_records(
    files: Sequence[Path], records: Sequence[Sequence[dict[str, Any]]]
) -> list[list[list[str]]]:
    """Returns for each record its rankings, one of each file.

    Args:
        files: whose records they are, for what is said of them.
        records: of each file.

    Raises:
        `InputError`: naming the first record that has no ranking, or another prompt than in the first file.
    """
    for file, of_file in zip(files, records, strict=True):
        if len(of_file) != len(records[0]):
            raise InputError(f"{file}: has {len(of_file)} records, {files[0]} has {len(records[0])}; predict as many")
        for index, (record, first) in enumerate(zip(of_file, records[0], strict=True)):
            if not _ranking(record, f"{file}: record {index}"):
                raise InputError(f"{file}: record {index}: its ranking is empty; predict again")
            if record["prompt"] != first["prompt"]:
                raise InputError(
                    f"{file}: record {index}: has another prompt than in {files[0]}; predict the same records"
                )
    return [[record["ranking"] for record in same] for same in zip(*records, strict=True)]


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], rank_constant: int) -> list[str]:
    """Returns all titles of some rankings in one order: by the sum of `1 / (rank_constant + rank)`, ranks from 1.

    Ties go to the title met first, in the rankings as they are given. Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, title in enumerate(ranking, 1):
            scores[title] = scores.get(title, 0.0) + 1 / (rank_constant + rank)
    return sorted(scores, key=lambda title: -scores[title])


def ranked_without_history(predictions_file: Path) -> bool:
    """Says whether the run that wrote the rankings left each record's history out, as its `run.json` tells."""
    runs = recorded_runs(predictions_file.absolute().parent.parent)
    return any(runs[script]["arguments"].get("exclude_history", False) for script in PREDICTING if script in runs)
