"""Starts command lines from a process that has the libraries loaded: a fraction of a second in place of eight.

Only third-party libraries are loaded beforehand. The script and our own modules are read anew by each process, which
has its own arguments, environment, working directory and output, as if `python script.py ...` had been typed.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

LIBRARIES = [
    "torch",
    "datasets",
    "pandas",
    "peft",
    "scipy.stats",
    "sentence_transformers",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


class ForkedScript:
    """A script that runs in a process of its own; what of `subprocess.Popen` the tests need.

    Args:
        script (`Path`): the script.
        args (`list[str]`): its arguments.
        cwd (`Path`): working directory.
        env (`dict[str, str]`): the whole environment. What libraries read when they are imported was read before.
    """

    def __init__(self, script: Path, args: list[str], *, cwd: Path, env: dict[str, str]):
        self.args = [sys.executable, str(script), *args]
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._process = _context.Process(target=_run, args=(str(script), args, str(cwd), env, *map(str, self._files)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def output(self) -> list[str]:
        """Returns what has come on stdout and stderr so far."""
        return [file.read_text(encoding="utf-8") for file in self._files]

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> list[str]:
        self.wait(timeout)
        return self.output()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(script: str, args: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    os.chdir(cwd)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # as in pyproject.toml
        warnings.simplefilter("error", category)
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
