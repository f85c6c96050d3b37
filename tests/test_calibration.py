"""Calibrated beams: the numbers without a history are the model's, and are computed once."""

import shutil
from itertools import pairwise

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from cebs import calibration
from cebs.beams import beam_search
from cebs.calibration import among_edges, edge_priors, kept_edge_priors
from cebs.generation import Decoder
from cebs.kept import kept_file, read_kept, write_kept
from cebs.models import load_model
from cebs.prompts import build_prompt
from cebs.trie import build_trie, title_paths
from utils import load_tokenizer

TITLES = ["Emma", "Emma: A Novel", "The Trial", "The Time Machine", "Les Misérables", "Ночь 🌒"]


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model).eval()


@torch.no_grad()
def token_log_probs(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


completions = st.lists(
    st.lists(st.integers(3, 7), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12, unique=True
)
prompts = st.lists(st.integers(3, 500), min_size=1, max_size=12)


@settings(deadline=None, max_examples=20)
@given(prompt=prompts, titles=completions, at_once=st.integers(1, 5))
def test_edge_priors_are_the_models_own(model, prompt, titles, at_once):
    trie = build_trie(titles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "TITLES_AT_ONCE", at_once)
        priors = edge_priors(model, prompt, trie)
    assert priors[0] == 0 and priors.dtype == torch.float32
    for title, path in zip(titles, title_paths(trie), strict=True):
        torch.testing.assert_close(priors[path], token_log_probs(model, prompt, list(title)), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(titles=completions, data=st.data())
def test_shares_among_edges_are_those_of_the_nodes_children(titles, data):
    trie = build_trie(titles)
    numbers = st.floats(-20, 0, width=32)
    log_probs = torch.tensor(data.draw(st.lists(numbers, min_size=len(trie.tokens), max_size=len(trie.tokens))))
    shares = among_edges(trie, log_probs)
    assert shares[0] == 0 and len(shares) == len(log_probs)
    for first, end in pairwise(trie.offsets.tolist()):
        if first < end:
            torch.testing.assert_close(shares[first:end], log_probs[first:end].log_softmax(0))


@settings(deadline=None, max_examples=20)
@given(prompt=prompts, blank=prompts, titles=completions, weight=st.floats(0, 2, width=16))
def test_calibrated_beams_rank_by_the_contrast(model, prompt, blank, titles, weight):
    """As wide as the catalogue: the order of log p(title | prompt) - weight * log p(title | blank)."""
    trie = build_trie(titles)
    ((branches, log_probs),) = beam_search(
        model, [prompt], trie, num_beams=len(titles), edge_bias=-weight * edge_priors(model, blank, trie)
    )
    assert sorted(map(tuple, branches)) == sorted(titles)
    plain = torch.stack([token_log_probs(model, prompt, branch).sum() for branch in branches])
    torch.testing.assert_close(torch.tensor(log_probs), plain, atol=1e-3, rtol=1e-4)
    contrast = plain - weight * torch.stack([token_log_probs(model, blank, branch).sum() for branch in branches])
    assert (contrast.diff() <= 2e-3).all()


def test_priors_are_kept_for_what_they_depend_on(tmp_path, tiny_model, monkeypatch):
    computed = []

    def remember(model, prompt, trie):
        computed.append(prompt)
        return edge_priors(model, prompt, trie)

    monkeypatch.setattr(calibration, "edge_priors", remember)
    base = shutil.copytree(tiny_model, tmp_path / "base")
    model = load_model(base)
    torch.manual_seed(0)
    adapter = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    decoder = Decoder(model.eval(), load_tokenizer(base), max_length=512, max_new_tokens=8, rows=2)
    (prompt,) = decoder.encode([build_prompt("Recommend a book.", "")])

    def priors(titles=TITLES, prompt=prompt, model=model, adapter=""):
        trie, _ = decoder.catalogue_trie(titles)
        kept = dict(model_dir=base, adapter=str(adapter), cache_dir=tmp_path / "kept")
        return kept_edge_priors(model, prompt, trie, **kept)

    first = priors()
    assert torch.equal(priors(), first) and len(computed) == 1
    merged = adapter.merge_and_unload().eval()
    others = [
        dict(titles=TITLES[:-1]),
        dict(prompt=[*prompt, 5]),
        dict(model=load_model(base, dtype="bfloat16").eval()),
        dict(model=merged, adapter=tmp_path / "adapter"),
    ]
    for number, other in enumerate(others, 2):
        priors(**other)
        priors(**other)
        assert len(computed) == number
    make_model(base, seed=3)  # other weights in the same folder
    priors()
    assert len(computed) == len(others) + 2
    assert not list((tmp_path / "kept").glob(".*"))

    for file in (tmp_path / "kept").iterdir():  # a damaged file is none
        file.write_bytes(file.read_bytes()[:-3])
    assert torch.equal(priors(model=load_model(base).eval()), priors(model=load_model(base).eval()))
    assert len(computed) == len(others) + 3


def test_what_cannot_be_kept_is_said(tmp_path, capsys):
    (tmp_path / "folder").write_text("a file")
    path = kept_file(tmp_path / "folder", ["anything"])
    write_kept(path, torch.zeros(3).numpy(), "the numbers")
    assert "note: the numbers are not kept" in capsys.readouterr().out
    assert read_kept(path) is None
