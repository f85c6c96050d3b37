r"""
Stage 5: evaluation. Predictions become recommendations, and these a row in the one CSV of all methods.

A prediction stands for the k titles of the catalogue that are nearest to it by a sentence encoder (BIGRec, SPRec); a
record with a ranking of its own is taken at its word. Every figure gets a 95 % interval, and the rows of the table are
tested against one of them; what each user got is kept beside the CSV.

# The default, configs/evaluate.yaml, on the predictions of the default run
```bash
python evaluate.py
```

# Another method's predictions, in a row of its own
```bash
python evaluate.py --predictions output/sft/predictions --method SFT
```

# Another data set and encoder, and the figures as JSON too
```bash
python evaluate.py --predictions predictions.json --data_dir sampled_data/goodreads --dataset Goodreads --method SFT \
    --encoder paraphrase-MiniLM-L3-v2 --topk 5 10 20 --metrics_json output/sft/metrics.json
```

# What each user got in a file of your own, and titles of the history left out of the recommendations
```bash
python evaluate.py --per_user output/sft/users.parquet --exclude_history
```

# The table alone
```bash
python -m cebs.results output/results.csv --reference SFT
```
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cebs.catalogue import exposure_counts, load_catalogue
from cebs.files import named_by_the_user
from cebs.grounding import EMBEDDINGS_CACHE, encoder_fingerprint, ground
from cebs.metrics import (
    EXPOSURE_GROUPS,
    METRICS_AT_K,
    NOT_IN_CATALOGUE,
    NOTHING,
    TAIL_METRICS_AT_K,
    EvaluationSet,
    genre_weights,
    hit_ranks,
    hits_at,
    ndcg_at,
    record_sums,
)
from cebs.per_user import check_per_user, per_user_file, write_per_user
from cebs.predictions import find_predictions, ranked_without_history, read_predictions, read_rankings
from cebs.prompts import predicted_title, quoted_titles, read_records
from cebs.results import print_results, read_results, results_columns, update_results
from cebs.sources import find_encoder
from cebs.statistics import intervals, number_users
from utils import InputError, ScriptParser, run_script, sha256, write_json

EXPOSURE_FILE = "train_sample.json"
# why a figure is empty
NO_LIST = "no record whose target is in the catalogue has a recommendation"
NO_GENRE = "no title of the histories, or none of the recommendations, has a genre that counts"
NO_TARGET = "no target is in the catalogue"
REASONS = {
    **dict.fromkeys(("NDCG", "HR", "Diversity"), NO_TARGET),
    "DivRatio": NO_LIST,
    "ORRatio": NO_LIST,
    "Gini": NO_LIST,
    "Coverage": NO_LIST,
    "DGU": NO_GENRE,
    "MGU": NO_GENRE,
}
REASONS |= {
    f"{metric}_{group}": f"no target in the catalogue is of the {group}"
    for metric in ("NDCG", "HR")
    for group in EXPOSURE_GROUPS
}


@dataclass
class ScriptArguments:
    """
    Arguments of this stage.

    Args:
        predictions (`str`): file of predictions, or the folder that holds one `raw_results_*.json`.
        data_dir (`str`): data folder whose catalogue is recommended from.
        encoder (`str`): sentence encoder that finds the nearest titles.
        topk (`list[int]`): how many titles are recommended; a set of figures for each.
        results_csv (`str`): the one CSV of all methods.
        bootstrap (`int`): resamples of the users for the 95 % intervals; 0 for none.
        seed (`int`): seed of the bootstrap.
        exclude_history (`bool`, *optional*, defaults to `False`): leave titles of a record's history out of what is
            recommended to it.
        reference (`str`, *optional*): the method that the others in the table are tested against.
        dataset (`str`, *optional*): name of the data set in the CSV.
        method (`str`, *optional*): name of the method in the CSV.
        metrics_json (`str`, *optional*): file for the figures and where they come from.
        per_user (`str`, *optional*): file for what each record got, JSON or Parquet, besides the one beside the CSV.
        cache_dir (`str`, *optional*): folder where the catalogue's embeddings are kept.
    """

    predictions: str = field(metadata={"help": "File of predictions, or the folder that holds one raw_results_*.json."})
    data_dir: str = field(metadata={"help": "Data folder whose catalogue is recommended from."})
    encoder: str = field(metadata={"help": "Sentence encoder that finds the nearest titles: a folder or a name."})
    topk: list[int] = field(metadata={"help": "How many titles are recommended; a set of figures for each."})
    results_csv: str = field(metadata={"help": "The one CSV of all methods; the row of (dataset, method) is updated."})
    bootstrap: int = field(metadata={"help": "Resamples of the users for the 95 %% intervals; 0: no intervals."})
    seed: int = field(metadata={"help": "Seed of the bootstrap."})
    exclude_history: bool = field(
        default=False, metadata={"help": "Leave titles of a record's history out of what is recommended to it."}
    )
    reference: str | None = field(
        default=None, metadata={"help": "The method that the others in the table are tested against; left out, SFT."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Name of the data set in the CSV; left out, the data folder's."}
    )
    method: str | None = field(
        default=None,
        metadata={"help": "Name of the method in the CSV; left out, that of the run's folder, or of the file."},
    )
    metrics_json: str | None = field(
        default=None, metadata={"help": "File for the figures and where they come from, besides the CSV."}
    )
    per_user: str | None = field(
        default=None,
        metadata={
            "help": "File for what each record got, .json or .parquet, besides per_user/<dataset>/<method>.json "
            "in the CSV's folder."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the catalogue's embeddings are kept; left out, models/.embeddings."}
    )


def main(script_args: ScriptArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    topk = sorted(set(script_args.topk))
    check_arguments(script_args)
    predictions_file = find_predictions(script_args.predictions)
    dataset = script_args.dataset or Path(script_args.data_dir).resolve().name
    method = script_args.method or default_method(predictions_file)
    own_file = per_user_file(script_args.results_csv, dataset, method)
    records = read_predictions(predictions_file)
    catalogue = load_catalogue(script_args.data_dir)
    ids = {title: index for index, title in enumerate(catalogue.titles)}
    histories = [[ids[title] for title in quoted_titles(record["prompt"]) if title in ids] for record in records]
    exclude_history = script_args.exclude_history or ranked_without_history(predictions_file)
    excluded = [set(history) if exclude_history else set() for history in histories]
    rankings = read_rankings(predictions_file, records, ids, excluded, topk[-1])
    read_results(script_args.results_csv)  # complains now rather than after the encoder's work
    exposure_file = Path(script_args.data_dir) / EXPOSURE_FILE
    exposed = exposure_counts(read_records(exposure_file)) if exposure_file.is_file() else None

    # -- Recommendations ----------------------------------------------------------------------------------------------
    titles = [predicted_title(record["prediction"]) for record in records]
    grounded = [index for index in range(len(records)) if index not in rankings]
    encoder = None
    if grounded:
        encoder_dir = find_encoder(script_args.encoder)
        encoder = {"name": encoder_name(script_args.encoder), "sha256": encoder_fingerprint(encoder_dir)}
        cache_dir = Path(script_args.cache_dir) if script_args.cache_dir else EMBEDDINGS_CACHE
        depth = topk[-1] + max(len(excluded[index]) for index in grounded)
        nearest = ground([titles[index] for index in grounded], catalogue.titles, encoder_dir, depth, cache_dir)
        for index, ranking in zip(grounded, nearest.tolist(), strict=True):
            rankings[index] = [title for title in ranking if title not in excluded[index]][: topk[-1]]
    ranked = np.full((len(records), min(topk[-1], len(ids))), NOTHING)  # [N, K]
    for index, ranking in rankings.items():
        ranked[index, : len(ranking)] = ranking

    # -- Figures ------------------------------------------------------------------------------------------------------
    target_titles, targets = targets_of(records, ids)
    weights = genre_weights(map(catalogue.genres_of, catalogue.titles), catalogue.counted_genres)  # [M, G]
    evaluation_set = EvaluationSet(
        targets=targets,
        history_genres=np.stack([weights[history].sum(axis=0) for history in histories]),
        genre_weights=weights,
        exposure=None if exposed is None else np.array([exposed[title] for title in catalogue.titles]),
        target_exposure=None if exposed is None else np.array([exposed[title] for title in target_titles]),
    )
    is_invented = np.array([title not in catalogue for title in titles])
    users = number_users([record["user"] for record in records])
    figures, spans = {}, {}  # by column: the figure, and both ends of its interval
    for k in topk:
        sums = record_sums(ranked, is_invented, evaluation_set, k)
        figures |= {column_at(metric, k): figure for metric, figure in sums.figures().items()}
        if script_args.bootstrap:
            ends = intervals(sums.by_user(users), script_args.bootstrap, script_args.seed)
            spans |= {column_at(metric, k): low_and_high for metric, low_and_high in ends.items()}
    notes = explain_gaps(figures, spans)
    if exposed is None:
        notes.append(f"Coverage and accuracy by exposure: the data folder has no {EXPOSURE_FILE}")
    if (targets == NOT_IN_CATALOGUE).all():
        notes.append(f"{NO_TARGET}; do the predictions belong to {script_args.data_dir}?")

    hidden = sum(target in left_out for target, left_out in zip(targets.tolist(), excluded, strict=True))
    if hidden:
        notes.append(f"{hidden} targets stand in their record's own history, which is left out: they cannot be hit")

    # -- Output -------------------------------------------------------------------------------------------------------
    protocol = "ranked" if not grounded else "grounded" if len(grounded) == len(records) else "mixed"
    protocol += ", no history" if exclude_history else ""
    row: dict[str, str | int | float] = dict.fromkeys(results_columns(topk), math.nan) | figures
    row |= {f"{column}_low": low for column, (low, _) in spans.items()}
    row |= {f"{column}_high": high for column, (_, high) in spans.items()}
    row |= {"Dataset": dataset, "Model": method, "Users": len(records), "Encoder": encoder["name"] if encoder else ""}
    row |= {"Protocol": protocol, "Notes": "; ".join(notes)}
    origin = {
        "dataset": dataset,
        "method": method,
        "protocol": protocol,
        "predictions": {"file": str(predictions_file), "sha256": sha256(predictions_file)},
    }
    if script_args.metrics_json:
        more = {
            "intervals": spans,
            "notes": notes,
            "encoder": encoder,
            "targets_in_catalogue": int((targets != NOT_IN_CATALOGUE).sum()),
            "titles": len(ids),
            "distinct_users": int(users.max()) + 1,
            "arguments": asdict(script_args),
        }
        with named_by_the_user(script_args.metrics_json, "give another --metrics_json"):
            write_json(script_args.metrics_json, figures_by_k(figures, topk, len(records)) | origin | more)
    content = origin | {
        "encoder": row["Encoder"] or None,
        "topk": topk,
        "seed": script_args.seed,
        "data_dir": script_args.data_dir,
        "users": per_user_records(records, titles, target_titles, ranked, evaluation_set, catalogue.titles, topk),
    }
    for path in filter(None, (own_file, script_args.per_user)):
        write_per_user(path, content)
    notices = update_results(script_args.results_csv, row)
    print_results(script_args.results_csv, dataset, script_args.reference)
    for notice in (*notes, *notices):
        print(f"note: {notice}")
    print(f"written to {script_args.results_csv}: {dataset}, {method}")


def check_arguments(script_args: ScriptArguments) -> None:
    """Checks what can be checked before anything is read.

    Raises:
        `InputError`: naming the flag.
    """
    if min(script_args.topk) < 1:
        raise InputError(f"--topk: {min(script_args.topk)} is not a number of titles; give 1 or more")
    for name, value in (("bootstrap", script_args.bootstrap), ("seed", script_args.seed)):
        if value < 0:
            raise InputError(f"--{name}: {value} is below 0; give 0 or more")
    if script_args.metrics_json and Path(script_args.metrics_json).is_dir():
        raise InputError(f"{script_args.metrics_json}: is a folder; give --metrics_json a file")
    if script_args.per_user:
        check_per_user(script_args.per_user)


def column_at(metric: str, k: int) -> str:
    """Returns the column of a figure; the share of invented titles is the same at every k."""
    return metric if metric == "NotInRatio" else f"{metric}@{k}"


def default_method(predictions_file: Path) -> str:
    """Returns the name of the run: of the folder that `predictions/` lies in, or else of the file."""
    folder = predictions_file.resolve().parent
    return folder.parent.name if folder.name == "predictions" else predictions_file.stem


def encoder_name(name_or_path: str) -> str:
    """Returns the name of an encoder as the CSV has it: without the folder, or the hub's organisation, before it."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else path.name


def targets_of(records: Sequence[Mapping[str, Any]], ids: dict[str, int]) -> tuple[list[str], np.ndarray]:
    """Returns the targets' titles, which may stand in quotes as they do in a test record, and their ids.

    Returns:
        `tuple[list[str], np.ndarray]`: N titles, and `[N]` ids, -1 for a title that is not in the catalogue.
    """
    titles = []
    for record in records:
        unquoted = record["ground_truth"].strip().removeprefix('"').removesuffix('"')
        titles.append(record["ground_truth"] if record["ground_truth"] in ids else unquoted)
    return titles, np.array([ids.get(title, NOT_IN_CATALOGUE) for title in titles])


def figures_by_k(figures: Mapping[str, float], topk: Sequence[int], num_records: int) -> dict[str, Any]:
    """Returns the figures as `--metrics_json` has them: SPRec's under `@k`, those of the tail under `tail`."""
    by_k: dict[str, Any] = {}
    for k in topk:
        by_k[f"@{k}"] = {"users": num_records}
        by_k[f"@{k}"] |= {metric: figures[column_at(metric, k)] for metric in (*METRICS_AT_K, "NotInRatio")}
    tail = {
        column_at(metric, k): figures.get(column_at(metric, k), math.nan) for k in topk for metric in TAIL_METRICS_AT_K
    }
    return by_k | {"tail": tail}


def explain_gaps(figures: Mapping[str, float], spans: Mapping[str, tuple[float, float]]) -> list[str]:
    """Returns why figures and intervals are empty, a sentence for each reason."""
    columns_of: dict[str, list[str]] = {}
    for column, figure in figures.items():
        if not math.isfinite(figure):
            columns_of.setdefault(REASONS[column.split("@")[0]], []).append(column)
    no_span = [column for column, ends in spans.items() if math.isfinite(figures[column]) and math.isnan(ends[0])]
    if no_span:
        columns_of["no interval, for the resamples do not differ, or some have no such record"] = no_span
    return [f"{', '.join(columns)}: {reason}" for reason, columns in columns_of.items()]


def per_user_records(
    records: Sequence[Mapping[str, Any]],
    predictions: Sequence[str],
    target_titles: Sequence[str],
    ranked: np.ndarray,
    evaluation_set: EvaluationSet,
    catalogue_titles: Sequence[str],
    topk: Sequence[int],
) -> list[dict[str, Any]]:
    """Returns what each record got, as `cebs.per_user` describes it."""
    ranks = hit_ranks(ranked, evaluation_set.targets)  # [N]
    hits = {str(k): hits_at(ranks, k).astype(int).tolist() for k in topk}
    ndcgs = {str(k): ndcg_at(ranks, k).tolist() for k in topk}
    is_known = evaluation_set.exposure is not None
    exposures = evaluation_set.target_exposure.tolist() if is_known else [None] * len(records)
    groups = [EXPOSURE_GROUPS[place] for place in evaluation_set.target_groups()] if is_known else [""] * len(records)
    known = set(catalogue_titles)
    return [
        {
            "record": index,
            "user": record["user"],
            "target": target_titles[index],
            "target_exposure": exposures[index],
            "exposure_group": groups[index],
            "rank": int(ranks[index]) if ranks[index] >= 0 else None,
            "hit": {k: of_records[index] for k, of_records in hits.items()},
            "ndcg": {k: of_records[index] for k, of_records in ndcgs.items()},
            "prediction": predictions[index],
            "in_catalogue": predictions[index] in known,
            "recommended": [catalogue_titles[title] for title in ranked[index].tolist() if title != NOTHING],
        }
        for index, record in enumerate(records)
    ]


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments,), __doc__, defaults="configs/evaluate.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
