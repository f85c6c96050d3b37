"""
Stage 4: predictions of baselines without a language model. Their rankings of the catalogue for each test record.

# The most exposed titles, the same for everyone
```bash
python predict_baselines.py --method popularity
```

# Titles that share training records with those of the history; a small transformer over title ids
```bash
python predict_baselines.py --method item_knn
python predict_baselines.py --method sasrec
```

# The next volumes of the series that the history holds
```bash
python predict_baselines.py --method next_in_series
```

# Then a row of the CSV, as for any other method
```bash
python evaluate.py --predictions output/item_knn/predictions --method ItemKNN
```

All of them see what the language models see: the titles of the training records, histories and targets; SASRec's
training stops by the validation records. popularity counts how often a title occurs; item_knn sums the cosine of titles
by the records they occur in; sasrec is Kang and McAuley's (arXiv:1808.09781); next_in_series reads series and numbers
in the titles themselves, as in "The Score (Off-Campus, #3)", and learns nothing; random shuffles the catalogue for each
record. Titles of the history are left out of a ranking (--no_exclude_history keeps them), and titles that are not in
the catalogue are ignored. Titles with equal scores stand in the order of popularity, so a record without history gets
the most popular ones from item_knn and sasrec, too, and one without a series from next_in_series.

It takes seconds, sasrec a minute or so; interrupted and started again it begins anew, and ends with the same bytes.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cebs.baselines import (
    Scorer,
    item_knn,
    next_in_series,
    popularity,
    popularity_order,
    random,
    title_ids,
    top_titles,
)
from cebs.catalogue import CATALOGUE_FILES, load_catalogue
from cebs.metrics import NOT_IN_CATALOGUE, NOTHING, hit_ranks, ndcg_at
from cebs.predictions import PREDICTION_FILES, check_histories, prediction_record, write_predictions
from cebs.prompts import Record, quote, read_records
from cebs.sasrec import SASRecArguments, sasrec
from utils import RunArguments, ScriptParser, run_folder, run_script

BATCH_SIZE = 64  # records scored at once: so many times the catalogue are in memory
VALIDATION_K = 10


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage, beside those of SASRec.

    Args:
        method (`str`): `popularity`, `item_knn`, `next_in_series`, `sasrec` or `random`.
        data_dir (`str`): data folder with records and catalogue.
        output_dir (`str`, *optional*): folder of the run; left out, `output/` and the method's name.
        num_titles (`int`): titles in a ranking.
        exclude_history (`bool`, *optional*, defaults to `True`): leave the titles of the history out of its ranking.
        max_train_samples, max_eval_samples (`int`, *optional*): use only the first training or validation records.
        max_predict_samples (`int`, *optional*): use only the first test records.
    """

    method: str = field(
        metadata={
            "help": "popularity: the most exposed titles; item_knn: titles that share training records with the "
            "history's; next_in_series: the next volumes of the history's series; sasrec: a small transformer over "
            "title ids; random: another order for each record.",
            "choices": ["popularity", "item_knn", "next_in_series", "sasrec", "random"],
        }
    )
    data_dir: str = field(metadata={"help": "Data folder: records and catalogue."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run; left out, output/ and the method's name."}
    )
    num_titles: int = field(metadata={"help": "Titles in a ranking; evaluate.py needs as many as its greatest --topk."})
    exclude_history: bool = field(
        default=True, metadata={"help": "Leave the titles of a record's history out of its ranking."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first validation records."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first test records."})


def main(script_args: ScriptArguments, sasrec_args: SASRecArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    script_args = replace(script_args, output_dir=script_args.output_dir or f"output/{script_args.method}")
    trains = script_args.method == "sasrec"
    data_dir = Path(script_args.data_dir)
    limits = {"train": script_args.max_train_samples, "test": script_args.max_predict_samples}
    if trains:
        limits["valid"] = script_args.max_eval_samples
    files = {split: data_dir / f"{split}_sample.json" for split in limits}
    records = {split: read_records(files[split])[:limit] for split, limit in limits.items()}
    titles = load_catalogue(data_dir).titles
    ids = {title: index for index, title in enumerate(titles)}
    if script_args.exclude_history:
        check_histories(files["test"], records["test"], titles)
    torch.set_num_threads(1)  # another number of threads would round sums otherwise; and so little work needs no more

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args) | (asdict(sasrec_args) if trains else {}),
        inputs=[*files.values(), *(data_dir / name for name in CATALOGUE_FILES)],
        outputs=[PREDICTION_FILES],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return

        # -- Training -------------------------------------------------------------------------------------------------
        order = popularity_order(records["train"], ids)  # [M]
        sequences = [title_ids([*record.history, record.target], ids) for record in records["train"]]

        def rank(score: Scorer, batch: list[Record], start: int, k: int) -> np.ndarray:
            """Returns the k best titles of each record of a batch that starts at a place of its file: `[N, k]`."""
            histories = [title_ids(record.history, ids) for record in batch]
            excluded = histories if script_args.exclude_history else [[]] * len(batch)
            return top_titles(score(histories, start), order, excluded, k)

        if script_args.method == "popularity":
            scorer = popularity(len(titles))
        elif script_args.method == "item_knn":
            scorer = item_knn(sequences, len(titles))
        elif script_args.method == "next_in_series":
            scorer = next_in_series(titles)
        elif script_args.method == "random":
            scorer = random(len(titles), script_args.seed)
        else:
            targets = np.array([ids.get(record.target, NOT_IN_CATALOGUE) for record in records["valid"]])

            def validate(score: Scorer) -> float:
                ranked = rank(score, records["valid"], 0, VALIDATION_K)
                return float(ndcg_at(hit_ranks(ranked, targets), VALIDATION_K).mean())

            scorer, training = sasrec(sequences, len(titles), validate, sasrec_args, script_args.seed)
            run.counts["training"] = asdict(training)

        # -- Predictions ----------------------------------------------------------------------------------------------
        results: list[dict[str, Any]] = []
        with tqdm(total=len(records["test"]), desc="predictions", unit="record", mininterval=1) as progress:
            for start in range(0, len(records["test"]), BATCH_SIZE):
                batch = records["test"][start : start + BATCH_SIZE]
                rankings = rank(scorer, batch, start, script_args.num_titles)
                for record, ranked in zip(batch, rankings, strict=True):
                    ranking = [titles[index] for index in ranked if index != NOTHING]
                    results.append(prediction_record(record, quote(ranking[0]), ranking))
                progress.update(len(batch))

        # -- Output ---------------------------------------------------------------------------------------------------
        write_predictions(run, results)
        run.counts.update({f"{split}_records": len(records[split]) for split in records})
        run.counts["titles_in_training"] = len({index for sequence in sequences for index in sequence})


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments, SASRecArguments), __doc__, defaults="configs/baselines.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
