"""Command lines, JSON, run folders, adapters: what every script stands on."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import edit_json, listing, make_adapter
from hypothesis import given
from hypothesis import strategies as st

from cebs.files import PROJECT, read_list
from cebs.models import load_model
from cebs.prompts import read_records
from cebs.runs import ADAPTER_WEIGHTS
from utils import (
    InputError,
    RunArguments,
    ScriptParser,
    base_fingerprint,
    check_adapter,
    load_tokenizer,
    read_json,
    require_done,
    run_folder,
    sha256,
    write_json,
    write_text,
)

# --- command lines ---


@dataclass(kw_only=True)
class Arguments(RunArguments):
    data_dir: str = field(metadata={"help": "Data."})
    adapter: str = field(metadata={"help": "Adapter."})
    rows: int = field(metadata={"help": "Rows."})
    rate: float = field(default=0.5, metadata={"help": "Rate."})
    topk: list[int] = field(default_factory=lambda: [5], metadata={"help": "k."})
    shared: bool = field(default=True, metadata={"help": "Shared."})
    limit: int | None = field(default=None, metadata={"help": "Limit."})


DEFAULTS = {"data_dir": "default/data", "adapter": "default/adapter", "output_dir": "out", "seed": 42, "rows": 16}


@pytest.fixture
def parse(tmp_path):
    def parse(*args, chain=("data_dir",), defaults=DEFAULTS):
        (tmp_path / "defaults.yaml").write_text(yaml.safe_dump(defaults))
        parser = ScriptParser(Arguments, "A stage.", defaults=str(tmp_path / "defaults.yaml"), chain=chain)
        return parser.parse_args_and_config([str(arg) for arg in args])[0]

    return parse


def config(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


def test_defaults_then_config_then_flags(parse, tmp_path):
    assert (parse().rows, parse().seed, parse().shared, parse().limit) == (16, 42, True, None)
    mine = config(tmp_path, "rows: 3\nseed: 7\ntopk: [1, 2]\nshared: false\nlimit: null\nrate: 1e-3\n")
    arguments = parse("--config", mine, "--seed", "8")
    assert (arguments.rows, arguments.seed, arguments.topk, arguments.shared) == (3, 8, [1, 2], False)
    assert (arguments.limit, arguments.rate) == (None, 0.001)
    assert parse("--seed", "8", "--config", mine).seed == 8
    assert parse(f"--config={mine}", "--seed=9", "--topk", "4", "6").seed == 9
    assert parse("--data-dir", "x").data_dir == "x" and parse("--no_shared").shared is False


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--rowz", "3"], "unknown flag --rowz; did you mean rows?"),
        (["--row", "3"], "unknown flag --row; did you mean rows?"),  # no abbreviations
        (["--qqqqqq"], "unknown flag --qqqqqq; --help lists what exists"),
        (["stray"], "unknown flag stray"),
        (["--rows", "three"], "argument --rows: invalid int value: 'three'"),
        (["--rows"], "argument --rows: expected one argument"),
        (["--topk", "5", "x"], "argument --topk: invalid int value: 'x'"),
        (["--shared", "maybe"], "argument --shared"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--limit", "-1"], "--limit -1: must be at least 1"),
        (["--config"], "--config: expected the path of a YAML file"),
        (["--config", "a.yaml", "--config", "b.yaml"], "a.yaml: no such file"),
    ],
)
def test_a_bad_command_line_is_named_in_one_line(parse, args, complaint):
    with pytest.raises(InputError) as error:
        parse(*args)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rowz: 3", "mine.yaml: unknown key 'rowz'; did you mean rows?"),
        ("3: 3", "mine.yaml: unknown key '3'"),
        ("rows: three", "argument --rows: invalid int value: 'three'"),
        ("rows: 2.5", "argument --rows: invalid int value: '2.5'"),
        ("rows: [1, 2]", "unknown flag 2"),
        ("topk: []", "argument --topk: expected at least one argument"),
        ("rows: 0", "--rows 0: must be at least 1"),
        ("- rows", "mine.yaml: expected a YAML mapping of names to values"),
        ("", "mine.yaml: expected a YAML mapping"),
        ("rows: [", "mine.yaml: cannot be read as YAML"),
        ("config: other.yaml", "mine.yaml: unknown key 'config'"),
    ],
)
def test_a_bad_config_is_named_in_one_line(parse, tmp_path, text, complaint):
    with pytest.raises(InputError) as error:
        parse("--config", config(tmp_path, text))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_missing_config_and_bad_defaults(parse, tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml: no such file; give --config the path of a YAML file"):
        parse("--config", tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="give one YAML file"):
        parse("--config", config(tmp_path, "rows: 3"), "--config", tmp_path / "mine.yaml")
    with pytest.raises(InputError, match="defaults.yaml: unknown key 'rowz'; did you mean rows?"):
        parse(defaults={**DEFAULTS, "rowz": 3})


def test_the_chains_adapter_belongs_to_the_chains_data(parse, tmp_path):
    assert parse().adapter == "default/adapter"
    assert parse("--rows", "3").adapter == "default/adapter"
    assert parse("--data_dir", "mine").adapter == ""
    assert parse("--data_dir=mine").adapter == ""  # an equals sign hid the flag once
    assert parse("--data-dir", "mine").adapter == ""
    assert parse("--data_dir", "mine", "--adapter", "a").adapter == "a"
    assert parse("--data_dir=mine", "--adapter=a").adapter == "a"
    assert parse("--config", config(tmp_path, "data_dir: mine")).adapter == ""
    assert parse("--config", config(tmp_path, "data_dir: mine\nadapter: a")).adapter == "a"
    assert parse("--data_dir", "mine", chain=()).adapter == "default/adapter"


def test_every_stages_defaults_and_configs_parse():
    import importlib

    stages = {
        "sft_smol": ["sft_published", "sft_recipe"],
        "dataset_generate_cluster_batch": [],
        "DPO_from_dpoData": ["dpo_hard", "dpo_long_tail", "dpo_published"],
        "generate_predict_batch": [],
    }
    chained = {}
    for name, configs in stages.items():
        for more in [[], *(["--config", str(PROJECT / "configs" / f"{config}.yaml")] for config in configs)]:
            groups = importlib.import_module(name).make_parser().parse_args_and_config(more)
            if not more:
                (chained[name],) = (group.adapter for group in groups if "adapter" in vars(group))
    assert chained == {
        "sft_smol": "",
        "dataset_generate_cluster_batch": "output/sft/final_model",
        "DPO_from_dpoData": "output/sft/final_model",
        "generate_predict_batch": "output/cluster_exposure/two_negatives/final_model",
    }


# --- JSON ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), values),
    max_leaves=8,
)


@given(json_values)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "some" / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[\n {"a": 1},\n {"a" 2}\n]', "invalid JSON at line 3, column 7: Expecting ':' delimiter"),
        (b"", "invalid JSON at line 1, column 1"),
        (b'["\xff"]', "cannot be read as UTF-8 text"),
        (None, "no such file; the stage before writes it, or give another path"),
    ],
)
def test_unreadable_json_says_where(tmp_path, content, complaint):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ") and complaint in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"a": 1}, "expected a JSON list of records, found dict"),
        ([], "the list is empty; at least one record is needed"),
        ([{"a": 1, "b": 2}, 3], "record 1: expected an object with a, b"),
        ([{"a": 1, "b": 2}, {"a": 1}], "record 1: 'b' is missing; each record needs a, b"),
    ],
)
def test_a_bad_list_names_file_and_record(tmp_path, value, complaint):
    write_json(tmp_path / "x.json", value)
    with pytest.raises(InputError) as error:
        read_list(tmp_path / "x.json", ("a", "b"))
    assert str(error.value) == f"{tmp_path / 'x.json'}: {complaint}"


@pytest.mark.parametrize("output", ["Emma", '"Emma', 'Emma"', '""', "", '"', 'The answer is "Emma"'])
def test_a_target_must_be_quoted(tmp_path, output):
    good = {"instruction": "Do.", "input": "x", "output": '"Emma"\n'}
    write_json(tmp_path / "x.json", [good, good, {**good, "output": output}])
    with pytest.raises(InputError, match="x.json: record 2: output must be the target title in double quotes"):
        read_records(tmp_path / "x.json")
    write_json(tmp_path / "x.json", [good, {**good, "input": None}])
    with pytest.raises(InputError, match="x.json: record 1: instruction, input and output must be text"):
        read_records(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "x", "new")
    monkeypatch.undo()
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", "new \ud800")
    monkeypatch.setattr(os, "replace", lambda a, b: no_space(0))
    with pytest.raises(OSError):
        write_text(tmp_path / "x", "new")
    assert listing(tmp_path).keys() == {"x"} and (tmp_path / "x").read_text() == "old"


# --- run folders ---


class Stage:
    """A script that writes `out.json`, with what it reads and where."""

    def __init__(self, tmp_path):
        self.folder, self.input = tmp_path / "run", tmp_path / "input.json"
        self.input.write_text("1")

    def start(self, work=None, *, overwrite=False, script="stage.py", scratch=("scratch-*",), **arguments):
        arguments = {"seed": 42, "output_dir": str(self.folder), "overwrite": overwrite, "size": 1, **arguments}
        with run_folder(
            self.folder,
            script=f"/somewhere/{script}",
            arguments=arguments,
            inputs=[self.input],
            outputs=["out.json"],
            scratch=scratch,
            overwrite=overwrite,
        ) as run:
            if run.done:
                return run
            (self.folder / "scratch-1").write_text("on the way")
            if work:
                work()
            run.counts["records"] = 1
            write_json(self.folder / "out.json", arguments["size"])
        return run

    def state(self):
        return read_json(self.folder / "run.json")["state"]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def raising(error):
    def work():
        raise error

    return work


def test_a_run_tells_how_it_was_made(stage):
    states = []
    run = stage.start(lambda: states.append(stage.state()))
    assert states == ["running"] and not run.done and not run.resumed
    record = read_json(stage.folder / "run.json")
    assert (record["state"], record["script"], record["seed"]) == ("done", "stage.py", 42)
    assert record["arguments"]["size"] == 1 and record["counts"] == {"records": 1}
    assert record["inputs"] == {str(stage.input): sha256(stage.input)}
    assert record["outputs"] == ["out.json"]
    for key in ("git_commit", "versions", "python", "device", "start_time", "end_time", "wall_time_s"):
        assert key in record


def test_a_finished_run_is_not_done_again(stage, capsys):
    stage.start()
    before = listing(stage.folder)
    run = stage.start(raising(AssertionError()))
    assert run.done and run.counts == {"records": 1} and listing(stage.folder) == before
    assert "is done already" in capsys.readouterr().out


def test_a_finished_run_whose_output_was_removed_is_done_again(stage):
    stage.start()
    (stage.folder / "out.json").unlink()
    assert not stage.start().done and (stage.folder / "out.json").exists()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("out of memory"), "failed"),
        (InputError("x.json: bad"), "failed"),
    ],
)
def test_an_unfinished_run_goes_on(stage, error, state):
    with pytest.raises(type(error)):
        stage.start(raising(error))
    record = read_json(stage.folder / "run.json")
    assert record["state"] == state and record["reason"].startswith(type(error).__name__)
    assert stage.start().resumed and stage.state() == "done"


def test_a_terminated_run_is_an_interrupted_one(stage):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stage.start(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stage.state() == "interrupted" and signal.getsignal(signal.SIGTERM) == before


def test_a_killed_run_goes_on(stage):
    stage.start()
    edit_json(stage.folder / "run.json", lambda run: run.update(state="running"))
    assert stage.start().resumed


def test_another_run_is_refused_and_nothing_touched(stage, tmp_path):
    stage.start()
    before = listing(stage.folder)
    with pytest.raises(InputError, match=r"run: holds another run of stage.py \(size was 1, is 2\); use --overwrite"):
        stage.start(size=2)
    with pytest.raises(InputError, match=r"\(seed was 42, is 7\)"):
        stage.start(seed=7)
    stage.input.write_text("2")
    with pytest.raises(InputError, match=r"\(.*input.json has changed since\)"):
        stage.start()
    assert listing(stage.folder) == before


def test_the_name_of_a_folder_makes_no_other_run(stage):
    stage.start()
    moved = stage.folder.with_name("moved")
    stage.folder.rename(moved)
    stage.folder = moved
    assert stage.start().done


def test_unfinished_work_of_another_run_is_refused_too(stage):
    with pytest.raises(KeyboardInterrupt):
        stage.start(raising(KeyboardInterrupt()))
    with pytest.raises(InputError, match="size was 1, is 2"):
        stage.start(size=2)


def test_a_run_that_ended_with_nothing_is_in_nobodys_way(stage):
    """A typing error used to cost --overwrite on the corrected command."""
    stage.folder.mkdir()
    with pytest.raises(InputError):
        with run_folder(stage.folder, script="stage.py", arguments={"seed": 1}, inputs=[], outputs=["out.json"]):
            raise InputError("--size: too large")
    assert not stage.start(size=2).resumed and stage.state() == "done"


def test_results_without_a_run_json_are_refused(stage):
    write_json(stage.folder / "out.json", "somebody's")
    before = listing(stage.folder)
    with pytest.raises(InputError, match="out.json is there already"):
        stage.start()
    assert listing(stage.folder) == before


def test_overwrite_removes_outputs_and_scratch_and_nothing_else(stage):
    stage.start()
    (stage.folder / "scratch-0").mkdir()
    write_text(stage.folder / "mine.txt", "keep")
    seen = []
    run = stage.start(
        lambda: seen.append(sorted(path.name for path in stage.folder.iterdir() if path.name[0] != ".")),
        overwrite=True,
        size=2,
    )
    assert seen == [["mine.txt", "run.json", "scratch-1"]] and not run.resumed
    assert read_json(stage.folder / "out.json") == 2 and (stage.folder / "mine.txt").exists()
    assert stage.start(size=2).done  # --overwrite itself makes no other run


def test_one_folder_serves_several_scripts(stage):
    stage.start()
    (stage.folder / "out.json").unlink()
    stage.start(script="other.py", size=5, scratch=())
    record = read_json(stage.folder / "run.json")
    assert record["script"] == "other.py" and record["earlier_runs"].keys() == {"stage.py"}
    assert stage.start(script="other.py", size=5, scratch=()).done
    assert stage.start().done


@pytest.mark.parametrize("content", ["[]", "{}", '{"script": "x"}', "{"])
def test_a_foreign_run_json_is_refused(stage, content):
    write_text(stage.folder / "run.json", content)
    with pytest.raises(InputError, match="run.json: "):
        stage.start()
    assert (stage.folder / "run.json").read_text() == content


def test_a_file_in_the_folders_place(stage):
    stage.folder.write_text("a file")
    with pytest.raises(InputError, match="run: cannot be made: .*; give another --output_dir"):
        stage.start()


def test_a_missing_input_and_a_negative_seed_make_no_folder(stage):
    with pytest.raises(InputError, match="--seed: -1"):
        stage.start(seed=-1)
    stage.input.unlink()
    with pytest.raises(InputError, match="input.json: no such file"):
        stage.start()
    assert not stage.folder.exists()


def test_two_at_once(stage):
    """Another process holds the lock of the run folder."""
    with pytest.raises(KeyboardInterrupt):
        stage.start(raising(KeyboardInterrupt()))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
            "print('held', flush=True)\nsys.stdin.read()",
            str(stage.folder / ".stage.py.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = listing(stage.folder)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="run: another stage.py is running there"):
                stage.start(overwrite=overwrite)
        assert listing(stage.folder) == before
    finally:
        holder.kill()
        holder.communicate()
    assert stage.start().resumed


def test_require_done(stage):
    with pytest.raises(KeyboardInterrupt):
        stage.start(raising(KeyboardInterrupt()))
    for path in (stage.folder / "out.json", stage.folder / "data" / "out.json"):
        with pytest.raises(InputError, match=f"{path}: stage.py is interrupted in .*run; run it to its end first"):
            require_done(path, "stage.py")
        require_done(path, "other.py")
    stage.start()
    require_done(stage.folder / "out.json", "stage.py")
    require_done(stage.folder.parent / "x" / "y.json", "stage.py")


# --- models and adapters ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model, tokenizer):
    return make_adapter(tmp_path_factory.mktemp("adapter") / "final_model", tiny_model, tokenizer)


@pytest.fixture
def damaged(adapter, tmp_path):
    import shutil

    return Path(shutil.copytree(adapter, tmp_path / "final_model"))


def test_fingerprints_tell_models_apart(tiny_model, other_model, tmp_path):
    assert base_fingerprint(tiny_model) == base_fingerprint(str(tiny_model)) != base_fingerprint(other_model)
    with pytest.raises(InputError, match="no .*safetensors file; give the folder of a model"):
        base_fingerprint(tmp_path)


def test_an_adapter_knows_its_base_model(adapter, tiny_model, other_model):
    assert not (adapter.parent / ".final_model.tmp").exists()
    check_adapter(adapter, tiny_model)
    load_model(tiny_model, adapter=str(adapter))
    with pytest.raises(InputError, match=r"final_model: was made for another base model \(tiny\), not for .*other"):
        check_adapter(adapter, other_model)


@pytest.mark.parametrize("name", ["adapter_config.json", ADAPTER_WEIGHTS])
def test_an_adapter_without_a_file(damaged, tiny_model, name):
    (damaged / name).unlink()
    with pytest.raises(InputError, match=f"no {name}; give the final_model folder of a finished training run"):
        check_adapter(damaged, tiny_model)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_half_an_adapter(damaged, tiny_model, size):
    weights = damaged / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{ADAPTER_WEIGHTS}: is damaged or cut short"):
        check_adapter(damaged, tiny_model)


def test_an_adapter_of_another_shape_without_its_fingerprint(damaged, tiny_model):
    """An adapter that other tools made has no base_model.json; then the shapes decide."""
    from safetensors.torch import load_file, save_file

    (damaged / "base_model.json").unlink()
    check_adapter(damaged, tiny_model)
    tensors = load_file(damaged / ADAPTER_WEIGHTS)
    save_file({name: tensor.repeat(1, 2) for name, tensor in tensors.items()}, damaged / ADAPTER_WEIGHTS)
    with pytest.raises(InputError, match="final_model: does not fit the base model") as error:
        load_model(tiny_model, adapter=str(damaged))
    assert "\n" not in str(error.value)


def test_half_a_base_model(tiny_model, tmp_path):
    import shutil

    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="broken: cannot be loaded as a language model"):
        load_model(broken)
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="broken: its tokenizer cannot be loaded"):
        load_tokenizer(broken)
