"""One S-DPO step, forward and backward through a LoRA adapter: the shared prompt against the repeated one.

    python benchmarks/bench_softmax_dpo.py --data_dir ../shared/goodreads --json FILE

The baseline repeats the prompt before the chosen and each of the K rejected titles, K + 1 rows a record, as TRL lays a
pair out; the model's forward is the stock one. Both sides compute the same loss. The limit is the time that one pass
over each prompt and each title would take at the machine's own matrix speed, a backward pass counted as one forward
pass: the frozen matrices need no gradients of their own. Peak memory is what a step holds on top of the weights.
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl import TrlParser

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
from cebs.branches import branch_log_probs
from cebs.catalogue import load_catalogue
from cebs.prompts import encode_completion, encode_titles
from cebs.softmax_dpo import RepeatedPromptCollator, SharedPromptCollator, repeated_log_probs, softmax_dpo_loss
from utils import run_script


@dataclass
class SoftmaxDPOArguments(BenchmarkArguments):
    negatives: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 15], metadata={"help": "Rejected titles a record: K of each case."}
    )
    batch_size: int = field(default=1, metadata={"help": "Records in a step."})


def main(args: SoftmaxDPOArguments) -> None:
    model, tokenizer, records, prompts = load(args)
    titles = encode_titles(tokenizer, load_catalogue(args.data_dir).titles)
    base = model
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).train()
    draw = random.Random(0)

    def step(log_probs, batch: dict[str, Tensor]) -> Tensor:
        logps = log_probs(model, batch)  # [B, 1 + K]
        logratios = logps - logps.detach()  # the reference is beside the point here: it costs both sides alike
        loss = softmax_dpo_loss(logratios[:, 0], logratios[:, 1:], batch["is_completion"][:, 1:], beta=0.1).mean()
        loss.backward()
        model.zero_grad()
        return loss.detach()

    rows = []
    for count in args.negatives:
        examples = [
            {
                "prompt_ids": prompt,
                "chosen_ids": encode_completion(tokenizer, record.output),
                "rejected_ids": draw.sample(titles, count),
            }
            for record, prompt in list(zip(records, prompts, strict=True))[: args.batch_size]
        ]
        batches = [
            {name: tensor.to(base.device) for name, tensor in collator(tokenizer.pad_token_id)(examples).items()}
            for collator in (RepeatedPromptCollator, SharedPromptCollator)
        ]
        baseline, ours = (
            lambda log_probs=log_probs, batch=batch: step(log_probs, batch)
            for log_probs, batch in zip((repeated_log_probs, branch_log_probs), batches, strict=True)
        )
        torch.testing.assert_close(ours(), baseline(), atol=1e-2, rtol=1e-2)  # also warms up
        tokens = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) + sum(map(len, e["rejected_ids"])) for e in examples)
        predicted = tokens - sum(len(e["prompt_ids"]) for e in examples)
        speeds: list[float] = []
        sides = [baseline, ours, lambda speeds=speeds: speeds.append(matrix_flops(base))]
        *times, _ = interleaved(sides, args.repetitions, base.device)
        rows.append(time_row(f"S-DPO step, K = {count}", *times, 2 * limit_seconds(base, speeds, tokens, predicted)))
        rows.append(
            memory_row(f"S-DPO step, K = {count}, peak", peak_mb(baseline, base.device), peak_mb(ours, base.device))
        )
    report(rows, args.json)


if __name__ == "__main__":
    run_script(main, TrlParser(SoftmaxDPOArguments))
