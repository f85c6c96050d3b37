"""The alignment stage under `accelerate launch` with two processes: ragged lists, accumulation, an overflow."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import run_main
from safetensors.torch import load_file

from utils import PROJECT, read_json, write_json

TITLES = ["Emma (1815)", "Dracula (1897)", "O", "Persuasion (1817)", "Carmilla (1872)", "The Time Machine (1895)"]


@pytest.fixture
def arguments(tiny_model, tmp_path):
    """Eight records with one rejected title or two, and settings under which rounding decides nothing."""
    records = [
        {
            "prompt": f'### Input:\n"{TITLES[index % 6]}", "{TITLES[index % 5]}"\n### Response:\n',
            "chosen": f'"{TITLES[index % 4]}"',
            "rejected": [f'"{title}"' for title in TITLES[4 : 5 + index % 2]],
        }
        for index in range(8)
    ]
    write_json(tmp_path / "lists.json", records)
    write_json(tmp_path / "pairs.json", [record | {"rejected": record["rejected"][0]} for record in records])
    return (
        *("--model_name_or_path", tiny_model, "--lr_scheduler_type", "constant", "--warmup_steps", "0"),
        *("--optim", "sgd"),  # Adam's first steps are of one size, whatever the gradient: rounding would decide signs
        *("--lora_dropout", "0", "--activation_checkpointing", "true", "--gradient_accumulation_steps", "2"),
    )


def launch_two(*arguments):
    # without MPI, accelerate starts several processes only as for GPUs; the script's own flags keep them on the CPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [str(PROJECT / "DPO_from_dpoData.py"), "--use_cpu", "true", "--ddp_backend", "gloo"]
    return subprocess.run(
        [*launch, *script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_two_processes_equal_one(arguments, tmp_path):
    data = ("--train_data", tmp_path / "lists.json", "--valid_data", tmp_path / "lists.json")
    arguments = (*arguments, *data, "--learning_rate", "0.5", "--sft_weight", "0.5")
    run_main("DPO_from_dpoData", *arguments, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", "2")
    result = launch_two(*arguments, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert read_json(tmp_path / "two" / "run.json")["state"] == "done"
    ours, theirs = (load_file(tmp_path / name / "final_model" / "adapter_model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-3, rtol=1e-2, msg=name)


def test_two_processes_stop_together(arguments, tmp_path):
    """A loss of TRL's own, at a learning rate that overflows: nobody waits for ever, the records of both are named."""
    data = ("--train_data", tmp_path / "pairs.json", "--valid_data", tmp_path / "pairs.json")
    more = ("--loss_type", "ipo", "--learning_rate", "1e38", "--per_device_train_batch_size", "1")
    result = launch_two(*arguments, *data, *more, "--output_dir", tmp_path / "out")
    assert result.returncode != 0
    # one line from each process, if the launcher leaves the slower one the time to write it
    complaints = {line.partition("error: ")[2] for line in result.stderr.splitlines() if "error: step 2: " in line}
    assert len(complaints) == 1, result.stderr[-2000:]
    (records,) = re.findall("the loss is nan on training records ([0-7]), ([0-7]); ", *complaints)
    assert records[0] < records[1]
    assert read_json(tmp_path / "out" / "run.json")["state"] == "failed"
