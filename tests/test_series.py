"""Series in titles: what is read out of them, their two spellings, and what comes next in a series."""

import shutil

import pytest
from conftest import run_main
from hypothesis import given
from hypothesis import strategies as st
from toy_catalogue import make_record

from cebs.baselines import next_in_series, title_ids
from cebs.catalogue import Catalogue
from cebs.ratings import SPLITS, write_data_folder
from cebs.series import Volume, series_first, volumes
from utils import write_json

words = st.text("ab 'é:,()1", min_size=1, max_size=8).map(str.strip).filter(bool)
names = st.text("AB 'é,", min_size=1, max_size=8).map(str.strip).filter(lambda name: name.strip(" ,"))


@pytest.mark.parametrize(
    ("title", "spelt", "found"),
    [
        ("The Score (Off-Campus, #3)", "Off-Campus, #3: The Score", [("Off-Campus", 3)]),
        ("Dark Needs  (Immortals #5.5)", "Immortals #5.5:  Dark Needs", [("Immortals", 5.5)]),
        ("Too Far (Beach, #2; Far, #1)", "Beach, #2; Far, #1: Too Far", [("Beach", 2), ("Far", 1)]),
        ("All (Selection, #0.4, 0.5, 2.6)", "Selection, #0.4, 0.5, 2.6: All", [("Selection", 0.4)]),
        ("A (B) C (D: E, #1-3)", "D: E, #1-3: A (B) C", [("D: E", 1)]),
        ("Prequel (Saga, #)", "Saga, #: Prequel", [("Saga", 0)]),
        ("Saga #1", "Saga #1", []),
        ("Hunger: A Memoir of (My) Body", "Hunger: A Memoir of (My) Body", []),
        ("(Only a series, #1)", "(Only a series, #1)", []),
        ("Emma (1815)", "Emma (1815)", []),
        ("", "", []),
    ],
)
def test_the_two_spellings(title, spelt, found):
    assert series_first(title) == spelt
    assert volumes(title) == volumes(spelt) == tuple(Volume(*volume) for volume in found)
    assert series_first(spelt) == spelt


@given(words, names, st.integers(0, 99), st.sampled_from([" ", "  ", ""]))
def test_any_title_of_a_series(title, name, number, space):
    written = f"{title}{space}({name}, #{number})"
    spelt = series_first(written)
    assert spelt == f"{name}, #{number}:{space}{title}"
    assert [number for _, number in volumes(written)] == [number] == [number for _, number in volumes(spelt)]


@given(st.lists(st.text("ab(#1):; ,", max_size=12), unique=True))
def test_different_titles_stay_different(titles):
    behind = [title for title in titles if series_first(title) != title]
    assert len(set(map(series_first, behind))) == len(behind)


CATALOGUE = [*(f"B{n} (B, #{n})" for n in (1, 2, 3, 4)), "A3 (A #3)", "A1 (A #1)", "AB (A, #2; B, #9)", "X"]
BY_WORDS = {title.split()[0]: title for title in CATALOGUE}
IDS = {title: index for index, title in enumerate(CATALOGUE)}


@pytest.mark.parametrize(
    ("history", "ranked"),
    [
        (["B2", "A1"], ["AB", "A3", "A1", "B3", "B4", "B2", "B1"]),  # series A first, for A1 is the newest
        (["A1", "B2"], ["B3", "B4", "AB", "B2", "B1", "A3", "A1"]),
        (["B4", "B1"], ["AB", "B4", "B3", "B2", "B1"]),  # after the furthest, then those before it
        (["AB"], ["A3", "AB", "A1", "B4", "B3", "B2", "B1"]),  # its series in their order
        (["X"], []),
        ([], []),
    ],
)
def test_next_in_series(history, ranked):
    read = title_ids([BY_WORDS[words] for words in history], IDS)
    (scores,) = next_in_series(CATALOGUE)([read], 0)
    order = sorted(range(len(CATALOGUE)), key=lambda index: -scores[index])
    assert [CATALOGUE[index] for index in order if scores[index]] == [BY_WORDS[words] for words in ranked]
    (of_other_spelling,) = next_in_series(list(map(series_first, CATALOGUE)))([read], 0)
    assert (of_other_spelling == scores).all()


def test_accuracy_by_series(run_script, tmp_path):
    """One record of two is answered by the next volume; the baseline finds it, and not the other."""
    records = [make_record(["B1 (B, #1)"], "B2 (B, #2)"), make_record(["A1 (A #1)"], "X")]
    catalogue = Catalogue(CATALOGUE, {title: ["a"] for title in CATALOGUE}, ["a"])
    write_data_folder(tmp_path / "data", dict.fromkeys(SPLITS, records), catalogue)
    table = ("--results_csv", tmp_path / "results.csv", "--data_dir", tmp_path / "data")
    out = tmp_path / "out"
    run_main("predict_baselines", "--method", "next_in_series", "--data_dir", tmp_path / "data", "--output_dir", out)
    run_main("evaluate", "--predictions", out / "predictions", *table, "--method", "Series", "--topk", "1", "5")

    result = run_script("benchmarks/accuracy_by_series.py", *table, "--topk", "1")
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == ["Series", *"1 of 1 1.0000 1.0000 0 of 1 0.0000 0.0000".split()]
    assert "has no figures at 3" in run_script("benchmarks/accuracy_by_series.py", *table, "--topk", "3").stderr
    write_data_folder(tmp_path / "data", dict.fromkeys(SPLITS, records[:1]), catalogue)
    assert "1 of 1 targets" in run_script("benchmarks/accuracy_by_series.py", *table).stderr
    (tmp_path / "bare").mkdir()
    bare = shutil.copy(tmp_path / "results.csv", tmp_path / "bare")
    write_data_folder(tmp_path / "data", dict.fromkeys(SPLITS, records), catalogue)
    table = ("--results_csv", bare, "--data_dir", tmp_path / "data")
    assert "has no files per user" in run_script("benchmarks/accuracy_by_series.py", *table).stderr


def test_negatives_by_series(run_script, tmp_path):
    own, other, alone = (make_record(history, "X").prompt for history in (["B1 (B, #1)"], ["A1 (A #1)"], ["X"]))
    volume, several = '"B2 (B, #2)"', ['"B3 (B, #3)"', '"X"', '"B9 (B, #9)"']
    pairs = [
        {"prompt": own, "chosen": '"X"', "rejected": volume},
        {"prompt": own, "chosen": volume, "rejected": several},
        {"prompt": other, "chosen": volume, "rejected": several},
        {"prompt": alone, "chosen": volume, "rejected": '"A1 (A #1)"'},
    ]
    write_json(tmp_path / "pairs.json", pairs)
    result = run_script("benchmarks/negatives_by_series.py", "--preferences", tmp_path / "pairs.json")
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines()[-1].split()[1:] == "1 of 4 3 of 8".split()
