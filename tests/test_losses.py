"""Every loss of the alignment stage: equal to TRL's where TRL has it, the same on shared rows, refused by its rules."""

import re

import pytest
import torch
from conftest import run_main
from hypothesis import given, settings
from preference_training import (
    LISTS,
    PAIRS,
    RATIOS,
    ApartDPOTrainer,
    assert_same_step,
    loss_of_one,
    make_adapted,
    make_trainer,
    step,
)
from trl import DPOConfig

from cebs.softmax_dpo import LIST_LOSSES, TRL_LOSSES, dmpo_loss, softmax_dpo_loss
from utils import InputError, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.2}, "aot": {"label_smoothing": 0.1}}
COMBINED = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def train_step(tiny_model, folder, records, **more):
    return step(make_trainer(make_adapted(tiny_model), tiny_model, folder, records, **more))


def test_trl_has_these_losses_and_no_others():
    """A TRL that brings another loss, or drops one, is noticed here."""
    described = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert re.findall(r"`'(\w+)'`", described) == list(TRL_LOSSES)


@pytest.mark.parametrize(
    "more", [*({"loss_type": [name], **SETTINGS.get(name, {})} for name in TRL_LOSSES), COMBINED], ids=str
)
def test_loss_and_gradient_are_trls(tiny_model, tmp_path, more):
    ours = train_step(tiny_model, tmp_path / "ours", PAIRS, **more)
    theirs = train_step(tiny_model, tmp_path / "trl", PAIRS, base=ApartDPOTrainer, **more)
    assert_same_step(ours, theirs)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= ours[2].keys()
    assert ours[2].keys() < theirs[2].keys()  # and nothing is made up: TRL also logs entropy and logits


@pytest.mark.parametrize("name", [*LIST_LOSSES, *TRL_LOSSES])
def test_every_loss_is_the_same_on_shared_rows(tiny_model, tmp_path, name):
    more = {"loss_type": [name], "sft_weight": 0.5, **SETTINGS.get(name, {})}
    records = LISTS if name in LIST_LOSSES else PAIRS
    shared, repeated = (
        train_step(tiny_model, tmp_path / str(shared), records, shared_prompt=shared, **more)
        for shared in (True, False)
    )
    assert_same_step(shared, repeated)


@settings(max_examples=50, deadline=None)
@given(*RATIOS)
def test_dmpo_equals_the_formula(chosen, rejected, beta):
    present = [value for value, present in rejected if present]
    margin = torch.tensor(beta * (chosen - sum(present) / len(present)), dtype=torch.float64)
    expected = torch.log1p(torch.exp(-margin)).item()
    assert loss_of_one(dmpo_loss, chosen, rejected, beta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_list_losses_differ_on_lists_and_are_dpo_on_pairs(tiny_model, tmp_path):
    chosen, rejected = torch.tensor([0.5, -1.0]), torch.tensor([[1.0, -3.0], [2.0, 0.0]])
    one, both = torch.tensor([[True, False]] * 2), torch.tensor([[True, True]] * 2)
    assert (dmpo_loss(chosen, rejected, both, 0.3) < softmax_dpo_loss(chosen, rejected, both, 0.3)).all()
    torch.testing.assert_close(dmpo_loss(chosen, rejected, one, 0.3), softmax_dpo_loss(chosen, rejected, one, 0.3))
    steps = [
        train_step(tiny_model, tmp_path / name, PAIRS, loss_type=[name]) for name in ("softmax", "dmpo", "sigmoid")
    ]
    assert_same_step(steps[0], steps[2], tolerance=1e-6)
    assert_same_step(steps[1], steps[2], tolerance=1e-6)


def test_sft_weight_adds_the_chosen_titles_nll(tiny_model, tmp_path):
    """The NLL as transformers itself computes it: per token, then the mean over records."""
    plain, weighted = (
        train_step(tiny_model, tmp_path / str(weight), LISTS, sft_weight=weight) for weight in (0.0, 2.0)
    )
    trainer = make_trainer(make_adapted(tiny_model), tiny_model, tmp_path / "nll", LISTS)
    step(trainer)  # moves the policy to where it is in the other two
    trainer.model.zero_grad()
    losses = []
    for row in trainer.train_dataset:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        labels = torch.tensor([[-100] * len(row["prompt_ids"]) + row["chosen_ids"]])
        losses.append(trainer.model(input_ids=ids, labels=labels).loss)
    nll = torch.stack(losses).mean()
    nll.backward()
    torch.testing.assert_close(weighted[0] - plain[0], 2.0 * nll.detach(), atol=1e-4, rtol=1e-4)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, gradient in weighted[1].items():
        torch.testing.assert_close(gradient - plain[1][name], 2.0 * gradients[name], atol=1e-4, rtol=1e-3, msg=name)


def test_sft_weight_is_trls_sft_on_one_record(tiny_model, tmp_path):
    """TRL's takes the mean over the tokens of a batch, ours over its records: on one record they are the same."""
    ours = train_step(tiny_model, tmp_path / "ours", PAIRS[:1], loss_type=["sigmoid"], sft_weight=0.5)
    more = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    assert_same_step(ours, train_step(tiny_model, tmp_path / "trl", PAIRS[:1], base=ApartDPOTrainer, **more))


# --- The command line ---


@pytest.fixture
def stage(tiny_model, tmp_path):
    """Runs the alignment stage on `PAIRS`, or on `LISTS`, which have several rejected titles in records 0 and 2."""
    for name, records in (("pairs", PAIRS), ("lists", LISTS)):
        write_json(tmp_path / f"{name}.json", records)

    def run(*more, train="pairs", valid="pairs"):
        files = ("--train_data", tmp_path / f"{train}.json", "--valid_data", tmp_path / f"{valid}.json")
        where = ("--model_name_or_path", tiny_model, "--output_dir", tmp_path / "out")
        run_main("DPO_from_dpoData", *files, *where, "--max_steps", "1", "--logging_steps", "1", *more)
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("name", [*LIST_LOSSES, *TRL_LOSSES])
def test_every_loss_on_the_command_line(stage, name):
    kind = "lists" if name in LIST_LOSSES else "pairs"
    out = stage("--loss_type", name, "--label_smoothing", "0.1", "--sft_weight", "0.1", train=kind, valid=kind)
    run = read_json(out / "run.json")
    assert run["state"] == "done" and run["arguments"]["loss_type"] == [name] and run["arguments"]["sft_weight"] == 0.1
    state = read_json(out / "checkpoint-1" / "trainer_state.json")
    logged = {name for entry in state["log_history"] for name in entry}
    assert {"loss", "eval_loss", "rewards/margins", "rewards/accuracies", "eval_rewards/margins"} <= logged


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--loss_type", "ipoo"), "--loss_type ipoo: no such loss; there are softmax, dmpo, sigmoid, hinge, ipo, "),
        (("--loss_type", "softmax", "sft"), "--loss_type softmax: stands alone; --sft_weight adds"),
        (("--loss_type", "sigmoid", "dmpo"), "--loss_type dmpo: stands alone"),
        (("--loss_type", "sigmoid", "sft", "--loss_weights", "1"), "`loss_weights` must have the same length"),
        (("--loss_type", "exo_pair"), "--label_smoothing 0.0: exo_pair takes one between 0 and 1"),
        (("--loss_type", "robust", "--label_smoothing", "0.5"), "--label_smoothing 0.5: robust takes"),
        (("--sft_weight", "-0.1"), "--sft_weight -0.1: must be 0 or more"),
        (("--sft_weight", "nan"), "--sft_weight nan: must be 0 or more"),
        (("--beta", "0"), "--beta 0.0: must be above 0"),
        (("--ld_alpha", "0.5"), "--ld_alpha 0.5: is not supported here; leave it out"),
        (("--use_weighting",), "--use_weighting True: is not supported here; leave it out"),
        (("--f_divergence_type", "forward_kl"), "--f_divergence_type forward_kl: is not supported here"),
    ],
)
def test_bad_settings_are_refused(stage, tmp_path, more, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        stage(*more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_a_loss_for_pairs_refuses_lists_before_anything_is_loaded(stage, tmp_path, name, monkeypatch):
    monkeypatch.setattr("DPO_from_dpoData.find_model", None)  # calling it would be a TypeError
    complaint = f"lists.json: record 0: has 3 rejected titles, and --loss_type {name} takes one; use softmax or dmpo"
    for files in ({"train": "lists"}, {"valid": "lists"}):
        with pytest.raises(InputError, match=re.escape(complaint)):
            stage("--loss_type", name, "--label_smoothing", "0.1", **files)
    assert not (tmp_path / "out").exists()


def test_data_of_a_run_that_was_not_finished_are_refused(stage, tmp_path):
    run = {"script": "dataset_generate.py", "state": "interrupted", "arguments": {}, "inputs": {}}
    write_json(tmp_path / "random" / "run.json", run)
    write_json(tmp_path / "random" / "data" / "pairs.json", PAIRS)
    for files in ({"train": "random/data/pairs"}, {"valid": "random/data/pairs"}):
        with pytest.raises(InputError, match="data/pairs.json: dataset_generate.py is interrupted in .*random; run it"):
            stage(**files)
    assert not (tmp_path / "out").exists()


def test_losses_are_added_up_from_yaml(stage, tmp_path):
    (tmp_path / "mpo.yaml").write_text("loss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\n")
    arguments = read_json(stage("--config", tmp_path / "mpo.yaml") / "run.json")["arguments"]
    assert arguments["loss_type"] == ["sigmoid", "sft"] and arguments["loss_weights"] == [1.0, 0.5]


def test_only_the_records_in_use_count(stage, tmp_path):
    """A list of one title is one title, and a list beyond `--max_train_samples` is nobody's business."""
    write_json(tmp_path / "lists.json", [*PAIRS[:2], *LISTS])
    out = stage("--loss_type", "ipo", "--max_train_samples", "2", train="lists")
    assert read_json(out / "run.json")["counts"]["rejected_titles"] == 2
