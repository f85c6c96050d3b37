"""The engine on the real SmolLM2-135M and real records, where both are there."""

import pytest
import torch

from cebs.branches import branch_log_probs, shared_rows
from cebs.files import PROJECT
from cebs.generation import Decoder
from cebs.models import load_model
from cebs.prompts import encode_completion, read_records
from cebs.sampling import greedy
from cebs.sources import MODELS
from utils import load_tokenizer

MODEL = MODELS / "SmolLM2-135M-Instruct"
GOODREADS = PROJECT.parent / "shared" / "goodreads"
pytestmark = [
    pytest.mark.skipif(
        not MODEL.is_dir(), reason=f"no {MODEL.name} in models/: prepare_data.py --download_only gets it"
    ),
    pytest.mark.skipif(not GOODREADS.is_dir(), reason="no Goodreads data in ../shared"),
]


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL).eval()


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, load_tokenizer(MODEL), max_length=1024, max_new_tokens=12, rows=4)


def test_greedy_equals_generate(model, decoder):
    records = read_records(GOODREADS / "test_sample.json")[:1]
    prompts = decoder.encode([record.prompt for record in records])
    ours = greedy(model, prompts, max_new_tokens=12, stop_token_ids=decoder.stop_token_ids)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=decoder.stop_token_ids.tolist(),
            pad_token_id=decoder.tokenizer.pad_token_id,
        )[0, len(prompt) :]
        assert answer == theirs.tolist()


@torch.no_grad()
def test_shared_rows_equal_concatenated_sequences(model, decoder):
    records = read_records(GOODREADS / "train_sample.json")[:2]
    prompts = decoder.encode([record.prompt for record in records])
    titles = [encode_completion(decoder.tokenizer, record.output) for record in records]
    log_probs = branch_log_probs(model, shared_rows(prompts, [titles, titles[:1]], decoder.tokenizer.pad_token_id))
    for row, column in ((0, 0), (0, 1), (1, 0)):
        ids = torch.tensor([prompts[row] + titles[column]])
        token_log_probs = model(ids).logits[0, len(prompts[row]) - 1 : -1].log_softmax(-1)
        expected = token_log_probs.gather(1, torch.tensor(titles[column])[:, None]).sum()
        torch.testing.assert_close(log_probs[row, column], expected, atol=1e-3, rtol=1e-5)
    assert log_probs[1, 1] == 0
