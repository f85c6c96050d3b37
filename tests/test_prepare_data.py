"""prepare_data.py as a user runs it, the logic of its split, and the data set that ships."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSICS, listing, run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_ratings import TOY_FILMS, TOY_GENRES, TOY_SIZES, toy_ratings, write_atomic, write_grouplens

import prepare_data
from cebs.catalogue import Catalogue, load_catalogue
from cebs.files import PROJECT
from cebs.prompts import read_records
from cebs.ratings import (
    ATOMIC_FILES,
    DATA_FILES,
    SPLITS,
    Rating,
    Window,
    liked_in_order,
    make_record,
    movielens_files,
    read_movielens,
    sliding_windows,
    split_by_time,
    take_in_turns,
    write_data_folder,
)
from cebs.series import series_first
from cebs.sources import MOVIELENS, find_movielens
from prepare_data import MOVIES
from sampled_data.classics import simulate
from utils import InputError, read_json

GOODREADS = PROJECT / "../shared/goodreads"
run = partial(run_main, "prepare_data")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in DATA_FILES}


@pytest.fixture
def grouplens(tmp_path: Path) -> Path:
    return write_grouplens(tmp_path / "archive", TOY_FILMS, TOY_GENRES, toy_ratings())


@pytest.fixture
def sprec(tmp_path: Path) -> Path:
    """A folder in SPRec's layout, of Goodreads where it lies beside the project, else of the classics."""
    origin = GOODREADS if GOODREADS.is_dir() else CLASSICS
    folder = tmp_path / "SPRec"
    for part in ("data", "eval"):
        (folder / part / "Goodreads").mkdir(parents=True)
    for split in SPLITS:
        shutil.copyfile(origin / f"{split}_sample.json", folder / f"data/Goodreads/{split}.json")
    for name in DATA_FILES[3:]:
        shutil.copyfile(origin / name, folder / "eval/Goodreads" / name)
    return folder


@pytest.fixture(scope="session")
def movielens() -> Path:
    try:
        return find_movielens()
    except InputError as error:
        pytest.skip(f"MovieLens-100K is neither in sampled_data/raw nor to be had from the package registry: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# The split
# ---------------------------------------------------------------------------------------------------------------------

rating_lists = st.lists(
    st.builds(
        Rating,
        user=st.sampled_from("abcde"),
        title=st.sampled_from([f"T{number}" for number in range(12)]),
        stars=st.sampled_from([1.0, 3.0, 4.0, 5.0]),
        time=st.integers(0, 30),
    ),
    max_size=150,
)
shares = st.floats(0.01, 0.49)


@given(rating_lists, st.integers(1, 4), shares, shares, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_histories_and_split(ratings, history_length, valid_share, test_share, seed):
    liked = liked_in_order(ratings, seed)
    first_time: dict[tuple[str, str], int] = {}
    for rating in ratings:
        if rating.stars >= 4:
            key = rating.user, rating.title
            first_time[key] = min(rating.time, first_time.get(key, rating.time))
    for user, mine in liked.items():
        assert [rating.time for rating in mine] == sorted(rating.time for rating in mine)
        assert {rating.title: rating.time for rating in mine} == {t: s for (u, t), s in first_time.items() if u == user}
    assert sum(map(len, liked.values())) == len(first_time)

    windows = sliding_windows(liked, history_length)
    assert len(windows) == sum(max(0, len(mine) - history_length) for mine in liked.values())
    for user, history, target, time in windows:
        assert len(history) == history_length and len({*history, target}) == history_length + 1
        assert all(first_time[user, title] <= time == first_time[user, target] for title in history)
    if not windows:
        return

    split = split_by_time(windows, valid_share, test_share)
    assert Counter(windows) == Counter(window for name in SPLITS for window in split[name])
    for earlier, later in (("train", "valid"), ("valid", "test"), ("train", "test")):
        # nothing that an earlier split holds, history or target, is as late as a later split's first target
        known = [first_time[w.user, title] for w in split[earlier] for title in (*w.history, w.target)]
        assert max(known, default=-1) < min((w.time for w in split[later]), default=10**9)


@given(rating_lists.flatmap(lambda ratings: st.tuples(st.just(ratings), st.permutations(ratings))))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_source_does_not_matter(ratings_twice):
    ratings, shuffled = ratings_twice
    assert liked_in_order(ratings, 42) == liked_in_order(shuffled, 42)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_users_take_turns(windows_per_user, data):
    windows = [Window(f"u{u}", (), f"{u}/{n}", 0) for u, count in enumerate(windows_per_user) for n in range(count)]
    size = data.draw(st.integers(0, len(windows)))
    taken = take_in_turns(windows, size, np.random.default_rng(1))
    assert len(taken) == size == len(set(taken)) and set(taken) <= set(windows)
    given_by = Counter(window.user for window in taken)
    most = max(given_by.values(), default=0)
    for user, count in enumerate(windows_per_user):
        assert given_by[f"u{user}"] >= min(count, most - 1), "a user gave two more than another that had some left"
    everything = take_in_turns(windows, len(windows), np.random.default_rng(1))
    assert everything[:size] == taken, "a smaller sample must be the beginning of a larger one"


def test_ties_are_not_in_the_order_of_the_films():
    """Ratings of one second in the order of film numbers would teach a model the numbers."""
    ratings = [Rating("u", f"T{number:02}", 5, 7) for number in range(50)]
    titles = [rating.title for rating in liked_in_order(ratings, 42)["u"]]
    assert titles != sorted(titles) and sorted(titles) == [rating.title for rating in ratings]
    assert titles != [rating.title for rating in liked_in_order(ratings, 43)["u"]]


# ---------------------------------------------------------------------------------------------------------------------
# MovieLens
# ---------------------------------------------------------------------------------------------------------------------


def test_grouplens_archive(grouplens, tmp_path):
    run("--source", grouplens, "--output_dir", tmp_path / "out", *TOY_SIZES)
    catalogue = load_catalogue(tmp_path / "out")
    titles = ["Toy Story (1995)", "The 'Double' Quote (1990)", "Les Misérables (1995)", "Chasing Amy (1997)"]
    titles += ["Good Morning (1971)", "Land Before Time III (1995)"]
    assert catalogue.titles == [*titles, *(f"Film {number} (1980)" for number in range(9, 25))]
    assert catalogue.genres["Chasing Amy (1997)"] == ["Comedy", "Drama"]
    assert catalogue.genres["Good Morning (1971)"] == []
    assert catalogue.genres["Toy Story (1995)"] == ["Animation", "Children's"]
    assert catalogue.counted_genres == ["Animation", "Children's", "Comedy", "Drama"]

    for split, size in zip(SPLITS, (30, 8, 20), strict=True):
        records = read_records(tmp_path / "out" / f"{split}_sample.json")
        assert len(records) == size
        for record in records:
            assert len(record.history) == 3 and len({*record.history, record.target} & {*catalogue.titles}) == 4
            assert "movie" in record.instruction and "movie" in record.input
            assert record.output == f'"{record.target}"\n'
            assert record.user.isdigit()
    made = read_json(tmp_path / "out/run.json")
    assert made["state"] == "done" and made["counts"]["records"] == {"train": 30, "valid": 8, "test": 20}
    assert made["counts"]["last_target"]["train"] < made["counts"]["first_target"]["test"]


def test_both_formats_give_the_same(grouplens, tmp_path):
    atomic = write_atomic(tmp_path / "atomic", TOY_FILMS, list(reversed(toy_ratings())))
    run("--source", grouplens, "--output_dir", tmp_path / "a", *TOY_SIZES)
    run("--source", atomic, "--output_dir", tmp_path / "b", *TOY_SIZES)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_seeds_and_sizes(grouplens, tmp_path):
    flags = ["--source", grouplens, *TOY_SIZES]
    run(*flags, "--output_dir", tmp_path / "a")
    run(*flags, "--output_dir", tmp_path / "b")
    run(*flags, "--output_dir", tmp_path / "c", "--seed", "43")
    run(*flags, "--output_dir", tmp_path / "d", "--train_size", "10")
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "b") == first
    assert contents(tmp_path / "c")["train_sample.json"] != first["train_sample.json"]
    smaller = contents(tmp_path / "d")
    assert json.loads(smaller.pop("train_sample.json")) == json.loads(first.pop("train_sample.json"))[:10]
    assert smaller == first, "the size of one split changed another"


def test_second_start_and_another_run_in_the_folder(grouplens, tmp_path, capsys):
    flags = ["--source", grouplens, *TOY_SIZES, "--output_dir", tmp_path / "out"]
    run(*flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != "run.json"}
    summary = capsys.readouterr().out
    run(*flags)
    again = capsys.readouterr().out
    assert "done already" in again and again.endswith(summary)
    with pytest.raises(InputError, match="--overwrite"):
        run(*flags, "--seed", "1")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    run(*flags, "--seed", "1", "--overwrite")
    assert read_json(tmp_path / "out/run.json")["seed"] == 1


def test_default_sizes_on_movielens(movielens, tmp_path):
    """The sizes of the contract can be had, from both formats; and the titles' times bear out the split."""
    run("--output_dir", tmp_path / "a")
    ratings, catalogue = read_movielens(movielens_files(movielens))
    assert load_catalogue(tmp_path / "a") == catalogue
    assert len(ratings) == 99_991 and len(catalogue.titles) == 1663 and len(catalogue.counted_genres) == 18
    assert len(set(catalogue.titles)) == 1663 and all(title.endswith(")") for title in catalogue.titles)
    assert "Sabrina (1995)" in catalogue and "unkonwn" not in " ".join(catalogue.titles)

    counts = read_json(tmp_path / "a/run.json")["counts"]
    assert counts["records"] == {"train": 1024, "valid": 256, "test": 1000}
    assert counts["users"] == {"train": 532, "valid": 171, "test": 365}
    assert counts["last_target"]["train"] < counts["first_target"]["valid"]
    assert counts["last_target"]["valid"] < counts["first_target"]["test"]

    with (movielens / "ml-100k.item").open(encoding="utf-8") as file:
        films = [line.rstrip("\n").split("\t") for line in file][1:]
    films = [(n, "" if t == "unkonwn" else t, y, genres.split()) for n, t, y, genres in films]
    with (movielens / "ml-100k.inter").open(encoding="utf-8") as file:
        rows = [line.split() for line in file][1:]
    source = write_grouplens(tmp_path / "archive", films, ["unknown", *catalogue.counted_genres], rows)
    run("--output_dir", tmp_path / "b", "--source", source)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---------------------------------------------------------------------------------------------------------------------
# SPRec's layout
# ---------------------------------------------------------------------------------------------------------------------


def test_sprec(sprec, tmp_path):
    flags = ["--dataset", "sprec", "--source", sprec, "--train_size", "100", "--valid_size", "64"]
    run(*flags, "--test_size", "50", "--output_dir", tmp_path / "a")
    run(*flags, "--test_size", "50", "--output_dir", tmp_path / "b")
    run(*flags, "--test_size", "50", "--output_dir", tmp_path / "c", "--seed", "1")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    assert load_catalogue(tmp_path / "a") == load_catalogue(sprec / "eval/Goodreads")
    for split, size in zip(SPLITS, (100, 64, 50), strict=True):
        source = read_json(sprec / f"data/Goodreads/{split}.json")
        records = read_json(tmp_path / "a" / f"{split}_sample.json")
        places = [source.index(record) for record in records]
        assert len(places) == size and places == sorted(places)


def test_sprec_takes_the_whole(sprec, tmp_path):
    whole = {split: read_json(sprec / f"data/Goodreads/{split}.json") for split in SPLITS}
    flags = [word for split in SPLITS for word in (f"--{split}_size", len(whole[split]))]
    run("--dataset", "sprec", "--source", sprec, *flags, "--output_dir", tmp_path / "out")
    assert {split: read_json(tmp_path / "out" / f"{split}_sample.json") for split in SPLITS} == whole


# ---------------------------------------------------------------------------------------------------------------------
# Another spelling of a data folder
# ---------------------------------------------------------------------------------------------------------------------

SERIES = {"One  (S, #1)": "S, #1:  One", "Two (S, #2; T #7)": "S, #2; T #7: Two", "Emma": "Emma"}


@pytest.fixture
def series_folder(tmp_path):
    """A data folder whose titles are in series; one target is not in the catalogue."""
    genres = {title: ["a", "b"][:place] for place, title in enumerate(SERIES)}
    catalogue = Catalogue(list(SERIES), genres, ["a", "b"])
    records = [
        make_record(list(SERIES)[:2], "Emma", MOVIES, "u1"),
        make_record(["Two (S, #2; T #7)"], "Out (S, #9)", MOVIES),
    ]
    write_data_folder(tmp_path / "books", dict.fromkeys(SPLITS, records), catalogue)
    return tmp_path / "books"


def test_series_first(series_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--dataset", "folder", "--source", "books", "--series_first")
    said = capsys.readouterr().out
    assert "2 titles with their series in front" in said
    assert "50.0% of the test targets are of a series that the history holds" in said
    assert "33.3% of the titles lie outside a user's interest cluster, on average" in said  # the one without genres
    old, new = series_folder, tmp_path / "sampled_data/books_series"
    spelt = SERIES | {"Out (S, #9)": "S, #9: Out"}
    for split in SPLITS:
        before, after = (read_records(folder / f"{split}_sample.json") for folder in (old, new))
        assert [record.history for record in after] == [[spelt[title] for title in r.history] for r in before]
        assert [record.target for record in after] == [spelt[record.target] for record in before]
        assert [record.user for record in after] == ["u1", ""] and after[0].instruction == MOVIES.instruction
        assert after[0].input == f'{MOVIES.before}"S, #1:  One", "S, #2; T #7: Two"{MOVIES.after}'
    assert load_catalogue(new).titles == list(SERIES.values())
    genres = load_catalogue(old).genres
    assert load_catalogue(new).genres == {spelt[title]: genres[title] for title in genres}
    assert load_catalogue(new).counted_genres == ["a", "b"]


def test_series_first_of_other_sources(sprec, tmp_path):
    """Without a series in any title, the folder is the same."""
    flags = ["--dataset", "sprec", "--source", sprec, "--train_size", "9", "--valid_size", "9", "--test_size", "9"]
    run(*flags, "--output_dir", tmp_path / "plain")
    run(*flags, "--output_dir", tmp_path / "spelt", "--series_first")
    old, new = load_catalogue(tmp_path / "plain"), load_catalogue(tmp_path / "spelt")
    assert new.titles == [series_first(title) for title in old.titles]


def test_what_cannot_be_spelt_anew(series_folder, tmp_path, refusal):
    folder = ("--dataset", "folder", "--output_dir", tmp_path / "out")
    assert "give it with --source, and --series_first" in refusal("prepare_data", *folder, "--series_first")
    assert "give it with --source, and --series_first" in refusal("prepare_data", *folder, "--source", series_folder)
    onto_itself = ("--dataset", "folder", "--source", series_folder, "--series_first", "--output_dir", series_folder)
    assert "use --overwrite or another --output_dir" in refusal("prepare_data", *onto_itself)
    for name in ("name2genre.json", "name2id.json", "id2name.json"):
        text = (series_folder / name).read_text().replace("Emma", "S, #1:  One")
        (series_folder / name).write_text(text)
    message = refusal("prepare_data", *folder, "--source", series_folder, "--series_first")
    assert "'One  (S, #1)' and 'S, #1:  One' would both be 'S, #1:  One'" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_the_data_set_that_ships_is_safe(grouplens, refusal):
    """Another data folder, made by no run of this script, is never written over."""
    before = listing(CLASSICS)
    flags = ("--source", grouplens, *TOY_SIZES, "--output_dir", CLASSICS)
    assert "use --overwrite or another --output_dir" in refusal("prepare_data", *flags)
    assert listing(CLASSICS) == before


# ---------------------------------------------------------------------------------------------------------------------
# The command itself
# ---------------------------------------------------------------------------------------------------------------------


def test_command_line(grouplens, tmp_path):
    """In a process of its own, with a config file, whose settings a flag wins over."""
    (tmp_path / "own.yaml").write_text("train_size: 12\nvalid_size: 4\ntest_size: 9\nhistory_length: 3\n")
    command = [sys.executable, PROJECT / "prepare_data.py", "--config", tmp_path / "own.yaml", "--test_size", "6"]
    command += ["--source", grouplens, "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = {split: len(read_json(tmp_path / f"out/{split}_sample.json")) for split in SPLITS}
    assert sizes == {"train": 12, "valid": 4, "test": 6}
    assert "of the test targets occur in training" in done.stdout

    refused = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        prepare_data.make_parser().parse_args_and_config(["--help"])
    text = capsys.readouterr().out
    assert "python prepare_data.py --dataset sprec" in text and "Training records. (default: 1024)" in text


def test_download_only(tmp_path, monkeypatch, capsys):
    asked = []
    for name in ("find_model", "find_encoder", "find_movielens"):
        monkeypatch.setattr(prepare_data, name, lambda *what: asked.append(what) or Path("there"))
    run("--download_only", "--encoder", "some/encoder", "--output_dir", tmp_path / "out")
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct",), ("some/encoder",), ()]
    assert not (tmp_path / "out").exists() and capsys.readouterr().out.count("there") == 3


def test_default_output_dirs(sprec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--train_size", "9", "--valid_size", "9", "--test_size", "9"]
    run("--dataset", "sprec", "--source", sprec, *sizes)
    write_grouplens(tmp_path / "archive", TOY_FILMS, TOY_GENRES, toy_ratings())
    run("--source", tmp_path / "archive", *TOY_SIZES)
    assert sorted(path.name for path in (tmp_path / "sampled_data").iterdir()) == ["goodreads", "ml-100k"]


# ---------------------------------------------------------------------------------------------------------------------
# The data set that ships
# ---------------------------------------------------------------------------------------------------------------------


def test_classics_are_what_the_script_writes(tmp_path):
    run_main("sampled_data.classics.simulate", "--output_dir", tmp_path)
    assert contents(tmp_path) == contents(CLASSICS)


def test_classics():
    books = load_catalogue(CLASSICS)
    assert books == simulate.read_books()
    assert len(books.titles) > 300 and 8 <= len(books.counted_genres) <= 12
    assert all(1 <= len(names) <= 3 for names in books.genres.values())
    for split, size in simulate.READERS.items():
        records = read_records(CLASSICS / f"{split}_sample.json")
        assert len(records) == size
        for record in records:
            assert len({*record.history, record.target} & {*books.titles}) == 11, record
    assert sum(path.stat().st_size for path in CLASSICS.glob("*.*")) < 400_000


def test_simulate_does_not_replace_other_data(tmp_path):
    (tmp_path / "train_sample.json").write_text("[]")
    with pytest.raises(InputError, match="--overwrite"):
        run_main("sampled_data.classics.simulate", "--output_dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train_sample.json"]


def test_file_names_agree_with_the_package():
    assert MOVIELENS.files == ATOMIC_FILES
