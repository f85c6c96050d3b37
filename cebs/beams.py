"""Beam search through the engine (`cebs.branches`): free or over a catalogue, in one group or several."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from cebs.trie import TokenTrie, best_rise


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


def trie_ways(
    trie: TokenTrie, edge_bias: Tensor, rise: Tensor, logits: Tensor, node: Tensor, renormalize: bool = False
) -> Ways:
    """The edges out of each beam's node; `renormalize` has a beam's edges share the whole probability."""
    log_probs, child = edge_log_probs(trie, logits, node, renormalize)
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
    renormalize: bool = False,
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
        model: as in [`cebs.sampling.sample_until`].
        prompts (`list[list[int]]`): token ids, at least one each.
        trie (`TokenTrie`, *optional*): of the completions of a catalogue; left out, beams are free.
        num_beams (`int`): beams, and branches returned, per prompt. As many as the trie has titles: an exhaustive
            search.
        num_beam_groups (`int`): groups; a divisor of `num_beams`.
        edge_bias (`Tensor`, `[num_nodes]`, *optional*): added to the score with the trie's edge to each node.
        renormalize (`bool`): of each edge counts the probability among the edges out of its node, instead of among all
            tokens: a title is then not marked down for tokens that the catalogue leaves no choice of. No completion may
            be the beginning of another.
        max_new_tokens, stop_token_ids: of free beams, as in [`cebs.sampling.sample_until`]. Of the stop tokens, only
            the likeliest ends a beam.
        rows (`int`): prompts decoded side by side.

    Returns:
        `list[tuple[list[list[int]], list[float]]]`: per prompt, branches, `num_beams` or fewer, best score first, and
        their log-probs under the model, in nats; with `renormalize` among the completions of the trie.

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
            return trie_ways(trie, bias, rise, logits, choice, renormalize)

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
    cache = BranchCache(len(prompts), int(lengths.max()))
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
        tokens, (_, most) = token_of(trie, ways.choice), ways.choice.shape
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
