"""The loss among a catalogue's titles: which tokens are choices, and that what they cost is a title's probability."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cebs.choices import CatalogueChoices
from cebs.models import load_model
from cebs.prompts import build_prompt, encode_completion, quote, title_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(deadline=None, max_examples=60)
words = st.sampled_from(
    ["Emma", "Emma 2", "The", "The Trial", "...", "(", "Les Misérables", "Ночь 🌒", "Dune,", "'Tis"]
)
catalogues = st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=8, unique=True)


def plain_edges(tokenizer, titles, title):
    """What an answer's tokens choose between, from the completions alone: at each place, the tokens that may follow."""
    completions = [encode_completion(tokenizer, quote(other)) for other in titles]
    ids = encode_completion(tokenizer, quote(title))
    return [
        {other[place] for other in completions if len(other) > place and other[:place] == ids[:place]}
        for place in range(len(ids))
    ]


@quick
@given(titles=catalogues)
def test_an_answers_choices_are_the_tokens_with_several_ways_on(tokenizer, titles):
    choices = CatalogueChoices(tokenizer, titles)
    for title in titles:
        ids = encode_completion(tokenizer, quote(title))
        edges = choices.edges(title, ids)
        assert [edge > 0 for edge in edges] == [len(ways) > 1 for ways in plain_edges(tokenizer, titles, title)]
        assert all(choices.trie.tokens[edge] == token for edge, token in zip(edges, ids, strict=True) if edge)


@quick
@given(titles=catalogues, separator=st.sampled_from([", ", ",", " ", ""]))
def test_a_historys_choices_are_those_of_the_same_titles_as_answers(tokenizer, titles, separator):
    """All but the last token, which may hold a comma, and the first, which may hold a space."""
    choices = CatalogueChoices(tokenizer, titles)
    prompt = build_prompt("Recommend.", f"Read: {separator.join(map(quote, titles))}.")
    prompt_ids = tokenizer(prompt).input_ids
    spans = title_tokens(tokenizer, prompt)
    assert [title for title, _ in spans] == titles
    for title, span in spans:
        ids = [prompt_ids[place] for place in span]
        answer = encode_completion(tokenizer, quote(title))
        edges, of_answer = choices.edges(title, ids), choices.edges(title, answer)
        assert len(edges) == len(ids)
        for place, edge in enumerate(edges):
            assert edge in (0, of_answer[place])
            if 0 < place < len(ids) - 1 and ids[1 : place + 1] == answer[1 : place + 1]:
                assert edge == of_answer[place]


def test_a_title_outside_the_catalogue_has_no_choices(tokenizer):
    choices = CatalogueChoices(tokenizer, ["Emma", "Dune"])
    assert not any(choices.edges("Emm", encode_completion(tokenizer, quote("Emm"))))
    assert any(choices.edges("Emma", encode_completion(tokenizer, quote("Emma"))))


@quick
@given(titles=catalogues)
def test_the_losses_are_those_of_a_distribution_over_the_titles(tokenizer, tiny_model, titles):
    """Each the softmax over the tokens that may follow, and e^-loss sums to 1 over the catalogue."""
    model = load_model(tiny_model).eval()
    choices = CatalogueChoices(tokenizer, titles)
    prompt_ids = tokenizer(build_prompt("Recommend.", 'Read: "Emma".')).input_ids
    probabilities = []
    for title in titles:
        ids = encode_completion(tokenizer, quote(title))
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        edges = torch.tensor(choices.edges(title, ids))
        chosen = edges.nonzero().squeeze(1)
        losses = choices.losses(logits[chosen], edges[chosen]) if len(chosen) else torch.zeros(0)
        ways = [sorted(ways) for ways in plain_edges(tokenizer, titles, title)]
        plain = [
            logits[place, ways[place]].logsumexp(0) - logits[place, ids[place]]
            for place in range(len(ids))
            if len(ways[place]) > 1
        ]
        torch.testing.assert_close(losses, torch.tensor(plain), atol=1e-5, rtol=1e-5)
        probabilities.append((-losses.sum()).exp().item())
    assert sum(probabilities) == pytest.approx(1, rel=1e-4)
