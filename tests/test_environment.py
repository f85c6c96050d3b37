"""Wherever and however the scripts are started, they come to the same: the real command lines in odd surroundings."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Result, edit_json, listing, run_main, start_script
from fork_server import LIBRARIES, ForkedScript

from cebs.files import PROJECT
from utils import InputError, read_json

pytestmark = pytest.mark.usefixtures("one_thread")

# one process loads the libraries in the surroundings that are tested; each command line is then a fork of it
DRIVER = f"""
import json, os, runpy, sys
os.umask(0o077)
import {", ".join(LIBRARIES)}
for script, *words in json.loads(sys.stdin.read()):
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            sys.exit(f"{{script}}: exit code {{code}}")
    else:
        sys.argv = [script, *words]
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        sys.exit()
"""


def chain(model: Path, encoder: Path, data: str, out: str) -> list[list[str]]:
    """The stages from records to a report, as command lines."""
    model_flags = ["--model_name_or_path", str(model)]
    decoding = ["--max_new_tokens", "8", "--batch_size", "4", "--rows", "3", "--dtype", "float32"]
    return [
        ["sft_smol.py", "--data_dir", data, *model_flags, "--num_train_epochs", "1", "--output_dir", f"{out}/sft"],
        ["dataset_generate_cluster_batch.py", "--data_dir", data, *model_flags, "--adapter", f"{out}/sft/final_model"]
        + ["--max_candidates", "10", *decoding, "--output_dir", f"{out}/cluster"],
        ["generate_predict_batch.py", "--data_dir", data, *model_flags, "--adapter", f"{out}/sft/final_model"]
        + [*decoding, "--output_dir", f"{out}/sft"],
        ["evaluate.py", "--predictions", f"{out}/sft/predictions", "--data_dir", data, "--encoder", str(encoder)]
        + ["--dataset", "Bücher", "--method", "SFT ☃", "--topk", "3", "--bootstrap", "20", "--cache_dir", f"{out}/kept"]
        + ["--results_csv", f"{out}/results.csv"],
        ["report.py", "--results_csv", f"{out}/results.csv", "--k", "3", "--output_dir", f"{out}/report"],
    ]


RESULTS = (
    "sft/final_model/adapter_model.safetensors",
    "cluster/data/dpo_two_negatives_train.json",
    "sft/predictions/raw_results_8.json",
    "results.csv",
    "report/report.md",
)


@pytest.fixture(scope="module")
def ordinary(tiny_model, data_dir, encoder, tmp_path_factory) -> Path:
    """What the chain comes to in ordinary surroundings."""
    out = tmp_path_factory.mktemp("ordinary")
    for script, *words in chain(tiny_model, encoder, str(data_dir), str(out)):
        run_main(script.removesuffix(".py"), *words)
    return out


def test_everything_at_once(ordinary, tiny_model, encoder, data_dir, tmp_path):
    """The C locale, another time zone, no terminal, a home that cannot be written, umask 077, paths with spaces and
    letters of three scripts, relative to a working directory that is not the project."""
    elsewhere = tmp_path / "Ünter wegs"
    elsewhere.mkdir()
    shutil.copytree(data_dir, elsewhere / "百年 孤独")
    shutil.copytree(tiny_model, elsewhere / "Модель 1")
    shutil.copytree(encoder, elsewhere / encoder.name)
    before = listing(elsewhere)
    stages = chain(Path("Модель 1"), Path(encoder.name), "百年 孤独", "Läufe und so")
    surroundings = {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C",
        "TZ": "Pacific/Apia",
        "TERM": "dumb",
        "HOME": "/proc/nobody",  # not even root can make it
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([[str(PROJECT / script), *words] for script, *words in stages]),
        cwd=elsewhere,
        env=surroundings,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr

    out = elsewhere / "Läufe und so"
    for name in RESULTS:
        assert (out / name).read_bytes() == (ordinary / name).read_bytes(), name
    for path in out.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) in (0o700, 0o600), path  # nobody else may read what the run left
    after = listing(elsewhere)
    assert before.items() <= after.items()
    assert all(name.startswith(out.name) for name in after.keys() - before.keys())  # and nothing lies about
    times = [read_json(out / "sft/run.json")[name] for name in ("start_time", "end_time")]
    assert all(time.endswith("+00:00") for time in times)  # whatever the time zone


def test_no_home_at_all(data_dir, tmp_path):
    """As in some containers and cron jobs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    words = ["--method", "popularity", "--data_dir", str(data_dir), "--output_dir", "out"]
    process = ForkedScript(PROJECT / "predict_baselines.py", words, cwd=tmp_path, env=environment)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert read_json(tmp_path / "out/run.json")["state"] == "done"


def test_a_name_that_is_not_utf8(data_dir, tmp_path):
    """As an old archive leaves them: Latin-1. It cannot stand in run.json."""
    with pytest.raises(InputError, match=r"^'out/B\\udcfccher': is not UTF-8; rename it, or set LC_ALL=C.UTF-8$"):
        run_main("predict_baselines", "--data_dir", data_dir, "--output_dir", os.fsdecode(b"out/B\xfccher"))
    assert listing(tmp_path) == {}


# --- two versions of the project side by side ---


@pytest.fixture(scope="module")
def other_version(tmp_path_factory) -> Path:
    """A copy of the project, as of another checkout."""
    folder = tmp_path_factory.mktemp("versions") / "cebs"
    left_out = (".*", "models", "output", "results", "tests", "docs", "benchmarks", "__pycache__")
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns(*left_out))
    return folder


def finish(process: ForkedScript) -> Result:
    stdout, stderr = process.communicate(timeout=180)
    return Result(process.returncode, stdout, stderr)


def baseline(data_dir: Path, out: Path) -> list[str]:
    return list(map(str, ("--method", "popularity", "--data_dir", data_dir, "--output_dir", out)))


def test_two_versions_take_up_each_others_runs(other_version, data_dir, tmp_path):
    script, words = "predict_baselines.py", baseline(data_dir, tmp_path / "run")
    assert finish(start_script(script, *words, cwd=tmp_path)).code == 0
    before = listing(tmp_path / "run")
    other = finish(start_script(str(other_version / script), *words, cwd=tmp_path))
    assert other.code == 0 and "is done already, nothing to do" in other.stdout
    assert listing(tmp_path / "run") == before


def test_two_versions_share_a_cache(other_version, data_dir, encoder, ordinary, tmp_path):
    """Both at once, with an empty cache."""
    words = ["--predictions", ordinary / "sft/predictions", "--data_dir", data_dir, "--encoder", encoder]
    words += ["--topk", "3", "--bootstrap", "20", "--cache_dir", tmp_path / "kept", "--method", "SFT"]
    processes = [
        start_script(script, *words, "--results_csv", tmp_path / name / "results.csv", cwd=tmp_path)
        for name, script in (("one", "evaluate.py"), ("two", str(other_version / "evaluate.py")))
    ]
    assert [finish(process).code for process in processes] == [0, 0]
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.suffix == ".safetensors"
    assert (tmp_path / "one/results.csv").read_bytes() == (tmp_path / "two/results.csv").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # an older version knew one setting less, a newer one knows one more
        (lambda run: run["arguments"].update(num_titles=None), "num_titles was None, is 20"),
        (lambda run: run["arguments"].update(new_setting=3), "new_setting was 3, is None"),
    ],
)
def test_a_finished_run_of_a_version_with_other_settings_is_not_touched(data_dir, tmp_path, change, said):
    words = baseline(data_dir, tmp_path / "run")
    run_main("predict_baselines", *words)
    edit_json(tmp_path / "run/run.json", change)
    before = listing(tmp_path / "run")
    with pytest.raises(InputError, match="holds another run of predict_baselines.py") as error:
        run_main("predict_baselines", *words)
    assert said in str(error.value)
    assert listing(tmp_path / "run") == before


def test_a_setting_that_is_left_out_does_not_tell_versions_apart(data_dir, tmp_path, capsys):
    words = baseline(data_dir, tmp_path / "run")
    run_main("predict_baselines", *words)
    edit_json(tmp_path / "run/run.json", lambda run: run["arguments"].update(new_setting=None))
    run_main("predict_baselines", *words)
    assert "is done already, nothing to do" in capsys.readouterr().out
