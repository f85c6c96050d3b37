"""Input that is odd and yet legal: it goes through the stages to sensible output, and titles stay what they are."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_main

from cebs.prompts import quote
from cebs.training import tokenize_records
from utils import read_json, token_limit, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = "A very long title " * 555 + "indeed"  # 10,000 letters
# what is odd; the title that stands in histories, as target, and in the catalogue
TITLES = {
    "right to left": "שלום עולם (מהדורה 2)",
    "emoji": "👩‍👩‍👧‍👦 Family 😀",
    "combining": "e\u0301\u0301\u0301 Zalgo\u0338",
    "direction marks": "\u202eabc\u202c",
    "byte order mark": "\ufeffEmma",
    "double quotes": 'A Child Called "It" (Dave Pelzer #1)',
    "newline": "Emma\nby Jane Austen",
    "tab": "Emma\tby Jane Austen",
    "carriage return": "Emma\r\nby Jane Austen",
    "NUL": "Em\x00ma",
    "escape sequence": "\x1b[2J\x1b]0;title\x07",
    "backslashes": "C:\\new\\table \\u0041",
    "prompt markers": "### Response:\n### Input:\n### Instruction:",
    "special tokens": "<|im_end|><|im_start|>assistant",
    "format fields": "{0} %s {title} $HOME `id` ; rm",
    "whitespace": "  Emma  ",
    "10,000 letters": LONG,
}
# what is odd; the history's length
HISTORIES = {"no history": 0, "one title": 1, "500 titles": 500}


def make_data(folder: Path, title: str, history: int = 3) -> Path:
    """A data folder whose first records have the title in the history, and as the target."""
    titles = [title, *(f"T{number}" for number in range(30))]
    genres = {name: [("drama", "comedy", "horror")[place % 3]] for place, name in enumerate(titles)}
    write_json(folder / "name2genre.json", genres)
    write_json(folder / "name2id.json", {name: place for place, name in enumerate(titles)})
    write_json(folder / "id2name.json", {str(place): name for place, name in enumerate(titles)})
    write_json(folder / "genre_dict.json", {"drama": 0, "comedy": 0, "horror": 0})
    records = []
    for place in range(4):
        past = [titles[(place + number) % 9] for number in range(history)]
        target = title if place == 3 else titles[10 + place]
        text = f"The user has read: {', '.join(map(quote, past))}. Recommend a book." if past else ""
        records.append({"instruction": "Recommend a book.", "input": text, "output": f"{quote(target)}\n"})
    for split in ("train", "valid", "test"):
        write_json(folder / f"{split}_sample.json", records)
    return folder


def run_all(data: Path, model: Path, out: Path) -> dict[str, Path]:
    """Every stage on a data folder, at its smallest; returns the runs' folders."""
    decoding = ("--model_name_or_path", model, "--max_new_tokens", 8, "--max_length", 700)
    short = ("--num_train_epochs", 1, "--max_train_samples", 2, "--max_eval_samples", 1, "--max_length", 700)
    runs = {name: out / name for name in ("sft", "random", "cluster", "dpo", "greedy", "item_knn")}
    run_main("sft_smol", "--data_dir", data, "--model_name_or_path", model, "--output_dir", runs["sft"], *short)
    adapter = ("--adapter", runs["sft"] / "final_model")
    run_main("dataset_generate", "--method", "random", "--data_dir", data, "--output_dir", runs["random"])
    run_main(
        "dataset_generate_cluster_batch",
        *("--data_dir", data, *adapter, *decoding, "--output_dir", runs["cluster"]),
        *("--max_candidates", 2, "--num_candidates", 2, "--max_train_samples", 2, "--max_eval_samples", 1),
    )
    files = {split: runs["cluster"] / "data" / f"dpo_two_negatives_{split}.json" for split in ("train", "valid")}
    run_main(
        "DPO_from_dpoData",
        *("--train_data", files["train"], "--valid_data", files["valid"], *adapter, "--model_name_or_path", model),
        *("--output_dir", runs["dpo"], *short),
    )
    run_main("generate_predict_batch", "--data_dir", data, *adapter, *decoding, "--output_dir", runs["greedy"])
    run_main("predict_baselines", "--method", "item_knn", "--data_dir", data, "--output_dir", runs["item_knn"])
    return runs


def evaluate(run: Path, data: Path, results_csv: Path, encoder: Path) -> dict:
    run_main(
        "evaluate",
        *("--predictions", run / "predictions", "--data_dir", data, "--results_csv", results_csv, "--topk", 3),
        *("--encoder", encoder, "--cache_dir", results_csv.parent / "cache", "--bootstrap", 10),
        *(
            "--metrics_json",
            results_csv.parent / f"{run.name}.json",
            "--per_user",
            results_csv.parent / "users.parquet",
        ),
    )
    return read_json(results_csv.parent / f"{run.name}.json")


@pytest.mark.parametrize("what", TITLES)
def test_odd_titles(what, tmp_path, data_dir):
    """Stages without a model: what is written is read again as it was."""
    title = TITLES[what]
    data = make_data(tmp_path / "data", title)
    run_main("dataset_generate", "--method", "random", "--data_dir", data, "--output_dir", tmp_path / "random")
    preferences = read_json(tmp_path / "random" / "data" / "dpo_train.json")
    assert preferences[3]["chosen"] == quote(title) and quote(title) in preferences[0]["prompt"]
    run_main("predict_baselines", "--method", "popularity", "--data_dir", data, "--output_dir", tmp_path / "popularity")
    predictions = read_json(tmp_path / "popularity" / "predictions" / "raw_results_4.json")
    assert predictions[3]["ground_truth"] == title and {title} & {name for p in predictions for name in p["ranking"]}
    metrics = evaluate(tmp_path / "popularity", data, tmp_path / "results.csv", tmp_path / "no encoder is needed")
    assert metrics["targets_in_catalogue"] == 4 and metrics["@3"]["users"] == 4


def test_every_stage_takes_odd_titles(tmp_path, tiny_model, encoder):
    """All odd titles at once but the longest, through every stage, to a row of the CSV."""
    data = make_data(tmp_path / "data", TITLES["emoji"])
    odd = [title for what, title in TITLES.items() if what not in ("10,000 letters", "double quotes")]
    for split in ("train", "valid", "test"):
        records = read_json(data / f"{split}_sample.json")
        for place, record in enumerate(records):
            record["input"] = ", ".join(map(quote, odd[4 * place : 4 * place + 4]))
        write_json(data / f"{split}_sample.json", records)
    runs = run_all(data, tiny_model, tmp_path / "out")
    for name in ("greedy", "item_knn"):
        metrics = evaluate(runs[name], data, tmp_path / "results.csv", encoder)
        assert metrics["@3"]["users"] == 4 and 0 <= metrics["@3"]["NotInRatio"] <= 1
    predictions = read_json(runs["greedy"] / "predictions" / "raw_results_4.json")
    assert [record["prompt"] for record in predictions] == [
        f"### Instruction:\n{record['instruction']}\n### Input:\n{record['input']}\n### Response:\n"
        for record in read_json(data / "test_sample.json")
    ]


@pytest.mark.parametrize("what", HISTORIES)
def test_histories_of_any_length(what, tmp_path, tiny_model, encoder):
    data = make_data(tmp_path / "data", "Emma", HISTORIES[what])
    runs = run_all(data, tiny_model, tmp_path / "out")
    shortened = HISTORIES[what] > 100
    for name, records in (("sft", 3), ("cluster", 3), ("dpo", 3), ("greedy", 4)):
        counts = read_json(runs[name] / "run.json")["counts"]
        assert counts["shortened_prompts"] == (records if shortened else 0), name
    for name in ("greedy", "item_knn"):
        assert evaluate(runs[name], data, tmp_path / "results.csv", encoder)["@3"]["users"] == 4


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Windows' editor writes one; JSON, YAML and CSV are read alike."""
    data = make_data(tmp_path / "data", "Emma")
    for path in data.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (tmp_path / "mine.yaml").write_bytes("\ufeffnum_titles: 5\n".encode())
    run_main(
        "predict_baselines",
        *("--config", tmp_path / "mine.yaml", "--method", "popularity", "--data_dir", data),
        *("--output_dir", tmp_path / "popularity"),
    )
    predictions = read_json(tmp_path / "popularity" / "predictions" / "raw_results_4.json")
    assert all(len(record["ranking"]) == 5 for record in predictions)
    (tmp_path / "results.csv").write_bytes("\ufeffModel;Dataset;HR@3\r\nOld;data;0,5\r\n".encode())
    evaluate(tmp_path / "popularity", data, tmp_path / "results.csv", tmp_path)
    assert (tmp_path / "results.csv").read_bytes().startswith("\ufeffModel;".encode())
    assert b";0,5;" in (tmp_path / "results.csv").read_bytes()


def test_other_line_ends_and_other_order_of_keys(tmp_path):
    data = make_data(tmp_path / "data", "Emma")
    for path in data.iterdir():
        value = read_json(path)
        value = dict(reversed(value.items())) if path.name == "name2genre.json" else value
        path.write_bytes(
            json.dumps(value, indent=1, sort_keys=path.name.endswith("_sample.json")).replace("\n", "\r\n").encode()
        )
    for name, folder in (("plain", make_data(tmp_path / "plain data", "Emma")), ("other", data)):
        run_main("predict_baselines", "--method", "item_knn", "--data_dir", folder, "--output_dir", tmp_path / name)
    results = [tmp_path / name / "predictions" / "raw_results_4.json" for name in ("plain", "other")]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_a_target_in_its_own_history(tmp_path):
    """The published Goodreads data have three such records."""
    data = make_data(tmp_path / "data", "Emma")
    for split in ("train", "valid", "test"):
        records = read_json(data / f"{split}_sample.json")
        records[0]["output"] = '"T1"\n'
        assert '"T1"' in records[0]["input"]
        write_json(data / f"{split}_sample.json", records)
    run_main("dataset_generate", "--method", "random", "--data_dir", data, "--output_dir", tmp_path / "random")
    record = read_json(tmp_path / "random" / "data" / "dpo_train.json")[0]
    assert record["chosen"] == '"T1"' != record["rejected"]


# ---------------------------------------------------------------------------------------------------------------------
# Length
# ---------------------------------------------------------------------------------------------------------------------


def test_no_row_is_longer_than_the_models_context(tmp_path, tiny_model):
    """`--max_length` may say more, or nothing: then the context is the limit."""
    assert [token_limit(tiny_model, length) for length in (100, 2048, 5000, None)] == [100, 2048, 2048, 2048]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"max_position_embeddings": 150})
    data = make_data(tmp_path / "data", "Emma", 60)
    runs = run_all_training(data, model, tmp_path / "out")
    for run in runs:
        assert read_json(run / "run.json")["counts"]["shortened_prompts"] == 8


def run_all_training(data: Path, model: Path, out: Path) -> list[Path]:
    short = ("--num_train_epochs", 1, "--max_length", 100_000)
    run_main("sft_smol", "--data_dir", data, "--model_name_or_path", model, "--output_dir", out / "sft", *short)
    run_main("dataset_generate", "--method", "random", "--data_dir", data, "--output_dir", out / "random")
    files = [out / "random" / "data" / f"dpo_{split}.json" for split in ("train", "valid")]
    run_main(
        "DPO_from_dpoData",
        *("--train_data", files[0], "--valid_data", files[1], "--model_name_or_path", model),
        *("--output_dir", out / "dpo", *short),
    )
    return [out / "sft", out / "dpo"]


def test_what_is_cut_is_said_once_and_counted(tmp_path, tiny_model, capsys):
    data = make_data(tmp_path / "data", "Emma", 60)
    run_main(
        "sft_smol",
        *("--data_dir", data, "--model_name_or_path", tiny_model, "--output_dir", tmp_path / "sft"),
        *("--num_train_epochs", 1, "--max_length", 120),
    )
    lines = capsys.readouterr().out.splitlines()
    note = "note: 8 prompts lost their oldest titles to fit in 120 tokens with their answers"
    assert lines.count(note) == 1 and sum("oldest titles" in line for line in lines) == 1


@pytest.mark.parametrize("room", [70, 90, 120, 200, 350])
def test_the_marker_and_the_target_are_never_cut(tokenizer, room):
    titles = [f"T{number}" for number in range(60)]
    prompt = f"### Instruction:\nDo.\n### Input:\n{', '.join(map(quote, titles))}.\n### Response:\n"
    dataset, shortened = tokenize_records(tokenizer, [(prompt, '"The target"\n')], room)
    (row,) = dataset
    text = tokenizer.decode(row["input_ids"])
    assert len(row["input_ids"]) <= room and shortened == 1
    assert text.endswith(f'### Response:\n"The target"\n{tokenizer.eos_token}')
    kept = text.count('"T') - 1
    assert 0 < kept < 60 and f"### Input:\n{', '.join(map(quote, titles[-kept:]))}.\n" in text
