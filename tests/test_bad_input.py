"""Bad arguments and bad input: exit code 2, one line that names file, record and remedy, and nothing touched.

The table has a row for each way in which an input can be wrong, by kind of input, for all scripts. What is odd and yet
to be taken stands in `tests/test_odd_input.py`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import edit_json, listing, make_adapter, run_main
from toy_ratings import TOY_FILMS, TOY_GENRES, toy_ratings, write_atomic, write_grouplens

from cebs.files import PROJECT
from utils import read_json, write_json, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

PREFERENCES = [{"prompt": "p", "chosen": '"a"', "rejected": ['"b"', '"c"']}] * 3
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, other_model, data_dir, tokenizer, encoder):
    """Good input for every script: see `STAGES`."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(data_dir, folder / "data")
    make_adapter(folder / "adapter", tiny_model, tokenizer)
    for split in ("train", "valid"):
        write_json(folder / f"dpo_{split}.json", PREFERENCES)
    shutil.copytree(tiny_model, folder / "model")
    (folder / "other_model").symlink_to(other_model)
    shutil.copytree(encoder, folder / "encoder")
    run_main(
        "dataset_generate_cluster_batch",
        *("--data_dir", folder / "data", "--model_name_or_path", tiny_model, "--output_dir", folder / "cluster"),
        *("--max_train_samples", 2, "--max_eval_samples", 2, "--max_new_tokens", 4, "--max_candidates", 10),
    )
    shutil.move(folder / "cluster" / "data" / "candidates.json", folder / "candidates.json")
    shutil.rmtree(folder / "cluster")

    write_grouplens(folder / "raw", TOY_FILMS, TOY_GENRES, toy_ratings())
    write_atomic(folder / "atomic", TOY_FILMS, toy_ratings())
    for part, names in (("data", SPLITS), ("eval", ("name2genre", "name2id", "id2name", "genre_dict"))):
        (folder / "sprec" / part / "Books").mkdir(parents=True)
        for name in names:
            origin = folder / "data" / (f"{name}_sample.json" if part == "data" else f"{name}.json")
            shutil.copy(origin, folder / "sprec" / part / "Books" / f"{name}.json")

    for method in ("item_knn", "popularity"):
        run = folder / method
        run_main("predict_baselines", "--method", method, "--data_dir", folder / "data", "--output_dir", run)
    run_main(
        "evaluate",
        *("--predictions", run / "predictions", "--data_dir", folder / "data", "--dataset", "classics", "--topk", 3),
        *("--method", "Popularity", "--bootstrap", 0, "--results_csv", folder / "results.csv"),
    )
    write_json(run / "training_log.json", [{"step": 1, "loss": 2.5}])
    (folder / "published.csv").write_text("Model,NDCG@3\nSFT,0.1\n")
    shutil.copy(PROJECT / "configs" / "comparison.yaml", folder)
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world to spoil, as working directory."""
    shutil.copytree(world, tmp_path / "place", symlinks=True)
    for path in (tmp_path / "place" / "per_user").rglob("*.json"):  # of the copy, not of the original
        path.write_text(path.read_text().replace(str(world), str(tmp_path / "place")))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


MODEL = ("--model_name_or_path", "model", "--output_dir", "out")
SIZES = ("--train_size", "4", "--valid_size", "4", "--test_size", "4", "--history_length", "3", "--output_dir", "out")
STAGES = {
    "movielens": ("prepare_data", "--source", "raw", *SIZES),
    "atomic": ("prepare_data", "--source", "atomic", *SIZES),
    "sprec": ("prepare_data", "--dataset", "sprec", "--source", "sprec", "--category", "Books", *SIZES),
    "sft": ("sft_smol", "--data_dir", "data", *MODEL),
    "average": ("average_adapters", "--adapters", "adapter", "adapter", *MODEL),
    "random": ("dataset_generate", "--method", "random", "--data_dir", "data", *MODEL),
    "self_play": ("dataset_generate", "--method", "self_play", "--data_dir", "data", "--adapter", "adapter", *MODEL),
    "cluster": ("dataset_generate_cluster_batch", "--data_dir", "data", "--adapter", "adapter", *MODEL),
    "again": ("dataset_generate_cluster_batch", "--data_dir", "data", "--candidates", "candidates.json", *MODEL)
    + ("--max_train_samples", "2", "--max_eval_samples", "2"),
    "dpo": ("DPO_from_dpoData", "--train_data", "dpo_train.json", "--valid_data", "dpo_valid.json", *MODEL)
    + ("--adapter", "adapter"),
    "predict": ("generate_predict_batch", "--data_dir", "data", "--adapter", "adapter", *MODEL),
    "beams": ("generate_predict_batch", "--data_dir", "data", "--decoding", "constrained_beam", *MODEL),
    "popularity": ("predict_baselines", "--method", "popularity", "--data_dir", "data", "--output_dir", "out"),
    "sasrec": ("predict_baselines", "--method", "sasrec", "--data_dir", "data", "--output_dir", "out"),
    "fuse": ("fuse_predictions", "--predictions", "item_knn/predictions", "popularity/predictions")
    + ("--output_dir", "out"),
    "evaluate": ("evaluate", "--predictions", "popularity/predictions", "--data_dir", "data", "--method", "Popularity")
    + ("--dataset", "classics")
    + ("--topk", "3", "--results_csv", "results.csv", "--metrics_json", "out/metrics.json", "--encoder", "encoder")
    + ("--cache_dir", "cache", "--bootstrap", "0"),
    "report": ("report", "--results_csv", "results.csv", "--k", "3", "--output_dir", "out"),
    "table": ("cebs.results", "results.csv"),
    "aggregate": ("cebs.results", "--aggregate", "mean.csv", "results.csv"),
    "comparison": ("cebs.comparison", "--description", "comparison.yaml", "--dry_run", "--output_dir", "out"),
}


@pytest.fixture
def refusal(refusal):
    """`refusal(stage, *more)`: the line of complaint of a stage with these arguments beside its own."""
    return lambda stage, *more, **allowed: refusal(*STAGES[stage], *more, **allowed)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to spoil a file
# ---------------------------------------------------------------------------------------------------------------------


def spoil(path: str, change: Callable) -> Callable[[], None]:
    """Returns a function that rewrites a JSON file of the place; so do the others below."""
    return lambda: edit_json(Path(path), change)


def write(path: str, content: str | bytes) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: str) -> Callable[[], None]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def replace(path: str, old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        text = Path(path).read_text(encoding="utf-8")
        assert old in text
        Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def line(path: str, number: int, text: str) -> Callable[[], None]:
    """Replaces a line of a table, counted from 1."""

    def change() -> None:
        lines = Path(path).read_text(encoding="latin-1").split("\n")
        lines[number - 1] = text
        Path(path).write_text("\n".join(lines), encoding="latin-1")

    return change


def recode(path: str, encoding: str) -> Callable[[], None]:
    """Writes the file in another encoding, with a letter that is no ASCII in the place of its first quote."""
    return lambda: Path(path).write_bytes(("é" + Path(path).read_text(encoding="utf-8")).encode(encoding))


def drop_key(index: int, key: str) -> Callable[[list], None]:
    def change(records: list) -> None:
        del records[index][key]

    return change


def set_key(index: int | str, key: str, value: object) -> Callable[[list | dict], None]:
    def change(records: list | dict) -> None:
        records[index][key] = value

    return change


def cut(path: str, size: int) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def instead(path: str, make: Callable[[Path], None]) -> Callable[[], None]:
    """Puts something else in the place of a file."""

    def change() -> None:
        Path(path).unlink()
        make(Path(path))

    return change


def no_permission(path: str) -> Callable[[], None]:
    def change() -> None:
        Path(path).chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")

    return change


def other_rank() -> None:
    from safetensors.torch import load_file, save_file

    weights = Path("adapter/adapter_model.safetensors")
    save_file({name: tensor.repeat(2, 2) for name, tensor in load_file(weights).items()}, weights)


def pickled(folder: str, name: str, pickle: str) -> Callable[[], None]:
    """Leaves the weights of a folder as a pickle alone."""
    return lambda: Path(folder, name).rename(Path(folder, pickle))


def interrupted() -> None:
    run = {"script": "sft_smol.py", "state": "interrupted", "arguments": {}, "inputs": {}}
    write_json("run.json", run)


def title_without_name() -> None:
    edit_json(Path(GENRES), lambda genres: {**genres, "New": []})
    edit_json(Path(IDS), lambda ids: {**ids, "New": 9})


def checkpoint_without_log() -> None:
    Path(LOG).unlink()
    write_json("popularity/checkpoint-10/trainer_state.json", {})


def candidates_without_rounds() -> None:
    arguments = {"data_dir": "data", "num_candidates": 10}
    run = {"script": "dataset_generate_cluster_batch.py", "state": "done", "arguments": arguments, "inputs": {}}
    write_json("cluster_exposure/run.json", run | {"counts": {}})


def second_row(*cells: str) -> str:
    return "\n".join(["Dataset,Model,HR@3", *cells]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The table: kind of input; what is wrong with it; for which scripts; how it comes about; what the line must hold
# ---------------------------------------------------------------------------------------------------------------------

TRAIN, VALID, TEST = (f"data/{split}_sample.json" for split in SPLITS)
GENRES, IDS, NAMES, COUNTED = (f"data/{name}.json" for name in ("name2genre", "name2id", "id2name", "genre_dict"))
RANKED = "popularity/predictions/raw_results_8.json"
PER_USER = "per_user/classics/Popularity.json"
LOG = "popularity/training_log.json"
OF_RECORDS = ("sft", "random", "self_play", "cluster", "again", "popularity")
OF_ADAPTERS = ("average", "self_play", "cluster", "dpo", "predict")
OF_MODELS = ("sft", "average", "cluster", "predict")
RANKING = ("evaluate", "fuse")
OF_CATALOGUES = ("random", "cluster", "beams", "popularity", "evaluate")
NESTED = "[" * 100_000

TABLE = {
    "records": [
        ("missing", OF_RECORDS, remove(TRAIN), f"{TRAIN}: no such file; the stage before writes it, or give another"),
        ("missing", (*OF_RECORDS[:-1], "sasrec"), remove(VALID), f"{VALID}: no such file"),
        ("missing", ("predict", "beams"), remove(TEST), f"{TEST}: no such file"),
        ("dangling link", ("sft",), instead(TRAIN, lambda path: path.symlink_to("nowhere")), f"{TRAIN}: no such file"),
        ("link in a ring", ("sft",), instead(TRAIN, lambda path: path.symlink_to(path.name)), f"{TRAIN}: cannot be re"),
        ("folder", ("sft", "popularity"), instead(TRAIN, Path.mkdir), f"{TRAIN}: cannot be read: is a folder"),
        ("pipe without end", ("predict", "beams"), instead(TEST, os.mkfifo), f"{TEST}: cannot be read: is a folder or"),
        ("no permission", ("sft",), no_permission(TRAIN), f"{TRAIN}: cannot be read: Permission denied"),
        ("empty", ("predict", "beams"), write(TEST, ""), f"{TEST}: invalid JSON at line 1, column 1"),
        ("truncated", OF_RECORDS, cut(TRAIN, 500), f"{TRAIN}: invalid JSON at line "),
        ("JSON Lines", ("sft", "again"), write(TRAIN, '{"a": 1}\n{"a": 2}\n'), f"{TRAIN}: invalid JSON at line 2, col"),
        ("a comma missing", ("sft",), write(VALID, '[{"a": 1},\n {"a" 2}]'), f"{VALID}: invalid JSON at line 2, colum"),
        ("a web page", ("sft",), write(TRAIN, "<!doctype html>"), f"{TRAIN}: invalid JSON at line 1, column 1"),
        ("compressed", ("sft",), write(TRAIN, b"\x1f\x8b\x08\x00" * 9), f"{TRAIN}: cannot be read as UTF-8 text: byte"),
        ("UTF-16", ("sft", "sasrec"), recode(TRAIN, "utf-16"), f"{TRAIN}: cannot be read as UTF-8 text: byte 0"),
        ("Latin-1", ("sft",), recode(TRAIN, "latin-1"), f"{TRAIN}: cannot be read as UTF-8 text: byte 0"),
        ("object for a list", ("predict",), write(TEST, "{}"), f"{TEST}: expected a JSON list of records, found dict"),
        ("empty list", ("sft", "random", "again"), write(TRAIN, "[]"), f"{TRAIN}: the list is empty"),
        ("null for a record", ("sft",), spoil(TRAIN, lambda r: r[:4] + [None]), f"{TRAIN}: record 4: expected an obje"),
        ("nested too deeply", ("sft", "again"), write(TRAIN, NESTED), f"{TRAIN}: record 0: is nested too deeply"),
        ("NaN", ("sft",), spoil(TRAIN, set_key(5, "user", float("nan"))), f"{TRAIN}: record 5: NaN is no number"),
        ("endless number", ("sft",), write(TRAIN, '[{"user": 1e999}]'), f"{TRAIN}: record 0: 1e999 is too large a num"),
        ("huge number", ("sft",), write(TRAIN, f"[1, {'9' * 5000}]"), f"{TRAIN}: record 1: 999999999... is too large"),
        ("key twice", ("sft",), write(TRAIN, '[{}, {"input": 1, "input": 2}]'), f"{TRAIN}: record 1: the key 'input'"),
        ("half a character", ("sft",), spoil(TRAIN, set_key(2, "input", "\ud83d")), f"{TRAIN}: record 2: holds half a"),
        ("key missing", OF_RECORDS, spoil(TRAIN, drop_key(3, "input")), f"{TRAIN}: record 3: 'input' is missing"),
        ("key missing", ("predict",), spoil(TEST, drop_key(7, "output")), f"{TEST}: record 7: 'output' is missing"),
        ("no text", ("sft",), spoil(TRAIN, set_key(2, "instruction", 5)), f"{TRAIN}: record 2: instruction, input and"),
        ("list for a text", ("sft",), spoil(TRAIN, set_key(2, "input", ["a"])), f"{TRAIN}: record 2: instruction, inp"),
        ("target unquoted", OF_RECORDS, spoil(TRAIN, set_key(2, "output", "Emma\n")), f"{TRAIN}: record 2: output mus"),
        ("half a quote", ("predict",), spoil(TEST, set_key(1, "output", '"')), f"{TEST}: record 1: output must be the"),
        ("empty target", ("predict",), spoil(TEST, set_key(1, "output", '""\n')), f"{TEST}: record 1: output must be"),
        ("a quote too many", ("sft",), spoil(TRAIN, set_key(2, "input", '"A", "6" B"')), f"{TRAIN}: record 2: input h"),
        ("user of no kind", ("sft",), spoil(TRAIN, set_key(2, "user", [1])), f"{TRAIN}: record 2: 'user' must be text"),
        ("user true", ("predict",), spoil(TEST, set_key(2, "user", True)), f"{TEST}: record 2: 'user' must be text or"),
        (
            "history is the whole catalogue",
            ("popularity",),
            lambda: edit_json(
                Path(TEST), set_key(1, "input", ", ".join(f'"{title}"' for title in read_json(Path(GENRES))))
            ),
            f"{TEST}: record 1: its history is the whole catalogue; nothing is left",
        ),
    ],
    "catalogue": [
        ("missing", OF_CATALOGUES, remove(NAMES), f"{NAMES}: no such file"),
        ("empty", OF_CATALOGUES, write(GENRES, "{}"), f"{GENRES}: expected a JSON object that is not empty"),
        ("list for an object", ("random",), write(GENRES, "[]"), f"{GENRES}: expected a JSON object that is not empty"),
        ("truncated", ("random",), cut(GENRES, 90), f"{GENRES}: invalid JSON at line"),
        ("title twice", ("random",), write(GENRES, '{"It": ["a"], "It": ["a"]}'), f"{GENRES}: the key 'It' occurs twi"),
        ("gap in the ids", OF_CATALOGUES, spoil(NAMES, lambda ids: ids.pop("5") and None), f"{NAMES}: id 5 is missing"),
        (
            "ids from 1",
            ("random", "evaluate"),
            spoil(NAMES, lambda ids: {str(int(key) + 1): title for key, title in ids.items()}),
            f"{NAMES}: id 0 is missing; ids must run from 0 without gaps",
        ),
        ("id with a zero before it", ("random",), replace(NAMES, '"3"', '"03"'), f"{NAMES}: id 3 is missing"),
        ("id twice", ("random",), lambda: edit_json(Path(IDS), lambda ids: dict.fromkeys(ids, 0)), "should have id 1,"),
        ("title of two ids", ("random",), spoil(NAMES, lambda ids: {**ids, "2": ids["1"]}), "should have id 2, as in"),
        ("true for 1", ("random",), replace(IDS, ": 1,", ": true,"), "should have id 1, as in id2name.json"),
        ("1.0 for 1", ("random",), replace(IDS, ": 1,", ": 1.0,"), "should have id 1, as in id2name.json"),
        ("id as text", ("random",), replace(IDS, ": 1,", ': "1",'), "should have id 1, as in id2name.json"),
        ("title no text", ("random",), spoil(NAMES, lambda ids: {**ids, "2": ["It"]}), f"{NAMES}: id 2: expected a ti"),
        ("unknown title", ("random",), spoil(NAMES, lambda ids: {**ids, "2": "Nowhere"}), "'Nowhere' (id 2) has no en"),
        ("title without id", ("random",), spoil(GENRES, lambda g: {**g, "New": []}), f"{NAMES}: 'New' of name2genre.j"),
        ("id of no title", ("random",), spoil(IDS, lambda ids: {**ids, "New": 489}), f"{NAMES}: 'New' of name2id.json"),
        (
            "title without name",
            ("random", "popularity"),
            title_without_name,
            f"{NAMES}: 'New' of name2genre.json has no id",
        ),
        ("genres as text", ("random",), spoil(GENRES, lambda g: dict.fromkeys(g, "novel")), "genres must be a list of"),
        ("genre no text", ("random",), spoil(GENRES, lambda g: dict.fromkeys(g, [1])), "genres must be a list of stri"),
        ("no genres", ("evaluate",), write(COUNTED, "{}"), f"{COUNTED}: expected a JSON object that is not empty"),
        ("genre list", ("evaluate",), write(COUNTED, '["a"]'), f"{COUNTED}: expected a JSON object that is not empty"),
        ("genre counts", ("evaluate",), write(COUNTED, '{"a": "0"}'), f"{COUNTED}: 'a': expected the number 0, not '0"),
    ],
    "candidates.json": [
        ("missing", ("again",), remove("candidates.json"), "candidates.json: no such file"),
        ("truncated", ("again",), cut("candidates.json", 700), "candidates.json: invalid JSON at line"),
        ("list", ("again",), write("candidates.json", "[]"), "candidates.json: is not a candidates.json of this scrip"),
        ("no records", ("again",), spoil("candidates.json", lambda c: {"train": []}), "is not a candidates.json of th"),
        ("null", ("again",), spoil("candidates.json", set_key("train", 0, None)), "is not a candidates.json of this s"),
        ("of other records", ("again",), spoil(TRAIN, lambda rows: rows[1:]), "was made from another train_sample.jso"),
        (
            "of fewer records",
            ("again",),
            spoil("candidates.json", lambda c: c["valid"].pop() and None),
            "was made from an",
        ),
        (
            "title no text",
            ("again",),
            spoil("candidates.json", lambda stored: stored["valid"][0]["candidates"][0].update(title=3)),
            "candidates.json: a title of valid is not text",
        ),
        (
            "log-probability NaN",
            ("again",),
            spoil("candidates.json", lambda stored: stored["train"][0]["candidates"][0].update(log_prob=float("nan"))),
            "candidates.json: NaN is no number",
        ),
        (
            "log-probability as text",
            ("again",),
            spoil("candidates.json", lambda stored: stored["train"][0]["candidates"][0].update(log_prob="-1")),
            "candidates.json: train, record 0: log_prob of",
        ),
    ],
    "preferences": [
        ("missing", ("dpo",), remove("dpo_train.json"), "dpo_train.json: no such file"),
        ("empty list", ("dpo",), write("dpo_valid.json", "[]"), "dpo_valid.json: the list is empty"),
        ("JSON Lines", ("dpo",), write("dpo_train.json", "{}\n{}\n"), "dpo_train.json: invalid JSON at line 2, column"),
        ("text for a record", ("dpo",), write("dpo_train.json", '["a"]'), "dpo_train.json: record 0: expected an obje"),
        ("key missing", ("dpo",), spoil("dpo_train.json", drop_key(1, "chosen")), "record 1: 'chosen' is missing"),
        ("none rejected", ("dpo",), spoil("dpo_train.json", set_key(2, "rejected", [])), "record 2: rejected must be"),
        ("null rejected", ("dpo",), spoil("dpo_train.json", set_key(2, "rejected", None)), "record 2: rejected must b"),
        ("object", ("dpo",), spoil("dpo_train.json", set_key(2, "rejected", {"a": 1})), "record 2: rejected must be a"),
        ("no text", ("dpo",), spoil("dpo_train.json", set_key(0, "rejected", ["a", 1])), "record 0: prompt, chosen an"),
        ("blank", ("dpo",), spoil("dpo_valid.json", set_key(0, "rejected", " ")), "dpo_valid.json: record 0: prompt,"),
        ("two chosen", ("dpo",), spoil("dpo_valid.json", set_key(1, "chosen", ["a"])), "dpo_valid.json: record 1: pro"),
        (
            "chosen is rejected",
            ("dpo",),
            spoil("dpo_train.json", set_key(1, "rejected", ['"b"', ' "a"\n'])),
            'dpo_train.json: record 1: the chosen title "a" is also rejected',
        ),
    ],
    "predictions": [
        ("missing", RANKING, remove(RANKED), "popularity/predictions: no raw_results_*.json in this folder"),
        (
            "two in the folder",
            RANKING,
            lambda: shutil.copy(RANKED, "popularity/predictions/raw_results_9.json"),
            "popularity/predictions: holds 2 files of predictions",
        ),
        ("JSON Lines", RANKING, write(RANKED, "{}\n{}"), f"{RANKED}: invalid JSON at line 2"),
        ("object", RANKING, write(RANKED, "{}"), f"{RANKED}: expected a JSON list"),
        ("empty list", RANKING, write(RANKED, "[]"), f"{RANKED}: the list is empty"),
        ("key missing", RANKING, spoil(RANKED, drop_key(3, "prompt")), f"{RANKED}: record 3: 'prompt' is missin"),
        ("null", RANKING, spoil(RANKED, set_key(3, "prediction", None)), f"{RANKED}: record 3: 'prediction' mus"),
        ("list for a text", RANKING, spoil(RANKED, set_key(0, "prompt", ["a"])), "record 0: 'prompt' must be te"),
        ("half a character", RANKING, spoil(RANKED, set_key(4, "prediction", "\udc00")), "record 4: holds half"),
        ("user of no kind", RANKING, spoil(RANKED, set_key(1, "user", {})), "record 1: 'user' must be text or a"),
        ("ranking no list", RANKING, spoil(RANKED, set_key(1, "ranking", "It")), "record 1: 'ranking' must be a"),
        ("ranking no titles", RANKING, spoil(RANKED, set_key(1, "ranking", [1])), "record 1: 'ranking' must be"),
        ("unknown title", ("evaluate",), spoil(RANKED, set_key(1, "ranking", ["?"])), "record 1: '?' of its ranking i"),
        (
            "too short",
            ("evaluate",),
            spoil(RANKED, lambda r: r[2]["ranking"].__delitem__(slice(2, None))),
            "2 titles that",
        ),
        (
            "title twice",
            RANKING,
            spoil(RANKED, lambda r: r[2]["ranking"].__setitem__(1, r[2]["ranking"][0])),
            f"{RANKED}: record 2: its ranking has ",
        ),
        ("a foreign run.json", RANKING, write("popularity/run.json", "[]"), "run.json: was not written by these"),
        (
            "earlier runs no mapping",
            RANKING,
            spoil("popularity/run.json", lambda run: {**run, "earlier_runs": [1]}),
            "popularity/run.json: was not written by these scripts",
        ),
    ],
    "files per user": [
        ("truncated", ("report",), cut(PER_USER, 600), f"{PER_USER}: invalid JSON at line"),
        ("list", ("report",), write(PER_USER, "[]"), f"{PER_USER}: expected an object with dataset, method"),
        ("no users", ("report",), spoil(PER_USER, lambda c: {**c, "users": []}), f"{PER_USER}: has no users"),
        ("k no list", ("report",), spoil(PER_USER, lambda c: {**c, "topk": 3}), f"{PER_USER}: 'topk' must be list"),
        ("k as text", ("report",), spoil(PER_USER, lambda c: {**c, "topk": ["3"]}), f"{PER_USER}: 'topk' must hold wh"),
        ("k true", ("report",), spoil(PER_USER, lambda c: {**c, "topk": [True]}), f"{PER_USER}: 'topk' must hold whol"),
        ("no figures", ("report",), spoil(PER_USER, lambda c: c["users"][2].pop("hit") and None), "user 2: 'hit' must"),
        (
            "hit true",
            ("report",),
            spoil(PER_USER, lambda c: c["users"][2]["hit"].update({"3": True})),
            "user 2: 'hit' and",
        ),
        (
            "hit of 2",
            ("report",),
            spoil(PER_USER, lambda c: c["users"][2]["hit"].update({"3": 2})),
            "user 2: 'hit' and 'n",
        ),
        (
            "no titles",
            ("report",),
            spoil(PER_USER, lambda c: c["users"][3].pop("recommended") and None),
            "user 3: 'recomm",
        ),
        (
            "title no text",
            ("report",),
            spoil(PER_USER, lambda c: c["users"][3].update(recommended=[[]])),
            "user 3: 'recom",
        ),
        ("no origin", ("report",), spoil(PER_USER, lambda c: c["predictions"].update(file=5)), "does not say where it"),
    ],
    "training logs": [
        ("step missing", ("report",), write(LOG, '[{"loss": 1}]'), f"{LOG}: record 0: 'step' must be a whole number"),
        ("step as text", ("report",), write(LOG, '[{"step": "1"}]'), f"{LOG}: record 0: 'step' must be a whole number"),
        ("not a list", ("report",), write(LOG, "{}"), f"{LOG}: expected a JSON list"),
        ("checkpoint cut short", ("report",), checkpoint_without_log, "trainer_state.json: has no list 'log_history'"),
        ("no rounds counted", ("report",), candidates_without_rounds, "run.json: does not count rounds as dataset_g"),
    ],
    "results CSV": [
        ("missing", ("report", "table", "aggregate"), remove("results.csv"), "results.csv: no such file; evaluate.py"),
        ("folder", ("evaluate",), instead("results.csv", Path.mkdir), "results.csv: cannot be read: is a folder"),
        ("pipe", ("evaluate",), instead("results.csv", os.mkfifo), "results.csv: cannot be read: is a folder or a dev"),
        ("UTF-16", ("evaluate", "report", "table", "aggregate"), recode("results.csv", "utf-16"), "results.csv: canno"),
        ("Latin-1", ("evaluate",), recode("results.csv", "latin-1"), "results.csv: cannot be read as UTF-8 text"),
        ("other columns", ("evaluate", "report"), write("results.csv", "a,b\n1,2\n"), "the first line has no columns"),
        ("column twice", ("table",), write("results.csv", "Dataset,Model,HR@3,HR@3\n"), "has the column HR@3 2 times;"),
        (
            "quote never closed",
            ("evaluate", "table"),
            write("results.csv", second_row('b,"SFT,1')),
            "cannot be read as CSV",
        ),
        ("endless cell", ("evaluate",), write("results.csv", second_row("b," + "x" * 200_000)), "cannot be read as CS"),
        ("no rows", ("report",), write("results.csv", second_row()), "results.csv: has no rows; evaluate.py writes on"),
        (
            "a name too long for a file",
            ("report",),
            write("results.csv", second_row(f"b,{'x' * 300},0.5")),
            "...: is too long for the name of a file; give a shorter --dataset or --method",
        ),
    ],
    "ratings": [
        ("file missing", ("movielens",), remove("raw/u.genre"), "raw: no MovieLens-100K there; --source needs a folde"),
        ("an archive", ("movielens",), lambda: (remove("raw")(), write("raw", b"PK\x03\x04")()), "raw: no MovieLens-1"),
        ("column missing", ("movielens",), line("raw/u.data", 5, "1\t2\t5"), "raw/u.data: line 5: 3 columns instead o"),
        ("no number", ("movielens",), line("raw/u.data", 1, "1\t2\tgood\t7"), "raw/u.data: line 1: rating and timesta"),
        ("NaN", ("movielens",), line("raw/u.data", 1, "1\t2\tnan\t7"), "raw/u.data: line 1: rating must be a number f"),
        ("400 stars", ("movielens",), line("raw/u.data", 2, "1\t2\t400\t7"), "raw/u.data: line 2: rating must be a nu"),
        ("endless time", ("movielens",), line("raw/u.data", 1, "1\t2\t5\tinf"), "raw/u.data: line 1: rating and times"),
        ("time of no date", ("movielens",), line("raw/u.data", 1, "1\t2\t5\t1e300"), "line 1: timestamp must be secon"),
        ("time before 1970", ("movielens",), line("raw/u.data", 1, "1\t2\t5\t-1"), "line 1: timestamp must be seconds"),
        ("nobody's rating", ("movielens",), line("raw/u.data", 3, " \t2\t5\t7"), "raw/u.data: line 3: the user is mis"),
        ("unknown item", ("movielens",), line("raw/u.data", 3, "1\t99\t5\t7"), "line 3: item 99 is not in u.item"),
        ("no ratings", ("movielens",), write("raw/u.data", ""), "raw/u.data: the file has no entry"),
        ("no films", ("movielens",), write("raw/u.item", "\n"), "raw/u.item: the file has no entry"),
        ("film twice", ("movielens",), line("raw/u.item", 2, "1|A (1990)||||0|0|0|0|1"), "u.item: item 1 occurs twice"),
        ("genre is no flag", ("movielens",), line("raw/u.item", 2, "2|A||||0|0|0|0|x"), "u.item: line 2: the genre co"),
        ("no genre", ("movielens",), write("raw/u.item", "1|A||||1|0|0|0|0\n"), "u.item: no film has a genre"),
        ("no titles", ("movielens",), write("raw/u.item", "1|unknown||||1|0|0|0|0\n"), "u.item: no film with a title"),
        ("UTF-16", ("atomic",), recode("atomic/ml-100k.item", "utf-16"), "ml-100k.item: cannot be read as UTF-8 text:"),
        ("other columns", ("atomic",), write("atomic/ml-100k.inter", "a\tb\n"), "ml-100k.inter: line 1: expected the"),
        ("empty", ("atomic",), write("atomic/ml-100k.item", ""), "ml-100k.item: line 1: expected the header item_id"),
    ],
    "SPRec": [
        ("truncated", ("sprec",), cut("sprec/data/Books/test.json", 400), "Books/test.json: invalid JSON at line"),
        ("gap in the ids", ("sprec",), write("sprec/eval/Books/id2name.json", '{"1": "A"}'), "id2name.json: id 0 is m"),
        ("no such folder", ("sprec",), remove("sprec/eval"), "sprec/eval/Books: no such folder; check --source"),
        ("missing", ("sprec",), remove("sprec/data/Books/valid.json"), "valid.json: no such file"),
        (
            "history unquoted",
            ("sprec",),
            spoil("sprec/data/Books/train.json", set_key(5, "input", "It")),
            "record 5: input",
        ),
        (
            "another category's catalogue",
            ("sprec",),
            write("sprec/data/Books/valid.json", json.dumps([{"instruction": "i", "input": '"A"', "output": '"B"'}])),
            "valid.json: no target is in name2genre.json",
        ),
    ],
    "adapters": [
        ("missing", OF_ADAPTERS, remove("adapter"), "adapter: no adapter_config.json; give the final_model folder of"),
        ("no weights", OF_ADAPTERS, remove("adapter/adapter_model.safetensors"), "adapter: no adapter_model.safetenso"),
        (
            "a pickle",
            ("predict",),
            pickled("adapter", "adapter_model.safetensors", "adapter_model.bin"),
            "adapter: no adapter_model.safetensors",
        ),
        ("half written", OF_ADAPTERS, cut("adapter/adapter_model.safetensors", 900), "is damaged or cut short"),
        ("of size 0", ("predict",), cut("adapter/adapter_model.safetensors", 0), "is damaged or cut short"),
        (
            "no safetensors",
            ("predict",),
            write("adapter/adapter_model.safetensors", b"\x80\x04." * 99),
            "is damaged or cut",
        ),
        ("half a config", OF_ADAPTERS, cut("adapter/adapter_config.json", 30), "adapter_config.json: invalid JSON at"),
        ("config a list", ("predict",), write("adapter/adapter_config.json", "[]"), "adapter_config.json: is not of a"),
        (
            "no LoRA",
            ("predict", "dpo"),
            spoil("adapter/adapter_config.json", lambda config: {**config, "peft_type": "IA3"}),
            "adapter/adapter_config.json: is not of a LoRA adapter",
        ),
        ("of another rank", OF_ADAPTERS, other_rank, "adapter: adapter_config.json says rank 2, the weights have 4; c"),
        ("base unknown", ("predict",), write("adapter/base_model.json", "{}"), "base_model.json: needs fingerprint an"),
        ("training interrupted", ("predict",), interrupted, "adapter: sft_smol.py is interrupted in "),
    ],
    "base models": [
        ("half written", OF_MODELS, cut("model/model.safetensors", 5000), "model.safetensors: is damaged or cut short"),
        ("half a config", OF_MODELS, cut("model/config.json", 30), "model/config.json: invalid JSON at line"),
        ("no config", ("predict",), remove("model/config.json"), "model/config.json: no such file"),
        ("config a list", ("predict",), write("model/config.json", "[]"), "model/config.json: expected a JSON object;"),
        ("a pickle", OF_MODELS, pickled("model", "model.safetensors", "pytorch_model.bin"), "model: no *.safetensors"),
    ],
    "comparison.yaml": [
        ("missing", ("comparison",), remove("comparison.yaml"), "comparison.yaml: no such file"),
        ("empty", ("comparison",), write("comparison.yaml", ""), "comparison.yaml: expected a YAML mapping"),
        ("section missing", ("comparison",), replace("comparison.yaml", "flags:", "flag:"), "section 'flags' is missi"),
        ("rows a list", ("comparison",), replace("comparison.yaml", "rows:\n", "rows: []\nx:\n"), "section 'rows' mus"),
        (
            "row no mapping",
            ("comparison",),
            replace("comparison.yaml", "{start: origin}", "origin"),
            "row 'Origin': must be",
        ),
        ("unknown key", ("comparison",), replace("comparison.yaml", "{baseline: po", "{base: po"), "unknown key 'base"),
        ("name of no folder", ("comparison",), replace("comparison.yaml", "  SFT:", "  ../..:"), "row '../..': its na"),
        ("folder twice", ("comparison",), replace("comparison.yaml", "  SFT:", "  origin:"), "would share the folder"),
        ("row twice", ("comparison",), replace("comparison.yaml", "  SFT:", "  Origin:"), "holds the key 'Origin' twi"),
        ("unknown order", ("comparison",), replace("comparison.yaml", '"in:first"', '"in:frist"'), "there is no order"),
        (
            "model of nobody",
            ("comparison",),
            replace("comparison.yaml", "self_play of sft", "self_play of you"),
            "self_play",
        ),
        ("size missing", ("comparison",), replace("comparison.yaml", "quick:", "slow:"), "size 'quick': needs train,"),
        ("no records", ("comparison",), replace("comparison.yaml", "train: 128", "train: 0"), "size 'quick': train mu"),
        (
            "quote never closed",
            ("comparison",),
            replace("comparison.yaml", "--topk 5 10", "--topk '5"),
            "flags of evaluate.py",
        ),
        (
            "outside the folder",
            ("comparison",),
            replace("comparison.yaml", "  beam:", "  ../beam: ''\n  beam:"),
            "candidates '../beam': the name may have a to z, 0 to 9 and _ only",
        ),
        ("time as text", ("comparison",), replace("comparison.yaml", "start: 20", "start: long"), "seconds of sft_smo"),
    ],
    "published figures": [
        ("missing", ("report",), remove("published.csv"), "published.csv: no such file; give --published a CSV"),
        ("no methods", ("report",), write("published.csv", "a,b\n1,2\n"), "published.csv: has no column Model"),
        ("a cell too many", ("report",), write("published.csv", "Model\n1\n1,2\n"), "published.csv: cannot be read as"),
        ("empty", ("report",), write("published.csv", ""), "published.csv: cannot be read as CSV"),
        ("Latin-1", ("report",), recode("published.csv", "latin-1"), "published.csv: cannot be read as UTF-8 text"),
    ],
}
MORE_FLAGS = {"published figures": ("--published", "published.csv")}


@pytest.mark.parametrize(
    ("stage", "spoiling", "complaint", "more"),
    [
        pytest.param(stage, spoiling, complaint, MORE_FLAGS.get(kind, ()), id=f"{kind}-{what}-{stage}")
        for kind, rows in TABLE.items()
        for what, stages, spoiling, complaint in rows
        for stage in stages
    ],
)
def test_bad_input_is_refused_and_nothing_touched(place, refusal, stage, spoiling, complaint, more):
    spoiling()
    before = listing(place)
    assert complaint in refusal(stage, *more)
    assert listing(place) == before


BAD_ARGUMENTS = [
    (tuple(STAGES)[:-3], ("--no_such_flag", "1"), "unknown flag --no_such_flag"),
    (("table",), ("--no_such_flag", "1"), "unrecognized arguments: --no_such_flag"),
    (("table",), ("other.csv",), "give one CSV, or --aggregate OUT.csv to make one of several"),
    (("aggregate",), ("mean.csv",), "mean.csv: no such file; evaluate.py writes it"),
    (("aggregate",), ("--aggregate", "results.csv"), "results.csv: is the output and an input; give --aggregate anoth"),
    (("comparison",), ("--train", "0"), "argument --train: must be a whole number of 1 or more, not '0'"),
    (("comparison",), ("--only", "Nobody"), "--only 'Nobody': no such row; there are: Popularity"),
    (("sft", "dpo"), ("--learning_rat", "1"), "unknown flag --learning_rat; did you mean learning_rate?"),
    (("sft",), ("--learning_rate", "fast"), "--learning_rate/--learning-rate: invalid float value: 'fast'"),
    (("sft",), ("--max_train_samples", "0"), "--max_train_samples 0: must be at least 1"),
    (("sft",), ("--copies_per_record", "0"), "--copies_per_record 0: must be at least 1"),
    (("sft",), ("--copies_per_record", "2"), "--copies_per_record 2: copies are changed by --shuffle_titles or"),
    (("sft",), ("--shuffle_titles",), "--copies_per_record 1: copies are changed by --shuffle_titles or"),
    (("sft",), ("--history_dropout", "1"), "--history_dropout 1.0: must be 0 or more and below 1"),
    (("sft",), ("--use_peft", "false", "--adapter", "adapter"), "--use_peft false: all weights are trained, and no"),
    (("dpo",), ("--use_peft", "false"), "--use_peft false: the reference is the model without what is trained"),
    (("sft",), ("--history_loss_weight", "-1"), "--history_loss_weight -1.0: must be 0 or more"),
    (("sft",), ("--history_loss_weight", "nan"), "--history_loss_weight nan: must be 0 or more"),
    (("dpo",), ("--early_stopping_patience", "0"), "--early_stopping_patience 0: must be at least 1"),
    (("dpo",), ("--loss_type", "ipoo"), "--loss_type ipoo: no such loss; there are softmax, dmpo, sigmoid, hinge"),
    (("dpo",), ("--sft_weight", "-1"), "--sft_weight -1.0: must be 0 or more"),
    (("sft",), ("--save_strategy", "steps"), "save and eval strategy"),
    (("sft", "dpo", "predict", "random", "popularity", "report"), ("--seed", "-1"), "--seed: -1 is below 0"),
    (("random",), ("--method", "best"), "argument --method: invalid choice: 'best'"),
    (("cluster",), ("--unknown_titles", "maybe"), "--unknown_titles/--unknown-titles: invalid choice: 'maybe'"),
    (("cluster",), ("--same_series", "maybe"), "--same_series/--same-series: invalid choice: 'maybe'"),
    (("cluster", "again"), ("--negatives", "in:first", "in:frist"), "in:frist: there is no order 'frist'; did you"),
    (("cluster",), ("--negatives", "in:first:0"), "in:first:0: the count must be 1 or more"),
    (("cluster", "again"), ("--presets", "dpo_hrad"), "dpo_hrad: is no preset, nor a selector pool:order[:count]; did"),
    (("again",), ("--presets", "../dpo_hard"), "../dpo_hard: is no preset"),
    (("again",), ("--negatives", "in:nearest_target", "--encoder", "nobody"), "nobody: not a folder, not in"),
    (("cluster",), ("--fallback", "drop"), "argument --fallback: invalid choice: 'drop'"),
    (("cluster",), ("--temperature", "0"), "--temperature: 0.0 must be above 0"),
    (("cluster",), ("--temperature", "nan"), "--temperature nan: must be a number"),
    (("cluster",), ("--adapter", "no\nwhere"), "no\\nwhere: no adapter_config.json"),
    (("cluster",), ("--top_k", "0"), "--top_k 0: must be at least 1"),
    (("predict",), ("--rows", "0"), "--rows 0: must be at least 1"),  # it used to wait for ever
    (("predict", "self_play"), ("--batch_size", "0"), "--batch_size 0: must be at least 1"),
    (("beams",), ("--num_beams", "0"), "--num_beams 0: must be at least 1"),
    (("popularity",), ("--method", "svd"), "invalid choice: 'svd'"),
    (("popularity",), ("--num_titles", "0"), "--num_titles 0: must be at least 1"),
    (("movielens",), ("--dataset", "netflix"), "argument --dataset: invalid choice: 'netflix'"),
    (("movielens",), ("--source", "raw/u.data"), "raw/u.data: no MovieLens-100K there"),
    (("movielens",), ("--test_size", "5000"), "--test_size 5000 cannot be had; ask for fewer"),
    (("movielens",), ("--history_length", "90"), "there are 0 train, 0 valid, 0 test records"),
    (("movielens",), ("--valid_size", "0"), "--valid_size 0: must be at least 1"),
    (("movielens",), ("--seed", "-1"), "--seed -1: must not be negative"),
    (("movielens",), ("--test_share", "0.95"), "their sum must be below 1"),
    (("movielens",), ("--valid_share", "nan"), "--valid_share nan: must be a number"),
    (("movielens",), ("--tset_size", "5"), "unknown flag --tset_size; did you mean test_size?"),
    (("sprec",), ("--source", ""), "--source: --dataset sprec needs the folder that holds data/ and eval/"),
    (("sprec",), ("--category", "Steam"), "sprec/data/Steam: no such folder"),
    (("sprec",), ("--category", "../Books"), "--category '../Books': must be the name of one folder"),
    (("sprec",), ("--train_size", "99999"), "--train_size 99999 cannot be had"),
    (("evaluate",), ("--topk", "0", "5"), "--topk: 0 is not a number of titles"),
    (("evaluate",), ("--topk", "99"), "its ranking has"),
    (("fuse",), ("--rank_constant", "-1"), "--rank_constant -1: must be at least 1"),
    (("fuse",), ("--num_titles", "0"), "--num_titles 0: must be at least 1"),
    (("fuse",), ("--predictions", "item_knn/predictions"), "one ranking is none to be fused; give two or more"),
    (("average",), ("--adapters", "adapter"), "--adapters adapter: one adapter is its own mean; give two or more"),
    (("fuse",), ("--predictions", "data", "item_knn"), "data: no raw_results_*.json in this folder"),
    (("evaluate",), ("--bootstrap", "-1"), "--bootstrap: -1 is below 0"),
    (("evaluate",), ("--seed", "-1"), "--seed: -1 is below 0"),
    (("evaluate",), ("--predictions", "data"), "data: no raw_results_*.json in this folder"),
    (("evaluate",), ("--data_dir", "nowhere"), "nowhere/name2genre.json: no such file"),
    (("evaluate",), ("--metrics_json", "data"), "data: is a folder; give --metrics_json a file"),
    (("evaluate",), ("--per_user", "users.csv"), "users.csv: --per_user needs a file that ends in .json or .parquet"),
    (("evaluate",), ("--results_csv", "raw/u.data"), "raw/u.data: the first line has no columns Dataset and Model"),
    (("evaluate",), ("--method", "x" * 300), "...: is too long for the name of a file"),
    (("report",), ("--dataset", "Books"), "results.csv: has no data set 'Books'; it has classics"),
    (("report",), ("--k", "7"), "has no figures at k 7, but at 3; give --k"),
    (("report",), ("--k", "0"), "--k 0: must be at least 1"),
    (OF_ADAPTERS, ("--model_name_or_path", "other_model"), "adapter: was made for another base model (tiny), not f"),
    (("sft",), ("--adapter", "adapter", "--model_name_or_path", "other_model"), "adapter: was made for another base"),
    (("sft",), ("--adapter", "data"), "data: no adapter_config.json"),
    (("sft", "predict"), ("--model_name_or_path", "data"), "data: no *.safetensors file; give the folder of a model"),
    (("predict",), ("--model_name_or_path", "nobody/nothing"), "nobody/nothing: not a folder, not in"),
    (("predict",), ("--model_name_or_path", "x" * 300), "x: not a folder, not in"),
    (("sft", "predict", "popularity", "report"), ("--output_dir", "candidates.json"), "candidates.json: cannot be mad"),
    (OF_CATALOGUES[:-1], ("--config", "nowhere.yaml"), "nowhere.yaml: no such file; give --config the path of a YAML"),
    (("predict",), ("--config", "data"), "data: cannot be read: is a folder"),
]


@pytest.mark.parametrize(
    ("stage", "arguments", "complaint"),
    [
        pytest.param(stage, arguments, complaint, id=f"{stage}-{' '.join(arguments)[:60]}")
        for stages, arguments, complaint in BAD_ARGUMENTS
        for stage in stages
    ],
)
def test_bad_arguments_are_refused_and_nothing_touched(place, refusal, stage, arguments, complaint):
    before = listing(place)
    assert complaint in refusal(stage, *arguments)
    assert listing(place) == before


BAD_CONFIGS = [
    ("unknown key", "model_name: model", "mine.yaml: unknown key 'model_name'; did you mean model_name_or_path?"),
    ("key of a number", "3: 3", "mine.yaml: unknown key '3'"),
    ("text for a number", "rows: many", "argument --rows: invalid int value: 'many'"),
    ("truth for a number", "rows: true", "argument --rows: invalid int value: 'True'"),
    ("fraction for a number", "rows: 1.5", "argument --rows: invalid int value: '1.5'"),
    ("list for a number", "rows: [1, 2]", "unknown flag 2"),
    ("text for a truth", "overwrite: perhaps", "argument --overwrite"),
    ("number of no use", "rows: 0", "--rows 0: must be at least 1"),
    ("no choice", "decoding: bream", "argument --decoding: invalid choice: 'bream'"),
    ("NaN", "calibration: .nan", "mine.yaml: cannot be read as YAML: Out of range float values"),
    ("key twice", "rows: 3\nrows: 4", "mine.yaml: cannot be read as YAML: holds the key 'rows' twice; keep one"),
    ("alias", "rows: &a [1]\nbatch_size: *a", "mine.yaml: cannot be read as YAML: holds an alias (*); write it out"),
    ("a Python object", "rows: !!python/object/apply:os.getcwd []", "mine.yaml: cannot be read as YAML: could not det"),
    ("tag that does not fit", "rows: !!int ''", "mine.yaml: cannot be read as YAML: "),
    ("bytes", "rows: !!binary aGk=", "mine.yaml: cannot be read as YAML: Object of type bytes is not JSON serializabl"),
    ("NUL", 'data_dir: "a\\0b"', "mine.yaml: cannot be read as YAML: holds a NUL or half a character"),
    ("half a character", 'data_dir: "\\ud800"', "mine.yaml: cannot be read as YAML: holds a NUL or half a character"),
    ("nested too deeply", "rows: " + "[" * 10_000, "mine.yaml: cannot be read as YAML: maximum recursion depth exceed"),
    ("list", "- rows", "mine.yaml: expected a YAML mapping of names to values"),
    ("empty", "", "mine.yaml: expected a YAML mapping of names to values"),
    ("bracket never closed", "rows: [", "mine.yaml: cannot be read as YAML: while parsing a flow node"),
    ("tab", "rows:\n\t- 3", "mine.yaml: cannot be read as YAML: while scanning for the next token"),
    ("another config", "config: other.yaml", "mine.yaml: unknown key 'config'"),
    ("UTF-16", "rows: é".encode("utf-16"), "mine.yaml: cannot be read as UTF-8 text: byte 0"),
]


@pytest.mark.parametrize(("content", "complaint"), [pytest.param(*row[1:], id=row[0]) for row in BAD_CONFIGS])
def test_a_bad_config_is_refused_and_nothing_touched(place, refusal, content, complaint):
    write("mine.yaml", content)()
    before = listing(place)
    assert complaint in refusal("beams", "--config", "mine.yaml")
    assert listing(place) == before


def test_the_tables_hold_enough():
    """The inputs that docs/reliability.md counts."""
    files = {(kind, what) for kind, rows in TABLE.items() for what, *_ in rows}
    assert len(files) + len(BAD_CONFIGS) >= 60
    tried = {stage for rows in TABLE.values() for _, stages, *_ in rows for stage in stages}
    assert tried == set(STAGES)


# ---------------------------------------------------------------------------------------------------------------------
# What shows itself only when a model is there
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun_for_nothing(place):
    """`begun_for_nothing(before)`: the run has begun and failed, left nothing in anybody's way, and touched nothing."""

    def check(before: dict[str, str]) -> None:
        after = listing(place)
        assert {name for name in after if name not in before} <= {
            *("out", "out/run.json", "out/data", "out/predictions", "out/runs"),
            *(name for name in after if name.endswith((".lock", ".partial.jsonl"))),
        }
        assert read_json(place / "out" / "run.json")["state"] == "failed"
        assert {name: value for name, value in after.items() if name in before} == before

    return check


def test_a_model_that_brings_its_own_code(place, refusal, begun_for_nothing, monkeypatch):
    """transformers would ask on the terminal whether to run it, and wait."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    code = "from pathlib import Path\nPath('ran').touch()\n"
    write("model/own.py", code)()
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(place / "model/config.json", lambda config: {**config, "model_type": "own", "auto_map": auto_map})
    before = listing(place)
    assert "model: " in refusal("sft")
    assert not (place / "ran").exists()
    begun_for_nothing(before)


def test_a_damaged_tokenizer(place, refusal, begun_for_nothing):
    cut("model/tokenizer.json", 3000)()
    before = listing(place)
    assert "model: its tokenizer cannot be loaded: " in refusal("sft")
    begun_for_nothing(before)


def test_a_model_without_some_of_its_weights(place, refusal, begun_for_nothing):
    """transformers would put random numbers in their place, and go on."""
    from safetensors.torch import load_file, save_file

    tensors = load_file("model/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    before = listing(place)
    complaint = refusal("random", "--method", "self_play", progress=True)
    assert "model: 1 weights are missing, model.layers.1.mlp.up_proj.weight among them; copy it again" in complaint
    begun_for_nothing(before)


@pytest.mark.parametrize("stage", ["cluster", "predict", "self_play", "sft", "dpo"])
def test_a_prompt_that_cannot_fit(place, refusal, begun_for_nothing, stage):
    spoil("dpo_train.json", set_key(1, "prompt", "word " * 300))()
    before = listing(place)
    complaint = refusal(stage, "--max_length", "60", progress=True)
    assert "without any title" in complaint and "give a greater --max_length" in complaint
    begun_for_nothing(before)
    if stage == "predict":
        run_main(*STAGES[stage], "--max_new_tokens", "4")


# ---------------------------------------------------------------------------------------------------------------------
# Folders, and the command line itself
# ---------------------------------------------------------------------------------------------------------------------

RESULTS = {
    **dict.fromkeys(("sft", "average", "dpo"), "final_model"),
    **dict.fromkeys(("predict", "beams"), "predictions/raw_results_9.json"),
    **dict.fromkeys(("random", "self_play"), "data/dpo_train.json"),
    **dict.fromkeys(("cluster", "again"), "data/candidates.json"),
    "fuse": "predictions/raw_results_9.json",
}


@pytest.mark.parametrize("stage", RESULTS)
def test_a_folder_with_another_runs_results_is_refused(place, refusal, stage):
    """By its `run.json`, and by the results alone where there is none."""
    name, result = STAGES[stage][0], RESULTS[stage]
    write_text(place / "out" / result / "x" if result == "final_model" else place / "out" / result, "mine")
    before = listing(place)
    complaint = f"out: holds another run of {name}.py ({result.split('/')[-1]} is there already); use --overwrite"
    assert complaint in refusal(stage)
    assert listing(place) == before
    run = {"script": f"{name}.py", "state": "done", "arguments": {"seed": 1}, "inputs": {}, "counts": {}, "outputs": []}
    write_json(place / "out" / "run.json", run)
    before = listing(place)
    assert f"out: holds another run of {name}.py (" in refusal(stage)
    assert listing(place) == before


def test_one_record_leaves_no_random_negative(place, refusal):
    edit_json(place / "data" / "train_sample.json", lambda records: records[:1])
    assert "train_sample.json: record 0: no title is left to be its negative" in refusal("random")


def test_more_than_the_vocabulary_may_be_asked_for(place):
    run_main(*STAGES["cluster"], "--top_k", "100000", "--max_train_samples", "1", "--max_eval_samples", "1")


def test_a_spoiled_default_config_is_bad_input(place, refusal, monkeypatch, tmp_path):
    """The defaults are a file that people edit; a typing error there ended in a traceback."""
    shutil.copytree(PROJECT / "configs", tmp_path / "project" / "configs")
    with (tmp_path / "project" / "configs" / "predict.yaml").open("a") as file:
        file.write("num_beam: 3\n")
    monkeypatch.setattr("cebs.commands.PROJECT", tmp_path / "project")
    assert "predict.yaml: unknown key 'num_beam'; did you mean num_beams?" in refusal("predict")


@pytest.mark.parametrize(
    ("stage", "more", "spoiling", "complaint"),
    [
        ("predict", ("--rowz", "3"), None, "generate_predict_batch.py: error: unknown flag --rowz; did you mean rows?"),
        ("sft", (), write(TRAIN, "[{]"), f"sft_smol.py: error: {TRAIN}: invalid JSON at line 1, column 3"),
        ("dpo", ("--model_name_or_path", "other_model"), None, "DPO_from_dpoData.py: error: adapter: was made for ano"),
    ],
)
def test_the_command_line_itself(place, run_script, stage, more, spoiling, complaint):
    """A process of its own: exit code 2 and exactly one line on stderr."""
    if spoiling:
        spoiling()
    before = listing(place)
    name, *args = STAGES[stage]
    result = run_script(f"{name}.py", *args, *more, cwd=place)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(complaint)
    assert listing(place) == before
