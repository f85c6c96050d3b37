"""Training by two processes: DDP with ragged lists, accumulation and an overflow; FSDP. And the launchers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import listing, run_main, start_script
from processes import finish, start_processes
from safetensors.torch import load_file

from cebs.errors import InputError
from cebs.files import PROJECT
from cebs.processes import wait_for_everyone
from utils import read_json, write_json

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


# Lets accelerate split weights among processes on the CPU, which it does among GPUs only
SPLIT_ON_CPU = f"""
import runpy, sys, torch, accelerate.state
from accelerate.utils import DistributedType
torch.distributed.init_process_group("gloo")
barrier = torch.distributed.barrier
torch.distributed.barrier = lambda **devices: barrier()
accelerate.state.PartialState._prepare_backend = lambda state, *args: ("gloo", DistributedType.MULTI_GPU)
accelerate.state.PartialState.set_device = lambda state: vars(state).update(device=torch.device("cpu"))
sys.path.insert(0, {str(PROJECT)!r})
sys.argv[0] = {str(PROJECT / "sft_smol.py")!r}
import cebs.training
train = cebs.training.train_until_interrupted
def train_and_tell(trainer, checkpoint):
    result = train(trainer, checkpoint)
    print("weights:", {{type(weight).__name__ for weight in trainer.model.parameters()}})
    return result
cebs.training.train_until_interrupted = train_and_tell
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch_two(launcher, script, *arguments):
    words = [sys.executable, "-m", *launcher, PROJECT / script, *arguments]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=180)


def assert_same_adapter(one: Path, two: Path) -> None:
    ours, theirs = (load_file(folder / "final_model" / "adapter_model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-3, rtol=1e-2, msg=name)


def test_alignment_by_two_processes_equals_one(arguments, tmp_path):
    data = ("--train_data", tmp_path / "lists.json", "--valid_data", tmp_path / "lists.json")
    arguments = (*arguments, *data, "--learning_rate", "0.5", "--sft_weight", "0.5")
    run_main("DPO_from_dpoData", *arguments, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", "2")
    more = ("--output_dir", "two", "--per_device_train_batch_size", "1")
    codes, told = finish(start_processes(2, "DPO_from_dpoData.py", *arguments, *more, cwd=tmp_path))
    assert codes == [0, 0], told
    assert read_json(tmp_path / "two" / "run.json")["state"] == "done"
    assert_same_adapter(tmp_path / "one", tmp_path / "two")


@pytest.fixture
def sft(tiny_model, data_dir, tmp_path):
    """SFT by one process, and its arguments for two."""
    arguments = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--lora_dropout", "0", "--optim", "sgd")
    arguments += ("--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--warmup_steps", "0")
    arguments += ("--history_loss_weight", "0.5", "--bf16", "false")
    run_main("sft_smol", *arguments, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", "4")
    return (*arguments, "--per_device_train_batch_size", "2")


def test_fine_tuning_by_two_processes_equals_one(sft, tmp_path):
    codes, told = finish(start_processes(2, "sft_smol.py", *sft, "--output_dir", "two", cwd=tmp_path))
    assert codes == [0, 0], told
    assert_same_adapter(tmp_path / "one", tmp_path / "two")


def test_fine_tuning_with_split_weights_equals_one_process(sft, tmp_path):
    """`configs/accelerate/fsdp.yaml` on the CPU: the adapter is gathered and saved whole."""
    config = yaml.safe_load((PROJECT / "configs/accelerate/fsdp.yaml").read_text(encoding="utf-8"))
    settings = {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    (tmp_path / "split.py").write_text(SPLIT_ON_CPU)
    processes = start_processes(
        *(2, tmp_path / "split.py", *sft, "--output_dir", "two"), cwd=tmp_path, ACCELERATE_USE_FSDP="true", **settings
    )
    codes, told = finish(processes)
    assert codes == [0, 0], told
    assert "weights: {'DTensor'}" in told[0][0], told[0]
    assert_same_adapter(tmp_path / "one", tmp_path / "two")


def test_processes_that_do_not_find_each_other_are_refused(sft, tmp_path, monkeypatch):
    """A variable left over from elsewhere would make one run, in one folder, out of two."""
    process = start_script("sft_smol.py", *sft, "--output_dir", "two", cwd=tmp_path, WORLD_SIZE="2")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2 and "MASTER_ADDR" in complaint and complaint.count("\n") == 1, complaint
    assert not (tmp_path / "two").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="^WORLD_SIZE is 2, but the processes do not find each other"):
        wait_for_everyone()


# --- the launchers ---


@pytest.mark.parametrize(
    "script",
    [
        *("prepare_data.py", "average_adapters.py", "predict_baselines.py", "fuse_predictions.py", "evaluate.py"),
        "report.py",
    ],
)
def test_a_script_for_one_process_refuses_to_be_one_of_two(script, tmp_path):
    """Each process would have done all of the work, and written over the other's files."""
    process = start_script(script, cwd=tmp_path, WORLD_SIZE="2", RANK="0")
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint == f"{script}: error: started as 2 processes, and works as one; start it with python\n"
    assert not listing(tmp_path)


def test_two_processes_stop_together(arguments, tmp_path):
    """A loss of TRL's own, at a learning rate that overflows: nobody waits for ever, the records of both are named."""
    data = ("--train_data", tmp_path / "pairs.json", "--valid_data", tmp_path / "pairs.json")
    more = ("--loss_type", "ipo", "--learning_rate", "1e38", "--per_device_train_batch_size", "1")
    config = PROJECT / "configs/accelerate/cpu.yaml"
    result = launch_two(
        ["accelerate.commands.launch", "--config_file", config],
        "DPO_from_dpoData.py",
        *(*arguments, *data, *more, "--output_dir", tmp_path / "out"),
    )
    assert result.returncode != 0
    # one line from each process, if the launcher leaves the slower one the time to write it
    complaints = {line.partition("error: ")[2] for line in result.stderr.splitlines() if "error: step 2: " in line}
    assert len(complaints) == 1, result.stderr[-2000:]
    (records,) = re.findall("the loss is nan on training records ([0-7]), ([0-7]); ", *complaints)
    assert records[0] < records[1]
    assert read_json(tmp_path / "out" / "run.json")["state"] == "failed"


def test_predictions_under_torchrun(tiny_model, data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--max_new_tokens", "8", "--batch_size", "3")
    run_main("generate_predict_batch", *flags, "--output_dir", tmp_path / "one")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = launch_two(launcher, "generate_predict_batch.py", *flags, "--output_dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-2000:]
    assert listing(tmp_path / "two" / "predictions") == listing(tmp_path / "one" / "predictions")
