"""Supervised fine-tuning: which tokens have a label, what they weigh, and that the weight changes nothing else."""

import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import SFTTrainer

from cebs.catalogue import load_catalogue
from cebs.choices import CatalogueChoices
from cebs.errors import InputError
from cebs.files import PROJECT
from cebs.models import load_model
from cebs.prompts import QUOTED, build_prompt, encode_prompt, quote, quoted_titles, read_records, title_tokens
from cebs.training import CompletionTrainer, tokenize_records, with_copies
from sft_smol import SFTArguments
from utils import base_fingerprint, check_adapter, load_tokenizer, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(deadline=None, max_examples=80)
titles = st.text(st.characters(codec="utf-8", exclude_characters='"'), max_size=15) | st.sampled_from(
    ["", " ", ",", "Emma (1815)", "Les Misérables", "百年孤独", "👩‍🚀…", "### Response:\n", "<|im_end|>"]
)
histories = st.lists(titles, max_size=8)
instructions = st.sampled_from(["Recommend a book.", 'Answer as in "Emma", please.'])


def history_prompt(instruction, history, separator=", "):
    return build_prompt(instruction, f"The user has read: {separator.join(map(quote, history))}. What comes next?")


# --- which tokens ---


@quick
@given(instruction=instructions, history=histories, separator=st.sampled_from([", ", ",", " ", "; ", ""]))
def test_title_tokens_are_the_titles_and_their_quotes(tokenizer, instruction, history, separator):
    prompt = history_prompt(instruction, history, separator)
    ids = tokenizer(prompt).input_ids
    spans = title_tokens(tokenizer, prompt)
    assert [title for title, _ in spans] == history
    for title, span in spans:
        pieces = [tokenizer.decode(ids[index]) for index in span]
        assert quote(title) in tokenizer.decode(ids[span.start : span.stop])
        # no token more: the first and the last hold a quote
        assert '"' in pieces[0] and '"' in pieces[-1]
    assert all(one.start < two.start and one.stop <= two.start + 1 for (_, one), (_, two) in pairwise(spans))


def test_a_blank_input_has_no_titles(tokenizer):
    assert title_tokens(tokenizer, build_prompt('Answer as in "Emma".', " ")) == []


@quick
@given(instruction=instructions, history=histories, data=st.data())
def test_every_title_but_the_first_has_labels(tokenizer, instruction, history, data):
    """Also of a prompt that is too long, where the first is the oldest that is left."""
    prompt, answer = history_prompt(instruction, history), '"Dune"\n'
    (row,), _ = tokenize_records(tokenizer, [(prompt, answer)], None)
    shortest, longest = len(tokenizer(history_prompt(instruction, [])).input_ids), len(row["input_ids"])
    answer_tokens = longest - row["labels"].count(-100)
    max_length = data.draw(st.integers(min(shortest + answer_tokens + 2, longest), longest))
    (plain,), plain_shortened = tokenize_records(tokenizer, [(prompt, answer)], max_length)
    (row,), shortened = tokenize_records(tokenizer, [(prompt, answer)], max_length, label_history=True)
    assert shortened == plain_shortened == (max_length < longest)
    assert (row["input_ids"], row["labels"]) == (plain["input_ids"], plain["labels"])
    assert set(plain["history_labels"]) == {-100}
    prompt_ids, dropped = encode_prompt(tokenizer, prompt, max_length - answer_tokens)
    assert row["input_ids"][:-answer_tokens] == prompt_ids  # one prompt, in training and in decoding
    labelled = tokenizer.decode([label for label in row["history_labels"] if label != -100])
    assert quoted_titles(labelled) == history[dropped + 1 :]
    assert not QUOTED.sub("", labelled).strip(" ,.")  # at most the commas between them
    for token, label, history_label in zip(row["input_ids"], row["labels"], row["history_labels"], strict=True):
        assert history_label == -100 or (history_label == token and label == -100)


# --- what they weigh ---


@pytest.fixture(scope="module")
def pairs(data_dir):
    return [(record.prompt, record.output) for record in read_records(data_dir / "train_sample.json")]


def make_trainer(tiny_model, folder, pairs, weight, trainer=CompletionTrainer, choices=None, **arguments):
    """A trainer on the tiny model with an adapter whose second half is not zero, without dropout."""
    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    dataset, _ = tokenize_records(tokenizer, pairs, 1024, label_history=weight > 0, choices=choices)
    return trainer(
        model=get_peft_model(load_model(tiny_model), config),
        args=SFTArguments(
            output_dir=str(folder),
            save_strategy="no",
            logging_steps=1,
            warmup_steps=0,
            activation_checkpointing=False,
            bf16=False,
            **arguments,
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        **({"history_loss_weight": weight, "choices": choices} if trainer is CompletionTrainer else {}),
    )


@pytest.fixture(scope="module")
def choices(tiny_model, data_dir):
    return CatalogueChoices(load_tokenizer(tiny_model), load_catalogue(data_dir).titles)


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_loss_is_the_weighted_mean_over_tokens(tiny_model, tmp_path, pairs, choices, renormalize):
    """Against all logits, token by token; and a training step divides by the same sum of weights."""
    trainer = make_trainer(
        *(tiny_model, tmp_path, pairs[:3]),
        weight=0.3,
        choices=choices if renormalize else None,
        per_device_train_batch_size=3,
        max_steps=1,
    )
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    loss, weights = 0.0, 0.0
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, batch)
        for row in rows:
            log_probs = trainer.model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1)
            for place, token in enumerate(row["input_ids"]):
                weight = (row["labels"][place] != -100) + 0.3 * (row["history_labels"][place] != -100)
                if weight:
                    ways = slice(None)
                    if renormalize:
                        node = choices.parents[row["edges"][place]]
                        ways = choices.trie.tokens[choices.trie.offsets[node] : choices.trie.offsets[node + 1]].long()
                    of_token = log_probs[place - 1, token] - log_probs[place - 1, ways].logsumexp(0)
                    loss, weights = loss - weight * of_token.item(), weights + weight
    assert ours.item() == pytest.approx(loss / weights, rel=1e-5)
    assert any(label != -100 for row in rows for label in row["history_labels"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(ours.item(), rel=1e-5)


def test_batches_are_padded_without_labels(tiny_model, tmp_path, pairs):
    trainer = make_trainer(tiny_model, tmp_path, pairs[:4], weight=1.0, pad_to_multiple_of=64)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    assert batch["history_labels"].shape == batch["labels"].shape == batch["input_ids"].shape
    assert batch["input_ids"].shape[1] % 64 == 0
    for row, labels in zip(rows, batch["history_labels"].tolist(), strict=True):
        assert labels == row["history_labels"] + [-100] * (len(labels) - len(row["history_labels"]))


class AnswerTrainer(SFTTrainer):
    """The loss on the answer alone, as it stood before titles of the history could have a weight."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(dim=0).nonzero().squeeze(1)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        )
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels[:, columns].flatten(), reduction="sum")
        loss = loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def test_weight_0_is_the_loss_on_the_answer_to_the_last_bit(tiny_model, tmp_path, pairs):
    left = {}
    for kind in (CompletionTrainer, AnswerTrainer):
        trainer = make_trainer(
            *(tiny_model, tmp_path / kind.__name__, pairs),
            weight=0.0,
            trainer=kind,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            eval_strategy="epoch",
            num_train_epochs=2,
        )
        trainer.train()
        logged = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
        weights = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
        left[kind] = logged, weights
    (ours, our_weights), (theirs, their_weights) = left.values()
    assert ours == theirs and len(ours) == 2 * (len(pairs) // 4 + 1) and ours[0] != ours[-1]
    assert all(torch.equal(our_weights[name], their_weights[name]) for name in their_weights)


# without Adam, whose first steps are of one size whatever the gradient: rounding would decide signs
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@pytest.mark.parametrize(("weight", "renormalize"), [(0.3, False), (1.0, False), (0.3, True)])
def test_accumulated_batches_equal_one_batch(tiny_model, tmp_path, pairs, choices, weight, renormalize):
    """Batches of unequal lengths: a mean of means would differ."""
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        arguments |= SGD | {"learning_rate": 0.1, "max_steps": 3, "choices": choices if renormalize else None}
        trainer = make_trainer(tiny_model, tmp_path / str(batch), pairs, weight, **arguments)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, [value.clone() for value in trainer.model.parameters() if value.requires_grad]))
    for losses, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for ours, first in zip(parameters, runs[0][1], strict=True):
            torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-4)


# --- the command line ---


def adapter(folder):
    return load_file(folder / "final_model" / "adapter_model.safetensors")


def test_bfloat16_needs_no_gpu(tiny_model, data_dir, tmp_path):
    """It is what a processor with bfloat16 gets without asking; transformers refuses it unless told to use the CPU."""
    arguments = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--num_train_epochs", "1")
    run_main("sft_smol", *arguments, "--bf16", "true", "--output_dir", tmp_path)
    run = read_json(tmp_path / "run.json")
    assert run["state"] == "done" and run["arguments"]["bf16"] is True


def test_two_processes_equal_one(tiny_model, data_dir, tmp_path):
    arguments = (
        *("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--history_loss_weight", "0.3"),
        *("--optim", "sgd", "--lr_scheduler_type", "constant", "--learning_rate", "0.5", "--warmup_steps", "0"),
        *("--lora_dropout", "0", "--max_train_samples", "8", "--num_train_epochs", "1"),
        *("--gradient_accumulation_steps", "2", "--bf16", "false"),
    )
    one = (*arguments, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", "2")
    run_main("sft_smol", *one)
    two = (*arguments, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "1")
    # without MPI, accelerate starts several processes only as for GPUs; where there are none, the script uses the CPU
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, "--dynamo_backend", "no"]
        + [str(PROJECT / "sft_smol.py"), *map(str, two)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    ours, theirs = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def test_the_weight_changes_the_adapter_and_not_what_is_evaluated(tiny_model, data_dir, tmp_path):
    def train(name, *more):
        arguments = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--num_train_epochs", "1", *more)
        run_main("sft_smol", *arguments, "--output_dir", tmp_path / name)
        return read_json(tmp_path / name / "run.json")

    still = ("--learning_rate", "0", "--lora_dropout", "0")
    (plain,) = train("plain", *still)["counts"]["eval_loss"]
    (weighted,) = train("weighted", *still, "--history_loss_weight", "1")["counts"]["eval_loss"]
    assert weighted == plain
    train("zero", "--learning_rate", "0.01", "--history_loss_weight", "0", "--report_to", "none")
    assert not (tmp_path / "zero/runs").exists()
    run = train("recipe", "--config", PROJECT / "configs" / "sft_recipe.yaml", "--learning_rate", "0.01")
    assert run["arguments"]["history_loss_weight"] == 1.0 and run["state"] == "done"
    assert list(tmp_path.glob("recipe/runs/*/events.out.tfevents.*"))
    zero, recipe = adapter(tmp_path / "zero"), adapter(tmp_path / "recipe")
    assert any(not torch.equal(zero[name], recipe[name]) for name in zero)


def test_copies_in_other_orders(data_dir):
    records = read_records(data_dir / "train_sample.json")[:4]
    numbered = with_copies(records, 3, shuffle=True, dropout=0, seed=1)
    assert [number for number, _ in numbered] == [0, 1, 2, 3] * 3 and [record for _, record in numbered[:4]] == records
    titles = [[sorted([*record.history, record.target]) for _, record in numbered[i::4]] for i in range(4)]
    assert all(own == other for own, *others in titles for other in others)
    assert len({record.prompt for _, record in numbered}) == 12
    fewer = with_copies(records[:3], 2, shuffle=True, dropout=0, seed=1)
    assert numbered[4:7] == fewer[3:]  # whatever stands beside them
    assert numbered != with_copies(records, 3, shuffle=True, dropout=0, seed=2)


@pytest.mark.parametrize(("dropout", "kept"), [(0.4, 0.6), (0.999, 0.1)])  # of ten titles one stays in any case
def test_copies_without_some_titles(data_dir, dropout, kept):
    records = [record for record in read_records(data_dir / "train_sample.json") if len(record.history) == 10]
    numbered = with_copies(records, 41, shuffle=False, dropout=dropout, seed=1)
    assert [record for _, record in numbered[: len(records)]] == records
    lengths = []
    for number, (_, record) in enumerate(numbered[len(records) :]):
        own = iter(records[number % len(records)].history)
        assert record.history and all(title in own for title in record.history)  # a part of it, in its order
        assert record.target == records[number % len(records)].target
        lengths.append(len(record.history))
    assert np.mean(lengths) == pytest.approx(10 * kept, rel=0.1)


def test_copies_are_trained_on(tiny_model, data_dir, tmp_path):
    def train(name, *more):
        arguments = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--max_train_samples", "4")
        schedule = ("--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--learning_rate", "0.01")
        run_main("sft_smol", *arguments, *schedule, *more, "--output_dir", tmp_path / name)
        return read_json(tmp_path / name / "run.json")["counts"]

    three = ("--copies_per_record", "3")
    runs = [train("one"), train("orders", *three, "--shuffle_titles"), train("out", *three, "--history_dropout", "0.5")]
    assert [run["steps"] for run in runs] == [2, 6, 6] and runs[1]["train_loss"] != runs[2]["train_loss"]


def test_all_weights_in_place_of_an_adapter(tiny_model, data_dir, tmp_path):
    """The model that comes out is the base model of the next stages: predictions, and an alignment by an adapter."""

    def train(script, name, *more):
        schedule = ("--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--learning_rate", "0.01")
        run_main(script, "--max_train_samples", "8", *schedule, *more, "--output_dir", tmp_path / name)
        return tmp_path / name / "final_model"

    folder = train(
        "sft_smol", "full", "--data_dir", data_dir, "--model_name_or_path", tiny_model, "--use_peft", "false"
    )
    assert not (folder / "adapter_config.json").exists() and not (folder / "base_model.json").exists()
    before, after = load_model(tiny_model).state_dict(), load_model(folder).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "layernorm" not in name)
    assert base_fingerprint(folder) != base_fingerprint(tiny_model)
    # the loss of what was written is the last one that training saw
    (loss,) = read_json(tmp_path / "full/run.json")["counts"]["eval_loss"]
    run_main(
        *("sft_smol", "--data_dir", data_dir, "--model_name_or_path", folder, "--max_train_samples", "1"),
        *("--num_train_epochs", "1", "--learning_rate", "0", "--lora_dropout", "0", "--output_dir", tmp_path / "again"),
    )
    (again,) = read_json(tmp_path / "again/run.json")["counts"]["eval_loss"]
    assert again["eval_loss"] == pytest.approx(loss["eval_loss"], rel=1e-5)

    pairs = [
        {"prompt": record.prompt, "chosen": record.output, "rejected": record.history[0]}
        for record in read_records(data_dir / "train_sample.json")
    ]
    write_json(tmp_path / "pairs.json", pairs)
    data = ("--train_data", tmp_path / "pairs.json", "--valid_data", tmp_path / "pairs.json")
    aligned = train("DPO_from_dpoData", "dpo", *data, "--model_name_or_path", folder)
    check_adapter(aligned, folder)
    with pytest.raises(InputError, match="was made for another base model"):
        check_adapter(aligned, tiny_model)
    with pytest.raises(InputError, match="is a whole model; give it as --model_name_or_path, without --adapter"):
        check_adapter(folder, tiny_model)
    run_main(
        *("generate_predict_batch", "--data_dir", data_dir, "--model_name_or_path", folder, "--max_predict_samples", 2),
        *("--output_dir", tmp_path / "predicted"),
    )
    assert len(read_json(next((tmp_path / "predicted/predictions").glob("raw_results_*.json")))) == 2


def test_renormalized_loss(tiny_model, data_dir, tmp_path, capsys):
    """A record whose target is not in the catalogue has no loss; the loss that is reported is a title's share."""
    shutil.copytree(data_dir, tmp_path / "data")
    records = read_json(tmp_path / "data/train_sample.json")[:3]
    records[1]["output"] = '"In no catalogue"\n'
    write_json(tmp_path / "data/train_sample.json", records)

    def train(name, *more):
        arguments = ("--data_dir", tmp_path / "data", "--model_name_or_path", tiny_model, "--num_train_epochs", "1")
        batches = ("--per_device_train_batch_size", "1", "--learning_rate", "0.01", "--history_loss_weight", "1")
        run_main("sft_smol", *arguments, *batches, *more, "--output_dir", tmp_path / name)
        return read_json(tmp_path / name / "run.json")["counts"]

    plain, shares = train("plain"), train("shares", "--renormalize")
    assert (plain["steps"], shares["steps"]) == (3, 2)
    assert "left out 1 records with a title outside the catalogue, as 'In no catalogue'" in capsys.readouterr().out
    assert shares["eval_loss"] != plain["eval_loss"]

    write_json(tmp_path / "data/train_sample.json", [records[1]])
    with pytest.raises(InputError, match="train_sample.json: no record has all of its titles in the catalogue"):
        train("none", "--renormalize")
