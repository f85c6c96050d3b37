import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cebs.trie import build_trie, children

# Few tokens and short titles, so that shared beginnings and titles inside titles are the rule.
catalogues = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple), min_size=1, max_size=40, unique=True
)


def walk(trie, tokens):
    """The node that `tokens` lead to, found through `children` alone; None where there is none."""
    node = 0
    for token in tokens:
        _, child = children(trie, torch.tensor([node]))
        hits = child[trie.tokens[child] == token]
        if len(hits) == 0:
            return None
        assert len(hits) == 1
        node = int(hits)
    return node


@settings(deadline=None, max_examples=60)
@given(catalogues)
def test_holds_exactly_the_titles(completions):
    trie = build_trie(completions)
    for i, completion in enumerate(completions):
        assert trie.titles[walk(trie, completion)] == i
        assert walk(trie, (*completion, 9)) is None
    beginnings = {completion[:n] for completion in completions for n in range(len(completion) + 1)}
    assert len(trie.tokens) == len(trie.titles) == len(trie.offsets) - 1 == len(beginnings)
    for beginning in beginnings - set(completions):
        assert trie.titles[walk(trie, beginning)] == -1


@settings(deadline=None, max_examples=60)
@given(catalogues, st.data())
def test_children_of_many_nodes_at_once(completions, data):
    trie = build_trie(completions)
    nodes = data.draw(st.lists(st.integers(0, len(trie.tokens) - 1), max_size=8))
    parent, child = children(trie, torch.tensor(nodes, dtype=torch.long))
    expected = [(p, c) for p, n in enumerate(nodes) for c in range(int(trie.offsets[n]), int(trie.offsets[n + 1]))]
    assert list(zip(parent.tolist(), child.tolist(), strict=True)) == expected


def test_the_drawing():
    trie = build_trie([[5, 7, 2], [5, 7, 9, 2], [5, 8, 2], [6, 2]])
    assert trie.tokens.tolist() == [-1, 5, 6, 7, 8, 2, 2, 9, 2, 2]
    assert trie.titles.tolist() == [-1, -1, -1, -1, -1, 3, 0, -1, 2, 1]
    assert trie.offsets.tolist() == [1, 3, 5, 6, 8, 9, 9, 9, 10, 10, 10]


def test_under_100_bytes_per_node():
    trie = build_trie([[i // 100, i % 100, 2] for i in range(5000)])
    assert sum(t.numel() * t.element_size() for t in (trie.offsets, trie.tokens, trie.titles)) < 100 * len(trie.tokens)


@pytest.mark.parametrize(
    "completions, message",
    [
        ([], "empty"),
        ([[1], []], "title 1 has no tokens"),
        ([[1, 2], [3], [1, 2]], r"titles 0 and 2|titles 2 and 0"),
    ],
)
def test_bad_catalogues(completions, message):
    with pytest.raises(ValueError, match=message):
        build_trie(completions)
