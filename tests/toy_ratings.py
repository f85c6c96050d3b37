"""A small MovieLens: films of every oddity that the real ones have, ratings, and both formats of the source."""

from pathlib import Path

import numpy as np

TOY_SIZES = ["--train_size", "30", "--valid_size", "8", "--test_size", "20", "--history_length", "3"]

# number, title, year, genres
TOY_FILMS = [
    (1, "Toy Story", "1995", ["Animation", "Children's"]),
    (2, 'The "Double" Quote', "1990", ["Comedy"]),
    (3, "Misérables, Les", "1995", ["Drama"]),
    (4, "Chasing Amy", "1997", ["Drama"]),
    (5, "", "", ["unknown"]),  # item 267 of MovieLens
    (6, "Chasing Amy", "1997", ["Comedy", "Drama"]),
    (7, "Good Morning", "1971", ["unknown"]),
    (8, "Land Before Time III (1995)", "V", ["Animation"]),
    *((number, f"Film {number}", "1980", ["Drama"] if number % 2 else ["Comedy"]) for number in range(9, 25)),
]
TOY_GENRES = ["unknown", "Animation", "Children's", "Comedy", "Drama"]


def toy_ratings() -> list[tuple[int, int, int, int]]:
    """Six users rate all films, several in the same second; the later the user, the later the ratings."""
    rng = np.random.default_rng(0)
    return [
        (user, item, int(rng.choice([2, 4, 5])), 880_000_000 + 50 * user + place // 3)
        for user in range(1, 7)
        for place, item in enumerate(rng.permutation([film[0] for film in TOY_FILMS]).tolist())
    ]


def write_grouplens(folder: Path, films: list, genres: list[str], ratings: list) -> Path:
    """Writes films and ratings as GroupLens' archive has them."""
    folder.mkdir()
    lines = []
    for number, title, year, names in films:
        title = f"{title} ({year})" if title else "unknown"
        flags = "|".join(str(int(genre in names)) for genre in genres)
        lines.append(f"{number}|{title}|01-Jan-1995||http://us.imdb.com/M/title-exact?{number}|{flags}\n")
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    (folder / "u.genre").write_text("".join(f"{genre}|{index}\n" for index, genre in enumerate(genres)) + "\n")
    (folder / "u.data").write_text("".join("\t".join(map(str, rating)) + "\n" for rating in ratings))
    return folder


def write_atomic(folder: Path, films: list, ratings: list) -> Path:
    """Writes films and ratings as the package on PyPI has them."""
    folder.mkdir()
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"]
    for number, title, year, names in films:
        lines.append(f"{number}\t{title or 'unkonwn'}\t{year or 'unkonwn'}\t{' '.join(names)}\n")
    (folder / "ml-100k.item").write_text("".join(lines), encoding="utf-8")
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(header + "".join("\t".join(map(str, r)) + "\n" for r in ratings))
    return folder
