"""This process among others: ranks, seeds of records, and what the hardware can do."""

import os
import platform
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from cebs.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

PROCESS_TIMEOUT = timedelta(hours=1)  # how long a process waits for the others


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
        raise InputError(
            f"WORLD_SIZE is {processes}, but the processes do not find each other; start them with accelerate launch"
        )
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
