"""Bad arguments and bad input: exit code 2, one line that names file, record and remedy, and nothing touched."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from conftest import edit_json, listing, run_main

import utils
from utils import read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

PREFERENCES = [{"prompt": "p", "chosen": '"a"', "rejected": ['"b"', '"c"']}] * 3


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, other_model, data_dir, tokenizer):
    """Good input for every stage: `data`, `adapter`, `dpo_{train,valid}.json`, and `candidates.json`."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(data_dir, folder / "data")
    model = get_peft_model(utils.load_model(tiny_model), LoraConfig(r=2, target_modules=["q_proj"]))
    utils.save_adapter(model, tokenizer, folder / "adapter", tiny_model)
    for split in ("train", "valid"):
        write_json(folder / f"dpo_{split}.json", PREFERENCES)
    (folder / "model").symlink_to(tiny_model)
    (folder / "other_model").symlink_to(other_model)
    run_main(
        "dataset_generate_cluster_batch",
        *("--data_dir", folder / "data", "--model_name_or_path", tiny_model, "--output_dir", folder / "cluster"),
        *("--max_train_samples", 2, "--max_eval_samples", 2, "--max_new_tokens", 4, "--max_candidates", 10),
    )
    shutil.move(folder / "cluster" / "data" / "candidates.json", folder / "candidates.json")
    shutil.rmtree(folder / "cluster")
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world to spoil, as working directory."""
    shutil.copytree(world, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


MODEL = ("--model_name_or_path", "model", "--output_dir", "out")
STAGES = {
    "sft": ("sft_smol", "--data_dir", "data", *MODEL),
    "random": ("dataset_generate", "--method", "random", "--data_dir", "data", *MODEL),
    "self_play": ("dataset_generate", "--method", "self_play", "--data_dir", "data", "--adapter", "adapter", *MODEL),
    "cluster": ("dataset_generate_cluster_batch", "--data_dir", "data", "--adapter", "adapter", *MODEL),
    "again": ("dataset_generate_cluster_batch", "--data_dir", "data", "--candidates", "candidates.json", *MODEL)
    + ("--max_train_samples", "2", "--max_eval_samples", "2"),
    "dpo": ("DPO_from_dpoData", "--train_data", "dpo_train.json", "--valid_data", "dpo_valid.json", *MODEL)
    + ("--adapter", "adapter"),
    "predict": ("generate_predict_batch", "--data_dir", "data", "--adapter", "adapter", *MODEL),
    "beams": ("generate_predict_batch", "--data_dir", "data", "--decoding", "constrained_beam", *MODEL),
}


def refusal(stage, *more, monkeypatch, capsys):
    """Runs a script as `__main__` does; returns its line of complaint after checking code, form and silence."""
    name, *args = STAGES[stage]
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, *more])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        utils.run_script(module.main, module.make_parser())
    assert exit.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(f"{name}.py: error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1] and "Traceback" not in "".join(lines)
    return errors[0].removeprefix(f"{name}.py: error: ")


def spoil(path, change):
    """Returns a function that rewrites a JSON file of the place."""
    return lambda: edit_json(Path(path), change)


def write(path, text):
    return lambda: Path(path).write_text(text, encoding="utf-8")


def remove(path):
    def do():
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

    return do


def drop_key(index, key):
    def change(records):
        del records[index][key]

    return change


def set_key(index, key, value):
    def change(records):
        records[index][key] = value

    return change


def cut(path, size):
    def do():
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[:size])

    return do


TRAIN, VALID, TEST = (f"data/{split}_sample.json" for split in ("train", "valid", "test"))
ALL_RECORDS = ("sft", "random", "self_play", "cluster", "again")
ALL_ADAPTERS = ("self_play", "cluster", "dpo", "predict")
CATALOGUE = ("random", "cluster", "beams")

# stages, what is done to the place, and what the line must hold
SPOILED = [
    (ALL_RECORDS, remove(TRAIN), f"{TRAIN}: no such file"),
    (ALL_RECORDS, remove(VALID), f"{VALID}: no such file"),
    (("predict", "beams"), remove(TEST), f"{TEST}: no such file"),
    (("sft", "cluster"), write(VALID, '[{"a": 1},\n {"a" 2}]'), f"{VALID}: invalid JSON at line 2, column 7"),
    (("predict",), write(TEST, ""), f"{TEST}: invalid JSON at line 1, column 1"),
    (("predict",), write(TEST, "{}"), f"{TEST}: expected a JSON list of records, found dict"),
    (("sft", "random", "again"), write(TRAIN, "[]"), f"{TRAIN}: the list is empty"),
    (ALL_RECORDS, spoil(TRAIN, drop_key(3, "input")), f"{TRAIN}: record 3: 'input' is missing"),
    (("predict",), spoil(TEST, drop_key(7, "output")), f"{TEST}: record 7: 'output' is missing"),
    (ALL_RECORDS, spoil(TRAIN, set_key(2, "output", "Emma\n")), f"{TRAIN}: record 2: output must be the target title"),
    (("predict",), spoil(TEST, set_key(1, "output", '"')), f"{TEST}: record 1: output must be the target title"),
    (("sft", "cluster"), spoil(TRAIN, set_key(2, "instruction", 5)), f"{TRAIN}: record 2: instruction, input and outp"),
    (CATALOGUE, write("data/name2genre.json", "{}"), "data/name2genre.json: expected a JSON object that is not empty"),
    (CATALOGUE, remove("data/id2name.json"), "data/id2name.json: no such file"),
    (CATALOGUE, spoil("data/id2name.json", lambda ids: ids.pop("5") and None), "data/id2name.json: id 5 is missing"),
    (ALL_ADAPTERS, remove("adapter"), "adapter: no adapter_config.json; give the final_model folder"),
    (ALL_ADAPTERS, remove("adapter/adapter_model.safetensors"), "adapter: no adapter_model.safetensors"),
    (ALL_ADAPTERS, cut("adapter/adapter_model.safetensors", 900), "adapter/adapter_model.safetensors: is damaged or"),
    (ALL_ADAPTERS, cut("adapter/adapter_config.json", 30), "adapter/adapter_config.json: invalid JSON at line"),
    (("dpo",), remove("dpo_train.json"), "dpo_train.json: no such file"),
    (("dpo",), write("dpo_valid.json", "[]"), "dpo_valid.json: the list is empty"),
    (("dpo",), spoil("dpo_train.json", drop_key(1, "chosen")), "dpo_train.json: record 1: 'chosen' is missing"),
    (("dpo",), spoil("dpo_train.json", set_key(2, "rejected", [])), "dpo_train.json: record 2: rejected must be"),
    (("dpo",), spoil("dpo_train.json", set_key(2, "rejected", None)), "dpo_train.json: record 2: rejected must be"),
    (("dpo",), spoil("dpo_train.json", set_key(0, "rejected", ["a", 1])), "dpo_train.json: record 0: prompt, chosen"),
    (("dpo",), spoil("dpo_valid.json", set_key(0, "rejected", " ")), "dpo_valid.json: record 0: prompt, chosen"),
    (("dpo",), spoil("dpo_valid.json", set_key(1, "chosen", ["a"])), "dpo_valid.json: record 1: prompt, chosen"),
    (("again",), remove("candidates.json"), "candidates.json: no such file"),
    (("again",), write("candidates.json", "[]"), "candidates.json: is not a candidates.json of this script"),
    (("again",), spoil("candidates.json", lambda c: {"train": []}), "candidates.json: is not a candidates.json of th"),
    (("again",), spoil(TRAIN, lambda rows: rows[1:]), "candidates.json: was made from another train_sample.json"),
    (
        ("again",),
        spoil("candidates.json", lambda stored: stored["valid"][0]["candidates"][0].update(title=3)),
        "candidates.json: a title of valid is not text",
    ),
]


@pytest.mark.parametrize(
    ("stage", "spoiling", "complaint"),
    [
        pytest.param(stage, spoiling, complaint, id=f"{stage}-{complaint[:50]}")
        for stages, spoiling, complaint in SPOILED
        for stage in stages
    ],
)
def test_bad_input_is_refused_and_nothing_touched(place, stage, spoiling, complaint, monkeypatch, capsys):
    spoiling()
    before = listing(place)
    assert complaint in refusal(stage, monkeypatch=monkeypatch, capsys=capsys)
    assert listing(place) == before


BAD_ARGUMENTS = [
    (tuple(STAGES), ("--no_such_flag", "1"), "unknown flag --no_such_flag"),
    (("sft", "dpo"), ("--learning_rat", "1"), "unknown flag --learning_rat; did you mean learning_rate?"),
    (("sft",), ("--learning_rate", "fast"), "--learning_rate/--learning-rate: invalid float value: 'fast'"),
    (("sft",), ("--max_train_samples", "0"), "--max_train_samples 0: must be at least 1"),
    (("sft",), ("--history_loss_weight", "-1"), "--history_loss_weight -1.0: must be 0 or more"),
    (("sft",), ("--history_loss_weight", "nan"), "--history_loss_weight nan: must be 0 or more"),
    (("dpo",), ("--early_stopping_patience", "0"), "--early_stopping_patience 0: must be at least 1"),
    (("dpo",), ("--loss_type", "ipoo"), "--loss_type ipoo: no such loss; there are softmax, dmpo, sigmoid, hinge"),
    (("dpo",), ("--sft_weight", "-1"), "--sft_weight -1.0: must be 0 or more"),
    (("sft",), ("--save_strategy", "steps"), "save and eval strategy"),
    (("sft", "dpo"), ("--seed", "-1"), "--seed: -1 is below 0"),
    (("random",), ("--method", "best"), "argument --method: invalid choice: 'best'"),
    (("cluster",), ("--unknown_titles", "maybe"), "--unknown_titles/--unknown-titles: invalid choice: 'maybe'"),
    (
        ("cluster", "again"),
        ("--negatives", "in:first", "in:frist"),
        "in:frist: there is no order 'frist'; did you",
    ),
    (("cluster",), ("--negatives", "in:first:0"), "in:first:0: the count must be 1 or more"),
    (("cluster", "again"), ("--presets", "dpo_hrad"), "dpo_hrad: is no preset, nor a selector pool:order[:count]; did"),
    (("again",), ("--negatives", "in:nearest_target", "--encoder", "nobody"), "nobody: not a folder, not in"),
    (("cluster",), ("--fallback", "drop"), "argument --fallback: invalid choice: 'drop'"),
    (("cluster",), ("--temperature", "0"), "--temperature: 0.0 must be above 0"),
    (("cluster",), ("--top_k", "0"), "--top_k 0: must be at least 1"),
    (("predict",), ("--rows", "0"), "--rows 0: must be at least 1"),  # it used to wait for ever
    (("predict", "self_play"), ("--batch_size", "0"), "--batch_size 0: must be at least 1"),
    (("beams",), ("--num_beams", "0"), "--num_beams 0: must be at least 1"),
    (("predict", "random"), ("--seed", "-1"), "--seed: -1 is below 0"),
    (ALL_ADAPTERS, ("--model_name_or_path", "other_model"), "adapter: was made for another base model (tiny), not f"),
    (("sft",), ("--adapter", "adapter", "--model_name_or_path", "other_model"), "adapter: was made for another base"),
    (("sft",), ("--adapter", "data"), "data: no adapter_config.json"),
    (("sft", "predict"), ("--model_name_or_path", "data"), "data: no *.safetensors file; give the folder of a model"),
    (("predict",), ("--model_name_or_path", "nobody/nothing"), "nobody/nothing: not a folder, not in"),
    (("sft", "predict"), ("--output_dir", "candidates.json"), "candidates.json: cannot be made: "),
    (("sft",), ("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read as YAML"),
    (("sft", "predict"), ("--config", "typo.yaml"), "typo.yaml: unknown key 'model_name'"),
    (("predict",), ("--config", "wrong.yaml"), "argument --rows: invalid int value: 'many'"),
]


@pytest.mark.parametrize(
    ("stage", "arguments", "complaint"),
    [
        pytest.param(stage, arguments, complaint, id=f"{stage}-{' '.join(arguments)}")
        for stages, arguments, complaint in BAD_ARGUMENTS
        for stage in stages
    ],
)
def test_bad_arguments_are_refused_and_nothing_touched(place, stage, arguments, complaint, monkeypatch, capsys):
    (place / "typo.yaml").write_text("model_name: model\n")
    (place / "wrong.yaml").write_text("rows: many\n")
    before = listing(place)
    assert complaint in refusal(stage, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert listing(place) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_with_another_runs_results_is_refused(place, stage, monkeypatch, capsys):
    """By its `run.json`, and by the results alone where there is none."""
    name, *_ = STAGES[stage]
    result = {"sft": "final_model", "dpo": "final_model", "predict": "predictions/raw_results_9.json"}.get(
        stage, "predictions/raw_results_9.json" if stage == "beams" else "data/dpo_train.json"
    )
    if name == "dataset_generate_cluster_batch":
        result = "data/candidates.json"
    utils.write_text(place / "out" / result / "x" if result == "final_model" else place / "out" / result, "mine")
    before = listing(place)
    complaint = f"out: holds another run of {name}.py ({result.split('/')[-1]} is there already); use --overwrite"
    assert complaint in refusal(stage, monkeypatch=monkeypatch, capsys=capsys)
    assert listing(place) == before
    run = {"script": f"{name}.py", "state": "done", "arguments": {"seed": 1}, "inputs": {}, "counts": {}, "outputs": []}
    write_json(place / "out" / "run.json", run)
    before = listing(place)
    assert f"out: holds another run of {name}.py (" in refusal(stage, monkeypatch=monkeypatch, capsys=capsys)
    assert listing(place) == before


@pytest.mark.parametrize("stage", ["cluster", "predict", "self_play", "sft", "dpo"])
def test_a_prompt_that_cannot_fit(place, stage, monkeypatch, capsys):
    """Only the tokenizer can tell, so the run has begun; but it is in nobody's way."""
    long = spoil("dpo_train.json", set_key(1, "prompt", "word " * 300))
    long()
    before = listing(place)
    complaint = refusal(stage, "--max_length", "60", monkeypatch=monkeypatch, capsys=capsys)
    assert "without any title" in complaint and "give a greater --max_length" in complaint
    assert {name for name in listing(place) if name not in before} <= {
        *("out", "out/run.json", "out/data", "out/predictions", "out/runs"),
        *(name for name in listing(place) if name.endswith((".lock", ".partial.jsonl"))),
    }
    assert read_json(place / "out" / "run.json")["state"] == "failed"
    assert {name: value for name, value in listing(place).items() if name in before} == before
    if stage == "predict":
        run_main(*STAGES[stage], "--max_new_tokens", "4")


def test_one_record_leaves_no_random_negative(place, monkeypatch, capsys):
    edit_json(place / "data" / "train_sample.json", lambda records: records[:1])
    complaint = refusal("random", monkeypatch=monkeypatch, capsys=capsys)
    assert "train_sample.json: record 0: no title is left to be its negative" in complaint


def test_more_than_the_vocabulary_may_be_asked_for(place):
    run_main(*STAGES["cluster"], "--top_k", "100000", "--max_train_samples", "1", "--max_eval_samples", "1")


def test_a_spoiled_default_config_is_bad_input(place, monkeypatch, capsys, tmp_path):
    """The defaults are a file that people edit; a typing error there ended in a traceback."""
    shutil.copytree(utils.PROJECT / "configs", tmp_path / "project" / "configs")
    with (tmp_path / "project" / "configs" / "predict.yaml").open("a") as file:
        file.write("num_beam: 3\n")
    monkeypatch.setattr(utils, "PROJECT", tmp_path / "project")
    assert "predict.yaml: unknown key 'num_beam'; did you mean num_beams?" in refusal(
        "predict", monkeypatch=monkeypatch, capsys=capsys
    )


@pytest.mark.parametrize(
    ("stage", "more", "spoiling", "complaint"),
    [
        ("predict", ("--rowz", "3"), None, "generate_predict_batch.py: error: unknown flag --rowz; did you mean rows?"),
        ("sft", (), write(TRAIN, "[{]"), f"sft_smol.py: error: {TRAIN}: invalid JSON at line 1, column 3"),
        ("dpo", ("--model_name_or_path", "other_model"), None, "DPO_from_dpoData.py: error: adapter: was made for ano"),
    ],
)
def test_the_command_line_itself(place, run_script, stage, more, spoiling, complaint):
    """A process of its own: exit code 2 and exactly one line on stderr."""
    if spoiling:
        spoiling()
    before = listing(place)
    name, *args = STAGES[stage]
    result = run_script(f"{name}.py", *args, *more, cwd=place)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(complaint)
    assert listing(place) == before
