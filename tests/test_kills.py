"""kill -9 at random moments: each script, started again with the same words, ends as if nothing had happened."""

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import CLASSICS, SIZES, listing, run_main, start_script

from cebs.prompts import read_records
from utils import read_json, write_json

# how often each is killed before it may come to its end, twenty in all; SEED gives the moments
KILLS = {
    "prepare_data.py": 2,
    "sft_smol.py": 4,
    "dataset_generate.py": 2,
    "dataset_generate_cluster_batch.py": 3,
    "DPO_from_dpoData.py": 3,
    "generate_predict_batch.py": 2,
    "predict_baselines.py": 2,
    "evaluate.py": 2,
}
SEED = 0

TRAINING = ["--learning_rate", "0.01", "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps"]
TRAINING += ["--save_steps", "1"]
SPLITS = ["--train_size", "64", "--valid_size", "16", "--test_size", "32"]
DECODING = ["--max_new_tokens", "8", "--batch_size", "2", "--rows", "2", "--dtype", "float32"]
RESULTS = ("final_model/*", "data/*.json", "predictions/*.json", "data_set/*.json", "table/*", "table/per_user/*/*")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, data_dir):
    """What the scripts read besides a data folder: SPRec's layout, preferences, predictions."""
    folder = tmp_path_factory.mktemp("inputs")
    for part in ("data", "eval"):
        (folder / "SPRec" / part / "Goodreads").mkdir(parents=True)
    for split in SIZES:
        shutil.copyfile(CLASSICS / f"{split}_sample.json", folder / f"SPRec/data/Goodreads/{split}.json")
    for name in ("name2genre.json", "name2id.json", "id2name.json", "genre_dict.json"):
        shutil.copyfile(CLASSICS / name, folder / "SPRec/eval/Goodreads" / name)
    run_main("dataset_generate", "--method", "random", "--data_dir", data_dir, "--output_dir", folder / "random")
    records = read_records(data_dir / "test_sample.json")
    predictions = [
        {"prompt": record.prompt, "prediction": f'"{other.target}"', "ground_truth": record.target}
        for record, other in zip(records, records[::-1], strict=True)
    ]
    write_json(folder / "raw_results_8.json", predictions)
    return folder


@pytest.fixture
def words(inputs, data_dir, tiny_model, encoder):
    """The words of each script's command line, which writes below the working directory."""
    data, model = ["--data_dir", data_dir], ["--model_name_or_path", tiny_model, "--output_dir", "."]
    preferences = [f"--{split}_data={inputs}/random/data/dpo_{split}.json" for split in ("train", "valid")]
    table = ["--results_csv", "table/results.csv", "--metrics_json", "table/metrics.json", "--bootstrap", "50"]
    return {
        "prepare_data.py": ["--dataset", "sprec", "--source", inputs / "SPRec", "--output_dir", "data_set", *SPLITS],
        "sft_smol.py": [*data, *model, *TRAINING],
        "dataset_generate.py": ["--method", "self_play", *data, *model, *DECODING],
        "dataset_generate_cluster_batch.py": [*data, *model, *DECODING],
        "DPO_from_dpoData.py": [*preferences, *model, *TRAINING],
        "generate_predict_batch.py": [*data, *model, *DECODING],
        "predict_baselines.py": ["--method", "sasrec", *data, "--output_dir", ".", "--num_train_epochs", "20"],
        "evaluate.py": [*data, "--predictions", inputs / "raw_results_8.json", "--encoder", encoder, *table]
        + ["--cache_dir", "kept", "--topk", "3"],
    }


def results(folder: Path) -> dict[str, str]:
    """What later stages may take, with its sums; what a killed writer leaves under a hidden name is none of it."""
    paths = [path for pattern in RESULTS for path in folder.glob(pattern) if not path.name.startswith(".")]
    found = {str(path.relative_to(folder)) for path in paths} - {"data_set/run.json"}
    return {name: total for name, total in listing(folder).items() if name in found and total != "folder"}


def finish(script: str, words: list, folder: Path) -> float:
    """Runs a script to its end; returns the seconds it took."""
    started = time.monotonic()
    process = start_script(script, *words, cwd=folder)
    process.wait(timeout=180)
    assert process.returncode == 0, process.output()
    return time.monotonic() - started


@pytest.mark.parametrize("script", KILLS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(script, words, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for path in (whole, folder):
        path.mkdir()
    seconds = finish(script, words[script], whole)
    expected = results(whole)
    assert expected

    moments, kills = random.Random(f"{SEED} {script}"), 0
    while kills < KILLS[script]:
        process = start_script(script, *words[script], cwd=folder)
        started = time.monotonic()
        try:
            process.wait(timeout=moments.uniform(0.2, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert results(folder).items() <= expected.items()  # nothing half done under the name of a result
        else:  # it was faster than the first one, and is begun anew
            assert process.returncode == 0, process.output()
            seconds = time.monotonic() - started
            shutil.rmtree(folder)
            folder.mkdir()

    finish(script, words[script], folder)
    assert results(folder) == expected
    if script != "evaluate.py":
        (record,) = folder.glob("**/run.json")
        assert read_json(record)["state"] == "done"
