"""Fast equals slow: everything the engine computes, against the plain computation on concatenated sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2_contingency, chisquare
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cebs.branches import beam_search, branch_log_probs, greedy, sample_until, shared_rows
from cebs.trie import build_trie

VOCABULARY = 97
STOP = torch.tensor([2, 10, 11, 12, 13])
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # far from uniform, so that a wrong mask or position shows
)


def tiny_model(architecture="llama"):
    torch.manual_seed(0)
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


MODEL = tiny_model()


def concatenated(model, prompt, completion):
    """Log-prob of `completion` after `prompt`, by the book."""
    ids = torch.tensor([prompt + completion])
    log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(completion)[:, None]).sum()


tokens = st.integers(3, VOCABULARY - 1)
prompt_lists = st.lists(st.lists(tokens, min_size=1, max_size=30), min_size=1, max_size=5)
completion_lists = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=5)
records = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=30), completion_lists), min_size=1, max_size=4)
quick = settings(deadline=None, max_examples=12)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- shared rows ---


@quick
@given(records)
def test_shared_rows_equal_concatenated(batch):
    prompts, branches = map(list, zip(*batch, strict=True))
    rows = shared_rows(prompts, branches, pad_token_id=0)
    with torch.no_grad():
        log_probs = branch_log_probs(MODEL, rows)
        assert log_probs.shape == (len(batch), max(map(len, branches)))
        for prompt, completions, found in zip(prompts, branches, log_probs, strict=True):
            for k, value in enumerate(found):
                expected = concatenated(MODEL, prompt, completions[k]) if k < len(completions) else torch.tensor(0.0)
                torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-5)


def ragged_batch():
    """Prompts of 1 to 60 tokens, 1 to 5 completions of 1 to 8 tokens."""
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, VOCABULARY, (n,), generator=g).tolist()  # noqa: E731
    return [draw(60), draw(1), draw(17)], [[draw(1)], [draw(3), draw(8), draw(1), draw(2), draw(5)], [draw(4), draw(4)]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_equal_concatenated(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    prompts, branches = ragged_batch()
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    (branch_log_probs(model, shared_rows(prompts, branches, 0)) * weights).sum().backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, (prompt, completions) in enumerate(zip(prompts, branches, strict=True)):
        for k, completion in enumerate(completions):
            (concatenated(model, prompt, completion) * weights[i, k]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(shared[name], p.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_row_layout():
    rows = shared_rows([[5, 6, 7], [8]], [[[1, 2, 3], [4, 2]], [[9]]], pad_token_id=0)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 1, 2, 7, 4], [0, 0, 8, 0, 0, 0, 0]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 0, 0, 0, 0, 0, 0]]
    assert rows["labels"].tolist() == [[1, 2, 3, 4, 2], [9, -100, -100, -100, -100]]
    assert rows["branch_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 2, 2, 2, 2]]
    assert rows["branch_lengths"].tolist() == [[3, 2], [1, 0]]
    sees = (rows["attention_mask"][0, 0] == 0).int()
    assert sees[6].tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert sees[3].tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_rows_are_never_fully_masked():
    rows = shared_rows(*ragged_batch(), pad_token_id=0)
    assert (rows["attention_mask"] == 0).any(-1).all()
    assert MODEL(rows["input_ids"], rows["attention_mask"], rows["position_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("prompts, branches", [([[]], [[[1]]]), ([[1], [1]], [[[1]], [[1], []]])])
def test_empty_sequences_are_refused(prompts, branches):
    with pytest.raises(ValueError, match=f"record {len(prompts) - 1}: a (prompt|completion) without tokens"):
        shared_rows(prompts, branches, 0)


def test_peft_and_ddp(tmp_path):
    prompts, branches = ragged_batch()
    rows = shared_rows(prompts, branches, 0)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        log_probs = branch_log_probs(wrapped, rows)
        log_probs.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(log_probs[2, 1], concatenated(model, prompts[2], branches[2][1]), atol=1e-4, rtol=1e-5)
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


# --- greedy ---


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@quick
@given(prompts=prompt_lists, rows=st.integers(1, 6), max_new_tokens=st.integers(1, 12))
def test_greedy_equals_generate(architecture, prompts, rows, max_new_tokens):
    model = MODEL if architecture == "llama" else QWEN
    found = greedy(model, prompts, max_new_tokens=max_new_tokens, stop_token_ids=STOP, rows=rows)
    for prompt, new in zip(prompts, found, strict=True):
        assert new == generate(model, [prompt], max_new_tokens)[0]


QWEN = tiny_model("qwen2")


def generate(model, prompts, max_new_tokens, **kwargs):
    """New tokens of stock `generate`, up to and including the stop token, for prompts of one length."""
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=kwargs.pop("do_sample", False),
        max_new_tokens=max_new_tokens,
        eos_token_id=STOP.tolist(),
        pad_token_id=0,
        **kwargs,
    )
    new = [row[len(prompts[0]) :].tolist() for row in out]
    return [row[: next((i + 1 for i, t in enumerate(row) if t in STOP), len(row))] for row in new]


def test_peft_model_decodes_with_its_adapter():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval()
    prompts = [list(range(start, start + 9)) for start in range(20, 30)]
    found = greedy(model, prompts, max_new_tokens=12, stop_token_ids=STOP)
    assert found == generate(model, prompts, 12)
    with model.disable_adapter():
        assert found != generate(model, prompts, 12)


def test_model_is_left_as_it_was():
    model = tiny_model().train()
    model.generation_config.max_length = 3  # neither read nor changed
    found = greedy(model, [[5, 6, 7]], max_new_tokens=9, stop_token_ids=torch.tensor([2]))
    assert len(found[0]) == 9 or found[0][-1] == 2
    assert model.training and model.config._attn_implementation == "sdpa"


def test_attention_that_is_not_plain_is_refused():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=50.0))
    with pytest.raises(ValueError, match="score capping"):
        greedy(model, [[5, 6]], max_new_tokens=2, stop_token_ids=STOP)


def test_no_prompts():
    assert greedy(MODEL, [], max_new_tokens=3, stop_token_ids=STOP) == []
    assert beam_search(MODEL, [], build_trie([[1]]), num_beams=2) == []


# --- sampling ---


def sample(prompts, seeds, accept=lambda i, branches: True, **kwargs):
    settings = dict(max_new_tokens=8, stop_token_ids=STOP) | kwargs
    return dict(sample_until(MODEL, prompts, accept=accept, seeds=seeds, **settings))


@quick
@given(prompts=prompt_lists, rows=st.integers(1, 6), num_branches=st.integers(1, 7), max_branches=st.integers(7, 20))
def test_candidates_do_not_depend_on_the_batch(prompts, rows, num_branches, max_branches):
    def accept(index, branches):
        return sum(map(sum, branches)) % 3 == 0

    sizes = dict(num_branches=num_branches, max_branches=max_branches)
    seeds = [100 + len(prompt) for prompt in prompts]
    together = sample(prompts, seeds, accept, rows=rows, **sizes)
    assert sorted(together) == list(range(len(prompts)))
    for i, prompt in enumerate(prompts):
        assert sample([prompt], [seeds[i]], accept, **sizes) == {0: together[i]}


@quick
@given(prompts=prompt_lists, rows=st.integers(1, 6), num_branches=st.integers(1, 7), max_branches=st.integers(1, 20))
def test_rounds(prompts, rows, num_branches, max_branches):
    """`accept` sees every round once and in order; sampling goes on until it says yes or the limit is met."""
    rounds = {i: [] for i in range(len(prompts))}

    def accept(index, branches):
        rounds[index].append([list(branch) for branch in branches])
        return index % 2 == 0 and len(rounds[index]) == 2

    sizes = dict(num_branches=num_branches, max_branches=max_branches, rows=rows)
    for i, branches in sample(prompts, list(range(len(prompts))), accept, **sizes).items():
        assert sum(rounds[i], []) == branches
        assert len(branches) == (min(2 * num_branches, max_branches) if i % 2 == 0 else max_branches)
        assert all(len(r) == num_branches for r in rounds[i][:-1])
        for branch in branches:
            ended = [token in STOP for token in branch]
            assert not any(ended[:-1]) and (ended[-1] or len(branch) == 8)


def test_same_arguments_same_bytes():
    prompts = ragged_batch()[0] * 3
    first, again = (sample(prompts, list(range(9)), rows=4, max_new_tokens=20) for _ in range(2))
    assert list(first.items()) == list(again.items())  # the order in which records finish, too
    assert first[0] != first[3]  # same prompt, other seed
    assert len({tuple(branch) for branch in first[0]}) > 1


@pytest.mark.parametrize("top_k, temperature", [(5, 1.0), (50, 0.5)])
def test_sampled_branches_follow_the_distribution(top_k, temperature):
    """The first two tokens of 4,000 branches against their exact probabilities, and against `generate`'s."""
    prompt, n = ragged_batch()[0][2], 4000
    kwargs = dict(num_branches=n, max_branches=n, top_k=top_k, temperature=temperature, max_new_tokens=2)
    found = sample([prompt], [7], **kwargs)[0]

    def top(ids):
        logits = MODEL(torch.tensor([ids])).logits[0, -1].double() / temperature
        kept = torch.full_like(logits, float("-inf")).scatter(0, (best := logits.topk(top_k)).indices, best.values)
        return kept.softmax(-1)

    with torch.no_grad():
        expected = {}
        for a, p in enumerate(top(prompt).tolist()):
            if p > 0 and a in STOP:
                expected[(a,)] = n * p
            elif p > 0:
                expected |= {(a, b): n * p * q for b, q in enumerate(top([*prompt, a]).tolist()) if q > 0}
    torch.manual_seed(0)
    stock = generate(MODEL, [prompt], 2, do_sample=True, top_k=top_k, temperature=temperature, num_return_sequences=n)

    common = [outcome for outcome, count in expected.items() if count >= 8]
    assert len(common) > 10 and set(map(tuple, found)) <= set(expected)

    def counts(branches):
        ids = [common.index(t) if (t := tuple(branch)) in common else len(common) for branch in branches]
        return torch.bincount(torch.tensor(ids), minlength=len(common) + 1).double()

    exact = torch.tensor([expected[outcome] for outcome in common], dtype=torch.double)
    exact = torch.cat([exact, n - exact.sum(0, keepdim=True)])
    some = exact > 1  # with a small k there is no remainder
    assert chisquare(counts(found)[some], exact[some] * counts(found)[some].sum() / exact[some].sum()).pvalue > 1e-3
    table = torch.stack([counts(found), counts(stock)])
    assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


# --- beam search ---

catalogues = st.lists(
    st.lists(st.integers(3, 7), min_size=1, max_size=5).map(tuple), min_size=1, max_size=25, unique=True
)


def exhaustive(prompt, titles):
    """All titles by log-probability, best first."""
    with torch.no_grad():
        log_probs = torch.stack([concatenated(MODEL, prompt, list(title)) for title in titles])
    return log_probs.sort(descending=True)


@quick
@given(prompts=prompt_lists, titles=catalogues, rows=st.integers(1, 6), spare=st.integers(0, 3))
def test_as_wide_as_the_catalogue_is_exhaustive(prompts, titles, rows, spare):
    found = beam_search(MODEL, prompts, build_trie(titles), num_beams=len(titles) + spare, rows=rows)
    for prompt, (title_ids, log_probs) in zip(prompts, found, strict=True):
        expected = exhaustive(prompt, titles)
        torch.testing.assert_close(log_probs, expected.values, atol=1e-4, rtol=1e-5)
        by_title = torch.empty(len(titles)).scatter(0, expected.indices, expected.values)
        assert sorted(title_ids.tolist()) == list(range(len(titles)))
        torch.testing.assert_close(by_title[title_ids], log_probs, atol=1e-4, rtol=1e-5)


@quick
@given(prompts=prompt_lists, titles=catalogues, num_beams=st.integers(1, 6))
def test_narrow_beams(prompts, titles, num_beams):
    """Each title at most once, in order, with its own exact log-prob, whatever the width."""
    found = beam_search(MODEL, prompts, build_trie(titles), num_beams=num_beams)
    for prompt, (title_ids, log_probs) in zip(prompts, found, strict=True):
        assert 1 <= len(title_ids) <= num_beams and len(set(title_ids.tolist())) == len(title_ids)
        assert (log_probs.diff() <= 0).all()
        with torch.no_grad():
            expected = torch.stack([concatenated(MODEL, prompt, list(titles[i])) for i in title_ids])
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-5)


def reference_beams(prompt, titles, num_beams):
    """The same search with a dictionary of prefixes and one forward pass per beam."""

    def best(scored):
        return sorted(scored, key=lambda candidate: -candidate[1])[:num_beams]

    pool, beams = [], [((), 0.0)]
    while beams:
        candidates = []
        for prefix, score in beams:
            log_probs = MODEL(torch.tensor([prompt + list(prefix)])).logits[0, -1].log_softmax(-1)
            following = {t[len(prefix)] for t in titles if len(t) > len(prefix) and t[: len(prefix)] == prefix}
            candidates += [((*prefix, token), score + float(log_probs[token])) for token in following]
        pool = best(pool + [c for c in candidates if c[0] in titles])
        going = [c for c in candidates if any(len(t) > len(c[0]) and t[: len(c[0])] == c[0] for t in titles)]
        worst = pool[-1][1] if len(pool) == num_beams else float("-inf")
        beams = [c for c in best(going) if c[1] > worst]
    return pool


@settings(deadline=None, max_examples=8)
@given(prompts=prompt_lists, titles=catalogues, num_beams=st.integers(1, 6))
def test_narrow_beams_equal_a_plain_beam_search(prompts, titles, num_beams):
    found = beam_search(MODEL, prompts, build_trie(titles), num_beams=num_beams)
    for prompt, (title_ids, _) in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = reference_beams(prompt, titles, num_beams)
        assert [titles[i] for i in title_ids] == [title for title, _ in expected]


def test_beams_do_not_depend_on_the_batch():
    g = torch.Generator().manual_seed(3)
    titles = [tuple(t) for t in torch.randint(3, 20, (200, 4), generator=g).unique(dim=0).tolist()]
    prompts = ragged_batch()[0]
    together = beam_search(MODEL, prompts, build_trie(titles), num_beams=5, rows=3)
    for prompt, (title_ids, log_probs) in zip(prompts, together, strict=True):
        ((alone, scores),) = beam_search(MODEL, [prompt], build_trie(titles), num_beams=5)
        assert alone.tolist() == title_ids.tolist()
        torch.testing.assert_close(scores, log_probs, atol=1e-5, rtol=1e-5)
