"""Decoding in parts, by several processes or as shards: the bytes of one go, and what putting together refuses."""

import shutil
from pathlib import Path

import pytest
from conftest import edit_json, interrupt_at, listing, run_main
from filelock import FileLock
from processes import finish, start_processes

from cebs import generation
from cebs.files import PROJECT
from cebs.generation import Journal
from utils import InputError, read_json

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = {
    "generate_predict_batch": ("--decoding", "constrained_beam", "--num_beams", "3", "--calibration", "0.5"),
    "dataset_generate": ("--method", "self_play"),
    "dataset_generate_cluster_batch": ("--num_candidates", "4", "--max_candidates", "8"),
}
one_script = pytest.mark.parametrize(
    "decoding", ["generate_predict_batch"], indirect=True
)  # enough where all are alike

# Runs a script whose second process sends itself a signal after its first batch
SIGNALLED = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(PROJECT)!r})
from cebs.generation import Journal
script, signal_name, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
append = Journal.append
def append_and_signal(journal, start, results):
    append(journal, start, results)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.Signals[signal_name])
Journal.append = append_and_signal
runpy.run_path(script, run_name="__main__")
"""


class Decoding:
    """A decoding script with its settings: batches of two records, so that there are several to deal out."""

    def __init__(self, script: str, root: Path, model: Path, data_dir: Path):
        self.script, self.root = script, root
        self.flags = ["--data_dir", data_dir, "--model_name_or_path", model, *SCRIPTS[script], "--max_new_tokens", "8"]
        self.flags += ["--batch_size", "2", "--rows", "2", "--dtype", "float32"]
        if script == "generate_predict_batch":
            self.flags += ["--cache_dir", root / "kept"]

    def run(self, out: str, *more) -> Path:
        run_main(self.script, *self.flags, "--output_dir", self.root / out, *more)
        return self.root / out

    def start(self, out: str, processes: int, signal_name: str = "") -> list:
        """Starts the real command line as the processes of one torch.distributed run, as a launcher does."""
        script, words = f"{self.script}.py", [*self.flags, "--output_dir", self.root / out]
        if signal_name:
            (self.root / "signalled.py").write_text(SIGNALLED)
            script, words = self.root / "signalled.py", [PROJECT / script, signal_name, *words]
        return start_processes(processes, script, *words, cwd=self.root)


@pytest.fixture(scope="module", params=SCRIPTS)
def decoding(request, tmp_path_factory, tiny_model, data_dir):
    return Decoding(request.param, tmp_path_factory.mktemp(request.param), tiny_model, data_dir)


@pytest.fixture(scope="module")
def whole(decoding):
    """What one process writes in one go."""
    return outputs(decoding.run("whole"))


def outputs(folder: Path) -> dict[str, str]:
    return {name: total for name, total in listing(folder).items() if name.startswith(("data/", "predictions/"))}


# --- several processes ---


@pytest.mark.parametrize("number", [2, 3])
def test_processes_write_the_bytes_of_one(decoding, whole, number):
    codes, told = finish(decoding.start(f"processes_{number}", number))
    assert codes == [0] * number, told
    assert outputs(decoding.root / f"processes_{number}") == whole
    assert read_json(decoding.root / f"processes_{number}/run.json")["state"] == "done"
    assert told[0][0] and not any(stdout or "record/s" in stderr for stdout, stderr in told[1:]), told


@pytest.mark.parametrize("decoding", ["generate_predict_batch", "dataset_generate_cluster_batch"], indirect=True)
@pytest.mark.parametrize("signal_name", ["SIGUSR1", "SIGKILL"])
def test_processes_stop_together_and_another_number_goes_on(decoding, whole, signal_name):
    """After a signal, or without one of them: nobody waits for ever, and no finished batch is done again."""
    codes, told = finish(decoding.start(signal_name, 2, signal_name))
    assert codes == [130, -9 if signal_name == "SIGKILL" else 130], told
    assert "interrupted; the same command goes on from here" in told[0][1] and "Traceback" not in told[0][1]
    run = read_json(decoding.root / signal_name / "run.json")
    reason = {"SIGUSR1": "SIGUSR1", "SIGKILL": "another process has ended"}[signal_name]
    assert (run["state"], run["reason"]) == ("interrupted", f"KeyboardInterrupt: {reason}")
    assert not set(outputs(decoding.root / signal_name)) & set(whole) - {"data", "predictions"}
    codes, told = finish(decoding.start(signal_name, 3))
    assert codes == [0] * 3, told
    assert "1 batches are done already" in told[0][0]
    assert outputs(decoding.root / signal_name) == whole


@one_script
def test_only_one_run_of_several_processes_in_a_folder(decoding):
    (decoding.root / "locked").mkdir()
    with FileLock(decoding.root / "locked/.generate_predict_batch.py.lock"):
        codes, told = finish(decoding.start("locked", 2))
    assert codes == [2, 130] and "another" in told[0][1] and "is running there" in told[0][1], told


# --- shards ---


@pytest.fixture(scope="module")
def shards(decoding, whole):
    """A folder with three finished shards, the first of them interrupted once. Read only."""
    for number in (1, 2, 3):
        if number == 1:
            with pytest.MonkeyPatch.context() as patched:
                interrupt_at(patched, Journal, "append", 1)
                with pytest.raises(KeyboardInterrupt):
                    decoding.run("shards", "--shard", "1/3")
            assert read_json(decoding.root / "shards/shard_1_of_3/run.json")["state"] == "interrupted"
        decoding.run("shards", "--shard", f"{number}/3")
    assert sorted(path.name for path in (decoding.root / "shards").iterdir()) == [
        f"shard_{number}_of_3" for number in (1, 2, 3)
    ]
    return decoding.root / "shards"


def copy(shards: Path, name: str) -> Path:
    return Path(shutil.copytree(shards, shards.with_name(name)))


def test_shards_put_together_are_the_bytes_of_one_go(decoding, whole, shards, monkeypatch, capsys):
    def no_model(*args):
        raise AssertionError("a model is loaded")

    copy(shards, "together")
    monkeypatch.setattr(generation, "load_for_inference", no_model)
    assert outputs(decoding.run("together")) == whole
    capsys.readouterr()
    decoding.run("together")
    decoding.run("together", "--shard", "3/3")
    assert capsys.readouterr().out.count("is done already, nothing to do") == 2


SPOILT = {
    "missing": (
        lambda folder: [shutil.rmtree(folder / f"shard_{number}_of_3") for number in (1, 3)],
        r": shard 1/3 is missing, 3/3 is missing; run each with --shard first",
    ),
    "unfinished": (
        lambda folder: edit_json(folder / "shard_2_of_3/run.json", lambda run: run.update(state="interrupted")),
        r": shard 2/3 is interrupted; run each with --shard first",
    ),
    "of two divisions": (
        lambda folder: shutil.copytree(folder / "shard_1_of_3", folder / "shard_1_of_2"),
        r"holds shards of 2 and of 3 parts \(shard_1_of_2, shard_1_of_3, shard_2_of_3, shard_3_of_3\)",
    ),
    "doubled": (
        lambda folder: shutil.copytree(folder / "shard_1_of_3", folder / "shard_2_of_3", dirs_exist_ok=True),
        r"shard_2_of_3: holds shard 1/3; run --shard 2/3 anew",
    ),
    "of other arguments": (
        lambda folder: edit_json(
            folder / "shard_3_of_3/run.json", lambda run: run["arguments"].update(max_new_tokens=9)
        ),
        r"shard_3_of_3: is a shard of another run \(max_new_tokens was 9, is 8\); use another --output_dir",
    ),
    "of other inputs": (
        lambda folder: edit_json(
            folder / "shard_3_of_3/run.json", lambda run: run["inputs"].update(dict.fromkeys(run["inputs"], "0"))
        ),
        r"shard_3_of_3: is a shard of another run \(.* has changed since\)",
    ),
}


@one_script
@pytest.mark.parametrize("spoilt", SPOILT)
def test_shards_that_do_not_belong_together_are_refused(decoding, shards, spoilt):
    folder = copy(shards, spoilt)
    spoil, message = SPOILT[spoilt]
    spoil(folder)
    before = listing(folder)
    with pytest.raises(InputError, match=message):
        decoding.run(spoilt)
    assert listing(folder) == before


def test_a_shard_without_its_answers_is_told(decoding, whole, shards):
    folder = copy(shards, "without")
    for path in folder.glob("shard_2_of_3/*/*.partial.jsonl"):
        path.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"without/shard_2_of_3/.*: no answers for record 2; run --shard 2/3 with --overwrite"
    ):
        decoding.run("without")
    decoding.run("without", "--shard", "2/3", "--overwrite")
    assert outputs(decoding.run("without")) == whole


@one_script
def test_more_shards_than_batches(decoding, whole):
    for number in range(1, 9):
        decoding.run("many", "--shard", f"{number}/8")
    assert outputs(decoding.run("many")) == whole


# --- flags ---


@one_script
@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3"])
def test_a_shard_is_a_part_of_so_many(decoding, shard):
    with pytest.raises(InputError, match=f"--shard {shard}: must be i/n with i from 1 to n, as in 2/4"):
        decoding.run("bad", f"--shard={shard}")


def test_what_decodes_nothing_has_no_shards(tmp_path, data_dir):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "out", "--shard", "1/2")
    with pytest.raises(InputError, match="--shard: --method random decodes nothing"):
        run_main("dataset_generate", "--method", "random", *flags)
    with pytest.raises(InputError, match="--shard: --candidates decodes nothing"):
        run_main("dataset_generate_cluster_batch", "--candidates", tmp_path / "candidates.json", *flags)
    assert not (tmp_path / "out").exists()
