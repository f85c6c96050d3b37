"""The statistics against scipy, against cases worked out by hand, and against simulated data sets of known truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cebs.metrics import NOT_IN_CATALOGUE, SET_METRICS, EvaluationSet, record_sums
from cebs.per_user import mean_over_seeds
from cebs.statistics import (
    PairedTest,
    holm,
    intervals,
    mcnemar_test,
    number_users,
    paired_tests,
    sign_flip_test,
    smallest_difference,
)
from cebs.statistics import test_rows as rows_against
from utils import InputError


def at_least(successes, trials, share):
    """Says whether so many successes could come of a probability of `share` or more (one such test in 1,000 fails)."""
    return stats.binomtest(successes, trials, share, alternative="less").pvalue > 1e-3


def at_most(successes, trials, share):
    return stats.binomtest(successes, trials, share, alternative="greater").pvalue > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------

K, NUM_TITLES, NUM_GENRES = 3, 120, 6
POPULARITY = 1 / np.arange(1, NUM_TITLES + 1)
POPULARITY /= POPULARITY.sum()
GENRES = np.random.default_rng(0).dirichlet(np.full(NUM_GENRES, 0.4), NUM_TITLES)
EXPOSURE = np.arange(NUM_TITLES)[::-1] // 4


def simulated(rng, num_users, hit_ratio=0.15, records_each=1):
    """Draws users who get popular titles and read others; records of one user are all alike."""
    noise = rng.gumbel(size=(num_users, NUM_TITLES))
    ranked = np.argsort(-(np.log(POPULARITY) + noise), axis=1)[:, :K]  # K titles without replacement
    is_hit = rng.random(num_users) < hit_ratio
    drawn = ranked[np.arange(num_users), rng.integers(K, size=num_users)]
    targets = np.where(is_hit, drawn, rng.integers(NUM_TITLES, size=num_users))
    targets[~is_hit & (ranked == targets[:, None]).any(axis=1)] = NOT_IN_CATALOGUE  # a hit by chance is none
    histories = GENRES[rng.choice(NUM_TITLES, p=POPULARITY[::-1], size=(num_users, 5))].sum(axis=1)
    exposure = np.where(targets >= 0, EXPOSURE[targets], 0)
    users = np.repeat(np.arange(num_users), records_each)
    evaluation_set = EvaluationSet(targets[users], histories[users], GENRES, EXPOSURE, exposure[users])
    return record_sums(ranked[users], rng.random(num_users)[users] < 0.3, evaluation_set, K).by_user(users)


@pytest.fixture(scope="module")
def coverage():
    """Of 250 data sets of 150 users, how many intervals hold the mean over 2,000 other data sets; by metric."""
    rng, num_users, trials = np.random.default_rng(1), 150, 250
    truth = {}
    for _ in range(2000):
        for name, figure in simulated(rng, num_users).figures().items():
            truth.setdefault(name, []).append(figure)
    truth = {name: np.nanmean(figures) for name, figures in truth.items()}
    held = dict.fromkeys(truth, 0)
    for trial in range(trials):
        for name, (low, high) in intervals(simulated(rng, num_users), 300, seed=trial).items():
            held[name] += low <= truth[name] <= high
    return held, trials


@pytest.mark.parametrize("metric", ["NDCG", "HR", "NotInRatio", "Coverage", "DGU", "MGU", "ORRatio"])
def test_an_interval_holds_the_truth_in_95_of_100_data_sets(coverage, metric):
    held, trials = coverage
    assert at_least(held[metric], trials, 0.93) and at_most(held[metric], trials, 0.97), held[metric]


@pytest.mark.parametrize("metric", ["Diversity", "DivRatio", "Gini"])
def test_intervals_of_distinct_titles_err_on_the_wide_side(coverage, metric):
    """A percentile interval would hold the truth in none of them: its resamples have fewer distinct titles."""
    held, trials = coverage
    assert at_least(held[metric], trials, 0.95), held[metric]


def test_percentiles_of_diversity_would_miss_it():
    sums = simulated(np.random.default_rng(2), 150)
    drawn = np.random.default_rng(3).multinomial(150, np.full(150, 1 / 150), size=300).astype(float)
    resampled = sums.set_figures(drawn)[SET_METRICS.index("Diversity")]
    figure = sums.figures()["Diversity"]
    assert np.quantile(resampled, 0.975) < figure
    low, high = intervals(sums, 300, seed=0)["Diversity"]
    assert low < figure < high


def test_ratios_are_scipys_bca_intervals():
    """One hit ratio by `scipy.stats.bootstrap` of the hits themselves, on the same draws."""
    sums = simulated(np.random.default_rng(4), 100)
    hits = sums.above[:, sums.ratios.index("HR")]
    expected = stats.bootstrap(
        (hits,), np.mean, n_resamples=500, method="BCa", vectorized=True, rng=np.random.default_rng(9)
    ).confidence_interval
    assert intervals(sums, 500, seed=9)["HR"] == pytest.approx(tuple(expected))


def test_records_of_one_user_count_as_one():
    """Four equal records each, drawn user by user, say no more than one each."""
    one, four = (simulated(np.random.default_rng(5), 80, records_each=each) for each in (1, 4))
    for name, ends in intervals(one, 200, seed=0).items():
        if name not in ("ORRatio", "DivRatio"):  # DivRatio is a quarter, with four times the recommendations
            assert intervals(four, 200, seed=0)[name] == pytest.approx(ends, nan_ok=True), name


def test_the_same_seed_gives_the_same_intervals_whatever_the_batches(monkeypatch):
    sums = simulated(np.random.default_rng(6), 60)
    whole = intervals(sums, 100, seed=3)
    monkeypatch.setattr("cebs.statistics.NUMBERS_AT_ONCE", 1000)
    for name, ends in intervals(sums, 100, seed=3).items():
        assert ends == pytest.approx(whole[name], nan_ok=True), name
    assert intervals(sums, 100, seed=4)["NDCG"] != whole["NDCG"]


def test_no_interval_where_resamples_do_not_differ_or_there_is_one_user():
    no_hit = simulated(np.random.default_rng(7), 30, hit_ratio=0)
    found = intervals(no_hit, 50, seed=0)
    assert math.isnan(found["HR"][0]) and math.isnan(found["NDCG_tail"][1])
    assert found["Diversity"][0] < no_hit.figures()["Diversity"] < found["Diversity"][1]
    alone = intervals(simulated(np.random.default_rng(7), 1), 50, seed=0)
    assert all(math.isnan(low) and math.isnan(high) for low, high in alone.values())


def test_users_are_numbered_and_records_without_one_stand_alone():
    assert number_users(["7", "", "7", "", "b"]).tolist() == [0, 1, 0, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


def evaluated(ranks, users=None, k=5, method="M"):
    """The content of a file per user, from the places of the targets (-1: no hit)."""
    return {
        "dataset": "D",
        "method": method,
        "topk": [k],
        "users": [
            {
                "user": str(users[index]) if users is not None else "",
                "target": f"T{index}",
                "hit": {str(k): int(0 <= rank < k)},
                "ndcg": {str(k): math.log(2) / math.log(rank + 2) if 0 <= rank < k else 0.0},
            }
            for index, rank in enumerate(ranks)
        ],
    }


def test_mcnemar_by_hand():
    assert mcnemar_test(0, 0) == 1
    assert mcnemar_test(5, 5) == 1
    assert mcnemar_test(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_test(1, 4) == pytest.approx(2 * (1 + 5) / 32)


def test_sign_flips_by_hand():
    assert sign_flip_test(np.zeros(9)) == 1
    assert sign_flip_test(np.array([0.5, 0, 0])) == 1
    assert sign_flip_test(np.array([1.0, 2.0, 0, 3.0])) == pytest.approx(2 / 8)  # the most extreme of eight sums
    assert sign_flip_test(np.array([1.0, 2.0, -3.0])) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 6), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_paired_tests_equal_plain_ones(ranks, random):
    others = [random.choice([rank, -1, 0, 3]) for rank in ranks]
    test = paired_tests(evaluated(ranks), evaluated(others), 5)
    ndcg, hits = (
        np.array([[user[measure]["5"] for user in evaluated(of)["users"]] for of in (others, ranks)], float)
        for measure in ("ndcg", "hit")
    )
    assert test.ndcg_difference == pytest.approx(ndcg[0].mean() - ndcg[1].mean())
    assert test.hr_difference == pytest.approx(hits[0].mean() - hits[1].mean())
    only = [int((hits[0] > hits[1]).sum()), int((hits[0] < hits[1]).sum())]
    assert test.hr_p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1)
    if np.count_nonzero(ndcg[0] != ndcg[1]) <= 10:  # all signs are gone through
        differences = (ndcg[0] - ndcg[1])[ndcg[0] != ndcg[1]]
        signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))  # [2^C, C]
        sums = signs @ differences
        share = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
        assert test.ndcg_p == pytest.approx(share)


def test_mcnemar_is_the_sign_flip_test_of_hits():
    """What takes its place where records share a user is the same where each has its own."""
    hits = np.array([1] * 7 + [-1] * 2 + [0] * 20)
    assert sign_flip_test(hits) == pytest.approx(mcnemar_test(7, 2))


def test_records_of_one_user_change_sides_together():
    ranks, users = [0] * 6 + [-1] * 30, [1, 1, 1, 2, 2, 2, *range(10, 40)]
    alone, together = (paired_tests(evaluated([-1] * 36, by), evaluated(ranks, by), 5) for by in (None, users))
    assert alone.hr_p == pytest.approx(2 / 64) and alone.num_users == 36
    assert together.hr_p == together.ndcg_p == pytest.approx(2 / 4) and together.num_users == 32
    assert together.smallest_hr_difference > alone.smallest_hr_difference


def test_tests_reject_about_5_of_100_where_there_is_no_difference(monkeypatch):
    """Two methods with the same chances of a hit, in 400 test sets, and each of these with every record twice."""
    monkeypatch.setattr("cebs.statistics.SIGN_FLIPS", 999)
    rng, trials = np.random.default_rng(0), 400
    rejected = {"ndcg": 0, "hr": 0, "clustered ndcg": 0}
    for _ in range(trials):
        one, other = (np.where(rng.random(60) < 0.4, rng.integers(0, 5, 60), -1) for _ in range(2))
        test = paired_tests(evaluated(one), evaluated(other), 5)
        rejected["ndcg"] += test.ndcg_differs
        rejected["hr"] += test.hr_differs
        users = np.repeat(np.arange(60), 2)
        test = paired_tests(evaluated(np.repeat(one, 2), users), evaluated(np.repeat(other, 2), users), 5)
        rejected["clustered ndcg"] += test.ndcg_differs
    assert at_most(rejected["ndcg"], trials, 0.05) and at_least(rejected["ndcg"], trials, 0.04)
    assert at_most(rejected["clustered ndcg"], trials, 0.05) and at_least(rejected["clustered ndcg"], trials, 0.04)
    assert at_most(rejected["hr"], trials, 0.05) and rejected["hr"] > 0  # exact: at most 5, for whole numbers less


def test_the_smallest_difference_is_shown_in_80_of_100_test_sets():
    rng, trials, size, shared = np.random.default_rng(1), 600, 500, 0.1
    spread = 0.12
    difference = smallest_difference(spread, size)
    only_other, only_reference = (spread + difference) / 2, (spread - difference) / 2
    table = rng.multinomial(size, [only_other, only_reference, shared, 1 - spread - shared], size=trials)
    shown = sum(mcnemar_test(better, worse) < 0.05 for better, worse, *_ in table.tolist())
    assert at_least(shown, trials, 0.72) and at_most(shown, trials, 0.83)  # exact tests show a little less


def test_the_smallest_difference_by_hand():
    # d sqrt(N) = 1.95996 sqrt(s) + 0.84162 sqrt(s - d²)
    difference = smallest_difference(0.25, 400)
    assert difference * 20 == pytest.approx(1.959964 * 0.5 + 0.841621 * math.sqrt(0.25 - difference**2), abs=1e-5)
    least = smallest_difference(0.0, 1000)  # with every hit that changed changed one way
    assert least == pytest.approx(smallest_difference(0.002, 1000)) and least > 0.002
    assert smallest_difference(0.1, 1000, 0.05 / 6) > smallest_difference(0.1, 1000)
    assert smallest_difference(0.5, 3) == math.inf


def test_holm_by_hand():
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for step, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[place] * (len(p_values) - step) > level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_rows_are_corrected_together():
    reference = evaluated([-1] * 40)
    others = [evaluated([0] * hits + [-1] * (40 - hits), method=str(hits)) for hits in (6, 9, 0)]
    tests = rows_against(reference, others, 5)
    assert [test.hr_p for test in tests] == pytest.approx([2 * 2 / 2**6, 3 * 2 / 2**9, 1])
    assert [test.hr_differs for test in tests] == [False, True, False]
    assert rows_against(reference, [], 5) == []


def test_in_words():
    test = PairedTest(10, 1000, 0.003, 0.109, 0.002, 0.6875, 0.0078)
    assert test.in_words("DPO", "SFT") == (
        "DPO: no difference from SFT can be seen with 1000 users (p = 0.109 for NDCG@10, p = 0.688 for HR@10; the "
        "smallest difference in HR@10 that this test set could have shown: 0.0078)"
    )
    assert "no difference in HR from SFT" in PairedTest(10, 9, 0.3, 0.01, 0.2, 0.2, math.inf).in_words("DPO", "SFT")
    assert PairedTest(5, 9, 0.3, 0.0001, 0.2, 0.02, 0.1).in_words("DPO", "SFT") == (
        "DPO: differs from SFT in NDCG@5 and HR@5 (p < 0.001 for NDCG@5, p = 0.020 for HR@5)"
    )


def test_other_records_or_another_k_are_refused():
    reference = evaluated([0, -1])
    with pytest.raises(InputError, match="M are not of the same test records"):
        paired_tests(reference, evaluated([0, -1, 1]), 5)
    with pytest.raises(InputError, match="D, M: not evaluated at k 10; add it to --topk"):
        paired_tests(reference, evaluated([0, 1]), 10)
    with pytest.raises(InputError, match="are not of the same test records"):
        mean_over_seeds([reference, evaluated([0, -1], users=[1, 2])])
