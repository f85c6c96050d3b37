"""Journals and batches: what is finished stays, what was cut short is done again."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cebs.generation import Journal, run_in_batches

answers = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.lists(answers, min_size=1, max_size=3), max_size=5), st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, batches, data):
    path = tmp_path_factory.getbasetemp() / "cut.partial.jsonl"
    journal = Journal(path, resumed=False)
    ends = [0]
    for batch in batches:
        journal.append(batch)
        ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:cut])  # anywhere, also inside a letter of several bytes
    whole = sum(end <= cut for end in ends) - 1
    resumed = Journal(path, resumed=True)
    assert resumed.batches == batches[:whole] and path.stat().st_size == ends[whole]
    resumed.append(["more"])
    assert Journal(path, resumed=True).batches == [*batches[:whole], ["more"]]


def test_a_new_run_begins_anew(tmp_path):
    Journal(tmp_path / "a" / "j", resumed=False).append([1])
    assert Journal(tmp_path / "a" / "j", resumed=False).batches == []
    assert Journal(tmp_path / "a" / "j", resumed=True).batches == []
    journal = Journal(tmp_path / "none", resumed=True)
    assert journal.batches == []
    journal.remove()
    assert not (tmp_path / "none").exists()


@given(st.integers(0, 20), st.integers(1, 7), st.integers(0, 10))
def test_interrupted_batches_give_what_uninterrupted_ones_give(tmp_path_factory, items, size, fail_at):
    path = tmp_path_factory.getbasetemp() / "batches.partial.jsonl"
    calls = []

    def work(batch, start):
        calls.append(start)
        if len(calls) == fail_at + 1:
            raise KeyboardInterrupt
        return [[start + place, item] for place, item in enumerate(batch)]

    expected = [[place, place * place] for place in range(items)]
    squares = [place * place for place in range(items)]
    try:
        results = run_in_batches(squares, size, work, Journal(path, resumed=False), "test")
    except KeyboardInterrupt:
        results = run_in_batches(squares, size, work, Journal(path, resumed=True), "test")
    assert results == expected
    assert sorted(set(calls)) == list(range(0, items, size))
    assert len(calls) <= len(set(calls)) + 1  # only the batch that was cut short is done twice


def test_a_batch_is_on_the_disk_when_append_returns(tmp_path):
    journal = Journal(tmp_path / "j", resumed=False)
    journal.append([{"prediction": '"Les Misérables\u2028"\n'}])
    assert json.loads((tmp_path / "j").read_text(encoding="utf-8")) == journal.batches[0]
    assert (tmp_path / "j").read_text(encoding="utf-8").count("\n") == 1
