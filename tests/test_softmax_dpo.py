"""S-DPO: the loss, both row layouts, the reference, and equality with TRL's own DPO trainer."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from peft import LoraConfig
from preference_training import (
    CATALOGUE,
    LISTS,
    PAIRS,
    PROMPTS,
    RATIOS,
    ApartDPOTrainer,
    assert_same_step,
    loss_of_one,
    make_adapted,
    make_trainer,
    step,
)

from cebs.models import load_model
from cebs.softmax_dpo import (
    RepeatedPromptCollator,
    SharedPromptCollator,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    repeated_log_probs,
    softmax_dpo_loss,
)
from cebs.training import LossThresholdCallback
from utils import load_tokenizer


@pytest.fixture
def adapted(tiny_model):
    return make_adapted(tiny_model)


def test_loss_is_dpo_with_one_rejected_title():
    chosen, rejected = torch.tensor([0.4, -1.0]), torch.tensor([[0.1], [2.0]])
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected[:, 0]))
    torch.testing.assert_close(softmax_dpo_loss(chosen, rejected, torch.ones(2, 1, dtype=torch.bool), 0.1), expected)


@settings(max_examples=50, deadline=None)
@given(*RATIOS)
def test_loss_equals_the_formula(chosen, rejected, beta):
    total = sum(math.exp(beta * (value - chosen)) for value, present in rejected if present)
    expected = math.log1p(total)  # -log sigmoid(-log total)
    assert loss_of_one(softmax_dpo_loss, chosen, rejected, beta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_loss_does_not_overflow():
    chosen = torch.tensor([-4000.0], requires_grad=True)
    loss = softmax_dpo_loss(chosen, torch.tensor([[4000.0, 0.0]]), torch.tensor([[True, True]]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(8000) and chosen.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("shared", [True, False])
def test_one_rejected_title_is_trls_dpo(adapted, tiny_model, tmp_path, shared):
    """Loss, gradients and logged rewards; the reference is a frozen copy of the adapter on the same weights."""
    trainer = make_trainer(adapted, tiny_model, tmp_path / "ours", PAIRS, shared_prompt=shared)
    ours = step(trainer)
    assert trainer.ref_model is None and "ref" in trainer.model.peft_config
    theirs = step(make_trainer(make_adapted(tiny_model), tiny_model, tmp_path / "trl", PAIRS, base=ApartDPOTrainer))
    assert_same_step(ours, theirs)
    assert ours[0] != pytest.approx(math.log(2), abs=1e-3), "the policy has not moved, the test shows nothing"


@pytest.mark.parametrize(("precompute", "catalogue"), [(True, None), (False, None), (True, CATALOGUE)])
def test_shared_rows_equal_repeated_prompts(tiny_model, tmp_path, precompute, catalogue):
    """Lists of different lengths, prompts of very different lengths, one-letter titles."""
    steps = []
    for shared in (True, False):
        model = make_adapted(tiny_model, std=0)
        settings = {"precompute_ref_log_probs": precompute, "catalogue": catalogue}
        trainer = make_trainer(model, tiny_model, tmp_path / str(shared), LISTS, shared_prompt=shared, **settings)
        steps.append(step(trainer))
    assert_same_step(*steps)


@pytest.mark.parametrize("shared", [True, False])
def test_log_probs_among_the_titles_of_a_catalogue_are_a_distribution_over_them(adapted, tiny_model, tmp_path, shared):
    """After one prompt, every title of the catalogue once; and no text outside the catalogue can take of theirs."""
    record = {
        "prompt": PROMPTS[0],
        "chosen": f'"{CATALOGUE[0]}"',
        "rejected": [f'"{title}"' for title in CATALOGUE[1:]],
    }
    settings = {"shared_prompt": shared, "catalogue": CATALOGUE}
    trainer = make_trainer(adapted, tiny_model, tmp_path, [record], **settings)
    log_probs = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert log_probs.shape == (1, len(CATALOGUE)) and log_probs.max() < 0
    torch.testing.assert_close(log_probs.double().exp().sum(1), torch.ones(1, dtype=torch.double), atol=1e-5, rtol=0)


def test_reference_log_probs_once_or_each_time(adapted, tiny_model, tmp_path):
    trainer = make_trainer(adapted, tiny_model, tmp_path, LISTS, precompute_ref_log_probs=True)
    rows = list(trainer.train_dataset)
    assert [len(row["ref_logps"]) for row in rows] == [4, 2, 3]
    batch = trainer.data_collator(rows)
    again = trainer.compute_ref_log_probs(trainer.model, batch)
    torch.testing.assert_close(batch["ref_logps"], again, atol=1e-4, rtol=1e-4)
    assert (again[~batch["is_completion"]] == 0).all()


def test_reference_without_an_adapter_is_the_base_model(tiny_model, tmp_path):
    base = load_model(tiny_model)
    args = SoftmaxDPOConfig(output_dir=str(tmp_path), report_to=[], bf16=False, activation_checkpointing=False)
    trainer = SoftmaxDPOTrainer(
        model=load_model(tiny_model),
        args=args,
        train_dataset=Dataset.from_list(LISTS),
        processing_class=load_tokenizer(tiny_model),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter += 1.0
        repeated = RepeatedPromptCollator(trainer.processing_class.pad_token_id)(list(trainer.train_dataset))
        expected = repeated_log_probs(base, repeated)
    batch = trainer.data_collator(list(trainer.train_dataset))
    torch.testing.assert_close(trainer.compute_ref_log_probs(trainer.model, batch), expected, atol=1e-4, rtol=1e-4)


def test_training_on_mixed_lists_widens_the_margin(adapted, tiny_model, tmp_path):
    trainer = make_trainer(
        adapted, tiny_model, tmp_path, LISTS, max_steps=12, learning_rate=1e-2, save_strategy="no", logging_steps=1
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    mean_of_logs = sum(math.log1p(len(record["rejected"])) for record in LISTS) / len(LISTS)
    assert losses[0] == pytest.approx(mean_of_logs, abs=1e-3)  # policy and reference begin equal: log(1 + K)
    assert losses[-1] < losses[0] and margins[-1] > margins[0]


def test_both_layouts_have_one_loss_curve(tiny_model, tmp_path):
    curves = []
    for shared in (True, False):
        model = make_adapted(tiny_model, std=0)
        settings = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1}
        trainer = make_trainer(model, tiny_model, tmp_path / str(shared), LISTS, shared_prompt=shared, **settings)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], abs=2e-4) and curves[0][-1] < curves[0][0]


def test_collators_show_what_their_docstrings_say():
    record = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9]}
    shared = SharedPromptCollator(pad_token_id=0)([record | {"rejected_ids": [[10, 9]]}])
    assert shared["input_ids"].tolist() == [[5, 6, 7, 8, 7, 10]]
    assert shared["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3]]
    assert shared["labels"].tolist() == [[8, 9, 10, 9]] and shared["branch_ids"].tolist() == [[0, 0, 1, 1]]
    repeated = RepeatedPromptCollator(pad_token_id=0)([record | {"rejected_ids": [[10]]}])
    assert repeated["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 10, 0]]
    assert repeated["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    assert repeated["row"].tolist() == [[0, 1]]


def test_long_prompts_lose_their_oldest_titles(adapted, tiny_model, tmp_path):
    titles = ", ".join(f'"Title {number}"' for number in range(30))
    record = {"prompt": f"### Input:\n{titles}\n### Response:\n", "chosen": '"A"', "rejected": ['"B"']}
    trainer = make_trainer(adapted, tiny_model, tmp_path, [record], max_length=120)
    row = trainer.train_dataset[0]
    assert trainer.shortened_prompts == 2  # in the training and in the evaluation data
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"][0])) <= 120
    text = trainer.processing_class.decode(row["prompt_ids"])
    assert text.startswith("### Input:") and text.endswith('"Title 29"\n### Response:\n') and '"Title 0"' not in text


def test_loss_threshold_stops_training(adapted, tiny_model, tmp_path):
    trainer = make_trainer(
        adapted,
        tiny_model,
        tmp_path,
        PAIRS,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
    )
    trainer.add_callback(LossThresholdCallback(10.0))
    trainer.train()
    assert trainer.state.global_step == 1
