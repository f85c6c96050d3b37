"""A script's command line as several processes of one torch.distributed run, on the CPU, without a launcher."""

import socket
from pathlib import Path
from typing import Any

from conftest import start_script
from fork_server import ForkedScript


def start_processes(number: int, script: str | Path, *args: Any, cwd: Path, **environment: str) -> list[ForkedScript]:
    """Starts what `torchrun --nproc_per_node number script args` starts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    run |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [start_script(script, *args, cwd=cwd, **environment, **run, **rank) for rank in ranks]


def finish(processes: list[ForkedScript]) -> tuple[list[int], list[list[str]]]:
    """Returns the exit codes of processes, and what each has written on stdout and stderr."""
    told = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], told
