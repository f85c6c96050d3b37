"""A scheduler's signals: training saves after the step and leaves, and goes on to the same weights."""

import os
import signal

import pytest
import transformers.trainer
from conftest import run_main
from transformers import TrainerCallback

import sft_smol
from cebs import training
from cebs.interrupts import deferred_interrupts
from utils import read_json

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, STEPS = 2, 3  # twelve records in batches of four


class SignalCallback(TrainerCallback):
    """Sends this process a signal at the beginning of an optimiser step."""

    def __init__(self, signum: int, step: int):
        self.signum, self.step = signum, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def sft(tiny_model, data_dir, tmp_path):
    def run(name, *more):
        flags = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--num_train_epochs", EPOCHS)
        run_main("sft_smol", *flags, "--learning_rate", "0.01", "--output_dir", tmp_path / name, *more)
        return tmp_path / name

    return run


def weights(folder):
    (path,) = folder.glob("final_model/*.safetensors")  # an adapter's, or the model's
    return path.read_bytes()


# within an epoch, also between the batches of a step; in the last step of one, whose evaluation is still to come
@pytest.mark.parametrize(
    ("step", "saved", "accumulation", "adapter"),
    [(1, 2, 1, True), (4, 5, 2, True), (2, 3, 1, True), (1, 2, 1, False)],
)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_weights(
    sft, monkeypatch, step, saved, accumulation, adapter
):
    more = ("--per_device_train_batch_size", 4 // accumulation, "--gradient_accumulation_steps", accumulation)
    more += ("--use_peft", "true" if adapter else "false")
    whole = sft("whole", *more)
    with monkeypatch.context() as patched:
        callbacks = training.stopping_callbacks
        patched.setattr(
            sft_smol,
            "stopping_callbacks",
            lambda *args: [*callbacks(*args), SignalCallback(signal.SIGUSR1, step)],
        )
        with pytest.raises(KeyboardInterrupt, match="SIGUSR1"):
            sft("stopped", *more)
    stopped = read_json(whole.parent / "stopped/run.json")
    assert (stopped["state"], stopped["reason"]) == ("interrupted", "KeyboardInterrupt: SIGUSR1")
    assert (whole.parent / f"stopped/checkpoint-{saved}/trainer_state.json").is_file()
    assert not (whole.parent / "stopped/final_model").exists()
    resumed = sft("stopped", *more)
    assert weights(resumed) == weights(whole)
    runs = [read_json(folder / "run.json")["counts"] for folder in (whole, resumed)]
    assert runs[0]["eval_loss"] == runs[1]["eval_loss"]


def test_a_signal_in_the_last_step_does_not_keep_a_training_from_its_end(sft, monkeypatch):
    whole = sft("whole")
    callback = SignalCallback(signal.SIGTERM, EPOCHS * STEPS - 1)
    monkeypatch.setattr(sft_smol, "stopping_callbacks", lambda *args: [callback])
    assert weights(sft("signalled")) == weights(whole)


def end_at(monkeypatch, owner, name, call):
    """Makes a call of a function (counted from 1) end the run, as a kill would."""
    original, calls = getattr(owner, name), []

    def ended(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, ended)


@pytest.mark.parametrize(
    ("flags", "owner", "name", "call", "steps"),
    [
        # stopped in the middle of an epoch, and the end came before final_model
        (("--eval_steps", 2, "--save_steps", 2, "--early_stopping_patience", 1), training, "save_trained", 1, 4),
        # the same at the end of an epoch
        (("--eval_steps", 3, "--save_steps", 3, "--early_stopping_patience", 1), training, "save_trained", 1, 6),
        # after the third evaluation, when two had been without improvement
        (
            ("--eval_steps", 2, "--save_steps", 2, "--early_stopping_patience", 3),
            transformers.trainer,
            "rotate_checkpoints",
            3,
            8,
        ),
        # the last step is in the middle of an epoch
        (("--eval_steps", 2, "--save_steps", 2, "--max_steps", 4), training, "save_trained", 1, 4),
    ],
)
def test_a_training_that_was_over_is_not_taken_up_again(sft, monkeypatch, flags, owner, name, call, steps):
    flags += ("--eval_strategy", "steps", "--save_strategy", "steps", "--num_train_epochs", 9)
    if "--max_steps" not in flags:
        flags += ("--greater_is_better", "true")  # and the loss falls: no evaluation after the first is better
    whole = sft("whole", *flags)
    with monkeypatch.context() as patched:
        end_at(patched, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            sft("ended", *flags)
    resumed = sft("ended", *flags)
    assert weights(resumed) == weights(whole)
    runs = [read_json(folder / "run.json")["counts"] for folder in (whole, resumed)]
    assert runs[0]["steps"] == runs[1]["steps"] == steps
    assert [entry["step"] for entry in runs[1]["eval_loss"]] == [entry["step"] for entry in runs[0]["eval_loss"]]
    assert runs[0]["best_checkpoint"] == runs[1]["best_checkpoint"]


def test_signals_wait_for_a_place_where_the_work_can_be_left():
    done = []
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), deferred_interrupts() as interrupts:
        for batch in range(3):
            if batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(batch)
            if interrupts.received:
                break
        interrupts.leave_together()
    assert done == [0, 1]
    assert signal.getsignal(signal.SIGUSR1) == before
