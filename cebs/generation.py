"""Decoding many prompts, batch by batch, so that an interrupted run goes on where it was."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cebs.branches import greedy
from cebs.prompts import encode_prompt, line_end_tokens
from utils import ModelArguments, check_counts, load_for_inference, load_tokenizer


@dataclass(kw_only=True)
class DecodingArguments(ModelArguments):
    """Which model a script decodes with, and how; beside those of `ModelArguments`:

    Args:
        max_new_tokens (`int`): most tokens of an answer.
        max_length (`int`): most tokens of prompt and answer; a longer prompt loses its oldest titles.
        batch_size (`int`): records between two saves.
        rows (`int`): records decoded side by side; memory grows with it.
    """

    max_new_tokens: int = field(metadata={"help": "Most tokens of an answer."})
    max_length: int = field(
        metadata={"help": "Most tokens of prompt and answer; a longer prompt loses its oldest titles."}
    )
    batch_size: int = field(metadata={"help": "Records between two saves."})
    rows: int = field(metadata={"help": "Records decoded side by side; memory grows with it."})

    def __post_init__(self):
        check_counts(self)


class Journal:
    """The finished batches of a run, one JSON line each.

    The batches of a run are fixed by its input, and one that was cut short is done again as a whole; so what comes out
    does not depend on where a run was interrupted.

    Args:
        path (`Path`): the journal's file; it goes when the run is complete.
        resumed (`bool`): keep the batches that an interrupted run left, else begin anew.
    """

    def __init__(self, path: Path, resumed: bool):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if resumed and path.is_file() else [b""]
        self.batches: list[list[Any]] = [json.loads(line) for line in lines[:-1]]  # the last line may be cut short
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))

    def append(self, batch: list[Any]) -> None:
        """Adds a finished batch; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.batches.append(batch)

    def remove(self) -> None:
        self.path.unlink()


def run_in_batches(
    items: Sequence[Any],
    batch_size: int,
    work: Callable[[Sequence[Any], int], list[Any]],
    journal: Journal,
    description: str,
) -> list[Any]:
    """Calls `work(batch, start)` for each batch that the journal does not hold; returns the results of all items."""
    if journal.batches:
        print(f"{description}: {len(journal.batches)} batches are done already")
    with tqdm(total=len(items), desc=description, unit="record", mininterval=1) as progress:
        progress.update(sum(map(len, journal.batches)))
        for start in range(len(journal.batches) * batch_size, len(items), batch_size):
            journal.append(work(items[start : start + batch_size], start))
            progress.update(len(journal.batches[-1]))
    return [result for batch in journal.batches for result in batch]


class Decoder:
    """A model and its tokenizer, from text to text; all decoding goes through `cebs.branches`.

    Args:
        model (`PreTrainedModel`): as `utils.load_for_inference` returns it.
        tokenizer (`PreTrainedTokenizerBase`): of the base model.
        max_length (`int`): most tokens of prompt and answer; a longer prompt loses its oldest titles.
        max_new_tokens (`int`): most tokens of an answer.
        rows (`int`): prompts decoded side by side.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_new_tokens: int,
        rows: int,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.max_new_tokens, self.rows = max_length, max_new_tokens, rows
        self.stop_token_ids = torch.tensor(line_end_tokens(tokenizer))
        self.shortened_prompts = 0

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenises prompts, and counts those that lost titles."""
        encoded = [encode_prompt(self.tokenizer, prompt, self.max_length - self.max_new_tokens) for prompt in prompts]
        self.shortened_prompts += sum(dropped > 0 for _, dropped in encoded)
        return [ids for ids, _ in encoded]

    def decode(self, ids: list[int]) -> str:
        """Returns an answer as text, without special tokens and surrounding whitespace."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def greedy(self, prompts: Sequence[list[int]]) -> list[str]:
        """Returns the greedy answer to each prompt, given as token ids."""
        answers = greedy(
            self.model,
            list(prompts),
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            rows=self.rows,
        )
        return [self.decode(ids) for ids in answers]


def load_decoder(model_dir: Path, args: DecodingArguments) -> Decoder:
    """Loads a base model with its adapter, and its tokenizer, for decoding."""
    return Decoder(
        load_for_inference(model_dir, args),
        load_tokenizer(model_dir),
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        rows=args.rows,
    )
