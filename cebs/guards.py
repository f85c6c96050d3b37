"""Stops a training whose loss is no longer a number, before the optimizer spoils the weights with it."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cebs.errors import InputError
from cebs.runs import ADAPTER_WEIGHTS

RECORD = "record"  # in the rows of a data set and in batches: the record's number in its file, from 0


class FiniteLossMixin:
    """
    Makes a `Trainer` stop at the first loss that is NaN or infinite, in training or evaluation.

    It stands before the trainer among the base classes: `class MyTrainer(FiniteLossMixin, SFTTrainer)`. The data sets
    have a column `RECORD`, which is among the `_signature_columns`; the collator makes a tensor `[B]` of it.

    Raises:
        `InputError`: naming the step, the batch's records (of all processes) and the last good checkpoint.
    """

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite(loss, inputs, f"step {self.state.global_step + 1}", "training")
        return loss

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple:
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        self._check_finite(loss, inputs, f"evaluation after step {self.state.global_step}", "validation")
        return loss, *rest

    def _check_finite(self, loss: Tensor, inputs: dict[str, Tensor], when: str, split: str) -> None:
        losses = self.accelerator.gather(loss.detach().reshape(1))  # of all processes, which stop together
        if losses.isfinite().all():
            return
        records = ", ".join(map(str, sorted(gather_object(inputs[RECORD].tolist()))))
        checkpoint = last_good_checkpoint(self.args.output_dir)
        raise InputError(
            f"{when}: the loss is {losses.sum().item()} on {split} records {records}; the last good checkpoint is "
            f"{checkpoint or 'none'}; try a lower --learning_rate, or look at these records"
        )


def last_good_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest checkpoint of a run whose adapter weights are whole and finite; `None` if there is none."""
    checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(checkpoints):
        try:
            weights = load_file(checkpoint / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError):
            continue
        if all(tensor.isfinite().all() for tensor in weights.values()):
            return checkpoint
    return None
