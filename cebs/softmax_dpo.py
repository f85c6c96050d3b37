"""DPO and its kin: one chosen title against one or more rejected ones, on TRL's `DPOTrainer`.

Every loss is a function of the completions' log-probabilities and lengths, so that all of them share the computation of
the prompt (`cebs.branches`). Those for lists of rejected titles are here; those for one rejected title are TRL's own.

- S-DPO (`softmax`): Chen et al., "On Softmax Direct Preference Optimization for Recommendation", arXiv:2406.09215
- DMPO (`dmpo`): Bai et al., "Finetuning Large Language Model for Personalized Ranking", arXiv:2405.16127

With one rejected title both are DPO (Rafailov et al., arXiv:2305.18290; TRL's `sigmoid`) exactly.
"""

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
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
from cebs.choices import CatalogueChoices
from cebs.errors import InputError
from cebs.guards import RECORD, FiniteLossMixin
from cebs.prompts import encode_completion, encode_prompt, unquote
from cebs.training import HardwareDefaults

# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


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


def dmpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, is_rejected: Tensor, beta: float) -> Tensor:
    """
    The DMPO loss of arXiv:2405.16127: -log sigmoid(beta (r_chosen - mean_j r_j)).

    Arguments and result are those of [`softmax_dpo_loss`].
    """
    return -F.logsigmoid(beta * (chosen_logratios - masked_mean(rejected_logratios, is_rejected)))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each row of `values` `[B, K]` where `mask` is true, `[B]`."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


LIST_LOSSES = {"softmax": softmax_dpo_loss, "dmpo": dmpo_loss}
# those of `DPOTrainer`, which has no list of them
TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# settings of `DPOConfig` that would have no effect here, or fail once the model is loaded, and their defaults
UNSUPPORTED = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl", "sync_ref_model": False}


@dataclass
class SoftmaxDPOConfig(HardwareDefaults, DPOConfig):
    """
    TRL's `DPOConfig` with more losses and two more settings.

    Args:
        loss_type (`list[str]`, *optional*, defaults to `["softmax"]`): `softmax` (S-DPO) or `dmpo`, which take one
            rejected title or a list of them; or one or several of TRL's own, weighted by `loss_weights`, which take one
            rejected title.
        sft_weight (`float`, *optional*, defaults to `0.0`): weight of the chosen title's negative log-likelihood per
            token, added to the loss (RPO, arXiv:2404.19733). The mean is over records: a long title does not count for
            more than a short one, as it does in TRL's `sft`.
        shared_prompt (`bool`, *optional*, defaults to `True`): compute each prompt once for all its completions;
            `--no_shared_prompt` repeats it for each, as TRL does. Both give the same losses.

    Raises:
        `ValueError`: a loss does not exist, or a setting does not go with it; the parser makes an `InputError` of it.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["softmax"],
        metadata={
            "help": "softmax (S-DPO) or dmpo, for one rejected title or lists of them; or TRL's own for one rejected "
            f"title, several of which are added up by --loss_weights: {', '.join(TRL_LOSSES)}."
        },
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the chosen title's NLL per token, added to the loss (RPO)."}
    )
    shared_prompt: bool = field(
        default=True,
        metadata={"help": "Compute each prompt once for all its completions; the losses are the same either way."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.loss_type:
            if name not in (known := (*LIST_LOSSES, *TRL_LOSSES)):
                raise ValueError(f"--loss_type {name}: no such loss; there are {', '.join(known)}")
            if name in LIST_LOSSES and len(self.loss_type) > 1:
                raise ValueError(f"--loss_type {name}: stands alone; --sft_weight adds the chosen title's NLL")
        if not self.beta > 0:
            raise ValueError(f"--beta {self.beta}: must be above 0")
        if not self.sft_weight >= 0:
            raise ValueError(f"--sft_weight {self.sft_weight}: must be 0 or more")
        if "robust" in self.loss_type and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {self.label_smoothing}: robust takes 0 or more, below 0.5")
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise ValueError(f"--label_smoothing {self.label_smoothing}: exo_pair takes one between 0 and 1, as 1e-3")
        for name, default in UNSUPPORTED.items():
            if vars(self)[name] != default:
                raise ValueError(f"--{name} {vars(self)[name]}: is not supported here; leave it out")


def check_rejected(path: str | Path, records: list[dict[str, Any]], loss_type: list[str]) -> None:
    """Checks that a loss can take the preference records of a file.

    Raises:
        `InputError`: naming the file and the first record with several rejected titles, where the loss takes one.
    """
    if loss_type[0] in LIST_LOSSES:
        return
    for index, record in enumerate(records):
        if len(record["rejected"]) > 1:
            raise InputError(
                f"{path}: record {index}: has {len(record['rejected'])} rejected titles, and --loss_type "
                f"{' '.join(loss_type)} takes one; use {' or '.join(LIST_LOSSES)}, or data with one rejected title"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


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
        if "edges" in examples[0]:
            edges = [torch.tensor(list(chain.from_iterable(example["edges"]))) for example in examples]
            rows["edges"] = pad(edges, padding_value=0)  # [B, S], beside the labels
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
        if "edges" in examples[0]:
            edges = [
                torch.tensor([0] * len(example["prompt_ids"]) + of_completion)
                for example in examples
                for of_completion in example["edges"]
            ]
            columns["edges"] = pad(edges, padding_value=0)  # [R, L], beside the ids
        is_completion = columns["is_completion"]  # [B, 1 + K]
        row = (is_completion.flatten().cumsum(0) - 1).view_as(is_completion) * is_completion
        return columns | {
            "input_ids": pad(input_ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in input_ids], padding_value=0),
            "completion_mask": pad(completion_mask, padding_value=0),
            "row": row,
        }


def _completion_columns(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Returns `branch_lengths` in tokens, `is_completion` and, where known, `ref_logps`, `[B, 1 + K]` each.

    The chosen title comes first; beyond a record's own titles all three are 0. Numbered records keep their number.
    """
    completions = [[example["chosen_ids"], *example["rejected_ids"]] for example in examples]
    lengths = pad([torch.tensor([len(ids) for ids in row]) for row in completions], padding_value=0)
    columns = {"branch_lengths": lengths, "is_completion": lengths > 0}
    if "ref_logps" in examples[0]:
        columns["ref_logps"] = pad([torch.tensor(example["ref_logps"]) for example in examples], padding_value=0.0)
    if RECORD in examples[0]:
        columns[RECORD] = torch.tensor([example[RECORD] for example in examples])
    return columns


def repeated_log_probs(
    model: torch.nn.Module, batch: dict[str, Tensor], choices: CatalogueChoices | None = None
) -> Tensor:
    """
    Log-probability of each completion given its prompt, from rows of `RepeatedPromptCollator`; differentiable.

    Args:
        choices (`CatalogueChoices`, *optional*): as in [`branch_log_probs`].

    Returns:
        `Tensor`, `[B, 1 + K]`: in nats, summed over tokens; 0 where a record has no such completion.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    if choices is not None:
        token_log_probs = choices.log_probs(logits[:, :-1], batch["edges"][:, 1:])  # [R, L - 1]
    else:
        token_log_probs = selective_log_softmax(logits[:, :-1].float(), batch["input_ids"][:, 1:])
    log_probs = (token_log_probs * batch["completion_mask"][:, 1:]).sum(dim=1)  # [R]
    return log_probs[batch["row"]] * batch["is_completion"]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class SoftmaxDPOTrainer(FiniteLossMixin, DPOTrainer):
    """
    TRL's `DPOTrainer` for records with one rejected title or a list of them, of any length and mixed at will.

    The reference is what TRL takes: a frozen copy of the adapter that training starts from, or, where a new adapter
    is trained, the base model with the adapter switched off; never a second model.

    Args:
        args ([`SoftmaxDPOConfig`]): TRL's configuration, with the losses for lists.
        train_dataset, eval_dataset (`Dataset`): rows of `prompt`, `chosen` and `rejected` (a list of titles). Prompt
            and completions are tokenised apart and joined; too long a prompt loses its oldest titles.
        choices (`CatalogueChoices`, *optional*): takes all log-probabilities among the catalogue's titles, of which
            every completion is one. Left out, they are among all texts.
    """

    def __init__(
        self,
        *,
        args: SoftmaxDPOConfig,
        processing_class: PreTrainedTokenizerBase,
        choices: CatalogueChoices | None = None,
        **kwargs: Any,
    ):
        collator = SharedPromptCollator if args.shared_prompt else RepeatedPromptCollator
        log_probs = branch_log_probs if args.shared_prompt else repeated_log_probs
        self.choices, self._log_probs = choices, partial(log_probs, choices=choices)
        self.shortened_prompts = 0
        super().__init__(
            args=args,
            processing_class=processing_class,
            data_collator=collator(processing_class.pad_token_id),
            **kwargs,
        )
        # TRL's loss finds the reference log-probs in its batch: `_pair_loss` puts them there
        self.precompute_ref_logps = True

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: DPOConfig, dataset_name: str
    ) -> Dataset:
        rows = []
        for index, record in enumerate(dataset):
            titles = (record["chosen"], *record["rejected"])
            chosen, *rejected = completions = [encode_completion(processing_class, title) for title in titles]
            room = (args.max_length or 2**30) - max(map(len, (chosen, *rejected)))
            prompt, dropped = encode_prompt(processing_class, record["prompt"], room)
            self.shortened_prompts += dropped > 0
            row = {
                RECORD: record.get(RECORD, index),
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
            }
            if self.choices is not None:
                row["edges"] = [
                    self.choices.edges(unquote(title), ids) for title, ids in zip(titles, completions, strict=True)
                ]
            rows.append(row)
        return Dataset.from_list(rows)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [RECORD, "prompt_ids", "chosen_ids", "rejected_ids", "ref_logps", "edges"]

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
        lengths, is_rejected = inputs["branch_lengths"], inputs["is_completion"][:, 1:]  # [B, 1 + K], [B, K]
        logps = self._log_probs(model, inputs)  # [B, 1 + K]
        ref_logps = inputs["ref_logps"] if "ref_logps" in inputs else self.compute_ref_log_probs(model, inputs)
        logratios = logps - ref_logps
        if self.loss_types[0] in LIST_LOSSES:
            list_loss = LIST_LOSSES[self.loss_types[0]]
            loss = list_loss(logratios[:, 0], logratios[:, 1:], is_rejected, self.beta).mean()
        else:
            loss = self._pair_loss(logps, ref_logps, lengths)
        chosen_nll = -logps[:, 0] / lengths[:, 0]  # [B], nats per token
        loss = loss + self.args.sft_weight * chosen_nll.mean()
        self._record_rewards(logps.detach(), self.beta * logratios.detach(), is_rejected)
        return (loss, {"rewards": logratios}) if return_outputs else loss

    def _pair_loss(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
        """
        TRL's own loss of one chosen and one rejected title, from log-probabilities that are known already.

        TRL computes it from the log-probabilities of tokens, in rows of which the first half are the chosen titles. It
        takes only their sums and counts, so a title's whole log-probability may stand at its first token:

            chosen a0 a1 a2, rejected b0 b1    completion_mask  0 1 1 1    log_probs  log p(a)  0  0
                                                                0 1 1 0               log p(b)  0  0

        Args:
            logps, ref_logps (`Tensor`, `[B, 2]`): under the policy and the reference, in nats.
            lengths (`Tensor` of int, `[B, 2]`): in tokens.

        Returns:
            `Tensor`: a scalar, the mean over the records.
        """
        (chosen_logps, rejected_logps), (ref_chosen_logps, ref_rejected_logps) = logps.unbind(1), ref_logps.unbind(1)
        columns = torch.arange(1 + int(lengths.max()), device=lengths.device)
        completion_mask = ((columns > 0) & (columns <= lengths.T.reshape(-1, 1))).long()  # [2B, 1 + L]
        log_probs = F.pad(torch.cat([chosen_logps, rejected_logps])[:, None], (0, len(columns) - 2))  # [2B, L]
        batch = {
            "input_ids": completion_mask,  # any ids will do
            "attention_mask": completion_mask,
            "completion_mask": completion_mask,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
        }
        zeros = torch.zeros_like(log_probs)
        outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        # TRL's figures of the tokens that it was not shown are not to be logged
        metrics, self._metrics = self._metrics, {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            return super()._compute_loss(lambda **kwargs: outputs, batch, return_outputs=False)
        finally:
            self._metrics = metrics

    def _record_rewards(self, logps: Tensor, rewards: Tensor, is_rejected: Tensor) -> None:
        """Logs what TRL logs; of several rejected titles the mean, and accuracy counts a win over all of them."""
        chosen, rejected = rewards[:, 0], rewards[:, 1:]  # [B], [B, K]
        wins = chosen > rejected.masked_fill(~is_rejected, -torch.inf).amax(dim=1)
        figures = {
            "rewards/chosen": chosen,
            "rewards/rejected": masked_mean(rejected, is_rejected),
            "rewards/accuracies": wins.float(),
            "rewards/margins": chosen - masked_mean(rejected, is_rejected),
            "logps/chosen": logps[:, 0],
            "logps/rejected": masked_mean(logps[:, 1:], is_rejected),
        }
        mode = "train" if self.model.training else "eval"
        for name, values in figures.items():
            self._metrics[mode][name].append(self.accelerator.gather_for_metrics(values).mean().item())
