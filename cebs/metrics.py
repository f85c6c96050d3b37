"""The figures of the evaluation protocol of SPRec (https://arxiv.org/abs/2412.09243), which grounds as BIGRec does
(https://arxiv.org/abs/2308.08434).

Pure functions over arrays of title ids. In the shapes, N is the number of test records, K the depth of the rankings,
M the number of titles in the catalogue and G the number of genres counted. What a user got (`hit_ranks`, `hits_at`,
`ndcg_at`) stays apart from what the set of recommendations looks like (all that starts from `recommendation_counts`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

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
}
METRICS_AT_K = tuple(name for name in HIGHER_IS_BETTER if name != "NotInRatio")
NOT_IN_CATALOGUE = -1
MOST_RECOMMENDED = 3  # ORRatio: the share that so many titles take


# ---------------------------------------------------------------------------------------------------------------------
# What each user got
# ---------------------------------------------------------------------------------------------------------------------


def hit_ranks(ranked: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the place of each user's target in the ranking, from 0; -1 where it is not in it.

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
    """Returns which users found their target among the first k: `[N]` of bool, from the `[N]` of `hit_ranks`."""
    return (ranks >= 0) & (ranks < k)


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Returns each user's NDCG@k, which for one target is ln 2 / ln(rank + 2): `[N]`, from the `[N]` of `hit_ranks`."""
    return np.where(hits_at(ranks, k), np.log(2) / np.log(np.maximum(ranks, 0) + 2), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is recommended
# ---------------------------------------------------------------------------------------------------------------------


def recommendation_counts(ranked: np.ndarray, num_titles: int) -> np.ndarray:
    """Returns how often each title is recommended: `[M]`, from the ids `[N, k]`."""
    return np.bincount(ranked.ravel(), minlength=num_titles)


def over_recommendation(counts: np.ndarray, most: int = MOST_RECOMMENDED) -> float:
    """Returns the share of all recommendations (`counts`, `[M]`) that the most recommended titles take (ORRatio)."""
    return _ratio(np.sort(counts)[-most:].sum(), counts.sum())


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
    """Returns the share of each genre over titles counted `[M]` with weights `[M, G]`: `[G]`, NaN where none counts."""
    totals = counts @ weights
    return totals / totals.sum() if totals.sum() else np.full(len(totals), np.nan)


def genre_unfairness(recommended: np.ndarray, history: np.ndarray) -> tuple[float, float]:
    """Returns DGU and MGU, how far the genres of the recommendations are from those of the histories (SPRec).

    Args:
        recommended (`np.ndarray` of shape `[G]`): genre shares P over the recommendations.
        history (`np.ndarray` of shape `[G]`): genre shares H over the histories.

    Returns:
        `tuple[float, float]`: max(P - H) - min(P - H), and the mean of |P - H|.
    """
    difference = recommended - history
    return float(difference.max() - difference.min()), float(np.abs(difference).mean())


# ---------------------------------------------------------------------------------------------------------------------
# All figures of a method
# ---------------------------------------------------------------------------------------------------------------------


def evaluate_rankings(
    ranked: np.ndarray, targets: np.ndarray, history_counts: np.ndarray, weights: np.ndarray, topk: Iterable[int]
) -> dict[int, dict[str, float]]:
    """Returns the figures at each k.

    NDCG and HR are sums over the users whose target is in the catalogue, divided by the number of all users; the
    others look at the recommendations to those users only. Where nothing can be counted (no such user, no history at
    all) a share is NaN.

    Args:
        ranked (`np.ndarray` of shape `[N, K]`): recommended title ids, best first; K is at least the largest k, or M
            where the catalogue is smaller.
        targets (`np.ndarray` of shape `[N]`): target ids, -1 for a target that is not in the catalogue.
        history_counts (`np.ndarray` of shape `[M]`): how often each title occurs in the histories of all users.
        weights (`np.ndarray` of shape `[M, G]`): see `genre_weights`.
        topk: the values of k.

    Returns:
        `dict[int, dict[str, float]]`: for each k, `users` and the metrics of `METRICS_AT_K`.
    """
    ranks = hit_ranks(ranked, targets)
    judged = ranked[targets != NOT_IN_CATALOGUE]
    history = genre_shares(history_counts, weights)
    figures = {}
    for k in topk:
        counts = recommendation_counts(judged[:, :k], len(weights))
        diversity = int(np.count_nonzero(counts))
        dgu, mgu = genre_unfairness(genre_shares(counts, weights), history)
        figures[k] = {
            "users": len(targets),
            "NDCG": _ratio(ndcg_at(ranks, k).sum(), len(targets)),
            "HR": _ratio(hits_at(ranks, k).sum(), len(targets)),
            "Diversity": diversity,
            "DivRatio": _ratio(diversity, len(judged) * k),
            "DGU": dgu,
            "MGU": mgu,
            "ORRatio": over_recommendation(counts),
        }
    return figures


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
