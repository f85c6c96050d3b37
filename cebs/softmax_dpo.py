"""Softmax-DPO: one chosen title against any number of rejected ones, on TRL's `DPOTrainer`.

S-DPO paper: Chen et al., "On Softmax Direct Preference Optimization for Recommendation", arXiv:2406.09215. With one
rejected title it is DPO (Rafailov et al., arXiv:2305.18290) exactly.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad, selective_log_softmax, use_adapter

from cebs.branches import branch_log_probs, shared_rows
from cebs.prompts import encode_completion, encode_prompt
from cebs.training import HardwareDefaults


@dataclass
class SoftmaxDPOConfig(HardwareDefaults, DPOConfig):
    """
    TRL's `DPOConfig` with one more setting.

    Args:
        shared_prompt (`bool`, *optional*, defaults to `True`): compute each prompt once for all its completions;
            `--no_shared_prompt` repeats it for each, as TRL does. Both give the same losses.
    """

    shared_prompt: bool = field(
        default=True,
        metadata={"help": "Compute each prompt once for all its completions; the losses are the same either way."},
    )


def softmax_dpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, is_rejected: Tensor, beta: float) -> Tensor:
    """
    The S-DPO loss of arXiv:2406.09215: -log sigmoid(-log sum_j exp(beta (r_j - r_chosen))).

    Args:
        chosen_logratios (`Tensor`, `[B]`): policy minus reference log-probability of the chosen title, in nats.
        rejected_logratios (`Tensor`, `[B, K]`): the same for the rejected titles.
        is_rejected (`Tensor` of bool, `[B, K]`): where a record has a rejected title; at least once in each row.
        beta (`float`): strength of the pull towards the reference.

    Returns:
        `Tensor`, `[B]`: the loss of each record.
    """
    differences = beta * (rejected_logratios - chosen_logratios[:, None])
    return -F.logsigmoid(-differences.masked_fill(~is_rejected, -torch.inf).logsumexp(dim=1))


@dataclass
class SharedPromptCollator:
    """
    One row per record: the prompt once, then its completions side by side; see `cebs.branches.shared_rows`.

    ```python
    >>> collator = SharedPromptCollator(pad_token_id=0)
    >>> batch = collator([{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [[10, 9]]}])
    >>> batch["input_ids"]  # prompt 5 6, then 7 8 (chosen) and 7 10 (rejected), each predicting one token on
    tensor([[ 5,  6,  7,  8,  7, 10]])
    >>> batch["position_ids"]
    tensor([[0, 1, 2, 3, 2, 3]])
    >>> batch["labels"], batch["branch_ids"]
    (tensor([[ 8,  9, 10,  9]]), tensor([[0, 0, 1, 1]]))
    ```
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        completions = [[example["chosen_ids"], *example["rejected_ids"]] for example in examples]
        rows = shared_rows([example["prompt_ids"] for example in examples], completions, self.pad_token_id)
        return rows | _completion_columns(examples)


@dataclass
class RepeatedPromptCollator:
    """
    One row per completion, the prompt before each: the plain layout that the shared one is measured against.

    ```python
    >>> collator = RepeatedPromptCollator(pad_token_id=0)
    >>> batch = collator([{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [[10]]}])
    >>> batch["input_ids"], batch["completion_mask"]
    (tensor([[ 5,  6,  7,  8,  9], [ 5,  6,  7, 10,  0]]), tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]))
    >>> batch["row"]  # where the chosen and the rejected titles of each record are
    tensor([[0, 1]])
    ```
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = _completion_columns(examples)
        input_ids, completion_mask = [], []
        for example in examples:
            for completion in (example["chosen_ids"], *example["rejected_ids"]):
                input_ids.append(torch.tensor(example["prompt_ids"] + completion))
                completion_mask.append(torch.tensor([0] * len(example["prompt_ids"]) + [1] * len(completion)))
        is_completion = columns["is_completion"]  # [B, 1 + K]
        row = (is_completion.flatten().cumsum(0) - 1).view_as(is_completion) * is_completion
        return columns | {
            "input_ids": pad(input_ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in input_ids], padding_value=0),
            "completion_mask": pad(completion_mask, padding_value=0),
            "row": row,
        }


def _completion_columns(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Returns `is_completion` `[B, 1 + K]` and, where known, `ref_logps` `[B, 1 + K]`, 0 beyond a record's own."""
    counts = torch.tensor([1 + len(example["rejected_ids"]) for example in examples])
    columns = {"is_completion": torch.arange(int(counts.max())) < counts[:, None]}
    if "ref_logps" in examples[0]:
        columns["ref_logps"] = pad([torch.tensor(example["ref_logps"]) for example in examples], padding_value=0.0)
    return columns


def repeated_log_probs(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """
    Log-probability of each completion given its prompt, from rows of `RepeatedPromptCollator`; differentiable.

    Returns:
        `Tensor`, `[B, 1 + K]`: in nats, summed over tokens; 0 where a record has no such completion.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    token_log_probs = selective_log_softmax(logits[:, :-1].float(), batch["input_ids"][:, 1:])  # [R, L - 1]
    log_probs = (token_log_probs * batch["completion_mask"][:, 1:]).sum(dim=1)  # [R]
    return log_probs[batch["row"]] * batch["is_completion"]


class SoftmaxDPOTrainer(DPOTrainer):
    """
    TRL's `DPOTrainer` for records with one rejected title or a list of them, of any length and mixed at will.

    The reference is what TRL takes: a frozen copy of the adapter that training starts from, or, where a new adapter
    is trained, the base model with the adapter switched off; never a second model.

    Args:
        args ([`SoftmaxDPOConfig`]): TRL's configuration and `shared_prompt`.
        train_dataset, eval_dataset (`Dataset`): rows of `prompt`, `chosen` and `rejected` (a list of titles). Prompt
            and completions are tokenised apart and joined; too long a prompt loses its oldest titles.
    """

    def __init__(self, *, args: SoftmaxDPOConfig, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        collator = SharedPromptCollator if args.shared_prompt else RepeatedPromptCollator
        self._log_probs = branch_log_probs if args.shared_prompt else repeated_log_probs
        self.shortened_prompts = 0
        super().__init__(
            args=args,
            processing_class=processing_class,
            data_collator=collator(processing_class.pad_token_id),
            **kwargs,
        )

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: DPOConfig, dataset_name: str
    ) -> Dataset:
        rows = []
        for record in dataset:
            chosen, *rejected = (
                encode_completion(processing_class, title) for title in (record["chosen"], *record["rejected"])
            )
            room = (args.max_length or 2**30) - max(map(len, (chosen, *rejected)))
            prompt, dropped = encode_prompt(processing_class, record["prompt"], room)
            self.shortened_prompts += dropped > 0
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        return Dataset.from_list(rows)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_logps"]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        ref_logps = []
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"reference log-probs, {name}", mininterval=1):
            values = self.compute_ref_log_probs(self.model, batch)  # [B, 1 + K]
            rows = [row[mask].tolist() for row, mask in zip(values, batch["is_completion"], strict=True)]
            ref_logps += self.accelerator.gather_for_metrics(rows, use_gather_object=True)
        return dataset.add_column("ref_logps", ref_logps)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the log-probabilities `[B, 1 + K]` of a batch's completions under the reference."""
        reference, adapter = self.ref_model or model, nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        without_checkpoints = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), without_checkpoints, adapter, self.accelerator.autocast():
            return self._log_probs(reference, inputs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        is_rejected = inputs["is_completion"][:, 1:]  # [B, K]
        logps = self._log_probs(model, inputs)  # [B, 1 + K]
        ref_logps = inputs["ref_logps"] if self.precompute_ref_logps else self.compute_ref_log_probs(model, inputs)
        logratios = logps - ref_logps
        losses = softmax_dpo_loss(logratios[:, 0], logratios[:, 1:], is_rejected, self.beta)  # [B]
        self._record_rewards(logps.detach(), self.beta * logratios.detach(), is_rejected)
        return (losses.mean(), {"rewards": logratios}) if return_outputs else losses.mean()

    def _record_rewards(self, logps: Tensor, rewards: Tensor, is_rejected: Tensor) -> None:
        """Logs what TRL logs; of several rejected titles the mean, and accuracy counts a win over all of them."""

        def rejected_mean(values: Tensor) -> Tensor:  # [B, K] -> [B]
            return (values * is_rejected).sum(dim=1) / is_rejected.sum(dim=1)

        chosen, rejected = rewards[:, 0], rewards[:, 1:]  # [B], [B, K]
        wins = chosen > rejected.masked_fill(~is_rejected, -torch.inf).amax(dim=1)
        figures = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected_mean(rejected),
            "rewards/accuracies": wins.float(),
            "rewards/margins": chosen - rejected_mean(rejected),
            "logps/chosen": logps[:, 0],
            "logps/rejected": rejected_mean(logps[:, 1:]),
        }
        mode = "train" if self.model.training else "eval"
        for name, values in figures.items():
            self._metrics[mode][name].append(self.accelerator.gather_for_metrics(values).mean().item())
