"""
The comparison as Slurm jobs: submits what is missing of the graph, one job a stage, and tells how it stands.

# Every row at a small size; the five rows of the main job; three seeds
```bash
slurm/submit_comparison.sh --quick
slurm/submit_pipeline.sh --full
slurm/submit_comparison.sh --full --seeds 0 1 2
```

# The sbatch lines alone
```bash
slurm/submit_comparison.sh --full --dry_run
```

# How it stands, and what to do next
```bash
slurm/status.sh
```

A job starts when the jobs whose results it reads have succeeded; when one fails, those that need it are cancelled and
the others go on. A finished job leaves the note that run_comparison.sh leaves, so both may take turns in one folder.
Started again, this submits the stages that are neither done nor in the queue. What needs the network (prepare_data.py
--download_only) runs here, before the first job. Settings of the cluster: slurm/site.env.example.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from cebs.commands import OneLineParser
from cebs.comparison import (
    command_line,
    file_stem,
    is_done,
    make_plans,
    plan_parser,
    run_command,
    run_stages,
    the_only_one,
)
from cebs.errors import InputError
from cebs.files import read_json, write_json
from cebs.plan import Plan, Stage

RECORD = ".slurm/jobs.json"  # below the comparison's folder
DOWNLOADS = "downloads"  # the stage that needs the network, which compute nodes may not have


@dataclass(frozen=True)
class Job:
    """A stage as a job of Slurm, submitted or not.

    Args:
        name (`str`): the stage's name, with its seed's folder before it where there are several seeds.
        command (`str`): its command line.
        after (`list[str]`): names of the jobs whose results it reads.
        result, note, log (`str`): what it leaves when it is finished; the note that says so; where its output goes.
        job_id (`str`): Slurm's number; empty while it has not been submitted.
    """

    name: str
    command: str
    after: list[str]
    result: str
    note: str
    log: str
    job_id: str = ""

    @property
    def stage(self) -> Stage:
        return Stage(self.name, shlex.split(self.command)[1:], self.after, Path(self.result), 0)


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue: its state in Slurm's words, the time it has run, and why it waits."""

    state: str
    elapsed: str
    reason: str


# ---------------------------------------------------------------------------------------------------------------------
# Submitting
# ---------------------------------------------------------------------------------------------------------------------


def submit(args: argparse.Namespace, words: list[str]) -> int:
    """Submits the stages that are neither done nor in the queue, and prints the graph with its job ids.

    Args:
        args: as `make_plans` takes them.
        words: the command line that they come from, for the record.
    """
    output, _, plans = make_plans(args)
    if args.dry_run:
        jobs, actions = what_is_missing(output, plans, read_queue() if shutil.which("squeue") else {})
        print_sbatch_lines(jobs, actions)
        return 0
    with the_only_one(output):
        queued = read_queue()
        jobs, actions = what_is_missing(output, plans, queued)
        if "submit" in actions.values():
            fetch_downloads(plans, output)
        width = max(map(len, jobs))
        for name, action in actions.items():
            waits_for = before(jobs, name, actions)
            if action == "submit":
                if jobs[name].job_id in queued:  # with a result that is about to be made anew
                    slurm("scancel", jobs[name].job_id)
                jobs[name] = replace(jobs[name], job_id=start(jobs[name], waits_for))
                write_jobs(output, jobs, words)  # at once: whatever happens next, what is in the queue is known
            told = {"submit": f"job {jobs[name].job_id}", "queued": f"job {jobs[name].job_id}, in the queue already"}
            after = f" after {', '.join(waits_for)}" if waits_for else ""
            print(f"{name:<{width}}  {told.get(action, action)}{after}", flush=True)
        write_jobs(output, jobs, words)
    print("\nslurm/status.sh tells how it stands, and what to do next")
    return 0


def what_is_missing(
    output: Path, plans: list[Plan], queued: dict[str, Queued]
) -> tuple[dict[str, Job], dict[str, str]]:
    """Returns the jobs of the plans, with the ids they were submitted under before, and what becomes of each.

    Raises:
        `InputError`: if a job is in the queue with another command line.
    """
    earlier = read_jobs(output) if (output / RECORD).is_file() else {}
    jobs = {job.name: job for plan in plans for job in planned_jobs(plan, output)}
    for name in jobs.keys() & earlier.keys():
        jobs[name] = replace(jobs[name], job_id=earlier[name].job_id)
        if jobs[name].job_id in queued and jobs[name].command != earlier[name].command:
            raise InputError(
                f"{name}: job {jobs[name].job_id} is in the queue with other flags; scancel it first, or give another "
                "--output_dir"
            )
    wait_for_same_command(jobs)
    return jobs, decide(jobs, queued)


def print_sbatch_lines(jobs: dict[str, Job], actions: dict[str, str]) -> None:
    """Prints what would be submitted, as lines for the shell in which variables stand for the ids of jobs."""
    jobs = dict(jobs)
    for name, action in actions.items():
        if action == "submit":
            variable = re.sub(r"\W", "_", f"job_{name}")
            sbatch = sbatch_words(jobs[name], before(jobs, name, actions))
            print(f"{variable}=$(CEBS_NOTE={shlex.quote(jobs[name].note)} {line(sbatch)})")
            jobs[name] = replace(jobs[name], job_id=f"${variable}")
        else:
            print(f"# {name}: {action}")


def planned_jobs(plan: Plan, output: Path) -> list[Job]:
    """Returns the stages of a plan as jobs, but for those of the login node."""
    folder = plan.settings.output
    prefix = "" if folder == output else f"{folder.name}/"
    return [
        Job(
            name=prefix + stage.name,
            command=command_line(stage),
            after=[prefix + name for name in stage.after if name != DOWNLOADS],
            result=str(stage.result),
            note=str(folder / ".stages" / f"{file_stem(stage)}.txt"),
            log=str(folder / "logs" / f"{file_stem(stage)}.log"),
        )
        for stage in plan.stages.values()
        if stage.name != DOWNLOADS
    ]


def wait_for_same_command(jobs: dict[str, Job]) -> None:
    """Makes each job wait for those with the same command line: seeds share one data folder, and who comes second must
    find it finished."""
    latest: dict[str, str] = {}
    for name, job in jobs.items():
        if job.command in latest:
            jobs[name] = replace(job, after=[*job.after, latest[job.command]])
        latest[job.command] = name


def decide(jobs: dict[str, Job], queued: dict[str, Queued]) -> dict[str, str]:
    """Returns what becomes of each job: `done`, `queued` already, or `submit`, as all that follows a new result."""
    actions: dict[str, str] = {}
    for name, job in jobs.items():
        if any(actions[other] == "submit" for other in job.after):
            actions[name] = "submit"
        elif is_done(job.stage, Path(job.note)):
            actions[name] = "done"
        else:
            actions[name] = "queued" if job.job_id in queued else "submit"
    return actions


def before(jobs: dict[str, Job], name: str, actions: dict[str, str]) -> list[str]:
    """Returns the ids of the jobs that must succeed first."""
    return [jobs[other].job_id for other in jobs[name].after if actions[other] != "done"]


def sbatch_words(job: Job, waits_for: list[str]) -> list[str]:
    """Returns the sbatch line of a job; the script's own flags are the end of it."""
    script, *flags = job.stage.command
    words = ["sbatch", "--parsable", f"--job-name={job.name}", f"--output={job.log}"]
    if "--model_name_or_path" in flags:
        words += shlex.split(os.environ.get("CEBS_SBATCH_GPU", ""))
    else:
        words += ["--gpus-per-node=0", *shlex.split(os.environ.get("CEBS_SBATCH_CPU", ""))]
    if waits_for:
        words += [f"--dependency=afterok:{':'.join(waits_for)}", "--kill-on-invalid-dep=yes"]
    return [*words, f"slurm/{Path(script).stem}.sbatch", *flags]


def line(words: list[str]) -> str:
    """Returns words as a line for the shell, in which the ids of jobs may be variables."""
    return " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in words)


def start(job: Job, waits_for: list[str]) -> str:
    """Submits a job and returns its id."""
    for path in (job.note, job.log):  # Slurm makes no folder for a log: the job would fail without a word
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(job.note).unlink(missing_ok=True)  # an earlier result is not this one's
    return slurm(*sbatch_words(job, waits_for), CEBS_NOTE=job.note).strip().split(";")[0]


def fetch_downloads(plans: list[Plan], output: Path) -> None:
    """Fetches what comes from the network, on this machine.

    Raises:
        `InputError`: if something is missing; the script has said what.
    """
    stage = plans[0].stages[DOWNLOADS]
    note = output / ".stages" / f"{file_stem(stage)}.txt"
    note.unlink(missing_ok=True)  # what was there once may have been cleaned away
    if missing := run_stages({output: [stage]}, jobs=1):
        raise InputError(f"{command_line(stage)}: {missing[DOWNLOADS]}; no job was submitted")


# ---------------------------------------------------------------------------------------------------------------------
# How it stands
# ---------------------------------------------------------------------------------------------------------------------


def status(args: argparse.Namespace) -> int:
    """Prints state, elapsed time, log and last line of each job, and which command comes next."""
    output = Path(args.output_dir) if args.output_dir else last_submitted()
    jobs, queued = read_jobs(output), read_queue()
    states: dict[str, State] = {}
    for name, job in jobs.items():
        states[name] = state_of(job, states, queued)

    names, words = max(map(len, states)), max(len(state.word) for state in states.values())
    for name, state in states.items():
        print(f"{name:<{names}}  {state.word:<{words}}  {state.elapsed:>11}  {state.text}".rstrip())
    counts = Counter(state.word for state in states.values())
    print(f"\n{output}: {len(jobs)} jobs, {', '.join(f'{number} {word}' for word, number in counts.items())}")

    again = read_json(output / RECORD)["command"]
    stopped = [name for name, state in states.items() if state.word in ("failed", "interrupted")]
    for name in stopped:
        print(f"{name} {states[name].word}: see {jobs[name].log}; its command: {jobs[name].command}")
    if counts["done"] == len(jobs):
        print(f"next: ./run_comparison.sh {again}   prints the table")
    elif stopped or counts["cancelled"] or counts["not submitted"]:
        mended = "when the cause is mended: " if counts["failed"] else ""
        print(f"next: {mended}slurm/submit_comparison.sh {again}   submits what is missing, and only that")
    else:
        print("next: nothing; the jobs in the queue will do the rest")
    return 0


@dataclass(frozen=True)
class State:
    """How a job stands: in a word, the time it has run or ran, and its log with the last line, or what it waits for."""

    word: str
    elapsed: str = ""
    text: str = ""


def state_of(job: Job, states: dict[str, State], queued: dict[str, Queued]) -> State:
    """Tells how a job stands, by its note, the queue and its log; `states` has those of the jobs before it."""
    log = read_log(Path(job.log), job.job_id)
    text = f"{job.log}: {log.last_line}"
    if is_done(job.stage, Path(job.note)):
        return State("done", log.elapsed, text if log.started else "")
    if job.job_id in queued:
        entry = queued[job.job_id]
        if entry.state == "PENDING":
            return State("queued", "", f"job {job.job_id}: {entry.reason}")
        return State("running", entry.elapsed, text)
    if log.started:
        return State("interrupted" if log.interrupted else "failed", log.elapsed, text)
    if not job.job_id:
        return State("not submitted")
    lost = [name for name in job.after if states[name].word not in ("done", "queued", "running")]
    return State("cancelled", "", f"job {job.job_id}: " + (f"for want of {lost[0]}" if lost else "before it started"))


@dataclass(frozen=True)
class Log:
    """What the log of a job tells; slurm/job.sh writes the lines that begin with ==.

    Args:
        started (`bool`): whether the job wrote to it.
        elapsed (`str`): how long the script ran; empty where it did not come to its end.
        interrupted (`bool`): whether it ended because the time was up.
        last_line (`str`): of what the script wrote, or Slurm about it.
    """

    started: bool = False
    elapsed: str = ""
    interrupted: bool = False
    last_line: str = ""


def read_log(path: Path, job_id: str) -> Log:
    """Reads the part of a log that a job wrote the last time it was started."""
    if not path.is_file():
        return Log()
    lines = re.split(r"[\r\n]+", path.read_text(encoding="utf-8", errors="replace"))
    starts = [number for number, text in enumerate(lines) if text.startswith(f"== job {job_id} ")]
    if not starts:
        return Log()
    lines = [text.strip() for text in lines[starts[-1] + 1 :] if text.strip()]
    ends = [end for text in lines if (end := re.match(r"== (done|interrupted|failed)\b.* after (\d+) s", text))]
    spoken = [text for text in lines if not text.startswith(("== ", "srun: "))]
    return Log(
        started=True,
        elapsed=clock(int(ends[-1][2])) if ends else "",
        interrupted=bool(ends) and ends[-1][1] == "interrupted",
        last_line=spoken[-1] if spoken else "",
    )


def clock(seconds: int) -> str:
    """Returns a time as squeue writes it.

    ```python
    >>> clock(65), clock(90061)
    ('1:05', '1-01:01:01')
    ```
    """
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ---------------------------------------------------------------------------------------------------------------------
# The record, and Slurm's commands
# ---------------------------------------------------------------------------------------------------------------------


def read_jobs(output: Path) -> dict[str, Job]:
    """Returns the jobs that were submitted in a folder, by name.

    Raises:
        `InputError`: if there are none.
    """
    if not (output / RECORD).is_file():
        raise InputError(f"{output}: no jobs were submitted there; slurm/submit_comparison.sh --output_dir DIR does")
    return {entry["name"]: Job(**entry) for entry in read_json(output / RECORD)["jobs"]}


def write_jobs(output: Path, jobs: dict[str, Job], words: list[str]) -> None:
    """Records jobs and the words that they were submitted with; jobs of other rows in the same folder stay."""
    earlier = read_jobs(output) if (output / RECORD).is_file() else {}
    jobs = jobs | {name: job for name, job in earlier.items() if name not in jobs}  # each after those it waits for
    write_json(output / RECORD, {"command": shlex.join(words), "jobs": [asdict(job) for job in jobs.values()]})


def last_submitted() -> Path:
    """Returns the comparison's folder below `output/` in which jobs were submitted last."""
    records = sorted(Path("output").glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise InputError("output/: no jobs were submitted in a folder there; give the folder of --output_dir")
    return records[-1].parents[1]


def read_queue() -> dict[str, Queued]:
    """Returns the user's jobs in the queue, by id."""
    rows = [row.split("|") for row in slurm("squeue", "--me", "--noheader", "--format=%i|%T|%M|%r").splitlines()]
    return {job_id: Queued(state, elapsed, reason) for job_id, state, elapsed, reason in rows}


def slurm(*words: str, **environment: str) -> str:
    """Runs one of Slurm's commands and returns what it prints.

    Raises:
        `InputError`: if it is not there or complains.
    """
    try:
        result = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(f"{words[0]}: not found; run this where Slurm's commands are, on a login node") from error
    if result.returncode:
        raise InputError(f"{line(list(words))}: {' '.join(result.stderr.split())}; the same command goes on from here")
    return result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def main(command: str, words: list[str]) -> NoReturn:
    if command == "submit":
        parser = plan_parser("slurm/submit_comparison.sh", __doc__)
        run_command(parser, lambda args: submit(args, words), words)
    parser = OneLineParser(prog="slurm/status.sh", description=status.__doc__, allow_abbrev=False)
    parser.add_argument("output_dir", nargs="?", help="the comparison's folder; default: the last one submitted")
    run_command(parser, status, words)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
