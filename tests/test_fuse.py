"""Rankings of several methods made into one: the formula, the real command, and what is refused."""

import pytest
from conftest import edit_json, run_main
from hypothesis import given
from hypothesis import strategies as st

from cebs.catalogue import load_catalogue
from cebs.predictions import reciprocal_rank_fusion
from utils import InputError, read_json

titles = st.sampled_from("ABCDEFG")
rankings = st.lists(st.lists(titles, min_size=1, unique=True), min_size=1, max_size=4)


@given(rankings, st.integers(1, 100))
def test_a_fused_ranking_is_in_the_order_of_the_formula(rankings, constant):
    def score(title):
        return sum(1 / (constant + ranking.index(title) + 1) for ranking in rankings if title in ranking)

    fused = reciprocal_rank_fusion(rankings, constant)
    assert len(fused) == len(set(fused)) and set(fused) == {title for ranking in rankings for title in ranking}
    scores = [score(title) for title in fused]
    assert all(first >= second - 1e-12 for first, second in zip(scores, scores[1:], strict=False))


@given(st.lists(titles, min_size=1, unique=True), st.integers(1, 4), st.integers(1, 100))
def test_methods_that_agree_change_nothing(ranking, count, constant):
    assert reciprocal_rank_fusion([ranking] * count, constant) == ranking


def test_a_tie_goes_to_the_ranking_given_first():
    assert reciprocal_rank_fusion([["A", "B"], ["B", "A"]], 60) == ["A", "B"]
    assert reciprocal_rank_fusion([["A"], ["B"]], 60) == ["A", "B"]


@pytest.fixture
def runs(data_dir, tmp_path):
    """Folders of rankings without the history, by two methods."""
    for method in ("popularity", "item_knn"):
        words = ("--method", method, "--data_dir", data_dir, "--output_dir", tmp_path / method, "--num_titles", 6)
        run_main("predict_baselines", *words)
    return [tmp_path / method / "predictions" for method in ("popularity", "item_knn")]


def fuse(folder, *runs):
    run_main("fuse_predictions", "--predictions", *runs, "--output_dir", folder, "--num_titles", 5)
    return folder / "predictions"


def test_fused_rankings_are_evaluated_like_any_other(runs, data_dir, tmp_path, capsys):
    fused = fuse(tmp_path / "fused", *runs)
    parts = [read_json(run / "raw_results_8.json") for run in runs]
    for record, *same in zip(read_json(fused / "raw_results_8.json"), *parts, strict=True):
        assert record["ranking"] == reciprocal_rank_fusion([part["ranking"] for part in same], 60)[:5]
        assert record["prediction"] == f'"{record["ranking"][0]}"' and record.keys() == same[0].keys()
        assert record["prompt"] == same[0]["prompt"] and record["ground_truth"] == same[0]["ground_truth"]
    words = ("--predictions", fused, "--data_dir", data_dir, "--topk", 5, "--results_csv", tmp_path / "results.csv")
    capsys.readouterr()
    run_main("evaluate", *words)
    assert "ranked, no history" in capsys.readouterr().out
    fuse(tmp_path / "fused", *runs)
    assert "is done already" in capsys.readouterr().out


def test_one_ranking_that_kept_the_history_makes_a_ranking_that_may_hold_it(runs, data_dir, tmp_path):
    words = ("--method", "item_knn", "--data_dir", data_dir, "--output_dir", tmp_path / "kept", "--no_exclude_history")
    run_main("predict_baselines", *words)
    fuse(tmp_path / "fused", runs[0], tmp_path / "kept" / "predictions")
    assert read_json(tmp_path / "fused/run.json")["arguments"]["exclude_history"] is False
    assert len(load_catalogue(data_dir).titles) > 6


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda records: records.pop(), "has 7 records, .*popularity.* has 8; predict as many"),
        (lambda records: records[2].pop("ranking"), "record 2: 'ranking' must be a list of titles"),
        (lambda records: records[2].update(ranking=[]), "record 2: its ranking is empty"),
        (lambda records: records[2].update(ranking=["A", "A"]), "record 2: its ranking has 'A' more than once"),
        (lambda records: records[3].update(ranking=[7]), "record 3: 'ranking' must be a list of titles"),
        (lambda records: records[4].update(prompt="another"), "record 4: has another prompt than in .*popularity"),
    ],
)
def test_rankings_of_other_records_are_refused(runs, tmp_path, change, complaint):
    edit_json(runs[1] / "raw_results_8.json", lambda records: change(records) and None)
    with pytest.raises(InputError, match=complaint):
        fuse(tmp_path / "fused", *runs)
    assert not (tmp_path / "fused").exists()


def test_one_ranking_is_none_to_be_fused(runs, tmp_path):
    with pytest.raises(InputError, match="give two or more"):
        fuse(tmp_path / "fused", runs[0])
    edit_json(runs[1].parent / "run.json", lambda run: run.update(state="interrupted"))
    with pytest.raises(InputError, match="predict_baselines.py is interrupted in .*; run it to its end first"):
        fuse(tmp_path / "fused", *runs)
