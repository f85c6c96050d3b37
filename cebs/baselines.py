"""Recommenders without a language model: popularity, ItemKNN, the next in a series, random (SASRec: `sasrec`).

Each gives every title of the catalogue a score for each record, and `top_titles` makes rankings of the scores. In the
shapes, N is the number of records and M the number of titles in the catalogue; a title is its id.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import csr_array, diags_array

from cebs.catalogue import exposure_counts
from cebs.metrics import NOTHING
from cebs.processes import record_seed
from cebs.prompts import Record
from cebs.series import volumes

# scores of all titles, [N, M], from the histories of N records and the place of the first of them in its file
Scorer = Callable[[Sequence[Sequence[int]], int], np.ndarray]


def title_ids(titles: Iterable[str], ids: dict[str, int]) -> list[int]:
    """Returns the ids of titles, in order; titles that are not in the catalogue are left out."""
    return [ids[title] for title in titles if title in ids]


def popularity_order(records: Iterable[Record], ids: dict[str, int]) -> np.ndarray:
    """Returns all title ids, the one with the most exposure in the records first: `[M]`.

    Of titles with the same exposure the one met first comes first, and titles that were not met come last, by id.
    """
    met = title_ids((title for title, _ in exposure_counts(records).most_common()), ids)
    return np.array([*met, *sorted(set(ids.values()) - set(met))])


def top_titles(scores: np.ndarray, order: np.ndarray, excluded: Sequence[Sequence[int]], k: int) -> np.ndarray:
    """Returns the k best titles of each record.

    Args:
        scores (`np.ndarray` of shape `[N, M]`): score of each title, the greater the better.
        order (`np.ndarray` of shape `[M]`): all titles in the order that decides between equal scores.
        excluded: for each record, titles that its ranking must not hold.
        k: length of a ranking.

    Returns:
        `np.ndarray` of shape `[N, k]`: ids, best first; where fewer than k titles are left, -1 behind them.

    ```python
    >>> top_titles(np.array([[0.0, 2.0, 0.0, 1.0]]), np.array([2, 0, 1, 3]), [[1]], 2)
    array([[3, 2]])
    ```
    """
    rankings = np.full((len(scores), k), NOTHING)
    for ranking, row, left_out in zip(rankings, scores, excluded, strict=True):
        ranked = order[np.argsort(-row[order], kind="stable")]  # [M]
        best = ranked[~np.isin(ranked, left_out)][:k]
        ranking[: len(best)] = best
    return rankings


def popularity(num_titles: int) -> Scorer:
    """Returns the scorer that tells no title from another, so that `popularity_order` alone ranks them."""
    return lambda histories, start: np.zeros((len(histories), num_titles))


def random(num_titles: int, seed: int) -> Scorer:
    """Returns the scorer that shuffles the catalogue for each record; the order depends on seed and place only."""

    def score(histories: Sequence[Sequence[int]], start: int) -> np.ndarray:
        seeds = [record_seed(seed, "test/ranking", start + index) for index in range(len(histories))]
        return np.stack([np.random.default_rng(record).random(num_titles) for record in seeds])

    return score


def next_in_series(titles: Sequence[str]) -> Scorer:
    """Returns the scorer of what comes next in the series of the history, which learns nothing from any record.

    A series stands where the newest of its titles in the history has it. Of a series, the volumes after the furthest
    one in the history come first, the nearest one at the front, then those before it. All other titles have 0.

    Args:
        titles: the catalogue; [`cebs.series.volumes`] reads the series of a title.
    """
    volumes_of = [volumes(title) for title in titles]
    members = defaultdict(list)  # by series: numbers and ids
    for index, of_title in enumerate(volumes_of):
        for series, number in of_title:
            members[series].append((number, index))

    def score(histories: Sequence[Sequence[int]], start: int) -> np.ndarray:
        scores = np.zeros((len(histories), len(titles)))
        for row, history in zip(scores, histories, strict=True):
            furthest: dict[str, float] = {}
            for series, number in (volume for index in reversed(history) for volume in volumes_of[index]):
                furthest[series] = max(number, furthest.get(series, number))
            ranked: dict[int, None] = {}
            for series, last in furthest.items():
                nearest = sorted(members[series], key=lambda member: (member[0] <= last, abs(member[0] - last)))
                ranked |= dict.fromkeys(index for _, index in nearest)
            row[list(ranked)] = 1 / np.arange(1, len(ranked) + 1)
        return scores

    return score


def item_knn(sets: Sequence[Sequence[int]], num_titles: int) -> Scorer:
    """Returns the scorer of ItemKNN: titles that share training records with those of the history.

    Two titles are as similar as their columns of the binary matrix of records and titles, by the cosine (Sarwar et
    al., *Item-Based Collaborative Filtering Recommendation Algorithms*, WWW 2001): the number of records that hold
    both, over the root of the product of the numbers that hold either. A title's score is the sum of its similarities
    to the titles of the history; all neighbours count, and a title is no neighbour of its own.

    Args:
        sets: the titles of each training record, history and target.
        num_titles: size of the catalogue.
    """
    similarity = cosine_similarity(incidence_matrix(sets, num_titles))

    def score(histories: Sequence[Sequence[int]], start: int) -> np.ndarray:
        scores = (incidence_matrix(histories, num_titles) @ similarity).toarray()  # [N, M]
        return scores.round(9)  # equal sums stay equal, in whatever order they were added up

    return score


def incidence_matrix(sets: Sequence[Iterable[int]], num_titles: int) -> csr_array:
    """Returns the sparse matrix `[N, M]` with a 1 where a record holds a title, once or several times."""
    members = [sorted(set(titles)) for titles in sets]
    starts = np.cumsum([0, *map(len, members)])
    columns = np.fromiter((title for titles in members for title in titles), np.int64, starts[-1])
    return csr_array((np.ones(len(columns)), columns, starts), shape=(len(members), num_titles))


def cosine_similarity(incidence: csr_array) -> csr_array:
    """Returns the cosine of each two columns of a binary matrix `[N, M]`, 0 on the diagonal: sparse, `[M, M]`."""
    together = incidence.T @ incidence  # [M, M]: records that hold both titles
    records = together.diagonal()  # [M]: records that hold a title
    norm = diags_array(1 / np.sqrt(np.maximum(records, 1)))
    return csr_array(norm @ (together - diags_array(records)) @ norm)
