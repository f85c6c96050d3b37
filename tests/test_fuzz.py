"""Every reader against input that nobody meant: random bytes, cut files, changed values.

What comes out is an `InputError` of one line that names the file, or a result in which every value is of its kind:
never another exception, nor a wait without end. `FUZZ_EXAMPLES` in the environment raises the number of tries.
"""

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cebs.candidates import read_candidates
from cebs.catalogue import CATALOGUE_FILES, interest_cluster, load_catalogue
from cebs.files import PROJECT, read_list, read_yaml
from cebs.per_user import mean_over_seeds, read_per_user
from cebs.plan import Plan, Settings, read_description
from cebs.predictions import read_predictions, read_rankings
from cebs.preferences import read_preferences
from cebs.prompts import Record, predicted_title, quoted_titles, read_records, shorten_prompt
from cebs.ratings import ATOMIC_FILES, GROUPLENS_FILES, movielens_files, read_movielens
from cebs.report.inputs import read_training_log
from cebs.report.tables import published_table
from cebs.results import ReferenceTests, format_results, mean_rows, read_results, update_results
from cebs.runs import recorded_runs
from cebs.selectors import Selector, parse_negatives
from utils import InputError, check_adapter, read_json

NOTHING_TESTED = ReferenceTests("SFT", {}, [])
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # milliseconds; most take one
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextlib.contextmanager
def refused_in_one_line(*names: str):
    """What is inside may raise an `InputError` of one line that starts with one of these names; nothing else."""
    try:
        yield
    except InputError as error:
        assert str(error).startswith(names) and "\n" not in str(error), str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Input that nobody meant
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", '"', "\x00", "\ufeff", "é", "שלום", "😀", "../x", "=1+1", "x" * 10_000]
)
JSON_WORDS = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    '{"a": 1, "a": 2}',
    "[" * 5000,
    "-0",
    "1E5",
    '"\\u0000"',
]
STRANGE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES = st.recursive(
    STRANGE,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=4,
)


def places(value: Any) -> list[tuple]:
    """Returns the path to each part of a JSON value, the whole first."""
    found: list[tuple] = [()]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += [(key, *path) for path in places(part)]
    return found


def twins(value: Any) -> list[Any]:
    """Returns values of other types that are easily taken for this one: `True` and `1.0` equal 1."""
    match value:
        case int() | float():
            return [bool(value), float(value), int(value), str(value), [value]]
        case str():
            return [[value], {value: value}, None, value.encode().hex()]
    return [None, list(value), str(value), dict(enumerate(map(str, value)))] if value else [None, 0, ""]


@st.composite
def changed(draw: Callable, value: Any) -> Any:
    """A JSON value of which one to three parts are taken away, doubled, renamed, replaced, or of another type."""
    value = [copy.deepcopy(value)]  # so that the whole can be replaced, too
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)[1:]))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        match draw(st.sampled_from(["drop", "replace", "retype", "retype", "rename", "double"])):
            case "drop" if len(path) > 1:
                del parent[key]
            case "rename" if isinstance(parent, dict):
                parent[draw(TEXTS)] = parent.pop(key)
            case "double" if len(path) > 1:
                if isinstance(parent, list):
                    parent.append(parent[key])
                else:
                    parent[draw(TEXTS)] = parent[key]
            case "retype":
                parent[key] = draw(st.sampled_from(twins(parent[key])))
            case _:
                parent[key] = draw(VALUES)
        if not value:
            break
    return value[0]


@st.composite
def spoiled(draw: Callable, value: Any) -> bytes:
    """A JSON file that is changed, cut, strewn with bytes, or has a word put in that no value is made of."""
    text = json.dumps(draw(changed(value)) if draw(st.booleans()) else value, ensure_ascii=draw(st.booleans()))
    content = text.encode(errors="surrogatepass")
    at = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(["whole", "whole", "whole", "cut", "bytes", "word", "word", "mark", "utf-16"])):
        case "cut":
            return content[:at]
        case "bytes":
            return content[:at] + draw(st.binary(max_size=6)) + content[at:]
        case "word":  # in the place of a number, where there is one
            word = draw(st.sampled_from(JSON_WORDS))
            start = max(text.rfind(": ", 0, at), 0) + 2
            end = min((place for sign in ",}]" if (place := text.find(sign, start)) >= 0), default=len(text))
            return (text[:start] + word + text[end:]).encode(errors="surrogatepass")
        case "mark":
            return b"\xef\xbb\xbf" + content
        case "utf-16":
            return text.encode("utf-16", errors="surrogatepass")
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def is_plain(value: Any) -> bool:
    """Says whether a value is JSON that can be written again: finite numbers, whole characters."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return True


# ---------------------------------------------------------------------------------------------------------------------
# JSON and YAML
# ---------------------------------------------------------------------------------------------------------------------

RECORDS = [
    {"instruction": "Do.", "input": 'Read: "Emma", "Dune".', "output": '"It"\n', "user": "7"},
    {"instruction": "Do.", "input": "", "output": '"Dune"\n'},
    {"instruction": "", "input": '"A 😀"', "output": '"Emma"\n', "user": 7},
]


@fuzz
@given(st.binary(max_size=60) | spoiled(RECORDS))
def test_read_json(folder, content):
    path = written(folder / "x.json", content)
    with refused_in_one_line(f"{path}: "):
        value = read_json(path)
        assert is_plain(value) and value == json.loads(content.decode("utf-8-sig"))


@fuzz
@given(spoiled(RECORDS))
def test_read_list_and_read_records(folder, content):
    path = written(folder / "train_sample.json", content)
    with refused_in_one_line(f"{path}: "):
        assert all(isinstance(record, dict) and "input" in record for record in read_list(path, ["input"]))
    with refused_in_one_line(f"{path}: "):
        records = read_records(path)
        assert records
        for record in records:
            assert record.target and isinstance(record.user, str) and record.prompt.endswith("### Response:\n")
            assert all(isinstance(title, str) for title in record.history)


OWN = {"rows": 3, "data_dir": "data", "topk": [5, 10], "lr": 1.5, "deep": {"a": [True, None]}, "name": "x: # y"}
YAML_WORDS = [
    "*a",
    "&a",
    "!!int ''",
    "!!python/name:os.system",
    ".nan",
    "2024-13-45",
    "{",
    "\t",
    "? ",
    "<<: {}",
    "'",
    "- ",
]


@st.composite
def spoiled_yaml(draw: Callable) -> bytes:
    value = draw(changed(OWN)) if draw(st.booleans()) else OWN
    text = yaml.safe_dump(value, allow_unicode=draw(st.booleans()))
    at = draw(st.integers(0, len(text)))
    text = text[:at] + draw(st.sampled_from(["", *YAML_WORDS]) | TEXTS) + text[at:]
    return text.encode(errors="surrogatepass")[: draw(st.integers(0, 2 * len(text)))]


@fuzz
@given(st.binary(max_size=60) | spoiled_yaml())
def test_read_yaml(folder, content):
    path = written(folder / "x.yaml", content)
    with refused_in_one_line(f"{path}: "):
        mapping = read_yaml(path)
        assert isinstance(mapping, dict) and is_plain(mapping) and "\\u0000" not in json.dumps(list(mapping.values()))


def test_aliases_that_grow_without_end(folder):
    """Nine lines that would be a list of a billion."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    path = written(folder / "x.yaml", "\n".join(lines).encode())
    with pytest.raises(InputError, match="holds an alias"):
        read_yaml(path)


DESCRIPTION = yaml.safe_load((PROJECT / "configs" / "comparison.yaml").read_text(encoding="utf-8"))


@fuzz
@given(changed(DESCRIPTION))
def test_the_description_of_the_comparison(folder, description):
    """What is taken can be planned, and every folder of the plan lies in the comparison's own."""
    path = folder / "comparison.yaml"
    try:
        path.write_text(yaml.safe_dump(description), encoding="utf-8")
    except UnicodeEncodeError:
        return
    with refused_in_one_line(f"{path}: "):
        known = read_description(path)
        settings_ = Settings("", "m", "e", Path("out"), Path("out/results.csv"), known["sizes"]["quick"], 1, 2)
        plan = Plan(known, settings_)
        for row in known["rows"]:
            plan.add_row(row)
        for stage in plan.stages.values():
            assert stage.result.parts[0] in ("out", "sampled_data") and ".." not in stage.result.parts
            assert all(isinstance(word, str) for word in stage.command) and math.isfinite(stage.seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The data folder, and what the stages write
# ---------------------------------------------------------------------------------------------------------------------

CATALOGUE = {
    "name2genre.json": {"Emma": ["romance"], "Dune": ["sf", "classic"], "It": []},
    "name2id.json": {"Emma": 0, "Dune": 1, "It": 2},
    "id2name.json": {"0": "Emma", "1": "Dune", "2": "It"},
    "genre_dict.json": {"romance": 0, "sf": 0},
}


@fuzz
@given(st.sampled_from(CATALOGUE_FILES).flatmap(lambda name: st.tuples(st.just(name), spoiled(CATALOGUE[name]))))
def test_load_catalogue(folder, spoiling):
    for name, mapping in CATALOGUE.items():
        (folder / name).write_text(json.dumps(mapping))
    written(folder / spoiling[0], spoiling[1])
    with refused_in_one_line(*(f"{folder / name}: " for name in CATALOGUE)):
        catalogue = load_catalogue(folder)
        assert len(catalogue.titles) == len(set(catalogue.titles)) == len(catalogue.genres)
        assert all(isinstance(genre, str) for genres in catalogue.genres.values() for genre in genres)
        ids = read_json(folder / "name2id.json")
        assert [(title, index, type(ids[title])) for index, title in enumerate(catalogue.titles)] == [
            (title, ids[title], int) for title in catalogue.titles
        ]
        interest_cluster(catalogue.titles, catalogue)


CANDIDATES = {
    "data_sha256": {"train": "s", "valid": "s"},
    **{
        split: [{"record": 0, "candidates": [{"title": "Emma", "log_prob": -1.5}, {"title": "Dune", "log_prob": -2}]}]
        for split in ("train", "valid")
    },
}


@fuzz
@given(spoiled(CANDIDATES), st.booleans())
def test_read_candidates(folder, content, by_likelihood):
    path = written(folder / "candidates.json", content)
    records = {split: [Record("Do.", "", '"It"')] for split in ("train", "valid")}
    selectors = [Selector("in", "likely" if by_likelihood else "first")]
    with refused_in_one_line(f"{path}: "):
        for proposed in read_candidates(path, records, {"train": "s", "valid": "s"}, selectors).values():
            assert len(proposed) == 1
            for title, log_prob in proposed[0]:
                assert isinstance(title, str)
                assert log_prob is None and not by_likelihood or math.isfinite(log_prob)


PREFERENCES = [
    {"prompt": "p", "chosen": '"a"', "rejected": '"b"'},
    {"prompt": "p", "chosen": '"a"', "rejected": ['"b"', '"c"']},
]


@fuzz
@given(spoiled(PREFERENCES))
def test_read_preferences(folder, content):
    path = written(folder / "dpo_train.json", content)
    with refused_in_one_line(f"{path}: "):
        for record in read_preferences(path):
            texts = [record["prompt"], record["chosen"], *record["rejected"]]
            assert len(texts) >= 3 and all(isinstance(text, str) and text.strip() for text in texts)
            assert record["chosen"] not in record["rejected"]


PREDICTIONS = [
    {"prompt": 'Read: "Emma".', "prediction": '"Dune"', "ground_truth": "It", "user": "1"},
    {"prompt": "", "prediction": "", "ground_truth": '"Dune"', "ranking": ["Emma", "Dune", "It"]},
]


@fuzz
@given(spoiled(PREDICTIONS), st.integers(1, 4))
def test_read_predictions_and_rankings(folder, content, k):
    path = written(folder / "raw_results_2.json", content)
    ids = {"Emma": 0, "Dune": 1, "It": 2}
    with refused_in_one_line(f"{path}: "):
        records = read_predictions(path)
        for record in records:
            assert all(isinstance(record[key], str) for key in ("prompt", "prediction", "ground_truth", "user"))
            assert predicted_title(record["prediction"]).strip()
        for ranking in read_rankings(path, records, ids, [set()] * len(records), k).values():
            assert len(ranking) == min(k, 3) == len(set(ranking))


PER_USER = {
    "dataset": "Books",
    "method": "SFT",
    "topk": [2, 3],
    "users": [
        {"user": "", "target": "It", "hit": {"2": 1, "3": 1}, "ndcg": {"2": 0.5, "3": 0.5}},
        {"user": "a", "target": "Emma", "hit": {"2": 0, "3": 1}, "ndcg": {"2": 0.0, "3": 0.63}},
    ],
}


@fuzz
@given(spoiled(PER_USER))
def test_read_per_user(folder, content):
    path = written(folder / "SFT.json", content)
    with refused_in_one_line(f"{path}: "):
        read = read_per_user(path)
        for user in read["users"]:
            numbers = [user[measure][str(k)] for measure in ("hit", "ndcg") for k in read["topk"]]
            assert all(type(number) in (int, float) and 0 <= number <= 1 for number in numbers)
        mean_over_seeds([read, read])


@fuzz
@given(spoiled([{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.4}]), st.booleans())
def test_read_training_log(folder, content, of_checkpoint):
    path = written(folder / ("trainer_state.json" if of_checkpoint else "training_log.json"), content)
    if of_checkpoint:
        path.write_bytes(b'{"log_history": ' + content + b"}")
    with refused_in_one_line(f"{path}: "):
        assert all(type(entry["step"]) is int for entry in read_training_log(path))


RUN = {"script": "a.py", "state": "done", "arguments": {}, "inputs": {}, "counts": {}}


@fuzz
@given(spoiled(RUN | {"earlier_runs": {"b.py": RUN | {"script": "b.py"}}}))
def test_recorded_runs(folder, content):
    (folder / "run").mkdir(exist_ok=True)
    path = written(folder / "run" / "run.json", content)
    with refused_in_one_line(f"{path}: "):
        for run in recorded_runs(folder / "run").values():
            assert isinstance(run["state"], str) and isinstance(run["arguments"], dict)


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "base_model_name_or_path": "x",
}


@fuzz
@given(spoiled(ADAPTER), spoiled({"fingerprint": "f", "name": "tiny"}), st.binary(max_size=60) | st.none())
def test_check_adapter(folder, tiny_model, content, base, weights):
    import numpy as np
    from safetensors.numpy import save_file

    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    written(adapter / "adapter_config.json", content)
    written(adapter / "base_model.json", base)
    if weights is None:
        save_file({"x.lora_A.weight": np.zeros((2, 4), np.float32)}, adapter / "adapter_model.safetensors")
    else:
        written(adapter / "adapter_model.safetensors", weights)
    with refused_in_one_line(f"{adapter}"):
        check_adapter(adapter, tiny_model)
        raise AssertionError("no base model has this fingerprint")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

CSV = """Dataset,Model,HR@5,NDCG@5,HR@5_low,Users,Encoder,Protocol,Mine
Books,SFT,0.5,1e-3,0.1,7,e,grounded,x
Books,DPO,,,,,,,
"""
CELLS = st.sampled_from(
    ["NaN", "1e999", "'=1", '"', '""', "\n", ";", "\x00", "HR@" + "9" * 5000, "HR@５", "Model", "٣", "1_0"]
)


@st.composite
def spoiled_table(draw: Callable, text: str) -> bytes:
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(CELLS | TEXTS) + text[at + draw(st.integers(0, 4)) :]
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])), "ignore")
    return content[: draw(st.integers(0, 2 * len(content)))]


@fuzz
@given(st.binary(max_size=60) | spoiled_table(CSV))
def test_read_results(folder, content):
    path = written(folder / "results.csv", content)
    with refused_in_one_line(f"{path}: "):
        table = read_results(path)
        for row in table.rows:
            numbers = [table.number(row, column) for column in table.header]
            assert all(number is None or math.isfinite(number) for number in numbers)
        for dataset in {table.name(row, "Dataset") for row in table.rows}:
            format_results(table, dataset, NOTHING_TESTED)
        mean_rows([table, table])
        before = [[cell for cell in row] for row in table.rows]
        update_results(path, {"Dataset": "New", "Model": "M", "HR@5": 0.5, "Encoder": "e"})
        after = read_results(path)
        kept = [after.header.index(column) for column in table.header if table.header.count(column) == 1]
        for old, new in zip(before, after.rows, strict=False):
            cells = [old[table.header.index(after.header[place])] for place in kept if len(old) == len(table.header)]
            assert not cells or cells == [new[place] for place in kept], "an update changed another row"


@fuzz
@given(st.binary(max_size=60) | spoiled_table("Model,NDCG@5\nSFT,0.5\n"))
def test_published_table(folder, content):
    path = written(folder / "published.csv", content)
    with refused_in_one_line(f"{path}: "):
        table = published_table(path)
        assert all(len(row) == len(table.columns) for row in table.rows)


RATINGS = {
    "u.data": "1\t1\t5\t880000000\n1\t2\t3\t880000001\n2\t1\t4\t880000002\n",
    "u.item": "1|Emma (1996)|01-Jan-1996||http://x|0|1\n2|It (1990)|01-Jan-1990||http://x|1|0\n",
    "u.genre": "Drama|0\nHorror|1\n\n",
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\t5\t880000000\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n1\tEmma\t1996\tDrama\n",
}


@fuzz
@given(st.sampled_from(list(RATINGS)).flatmap(lambda name: st.tuples(st.just(name), spoiled_table(RATINGS[name]))))
def test_read_movielens(folder, spoiling):
    name, content = spoiling
    names = GROUPLENS_FILES if name in GROUPLENS_FILES else ATOMIC_FILES
    source = folder / names[0].replace(".", "_")
    source.mkdir(exist_ok=True)
    for each in names:
        written(source / each, content if each == name else RATINGS[each].encode())
    with refused_in_one_line(*(f"{source / each}: " for each in names)):
        ratings, catalogue = read_movielens(movielens_files(source))
        assert catalogue.titles and set(catalogue.genres) == set(catalogue.titles)
        for rating in ratings:
            assert rating.user and rating.title in catalogue and 0 <= rating.stars <= 5 and 0 <= rating.time < 10**12


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


@fuzz
@given(st.lists(TEXTS | st.from_regex(r"(in|out|all|im):[a-z_]{1,12}(:[0-9]{1,5000})?", fullmatch=True), max_size=3))
def test_selectors(words):
    try:
        selectors = parse_negatives(words)
    except InputError:
        return
    assert parse_negatives(map(str, selectors)) == selectors and all(selector.count >= 1 for selector in selectors)


@fuzz
@given(st.text(st.sampled_from('ab" ,\n\t\x00😀ש'), max_size=60))
def test_titles_out_of_any_text(text):
    titles = quoted_titles(text)
    assert len(titles) == text.count('"') // 2 and all(f'"{title}"' in text for title in titles)
    assert predicted_title(text).strip() and '"' not in predicted_title(text)


@fuzz
@given(TEXTS, st.lists(TEXTS, max_size=12), st.integers(-5, 400))
def test_a_prompt_of_any_text_fits_or_is_refused(tokenizer, instruction, titles, room):
    prompt = Record(instruction, ", ".join(f'"{title}"' for title in titles), '"x"').prompt
    try:
        shorter, dropped = shorten_prompt(tokenizer, prompt, room)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert len(tokenizer(shorter).input_ids) <= room and shorter.endswith("### Response:\n")
    assert shorter.startswith(f"### Instruction:\n{instruction}\n") and (dropped > 0) == (shorter != prompt)
