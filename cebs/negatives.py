"""How negatives are chosen: candidates, interest cluster, exposure (rules 1 to 7 of the method)."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from cebs.catalogue import Catalogue, exposure_counts, interest_cluster
from cebs.prompts import NO_PREDICTION, Record
from utils import InputError, record_seed


@dataclass(frozen=True)
class Candidate:
    """A title that the model proposed for a record.

    Args:
        title (`str`): as it was generated.
        in_catalogue (`bool`): whether it exists; one that does not has no genres and no exposure.
        genres (`list[str]`): its genres.
        exposure (`int`): how often it occurs in the training records.
        in_cluster (`bool`): whether it shares a genre with the user's interest cluster.
    """

    title: str
    in_catalogue: bool
    genres: list[str]
    exposure: int
    in_cluster: bool


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


class NegativeSelector:
    """Describes candidates and chooses negatives among them, record by record.

    Args:
        catalogue (`Catalogue`): titles and genres.
        train_records (`Iterable[Record]`): the records that exposure is counted over.
        unknown_titles (`str`): `"keep"` admits titles that are not in the catalogue as negatives (the published
            behaviour), `"drop"` does not.
        seed (`int`): seed of the random fall-backs.
    """

    def __init__(self, catalogue: Catalogue, train_records: Iterable[Record], unknown_titles: str, seed: int):
        self.catalogue = catalogue
        self.exposure = exposure_counts(train_records)
        self.unknown_titles = unknown_titles
        self.seed = seed

    def describe(self, titles: Iterable[str], record: Record) -> list[Candidate]:
        """Returns the candidates of a record, in the order given."""
        cluster = set(interest_cluster(record.history, self.catalogue))
        described = []
        for title in titles:
            known = title in self.catalogue
            genres = self.catalogue.genres_of(title)
            exposure = self.exposure[title] if known else 0
            described.append(Candidate(title, known, genres, exposure, not cluster.isdisjoint(genres)))
        return described

    def eligible(self, candidates: Iterable[Candidate], record: Record) -> list[Candidate]:
        """Returns the candidates that may be a negative: not the target, not in the history, not empty (rule 6)."""
        taken = {record.target, *record.history, NO_PREDICTION, ""}
        return [
            candidate
            for candidate in candidates
            if candidate.title not in taken and (candidate.in_catalogue or self.unknown_titles == "keep")
        ]

    def has_match(self, candidates: Iterable[Candidate], record: Record) -> bool:
        """Says whether some candidate can be the hard negative, so that sampling may stop (rule 2)."""
        return any(candidate.in_cluster for candidate in self.eligible(candidates, record))

    def hard(self, candidates: list[Candidate], record: Record, split: str, index: int) -> Selection:
        """Returns the first candidate inside the cluster (rule 3)."""
        return self._choose(
            "hard", candidates, record, split, index, lambda pool: next((c for c in pool if c.in_cluster), None)
        )

    def long_tail(self, candidates: list[Candidate], record: Record, split: str, index: int) -> Selection:
        """Returns the candidate outside the cluster with the least exposure; ties go to the first sampled (rule 5)."""
        return self._choose(
            "long_tail",
            candidates,
            record,
            split,
            index,
            lambda pool: min((c for c in pool if not c.in_cluster), key=lambda c: c.exposure, default=None),
        )

    def random(self, titles: list[str], record: Record, split: str, index: int) -> str:
        """Returns one of the titles at random, but never the record's own target nor a title of its history.

        Raises:
            `InputError`: if nothing is left.
        """
        taken = {record.target, *record.history, ""}
        free = [title for title in titles if title not in taken]
        if not free:
            raise InputError(
                f"{split}_sample.json: record {index}: no title is left to be its negative: all {len(titles)} to "
                "choose from are its target or in its history; use more records"
            )
        return free[self._generator("random", split, index).integers(len(free))]

    def _choose(
        self,
        kind: str,
        candidates: list[Candidate],
        record: Record,
        split: str,
        index: int,
        choose: Callable[[list[Candidate]], Candidate | None],
    ) -> Selection:
        pool = self.eligible(candidates, record)
        chosen = choose(pool)
        if chosen is not None:
            return Selection(chosen.title, "", chosen.in_catalogue)
        if pool:
            fallback = pool[self._generator(kind, split, index).integers(len(pool))]
            return Selection(fallback.title, "candidate", fallback.in_catalogue)
        return Selection(self.random(self.catalogue.titles, record, split, index), "catalogue", True)

    def _generator(self, kind: str, split: str, index: int) -> np.random.Generator:
        return np.random.default_rng(record_seed(self.seed, f"{split}/{kind}", index))


def fallback_counts(selections: Iterable[Selection]) -> dict[str, int]:
    """Counts what became of the negatives of one kind, for `run.json`."""
    selections = list(selections)
    kinds = Counter(selection.fallback for selection in selections)
    return {
        "records": len(selections),
        "random_candidate": kinds["candidate"],
        "random_catalogue_title": kinds["catalogue"],
        "not_in_catalogue": sum(not selection.in_catalogue for selection in selections),
    }
