"""Writes that fail: a full disk, a folder that is gone or read-only. One line says so, and the next start goes on.

Faults are injected at every place in turn where a run asks the disk to keep something, and by the real thing: a limit
on the size of files, a small file system, one that is read-only.
"""

import contextlib
import errno
import importlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import listing, run_main
from safetensors.torch import save_file
from toy_ratings import TOY_FILMS, TOY_SIZES, toy_ratings, write_atomic

from cebs import files
from cebs.errors import errors_in_one_line
from cebs.kept import read_kept, write_kept
from utils import read_json, write_json, write_text, written_whole

pytestmark = pytest.mark.usefixtures("one_thread")

UNFINISHED = ("run.json", ".lock", ".jsonl")  # what a run that failed may leave beside its results


@dataclass(frozen=True)
class Stage:
    """A script with its inputs, and the file patterns of its results."""

    script: str
    flags: tuple[Any, ...]
    results: str = "**/*.json"

    def run(self, folder: Path) -> None:
        """Runs the stage as a command line does: its errors end in `SystemExit`."""
        with errors_in_one_line(self.script):
            run_main(self.script, *self.flags, "--output_dir", folder)

    def outcome(self, folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.glob(self.results)
            if path.name != "run.json"
        }


@pytest.fixture(scope="module")
def stages(tiny_model, data_dir, tmp_path_factory) -> dict[str, Stage]:
    films = write_atomic(tmp_path_factory.mktemp("films") / "films", TOY_FILMS, toy_ratings())
    model = ("--data_dir", data_dir, "--model_name_or_path", tiny_model)
    decoding = ("--max_new_tokens", "6", "--batch_size", "3", "--rows", "2", "--dtype", "float32")
    training = ("--learning_rate", "0.01", "--num_train_epochs", "1", "--save_steps", "2", "--eval_steps", "2")
    return {
        "prepare_data": Stage("prepare_data", ("--source", films, *TOY_SIZES)),
        "random": Stage("dataset_generate", ("--method", "random", "--data_dir", data_dir)),
        "negatives": Stage("dataset_generate_cluster_batch", (*model, *decoding)),
        "baseline": Stage("predict_baselines", ("--method", "popularity", "--data_dir", data_dir)),
        "predict": Stage("generate_predict_batch", (*model, *decoding)),
        "sft": Stage("sft_smol", (*model, *training), "final_model/adapter_model.safetensors"),
    }


def fails_in_one_line(stage: Stage, folder: Path, capsys: pytest.CaptureFixture, said: str) -> None:
    """Runs a stage that cannot write: exit code 1, and one line, which a progress bar may stand before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        stage.run(folder)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{stage.script}: ")]
    assert exit.value.code == 1
    assert len(lines) == 1 and said in lines[0] and lines[0].endswith("the same command goes on from here")


# --- every write in turn ---


@contextlib.contextmanager
def full_at(nth: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The n-th time that anything is to be kept, counted from 1, the disk is full; yields the calls so far."""
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        yield calls


@pytest.mark.parametrize("name", ["prepare_data", "random", "baseline", "predict"])
def test_the_disk_is_full_at_any_write(stages, name, tmp_path, monkeypatch, capsys):
    """The n-th time that anything is to be kept on the disk fails, for every n; the same command then goes on."""
    stage = stages[name]
    stage.run(tmp_path / "whole")
    expected, failed = stage.outcome(tmp_path / "whole"), 0
    for nth in range(1, 100):
        folder = tmp_path / str(nth)
        with full_at(nth, monkeypatch) as calls:
            try:
                stage.run(folder)
            except SystemExit as exit:
                failed += 1
                error = capsys.readouterr().err.splitlines()[-1]
                assert exit.code == 1
                assert error.startswith(f"{stage.script}: error: {folder}") and "No space left on device" in error
                assert all(path.name.endswith(UNFINISHED) or path.is_dir() for path in folder.rglob(".*"))
                for path, content in stage.outcome(folder).items():  # what is there is whole
                    assert content == expected[path]
        stage.run(folder)
        assert stage.outcome(folder) == expected and read_json(folder / "run.json")["state"] == "done"
        if len(calls) < nth:
            break
    assert failed >= 2 + len(expected)  # run.json twice, and each result; folders that do not sync do no harm


@pytest.fixture(scope="module")
def rankings(data_dir, tmp_path_factory) -> Path:
    """A file of predictions that needs no encoder: every record gets the catalogue's first titles."""
    titles = list(read_json(data_dir / "name2id.json"))[:5]
    records = [
        {"prompt": f'"{titles[4]}"', "prediction": f'"{titles[0]}"', "ground_truth": title, "ranking": titles}
        for title in titles
    ]
    path = tmp_path_factory.mktemp("rankings") / "rankings.json"
    write_json(path, records)
    return path


def evaluate(folder: Path, rankings: Path, data_dir: Path, method: str) -> None:
    words = ("--predictions", rankings, "--data_dir", data_dir, "--method", method, "--topk", 3, "--bootstrap", 0)
    with errors_in_one_line("evaluate"):
        run_main("evaluate", *words, "--results_csv", folder / "results.csv", "--metrics_json", folder / "m.json")


def test_the_disk_is_full_at_any_write_of_an_evaluation(rankings, data_dir, tmp_path, monkeypatch, capsys):
    """The row of an earlier method stays, whatever happens; the new row is there as a whole or not at all."""
    folder = tmp_path / "out"
    for method in ("earlier", "new"):
        evaluate(folder, rankings, data_dir, method)
    expected, failed = listing(folder), 0
    for nth in range(1, 100):
        shutil.rmtree(folder)
        evaluate(folder, rankings, data_dir, "earlier")
        earlier = listing(folder)
        with full_at(nth, monkeypatch) as calls:
            try:
                evaluate(folder, rankings, data_dir, "new")
            except SystemExit as exit:
                failed += 1
                assert exit.code == 1
                assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
                for name, content in listing(folder).items():  # what is there is whole, and the table is the old one
                    assert content == earlier.get(name) or name != "results.csv" and content == expected[name]
        evaluate(folder, rankings, data_dir, "new")
        assert listing(folder) == expected
        if len(calls) < nth:
            break
    assert failed == 3  # the figures, the file per user, the table


# --- the real thing ---


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: EFBIG, as the kernel's signal is ignored by Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["prepare_data", "random", "baseline", "predict"])
def test_a_file_that_may_not_grow_so_large(stages, name, tmp_path, capsys):
    stage = stages[name]
    stage.run(tmp_path / "whole")
    expected = stage.outcome(tmp_path / "whole")
    with file_size_limit(max(map(len, expected.values())) - 1):
        fails_in_one_line(stage, tmp_path / "small", capsys, "File too large; raise the limit on the size of a file")
    stage.run(tmp_path / "small")
    assert stage.outcome(tmp_path / "small") == expected


@pytest.mark.parametrize(
    ("too_large", "said"),
    [
        ("optimizer.pt", "a checkpoint cannot be written; see whether the disk is full"),
        ("adapter_model.safetensors", "File too large"),
        ("tokenizer.json", "File too large"),
    ],
)
def test_a_checkpoint_that_cannot_be_written(stages, too_large, said, tmp_path, capsys):
    """torch, safetensors and tokenizers each say it in another way."""
    stage = stages["sft"]
    stage.run(tmp_path / "whole")
    (checkpoint, *_) = sorted((tmp_path / "whole").glob("checkpoint-*"))
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    with file_size_limit(sizes[too_large] - 1):
        fails_in_one_line(stage, tmp_path / "small", capsys, said)
    assert not (tmp_path / "small/final_model").exists()
    stage.run(tmp_path / "small")
    assert stage.outcome(tmp_path / "small") == stage.outcome(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """`small_disk("size=64k")`: a file system of that size; `small_disk("remount,ro")` makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {result.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", ["random", "predict", "sft"])
def test_a_full_disk_and_a_read_only_one(stages, name, small_disk, tmp_path, capsys):
    stage = stages[name]
    stage.run(tmp_path / "whole")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*"))
    disk = small_disk(f"size={3 * needed + 2**20}")
    shutil.copytree(tmp_path / "whole", disk / "earlier")
    earlier = listing(disk / "earlier")

    room = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(room - 20_000))
    fails_in_one_line(stage, disk / "run", capsys, "")
    small_disk("remount,ro")
    fails_in_one_line(stage, disk / "run", capsys, "Read-only file system; make the folder writable")
    with pytest.raises(SystemExit) as exit:
        stage.run(disk / "new")
    assert exit.value.code == 2  # nothing has been begun: it is an argument that is wrong
    assert f"{disk / 'new'}: cannot be made: Read-only file system; give another" in capsys.readouterr().err
    small_disk("remount,rw")
    assert listing(disk / "earlier") == earlier

    (disk / "ballast").unlink()
    stage.run(disk / "run")
    assert stage.outcome(disk / "run") == stage.outcome(tmp_path / "whole")


@contextlib.contextmanager
def after_two_batches(monkeypatch, happens):
    """Calls `happens` as soon as two batches are in the journal."""
    from cebs.generation import Journal

    append = Journal.append

    def append_and_go_on(journal, *args):
        append(journal, *args)
        if len(journal.batches) == 2:
            happens()

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", append_and_go_on)
        yield


def test_a_folder_that_vanishes(stages, tmp_path, monkeypatch, capsys):
    """After the second batch; what comes back is a folder without the batches, so that the run begins anew."""
    stage = stages["predict"]
    stage.run(tmp_path / "whole")
    with after_two_batches(monkeypatch, lambda: shutil.rmtree(tmp_path / "run")):
        fails_in_one_line(stage, tmp_path / "run", capsys, "No such file or directory; see where it has gone")
    stage.run(tmp_path / "run")
    assert stage.outcome(tmp_path / "run") == stage.outcome(tmp_path / "whole")


def test_a_folder_that_turns_read_only(stages, tmp_path, monkeypatch, capsys):
    stage = stages["predict"]
    stage.run(tmp_path / "whole")

    def freeze():
        command = ["chattr", "+i", tmp_path / "run/predictions"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a folder cannot be made immutable here: chattr +i fails")

    try:
        with after_two_batches(monkeypatch, freeze):
            fails_in_one_line(stage, tmp_path / "run", capsys, "not permitted; make the folder writable")
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "run/predictions"], capture_output=True)
    stage.run(tmp_path / "run")
    assert stage.outcome(tmp_path / "run") == stage.outcome(tmp_path / "whole")


def test_a_plot_that_cannot_be_written(rankings, data_dir, tmp_path, capsys):
    for method in ("SFT", "other"):
        evaluate(tmp_path, rankings, data_dir, method)
    stage = Stage("report", ("--results_csv", tmp_path / "results.csv", "--k", 3), "**/*.*")
    stage.run(tmp_path / "whole")
    plots = sorted((tmp_path / "whole/plots").glob("*.png"))
    with file_size_limit(max(plot.stat().st_size for plot in plots) - 1):
        fails_in_one_line(stage, tmp_path / "small", capsys, "File too large; raise the limit")
    for name, content in stage.outcome(tmp_path / "small").items():
        assert name == ".report.py.lock" or content == (tmp_path / "whole" / name).read_bytes()
    stage.run(tmp_path / "small")
    assert stage.outcome(tmp_path / "small") == stage.outcome(tmp_path / "whole")


# --- the writing itself ---


@pytest.mark.parametrize("name", ["prepare_data", "random", "negatives"])
def test_a_reader_that_leaves_before_the_summary_makes_no_failure_of_a_finished_run(
    stages, name, tmp_path, monkeypatch, capfd
):
    """`dataset_generate_cluster_batch.py | head -2` had its candidates to generate again."""

    def closed(*args, **kwargs):
        raise BrokenPipeError

    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module(stages[name].script), "print", closed, raising=False)
        with pytest.raises(SystemExit) as stopped:
            stages[name].run(tmp_path / "out")
    assert stopped.value.code == 141
    assert read_json(tmp_path / "out/run.json")["state"] == "done"


def test_what_is_written_has_its_name_last(tmp_path):
    path = tmp_path / "a/b/x.bin"
    with written_whole(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and listing(tmp_path / "a/b").keys() == {"x.bin"}
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_bytes(b"newer")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new" and listing(tmp_path / "a/b").keys() == {"x.bin"}


def test_the_name_is_kept_after_the_contents(tmp_path, monkeypatch):
    """A power cut at any moment leaves the old file or the new one: contents, name, folder, in this order."""
    order = []
    replace, sync = os.replace, files.sync
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("name"), replace(a, b)))
    monkeypatch.setattr(files, "sync", lambda path: (order.append("folder" if path.is_dir() else "file"), sync(path)))
    write_json(tmp_path / "x.json", 1)
    assert order == ["file", "name", "folder"]


def test_a_name_that_is_taken_by_a_folder(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OSError, match=rf"\[Errno 21\] Is a directory: '{tmp_path}/x.json'"):
        write_text(tmp_path / "x.json", "1")


def test_an_array_that_cannot_be_kept_is_a_note(tmp_path, capsys):
    array = np.ones(10_000)
    with file_size_limit(5_000):
        write_kept(tmp_path / "x.safetensors", array, "the numbers")
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: the numbers are not kept: ") and "File too large" in note
    assert listing(tmp_path) == {} and read_kept(tmp_path / "x.safetensors") is None
    write_kept(tmp_path / "x.safetensors", array, "the numbers")
    assert (read_kept(tmp_path / "x.safetensors") == array).all()


# --- what is said ---


def write_too_much(path: Path, how: str) -> None:
    if how == "safetensors":
        save_file({"a": torch.ones(10_000)}, path)
    elif how == "torch":
        torch.save(torch.ones(10_000), path)
    else:
        path.write_bytes(bytes(10_000))


@pytest.mark.parametrize("how", ["safetensors", "torch", "plain"])
def test_libraries_say_that_a_disk_is_full_each_in_its_own_way(tmp_path, capsys, how):
    with pytest.raises(SystemExit) as exit, errors_in_one_line("x.py"), file_size_limit(5_000):
        write_too_much(tmp_path / "x", how)
    error = capsys.readouterr().err
    assert exit.value.code == 1 and error.count("\n") == 1
    assert error.startswith("x.py: error: ")
    assert ("a checkpoint cannot be written; " if how == "torch" else "File too large; ") in error


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("3 beams"),
        RuntimeError("shapes cannot be multiplied"),
        OSError("no number"),
        ConnectionRefusedError(errno.ECONNREFUSED, "x"),
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), errors_in_one_line("x.py"):
        raise bug
