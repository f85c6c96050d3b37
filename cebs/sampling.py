"""Sampling through the engine (`cebs.branches`): rounds of branches for each prompt until one is accepted."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cebs.branches import (
    BranchCache,
    NotFiniteError,
    advance,
    begin_rows,
    branching,
    edge_log_probs,
    log_normalizer,
    prefill,
    token_of,
)
from cebs.trie import TokenTrie

PREFILL_ROWS = 16  # prompts in one pass: enough to keep the matrix units busy, few enough to keep the activations small


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


class _Live(NamedTuple):
    """The N branches that have not ended."""

    row: Tensor  # [N] buffer row of the prompt
    number: Tensor  # [N] among the prompt's branches
    choice: Tensor  # [N] the newest
    position: Tensor  # [N] and its position id
    quoted: Tensor  # [N] tokens with a quote so far
    sees: Tensor  # [N, C] columns

    def keep(self, which: Tensor) -> "_Live":
        return _Live(*(x[which] for x in self))


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
    renormalize: bool = False,
    max_new_tokens: int,
    stop_token_ids: Tensor,
    quote_token_ids: Tensor | None = None,
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
        renormalize (`bool`): with a trie, the log-probabilities that are returned are among its completions.
        max_new_tokens (`int`): a branch of this length ends.
        stop_token_ids (`Tensor`, `[num_stop]`): a branch without a trie ends when it emits one; it is included in the
            branch.
        quote_token_ids (`Tensor`, `[num_quotes]`, *optional*): a branch without a trie also ends with the first token
            after the second one of these. Its title stands between the two, and a model that goes on to list further
            titles would hold everything up.
        rows (`int`): prompts decoded side by side; memory grows with it.

    Yields:
        `tuple[int, list[list[int]], list[float]]`: a prompt's index, all its branches in the order sampled, and the
        log-probability of each under the model (in nats, at temperature 1, over the whole vocabulary unless
        `renormalize`), as prompts finish.

    Raises:
        `NotFiniteError`: naming the prompt whose logits are NaN or infinite.
    """
    device, stop = model.device, stop_token_ids.to(model.device)
    quotes = stop[:0] if quote_token_ids is None else quote_token_ids.to(device)
    trie = trie and trie.to(device)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True))  # like lengths together
    active: list[_Sampled] = []  # active[r] is in buffer row r
    cache = BranchCache(min(rows, len(prompts)), max(map(len, prompts), default=0))
    noise = torch.empty(cache.rows, max_branches, max_new_tokens, device=device)

    nothing = torch.empty(0, dtype=torch.long, device=device)
    live = _Live(*[nothing] * 5, torch.empty(0, cache.columns, dtype=torch.bool, device=device))
    accepted = refused = 0  # rounds of all prompts

    def emit(new: _Live, log_probs: Tensor, step: Tensor) -> _Live:
        """Append the newest token to each branch; those that go on."""
        ids = token_of(trie, new.choice)
        if trie is None:
            ended = torch.isin(ids, stop) | (new.quoted >= 2)
        else:
            ended = trie.offsets[new.choice] == trie.offsets[new.choice + 1]
        goes_on = ~ended & (step + 1 < max_new_tokens)
        emitted = torch.stack([new.row, new.number, ids, goes_on], 1)
        for (r, n, token, more), log_prob in zip(emitted.tolist(), log_probs.tolist(), strict=True):
            if not math.isfinite(log_prob):  # a single bad logit makes all log-probs of its branch bad
                raise NotFiniteError(active[r].index)
            active[r].branches[n].append(token)
            active[r].log_probs[n] += log_prob
            active[r].open[n // num_branches] -= 1 - more
        return new._replace(quoted=new.quoted + torch.isin(ids, quotes)).keep(goes_on)

    with branching(model):
        begun = begin_rows(model, cache, prompts)
        while waiting or active:
            while waiting and len(active) < rows:
                fresh = [waiting.popleft() for _ in range(min(PREFILL_ROWS, rows - len(active), len(waiting)))]
                new_rows = list(range(len(active), len(active) + len(fresh)))
                logits = prefill(model, cache, [prompts[i] for i in fresh], new_rows, begun)
                root = torch.zeros(len(fresh), dtype=torch.long, device=device)
                first = _likeliest(trie, logits, root, top_k, renormalize)
                for i, *likeliest in zip(fresh, *first, strict=True):
                    generator = torch.Generator().manual_seed(seeds[i])
                    noise[len(active)] = torch.rand(max_branches, max_new_tokens, generator=generator)
                    active.append(_Sampled(i, len(prompts[i]), tuple(likeliest), [], [], []))

            # Another round, the first one included, for each prompt without a live branch. When no prompt is left to
            # fill up with and most rounds are refused, the next begin early: small steps cost little less than large.
            starts: list[tuple[int, int, int]] = []  # row, number, prompt length
            for r in sorted(range(len(active)), key=lambda r: sum(active[r].open)):
                prompt, n = active[r], len(active[r].branches)
                early = not waiting and refused > accepted and len(live.row) + len(starts) < rows * num_branches
                if n < max_branches and (early or not any(prompt.open)):
                    prompt.open.append(min(num_branches, max_branches - n))
                    prompt.branches += [[] for _ in range(prompt.open[-1])]
                    prompt.log_probs += [0.0] * prompt.open[-1]
                    starts += [(r, number, prompt.length) for number in range(n, len(prompt.branches))]
            if starts:
                r, n, length = torch.tensor(starts, device=device).unbind(1)
                first = (torch.stack(x) for x in zip(*(active[r].first for r, *_ in starts), strict=True))  # [N, k]
                chosen, log_probs = _pick(*first, temperature, noise[r, n, 0])
                prompt_columns = torch.arange(cache.columns, device=device) < length[:, None]
                zeros = torch.zeros_like(n)
                started = emit(_Live(r, n, chosen, length, zeros, prompt_columns), log_probs, step=zeros)
                live = _Live(*map(torch.cat, zip(live, started, strict=True)))

            if len(live.row):
                logits, sees = advance(model, cache, token_of(trie, live.choice), live.position, live.row, live.sees)
                position = live.position + 1
                step = position - torch.tensor([prompt.length for prompt in active], device=device)[live.row]
                likeliest = _likeliest(trie, logits, live.choice, top_k, renormalize)
                choice, log_probs = _pick(*likeliest, temperature, noise[live.row, live.number, step])
                live = emit(live._replace(choice=choice, position=position, sees=sees), log_probs, step)

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
                        live, last = live.keep(live.row != r), len(active) - 1
                        live.row[live.row == last] = r
                        for buffer in [noise, *cache.tensors()]:
                            buffer[r] = buffer[last]
                        active[r] = active[last]
                        active.pop()
                        break
            if not waiting:
                cache.keep_rows(len(active))


def _likeliest(
    trie: TokenTrie | None, logits: Tensor, node: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs and choices, `[N, k]`, of the k likeliest ways on, by token id: near ties then keep their places."""
    if trie is None:
        scores, choices = logits.topk(min(top_k, logits.shape[1]), sorted=False)
        choices, order = choices.sort(dim=-1)
        return scores.gather(-1, order).float() - log_normalizer(logits), choices
    log_probs, choices = edge_log_probs(trie, logits, node, renormalize)
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
    trie: TokenTrie | None = None,
    *,
    max_new_tokens: int,
    stop_token_ids: Tensor,
    quote_token_ids: Tensor | None = None,
    rows: int = 64,
) -> list[list[int]]:
    """
    The likeliest token, or edge, at each step, for each prompt: one branch of the one likeliest way on.

    Args: as in [`sample_until`].

    Returns:
        `list[list[int]]`: the new tokens, in the order of the prompts.
    """
    found = sample_until(
        model,
        prompts,
        trie,
        accept=lambda index, branches: True,
        seeds=[0] * len(prompts),
        num_branches=1,
        max_branches=1,
        top_k=1,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        quote_token_ids=quote_token_ids,
        rows=rows,
    )
    return [branches[0] for _, branches, _ in sorted(found)]
