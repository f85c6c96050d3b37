"""The catalogue, interest clusters and exposure."""

import shutil

import pytest
from conftest import CLASSICS, edit_json
from hypothesis import given
from hypothesis import strategies as st

from cebs.catalogue import Catalogue, exposure_counts, interest_cluster, load_catalogue
from cebs.prompts import Record, quote, read_records
from utils import InputError, read_json

GENRES = "abcdef"
TITLES = [f"T{number}" for number in range(8)]


@st.composite
def catalogues(draw):
    genres = st.lists(st.sampled_from(GENRES), max_size=4, unique=True)
    return Catalogue(TITLES[:6], {title: draw(genres) for title in TITLES[:6]}, list(GENRES))


def record(history, target):
    return Record("Do.", f"Read: {', '.join(map(quote, history))}.", f"{quote(target)}\n")


# --- interest cluster (rule 1) ---


@given(catalogues(), st.lists(st.sampled_from(TITLES), max_size=10), st.integers(1, 4))
def test_cluster_against_brute_force(catalogue, history, size):
    met = [genre for title in history if title in catalogue.genres for genre in catalogue.genres[title]]
    distinct = [genre for place, genre in enumerate(met) if genre not in met[:place]]
    # most frequent first; of equals the one met first
    expected = sorted(distinct, key=lambda genre: (-met.count(genre), met.index(genre)))[:size]
    assert interest_cluster(history, catalogue, size) == expected


def test_ties_go_to_the_genre_met_first():
    catalogue = Catalogue(["A", "B"], {"A": ["x", "y"], "B": ["z", "w"]}, [])
    assert interest_cluster(["A", "B"], catalogue) == ["x", "y", "z"]
    assert interest_cluster(["B", "A"], catalogue) == ["z", "w", "x"]
    assert interest_cluster(["B", "A", "A"], catalogue) == ["x", "y", "z"]


def test_a_history_without_known_titles_has_no_cluster():
    assert interest_cluster(["nowhere"], Catalogue(["A"], {"A": ["x"]}, [])) == []
    assert interest_cluster([], Catalogue(["A"], {"A": ["x"]}, [])) == []


# --- exposure (rule 4) ---


@given(st.lists(st.tuples(st.lists(st.sampled_from(TITLES), max_size=5), st.sampled_from(TITLES)), max_size=8))
def test_exposure_against_brute_force(rows):
    exposure = exposure_counts(record(history, target) for history, target in rows)
    for title in TITLES:
        assert exposure[title] == sum(history.count(title) + (target == title) for history, target in rows)


def test_exposure_of_a_data_set_adds_up():
    records = read_records(CLASSICS / "train_sample.json")
    assert exposure_counts(records).total() == sum(len(record.history) + 1 for record in records)


# --- files ---


def test_titles_stand_in_id_order(data_dir):
    catalogue = load_catalogue(data_dir)
    ids = read_json(data_dir / "name2id.json")
    assert [ids[title] for title in catalogue.titles] == list(range(len(ids)))
    assert catalogue.genres == read_json(data_dir / "name2genre.json")
    assert catalogue.counted_genres == list(read_json(data_dir / "genre_dict.json"))
    assert catalogue.titles[0] in catalogue and "no such title" not in catalogue
    assert catalogue.genres_of("no such title") == []


def test_the_order_of_the_keys_does_not_matter(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    for name in ("id2name.json", "name2id.json"):
        edit_json(tmp_path / "data" / name, lambda mapping: dict(reversed(mapping.items())))
    assert load_catalogue(tmp_path / "data").titles == load_catalogue(data_dir).titles


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("id2name.json", lambda ids: ids.pop("3") and None, "id 3 is missing; ids must run from 0 without gaps"),
        ("id2name.json", lambda ids: {str(int(key) + 1): title for key, title in ids.items()}, "id 0 is missing"),
        ("id2name.json", lambda ids: {**ids, "2": ["Emma"]}, r"id 2: expected a title, not \['Emma'\]"),
        ("id2name.json", lambda ids: {**ids, "2": "Nowhere"}, "'Nowhere' .id 2. has no entry"),
        ("id2name.json", lambda ids: {**ids, "2": ids["1"]}, "should have id 2, as in id2name.json"),
        ("name2id.json", lambda ids: dict.fromkeys(ids, 0), "should have id 1, as in id2name.json"),
        ("name2genre.json", lambda genres: {**genres, "New": ["novel"]}, "'New' of name2genre.json has no id"),
        ("name2genre.json", lambda genres: dict.fromkeys(genres, "novel"), "genres must be a list of strings"),
        ("name2genre.json", lambda genres: dict.fromkeys(genres, [1]), "genres must be a list of strings"),
        ("name2genre.json", lambda genres: {}, "expected a JSON object that is not empty"),
        ("genre_dict.json", lambda genres: list(genres), "expected a JSON object that is not empty"),
    ],
)
def test_a_catalogue_that_disagrees_is_refused(data_dir, tmp_path, name, change, complaint):
    shutil.copytree(data_dir, tmp_path / "data")
    edit_json(tmp_path / "data" / name, change)
    with pytest.raises(InputError, match=complaint) as error:
        load_catalogue(tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value) and "\n" not in str(error.value)
