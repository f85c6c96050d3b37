"""A scheduler's signals as requests to stop where nothing is lost: after an optimiser step, after a batch.

Where nothing else is said they end a run at once (`cebs.runs.run_folder`). Long work that can be left at certain places
only takes note of them, and leaves there by a `KeyboardInterrupt`, as after Ctrl-C: exit code 130.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from cebs.runs import on_interrupt


class Interrupts:
    """The signals that came while they were deferred.

    Args:
        received (`str`): name of the last one; empty while there is none.
    """

    def __init__(self):
        self.received = ""

    def note(self, signum: int, frame: Any) -> None:
        """The signal handler."""
        self.received = signal.Signals(signum).name

    def leave_together(self) -> None:
        """To be called by every process when its work is done or can be left; they leave if a signal came to one.

        Raises:
            `KeyboardInterrupt`: naming the signal, or because another process has ended or does not come here.
        """
        try:
            received = [name for name in gather_object([self.received]) if name]
        except RuntimeError as error:
            raise KeyboardInterrupt(self.received or "another process has ended") from error
        if received:
            raise KeyboardInterrupt(received[0])


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Takes note of SIGTERM and SIGUSR1 in place of ending the run; Ctrl-C ends it as ever.

    ```python
    with deferred_interrupts() as interrupts:
        for batch in batches:
            write(work(batch))
            if interrupts.received:
                break
        interrupts.leave_together()
    ```
    """
    interrupts = Interrupts()
    with on_interrupt(interrupts.note):
        yield interrupts


class SaveAndLeaveCallback(TrainerCallback):
    """After a signal, saves a checkpoint at the end of the optimiser step and leaves the training.

    Processes get the signal at different moments, so they agree after each step whether to leave, and leave together.
    transformers' own `enable_jit_checkpoint` does not do that, knows SIGTERM only, and may save in the middle of a
    step, where the gradients gathered so far are lost.

    Args:
        interrupts (`Interrupts`): what came.
    """

    def __init__(self, interrupts: Interrupts):
        self.interrupts = interrupts
        self.leaving = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.leaving = self._any_process(args)
        # the evaluation at the end of an epoch belongs to its last step: a checkpoint between them would skip it
        if self.leaving and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.leaving:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a training that ends here anyway ends as it would have
        if self.leaving and not control.should_training_stop:
            PartialState().wait_for_everyone()  # or the first to leave would take along one that still writes
            raise KeyboardInterrupt(self.interrupts.received or "a signal to another process")

    def _any_process(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return bool(self.interrupts.received)
        return bool(reduce(torch.tensor(float(bool(self.interrupts.received)), device=args.device)))


def train_until_interrupted(trainer: Trainer, checkpoint: str | None) -> TrainOutput:
    """Trains, from a checkpoint if given; a signal saves another one first.

    Raises:
        `KeyboardInterrupt`: after a signal, when the checkpoint is written.
    """
    with deferred_interrupts() as interrupts:
        trainer.add_callback(SaveAndLeaveCallback(interrupts))
        return trainer.train(resume_from_checkpoint=checkpoint)
