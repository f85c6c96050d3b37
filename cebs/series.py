"""Series in titles, as booksellers write them: `The Score (Off-Campus, #3)`, or with the series first.

`The Score (Off-Campus, #3)` and `Off-Campus, #3: The Score` are two spellings of one title. In the first a language
model has to know which words begin the next volume; in the second it can copy the name of the series from the history.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

SERIES_BEHIND = re.compile(r"(?P<words>.*\S)(?P<space>\s*)\((?P<series>[^()]*#[^()]*)\)")
SERIES_FIRST = re.compile(r"(?P<series>[^()]*#[^():]*):(?P<space>\s*)(?P<words>.*)")
VOLUME = re.compile(r"(?P<name>[^#]+?)[,\s]*#\s*(?P<number>\d+(\.\d+)?)?")


class Volume(NamedTuple):
    """A title's place in a series."""

    series: str
    number: float  # the first one of several, 0 where there is none


@lru_cache(maxsize=2**16)
def volumes(title: str) -> tuple[Volume, ...]:
    """Returns the series of a title, in either spelling, and its number in each.

    ```python
    >>> volumes("Never Too Far (Rosemary Beach, #2; Too Far, #2)")
    (Volume(series='Rosemary Beach', number=2.0), Volume(series='Too Far', number=2.0))
    >>> volumes("Immortals After Dark #5: Dark Needs at Night's Edge"), volumes("Emma")
    ((Volume(series='Immortals After Dark', number=5.0),), ())
    ```
    """
    found = SERIES_BEHIND.fullmatch(title) or SERIES_FIRST.fullmatch(title)
    parts = found["series"].split(";") if found else []
    matches = [match for part in parts if (match := VOLUME.match(part.strip()))]
    return tuple(Volume(match["name"], float(match["number"] or 0)) for match in matches)


def continues_series(title: str, history: Sequence[str]) -> bool:
    """Says whether a title is of a series that the history holds, whichever volume it is."""
    own = {volume.series for volume in volumes(title)}
    return any(volume.series in own for past in history for volume in volumes(past))


def series_first(title: str) -> str:
    """Returns a title with its series in front; one without a series stays as it is. Spaces are kept as they are.

    ```python
    >>> series_first("The Score (Off-Campus, #3)"), series_first("Hunger: A Memoir of (My) Body")
    ('Off-Campus, #3: The Score', 'Hunger: A Memoir of (My) Body')
    ```
    """
    found = SERIES_BEHIND.fullmatch(title)
    return f"{found['series']}:{found['space']}{found['words']}" if found else title
