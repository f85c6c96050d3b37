"""Models: base models, tokenizers and adapters, loaded and saved in one way by all stages."""

import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cebs.errors import InputError, first_line
from cebs.files import read_json, sync, write_json
from cebs.processes import connect_processes, has_fast_bf16
from cebs.runs import ADAPTER_WEIGHTS, require_done

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(kw_only=True)
class ModelArguments:
    """Which model a script decodes with, and on what.

    Args:
        model_name_or_path (`str`): folder or hub name of the base model.
        adapter (`str`): folder of the adapter; an empty string is the base model alone.
        dtype (`str`): type of the weights; auto is bfloat16 where the hardware computes in it, else float32.
        device (`str`): auto is the GPU where there is one, else the CPU.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the base model."})
    adapter: str = field(
        metadata={"help": "Folder of the adapter. Left out where model or data are given: the base model alone."}
    )
    dtype: str = field(
        metadata={
            "help": "Type of the weights; auto is bfloat16 where the hardware computes in it, else float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    device: str = field(metadata={"help": "auto, cpu, cuda or cuda:N; auto is the GPU if any."})


def load_tokenizer(model_dir: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a base model; a model without a padding token pads with its end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)  # else it would ask
    except Exception as error:  # the tokenizers library raises nothing more exact for a damaged file
        raise InputError(f"{model_dir}: its tokenizer cannot be loaded: {first_line(error)}; copy it again") from error
    if tokenizer.eos_token is None:
        raise InputError(f"{model_dir}: its tokenizer has no end-of-sequence token, which ends an answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_limit(model_dir: str | Path, max_length: int | None) -> int:
    """Returns how many tokens prompt and answer may have together: `max_length`, but no more than the model's context.

    Args:
        model_dir: folder of the base model.
        max_length: as `--max_length` has it; `None` is no other limit than the context.

    Raises:
        `InputError`: if the folder's settings are of no language model.
    """
    from transformers import AutoConfig

    try:
        context = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).max_position_embeddings
    except Exception as error:  # settings of another kind can fail at any of many places
        raise InputError(f"{model_dir}: cannot be loaded as a language model: {first_line(error)}") from error
    return min(max_length or context, context)


def load_model(
    model_dir: str | Path, *, dtype: "torch.dtype | str" = "float32", adapter: str | None = None, **kwargs: Any
) -> "PreTrainedModel":
    """Loads a base model and, if given, an adapter on it whose weights can be trained on.

    Args:
        model_dir: folder of the base model (see `cebs.sources.find_model`).
        dtype: type of the base model's weights.
        adapter: folder of the adapter.
        kwargs: passed to `from_pretrained` (`quantization_config`, `attn_implementation` ...).

    Raises:
        `InputError`: if the folder holds no model or not all of its weights, or the adapter was made for another base
            model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if adapter:
        check_adapter(adapter, model_dir)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **kwargs
        )
    except Exception as error:  # a folder of another kind can fail at any of many places
        raise InputError(f"{model_dir}: cannot be loaded as a language model: {first_line(error)}") from error
    if found["missing_keys"]:  # they would be random numbers
        lacking = sorted(found["missing_keys"])
        raise InputError(f"{model_dir}: {len(lacking)} weights are missing, {lacking[0]} among them; copy it again")
    if adapter:
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True, use_safetensors=True)
        except Exception as error:  # the same
            raise InputError(
                f"{adapter}: does not fit the base model {model_dir}; was it made for another? {first_line(error)}"
            ) from error
    return model


def load_for_inference(model_dir: str | Path, model_args: ModelArguments) -> "PreTrainedModel":
    """Loads a base model with its adapter merged into the weights, in eval mode, on the device asked for."""
    import torch

    dtype = model_args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16() else "float32"
    device = model_args.device
    if device == "auto":
        device = connect_processes(device).device
    # merged in float32, so that the adapter is rounded once and not at each layer
    model = load_model(model_dir, dtype="float32" if model_args.adapter else dtype, adapter=model_args.adapter)
    if model_args.adapter:
        model = model.merge_and_unload()
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


def base_fingerprint(model_dir: str | Path) -> str:
    """Returns a sum that tells base models apart: over each weight file's size and its first megabyte.

    There stand the embeddings of the first tokens, letters and digits among them, which any training of all weights
    changes.
    """
    digest = hashlib.sha256()
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise InputError(f"{model_dir}: no *.safetensors file; give the folder of a model")
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()


def save_trained(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    base_dir: Path,
    state_dict: dict[str, "torch.Tensor"] | None = None,
) -> None:
    """Writes `final_model/`: adapter, tokenizer, and the fingerprint of the base model that it belongs to.

    Of a model without an adapter it writes the model, a base model of its own from then on. It is written beside its
    place and then moved, so that a folder that is there is whole.

    Args:
        model: the model with its adapter, or by itself where all of its weights were trained.
        tokenizer: the model's tokenizer.
        folder: `final_model/`.
        base_dir: folder of the base model.
        state_dict: the whole weights, where processes have split the model's among them; left out, the model's own.
    """
    from peft import PeftModel

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(model, PeftModel):
        config = model.peft_config["default"]
        if isinstance(config.target_modules, set):  # whose order is another in each process
            config.target_modules = sorted(config.target_modules)
        # a reference copy of the adapter, kept by DPO, stays behind
        model.save_pretrained(temporary, selected_adapters=["default"], state_dict=state_dict)
        write_json(temporary / "base_model.json", {"fingerprint": base_fingerprint(base_dir), "name": base_dir.name})
    else:
        model.save_pretrained(temporary, state_dict=state_dict)
    tokenizer.save_pretrained(temporary)
    for path in temporary.iterdir():
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def check_adapter(adapter: str | Path, model_dir: str | Path) -> None:
    """Checks that an adapter is there, is whole, and belongs to the base model, before anything is loaded.

    Raises:
        `InputError`: naming what is missing, or the base model that the adapter was made for.
    """
    folder = Path(adapter)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: is a whole model; give it as --model_name_or_path, without --adapter")
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; give the final_model folder of a finished training run")
    require_done(folder, "sft_smol.py", "DPO_from_dpoData.py")
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or type(config.get("r")) is not int:
        raise InputError(f"{folder / 'adapter_config.json'}: is not of a LoRA adapter; train one with sft_smol.py")
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS)
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")}
    if not shapes or ranks - {config["r"]} and not config.get("rank_pattern"):
        found = " and ".join(map(str, sorted(ranks))) or "none"
        raise InputError(
            f"{folder}: adapter_config.json says rank {config['r']}, the weights have {found}; copy both from one run"
        )
    if (folder / "base_model.json").is_file():
        base = read_json(folder / "base_model.json")
        if not isinstance(base, dict) or not {"fingerprint", "name"} <= base.keys():
            raise InputError(f"{folder / 'base_model.json'}: needs fingerprint and name; copy it from the training run")
        if base["fingerprint"] != base_fingerprint(model_dir):
            raise InputError(f"{folder}: was made for another base model ({base['name']}), not for {model_dir}")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Returns the shape of each tensor in a safetensors file; of the file only the header is read.

    Raises:
        `InputError`: if the file is damaged or shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is damaged or cut short ({error}); copy it again") from error
