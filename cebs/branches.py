"""One prompt, many branches: the engine under sampling, beam search and S-DPO.

A prompt and its continuations share one computation of the prompt. Each token sees the prompt and its own branch, and
its position id counts on from the end of the prompt: every number is the one that the concatenated sequence would give.

Training puts a record in one row, the prompt without its last token, then the branches side by side. Each branch begins
with the prompt's last token, whose logits predict the branch's first completion token (`shared_rows`):

    prompt p0 p1 p2 p3                              sees ->   .  p0 p1 p2 | p3 a0 a1 | p3 b0 .
    completions a0 a1 a2 and b0 b1                       p1   .  x  x  .  | .  .  .  | .  .  .
                                                         p2   .  x  x  x  | .  .  .  | .  .  .
    ids      .  p0 p1 p2 | p3 a0 a1 | p3 b0 .       -> a p3   .  x  x  x  | x  .  .  | .  .  .
    position 0  0  1  2  | 3  4  5  | 3  4  0            a0   .  x  x  x  | x  x  .  | .  .  .
    label                | a0 a1 a2 | b0 b1 .            a1   .  x  x  x  | x  x  x  | .  .  .
                                                    -> b p3   .  x  x  x  | .  .  .  | x  .  .
                                                         b0   .  x  x  x  | .  .  .  | x  x  .

Decoding keeps the same picture in the cache: one buffer row per prompt, `[prompt | columns]`, and a flat list of live
branches, each a new token with the columns that it sees (`sees [N, C]`, N branches over all rows, C columns):

    ids [N]  row   sees                  - a finished branch leaves the list and costs nothing from then on;
    a2       0     x x x x . x . x .     - a column that no branch of its row sees any more is free, and used again;
    b1       0     x x x x x . . . .     - a beam that is continued twice is `sees[parent]`, twice: the mask forks and
    c4       1     x x . x x x x . .       the cache is not copied.

All of the model but the attention runs on those N tokens alone (`[1, N]`, no padding between rows of different
lengths); `branch_attention` arranges the queries by row, in front of the row's keys. What all prompts begin with, the
instruction, is computed once and stands in every row.

Sampling (`cebs.sampling`) and beam search (`cebs.beams`) choose a branch's next token among all tokens or, over a
catalogue, among the edges of its token trie (`cebs.trie`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import commonprefix  # of any sequences
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import selective_log_softmax

from cebs.trie import TokenTrie, children

if TYPE_CHECKING:
    from cebs.choices import CatalogueChoices

# ---------------------------------------------------------------------------------------------------------------------
# Training: log-probs of several completions of one prompt
# ---------------------------------------------------------------------------------------------------------------------


def shared_rows(
    prompts: list[list[int]],
    branches: list[list[list[int]]],
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """
    Lay out B records as rows `[padding | prompt | branch | branch ... | padding]`; see the drawing above.

    Args:
        prompts (`list[list[int]]`): B prompts, at least one token each.
        branches (`list[list[list[int]]]`): the completions of each prompt, at least one token each. Their number may
            differ from record to record.
        pad_token_id (`int`): fills up; never seen by another token.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the additive attention mask: the model's.

    Returns:
        `dict[str, Tensor]`: `input_ids` and `position_ids` `[B, L]`, `attention_mask` `[B, 1, L, L]` (0 or -inf),
        and for the last S columns, where the branches are: `labels` `[B, S]` (the token predicted there, -100 at
        padding) and `branch_ids` `[B, S]` (K at padding); `branch_lengths` `[B, K]`, in tokens, 0 beyond a record's
        own branches. K is the greatest number of branches.

    Raises:
        ValueError: a prompt or a completion has no tokens.
    """
    for i, (prompt, completions) in enumerate(zip(prompts, branches, strict=True)):
        if not prompt or not all(completions):
            raise ValueError(f"record {i}: a {'completion' if prompt else 'prompt'} without tokens")

    batch, most = len(prompts), max(map(len, branches))
    prefix_width = max(map(len, prompts)) - 1
    width = prefix_width + max(sum(map(len, completions)) for completions in branches)

    input_ids = torch.full((batch, width), pad_token_id)
    position_ids = torch.zeros(batch, width, dtype=torch.long)
    labels = torch.full((batch, width), -100)
    # The branch that a column belongs to; the prompt is -1 and padding is `most`.
    branch_ids = torch.full((batch, width), most)
    branch_lengths = torch.zeros(batch, most, dtype=torch.long)
    for i, (prompt, completions) in enumerate(zip(prompts, branches, strict=True)):
        last = len(prompt) - 1
        span = slice(prefix_width - last, prefix_width)
        input_ids[i, span] = torch.tensor(prompt[:-1], dtype=torch.long)
        position_ids[i, span] = torch.arange(last)
        branch_ids[i, span] = -1
        for k, completion in enumerate(completions):
            span = slice(span.stop, span.stop + len(completion))
            input_ids[i, span] = torch.tensor(prompt[-1:] + completion[:-1])
            position_ids[i, span] = torch.arange(last, last + len(completion))
            labels[i, span] = torch.tensor(completion)
            branch_ids[i, span] = k
            branch_lengths[i, k] = len(completion)

    query, key = branch_ids[:, :, None], branch_ids[:, None, :]  # [B, L, 1], [B, 1, L]
    sees = ((key == -1) | (key == query)) & torch.ones(width, width, dtype=torch.bool).tril()  # [B, L, L]
    return {
        "input_ids": input_ids,
        "attention_mask": _additive(sees, dtype)[:, None],
        "position_ids": position_ids,
        "labels": labels[:, prefix_width:].contiguous(),
        "branch_ids": branch_ids[:, prefix_width:].contiguous(),
        "branch_lengths": branch_lengths,
    }


def branch_log_probs(
    model: torch.nn.Module, rows: dict[str, Tensor], choices: "CatalogueChoices | None" = None
) -> Tensor:
    """
    Log-probability of each completion given its prompt, in nats, summed over tokens; differentiable.

    Args:
        model: a causal language model, possibly inside a `PeftModel` or `DistributedDataParallel`.
        rows (`dict[str, Tensor]`): from [`shared_rows`], on the model's device.
        choices (`CatalogueChoices`, *optional*): takes tokens among those that the catalogue goes on with, instead of
            among all; `rows` then has the `edges` `[B, S]` that they take.

    Returns:
        `Tensor`, `[B, K]`: float32; 0 where a record has fewer than K branches.
    """
    log_probs = token_log_probs(model, rows, choices)  # [B, S]
    batch, most = rows["branch_lengths"].shape
    sums = log_probs.new_zeros(batch, most + 1)  # the last one takes the padding
    return sums.scatter_add(1, rows["branch_ids"], log_probs)[:, :most]


def token_log_probs(
    model: torch.nn.Module, rows: dict[str, Tensor], choices: "CatalogueChoices | None" = None
) -> Tensor:
    """Log-probability `[B, S]` of each token in `rows["labels"]`, in nats, float32; any number at padding."""
    logits = model(
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        position_ids=rows["position_ids"],
        logits_to_keep=rows["labels"].shape[1],
        use_cache=False,
    ).logits  # [B, S, V]
    if choices is not None:
        return choices.log_probs(logits, rows["edges"])
    # Not `cross_entropy`: its float32 sum over a large vocabulary is off by some 2e-5 per token on a CPU.
    return selective_log_softmax(logits.float(), rows["labels"].clamp(min=0))


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, float("-inf"))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one forward pass over the live branches of all rows
# ---------------------------------------------------------------------------------------------------------------------


class NotFiniteError(ArithmeticError):
    """The logits after a prompt or one of its branches are NaN or infinite: nothing can be chosen by them.

    Args:
        prompt (`int`): which of the prompts, from 0.
    """

    def __init__(self, prompt: int):
        super().__init__(f"prompt {prompt}: the logits are not finite numbers")
        self.prompt = prompt


class Place(NamedTuple):
    """Where N tokens go in a [`BranchCache`] and which rows' keys their queries meet."""

    row: Tensor  # [N] buffer row that holds the token's key and value
    column: Tensor  # [N] and the column
    keys_of: Tensor | slice  # buffer rows that are read, R of them
    query_row: Tensor  # [N] the query's row among those R
    slot: Tensor  # [N] and its number in that row, below W
    mask: Tensor  # [R, W, C] additive


class BranchCache(Cache):
    """Keys and values `[rows, heads, columns, head size]` of every layer, written in place where a [`Place`] says."""

    def __init__(self, rows: int, columns: int):
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.buffers: list[list[Tensor]] = []  # per layer: keys, values
        self.place: Place | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if len(self.buffers) == layer_idx:
            # Zeros, not empty: a masked column counts for nothing only if it is finite.
            shape = (self.rows, keys.shape[1], self.columns)
            self.buffers.append([x.new_zeros(*shape, x.shape[-1]) for x in (keys, values)])
        place, width = self.place, self.place.mask.shape[-1]
        for buffer, new in zip(self.buffers[layer_idx], (keys, values), strict=True):
            buffer[place.row, :, place.column] = new[0].transpose(0, 1)  # [N, heads, head size]
        return tuple(buffer[place.keys_of, :, :width] for buffer in self.buffers[layer_idx])

    def tensors(self) -> list[Tensor]:
        return [buffer for layer in self.buffers for buffer in layer]

    def keep_rows(self, rows: int) -> None:
        """Forget all rows but the first; their memory goes with the next `widen`."""
        self.rows = rows
        for layer in self.buffers:
            layer[:] = [buffer[:rows] for buffer in layer]

    def widen(self, columns: int) -> None:
        """Add columns to every row."""
        self.columns += columns
        for layer in self.buffers:  # one by one: never twice the whole cache
            layer[:] = [F.pad(buffer, (0, 0, 0, columns)) for buffer in layer]


def branch_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    place: Place | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """
    An attention function for transformers' `AttentionInterface`: queries `[1, heads, N, D]` of N branches against the
    keys and values `[R, key heads, C, D]` of their rows, as [`BranchCache`] returns them. Without a `place` it is SDPA.

    Returns:
        `tuple[Tensor, None]`: `[1, N, heads, D]`.

    Raises:
        ValueError: the model's attention is not plain: it caps scores, has sinks, or a window shorter than the row.
    """
    if place is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window") or key.shape[2]
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or key.shape[2] > window:
        raise ValueError(
            f"{type(module).__name__}: score capping, sinks or a sliding window below {key.shape[2]} tokens"
        )
    rows, slots, _ = place.mask.shape
    key_heads, size = key.shape[1], query.shape[-1]
    # Query heads that share a key head become further queries of it, so that no key is repeated.
    group = query.shape[1] // key_heads
    arranged = query.new_zeros(rows, slots, key_heads, group, size)
    arranged[place.query_row, place.slot] = query[0].transpose(0, 1).unflatten(1, (key_heads, group))
    arranged = arranged.permute(0, 2, 3, 1, 4).reshape(rows, key_heads, group * slots, size)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:  # there the plain way takes half of SDPA's time
        scores = (arranged * (scaling or size**-0.5)) @ key.transpose(2, 3)  # [R, key heads, group * W, C]
        scores.unflatten(2, (group, slots)).add_(place.mask[:, None, None])
        out = scores.softmax(-1) @ value
    else:
        mask = place.mask.repeat(1, group, 1)[:, None]  # [R, 1, group * W, C]
        out = F.scaled_dot_product_attention(arranged, key, value, attn_mask=mask, scale=scaling)
    out = out.unflatten(2, (group, slots)).permute(0, 3, 1, 2, 4)  # [R, W, key heads, group, D]
    return out[place.query_row, place.slot].flatten(1, 2)[None], None


AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)


@contextmanager
def branching(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and [`branch_attention`] while decoding, and everything as it was afterwards."""
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("branches")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(was_training)


def _forward(model: PreTrainedModel, cache: BranchCache, ids: Tensor, positions: Tensor, place: Place, keep: Tensor):
    """One pass over `ids` and `positions` `[N]`; logits `[len(keep), V]` at the indices `keep`."""
    cache.place = place
    return model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=place.mask[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
        place=place,
    ).logits[0]


def prefill(
    model: PreTrainedModel, cache: BranchCache, prompts: list[list[int]], rows: list[int], begun: int = 0
) -> Tensor:
    """
    Put each prompt into the first columns of its buffer row, where its first `begun` tokens are already.

    Returns:
        `Tensor`, `[R, V]`: the logits after each prompt's last token.
    """
    lengths = torch.tensor([len(prompt) - begun for prompt in prompts], device=model.device)
    width = int(lengths.max())
    query_row, slot = (torch.arange(width, device=model.device) < lengths[:, None]).nonzero().unbind(1)  # [N] each
    causal = torch.ones(1, width, begun + width, dtype=torch.bool, device=model.device).tril(begun)
    ids = torch.tensor([token for prompt in prompts for token in prompt[begun:]], device=model.device)
    rows = torch.tensor(rows, device=model.device)
    mask = _additive(causal, model.dtype).expand(len(prompts), -1, -1)
    place = Place(rows[query_row], begun + slot, rows, query_row, slot, mask)
    return _forward(model, cache, ids, begun + slot, place, keep=lengths.cumsum(0) - 1)


def begin_rows(model: PreTrainedModel, cache: BranchCache, prompts: list[list[int]]) -> int:
    """Put what all prompts begin with into every row, computed once; a prompt's columns are never written again.

    Returns:
        `int`: its number of tokens, less than the shortest prompt has; 0 for a single prompt.
    """
    if len(prompts) < 2:
        return 0
    begun = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    if begun:
        prefill(model, cache, [prompts[0][:begun]], [0])
        for buffer in cache.tensors():
            buffer[1:, :, :begun] = buffer[0, :, :begun]
    return begun


def advance(
    model: PreTrainedModel, cache: BranchCache, ids: Tensor, positions: Tensor, row: Tensor, sees: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Put one more token on each of N branches.

    Args:
        ids, positions, row (`Tensor`, `[N]`): the token, its position id, and the buffer row of its prompt.
        sees (`Tensor` of bool, `[N, C]`): the columns that the token sees, without its own.

    Returns:
        `tuple[Tensor, Tensor]`: logits `[N, V]`, and `sees` with each token's own column, a free one of its row, added
        (`[N, C']` with C' > C where the buffer had to grow).
    """
    same_row = row[:, None] == row
    slot = same_row.tril(-1).sum(1)  # [N] branches of the same row before this one
    rows, slots = int(row.max()) + 1, int(slot.max()) + 1
    used = torch.zeros(rows, cache.columns, device=row.device).index_add_(0, row, sees.float()) > 0
    if (missing := int(used.sum(1).max()) + slots - cache.columns) > 0:
        cache.widen(missing := missing + 4 * slots)  # room for the next steps too
        sees, used = F.pad(sees, (0, missing)), F.pad(used, (0, missing))
    column = used.int().argsort(dim=1, stable=True)[row, slot]  # [N] each row's free columns, from the left
    sees = sees.clone().scatter_(1, column[:, None], True)

    mask = torch.ones(rows, slots, cache.columns, dtype=torch.bool, device=row.device)  # empty slots see all: no NaN
    mask[row, slot] = sees
    place = Place(row, column, slice(0, rows), row, slot, _additive(mask, model.dtype))
    return _forward(model, cache, ids, positions, place, keep=torch.arange(len(ids), device=row.device)), sees


# ---------------------------------------------------------------------------------------------------------------------
# Where a branch may go: any token, or the edges of a catalogue's trie
# ---------------------------------------------------------------------------------------------------------------------

# A choice is a token, or with a trie the node that its edge leads to: one number says all that a branch needs to go on.

LOGITS_AT_ONCE = 64  # branches: 12 MB in float32 with 49,152 tokens


def token_of(trie: TokenTrie | None, choice: Tensor) -> Tensor:
    """Returns the token of each choice, in its shape."""
    return choice if trie is None else trie.tokens[choice].long().clamp_(min=0)  # -1 at the root, which fills up tables


def log_normalizer(logits: Tensor) -> Tensor:
    """Log of the summed exponentials of logits `[N, V]`: `[N, 1]`, float32."""
    # Some at a time: what is computed on the way stays in the processor's cache, and little memory is needed for it.
    return torch.cat([part.float().logsumexp(-1, keepdim=True) for part in logits.split(LOGITS_AT_ONCE)])


def edge_logits(trie: TokenTrie, logits: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    """
    Logits of the edges out of each of N nodes.

    Args:
        logits (`Tensor`, `[N, V]`): after the branches that stand at `node` `[N]`.

    Returns:
        `tuple[Tensor, Tensor]`, `[N, M]`, M the most edges of a node: logits (float32; -inf where a node has fewer
        edges) and the nodes that the edges lead to (0 there).
    """
    child = children(trie, node)
    return logits.gather(1, token_of(trie, child)).float().masked_fill(child == 0, float("-inf")), child


def edge_log_probs(trie: TokenTrie, logits: Tensor, node: Tensor, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the edges out of each node: among all tokens, or with `renormalize` among those edges.

    The rest is as in [`edge_logits`].
    """
    found, child = edge_logits(trie, logits, node)
    return found.log_softmax(1) if renormalize else found - log_normalizer(logits), child
