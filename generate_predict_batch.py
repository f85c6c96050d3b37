"""
Stage 4: predictions. The model's answer for each test record, or its own ranking of the catalogue.

# The default, configs/predict.yaml: greedy answers of the model aligned on two negatives
```bash
python generate_predict_batch.py
```

# Another adapter; an empty one is the base model
```bash
python generate_predict_batch.py --adapter output/sft/final_model --output_dir output/sft
python generate_predict_batch.py --adapter "" --output_dir output/origin
```

# The catalogue's titles by the model's own probability (constrained beam search), in place of one answer
```bash
python generate_predict_batch.py --decoding constrained_beam --num_beams 20 --output_dir output/beams
```

# The same, calibrated: what the model would say without a history counts against a title; history titles are left out
```bash
python generate_predict_batch.py --decoding constrained_beam --calibration 0.4 --exclude_history \\
    --output_dir output/calibrated_beams
```

# In parts, as jobs of an array or on several machines; when all are done, the same command without --shard puts them
# together
```bash
python generate_predict_batch.py --shard 1/4
```

# On several GPUs, or processes
```bash
torchrun --nproc_per_node 4 generate_predict_batch.py
```

Interrupted and started again with the same flags, it goes on after the last finished batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cebs.beams import beam_search
from cebs.calibration import calibration_bias, common_instruction
from cebs.catalogue import CATALOGUE_FILES, load_catalogue
from cebs.generation import DecodingArguments, Journal, load_decoder, run_in_batches
from cebs.predictions import PREDICTION_FILES, check_histories, prediction_record, write_predictions
from cebs.prompts import Record, quote, read_records
from cebs.sources import find_model
from utils import (
    RunArguments,
    ScriptParser,
    base_fingerprint,
    check_adapter,
    run_folder,
    run_script,
)


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage, beside those of decoding.

    Args:
        data_dir (`str`): data folder with `test_sample.json` and, unless `greedy`, the catalogue.
        decoding (`str`): `greedy` writes the model's answer, `constrained_greedy` one that is a title of the catalogue,
            `constrained_beam` its ranking of the catalogue too.
        num_beams (`int`): width of the beam search, and titles in a ranking.
        calibration (`float`): weight of a title's log-probability without a history, which is taken off its score
            (see `cebs.calibration`). It is computed once for a model and catalogue, and kept.
        renormalize (`bool`, *optional*, defaults to `False`): score each token by its probability among those that a
            title of the catalogue may go on with, instead of among all tokens.
        exclude_history (`bool`, *optional*, defaults to `False`): leave the titles of a user's own history out of the
            ranking. The search is wider then, by as many beams as the longest history has titles.
        cache_dir (`str`, *optional*): folder where the log-probabilities without a history are kept.
        max_predict_samples (`int`, *optional*): use only the first test records.
    """

    data_dir: str = field(metadata={"help": "Data folder with test_sample.json."})
    decoding: str = field(
        metadata={
            "help": "greedy: the model's answer; constrained_greedy: an answer that is a title of the catalogue; "
            "constrained_beam: its own ranking of the catalogue's titles.",
            "choices": ["greedy", "constrained_greedy", "constrained_beam"],
        }
    )
    num_beams: int = field(metadata={"help": "Width of the beam search, and titles in a ranking."})
    calibration: float = field(
        metadata={"help": "Weight of a title's log-probability without a history, taken off its score."}
    )
    renormalize: bool = field(
        default=False,
        metadata={"help": "Score a token among those that a title of the catalogue may go on with, not among all."},
    )
    exclude_history: bool = field(default=False, metadata={"help": "Leave a user's own history out of the ranking."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder where log-probabilities without a history are kept. Left out: models/.priors."},
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first test records."})

    def __post_init__(self):
        super().__post_init__()
        if self.calibration < 0:
            raise ValueError(f"--calibration: {self.calibration} must be 0 or more")
        for name in ("calibration", "renormalize", "exclude_history"):
            if vars(self)[name] and self.decoding != "constrained_beam":
                raise ValueError(f"--{name}: is for rankings; give --decoding constrained_beam with it")


def main(script_args: ScriptArguments, model_args: DecodingArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    data_dir = Path(script_args.data_dir)
    test_file = data_dir / "test_sample.json"
    records = read_records(test_file)[: script_args.max_predict_samples]
    inputs = [test_file]
    instruction = common_instruction(test_file, records) if script_args.calibration else None
    titles = None
    if script_args.decoding != "greedy":
        titles = load_catalogue(data_dir).titles
        inputs += [data_dir / name for name in CATALOGUE_FILES]
        if script_args.exclude_history:
            check_histories(test_file, records, titles)
    model_dir = find_model(model_args.model_name_or_path)
    if model_args.adapter:
        check_adapter(model_args.adapter, model_dir)
    print(f"adapter: {model_args.adapter or 'none, the base model alone'}")

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args) | asdict(model_args),
        inputs=inputs,
        base_model=base_fingerprint(model_dir),
        adapter=model_args.adapter,
        shard=model_args.shard,
        outputs=[PREDICTION_FILES],
        scratch=["predictions/*.partial.jsonl"],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return

        # -- Predictions ----------------------------------------------------------------------------------------------
        decoder = load_decoder(model_dir, model_args, run)
        prompts = decoder.encode([record.prompt for record in records])

        if script_args.decoding != "constrained_beam":

            def predict(batch: Sequence[tuple[Record, list[int]]], start: int) -> list[dict[str, Any]]:
                answers = decoder.greedy([prompt for _, prompt in batch], titles)
                return [prediction_record(record, answer) for (record, _), answer in zip(batch, answers, strict=True)]
        else:
            trie, title_of = decoder.catalogue_trie(titles)
            edge_bias = calibration_bias(
                decoder,
                titles,
                instruction,
                script_args.calibration,
                script_args.cache_dir,
                script_args.renormalize,
            )

            def left_out(record: Record) -> set[str]:
                return set(record.history) if script_args.exclude_history else set()

            # as wide for every record, so that a ranking does not depend on the records beside it
            num_beams = script_args.num_beams + max(len(left_out(record)) for record in records)

            def predict(batch: Sequence[tuple[Record, list[int]]], start: int) -> list[dict[str, Any]]:
                found = decoder.within_memory(
                    lambda rows: beam_search(
                        decoder.model,
                        [prompt for _, prompt in batch],
                        trie,
                        num_beams=num_beams,
                        edge_bias=edge_bias,
                        renormalize=script_args.renormalize,
                        rows=rows,
                    )
                )
                results = []
                for (record, _), (branches, _) in zip(batch, found, strict=True):
                    known = left_out(record)
                    ranking = [title for branch in branches if (title := title_of[tuple(branch)]) not in known]
                    results.append(prediction_record(record, quote(ranking[0]), ranking[: script_args.num_beams]))
                return results

        journal = Journal(run, "predictions/raw_results")
        results = run_in_batches(
            list(zip(records, prompts, strict=True)), model_args.batch_size, predict, journal, "predictions"
        )
        run.counts.update(records=len(results), **decoder.report())
        if not run.writes_outputs:
            return
        write_predictions(run, results)
        journal.remove()


def make_parser() -> ScriptParser:
    return ScriptParser(
        (ScriptArguments, DecodingArguments),
        __doc__,
        defaults="configs/predict.yaml",
        chain=("data_dir", "model_name_or_path"),
    )


if __name__ == "__main__":
    run_script(main, make_parser(), distributed=True)
