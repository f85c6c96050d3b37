"""Decoding many prompts, batch by batch, over processes and shards, so that an interrupted run goes on where it was."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cebs.beams import beam_search
from cebs.branches import NotFiniteError
from cebs.commands import check_counts
from cebs.errors import InputError
from cebs.interrupts import deferred_interrupts
from cebs.memory import decode_within_memory
from cebs.models import ModelArguments, load_for_inference, load_tokenizer, token_limit
from cebs.processes import connect_processes
from cebs.prompts import (
    encode_prompt,
    encode_titles,
    line_end_tokens,
    predicted_title,
    say_shortened,
    tokens_with,
)
from cebs.runs import Run
from cebs.sampling import greedy, sample_until
from cebs.trie import TokenTrie, build_trie

CPU_ROWS = 32  # decoded side by side: more bring little on two cores, and take memory


@dataclass(kw_only=True)
class DecodingArguments(ModelArguments):
    """Which model a script decodes with, and how; beside those of `ModelArguments`:

    Args:
        max_new_tokens (`int`): most tokens of an answer.
        max_length (`int`): most tokens of prompt and answer; a longer prompt loses its oldest titles.
        batch_size (`int`): records between two saves.
        rows (`int`, *optional*): records decoded side by side; memory grows with it. Left out, 32 on a CPU and the
            whole batch on a GPU, which more of them keep busier.
        shard (`str`, *optional*): `i/n` decodes the i-th of n parts, counted from 1, into `shard_i_of_n` below the
            output folder. When all are done, the same command without it puts them together, and decodes nothing.
    """

    max_new_tokens: int = field(
        metadata={"help": "Most tokens of an answer. It ends with its line, or after the closing quote of its title."}
    )
    max_length: int = field(
        metadata={"help": "Most tokens of prompt and answer; a longer prompt loses its oldest titles."}
    )
    batch_size: int = field(metadata={"help": "Records between two saves."})
    rows: int | None = field(
        metadata={
            "help": "Records decoded side by side; memory grows with it. Left out, 32 on a CPU, the batch on a GPU."
        }
    )
    shard: str = field(
        default="",
        metadata={
            "help": "i/n: decode the i-th of n parts, from 1. When all are done, the same command without it puts them "
            "together."
        },
    )

    def __post_init__(self):
        check_counts(self)
        if self.shard:
            parts = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard)
            if not parts or int(parts[1]) > int(parts[2]):
                raise ValueError(f"--shard {self.shard}: must be i/n with i from 1 to n, as in 2/4")
        connect_processes(self.device)  # as transformers' TrainingArguments do for the training stages


@dataclass(kw_only=True)
class CandidateArguments:
    """How a model proposes titles that may become negatives.

    Args:
        candidate_source (`str`): `topk` samples them; `beam` and `diverse_beam` search for the likeliest.
        constrained (`bool`): only titles of the catalogue.
        num_candidates (`int`): titles of a record sampled at a time, or found by beam search.
        max_candidates (`int`): most titles sampled for a record.
        top_k (`int`): sample from the k likeliest tokens.
        temperature (`float`): of the sampling.
        num_beam_groups (`int`): groups of a diverse beam search; a divisor of `num_candidates`.
        diversity_penalty (`float`): taken off the log-probability of a token for each beam of an earlier group that
            has chosen it at the same step.
        calibration (`float`): of constrained beams: weight of a title's log-probability without a history, which is
            taken off its score (see `cebs.calibration`).
        renormalize (`bool`): of titles of the catalogue: score and keep their log-probabilities among these titles,
            instead of among all texts.
    """

    candidate_source: str = field(
        metadata={
            "help": "topk: sampled; beam: by beam search; diverse_beam: by beams in groups that avoid each other.",
            "choices": ["topk", "beam", "diverse_beam"],
        }
    )
    constrained: bool = field(metadata={"help": "Only titles of the catalogue."})
    num_candidates: int = field(metadata={"help": "Titles of a record sampled at a time, or found by beam search."})
    max_candidates: int = field(metadata={"help": "Most titles sampled for a record."})
    top_k: int = field(metadata={"help": "Sample from the k likeliest tokens."})
    temperature: float = field(metadata={"help": "Temperature of the sampling."})
    num_beam_groups: int = field(metadata={"help": "Groups of a diverse beam search; a divisor of num_candidates."})
    diversity_penalty: float = field(
        metadata={"help": "Taken off a token's log-probability for each beam of an earlier group that has chosen it."}
    )
    calibration: float = field(
        metadata={
            "help": "Of constrained beams: weight of a title's log-probability without a history, taken off its score."
        }
    )
    renormalize: bool = field(
        metadata={"help": "With --constrained: take log-probabilities among the catalogue's titles, not all texts."},
    )

    def __post_init__(self):
        check_counts(self)
        if self.temperature <= 0:
            raise ValueError(f"--temperature: {self.temperature} must be above 0")
        if self.diversity_penalty < 0:
            raise ValueError(f"--diversity_penalty: {self.diversity_penalty} must be 0 or more")
        if self.calibration < 0:
            raise ValueError(f"--calibration: {self.calibration} must be 0 or more")
        if self.calibration and not (self.constrained and self.candidate_source != "topk"):
            raise ValueError(
                "--calibration: is for beams over the catalogue; give --candidate_source beam --constrained"
            )
        if self.renormalize and not self.constrained:
            raise ValueError("--renormalize: is for titles of the catalogue; give --constrained with it")
        if self.candidate_source == "diverse_beam" and self.num_candidates % self.num_beam_groups:
            raise ValueError(
                f"--num_beam_groups {self.num_beam_groups}: does not divide --num_candidates {self.num_candidates}"
            )


class Journal:
    """The finished batches of a run, one JSON line each: the place of its first record, and its results.

    The batches of a run are fixed by its input, and one that was cut short is done again as a whole; so what comes out
    does not depend on where a run was interrupted, nor on how many processes or shards did it. Each process writes a
    file of its own and reads those of all, and of the finished shards.

    Args:
        run (`Run`): the run; one that is not resumed has no finished batches but those of shards.
        name (`str`): name of the journal in the run's folder, `data/candidates_train`.
    """

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name
        process = PartialState().process_index
        self.path = run.path / f"{name}{f'.{process}' if process else ''}.partial.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.batches: dict[int, list[Any]] = {}
        for folder in [*([run.path] if run.resumed else []), *run.shards]:
            for path in self._files(folder):
                whole, newline, _ = path.read_bytes().rpartition(b"\n")  # the last line may be cut short
                if path == self.path:
                    os.truncate(path, len(whole + newline))
                self.batches.update(json.loads(line) for line in whole.split(b"\n") if line)

    def append(self, start: int, results: list[Any]) -> None:
        """Adds a finished batch; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([start, results], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.batches[start] = results

    def remove(self) -> None:
        """Removes the files of all processes, when the run is complete; those of shards stay in their folders."""
        for path in self._files(self.run.path):
            path.unlink()

    def _files(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"{self.name}.*partial.jsonl"))


def run_in_batches(
    items: Sequence[Any],
    batch_size: int,
    work: Callable[[Sequence[Any], int], list[Any]],
    journal: Journal,
    description: str,
) -> list[Any]:
    """Calls `work(batch, start)` for each batch that the journal does not hold.

    Batches are dealt out in turn, first among the shards of a run, then among the processes.

    Returns:
        The results of all items, in their order, to every process; of a shard, those of its own batches.

    Raises:
        `InputError`: if a shard of the run lacks batches, or naming the record after which the model gives no numbers.
        `KeyboardInterrupt`: after a signal, when the batch is finished, or where another process has ended.
    """
    part, parts = map(int, (journal.run.shard or "1/1").split("/"))
    processes = PartialState()
    starts = range(0, len(items), batch_size)[part - 1 :: parts]
    own = starts[processes.process_index :: processes.num_processes]
    missing = [start for start in own if start not in journal.batches]

    def records(chosen: Sequence[int]) -> int:
        return sum(min(batch_size, len(items) - start) for start in chosen)

    if missing and journal.run.shards:
        number = missing[0] // batch_size % len(journal.run.shards)
        raise InputError(
            f"{journal.run.shards[number] / journal.name}: no answers for record {missing[0]}; run --shard "
            f"{number + 1}/{len(journal.run.shards)} with --overwrite"
        )
    if len(missing) < len(own):
        print(f"{description}: {len(own) - len(missing)} batches are done already")
    with (
        deferred_interrupts() as interrupts,
        tqdm(
            total=records(own),
            initial=records(own) - records(missing),
            desc=description,
            unit="record",
            mininterval=1,
            disable=not processes.is_main_process,
        ) as progress,
    ):
        for start in missing:
            try:
                results = work(items[start : start + batch_size], start)
            except NotFiniteError as error:
                raise InputError(
                    f"{description}: record {start + error.prompt}: the model's logits are not finite numbers; use "
                    "--dtype float32, or another --adapter"
                ) from error
            journal.append(start, results)
            progress.update(len(journal.batches[start]))
            if interrupts.received:
                break
        interrupts.leave_together()
    batches: dict[int, list[Any]] = {}
    for of_a_process in gather_object([journal.batches]):
        batches |= of_a_process
    return [result for start in starts for result in batches[start]]


class Decoder:
    """A model and its tokenizer, from text to text; all decoding goes through `cebs.branches`.

    Args:
        model (`PreTrainedModel`, *optional*): as `cebs.models.load_for_inference` returns it; without it, texts alone.
        tokenizer (`PreTrainedTokenizerBase`): of the base model.
        max_length (`int`): most tokens of prompt and answer; a longer prompt loses its oldest titles.
        max_new_tokens (`int`): most tokens of an answer.
        rows (`int`): prompts decoded side by side; half as many from when memory runs out.
        model_dir (`Path`, *optional*): where the base model comes from.
        adapter (`str`): folder of the adapter that is merged into `model`, or an empty string.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_new_tokens: int,
        rows: int,
        model_dir: Path | None = None,
        adapter: str = "",
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.max_new_tokens, self.rows = max_length, max_new_tokens, rows
        self.model_dir, self.adapter = model_dir, adapter
        self.stop_token_ids = torch.tensor(line_end_tokens(tokenizer))
        self.quote_token_ids = torch.tensor(tokens_with('"', tokenizer), dtype=torch.long)
        self.shortened_prompts = 0

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenises prompts, and counts those that lost titles."""
        encoded = [encode_prompt(self.tokenizer, prompt, self.max_length - self.max_new_tokens) for prompt in prompts]
        self.shortened_prompts += sum(dropped > 0 for _, dropped in encoded)
        return [ids for ids, _ in encoded]

    def report(self) -> dict[str, int]:
        """Says how many prompts lost titles, and returns what `run.json` keeps of the decoding."""
        say_shortened(self.shortened_prompts, self.max_length)
        return {"shortened_prompts": self.shortened_prompts, "rows": self.rows}

    def decode(self, ids: list[int]) -> str:
        """Returns an answer as text, without special tokens and surrounding whitespace."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def within_memory(self, decode: Callable[[int], Any]) -> Any:
        """Returns `decode(rows)`; out of memory, that of half the rows, with which later calls begin."""
        decoded, self.rows = decode_within_memory(decode, self.rows)
        return decoded

    def greedy(self, prompts: Sequence[list[int]], titles: Sequence[str] | None = None) -> list[str]:
        """Returns the greedy answer to each prompt, given as token ids; where `titles` are given, one of them."""
        trie, title_of = self.catalogue_trie(titles) if titles else (None, {})
        answers = self.within_memory(
            lambda rows: greedy(
                self.model,
                list(prompts),
                trie,
                max_new_tokens=max(map(len, title_of), default=self.max_new_tokens),
                stop_token_ids=self.stop_token_ids,
                quote_token_ids=self.quote_token_ids,
                rows=rows,
            )
        )
        return [self.decode(ids) for ids in answers]

    def catalogue_trie(self, titles: Sequence[str]) -> tuple[TokenTrie, dict[tuple[int, ...], str]]:
        """Returns the trie of a catalogue's completions, and the title of each completion."""
        return _catalogue_trie(self.tokenizer, tuple(titles))

    def propose(
        self,
        prompts: Sequence[list[int]],
        args: CandidateArguments,
        *,
        titles: Sequence[str] | None,
        seeds: Sequence[int],
        accept: Callable[[int, list[str]], bool],
        edge_bias: torch.Tensor | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Proposes titles after each prompt.

        Args:
            prompts: N prompts as token ids.
            args: how.
            titles: the catalogue, where `args.constrained`; else it is not used.
            seeds: one for each prompt, for sampling.
            accept: for sampling, called as `accept(index, newest titles)`; False asks for another round, as long as
                there are not `max_candidates`.
            edge_bias: for beams over the catalogue, added to the score with each edge of its trie.

        Returns:
            For each prompt titles and the log-probabilities of their whole completions under the model, in nats and
            without any penalty or bias; among the catalogue's titles, where `args.renormalize`. Sampled ones stand in
            the order sampled and may repeat; beams are distinct, best score first, and `num_candidates` or fewer:
            spellings of one title in other tokens count once.
        """
        trie, title_of = self.catalogue_trie(titles) if args.constrained else (None, {})

        def title(branch: list[int]) -> str:
            return title_of[tuple(branch)] if args.constrained else predicted_title(self.decode(branch))

        if args.candidate_source == "topk":
            found = self.within_memory(
                lambda rows: sorted(
                    sample_until(
                        self.model,
                        list(prompts),
                        trie,
                        accept=lambda index, branches: accept(index, [title(branch) for branch in branches]),
                        seeds=list(seeds),
                        num_branches=args.num_candidates,
                        max_branches=args.max_candidates,
                        top_k=args.top_k,
                        temperature=args.temperature,
                        renormalize=args.renormalize,
                        max_new_tokens=max(map(len, title_of)) if args.constrained else self.max_new_tokens,
                        stop_token_ids=self.stop_token_ids,
                        quote_token_ids=self.quote_token_ids,
                        rows=rows,
                    )
                )
            )
            return [
                [(title(branch), log_prob) for branch, log_prob in zip(branches, log_probs, strict=True)]
                for _, branches, log_probs in found
            ]

        found = self.within_memory(
            lambda rows: beam_search(
                self.model,
                list(prompts),
                trie,
                num_beams=args.num_candidates,
                num_beam_groups=args.num_beam_groups if args.candidate_source == "diverse_beam" else 1,
                diversity_penalty=args.diversity_penalty,
                edge_bias=edge_bias,
                renormalize=args.renormalize,
                max_new_tokens=self.max_new_tokens,
                stop_token_ids=self.stop_token_ids,
                rows=rows,
            )
        )
        proposed = []
        for branches, log_probs in found:
            first: dict[str, float] = {}
            for branch, log_prob in zip(branches, log_probs, strict=True):
                first.setdefault(title(branch), log_prob)
            proposed.append(list(first.items()))
        return proposed


@lru_cache(maxsize=1)  # one catalogue serves every batch of a run
def _catalogue_trie(
    tokenizer: PreTrainedTokenizerBase, titles: tuple[str, ...]
) -> tuple[TokenTrie, dict[tuple[int, ...], str]]:
    completions = encode_titles(tokenizer, titles)
    return build_trie(completions), dict(zip(map(tuple, completions), titles, strict=True))


def load_decoder(model_dir: Path, args: DecodingArguments, run: Run) -> Decoder:
    """Loads a base model with its adapter, and its tokenizer, for decoding.

    The model is left out of a run that puts shards together: it decodes nothing, and may do so where there is no GPU.
    """
    model = None if run.shards else load_for_inference(model_dir, args)
    on_gpu = model is not None and model.device.type != "cpu"
    return Decoder(
        model,
        load_tokenizer(model_dir),
        max_length=token_limit(model_dir, args.max_length),
        max_new_tokens=args.max_new_tokens,
        rows=args.rows or (args.batch_size if on_gpu else CPU_ROWS),
        model_dir=model_dir,
        adapter=args.adapter,
    )
