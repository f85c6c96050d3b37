"""What the catalogue costs: the trie's part of a beam search step beside the step without it, for growing catalogues.

    python benchmarks/bench_trie.py --data_dir ../shared/goodreads --json FILE

The baseline is a step of an unconstrained beam search: the forward pass over all beams, the log-softmax and the best
tokens of the vocabulary. "Ours" is that step with the trie's look-up on top of it (averaged over a whole descent, the
root's thousands of children included), although the look-up stands in for the choice among the vocabulary. Larger
catalogues than the data folder's are made of beginnings of its titles joined with ends of others.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import BenchmarkArguments, load, report, seconds, time_row
from cebs.beams import by_search, trie_ways
from cebs.branches import BranchCache, advance, branching, prefill
from cebs.catalogue import load_catalogue
from cebs.prompts import encode_titles
from cebs.trie import TokenTrie, best_rise, build_trie
from utils import run_script


@dataclass
class Arguments(BenchmarkArguments):
    num_records: int = field(default=8, metadata={"help": "Prompts side by side."})
    num_beams: int = field(default=20, metadata={"help": "Beams per prompt."})
    repetitions: int = field(default=7, metadata={"help": "Interleaved repetitions; the median counts."})
    num_titles: list[int] = field(
        default_factory=lambda: [100_000, 1_000_000], metadata={"help": "Sizes of the catalogues that are made up."}
    )


def joined_titles(completions: list[list[int]], count: int) -> list[list[int]]:
    """`count` different completions, each the beginning of one title and the end of another."""
    rng = random.Random(0)
    made: dict[tuple[int, ...], None] = {}
    while len(made) < count:
        a, b = rng.choice(completions), rng.choice(completions)
        made[tuple(a[: rng.randint(1, len(a) - 2)] + b[rng.randint(1, len(b) - 2) :])] = None
    return list(map(list, made))


def descent(trie: TokenTrie, logits: torch.Tensor, batch: int, num_beams: int) -> list[float]:
    """Seconds of each step's look-up on a way down the trie, with as many beams as there can be."""
    row = torch.arange(batch, device=logits.device)
    place = node = torch.zeros_like(row)
    scores, times = torch.zeros(batch, device=logits.device), []
    bias = torch.zeros(len(trie.tokens), device=logits.device)
    rise = best_rise(trie, bias)
    while len(row):

        def look_up(row=row, place=place, node=node, scores=scores):
            ways = trie_ways(trie, bias, rise, logits[: len(row)], node)
            at = by_search(row, place, batch, ways.choice)
            going = (scores[:, None] + ways.log_probs).masked_fill_(ways.rise == float("-inf"), float("-inf"))
            going = going.flatten()[at].masked_fill_(at < 0, float("-inf"))
            going, best = going.topk(min(num_beams, going.shape[1]))
            return going, ways.choice.flatten()[at.gather(1, best)]

        times.append(seconds(look_up, logits.device))
        going, child = look_up()
        row, place = (going > float("-inf")).nonzero().unbind(1)
        node, scores = child[row, place], going[row, place]
    return times


@torch.no_grad()
def main(args: Arguments) -> None:
    model, tokenizer, _, prompts = load(args)
    batch, beams = len(prompts), len(prompts) * args.num_beams
    completions = encode_titles(tokenizer, load_catalogue(args.data_dir).titles)

    catalogues = {len(completions): completions} | {n: joined_titles(completions, n) for n in args.num_titles}
    tries = {}
    for size, titles in catalogues.items():
        start = time.perf_counter()
        tries[size] = build_trie(titles).to(model.device)
        build_s, trie = time.perf_counter() - start, tries[size]
        num_bytes = sum(t.numel() * t.element_size() for t in (trie.offsets, trie.tokens, trie.titles))
        print(
            f"{size} titles: {len(trie.tokens)} nodes, {num_bytes / len(trie.tokens):.1f} bytes each, {build_s:.1f} s"
        )

    cache = BranchCache(batch, max(map(len, prompts)) + args.num_beams)
    row = torch.arange(batch, device=model.device).repeat_interleave(args.num_beams)
    positions = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[row]
    sees = torch.arange(cache.columns, device=model.device) < positions[:, None]
    ids = torch.full_like(row, completions[0][0])
    with branching(model):
        prefill(model, cache, prompts, list(range(batch)))

        def step() -> None:
            logits, _ = advance(model, cache, ids, positions, row, sees)
            logits.float().log_softmax(-1).view(batch, -1).topk(2 * args.num_beams)

        logits, _ = advance(model, cache, ids, positions, row, sees)
        step_s, look_up_s = [], {size: [] for size in tries}
        for _ in range(args.repetitions):
            step_s.append(seconds(step, model.device))
            for size, trie in tries.items():
                look_up_s[size].append(statistics.mean(descent(trie, logits[:beams], batch, args.num_beams)))

    baseline_s = statistics.median(step_s)
    rows = []
    for size, times in look_up_s.items():
        look_up = statistics.median(times)
        print(f"{size} titles: look-up {look_up * 1e3:.2f} ms, {look_up / baseline_s:.2%} of a step")
        rows.append(
            time_row(f"step of {batch} x {args.num_beams} beams, {size} titles", baseline_s, baseline_s + look_up, None)
        )
    report(rows, args.json)


if __name__ == "__main__":
    run_script(main, TrlParser((Arguments,), description=__doc__))
