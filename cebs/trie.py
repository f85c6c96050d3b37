r"""The catalogue as a token trie in flat arrays.

Four titles, `[5, 7, 2]`, `[5, 7, 9, 2]`, `[5, 8, 2]` and `[6, 2]`, numbered 0 to 3 (2 ends a title):

                      node      0   1   2   3   4   5   6   7   8   9
         0            tokens    .   5   6   7   8   2   2   9   2   2
       5/ \6          titles   -1  -1  -1  -1  -1   3   0  -1   2   1
      1     2         offsets   1   3   5   6   8   9   9   9  10  10  10
    7/ \8    \2
    3   4     5       The nodes are numbered level by level and, inside a level, parent by parent, so the children of
  2/ \9  \2           node n are the nodes offsets[n] .. offsets[n + 1] - 1: a node is also the number of the edge that
  6   7   8           leads to it, and one int32 each for `tokens`, `titles` and `offsets` (12 bytes per node) is the
      |2              whole trie.
      9
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTrie:
    """
    Args:
        offsets (`Tensor` of int32, `[num_nodes + 1]`): the children of node n are `offsets[n] .. offsets[n + 1] - 1`.
        tokens (`Tensor` of int32, `[num_nodes]`): the token on the edge to the node; -1 for the root, node 0.
        titles (`Tensor` of int32, `[num_nodes]`): the title that ends at the node, or -1.
    """

    offsets: Tensor
    tokens: Tensor
    titles: Tensor

    def to(self, device: torch.device | str) -> "TokenTrie":
        return TokenTrie(self.offsets.to(device), self.tokens.to(device), self.titles.to(device))


def build_trie(completions: Sequence[Sequence[int]]) -> TokenTrie:
    """
    Build the trie of a catalogue, one vectorised pass per token position.

    Args:
        completions (sequence of token id lists): one per title, in title order, with whatever ends a title (newline,
            end of sequence). A completion may be the beginning of another one.

    Returns:
        `TokenTrie`: on the CPU. `titles` holds positions in `completions`.

    Raises:
        ValueError: a completion is empty, or two are the same tokens.
    """
    lengths = np.fromiter(map(len, completions), np.int64, len(completions))  # [T]
    flat = np.fromiter(chain.from_iterable(completions), np.int64, lengths.sum())
    if len(completions) == 0 or lengths.min() == 0:
        raise ValueError(f"title {lengths.argmin()} has no tokens" if len(completions) else "the catalogue is empty")

    vocabulary = flat.max() + 1
    starts = lengths.cumsum() - lengths
    tokens, titles, num_children = [np.array([-1])], [np.array([-1])], []
    going = np.arange(len(completions))  # titles that reach the present level
    node = np.zeros(len(completions), np.int64)  # and where each stands in it
    for depth in range(lengths.max()):
        node, going = node[lengths[going] > depth], going[lengths[going] > depth]
        key = node * vocabulary + flat[starts[going] + depth]
        # `unique` sorts by parent, then token: the numbering that keeps a node's children together.
        edges, node = np.unique(key, return_inverse=True)
        num_children.append(np.bincount(edges // vocabulary, minlength=len(tokens[-1])))
        tokens.append(edges % vocabulary)
        titles.append(np.full(len(edges), -1))
        ends = lengths[going] == depth + 1
        titles[-1][node[ends]] = going[ends]
        if len(np.unique(node[ends])) < ends.sum():
            lost = np.setdiff1d(going[ends], titles[-1])[0]
            twin = titles[-1][node[going == lost]][0]
            raise ValueError(f"titles {lost} and {twin} are the same tokens: {list(completions[lost])}")
    num_children.append(np.zeros(len(tokens[-1]), np.int64))
    offsets = 1 + np.concatenate([[0], np.concatenate(num_children).cumsum()])
    arrays = offsets, np.concatenate(tokens), np.concatenate(titles)
    return TokenTrie(*(torch.from_numpy(array.astype(np.int32)) for array in arrays))


def children(trie: TokenTrie, nodes: Tensor) -> Tensor:
    """
    All edges out of a set of nodes, one line per node.

    Args:
        trie (`TokenTrie`): on the device of `nodes`.
        nodes (`Tensor` of int64, `[N]`): at least one; may repeat.

    Returns:
        `Tensor` of int64, `[N, M]`, M the most children of a node: the nodes that the edges lead to, in the order of
        their tokens, then 0 where a node has fewer (the root is nobody's child).
    """
    first, end = trie.offsets[nodes].long(), trie.offsets[nodes + 1].long()  # [N]
    child = first[:, None] + torch.arange(int((end - first).max()), device=nodes.device)
    return child.masked_fill_(child >= end[:, None], 0)


def parents(trie: TokenTrie) -> Tensor:
    """Returns the node above each node: int64 `[num_nodes]`, 0 for the root too."""
    above = torch.repeat_interleave(trie.offsets.diff().long())
    return torch.cat([above.new_zeros(1), above])


def title_paths(trie: TokenTrie) -> list[Tensor]:
    """Returns the nodes on the way to each title, in title order: int64 `[length]` each, without the root."""
    above, paths = parents(trie).tolist(), {}
    for end in (trie.titles >= 0).nonzero()[:, 0].tolist():
        path = [end]
        while above[path[-1]]:
            path.append(above[path[-1]])
        paths[int(trie.titles[end])] = torch.tensor(path[::-1])
    return [paths[title] for title in range(len(paths))]


def best_rise(trie: TokenTrie, edge_bias: Tensor) -> Tensor:
    """
    The most that a sum of edge weights can still rise on the way from each node to a title below it.

    Args:
        trie (`TokenTrie`): on the device of `edge_bias`.
        edge_bias (`Tensor`, `[num_nodes]`): the weight of the edge that leads to each node.

    Returns:
        `Tensor`, `[num_nodes]`: the largest sum over the paths to titles below; -inf where there is nothing below.
    """
    levels = [(0, 1)]  # the nodes of each level, down to an empty one
    while levels[-1][0] < levels[-1][1]:
        levels.append(tuple(int(trie.offsets[node]) for node in levels[-1]))
    rise = torch.full_like(edge_bias, float("-inf"))
    for (start, end), below in reversed(list(pairwise(levels))):
        child = slice(*below)
        ends_here = torch.where(trie.titles[child] >= 0, 0.0, float("-inf"))
        value = edge_bias[child] + torch.maximum(rise[child], ends_here)
        parent = torch.repeat_interleave(trie.offsets[start : end + 1].diff().long())
        rise[start:end].scatter_reduce_(0, parent, value, "amax")
    return rise
