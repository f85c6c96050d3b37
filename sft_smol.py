"""
Stage 1: supervised fine-tuning. A base model learns to answer "history of titles -> next title".

The loss is on the answer, and with `--history_loss_weight` also on the titles of the history, each predicted from those
before it. What is trained is a LoRA adapter, which goes to `<output_dir>/final_model`; with `--use_peft false` it is
the whole model, which the next stages take as their `--model_name_or_path`.

# The default, configs/sft.yaml, on the default data
```bash
python sft_smol.py
```

# Another data set
```bash
python sft_smol.py --data_dir sampled_data/goodreads --output_dir output/goodreads/sft
```

# The recipe for accuracy: the loss on every title of the history, see docs/recipe.md
```bash
python sft_smol.py --config configs/sft_recipe.yaml
```

# Three copies of each record, the second and third without some titles of the history
```bash
python sft_smol.py --copies_per_record 3 --history_dropout 0.3 --num_train_epochs 1 --output_dir output/sft_dropout
```

# All weights in place of an adapter, and what comes next
```bash
python sft_smol.py --use_peft false --learning_rate 1e-4 --output_dir output/sft_full
python dataset_generate_cluster_batch.py --model_name_or_path output/sft_full/final_model
```

# The settings of the published runs
```bash
python sft_smol.py --config configs/sft_published.yaml --output_dir output/sft_published
```

# SmolLM2-1.7B with QLoRA on a GPU, and on several
```bash
python sft_smol.py --model_name_or_path HuggingFaceTB/SmolLM2-1.7B-Instruct --load_in_4bit --activation_checkpointing
accelerate launch --num_processes 4 sft_smol.py --model_name_or_path HuggingFaceTB/SmolLM2-1.7B-Instruct
```

Interrupted and started again with the same flags, it goes on from its last checkpoint.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, SFTConfig, get_peft_config

from cebs.catalogue import CATALOGUE_FILES, load_catalogue
from cebs.choices import CatalogueChoices, within_catalogue
from cebs.memory import train_within_memory
from cebs.prompts import read_records, say_shortened
from cebs.sources import find_model
from cebs.training import (
    CompletionTrainer,
    HardwareDefaults,
    TrainingScriptArguments,
    load_trainable,
    stopping_callbacks,
    tokenize_records,
    train_and_save,
    training_run,
    with_copies,
)
from utils import InputError, ScriptParser, check_adapter, load_tokenizer, run_script, token_limit


@dataclass(kw_only=True)
class ScriptArguments(TrainingScriptArguments):
    """
    Arguments of this stage, beside `TrainingScriptArguments`; all others are TRL's (`SFTConfig`, `ModelConfig`).

    Args:
        data_dir (`str`): data folder with `train_sample.json` and `valid_sample.json`.
        history_loss_weight (`float`): weight of a token of the history's titles in the loss, beside 1 for a token of
            the answer. All titles but the first count. The evaluation loss is the answer's alone, whatever the weight.
        copies_per_record (`int`): how often an epoch has each training record: once as it is, and then in copies that
            are changed by the next two. An epoch is that many times as long.
        shuffle_titles (`bool`, *optional*, defaults to `False`): give a copy's titles a random order, in which a title
            of the history may change places with the target.
        history_dropout (`float`, *optional*, defaults to 0): probability with which a title of the history is missing
            in a copy.
        renormalize (`bool`, *optional*, defaults to `False`): the loss of a token is among those that a title of the
            catalogue may go on with, instead of among all tokens; of tokens that the catalogue leaves no choice of
            there is none (`cebs.choices`). For rankings; such a model is not taught to write whole titles by itself.
        adapter (`str`, *optional*): adapter to go on from; left out, a new one is trained.
    """

    data_dir: str = field(metadata={"help": "Data folder with train_sample.json and valid_sample.json."})
    history_loss_weight: float = field(
        metadata={
            "help": "Weight of a token of the history's titles (but the first) in the training loss, beside 1 for a "
            "token of the answer; 0 is the loss on the answer only."
        }
    )
    copies_per_record: int = field(
        metadata={
            "help": "How often an epoch has each training record: once as it is, and then in copies changed by "
            "--shuffle_titles and --history_dropout."
        }
    )
    shuffle_titles: bool = field(
        default=False, metadata={"help": "Give a copy's titles a random order, the target's included."}
    )
    history_dropout: float = field(
        default=0.0, metadata={"help": "Probability with which a title of the history is missing in a copy."}
    )
    renormalize: bool = field(
        default=False,
        metadata={
            "help": "Take the loss of a token among those that a title of the catalogue may go on with, not among all."
        },
    )
    adapter: str = field(default="", metadata={"help": "Adapter to go on from; left out, a new one is trained."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.history_loss_weight < math.inf:
            raise ValueError(f"--history_loss_weight {self.history_loss_weight}: must be 0 or more")
        if not 0 <= self.history_dropout < 1:
            raise ValueError(f"--history_dropout {self.history_dropout}: must be 0 or more and below 1")
        if (self.copies_per_record > 1) != (self.shuffle_titles or self.history_dropout > 0):
            raise ValueError(
                f"--copies_per_record {self.copies_per_record}: copies are changed by --shuffle_titles or "
                "--history_dropout, which change nothing else; give two or more copies and one of these, or neither"
            )


@dataclass
class SFTArguments(HardwareDefaults, SFTConfig):
    __doc__ = SFTConfig.__doc__


def main(script_args: ScriptArguments, training_args: SFTArguments, model_args: ModelConfig) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    train_file = Path(script_args.data_dir) / "train_sample.json"
    valid_file = Path(script_args.data_dir) / "valid_sample.json"
    train_records = read_records(train_file)[: script_args.max_train_samples]
    valid_records = read_records(valid_file)[: script_args.max_eval_samples]
    inputs, titles = [train_file, valid_file], []
    if script_args.renormalize:
        titles = load_catalogue(script_args.data_dir).titles
        inputs += [Path(script_args.data_dir) / name for name in CATALOGUE_FILES]
        for file, records in ((train_file, train_records), (valid_file, valid_records)):
            within_catalogue(file, [[record.target] for record in records], titles)  # the others have no label
    model_dir = find_model(model_args.model_name_or_path, model_args.model_revision)
    if script_args.adapter:
        if not model_args.use_peft:
            raise InputError("--use_peft false: all weights are trained, and no --adapter; leave out one of the two")
        check_adapter(script_args.adapter, model_dir)

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

        # -- Data and model -------------------------------------------------------------------------------------------
        tokenizer, limit = load_tokenizer(model_dir), token_limit(model_dir, training_args.max_length)
        choices = CatalogueChoices(tokenizer, titles) if script_args.renormalize else None
        numbered = with_copies(
            train_records,
            script_args.copies_per_record,
            script_args.shuffle_titles,
            script_args.history_dropout,
            training_args.seed,
        )
        train_dataset, train_shortened = tokenize_records(
            tokenizer,
            [(record.prompt, record.output) for _, record in numbered],
            limit,
            label_history=script_args.history_loss_weight > 0,
            numbers=[number for number, _ in numbered],
            choices=choices,
        )
        valid_dataset, valid_shortened = tokenize_records(
            tokenizer, [(record.prompt, record.output) for record in valid_records], limit, choices=choices
        )
        say_shortened(train_shortened + valid_shortened, limit)
        run.counts.update(
            train_records=len(train_records),
            valid_records=len(valid_records),
            shortened_prompts=train_shortened + valid_shortened,
        )

        # -- Training -------------------------------------------------------------------------------------------------
        def train(args: SFTArguments) -> None:
            trainer = CompletionTrainer(
                history_loss_weight=script_args.history_loss_weight,
                choices=choices,
                model=load_trainable(model_dir, model_args, script_args.adapter),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=valid_dataset,
                processing_class=tokenizer,
                peft_config=None if script_args.adapter else get_peft_config(model_args),
                callbacks=stopping_callbacks(None, script_args.early_stopping_patience),
            )
            train_and_save(trainer, run, model_dir)

        train_within_memory(train, training_args, run)


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments, SFTArguments, ModelConfig), __doc__, defaults="configs/sft.yaml")


if __name__ == "__main__":
    run_script(main, make_parser(), distributed=True)
