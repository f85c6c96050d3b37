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
lengths); `branch_attention` arranges the queries by row, in front of the row's keys.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import selective_log_softmax

from cebs.trie import TokenTrie, children

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
    logits = model(
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        position_ids=rows["position_ids"],
        logits_to_keep=rows["labels"].shape[1],
        use_cache=False,
    ).logits  # [B, S, V]
    batch, most = rows["branch_lengths"].shape
    # Not `cross_entropy`: its float32 sum over a large vocabulary is off by some 2e-5 per token on a CPU.
    log_probs = selective_log_softmax(logits.float(), rows["labels"].clamp(min=0))  # [B, S]
    sums = log_probs.new_zeros(batch, most + 1)  # the last one takes the padding
    return sums.scatter_add(1, rows["branch_ids"], log_probs)[:, :most]


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, float("-inf"))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one forward pass over the live branches of all rows
# ---------------------------------------------------------------------------------------------------------------------


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


def prefill(model: PreTrainedModel, cache: BranchCache, prompts: list[list[int]], rows: list[int]) -> Tensor:
    """Put each prompt into the first columns of its buffer row. Returns the logits after its last token, `[R, V]`."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = int(lengths.max())
    query_row, column = (torch.arange(width, device=model.device) < lengths[:, None]).nonzero().unbind(1)  # [N] each
    causal = torch.ones(1, width, width, dtype=torch.bool, device=model.device).tril()
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    rows = torch.tensor(rows, device=model.device)
    mask = _additive(causal, model.dtype).expand(len(prompts), -1, -1)
    place = Place(rows[query_row], column, rows, query_row, column, mask)
    return _forward(model, cache, ids, column, place, keep=lengths.cumsum(0) - 1)


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
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

PREFILL_ROWS = 8  # prompts in one pass: enough to keep the matrix units busy, few enough to keep the activations small


@dataclass
class _Sampled:
    """A prompt in the buffer, and its branches so far, in rounds of `num_branches`."""

    index: int
    length: int
    branches: list[list[int]]
    open: list[int]  # per round, branches that have not ended
    judged: int = 0  # rounds that `accept` has refused


@torch.no_grad()
def sample_until(
    model: PreTrainedModel,
    prompts: list[list[int]],
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
) -> Iterator[tuple[int, list[list[int]]]]:
    """
    Sample branches of each prompt, a round of `num_branches` at a time, until a round is accepted.

    The random number of a prompt's branch and step comes from the prompt's seed alone, so what is sampled does not
    depend on which prompts are decoded beside it, up to rounding.

    Args:
        model: a causal language model that uses transformers' attention interface; its dtype and device are used.
        prompts (`list[list[int]]`): token ids, at least one each.
        accept: called as `accept(i, branches)` with the newest round of prompt `i`; False asks for another round.
        seeds (`list[int]`): one per prompt.
        max_branches (`int`): no further round once a prompt has this many.
        top_k (`int`): sample from the k likeliest tokens only.
        max_new_tokens (`int`): a branch of this length ends.
        stop_token_ids (`Tensor`, `[num_stop]`): a branch ends when it emits one; it is included in the branch.
        rows (`int`): prompts decoded side by side; memory grows with it.

    Yields:
        `tuple[int, list[list[int]]]`: a prompt's index and all its branches in the order sampled, as prompts finish.
    """
    device, stop = model.device, stop_token_ids.to(model.device)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True))  # like lengths together
    active: list[_Sampled] = []  # active[r] is in buffer row r
    # Columns for titles of a usual length; longer ones widen the buffer.
    cache = BranchCache(min(rows, len(prompts)), max(map(len, prompts), default=0) + 12 * num_branches)
    noise = torch.empty(cache.rows, max_branches, max_new_tokens, device=device)
    # What may come first after each prompt is kept for its later rounds.
    first_scores = torch.empty(cache.rows, top_k, device=device)
    first_tokens = torch.empty(cache.rows, top_k, dtype=torch.long, device=device)

    # The N live branches: buffer row, number among the prompt's branches, newest token, its position, what it sees.
    row = number = ids = positions = torch.empty(0, dtype=torch.long, device=device)
    sees = torch.empty(0, cache.columns, dtype=torch.bool, device=device)

    def emit(row: Tensor, number: Tensor, ids: Tensor, step: Tensor) -> Tensor:
        """Append a token to each branch; True `[N]` where the branch goes on."""
        goes_on = ~torch.isin(ids, stop) & (step + 1 < max_new_tokens)
        for r, n, token, more in torch.stack([row, number, ids, goes_on], 1).tolist():
            active[r].branches[n].append(token)
            active[r].open[n // num_branches] -= 1 - more
        return goes_on

    with branching(model):
        while waiting or active:
            while waiting and len(active) < rows:
                fresh = [waiting.popleft() for _ in range(min(PREFILL_ROWS, rows - len(active), len(waiting)))]
                new = slice(len(active), len(active) + len(fresh))
                logits = prefill(model, cache, [prompts[i] for i in fresh], list(range(new.start, new.stop)))
                first_scores[new], first_tokens[new] = _top_tokens(logits, top_k, temperature)
                for r, i in enumerate(fresh, new.start):
                    active.append(_Sampled(i, len(prompts[i]), [], []))
                    generator = torch.Generator().manual_seed(seeds[i])
                    noise[r] = torch.rand(max_branches, max_new_tokens, generator=generator)

            # Another round, the first one included, for each prompt without a live branch. When no prompt is left to
            # fill up with, the rounds that may be needed begin early: a small step costs hardly less than a larger one.
            starts: list[tuple[int, int, int]] = []  # row, number, prompt length
            for r in sorted(range(len(active)), key=lambda r: sum(active[r].open)):
                prompt, n = active[r], len(active[r].branches)
                early = not waiting and len(ids) + len(starts) < rows * num_branches
                if n < max_branches and (early or not any(prompt.open)):
                    prompt.open.append(min(num_branches, max_branches - n))
                    prompt.branches += [[] for _ in range(prompt.open[-1])]
                    starts += [(r, number, prompt.length) for number in range(n, len(prompt.branches))]
            if starts:
                r, n, length = torch.tensor(starts, device=device).unbind(1)
                token = _pick(first_scores[r], first_tokens[r], noise[r, n, 0])
                goes_on = emit(r, n, token, torch.zeros_like(n))
                row, number, ids = (torch.cat([a, b[goes_on]]) for a, b in ((row, r), (number, n), (ids, token)))
                positions = torch.cat([positions, length[goes_on]])
                prompt_columns = torch.arange(cache.columns, device=device) < length[goes_on, None]
                sees = torch.cat([sees, prompt_columns])

            if len(ids):
                logits, sees = advance(model, cache, ids, positions, row, sees)
                step = positions + 1 - torch.tensor([prompt.length for prompt in active], device=device)[row]
                ids = _pick(*_top_tokens(logits, top_k, temperature), noise[row, number, step])
                live = emit(row, number, ids, step)
                row, number, ids, positions, sees = row[live], number[live], ids[live], positions[live] + 1, sees[live]

            for r in reversed(range(len(active))):
                prompt = active[r]
                while prompt.judged < len(prompt.open) and prompt.open[prompt.judged] == 0:
                    start, prompt.judged = prompt.judged * num_branches, prompt.judged + 1
                    end = min(start + num_branches, max_branches)
                    if accept(prompt.index, prompt.branches[start:end]) or end == max_branches:
                        yield prompt.index, prompt.branches[:end]
                        # Rounds begun early are dropped, and the last row moves into the hole.
                        live, last = row != r, len(active) - 1
                        row, number, ids, positions, sees = (x[live] for x in (row, number, ids, positions, sees))
                        row[row == last] = r
                        for buffer in [noise, first_scores, first_tokens, *cache.tensors()]:
                            buffer[r] = buffer[last]
                        active[r] = active[last]
                        active.pop()
                        break
            if not waiting:
                cache.keep_rows(len(active))


def _top_tokens(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Scores and ids of the k likeliest tokens, `[N, k]`, in the order of the ids: near ties then keep their places."""
    scores, ids = logits.float().topk(top_k, sorted=False)
    ids, order = ids.sort(dim=-1)
    return scores.gather(-1, order) / temperature, ids


def _pick(scores: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
    """Inverse-CDF sampling, `[N, k]` scores and ids and `[N]` uniform noise to `[N]` ids."""
    cdf = scores.softmax(-1).cumsum(-1)  # [N, k]
    index = (cdf <= noise[:, None] * cdf[:, -1:]).sum(-1, keepdim=True).clamp(max=cdf.shape[-1] - 1)
    return ids.gather(-1, index)[:, 0]


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
    return [branches[0] for _, branches in sorted(found)]


# ---------------------------------------------------------------------------------------------------------------------
# Beam search over a catalogue
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    prompts: list[list[int]],
    trie: TokenTrie,
    *,
    num_beams: int,
    rows: int = 8,
) -> list[tuple[Tensor, Tensor]]:
    """
    The titles of the catalogue that are likeliest after each prompt.

    A finished title takes no beam: it joins the prompt's best `num_beams` finished titles. A beam is given up as soon
    as it is below all of those, since its log-prob can only fall; a prompt is done when it has no beam left.

    Args:
        model: as in [`sample_until`].
        prompts (`list[list[int]]`): token ids, at least one each.
        trie (`TokenTrie`): of the completions.
        num_beams (`int`): beams, and titles returned, per prompt. As many as there are titles: an exhaustive search.
        rows (`int`): prompts decoded side by side.

    Returns:
        `list[tuple[Tensor, Tensor]]`: per prompt `title_ids` (int64) and `log_probs` (float32, of the whole completion,
        in nats), `[num_beams]` or fewer, best first, on the CPU.
    """
    trie = trie.to(model.device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    found: list[tuple[Tensor, Tensor]] = [None] * len(prompts)
    with branching(model):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            for i, titles, scores in zip(
                chosen, *_beams(model, [prompts[i] for i in chosen], trie, num_beams), strict=True
            ):
                found[i] = (titles[titles >= 0], scores[titles >= 0])
    return found


def _beams(model: PreTrainedModel, prompts: list[list[int]], trie: TokenTrie, num_beams: int) -> tuple[Tensor, Tensor]:
    """R prompts side by side: titles (-1 where there are fewer) and log-probs, `[R, num_beams]`, on the CPU."""
    device, batch = model.device, len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = BranchCache(batch, int(lengths.max()) + 8 * num_beams)
    pool_scores = torch.full((batch, num_beams), float("-inf"), device=device)
    pool_titles = torch.full((batch, num_beams), -1, device=device)

    # One beam per prompt to begin with: N beams, each a node of the trie.
    logits = prefill(model, cache, prompts, list(range(batch)))
    row, positions = torch.arange(batch, device=device), lengths - 1
    node, scores = torch.zeros_like(row), torch.zeros(batch, device=device)
    sees = torch.arange(cache.columns, device=device) < lengths[:, None]
    while True:
        scores, parent, child = continuations(trie, logits, row, node, scores, batch)  # [R, M] each
        title = trie.titles[child].long()
        finished = scores.masked_fill(title < 0, float("-inf"))
        pool_scores, best = torch.cat([pool_scores, finished], 1).topk(num_beams)
        pool_titles = torch.cat([pool_titles, title], 1).gather(1, best)

        leaf = trie.offsets[child + 1] == trie.offsets[child]
        scores, best = scores.masked_fill(leaf, float("-inf")).topk(min(num_beams, scores.shape[1]))
        row, rank = (scores > pool_scores[:, -1:]).nonzero().unbind(1)  # a beam below the whole pool cannot win
        if len(row) == 0:
            pool_titles[pool_scores == float("-inf")] = -1
            return pool_titles.cpu(), pool_scores.cpu()
        scores, best = scores[row, rank], best[row, rank]  # [N]
        parent, node = parent[row, best], child[row, best]
        positions, sees = positions[parent] + 1, sees[parent]
        logits, sees = advance(model, cache, trie.tokens[node].long(), positions, row, sees)


def continuations(
    trie: TokenTrie, logits: Tensor, row: Tensor, node: Tensor, scores: Tensor, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Everything that the beams of a step may go on to, as one table per prompt.

    Args:
        trie (`TokenTrie`): on the beams' device.
        logits (`Tensor`, `[N, V]`): after each of the N beams.
        row (`Tensor`, `[N]`): each beam's prompt, ascending, below `batch`.
        node (`Tensor`, `[N]`): each beam's place in the trie.
        scores (`Tensor`, `[N]`): each beam's log-prob.
        batch (`int`): the number of prompts, R.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`, `[R, M]` M the most edges of a prompt: log-prob of the continued beam
        (-inf where a prompt has fewer edges), the beam it continues, and the node that it reaches.
    """
    parent, child = children(trie, node)  # [E]
    logits = logits.float()
    log_probs = logits[parent, trie.tokens[child].long()] - logits.logsumexp(-1)[parent]
    # Beams are in row order, so a row's edges lie together; its table row is those, then padding.
    edges = torch.bincount(row[parent], minlength=batch)  # [R]
    column = torch.arange(int(edges.max()), device=row.device)  # [M]
    edge = (edges.cumsum(0) - edges)[:, None] + column  # [R, M]
    absent = column >= edges[:, None]
    edge.masked_fill_(absent, 0)
    return (scores[parent] + log_probs)[edge].masked_fill_(absent, float("-inf")), parent[edge], child[edge]
