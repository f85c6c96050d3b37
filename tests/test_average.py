"""Adapters averaged: the mean of what they add to the model, whatever their ranks and layers."""

import pytest
import torch
from conftest import run_main
from peft import LoraConfig, get_peft_model

from cebs.models import load_model, save_trained
from utils import base_fingerprint, check_adapter, read_json

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "small": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "large": LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "root": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True),
}


def made(kind, seed, folder, base, tokenizer):
    """An adapter with random weights, as a training run leaves it."""
    torch.manual_seed(seed)
    save_trained(get_peft_model(load_model(base), KINDS[kind]), tokenizer, folder / "final_model", base)
    return folder / "final_model"


def merged(base, adapter):
    """The weights of the model with the adapter in them."""
    return load_model(base, adapter=adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "kinds", [["small", "small"], ["small", "large"], ["large", "large", "large"], ["small", "root", "large"]]
)
def test_the_mean_adapter_adds_the_mean_of_what_they_add(kinds, tiny_model, tokenizer, tmp_path):
    adapters = [made(kind, seed, tmp_path / str(seed), tiny_model, tokenizer) for seed, kind in enumerate(kinds)]
    words = ("--adapters", *adapters, "--model_name_or_path", tiny_model)
    run_main("average_adapters", *words, "--output_dir", tmp_path / "mean")
    mean = tmp_path / "mean/final_model"
    check_adapter(mean, tiny_model)
    assert read_json(mean / "base_model.json")["fingerprint"] == base_fingerprint(tiny_model)
    counts = read_json(tmp_path / "mean/run.json")["counts"]
    assert counts == {"adapters": len(kinds), "rank": sum(KINDS[kind].r for kind in kinds)}

    found, parts = merged(tiny_model, mean), [merged(tiny_model, adapter) for adapter in adapters]
    for name, base in load_model(tiny_model).state_dict().items():
        expected = torch.stack([part[name].double() for part in parts]).mean(0)
        assert torch.allclose(found[name].double(), expected, atol=1e-5), name
        if "q_proj" in name:
            assert (expected - base).abs().max() > 1e-3  # there is something to be averaged


def test_the_same_adapters_give_the_same_bytes_and_are_averaged_once(tiny_model, tokenizer, tmp_path, capsys):
    adapters = [made("small", seed, tmp_path / str(seed), tiny_model, tokenizer) for seed in (0, 1)]
    words = ("--adapters", *adapters, "--model_name_or_path", tiny_model)
    for name in ("one", "two", "one"):
        run_main("average_adapters", *words, "--output_dir", tmp_path / name)
    assert capsys.readouterr().out.count("is done already, nothing to do") == 1
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_model.json"):
        one, two = ((tmp_path / run / "final_model" / name).read_bytes() for run in ("one", "two"))
        assert one == two
    assert read_json(adapters[0] / "adapter_config.json")["target_modules"] == ["down_proj", "q_proj"]


def test_the_epochs_of_a_training_are_averaged_and_predict(tiny_model, data_dir, tmp_path):
    model = ("--data_dir", data_dir, "--model_name_or_path", tiny_model)
    schedule = ("--max_train_samples", "4", "--num_train_epochs", "2", "--learning_rate", "0.01")
    run_main("sft_smol", *model, *schedule, "--output_dir", tmp_path / "sft")
    epochs = sorted((tmp_path / "sft").glob("checkpoint-*"))
    assert len(epochs) == 2
    averaged = ("--adapters", *epochs, "--model_name_or_path", tiny_model, "--output_dir", tmp_path / "mean")
    run_main("average_adapters", *averaged)
    more = ("--adapter", tmp_path / "mean/final_model", "--max_predict_samples", 2, "--output_dir", tmp_path / "out")
    run_main("generate_predict_batch", *model, *more)
    assert len(read_json(tmp_path / "out/predictions/raw_results_2.json")) == 2
