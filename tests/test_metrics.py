"""The metrics against plain loops, and the search for the nearest titles against a full sort."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cebs import grounding
from cebs.grounding import nearest_titles
from cebs.metrics import (
    EXPOSURE_GROUPS,
    HIGHER_IS_BETTER,
    NOTHING,
    SET_METRICS,
    EvaluationSet,
    exposure_bounds,
    exposure_groups,
    genre_weights,
    gini,
    hit_ranks,
    long_tail,
    ndcg_at,
    record_sums,
)

GENRES = ["a", "b", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def plain_figures(ranked, targets, invented, histories, genres, exposure, target_exposure, k):
    """The protocol of the paper and the figures of the tail, a record and a rank at a time."""
    judged, recommended, tail_shown = 0, Counter(), 0.0
    accuracy = {"NDCG": [], "HR": []}
    for ranking, target in zip(ranked, targets, strict=True):
        hits = [rank for rank, title in enumerate(ranking[:k]) if title == target and target != -1]
        accuracy["HR"].append(len(hits))
        accuracy["NDCG"].append(sum(math.log(2) / math.log(rank + 2) for rank in hits))
        if target != -1:
            judged += 1
            recommended.update(title for title in ranking[:k] if title != NOTHING)

    def shares(titles):
        totals = dict.fromkeys(GENRES, 0.0)
        for title in titles:
            own = [genre for genre in genres[title] if genre in GENRES]
            for genre in own:
                totals[genre] += 1 / len(own)
        whole = sum(totals.values())
        return [total / whole if whole else math.nan for total in totals.values()]

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    read = [title for history in histories for title in history]
    difference = [p - h for p, h in zip(shares(recommended.elements()), shares(read), strict=True)]
    isnan = any(map(math.isnan, difference))
    total = sum(recommended.values())
    counts = [recommended[title] for title in range(len(genres))]
    # places among the most exposed fifth of the catalogue are shared by titles of equal exposure
    for title, count in recommended.items():
        above = sum(other > exposure[title] for other in exposure)
        tied = sum(other == exposure[title] for other in exposure)
        tail_shown += count * (1 - min(max(len(genres) / 5 - above, 0), tied) / tied)
    figures = {
        "Diversity": len(recommended),
        "DivRatio": len(recommended) / (judged * k) if judged else math.nan,
        "DGU": math.nan if isnan else max(difference) - min(difference),
        "MGU": math.nan if isnan else sum(map(abs, difference)) / len(difference),
        "ORRatio": sum(count for _, count in recommended.most_common(3)) / total if total else math.nan,
        "NotInRatio": mean(invented),
        "Coverage": tail_shown / total if total else math.nan,
        # half the mean difference of all pairs of titles, relative to the mean
        "Gini": sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * total) if total else math.nan,
    }
    for metric, values in accuracy.items():
        figures[metric] = mean(values)
        for group in EXPOSURE_GROUPS:
            of_group = [plain_group(exposure, own) == group for own in target_exposure]
            figures[f"{metric}_{group}"] = mean([value for value, is_in in zip(values, of_group, strict=True) if is_in])
    return figures


def plain_group(exposure, own):
    """Walks from either end of the catalogue until a fifth of all exposure is passed."""
    if own == 0:
        return "tail"

    def is_in_the_first_fifth(order):
        passed = 0
        for count in order:
            passed += count
            if passed * 5 >= sum(exposure):
                return (own >= count) if order[0] > order[-1] else (own <= count)
        raise AssertionError

    descending = sorted(exposure, reverse=True)
    if descending[0] == descending[-1]:  # no title is more exposed than another
        if descending[0] == 0:
            return "head" if own else "tail"
        return "head" if own > descending[0] else "tail" if own < descending[0] else "middle"
    head, tail = is_in_the_first_fifth(descending), is_in_the_first_fifth(descending[::-1])
    return "middle" if head == tail else "head" if head else "tail"


@st.composite
def evaluations(draw):
    """Targets outside the catalogue, no history, titles without genres, equal exposure, k beyond the catalogue."""
    num_titles = draw(st.integers(1, 8))
    num_records = draw(st.integers(1, 6))
    k = draw(st.integers(1, 12))
    depth = min(draw(st.integers(k, 12)), num_titles)
    title = st.integers(0, num_titles - 1)
    ranked = [draw(st.permutations(range(num_titles)))[:depth] for _ in range(num_records)]
    for ranking in ranked:  # history titles left out: too few are left
        short = draw(st.integers(0, 2))
        ranking[depth - short :] = [NOTHING] * min(short, depth)
    targets = [draw(st.integers(-1, num_titles - 1)) for _ in range(num_records)]
    invented = [draw(st.booleans()) for _ in range(num_records)]
    histories = [draw(st.lists(title, max_size=4)) for _ in range(num_records)]
    genres = [draw(st.lists(st.sampled_from([*GENRES, "uncounted"]), unique=True)) for _ in range(num_titles)]
    exposure = [draw(st.integers(0, 6)) for _ in range(num_titles)]
    target_exposure = [draw(st.integers(0, 3)) if target == -1 else exposure[target] for target in targets]
    return np.array(ranked), targets, invented, histories, genres, exposure, target_exposure, k


def sums_of(ranked, targets, invented, histories, genres, exposure, target_exposure, k):
    weights = genre_weights(genres, GENRES)
    history_genres = np.stack([weights[history].sum(axis=0) for history in histories])
    arrays = (np.array(targets), history_genres, weights, np.array(exposure), np.array(target_exposure))
    return record_sums(ranked, np.array(invented), EvaluationSet(*arrays), k)


@settings(max_examples=200, deadline=None)
@given(evaluations())
def test_figures_equal_plain_loops(evaluation):
    figures, expected = sums_of(*evaluation).figures(), plain_figures(*evaluation)
    if all(target == -1 for target in evaluation[1]):
        expected |= {name: math.nan for name in expected if name.split("_")[0] in ("NDCG", "HR", "Diversity")}
    assert list(figures) == list(HIGHER_IS_BETTER)
    assert figures == pytest.approx(expected, nan_ok=True, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(evaluations(), st.data())
def test_weighted_figures_are_those_of_records_repeated(evaluation, data):
    """What the bootstrap rests on, with users of several records: drawn twice counts twice."""
    ranked, *of_records, genres, exposure, target_exposure, k = evaluation
    sums = sums_of(*evaluation)
    users = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(ranked), max_size=len(ranked))))
    users = np.unique(users, return_inverse=True)[1]
    num_users = int(users.max()) + 1
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num_users, max_size=num_users)))
    chosen = np.repeat(np.arange(len(ranked)), times[users])
    assume(len(chosen))
    taken = [[values[index] for index in chosen] for values in (*of_records, target_exposure)]
    repeated = plain_figures(ranked[chosen], *taken[:-1], genres, exposure, taken[-1], k)
    by_user, weights = sums.by_user(users), times[None].astype(float)
    weighted = dict(zip(sums.ratios, by_user.ratio_figures(weights)[:, 0], strict=True))
    weighted |= dict(zip(SET_METRICS, by_user.set_figures(weights)[:, 0], strict=True))
    assert weighted == pytest.approx(repeated, nan_ok=True, abs=1e-12)


def test_metrics_by_hand():
    genres = [["a"], ["b", "a"], ["x"]]
    assert genre_weights(genres, ["a", "b"]).tolist() == [[1, 0], [0.5, 0.5], [0, 0]]
    ranked = np.array([[0, 1], [0, 2], [1, 0]])
    figures = sums_of(
        ranked, [1, 1, -1], [True, False, False], [[0], [], []], genres, [5, 0, 0], [0, 0, 7], 2
    ).figures()
    assert figures["HR"] == 1 / 3  # over all records, the one whose target is unknown included
    assert figures["NDCG"] == pytest.approx(math.log(2) / math.log(3) / 3)
    assert figures["Diversity"] == 3
    assert figures["DivRatio"] == 3 / 4  # over the records whose target is known
    # recommended 0, 1, 0, 2: P = (2.5, 0.5, 0) / 3, H = (1, 0, 0)
    assert figures["DGU"] == pytest.approx(1 / 3)
    assert figures["MGU"] == pytest.approx(1 / 9)
    assert figures["ORRatio"] == 1.0
    assert figures["NotInRatio"] == 1 / 3
    # 0.6 of three titles are the most exposed fifth, all of it title 0, which is recommended twice of four times
    assert figures["Coverage"] == pytest.approx((2 + 2 * 0.4) / 4)
    assert figures["Gini"] == pytest.approx((-2 * 1 + 0 * 1 + 2 * 2) / (3 * 4))
    assert (figures["HR_tail"], figures["HR_head"]) == (1 / 2, 0)
    assert math.isnan(figures["HR_middle"])


def test_what_cannot_be_computed_is_no_number():
    """A model is not said to have no hits, or to recommend nothing, where nothing could be hit or told."""
    ranked, genres, exposure = np.array([[0, 1], [1, 0]]), [["a"], ["b"]], [3, 1]
    no_target = sums_of(ranked, [-1, -1], [True, False], [[0], [1]], genres, exposure, [0, 0], 2).figures()
    assert [name for name, figure in no_target.items() if not math.isnan(figure)] == ["NotInRatio"]
    no_genre = sums_of(ranked, [0, 0], [True, False], [[0], [1]], [["x"], ["y"]], exposure, [3, 3], 2).figures()
    assert math.isnan(no_genre["DGU"]) and math.isnan(no_genre["MGU"]) and no_genre["HR"] == 1
    no_hit = sums_of(ranked, [0, 0], [True, False], [[0], [1]], genres, exposure, [3, 3], 1).figures()
    assert no_hit["HR"] == 0.5 and no_hit["HR_head"] == 0.5 and math.isnan(no_hit["HR_tail"])
    nothing = np.full((2, 2), NOTHING)  # a history that is the whole catalogue
    nothing = sums_of(nothing, [0, 1], [True, False], [[0, 1], [0, 1]], genres, exposure, [3, 1], 2).figures()
    assert (nothing["HR"], nothing["Diversity"]) == (0, 0)
    assert all(math.isnan(nothing[name]) for name in ("ORRatio", "DGU", "MGU", "Coverage", "Gini"))


def test_gini_of_known_distributions():
    assert gini(np.array([3, 3, 3, 3]), 4) == 0
    assert gini(np.array([5]), 4) == pytest.approx(3 / 4)  # one title of four takes it all
    assert gini(np.array([1, 2, 3]), 3) == pytest.approx(2 / 9)
    assert np.isnan(gini(np.array([0, 0]), 2))


def test_what_is_exposed_equally_is_treated_equally():
    assert long_tail(np.array([9, 3, 3, 0, 0, 0, 0, 0, 0, 0])).tolist() == [0, 0.5, 0.5, *[1] * 7]
    assert long_tail(np.arange(35)[::-1]).sum() == 28  # 35 / 5 is 7, and 0.2 * 35 a little more
    exposure = np.array([10, 4, 4, 1, 1, 0])
    bounds = exposure_bounds(exposure)
    assert bounds == (10, 4)  # of 20: 10 reaches a fifth from above, 0 + 1 + 1 + 4 from below
    assert exposure_groups(np.array([12, 10, 5, 4, 0]), bounds).tolist() == [0, 0, 1, 2, 2]


def test_what_each_user_got():
    ranks = hit_ranks(np.array([[4, 2], [4, 2], [4, 2], [4, 2]]), np.array([4, 2, 0, -1]))
    assert ranks.tolist() == [0, 1, -1, -1]
    assert ndcg_at(ranks, 1).tolist() == [1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


def plain_nearest(queries, catalogue, k):
    distances = [[float(np.sum((query - title) ** 2)) for title in catalogue] for query in queries]
    return [sorted(range(len(catalogue)), key=lambda title: (row[title], title))[:k] for row in distances]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nearest_titles_equal_a_full_sort(data):
    """Whole coordinates make many exact ties; blocks smaller than the catalogue make many merges."""
    size = st.integers(1, 40)
    shape_q, shape_m, dimensions = data.draw(size), data.draw(size), data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([1, 2, 50]))
    queries = random.integers(-spread, spread + 1, (shape_q, dimensions)).astype(np.float32)
    catalogue = random.integers(-spread, spread + 1, (shape_m, dimensions)).astype(np.float32)
    k = data.draw(st.integers(1, 45))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grounding, "SEARCHED_QUERIES", data.draw(st.integers(1, 50)))
        patch.setattr(grounding, "SEARCHED_TITLES", data.draw(st.integers(1, 50)))
        patch.setattr(grounding, "SPARE", data.draw(st.integers(1, 5)))
        nearest = nearest_titles(queries, catalogue, k)
    assert nearest.tolist() == plain_nearest(queries, catalogue, k)


def test_equal_embeddings_come_in_the_order_of_their_ids():
    """The bug this guards against: a matrix product rounds by a title's place, so equal titles came in any order."""
    random = np.random.default_rng(0)
    distinct = random.normal(size=(50, 384)).astype(np.float32)
    catalogue = np.concatenate([distinct, np.repeat(distinct[:1], 40, axis=0), distinct])
    nearest = nearest_titles(distinct + np.float32(1e-3), catalogue, 30)
    assert nearest[0].tolist() == [0, *range(50, 79)]  # more equal titles than are spared
    for query in range(1, 50):
        assert nearest[query, :2].tolist() == [query, 90 + query]
    assert nearest.tolist() == nearest_titles(distinct + np.float32(1e-3), catalogue, 30).tolist()


def test_nearest_titles_of_embeddings_far_from_the_origin():
    """|q|² - 2qt + |t|² loses the digits that tell such titles apart; the differences do not."""
    random = np.random.default_rng(1)
    catalogue = (1000 + random.normal(size=(300, 8)) * 1e-3).astype(np.float32)
    queries = catalogue[:20] + np.float32(1e-4)
    assert nearest_titles(queries, catalogue, 10).tolist() == plain_nearest(
        queries.astype(np.float64), catalogue.astype(np.float64), 10
    )
