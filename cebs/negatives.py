"""How negatives are chosen: candidates, interest cluster, exposure (rules 1 to 7 of the method), and any selector."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cebs.catalogue import Catalogue, exposure_counts, interest_cluster
from cebs.errors import InputError
from cebs.processes import record_seed
from cebs.prompts import NO_PREDICTION, Record
from cebs.selectors import Selector
from cebs.series import continues_series

# rules 3 and 5 draw under names of their own, any other selector under its pool and order
RULES = {("in", "first"): "hard", ("out", "low_exposure"): "long_tail"}


@dataclass(frozen=True)
class Candidate:
    """A title that the model proposed for a record.

    Args:
        title (`str`): as it was generated.
        in_catalogue (`bool`): whether it exists; one that does not has no genres and no exposure.
        genres (`list[str]`): its genres.
        exposure (`int`): how often it occurs in the training records.
        in_cluster (`bool`): whether it shares a genre with the user's interest cluster.
        log_prob (`float`, *optional*): log-probability of the whole completion in nats, at temperature 1; `None`
            where it was not kept.
    """

    title: str
    in_catalogue: bool
    genres: list[str]
    exposure: int
    in_cluster: bool
    log_prob: float | None


@dataclass(frozen=True)
class Selection:
    """A negative, and whether it had to be drawn at random for want of one that fits.

    Args:
        title (`str`): the negative.
        fallback (`str`): empty, `"candidate"` (a random candidate) or `"catalogue"` (a random catalogue title, where
            no candidate can serve at all).
        in_catalogue (`bool`): whether the title exists.
    """

    title: str
    fallback: str
    in_catalogue: bool


class NegativeSampler:
    """Describes candidates and chooses negatives among them, record by record.

    Args:
        catalogue (`Catalogue`): titles and genres.
        train_records (`Iterable[Record]`): the records that exposure is counted over.
        unknown_titles (`str`): `"keep"` admits titles that are not in the catalogue as negatives (the published
            behaviour), `"drop"` does not.
        same_series (`str`): `"keep"` admits titles of a series that the history holds, `"drop"` does not: who has read
            two volumes may well read the third.
        fallback (`str`): what a selector does that finds nothing: `"random"` draws one title as rules 3 and 5 say,
            `"skip"` leaves the negative out.
        seed (`int`): seed of all random choices.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        train_records: Iterable[Record],
        *,
        unknown_titles: str = "keep",
        same_series: str = "keep",
        fallback: str = "random",
        seed: int,
    ):
        self.catalogue = catalogue
        self.exposure = exposure_counts(train_records)
        self.unknown_titles = unknown_titles
        self.same_series = same_series
        self.fallback = fallback
        self.seed = seed

    def describe(self, proposed: Iterable[tuple[str, float | None]], record: Record) -> list[Candidate]:
        """Returns the candidates of a record, given as titles and log-probabilities, in the order given."""
        cluster = set(interest_cluster(record.history, self.catalogue))
        described = []
        for title, log_prob in proposed:
            known = title in self.catalogue
            genres = self.catalogue.genres_of(title)
            exposure = self.exposure[title] if known else 0
            described.append(Candidate(title, known, genres, exposure, not cluster.isdisjoint(genres), log_prob))
        return described

    def eligible(self, candidates: Iterable[Candidate], record: Record) -> list[Candidate]:
        """Returns the candidates that may be a negative: not the target, not in the history, not empty (rule 6)."""
        taken = {record.target, *record.history, NO_PREDICTION, ""}
        return [
            candidate
            for candidate in candidates
            if candidate.title not in taken
            and (candidate.in_catalogue or self.unknown_titles == "keep")
            and not self._spared(candidate.title, record)
        ]

    def has_match(self, candidates: Iterable[Candidate], record: Record) -> bool:
        """Says whether some candidate can be the hard negative, so that sampling may stop (rule 2)."""
        return any(candidate.in_cluster for candidate in self.eligible(candidates, record))

    def select(
        self,
        selectors: Iterable[Selector],
        candidates: Iterable[Candidate],
        record: Record,
        split: str,
        index: int,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> dict[Selector, list[Selection]]:
        """Returns the negatives that each selector takes from a record's candidates; none takes a title twice.

        A selector takes fewer than `count` where its pool has fewer titles. From an empty pool it takes one, drawn at
        random from all eligible candidates, or without any from the catalogue (rules 3 and 5); or none, with
        `fallback="skip"`. What it takes does not depend on the others, and a greater count only adds to the end.

        Args:
            selectors: pools, orders and counts.
            candidates: the record's candidates, in the order generated.
            record: the record.
            split, index: where it stands; its random numbers come from there and the seed alone.
            embeddings: unit vectors `[D]` by title, of every eligible candidate, target and history title; the orders
                by similarity need them.
        """
        eligible = self.eligible(candidates, record)
        if not eligible:
            skip = self.fallback == "skip"
            stand_in = [] if skip else self.random(self.catalogue.titles, record, split, index)
            return {selector: [Selection(title, "catalogue", True) for title in stand_in] for selector in selectors}
        pools = {
            "in": [candidate for candidate in eligible if candidate.in_cluster],
            "out": [candidate for candidate in eligible if not candidate.in_cluster],
            "all": eligible,
        }
        taken = {}
        for selector in selectors:
            if pool := pools[selector.pool]:
                ordered = self._in_order(selector, pool, record, split, index, embeddings)
                titles = list(dict.fromkeys(candidate.title for candidate in ordered))[: selector.count]
                taken[selector] = [Selection(title, "", title in self.catalogue) for title in titles]
            elif self.fallback == "skip":
                taken[selector] = []
            else:
                drawn = eligible[self._generator(_draw_name(selector), split, index).integers(len(eligible))]
                taken[selector] = [Selection(drawn.title, "candidate", drawn.in_catalogue)]
        return taken

    def random(self, titles: list[str], record: Record, split: str, index: int, count: int = 1) -> list[str]:
        """Returns titles at random, none twice, and never one that may be no negative of the record.

        They are `count`, or all that are left where these are fewer; a greater count only adds to the end.

        Raises:
            `InputError`: if nothing is left.
        """
        free = self._free(titles, record, split, index)
        generator = self._generator("random", split, index)
        return [free.pop(generator.integers(len(free))) for _ in range(min(count, len(free)))]

    def popular(self, record: Record, split: str, index: int, count: int = 1) -> list[str]:
        """Returns titles of the catalogue drawn in proportion to their exposure; else as [`random`].

        Drawn without replacement, by the smallest of exponential times whose rates are the exposures (Efraimidis and
        Spirakis, 2006, Information Processing Letters).

        Raises:
            `InputError`: if no title of the training records is left.
        """
        free = self._free([title for title in self.catalogue.titles if self.exposure[title]], record, split, index)
        rates = np.array([self.exposure[title] for title in free])
        times = self._generator("popularity", split, index).exponential(size=len(free)) / rates
        return [free[place] for place in np.argsort(times, kind="stable")[:count]]

    def _free(self, titles: list[str], record: Record, split: str, index: int) -> list[str]:
        """Returns the titles that may be a negative of the record.

        Raises:
            `InputError`: if there is none.
        """
        taken = {record.target, *record.history, ""}
        free = [title for title in titles if title not in taken and not self._spared(title, record)]
        if not free:
            raise InputError(
                f"{split}_sample.json: record {index}: no title is left to be its negative: all {len(titles)} to "
                "choose from are its target or in its history (or, with --same_series drop, of a series of it); use "
                "more records"
            )
        return free

    def _spared(self, title: str, record: Record) -> bool:
        return self.same_series == "drop" and continues_series(title, record.history)

    def _in_order(
        self,
        selector: Selector,
        pool: list[Candidate],
        record: Record,
        split: str,
        index: int,
        embeddings: Mapping[str, np.ndarray] | None,
    ) -> list[Candidate]:
        """Returns the pool in the selector's order; sorting is stable, so that ties stay as they were generated."""
        match selector.order:
            case "first":
                return pool
            case "random":
                generator = self._generator(_draw_name(selector), split, index)
                return [pool[place] for place in generator.permutation(len(pool))]
            case "low_exposure":
                return sorted(pool, key=lambda candidate: candidate.exposure)
            case "high_exposure":
                return sorted(pool, key=lambda candidate: -candidate.exposure)
            case "likely":
                return sorted(pool, key=lambda candidate: -candidate.log_prob)
        end, reference = selector.order.split("_")
        titles = [record.target] if reference == "target" else record.history
        if not titles:
            return pool  # no history, nothing to be near to
        # the mean of the cosines with several unit vectors is the product with their mean
        towards = np.mean([embeddings[title] for title in titles], axis=0)  # [D]
        sign = -1 if end == "nearest" else 1
        return sorted(pool, key=lambda candidate: sign * float(embeddings[candidate.title] @ towards))

    def _generator(self, name: str, split: str, index: int) -> np.random.Generator:
        return np.random.default_rng(record_seed(self.seed, f"{split}/{name}", index))


def _draw_name(selector: Selector) -> str:
    """Returns what a selector's random numbers are named after; the count is no part of it."""
    return RULES.get((selector.pool, selector.order), f"{selector.pool}:{selector.order}")


def selection_counts(selections: Iterable[list[Selection]], count: int) -> dict[str, int]:
    """Counts what became of the negatives of one selector, for `run.json`.

    Args:
        selections: what it took, record by record.
        count: how many titles it asks for.
    """
    selections = list(selections)
    titles = [selection for chosen in selections for selection in chosen]
    fallbacks = Counter(selection.fallback for selection in titles)
    return {
        "titles": len(titles),
        "records_with_fewer_than_count": sum(0 < len(chosen) < count for chosen in selections),
        "random_candidate": fallbacks["candidate"],
        "random_catalogue_title": fallbacks["catalogue"],
        "left_out": sum(not chosen for chosen in selections),
        "not_in_catalogue": sum(not selection.in_catalogue for selection in titles),
    }
