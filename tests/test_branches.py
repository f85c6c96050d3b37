"""Fast equals slow: everything the engine computes, against the plain computation on concatenated sequences."""

from collections import Counter
from itertools import pairwise
from math import exp, inf, log

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

from cebs.beams import beam_search
from cebs.branches import NotFiniteError, Place, branch_attention, branch_log_probs, shared_rows
from cebs.sampling import greedy, sample_until
from cebs.trie import build_trie, title_paths

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


@st.composite
def prompt_lists(draw):
    """Up to five prompts that begin alike, or not; one may be the beginning of another."""
    beginning = draw(st.lists(tokens, max_size=12))
    rest = st.lists(tokens, min_size=not beginning, max_size=30)
    return [beginning + each for each in draw(st.lists(rest, min_size=1, max_size=5))]


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
@given(prompts=prompt_lists(), rows=st.integers(1, 6), max_new_tokens=st.integers(1, 12))
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


def test_attention_in_bfloat16_is_that_in_float32_rounded():
    """On a CPU the one is written out, the other SDPA's. Two rows, four heads over two key heads, one slot empty."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    row, slot = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    sees = torch.rand(2, 2, 5) < 0.7
    mask = torch.zeros(2, 2, 5).masked_fill(~sees.index_fill(2, torch.tensor([0]), True), float("-inf"))
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        place = Place(row, torch.zeros(3, dtype=torch.long), slice(0, 2), row, slot, mask.to(dtype))
        tensors = (tensor.to(dtype) for tensor in (query, key, value))
        output, _ = branch_attention(None, *tensors, None, scaling=0.35, place=place)
        assert output.dtype == dtype and output.shape == (1, 3, 4, 8)
        outputs.append(output.float())
    torch.testing.assert_close(*outputs, atol=0.03, rtol=0.03)


def test_what_all_prompts_begin_with_is_computed_once(monkeypatch):
    passed = []
    forward = MODEL.forward
    monkeypatch.setattr(
        MODEL, "forward", lambda input_ids, **kwargs: passed.append(input_ids.numel()) or forward(input_ids, **kwargs)
    )
    prompts = [[5, 6, 7, 8], [5, 6, 7], [5, 6, 7, 9, 9]]
    alone = [greedy(MODEL, [prompt], max_new_tokens=1, stop_token_ids=STOP)[0] for prompt in prompts]
    passed.clear()
    assert greedy(MODEL, prompts, max_new_tokens=1, stop_token_ids=STOP) == alone
    assert passed == [2, 2 + 1 + 3]  # the shortest prompt keeps a token of its own, whose logits are needed


def test_no_prompts():
    assert greedy(MODEL, [], max_new_tokens=3, stop_token_ids=STOP) == []
    assert beam_search(MODEL, [], build_trie([[1]]), num_beams=2) == []


# --- sampling ---


def sample(prompts, seeds, accept=lambda i, branches: True, **kwargs):
    settings = dict(max_new_tokens=8, stop_token_ids=STOP) | kwargs
    return {i: branches for i, branches, _ in sample_until(MODEL, prompts, accept=accept, seeds=seeds, **settings)}


@quick
@given(prompts=prompt_lists(), rows=st.integers(1, 6), num_branches=st.integers(1, 7), max_branches=st.integers(7, 20))
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
@given(prompts=prompt_lists(), rows=st.integers(1, 6), num_branches=st.integers(1, 7), max_branches=st.integers(1, 20))
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


@quick
@given(prompts=prompt_lists(), rows=st.integers(1, 6), quotes=st.sets(tokens, min_size=1, max_size=40))
def test_a_branch_ends_after_its_second_quote(prompts, rows, quotes):
    """Up to there it is the branch that ends elsewhere, and so is the greedy one."""

    def until_closed(branch):
        places = [place for place, token in enumerate(branch) if token in quotes]
        return branch[: places[1] + 2] if len(places) > 1 else branch

    quote_token_ids, seeds = torch.tensor(sorted(quotes)), list(range(len(prompts)))
    whole = sample(prompts, seeds, rows=rows, max_new_tokens=12)
    found = sample(prompts, seeds, rows=rows, max_new_tokens=12, quote_token_ids=quote_token_ids)
    assert found == {i: list(map(until_closed, branches)) for i, branches in whole.items()}
    how = dict(max_new_tokens=12, stop_token_ids=STOP)
    answers = greedy(MODEL, prompts, quote_token_ids=quote_token_ids, **how)
    assert answers == list(map(until_closed, greedy(MODEL, prompts, **how)))


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


# Titles of few tokens, all ended by token 2, so that none is the beginning of another.
catalogues = st.lists(
    st.lists(st.integers(3, 7), min_size=1, max_size=4).map(lambda title: (*title, 2)),
    min_size=1,
    max_size=25,
    unique=True,
)


@quick
@given(prompts=prompt_lists(), titles=st.none() | catalogues, num_branches=st.integers(1, 7), top_k=st.integers(1, 120))
def test_log_probs_of_samples(prompts, titles, num_branches, top_k):
    """The model's own, of the whole branch: neither temperature nor top_k nor the trie changes them."""
    found = sample_until(
        MODEL,
        prompts,
        titles and build_trie(titles),
        accept=lambda index, branches: False,
        seeds=list(range(len(prompts))),
        num_branches=num_branches,
        max_branches=8,
        top_k=top_k,
        temperature=0.7,
        max_new_tokens=5,
        stop_token_ids=STOP,
    )
    for i, branches, log_probs in found:
        assert len(branches) == len(log_probs) == 8
        assert titles is None or set(map(tuple, branches)) <= set(titles)
        with torch.no_grad():
            expected = [float(concatenated(MODEL, prompts[i], branch)) for branch in branches]
        assert log_probs == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("top_k", [2, 50])
def test_constrained_samples_follow_the_renormalised_distribution(top_k):
    """4,000 titles against the product of each step's probabilities, renormalised over the trie's edges."""
    prompt, n = ragged_batch()[0][2], 4000
    g = torch.Generator().manual_seed(4)
    titles = [(*title, 2) for title in torch.randint(3, 8, (40, 3), generator=g).unique(dim=0).tolist()]
    titles += [(3, 2), (4, 5, 2), (7, 2)]

    def share(title):
        product = 1.0
        for step, token in enumerate(title):
            following = sorted({t[step] for t in titles if t[:step] == title[:step]})
            log_probs = MODEL(torch.tensor([prompt + list(title[:step])])).logits[0, -1].double()[following]
            kept = log_probs.topk(min(top_k, len(following)))
            if following.index(token) not in kept.indices:
                return 0.0
            product *= float((log_probs[following.index(token)] - kept.values.logsumexp(0)).exp())
        return product

    ((_, found, _),) = sample_until(
        MODEL,
        [prompt],
        build_trie(titles),
        accept=lambda index, branches: True,
        seeds=[7],
        num_branches=n,
        max_branches=n,
        top_k=top_k,
        max_new_tokens=4,
        stop_token_ids=STOP,
    )
    counts = Counter(map(tuple, found))
    with torch.no_grad():
        expected = {title: n * share(title) for title in titles}
    assert sum(expected.values()) == pytest.approx(n)
    assert all(expected[title] > 0 for title in counts)
    common = [title for title in titles if expected[title] >= 5]
    rare = [sum(table[title] for title in titles if title not in common) for table in (counts, expected)]
    observed = torch.tensor([counts[title] for title in common] + rare[:1], dtype=torch.double)
    exact = torch.tensor([expected[title] for title in common] + rare[1:], dtype=torch.double)
    assert len(common) > 3
    assert chisquare(observed[exact > 0], exact[exact > 0]).pvalue > 1e-3


# --- beam search ---

any_titles = st.lists(
    st.lists(st.integers(3, 7), min_size=1, max_size=5).map(tuple), min_size=1, max_size=25, unique=True
)


def plain_beams(
    prompt, num_beams, *, titles=None, bias=None, renormalize=False, groups=1, penalty=0.0, max_new_tokens=None
):
    """The same search with prefixes in lists, one forward pass per beam, one group after the other.

    `bias` gives the bias of the edge that leads to a prefix. Returns branches and scores, best first.
    """
    width = num_beams // groups

    def best(candidates):
        return sorted(candidates, key=lambda candidate: -candidate[1])[:width]

    def ways(prefix):
        """Token, log-prob, bias, whether the branch may end and go on there, and how far its score may rise then."""
        log_probs = MODEL(torch.tensor([prompt + list(prefix)])).logits[0, -1].log_softmax(-1).tolist()
        if titles is None:
            stop = max(STOP.tolist(), key=lambda token: log_probs[token])
            for token, log_prob in enumerate(log_probs):
                if token not in STOP or token == stop:
                    ends = token == stop or len(prefix) + 1 == max_new_tokens
                    yield token, log_prob, ends, not ends, 0.0
        else:
            allowed = {t[len(prefix)] for t in titles if len(t) > len(prefix) and t[: len(prefix)] == prefix}
            share = log(sum(exp(log_probs[token]) for token in allowed)) if renormalize else 0.0
            for token in allowed:
                new = (*prefix, token)
                longer = [t for t in titles if len(t) > len(new) and t[: len(new)] == new]
                rises = [sum(bias[t[:n]] for n in range(len(new) + 1, len(t) + 1)) for t in longer] if bias else [0.0]
                score = log_probs[token] - share + (bias[new] if bias else 0.0)
                yield token, score, new in titles, bool(longer), max(rises, default=0.0)

    pools, beams = [[] for _ in range(groups)], [[((), 0.0)] for _ in range(groups)]
    while any(beams):
        chosen, finished = Counter(), set()
        for group in range(groups):
            ending, going = [], []
            for prefix, score in beams[group]:
                for token, gain, ends, goes_on, rise in ways(prefix):
                    candidate = ((*prefix, token), score + gain - penalty * chosen[token], rise)
                    if ends and candidate[0] not in finished:
                        ending.append(candidate)
                    if goes_on:
                        going.append(candidate)
            ending, going = best(ending), best(going)
            finished.update(branch for branch, _, _ in ending)
            chosen.update(branch[-1] for branch, _, _ in going)
            pools[group] = best(pools[group] + ending)
            worst = pools[group][-1][1] if len(pools[group]) == width else -inf
            beams[group] = [(branch, score) for branch, score, rise in going if score + rise > worst]
    return sorted(((branch, score) for pool in pools for branch, score, _ in pool), key=lambda found: -found[1])


@torch.no_grad()
def check_against_plain(prompts, found, num_beams, **kwargs):
    """Same branches in the same order, and the log-probs are without bias or penalty; the model's, or renormalised."""
    bias = kwargs.get("bias")
    for prompt, (branches, log_probs) in zip(prompts, found, strict=True):
        expected = plain_beams(prompt, num_beams, **kwargs)
        assert list(map(tuple, branches)) == [branch for branch, _ in expected]
        assert len(set(map(tuple, branches))) == len(branches) <= num_beams
        if kwargs.get("renormalize"):
            biases = [sum(bias[b[:n]] for n in range(1, len(b) + 1)) if bias else 0.0 for b, _ in expected]
            scored = [score - of_branch for (_, score), of_branch in zip(expected, biases, strict=True)]
        else:
            scored = [float(concatenated(MODEL, prompt, branch)) for branch in branches]
        assert log_probs == pytest.approx(scored, abs=1e-4)


few = settings(deadline=None, max_examples=8)
short_prompts = st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=3)
group_sizes = st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 1)])  # groups, beams of each


@torch.no_grad()
def exhaustive(prompt, titles, bias=None):
    """All titles by log-probability plus the biases along them, best first."""
    scores = [float(concatenated(MODEL, prompt, list(title))) for title in titles]
    if bias:
        scores = [s + sum(bias[t[:n]] for n in range(1, len(t) + 1)) for s, t in zip(scores, titles, strict=True)]
    return sorted(zip(titles, scores, strict=True), key=lambda found: -found[1])


@st.composite
def biased_catalogues(draw, of=any_titles):
    """Titles, and a bias between -3 and 3 for each beginning of one."""
    titles = draw(of)
    beginnings = sorted({title[:n] for title in titles for n in range(1, len(title) + 1)})
    number = st.integers(0, 2**16)
    return titles, {b: draw(number) / 2**16 * 6 - 3 + i * 1e-3 for i, b in enumerate(beginnings)}


def edge_bias(trie, titles, bias):
    """The biases of beginnings, as one number per node."""
    numbers = torch.zeros(len(trie.tokens))
    for title, path in zip(titles, title_paths(trie), strict=True):
        numbers[path] = torch.tensor([bias[title[:n]] for n in range(1, len(title) + 1)])
    return numbers


@quick
@given(prompts=prompt_lists(), titles=any_titles, rows=st.integers(1, 6), spare=st.integers(0, 3))
def test_as_wide_as_the_catalogue_is_exhaustive(prompts, titles, rows, spare):
    found = beam_search(MODEL, prompts, build_trie(titles), num_beams=len(titles) + spare, rows=rows)
    for prompt, (branches, log_probs) in zip(prompts, found, strict=True):
        expected = exhaustive(prompt, titles)
        assert sorted(map(tuple, branches)) == sorted(titles)
        assert log_probs == pytest.approx([score for _, score in expected], abs=1e-4)
        by_title = dict(expected)
        assert log_probs == pytest.approx([by_title[tuple(branch)] for branch in branches], abs=1e-4)


@quick
@given(prompts=prompt_lists(), catalogue=biased_catalogues(), spare=st.integers(0, 3))
def test_as_wide_as_the_catalogue_is_exhaustive_with_biases(prompts, catalogue, spare):
    """A beam whose score is below every finished title's may still rise above them, and is not given up."""
    titles, bias = catalogue
    trie = build_trie(titles)
    found = beam_search(MODEL, prompts, trie, num_beams=len(titles) + spare, edge_bias=edge_bias(trie, titles, bias))
    for prompt, (branches, log_probs) in zip(prompts, found, strict=True):
        assert sorted(map(tuple, branches)) == sorted(titles)
        by_title = dict(exhaustive(prompt, titles, bias))
        scores = [by_title[tuple(branch)] for branch in branches]
        assert all(better >= worse - 1e-4 for better, worse in pairwise(scores))
        plain = dict(exhaustive(prompt, titles))
        assert log_probs == pytest.approx([plain[tuple(branch)] for branch in branches], abs=1e-4)


def test_a_late_bias_is_waited_for():
    """Width 2, three titles: the first two are whole before the third has met its bias."""
    prompt, titles = ragged_batch()[0][2], [(3,), (4,), (5, 5, 5, 5)]
    trie = build_trie(titles)
    assert beam_search(MODEL, [prompt], trie, num_beams=2)[0][0] == [[3], [4]]
    bias = torch.zeros(len(trie.tokens))
    bias[title_paths(trie)[2][-1]] = 100.0
    assert beam_search(MODEL, [prompt], trie, num_beams=2, edge_bias=bias)[0][0] == [[5, 5, 5, 5], [3]]


@few
@given(prompts=short_prompts, catalogue=biased_catalogues(), num_beams=st.integers(1, 6), biased=st.booleans())
def test_narrow_beams_equal_a_plain_beam_search(prompts, catalogue, num_beams, biased):
    titles, bias = catalogue
    trie = build_trie(titles)
    numbers = edge_bias(trie, titles, bias) if biased else None
    found = beam_search(MODEL, prompts, trie, num_beams=num_beams, edge_bias=numbers)
    check_against_plain(prompts, found, num_beams, titles=titles, bias=bias if biased else None)


@few
@given(prompts=short_prompts, catalogue=biased_catalogues(catalogues), num_beams=st.integers(1, 6))
def test_renormalised_beams_equal_a_plain_beam_search(prompts, catalogue, num_beams):
    titles, bias = catalogue
    trie = build_trie(titles)
    for numbers, plain_bias in ((None, None), (edge_bias(trie, titles, bias), bias)):
        found = beam_search(MODEL, prompts, trie, num_beams=num_beams, edge_bias=numbers, renormalize=True)
        check_against_plain(prompts, found, num_beams, titles=titles, bias=plain_bias, renormalize=True)


@few
@given(prompts=short_prompts, sizes=group_sizes, penalty=st.sampled_from([0.0, 0.5, 3.0]), length=st.integers(1, 4))
def test_free_beams_equal_a_plain_beam_search(prompts, sizes, penalty, length):
    groups, width = sizes
    found = beam_search(
        MODEL,
        prompts,
        num_beams=groups * width,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        max_new_tokens=length,
        stop_token_ids=STOP,
    )
    check_against_plain(prompts, found, groups * width, groups=groups, penalty=penalty, max_new_tokens=length)
    for branches, _ in found:
        assert all(set(branch[:-1]).isdisjoint(STOP.tolist()) for branch in branches)
        assert all(branch[-1] in STOP or len(branch) == length for branch in branches)


@few
@given(prompts=short_prompts, titles=any_titles, sizes=group_sizes, penalty=st.sampled_from([0.0, 0.5, 3.0]))
def test_diverse_beams_over_a_catalogue_equal_a_plain_search(prompts, titles, sizes, penalty):
    groups, width = sizes
    found = beam_search(
        MODEL,
        prompts,
        build_trie(titles),
        num_beams=groups * width,
        num_beam_groups=groups,
        diversity_penalty=penalty,
    )
    check_against_plain(prompts, found, groups * width, titles=titles, groups=groups, penalty=penalty)


def stock_beams(prompt, num_beams, max_new_tokens, stop=None):
    out = MODEL.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=0.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = [row[len(prompt) :].tolist() for row in out.sequences]
    return [row[: row.index(stop) + 1] if stop in row else row for row in new], out.sequences_scores.tolist()


@few
@given(prompt=st.lists(tokens, min_size=1, max_size=12), num_beams=st.integers(2, 6), length=st.integers(1, 5))
def test_free_beams_equal_generate(prompt, num_beams, length):
    """Without a stop token. With one, stock `generate` drops what ends outside the `num_beams` best of a step."""
    no_token = torch.empty(0, dtype=torch.long)
    found = beam_search(MODEL, [prompt], num_beams=num_beams, max_new_tokens=length, stop_token_ids=no_token)
    branches, scores = stock_beams(prompt, num_beams, length)
    assert found[0][0] == branches
    assert found[0][1] == pytest.approx(scores, abs=1e-4)


def test_free_beams_equal_generate_where_both_are_exhaustive():
    """Two tokens and a beam for each first one: nothing is dropped, stop token or not."""
    prompt, stop = ragged_batch()[0][2], 69
    found = beam_search(MODEL, [prompt], num_beams=VOCABULARY, max_new_tokens=2, stop_token_ids=torch.tensor([stop]))
    branches, scores = stock_beams(prompt, VOCABULARY, 2, stop)
    assert found[0][0] == branches and [stop] in branches
    assert found[0][1] == pytest.approx(scores, abs=1e-4)


def test_a_stronger_penalty_gives_other_first_tokens():
    prompt = ragged_batch()[0][2]
    firsts = []
    for penalty in (0.0, 100.0):
        ((branches, _),) = beam_search(
            MODEL,
            [prompt],
            num_beams=6,
            num_beam_groups=6,
            diversity_penalty=penalty,
            max_new_tokens=4,
            stop_token_ids=torch.tensor([2]),
        )
        firsts.append(len({branch[0] for branch in branches}))
    assert firsts[0] < firsts[1] == 6


def test_groups_share_the_beams_out():
    with pytest.raises(ValueError, match="10 beams cannot be shared out evenly among 4 groups"):
        beam_search(MODEL, [[5]], build_trie([[1]]), num_beams=10, num_beam_groups=4)


def test_beams_do_not_depend_on_the_batch():
    g = torch.Generator().manual_seed(3)
    titles = [tuple(t) for t in torch.randint(3, 20, (200, 4), generator=g).unique(dim=0).tolist()]
    prompts = ragged_batch()[0]
    for trie, free in ((build_trie(titles), {}), (None, dict(max_new_tokens=6, stop_token_ids=STOP))):
        together = beam_search(MODEL, prompts, trie, num_beams=6, num_beam_groups=2, rows=3, **free)
        for prompt, (branches, log_probs) in zip(prompts, together, strict=True):
            ((alone, scores),) = beam_search(MODEL, [prompt], trie, num_beams=6, num_beam_groups=2, **free)
            assert alone == branches
            assert scores == pytest.approx(log_probs, abs=1e-5)


# --- logits that are not finite ---

CATALOGUE = build_trie([[3, 4, 2], [3, 5, 6, 2], [7, 8, 2], [9, 2], [20, 21, 22, 23, 2]])


def sampled(model, prompts, trie=None):
    options = dict(num_branches=3, max_branches=6, top_k=20, max_new_tokens=6, stop_token_ids=STOP, rows=2)
    seeds = list(range(len(prompts)))
    return list(sample_until(model, prompts, trie, accept=lambda *_: True, seeds=seeds, **options))


WAYS_TO_DECODE = {
    "greedy": lambda model, prompts: greedy(model, prompts, max_new_tokens=6, stop_token_ids=STOP, rows=2),
    "sampling": sampled,
    "constrained sampling": lambda model, prompts: sampled(model, prompts, CATALOGUE),
    "beams": lambda model, prompts: beam_search(
        model, prompts, num_beams=4, max_new_tokens=6, stop_token_ids=STOP, rows=2
    ),
    "diverse beams": lambda model, prompts: beam_search(
        model,
        prompts,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=1.0,
        max_new_tokens=6,
        stop_token_ids=STOP,
        rows=2,
    ),
    "constrained beams": lambda model, prompts: beam_search(model, prompts, CATALOGUE, num_beams=4, rows=2),
}


@pytest.mark.parametrize("decode", WAYS_TO_DECODE.values(), ids=WAYS_TO_DECODE)
@pytest.mark.parametrize("value", [float("nan"), inf, -inf])
def test_logits_that_are_not_finite_stop_decoding_and_name_the_prompt(decode, value):
    prompts = [[5, 6, 7], [8] * 9, [8, 90, 9, 11], [6]]
    decode(tiny_model(), prompts)
    spoilt = tiny_model()
    with torch.no_grad():
        spoilt.model.embed_tokens.weight[90] = value  # of a token that only the third prompt has
    with pytest.raises(NotFiniteError, match="^prompt 2: the logits are not finite numbers") as error:
        decode(spoilt, prompts)
    assert error.value.prompt == 2
    decode(spoilt, prompts[:2])


@pytest.mark.parametrize("decode", WAYS_TO_DECODE.values(), ids=WAYS_TO_DECODE)
@pytest.mark.parametrize("token", [2, 20])
def test_a_single_infinite_logit_stops_decoding(decode, token):
    """A spoilt row of the output layer: the softmax is NaN for its token and 0 for all others."""
    spoilt = tiny_model()
    with torch.no_grad():
        spoilt.lm_head.weight[token] = inf
    with pytest.raises(NotFiniteError):
        decode(spoilt, [[5, 6, 7], [8, 9]])


@pytest.mark.parametrize("decode", WAYS_TO_DECODE.values(), ids=WAYS_TO_DECODE)
def test_logits_that_turn_bad_on_the_way_stop_decoding(decode):
    """The prompts are good; every token that may follow is not."""
    spoilt = tiny_model()
    with torch.no_grad():
        spoilt.model.embed_tokens.weight[:5] = spoilt.model.embed_tokens.weight[7:] = float("nan")
    with pytest.raises(NotFiniteError):
        decode(spoilt, [[5, 6, 5, 5], [6, 6]])
