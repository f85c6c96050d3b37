"""The catalogue of a data folder: titles, genres, interest clusters and exposure."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cebs.errors import InputError
from cebs.files import read_json
from cebs.prompts import Record

CLUSTER_SIZE = 3
CATALOGUE_FILES = ("name2genre.json", "name2id.json", "id2name.json", "genre_dict.json")


@dataclass(frozen=True)
class Catalogue:
    """The titles that can be recommended.

    Args:
        titles (`list[str]`): all titles in `id2name` order; a title's place is its id.
        genres (`dict[str, list[str]]`): the genres of each title.
        counted_genres (`list[str]`): the genres that DGU and MGU count, in order.
    """

    titles: list[str]
    genres: dict[str, list[str]]
    counted_genres: list[str]

    def __contains__(self, title: str) -> bool:
        return title in self.genres

    def genres_of(self, title: str) -> list[str]:
        """Returns the genres of a title; one that is not in the catalogue has none."""
        return self.genres.get(title, [])


def load_catalogue(data_dir: str | Path) -> Catalogue:
    """Reads `name2genre.json`, `name2id.json`, `id2name.json` and `genre_dict.json`, and checks that they agree.

    Raises:
        `InputError`: naming the file and the entry that is wrong.
    """
    data_dir = Path(data_dir)
    name2genre, name2id, id2name, genre_dict = (_read_mapping(data_dir / name) for name in CATALOGUE_FILES)
    for title, genres in name2genre.items():
        if not isinstance(genres, list) or not all(isinstance(genre, str) for genre in genres):
            raise InputError(f"{data_dir / 'name2genre.json'}: {title!r}: genres must be a list of strings")
    titles = []
    for index in range(len(id2name)):
        title = id2name.get(str(index))
        if title is None:
            raise InputError(f"{data_dir / 'id2name.json'}: id {index} is missing; ids must run from 0 without gaps")
        if not isinstance(title, str):
            raise InputError(f"{data_dir / 'id2name.json'}: id {index}: expected a title, not {title!r}")
        if title not in name2genre:
            raise InputError(f"{data_dir / 'name2genre.json'}: {title!r} (id {index}) has no entry; give it a list")
        if type(name2id.get(title)) is not int or name2id[title] != index:
            raise InputError(f"{data_dir / 'name2id.json'}: {title!r} should have id {index}, as in id2name.json")
        titles.append(title)
    for name, mapping in (("name2genre.json", name2genre), ("name2id.json", name2id)):
        if len(mapping) != len(titles):
            title = next(iter(mapping.keys() - set(titles)))
            raise InputError(f"{data_dir / 'id2name.json'}: {title!r} of {name} has no id; give it one")
    for genre, count in genre_dict.items():
        if type(count) is not int:
            raise InputError(f"{data_dir / 'genre_dict.json'}: {genre!r}: expected the number 0, not {count!r}")
    return Catalogue(titles, name2genre, list(genre_dict))


def _read_mapping(path: Path) -> dict:
    mapping = read_json(path)
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{path}: expected a JSON object that is not empty; prepare_data.py writes one")
    return mapping


def interest_cluster(history: Iterable[str], catalogue: Catalogue, size: int = CLUSTER_SIZE) -> list[str]:
    """Returns the user's interest cluster: the genres that occur most often over the history, at most `size`.

    Ties go to the genre met first (`Counter.most_common` keeps the order of insertion).
    """
    counts = Counter(genre for title in history for genre in catalogue.genres_of(title))
    return [genre for genre, _ in counts.most_common(size)]


def exposure_counts(records: Iterable[Record]) -> Counter[str]:
    """Returns how often each title occurs in the training records, in histories and as target."""
    exposure: Counter[str] = Counter()
    for record in records:
        exposure.update(record.history)
        exposure[record.target] += 1
    return exposure
