"""
Stage 4: rankings of several methods made into one, by reciprocal rank fusion. What one method misses another may have.

# A language model's beams and ItemKNN
```bash
python fuse_predictions.py --predictions output/beams/predictions output/item_knn/predictions
```

# Then a row of the CSV, as for any other method
```bash
python evaluate.py --predictions output/fused/predictions --method Fused
```

A title's score is the sum of 1 / (c + rank) over the rankings that hold it, c being --rank_constant (Cormack, Clarke
and Buettcher, SIGIR 2009). Nothing is learned, and no score is compared with a score of another kind. The rankings must
be of the same test records in the same order: made from one data folder, and of as many records.
"""

from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from cebs.predictions import (
    PREDICTION_FILES,
    find_predictions,
    ranked_without_history,
    rankings_of_same_records,
    read_predictions,
    reciprocal_rank_fusion,
    write_predictions,
)
from cebs.prompts import quote
from utils import InputError, RunArguments, ScriptParser, run_folder, run_script


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage, beside those of every run.

    Args:
        predictions (`list[str]`): files of predictions with rankings, or the folders that hold one each.
        rank_constant (`int`): how little the first places count more than the next ones.
        num_titles (`int`): titles in a ranking.
    """

    predictions: list[str] = field(
        metadata={"help": "Two or more files of predictions with rankings, or the folders that hold one each."}
    )
    rank_constant: int = field(metadata={"help": "The greater, the less the first places count more than the next."})
    num_titles: int = field(metadata={"help": "Titles in a ranking; evaluate.py needs as many as its greatest --topk."})


def main(script_args: ScriptArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    files = [find_predictions(path) for path in script_args.predictions]
    if len(files) < 2:
        raise InputError(f"--predictions {files[0]}: one ranking is none to be fused; give two or more")
    records = [read_predictions(file) for file in files]
    rankings = rankings_of_same_records(files, records)

    with run_folder(
        script_args.output_dir,
        script=__file__,
        # a fused ranking leaves the history out where all that go into it do
        arguments=asdict(script_args) | {"exclude_history": all(map(ranked_without_history, files))},
        inputs=files,
        outputs=[PREDICTION_FILES],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return

        # -- Fusion ---------------------------------------------------------------------------------------------------
        results = []
        for record, of_record in zip(
            tqdm(records[0], desc="fusion", unit="record", mininterval=1), rankings, strict=True
        ):
            ranking = reciprocal_rank_fusion(of_record, script_args.rank_constant)[: script_args.num_titles]
            known = {key: value for key, value in record.items() if value or key != "user"}
            results.append(known | {"prediction": quote(ranking[0]), "ranking": ranking})

        # -- Output ---------------------------------------------------------------------------------------------------
        write_predictions(run, results)
        run.counts["test_records"] = len(results)


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments,), __doc__, defaults="configs/fuse.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
