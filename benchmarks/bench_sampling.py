"""Candidates by rules 2 and 3 of the method, and greedy answers: the engine against stock `generate`.

    python benchmarks/bench_sampling.py --adapter output/sft/final_model --data_dir ../shared/goodreads --json FILE

The baseline is `generate` with ten return sequences and up to 100 new tokens, in batches of eight; the whole batch is
sampled again until each of its records has a match or 40 candidates; for greedy answers it is `generate` in batches of
`--rows`. Both sides stop a branch at the same tokens, the engine also one whose title is closed. The limit is the time
that the tokens which must pass through the model (each prompt once, and each token of an answer but its last) would
take at the machine's own matrix speed.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    BenchmarkArguments,
    interleaved,
    limit_seconds,
    load,
    matrix_flops,
    memory_row,
    peak_mb,
    report,
    time_row,
)
from cebs.catalogue import interest_cluster, load_catalogue
from cebs.generation import CPU_ROWS
from cebs.prompts import line_end_tokens, predicted_title, tokens_with
from cebs.sampling import greedy, sample_until
from utils import run_script

TOP_K = 50
NUM_BRANCHES, MAX_BRANCHES = 10, 40


@dataclass
class Arguments(BenchmarkArguments):
    max_new_tokens: int = field(default=100, metadata={"help": "Longest branch."})
    rows: int = field(default=CPU_ROWS, metadata={"help": "Prompts that the engine decodes side by side."})
    baseline_batch_size: int = field(default=8, metadata={"help": "Prompts in one call of generate."})
    baseline: bool = field(
        default=True, metadata={"help": "Also the baseline; false is the engine and its limit only."}
    )
    scaling: bool = field(default=False, metadata={"help": "Also how cost grows with branches and prompt length."})


def stock_generate(model, prompts: list[list[int]], stop: torch.Tensor, **how) -> torch.Tensor:
    """New tokens of `generate` for one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends = dict(eos_token_id=stop.tolist(), pad_token_id=int(stop[0]))
    return model.generate(ids, attention_mask=mask, **ends, **how)[:, width:]


def resample_whole_batches(model, prompts, accept, stop, args: Arguments) -> list[list[list[int]]]:
    """The baseline: `generate` for a batch, again and again until each of its records has a match or 40 candidates."""
    how = dict(do_sample=True, top_k=TOP_K, num_return_sequences=NUM_BRANCHES, max_new_tokens=args.max_new_tokens)
    candidates = []
    for start in range(0, len(prompts), args.baseline_batch_size):
        batch = prompts[start : start + args.baseline_batch_size]
        found, done = [[] for _ in batch], [False] * len(batch)
        while not all(done):
            new = stock_generate(model, batch, stop, **how).unflatten(0, (len(batch), NUM_BRANCHES))
            for i, branches in enumerate(new.tolist()):
                if not done[i]:
                    found[i] += branches
                    done[i] = accept(start + i, branches) or len(found[i]) >= MAX_BRANCHES
        candidates += found
    return candidates


def greedy_in_batches(model, prompts, stop, args: Arguments) -> list[list[int]]:
    """The baseline of greedy answers."""
    batches = [prompts[start : start + args.rows] for start in range(0, len(prompts), args.rows)]
    how = dict(do_sample=False, max_new_tokens=args.max_new_tokens)
    return [answer for batch in batches for answer in stock_generate(model, batch, stop, **how).tolist()]


def main(args: Arguments) -> None:
    model, tokenizer, records, prompts = load(args)
    catalogue = load_catalogue(args.data_dir)
    clusters = [set(interest_cluster(record.history, catalogue)) for record in records]
    stop = torch.tensor(line_end_tokens(tokenizer))
    ends = dict(stop_token_ids=stop, quote_token_ids=torch.tensor(tokens_with('"', tokenizer)))

    def in_cluster(index: int, branches: list[list[int]]) -> bool:
        titles = (predicted_title(text) for text in tokenizer.batch_decode(branches, skip_special_tokens=True))
        known = {records[index].target, *records[index].history}
        return any(clusters[index].intersection(catalogue.genres_of(title)) for title in titles if title not in known)

    def engine(accept=in_cluster, prompts=prompts, num_branches=NUM_BRANCHES, **kwargs) -> list[list[list[int]]]:
        found = sample_until(
            model,
            prompts,
            accept=accept,
            seeds=list(range(len(prompts))),
            num_branches=num_branches,
            max_branches=max(MAX_BRANCHES, num_branches),
            top_k=TOP_K,
            rows=args.rows,
            **ends,
            **{"max_new_tokens": args.max_new_tokens} | kwargs,
        )
        return [branches for _, branches, _ in sorted(found)]

    print(f"{len(prompts)} records, {sum(map(len, prompts)) / len(prompts):.0f} tokens per prompt, {model.dtype}")
    speeds: list[float] = []

    def limit(prompts: list[list[int]], found: list[list[list[int]]]) -> float:
        fed = sum(len(branch) - 1 for branches in found for branch in branches)
        return limit_seconds(model, speeds, sum(map(len, prompts)) + fed, len(prompts) + fed)

    last: dict[str, list] = {}

    def baseline() -> None:
        last.update(baseline=resample_whole_batches(model, prompts, in_cluster, stop, args))

    baseline_s, ours_s, _ = interleaved(
        [
            baseline if args.baseline else None,
            lambda: last.update(ours=engine()),
            lambda: speeds.append(matrix_flops(model)),
        ],
        args.repetitions,
        model.device,
    )
    print(f"{statistics.median(speeds) / 1e9:.0f} GFLOP/s measured")
    for side, found in last.items():
        lengths = [len(branch) for branches in found for branch in branches]
        print(f"{side}: {len(lengths)} candidates, {sum(lengths) / len(lengths):.1f} tokens each (the last call)")
    rows = [time_row(f"candidates for {len(prompts)} records", baseline_s, ours_s, limit(prompts, last["ours"]))]

    def greedy_baseline() -> None:
        greedy_in_batches(model, prompts, stop, args)

    baseline_s, ours_s = interleaved(
        [
            greedy_baseline if args.baseline else None,
            lambda: last.update(
                greedy=greedy(model, prompts, max_new_tokens=args.max_new_tokens, rows=args.rows, **ends)
            ),
        ],
        args.repetitions,
        model.device,
    )
    answers = [[answer] for answer in last["greedy"]]
    rows.append(time_row(f"greedy answers for {len(prompts)} records", baseline_s, ours_s, limit(prompts, answers)))

    # One round for one batch of the baseline's; the engine may use all its rows.
    def once(index: int, branches: list[list[int]]) -> bool:
        return True

    if args.baseline:
        batch = prompts[: args.baseline_batch_size]
        baseline_mb = peak_mb(lambda: resample_whole_batches(model, batch, once, stop, args), model.device)
        ours_mb = peak_mb(lambda: engine(once), model.device)
        rows.append(memory_row("peak on top of the weights, 10 candidates per record", baseline_mb, ours_mb))

    if args.scaling:
        for num_branches in (1, 2, 5, 10, 20, 40):
            found = []
            (ours_s,) = interleaved(
                [lambda n=num_branches, f=found: f.append(engine(once, num_branches=n))], args.repetitions, model.device
            )
            rows.append(time_row(f"one round of {num_branches} branches", None, ours_s, limit(prompts, found[-1])))
        for length in (64, 128, 256, 512):
            stretched = [(prompt * 9)[-length:] for prompt in prompts]
            found = []
            (ours_s,) = interleaved(
                # All branches as long as titles are: what comes after a prompt cut from its beginning means nothing.
                [lambda p=stretched, f=found: f.append(engine(once, p, max_new_tokens=13))],
                args.repetitions,
                model.device,
            )
            rows.append(time_row(f"one round, prompts of {length} tokens", None, ours_s, limit(stretched, found[-1])))
    report(rows, args.json)


if __name__ == "__main__":
    run_script(main, TrlParser((Arguments,), description=__doc__))
