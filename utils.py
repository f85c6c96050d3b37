"""What every script shares: command lines and their errors, JSON in and out, seeds, run folders, models.

torch and transformers are imported where they are used, so that a script that only moves data starts at once.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from trl import TrlParser

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cebs.prompts import Record

PROJECT = Path(__file__).resolve().parent
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPORTED_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "sentence-transformers")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# arguments that do not change what a run computes
PLACES = ("output_dir", "overwrite", "logging_dir", "run_name", "cache_dir")
INTERRUPT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's: the job is cancelled; its time or its node runs out

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would report each training run
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
        import argparse

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
            return self.parse_args_into_dataclasses(args, look_for_args_file=False)
        except (ValueError, TypeError) as error:
            raise InputError(" ".join(str(error).split())) from error

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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        `InputError`: if the file is missing, cannot be read, or is no mapping.
    """
    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise InputError(f"{path}: expected a YAML mapping of names to values")
    return mapping


def _flag_and_value(arg: str) -> list[str]:
    return arg.split("=", maxsplit=1) if arg.startswith("--") else [arg]


def run_script(main: Callable[..., None], parser: ScriptParser) -> None:
    """Runs a script: parses its command line, calls `main`, and turns bad input into one line and exit code 2."""
    with errors_in_one_line(Path(sys.argv[0]).name):
        main(*parser.parse_args_and_config())


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Ends the process with one line on stderr: exit code 2 after bad input, 130 after an interruption."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


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


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        `InputError`: if the file is missing, is not UTF-8 or is not JSON; the message says where.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the stage before writes it, or give another path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error


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
        `InputError`: naming the file and the first record that has no quoted target or another type than text, or
            whose `user` (optional) is neither text nor a number.
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


def write_text(path: str | Path, text: str) -> None:
    """Writes a file as a whole or not at all: a temporary file beside it, fsync, then an atomic rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON that people can read, atomically (see `write_text`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
        counts (`dict`): what the script wants to remember in `run.json`.
    """

    path: Path
    done: bool = False
    resumed: bool = False
    counts: dict[str, Any] = field(default_factory=dict)


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
    overwrite: bool = False,
) -> Iterator[Run]:
    """Opens the run folder of a script and keeps its `run.json` true.

    The folder may serve several scripts (an adapter, then its predictions): `run.json` describes the last one and
    keeps the others under `earlier_runs`. A run is told from another by its arguments and the contents of its inputs.

    Args:
        output_dir: the run's folder, made if need be.
        script: the script's `__file__`.
        arguments: the arguments by name, recorded and (but for folders) compared.
        inputs: the files that the run reads; their SHA-256 sums are recorded and compared.
        base_model: fingerprint of the base model, recorded and compared.
        adapter: folder of the adapter that the run starts from, recorded and compared.
        outputs: glob patterns, relative to the folder, of what a finished run leaves there.
        scratch: the same for what it writes on the way and may lose: checkpoints, logs, journals.
        overwrite: remove an earlier run's outputs instead of refusing.

    Raises:
        `InputError`: if the folder holds results of another run, or another process is writing in it.
    """
    folder, script = Path(output_dir), Path(script).name
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
    if not is_main_process():  # the first process keeps the books for all
        folder.mkdir(parents=True, exist_ok=True)
        yield Run(folder, resumed=same and not overwrite)
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
        run = Run(folder, resumed=same and not overwrite)
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
                yield run
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = {"reason": f"{type(error).__name__}: {error}"}
            write_json(folder / "run.json", {**record, "state": state, **reason, **_end(started), "counts": run.counts})
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
    if not isinstance(last, dict) or not {"script", "state", "arguments", "inputs"} <= last.keys():
        raise InputError(f"{folder / 'run.json'}: was not written by these scripts; use another folder")
    return {**last.pop("earlier_runs", {}), last["script"]: last}


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _identity(run: dict) -> tuple[dict, list]:
    """Returns what tells a run from another: its arguments without folders, and the contents of its inputs."""
    return {name: run["arguments"][name] for name in run["arguments"] if name not in PLACES}, [*run["inputs"].values()]


def _json_ready(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _sums(inputs: Iterable[str | Path]) -> dict[str, str]:
    missing = [path for path in inputs if not Path(path).is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file; the stage before writes it, or give another path")
    return {str(path): sha256(path) for path in inputs}


def _difference(previous: dict, described: dict) -> str:
    (old, old_sums), (new, new_sums) = _identity(previous), _identity(described)
    for name in new:
        if old.get(name) != new[name]:
            return f"{name} was {old.get(name)!r}, is {new[name]!r}"
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
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{model_dir}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        `InputError`: if the folder holds no model, or the adapter was made for another base model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if adapter:
        check_adapter(adapter, model_dir)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{model_dir}: cannot be loaded as a language model: {_first_line(error)}") from error
    if adapter:
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
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
        device = "cuda" if torch.cuda.is_available() else "cpu"
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


def save_adapter(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, base_dir: Path) -> None:
    """Writes `final_model/`: adapter, tokenizer, and the fingerprint of the base model that it belongs to.

    It is written beside its place and then moved, so that a folder that is there is whole.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # a reference copy of the adapter, kept by DPO, stays behind
    model.save_pretrained(temporary, selected_adapters=["default"])
    tokenizer.save_pretrained(temporary)
    write_json(temporary / "base_model.json", {"fingerprint": base_fingerprint(base_dir), "name": base_dir.name})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def check_adapter(adapter: str | Path, model_dir: str | Path) -> None:
    """Checks that an adapter is there, is whole, and belongs to the base model, before anything is loaded.

    Raises:
        `InputError`: naming what is missing, or the base model that the adapter was made for.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(adapter)
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; give the final_model folder of a finished training run")
    require_done(folder, "sft_smol.py", "DPO_from_dpoData.py")
    read_json(folder / "adapter_config.json")
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "numpy"):  # reads the header, which knows the file's size
            pass
    except SafetensorError as error:
        raise InputError(f"{folder / ADAPTER_WEIGHTS}: is damaged or cut short ({error}); copy it again") from error
    if (folder / "base_model.json").is_file():
        base = read_json(folder / "base_model.json")
        if base["fingerprint"] != base_fingerprint(model_dir):
            raise InputError(f"{folder}: was made for another base model ({base['name']}), not for {model_dir}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
