"""The chain of scripts on a GPU, where there is one. All other tests keep to the CPU (see conftest)."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import VISIBLE_GPUS

from cebs.files import PROJECT
from utils import read_json


def has_gpu() -> bool:
    """Asked of the driver: torch has been told that there is none."""
    if VISIBLE_GPUS == "" or shutil.which("nvidia-smi") is None:
        return False
    found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return found.returncode == 0 and "GPU 0" in found.stdout


pytestmark = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU here")


@pytest.fixture
def run(tiny_model, data_dir, tmp_path):
    """Runs a script's command line on the first GPU and returns its `run.json`."""

    def run(script, out, *flags):
        words = ["--model_name_or_path", tiny_model, "--output_dir", tmp_path / out, *flags]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": (VISIBLE_GPUS or "0").split(",")[0]}
        command = [sys.executable, PROJECT / script, *words]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-2000:]
        state = read_json(tmp_path / out / "run.json")
        assert state["state"] == "done" and state["device"].startswith("NVIDIA"), state["device"]
        return state

    return run


def test_the_chain(run, data_dir, tmp_path):
    data, decoding = ("--data_dir", data_dir), ("--max_new_tokens", 8, "--batch_size", 4)
    run("sft_smol.py", "sft", *data, "--history_loss_weight", 0.5, "--num_train_epochs", 1)
    adapter = ("--adapter", tmp_path / "sft/final_model")
    run("dataset_generate.py", "own", *data, *adapter, *decoding, "--method", "self_play")
    run("dataset_generate_cluster_batch.py", "candidates", *data, *adapter, *decoding)
    pairs = [("--train_data", "train"), ("--valid_data", "valid")]
    files = [(flag, tmp_path / f"candidates/data/dpo_two_negatives_{split}.json") for flag, split in pairs]
    run("DPO_from_dpoData.py", "sdpo", *files[0], *files[1], *adapter)
    aligned = ("--adapter", tmp_path / "sdpo/final_model")
    run("generate_predict_batch.py", "greedy", *data, *aligned, *decoding)
    beams = ("--decoding", "constrained_beam", "--num_beams", 5, "--calibration", 0.4, "--exclude_history")
    run("generate_predict_batch.py", "beams", *data, *aligned, *decoding, *beams, "--cache_dir", tmp_path)


@pytest.mark.parametrize("how", [(), ("--decoding", "constrained_beam", "--num_beams", 5)])
def test_answers_are_those_of_the_cpu(run, data_dir, tmp_path, how):
    """In float32. A tie that rounding breaks the other way may cost one record of eight."""
    flags = ("--data_dir", data_dir, "--adapter", "", "--dtype", "float32", "--max_new_tokens", 8, *how)
    run("generate_predict_batch.py", "gpu", *flags)
    run("generate_predict_batch.py", "cpu", *flags, "--device", "cpu")
    (ours,), (theirs,) = ([*(tmp_path / name / "predictions").glob("*.json")] for name in ("gpu", "cpu"))
    same = [one == two for one, two in zip(read_json(ours), read_json(theirs), strict=True)]
    assert len(same) == 8 and sum(same) >= 7
