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

Interrupted and started again with the same flags, it goes on after the last finished batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cebs.branches import beam_search
from cebs.catalogue import CATALOGUE_FILES, load_catalogue
from cebs.generation import DecodingArguments, Journal, load_decoder, run_in_batches
from cebs.prompts import Record, encode_completion, quote
from cebs.sources import find_model
from cebs.trie import build_trie
from utils import (
    RunArguments,
    ScriptParser,
    base_fingerprint,
    check_adapter,
    read_records,
    run_folder,
    run_script,
    write_json,
)


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage, beside those of decoding.

    Args:
        data_dir (`str`): data folder with `test_sample.json` and, for constrained beams, the catalogue.
        decoding (`str`): `greedy` writes the model's answer, `constrained_beam` its ranking of the catalogue too.
        num_beams (`int`): width of the beam search, and titles in a ranking.
        max_predict_samples (`int`, *optional*): use only the first test records.
    """

    data_dir: str = field(metadata={"help": "Data folder with test_sample.json."})
    decoding: str = field(
        metadata={
            "help": "greedy: the model's answer; constrained_beam: its own ranking of the catalogue's titles.",
            "choices": ["greedy", "constrained_beam"],
        }
    )
    num_beams: int = field(metadata={"help": "Width of the beam search, and titles in a ranking."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first test records."})


def main(script_args: ScriptArguments, model_args: DecodingArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    data_dir = Path(script_args.data_dir)
    test_file = data_dir / "test_sample.json"
    records = read_records(test_file)[: script_args.max_predict_samples]
    inputs = [test_file]
    if script_args.decoding == "constrained_beam":
        titles = load_catalogue(data_dir).titles
        inputs += [data_dir / name for name in CATALOGUE_FILES]
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
        outputs=["predictions/raw_results_*.json"],
        scratch=["predictions/*.partial.jsonl"],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return

        # -- Predictions ----------------------------------------------------------------------------------------------
        decoder = load_decoder(model_dir, model_args)

        prompts = decoder.encode([record.prompt for record in records])

        if script_args.decoding == "greedy":

            def predict(batch: Sequence[tuple[Record, list[int]]], start: int) -> list[dict[str, Any]]:
                answers = decoder.greedy([prompt for _, prompt in batch])
                return [
                    {"prompt": record.prompt, "prediction": answer, "ground_truth": record.target}
                    for (record, _), answer in zip(batch, answers, strict=True)
                ]
        else:
            trie = build_trie([encode_completion(decoder.tokenizer, quote(title)) for title in titles])

            def predict(batch: Sequence[tuple[Record, list[int]]], start: int) -> list[dict[str, Any]]:
                found = beam_search(
                    decoder.model,
                    [prompt for _, prompt in batch],
                    trie,
                    num_beams=script_args.num_beams,
                    rows=decoder.rows,
                )
                rankings = [[titles[title_id] for title_id in title_ids] for title_ids, _ in found]
                return [
                    {
                        "prompt": record.prompt,
                        "prediction": quote(ranking[0]),
                        "ground_truth": record.target,
                        "ranking": ranking,
                    }
                    for (record, _), ranking in zip(batch, rankings, strict=True)
                ]

        predictions = run.path / "predictions"
        journal = Journal(predictions / "raw_results.partial.jsonl", run.resumed)
        results = run_in_batches(
            list(zip(records, prompts, strict=True)), model_args.batch_size, predict, journal, "predictions"
        )
        write_json(predictions / f"raw_results_{len(results)}.json", results)
        journal.remove()
        run.counts.update(records=len(results), shortened_prompts=decoder.shortened_prompts)


def make_parser() -> ScriptParser:
    return ScriptParser(
        (ScriptArguments, DecodingArguments),
        __doc__,
        defaults="configs/predict.yaml",
        chain=("data_dir", "model_name_or_path"),
    )


if __name__ == "__main__":
    run_script(main, make_parser())
