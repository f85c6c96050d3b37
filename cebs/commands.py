"""Command lines: TRL's parser over dataclasses with a YAML file of defaults, and the start of every script."""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from cebs.errors import InputError, errors_in_one_line
from cebs.files import PROJECT, has_half_characters, read_yaml
from cebs.processes import is_main_process


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `InputError`s of one line; enough for the commands that are no stage."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


class ScriptParser(OneLineParser, TrlParser):
    """`TrlParser` with a stage's YAML file as its defaults, whose complaints are `OneLineParser`'s.

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
            if has_half_characters(word):  # what Python makes of bytes that are not UTF-8; no JSON file can hold it
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


def _flag_and_value(arg: str) -> list[str]:
    return arg.split("=", maxsplit=1) if arg.startswith("--") else [arg]


def run_script(main: Callable[..., None], parser: ScriptParser, distributed: bool = False) -> None:
    """Runs a script: parses its command line, calls `main`, and turns bad input into one line and exit code 2.

    Args:
        main: the script's work, called with what the parser returns.
        parser: of its command line.
        distributed: whether several processes can share the work; else each would do, and write, all of it.
    """
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    with errors_in_one_line(Path(sys.argv[0]).name):
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1" and not distributed:
            raise InputError(f"started as {processes} processes, and works as one; start it with python")
        main(*parser.parse_args_and_config())


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
