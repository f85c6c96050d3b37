"""
Stage 3: alignment. A model learns to prefer the target title to the rejected ones (DPO, S-DPO).

A record with one rejected title is DPO, a list of them is S-DPO; both kinds may stand in one file. The reference is a
frozen copy of the adapter that training starts from; where there is none, it is the base model. `--loss_type` takes
another loss: DMPO for lists, or TRL's own for one rejected title.

# The default, configs/dpo.yaml: two negatives a record, on the SFT adapter
```bash
python DPO_from_dpoData.py
```

# Hard negatives alone, long-tail negatives alone
```bash
python DPO_from_dpoData.py --config configs/dpo_hard.yaml
python DPO_from_dpoData.py --config configs/dpo_long_tail.yaml
```

# Another loss: DMPO, IPO on one rejected title, S-DPO with the chosen title's NLL added (RPO)
```bash
python DPO_from_dpoData.py --loss_type dmpo --output_dir output/cluster_exposure/dmpo
python DPO_from_dpoData.py --config configs/dpo_hard.yaml --loss_type ipo --output_dir output/cluster_exposure/hard_ipo
python DPO_from_dpoData.py --sft_weight 1 --output_dir output/cluster_exposure/two_negatives_rpo
```

# Any other preference data; without --adapter on the base model ("w/o SFT")
```bash
python DPO_from_dpoData.py --adapter output/sft/final_model --output_dir output/random/dpo \\
    --train_data output/random/data/dpo_train.json --valid_data output/random/data/dpo_valid.json
```

# Preferences among the titles of a catalogue, on a model that was trained so (sft_smol.py --renormalize)
```bash
python DPO_from_dpoData.py --renormalize --output_dir output/cluster_exposure/among_titles
```

# The settings of the published runs
```bash
python DPO_from_dpoData.py --config configs/dpo_published.yaml --output_dir output/cluster_exposure/published
```

Interrupted and started again with the same flags, it goes on from its last checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig, get_peft_config

from cebs.catalogue import CATALOGUE_FILES, load_catalogue
from cebs.choices import CatalogueChoices, within_catalogue
from cebs.guards import RECORD
from cebs.memory import train_within_memory
from cebs.preferences import read_preferences
from cebs.prompts import say_shortened, unquote
from cebs.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer, check_rejected
from cebs.sources import find_model
from cebs.training import TrainingScriptArguments, load_trainable, stopping_callbacks, train_and_save, training_run
from utils import InputError, ScriptParser, check_adapter, load_tokenizer, require_done, run_script, token_limit


@dataclass(kw_only=True)
class ScriptArguments(TrainingScriptArguments):
    """
    Arguments of this stage, beside `TrainingScriptArguments`; all others are TRL's (`DPOConfig`, `ModelConfig`).

    Args:
        train_data (`str`): preference records to train on.
        valid_data (`str`): preference records to evaluate on.
        adapter (`str`): adapter to start from, and the reference. Left out where model or data are given: a new
            adapter on the base model, which is then the reference.
        data_dir (`str`): data folder whose catalogue `renormalize` goes by.
        renormalize (`bool`, *optional*, defaults to `False`): take a title's log-probability among the titles of the
            catalogue (`cebs.choices`), as rankings with `--renormalize` do, instead of among all texts.
        loss_threshold (`float`, *optional*): stop when the evaluation loss falls below it.
    """

    train_data: str = field(metadata={"help": "Preference records to train on: prompt, chosen, rejected."})
    valid_data: str = field(metadata={"help": "Preference records to evaluate on."})
    adapter: str = field(
        metadata={
            "help": "Adapter to start from, also the reference. Left out where model or data are given: a new adapter "
            "on the base model."
        },
    )
    data_dir: str = field(metadata={"help": "Data folder whose catalogue --renormalize goes by."})
    renormalize: bool = field(
        default=False,
        metadata={"help": "Take a title's log-probability among the titles of the catalogue, not among all texts."},
    )
    loss_threshold: float | None = field(
        default=None, metadata={"help": "Stop when the evaluation loss falls below it."}
    )


def main(script_args: ScriptArguments, training_args: SoftmaxDPOConfig, model_args: ModelConfig) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    train_records = read_preferences(script_args.train_data)[: script_args.max_train_samples]
    valid_records = read_preferences(script_args.valid_data)[: script_args.max_eval_samples]
    for path, records in ((script_args.train_data, train_records), (script_args.valid_data, valid_records)):
        check_rejected(path, records, training_args.loss_type)
        require_done(path, "dataset_generate.py", "dataset_generate_cluster_batch.py")
    inputs, titles = [script_args.train_data, script_args.valid_data], []
    if script_args.renormalize:
        titles = load_catalogue(script_args.data_dir).titles
        inputs += [Path(script_args.data_dir) / name for name in CATALOGUE_FILES]
        train_records = among_titles(script_args.train_data, train_records, titles)
        valid_records = among_titles(script_args.valid_data, valid_records, titles)
    model_dir = find_model(model_args.model_name_or_path, model_args.model_revision)
    if script_args.adapter:
        check_adapter(script_args.adapter, model_dir)
    if not model_args.use_peft:
        raise InputError("--use_peft false: the reference is the model without what is trained; leave it at true")

    with training_run(
        __file__,
        script_args,
        training_args,
        model_args,
        model_dir,
        adapter=script_args.adapter,
        inputs=inputs,
    ) as run:
        if run.done:
            return

        # -- Training -------------------------------------------------------------------------------------------------
        tokenizer = load_tokenizer(model_dir)
        training_args.max_length = token_limit(model_dir, training_args.max_length)
        choices = CatalogueChoices(tokenizer, titles) if script_args.renormalize else None
        run.counts.update(
            train_records=len(train_records),
            valid_records=len(valid_records),
            rejected_titles=sum(len(record["rejected"]) for record in train_records),
        )

        def train(args: SoftmaxDPOConfig) -> None:
            trainer = SoftmaxDPOTrainer(
                model=load_trainable(model_dir, model_args, script_args.adapter),
                args=args,
                choices=choices,
                train_dataset=Dataset.from_list(train_records),
                eval_dataset=Dataset.from_list(valid_records),
                processing_class=tokenizer,
                peft_config=None if script_args.adapter else get_peft_config(model_args),
                callbacks=stopping_callbacks(script_args.loss_threshold, script_args.early_stopping_patience),
            )
            run.counts["shortened_prompts"] = trainer.shortened_prompts
            say_shortened(trainer.shortened_prompts, args.max_length)
            train_and_save(trainer, run, model_dir)

        train_within_memory(train, training_args, run)


def among_titles(file: str, records: list[dict[str, Any]], titles: list[str]) -> list[dict[str, Any]]:
    """Returns the preference records whose titles are all in the catalogue, with their numbers in the file."""
    quoted = [[record["chosen"], *record["rejected"]] for record in records]
    within = within_catalogue(file, [list(map(unquote, row)) for row in quoted], titles)
    return [{RECORD: number, **records[number]} for number in within]


def make_parser() -> ScriptParser:
    return ScriptParser(
        (ScriptArguments, SoftmaxDPOConfig, ModelConfig),
        __doc__,
        defaults="configs/dpo.yaml",
        chain=("train_data", "model_name_or_path"),
    )


if __name__ == "__main__":
    run_script(main, make_parser(), distributed=True)
