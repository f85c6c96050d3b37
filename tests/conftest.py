"""Shared fixtures: a tiny random model, a small data folder, and the scripts as a user starts them.

A script is run in two ways: `run_script` starts the real command line in a process of its own (see `fork_server`);
`run_main` parses the same words and calls the script's `main` in this process. `refusal` is for bad input: it runs the
script's `__main__` in this process, to its line of complaint.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import runpy
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # before any import of torch: workers share the cores, and sums keep their order
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # likewise: what is compared to the last digits is computed on the CPU

from fork_server import ForkedScript  # noqa: E402

from cebs.files import PROJECT  # noqa: E402
from utils import read_json, write_json  # noqa: E402

CLASSICS = PROJECT / "sampled_data" / "classics"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LONGEST = ("test_slurm.py", "test_comparison.py", "test_environment.py")  # which would keep one worker to the end
SIZES = {"train": 12, "valid": 6, "test": 8}
PROGRAMS = {"cebs.results": "cebs.results", "cebs.comparison": "run_comparison.sh"}  # others: the script's name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the files that take longest begin first, so that the workers end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tiny models are so small that threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer():
    """A byte-level BPE tokenizer of some 600 tokens, trained on the texts of the classics."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    records = [record for split in SIZES for record in read_json(CLASSICS / f"{split}_sample.json")]
    texts = [record[key] for record in records for key in ("instruction", "input", "output")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )


def make_model(folder: Path, seed: int) -> Path:
    """A tiny Llama with random weights and its tokenizer, as a folder that `from_pretrained` takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # far from uniform, so that another prompt gives another answer
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape as `tiny_model`, with other weights: an adapter of the one would load on the other."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path):
    from utils import load_tokenizer

    return load_tokenizer(tiny_model)


def make_adapter(folder: Path, base: Path, tokenizer: Any) -> Path:
    """An untrained adapter of the base model, as a training run leaves it in `final_model/`."""
    from peft import LoraConfig, get_peft_model

    from cebs.models import load_model, save_trained

    model = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"]))
    save_trained(model, tokenizer, folder, base)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence encoder with random weights that reads letters."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoders")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab={word: place for place, word in enumerate(vocabulary)}).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "tiny-encoder"))
    return folder / "tiny-encoder"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first records of the classics, with the whole catalogue. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("data") / "classics"
    folder.mkdir()
    for split, size in SIZES.items():
        write_json(folder / f"{split}_sample.json", read_json(CLASSICS / f"{split}_sample.json")[:size])
    for name in ("name2genre.json", "name2id.json", "id2name.json", "genre_dict.json"):
        shutil.copy(CLASSICS / name, folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished process left."""

    code: int
    stdout: str
    stderr: str


def start_script(name: str, *args: Any, cwd: Path, **environment: str) -> ForkedScript:
    """Starts a script's real command line, `python /.../name args`, offline and on one thread."""
    env = {**os.environ, **environment}
    return ForkedScript(PROJECT / name, list(map(str, args)), cwd=cwd, env=env)


@pytest.fixture
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """`run_script("sft_smol.py", "--data_dir", folder)`: the real command line, in an empty working directory."""

    def run(name: str, *args: Any, cwd: Path | None = None) -> Result:
        process = start_script(name, *args, cwd=cwd or tmp_path_factory.mktemp("cwd"))
        stdout, stderr = process.communicate(timeout=180)
        return Result(process.returncode, stdout, stderr)

    return run


def run_main(name: str, *args: Any) -> None:
    """Runs a script in this process, from its command line on: `run_main("sft_smol", "--data_dir", folder)`."""
    module = importlib.import_module(name)
    module.main(*module.make_parser().parse_args_and_config([str(arg) for arg in args]))


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Callable[..., str]]:
    """`refusal("sft_smol", "--data_dir", folder)`: its line of complaint, after checks of exit code, form and silence.

    With `progress=True`, progress bars may stand before the line.
    """
    at_sigterm = signal.getsignal(signal.SIGTERM)

    def refused(name: str, *args: Any, progress: bool = False) -> str:
        start = f"{PROGRAMS.get(name, f'{name}.py')}: error: "
        monkeypatch.setattr(sys, "argv", ["", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(PROJECT / f"{name.replace('.', '/')}.py"), run_name="__main__")
        assert exit.value.code == 2
        *before, line = filter(str.strip, capsys.readouterr().err.splitlines())
        assert line.startswith(start) and all(progress and "%|" in other for other in before), [*before, line]
        return line.removeprefix(start)

    yield refused
    signal.signal(signal.SIGTERM, at_sigterm)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Makes the given call of a function (counted from 0) end as Ctrl-C does; later calls go through."""
    original, calls = getattr(owner, name), Counter()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        if calls[name] == call + 1:
            raise KeyboardInterrupt("test")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder with the SHA-256 sum of its contents: equal listings, nothing changed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file; `change` returns the new value, or alters the old one and returns `None`."""
    value = read_json(path)
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")
