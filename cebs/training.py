"""What the two training stages share: precision by hardware, tokenised records, callbacks, and the training itself."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTTrainer, get_quantization_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cebs.choices import CatalogueChoices
from cebs.commands import check_counts
from cebs.errors import InputError
from cebs.files import read_json, write_json
from cebs.guards import RECORD, FiniteLossMixin
from cebs.interrupts import train_until_interrupted
from cebs.models import base_fingerprint, load_model, save_trained
from cebs.processes import has_fast_bf16, is_main_process, record_seed
from cebs.prompts import (
    Record,
    encode_completion,
    movable_titles,
    reordered,
    shorten_prompt,
    title_tokens,
    unquote,
    without_titles,
)
from cebs.runs import Run, run_folder


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


def training_run(
    script: str,
    script_args: TrainingScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    model_dir: Path,
    adapter: str,
    inputs: Iterable[str | Path],
) -> AbstractContextManager[Run]:
    """Opens the run folder of a training script, as `run_folder` does, with all of its arguments recorded."""
    return run_folder(
        training_args.output_dir,
        script=script,
        arguments=asdict(script_args) | training_args.to_dict() | asdict(model_args),
        inputs=inputs,
        base_model=base_fingerprint(model_dir),
        adapter=adapter,
        outputs=("final_model", "training_log.json"),
        scratch=("checkpoint-*", "runs", "README.md"),
        overwrite=script_args.overwrite,
    )


class HardwareDefaults:
    """Settings of TRL's configs that follow from the machine where the user leaves them open."""

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = has_fast_bf16() and not self.fp16
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else bf16 is refused on a CPU
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
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


class CompletionCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the labels of the history and the catalogue's edges beside the labels of the answer.

    ```python
    >>> none = -100
    >>> rows = [
    ...     {"record": 0, "input_ids": [1, 2, 3], "labels": [none, none, 3], "history_labels": [none, 2, none]},
    ...     {"record": 1, "input_ids": [4, 5], "labels": [none, 5], "history_labels": [none, none]},
    ... ]
    >>> CompletionCollator(pad_token_id=0)([row | {"edges": [0] * len(row["labels"])} for row in rows])
    {'input_ids': tensor([[1, 2, 3], [4, 5, 0]]),
     'labels': tensor([[-100, -100, 3], [-100, 5, -100]]),
     'attention_mask': tensor([[1, 1, 1], [1, 1, 0]]),
     'history_labels': tensor([[-100, 2, -100], [-100, -100, -100]]),
     'edges': tensor([[0, 0, 0], [0, 0, 0]]),
     'record': tensor([0, 1])}
    ```
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        for name, padding in (("history_labels", -100), ("edges", 0)):
            batch[name] = torch.full_like(batch["labels"], padding)
            for row, example in zip(batch[name], examples, strict=True):
                row[: len(example[name])] = torch.tensor(example[name])
        batch[RECORD] = torch.tensor([example[RECORD] for example in examples])
        return batch


class CompletionTrainer(FiniteLossMixin, SFTTrainer):
    """TRL's `SFTTrainer` for answers and, with a weight, for the titles of the history before them.

    The loss is a weighted mean over tokens: 1 for each token of an answer, `history_loss_weight` for each token of
    `history_labels`. Rows without the latter, which is what to evaluate on, have TRL's loss.

    Logits are computed only in the columns where some record of the batch has a label: TRL's fused head scores every
    position where there is no Triton, and most of ours are prompt.

    Args:
        history_loss_weight (`float`): weight of a token of the history.
        choices (`CatalogueChoices`, *optional*): takes each token's loss among the tokens that the catalogue goes on
            with; the rows have labels at its choices only. Left out, the loss is among all tokens.
        kwargs: `SFTTrainer`'s own arguments.
    """

    def __init__(self, *, history_loss_weight: float, choices: CatalogueChoices | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.history_loss_weight, self.choices = history_loss_weight, choices
        self.data_collator = CompletionCollator(**vars(self.data_collator))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [RECORD, "input_ids", "labels", "history_labels", "edges"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Returns the batches of one optimiser step, and the sum of their tokens' weights over all processes."""
        batches, answer_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        history_tokens = torch.stack([(batch["history_labels"][:, 1:] != -100).sum() for batch in batches]).sum()
        if self.args.average_tokens_across_devices:
            history_tokens = self.accelerator.gather(history_tokens.to(device)).sum()
        return batches, answer_tokens + self.history_loss_weight * history_tokens

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # the token that each column predicts
        answer, history = inputs["labels"][:, 1:], inputs["history_labels"][:, 1:]  # [B, L - 1] each
        columns = ((answer != -100) | (history != -100)).any(dim=0).nonzero().squeeze(1)  # [C]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        )
        answer, history = answer[:, columns].flatten(), history[:, columns].flatten()  # [B * C] each
        logits = outputs.logits.flatten(0, 1)  # [B * C, V]
        if self.choices is None:
            log_probs = logits.float().log_softmax(dim=-1)
            loss = F.nll_loss(log_probs, answer, reduction="sum")
            loss = loss + self.history_loss_weight * F.nll_loss(log_probs, history, reduction="sum")
        else:
            edges = inputs["edges"][:, 1:][:, columns].flatten()
            weights = (answer != -100) + self.history_loss_weight * (history != -100)
            chosen = edges.nonzero().squeeze(1)
            loss = weights[chosen] @ self.choices.losses(logits[chosen], edges[chosen])
        if num_items_in_batch is None:
            loss = loss / ((answer != -100).sum() + self.history_loss_weight * (history != -100).sum())
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the sum is over all processes, and DDP takes the mean
        return (loss, outputs) if return_outputs else loss


def with_copies(
    records: Sequence[Record], copies: int, shuffle: bool, dropout: float, seed: int
) -> list[tuple[int, Record]]:
    """Returns each record with its number: as it is, and then `copies - 1` times changed.

    What is drawn for a copy depends on the seed, its number among the copies and the record's number alone.

    Args:
        records: the training records.
        copies: how often each record is there.
        shuffle: whether a copy has its titles in a random order; one of the history may become the target.
        dropout: probability with which a title of the history is missing in a copy; the latest stays where all would.
        seed: what is drawn starts from it.
    """
    numbered = list(enumerate(records))
    for copy in range(1, copies):
        for number, record in enumerate(records):
            rng = np.random.default_rng(record_seed(seed, f"copy/{copy}", number))
            if shuffle:
                record = reordered(record, rng.permutation(len(movable_titles(record))))
            left_out = rng.random(len(record.history)) < dropout
            left_out[-1:] &= not left_out.all()
            numbered.append((number, without_titles(record, left_out)))
    return numbered


def tokenize_records(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int | None,
    label_history: bool = False,
    numbers: Sequence[int] | None = None,
    choices: CatalogueChoices | None = None,
) -> tuple[Dataset, int]:
    """Tokenises (prompt, completion) pairs apart and joins them.

    Args:
        tokenizer: the model's tokenizer.
        pairs: prompts and completions.
        max_length: how many tokens a row may have; `None` is no limit.
        label_history: whether the titles of the history have labels too, all but the first, which nothing foretells.
        numbers: the number of each pair's record in its file; left out, the pairs are the file's records.
        choices: leaves labels only where the catalogue leaves a choice; completions are titles of it.

    Returns:
        `tuple[Dataset, int]`: rows of `input_ids`, `labels` (the completion; -100 elsewhere), `history_labels` (the
        titles of the history; -100 elsewhere) and `edges` (of the catalogue's choices; 0 elsewhere), and how many
        prompts lost their oldest titles to fit in `max_length`.
    """
    rows, shortened = [], 0
    for number, (prompt, completion) in zip(numbers or range(len(pairs)), pairs, strict=True):
        completion_ids = encode_completion(tokenizer, completion)
        prompt, dropped = shorten_prompt(tokenizer, prompt, (max_length or 2**30) - len(completion_ids))
        prompt_ids = tokenizer(prompt).input_ids
        shortened += dropped > 0
        input_ids = prompt_ids + completion_ids
        answer = (unquote(completion), range(len(prompt_ids), len(input_ids)))
        history = title_tokens(tokenizer, prompt)[1:] if label_history else []
        row = {RECORD: number, "input_ids": input_ids, "edges": [0] * len(input_ids)}
        for name, titles in (("labels", [answer]), ("history_labels", history)):
            row[name] = [-100] * len(input_ids)
            for title, span in titles:
                place = slice(span.start, span.stop)
                row[name][place] = input_ids[place]
                if choices is not None:
                    row["edges"][place] = edges = choices.edges(title, input_ids[place])
                    row[name][place] = np.where(edges, input_ids[place], -100).tolist()
        rows.append(row)
    return Dataset.from_list(rows), shortened


def load_trainable(model_dir: Path, model_args: ModelConfig, adapter: str) -> torch.nn.Module:
    """Loads the model to be trained: in 4 or 8 bits where asked for, with the adapter it starts from, if any.

    Raises:
        `InputError`: if quantisation is asked for where there is no GPU, or for weights that are to be trained.
    """
    quantization = get_quantization_config(model_args)
    if quantization is not None and not torch.cuda.is_available():
        raise InputError("--load_in_4bit and --load_in_8bit need a GPU; leave them out on this machine")
    if quantization is not None and not model_args.use_peft:
        raise InputError("--use_peft false: weights in 4 or 8 bits are not trained; leave out one of the two flags")
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
            read_trainer_state(checkpoint)
        except InputError:
            shutil.rmtree(checkpoint)


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Reads what the trainer wrote; the norm of a step's gradients may be NaN."""
    return read_json(checkpoint / "trainer_state.json", finite=False)


def prepare_to_go_on(args: TrainingArguments, checkpoint: str) -> None:
    """Sets what transformers would forget of a training that goes on from a checkpoint.

    Early stopping counts on, and a training that was over (its last step, early stopping, the loss threshold) is not
    taken up again: it has no epochs left, and what remains is to load the best checkpoint.
    """
    args.restore_callback_states_from_checkpoint = True
    state = read_trainer_state(Path(checkpoint))
    if state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        args.max_steps, args.num_train_epochs = -1, 0


def train_and_save(trainer: Trainer, run: Run, model_dir: Path) -> None:
    """Trains, from the last checkpoint where the run was interrupted, and writes `final_model/`."""
    if is_main_process():
        remove_cut_short(run.path)
    trainer.accelerator.wait_for_everyone()
    (checkpoint,) = broadcast_object_list([get_last_checkpoint(run.path)])  # one process's word, should they differ
    if checkpoint:
        print(f"going on from {checkpoint}")
        prepare_to_go_on(trainer.args, checkpoint)
    result = train_until_interrupted(trainer, checkpoint)
    # all processes take part: FSDP and ZeRO-3 have split the weights among them
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_main_process():
        write_json(run.path / "training_log.json", trainer.state.log_history)
        save_trained(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            run.path / "final_model",
            model_dir,
            state_dict,
        )
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    run.counts.update(
        steps=result.global_step,
        train_loss=result.training_loss,
        eval_loss=[{"step": entry["step"], "eval_loss": entry["eval_loss"]} for entry in evaluations],
        best_checkpoint=trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name,
        best_eval_loss=trainer.state.best_metric,
    )
