"""Files in and out: strict readers of text, JSON and YAML; writers that leave a file whole or not at all."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cebs.errors import InputError, storage_fault

PROJECT = Path(__file__).resolve().parent.parent
MOST_DIGITS = 100  # of a whole number in a JSON file; one with more is nobody's count, id or seed


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
    if has_half_characters(json.dumps(value, ensure_ascii=False) if r"\u" in text else ""):
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


def has_half_characters(text: str) -> bool:
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
        if "\0" in text or has_half_characters(text):
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
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the file is there; some file systems do not sync folders
            sync(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def named_by_the_user(path: str | Path, remedy: str) -> Iterator[None]:
    """Makes bad input of a path that cannot be written to; a fault of the disk (`storage_fault`) stays an `OSError`.

    Args:
        path: what the user named.
        remedy: what to give in its place.

    Raises:
        `InputError`: naming the path.
    """
    try:
        yield
    except OSError as error:
        if storage_fault(error):
            raise
        raise InputError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error


def sync(path: Path) -> None:
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
