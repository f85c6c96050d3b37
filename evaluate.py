r"""
Stage 5: evaluation. Predictions become recommendations, and these a row in the one CSV of all methods.

A prediction stands for the k titles of the catalogue that are nearest to it by a sentence encoder (BIGRec, SPRec); a
record with a ranking of its own is taken at its word.

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

# The table alone
```bash
python -m cebs.results output/results.csv
```
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cebs.catalogue import Catalogue, load_catalogue
from cebs.grounding import EMBEDDINGS_CACHE, encoder_fingerprint, ground
from cebs.metrics import METRICS_AT_K, NOT_IN_CATALOGUE, evaluate_rankings, genre_weights
from cebs.prompts import predicted_title, quoted_titles
from cebs.results import print_results, read_results, update_results
from cebs.sources import find_encoder
from utils import InputError, ScriptParser, read_list, require_done, run_script, sha256, write_json


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
        seed (`int`): recorded; the evaluation makes no random choice.
        dataset (`str`, *optional*): name of the data set in the CSV.
        method (`str`, *optional*): name of the method in the CSV.
        metrics_json (`str`, *optional*): file for the figures and where they come from.
        cache_dir (`str`, *optional*): folder where the catalogue's embeddings are kept.
    """

    predictions: str = field(metadata={"help": "File of predictions, or the folder that holds one raw_results_*.json."})
    data_dir: str = field(metadata={"help": "Data folder whose catalogue is recommended from."})
    encoder: str = field(metadata={"help": "Sentence encoder that finds the nearest titles: a folder or a name."})
    topk: list[int] = field(metadata={"help": "How many titles are recommended; a set of figures for each."})
    results_csv: str = field(metadata={"help": "The one CSV of all methods; the row of (dataset, method) is updated."})
    seed: int = field(metadata={"help": "Recorded; the evaluation makes no random choice."})
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
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the catalogue's embeddings are kept; left out, models/.embeddings."}
    )


def main(script_args: ScriptArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    topk = sorted(set(script_args.topk))
    if topk[0] < 1:
        raise InputError(f"--topk: {topk[0]} is not a number of titles; give 1 or more")
    predictions_file = find_predictions(script_args.predictions)
    dataset = script_args.dataset or Path(script_args.data_dir).resolve().name
    method = script_args.method or default_method(predictions_file)
    records = read_predictions(predictions_file)
    require_done(predictions_file)
    catalogue = load_catalogue(script_args.data_dir)
    ids = {title: index for index, title in enumerate(catalogue.titles)}
    rankings = read_rankings(predictions_file, records, ids, topk[-1])
    read_results(script_args.results_csv)  # complains now rather than after the encoder's work
    if script_args.metrics_json and Path(script_args.metrics_json).is_dir():
        raise InputError(f"{script_args.metrics_json}: is a folder; give --metrics_json a file")

    # -- Recommendations ----------------------------------------------------------------------------------------------
    titles = [predicted_title(record["prediction"]) for record in records]
    ranked = np.empty((len(records), min(topk[-1], len(ids))), np.int64)  # [N, K]
    for index, ranking in rankings.items():
        ranked[index] = ranking
    grounded = [index for index in range(len(records)) if index not in rankings]
    encoder = None
    if grounded:
        encoder_dir = find_encoder(script_args.encoder)
        encoder = {"name": encoder_name(script_args.encoder), "sha256": encoder_fingerprint(encoder_dir)}
        cache_dir = Path(script_args.cache_dir) if script_args.cache_dir else EMBEDDINGS_CACHE
        ranked[grounded] = ground(
            [titles[index] for index in grounded], catalogue.titles, encoder_dir, topk[-1], cache_dir
        )

    # -- Figures ------------------------------------------------------------------------------------------------------
    targets = np.array([target_id(record["ground_truth"], ids) for record in records])  # [N]
    if (targets == NOT_IN_CATALOGUE).all():
        print(f"note: no target of {predictions_file} is in the catalogue; does it belong to {script_args.data_dir}?")
    weights = genre_weights(map(catalogue.genres_of, catalogue.titles), catalogue.counted_genres)  # [M, G]
    figures = evaluate_rankings(ranked, targets, count_histories(records, catalogue), weights, topk)
    not_in_ratio = sum(title not in catalogue for title in titles) / len(titles)
    protocol = "grounded" if not rankings else "mixed" if grounded else "ranked"

    # -- Output -------------------------------------------------------------------------------------------------------
    row: dict[str, str | int | float] = {"Dataset": dataset, "Model": method}
    row |= {f"{metric}@{k}": figures[k][metric] for k in topk for metric in METRICS_AT_K}
    row |= {"NotInRatio": not_in_ratio, "Users": len(records), "Encoder": encoder["name"] if encoder else ""}
    row |= {"Protocol": protocol}
    if script_args.metrics_json:
        at_k = {f"@{k}": {**figures[k], "NotInRatio": not_in_ratio} for k in topk}
        origin = {
            "dataset": dataset,
            "method": method,
            "protocol": protocol,
            "encoder": encoder,
            "predictions": {"file": str(predictions_file), "sha256": sha256(predictions_file)},
            "targets_in_catalogue": int((targets != NOT_IN_CATALOGUE).sum()),
            "titles": len(ids),
            "arguments": asdict(script_args),
        }
        write_metrics(script_args.metrics_json, at_k | origin)
    notices = update_results(script_args.results_csv, row)
    print_results(script_args.results_csv, dataset)
    print(*(f"note: {notice}" for notice in notices), sep="\n", end="\n" if notices else "")
    print(f"written to {script_args.results_csv}: {dataset}, {method}")


def find_predictions(path: str) -> Path:
    """Returns the file of predictions: the path itself, or the one file in the folder that it names.

    Raises:
        `InputError`: if the folder has no file of predictions, or several.
    """
    if not Path(path).is_dir():
        return Path(path)
    files = sorted(Path(path).glob("raw_results_*.json"))
    if not files:
        raise InputError(f"{path}: no raw_results_*.json in this folder; generate_predict_batch.py writes one")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{path}: holds {len(files)} files of predictions ({names}); give the path of one")
    return files[0]


def default_method(predictions_file: Path) -> str:
    """Returns the name of the run: of the folder that `predictions/` lies in, or else of the file."""
    folder = predictions_file.resolve().parent
    return folder.parent.name if folder.name == "predictions" else predictions_file.stem


def encoder_name(name_or_path: str) -> str:
    """Returns the name of an encoder as the CSV has it: without the folder, or the hub's organisation, before it."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else path.name


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Reads prediction records.

    Raises:
        `InputError`: naming the first record that lacks a key or holds something else than text.
    """
    keys = ("prompt", "prediction", "ground_truth")
    records = read_list(path, keys)
    for index, record in enumerate(records):
        for key in keys:
            if not isinstance(record[key], str):
                raise InputError(f"{path}: record {index}: {key!r} must be text, not {type(record[key]).__name__}")
        if not is_unicode(record["prediction"]):
            raise InputError(f"{path}: record {index}: 'prediction' holds half a character (a lone surrogate)")
    return records


def is_unicode(text: str) -> bool:
    """Says whether the text can be written in UTF-8; JSON can smuggle in what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rankings(path: Path, records: list[dict[str, Any]], ids: dict[str, int], k: int) -> dict[int, list[int]]:
    """Returns the first k title ids of each record that has a ranking, by the record's place.

    Raises:
        `InputError`: naming the record whose ranking is too short, or holds a title twice or one not in the catalogue.
    """
    rankings = {}
    k = min(k, len(ids))
    for index, record in enumerate(records):
        if "ranking" not in record:
            continue
        ranking = record["ranking"]
        if not isinstance(ranking, list) or not all(isinstance(title, str) for title in ranking):
            raise InputError(f"{path}: record {index}: 'ranking' must be a list of titles")
        for title in ranking:
            if title not in ids:
                raise InputError(f"{path}: record {index}: {title!r} of its ranking is not in the catalogue")
        if len(ranking) < k:
            raise InputError(f"{path}: record {index}: its ranking has {len(ranking)} titles, fewer than --topk {k}")
        if len(set(ranking)) < len(ranking):
            twice = Counter(ranking).most_common(1)[0][0]
            raise InputError(f"{path}: record {index}: its ranking has {twice!r} more than once; keep the first")
        rankings[index] = [ids[title] for title in ranking[:k]]
    return rankings


def target_id(ground_truth: str, ids: dict[str, int]) -> int:
    """Returns the id of a target, which may stand in quotes as it does in a test record; -1 if not in the catalogue."""
    unquoted = ground_truth.strip().removeprefix('"').removesuffix('"')
    return ids.get(ground_truth, ids.get(unquoted, NOT_IN_CATALOGUE))


def count_histories(records: list[dict[str, Any]], catalogue: Catalogue) -> np.ndarray:
    """Returns how often each title occurs in the histories of all prompts: `[M]`."""
    counts = Counter(title for record in records for title in quoted_titles(record["prompt"]))
    return np.array([counts[title] for title in catalogue.titles])


def write_metrics(path: str, metrics: dict[str, Any]) -> None:
    """Writes the figures as JSON, which has no NaN: a share of nothing is null.

    Raises:
        `InputError`: if the file cannot be written.
    """
    for name, value in metrics.items():
        if name.startswith("@"):
            metrics[name] = {metric: figure if math.isfinite(figure) else None for metric, figure in value.items()}
    try:
        write_json(path, metrics)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; give another --metrics_json") from error


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments,), __doc__, defaults="configs/evaluate.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
