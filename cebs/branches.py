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

Sampling and beam search choose a branch's next token among all tokens or, over a catalogue, among the edges of its
token trie (`cebs.trie`).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import commonprefix  # of any sequences
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import selective_log_softmax

from cebs.trie import TokenTrie, best_rise, children

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


def branch_log_probs(model: torch.nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """
    Log-probability of each completion given its prompt, in nats, summed over tokens; differentiable.

    Args:
        model: a causal language model, possibly inside a `PeftModel` or `DistributedDataParallel`.
        rows (`dict[str, Tensor]`): from [`shared_rows`], on the model's device.

    Returns:
        `Tensor`, `[B, K]`: float32; 0 where a record has fewer than K branches.
    """
    log_probs = token_log_probs(model, rows)  # [B, S]
    batch, most = rows["branch_lengths"].shape
    sums = log_probs.new_zeros(batch, most + 1)  # the last one takes the padding
    return sums.scatter_add(1, rows["branch_ids"], log_probs)[:, :most]


def token_log_probs(model: torch.nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """Log-probability `[B, S]` of each token in `rows["labels"]`, in nats, float32; any number at padding."""
    logits = model(
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        position_ids=rows["position_ids"],
        logits_to_keep=rows["labels"].shape[1],
        use_cache=False,
    ).logits  # [B, S, V]
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

    width = int(torch.where(sees.any(0))[0].max()) + 1
    mask = torch.ones(rows, slots, width, dtype=torch.bool, device=row.device)  # empty slots see all: no NaN
    mask[row, slot] = sees[:, :width]
    place = Place(row, column, slice(0, rows), row, slot, _additive(mask, model.dtype))
    return _forward(model, cache, ids, positions, place, keep=torch.arange(len(ids), device=row.device)), sees


# ---------------------------------------------------------------------------------------------------------------------
# Where a branch may go: any token, or the edges of a catalogue's trie
# ---------------------------------------------------------------------------------------------------------------------

# A choice is a token, or with a trie the node that its edge leads to: one number says all that a branch needs to go on.

LOGITS_AT_ONCE = 64  # branches: 12 MB in float32 with 49,152 tokens


def _token(trie: TokenTrie | None, choice: Tensor) -> Tensor:
    return choice if trie is None else trie.tokens[choice].long().clamp_(min=0)  # -1 at the root, which fills up tables


def log_normalizer(logits: Tensor) -> Tensor:
    """Log of the summed exponentials of logits `[N, V]`: `[N, 1]`, float32."""
    # Some at a time: what is computed on the way stays in the processor's cache, and little memory is needed for it.
    return torch.cat([part.float().logsumexp(-1, keepdim=True) for part in logits.split(LOGITS_AT_ONCE)])


def edge_log_probs(trie: TokenTrie, logits: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    """
    Log-probabilities of the edges out of each of N nodes, under the whole vocabulary.

    Args:
        logits (`Tensor`, `[N, V]`): after the branches that stand at `node` `[N]`.

    Returns:
        `tuple[Tensor, Tensor]`, `[N, M]`, M the most edges of a node: log-probs (float32; -inf where a node has fewer
        edges) and the nodes that the edges lead to (0 there).
    """
    child = children(trie, node)
    log_probs = logits.gather(1, _token(trie, child)).float() - log_normalizer(logits)
    return log_probs.masked_fill_(child == 0, float("-inf")), child


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

PREFILL_ROWS = 8  # prompts in one pass: enough to keep the matrix units busy, few enough to keep the activations small


@dataclass
class _Sampled:
    """A prompt in the buffer, and its branches so far, in rounds of `num_branches`."""

    index: int
    length: int
    first: tuple[Tensor, Tensor]  # `_likeliest` after the prompt, `[k]` each, kept for later rounds
    branches: list[list[int]]
    log_probs: list[float]
    open: list[int]  # per round, branches that have not ended
    judged: int = 0  # rounds that `accept` has refused


@torch.no_grad()
def sample_until(
    model: PreTrainedModel,
    prompts: list[list[int]],
    trie: TokenTrie | None = None,
    *,
    accept: Callable[[int, list[list[int]]], bool],
    seeds: list[int],
    num_branches: int = 10,
    max_branches: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_new_tokens: int,
    stop_token_ids: Tensor,
    rows: int = 16,
) -> Iterator[tuple[int, list[list[int]], list[float]]]:
    """
    Sample branches of each prompt, a round of `num_branches` at a time, until a round is accepted.

    The random number of a prompt's branch and step comes from the prompt's seed alone, so what is sampled does not
    depend on which prompts are decoded beside it, up to rounding.

    Args:
        model: a causal language model that uses transformers' attention interface; its dtype and device are used.
        prompts (`list[list[int]]`): token ids, at least one each.
        trie (`TokenTrie`, *optional*): of the completions to sample from, none the beginning of another. A branch then
            goes along its edges, with their probabilities renormalised, and ends with a completion.
        accept: called as `accept(i, branches)` with the newest round of prompt `i`; False asks for another round.
        seeds (`list[int]`): one per prompt.
        max_branches (`int`): no further round once a prompt has this many.
        top_k (`int`): sample from the k likeliest tokens only, or edges.
        max_new_tokens (`int`): a branch of this length ends.
        stop_token_ids (`Tensor`, `[num_stop]`): a branch without a trie ends when it emits one; it is included in the
            branch.
        rows (`int`): prompts decoded side by side; memory grows with it.

    Yields:
        `tuple[int, list[list[int]], list[float]]`: a prompt's index, all its branches in the order sampled, and the
        log-probability of each under the model (in nats, at temperature 1, over the whole vocabulary), as prompts
        finish.

    Raises:
        `NotFiniteError`: naming the prompt whose logits are NaN or infinite.
    """
    device, stop = model.device, stop_token_ids.to(model.device)
    trie = trie and trie.to(device)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True))  # like lengths together
    active: list[_Sampled] = []  # active[r] is in buffer row r
    # Columns for titles of a usual length; longer ones widen the buffer.
    cache = BranchCache(min(rows, len(prompts)), max(map(len, prompts), default=0) + 12 * num_branches)
    noise = torch.empty(cache.rows, max_branches, max_new_tokens, device=device)

    # The N live branches: buffer row, number among the prompt's branches, newest choice, its position, what it sees.
    row = number = choice = positions = torch.empty(0, dtype=torch.long, device=device)
    sees = torch.empty(0, cache.columns, dtype=torch.bool, device=device)
    accepted = refused = 0  # rounds of all prompts

    def emit(row: Tensor, number: Tensor, choice: Tensor, log_probs: Tensor, step: Tensor) -> Tensor:
        """Append a token to each branch; True `[N]` where the branch goes on."""
        ids = _token(trie, choice)
        ended = torch.isin(ids, stop) if trie is None else trie.offsets[choice] == trie.offsets[choice + 1]
        goes_on = ~ended & (step + 1 < max_new_tokens)
        emitted = torch.stack([row, number, ids, goes_on], 1)
        for (r, n, token, more), log_prob in zip(emitted.tolist(), log_probs.tolist(), strict=True):
            if not math.isfinite(log_prob):  # a single bad logit makes all log-probs of its branch bad
                raise NotFiniteError(active[r].index)
            active[r].branches[n].append(token)
            active[r].log_probs[n] += log_prob
            active[r].open[n // num_branches] -= 1 - more
        return goes_on

    with branching(model):
        begun = begin_rows(model, cache, prompts)
        while waiting or active:
            while waiting and len(active) < rows:
                fresh = [waiting.popleft() for _ in range(min(PREFILL_ROWS, rows - len(active), len(waiting)))]
                new_rows = list(range(len(active), len(active) + len(fresh)))
                logits = prefill(model, cache, [prompts[i] for i in fresh], new_rows, begun)
                first = _likeliest(trie, logits, torch.zeros(len(fresh), dtype=torch.long, device=device), top_k)
                for i, *likeliest in zip(fresh, *first, strict=True):
                    generator = torch.Generator().manual_seed(seeds[i])
                    noise[len(active)] = torch.rand(max_branches, max_new_tokens, generator=generator)
                    active.append(_Sampled(i, len(prompts[i]), tuple(likeliest), [], [], []))

            # Another round, the first one included, for each prompt without a live branch. When no prompt is left to
            # fill up with and most rounds are refused, the next begin early: small steps cost little less than large.
            starts: list[tuple[int, int, int]] = []  # row, number, prompt length
            for r in sorted(range(len(active)), key=lambda r: sum(active[r].open)):
                prompt, n = active[r], len(active[r].branches)
                early = not waiting and refused > accepted and len(choice) + len(starts) < rows * num_branches
                if n < max_branches and (early or not any(prompt.open)):
                    prompt.open.append(min(num_branches, max_branches - n))
                    prompt.branches += [[] for _ in range(prompt.open[-1])]
                    prompt.log_probs += [0.0] * prompt.open[-1]
                    starts += [(r, number, prompt.length) for number in range(n, len(prompt.branches))]
            if starts:
                r, n, length = torch.tensor(starts, device=device).unbind(1)
                first = (torch.stack(x) for x in zip(*(active[r].first for r, *_ in starts), strict=True))  # [N, k]
                chosen, log_probs = _pick(*first, temperature, noise[r, n, 0])
                goes_on = emit(r, n, chosen, log_probs, torch.zeros_like(n))
                row, number, choice = (torch.cat([a, b[goes_on]]) for a, b in ((row, r), (number, n), (choice, chosen)))
                positions = torch.cat([positions, length[goes_on]])
                prompt_columns = torch.arange(cache.columns, device=device) < length[goes_on, None]
                sees = torch.cat([sees, prompt_columns])

            if len(choice):
                logits, sees = advance(model, cache, _token(trie, choice), positions, row, sees)
                step = positions + 1 - torch.tensor([prompt.length for prompt in active], device=device)[row]
                likeliest = _likeliest(trie, logits, choice, top_k)
                choice, log_probs = _pick(*likeliest, temperature, noise[row, number, step])
                live = emit(row, number, choice, log_probs, step)
                row, number, choice, sees = row[live], number[live], choice[live], sees[live]
                positions = positions[live] + 1

            for r in reversed(range(len(active))):
                prompt = active[r]
                while prompt.judged < len(prompt.open) and prompt.open[prompt.judged] == 0:
                    start, prompt.judged = prompt.judged * num_branches, prompt.judged + 1
                    end = min(start + num_branches, max_branches)
                    is_enough = accept(prompt.index, prompt.branches[start:end])
                    accepted, refused = accepted + is_enough, refused + (not is_enough)
                    if is_enough or end == max_branches:
                        yield prompt.index, prompt.branches[:end], prompt.log_probs[:end]
                        # Rounds begun early are dropped, and the last row moves into the hole.
                        live, last = row != r, len(active) - 1
                        row, number, choice, positions, sees = (x[live] for x in (row, number, choice, positions, sees))
                        row[row == last] = r
                        for buffer in [noise, *cache.tensors()]:
                            buffer[r] = buffer[last]
                        active[r] = active[last]
                        active.pop()
                        break
            if not waiting:
                cache.keep_rows(len(active))


def _likeliest(trie: TokenTrie | None, logits: Tensor, node: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probs and choices, `[N, k]`, of the k likeliest ways on, by token id: near ties then keep their places."""
    if trie is None:
        scores, choices = logits.topk(min(top_k, logits.shape[1]), sorted=False)
        choices, order = choices.sort(dim=-1)
        return scores.gather(-1, order).float() - log_normalizer(logits), choices
    log_probs, choices = edge_log_probs(trie, logits, node)
    kept = log_probs.topk(min(top_k, log_probs.shape[1]), sorted=False).indices.sort(dim=-1).values
    return log_probs.gather(-1, kept), choices.gather(-1, kept)


def _pick(log_probs: Tensor, choices: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling from `[N, k]` choices, with `[N]` uniform noise. Returns choices and log-probs, `[N]`."""
    cdf = (log_probs / temperature).softmax(-1).cumsum(-1)  # [N, k]
    index = (cdf <= noise[:, None] * cdf[:, -1:]).sum(-1, keepdim=True).clamp(max=cdf.shape[-1] - 1)
    return choices.gather(-1, index)[:, 0], log_probs.gather(-1, index)[:, 0]


def greedy(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Tensor,
    rows: int = 64,
) -> list[list[int]]:
    """
    The likeliest token at each step, for each prompt: one branch of the one likeliest token.

    Args: as in [`sample_until`].

    Returns:
        `list[list[int]]`: the new tokens, in the order of the prompts.
    """
    found = sample_until(
        model,
        prompts,
        accept=lambda index, branches: True,
        seeds=[0] * len(prompts),
        num_branches=1,
        max_branches=1,
        top_k=1,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        rows=rows,
    )
    return [branches[0] for _, branches, _ in sorted(found)]


# ---------------------------------------------------------------------------------------------------------------------
# Beam search: free or over a catalogue, in one group or several
# ---------------------------------------------------------------------------------------------------------------------


class Ways(NamedTuple):
    """The ways on from each of N beams, `[N, M]`."""

    log_probs: Tensor  # -inf where a beam has fewer than M
    bias: Tensor  # what a way adds to the score beside its log-prob
    choice: Tensor
    ends: Tensor  # bool: the branch is whole then
    rise: Tensor  # the most that the score may rise after it; -inf where nothing follows


class Finished(NamedTuple):
    """The finished branches of each of S searches, best first."""

    scores: Tensor  # [S, K], -inf where there are fewer than K
    log_probs: Tensor  # [S, K]
    tokens: Tensor  # [S, K, T], -1 after the end


def best_of(finished: Finished, k: int) -> Finished:
    scores, best = finished.scores.topk(k)
    tokens = finished.tokens.gather(1, best[..., None].expand(-1, -1, finished.tokens.shape[2]))
    return Finished(scores, finished.log_probs.gather(1, best), tokens)


def free_ways(stop: Tensor, num_beams: int, logits: Tensor, last: bool) -> Ways:
    """The likeliest stop token (others would end the same title once more), and the likeliest others."""
    ending, which = logits[:, stop].topk(min(1, len(stop)))
    going, token = logits.index_fill(1, stop, float("-inf")).topk(min(num_beams, logits.shape[1]))
    log_probs = torch.cat([ending, going], 1).float() - log_normalizer(logits)
    choice = torch.cat([stop[which], token], 1)
    ends = torch.isin(choice, stop) | last
    rise = torch.zeros_like(log_probs).masked_fill_(ends, float("-inf"))
    return Ways(log_probs, torch.zeros_like(rise), choice, ends, rise)


def trie_ways(trie: TokenTrie, edge_bias: Tensor, rise: Tensor, logits: Tensor, node: Tensor) -> Ways:
    """The edges out of each beam's node."""
    log_probs, child = edge_log_probs(trie, logits, node)
    return Ways(log_probs, edge_bias[child], child, trie.titles[child] >= 0, rise[child])


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    prompts: list[list[int]],
    trie: TokenTrie | None = None,
    *,
    num_beams: int,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    edge_bias: Tensor | None = None,
    max_new_tokens: int | None = None,
    stop_token_ids: Tensor | None = None,
    rows: int = 8,
) -> list[tuple[list[list[int]], list[float]]]:
    """
    The likeliest completions of each prompt: any, or those of a catalogue.

    A beam's score is its log-probability, plus the biases of its edges, less its diversity penalties. A finished branch
    takes no beam: it joins the best finished ones, as many as there are beams. A beam is given up as soon as it can no
    longer come above all of those; a prompt is done when it has no beam left.

    With several groups (diverse beam search, Vijayakumar et al., 2016, arXiv:1610.02424), each is a search of its own
    with its share of the beams. At each step they choose in turn, and `diversity_penalty` is taken off a token for each
    beam of an earlier group that has chosen it at this step (Hamming diversity). What an earlier group has finished,
    a later one does not finish again.

    Args:
        model: as in [`sample_until`].
        prompts (`list[list[int]]`): token ids, at least one each.
        trie (`TokenTrie`, *optional*): of the completions of a catalogue; left out, beams are free.
        num_beams (`int`): beams, and branches returned, per prompt. As many as the trie has titles: an exhaustive
            search.
        num_beam_groups (`int`): groups; a divisor of `num_beams`.
        edge_bias (`Tensor`, `[num_nodes]`, *optional*): added to the score with the trie's edge to each node.
        max_new_tokens, stop_token_ids: of free beams, as in [`sample_until`]. Of the stop tokens, only the likeliest
            ends a beam.
        rows (`int`): prompts decoded side by side.

    Returns:
        `list[tuple[list[list[int]], list[float]]]`: per prompt, branches, `num_beams` or fewer, best score first, and
        their log-probs under the model, in nats.

    Raises:
        `NotFiniteError`: naming the prompt whose logits are NaN or infinite.
    """
    if num_beams % num_beam_groups:
        raise ValueError(f"{num_beams} beams cannot be shared out evenly among {num_beam_groups} groups")
    if trie is None:
        stop = stop_token_ids.to(model.device)

        def ways_on(logits: Tensor, choice: Tensor, step: int) -> Ways:
            return free_ways(stop, num_beams, logits, last=step + 1 == max_new_tokens)
    else:
        trie = trie.to(model.device)
        bias = torch.zeros(len(trie.tokens)) if edge_bias is None else edge_bias
        bias = bias.to(model.device)
        rise = best_rise(trie, bias)

        def ways_on(logits: Tensor, choice: Tensor, step: int) -> Ways:
            return trie_ways(trie, bias, rise, logits, choice)

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    found: list[tuple[list[list[int]], list[float]]] = [None] * len(prompts)
    with branching(model):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            try:
                finished = _beams(
                    model, [prompts[i] for i in chosen], trie, ways_on, num_beams, num_beam_groups, diversity_penalty
                )
            except NotFiniteError as error:
                raise NotFiniteError(chosen[error.prompt]) from error
            for i, scores, log_probs, tokens in zip(chosen, *(x.tolist() for x in finished), strict=True):
                count = sum(score > float("-inf") for score in scores)
                found[i] = [[token for token in row if token >= 0] for row in tokens[:count]], log_probs[:count]
    return found


def _beams(
    model: PreTrainedModel,
    prompts: list[list[int]],
    trie: TokenTrie | None,
    ways_on: Callable[[Tensor, Tensor, int], Ways],
    num_beams: int,
    groups: int,
    penalty: float,
) -> Finished:
    """The best `num_beams` branches of R prompts, decoded side by side."""
    device, width = model.device, num_beams // groups
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = BranchCache(len(prompts), int(lengths.max()) + 8 * num_beams)
    # Search s is group s % groups of prompt s // groups; S searches in all, one beam each to begin with.
    begun = begin_rows(model, cache, prompts)
    logits = prefill(model, cache, prompts, list(range(len(prompts))), begun).repeat_interleave(groups, 0)  # [S, V]
    search = torch.arange(len(logits), device=device)
    num_searches, prompt = len(search), search // groups
    # The N beams: search, place among its beams, newest choice, score, log-prob, tokens, last position, what it sees.
    place = choice = torch.zeros_like(search)
    scores = log_probs = torch.zeros(num_searches, device=device)
    written = torch.empty(num_searches, 0, dtype=torch.long, device=device)
    positions = lengths[prompt] - 1
    sees = torch.arange(cache.columns, device=device) < lengths[prompt, None]
    nothing = torch.full((num_searches, width), float("-inf"), device=device)
    pool = Finished(nothing, nothing, torch.empty(num_searches, width, 0, dtype=torch.long, device=device))
    while len(search):
        ways = ways_on(logits, choice, written.shape[1])  # [N, M]
        finite = ways.log_probs.amax(1).isfinite()  # [N]: a single bad logit makes all log-probs of its beam bad
        if not finite.all():
            raise NotFiniteError(int(prompt[~finite][0]))
        tokens, (_, most) = _token(trie, ways.choice), ways.choice.shape
        totals = log_probs[:, None] + ways.log_probs

        at = by_search(search, place, num_searches, tokens)  # [S, W * M]
        reached = (scores[:, None] + ways.log_probs + ways.bias).flatten()[at].masked_fill_(at < 0, float("-inf"))
        ending = reached.masked_fill(~ways.ends.flatten()[at], float("-inf"))
        going = reached.masked_fill(ways.rise.flatten()[at] == float("-inf"), float("-inf"))
        if groups > 1:
            # Equal numbers: equal tokens so far, this one included.
            beginning = torch.cat([prompt[:, None], written], 1).unique(dim=0, return_inverse=True)[1]  # [N]
            same = (beginning[:, None] * logits.shape[1] + tokens).flatten()[at]
            same.masked_fill_(reached == float("-inf"), -1)
            by_group = [x.unflatten(0, (-1, groups)) for x in (ending, going, tokens.flatten()[at], same)]
            _choose_in_turn(*by_group, width, penalty, logits.shape[1])

        ending, best = ending.topk(min(width, ending.shape[1]))
        end = at.gather(1, best)
        branches = torch.cat([written[end // most], tokens.flatten()[end][..., None]], 2)  # [S, width, step + 1]
        longer = pool._replace(tokens=F.pad(pool.tokens, (0, 1), value=-1))
        new = Finished(ending, totals.flatten()[end], branches)
        pool = best_of(Finished(*(torch.cat(pair, 1) for pair in zip(longer, new, strict=True))), width)

        going, best = going.topk(min(width, going.shape[1]))
        at = at.gather(1, best)
        # A beam is given up that cannot rise above the worst of the finished branches.
        search, place = (going + ways.rise.flatten()[at] > pool.scores[:, -1:]).nonzero().unbind(1)
        scores, at = going[search, place], at[search, place]  # [N]
        parent, prompt = at // most, search // groups
        choice, log_probs = ways.choice.flatten()[at], totals.flatten()[at]
        written = torch.cat([written[parent], tokens.flatten()[at][:, None]], 1)
        positions, sees = positions[parent] + 1, sees[parent]
        if len(search):
            logits, sees = advance(model, cache, written[:, -1], positions, prompt, sees)

    return best_of(Finished(*(x.reshape(len(prompts), num_beams, *x.shape[2:]) for x in pool)), num_beams)


def by_search(search: Tensor, place: Tensor, num_searches: int, ways: Tensor) -> Tensor:
    """
    A line for each search: where its beams' ways lie in a flattened table of all beams' ways.

    Args:
        search, place (`Tensor`, `[N]`): each beam's search, below `num_searches` (S), and its place there, below W.
        ways (`Tensor`, `[N, M]`): any table of the ways.

    Returns:
        `Tensor` of int64, `[S, W * M]`: indices into `ways.flatten()`; -1 where a search has fewer.
    """
    at = torch.full((num_searches, int(place.max()) + 1, ways.shape[1]), -1, device=ways.device)
    at[search, place] = torch.arange(ways.numel(), device=ways.device).view_as(ways)
    return at.flatten(1)


def _choose_in_turn(
    ending: Tensor, going: Tensor, tokens: Tensor, same: Tensor, width: int, penalty: float, vocabulary: int
) -> None:
    """
    Let the groups of each prompt choose one after the other; changes `ending` and `going` in place.

    Args:
        ending, going (`Tensor`, `[R, groups, M]`): scores of the ways that end a branch, and that go on; else -inf.
        tokens, same (`Tensor`, `[R, groups, M]`): the token of each way, and a number that equal branches share.
        width (`int`): beams of a group.
    """
    chosen = going.new_zeros(len(going), vocabulary)  # how often a token has been chosen
    finished = same[:, 0, :0]
    for group in range(1, going.shape[1]):
        best = going[:, group - 1].topk(min(width, going.shape[2]))
        chosen.scatter_add_(1, tokens[:, group - 1].gather(1, best.indices), (best.values > float("-inf")).float())
        for scores in (ending, going):
            scores[:, group] -= penalty * chosen.gather(1, tokens[:, group])
        best = ending[:, group - 1].topk(min(width, ending.shape[2]))
        finished = torch.cat([finished, same[:, group - 1].gather(1, best.indices)], 1)
        ending[:, group].masked_fill_(torch.isin(same[:, group], finished), float("-inf"))
