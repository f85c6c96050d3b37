"""The grammar of negatives, `pool:order[:count]`, and the data sets that have a name."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from cebs.errors import InputError

POOLS = ("in", "out", "all")
SIMILARITY_ORDERS = ("nearest_target", "farthest_target", "nearest_history", "farthest_history")
ORDERS = ("first", "random", "low_exposure", "high_exposure", "likely", *SIMILARITY_ORDERS)


def _check(written: str, pool: str, order: str, count: int) -> None:
    for kind, value, known in (("pool", pool, POOLS), ("order", order, ORDERS)):
        if value not in known:
            raise InputError(f"{written}: there is no {kind} {value!r}{_known(value, known, f'{kind}s')}")
    if count < 1:
        raise InputError(f"{written}: the count must be 1 or more")


def _known(value: str, known: Iterable[str], kind: str) -> str:
    """Returns the end of a complaint: what comes closest, and all that exists."""
    near = difflib.get_close_matches(value, known, n=1)
    return (f"; did you mean {near[0]}? " if near else "; ") + f"{kind}: {', '.join(known)}"


@dataclass(frozen=True)
class Selector:
    """
    A rule that takes negatives from a record's candidates: the first `count` titles of a pool, put in an order.

    Ties go to the candidate generated first, in every order.

    Args:
        pool (`str`): `in` or `out` of the user's interest cluster, or `all`.
        order (`str`):
            - `first`: as generated.
            - `random`: shuffled; a title generated twice is twice as likely to come first.
            - `low_exposure`, `high_exposure`: by how often the title occurs in the training records.
            - `likely`: likeliest first, by the log-probability of the whole completion (not divided by its length).
            - `nearest_target`, `farthest_target`: by the cosine of its sentence embedding with the target's.
            - `nearest_history`, `farthest_history`: by the mean of its cosines with the titles of the history, so
              that what is near resembles the history as a whole, and not one title of it.
        count (`int`, *optional*, defaults to 1): how many titles.

    Raises:
        `InputError`: naming the selector and what exists.

    ```python
    >>> Selector.parse("out:low_exposure:2")
    Selector(pool='out', order='low_exposure', count=2)
    >>> str(Selector("in", "first"))
    'in:first'
    ```
    """

    pool: str
    order: str
    count: int = 1

    def __post_init__(self):
        _check(str(self), self.pool, self.order, self.count)

    @classmethod
    def parse(cls, expression: str) -> "Selector":
        """Reads `pool:order[:count]`; `str` writes it.

        Raises:
            `InputError`: naming the selector and what exists.
        """
        parts = expression.split(":")
        if len(parts) not in (2, 3):
            raise InputError(
                f"{expression}: a selector is pool:order[:count], such as in:first or all:random:3; "
                f"pools: {', '.join(POOLS)}; orders: {', '.join(ORDERS)}"
            )
        pool, order, count = parts if len(parts) == 3 else (*parts, "1")
        if not (count.isascii() and count.isdigit()):
            raise InputError(f"{expression}: the count must be a whole number of 1 or more, not {count!r}")
        _check(expression, pool, order, int(count))
        return cls(pool, order, int(count))

    def __str__(self) -> str:
        return f"{self.pool}:{self.order}" + (f":{self.count}" if self.count != 1 else "")


# The data sets that have a name. Each is written as on the command line: --presets dpo_hard, or --negatives in:first.
_PRESETS = {
    # the method's own
    "dpo_hard": "in:first",
    "dpo_long_tail": "out:low_exposure",
    "dpo_two_negatives": "in:first out:low_exposure",
    # by exposure, inside the cluster, outside it, and both
    "clusterin_low": "in:low_exposure",
    "clusterin_high": "in:high_exposure",
    "clusterout_low": "out:low_exposure",
    "clusterout_high": "out:high_exposure",
    "clusterin_low_clusterout_low": "in:low_exposure out:low_exposure",
    "clusterin_high_clusterout_high": "in:high_exposure out:high_exposure",
    # by exposure, whatever the cluster
    "balanced_popularity": "all:high_exposure all:low_exposure",
    # S-DPO with K negatives; the smaller lists are the beginnings of the greater
    "sdpo_3": "all:random:3",
    "sdpo_5": "all:random:5",
    "sdpo_10": "all:random:10",
}
PRESETS = {name: tuple(map(Selector.parse, expressions.split())) for name, expressions in _PRESETS.items()}


def parse_negatives(words: Iterable[str]) -> tuple[Selector, ...]:
    """Reads a list of selectors; a preset's name stands for its selectors, and one named twice stands once.

    Raises:
        `InputError`: naming the word that is neither, and what exists.

    ```python
    >>> [str(selector) for selector in parse_negatives(["dpo_two_negatives", "all:random:3"])]
    ['in:first', 'out:low_exposure', 'all:random:3']
    ```
    """
    selectors = []
    for word in words:
        selectors += [Selector.parse(word)] if ":" in word else find_preset(word)
    return tuple(dict.fromkeys(selectors))


def find_preset(name: str) -> tuple[Selector, ...]:
    """Returns the selectors of a data set that has a name.

    Raises:
        `InputError`: naming the presets that exist.
    """
    if name not in PRESETS:
        raise InputError(f"{name}: is no preset, nor a selector pool:order[:count]{_known(name, PRESETS, 'presets')}")
    return PRESETS[name]
