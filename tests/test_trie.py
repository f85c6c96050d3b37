import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cebs.trie import best_rise, build_trie, children, title_paths

# Few tokens and short titles, so that shared beginnings and titles inside titles are the rule.
catalogues = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple), min_size=1, max_size=40, unique=True
)


def walk(trie, tokens):
    """The node that `tokens` lead to, found through `children` alone; None where there is none."""
    node = 0
    for token in tokens:
        child = children(trie, torch.tensor([node]))[0]
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
    nodes = data.draw(st.lists(st.integers(0, len(trie.tokens) - 1), min_size=1, max_size=8))
    found = children(trie, torch.tensor(nodes))
    expected = [list(range(int(trie.offsets[n]), int(trie.offsets[n + 1]))) for n in nodes]
    assert found.shape == (len(nodes), max(map(len, expected)))
    assert [[child for child in row if child] for row in found.tolist()] == expected


@settings(deadline=None, max_examples=60)
@given(catalogues)
def test_title_paths(completions):
    trie = build_trie(completions)
    for completion, path in zip(completions, title_paths(trie), strict=True):
        assert path.tolist() == [walk(trie, completion[:n]) for n in range(1, len(completion) + 1)]


@settings(deadline=None, max_examples=60)
@given(catalogues, st.data())
def test_best_rise_is_the_best_path_to_a_title_below(completions, data):
    trie = build_trie(completions)
    weights = data.draw(st.lists(st.integers(-9, 9), min_size=len(trie.tokens), max_size=len(trie.tokens)))
    expected = [float("-inf")] * len(weights)
    for path in title_paths(trie):
        total = 0.0
        for node, above in zip(path.tolist()[::-1], [0, *path.tolist()][-2::-1], strict=True):
            total += weights[node]
            expected[above] = max(expected[above], total)
    assert best_rise(trie, torch.tensor(weights, dtype=torch.float32)).tolist() == expected


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
