"""
Stage 2: the negatives that others use. Random titles, or the model's own predictions (self-play, SPRec).

# A title drawn from the training targets (DPO-RN); needs no model
```bash
python dataset_generate.py --method random --output_dir output/random
```

# Ten of them a record, for S-DPO as its paper has it (arXiv:2406.09215)
```bash
python dataset_generate.py --method random --num_negatives 10 --output_dir output/random_10
```

# Ten drawn in proportion to how often they occur in the training records
```bash
python dataset_generate.py --method popularity --num_negatives 10 --output_dir output/popularity_10
```

# The SFT model's own greedy prediction (SPRec); without --adapter the base model's
```bash
python dataset_generate.py --method self_play --adapter output/sft/final_model --output_dir output/self_play
```

# In parts, as jobs of an array or on several machines; when all are done, the same command without --shard puts them
# together
```bash
python dataset_generate.py --method self_play --shard 1/4
```

# On several GPUs, or processes
```bash
torchrun --nproc_per_node 4 dataset_generate.py --method self_play
```

Interrupted and started again with the same flags, it goes on after the last finished batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from cebs.catalogue import load_catalogue
from cebs.generation import DecodingArguments, Journal, load_decoder, run_in_batches
from cebs.negatives import NegativeSampler
from cebs.preferences import SPLITS, PreferenceArguments, preference_record
from cebs.prompts import Record, predicted_title
from cebs.sources import find_model
from utils import InputError, ScriptParser, base_fingerprint, check_adapter, run_folder, run_script, write_json


@dataclass(kw_only=True)
class ScriptArguments(PreferenceArguments):
    """
    Arguments of this stage, beside `PreferenceArguments` and those of decoding.

    Args:
        method (`str`): `random`, `popularity` or `self_play`.
        num_negatives (`int`): negatives of a record, for `random` and `popularity`; a greedy prediction is one.
        constrained (`bool`): for `self_play`: predict only titles of the catalogue.
    """

    method: str = field(
        metadata={
            "help": "random: a title drawn from the training targets; popularity: one of the catalogue, drawn in "
            "proportion to its exposure; self_play: the model's own greedy prediction.",
            "choices": ["random", "popularity", "self_play"],
        }
    )
    num_negatives: int = field(
        metadata={"help": "Negatives of a record, for random and popularity; none occurs twice."}
    )
    constrained: bool = field(metadata={"help": "For self_play: predict only titles of the catalogue."})


def main(script_args: ScriptArguments, model_args: DecodingArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    records, all_train = script_args.read_splits()
    sampler = NegativeSampler(load_catalogue(script_args.data_dir), all_train, seed=script_args.seed)
    targets = sorted({record.target for record in all_train})
    model_dir, adapter = None, ""
    if script_args.method != "self_play" and model_args.shard:
        raise InputError(f"--shard: --method {script_args.method} decodes nothing; leave it out")
    if script_args.method == "self_play":
        if script_args.num_negatives > 1:
            raise InputError(f"--num_negatives {script_args.num_negatives}: --method self_play has one, its prediction")
        model_dir, adapter = find_model(model_args.model_name_or_path), model_args.adapter
        if adapter:
            check_adapter(adapter, model_dir)

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args) | asdict(model_args),
        inputs=script_args.data_files,
        base_model=model_dir and base_fingerprint(model_dir),
        adapter=adapter,
        shard=model_args.shard,
        outputs=[f"data/dpo_{split}.json" for split in SPLITS],
        scratch=["data/*.partial.jsonl"],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return

        # -- Negatives ------------------------------------------------------------------------------------------------
        journals, answers = [], {}
        if script_args.method == "self_play":
            decoder = load_decoder(model_dir, model_args, run)
            titles = sampler.catalogue.titles if script_args.constrained else None

            def predict(batch: Sequence[list[int]], start: int) -> list[str]:
                return [predicted_title(answer) for answer in decoder.greedy(batch, titles)]

            for split in SPLITS:
                journals.append(Journal(run, f"data/self_play_{split}"))
                prompts = decoder.encode([record.prompt for record in records[split]])
                answers[split] = run_in_batches(
                    prompts, model_args.batch_size, predict, journals[-1], f"self-play, {split}"
                )
            run.counts.update(decoder.report())
        if not run.writes_outputs:
            return

        def draw(record: Record, split: str, index: int) -> list[str]:
            if script_args.method == "popularity":
                return sampler.popular(record, split, index, script_args.num_negatives)
            return sampler.random(targets, record, split, index, script_args.num_negatives)

        negatives = {}
        for split in SPLITS:
            if script_args.method != "self_play":
                fits = [False] * len(records[split])
            else:
                # a prediction that is right, or a title of the history, is no negative: a random title stands in
                fits = [
                    bool(sampler.eligible(sampler.describe([(title, None)], record), record))
                    for title, record in zip(answers[split], records[split], strict=True)
                ]
                run.counts[f"{split}_random_instead"] = fits.count(False)
            negatives[split] = [
                [answers[split][index]] if fit else draw(record, split, index)
                for index, (fit, record) in enumerate(zip(fits, records[split], strict=True))
            ]

        # -- Output ---------------------------------------------------------------------------------------------------
        for split in SPLITS:
            rows = [
                preference_record(record, rejected)
                for record, rejected in zip(records[split], negatives[split], strict=True)
            ]
            write_json(run.path / "data" / f"dpo_{split}.json", rows)
            run.counts[f"{split}_records"] = len(rows)
            run.counts[f"{split}_not_in_catalogue"] = sum(
                title not in sampler.catalogue for rejected in negatives[split] for title in rejected
            )
        for journal in journals:
            journal.remove()
    print(f"{script_args.method}: {run.counts}")


def make_parser() -> ScriptParser:
    return ScriptParser(
        (ScriptArguments, DecodingArguments),
        __doc__,
        defaults="configs/dataset_generate.yaml",
        chain=("data_dir", "model_name_or_path"),
    )


if __name__ == "__main__":
    run_script(main, make_parser(), distributed=True)
