"""Memory that runs out: the work is done again with half as much side by side, and comes to the same."""

import weakref

import pytest
import torch
from conftest import run_main
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cebs.beams import beam_search
from cebs.memory import batch_sizes, decode_within_memory, within_memory
from cebs.models import load_model
from cebs.runs import ADAPTER_WEIGHTS
from cebs.sampling import greedy, sample_until
from utils import InputError, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

STOP = torch.tensor([2])
PROMPTS = [[5, 6, 7, 8, 9], [30] * 11, [7], [40, 41], [9, 9, 9, 50, 51, 52], [11] * 7]
# as CUDA and the CPU's allocator say it
ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
}


def run_out_of_memory(monkeypatch, most_tokens, error=ERRORS["GPU"]):
    """Makes passes of more tokens run out of memory. Returns the numbers of tokens of those that did."""
    forward, refused = LlamaForCausalLM.forward, []

    def within_limit(self, input_ids, *args, **kwargs):
        if input_ids.numel() > most_tokens:
            refused.append(input_ids.numel())
            raise error
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", within_limit)
    return refused


# --- decoding ---


def sampled(model, rows):
    found = sample_until(
        model,
        PROMPTS,
        accept=lambda index, branches: index % 2,
        seeds=list(range(len(PROMPTS))),
        num_branches=2,
        max_branches=4,
        max_new_tokens=5,
        stop_token_ids=STOP,
        rows=rows,
    )
    return [(index, branches) for index, branches, _ in sorted(found)]


def beams(model, rows):
    found = beam_search(model, PROMPTS, num_beams=3, max_new_tokens=5, stop_token_ids=STOP, rows=rows)
    return [branches for branches, _ in found]


WAYS_TO_DECODE = {
    "greedy": lambda model, rows: greedy(model, PROMPTS, max_new_tokens=5, stop_token_ids=STOP, rows=rows),
    "sampled": sampled,
    "beams": beams,
}


@pytest.mark.parametrize("decode", WAYS_TO_DECODE.values(), ids=WAYS_TO_DECODE)
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_decoding_halves_its_rows_to_the_same_result(tiny_model, monkeypatch, capsys, decode, error):
    model = load_model(tiny_model).eval()
    expected = decode(model, 6)
    refused = run_out_of_memory(monkeypatch, most_tokens=12, error=error)
    found, rows = decode_within_memory(lambda rows: decode(model, rows), rows=6)
    assert found == expected
    assert refused and rows < 6
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == len(refused)
    assert notes[0] == "note: out of memory with --rows 6; going on with --rows 3"
    assert model.config._attn_implementation == "sdpa"  # as it was before the passes that failed


def test_a_row_that_is_too_large_by_itself_ends_decoding(tiny_model, monkeypatch):
    model = load_model(tiny_model).eval()
    run_out_of_memory(monkeypatch, most_tokens=10)
    with pytest.raises(InputError, match="^out of memory with --rows 1; use a smaller --max_length"):
        decode_within_memory(lambda rows: beams(model, rows), rows=8)


def test_other_errors_are_no_lack_of_memory():
    calls = []

    def work(size):
        calls.append(size)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        within_memory(work, [4, 2, 1], str, "")
    assert calls == [4]


def test_what_ran_out_is_given_back_before_the_next_attempt():
    """The bug this guards against: the error's traceback keeps the tensors, and the smaller size has no room either."""
    tensors = []

    class Tensor:
        pass

    def work(size):
        assert all(earlier() is None for earlier in tensors)
        tensor = Tensor()
        tensor.cycle = tensor
        tensors.append(weakref.ref(tensor))
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    within_memory(work, [4, 2, 1], str, "")
    assert len(tensors) == 3


# --- training ---


@given(st.integers(1, 200), st.integers(1, 200))
def test_batch_sizes_halve_and_leave_the_records_of_a_step_as_they_were(train, evaluation):
    sizes = batch_sizes(train, evaluation)
    assert sizes[0] == (train, evaluation) and sizes[-1] == (1, 1)
    for (before, eval_before), (after, eval_after) in zip(sizes, sizes[1:], strict=False):
        assert train % after == 0 and after <= max(before / 2, 1) or after == before == 1
        assert eval_after == max(eval_before // 2, 1)
    assert len(set(sizes)) == len(sizes)


# --- the scripts ---

TRAINING = ("--learning_rate", "0.01", "--num_train_epochs", "2", "--lora_dropout", "0.0", "--bf16", "false")
BATCHES = ("--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4, "--gradient_accumulation_steps", 1)


def losses(folder):
    entries = read_json(folder / "training_log.json")
    return [entry[name] for entry in entries for name in ("loss", "eval_loss") if name in entry]


@pytest.fixture
def train(tiny_model, data_dir, tmp_path):
    """`train("sft", "out", *flags)` trains one of the two stages, four records at a time, into a folder."""
    record = read_json(data_dir / "train_sample.json")[0]
    prompt = f"### Instruction:\n{record['instruction']}\n### Response:\n"
    titles = ['"Emma (1815)"', '"Dracula (1897)"', '"Persuasion (1817)"', '"Carmilla (1872)"', '"Evelina (1778)"']
    pairs = [{"prompt": prompt, "chosen": title, "rejected": ['"O"', '"Ivanhoe (1819)"']} for title in titles * 2]
    write_json(tmp_path / "pairs.json", pairs)
    data = {
        "sft_smol": ("--data_dir", data_dir),
        "DPO_from_dpoData": ("--train_data", tmp_path / "pairs.json", "--valid_data", tmp_path / "pairs.json"),
    }

    def run(stage, name, *more):
        where = ("--model_name_or_path", tiny_model, "--output_dir", tmp_path / name)
        run_main(stage, *data[stage], *where, *TRAINING, *BATCHES, *more)
        return tmp_path / name

    return run


@pytest.mark.parametrize(("stage", "most_tokens"), [("sft_smol", 450), ("DPO_from_dpoData", 250)])
def test_training_halves_its_batch_and_takes_the_same_steps(train, monkeypatch, capsys, stage, most_tokens):
    plenty = train(stage, "plenty")
    by_hand = train(stage, "by_hand", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    capsys.readouterr()
    refused = run_out_of_memory(monkeypatch, most_tokens)
    scarce = train(stage, "scarce")
    batch = read_json(scarce / "run.json")["counts"]["batch_within_memory"]
    assert (batch["per_device_train_batch_size"], batch["gradient_accumulation_steps"]) == (2, 2)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: out of memory")]
    assert len(notes) == len(refused)
    assert losses(scarce) == pytest.approx(losses(plenty), rel=1e-3)
    weights = [load_file(folder / "final_model" / ADAPTER_WEIGHTS) for folder in (plenty, scarce)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-3, rtol=1e-2, msg=name)
    # what it came to is what the user could have asked for
    halves = load_file(by_hand / "final_model" / ADAPTER_WEIGHTS)
    assert all(value.equal(weights[1][name]) for name, value in halves.items())


def test_training_goes_on_from_its_last_checkpoint(train, monkeypatch, capsys):
    """Memory runs out in the fourth step, as when a long record comes up late."""
    steps = ("--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no", "--load_best_model_at_end", "no")
    plenty = train("sft_smol", "plenty", *steps)
    forward, passes = LlamaForCausalLM.forward, []

    def runs_out_once(self, input_ids, *args, **kwargs):
        passes.append(len(input_ids))
        if passes == [4, 4, 4, 4]:
            raise ERRORS["GPU"]
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", runs_out_once)
    scarce = train("sft_smol", "scarce", *steps)
    assert f"going on from {scarce / 'checkpoint-2'}" in capsys.readouterr().out
    assert passes == [4] * 4 + [2] * 8  # four steps of six are left
    first, second = (load_file(folder / "final_model" / ADAPTER_WEIGHTS) for folder in (plenty, scarce))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=2e-3, rtol=1e-2, msg=name)


def test_a_record_that_is_too_large_by_itself_ends_training(train, monkeypatch):
    run_out_of_memory(monkeypatch, most_tokens=20)
    message = "^out of memory with --per_device_train_batch_size 1 and --per_device_eval_batch_size 1; use smaller ones"
    with pytest.raises(InputError, match=message):
        train("sft_smol", "out")


@pytest.mark.parametrize(
    "how", [(), ("--decoding", "constrained_beam", "--num_beams", "3")], ids=["greedy", "constrained beams"]
)
def test_the_script_that_predicts(tiny_model, data_dir, tmp_path, monkeypatch, how):
    def predict(name):
        flags = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--max_new_tokens", 8, "--batch_size", 4)
        run_main("generate_predict_batch", *flags, "--dtype", "float32", *how, "--output_dir", tmp_path / name)
        return read_json(tmp_path / name / "predictions/raw_results_8.json")

    plenty = predict("plenty")
    refused = run_out_of_memory(monkeypatch, most_tokens=300)
    assert predict("scarce") == plenty and refused
    rows = [read_json(tmp_path / name / "run.json")["counts"]["rows"] for name in ("plenty", "scarce")]
    assert rows[1] < rows[0]


@pytest.mark.parametrize("source", ["topk", "diverse_beam"])
def test_the_script_that_proposes(tiny_model, data_dir, tmp_path, monkeypatch, source):
    def propose(name):
        flags = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--max_new_tokens", 6, "--batch_size", 6)
        flags += ("--candidate_source", source, "--num_candidates", 4, "--num_beam_groups", 2, "--max_candidates", 8)
        flags += ("--dtype", "float32", "--output_dir", tmp_path / name)
        run_main("dataset_generate_cluster_batch", *flags)
        return (tmp_path / name / "data/dpo_two_negatives_train.json").read_bytes()

    plenty = propose("plenty")
    refused = run_out_of_memory(monkeypatch, most_tokens=300)
    assert propose("scarce") == plenty and refused
