"""The comparison as Slurm jobs: what is submitted, what is told, and a graph on a real Slurm where one can be started.

Everywhere else sbatch, squeue, scancel, srun and scontrol are small scripts that stand in for Slurm's.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import run_main

from cebs import slurm
from cebs.comparison import command_line, make_plans, plan_parser
from cebs.files import PROJECT
from cebs.slurm import Job, Queued, State, clock, read_jobs, read_log, state_of, submit
from utils import InputError, read_json, write_text

SCRIPTS = sorted(PROJECT.glob("slurm/*.sbatch"))
LOCAL_SLURM = PROJECT.parent / "shared/tools/slurm_local.sh"
DATA = ("--data_dir", "data", "--model_name_or_path", "model", "--encoder", "encoder")


# -- The sbatch files -------------------------------------------------------------------------------------------------


def test_each_script_of_the_graph_has_its_sbatch_file():
    scripts = {Path(stage.command[0]).stem for stage in stages(*DATA)}
    assert scripts <= {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_sbatch_file_ends_in_the_command_line_of_its_script(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(rf'\nrun srun (slurm/rank\.sh )?python {path.stem}\.py "\$@"\n$', text)
    for option in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert option in text, option


class Shell:
    """A folder with the scripts that a job needs, and stand-ins for Slurm's commands that write down their words."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        (folder / "slurm").mkdir()
        shutil.copy(PROJECT / "slurm/job.sh", folder / "slurm")
        self.command("srun", 'exec "$@"')
        self.command("scontrol", 'echo "scontrol $*" >> calls.txt; [[ $1 != requeue ]]')
        (folder / "venv/bin").mkdir(parents=True)
        (folder / "venv/bin/python").symlink_to(sys.executable)

    def command(self, name: str, code: str) -> None:
        write_text(self.bin / name, f"#!/usr/bin/env bash\n{code}\n")
        (self.bin / name).chmod(0o755)

    def start(self, script: str, *flags: str, **environment: str) -> subprocess.Popen:
        write_text(self.folder / "script.py", script)
        slurm_says = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "VENV": "venv"}
        return subprocess.Popen(
            ["bash", "-c", 'source slurm/job.sh || exit\nrun srun python script.py "$@"', "job", *flags],
            cwd=self.folder,
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | slurm_says | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def calls(self) -> str:
        return (self.folder / "calls.txt").read_text()


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_a_finished_job_leaves_the_note_of_the_local_runner(shell):
    flags = ["--method", "Two negatives", "--negatives", "in:first", "--adapter", "", "--x", "it's $HOME"]
    job = shell.start("print('hello')", *flags, CEBS_NOTE="note.txt")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and "== done after" in out, out
    stage = slurm.Stage("a", ["script.py", *flags], [], Path("result"), 0)
    assert (shell.folder / "note.txt").read_text() == command_line(stage)


def test_a_failed_job_leaves_none(shell):
    job = shell.start("raise SystemExit(2)", CEBS_NOTE="note.txt")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and "== failed with exit code 2 after" in out, out
    assert not (shell.folder / "note.txt").exists()
    assert "requeue" not in shell.calls()


@pytest.mark.parametrize("restarts", ["0", "100"])
def test_a_signal_goes_to_the_script_and_the_job_back_into_the_queue(shell, restarts):
    script = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda signum, frame: sys.exit(130))
print("ready", flush=True)
time.sleep(60)
"""
    job = shell.start(script, CEBS_NOTE="note.txt", SLURM_RESTART_COUNT=restarts)
    for line in job.stdout:
        if line == "ready\n":
            job.send_signal(signal.SIGUSR1)
            break
    out, _ = job.communicate(timeout=30)
    # the stand-in cannot requeue: the job says so and ends
    assert job.returncode == 130, out
    assert not (shell.folder / "note.txt").exists()
    if restarts == "0":
        assert "scontrol requeue 7" in shell.calls() and "== interrupted after" in out and "not requeued" in out
    else:
        assert "requeue" not in shell.calls() and "== failed with exit code 130" in out


def test_a_signal_before_the_script_is_ready_counts_as_one(shell):
    job = shell.start("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    for line in job.stdout:
        if line == "ready\n":
            job.send_signal(signal.SIGUSR1)
            break
    job.communicate(timeout=30)
    assert job.returncode == 128 + signal.SIGUSR1
    assert "scontrol requeue 7" in shell.calls()


def test_the_tasks_of_an_array_have_flags_of_their_own(shell):
    job = shell.start(
        "import sys; print(sys.argv[1:])", "--seed", "%a", "--output_dir", "a/%a", SLURM_ARRAY_TASK_ID="3"
    )
    assert "['--seed', '3', '--output_dir', 'a/3']" in job.communicate(timeout=30)[0]


def test_a_job_without_an_environment_says_how_to_make_one(shell):
    job = shell.start("", VENV="nowhere")
    assert "nowhere: no Python environment there; slurm/submit_comparison.sh" in job.communicate(timeout=30)[0]
    assert job.returncode == 2


# -- Submitting -------------------------------------------------------------------------------------------------------


def parse(*words):
    return plan_parser("test", "").parse_args([str(word) for word in words])


def stages(*words):
    return [stage for plan in make_plans(parse(*words))[2] for stage in plan.stages.values()]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder to submit from. `sbatch` counts from 1, `squeue` shows `queue.txt`, and downloads are there."""
    shell = Shell(tmp_path)
    shell.command(
        "sbatch", 'echo "$CEBS_NOTE $*" >> calls.txt; [[ ! -f full ]] || { cat full >&2; exit 1; }; wc -l < calls.txt'
    )
    shell.command("squeue", "[[ ! -f queue.txt ]] || cat queue.txt")
    shell.command("scancel", 'echo "scancel $*" >> calls.txt')
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{shell.bin}:{os.environ['PATH']}")
    monkeypatch.delenv("CEBS_SBATCH_GPU", raising=False)
    monkeypatch.delenv("CEBS_SBATCH_CPU", raising=False)
    monkeypatch.setattr(slurm, "run_stages", lambda plans, jobs: {})
    return tmp_path


ROW = ("--only", "SFT", "--output_dir", "out", *DATA)


def go(*words):
    return submit(parse(*words), list(words))


def finish(job: Job) -> None:
    write_text(job.note, job.command)
    Path(job.result).parent.mkdir(parents=True, exist_ok=True)
    Path(job.result).touch()


def test_the_dry_run_submits_nothing_and_prints_the_whole_graph(cluster, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm is needed for it
    go("--dry_run", *DATA)
    lines = [line for line in capsys.readouterr().out.splitlines() if "sbatch" in line]
    expected = [stage for stage in stages(*DATA) if stage.name != "downloads"]
    assert len(lines) == len(expected)
    known = set()
    for line, stage in zip(lines, expected, strict=True):
        variable, words = line.partition("=")[0], shlex.split(line.partition("=$(")[2].removesuffix(")"))
        at = words.index(f"slurm/{Path(stage.command[0]).stem}.sbatch")
        assert words[at + 1 :] == stage.command[1:], "the flags of a job are those of its script"
        depends = [word for word in words if word.startswith("--dependency=afterok:")]
        ids = set(depends[0].removeprefix("--dependency=afterok:$").split(":$")) if depends else set()
        assert ids <= known and len(ids) == len(set(stage.after) - {"downloads"}), stage.name
        assert ("--kill-on-invalid-dep=yes" in words) == bool(ids)
        known.add(variable)
    assert not (cluster / "calls.txt").exists()


def test_stages_with_a_language_model_get_the_gpu_options(cluster, monkeypatch, capsys):
    monkeypatch.setenv("CEBS_SBATCH_GPU", "--gpus-per-node=a100:1 --mem=64G")
    monkeypatch.setenv("CEBS_SBATCH_CPU", "--partition=cpu")
    go("--dry_run", *ROW)
    lines = {line.partition("=")[0]: line for line in capsys.readouterr().out.splitlines() if "sbatch" in line}
    assert " --gpus-per-node=a100:1 --mem=64G " in lines["job_sft"]
    assert " --gpus-per-node=0 --partition=cpu " in lines["job_sft_evaluate"]


def test_started_again_only_what_is_missing_is_submitted(cluster, capsys):
    go(*ROW)
    calls = (cluster / "calls.txt").read_text().splitlines()
    assert len(calls) == 3
    assert "--dependency=afterok:1 " in calls[1] and "--dependency=afterok:2 " in calls[2]
    assert "out/.stages/sft.predict.txt " in calls[1]
    sft, predict, _ = read_jobs(Path("out")).values()
    finish(sft)
    write_text("queue.txt", "2|RUNNING|0:05|None\n")
    go(*ROW)
    assert len(calls := (cluster / "calls.txt").read_text().splitlines()) == 4
    assert "--job-name=sft/evaluate" in calls[3] and "--dependency=afterok:2 " in calls[3]
    assert re.search(
        r"sft +done\nsft/predict +job 2, in the queue already\nsft/evaluate +job 4 after 2", capsys.readouterr().out
    )
    # a result that is gone is made anew, and what follows from it; what was to follow from the old one is cancelled
    Path(sft.result).unlink()
    finish(predict)
    go(*ROW)
    calls = (cluster / "calls.txt").read_text().splitlines()[4:]
    assert [re.search(r"--job-name=(\S+)|scancel 2", call)[0] for call in calls] == [
        "--job-name=sft",
        "scancel 2",
        "--job-name=sft/predict",
        "--job-name=sft/evaluate",
    ]
    assert not Path(predict.note).exists(), "the note of the old result"


def test_a_job_in_the_queue_with_other_flags_is_not_taken_for_this_one(cluster):
    go(*ROW)
    write_text("queue.txt", "1|PENDING|0:00|Priority\n")
    with pytest.raises(InputError, match="sft: job 1 is in the queue with other flags; scancel it first"):
        go(*ROW, "--seed", "7")


def test_what_was_submitted_before_a_refusal_is_known(cluster, monkeypatch):
    calls = []

    def at_most_two(*words, **environment):
        calls.append(words)
        if len([call for call in calls if call[0] == "sbatch"]) > 2:
            write_text("full", "sbatch: error: QOSMaxSubmitJobPerUserLimit\n")
        return original(*words, **environment)

    original = slurm.slurm
    monkeypatch.setattr(slurm, "slurm", at_most_two)
    with pytest.raises(InputError, match="QOSMaxSubmitJobPerUserLimit; the same command goes on from here"):
        go(*ROW)
    assert [job.job_id for job in read_jobs(Path("out")).values()] == ["1", "2", ""]


def test_seeds_make_their_common_data_one_after_the_other(cluster):
    go("--only", "Origin", "--output_dir", "out", "--seeds", "1", "2")
    calls = (cluster / "calls.txt").read_text().splitlines()
    (first, second) = (call for call in calls if "prepare_data.sbatch" in call)
    assert "out/seed_1/.stages/data.txt" in first and "--dependency" not in first
    assert "out/seed_2/.stages/data.txt" in second and "--dependency=afterok:1 " in second


def test_rows_submitted_one_after_the_other_stand_in_one_record_in_order(cluster):
    go("--only", "SFT", "--output_dir", "out", *DATA, "--seeds", "2", "3")
    go("--only", "Origin", "--output_dir", "out", *DATA, "--seeds", "1", "2", "3")
    jobs = read_jobs(Path("out"))
    assert {"seed_2/sft/evaluate", "seed_1/origin/evaluate", "seed_3/origin/evaluate"} <= jobs.keys()
    seen = set()
    for name, job in jobs.items():
        assert seen.issuperset(job.after), name
        seen.add(name)


def test_without_slurm_it_says_where_to_go(cluster, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="squeue: not found; run this where Slurm's commands are"):
        go(*ROW)


# -- Status -----------------------------------------------------------------------------------------------------------

LOG = """== job 3 on node1, 2026-01-01T10:00:00: srun python a.py
== interrupted after 60 s, back into the queue
slurmstepd: error: *** JOB 3 ON node1 CANCELLED AT 2026-01-01T10:01:00 DUE TO JOB REQUEUE ***
== job 3 on node2, 2026-01-01T10:05:00: srun python a.py
  0%|          | 0/9\r 50%|#####     | 4/9
"""
END = "a.py: error: data: no such folder\nsrun: error: node2: task 0: Exited with exit code 2\n"
END += "== failed with exit code 2 after 3725 s\n"


def test_a_log_is_read_from_the_last_start_of_its_job(tmp_path):
    write_text(tmp_path / "a.log", LOG)
    log = read_log(tmp_path / "a.log", "3")
    assert (log.started, log.elapsed, log.last_line) == (True, "", "50%|#####     | 4/9")
    write_text(tmp_path / "a.log", LOG + END)
    log = read_log(tmp_path / "a.log", "3")
    assert (log.elapsed, log.last_line) == ("1:02:05", "a.py: error: data: no such folder")
    assert not read_log(tmp_path / "a.log", "4").started


@pytest.mark.parametrize(
    ("log", "queued", "expected"),
    [
        ("", {}, State("cancelled", "", "job 3: for want of b")),
        ("", {"3": Queued("PENDING", "0:00", "Resources")}, State("queued", "", "job 3: Resources")),
        (LOG, {"3": Queued("RUNNING", "0:09", "None")}, State("running", "0:09", "{log}: 50%|#####     | 4/9")),
        (LOG, {}, State("failed", "", "{log}: 50%|#####     | 4/9")),
        (LOG + END, {}, State("failed", "1:02:05", "{log}: a.py: error: data: no such folder")),
    ],
)
def test_the_state_of_a_job(tmp_path, log, queued, expected):
    job = Job("a", "python a.py", ["b"], str(tmp_path / "result"), str(tmp_path / "note"), str(tmp_path / "a.log"), "3")
    if log:
        write_text(job.log, log)
    state = state_of(job, {"b": State("failed")}, queued)
    assert state == State(expected.word, expected.elapsed, expected.text.format(log=job.log))


def test_times_are_written_as_squeue_writes_them():
    assert [clock(seconds) for seconds in (5, 65, 3600, 90061)] == ["0:05", "1:05", "1:00:00", "1-01:01:01"]


# -- A real Slurm -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_slurm():
    """A Slurm that takes jobs: this machine's own, or one on this node alone, which is stopped in the end."""
    if shutil.which("sinfo") and not subprocess.run(["sinfo"], capture_output=True).returncode:
        yield
        return
    if not LOCAL_SLURM.is_file() or os.geteuid():
        pytest.skip("no Slurm here, and none can be started")
    started = subprocess.run(["bash", str(LOCAL_SLURM), "start"], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no Slurm could be started: {started.stderr.strip().splitlines()[-1]}")
    yield
    subprocess.run(["bash", str(LOCAL_SLURM), "stop"], capture_output=True)


def wait_until(what, timeout=300):
    end = time.monotonic() + timeout
    while not (result := what()):
        assert time.monotonic() < end, "timeout"
        time.sleep(0.2)
    return result


def test_a_graph_on_slurm(real_slurm, tmp_path, tiny_model, data_dir, encoder, monkeypatch, one_thread):
    """A row whose training is interrupted and whose predictions fail at first."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("VENV", sys.prefix)
    for kind in ("CEBS_SBATCH_GPU", "CEBS_SBATCH_CPU"):
        monkeypatch.setenv(kind, "--gpus-per-node=0 --cpus-per-task=1 --mem=1G")
    description = yaml.safe_load((PROJECT / "configs/comparison.yaml").read_text(encoding="utf-8"))
    training = "--num_train_epochs 40 --learning_rate 0.01"
    description["flags"]["sft_smol.py"] = training
    write_text(tmp_path / "description.yaml", yaml.safe_dump(description))
    out = tmp_path / "out"
    words = ["--only", "SFT", "--data_dir", data_dir, "--model_name_or_path", tiny_model, "--encoder", encoder]
    words += ["--train", 12, "--valid", 2, "--test", 4, "--output_dir", out]
    words += ["--description", tmp_path / "description.yaml"]

    def cebs_slurm(command, *words):
        line = [sys.executable, "-m", "cebs.slurm", command, *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    def in_queue():
        return {job.job_id for job in read_jobs(out).values()} & slurm.read_queue().keys()

    # the predictions will find another's in their folder
    write_text(out / "sft/predictions/raw_results_4.json", "[]")
    submitted = cebs_slurm("submit", *words)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    sft, predict, evaluate = read_jobs(out).values()
    wait_until(lambda: list(out.glob("sft/checkpoint-3/trainer_state.json")))
    # what Slurm does before the time limit
    subprocess.run(["scancel", "--batch", "--signal=USR1", sft.job_id], check=True)
    wait_until(lambda: not in_queue())
    log = Path(sft.log).read_text()
    assert "back into the queue" in log and "going on from" in log and "== done after" in log, log
    told = cebs_slurm("status", out).stdout
    assert re.search(r"\nsft/predict +failed .*use --overwrite or another --output_dir", told), told
    assert re.search(rf"\nsft/evaluate +cancelled +job {evaluate.job_id}: for want of sft/predict", told), told
    assert "1 done, 1 failed, 1 cancelled" in told and "slurm/submit_comparison.sh --only SFT" in told, told

    # mended
    (out / "sft/predictions/raw_results_4.json").unlink()
    again = cebs_slurm("submit", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    jobs = read_jobs(out)
    assert jobs["sft"].job_id == sft.job_id and jobs["sft/predict"].job_id != predict.job_id
    wait_until(lambda: not in_queue())
    told = cebs_slurm("status", out).stdout
    assert "3 jobs, 3 done" in told and "./run_comparison.sh --only SFT" in told, told
    assert "SFT" in (out / "results.csv").read_text()
    assert read_json(out / "sft/run.json")["state"] == "done"

    # the training as if nothing had happened
    flags = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--seed", 42)
    flags += ("--max_train_samples", 12, "--max_eval_samples", 2, *training.split())
    run_main("sft_smol", *flags, "--output_dir", tmp_path / "whole")
    weights = "final_model/adapter_model.safetensors"
    assert (out / "sft" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
