"""SASRec, a small transformer over title ids (Kang and McAuley, *Self-Attentive Sequential Recommendation*, ICDM 2018,
arXiv:1808.09781).

As in the paper: an embedding per title and per position, blocks of causal self-attention and a point-wise feed-forward
network, each x + Dropout(g(LayerNorm(x))), and scores against the same title embeddings. Two things differ. Sequences
are padded at the end instead of the beginning, so positions count from the oldest title. And the loss is not binary
cross-entropy with one sampled negative a position but cross-entropy over the whole catalogue, which makes SASRec the
stronger baseline (Klenitskiy and Vasilev, *Turning Dross Into Gold Loss*, RecSys 2023, arXiv:2309.07602): on the 256
validation records of Goodreads, three seeds had an NDCG@10 of 0.057 to 0.061 with it and of 0.017 to 0.046 with the
paper's (hidden size 64).

In the shapes, B is the number of sequences, L their length, D the hidden size and M the number of titles.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from cebs.baselines import Scorer
from cebs.commands import check_counts
from cebs.errors import InputError
from cebs.processes import record_seed


@dataclass(kw_only=True)
class SASRecArguments:
    """Size and training of SASRec; the other methods have nothing to set.

    Args:
        hidden_size (`int`): size of a title's embedding and of the hidden states.
        num_hidden_layers (`int`): blocks of self-attention.
        num_attention_heads (`int`): heads of each block.
        dropout (`float`): of embeddings, attention weights and the output of each part of a block.
        max_length (`int`): most titles of a history; a longer one loses its oldest.
        learning_rate (`float`): of Adam.
        per_device_train_batch_size (`int`): training records in a step.
        num_train_epochs (`int`): most epochs.
        early_stopping_patience (`int`): stop after so many epochs without a better validation NDCG@10.
    """

    hidden_size: int = field(metadata={"help": "sasrec: size of a title's embedding and of the hidden states."})
    num_hidden_layers: int = field(metadata={"help": "sasrec: blocks of self-attention."})
    num_attention_heads: int = field(metadata={"help": "sasrec: heads of each block."})
    dropout: float = field(metadata={"help": "sasrec: dropout of embeddings, attention weights and blocks."})
    max_length: int = field(metadata={"help": "sasrec: most titles of a history; a longer one loses its oldest."})
    learning_rate: float = field(metadata={"help": "sasrec: learning rate of Adam."})
    per_device_train_batch_size: int = field(metadata={"help": "sasrec: training records in a step."})
    num_train_epochs: int = field(metadata={"help": "sasrec: most epochs."})
    early_stopping_patience: int = field(
        metadata={"help": "sasrec: stop after so many epochs without a better validation NDCG@10."}
    )

    def __post_init__(self):
        check_counts(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: must be at least 0 and below 1")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate {self.learning_rate}: must be above 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden_size {self.hidden_size}: must be divisible by --num_attention_heads "
                f"{self.num_attention_heads}"
            )


class SASRec(nn.Module):
    """The network. Sequences are padded at their end, where no earlier position can see it, with the id M.

    Args:
        num_titles (`int`): size of the catalogue, M.
        num_positions (`int`): greatest length of a sequence.
        args (`SASRecArguments`): the other sizes.
    """

    def __init__(self, num_titles: int, num_positions: int, args: SASRecArguments):
        super().__init__()
        self.num_titles, self.num_positions = num_titles, num_positions
        self.titles = nn.Embedding(num_titles + 1, args.hidden_size, padding_idx=num_titles)
        self.positions = nn.Embedding(num_positions, args.hidden_size)
        self.dropout = nn.Dropout(args.dropout)
        block = nn.TransformerEncoderLayer(
            args.hidden_size,
            args.num_attention_heads,
            dim_feedforward=args.hidden_size,
            dropout=args.dropout,
            activation="relu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            block, args.num_hidden_layers, norm=nn.LayerNorm(args.hidden_size), enable_nested_tensor=False
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Returns the hidden state at each position, which sees the titles up to there: `[B, L, D]` from `[B, L]`."""
        length = sequences.shape[1]
        states = self.dropout(self.titles(sequences) + self.positions.weight[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length)  # [L, L]
        return self.blocks(states, mask=mask, is_causal=True)

    def title_scores(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the score of each title to be the next one: `[..., M]` from hidden states `[..., D]`."""
        return states @ self.titles.weight[: self.num_titles].T

    def pad(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns the last titles of each sequence, as many as there are positions, as one tensor: `[B, L]`."""
        tensors = [torch.tensor(sequence[-self.num_positions :]) for sequence in sequences]
        return pad_sequence(tensors, batch_first=True, padding_value=self.num_titles)


@dataclass(frozen=True)
class Training:
    """How a training went, for `run.json`.

    Args:
        epochs (`int`): epochs trained.
        best_epoch (`int`): the epoch whose weights were kept, from 1.
        best_validation_ndcg (`float`): its validation NDCG@10.
    """

    epochs: int
    best_epoch: int
    best_validation_ndcg: float


def sasrec(
    sequences: Sequence[Sequence[int]],
    num_titles: int,
    validate: Callable[[Scorer], float],
    args: SASRecArguments,
    seed: int,
) -> tuple[Scorer, Training]:
    """Trains SASRec on the CPU and returns its scorer, and how the training went.

    Each title of a sequence is predicted from those before it. A record without history gets the same score for all
    titles. The weights are those of the epoch with the best validation figure, the earliest of them.

    Args:
        sequences: the titles of each training record, oldest first, the target last.
        num_titles: size of the catalogue.
        validate: returns the figure (NDCG@10, greater is better) that a scorer reaches on the validation records.
        args: size and training.
        seed: of the initial weights, the order of the records and dropout.

    Raises:
        `InputError`: if no sequence has two titles to learn from.
    """
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise InputError("train_sample.json: no record has two titles of the catalogue; SASRec needs sequences")
    torch.manual_seed(record_seed(seed, "train/sasrec", 0))
    # positions beyond the longest training sequence would stay as they were initialised
    num_positions = min(args.max_length, max(map(len, sequences)) - 1)
    model = SASRec(num_titles, num_positions, args)
    inputs = model.pad([sequence[:-1] for sequence in sequences])  # [R, L]
    targets = model.pad([sequence[1:] for sequence in sequences])  # [R, L]
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    scorer = make_scorer(model)

    best, best_weights = Training(0, 0, -1.0), {}
    with tqdm(range(1, args.num_train_epochs + 1), desc="sasrec", unit="epoch", mininterval=1) as epochs:
        for epoch in epochs:
            model.train()
            for batch in torch.randperm(len(inputs)).split(args.per_device_train_batch_size):
                optimizer.zero_grad()
                next_title_loss(model, inputs[batch], targets[batch]).backward()
                optimizer.step()
            ndcg = validate(scorer)
            epochs.set_postfix({"validation NDCG@10": f"{ndcg:.4f}"}, refresh=False)
            if ndcg > best.best_validation_ndcg:
                best, best_weights = Training(epoch, epoch, ndcg), copy.deepcopy(model.state_dict())
            elif epoch - best.best_epoch >= args.early_stopping_patience:
                break
    model.load_state_dict(best_weights)
    return scorer, replace(best, epochs=epoch)


def next_title_loss(model: SASRec, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of the next title over the whole catalogue, at each position that has one.

    Args:
        model: the network.
        inputs (`torch.Tensor` of shape `[B, L]`): title ids, padded as `SASRec.pad` does.
        targets (`torch.Tensor` of shape `[B, L]`): the next title at each position, padded alike.
    """
    real = targets != model.num_titles  # [B, L]
    return F.cross_entropy(model.title_scores(model(inputs)[real]), targets[real])


def make_scorer(model: SASRec) -> Scorer:
    """Returns the scorer of a network, with the weights that it has when the scorer is called."""

    @torch.inference_mode()
    def score(histories: Sequence[Sequence[int]], start: int) -> np.ndarray:
        model.eval()
        scores = np.zeros((len(histories), model.num_titles), np.float32)
        known = [place for place, history in enumerate(histories) if history]
        if known:
            sequences = model.pad([histories[place] for place in known])  # [B, L]
            last = (sequences != model.num_titles).sum(dim=1) - 1  # [B]
            states = model(sequences)[torch.arange(len(known)), last]  # [B, D]
            scores[known] = model.title_scores(states).numpy()
        return scores

    return score
