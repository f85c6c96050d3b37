"""What every script shares: command lines and their errors, JSON in and out, seeds, run folders, models.

torch and transformers are imported where they are used, so that a script that only moves data starts at once.
"""

import argparse
import contextlib
import difflib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm
from trl import TrlParser

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cebs.prompts import Record

PROJECT = Path(__file__).resolve().parent
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPORTED_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "sentence-transformers")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MOST_DIGITS = 100  # of a whole number in a JSON file; one with more is nobody's count, id or seed
# arguments that do not change what a run computes; shards of one run have folders of their own
PLACES = ("output_dir", "overwrite", "logging_dir", "run_name", "cache_dir", "shard")
PROCESS_TIMEOUT = timedelta(hours=1)  # how long a process waits for the others
INTERRUPT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's: the job is cancelled; its time or its node runs out

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each training run
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# peft 0.21 and TRL 1.16 themselves ask transformers 5.23 for the old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Bad arguments or input. The message is one line that names file, record and remedy; the exit code is 2."""


class ScriptParser(TrlParser):
    """`TrlParser` with a stage's YAML file as its defaults, whose complaints are `InputError`s of one line.

    Args:
        dataclass_types: as for [`~trl.TrlParser`].
        description (`str`): the script's docstring, shown by `--help`.
        defaults (`str`): YAML file, relative to the project, that holds the stage's default settings. They are
            declared there and nowhere else.
        chain (`Iterable[str]`, *optional*): inputs whose defaults belong together with that of `--adapter`. Give one of
            them and leave `--adapter` out, and there is no adapter: the chain's own would belong to other data.
    """

    def __init__(self, dataclass_types: Iterable[type], description: str, defaults: str, chain: Iterable[str] = ()):
        class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
            """Keeps the line breaks of the docstring and shows each flag's default."""

        super().__init__(dataclass_types, description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.chain = frozenset(chain)
        self.defaults = PROJECT / defaults

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple:
        """Parses the command line; `--config FILE` replaces defaults, flags on the command line win."""
        self.set_defaults_with_config(**self._read_config(self.defaults))
        # --flag=value is --flag value
        args = [word for arg in (sys.argv[1:] if args is None else args) for word in _flag_and_value(arg)]
        for word in args:
            if _has_half_characters(word):  # what Python makes of bytes that are not UTF-8; no JSON file can hold it
                raise InputError(f"{word!a}: is not UTF-8; rename it, or set LC_ALL=C.UTF-8")
        if "--config" in args:
            at = args.index("--config")
            if at + 1 == len(args):
                raise InputError("--config: expected the path of a YAML file")
            config = self._read_config(Path(args[at + 1]))
            args = [*self._as_flags(config), *args[:at], *args[at + 2 :]]
            if "--config" in args:
                raise InputError("--config: give one YAML file")
        _, unknown = self.parse_known_args(args)
        if unknown:
            raise InputError(f"unknown flag {unknown[0]}{self._suggestion(unknown[0].lstrip('-'))}")
        given = {action.dest for action in self._actions for flag in action.option_strings if flag in args}
        if given & self.chain and "adapter" not in given:
            args += ["--adapter", ""]
        try:
            parsed = self.parse_args_into_dataclasses(args, look_for_args_file=False)
        except (ValueError, TypeError) as error:
            raise InputError(" ".join(str(error).split())) from error
        for name, value in ((name, value) for arguments in parsed for name, value in vars(arguments).items()):
            if isinstance(value, float) and math.isnan(value):  # no comparison with a bound would notice it
                raise InputError(f"--{name} nan: must be a number")
        return parsed

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")

    def _read_config(self, path: Path) -> dict[str, Any]:
        config = read_yaml(path)
        for key in config:
            if not self._knows(str(key)):
                raise InputError(f"{path}: unknown key {str(key)!r}{self._suggestion(str(key))}")
        return config

    def _knows(self, name: str) -> bool:
        return any(action.dest == name for action in self._actions)

    def _suggestion(self, name: str) -> str:
        near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
        return f"; did you mean {near[0]}?" if near else "; --help lists what exists"

    @staticmethod
    def _as_flags(config: dict[str, Any]) -> list[str]:
        """Turns a YAML mapping into command-line words, so that both pass the same checks of type and choice."""
        flags = []
        for name, value in config.items():
            if value is None:
                continue
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
        return flags


class _PlainLoader(yaml.SafeLoader):
    """YAML that says no more than JSON could: no aliases, which can grow without end, no key twice, dates as text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            self._refuse("an alias (*); write it out", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = Counter(key.value for key, _ in node.value)
            self._refuse(f"the key {names.most_common(1)[0][0]!r} twice; keep one", node)
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        if "\0" in text or _has_half_characters(text):
            self._refuse("a NUL or half a character", node)
        return text

    @staticmethod
    def _refuse(what: str, where: yaml.Node | yaml.Event) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=f"holds {what}", problem_mark=where.start_mark)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping of nothing but text, numbers, truth values, lists and mappings.

    Raises:
        `InputError`: if the file is missing, cannot be read, or is no such mapping; the message says where.
    """
    text = read_text(path, missing="give --config the path of a YAML file")
    try:
        mapping = yaml.load(text, _PlainLoader)
        json.dumps(mapping, allow_nan=False)
    except Exception as error:  # a value that does not fit its tag fails in whatever way its constructor does
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}; mend the file") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{path}: expected a YAML mapping of names to values")
    return mapping


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `InputError`s of one line, for the commands that are no stage."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def _flag_and_value(arg: str) -> list[str]:
    return arg.split("=", maxsplit=1) if arg.startswith("--") else [arg]


def run_script(main: Callable[..., None], parser: ScriptParser) -> None:
    """Runs a script: parses its command line, calls `main`, and turns bad input into one line and exit code 2."""
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    with errors_in_one_line(Path(sys.argv[0]).name):
        main(*parser.parse_args_and_config())


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Ends the process with one line on stderr: exit code 2 after bad input, 130 after an interruption, 1 after a write
    that failed. A traceback is left for what is a bug.
    """
    try:
        yield
    except InputError as error:
        line, code = f"error: {error}", 2
    except KeyboardInterrupt:
        line, code = "interrupted; the same command goes on from here", 130
    except Exception as error:
        fault = storage_fault(error)
        if not fault:
            raise
        line, code = f"error: {fault}, then the same command goes on from here", 1
    else:
        return
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)  # a path may hold any
    tqdm.write(f"{program}: {line}", file=sys.stderr)  # on a line of its own, also where a progress bar stands
    sys.exit(code)


# what keeps a file from being written, and what to do about it
STORAGE_FAULTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the folder writable"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "see where it has gone"),
    errno.EIO: "see to the disk",
}
RUST_FAULT = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers
TORCH_FAULT = re.compile(r"inline_container\.cc:\d+\] \. (unexpected pos|open file failed)|iostream error")


def storage_fault(error: Exception) -> str:
    """Returns what keeps a file from being written, and a remedy; an empty string where the error is another."""
    path = ""
    if isinstance(error, OSError):
        number, path = error.errno, error.filename
    elif found := RUST_FAULT.search(str(error)):
        number = int(found[1])
    elif TORCH_FAULT.search(str(error)):  # which keeps the reason to itself
        return "a checkpoint cannot be written; see whether the disk is full or read-only"
    else:
        return ""
    if number not in STORAGE_FAULTS:
        return ""
    return f"{f'{path}: ' if path else ''}{os.strerror(number)}; {STORAGE_FAULTS[number]}"


@dataclass(kw_only=True)
class RunArguments:
    """Arguments of every script that makes a run folder and does not train.

    Args:
        output_dir (`str`): folder of the run.
        overwrite (`bool`, *optional*, defaults to `False`): replace what an earlier run of the script left there.
        seed (`int`): seed of all random choices; the same seed gives the same bytes.
    """

    output_dir: str = field(metadata={"help": "Folder of the run."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace what an earlier run of this script left in the folder."}
    )
    seed: int = field(metadata={"help": "Seed of all random choices; the same seed gives the same bytes."})

    def __post_init__(self):
        check_counts(self)


def check_counts(arguments: Any) -> None:
    """Checks that every whole number among the arguments, but for the seed, is 1 or more.

    Raises:
        `ValueError`: naming the flag; the parser makes an `InputError` of it.
    """
    for name, value in vars(arguments).items():
        if type(value) is int and value < 1 and name != "seed":
            raise ValueError(f"--{name} {value}: must be at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# JSON in and out
# ---------------------------------------------------------------------------------------------------------------------


def read_text(
    path: str | Path,
    missing: str = "the stage before writes it, or give another path",
    encoding: str = "utf-8-sig",
) -> str:
    """Reads a file of text, with its line ends as they are and, of UTF-8, without a byte order mark at its start.

    Args:
        path: the file.
        missing: the remedy where there is none.
        encoding: of the file.

    Raises:
        `InputError`: if it is missing, is no file, cannot be read or is in another encoding.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device might never end
            raise InputError(f"{path}: cannot be read: is a folder or a device; give the path of a file")
        return path.read_bytes().decode(encoding)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {missing}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give the path of a file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: cannot be read as UTF-8 text: byte {error.start}: {error.reason}; save it as UTF-8"
        ) from error


def read_json(path: str | Path, finite: bool = True) -> Any:
    """Reads a JSON file, strictly: no key twice in an object, no NaN or Infinity, no half characters.

    Args:
        path: the file.
        finite: whether NaN and Infinity are refused; transformers writes them into its logs.

    Raises:
        `InputError`: if the file is missing, is not UTF-8 or is not such JSON; the message says where.
    """
    text = read_text(path)
    try:
        return _strict_json(text, finite)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: {_first_bad_record(text)}{reason}; mend the file or make it again") from error


def _strict_json(text: str, finite: bool = True) -> Any:
    value = json.loads(
        text,
        object_pairs_hook=_without_repeats,
        parse_constant=_refuse_constant if finite else float,
        parse_float=_finite_number if finite else float,
        parse_int=_whole_number,
    )
    if _has_half_characters(json.dumps(value, ensure_ascii=False) if r"\u" in text else ""):
        raise ValueError("holds half a character (a lone surrogate)")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice")
    return mapping


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large a number")
    return number


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"{digits[:9]}... is too large a number ({len(digits)} digits)")
    return int(digits)


def _has_half_characters(text: str) -> bool:
    """Says whether the text cannot be written in UTF-8: escapes can smuggle in one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _first_bad_record(text: str) -> str:
    """Returns `record 3: ` for the first element of a JSON list that is refused; empty for anything but a list."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    start = re.match(r"\s*\[\s*", text)
    index, end = 0, start.end() if start else len(text)
    while end < len(text):
        try:
            begin, (_, end) = end, decoder.raw_decode(text, end)
            _strict_json(text[begin:end])
        except (ValueError, RecursionError):
            return f"record {index}: "
        index, end = index + 1, blank.match(text, end).end()
    return ""


def read_list(path: str | Path, keys: Iterable[str]) -> list[dict[str, Any]]:
    """Reads a JSON list of objects that is not empty, and checks that each has the keys.

    Raises:
        `InputError`: naming the file and the first record (counted from 0) that is wrong.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a JSON list of records, found {type(records).__name__}")
    if not records:
        raise InputError(f"{path}: the list is empty; at least one record is needed")
    keys = list(keys)
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{path}: record {index}: expected an object with {', '.join(keys)}")
        for key in keys:
            if key not in record:
                raise InputError(f"{path}: record {index}: {key!r} is missing; each record needs {', '.join(keys)}")
    return records


def read_records(path: str | Path) -> list["Record"]:
    """Reads a `{train,valid,test}_sample.json` file.

    Raises:
        `InputError`: naming the file and the first record that has no quoted target or another type than text, whose
            input has a quote too many, or whose `user` (optional) is neither text nor a number.
    """
    from cebs.prompts import Record

    records = []
    for index, raw in enumerate(read_list(path, ("instruction", "input", "output"))):
        texts = [raw[key] for key in ("instruction", "input", "output")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: record {index}: instruction, input and output must be text")
        output = raw["output"].strip()
        if len(output) < 3 or not (output.startswith('"') and output.endswith('"')):
            raise InputError(
                f"{path}: record {index}: output must be the target title in double quotes, not {output!r}"
            )
        if raw["input"].count('"') % 2:
            raise InputError(
                f"{path}: record {index}: input has an odd number of double quotes, so that its titles cannot be told "
                "apart; write ' inside a title"
            )
        records.append(Record(*texts, user=read_user(raw, f"{path}: record {index}")))
    return records


def read_user(raw: dict[str, Any], place: str) -> str:
    """Returns whose record it is, as text; empty where it does not say.

    Raises:
        `InputError`: starting with `place`, if `user` is neither text nor a number.
    """
    user = raw.get("user", "")
    if isinstance(user, bool) or not isinstance(user, str | int | float):
        raise InputError(f"{place}: 'user' must be text or a number, not {type(user).__name__}")
    return str(user)


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file that is written there takes its place, whole or not at all.

    Its contents are on the disk before it gets its name, and the name is before this returns.

    Raises:
        `OSError`: naming `path`, if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the file is there; some file systems do not sync folders
            _sync(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all (see `written_whole`)."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON that people can read, whole or not at all (see `written_whole`).

    JSON has no NaN and no infinity: such a number becomes null.
    """
    write_text(path, json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Returns nested dictionaries and sequences with `None` for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 sum of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Run folders
# ---------------------------------------------------------------------------------------------------------------------


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
        with _terminate_as_interrupt():
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
            with _terminate_as_interrupt():
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


def require_done(path: str | Path, *scripts: str) -> None:
    """Checks that the run that wrote a file or folder was finished, where a `run.json` tells.

    Args:
        path: an input of this run.
        scripts: the scripts that write such inputs; other scripts may still be at work in the folder.

    Raises:
        `InputError`: if the run is still going on, was interrupted or failed.
    """
    for folder in Path(path).absolute().parents[:2]:
        runs = recorded_runs(folder)
        for script in scripts:
            if script in runs and runs[script]["state"] != "done":
                raise InputError(f"{path}: {script} is {runs[script]['state']} in {folder}; run it to its end first")


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
def _terminate_as_interrupt() -> Iterator[None]:
    """Makes a scheduler's signals end a run as Ctrl-C does, so that it is recorded as interrupted and goes on later."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, interrupt) for signum in INTERRUPT_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def git_commit() -> str | None:
    """Returns the commit of the project's checkout, with `-dirty` behind it where files were changed."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, devices and models
# ---------------------------------------------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Says whether this is the first process of a distributed run, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def connect_processes(device: str) -> "PartialState":
    """Connects the processes of a distributed run, on their GPUs or, on a CPU, by gloo; alone there is nothing to do.

    Args:
        device: `cpu` leaves GPUs aside.

    Returns:
        `PartialState`: accelerate's state of this process; its device is `cuda:LOCAL_RANK`, or the CPU.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PROCESS_TIMEOUT)


def wait_for_everyone() -> None:
    """Waits until all processes of a distributed run are here; one that is alone does not wait.

    Raises:
        `InputError`: if the processes are not connected.
        `KeyboardInterrupt`: if one of them has ended, or does not come.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return
    from accelerate import PartialState

    if PartialState().num_processes != processes:
        raise InputError(f"{processes} processes do not find each other; without GPUs training needs --use_cpu true")
    try:
        PartialState().wait_for_everyone()
    except RuntimeError as error:
        raise KeyboardInterrupt("another process has ended") from error


def record_seed(seed: int, split: str, index: int) -> int:
    """Returns the seed of one record's random choices; it does not depend on batches or on other records."""
    words = [seed, index, *split.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def device_name() -> str:
    """Returns the accelerator's name, or the processor's and the number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x{torch.cuda.device_count()}"
    return f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())} x{torch.get_num_threads()}"


def has_fast_bf16() -> bool:
    """Says whether the hardware computes in bfloat16; elsewhere it is emulated and slower than float32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(kw_only=True)
class ModelArguments:
    """Which model a script decodes with, and on what.

    Args:
        model_name_or_path (`str`): folder or hub name of the base model.
        adapter (`str`): folder of the adapter; an empty string is the base model alone.
        dtype (`str`): type of the weights; auto is bfloat16 where the hardware computes in it, else float32.
        device (`str`): auto is the GPU where there is one, else the CPU.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the base model."})
    adapter: str = field(
        metadata={"help": "Folder of the adapter. Left out where model or data are given: the base model alone."}
    )
    dtype: str = field(
        metadata={
            "help": "Type of the weights; auto is bfloat16 where the hardware computes in it, else float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    device: str = field(metadata={"help": "auto, cpu, cuda or cuda:N; auto is the GPU if any."})


def load_tokenizer(model_dir: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a base model; a model without a padding token pads with its end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)  # else it would ask
    except Exception as error:  # the tokenizers library raises nothing more exact for a damaged file
        raise InputError(f"{model_dir}: its tokenizer cannot be loaded: {_first_line(error)}; copy it again") from error
    if tokenizer.eos_token is None:
        raise InputError(f"{model_dir}: its tokenizer has no end-of-sequence token, which ends an answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_limit(model_dir: str | Path, max_length: int | None) -> int:
    """Returns how many tokens prompt and answer may have together: `max_length`, but no more than the model's context.

    Args:
        model_dir: folder of the base model.
        max_length: as `--max_length` has it; `None` is no other limit than the context.

    Raises:
        `InputError`: if the folder's settings are of no language model.
    """
    from transformers import AutoConfig

    try:
        context = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).max_position_embeddings
    except Exception as error:  # settings of another kind can fail at any of many places
        raise InputError(f"{model_dir}: cannot be loaded as a language model: {_first_line(error)}") from error
    return min(max_length or context, context)


def load_model(
    model_dir: str | Path, *, dtype: "torch.dtype | str" = "float32", adapter: str | None = None, **kwargs: Any
) -> "PreTrainedModel":
    """Loads a base model and, if given, an adapter on it whose weights can be trained on.

    Args:
        model_dir: folder of the base model (see `cebs.sources.find_model`).
        dtype: type of the base model's weights.
        adapter: folder of the adapter.
        kwargs: passed to `from_pretrained` (`quantization_config`, `attn_implementation` ...).

    Raises:
        `InputError`: if the folder holds no model or not all of its weights, or the adapter was made for another base
            model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if adapter:
        check_adapter(adapter, model_dir)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    except Exception as error:  # a folder of another kind can fail at any of many places
        raise InputError(f"{model_dir}: cannot be loaded as a language model: {_first_line(error)}") from error
    if found["missing_keys"]:  # they would be random numbers
        lacking = sorted(found["missing_keys"])
        raise InputError(f"{model_dir}: {len(lacking)} weights are missing, {lacking[0]} among them; copy it again")
    if adapter:
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True, use_safetensors=True)
        except Exception as error:  # the same
            raise InputError(
                f"{adapter}: does not fit the base model {model_dir}; was it made for another? {_first_line(error)}"
            ) from error
    return model


def load_for_inference(model_dir: str | Path, model_args: ModelArguments) -> "PreTrainedModel":
    """Loads a base model with its adapter merged into the weights, in eval mode, on the device asked for."""
    import torch

    dtype = model_args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16() else "float32"
    device = model_args.device
    if device == "auto":
        device = connect_processes(device).device
    # merged in float32, so that the adapter is rounded once and not at each layer
    model = load_model(model_dir, dtype="float32" if model_args.adapter else dtype, adapter=model_args.adapter)
    if model_args.adapter:
        model = model.merge_and_unload()
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


def base_fingerprint(model_dir: str | Path) -> str:
    """Returns a sum that tells base models apart: over each weight file's size and its first megabyte."""
    digest = hashlib.sha256()
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise InputError(f"{model_dir}: no *.safetensors file; give the folder of a model")
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()


def save_adapter(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    base_dir: Path,
    state_dict: dict[str, "torch.Tensor"] | None = None,
) -> None:
    """Writes `final_model/`: adapter, tokenizer, and the fingerprint of the base model that it belongs to.

    It is written beside its place and then moved, so that a folder that is there is whole.

    Args:
        model: the model with its adapter.
        tokenizer: the model's tokenizer.
        folder: `final_model/`.
        base_dir: folder of the base model.
        state_dict: the whole weights, where processes have split the model's among them; left out, the model's own.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # a reference copy of the adapter, kept by DPO, stays behind
    model.save_pretrained(temporary, selected_adapters=["default"], state_dict=state_dict)
    tokenizer.save_pretrained(temporary)
    write_json(temporary / "base_model.json", {"fingerprint": base_fingerprint(base_dir), "name": base_dir.name})
    for path in temporary.iterdir():
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def check_adapter(adapter: str | Path, model_dir: str | Path) -> None:
    """Checks that an adapter is there, is whole, and belongs to the base model, before anything is loaded.

    Raises:
        `InputError`: naming what is missing, or the base model that the adapter was made for.
    """
    folder = Path(adapter)
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; give the final_model folder of a finished training run")
    require_done(folder, "sft_smol.py", "DPO_from_dpoData.py")
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or type(config.get("r")) is not int:
        raise InputError(f"{folder / 'adapter_config.json'}: is not of a LoRA adapter; train one with sft_smol.py")
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS)
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")}
    if not shapes or ranks - {config["r"]} and not config.get("rank_pattern"):
        found = " and ".join(map(str, sorted(ranks))) or "none"
        raise InputError(
            f"{folder}: adapter_config.json says rank {config['r']}, the weights have {found}; copy both from one run"
        )
    if (folder / "base_model.json").is_file():
        base = read_json(folder / "base_model.json")
        if not isinstance(base, dict) or not {"fingerprint", "name"} <= base.keys():
            raise InputError(f"{folder / 'base_model.json'}: needs fingerprint and name; copy it from the training run")
        if base["fingerprint"] != base_fingerprint(model_dir):
            raise InputError(f"{folder}: was made for another base model ({base['name']}), not for {model_dir}")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Returns the shape of each tensor in a safetensors file; of the file only the header is read.

    Raises:
        `InputError`: if the file is damaged or shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is damaged or cut short ({error}); copy it again") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
