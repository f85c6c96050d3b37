"""Rules 2 to 7: what a candidate is, which may be a negative, and which is chosen. Brute force beside the code."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_catalogue import CATALOGUE, TITLES, UNKNOWN, known, make_record, make_sampler

from cebs.catalogue import Catalogue, interest_cluster
from cebs.negatives import selection_counts
from cebs.preferences import preference_record, read_preferences
from cebs.prompts import quote
from cebs.selectors import Selector
from utils import InputError, record_seed, write_json

rows = st.tuples(st.lists(known, max_size=3), known)
proposals = st.lists(st.sampled_from([*TITLES, *UNKNOWN, "NAN", ""]), max_size=12)
settings_of = st.sampled_from(["keep", "drop"])
HARD, LONG_TAIL = Selector("in", "first"), Selector("out", "low_exposure")


def describe(sampler, titles, record):
    return sampler.describe([(title, None) for title in titles], record)


def choose(sampler, selector, candidates, record, split, index):
    (selection,) = sampler.select([selector], candidates, record, split, index)[selector]
    return selection


def exposure(title, train):
    return sum(history.count(title) + (target == title) for history, target in train)


@given(rows, st.lists(rows, max_size=6), proposals)
def test_candidates_are_described_in_the_order_sampled(row, train, proposed):
    record, sampler = make_record(*row), make_sampler(train)
    cluster = interest_cluster(record.history, CATALOGUE)
    described = describe(sampler, proposed, record)
    assert [candidate.title for candidate in described] == proposed
    for candidate in described:
        genres = CATALOGUE.genres.get(candidate.title, [])
        assert candidate.in_catalogue == (candidate.title in TITLES)
        assert candidate.genres == genres
        assert candidate.exposure == (exposure(candidate.title, train) if candidate.title in TITLES else 0)
        assert candidate.in_cluster == any(genre in cluster for genre in genres)


@settings(max_examples=300)
@given(rows, st.lists(rows, max_size=6), proposals, settings_of, st.integers(0, 5))
def test_negatives_against_brute_force(row, train, proposed, unknown_titles, index):
    history, target = row
    record, sampler = make_record(*row), make_sampler(train, unknown_titles)
    candidates = describe(sampler, proposed, record)
    cluster = set(interest_cluster(history, CATALOGUE))

    def inside(title):
        return any(genre in cluster for genre in CATALOGUE.genres.get(title, []))

    may = [
        title
        for title in proposed
        if title != target
        and title not in history  # rule 6
        and title not in ("", "NAN")
        and (title in TITLES or unknown_titles == "keep")  # rule 7
    ]
    matches = [title for title in may if inside(title)]
    others = [title for title in may if not inside(title)]
    assert sampler.has_match(candidates, record) == bool(matches)
    assert [candidate.title for candidate in sampler.eligible(candidates, record)] == may

    hard = choose(sampler, HARD, candidates, record, "train", index)
    long_tail = choose(sampler, LONG_TAIL, candidates, record, "train", index)
    if matches:
        assert (hard.title, hard.fallback) == (matches[0], "")  # rule 3
    if others:
        counts = [exposure(title, train) if title in TITLES else 0 for title in others]
        assert (long_tail.title, long_tail.fallback) == (others[counts.index(min(counts))], "")  # rule 5
    for found, chosen in ((matches, hard), (others, long_tail)):
        if not found and may:
            assert chosen.fallback == "candidate" and chosen.title in may
        if not may:
            assert chosen.fallback == "catalogue" and chosen.title in set(TITLES) - {target, *history}
        assert chosen.title not in {target, *history, "", "NAN"}
        assert chosen.in_catalogue == (chosen.title in TITLES)
        assert chosen.in_catalogue or unknown_titles == "keep"
    # the same seed, the same choice, whatever was chosen in between
    again = make_sampler(train, unknown_titles)
    assert choose(again, LONG_TAIL, candidates, record, "train", index) == long_tail
    assert choose(again, HARD, candidates, record, "train", index) == hard


VOLUMES = {f"{series}, #{number}: B{number}": series for series in "ABC" for number in (1, 2)} | {"X": "", "Y": ""}
LIBRARY = Catalogue(list(VOLUMES), {title: ["a"] if "A" in title else ["b"] for title in VOLUMES}, ["a", "b"])
titles_of_series = st.sampled_from(list(VOLUMES))


@given(
    st.lists(titles_of_series, max_size=3),
    titles_of_series,
    st.lists(titles_of_series, max_size=8),
    st.sampled_from([*product(["in", "out", "all"], ["first", "random", "low_exposure"])]),
)
def test_titles_of_a_series_of_the_history_are_spared(history, target, proposed, kind):
    record, selector = make_record(history, target), Selector(*kind)
    read = {VOLUMES[title] for title in history} - {""}
    keeping, sampler = (make_sampler(catalogue=LIBRARY, same_series=choice) for choice in ("keep", "drop"))
    candidates = describe(sampler, proposed, record)
    may = [candidate for candidate in keeping.eligible(candidates, record) if VOLUMES[candidate.title] not in read]
    assert sampler.eligible(candidates, record) == may
    if VOLUMES.keys() - {target, *history} <= {title for title, series in VOLUMES.items() if series in read}:
        with pytest.raises(InputError, match="or, with --same_series drop, of a series of it"):
            sampler.random(LIBRARY.titles, record, "train", 0)
    else:
        chosen = choose(sampler, selector, candidates, record, "train", 0)
        assert VOLUMES[chosen.title] not in read
        # what may be chosen is chosen as among the others alone
        others = describe(keeping, [candidate.title for candidate in may], record)
        if may:
            assert chosen == choose(keeping, selector, others, record, "train", 0)


@given(rows, st.lists(rows, min_size=1, max_size=6), st.integers(0, 9), st.integers(1, 8))
def test_popular_negatives_are_of_the_training_records_and_never_target_or_history(row, train, index, count):
    record, sampler = make_record(*row), make_sampler(train)
    free = {title for title in TITLES if exposure(title, train)} - {row[1], *row[0]}
    if not free:
        with pytest.raises(InputError, match="no title is left to be its negative"):
            sampler.popular(record, "train", index, count)
        return
    drawn = sampler.popular(record, "train", index, count)
    assert len(drawn) == len(set(drawn)) == min(count, len(free)) and set(drawn) <= free
    assert sampler.popular(record, "train", index, count + 1)[:count] == drawn


def test_popular_negatives_are_drawn_in_proportion_to_their_exposure():
    sampler = make_sampler([(["T1"] * 6 + ["T3"] * 3, "T5")])
    record = make_record(["T0"], "T2")
    counts = Counter(sampler.popular(record, "train", index)[0] for index in range(3000))
    assert counts.keys() == {"T1", "T3", "T5"}
    for title, share in (("T1", 0.6), ("T3", 0.3), ("T5", 0.1)):
        assert counts[title] / 3000 == pytest.approx(share, abs=0.03)
    second = Counter(sampler.popular(record, "valid", index, 2)[1] for index in range(3000))
    # of the draws that left T1 out at first: 0.3 x 6/7 + 0.1 x 6/9
    assert second["T1"] / 3000 == pytest.approx(0.3 * 6 / 7 + 0.1 * 6 / 9, abs=0.03)


def test_fall_backs_are_random_over_all_candidates():
    record, sampler = make_record(["T1"], "T2"), make_sampler()
    candidates = describe(sampler, ["U0", "U1", "U2"], record)
    counts = Counter(choose(sampler, HARD, candidates, record, "train", index).title for index in range(600))
    assert counts.keys() == {"U0", "U1", "U2"} and min(counts.values()) > 150
    of_seeds = {choose(make_sampler(seed=seed), HARD, candidates, record, "train", 0).title for seed in range(20)}
    assert of_seeds == {"U0", "U1", "U2"}


def test_the_two_kinds_of_fall_back_are_drawn_apart():
    record, sampler = make_record([], "T2"), make_sampler()
    inside_none = describe(sampler, ["U0", "U1"], record)
    none = describe(sampler, [], record)
    assert all(choose(sampler, HARD, none, record, "train", index).fallback == "catalogue" for index in range(5))
    picks = [choose(sampler, HARD, inside_none, record, split, index).title for split in "ab" for index in range(8)]
    assert len(set(picks)) == 2


@given(rows, st.lists(known, min_size=1, max_size=6, unique=True), st.integers(0, 9), st.integers(1, 8))
def test_random_negatives_are_never_target_or_history(row, titles, index, count):
    history, target = row
    record, sampler = make_record(*row), make_sampler()
    free = set(titles) - {target, *history}
    if free:
        drawn = sampler.random([*titles, ""], record, "train", index, count)
        assert set(drawn) <= free and len(set(drawn)) == len(drawn) == min(count, len(free))
        assert drawn[:1] == sampler.random([*titles, ""], record, "train", index)
    else:
        with pytest.raises(InputError, match=f"train_sample.json: record {index}: no title is left"):
            sampler.random(titles, record, "train", index)


def test_fall_backs_are_counted():
    record, sampler = make_record(["T1"], "T2"), make_sampler()
    lists = [["T4"], ["U0"], [], ["T2"]]
    candidates = [describe(sampler, titles, record) for titles in lists]
    chosen = [choose(sampler, HARD, each, record, "train", index) for index, each in enumerate(candidates)]
    assert chosen[1].fallback == "candidate"
    counts = selection_counts([[selection] for selection in chosen], HARD.count)
    assert counts["titles"] == 4 and counts["random_candidate"] == 2 and counts["random_catalogue_title"] == 2
    assert counts["not_in_catalogue"] == sum(selection.title in UNKNOWN for selection in chosen)


# --- seeds ---


def test_record_seeds_do_not_collide_and_do_not_change():
    seeds = [record_seed(*key) for key in product((0, 1, 42), ("train", "valid", "train/hard"), range(200))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch's generator takes
    assert record_seed(42, "train", 0) == record_seed(42, "train", 0)
    assert record_seed(42, "train", 0) == 2182626129610440119  # finished runs were made with it


# --- preference records ---


def test_one_title_is_a_text_and_several_are_a_list():
    record = make_record(["T1"], "T2")
    one = preference_record(record, ["T3"])
    assert one == {"prompt": record.prompt, "chosen": '"T2"', "rejected": '"T3"'}
    assert preference_record(record, ["T3", "T4"])["rejected"] == ['"T3"', '"T4"']


rejected_titles = st.text(min_size=1, max_size=5).filter(lambda title: title != "c").map(quote)  # "c" is chosen


@given(st.lists(st.lists(rejected_titles, min_size=1, max_size=4), min_size=1, max_size=5))
def test_preference_records_come_back_as_lists(tmp_path_factory, rejected):
    path = tmp_path_factory.getbasetemp() / "preferences.json"
    write_json(
        path,
        [
            {"prompt": "p", "chosen": '"c"', "rejected": titles[0] if len(titles) == 1 else titles}
            for titles in rejected
        ],
    )
    assert [record["rejected"] for record in read_preferences(path)] == rejected
