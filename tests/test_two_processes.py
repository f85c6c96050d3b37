"""S-DPO under `accelerate launch` with two processes: lists of different lengths, accumulation, checkpointing."""

import os
import subprocess
import sys

import torch
from conftest import run_main
from safetensors.torch import load_file

from utils import PROJECT, read_json, write_json

TITLES = ["Emma (1815)", "Dracula (1897)", "O", "Persuasion (1817)", "Carmilla (1872)", "The Time Machine (1895)"]


def test_two_processes_equal_one(tiny_model, tmp_path):
    records = [
        {
            "prompt": f'### Input:\n"{TITLES[index % 6]}", "{TITLES[index % 5]}"\n### Response:\n',
            "chosen": f'"{TITLES[index % 4]}"',
            "rejected": [f'"{title}"' for title in TITLES[4 : 5 + index % 2]],
        }
        for index in range(8)
    ]
    write_json(tmp_path / "train.json", records)
    arguments = (
        *("--train_data", tmp_path / "train.json", "--valid_data", tmp_path / "train.json"),
        *("--model_name_or_path", tiny_model, "--learning_rate", "0.5", "--lr_scheduler_type", "constant"),
        *("--optim", "sgd"),  # Adam's first steps are of one size, whatever the gradient: rounding would decide signs
        *("--lora_dropout", "0", "--warmup_steps", "0", "--activation_checkpointing", "true"),
    )
    one = (*arguments, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", "2")
    run_main("DPO_from_dpoData", *one, "--gradient_accumulation_steps", "2")

    # without MPI, accelerate starts several processes only as for GPUs; the script's own flags keep them on the CPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two = (*arguments, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "1")
    result = subprocess.run(
        [
            *launch,
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            str(PROJECT / "DPO_from_dpoData.py"),
        ]
        + [*map(str, two), "--gradient_accumulation_steps", "2", "--use_cpu", "true", "--ddp_backend", "gloo"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert read_json(tmp_path / "two" / "run.json")["state"] == "done"
    ours, theirs = (load_file(tmp_path / name / "final_model" / "adapter_model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-3, rtol=1e-2, msg=name)
