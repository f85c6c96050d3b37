"""Losses that are no longer numbers: where training stops, and what it says."""

import math

import pytest
import torch
from conftest import run_main
from datasets import Dataset
from preference_training import LISTS, PAIRS, make_adapted, make_trainer
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cebs.guards import RECORD, FiniteLossMixin, last_good_checkpoint
from utils import ADAPTER_WEIGHTS, InputError, load_tokenizer, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil(dataset, record):
    """Makes the reference log-probabilities of one record, and with them its loss, not a number."""
    values = dataset["ref_logps"]
    return dataset.remove_columns("ref_logps").add_column(
        "ref_logps", [[math.nan] * len(row) if i == record else row for i, row in enumerate(values)]
    )


def alignment(tiny_model, folder, **more):
    batches = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "save_strategy": "no"}
    model = make_adapted(tiny_model)
    return make_trainer(model, tiny_model, folder, PAIRS, precompute_ref_log_probs=True, **batches, **more)


def test_training_stops_before_the_weights_are_spoilt(tiny_model, tmp_path):
    trainer = alignment(tiny_model, tmp_path, max_steps=4, gradient_accumulation_steps=2)
    trainer.train_dataset = spoil(trainer.train_dataset, 2)
    with pytest.raises(InputError, match=r"^step [12]: the loss is nan on training records 2; .* is none; try a lower"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_evaluation_stops_too(tiny_model, tmp_path):
    trainer = alignment(tiny_model, tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = spoil(trainer.eval_dataset, 3)
    with pytest.raises(InputError, match="^evaluation after step 1: the loss is nan on validation records 3; "):
        trainer.train()


def test_batches_know_their_records(tiny_model, tmp_path):
    trainer = make_trainer(make_adapted(tiny_model), tiny_model, tmp_path, LISTS, shared_prompt=False)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch[RECORD].tolist()) == [0, 1, 2]
    for row, record in enumerate(batch[RECORD].tolist()):
        assert batch["is_completion"][row].sum() == 1 + len(LISTS[record]["rejected"])


def test_sft_stops_too(tiny_model, tmp_path):
    class Guarded(FiniteLossMixin, SFTTrainer):
        def _set_signature_columns_if_needed(self):
            self._signature_columns = [RECORD, "input_ids", "labels"]

    def collate(rows):
        records = torch.tensor([row[RECORD] for row in rows])
        return {**DataCollatorForLanguageModeling(pad_token_id=0)(rows), RECORD: records}

    rows = [{RECORD: index, "input_ids": [5, 6, 7], "labels": [-100, 6, 7]} for index in range(2)]
    model = make_adapted(tiny_model)
    trainer = Guarded(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            report_to=[],
            bf16=False,
            per_device_train_batch_size=2,
            max_steps=3,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=load_tokenizer(tiny_model),
    )
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "mlp" in name and "lora_B" in name).fill_(math.inf)
    with pytest.raises(InputError, match="^step 1: the loss is nan on training records 0, 1; "):
        trainer.train()


def test_last_good_checkpoint(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    for step, value in ((2, 1.0), (9, -3.0), (10, math.nan), (11, math.inf)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"a": torch.zeros(2), "b": torch.tensor([value])}, tmp_path / f"checkpoint-{step}" / ADAPTER_WEIGHTS)
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-9"  # by number, not by name
    for step in (2, 9):
        save_file({"a": torch.tensor([math.nan])}, tmp_path / f"checkpoint-{step}" / ADAPTER_WEIGHTS)
    assert last_good_checkpoint(tmp_path) is None


def test_a_learning_rate_that_overflows(tiny_model, tmp_path):
    """The command line: one line, the run is recorded as failed, the checkpoint from before is whole."""
    write_json(tmp_path / "pairs.json", PAIRS)
    files = ("--train_data", tmp_path / "pairs.json", "--valid_data", tmp_path / "pairs.json")
    where = ("--model_name_or_path", tiny_model, "--output_dir", tmp_path / "out")
    rate = ("--learning_rate", "1e38", "--optim", "sgd", "--lr_scheduler_type", "constant_with_warmup")
    warm_up = ("--warmup_steps", "1", "--loss_threshold", "-1")  # the rate of the first step is 0
    batches = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--num_train_epochs", "4")
    with pytest.raises(InputError) as error:
        run_main("DPO_from_dpoData", *files, *where, *rate, *warm_up, *batches)
    message = str(error.value)
    assert message.startswith("evaluation after step 2: the loss is nan on validation records 0, 1, 2, 3; ")
    assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-1'}; " in message and "\n" not in message
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "out/checkpoint-1" / ADAPTER_WEIGHTS).values()
    )
    run = read_json(tmp_path / "out" / "run.json")
    assert run["state"] == "failed" and run["reason"] == f"InputError: {message}"
    assert not (tmp_path / "out" / "final_model").exists()
