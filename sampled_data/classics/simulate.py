"""Simulates reading histories over public-domain books and writes them as a data folder.

```bash
# from the project's root; writes what is in the repository already, byte for byte
python -m sampled_data.classics.simulate

# other readers, in another place
python -m sampled_data.classics.simulate --seed 7 --output_dir classics_seed7
```

THE READERS DO NOT EXIST. The books do (books.csv); the histories come from the random numbers below, and serve tests
and people without a network. No result is to be reported on them.

A reader's taste is a Dirichlet draw over the genres, a book's popularity a power law of its rank, and the ranks are
drawn once. A reader takes books one after the other, none twice, each with a probability proportional to
popularity x (the taste for its genres + a little curiosity). The last one is the target.
"""

import csv
import random
import tempfile
from pathlib import Path

from cebs.catalogue import Catalogue
from cebs.prompts import Record
from cebs.ratings import DATA_FILES, SPLITS, Wording, make_record, write_data_folder
from utils import InputError, RunArguments, ScriptParser, run_script, write_text

BOOKS = Path(__file__).with_name("books.csv")
READERS = {"train": 256, "valid": 64, "test": 128}
HISTORY_LENGTH = 10
TASTE = 0.3  # Dirichlet's alpha: the smaller, the fewer genres a reader cares about
CURIOSITY = 0.01  # what a book of none of the reader's genres has instead of taste
POPULARITY = 0.8  # exponent of the power law

SIMULATED = Wording(
    instruction="Given a list of books that the user enjoyed, please recommend a new book that the user may like",
    before="The user has read the following books before: ",
    after=". Please recommend a new book that the user may like.",
)


def read_books(path: Path = BOOKS) -> Catalogue:
    """Reads the books: `title,author,year,genres`, the genres separated by `|`."""
    with path.open(encoding="utf-8", newline="") as file:
        genres = {f"{book['title']} ({book['year']})": book["genres"].split("|") for book in csv.DictReader(file)}
    return Catalogue(list(genres), genres, sorted({genre for names in genres.values() for genre in names}))


def simulate(books: Catalogue, seed: int) -> dict[str, list[Record]]:
    """Returns the simulated records of each split; every record is another reader."""
    rng = random.Random(seed)
    ranks = list(range(1, len(books.titles) + 1))
    rng.shuffle(ranks)
    popularity = [rank**-POPULARITY for rank in ranks]
    splits = {}
    for split in SPLITS:
        splits[split] = []
        for _ in range(READERS[split]):
            taste = {genre: rng.gammavariate(TASTE, 1) for genre in books.counted_genres}
            total = sum(taste.values())
            weights = [
                popularity[index] * (CURIOSITY + sum(taste[genre] for genre in names) / len(names) / total)
                for index, names in enumerate(books.genres[title] for title in books.titles)
            ]
            # the order of exponential arrival times is that of draws without replacement
            arrivals = sorted((rng.expovariate(weight), index) for index, weight in enumerate(weights))
            read = [books.titles[index] for _, index in arrivals[: HISTORY_LENGTH + 1]]
            splits[split].append(make_record(read[:-1], read[-1], SIMULATED))
    return splits


def main(script_args: RunArguments) -> None:
    books = read_books()
    folder = Path(script_args.output_dir)
    with tempfile.TemporaryDirectory() as temporary:
        write_data_folder(temporary, simulate(books, script_args.seed), books)
        texts = {name: (Path(temporary) / name).read_text(encoding="utf-8") for name in DATA_FILES}
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != text and not script_args.overwrite:
            raise InputError(f"{path}: is there and differs; use --overwrite or another --output_dir")
    for name, text in texts.items():
        write_text(folder / name, text)
    print(f"{folder}: {READERS} SIMULATED readers of {len(books.titles)} books, {len(books.counted_genres)} genres")


def make_parser() -> ScriptParser:
    return ScriptParser(RunArguments, description=__doc__, defaults="sampled_data/classics/simulate.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
