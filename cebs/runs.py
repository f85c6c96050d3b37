"""Run folders: what was run, on what, how far it came; and who may go on in them.

Every script opens its folder with `run_folder`, which keeps `run.json` there.
"""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cebs.errors import InputError
from cebs.files import PROJECT, read_json, sha256, write_json
from cebs.processes import device_name, is_main_process, wait_for_everyone

ADAPTER_WEIGHTS = "adapter_model.safetensors"
REPORTED_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "sentence-transformers")
# arguments that do not change what a run computes; shards of one run have folders of their own
PLACES = ("output_dir", "overwrite", "logging_dir", "run_name", "cache_dir", "shard")
INTERRUPT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's: the job is cancelled; its time or its node runs out


@dataclass
class Run:
    """A run in progress, handed to the script by `run_folder`.

    Args:
        path (`Path`): the run's folder.
        done (`bool`): the same run has been finished before; there is nothing to do.
        resumed (`bool`): the same run was begun before and not finished.
        shard (`str`): which part of a run this one is, `2/4`; empty for a whole run.
        shards (`list[Path]`): folders of the finished shards, all of them, that a whole run puts together.
        counts (`dict`): what the script wants to remember in `run.json`.
    """

    path: Path
    done: bool = False
    resumed: bool = False
    shard: str = ""
    shards: list[Path] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def writes_outputs(self) -> bool:
        """Whether this process has the outputs to write: the first one, and not of a shard."""
        return not self.shard and is_main_process()


@contextlib.contextmanager
def run_folder(
    output_dir: str | Path,
    *,
    script: str,
    arguments: dict[str, Any],
    inputs: Iterable[str | Path],
    outputs: Iterable[str],
    scratch: Iterable[str] = (),
    base_model: str | None = None,
    adapter: str | None = None,
    shard: str = "",
    overwrite: bool = False,
) -> Iterator[Run]:
    """Opens the run folder of a script and keeps its `run.json` true.

    The folder may serve several scripts (an adapter, then its predictions): `run.json` describes the last one and
    keeps the others under `earlier_runs`. A run is told from another by its arguments and the contents of its inputs.

    A shard has a folder of its own below it, `shard_2_of_4`, where its journals are its outputs. The run without a
    shard takes up those that it finds, if they are all there and shards of the same run.

    What came out is told behind it: a finished run must not fail because nobody reads stdout to its end (`| head`).

    Of several processes (torch.distributed) the first keeps the books for all; they come in together.

    Args:
        output_dir: the run's folder, made if need be.
        script: the script's `__file__`.
        arguments: the arguments by name, recorded and (but for folders) compared.
        inputs: the files that the run reads; their SHA-256 sums are recorded and compared.
        base_model: fingerprint of the base model, recorded and compared.
        adapter: folder of the adapter that the run starts from, recorded and compared.
        outputs: glob patterns, relative to the folder, of what a finished run leaves there.
        scratch: the same for what it writes on the way and may lose: checkpoints, logs, journals.
        shard: which part of the run this is, `2/4`; empty for the whole.
        overwrite: remove an earlier run's outputs instead of refusing.

    Raises:
        `InputError`: if the folder holds results of another run, or shards of another or not all of them, or another
            process is writing in it.
    """
    folder, script = Path(output_dir), Path(script).name
    if shard:
        folder, outputs, scratch = folder / shard_name(shard), scratch, ()
    if arguments["seed"] < 0:
        raise InputError(f"--seed: {arguments['seed']} is below 0; give 0 or more")
    described = {
        "script": script,
        "arguments": _json_ready(arguments),
        "inputs": _sums([*inputs, *([Path(adapter) / ADAPTER_WEIGHTS] if adapter else [])])
        | ({"base_model": base_model} if base_model else {}),
    }
    earlier = recorded_runs(folder)
    previous = earlier.get(script)
    old_outputs = _found(folder, [*outputs, *scratch])
    same = previous is not None and _identity(previous) == _identity(described)
    finished = previous is not None and previous["state"] == "done"
    if not overwrite and not same and (finished or old_outputs):  # one that ended with nothing is in nobody's way
        what = _difference(previous, described) if previous else f"{old_outputs[0].name} is there already"
        raise InputError(f"{folder}: holds another run of {script} ({what}); use --overwrite or another --output_dir")
    whole = same and finished and all((folder / name).exists() for name in previous.get("outputs", []))
    if whole and not overwrite:
        print(f"{script}: {folder} is done already, nothing to do (--overwrite does it again)")
        yield Run(folder, done=True, counts=previous["counts"])
        return
    run = Run(folder, resumed=same and not overwrite, shard=shard, shards=_finished_shards(folder, described))
    wait_for_everyone()  # all have seen what was there before the first process changes it
    if not is_main_process():
        wait_for_everyone()
        with on_interrupt(_as_keyboard_interrupt):
            yield run
        return

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}; give another --output_dir") from error
    try:
        lock = FileLock(folder / f".{script}.lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{folder}: another {script} is running there; wait for it or use another folder") from error
    try:
        if overwrite:
            for path in old_outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        started = time.time()
        record = {
            **described,
            "state": "running",
            "seed": described["arguments"]["seed"],
            "git_commit": git_commit(),
            "versions": {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
            "python": platform.python_version(),
            "device": device_name(),
            "start_time": _timestamp(started),
            "earlier_runs": {name: run for name, run in earlier.items() if name != script},
        }
        write_json(folder / "run.json", record)
        try:
            with on_interrupt(_as_keyboard_interrupt):
                wait_for_everyone()
                yield run
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = {"reason": f"{type(error).__name__}: {error}"}
            if isinstance(error, OSError) and not error.filename:  # a full disk, met in the middle of a file
                error.filename = str(folder)
            ended = {**record, "state": state, **reason, **_end(started), "counts": run.counts}
            # on a full disk it stays "running", from where a later start goes on too
            with contextlib.suppress(OSError):
                write_json(folder / "run.json", ended)
            raise
        record["outputs"] = [str(path.relative_to(folder)) for path in _found(folder, outputs)]
        write_json(folder / "run.json", {**record, "state": "done", **_end(started), "counts": run.counts})
    finally:
        lock.release()


def require_done(path: str | Path, script: str, *more: str) -> None:
    """Checks that the run that wrote a file or folder was finished, where a `run.json` tells.

    Args:
        path: an input of this run.
        script, more: the scripts that write such inputs; others may still be at work in the folder.

    Raises:
        `InputError`: if the run is still going on, was interrupted or failed.
    """
    for folder in Path(path).absolute().parents[:2]:
        runs = recorded_runs(folder)
        for name in (script, *more):
            if name in runs and runs[name]["state"] != "done":
                raise InputError(f"{path}: {name} is {runs[name]['state']} in {folder}; run it to its end first")


def recorded_runs(folder: Path) -> dict[str, dict]:
    if not (folder / "run.json").is_file():
        return {}
    last = read_json(folder / "run.json")
    earlier = last.pop("earlier_runs", {}) if isinstance(last, dict) else {}
    if not isinstance(earlier, dict) or not all(map(_is_run, [last, *earlier.values()])):
        raise InputError(f"{folder / 'run.json'}: was not written by these scripts; use another folder")
    return {**earlier, last["script"]: last}


def _is_run(value: Any) -> bool:
    kinds = {"script": str, "state": str, "arguments": dict, "inputs": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    return value["state"] != "done" or isinstance(value.get("counts"), dict)


def shard_name(shard: str) -> str:
    """Returns the name of a shard's folder, `shard_2_of_4` for `2/4`."""
    return f"shard_{shard.replace('/', '_of_')}"


def _finished_shards(folder: Path, described: dict) -> list[Path]:
    """Returns the folders of all shards of the run that is described; none where it was not done in shards.

    Raises:
        `InputError`: naming the shards that are missing, unfinished, doubled or of another run.
    """
    names = sorted(path.name for path in folder.glob("shard_*_of_*"))
    sizes = sorted({int(name.rpartition("_")[2]) for name in names})
    if not sizes:
        return []
    if len(sizes) > 1:
        parts = " and of ".join(map(str, sizes))
        raise InputError(f"{folder}: holds shards of {parts} parts ({', '.join(names)}); remove those of one division")
    expected = {f"{number}/{sizes[0]}": folder / f"shard_{number}_of_{sizes[0]}" for number in range(1, sizes[0] + 1)}
    runs = {shard: recorded_runs(path).get(described["script"]) for shard, path in expected.items()}
    unfinished = [
        f"{shard} is {run['state'] if run else 'missing'}"
        for shard, run in runs.items()
        if run is None or run["state"] != "done"
    ]
    if unfinished:
        raise InputError(f"{folder}: shard {', '.join(unfinished)}; run each with --shard first")
    for shard, run in runs.items():
        if run["arguments"]["shard"] != shard:
            raise InputError(f"{expected[shard]}: holds shard {run['arguments']['shard']}; run --shard {shard} anew")
        if _identity(run) != _identity(described):
            what = _difference(run, described)
            raise InputError(f"{expected[shard]}: is a shard of another run ({what}); use another --output_dir")
    return list(expected.values())


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _identity(run: dict) -> tuple[dict, list]:
    """Returns what tells a run from another: its arguments without folders, and the contents of its inputs.

    An argument that is not given counts as none at all, as in the runs of a version that did not know it.
    """
    given = {name: value for name, value in run["arguments"].items() if name not in PLACES and value is not None}
    return given, [*run["inputs"].values()]


def _json_ready(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _sums(inputs: Iterable[str | Path]) -> dict[str, str]:
    missing = [path for path in inputs if not Path(path).is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file; the stage before writes it, or give another path")
    return {str(path): sha256(path) for path in inputs}


def _difference(previous: dict, described: dict) -> str:
    (old, old_sums), (new, new_sums) = _identity(previous), _identity(described)
    for name in new | old:
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
    changed = [
        path
        for path, old_sum, new_sum in zip(described["inputs"], old_sums, new_sums, strict=False)
        if old_sum != new_sum
    ]
    return f"{changed[0]} has changed since" if changed else "its inputs differ"


def _end(started: float) -> dict[str, Any]:
    return {"end_time": _timestamp(time.time()), "wall_time_s": round(time.time() - started, 1)}


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def on_interrupt(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Calls `handler` at a scheduler's signals, and at the end puts back what was called before."""
    before = {signum: signal.signal(signum, handler) for signum in INTERRUPT_SIGNALS}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def _as_keyboard_interrupt(signum: int, frame: Any) -> None:
    """Ends a run as Ctrl-C does, so that it is recorded as interrupted and goes on later."""
    raise KeyboardInterrupt(signal.Signals(signum).name)


def git_commit() -> str | None:
    """Returns the commit of the project's checkout, with `-dirty` behind it where files were changed."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
