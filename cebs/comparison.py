"""
The comparison of methods: runs what is missing of the rows asked for, and prints their table.

# Every row at a small size, in under an hour on two CPU cores
```bash
./run_comparison.sh --quick
```

# The table of a paper: mean and spread over three seeds; a stage of a small model leaves a GPU idle, a dozen fill it
```bash
./run_comparison.sh --full --seeds 0 1 2
./run_comparison.sh --full --seeds 0 1 2 --jobs 12
```

# Some rows and what they need; another data set; the commands alone
```bash
./run_comparison.sh --only SFT ClusterIn "Two negatives"
./run_comparison.sh --data_dir sampled_data/goodreads --test 200
./run_comparison.sh --dry_run
```

Started again, it goes on after the last finished stage. When a stage fails, the rows that need it are left out, the
others go on, and the end says what is missing. The rows are described in configs/comparison.yaml.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from cebs.commands import OneLineParser
from cebs.errors import InputError, errors_in_one_line
from cebs.files import PROJECT, write_text
from cebs.models import DEFAULT_MODEL
from cebs.plan import SIZE_NAMES, Plan, Settings, Stage, read_description, slug
from cebs.results import aggregate_seeds, print_results, read_results


def main(args: argparse.Namespace) -> int:
    """Plans, runs and shows the comparison. Returns the exit code: 1 where a row is missing."""
    output, rows, plans = make_plans(args)
    stages = [stage for plan in plans for stage in plan.stages.values()]
    if args.dry_run:
        print(*map(command_line, stages), sep="\n")
        return 0

    # -- The runs -----------------------------------------------------------------------------------------------------
    with the_only_one(output):
        missing = run_stages({plan.settings.output: list(plan.stages.values()) for plan in plans}, args.jobs)
        for plan in plans:
            order_rows(plan.settings.results_csv, rows)
        write_text(output / "commands.sh", "\n".join(map(command_line, stages)) + "\n")

    # -- The table ----------------------------------------------------------------------------------------------------
    dataset, results_csv = Path(plans[0].settings.data).name, output / "results.csv"
    if len(plans) > 1:
        aggregate_seeds([plan.settings.results_csv for plan in plans], results_csv)
    if results_csv.is_file():
        print_results(results_csv, dataset)
        report = ["report.py", "--results_csv", str(results_csv), "--output_dir", str(output / "report")]
        subprocess.run([sys.executable, *report], check=False)  # its complaint stands; the table is there
        print(f"written to {results_csv}; the commands are in {output / 'commands.sh'}")
    if args.publish:
        publish(output, Path(args.publish))
    if missing:
        print(f"\n{len(missing)} stages are missing; the same command tries them again:", file=sys.stderr)
        print(*(f"  {name}: {reason}" for name, reason in missing.items()), sep="\n", file=sys.stderr)
    return 1 if missing else 0


def make_plans(args: argparse.Namespace) -> tuple[Path, list[str], list[Plan]]:
    """Returns the comparison's folder, its rows and, for each seed, its plan; and says how much work that is."""
    description = read_description(args.description)
    rows = chosen_rows(args.only, description["main_job"] if args.main_job else list(description["rows"]), description)
    sizes = description["sizes"][args.size] | {name: n for name in SIZE_NAMES if (n := getattr(args, name)) is not None}
    dataset = Path(args.data_dir or "ml-100k").name
    output = Path(args.output_dir or f"output/{dataset}_{args.size}")
    plans = []
    for seed in args.seeds:
        folder = output if len(args.seeds) == 1 else output / f"seed_{seed}"
        plan = Plan(
            description,
            Settings(
                data_dir=args.data_dir,
                model_name_or_path=args.model_name_or_path,
                encoder=args.encoder,
                output=folder,
                results_csv=folder / "results.csv",
                sizes=sizes,
                seed=seed,
                iterations=args.iterations,
            ),
        )
        for row in rows:
            plan.add_row(row)
        plans.append(plan)
    stages = [stage for plan in plans for stage in plan.stages.values()]
    minutes = sum(stage.seconds for stage in stages) / 60
    print(
        f"{dataset}: {', '.join(f'{sizes[name]} {name}' for name in SIZE_NAMES)} records, {len(rows)} rows -> {output}"
    )
    print(f"{len(stages)} stages, about {minutes:.0f} min on two CPU cores when none is done; a GPU takes a fraction")
    return output, rows, plans


@contextlib.contextmanager
def the_only_one(output: Path) -> Iterator[None]:
    """Keeps others from running or submitting the comparison in its folder, which is made if need be.

    Raises:
        `InputError`: if another one is at it.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".comparison.lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"{output}: another comparison is running there; wait for it or give --output_dir") from error


def chosen_rows(only: list[str] | None, table: list[str], description: dict[str, Any]) -> list[str]:
    """Returns the rows to be made, in the order of the description.

    Raises:
        `InputError`: if a row asked for does not exist.
    """
    rows = list(description["rows"])
    names = {slug(row): row for row in rows}
    for row in only or []:
        if slug(row) not in names:
            raise InputError(f"--only {row!r}: no such row; there are: {', '.join(rows)}")
    wanted = table if only is None else {names[slug(row)] for row in only}
    return [row for row in rows if row in wanted]


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """A command line to be run, for one seed or, where it does not depend on the seed, for several."""

    name: str
    stage: Stage
    after: set[str] = field(default_factory=set)  # command lines
    notes: list[Path] = field(default_factory=list)  # one in each seed's folder


def run_stages(plans: Mapping[Path, list[Stage]], jobs: int) -> dict[str, str]:
    """Runs the stages that are not done, each when what it reads is there; those of several seeds side by side.

    A finished stage leaves a note with its command line under `<output>/.stages`. It is done when the note tells the
    same command, its result is there, and nothing that it reads has been run since.

    Args:
        plans (`Mapping[Path, list[Stage]]`): by folder, which gets notes and logs, stages in an order in which they can
            be run. A command line that several folders have is run once.
        jobs (`int`): stages run at once; each gets its share of the processor's cores.

    Returns:
        `dict[str, str]`: the stages that failed or could not be run, and why.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    works = gather_work(plans)
    waiting, running = list(works), {}
    done, ran, missing = set(), set(), {}
    try:
        while waiting or running:
            for line in list(waiting):
                work = works[line]
                lost = [works[other].name for other in work.after if other in missing]
                if lost:
                    missing[line] = f"not run, for want of {lost[0]}"
                elif not done.issuperset(work.after) or len(running) == jobs:
                    continue
                elif ran.isdisjoint(work.after) and any(is_done(work.stage, note) for note in work.notes):
                    print(f"== {work.name}: done, skipped")
                    leave_notes(work)
                    done.add(line)
                else:
                    print(f"== {work.name} ({list(works).index(line) + 1} of {len(works)})\n+ {line}", flush=True)
                    for note in work.notes:
                        note.unlink(missing_ok=True)  # an earlier result is not this one's
                    log = log_file(work).open("w") if jobs > 1 else None
                    with interrupts_later():
                        running[line] = subprocess.Popen(
                            [sys.executable, *work.stage.command],
                            env=environment,
                            stdout=log,
                            stderr=log and subprocess.STDOUT,
                        )
                waiting.remove(line)
            for line, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[line]
                if process.returncode == 0:
                    leave_notes(works[line])
                    done.add(line)
                    ran.add(line)
                else:
                    where = f", see {log_file(works[line])}" if jobs > 1 else ""
                    missing[line] = f"exit code {process.returncode}{where}"
                    print(f"== {works[line].name}: failed ({missing[line]})", file=sys.stderr, flush=True)
            time.sleep(0.1 if running else 0)
    finally:  # interrupted: the scripts save what they have
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return {works[line].name: reason for line, reason in missing.items()}


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait for the end of a block: what is being started would otherwise run on, unknown to us.

    Raises:
        `KeyboardInterrupt`: at its end, if one of them came.
    """
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, lambda signum, frame: came.append(signum)) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if came:
        raise KeyboardInterrupt(signal.Signals(came[0]).name)


def gather_work(plans: Mapping[Path, list[Stage]]) -> dict[str, Work]:
    """Returns what is to be run by command line; the names of several seeds' stages begin with their folder."""
    works: dict[str, Work] = {}
    for output, stages in plans.items():
        (output / ".stages").mkdir(parents=True, exist_ok=True)
        lines = {stage.name: command_line(stage) for stage in stages}
        for stage in stages:
            name = stage.name if len(plans) == 1 else f"{output}: {stage.name}"
            work = works.setdefault(lines[stage.name], Work(name, stage))
            work.after.update(lines[name] for name in stage.after)
            work.notes.append(output / ".stages" / f"{file_stem(stage)}.txt")
    return works


def leave_notes(work: Work) -> None:
    """Notes in each folder that a stage is done."""
    for note in work.notes:
        write_text(note, command_line(work.stage))


def log_file(work: Work) -> Path:
    """Returns where a stage's output goes while others run beside it."""
    path = work.notes[0].parents[1] / "logs" / f"{work.notes[0].stem}.log"
    path.parent.mkdir(exist_ok=True)
    return path


def is_done(stage: Stage, note: Path) -> bool:
    """Says whether a stage has ended well, as it is typed now, and its result, a file or a folder, is still there."""
    is_there = stage.result.is_file() or any(stage.result.glob("*"))
    return is_there and note.is_file() and note.read_text(encoding="utf-8") == command_line(stage)


def file_stem(stage: Stage) -> str:
    """Returns a stage's name as the name of its note and its log."""
    return stage.name.replace("/", ".")


def command_line(stage: Stage) -> str:
    """Returns a stage as it is typed in the project's folder."""
    return shlex.join(["python", *stage.command])


def order_rows(results_csv: Path, rows: list[str]) -> None:
    """Puts the rows of the table into the order of the description, whichever finished first; others come after."""
    if not results_csv.is_file():
        return
    table = read_results(results_csv)
    place = {row: number for number, row in enumerate(rows)}
    table.rows.sort(key=lambda row: place.get(table.name(row, "Model"), len(place)))
    write_text(results_csv, table.to_text())


def publish(output: Path, folder: Path) -> None:
    """Copies what others need to check a table, and no data: CSV, report, commands, and each run's `run.json`."""
    for name in ("results.csv", "commands.sh", "report/report.md"):
        write_text(folder / Path(name).name, (output / name).read_text(encoding="utf-8"))
    shutil.copytree(
        output / "report/plots", folder / "plots", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pdf")
    )
    for path in sorted(output.rglob("run.json")):
        name = ".".join(path.parent.relative_to(output).parts)
        write_text(folder / "runs" / f"{name}.json", path.read_text(encoding="utf-8"))
    print(f"published in {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = plan_parser("run_comparison.sh", __doc__)
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="stages run at once; default: 1")
    return parser


def plan_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Returns the parser of what `make_plans` takes; the same for runs on this machine and on a cluster."""
    parser = OneLineParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a small size (the default)")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="1,024 / 256 / 1,000 records")
    for name, what in zip(SIZE_NAMES, ("training", "aligned", "validation", "test"), strict=True):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} records, in place of the size's")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows only, and what they need")
    parser.add_argument("--main_job", action="store_true", help="the five rows of run_pipeline.sh")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="a data folder; left out, MovieLens-100K is made")
    parser.add_argument("--model_name_or_path", default=DEFAULT_MODEL, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--output_dir", metavar="DIR", help="default: output/<data>_<size>")
    parser.add_argument("--seeds", "--seed", nargs="+", type=int, default=[42], metavar="N", help="default: 42")
    parser.add_argument(
        "--iterations", type=positive, default=2, metavar="T", help="rounds of SPRec iterated; default: 2"
    )
    parser.add_argument("--description", default="configs/comparison.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--publish", metavar="DIR", help="copy CSV, commands and run.json files there, for others")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and the commands, run nothing")
    parser.set_defaults(size="quick")
    return parser


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def relative(path: str) -> str:
    """A path as the stages see it, which run from the project's folder; a name that is no path stays."""
    return os.path.relpath(path, PROJECT) if os.path.exists(path) else path


def run_command(
    parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], int], words: list[str] | None = None
) -> NoReturn:
    """Parses the command line and calls `main` in the project's folder; errors end as in `cebs.commands.run_script`."""
    with errors_in_one_line(parser.prog):
        args = parser.parse_args(words)
        for name in ("data_dir", "model_name_or_path", "encoder", "description"):
            if name in args:
                setattr(args, name, relative(getattr(args, name)))
        args.output_dir = args.output_dir and os.path.relpath(args.output_dir, PROJECT)
        os.chdir(PROJECT)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(main(args))


if __name__ == "__main__":
    run_command(make_parser(), main)
