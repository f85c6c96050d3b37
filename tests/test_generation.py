"""Journals and batches: what is finished stays, what was cut short is done again. And how titles are proposed."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cebs.generation import CandidateArguments, Decoder, Journal, load_decoder, run_in_batches
from cebs.models import load_model
from cebs.prompts import build_prompt, encode_completion, encode_titles, predicted_title
from cebs.runs import Run

answers = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.lists(answers, min_size=1, max_size=3), max_size=5), st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_lines(batches, data):
    with TemporaryDirectory() as folder:
        run = Run(Path(folder), resumed=True)
        journal = Journal(run, "cut")
        ends = [0]
        for start, batch in enumerate(batches):
            journal.append(start, batch)
            ends.append(journal.path.stat().st_size)
        cut = data.draw(st.integers(0, ends[-1]))
        if batches:
            os.truncate(journal.path, cut)  # anywhere, also inside a letter of several bytes
        whole = sum(end <= cut for end in ends) - 1
        resumed = Journal(run, "cut")
        assert resumed.batches == dict(enumerate(batches[:whole]))
        assert not batches or resumed.path.stat().st_size == ends[whole]
        resumed.append(whole, ["more"])
        assert Journal(run, "cut").batches == dict(enumerate([*batches[:whole], ["more"]]))


def test_a_new_run_begins_anew(tmp_path):
    Journal(Run(tmp_path), "a/j").append(0, [1])
    assert Journal(Run(tmp_path), "a/j").batches == {}
    journal = Journal(Run(tmp_path, resumed=True), "a/j")
    assert journal.batches == {0: [1]}
    journal.remove()
    assert not list((tmp_path / "a").iterdir())
    Journal(Run(tmp_path, resumed=True), "none").remove()


@given(st.integers(0, 20), st.integers(1, 7), st.integers(0, 10))
def test_interrupted_batches_give_what_uninterrupted_ones_give(items, size, fail_at):
    calls = []

    def work(batch, start):
        calls.append(start)
        if len(calls) == fail_at + 1:
            raise KeyboardInterrupt
        return [[start + place, item] for place, item in enumerate(batch)]

    expected = [[place, place * place] for place in range(items)]
    squares = [place * place for place in range(items)]
    with TemporaryDirectory() as folder:
        try:
            results = run_in_batches(squares, size, work, Journal(Run(Path(folder)), "j"), "test")
        except KeyboardInterrupt:
            results = run_in_batches(squares, size, work, Journal(Run(Path(folder), resumed=True), "j"), "test")
    assert results == expected
    assert sorted(set(calls)) == list(range(0, items, size))
    assert len(calls) <= len(set(calls)) + 1  # only the batch that was cut short is done twice


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 6))
def test_shards_give_what_one_run_gives_and_no_batch_is_done_twice(items, size, parts):
    calls = []

    def work(batch, start):
        calls.append(start)
        return [item * item for item in batch]

    with TemporaryDirectory() as folder:
        shards = [Path(folder, str(part)) for part in range(1, parts + 1)]
        for part, shard in enumerate(shards, start=1):
            run_in_batches(range(items), size, work, Journal(Run(shard, shard=f"{part}/{parts}"), "j"), "test")
        assert sorted(calls) == list(range(0, items, size))
        together = Journal(Run(Path(folder, "all"), shards=shards), "j")
        assert run_in_batches(range(items), size, None, together, "test") == [item * item for item in range(items)]


def test_a_batch_is_on_the_disk_when_append_returns(tmp_path):
    journal = Journal(Run(tmp_path), "j")
    journal.append(3, [{"prediction": '"Les Misérables\u2028"\n'}])
    text = (tmp_path / "j.partial.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == [3, journal.batches[3]] and text.count("\n") == 1


# --- proposing titles ---

TITLES = [
    "Emma",
    "Emma: A Novel",
    "Les Misérables",
    "1984",
    'The "Real" Thing',
    "Ночь 🌒",
    "The Time Machine",
    "The Trial",
]
TITLES += [f"{first} {last}" for first in ("The Old", "A New", "Our") for last in ("House", "Horse", "Home", "Hour")]
PROMPTS = [build_prompt("Recommend a book.", f'"{title}"') for title in ("Emma", "The Trial", "Dracula, the Book")]
SOURCES = ("topk", "beam", "diverse_beam")


@pytest.fixture(scope="module")
def decoder(tiny_model, tokenizer):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Decoder(load_model(tiny_model).eval(), tokenizer, max_length=512, max_new_tokens=8, rows=2)
    torch.set_num_threads(threads)


def candidate_arguments(**changed):
    settings = dict(num_candidates=6, max_candidates=12, top_k=50, temperature=1.0, num_beam_groups=3)
    settings |= dict(candidate_source="topk", constrained=False, renormalize=False)
    return CandidateArguments(**settings | dict(diversity_penalty=1.0, calibration=0.0) | changed)


def propose(decoder, accept=lambda index, titles: True, titles=None, **changed):
    return decoder.propose(
        decoder.encode(PROMPTS), candidate_arguments(**changed), titles=titles, seeds=[1, 2, 3], accept=accept
    )


@torch.no_grad()
def log_prob(decoder, prompt, completion, among=None):
    """Of a completion after a prompt, by the book; among all texts, or among some completions."""
    logits = decoder.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    for place, row in enumerate(logits if among else ()):
        allowed = {other[place] for other in among if other[:place] == completion[:place]}
        row[[token for token in range(len(row)) if token not in allowed]] = -torch.inf
    return float(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_constrained_proposals_are_titles_of_the_catalogue(decoder, source, renormalize):
    how = {"constrained": True, "renormalize": renormalize, "titles": TITLES}
    among = encode_titles(decoder.tokenizer, TITLES) if renormalize else None
    proposed = propose(decoder, candidate_source=source, **how)
    for prompt, found in zip(decoder.encode(PROMPTS), proposed, strict=True):
        titles = [title for title, _ in found]
        assert 1 <= len(found) <= 6 and set(titles) <= set(TITLES)
        assert source == "diverse_beam" or len(found) == 6
        assert source == "topk" or len(set(titles)) == len(titles)
        completions = encode_titles(decoder.tokenizer, titles)
        expected = [log_prob(decoder, prompt, completion, among) for completion in completions]
        assert [number for _, number in found] == pytest.approx(expected, abs=1e-3)
        assert source != "beam" or expected == sorted(expected, reverse=True)
    everything = propose(decoder, candidate_source="beam", num_candidates=len(TITLES), **how)
    assert all({title for title, _ in found} == set(TITLES) for found in everything)


@pytest.mark.parametrize("source", ["beam", "diverse_beam"])
def test_free_beams_propose_each_title_once(decoder, source):
    for found in propose(decoder, candidate_source=source, num_candidates=12):
        titles = [title for title, _ in found]
        assert 1 <= len(titles) == len(set(titles)) <= 12
        assert all(number < 0 for _, number in found)


def test_spellings_of_one_title_count_once(decoder, monkeypatch):
    twice = [encode_completion(decoder.tokenizer, text) for text in ('"Emma"', '"Emma', '"Ivanhoe"')]
    monkeypatch.setattr("cebs.generation.beam_search", lambda *args, **kwargs: [(twice, [-1.0, -2.0, -3.0])])
    found = decoder.propose([[5]], candidate_arguments(candidate_source="beam"), titles=None, seeds=[0], accept=None)
    assert found == [[("Emma", -1.0), ("Ivanhoe", -3.0)]]


def test_sampling_goes_on_until_a_round_is_accepted(decoder):
    rounds = {0: [], 1: [], 2: []}

    def accept(index, titles):
        rounds[index].append(titles)
        return index == 1

    proposed = propose(decoder, accept)
    assert [len(found) for found in proposed] == [12, 6, 12]
    for index, found in enumerate(proposed):
        assert [title for title, _ in found] == sum(rounds[index], [])
        assert all(title == predicted_title(title) for title, _ in found)
    assert propose(decoder, accept) == proposed  # same seeds
    assert propose(decoder, accept, temperature=0.3) != proposed


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(temperature=0.0), "--temperature: 0.0 must be above 0"),
        (dict(diversity_penalty=-1.0), "--diversity_penalty: -1.0 must be 0 or more"),
        (dict(calibration=-0.1), "--calibration: -0.1 must be 0 or more"),
        (dict(calibration=0.4, candidate_source="beam"), "--calibration: is for beams over the catalogue; give --cand"),
        (dict(calibration=0.4, constrained=True), "--calibration: is for beams over the catalogue; give --candidate_s"),
        (dict(renormalize=True), "--renormalize: is for titles of the catalogue; give --constrained with it"),
        (dict(num_candidates=0), "--num_candidates 0: must be at least 1"),
        (dict(candidate_source="diverse_beam", num_beam_groups=4), "--num_beam_groups 4: does not divide"),
    ],
)
def test_bad_candidate_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        candidate_arguments(**changed)


@pytest.mark.parametrize(
    ("given", "device", "rows"), [(None, "cpu", 32), (None, "cuda", 64), (8, "cpu", 8), (8, "cuda", 8)]
)
def test_a_gpu_decodes_a_whole_batch_side_by_side(tiny_model, monkeypatch, given, device, rows):
    model = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr("cebs.generation.load_for_inference", lambda model_dir, args: model)
    args = SimpleNamespace(rows=given, batch_size=64, max_length=64, max_new_tokens=8, adapter="")
    assert load_decoder(tiny_model, args, Run(Path())).rows == rows
