"""Out of memory: the same work once more with half as much side by side, to the same result.

What is halved is what memory grows with: in decoding the rows, on which results do not depend; in training the batch of
a device, while gradients are accumulated over twice as many, so that an optimiser step sees the same records.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import TrainingArguments

from cebs.errors import InputError
from cebs.runs import Run

Result = TypeVar("Result")
Size = TypeVar("Size")


def within_memory(
    work: Callable[[Size], Result], sizes: Sequence[Size], in_words: Callable[[Size], str], remedy: str
) -> tuple[Result, Size]:
    """Calls `work(size)` with one size after the other, until one does not run out of memory.

    accelerate's `find_executable_batch_size` does this too, but clears the device's cache while the error still holds
    the tensors, and ends in an error that gives no remedy.

    Args:
        work: what to do; called again, it begins anew.
        sizes: what to try, the largest first.
        in_words: a size as notes and complaints have it.
        remedy: what to do when the smallest is too large.

    Returns:
        `tuple[Result, Size]`: the result, and the size that it was made with.

    Raises:
        `InputError`: if the smallest size is still too large.
    """
    for place, size in enumerate(sizes):
        if place:
            clear_device_cache(garbage_collection=True)
            print(f"note: out of memory with {in_words(sizes[place - 1])}; going on with {in_words(size)}", flush=True)
        try:
            return work(size), size
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
    raise InputError(f"out of memory with {in_words(sizes[-1])}; {remedy}")


def decode_within_memory(decode: Callable[[int], Result], rows: int) -> tuple[Result, int]:
    """Decodes; out of memory, again with half the rows.

    Args:
        decode: called with how many prompts are to be decoded side by side.
        rows: how many to begin with.

    Returns:
        `tuple[Result, int]`: what was decoded, and the rows that memory had room for.

    Raises:
        `InputError`: if a single row is too much.
    """
    return within_memory(
        decode,
        [rows >> times for times in range(rows.bit_length())],
        "--rows {}".format,
        "use a smaller --max_length or another model; --dtype bfloat16 takes half the memory of float32",
    )


def train_within_memory(train: Callable[[TrainingArguments], None], args: TrainingArguments, run: Run) -> None:
    """Trains; out of memory, again from the last checkpoint with half the batch and twice the accumulation.

    The records of an optimiser step, and so the number of steps, stay what they were. transformers'
    `auto_find_batch_size` takes a tenth off the batch, does not accumulate more for it, and goes on with the weights
    that memory ran out on. What it came to stands in `run.json` under `batch_within_memory`.

    Of several processes one may run out while the others wait for it: they do not halve, and the run ends.

    Args:
        train: makes model and trainer with the arguments that it is given, and trains, from the last checkpoint if any.
        args: the arguments as the user gave them.
        run: the run that is trained in.

    Raises:
        `InputError`: if a batch of one record is too large.
    """
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    random_state = torch.get_rng_state()  # of a new adapter's first weights

    def attempt(sizes: tuple[int, int]) -> None:
        torch.set_rng_state(random_state)
        smaller = copy.copy(args)
        smaller.per_device_train_batch_size, smaller.per_device_eval_batch_size = sizes
        smaller.gradient_accumulation_steps = accumulation * batch // sizes[0]
        train(smaller)
        if sizes != (batch, args.per_device_eval_batch_size):
            names = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
            run.counts["batch_within_memory"] = {name: vars(smaller)[name] for name in names}

    sizes = batch_sizes(batch, args.per_device_eval_batch_size)
    within_memory(
        attempt,
        sizes if args.world_size == 1 else sizes[:1],
        lambda sizes: "--per_device_train_batch_size {} and --per_device_eval_batch_size {}".format(*sizes),
        "use smaller ones with more --gradient_accumulation_steps, a smaller --max_length, --activation_checkpointing, "
        "or a smaller model",
    )


def batch_sizes(train: int, evaluation: int) -> list[tuple[int, int]]:
    """Returns the batch sizes of training and evaluation halved step by step, down to 1.

    Those of training are divisors of the first, or the records of an optimiser step would change.

    ```python
    >>> batch_sizes(6, 8)
    [(6, 8), (3, 4), (1, 2), (1, 1)]
    ```
    """
    sizes = [(train, evaluation)]
    while sizes[-1] != (1, 1):
        most, most_evaluated = (max(size // 2, 1) for size in sizes[-1])
        sizes.append((max(size for size in range(1, most + 1) if train % size == 0), most_evaluated))
    return sizes
