"""What the two training stages share: precision by hardware, tokenised records, callbacks, and the training itself."""

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTTrainer, get_quantization_config

from cebs.prompts import encode_completion, encode_prompt
from utils import InputError, Run, check_counts, has_fast_bf16, is_main_process, load_model, read_json, save_adapter

# TRL 1.16 itself asks transformers 5.23 for the old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

TRAINING_OUTPUTS = ("final_model",)
TRAINING_SCRATCH = ("checkpoint-*", "runs", "README.md")


@dataclass(kw_only=True)
class TrainingScriptArguments:
    """What both training scripts take beside TRL's own arguments.

    Args:
        max_train_samples (`int`, *optional*): use only the first training records.
        max_eval_samples (`int`, *optional*): use only the first validation records.
        early_stopping_patience (`int`, *optional*): stop after so many evaluations without improvement.
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier run in the output folder.
    """

    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first validation records."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without improvement."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in the output folder."})

    def __post_init__(self):
        check_counts(self)


class HardwareDefaults:
    """Settings of TRL's configs that follow from the machine where the user leaves them open."""

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = has_fast_bf16() and not self.fp16
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.report_to == "none" and is_tensorboard_available():
            self.report_to = "tensorboard"
        super().__post_init__()


class LossThresholdCallback(TrainerCallback):
    """Stops training when the evaluation loss falls below a threshold.

    Args:
        threshold (`float`): evaluation loss at which the preference data has nothing left to teach.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if metrics["eval_loss"] < self.threshold:
            print(f"eval_loss {metrics['eval_loss']:.4f} is below {self.threshold}: training stops here")
            control.should_training_stop = True


def stopping_callbacks(loss_threshold: float | None, patience: int | None) -> list[TrainerCallback]:
    """Returns the callbacks that end training early; `None` leaves one out."""
    callbacks: list[TrainerCallback] = []
    if loss_threshold is not None:
        callbacks.append(LossThresholdCallback(loss_threshold))
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    return callbacks


class CompletionTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, with logits only in the columns where some record of the batch has a completion token.

    The loss is the same. TRL's fused head scores every position where there is no Triton, and most of ours are prompt.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"][:, 1:]  # [B, L - 1], the token that each column predicts
        columns = (labels != -100).any(dim=0).nonzero().squeeze(1)  # [C]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        )
        labels = labels[:, columns]  # [B, C]
        loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        loss = loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is over all processes, and DDP takes the mean
        return (loss, outputs) if return_outputs else loss


def tokenize_records(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]], max_length: int | None
) -> tuple[Dataset, int]:
    """Tokenises (prompt, completion) pairs apart and joins them; the loss is on the completion only.

    Returns:
        `tuple[Dataset, int]`: rows of `input_ids` and `labels` (-100 on the prompt), and how many of them lost their
        oldest titles to fit in `max_length`.
    """
    rows, shortened = [], 0
    for prompt, completion in pairs:
        completion_ids = encode_completion(tokenizer, completion)
        prompt_ids, dropped = encode_prompt(tokenizer, prompt, (max_length or 2**30) - len(completion_ids))
        shortened += dropped > 0
        rows.append({"input_ids": prompt_ids + completion_ids, "labels": [-100] * len(prompt_ids) + completion_ids})
    return Dataset.from_list(rows), shortened


def load_trainable(model_dir: Path, model_args: ModelConfig, adapter: str) -> torch.nn.Module:
    """Loads the model to be trained: in 4 or 8 bits where asked for, with the adapter it starts from, if any.

    Raises:
        `InputError`: if quantisation is asked for where there is no GPU.
    """
    quantization = get_quantization_config(model_args)
    if quantization is not None and not torch.cuda.is_available():
        raise InputError("--load_in_4bit and --load_in_8bit need a GPU; leave them out on this machine")
    if not model_args.use_peft:
        raise InputError("--use_peft false: the stages exchange adapters; leave it at true")
    return load_model(
        model_dir,
        dtype=model_args.dtype,
        adapter=adapter,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization,
    )


def remove_cut_short(folder: Path) -> None:
    """Removes the checkpoints that a kill cut short; the trainer writes `trainer_state.json` last."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            read_json(checkpoint / "trainer_state.json")
        except InputError:
            shutil.rmtree(checkpoint)


def train_and_save(trainer: Trainer, run: Run, model_dir: Path) -> None:
    """Trains, from the last checkpoint where the run was interrupted, and writes `final_model/`."""
    if is_main_process():
        remove_cut_short(run.path)
    trainer.accelerator.wait_for_everyone()
    (checkpoint,) = broadcast_object_list([get_last_checkpoint(run.path)])  # one process's word, should they differ
    if checkpoint:
        print(f"going on from {checkpoint}")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if is_main_process():
        save_adapter(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            run.path / "final_model",
            model_dir,
        )
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    run.counts.update(
        steps=result.global_step,
        train_loss=result.training_loss,
        eval_loss=[{"step": entry["step"], "eval_loss": entry["eval_loss"]} for entry in evaluations],
        best_checkpoint=trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name,
        best_eval_loss=trainer.state.best_metric,
    )
