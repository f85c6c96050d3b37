"""Errors a user can act on: one line that names file, record and remedy, and an exit code."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator

from tqdm import tqdm


class InputError(ValueError):
    """Bad arguments or input. The message is one line that names file, record and remedy; the exit code is 2."""


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """Ends the process with one line on stderr: exit code 2 after bad input, 130 after an interruption, 1 after a write
    that failed. A traceback is left for what is a bug. Where nobody reads stdout any more, as after `| head`, it ends
    without a word, with exit code 141.
    """
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        line, code = f"error: {error}", 2
    except KeyboardInterrupt:
        line, code = "interrupted; the same command goes on from here", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
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


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
