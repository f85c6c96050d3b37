"""The loss of a title among the titles of a catalogue: only the tokens that are a choice between titles count.

The catalogue's token trie is a hierarchical softmax over its titles (Morin and Bengio, 2005, AISTATS): over the nodes
on the way to a title,

    log p(title | history) = sum of log softmax(logits of the edges out of the node)[the edge taken].

A node with one edge adds nothing, so what the catalogue settles, most tokens of a title, has no part in the loss. It is
what beams score titles by with `--renormalize` (`cebs.beams`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cebs.branches import edge_logits
from cebs.errors import InputError
from cebs.prompts import encode_titles
from cebs.trie import build_trie, parents, title_paths


class CatalogueChoices:
    """The choices that a catalogue leaves: which tokens of a text they are, and what they cost.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        titles (sequence of `str`): the catalogue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str]):
        self.trie = build_trie(encode_titles(tokenizer, titles))
        self.parents = parents(self.trie)
        self.paths = dict(zip(titles, title_paths(self.trie), strict=True))
        self.is_choice = (self.trie.offsets.diff() > 1)[self.parents]  # [num_nodes], of the edge to each node
        self.is_choice[0] = False

    def edges(self, title: str, token_ids: Sequence[int]) -> list[int]:
        """Returns the edge that each token of a title takes, as the number of the node below; 0 where it is no choice.

        In a history the first token may hold the space before the title, and the last one a comma behind it. Such
        tokens are no edges of the trie, and 0. So are all tokens of a title that is not in the catalogue.

        Args:
            title: the title.
            token_ids: its tokens with those of its quotes, in an answer or in a history.
        """
        edges = [0] * len(token_ids)
        path = self.paths.get(title, torch.empty(0, dtype=torch.long))
        way = zip(path.tolist(), self.trie.tokens[path].tolist(), self.is_choice[path].tolist(), strict=True)
        for place, (token_id, (edge, token, is_choice)) in enumerate(zip(token_ids, way, strict=False)):
            if token_id == token:
                edges[place] = edge if is_choice else 0
            elif place:
                break
        return edges

    def losses(self, logits: Tensor, edges: Tensor) -> Tensor:
        """Returns what N choices cost, `[N]`, in nats; differentiable.

        Args:
            logits (`Tensor`, `[N, V]`): before each choice.
            edges (`Tensor` of int64, `[N]`): the edge that is taken, not 0.
        """
        trie, nodes = self.trie.to(logits.device), self.parents.to(logits.device)[edges]
        found, _ = edge_logits(trie, logits, nodes)  # [N, M]
        taken = edges - trie.offsets[nodes]  # [N]: the children of a node are numbered in a row
        return F.cross_entropy(found, taken.long(), reduction="none")

    def log_probs(self, logits: Tensor, edges: Tensor) -> Tensor:
        """Returns the log-probability of each token among the catalogue's, `[B, L]`, in nats; differentiable.

        Args:
            logits (`Tensor`, `[B, L, V]`): before each token.
            edges (`Tensor` of int64, `[B, L]`): the edge that it takes; 0 where it is no choice, which costs nothing.
        """
        chosen = edges.nonzero(as_tuple=True)
        log_probs = torch.zeros(edges.shape, device=logits.device)
        return log_probs.index_put(chosen, -self.losses(logits[chosen], edges[chosen]))


def within_catalogue(file: str | Path, titles: Sequence[Sequence[str]], catalogue: Sequence[str]) -> list[int]:
    """Returns the numbers of the records whose titles are all in the catalogue, and says how many are left out.

    Args:
        file: where the records stand.
        titles: of each record, those that have to be in the catalogue.
        catalogue: its titles.

    Raises:
        `InputError`: if there is no such record.
    """
    known = set(catalogue)
    outside = [next((title for title in of_record if title not in known), None) for of_record in titles]
    within = [number for number, title in enumerate(outside) if title is None]
    if not within:
        raise InputError(f"{file}: no record has all of its titles in the catalogue; leave out --renormalize")
    if left_out := [title for title in outside if title is not None]:
        print(f"note: {file}: left out {len(left_out)} records with a title outside the catalogue, as {left_out[0]!r}")
    return within
