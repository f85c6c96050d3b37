"""The chain of stages at toy size, as a user runs it: files, keys, sameness, interruption.

The trainings and decodings are real; the model is tiny and random. Everything runs in this process but for two command
lines, one of which is killed.
"""

import json
import math
import re
import shutil
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch
import transformers.trainer
from conftest import SIZES, edit_json, interrupt_at, listing, run_main, start_script
from safetensors.torch import load_file

import dataset_generate_cluster_batch
import sft_smol
from cebs import generation, training
from cebs.catalogue import exposure_counts, interest_cluster, load_catalogue
from cebs.generation import Decoder, Journal
from cebs.preferences import read_preferences
from cebs.prompts import predicted_title, read_records
from utils import InputError, read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

SFT = ("--learning_rate", "0.01", "--num_train_epochs", "2")  # 3 steps an epoch
DPO = ("--learning_rate", "0.01", "--num_train_epochs", "2")  # 2 steps an epoch
DECODING = ("--max_new_tokens", "16", "--batch_size", "4", "--rows", "3", "--dtype", "float32")
NEGATIVES = ("hard", "long_tail", "two_negatives")


class Chain:
    """The stages of one run below `root`, each started the same way whenever it is called."""

    def __init__(self, root: Path, model: Path, data_dir: Path):
        self.root, self.model, self.data_dir = root, model, data_dir
        self.adapter = root / "sft" / "final_model"

    def sft(self, *more, out="sft"):
        self._run("sft_smol", out, "--data_dir", self.data_dir, *SFT, *more)
        return self.root / out

    def random(self, *more, out="random"):
        self._run("dataset_generate", out, "--method", "random", "--data_dir", self.data_dir, *more)
        return self.root / out

    def self_play(self, *more, out="self_play"):
        self._decode("dataset_generate", out, "--method", "self_play", *more)
        return self.root / out

    def cluster(self, *more, out="cluster"):
        self._decode("dataset_generate_cluster_batch", out, *more)
        return self.root / out

    def dpo(self, name, *more, out=None):
        files = [f"--{split}_data={self.root}/cluster/data/dpo_{name}_{split}.json" for split in ("train", "valid")]
        out = out or f"cluster/{name}"
        self._run("DPO_from_dpoData", out, *files, "--adapter", self.adapter, *DPO, *more)
        return self.root / out

    def predict(self, *more, out, adapter=None):
        adapter = self.adapter if adapter is None else adapter
        self._run("generate_predict_batch", out, "--data_dir", self.data_dir, "--adapter", adapter, *DECODING, *more)
        return self.root / out

    def all(self):
        self.sft()
        self.random()
        self.self_play()
        self.cluster()
        for name in NEGATIVES:
            folder = self.dpo(name)
            self.predict(out=f"cluster/{name}", adapter=folder / "final_model")
        self.predict("--decoding", "constrained_beam", "--num_beams", "5", out="beams")

    def _decode(self, script, out, *more):
        self._run(script, out, "--data_dir", self.data_dir, "--adapter", self.adapter, *DECODING, *more)

    def _run(self, script, out, *more):
        run_main(script, "--output_dir", self.root / out, "--model_name_or_path", self.model, *more)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_model, data_dir):
    """All stages, finished. Read only: stages that are run anew write beside these, under another `out`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chain = Chain(tmp_path_factory.mktemp("chain"), tiny_model, data_dir)
    chain.all()
    yield chain
    torch.set_num_threads(threads)


@pytest.fixture
def out(request):
    """A folder name of the test's own below the chain's root."""
    return f"tests/{request.node.name}"


def adapter_bytes(folder):
    return (folder / "final_model" / "adapter_model.safetensors").read_bytes()


def json_bytes(folder):
    """All JSON outputs of a stage below `data/` and `predictions/`."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[dp]*/*"))}


def without_log_probs(files):
    """The files without the log-probabilities of candidates, and these."""
    pattern = re.compile(rb'"log_prob": (-?[0-9.]+)')
    found = [float(number) for content in files.values() for number in pattern.findall(content)]
    return {name: pattern.sub(b"", content) for name, content in files.items()}, found


# --- files and keys ---


def test_training_leaves_adapter_tokenizer_and_logs(chain):
    for folder in (chain.root / "sft", *(chain.root / "cluster" / name for name in NEGATIVES)):
        names = {path.name for path in (folder / "final_model").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
        assert not any(path.suffix == ".bin" for path in (folder / "final_model").iterdir())
        assert list(folder.glob("checkpoint-*/trainer_state.json"))
        config = read_json(folder / "final_model" / "adapter_config.json")
        assert config["base_model_name_or_path"] == str(chain.model)


def test_final_model_is_the_best_checkpoint(chain):
    for folder in (chain.root / "sft", chain.root / "cluster" / "two_negatives"):
        runs = read_json(folder / "run.json")
        counts = (runs if "best_checkpoint" in runs["counts"] else runs["earlier_runs"]["DPO_from_dpoData.py"])[
            "counts"
        ]
        best = load_file(folder / counts["best_checkpoint"] / "adapter_model.safetensors")
        final = load_file(folder / "final_model" / "adapter_model.safetensors")
        assert best.keys() == final.keys()
        assert all(torch.equal(best[name], final[name]) for name in best)
        assert counts["best_eval_loss"] == min(entry["eval_loss"] for entry in counts["eval_loss"])


def test_training_moves_the_adapter(chain):
    assert len({adapter_bytes(chain.root / name) for name in ("sft", *(f"cluster/{n}" for n in NEGATIVES))}) == 4


def test_run_json_says_how_each_run_was_made(chain):
    for name, script in [("sft", "sft_smol.py"), ("cluster", "dataset_generate_cluster_batch.py")]:
        run = read_json(chain.root / name / "run.json")
        assert (run["script"], run["state"], run["seed"]) == (script, "done", 42)
        assert run["arguments"]["model_name_or_path"] == str(chain.model)
        assert {"torch", "transformers", "trl", "peft"} <= run["versions"].keys()
        assert run["device"] and run["git_commit"] and run["counts"]
        assert run["start_time"] <= run["end_time"] and run["wall_time_s"] >= 0
        assert len(run["inputs"]) >= 3
    run = read_json(chain.root / "cluster" / "hard" / "run.json")
    assert run["script"] == "generate_predict_batch.py"
    assert run["earlier_runs"]["DPO_from_dpoData.py"]["state"] == "done"


def test_preference_records(chain):
    for folder, names in {
        "random": ["dpo"],
        "self_play": ["dpo"],
        "cluster": ["dpo_hard", "dpo_long_tail", "dpo_two_negatives"],
    }.items():
        for split in ("train", "valid"):
            records = read_records(chain.data_dir / f"{split}_sample.json")
            for name in names:
                rows = read_json(chain.root / folder / "data" / f"{name}_{split}.json")
                assert len(rows) == len(records) == SIZES[split]
                for row, record in zip(rows, records, strict=True):
                    assert row.keys() == {"prompt", "chosen", "rejected"}
                    assert row["prompt"] == record.prompt
                    assert row["chosen"] == f'"{record.target}"'
                    rejected = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
                    assert len(rejected) == (2 if name == "dpo_two_negatives" and len(rejected) == 2 else 1)
                    assert len(set(rejected)) == len(rejected)
                    for title in rejected:
                        assert title.startswith('"') and title.endswith('"') and title[1:-1].strip()
                        assert title[1:-1] not in {record.target, *record.history, "NAN"}  # rule 6
    rejected = [row["rejected"] for row in read_json(chain.root / "cluster" / "data" / "dpo_two_negatives_train.json")]
    assert any(isinstance(titles, list) for titles in rejected)


def test_random_negatives_are_training_targets(chain):
    targets = {record.target for record in read_records(chain.data_dir / "train_sample.json")}
    for split in ("train", "valid"):
        rows = read_json(chain.root / "random" / "data" / f"dpo_{split}.json")
        assert {row["rejected"].strip('"') for row in rows} <= targets
        assert len({row["rejected"] for row in rows}) > 2


def test_several_random_negatives_are_a_list_for_softmax_dpo(chain, data_dir):
    folder = chain.random("--num_negatives", "3", out="tests/random_3")
    for split in ("train", "valid"):
        several, one = (read_json(place / "data" / f"dpo_{split}.json") for place in (folder, chain.root / "random"))
        assert all(len(set(row["rejected"])) == 3 for row in several)
        assert [row["rejected"][0] for row in several] == [row["rejected"] for row in one]
    with pytest.raises(InputError, match="--num_negatives 2: --method self_play has one, its prediction"):
        run_main("dataset_generate", "--method", "self_play", "--num_negatives", 2, "--data_dir", data_dir)


def test_negatives_by_popularity_are_of_the_training_records(data_dir, tmp_path):
    records = read_records(data_dir / "train_sample.json")
    seen = {title for record in records for title in (*record.history, record.target)}
    words = ("--method", "popularity", "--num_negatives", 4, "--data_dir", data_dir)
    run_main("dataset_generate", *words, "--output_dir", tmp_path / "out")
    for split in ("train", "valid"):
        rows = read_json(tmp_path / "out/data" / f"dpo_{split}.json")
        assert all(len({title.strip('"') for title in row["rejected"]} & seen) == 4 for row in rows)


def test_prediction_records(chain):
    records = read_records(chain.data_dir / "test_sample.json")
    titles = load_catalogue(chain.data_dir).titles
    for folder in ("cluster/hard", "cluster/long_tail", "cluster/two_negatives", "beams"):
        rows = read_json(chain.root / folder / "predictions" / "raw_results_8.json")
        assert [row["prompt"] for row in rows] == [record.prompt for record in records]
        assert [row["ground_truth"] for row in rows] == [record.target for record in records]
        assert list((chain.root / folder / "predictions").iterdir()) == [
            chain.root / folder / "predictions" / "raw_results_8.json"
        ]
        for row in rows:
            if folder == "beams":
                assert row["prediction"] == f'"{row["ranking"][0]}"'
                assert len(set(row["ranking"])) == 5 and set(row["ranking"]) <= set(titles)
            else:
                assert row.keys() == {"prompt", "prediction", "ground_truth"}


def test_evaluation_reads_the_predictions(chain, tmp_path):
    run_main(
        "evaluate",
        *("--predictions", chain.root / "beams" / "predictions", "--data_dir", chain.data_dir, "--topk", 3, 5),
        *("--results_csv", tmp_path / "results.csv", "--metrics_json", tmp_path / "metrics.json"),
    )
    header, row = (tmp_path / "results.csv").read_text().splitlines()
    assert header.startswith("Dataset,Model,NDCG@3,HR@3,") and row.startswith("classics,beams,")


# --- sameness ---


def test_a_second_start_says_done_and_changes_nothing(chain, capsys):
    before = listing(chain.root)
    capsys.readouterr()
    chain.all()
    assert listing(chain.root) == before
    assert capsys.readouterr().out.count("is done already, nothing to do") == 4 + 2 * len(NEGATIVES) + 1


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(chain, tmp_path, tiny_model, data_dir):
    again = Chain(tmp_path / "again", tiny_model, data_dir)
    other = Chain(tmp_path / "other", tiny_model, data_dir)
    assert adapter_bytes(again.sft()) == adapter_bytes(chain.root / "sft") != adapter_bytes(other.sft("--seed", "7"))
    for name in ("random", "cluster", "self_play"):
        same, first = json_bytes(getattr(again, name)()), json_bytes(chain.root / name)
        assert same == first and len(same) == (9 if name == "cluster" else 2)
    other.adapter = chain.adapter  # so that nothing but the seed differs
    assert json_bytes(other.random("--seed", "7")) != json_bytes(chain.root / "random")
    assert json_bytes(other.cluster("--seed", "7")) != json_bytes(chain.root / "cluster")
    two = again.dpo("two_negatives")
    assert adapter_bytes(two) == adapter_bytes(chain.root / "cluster" / "two_negatives")
    again.predict(out="cluster/two_negatives", adapter=two / "final_model")
    assert (two / "predictions" / "raw_results_8.json").read_bytes() == (
        chain.root / "cluster" / "two_negatives" / "predictions" / "raw_results_8.json"
    ).read_bytes()


def test_batches_and_rows_do_not_change_what_is_decoded(chain, out):
    beams = ("--decoding", "constrained_beam", "--num_beams", "5")
    for number, sizes in enumerate([("--batch_size", "8", "--rows", "8"), ("--batch_size", "1", "--rows", "1")]):
        assert json_bytes(chain.predict(*beams, *sizes, out=f"{out}/beams{number}")) == json_bytes(chain.root / "beams")
        ours, theirs = chain.cluster(*sizes, out=f"{out}/cluster{number}"), chain.root / "cluster"
        (ours, probs), (theirs, their_probs) = map(without_log_probs, (json_bytes(ours), json_bytes(theirs)))
        assert ours == theirs
        # their last digit is rounding, in which processors differ
        assert probs == pytest.approx(their_probs, abs=0.0101) and len(probs) > len(ours)
        assert json_bytes(chain.self_play(*sizes, out=f"{out}/play{number}")) == json_bytes(chain.root / "self_play")


def test_greedy_predictions_are_those_of_generate(chain, tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = chain.root / "cluster" / "hard"
    model = AutoModelForCausalLM.from_pretrained(chain.model, dtype="float32")
    model = PeftModel.from_pretrained(model, folder / "final_model").eval()
    rows = read_json(folder / "predictions" / "raw_results_8.json")
    for row in rows:
        encoded = tokenizer(row["prompt"], return_tensors="pt")
        ids = model.generate(**encoded, max_new_tokens=16, do_sample=False)[0, encoded.input_ids.shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert row["prediction"].splitlines() == text.strip().splitlines()[:1]
    assert len({row["prediction"] for row in rows}) > 1


def test_training_and_prediction_see_the_same_prompt(chain, monkeypatch):
    """The public code of the method trains with one prompt and predicts with another."""
    records = read_records(chain.data_dir / "train_sample.json")
    seen = {}
    original = sft_smol.tokenize_records

    def remember(*args, **kwargs):
        dataset, shortened = original(*args, **kwargs)
        seen.setdefault("sft", [row["input_ids"][: row["labels"].count(-100)] for row in dataset])
        seen.setdefault("completions", [row["input_ids"][row["labels"].count(-100) :] for row in dataset])
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_smol, "tokenize_records", remember)
    with pytest.raises(KeyboardInterrupt):
        chain.sft(out="tests/prompts/sft")

    def no_decoding(model, prompts, trie, **kwargs):
        seen["decoding"] = prompts
        raise KeyboardInterrupt

    test_records = read_records(chain.data_dir / "test_sample.json")
    copy = chain.root / "tests" / "prompts" / "data"
    shutil.copytree(chain.data_dir, copy)
    shutil.copy(copy / "train_sample.json", copy / "test_sample.json")
    monkeypatch.setattr("cebs.generation.greedy", no_decoding)
    with pytest.raises(KeyboardInterrupt):
        chain.predict("--data_dir", copy, "--batch_size", "12", out="tests/prompts/predictions")
    assert seen["sft"] == seen["decoding"] and len(seen["sft"]) == len(records) != len(test_records)

    from utils import load_tokenizer

    tokenizer = load_tokenizer(chain.model)
    assert [tokenizer.decode(ids) for ids in seen["sft"]] == [record.prompt for record in records]
    assert [tokenizer.decode(ids) for ids in seen["completions"]] == [
        f'"{record.target}"\n<|im_end|>' for record in records
    ]
    # what stage 2 hands to stage 3 is the same text again
    preferences = read_preferences(chain.root / "cluster" / "data" / "dpo_hard_train.json")
    assert [row["prompt"] for row in preferences] == [record.prompt for record in records]


def test_a_yaml_file_replaces_defaults_and_flags_win(chain, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 7\nmax_train_samples: 5\nmax_eval_samples: 2\nmethod: random\n")
    folder = chain.random("--config", tmp_path / "mine.yaml", "--max_eval_samples", "3", out="tests/yaml")
    run = read_json(folder / "run.json")
    assert (run["seed"], run["counts"]["train_records"], run["counts"]["valid_records"]) == (7, 5, 3)


# --- cluster and exposure, with titles that exist ---


def test_cluster_negatives_follow_the_rules(chain, out, monkeypatch):
    """A random model names no title of the catalogue, so each text that it samples stands for one here."""
    catalogue = load_catalogue(chain.data_dir)

    def some_title(text):
        number = zlib.crc32(text.encode()) % (2 * len(catalogue.titles))
        return catalogue.titles[number] if number < len(catalogue.titles) else predicted_title(text)

    monkeypatch.setattr("cebs.generation.predicted_title", some_title)
    folder = chain.cluster("--num_candidates", "3", "--max_candidates", "7", out=out)
    stored = read_json(folder / "data" / "candidates.json")
    counts = read_json(folder / "run.json")["counts"]
    exposure = exposure_counts(read_records(chain.data_dir / "train_sample.json"))
    sizes = set()
    for split in ("train", "valid"):
        records = read_records(chain.data_dir / f"{split}_sample.json")
        data = {name: read_json(folder / "data" / f"{name}_{split}.json") for name in ("balanced", "dpo_two_negatives")}
        matches = 0
        for index, (record, entry) in enumerate(zip(records, stored[split], strict=True)):
            cluster = interest_cluster(record.history, catalogue)
            assert (entry["record"], entry["cluster"]) == (index, cluster)
            found = entry["candidates"]
            sizes.add(len(found))
            assert [candidate["order"] for candidate in found] == list(range(len(found)))
            for candidate in found:
                genres = catalogue.genres.get(candidate["title"], [])
                assert candidate["genres"] == genres
                assert candidate["in_catalogue"] == (candidate["title"] in catalogue.genres)
                assert candidate["exposure"] == (exposure[candidate["title"]] if genres else 0)
                assert candidate["in_cluster"] == any(genre in cluster for genre in genres)
            taken = {record.target, *record.history, "NAN"}
            free = [candidate for candidate in found if candidate["title"] not in taken]
            inside = [candidate["title"] for candidate in free if candidate["in_cluster"]]
            outside = [candidate for candidate in free if not candidate["in_cluster"]]
            # rule 2: no further round once one matches; 3, 6, then 7
            assert len(found) == 7 or any(c["in_cluster"] and c in free for c in found[-3:])
            assert not any(c["in_cluster"] and c in free for c in found[: (len(found) - 1) // 3 * 3])
            balanced, both = data["balanced"][index], data["dpo_two_negatives"][index]
            assert {key: balanced[key] for key in ("instruction", "input", "output")} == {
                "instruction": record.instruction,
                "input": record.input,
                "output": record.output,
            }
            (hard,), (long_tail,) = balanced["hard_negatives"], balanced["long_tail_negatives"]
            assert hard == inside[0] if inside else hard in [c["title"] for c in free]
            if outside:
                least = min(candidate["exposure"] for candidate in outside)
                assert long_tail == next(c["title"] for c in outside if c["exposure"] == least)
            assert both["rejected"] == ([f'"{hard}"', f'"{long_tail}"'] if hard != long_tail else f'"{hard}"')
            matches += bool(inside)
        assert counts[split]["with_match"] == matches
        assert counts[split]["selectors"]["in:first"]["random_candidate"] == len(records) - matches
    assert {3, 6} <= sizes <= {3, 6, 7}


def test_choosing_again_needs_no_model(chain, out, monkeypatch):
    def no_model(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(dataset_generate_cluster_batch, "load_decoder", no_model)
    monkeypatch.setattr(dataset_generate_cluster_batch, "find_model", no_model)
    candidates = chain.root / "cluster" / "data" / "candidates.json"
    same = chain.cluster("--candidates", candidates, out=f"{out}/keep")
    assert json_bytes(same) == json_bytes(chain.root / "cluster")
    dropped = chain.cluster("--candidates", candidates, "--unknown_titles", "drop", out=f"{out}/drop")
    titles = set(load_catalogue(chain.data_dir).titles)
    for row in read_json(dropped / "data" / "balanced_train.json"):
        assert {*row["hard_negatives"], *row["long_tail_negatives"]} <= titles
    assert read_json(dropped / "run.json")["counts"]["train"]["selectors"]["in:first"]["not_in_catalogue"] == 0
    # the classics have no series, so nothing is spared
    spared = chain.cluster("--candidates", candidates, "--same_series", "drop", out=f"{out}/spared")
    assert json_bytes(spared) == json_bytes(same)
    fewer = chain.cluster("--candidates", candidates, "--max_train_samples", "3", out=f"{out}/fewer")
    assert len(read_json(fewer / "data" / "dpo_hard_train.json")) == 3


# --- interruption (rule 8) ---


@pytest.mark.parametrize("batches", [1, 4])
def test_sampling_interrupted_goes_on_to_the_same_bytes(chain, out, monkeypatch, batches, capsys):
    """After one batch, and after the three of the training file and one of the validation file."""
    interrupt_at(monkeypatch, Journal, "append", batches)
    with pytest.raises(KeyboardInterrupt):
        chain.cluster(out=out)
    run = read_json(chain.root / out / "run.json")
    assert run["state"] == "interrupted" and not (chain.root / out / "data" / "candidates.json").exists()
    rounds = []
    original = generation.sample_until
    monkeypatch.setattr(
        generation, "sample_until", lambda *args, **kwargs: rounds.append(args) or original(*args, **kwargs)
    )
    folder = chain.cluster(out=out)
    assert json_bytes(folder) == json_bytes(chain.root / "cluster")
    assert len(rounds) == 5 - batches  # 3 + 2 batches in all; finished ones are not done again
    assert f"{min(batches, 3)} batches are done already" in capsys.readouterr().out


def test_predictions_interrupted_go_on_to_the_same_bytes(chain, out, monkeypatch):
    beams = ("--decoding", "constrained_beam", "--num_beams", "5")
    interrupt_at(monkeypatch, Journal, "append", 1)
    with pytest.raises(KeyboardInterrupt):
        chain.predict(*beams, out=out)
    # the kill came in the middle of a letter
    with (chain.root / out / "predictions" / "raw_results.partial.jsonl").open("ab") as file:
        file.write('[{"prompt": "Les Misé'.encode()[:-1])
    assert json_bytes(chain.predict(*beams, out=out)) == json_bytes(chain.root / "beams")


def test_an_interrupted_run_is_no_input(chain, out, monkeypatch):
    interrupt_at(monkeypatch, Journal, "append", 1)
    with pytest.raises(KeyboardInterrupt):
        chain.cluster(out=out)
    for split in ("train", "valid"):
        shutil.copy(chain.root / "cluster" / "data" / f"dpo_hard_{split}.json", chain.root / out / "data")
    files = [f"--{split}_data={chain.root}/{out}/data/dpo_hard_{split}.json" for split in ("train", "valid")]
    with pytest.raises(InputError, match="dataset_generate_cluster_batch.py is interrupted in .*; run it to its end"):
        run_main(
            "DPO_from_dpoData", *files, "--output_dir", chain.root / out / "dpo", "--model_name_or_path", chain.model
        )
    assert not (chain.root / out / "dpo").exists()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (training.Trainer, "_save_optimizer_and_scheduler"),  # in the middle of the first checkpoint
        (transformers.trainer, "rotate_checkpoints"),  # right after it
        (training, "save_trained"),  # after the last one
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_training_interrupted_ends_with_the_same_adapter(chain, out, monkeypatch, stage, owner, name):
    def start():
        return chain.sft(out=out) if stage == "sft" else chain.dpo("two_negatives", out=out)

    interrupt_at(monkeypatch, owner, name, 0)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert read_json(chain.root / out / "run.json")["state"] == "interrupted"
    assert list((chain.root / out).glob("checkpoint-*")) and not (chain.root / out / "final_model").exists()
    with pytest.raises(InputError, match="final_model|interrupted"):
        chain.predict(out=f"{out}/predictions", adapter=chain.root / out / "final_model")
    folder = start()
    expected = chain.root / ("sft" if stage == "sft" else "cluster/two_negatives")
    assert adapter_bytes(folder) == adapter_bytes(expected)
    assert read_json(folder / "run.json")["state"] == "done"


def test_training_killed_as_its_checkpoint_appears_goes_on(chain, tmp_path, run_script):
    """SIGKILL on the real command line, whatever of the checkpoint is on the disk at that moment."""
    args = ["--output_dir", "run", "--model_name_or_path", chain.model, "--data_dir", chain.data_dir, *SFT]
    process = start_script("sft_smol.py", *args, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoint-*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert read_json(tmp_path / "run" / "run.json")["state"] == "running"
    result = run_script("sft_smol.py", *args, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert read_json(tmp_path / "run" / "run.json")["state"] == "done"
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(chain.root / "sft")


def test_dataset_generate_has_no_leftovers(chain):
    """Journals go when a run is complete, and nothing temporary stays."""
    names = [path.name for path in chain.root.glob("*/data/*")]
    assert names and not [name for name in names if name.startswith(".") or "partial" in name]


def test_self_play_puts_a_random_title_for_a_prediction_that_is_right(chain, out, monkeypatch):
    records = read_records(chain.data_dir / "train_sample.json")
    answers = [f'"{record.target}"' for record in records]
    monkeypatch.setattr(Decoder, "greedy", lambda self, batch, titles: answers[: len(batch)])
    folder = chain.self_play("--batch_size", "12", out=out)
    counts = read_json(folder / "run.json")["counts"]
    rows = read_json(folder / "data" / "dpo_train.json")
    assert counts["train_random_instead"] == len(records)
    assert all(row["rejected"] != row["chosen"] for row in rows)


def test_a_mixed_file_trains(chain, out, tmp_path):
    """One rejected title and lists of several may stand in one file."""

    def mix(rows):
        rows[0]["rejected"] = '"Emma"'
        rows[1]["rejected"] = ['"Emma"', '"Dune"', '"It"']

    shutil.copytree(chain.root / "cluster" / "data", tmp_path / "data")
    for split in ("train", "valid"):
        edit_json(tmp_path / "data" / f"dpo_two_negatives_{split}.json", mix)
    files = [f"--{split}_data={tmp_path}/data/dpo_two_negatives_{split}.json" for split in ("train", "valid")]
    run_main(
        "DPO_from_dpoData",
        *(*files, "--output_dir", tmp_path / "dpo", "--model_name_or_path", chain.model, "--max_train_samples", "4"),
    )
    run = read_json(tmp_path / "dpo" / "run.json")
    assert run["arguments"]["adapter"] == ""  # data of one's own, no adapter named: the base model, "w/o SFT"
    assert run["counts"]["train_records"] == 4 and run["counts"]["rejected_titles"] >= 1 + 3 + 2


def test_constrained_beams_know_every_title(chain, out):
    """As many beams as titles: the ranking is the whole catalogue."""
    titles = load_catalogue(chain.data_dir).titles
    few = titles[:7]
    copy = chain.root / out / "data"
    shutil.copytree(chain.data_dir, copy)
    for name, value in {
        "name2genre.json": {title: ["novel"] for title in few},
        "name2id.json": {title: index for index, title in enumerate(few)},
        "id2name.json": {str(index): title for index, title in enumerate(few)},
    }.items():
        (copy / name).write_text(json.dumps(value))
    folder = chain.predict(
        *("--data_dir", copy, "--decoding", "constrained_beam", "--num_beams", "7", "--max_predict_samples", "2"),
        out=f"{out}/predictions",
    )
    for row in read_json(folder / "predictions" / "raw_results_2.json"):
        assert sorted(row["ranking"]) == sorted(few)


def test_calibrated_rankings_without_history(chain, out, run_script, tmp_path):
    """The real command line twice: the log-probabilities without a history are computed by the first run alone."""
    arguments = ["--model_name_or_path", chain.model, "--data_dir", chain.data_dir, "--adapter", chain.adapter]
    arguments += [*DECODING, "--decoding", "constrained_beam", "--num_beams", "5", "--cache_dir", tmp_path / "kept"]
    outputs = []
    for name in ("first", "again"):
        folder = chain.root / out / name
        flags = ["--calibration", "0.5", "--exclude_history", "--output_dir", folder]
        result = run_script("generate_predict_batch.py", *arguments, *flags)
        assert result.code == 0, result.stderr
        assert ("catalogue without history" in result.stderr) == (name == "first")
        outputs.append((folder / "predictions" / "raw_results_8.json").read_bytes())
    assert outputs[0] == outputs[1]
    assert len(list((tmp_path / "kept").iterdir())) == 1

    rows, plain = json.loads(outputs[0]), read_json(chain.root / "beams" / "predictions" / "raw_results_8.json")
    titles = set(load_catalogue(chain.data_dir).titles)
    for row, record in zip(rows, read_records(chain.data_dir / "test_sample.json"), strict=True):
        assert len(set(row["ranking"])) == 5 and set(row["ranking"]) <= titles
        assert titles.intersection(record.history) and not set(row["ranking"]).intersection(record.history)
        assert row["prediction"] == f'"{row["ranking"][0]}"'
    assert [row["ranking"] for row in rows] != [row["ranking"] for row in plain]


def test_calibrated_candidates_are_the_calibrated_ranking(chain, out, capsys):
    copy = chain.root / out / "data"
    shutil.copytree(chain.data_dir, copy)
    shutil.copy(copy / "train_sample.json", copy / "test_sample.json")
    beams = ("--data_dir", copy, "--calibration", "2", "--cache_dir", chain.root / out / "kept")
    ranked = chain.predict(*beams, "--decoding", "constrained_beam", "--num_beams", "4", out=f"{out}/ranked")
    capsys.readouterr()
    source = ("--candidate_source", "beam", "--constrained", "true", "--num_candidates", "4")
    proposed = chain.cluster(*beams, *source, out=f"{out}/proposed") / "data" / "candidates.json"
    assert "catalogue without history" not in capsys.readouterr().err  # what the ranking has kept
    (rows,) = (read_json(file) for file in (ranked / "predictions").iterdir())
    titles = [[candidate["title"] for candidate in entry["candidates"]] for entry in read_json(proposed)["train"]]
    assert titles == [row["ranking"] for row in rows]
    plain = chain.cluster("--data_dir", copy, *source, out=f"{out}/plain") / "data" / "candidates.json"
    assert titles != [[c["title"] for c in entry["candidates"]] for entry in read_json(plain)["train"]]


def test_a_renormalised_ranking_is_another_one_of_the_same_titles(chain, out):
    """As wide as the catalogue; with weight 1 no title gains by a token that the catalogue leaves no choice of."""
    size = len(load_catalogue(chain.data_dir).titles)
    beams = ("--decoding", "constrained_beam", "--num_beams", size, "--max_predict_samples", "2")
    beams += ("--calibration", "1", "--cache_dir", chain.root / out / "kept")
    plain, renormalised = (
        read_json(chain.predict(*beams, *more, out=f"{out}/{len(more)}") / "predictions" / "raw_results_2.json")
        for more in ((), ("--renormalize",))
    )
    for row, other in zip(plain, renormalised, strict=True):
        assert sorted(row["ranking"]) == sorted(other["ranking"]) and row["ranking"] != other["ranking"]


def test_greedy_answers_of_the_catalogue(chain, out):
    """The first of one beam, grounded by itself; and what self-play takes, unless it is right or of the history."""
    answers, first = (
        read_json(chain.predict("--decoding", *decoding, out=f"{out}/{decoding[0]}") / "predictions/raw_results_8.json")
        for decoding in (("constrained_greedy",), ("constrained_beam", "--num_beams", "1"))
    )
    assert [row["prediction"] for row in answers] == [row["prediction"] for row in first]
    assert not any("ranking" in row for row in answers)

    folder = chain.self_play("--constrained", out=f"{out}/self_play")
    assert read_json(folder / "run.json")["counts"]["train_not_in_catalogue"] == 0
    titles = load_catalogue(chain.data_dir).titles
    assert all(row["rejected"][1:-1] in titles for row in read_json(folder / "data/dpo_train.json"))


def test_preferences_among_the_titles_of_the_catalogue(chain, out, capsys):
    """Records with a title outside it are left out; before the first step the loss is that of equal chances."""
    copy, records = chain.root / out / "data", read_json(chain.root / "random/data/dpo_train.json")
    copy.mkdir(parents=True)
    records[1]["rejected"] = '"In no catalogue"'
    files = []
    for split, of_split in (("train", records), ("valid", records[:1])):
        write_json(copy / f"{split}.json", of_split)
        files += [f"--{split}_data", copy / f"{split}.json"]
    flags = ("--renormalize", "--data_dir", chain.data_dir, "--logging_steps", "1")

    def logged(name, *more):
        log = read_json(chain.dpo("hard", *files, *more, out=f"{out}/{name}") / "training_log.json")
        return [entry for entry in log if "logps/chosen" in entry][0]

    shares, plain = logged("shares", *flags), logged("plain", "--logging_steps", "1")
    assert f"{files[1]}: left out 1 records with a title outside the catalogue, as 'In no catalogue'" in (
        capsys.readouterr().out
    )
    assert read_json(chain.root / out / "shares/run.json")["counts"]["train_records"] == len(records) - 1
    assert shares["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert plain["logps/chosen"] < shares["logps/chosen"] < 0  # fewer ways to share a probability among

    write_json(copy / "valid.json", [records[1]])
    with pytest.raises(InputError, match="valid.json: no record has all of its titles in the catalogue"):
        chain.dpo("hard", *files, *flags, out=f"{out}/none")


def test_a_history_left_out_changes_nothing_else(chain, out):
    """As wide as the catalogue, the ranking is the full one without the titles of the history."""
    size = len(load_catalogue(chain.data_dir).titles)
    beams = ("--decoding", "constrained_beam", "--num_beams", size, "--max_predict_samples", "2")
    full, without = (
        read_json(chain.predict(*beams, *more, out=f"{out}/{len(more)}") / "predictions" / "raw_results_2.json")
        for more in ((), ("--exclude_history",))
    )
    for row, other, record in zip(full, without, read_records(chain.data_dir / "test_sample.json"), strict=False):
        assert len(row["ranking"]) == size
        assert other["ranking"] == [title for title in row["ranking"] if title not in record.history]


def test_predictions_say_whose_they_are(chain, out):
    copy = chain.root / out / "data"
    shutil.copytree(chain.data_dir, copy)
    edit_json(copy / "test_sample.json", lambda records: [*records[:2], {**records[2], "user": "u7"}])
    for decoding in ("greedy", "constrained_beam"):
        folder = chain.predict("--data_dir", copy, "--decoding", decoding, out=f"{out}/{decoding}")
        rows = read_json(folder / "predictions" / "raw_results_3.json")
        assert [row.get("user") for row in rows] == [None, None, "u7"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--calibration", "0.5"], "--calibration: is for rankings; give --decoding constrained_beam with it"),
        (["--renormalize"], "--renormalize: is for rankings; give --decoding constrained_beam with it"),
        (["--exclude_history"], "--exclude_history: is for rankings; give --decoding constrained_beam with it"),
        (["--decoding", "constrained_beam", "--calibration", "-1"], "--calibration: -1.0 must be 0 or more"),
    ],
)
def test_flags_for_rankings_alone(chain, out, flags, message):
    with pytest.raises(InputError, match=message):
        chain.predict(*flags, out=out)
    assert not (chain.root / out).exists()


def test_calibration_needs_one_instruction_and_a_title_that_is_left(chain, out):
    copy = chain.root / out / "data"
    shutil.copytree(chain.data_dir, copy)
    edit_json(copy / "test_sample.json", lambda records: [records[0], {**records[1], "instruction": "Another one"}])
    beams = ("--data_dir", copy, "--decoding", "constrained_beam", "--num_beams", "2")
    with pytest.raises(InputError, match="test_sample.json: has 2 different instructions; --calibration needs one"):
        chain.predict(*beams, "--calibration", "0.5", out=f"{out}/predictions")
    edit_json(copy / "valid_sample.json", lambda records: [{**records[0], "instruction": "Another one"}])
    source = ("--candidate_source", "beam", "--constrained", "true", "--calibration", "0.5")
    with pytest.raises(InputError, match="data: has 2 different instructions; --calibration needs one"):
        chain.cluster("--data_dir", copy, *source, out=f"{out}/candidates")
    everything = ", ".join(f'"{title}"' for title in load_catalogue(copy).titles)
    edit_json(copy / "test_sample.json", lambda records: [records[0], {**records[1], "input": everything}])
    with pytest.raises(InputError, match="test_sample.json: record 1: its history is the whole catalogue"):
        chain.predict(*beams, "--exclude_history", out=f"{out}/predictions")
