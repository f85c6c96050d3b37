"""What the benchmarks share: arguments, interleaved timing, peak memory, the machine's matrix speed, tables."""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cebs.models import DEFAULT_MODEL, load_for_inference
from cebs.prompts import Record, encode_prompt, read_records
from cebs.sources import find_model
from utils import load_tokenizer, write_json


@dataclass
class ModelOnData:
    model_name_or_path: str = field(default=DEFAULT_MODEL, metadata={"help": "Folder or hub name of the base model."})
    adapter: str = field(default="", metadata={"help": "Folder of the adapter, merged into the base model."})
    dtype: str = field(
        default="auto", metadata={"help": "auto (bfloat16 where the hardware has it), or a torch dtype."}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N; auto is the GPU if any."})
    data_dir: str = field(default="../shared/goodreads", metadata={"help": "Data folder."})


@dataclass
class BenchmarkArguments(ModelOnData):
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


def interleaved(sides: list[Callable[[], object] | None], repetitions: int, device: torch.device) -> list[float | None]:
    """The median seconds of each side over `repetitions` rounds in which the sides take turns; none for no side."""
    rounds = [[side and seconds(side, device) for side in sides] for _ in range(repetitions)]
    return [side and statistics.median(times) for side, times in zip(sides, zip(*rounds, strict=True), strict=True)]


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


def limit_seconds(model: PreTrainedModel, speeds: list[float], tokens: int, logits: int) -> float:
    """
    Seconds for `tokens` through the layers and `logits` of them through the output matrix, attention left out.

    Args:
        speeds (`list[float]`): [`matrix_flops`] beside each repetition of what is timed, for a machine's speed changes;
            the median counts.
    """
    layers = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
    output = model.get_output_embeddings().weight.numel()
    return 2 * (tokens * layers + logits * output) / statistics.median(speeds)


def time_row(case: str, baseline_s: float | None, ours_s: float, limit_s: float | None) -> dict:
    ratio = None if baseline_s is None else baseline_s / ours_s
    return {"case": case, "baseline_s": baseline_s, "ours_s": ours_s, "ratio": ratio, "limit_s": limit_s}


def memory_row(case: str, baseline_mb: float, ours_mb: float) -> dict:
    ratio = baseline_mb / ours_mb if ours_mb else None  # a tiny model may need no page more than there are
    return {"case": case, "baseline_mb": baseline_mb, "ours_mb": ours_mb, "ratio": ratio}


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
