"""Beam search over the catalogue: the engine against `generate(num_beams=..., prefix_allowed_tokens_fn=...)`.

    python benchmarks/bench_beam.py --adapter output/sft/final_model --data_dir ../shared/goodreads --json FILE

The baseline looks allowed tokens up in a trie of dictionaries, one Python call per beam and step. The limit counts each
prompt's tokens once and each token that the engine's own beams fed.
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
from cebs.beams import beam_search
from cebs.catalogue import load_catalogue
from cebs.prompts import encode_titles
from cebs.trie import build_trie
from utils import run_script


@dataclass
class Arguments(BenchmarkArguments):
    num_records: int = field(default=8, metadata={"help": "Records, from the head of train_sample.json."})
    num_beams: int = field(default=20, metadata={"help": "Beams, and titles returned, per record."})
    rows: int = field(default=8, metadata={"help": "Prompts that the engine decodes side by side."})
    baseline_batch_size: int = field(default=4, metadata={"help": "Prompts in one call of generate."})


def generate_with_dict_trie(model, prompts, completions, eos: int, args: Arguments) -> list[list[list[int]]]:
    """The baseline. Completions of each prompt, best first."""
    root: dict = {}
    for completion in completions:
        node = root
        for token in completion:
            node = node.setdefault(token, {})
    longest = max(map(len, completions))

    found = []
    for start in range(0, len(prompts), args.baseline_batch_size):
        batch = prompts[start : start + args.baseline_batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[eos] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)

        def allowed(_, sequence, width=width):
            node = root
            for token in sequence[width:].tolist():
                node = node.get(token, {})
            return list(node) or [eos]

        new = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=args.num_beams,
            num_return_sequences=args.num_beams,
            length_penalty=0.0,
            max_new_tokens=longest,
            eos_token_id=eos,
            pad_token_id=eos,
            prefix_allowed_tokens_fn=allowed,
        )[:, width:].unflatten(0, (len(batch), args.num_beams))
        found += [[row[: row.index(eos) + 1] for row in rows] for rows in new.tolist()]
    return found


def main(args: Arguments) -> None:
    model, tokenizer, _, prompts = load(args)
    titles = load_catalogue(args.data_dir).titles
    completions = encode_titles(tokenizer, titles)
    trie = build_trie(completions)
    print(f"{len(prompts)} records, {len(titles)} titles, {len(trie.tokens)} trie nodes")

    fed = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].numel()))
    beam_search(model, prompts, trie, num_beams=args.num_beams, rows=args.rows)
    hook.remove()
    tokens, branch_tokens = sum(fed), sum(fed) - sum(map(len, prompts))
    print(f"{branch_tokens / len(prompts):.0f} beam tokens per record through the model")

    last: dict[str, list] = {}
    speeds: list[float] = []
    baseline_s, ours_s, _ = interleaved(
        [
            lambda: last.update(
                baseline=generate_with_dict_trie(model, prompts, completions, tokenizer.eos_token_id, args)
            ),
            lambda: last.update(ours=beam_search(model, prompts, trie, num_beams=args.num_beams, rows=args.rows)),
            lambda: speeds.append(matrix_flops(model)),
        ],
        args.repetitions,
        model.device,
    )
    print(f"{statistics.median(speeds) / 1e9:.0f} GFLOP/s measured")
    same_first = same = 0
    for stock, (ours, _) in zip(last["baseline"], last["ours"], strict=True):
        same_first += stock[0] == ours[0]
        same += sum(completion in stock for completion in ours)
    print(f"same first title: {same_first} of {len(prompts)}; titles in common: {same / len(prompts):.1f} per record")

    limit_s = limit_seconds(model, speeds, tokens, branch_tokens + len(prompts))
    rows = [time_row(f"{args.num_beams} beams, {len(prompts)} records", baseline_s, ours_s, limit_s)]
    batch = prompts[: args.baseline_batch_size]
    baseline_mb = peak_mb(
        lambda: generate_with_dict_trie(model, batch, completions, tokenizer.eos_token_id, args), model.device
    )
    ours_mb = peak_mb(lambda: beam_search(model, prompts, trie, num_beams=args.num_beams, rows=args.rows), model.device)
    rows.append(memory_row("peak on top of the weights", baseline_mb, ours_mb))
    report(rows, args.json)


if __name__ == "__main__":
    run_script(main, TrlParser((Arguments,), description=__doc__))
