"""How sure the figures are: bootstrap intervals, paired tests against a reference, and Holm's correction.

Pure functions. What is drawn again, and what changes sides, is always a *user*: where a data set has several records
of one user, these are not independent and stay together.

In the shapes, N is the number of test records, C the number of users (N where no record says whose it is), B the
number of resamples.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from cebs.errors import InputError
from cebs.metrics import SET_METRICS, RecordSums
from cebs.per_user import check_same_records

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
POWER = 0.8
SIGN_FLIPS = 9999  # of the permutation test; all there are, where there are no more
NUMBERS_AT_ONCE = 2**22  # a batch of resamples holds no more counts than this
STRETCHED = ("Diversity", "DivRatio", "Gini")  # see `intervals`


def number_users(users: Sequence[str]) -> np.ndarray:
    """Returns the number of each record's user: `[N]`, from 0 without gaps; a record without one is its own user.

    ```python
    >>> number_users(["7", "", "7", ""])
    array([0, 1, 0, 2])
    ```
    """
    keys = [user or index for index, user in enumerate(users)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap intervals
# ---------------------------------------------------------------------------------------------------------------------


def intervals(sums: RecordSums, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Returns a 95 % interval for every figure, from users drawn again with replacement.

    An interval is for the figure's mean over test sets of this many users, which is what methods compared on one test
    set can be compared by. For means over records that is also the figure of the whole population; for figures of the
    set it is not (the number of distinct titles grows with the users).

    - Sums over records divided by sums (NDCG, HR, also by group of targets, NotInRatio, Coverage): BCa intervals
      (Efron, 1987), which suit the skew of rare hits.
    - DGU, MGU, ORRatio, recomputed on each resample. A resample lacks some 37 % of the users and repeats others, so
      that its shares are rougher and these figures greater than the sample's own. The percentile interval is moved, by
      the difference between the figure and the resamples' mean, to lie about the figure.
    - Diversity, DivRatio, Gini, recomputed likewise. A resample has fewer distinct titles than the sample, always: the
      percentile interval need not even hold the figure, and BCa does not exist. The spread is too small as well, for
      a title that one user got counts once however often that user is drawn. The interval is moved as above, and
      stretched to the jackknife's standard error, which is not too small on average (Efron and Stein, 1981). It errs on
      the wide side: simulated, it holds the truth in 95 to 99 % of the data sets.

    Args:
        sums: what each user adds to the figures (see `RecordSums.by_user`).
        resamples: B.
        seed: seed of the draws.

    Returns:
        `dict[str, tuple[float, float]]`: low and high by metric; NaN where the resamples do not differ (with no hit at
        all, for one, the bootstrap knows nothing of the spread), some cannot be computed, or there is one user only.
    """
    num_users = len(sums.judged)
    if num_users < 2:
        return dict.fromkeys((*sums.ratios, *SET_METRICS), (math.nan, math.nan))
    ratios = _bootstrap(sums.ratio_figures, sums, "BCa", resamples, seed).confidence_interval
    found = {name: (float(low), float(high)) for name, low, high in zip(sums.ratios, *ratios, strict=True)}

    figures = sums.figures()
    resampled = _bootstrap(sums.set_figures, sums, "percentile", resamples, seed).bootstrap_distribution
    errors = _jackknife_errors(sums)
    for name, values, error in zip(SET_METRICS, resampled, errors, strict=True):
        stretch = error / values.std(ddof=1) if name in STRETCHED and values.std() else 1.0
        found[name] = _about(figures[name], values, stretch)
    return found


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], sums: RecordSums, method: str, resamples: int, seed: int):
    """Calls scipy's bootstrap, in batches, on the numbers of the users; the same seed draws the same users."""
    num_users = len(sums.judged)

    def of_drawn(drawn: np.ndarray, axis: int) -> np.ndarray:
        """Returns figures `[figures, ...]` of users drawn `[..., users]`; scipy draws all of them, or all but one."""
        rows = drawn.reshape(-1, drawn.shape[axis])
        places = rows + num_users * np.arange(len(rows))[:, None]
        times = np.bincount(places.ravel(), minlength=num_users * len(rows)).reshape(-1, num_users)
        return statistic(times.astype(float)).reshape(-1, *drawn.shape[:-1])

    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # NaN says it
        return stats.bootstrap(
            (np.arange(num_users),),
            of_drawn,
            vectorized=True,
            n_resamples=resamples,
            batch=_batch(sums),
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(seed),
        )


def _jackknife_errors(sums: RecordSums) -> np.ndarray:
    """Returns the jackknife's standard errors of `SET_METRICS`, from leaving out each user in turn."""
    num_users, batch = len(sums.judged), _batch(sums)
    left_out = []
    for start in range(0, num_users, batch):
        weights = np.ones((min(batch, num_users - start), num_users))
        np.fill_diagonal(weights[:, start:], 0)
        left_out.append(sums.set_figures(weights))
    return np.sqrt((num_users - 1) * np.concatenate(left_out, axis=1).var(axis=1))


def _batch(sums: RecordSums) -> int:
    return max(1, NUMBERS_AT_ONCE // max(sums.recommended.shape))


def _about(figure: float, resampled: np.ndarray, stretch: float) -> tuple[float, float]:
    """Returns the percentile interval of the resamples, moved to lie about the figure, and stretched."""
    if not resampled.std() > 0:
        return math.nan, math.nan
    ends = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = figure + (ends - resampled.mean()) * stretch
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------------
# Paired tests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """A method against the reference, on the same test records at one k.

    Args:
        k (`int`): the length of the lists.
        num_users (`int`): C.
        ndcg_difference (`float`): mean NDCG of the method less the reference's.
        ndcg_p (`float`): p-value of the permutation test on it.
        hr_difference (`float`): the same of HR.
        hr_p (`float`): p-value of McNemar's exact test on it.
        smallest_hr_difference (`float`): see `smallest_difference`; infinite where no difference could be seen.
    """

    k: int
    num_users: int
    ndcg_difference: float
    ndcg_p: float
    hr_difference: float
    hr_p: float
    smallest_hr_difference: float

    @property
    def ndcg_differs(self) -> bool:
        return self.ndcg_p < SIGNIFICANCE

    @property
    def hr_differs(self) -> bool:
        return self.hr_p < SIGNIFICANCE

    def in_words(self, name: str, reference: str) -> str:
        """Returns a sentence on what can be seen, once the p-values are corrected (`test_rows`)."""
        p_values = f"p {_p_value(self.ndcg_p)} for NDCG@{self.k}, p {_p_value(self.hr_p)} for HR@{self.k}"
        if self.ndcg_differs and self.hr_differs:
            return f"{name}: differs from {reference} in NDCG@{self.k} and HR@{self.k} ({p_values})"
        unseen = " in HR" if self.ndcg_differs else " in NDCG" if self.hr_differs else ""
        shown = f"{self.smallest_hr_difference:.4f}" if self.smallest_hr_difference < math.inf else "none"
        return (
            f"{name}: no difference{unseen} from {reference} can be seen with {self.num_users} users ({p_values}; the "
            f"smallest difference in HR@{self.k} that this test set could have shown: {shown})"
        )


def _p_value(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def test_rows(reference: Mapping[str, Any], others: Sequence[Mapping[str, Any]], k: int) -> list[PairedTest]:
    """Tests the rows of a table against the reference: `paired_tests`, with Holm's correction over the rows.

    The NDCG column is one family of tests and the HR column another.

    Args:
        reference: the content of the reference's file per user (see `cebs.per_user`).
        others: the contents of the other rows' files.
        k: a value of `topk` in all files.
    """
    tests = [paired_tests(reference, other, k, comparisons=len(others)) for other in others]
    ndcg, hr = holm([test.ndcg_p for test in tests]), holm([test.hr_p for test in tests])
    return [replace(test, ndcg_p=p, hr_p=q) for test, p, q in zip(tests, ndcg, hr, strict=True)]


def paired_tests(
    reference: Mapping[str, Any], other: Mapping[str, Any], k: int, *, comparisons: int = 1, seed: int = 0
) -> PairedTest:
    """Tests a method against the reference, without correction.

    NDCG: a permutation test. If the two methods did not differ, each user's difference could as well have the other
    sign. Hits: McNemar's exact test (the users with a hit by one method only, as tosses of a fair coin). Where records
    share a user, or hits are means over seeds, the permutation test on each user's difference in hits takes its place;
    it is the same test where neither is the case.

    Args:
        reference: the content of the reference's file per user (see `cebs.per_user`).
        other: the content of the method's file.
        k: a value of `topk` in both files.
        comparisons: how many rows are compared with the reference; the smallest difference allows for Holm's
            correction, whose first step tests at 0.05 / comparisons.
        seed: seed of the permutations.

    Raises:
        `InputError`: if the two were not evaluated on the same records, or not at this k.
    """
    check_same_records(reference, other)
    for content in (reference, other):
        if k not in content["topk"]:
            raise InputError(f"{content['dataset']}, {content['method']}: not evaluated at k {k}; add it to --topk")
    ndcg, hits = (
        np.array([new[measure][str(k)] - old[measure][str(k)] for old, new in paired])
        for paired in [list(zip(reference["users"], other["users"], strict=True))]
        for measure in ("ndcg", "hit")
    )
    users = number_users([user["user"] for user in reference["users"]])
    users_hits = np.bincount(users, weights=hits)
    if len(users_hits) == len(hits) and np.isin(hits, (-1, 0, 1)).all():
        hr_p = mcnemar_test(int((hits > 0).sum()), int((hits < 0).sum()))
    else:
        hr_p = sign_flip_test(users_hits, seed)
    spread = float(np.square(users_hits).sum()) / len(hits)
    return PairedTest(
        k=k,
        num_users=len(users_hits),
        ndcg_difference=float(ndcg.mean()),
        ndcg_p=sign_flip_test(np.bincount(users, weights=ndcg), seed),
        hr_difference=float(hits.mean()),
        hr_p=hr_p,
        smallest_hr_difference=smallest_difference(spread, len(hits), SIGNIFICANCE / comparisons),
    )


def sign_flip_test(differences: np.ndarray, seed: int = 0) -> float:
    """Returns the two-sided p-value of the paired permutation test on the sum of differences `[C]`.

    Users without a difference have no say; where there are at most 13 others, all their signs are gone through.
    """
    differences = differences[differences != 0]
    if len(differences) < 2:
        return 1.0
    test = stats.permutation_test(
        (differences,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        batch=max(1, NUMBERS_AT_ONCE // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def mcnemar_test(only_other: int, only_reference: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, from how many users have a hit by one method only."""
    discordant = only_other + only_reference
    return float(stats.binomtest(only_other, discordant).pvalue) if discordant else 1.0


def smallest_difference(spread: float, num_records: int, significance: float = SIGNIFICANCE) -> float:
    """Returns the smallest difference in HR that the test set would have shown in 80 of 100 cases.

    Connor's normal approximation for paired proportions (Biometrics 43, 1987): the difference d at which
    d sqrt(N) = z(1 - significance / 2) sqrt(s) + z(0.8) sqrt(s - d²).

    Args:
        spread: s, the share of records with a hit by one method only; where records share a user, the sum of the
            squares of the users' differences in hits, over N. A difference d needs a share of d at the least.
        num_records: N.
        significance: of the two-sided test.

    Returns:
        `float`: infinite where even a difference of 1 would not have been shown.
    """
    size, power = stats.norm.ppf(1 - significance / 2), stats.norm.ppf(POWER)

    def excess(difference: float) -> float:
        share = max(spread, difference)
        return (
            difference * math.sqrt(num_records)
            - size * math.sqrt(share)
            - power * math.sqrt(max(share - difference**2, 0))
        )

    return float(brentq(excess, 1e-12, 1)) if excess(1) > 0 else math.inf


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the order given.

    ```python
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    ```
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p_values)[order] * factors), 1)
    return adjusted.tolist()
