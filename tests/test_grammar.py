"""Selectors `pool:order[:count]` and presets: the grammar, each order against its definition, the command line."""

import json
import math
import shutil
import time
from collections import Counter

import numpy as np
import pytest
from conftest import edit_json, listing, run_main
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_catalogue import CATALOGUE, TITLES, UNKNOWN, known, make_record, make_sampler

from cebs.catalogue import interest_cluster, load_catalogue
from cebs.negatives import NegativeSampler, selection_counts
from cebs.preferences import SPLITS
from cebs.prompts import quote, read_records
from cebs.selectors import ORDERS, POOLS, PRESETS, SIMILARITY_ORDERS, Selector, find_preset, parse_negatives
from cebs.similarity import unit_vectors
from utils import InputError, read_json, sha256, write_json

selectors = st.builds(Selector, st.sampled_from(POOLS), st.sampled_from(ORDERS), st.integers(1, 4))
# lengths whose means are exact in binary, so that ties are ties
histories = st.sampled_from([0, 1, 2, 4]).flatmap(lambda size: st.lists(known, min_size=size, max_size=size))
rows = st.tuples(histories, known)
proposals = st.lists(
    st.tuples(st.sampled_from([*TITLES, *UNKNOWN, "NAN", ""]), st.integers(-9, 0).map(float)), max_size=12
)
axes = [tuple(sign * (place == axis) for place in range(4)) for axis in range(4) for sign in (1.0, -1.0)]
diagonals = [(a, b, c, d) for a in (0.5, -0.5) for b in (0.5, -0.5) for c in (0.5, -0.5) for d in (0.5, -0.5)]
vectors = st.fixed_dictionaries({title: st.sampled_from([*axes, *diagonals]) for title in [*TITLES, *UNKNOWN]})


def take(sampler, selector, candidates, record, index=0, embeddings=None):
    return sampler.select([selector], candidates, record, "train", index, embeddings)[selector]


# --- the grammar ---


@given(selectors)
def test_a_selector_comes_back_from_its_text(selector):
    assert Selector.parse(str(selector)) == selector


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("in:first", Selector("in", "first", 1)),
        ("in:first:1", Selector("in", "first", 1)),
        ("all:random:10", Selector("all", "random", 10)),
        ("out:farthest_history:2", Selector("out", "farthest_history", 2)),
    ],
)
def test_what_is_read(text, selector):
    assert Selector.parse(text) == selector


ALL_ORDERS = (
    "first, random, low_exposure, high_exposure, likely, "
    "nearest_target, farthest_target, nearest_history, farthest_history"
)


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("in:frist", ["there is no order 'frist'; did you mean first?", f"orders: {ALL_ORDERS}"]),
        ("in:low_exposur:3", ["no order 'low_exposur'; did you mean low_exposure?", ALL_ORDERS]),
        ("inn:first", ["there is no pool 'inn'; did you mean in?", "pools: in, out, all"]),
        (":first", ["there is no pool ''", "pools: in, out, all"]),
        ("in:", ["there is no order ''", ALL_ORDERS]),
        ("in:first:0", ["the count must be 1 or more"]),
        ("in:first:-1", ["the count must be a whole number of 1 or more, not '-1'"]),
        ("in:first:two", ["the count must be a whole number of 1 or more, not 'two'"]),
        ("in:first:", ["the count must be a whole number of 1 or more, not ''"]),
        ("in:first:1:2", ["a selector is pool:order[:count]", "pools: in, out, all", ALL_ORDERS]),
        ("dpo_hrad", ["is no preset, nor a selector pool:order[:count]; did you mean dpo_hard?", ", sdpo_10"]),
        ("in", ["is no preset, nor a selector", "presets: dpo_hard, dpo_long_tail, dpo_two_negatives, "]),
    ],
)
def test_complaints_name_the_selector_and_what_exists(text, complaints):
    with pytest.raises(InputError) as error:
        parse_negatives(["in:first", text])
    assert str(error.value).startswith(f"{text}: ") and "\n" not in str(error.value)
    assert all(complaint in str(error.value) for complaint in complaints)


@example("::1")
@given(
    st.lists(st.sampled_from(["in", "out", "first", ":", "1", "0", "random", "x", " ", "²"]), max_size=6).map("".join)
)
def test_any_other_text_is_refused(text):
    try:
        (selector,) = parse_negatives([text])
    except InputError as error:
        assert str(error).startswith(f"{text}: ")
    else:
        pool, order, *count = text.split(":")
        assert (selector.pool, selector.order) == (pool, order) and pool in POOLS and order in ORDERS
        assert [selector.count] == ([int(count[0])] if count else [1])


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("dpo_hard", "in:first"),
        ("dpo_long_tail", "out:low_exposure"),
        ("dpo_two_negatives", "in:first out:low_exposure"),
        ("clusterin_low", "in:low_exposure"),
        ("clusterin_high", "in:high_exposure"),
        ("clusterout_low", "out:low_exposure"),
        ("clusterout_high", "out:high_exposure"),
        ("clusterin_low_clusterout_low", "in:low_exposure out:low_exposure"),
        ("clusterin_high_clusterout_high", "in:high_exposure out:high_exposure"),
        ("balanced_popularity", "all:high_exposure all:low_exposure"),
        ("sdpo_3", "all:random:3"),
        ("sdpo_5", "all:random:5"),
        ("sdpo_10", "all:random:10"),
    ],
)
def test_presets_equal_their_expressions(name, expression):
    assert find_preset(name) == parse_negatives([name]) == parse_negatives(expression.split())
    assert parse_negatives(["out:random", name, "out:random"])[0] == Selector("out", "random")


def test_presets_do_not_take_the_names_of_other_files():
    assert not PRESETS.keys() & {"negatives", "balanced", "candidates", "dpo"}


# --- every selector against its definition ---


def definition(selector, proposed, row, train, unknown_titles, vectors):
    """The titles that the selector stands for, in plain words; for `random`, all that it may take."""
    history, target = row
    cluster = interest_cluster(history, CATALOGUE)
    pool = []
    for title, log_prob in proposed:
        inside = any(genre in cluster for genre in CATALOGUE.genres.get(title, []))
        if title in (target, *history, "", "NAN") or (title not in TITLES and unknown_titles == "drop"):
            continue
        if selector.pool == "all" or (selector.pool == "in") == inside:
            pool.append((title, log_prob))

    def exposure(title):
        return sum(past.count(title) + (aim == title) for past, aim in train) if title in TITLES else 0

    def cosine(a, b):
        return sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))

    def mean_cosine(title):
        return sum(cosine(title, past) for past in history) / len(history) if history else 0

    score = {
        "first": lambda title, log_prob: 0,
        "random": lambda title, log_prob: 0,
        "low_exposure": lambda title, log_prob: -exposure(title),
        "high_exposure": lambda title, log_prob: exposure(title),
        "likely": lambda title, log_prob: log_prob,
        "nearest_target": lambda title, log_prob: cosine(title, target),
        "farthest_target": lambda title, log_prob: -cosine(title, target),
        "nearest_history": lambda title, log_prob: mean_cosine(title),
        "farthest_history": lambda title, log_prob: -mean_cosine(title),
    }[selector.order]
    best_first = []
    while pool:
        most = max(score(*candidate) for candidate in pool)
        best_first.append(next(title for title, log_prob in pool if score(title, log_prob) == most))
        pool = [candidate for candidate in pool if candidate[0] != best_first[-1]]
    return best_first


@settings(max_examples=500)
@given(
    selectors,
    proposals,
    rows,
    st.lists(rows, max_size=6),
    st.sampled_from(["keep", "drop"]),
    st.sampled_from(["random", "skip"]),
    vectors,
)
def test_every_selector_takes_what_its_definition_says(
    selector, proposed, row, train, unknown_titles, fallback, vectors
):
    record, sampler = make_record(*row), make_sampler(train, unknown_titles, fallback)
    embeddings = {title: np.array(vector) for title, vector in vectors.items()}
    taken = take(sampler, selector, sampler.describe(proposed, record), record, embeddings=embeddings)
    titles = [selection.title for selection in taken]
    fitting = definition(selector, proposed, row, train, unknown_titles, vectors)
    everyone = definition(Selector("all", "first"), proposed, row, train, unknown_titles, vectors)
    history, target = row
    assert not {target, *history, "", "NAN"} & set(titles)
    assert len(set(titles)) == len(titles) <= selector.count
    assert [selection.in_catalogue for selection in taken] == [title in TITLES for title in titles]
    if fitting:
        assert all(selection.fallback == "" for selection in taken)
        if selector.order == "random":
            assert len(titles) == min(len(fitting), selector.count) and set(titles) <= set(fitting)
        else:
            assert titles == fitting[: selector.count]
    elif fallback == "skip":
        assert taken == []
    elif everyone:
        assert [selection.fallback for selection in taken] == ["candidate"] and titles[0] in everyone
    else:
        assert [selection.fallback for selection in taken] == ["catalogue"] and titles[0] in TITLES


@given(st.lists(selectors.filter(lambda s: s.order not in SIMILARITY_ORDERS), max_size=4), proposals, rows)
def test_selectors_do_not_depend_on_each_other_and_a_greater_count_adds_to_the_end(chosen, proposed, row):
    record, sampler = make_record(*row), make_sampler()
    candidates = sampler.describe(proposed, record)
    together = sampler.select(chosen, candidates, record, "train", 3)
    for selector in chosen:
        assert together[selector] == take(sampler, selector, candidates, record, index=3)
        more = Selector(selector.pool, selector.order, selector.count + 2)
        assert take(sampler, more, candidates, record, index=3)[: selector.count] == together[selector]


def test_random_order_is_fair_and_another_for_each_record_and_seed():
    record, proposed = make_record(["T1"], "T2"), [("U0", -1.0), ("U1", -2.0), ("U1", -3.0), ("U2", -4.0)]
    sampler, selector = make_sampler(), Selector("all", "random")
    candidates = sampler.describe(proposed, record)
    counts = Counter(take(sampler, selector, candidates, record, index)[0].title for index in range(2000))
    assert counts.keys() == {"U0", "U1", "U2"}
    for title, share in (("U0", 0.25), ("U1", 0.5), ("U2", 0.25)):  # as often as it was proposed
        assert abs(counts[title] / 2000 - share) < 0.05
    of_seeds = {take(make_sampler(seed=seed), selector, candidates, record)[0].title for seed in range(20)}
    assert of_seeds == {"U0", "U1", "U2"}
    other = [take(sampler, Selector("out", "random"), candidates, record, index)[0].title for index in range(30)]
    assert other != [take(sampler, selector, candidates, record, index)[0].title for index in range(30)]


def test_what_a_selector_took_is_counted():
    record, selector = make_record(["T5"], "T2"), Selector("in", "first", 2)  # T1 and T8 share a genre with T5
    lists = [["T1", "T8", "T1"], ["T1"], ["U0"], []]

    def counts(fallback):
        sampler = make_sampler(fallback=fallback)
        proposed = [sampler.describe([(title, None) for title in titles], record) for titles in lists]
        return selection_counts([take(sampler, selector, each, record) for each in proposed], selector.count)

    assert counts("random") == {
        "titles": 5,
        "records_with_fewer_than_count": 3,
        "random_candidate": 1,
        "random_catalogue_title": 1,
        "left_out": 0,
        "not_in_catalogue": 1,
    }
    assert counts("skip") == {
        "titles": 3,
        "records_with_fewer_than_count": 1,
        "random_candidate": 0,
        "random_catalogue_title": 0,
        "left_out": 2,
        "not_in_catalogue": 0,
    }


def test_embeddings_are_unit_vectors_of_the_encoder(encoder, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    titles, texts = ["Emma", "Dune", "It"], ["Dune", "made up", "Emma", "made up"]
    found = unit_vectors(texts, titles, encoder, tmp_path)
    assert list(found) == ["Dune", "made up", "Emma"]
    plain = SentenceTransformer(str(encoder)).encode(list(found), normalize_embeddings=True)
    for vector, expected in zip(found.values(), plain, strict=True):
        assert vector == pytest.approx(expected, abs=1e-5)
    # the catalogue's come from the cache
    monkeypatch.setattr("cebs.grounding.load_encoder", lambda path: pytest.fail("the encoder is loaded"))
    assert (unit_vectors(["It", "Emma"], titles, encoder, tmp_path)["Emma"] == found["Emma"]).all()


# --- the command line, on stored candidates ---


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_dir):
    """A data folder, and candidates for it: half of them titles of the catalogue, some records with none at all."""
    folder = tmp_path_factory.mktemp("grammar")
    shutil.copytree(data_dir, folder / "data")
    titles = load_catalogue(data_dir).titles
    stored = {"data_sha256": {split: sha256(data_dir / f"{split}_sample.json") for split in ("train", "valid")}}
    for split, step in (("train", 7), ("valid", 11)):
        stored[split] = []
        for index in range(len(read_records(data_dir / f"{split}_sample.json"))):
            numbers = range(index, index + step * (index % 5), step)  # 0 to 4 candidates
            names = [titles[number % len(titles)] if number % 2 else f"made up {number}" for number in numbers]
            stored[split].append(
                {"candidates": [{"title": name, "log_prob": -float(len(name))} for name in names]},
            )
    write_json(folder / "candidates.json", stored)
    return folder


def again(world, out, *more):
    run_main(
        "dataset_generate_cluster_batch",
        *("--data_dir", world / "data", "--candidates", world / "candidates.json", "--output_dir", out),
        *("--model_name_or_path", "no model is needed", *more),
    )
    return out / "data"


def rejected(path):
    """The lists of rejected titles of a file, by prompt."""
    return {
        row["prompt"]: [row["rejected"]] if isinstance(row["rejected"], str) else row["rejected"]
        for row in read_json(path)
    }


@pytest.fixture
def no_model(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model is loaded")

    for name in ("cebs.models.load_model", "cebs.generation.load_for_inference", "cebs.generation.load_tokenizer"):
        monkeypatch.setattr(name, load)
    monkeypatch.setattr("cebs.grounding.load_encoder", load)


def test_presets_and_selectors_write_the_same_data(world, tmp_path, no_model):
    for name in PRESETS:
        expression = map(str, PRESETS[name])
        data = again(world, tmp_path / name, "--presets", name, "--negatives", *expression)
        for split in ("train", "valid"):
            preset = (data / f"{name}_{split}.json").read_bytes()
            assert preset == (data / f"negatives_{split}.json").read_bytes() and len(preset) > 100
        written = {"candidates", *(f"{each}_{split}" for each in ("balanced", "negatives", name) for split in SPLITS)}
        assert {path.stem for path in data.iterdir()} == written


def test_a_preset_can_stand_among_selectors(world, tmp_path, no_model):
    data = again(world, tmp_path / "out", "--negatives", "dpo_two_negatives", "all:likely")
    for split in SPLITS:
        both, one = rejected(data / f"dpo_two_negatives_{split}.json"), rejected(data / f"negatives_{split}.json")
        assert both.keys() == one.keys()
        for prompt, titles in one.items():
            assert titles[: len(both[prompt])] == both[prompt] and len(titles) <= len(both[prompt]) + 1


def test_skip_leaves_out_and_counts(world, tmp_path, no_model, capsys):
    presets = ("--presets", "dpo_hard", "dpo_long_tail", "dpo_two_negatives", "--negatives", "all:random:3")
    drawn = again(world, tmp_path / "random", *presets)
    skipped = again(world, tmp_path / "skip", *presets, "--fallback", "skip")
    printed = capsys.readouterr().out
    counts = {name: read_json(tmp_path / name / "run.json")["counts"] for name in ("random", "skip")}
    stored = read_json(drawn / "candidates.json")
    seen = Counter()
    for split in SPLITS:
        records = read_records(world / "data" / f"{split}_sample.json")
        hard, long_tail, all_three = {}, {}, {}
        for record, entry in zip(records, stored[split], strict=True):
            titles = [
                (candidate["title"], candidate["in_cluster"])
                for candidate in entry["candidates"]
                if candidate["title"] not in {record.target, *record.history}
            ]
            inside = [title for title, is_inside in titles if is_inside]
            hard |= {record.prompt: [quote(inside[0])]} if inside else {}
            long_tail |= {record.prompt: titles} if len(inside) < len(titles) else {}
            all_three |= {record.prompt: {quote(title) for title, _ in titles}} if titles else {}
            seen["both"] += bool(inside) and len(inside) < len(titles)
        assert rejected(skipped / f"dpo_hard_{split}.json") == hard
        assert rejected(skipped / f"dpo_long_tail_{split}.json").keys() == long_tail.keys()
        two = rejected(skipped / f"dpo_two_negatives_{split}.json")
        assert two.keys() == hard.keys() | long_tail.keys()
        assert all(len(titles) == (prompt in hard) + (prompt in long_tail) for prompt, titles in two.items())
        for prompt, titles in rejected(skipped / f"negatives_{split}.json").items():
            assert set(titles) <= all_three[prompt] and len(titles) == min(3, len(all_three[prompt]))
        # what was not skipped is what the other run has too
        for name in ("dpo_hard", "dpo_long_tail", "negatives"):
            every = rejected(drawn / f"{name}_{split}.json")
            assert len(every) == len(records) and rejected(skipped / f"{name}_{split}.json").items() <= every.items()
        figures = counts["skip"][split]
        assert figures["selectors"]["in:first"]["left_out"] == len(records) - len(hard)
        assert figures["data_sets"]["dpo_hard"] == {
            "records": len(hard),
            "left_out": len(records) - len(hard),
            "titles": len(hard),
            "chosen_twice": 0,
        }
        fallen = counts["random"][split]["selectors"]["in:first"]
        assert fallen["random_candidate"] + fallen["random_catalogue_title"] == len(records) - len(hard)
        assert f"{len(hard)} negatives, {len(records) - len(hard)} records left out" in printed
        seen["hard"] += len(hard)
        seen["left_out"] += figures["data_sets"]["dpo_two_negatives"]["left_out"]
        for row, record in zip(read_json(skipped / f"balanced_{split}.json"), records, strict=True):
            assert [quote(title) for title in row["hard_negatives"]] == hard.get(record.prompt, [])
    assert min(seen["both"], seen["hard"], seen["left_out"]) > 0


def test_orders_by_similarity_load_the_encoder(world, tmp_path, encoder):
    from sentence_transformers import SentenceTransformer

    nearest = ("--negatives", "all:nearest_target", "all:farthest_history", "--fallback", "skip")
    data = again(world, tmp_path / "out", *nearest, "--encoder", encoder, "--cache_dir", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    model = SentenceTransformer(str(encoder))
    records = read_records(world / "data" / "train_sample.json")
    lists, compared = rejected(data / "negatives_train.json"), 0
    for record, entry in zip(records, read_json(data / "candidates.json")["train"], strict=True):
        titles = [candidate["title"] for candidate in entry["candidates"]]
        titles = [title for title in dict.fromkeys(titles) if title not in {record.target, *record.history}]
        if not titles:
            assert record.prompt not in lists
            continue
        vectors = model.encode([*titles, record.target, *record.history], normalize_embeddings=True)
        to_target = vectors[: len(titles)] @ vectors[len(titles)]
        to_history = (vectors[: len(titles)] @ vectors[len(titles) + 1 :].T).mean(axis=1)
        expected = [quote(titles[to_target.argmax()]), quote(titles[to_history.argmin()])]
        assert lists[record.prompt] == list(dict.fromkeys(expected))
        compared += len(titles) > 1
    assert compared > 2


def test_likely_needs_what_an_old_file_lacks(world, tmp_path, no_model, monkeypatch):
    old = tmp_path / "old"
    shutil.copytree(world, old)

    def forget(stored):
        for split in SPLITS:
            for entry in stored[split]:
                for candidate in entry["candidates"]:
                    del candidate["log_prob"]

    edit_json(old / "candidates.json", forget)
    data = again(old, tmp_path / "first")  # what does not need them goes on
    assert read_json(data / "candidates.json")["train"][1]["candidates"][0]["log_prob"] is None
    before = listing(tmp_path)
    with pytest.raises(InputError, match="candidates.json: train, record 1: .* has no log_prob, which all:likely:2 "):
        again(old, tmp_path / "likely", "--negatives", "in:first", "all:likely:2")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("value", ['"high"', "true", "[1]"])
def test_a_log_prob_that_is_no_number(world, tmp_path, no_model, value):
    shutil.copytree(world, tmp_path / "bad")
    edit_json(
        tmp_path / "bad" / "candidates.json",
        lambda stored: stored["valid"][2]["candidates"][0].update(log_prob=json.loads(value)),
    )
    with pytest.raises(InputError, match="candidates.json: valid, record 2: log_prob of .* is not a number"):
        again(tmp_path / "bad", tmp_path / "out")


def test_another_expression_is_another_run(world, tmp_path, no_model):
    again(world, tmp_path / "out", "--negatives", "in:first")
    again(world, tmp_path / "out", "--negatives", "in:first")  # done already
    with pytest.raises(InputError, match="holds another run of .*negatives was"):
        again(world, tmp_path / "out", "--negatives", "in:first:2")
    again(world, tmp_path / "out", "--presets", "sdpo_3", "--overwrite")
    names = {path.stem for path in (tmp_path / "out" / "data").glob("*_train.json")}
    assert names == {"balanced_train", "sdpo_3_train"}


def test_choosing_takes_under_a_second_for_1280_records(world):
    records = read_records(world / "data" / "train_sample.json")
    titles = load_catalogue(world / "data").titles
    sampler = NegativeSampler(load_catalogue(world / "data"), records, seed=42)
    proposed = [[(titles[(17 * index + 5 * k) % len(titles)], -1.0) for k in range(10)] for index in range(1280)]
    started = time.process_time()
    for index, each in enumerate(proposed):
        record = records[index % len(records)]
        sampler.select(PRESETS["dpo_two_negatives"], sampler.describe(each, record), record, "train", index)
    assert time.process_time() - started < 1


def test_the_command_line_itself(world, tmp_path, run_script):
    args = ["--data_dir", world / "data", "--candidates", world / "candidates.json", "--output_dir", "out"]
    selected = ["--negatives", "in:random:2", "out:low_exposure", "--presets", "clusterin_low", "sdpo_3"]
    result = run_script("dataset_generate_cluster_batch.py", *args, *selected, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert "3 data sets of 18 records chosen in" in result.stdout
    names = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    assert names == {
        "candidates.json",
        *(f"{name}_{split}.json" for name in ("balanced", "negatives", "clusterin_low", "sdpo_3") for split in SPLITS),
    }
    run = read_json(tmp_path / "out" / "run.json")
    assert run["arguments"]["data_sets"] == {
        "negatives": ["in:random:2", "out:low_exposure"],
        "clusterin_low": ["in:low_exposure"],
        "sdpo_3": ["all:random:3"],
    }


# --- candidates from elsewhere than plain sampling ---


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("source", ["topk", "beam", "diverse_beam"])
def test_candidates_of_every_source(tiny_model, data_dir, tmp_path, source, constrained):
    run_main(
        "dataset_generate_cluster_batch",
        *("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--output_dir", tmp_path / "out"),
        *("--candidate_source", source, "--constrained", constrained, "--num_candidates", 4, "--max_candidates", 8),
        *("--num_beam_groups", 2, "--max_new_tokens", 12, "--max_train_samples", 3, "--max_eval_samples", 2),
        *("--dtype", "float32", "--negatives", "all:likely:4", "--fallback", "skip"),
    )
    titles = set(load_catalogue(data_dir).titles)
    stored = read_json(tmp_path / "out" / "data" / "candidates.json")
    lists = rejected(tmp_path / "out" / "data" / "negatives_train.json")
    for record, entry in zip(read_records(data_dir / "train_sample.json"), stored["train"], strict=False):
        found = entry["candidates"]
        assert 0 < len(found) <= (8 if source == "topk" else 4)
        assert all(math.isfinite(candidate["log_prob"]) and candidate["log_prob"] < 0 for candidate in found)
        names = [candidate["title"] for candidate in found]
        assert source == "topk" or len(set(names)) == len(names)
        assert not constrained or set(names) <= titles
        ordered = sorted(found, key=lambda candidate: -candidate["log_prob"])
        expected = [quote(c["title"]) for c in ordered if c["title"] not in {record.target, *record.history, "NAN"}]
        assert lists.get(record.prompt, []) == list(dict.fromkeys(expected))[:4]
