"""Candidates by rules 2 and 3 of the method: the engine against stock `generate`, in time and in memory.

    python benchmarks/bench_sampling.py --adapter output/sft/final_model --data_dir ../shared/goodreads --json FILE

The baseline is `generate` with ten return sequences and up to 100 new tokens, in batches of eight; the whole batch is
sampled again until each of its records has a match or 40 candidates. Both sides stop a branch at the same tokens. The
limit is the time that the tokens which must pass through the model (each prompt once, and each sampled token but a
branch's last) would take at the machine's own matrix speed.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cebs.branches import sample_until
from cebs.catalogue import interest_cluster, load_catalogue
from cebs.prompts import Record, encode_prompt, line_end_tokens, predicted_title
from cebs.sources import find_model
from utils import DEFAULT_MODEL, load_for_inference, load_tokenizer, read_records, run_script, write_json

TOP_K = 50
NUM_BRANCHES, MAX_BRANCHES = 10, 40

# ---------------------------------------------------------------------------------------------------------------------
# What the benchmarks share
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BenchmarkArguments:
    model_name_or_path: str = field(default=DEFAULT_MODEL, metadata={"help": "Folder or hub name of the base model."})
    adapter: str = field(default="", metadata={"help": "Folder of the adapter, merged into the base model."})
    dtype: str = field(
        default="auto", metadata={"help": "auto (bfloat16 where the hardware has it), or a torch dtype."}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N; auto is the GPU if any."})
    data_dir: str = field(default="../shared/goodreads", metadata={"help": "Data folder."})
    json: str | None = field(default=None, metadata={"help": "File for the rows."})
    num_records: int = field(default=16, metadata={"help": "Records, from the head of train_sample.json."})
    repetitions: int = field(default=3, metadata={"help": "Interleaved repetitions; the median counts."})


def load(args: BenchmarkArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Record], list[list[int]]]:
    model_dir = find_model(args.model_name_or_path)
    tokenizer = load_tokenizer(model_dir)
    records = read_records(Path(args.data_dir) / "train_sample.json")[: args.num_records]
    prompts = [encode_prompt(tokenizer, record.prompt, 1024)[0] for record in records]
    return load_for_inference(model_dir, args), tokenizer, records, prompts


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(sides: list[Callable[[], object]], repetitions: int, device: torch.device) -> list[float]:
    """The median seconds of each side over `repetitions` rounds in which the sides take turns."""
    rounds = [[seconds(side, device) for side in sides] for _ in range(repetitions)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def peak_mb(work: Callable[[], object], device: torch.device) -> float:
    """The most memory, in MB, that `work` holds on top of what is there before it (Linux, or a CUDA device)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work freed must not be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) * 1024 / 1e6


def matrix_flops(model: PreTrainedModel) -> float:
    """Measured FLOPs per second of the model's widest hidden matrix on 2,048 tokens, in the model's dtype."""
    weights = [m.weight for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    weight = max(weights, key=lambda w: w.shape[0])
    x = torch.randn(2048, weight.shape[1], device=weight.device).to(weight.dtype)
    times = [seconds(lambda: nn.functional.linear(x, weight), weight.device) for _ in range(20)]
    return 2 * x.shape[0] * weight.numel() / statistics.median(times)


def limit_seconds(model: PreTrainedModel, flops: float, tokens: int, logits: int) -> float:
    """Seconds for `tokens` through the layers and `logits` of them through the output matrix, attention left out."""
    layers = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
    return 2 * (tokens * layers + logits * model.get_output_embeddings().weight.numel()) / flops


def time_row(case: str, baseline_s: float | None, ours_s: float, limit_s: float | None) -> dict:
    ratio = None if baseline_s is None else baseline_s / ours_s
    return {"case": case, "baseline_s": baseline_s, "ours_s": ours_s, "ratio": ratio, "limit_s": limit_s}


def memory_row(case: str, baseline_mb: float, ours_mb: float) -> dict:
    return {"case": case, "baseline_mb": baseline_mb, "ours_mb": ours_mb, "ratio": baseline_mb / ours_mb}


def report(rows: list[dict], json_file: str | None) -> None:
    """Print the rows as a table, times in s and memory in MB, and write them."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    print(f"\n{'case':58}{'baseline':>11}{'ours':>11}{'ratio':>8}{'limit':>11}")
    for row in rows:
        unit = "mb" if "ours_mb" in row else "s"
        baseline, ours, ratio = cell(row[f"baseline_{unit}"]), cell(row[f"ours_{unit}"]), cell(row["ratio"])
        print(f"{row['case'] + ', ' + unit:58}{baseline:>11}{ours:>11}{ratio:>8}{cell(row.get('limit_s')):>11}")
    if json_file:
        write_json(json_file, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Arguments(BenchmarkArguments):
    max_new_tokens: int = field(default=100, metadata={"help": "Longest branch."})
    rows: int = field(default=16, metadata={"help": "Prompts that the engine decodes side by side."})
    baseline_batch_size: int = field(default=8, metadata={"help": "Prompts in one call of generate."})
    scaling: bool = field(default=False, metadata={"help": "Also how cost grows with branches and prompt length."})


def resample_whole_batches(model, prompts, accept, stop, args: Arguments) -> list[list[list[int]]]:
    """The baseline: `generate` for a batch, again and again until each of its records has a match or 40 candidates."""
    candidates = []
    for start in range(0, len(prompts), args.baseline_batch_size):
        batch = prompts[start : start + args.baseline_batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        found, done = [[] for _ in batch], [False] * len(batch)
        while not all(done):
            new = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=TOP_K,
                num_return_sequences=NUM_BRANCHES,
                max_new_tokens=args.max_new_tokens,
                eos_token_id=stop.tolist(),
                pad_token_id=int(stop[0]),
            )[:, width:].unflatten(0, (len(batch), NUM_BRANCHES))
            for i, branches in enumerate(new.tolist()):
                if not done[i]:
                    found[i] += branches
                    done[i] = accept(start + i, branches) or len(found[i]) >= MAX_BRANCHES
        candidates += found
    return candidates


def main(args: Arguments) -> None:
    model, tokenizer, records, prompts = load(args)
    catalogue = load_catalogue(args.data_dir)
    clusters = [set(interest_cluster(record.history, catalogue)) for record in records]
    stop = torch.tensor(line_end_tokens(tokenizer))

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
            stop_token_ids=stop,
            rows=args.rows,
            **{"max_new_tokens": args.max_new_tokens} | kwargs,
        )
        return [branches for _, branches in sorted(found)]

    flops = matrix_flops(model)
    print(f"{len(prompts)} records, {sum(map(len, prompts)) / len(prompts):.0f} tokens per prompt, ", end="")
    print(f"{next(model.parameters()).dtype}, {flops / 1e9:.0f} GFLOP/s measured")

    def limit(prompts: list[list[int]], found: list[list[list[int]]]) -> float:
        fed = sum(len(branch) - 1 for branches in found for branch in branches)
        return limit_seconds(model, flops, sum(map(len, prompts)) + fed, len(prompts) + fed)

    last: dict[str, list] = {}
    baseline_s, ours_s = interleaved(
        [
            lambda: last.update(baseline=resample_whole_batches(model, prompts, in_cluster, stop, args)),
            lambda: last.update(ours=engine()),
        ],
        args.repetitions,
        model.device,
    )
    for side, found in last.items():
        lengths = [len(branch) for branches in found for branch in branches]
        print(f"{side}: {len(lengths)} candidates, {sum(lengths) / len(lengths):.1f} tokens each (the last call)")
    rows = [time_row(f"candidates for {len(prompts)} records", baseline_s, ours_s, limit(prompts, last["ours"]))]

    # One round for one batch of the baseline's; the engine may use all its rows.
    def once(index: int, branches: list[list[int]]) -> bool:
        return True

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
