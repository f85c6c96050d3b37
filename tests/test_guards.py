"""Losses and logits that are no longer numbers: where training and decoding stop, and what they say."""

import math
import shutil

import pytest
import torch
from conftest import edit_json, run_main
from datasets import Dataset
from preference_training import LISTS, PAIRS, make_adapted, make_trainer
from safetensors.torch import load_file, save_file
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cebs.catalogue import load_catalogue
from cebs.guards import RECORD, FiniteLossMixin, last_good_checkpoint
from cebs.prompts import encode_completion, quote, read_records
from cebs.runs import ADAPTER_WEIGHTS
from utils import InputError, load_tokenizer, read_json, write_json

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
            activation_checkpointing=False,
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
    for step in (12, 13):  # a kill, or a full disk, cut two short
        (tmp_path / f"checkpoint-{step}").mkdir()
    whole = (tmp_path / "checkpoint-9" / ADAPTER_WEIGHTS).read_bytes()
    (tmp_path / "checkpoint-13" / ADAPTER_WEIGHTS).write_bytes(whole[:-1])
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
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


# --- decoding ---

DECODING = ("--max_new_tokens", 6, "--batch_size", 3, "--rows", 2, "--dtype", "float32")


def spoilt_model(tiny_model, folder, name, row):
    """A copy of the model with a row of one weight that is not a number."""
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][row] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "how", [(), ("--decoding", "constrained_beam", "--num_beams", 3)], ids=["greedy", "constrained beams"]
)
def test_prediction_stops_at_the_record(tiny_model, tokenizer, data_dir, tmp_path, how):
    """The model is spoilt for a token that only the sixth record has."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    edit_json(data / "test_sample.json", lambda records: records[5].update(instruction="☃"))
    elsewhere = [tokenizer(record.prompt).input_ids for record in read_records(data_dir / "test_sample.json")]
    elsewhere += [encode_completion(tokenizer, quote(title)) for title in load_catalogue(data_dir).titles]
    token = (set(tokenizer("☃").input_ids) - set().union(*elsewhere)).pop()
    model = spoilt_model(tiny_model, tmp_path / "model", "model.embed_tokens.weight", token)

    flags = ("--data_dir", data, "--model_name_or_path", model, *DECODING, *how)
    message = "^predictions: record 5: the model's logits are not finite numbers; use --dtype float32, or another"
    with pytest.raises(InputError, match=message):
        run_main("generate_predict_batch", *flags, "--output_dir", tmp_path / "out")
    run = read_json(tmp_path / "out/run.json")
    assert run["state"] == "failed" and "record 5" in run["reason"]
    assert not list((tmp_path / "out").glob("predictions/raw_results_*.json"))


@pytest.mark.parametrize("how", [("topk",), ("beam",), ("topk", "--constrained"), ("diverse_beam", "--constrained")])
def test_candidates_stop_too(tiny_model, data_dir, tmp_path, how):
    model = spoilt_model(tiny_model, tmp_path / "model", "lm_head.weight", 7)
    flags = ("--data_dir", data_dir, "--model_name_or_path", model, *DECODING, "--candidate_source", *how)
    with pytest.raises(InputError, match=r"^candidates, train: record [012]: the model's logits are not finite"):
        run_main("dataset_generate_cluster_batch", *flags, "--output_dir", tmp_path / "out")


def test_priors_that_are_not_numbers_are_not_kept(tiny_model, data_dir, tmp_path):
    model = spoilt_model(tiny_model, tmp_path / "model", "lm_head.weight", 7)
    flags = ("--data_dir", data_dir, "--model_name_or_path", model, *DECODING, "--decoding", "constrained_beam")
    cache = ("--calibration", 0.5, "--cache_dir", tmp_path / "kept")
    with pytest.raises(InputError, match="model: gives log-probabilities that are not finite numbers; use --dtype"):
        run_main("generate_predict_batch", *flags, *cache, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "kept").exists()
