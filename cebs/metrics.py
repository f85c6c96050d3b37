"""The figures of the evaluation protocol of SPRec (https://arxiv.org/abs/2412.09243), which grounds as BIGRec does
(https://arxiv.org/abs/2308.08434), and what the method is about beyond it: the tail.

Pure functions over arrays of title ids. In the shapes, N is the number of test records, K the depth of the rankings,
M the number of titles in the catalogue, G the number of genres counted and B a number of weightings of the records.
What a record got (`hit_ranks`, `hits_at`, `ndcg_at`) stays apart from what the set of recommendations looks like
(all that starts from `recommendation_counts`). `RecordSums` holds what each record adds to every figure, so that the
figures can be had for any weighting of the records: all once is the evaluation, other weights are a bootstrap's
resamples (`cebs.statistics`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

EXPOSURE_GROUPS = ("head", "middle", "tail")  # of targets, by how often their titles occur in training

# Which way is better, in the order of the columns
HIGHER_IS_BETTER = {
    "NDCG": True,
    "HR": True,
    "Diversity": True,
    "DivRatio": True,
    "DGU": False,
    "MGU": False,
    "ORRatio": False,
    "NotInRatio": False,
    "Coverage": True,
    "Gini": False,
    **{f"{metric}_{group}": True for group in EXPOSURE_GROUPS for metric in ("NDCG", "HR")},
}
METRICS_AT_K = ("NDCG", "HR", "Diversity", "DivRatio", "DGU", "MGU", "ORRatio")  # SPRec's
TAIL_METRICS_AT_K = ("Coverage", "Gini", *(name for name in HIGHER_IS_BETTER if name.endswith(EXPOSURE_GROUPS)))
SET_METRICS = ("Diversity", "DivRatio", "DGU", "MGU", "ORRatio", "Gini")  # no sums over records
OF_JUDGED = ("NDCG", "HR", "Diversity")  # and those by group: they are sums, where the others are shares
NOT_IN_CATALOGUE = -1
NOTHING = -1  # in a ranking that has run out of titles
MOST_RECOMMENDED = 3  # ORRatio: the share that so many titles take
MOST_EXPOSED = 5  # Coverage: one title in so many is not of the long tail
OUTER_GROUP = 5  # head and tail have one part in so many of all exposure each


# ---------------------------------------------------------------------------------------------------------------------
# What each record got
# ---------------------------------------------------------------------------------------------------------------------


def hit_ranks(ranked: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the place of each record's target in the ranking, from 0; -1 where it is not in it.

    Args:
        ranked (`np.ndarray` of shape `[N, K]`): recommended title ids, best first.
        targets (`np.ndarray` of shape `[N]`): target ids, -1 for a target that is not in the catalogue.

    Returns:
        `np.ndarray` of shape `[N]`.

    ```python
    >>> hit_ranks(np.array([[7, 3, 5], [7, 3, 5]]), np.array([5, 9]))
    array([ 2, -1])
    ```
    """
    if ranked.shape[1] == 0:
        return np.full(len(ranked), -1)
    matches = (ranked == targets[:, None]) & (targets[:, None] != NOT_IN_CATALOGUE)  # [N, K]
    return np.where(matches.any(axis=1), matches.argmax(axis=1), -1)


def hits_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Returns which records have their target among the first k: `[N]` of bool, from the `[N]` of `hit_ranks`."""
    return (ranks >= 0) & (ranks < k)


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Returns each record's NDCG@k, ln 2 / ln(rank + 2) for one target: `[N]`, from the `[N]` of `hit_ranks`."""
    return np.where(hits_at(ranks, k), np.log(2) / np.log(np.maximum(ranks, 0) + 2), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is recommended
# ---------------------------------------------------------------------------------------------------------------------


def recommendation_counts(ranked: np.ndarray, num_titles: int) -> np.ndarray:
    """Returns how often each title is recommended: `[M]`, from the ids `[N, k]`."""
    return np.bincount(ranked[ranked != NOTHING], minlength=num_titles)


def over_recommendation(counts: np.ndarray, most: int = MOST_RECOMMENDED) -> np.ndarray:
    """Returns the share of all recommendations that the most recommended titles take (ORRatio): `[...]`.

    Args:
        counts (`np.ndarray` of shape `[..., M]`): how often each title is recommended.
        most (`int`): how many titles.
    """
    return _ratio(np.sort(counts, axis=-1)[..., -most:].sum(axis=-1), counts.sum(axis=-1))


def gini(counts: np.ndarray, num_titles: int) -> np.ndarray:
    """Returns the Gini coefficient of the recommendations over the catalogue: `[...]`.

    G = sum over i of (2i - M - 1) x_i / (M sum x), with the titles in ascending order of their counts x, i from 1:
    0 where all M titles are recommended equally often, 1 - 1/M where one title is all that is recommended.

    Args:
        counts (`np.ndarray` of shape `[..., U]`): how often titles are recommended; those left out, never.
        num_titles (`int`): M, with those left out.
    """
    order = np.arange(num_titles - counts.shape[-1] + 1, num_titles + 1)  # the titles left out come first
    return _ratio(np.sort(counts, axis=-1) @ (2.0 * order - num_titles - 1), num_titles * counts.sum(axis=-1))


def genre_weights(genres: Iterable[Sequence[str]], counted_genres: Sequence[str]) -> np.ndarray:
    """Returns the weight of each title in each genre: 1/m in each of its m genres that are counted.

    Args:
        genres: the genres of each title, in the order of the ids.
        counted_genres: the genres that DGU and MGU count.

    Returns:
        `np.ndarray` of shape `[M, G]`; a row sums to 1, or to 0 where none of the title's genres is counted.
    """
    column = {genre: place for place, genre in enumerate(counted_genres)}
    columns = [list({column[genre] for genre in titles_genres if genre in column}) for titles_genres in genres]
    weights = np.zeros((len(columns), len(column)))
    for row, places in enumerate(columns):
        weights[row, places] = 1 / max(len(places), 1)
    return weights


def genre_shares(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the share of each genre over titles counted `[..., M]` with weights `[M, G]`: `[..., G]`.

    Where no title has a genre that counts, the shares are NaN.
    """
    return _shares(counts @ weights)


def genre_unfairness(recommended: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns DGU and MGU, how far the genres of the recommendations are from those of the histories (SPRec).

    Args:
        recommended (`np.ndarray` of shape `[..., G]`): genre shares P over the recommendations.
        history (`np.ndarray` of shape `[..., G]`): genre shares H over the histories.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: max(P - H) - min(P - H), and the mean of |P - H|, of shape `[...]`.
    """
    difference = recommended - history
    return np.ptp(difference, axis=-1), np.abs(difference).mean(axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Exposure
# ---------------------------------------------------------------------------------------------------------------------


def long_tail(exposure: np.ndarray) -> np.ndarray:
    """Returns how far each title belongs to the long tail, all but the 20 % most exposed titles: `[M]`, from 0 to 1.

    The share of recommendations in it is `Coverage`, called APLT by Abdollahpouri et al.
    (https://arxiv.org/abs/1901.07555). Titles that are exposed as often as the last of the 20 % are all in it by the
    same part: half each, say, and not one or the other by the order of the catalogue.

    Args:
        exposure (`np.ndarray` of shape `[M]`): how often each title occurs in the training records.

    ```python
    >>> long_tail(np.array([9, 1, 1, 0, 0]))
    array([0., 1., 1., 1., 1.])
    >>> long_tail(np.array([5, 5, 1, 0, 0]))
    array([0.5, 0.5, 1. , 1. , 1. ])
    ```
    """
    most = len(exposure) / MOST_EXPOSED
    last = np.sort(exposure)[::-1][int(np.ceil(most)) - 1]
    tied = exposure == last
    left = most - np.count_nonzero(exposure > last)  # places among the most exposed for those that are tied
    return np.where(exposure > last, 0.0, np.where(tied, 1 - left / np.count_nonzero(tied), 1.0))


class ExposureBounds(NamedTuple):
    """From which exposure on a title is of the head, and up to which it is of the tail."""

    head: int
    tail: int


def exposure_bounds(exposure: np.ndarray) -> ExposureBounds:
    """Returns what divides titles into head, middle and tail (Abdollahpouri et al., https://arxiv.org/abs/2103.06364).

    The head is the fewest most exposed titles that have 20 % of all exposure, the tail the least exposed ones that
    have 20 % of it; titles exposed equally often are of one group.

    Args:
        exposure (`np.ndarray` of shape `[M]`): how often each title occurs in the training records.
    """
    ascending = np.sort(exposure)
    part = ascending.sum() / OUTER_GROUP
    head, tail = (
        titles[np.searchsorted(np.cumsum(titles), part)] if part else 0 for titles in (ascending[::-1], ascending)
    )
    return ExposureBounds(int(head), int(tail))


def exposure_groups(exposure: np.ndarray, bounds: ExposureBounds) -> np.ndarray:
    """Returns the place in `EXPOSURE_GROUPS` of titles exposed so often: `[...]`.

    What was never seen in training is of the tail. Where so many titles are equally exposed that head and tail meet,
    those are of the middle.
    """
    of_head, of_tail = exposure >= bounds.head, exposure <= bounds.tail
    group = np.select([of_head & ~of_tail, of_tail & ~of_head], [0, 2], default=1)
    return np.where(exposure == 0, 2, group)


# ---------------------------------------------------------------------------------------------------------------------
# All figures of a method
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationSet:
    """What the figures rest on beside the rankings.

    Args:
        targets (`np.ndarray` of shape `[N]`): target ids, -1 for a target that is not in the catalogue.
        history_genres (`np.ndarray` of shape `[N, G]`): the sum of the genre weights over each record's history.
        genre_weights (`np.ndarray` of shape `[M, G]`): see `genre_weights`.
        exposure (`np.ndarray` of shape `[M]`): how often each title occurs in training; `None` where that is not known.
        target_exposure (`np.ndarray` of shape `[N]`): the same of the targets, in the catalogue or not.
    """

    targets: np.ndarray
    history_genres: np.ndarray
    genre_weights: np.ndarray
    exposure: np.ndarray | None = None
    target_exposure: np.ndarray | None = None

    def target_groups(self) -> np.ndarray:
        """Returns the place in `EXPOSURE_GROUPS` of each record's target: `[N]`."""
        return exposure_groups(self.target_exposure, exposure_bounds(self.exposure))


@dataclass(frozen=True)
class RecordSums:
    """What each record adds to the figures at one k; U titles are recommended to someone.

    Args:
        k (`int`): the length of the lists.
        num_titles (`int`): M.
        ratios (`tuple[str, ...]`): the R figures that are a sum over records divided by another.
        above (`np.ndarray` of shape `[N, R]`): what a record adds above the line of each.
        below (`np.ndarray` of shape `[N, R]`): what it adds below.
        judged (`np.ndarray` of shape `[N]`): 1 where the target is in the catalogue. The other figures look at the
            recommendations to these records only.
        recommended (`csr_array` of shape `[N, U]`): how often each title is recommended to it, 0 or 1.
        genre_weights (`np.ndarray` of shape `[U, G]`): of the titles recommended.
        history_genres (`np.ndarray` of shape `[N, G]`): see `EvaluationSet`.
    """

    k: int
    num_titles: int
    ratios: tuple[str, ...]
    above: np.ndarray
    below: np.ndarray
    judged: np.ndarray
    recommended: csr_array
    genre_weights: np.ndarray
    history_genres: np.ndarray

    def by_user(self, users: np.ndarray) -> "RecordSums":
        """Returns the sums of each user's records, given each record's user `[N]`, numbered from 0."""
        shape = (int(users.max()) + 1, len(users))
        add = csr_array((np.ones(len(users)), (users, np.arange(len(users)))), shape=shape)
        rows = ("above", "below", "judged", "recommended", "history_genres")
        return replace(self, **{name: add @ getattr(self, name) for name in rows})

    def ratio_figures(self, weights: np.ndarray) -> np.ndarray:
        """Returns the figures named in `ratios`: `[R, B]`, from how often each record counts, `[B, N]`."""
        return _ratio((weights @ self.above).T, (weights @ self.below).T)

    def set_figures(self, weights: np.ndarray) -> np.ndarray:
        """Returns the figures named in `SET_METRICS`: `[len(SET_METRICS), B]`, from weights `[B, N]` as above."""
        counts = (self.recommended.T @ weights.T).T  # [B, U]
        diversity = np.count_nonzero(counts, axis=-1)
        history = _shares(weights @ self.history_genres)  # [B, G]
        dgu, mgu = genre_unfairness(genre_shares(counts, self.genre_weights), history)
        return np.stack(
            [
                diversity,
                _ratio(diversity, weights @ self.judged * self.k),
                dgu,
                mgu,
                over_recommendation(counts),
                gini(counts, self.num_titles),
            ]
        )

    def figures(self) -> dict[str, int | float]:
        """Returns all figures of the records as they are, in the order of the columns; NaN for what cannot be told."""
        once = np.ones((1, len(self.judged)))
        found = dict(zip(self.ratios, self.ratio_figures(once)[:, 0].tolist(), strict=True))
        found |= dict(zip(SET_METRICS, self.set_figures(once)[:, 0].tolist(), strict=True))
        found["Diversity"] = int(found["Diversity"])
        if not self.judged.any():  # nobody could be recommended what was right: 0 would say that nobody was
            found |= dict.fromkeys((name for name in found if name.startswith(OF_JUDGED)), np.nan)
        return {name: found[name] for name in HIGHER_IS_BETTER if name in found}


def record_sums(ranked: np.ndarray, is_invented: np.ndarray, evaluation_set: EvaluationSet, k: int) -> RecordSums:
    """Returns what each record adds to the figures at k.

    NDCG and HR are sums over the records whose target is in the catalogue, divided by the number of all records;
    within a group of targets (`NDCG_tail`, say) by the number of records in it, so that the groups make up the whole.
    The figures of the recommendations look at the records whose target is in the catalogue only. Where nothing can be
    counted (no such record, no history at all) a share is NaN, and `RecordSums.figures` has no accuracy either.

    Args:
        ranked (`np.ndarray` of shape `[N, K]`): recommended title ids, best first, `NOTHING` behind the last; K is at
            least k, or M where the catalogue is smaller.
        is_invented (`np.ndarray` of shape `[N]`): where the predicted title is not in the catalogue.
        evaluation_set: the records and the catalogue.
        k: how many titles are recommended.
    """
    ranked = ranked[:, :k]
    ranks, judged = hit_ranks(ranked, evaluation_set.targets), evaluation_set.targets != NOT_IN_CATALOGUE
    everyone = np.ones(len(ranked))
    accuracy = {"NDCG": ndcg_at(ranks, k), "HR": hits_at(ranks, k).astype(float)}
    is_shown = (ranked != NOTHING) & judged[:, None]  # [N, k]
    lines = {metric: (values, everyone) for metric, values in accuracy.items()}  # above and below
    lines["NotInRatio"] = (is_invented.astype(float), everyone)
    if evaluation_set.exposure is not None:
        lines["Coverage"] = ((long_tail(evaluation_set.exposure)[ranked] * is_shown).sum(axis=1), is_shown.sum(axis=1))
        groups = evaluation_set.target_groups()
        for place, group in enumerate(EXPOSURE_GROUPS):
            for metric, values in accuracy.items():
                lines[f"{metric}_{group}"] = (values * (groups == place), everyone * (groups == place))
    titles, columns = np.unique(ranked[is_shown], return_inverse=True)
    return RecordSums(
        k=k,
        num_titles=len(evaluation_set.genre_weights),
        ratios=tuple(lines),
        above=np.column_stack([above for above, _ in lines.values()]),
        below=np.column_stack([below for _, below in lines.values()]),
        judged=judged.astype(float),
        recommended=csr_array(
            (np.ones(len(columns)), (is_shown.nonzero()[0], columns)), shape=(len(ranked), len(titles))
        ),
        genre_weights=evaluation_set.genre_weights[titles],
        history_genres=evaluation_set.history_genres,
    )


def _shares(totals: np.ndarray) -> np.ndarray:
    return _ratio(totals, totals.sum(axis=-1, keepdims=True))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divides; a share of nothing is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole == 0, np.nan, part / whole)
