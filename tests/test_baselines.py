"""predict_baselines.py: the methods against plain loops, what SASRec must do, the command line, published figures."""

import math
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import edit_json, listing, run_main
from hypothesis import given
from hypothesis import strategies as st

import predict_baselines
from cebs.baselines import (
    cosine_similarity,
    incidence_matrix,
    item_knn,
    popularity,
    popularity_order,
    random,
    title_ids,
    top_titles,
)
from cebs.catalogue import load_catalogue
from cebs.files import PROJECT
from cebs.prompts import Record, quote, read_records
from cebs.sasrec import SASRec, SASRecArguments, make_scorer, sasrec
from utils import InputError, read_json

GOODREADS = PROJECT.parent / "shared" / "goodreads"
METHODS = ["popularity", "item_knn", "next_in_series", "sasrec", "random"]
SMALL = ("--hidden_size", "8", "--num_train_epochs", "3", "--num_titles", "10")

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------------------
# Popularity, ItemKNN, random
# ---------------------------------------------------------------------------------------------------------------------

TITLES = ["a", "b", "c", "d", "e", "f"]
IDS = {title: index for index, title in enumerate(TITLES)}
KNOWN_OR_NOT = st.sampled_from([*TITLES, "unknown"])
RECORDS = st.lists(st.lists(KNOWN_OR_NOT, min_size=1, max_size=5), min_size=1, max_size=8)
HISTORIES = st.lists(st.lists(KNOWN_OR_NOT, max_size=4), min_size=1, max_size=4)


def make_record(titles):
    """The record whose history is all titles but the last, and whose target is the last."""
    return Record("Recommend.", ", ".join(map(quote, titles[:-1])), quote(titles[-1]))


def plain_popularity(records):
    counts = Counter(title for titles in records for title in titles)
    first = {}
    for titles in records:
        for title in titles:
            first.setdefault(title, len(first))
    return sorted(TITLES, key=lambda title: (-counts[title], first.get(title, math.inf), IDS[title]))


def plain_cosine(records, one, other):
    sets = list(map(set, records))
    both = sum(one in titles and other in titles for titles in sets)
    return both / math.sqrt(sum(one in t for t in sets) * sum(other in t for t in sets)) if both else 0.0


@given(RECORDS, HISTORIES)
def test_popularity_equals_plain_counts(records, histories):
    order = popularity_order(map(make_record, records), IDS)
    known = [title_ids(history, IDS) for history in histories]
    ranked = top_titles(popularity(len(TITLES))(known, 0), order, known, len(TITLES))
    for history, ranking in zip(histories, ranked, strict=True):
        expected = [title for title in plain_popularity(records) if title not in history]
        assert [TITLES[index] for index in ranking if index >= 0] == expected
        assert (ranking[len(expected) :] == -1).all()


@given(RECORDS, HISTORIES, st.integers(1, 8), st.booleans())
def test_item_knn_equals_plain_loops(records, histories, k, exclude_history):
    order = popularity_order(map(make_record, records), IDS)
    scorer = item_knn([title_ids(titles, IDS) for titles in records], len(TITLES))
    known = [title_ids(history, IDS) for history in histories]
    ranked = top_titles(scorer(known, 0), order, known if exclude_history else [[]] * len(known), k)
    by_popularity = plain_popularity(records)
    for history, ranking in zip(histories, ranked, strict=True):
        scores = {
            title: round(sum(plain_cosine(records, title, other) for other in set(history) - {title, "unknown"}), 8)
            for title in TITLES
        }
        expected = sorted(by_popularity, key=lambda title: -scores[title])  # stable: ties stay in popularity's order
        expected = [title for title in expected if not (exclude_history and title in history)][:k]
        assert [TITLES[index] for index in ranking if index >= 0] == expected


def test_a_title_is_no_neighbour_of_its_own():
    scores = item_knn([[0, 1], [0, 1], [0, 2]], 4)([[0]], 0)
    assert scores[0].tolist() == pytest.approx([0, 2 / math.sqrt(3 * 2), 1 / math.sqrt(3), 0])


def test_equal_sums_are_ties_in_whatever_order_they_were_added_up():
    together = {(0, 3): 1, (0, 4): 5, (1, 3): 2, (1, 4): 2, (2, 3): 5, (2, 4): 1}
    records = [pair for pair, times in together.items() for _ in range(times)] + [(1,), (1,)]  # 0, 1, 2: 6 times each
    plain = incidence_matrix([[0, 1, 2]], 5) @ cosine_similarity(incidence_matrix(records, 5))
    assert plain[0, 3] != plain[0, 4]  # in floating point
    scores = item_knn(records, 5)([[0, 1, 2]], 0)[0]
    assert scores[3] == scores[4] == pytest.approx((1 + 2 + 5) / math.sqrt(6 * 8))


def test_random_depends_on_seed_and_place_only():
    histories = [[0], [1], [2], []]
    scores = random(50, seed=1)(histories, 0)
    assert scores.shape == (4, 50) and len({row.tobytes() for row in scores}) == 4
    assert random(50, seed=1)(histories[2:], 2).tobytes() == scores[2:].tobytes()
    assert not np.isin(random(50, seed=2)(histories, 0), scores).any()


# ---------------------------------------------------------------------------------------------------------------------
# SASRec
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dropout": 0.1,
    "max_length": 50,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 30,
    "early_stopping_patience": 10,
}
CYCLE = 20


def settings(**changed):
    return SASRecArguments(**(SETTINGS | changed))


def cyclic(start, length):
    """Titles that follow each other: 18, 19, 0, 1 ..."""
    return [(start + step) % CYCLE for step in range(length)]


def share_of_next_titles(scorer):
    """How often the title after a stretch of the cycle, of 1 to 5 titles, has the greatest score."""
    stretches = [(start, length) for start in range(CYCLE) for length in range(1, 6)]
    scores = scorer([cyclic(start, length) for start, length in stretches], 0)
    return float(np.mean([(start + length) % CYCLE for start, length in stretches] == scores.argmax(axis=1)))


def train(seed=0, validate=share_of_next_titles, **changed):
    return sasrec([cyclic(start, 6) for start in range(CYCLE)] * 3, CYCLE, validate, settings(**changed), seed)


@pytest.fixture(scope="module")
def network():
    """A network whose attention and positions matter: large random weights, no dropout."""
    torch.manual_seed(0)
    model = SASRec(CYCLE, 8, settings())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_sasrec_learns_what_comes_next():
    scorer, training = train()
    assert share_of_next_titles(scorer) > 0.9  # chance is 0.05
    assert training.best_validation_ndcg == share_of_next_titles(scorer)


def test_sasrec_is_the_same_for_the_same_seed():
    histories = [cyclic(start, 4) for start in range(CYCLE)]
    first, again, other = (train(seed, num_train_epochs=3)[0](histories, 0).tobytes() for seed in (1, 1, 2))
    assert first == again != other


def test_sasrec_keeps_the_weights_of_the_best_epoch():
    figures = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9])
    seen = []

    def validate(scorer):
        seen.append(scorer([[0, 1]], 0))
        return next(figures)

    scorer, training = train(validate=validate, early_stopping_patience=3)
    assert (training.epochs, training.best_epoch, training.best_validation_ndcg) == (5, 2, 0.3)
    assert scorer([[0, 1]], 0).tobytes() == seen[1].tobytes() != seen[4].tobytes()


def test_a_later_title_does_not_change_earlier_states(network):
    sequence = torch.tensor([[3, 1, 4, 1, 5, 9]])
    states = network(sequence)
    for place in range(1, 6):
        changed = sequence.clone()
        changed[0, place] = 7
        moved = (network(changed) - states).abs().amax(dim=-1)[0]  # [L]
        assert moved[:place].max() < 1e-5 and moved[place:].min() > 1e-3


def test_longer_histories_beside_it_do_not_change_a_score(network):
    scorer = make_scorer(network)
    alone = scorer([[3, 1]], 0)
    beside = scorer([[2, 7, 1, 8, 2, 8], [3, 1], [], [5]], 0)
    np.testing.assert_allclose(beside[1], alone[0], atol=1e-5)
    assert not beside[2].any()  # no history: all titles alike


def test_a_history_longer_than_there_are_positions_loses_its_oldest(network):
    history = cyclic(2, 12)
    scorer = make_scorer(network)
    assert scorer([history], 0).tobytes() == scorer([history[-8:]], 0).tobytes()
    assert abs(scorer([history], 0) - scorer([history[-7:]], 0)).max() > 1e-3


def test_sasrec_needs_two_titles_in_a_row():
    with pytest.raises(InputError, match="no record has two titles of the catalogue"):
        sasrec([[1], []], CYCLE, share_of_next_titles, settings(), 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0"),
        ({"num_attention_heads": 3}, "--hidden_size 16"),
        ({"max_length": 0}, "--max_length 0"),
    ],
)
def test_settings_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        settings(**changed)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def predict(method, data_dir, out, *more):
    run_main("predict_baselines", "--method", method, "--data_dir", data_dir, "--output_dir", out, *SMALL, *more)
    (file,) = (out / "predictions").glob("raw_results_*.json")
    return read_json(file)


@pytest.mark.parametrize("method", METHODS)
def test_rankings_that_evaluate_takes(tmp_path, data_dir, method):
    out = tmp_path / method
    results = predict(method, data_dir, out)
    records = read_records(data_dir / "test_sample.json")
    catalogue = load_catalogue(data_dir)
    assert (out / "predictions" / "raw_results_8.json").is_file() and len(results) == len(records)
    for record, result in zip(records, results, strict=True):
        assert list(result) == ["prompt", "prediction", "ground_truth", "ranking"]
        assert (result["prompt"], result["ground_truth"]) == (record.prompt, record.target)
        assert result["prediction"] == quote(result["ranking"][0])
        assert len(set(result["ranking"])) == 10 and not set(result["ranking"]) & set(record.history)
        assert all(title in catalogue for title in result["ranking"])

    run = read_json(out / "run.json")
    assert run["state"] == "done" and run["arguments"]["exclude_history"] is True
    assert ("hidden_size" in run["arguments"]) == ("training" in run["counts"]) == (method == "sasrec")

    run_main(
        *("evaluate", "--predictions", out / "predictions", "--data_dir", data_dir),
        *("--results_csv", tmp_path / "results.csv", "--metrics_json", tmp_path / "metrics.json"),
    )
    metrics = read_json(tmp_path / "metrics.json")
    assert (metrics["method"], metrics["protocol"].split(",")[0]) == (method, "ranked")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(tmp_path, data_dir, method):
    first, again = predict(method, data_dir, tmp_path / "a"), predict(method, data_dir, tmp_path / "b")
    other = predict(method, data_dir, tmp_path / "c", "--seed", "7")
    assert first == again
    assert (first != other) == (method in ("sasrec", "random"))


@pytest.mark.parametrize("method", METHODS)
def test_a_ranking_does_not_depend_on_the_batches(tmp_path, data_dir, method, monkeypatch):
    together = predict(method, data_dir, tmp_path / "together")
    monkeypatch.setattr(predict_baselines, "BATCH_SIZE", 3)
    assert predict(method, data_dir, tmp_path / "apart") == together


def test_a_finished_run_is_left_alone_and_another_refused(tmp_path, data_dir, capsys):
    out = tmp_path / "run"
    predict("item_knn", data_dir, out)
    before = listing(out)
    predict("item_knn", data_dir, out)
    assert listing(out) == before and "done already" in capsys.readouterr().out
    with pytest.raises(InputError, match="method was 'item_knn', is 'popularity'"):
        predict("popularity", data_dir, out)
    assert listing(out) == before
    predict("popularity", data_dir, out, "--overwrite")
    assert listing(out) != before


def test_fewer_records(tmp_path, data_dir):
    few = ("--max_train_samples", "2", "--max_predict_samples", "3")
    results = predict("popularity", data_dir, tmp_path / "few", *few)
    assert results != predict("popularity", data_dir, tmp_path / "all")[:3]
    counts = read_json(tmp_path / "few" / "run.json")["counts"]
    assert (counts["train_records"], counts["test_records"], len(results)) == (2, 3, 3)
    predict("sasrec", data_dir, tmp_path / "sasrec", *few, "--max_eval_samples", "4")
    assert read_json(tmp_path / "sasrec" / "run.json")["counts"]["valid_records"] == 4


@pytest.fixture
def own_data(tmp_path, data_dir):
    """A copy of the data folder that may be changed."""
    return shutil.copytree(data_dir, tmp_path / "data")


def test_history_titles_may_be_kept(tmp_path, own_data):
    # the first title of the first history becomes the most popular of all
    title = read_records(own_data / "test_sample.json")[0].history[0]
    edit_json(
        own_data / "train_sample.json",
        lambda records: [record | {"output": quote(title) + "\n"} for record in records],
    )
    kept = predict("popularity", own_data, tmp_path / "kept", "--no_exclude_history")
    left_out = predict("popularity", own_data, tmp_path / "left_out")
    assert kept[0]["ranking"][0] == title and title not in left_out[0]["ranking"]
    assert read_json(tmp_path / "kept" / "run.json")["arguments"]["exclude_history"] is False


@pytest.mark.parametrize("method", ["popularity", "item_knn", "next_in_series", "sasrec"])
def test_no_history_titles_outside_the_catalogue_and_users(tmp_path, own_data, method):
    def change(records):
        records[0]["input"] = "Nothing yet."
        records[1]["input"] = 'They liked "No such title", "Nor this".'
        records[2]["output"] = '"No such title"\n'
        records[3] |= {"user": "u3"}

    for split in ("train", "valid", "test"):
        edit_json(own_data / f"{split}_sample.json", change)
    results = predict(method, own_data, tmp_path / method)
    popular = predict("popularity", own_data, tmp_path / "popular", "--no_exclude_history")
    assert results[0]["ranking"] == results[1]["ranking"] == popular[0]["ranking"]
    assert results[2]["ground_truth"] == "No such title" and results[3]["user"] == "u3" and "user" not in results[4]


def test_a_ranking_ends_with_the_catalogue(tmp_path, own_data):
    titles = load_catalogue(own_data).titles
    history = read_records(own_data / "test_sample.json")[0].history
    results = predict("item_knn", own_data, tmp_path / "out", "--num_titles", "10000")
    assert sorted(results[0]["ranking"]) == sorted(set(titles) - set(history))


def test_what_is_refused(tmp_path, own_data, refusal):
    refused = partial(refusal, "predict_baselines", "--data_dir", own_data, "--output_dir", tmp_path / "out")

    assert "--method" in refused()
    assert "invalid choice: 'svd'" in refused("--method", "svd")
    assert refused("--method", "random", "--num_titles", "0") == "--num_titles 0: must be at least 1"
    assert "did you mean num_titles?" in refused("--method", "random", "--num_title", "5")
    whole = ", ".join(map(quote, load_catalogue(own_data).titles))
    edit_json(own_data / "test_sample.json", lambda records: records[1].update(input=whole))
    assert refused("--method", "popularity") == (
        f"{own_data}/test_sample.json: record 1: its history is the whole catalogue; nothing is left"
    )
    (own_data / "valid_sample.json").unlink()
    assert "valid_sample.json: no such file" in refused("--method", "sasrec")
    assert not (tmp_path / "out").exists()


def test_the_real_command_line_with_its_default_folder(run_script, tmp_path, data_dir):
    result = run_script("predict_baselines.py", "--method", "item_knn", "--data_dir", data_dir, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert "predictions: 100%" in result.stderr
    assert len(read_json(tmp_path / "output" / "item_knn" / "predictions" / "raw_results_8.json")) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Goodreads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOODREADS.is_dir(), reason=f"{GOODREADS}: not here")
@pytest.mark.parametrize(
    ("method", "ndcg", "hit_rate"), [("popularity", 0.0100, 0.029), ("item_knn", 0.0367, 0.070), ("random", 0, 0.004)]
)
def test_figures_on_goodreads(tmp_path, method, ndcg, hit_rate):
    predict(method, GOODREADS, tmp_path / "run")
    run_main(
        *("evaluate", "--predictions", tmp_path / "run" / "predictions", "--data_dir", GOODREADS, "--topk", "10"),
        *("--results_csv", tmp_path / "results.csv", "--metrics_json", tmp_path / "metrics.json", "--bootstrap", "0"),
    )
    figures = read_json(tmp_path / "metrics.json")["@10"]
    assert figures["users"] == 1000
    assert figures["NDCG"] == pytest.approx(ndcg, abs=0.002)
    assert figures["HR"] == pytest.approx(hit_rate, abs=0.002)
