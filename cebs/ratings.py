"""Ratings in, data folder out: reading MovieLens, histories, the split by time, and the files of a data folder."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cebs.catalogue import CATALOGUE_FILES, Catalogue
from cebs.errors import InputError
from cebs.files import read_text, write_json
from cebs.processes import record_seed
from cebs.prompts import Record, quote, read_records

SPLITS = ("train", "valid", "test")
DATA_FILES = (*(f"{split}_sample.json" for split in SPLITS), *CATALOGUE_FILES)
LIKED = 4  # stars from which on a rating counts as liking
MOST_STARS = 5
LATEST_TIME = 253_402_300_800  # the year 10000, beyond which there are no dates
ATOMIC_FILES = ("ml-100k.inter", "ml-100k.item")  # MovieLens-100K in RecBole's format
GROUPLENS_FILES = ("u.data", "u.item", "u.genre")  # MovieLens-100K in GroupLens' own archive
INTER_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
ITEM_COLUMNS = ("item_id", "movie_title", "release_year", "class")
NO_TITLE = ("", "unknown", "unkonwn")  # MovieLens' item 267 has none; RecBole's copy misspells it
YEAR = re.compile(r"\d{4}")
# an article that stands behind its title, in front of the year or of a title in another language
ARTICLE = re.compile(r"(^|\()([^()]+?), (The|An?|La|Les?|Il|Der|Das|Die|Det|O|L')(?= \(|\)|$)")


class Rating(NamedTuple):
    """One user's rating of one title."""

    user: str
    title: str
    stars: float
    time: int  # seconds


class Window(NamedTuple):
    """A history and the title that came next."""

    user: str
    history: tuple[str, ...]
    target: str
    time: int  # of the target; nothing in the history is later


@dataclass(frozen=True)
class Wording:
    """How a data set's records are worded: `instruction`, and what stands before and after the history's titles."""

    instruction: str
    before: str
    after: str


# ---------------------------------------------------------------------------------------------------------------------
# MovieLens
# ---------------------------------------------------------------------------------------------------------------------


def movielens_files(folder: str | Path) -> list[Path]:
    """Returns the files of a MovieLens-100K folder, in either of its two formats.

    Raises:
        `InputError`: if neither is complete.
    """
    folder = Path(folder)
    for names in (ATOMIC_FILES, GROUPLENS_FILES):
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    raise InputError(
        f"{folder}: no MovieLens-100K there; --source needs a folder with {', '.join(GROUPLENS_FILES)}"
        f" (GroupLens' archive, unpacked) or with {', '.join(ATOMIC_FILES)}"
    )


def read_movielens(paths: Sequence[Path]) -> tuple[list[Rating], Catalogue]:
    """Reads what `movielens_files` found. Titles carry their year; films of the same title and year are one.

    Returns:
        `tuple[list[Rating], Catalogue]`: all ratings of films that have a title, and the catalogue: titles in the
        order of the source, each with the genres of all films of that title, in alphabetical order.

    Raises:
        `InputError`: naming the file and the line that is wrong.
    """
    if len(paths) == len(ATOMIC_FILES):
        ratings_path, items_path = paths
        films = _read_atomic_films(items_path)
        rows = _rows(ratings_path, "\t", INTER_COLUMNS, header=True)
    else:
        ratings_path, items_path, genres_path = paths
        films = _read_grouplens_films(items_path, genres_path)
        rows = _rows(ratings_path, "\t", INTER_COLUMNS, header=False)

    title_of: dict[str, str] = {}
    genres: dict[str, set[str]] = {}
    for item, title, film_genres in films:
        if item in title_of:
            raise InputError(f"{items_path}: item {item} occurs twice; keep one of its lines")
        title_of[item] = title
        if title not in NO_TITLE:
            genres.setdefault(title, set()).update(genre for genre in film_genres if genre != "unknown")
    if not genres:
        raise InputError(f"{items_path}: no film with a title; the catalogue would be empty")
    counted = sorted({genre for film_genres in genres.values() for genre in film_genres})
    if not counted:
        raise InputError(f"{items_path}: no film has a genre; DGU and MGU need genres to count")

    ratings = []
    for place, (user, item, stars, time) in rows:
        if item not in title_of:
            raise InputError(f"{place}: item {item} is not in {items_path.name}; take both files from one source")
        try:
            rating = Rating(user, title_of[item], float(stars), int(float(time)))
        except (ValueError, OverflowError) as error:
            raise InputError(f"{place}: rating and timestamp must be numbers, not {stars!r} and {time!r}") from error
        if not 0 <= rating.stars <= MOST_STARS:
            raise InputError(f"{place}: rating must be a number from 0 to {MOST_STARS}, not {stars!r}")
        if not 0 <= rating.time < LATEST_TIME:
            raise InputError(f"{place}: timestamp must be seconds since 1970, not {time!r}")
        if not user.strip():
            raise InputError(f"{place}: the user is missing; take the file from its source again")
        if rating.title in genres:
            ratings.append(rating)
    return ratings, Catalogue(list(genres), {title: sorted(names) for title, names in genres.items()}, counted)


def _read_atomic_films(path: Path) -> Iterable[tuple[str, str, list[str]]]:
    for _, (item, title, year, genres) in _rows(path, "\t", ITEM_COLUMNS, header=True):
        # where the year is no number ('V' for films that came out on video), the title has it already
        yield item, _clean(f"{title} ({year})" if YEAR.fullmatch(year) else title), genres.split()


def _read_grouplens_films(path: Path, genres_path: Path) -> Iterable[tuple[str, str, list[str]]]:
    genres = [name for _, (name, _) in _rows(genres_path, "|", ("genre", "number"), header=False)]
    columns = ("item", "title", "release date", "video release date", "URL", *genres)
    for place, (item, title, _, _, _, *flags) in _rows(path, "|", columns, header=False, encoding="latin-1"):
        if not set(flags) <= {"0", "1"}:
            raise InputError(f"{place}: the genre columns must be 0 or 1; is this GroupLens' u.item?")
        names = [genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"]
        yield item, _clean(title.strip().removesuffix("(V)")), names


def _clean(title: str) -> str:
    """Returns a title as it is spoken of: `Full Monty, The (1997)` is `The Full Monty (1997)`, and L' joins its noun.

    A title ends at the next double quote wherever it is read, so its own quotes become single ones.
    """
    title = " ".join(title.replace('"', "'").split())
    return ARTICLE.sub(lambda match: f"{match[1]}{match[3]} {match[2]}", title).replace("L' ", "L'")


def _rows(
    path: Path, separator: str, columns: Sequence[str], *, header: bool, encoding: str = "utf-8-sig"
) -> Iterable[tuple[str, list[str]]]:
    """Yields the lines of a table with their place (`file: line 3`), after checking that none has a column missing."""
    lines = read_text(path, encoding=encoding).replace("\r\n", "\n").split("\n")  # splitlines() splits at rarer signs
    start = 1
    if header:
        found = [name.split(":")[0] for name in lines[0].split(separator)]
        if found != list(columns):
            raise InputError(f"{path}: line 1: expected the header {', '.join(columns)}; take the file from RecBole")
        lines, start = lines[1:], 2
    rows = 0
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        fields = line.split(separator)
        if len(fields) != len(columns):
            raise InputError(
                f"{path}: line {number}: {len(fields)} columns instead of {len(columns)} ({', '.join(columns[:5])} ...)"
                "; the file is damaged, take it from its source again"
            )
        rows += 1
        yield f"{path}: line {number}", fields
    if not rows:
        raise InputError(f"{path}: the file has no entry; take it from its source again")


# ---------------------------------------------------------------------------------------------------------------------
# From ratings to records
# ---------------------------------------------------------------------------------------------------------------------


def liked_in_order(ratings: Iterable[Rating], seed: int) -> dict[str, list[Rating]]:
    """Returns what each user liked, oldest first, every title once (at its first time).

    A third and more of MovieLens' ratings share their second with the one before. Their order is drawn from the seed,
    not taken from the source: sorted by film number, say, they would teach a model the numbers.
    The order of the ratings in the source has no influence.
    """
    ordered = sorted(rating for rating in ratings if rating.stars >= LIKED)
    draws = np.random.default_rng(record_seed(seed, "ties", 0)).permutation(len(ordered))
    liked: dict[str, dict[str, Rating]] = {}
    for _, _, rating in sorted((rating.time, int(draw), rating) for rating, draw in zip(ordered, draws, strict=True)):
        liked.setdefault(rating.user, {}).setdefault(rating.title, rating)
    return {user: list(liked[user].values()) for user in sorted(liked)}


def sliding_windows(liked: dict[str, list[Rating]], history_length: int) -> list[Window]:
    """Returns every run of `history_length` titles of a user with the title after it."""
    return [
        Window(user, tuple(rating.title for rating in ratings[end - history_length : end]), ratings[end].title, time)
        for user, ratings in liked.items()
        for end in range(history_length, len(ratings))
        for time in [ratings[end].time]
    ]


def split_by_time(windows: Sequence[Window], valid_share: float, test_share: float) -> dict[str, list[Window]]:
    """Divides windows into train, valid and test by the time of their targets.

    The boundaries are the seconds at which `valid_share + test_share` and `test_share` of all targets are still to
    come. A target at a boundary's own second belongs to the later split, so that everything in a training window is
    strictly older than every validation and test target.
    """
    times = sorted(window.time for window in windows)
    first_valid, first_test = (
        times[round(len(times) * (1 - share))] if round(len(times) * (1 - share)) < len(times) else math.inf
        for share in (valid_share + test_share, test_share)
    )
    return {
        "train": [window for window in windows if window.time < first_valid],
        "valid": [window for window in windows if first_valid <= window.time < first_test],
        "test": [window for window in windows if first_test <= window.time],
    }


def take_in_turns(windows: Sequence[Window], size: int, rng: np.random.Generator) -> list[Window]:
    """Samples windows so that no user gives another one before every user that has one left has given as many.

    Users and their windows come in random order. A smaller sample drawn with the same `rng` is the beginning of a
    larger one.
    """
    of_user: dict[str, list[Window]] = {}
    for index in rng.permutation(len(windows)):
        of_user.setdefault(windows[index].user, []).append(windows[index])
    users = sorted(of_user)
    order = [of_user[users[index]] for index in rng.permutation(len(users))]
    turns = range(max(map(len, order), default=0))
    return [user_windows[turn] for turn in turns for user_windows in order if turn < len(user_windows)][:size]


def make_record(history: Iterable[str], target: str, wording: Wording, user: str = "") -> Record:
    """Puts a history and a target into words."""
    titles = ", ".join(map(quote, history))
    return Record(wording.instruction, f"{wording.before}{titles}{wording.after}", f"{quote(target)}\n", user)


# ---------------------------------------------------------------------------------------------------------------------
# Data folders
# ---------------------------------------------------------------------------------------------------------------------


def write_data_folder(folder: str | Path, splits: dict[str, list[Record]], catalogue: Catalogue) -> None:
    """Writes the files of a data folder (`DATA_FILES`)."""
    folder = Path(folder)
    ids = {title: index for index, title in enumerate(catalogue.titles)}
    write_json(folder / "name2genre.json", {title: catalogue.genres[title] for title in catalogue.titles})
    write_json(folder / "name2id.json", ids)
    write_json(folder / "id2name.json", {str(index): title for title, index in ids.items()})
    write_json(folder / "genre_dict.json", dict.fromkeys(catalogue.counted_genres, 0))
    for split in SPLITS:
        write_json(folder / f"{split}_sample.json", [record.to_dict() for record in splits[split]])


def read_sprec_split(path: Path, catalogue: Catalogue) -> list[Record]:
    """Reads a `{train,valid,test}.json` file of SPRec.

    Raises:
        `InputError`: naming the file and the record that is wrong.
    """
    records = read_records(path)
    for index, record in enumerate(records):
        if record.input.strip() and not record.history:
            raise InputError(f"{path}: record {index}: input must hold the history's titles in double quotes")
    if not any(record.target in catalogue for record in records):
        raise InputError(f"{path}: no target is in name2genre.json; take data/ and eval/ of one and the same category")
    return records
