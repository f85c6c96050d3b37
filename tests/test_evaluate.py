"""evaluate.py as a user runs it: the published figures, a tiny encoder, and what is refused."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cebs import grounding
from cebs.files import PROJECT
from cebs.grounding import ground
from cebs.predictions import find_predictions
from evaluate import ScriptArguments, default_method, encoder_name, main, make_parser
from utils import InputError, read_json, sha256, write_json

SHARED = PROJECT.parent / "shared"
CATALOGUE = {
    "Emma": ["romance"],
    "Dune": ["fantasy", "science"],
    "It": ["horror"],
    "The Hobbit": ["fantasy"],
    "Dracula": ["horror", "romance"],
    "Ivanhoe": [],
}
TITLES = list(CATALOGUE)


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "Books"
    write_json(folder / "name2genre.json", CATALOGUE)
    write_json(folder / "name2id.json", {title: place for place, title in enumerate(TITLES)})
    write_json(folder / "id2name.json", {str(place): title for place, title in enumerate(TITLES)})
    write_json(folder / "genre_dict.json", {"romance": 0, "fantasy": 0, "horror": 0})
    return folder


def record(prediction='"Emma"\n', ground_truth="Dune", prompt='Books: "It", "Emma"', **more):
    return {"prompt": prompt, "prediction": prediction, "ground_truth": ground_truth, **more}


def arguments(tmp_path, predictions, encoder="no-encoder-needed", **more):
    settings = {
        "predictions": str(predictions),
        "data_dir": str(tmp_path / "Books"),
        "encoder": str(encoder),
        "topk": [2, 3],
        "results_csv": str(tmp_path / "out" / "results.csv"),
        "metrics_json": str(tmp_path / "out" / "metrics.json"),
        "cache_dir": str(tmp_path / "cache"),
        "bootstrap": 0,
        "seed": 42,
    }
    return ScriptArguments(**(settings | more))


def rows(tmp_path):
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# The published figures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept_embeddings(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


@pytest.mark.skipif(not (SHARED / "evaluation").is_dir(), reason="the published predictions (../shared) are not here")
@pytest.mark.parametrize("name", ["sft_tuned", "dpo_random_negative"])
def test_published_predictions_give_the_published_figures(name, tmp_path, kept_embeddings):
    main(
        arguments(
            tmp_path,
            SHARED / "evaluation" / f"{name}_predictions.json",
            SHARED / "encoders" / "paraphrase-MiniLM-L3-v2",
            data_dir=str(SHARED / "goodreads"),
            dataset="Goodreads",
            topk=[5, 10],
            cache_dir=str(kept_embeddings),
        )
    )
    expected = read_json(SHARED / "evaluation" / "expected.json")[name]
    metrics = read_json(tmp_path / "out" / "metrics.json")
    (row,) = rows(tmp_path)
    assert (row["Dataset"], row["Model"]) == ("Goodreads", f"{name}_predictions")
    for at_k, figures in expected.items():
        assert metrics[at_k].keys() == figures.keys()
        for metric, figure in figures.items():
            assert round(metrics[at_k][metric], 4) == round(figure, 4), (metric, at_k)
            column = {"NotInRatio": "NotInRatio", "users": "Users"}.get(metric, metric + at_k)
            assert float(row[column]) == metrics[at_k][metric]


@pytest.mark.skipif(not (SHARED / "evaluation").is_dir(), reason="the published predictions (../shared) are not here")
def test_the_published_rows_cannot_be_told_apart(tmp_path, kept_embeddings, capsys):
    """HR@10 of 0.010 and 0.012 with a thousand users: two hits."""
    for name, method in (("sft_tuned", "SFT"), ("dpo_random_negative", "DPO-RN")):
        main(
            arguments(
                tmp_path,
                SHARED / "evaluation" / f"{name}_predictions.json",
                SHARED / "encoders" / "paraphrase-MiniLM-L3-v2",
                data_dir=str(SHARED / "goodreads"),
                method=method,
                topk=[5, 10],
                bootstrap=200,
                cache_dir=str(kept_embeddings),
            )
        )
    sft, dpo = rows(tmp_path)
    assert (sft["HR@10"], dpo["HR@10"]) == ("0.01", "0.012")
    assert float(dpo["HR@10_low"]) < 0.01 and 0.012 < float(sft["HR@10_high"])
    printed = capsys.readouterr().out
    assert "DPO-RN: no difference from SFT can be seen with 1000 users" in printed and "0.012†" not in printed
    assert "the smallest difference in HR@10 that this test set could have shown: 0.0078" in printed


# ---------------------------------------------------------------------------------------------------------------------
# The real command line
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, data_dir, encoder):
    folder = tmp_path / "runs" / "my method" / "predictions"
    records = [record(), record("no quotes\nat all", "Nowhere"), record("", prompt="nothing read"), record('"Emma"')]
    write_json(folder / "raw_results_4.json", records)
    command = [sys.executable, str(PROJECT / "evaluate.py"), "--predictions", "runs/my method/predictions"]
    command += ["--data_dir", "Books", "--encoder", str(encoder), "--topk", "3", "50", "--cache_dir", "cache"]
    command += ["--metrics_json", "m.json", "--seed", "7"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no load reports, no warnings
    assert "NDCG↑" in result.stdout and "DGU↓" in result.stdout
    with (tmp_path / "output" / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["Dataset"], row["Model"], row["Encoder"]) == ("Books", "my method", "tiny-encoder")
    assert (row["Users"], row["NotInRatio"], row["Protocol"]) == ("4", "0.5", "grounded")
    assert row["HR@50"] == "0.75"  # k beyond the catalogue: everything but the target that is not in it
    assert row["DivRatio@50"] == repr(6 / (3 * 50))
    metrics = read_json(tmp_path / "m.json")
    assert metrics["@3"]["users"] == 4 and metrics["targets_in_catalogue"] == 3
    assert metrics["arguments"]["seed"] == 7 and len(metrics["predictions"]["sha256"]) == 64
    low, high = metrics["intervals"]["HR@50"]
    assert (row["HR@50_low"], row["HR@50_high"]) == (repr(low), repr(high)) and low <= 0.75 <= high
    assert (tmp_path / "output/per_user/Books/my method.json").is_file()


def test_bad_input_on_the_command_line(tmp_path):
    command = [sys.executable, str(PROJECT / "evaluate.py"), "--predictions", "none.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("evaluate.py: error: none.json: no such file") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_the_end_of_the_chain():
    (script_args,) = make_parser().parse_args_and_config([])
    assert script_args.predictions == "output/cluster_exposure/two_negatives/predictions"
    assert (script_args.data_dir, script_args.encoder) == ("sampled_data/ml-100k", "all-MiniLM-L6-v2")
    assert (script_args.topk, script_args.results_csv) == ([5, 10], "output/results.csv")
    assert (script_args.bootstrap, script_args.reference, script_args.exclude_history) == (1000, None, False)


def test_default_names(tmp_path):
    assert (
        default_method(Path("output/cluster_exposure/two_negatives/predictions/raw_results_9.json")) == "two_negatives"
    )
    assert default_method(Path("elsewhere/sft.json")) == "sft"
    assert encoder_name("sentence-transformers/all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert encoder_name(f"{tmp_path}/") == tmp_path.name


def test_a_folder_stands_for_its_one_file(tmp_path):
    with pytest.raises(InputError, match="no raw_results"):
        find_predictions(str(tmp_path))
    (tmp_path / "raw_results_5.json").write_text("[]")
    assert find_predictions(str(tmp_path)) == tmp_path / "raw_results_5.json"
    (tmp_path / "raw_results_6.json").write_text("[]")
    with pytest.raises(InputError, match="raw_results_5.json, raw_results_6.json"):
        find_predictions(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Rankings and grounding
# ---------------------------------------------------------------------------------------------------------------------


def test_a_ranking_is_taken_as_it_stands_and_needs_no_encoder(tmp_path, data_dir):
    records = [
        record(ranking=["It", "Dune", "Emma"]),
        record('"Nowhere"', "Emma", ranking=["Dune", "Emma", "Ivanhoe", "It"]),
        record(ground_truth='"Dracula"\n', ranking=TITLES),
        record(ground_truth="Not a title", ranking=TITLES),
    ]
    write_json(tmp_path / "popularity.json", records)
    main(arguments(tmp_path, tmp_path / "popularity.json"))
    (row,) = rows(tmp_path)
    assert (row["Model"], row["Encoder"], row["Protocol"]) == ("popularity", "", "ranked")
    assert (row["HR@2"], row["HR@3"], row["NotInRatio"], row["Users"]) == ("0.5", "0.5", "0.25", "4")
    assert float(row["NDCG@3"]) == pytest.approx(2 * np.log(2) / np.log(3) / 4)
    assert row["Diversity@3"] == "4" and row["DivRatio@3"] == repr(4 / 9)
    # of It, Dune, Emma; Dune, Emma, Ivanhoe; Emma, Dune, It against It and Emma four times each:
    # P = romance 3, fantasy 3, horror 2 of 8; H = romance and horror a half each
    assert float(row["DGU@3"]) == pytest.approx(3 / 8 + 2 / 8)


def test_grounded_and_ranked_records_in_one_file(tmp_path, data_dir, encoder):
    records = [record('"It"', "It"), record(ground_truth="Dune", ranking=["Dune", "Emma", "It"])]
    write_json(tmp_path / "both.json", records)
    main(arguments(tmp_path, tmp_path / "both.json", encoder))
    (row,) = rows(tmp_path)
    assert (row["NDCG@2"], row["Protocol"], row["Encoder"]) == ("1.0", "mixed", "tiny-encoder")


def test_no_target_in_the_catalogue_and_no_history(tmp_path, data_dir, capsys):
    write_json(tmp_path / "p.json", [record(ground_truth="Nowhere", prompt="-", ranking=TITLES)])
    main(arguments(tmp_path, tmp_path / "p.json"))
    (row,) = rows(tmp_path)
    assert row["HR@2"] == row["NDCG@2"] == row["Diversity@2"] == row["HR_tail@2"] == ""
    assert row["DivRatio@2"] == row["DGU@2"] == row["MGU@2"] == row["ORRatio@2"] == ""
    assert read_json(tmp_path / "out" / "metrics.json")["@2"]["DGU"] is None
    assert "no target" in capsys.readouterr().out


def test_grounding_equals_plain_distances(tmp_path, encoder):
    from sentence_transformers import SentenceTransformer

    predictions = ["Emma", "emma woodhouse", "Dune 2", "NAN", "Emma", "emma woodhouse"]
    nearest = ground(predictions, TITLES, encoder, 4, tmp_path)
    model = SentenceTransformer(str(encoder))
    distances = np.linalg.norm(model.encode(predictions)[:, None] - model.encode(TITLES)[None], axis=-1)
    assert nearest.tolist() == distances.argsort(axis=1, kind="stable")[:, :4].tolist()
    assert nearest[0, 0] == TITLES.index("Emma")


def test_the_catalogue_is_encoded_once_for_each_encoder_and_catalogue(tmp_path, encoder, monkeypatch):
    encoded = []

    def counting(encoder, texts, description, encode_texts=grounding.encode_texts):
        encoded.append(list(texts))
        return encode_texts(encoder, texts, description)

    monkeypatch.setattr(grounding, "encode_texts", counting)
    first = ground(["hobbit"], TITLES, encoder, 3, tmp_path / "cache")
    assert encoded == [TITLES, ["hobbit"]]
    encoded.clear()
    assert ground(["hobbit"], TITLES, encoder, 3, tmp_path / "cache").tolist() == first.tolist()
    assert encoded == [["hobbit"]]  # the catalogue comes from the cache

    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-20], whole[:-8] + b"\x00" * 8, b"\xff" * len(whole)):
        file.write_bytes(damaged)
        encoded.clear()
        assert ground(["hobbit"], TITLES, encoder, 3, tmp_path / "cache").tolist() == first.tolist()
        assert encoded == [TITLES, ["hobbit"]]
        assert file.read_bytes() == whole

    encoded.clear()
    ground(["Emma"], TITLES[::-1], encoder, 3, tmp_path / "cache")
    other = shutil.copytree(encoder, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    ground(["Emma"], TITLES, other, 3, tmp_path / "cache")
    assert encoded == [TITLES[::-1], TITLES]  # another order, another encoder
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_weights_that_are_not_needed_are_not_reported(tmp_path, encoder, caplog):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoder, tmp_path / "extra")
    weights = load_file(folder / "model.safetensors")
    some = next(iter(weights))
    save_file(weights | {"another.part": weights[some].clone()}, folder / "model.safetensors", {"format": "pt"})
    grounding.load_encoder(folder)
    assert "UNEXPECTED" not in caplog.text
    weights.pop("embeddings.word_embeddings.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    grounding.load_encoder(folder)
    assert "MISSING" in caplog.text  # these embeddings would be random: say so


# ---------------------------------------------------------------------------------------------------------------------
# The history left out
# ---------------------------------------------------------------------------------------------------------------------


def recommended(tmp_path, method):
    return [user["recommended"] for user in read_json(tmp_path / f"out/per_user/Books/{method}.json")["users"]]


def test_titles_of_the_history_are_left_out(tmp_path, data_dir, encoder):
    """Of the six titles the second record has read five: its list is one title long."""
    read = "Read: " + ", ".join(f'"{title}"' for title in TITLES[:5])
    records = [record('"Emma"'), record('"Emma"', "Ivanhoe", prompt=read), record('"Emma"', "Emma")]
    write_json(tmp_path / "p.json", records)
    for exclude_history in (False, True):
        more = {"exclude_history": exclude_history, "method": str(exclude_history), "topk": [3]}
        main(arguments(tmp_path, tmp_path / "p.json", encoder, **more))
    whole, without = recommended(tmp_path, "False"), recommended(tmp_path, "True")
    nearest = [TITLES[title] for title in ground(["Emma"], TITLES, encoder, 6, tmp_path / "cache")[0]]
    assert whole == [nearest[:3]] * 3
    assert without[0] == without[2] == [title for title in nearest if title not in ("It", "Emma")][:3]
    assert without[1] == ["Ivanhoe"]
    row_whole, row = rows(tmp_path)
    assert (row_whole["Protocol"], row["Protocol"]) == ("grounded", "grounded, no history")
    assert (row["Diversity@3"], row["DivRatio@3"]) == (
        str(len({*without[0], "Ivanhoe"})),
        repr(len({*without[0], "Ivanhoe"}) / 9),
    )
    assert float(row["HR@3"]) == (("Dune" in without[0]) + 1 + 0) / 3  # the last target is in its own history


def test_rankings_lose_their_history_too(tmp_path, data_dir):
    write_json(tmp_path / "p.json", [record(ranking=["It", "Dune", "Emma", "Dracula", "Ivanhoe"])])
    main(arguments(tmp_path, tmp_path / "p.json", exclude_history=True))
    assert recommended(tmp_path, "p") == [["Dune", "Dracula", "Ivanhoe"]]
    assert rows(tmp_path)[0]["Protocol"] == "ranked, no history"
    write_json(tmp_path / "q.json", [record(ranking=["It", "Dune", "Emma", "Dracula"])])
    with pytest.raises(
        InputError, match="q.json: record 0: its ranking has 2 titles that are not in its history, fewer"
    ):
        main(arguments(tmp_path, tmp_path / "q.json", exclude_history=True))


def test_predictions_of_a_run_that_was_not_finished_are_refused(tmp_path, data_dir):
    folder = tmp_path / "run"
    write_json(folder / "predictions/raw_results_1.json", [record(ranking=["Dune", "The Hobbit", "Dracula"])])
    run = {"script": "generate_predict_batch.py", "state": "interrupted", "arguments": {}, "inputs": {}}
    write_json(folder / "run.json", run)
    with pytest.raises(InputError, match="raw_results_1.json: generate_predict_batch.py is interrupted in .*run; run"):
        main(arguments(tmp_path, folder / "predictions"))
    assert not (tmp_path / "out").exists()
    write_json(folder / "run.json", run | {"script": "sft_smol.py"})  # of the same folder, and no matter here
    main(arguments(tmp_path, folder / "predictions"))


def test_rankings_made_without_the_history_say_so(tmp_path, data_dir):
    folder = tmp_path / "popularity"
    write_json(folder / "predictions/raw_results_1.json", [record(ranking=["Dune", "The Hobbit", "Dracula"])])
    run = {"script": "predict_baselines.py", "state": "done", "inputs": {}, "counts": {}}
    for excluded, protocol in ((True, "ranked, no history"), (False, "ranked")):
        write_json(folder / "run.json", run | {"arguments": {"exclude_history": excluded}})
        main(arguments(tmp_path, folder / "predictions"))
        assert rows(tmp_path)[0]["Protocol"] == protocol


# ---------------------------------------------------------------------------------------------------------------------
# What each user got, intervals, and tests
# ---------------------------------------------------------------------------------------------------------------------


def write_training_records(data_dir, *targets):
    texts = {"instruction": "Recommend.", "input": 'Books: "Emma"'}
    write_json(data_dir / "train_sample.json", [texts | {"output": f'"{target}"\n'} for target in targets])


def test_what_each_user_got(tmp_path, data_dir):
    write_training_records(data_dir, "Dune", "Nowhere")
    records = [
        record('"Emma"\n', "Dune", ranking=["It", "Dune", "Emma"], user="a"),
        record('"Cats"', "Nowhere", ranking=["It", "Dune", "Emma"], user=7),
        record('"It"', '"Emma"\n', ranking=["Emma", "It", "Dune"]),
    ]
    write_json(tmp_path / "p.json", records)
    main(arguments(tmp_path, tmp_path / "p.json", per_user=str(tmp_path / "users.json"), method="a/b"))
    content = read_json(tmp_path / "users.json")
    assert content == read_json(tmp_path / "out/per_user/Books/a%2Fb.json")
    users = content.pop("users")
    assert content == {
        "dataset": "Books",
        "method": "a/b",
        "protocol": "ranked",
        "encoder": None,
        "topk": [2, 3],
        "seed": 42,
        "data_dir": str(data_dir),
        "predictions": {"file": str(tmp_path / "p.json"), "sha256": sha256(tmp_path / "p.json")},
    }
    ndcg = math.log(2) / math.log(3)
    assert users == [
        {
            "record": 0,
            "user": "a",
            "target": "Dune",
            "target_exposure": 1,
            "exposure_group": "tail",
            "rank": 1,
            "hit": {"2": 1, "3": 1},
            "ndcg": {"2": pytest.approx(ndcg), "3": pytest.approx(ndcg)},
            "prediction": "Emma",
            "in_catalogue": True,
            "recommended": ["It", "Dune", "Emma"],
        },
        {
            "record": 1,
            "user": "7",
            "target": "Nowhere",
            "target_exposure": 1,
            "exposure_group": "tail",
            "rank": None,
            "hit": {"2": 0, "3": 0},
            "ndcg": {"2": 0.0, "3": 0.0},
            "prediction": "Cats",
            "in_catalogue": False,
            "recommended": ["It", "Dune", "Emma"],
        },
        {
            "record": 2,
            "user": "",
            "target": "Emma",
            "target_exposure": 2,
            "exposure_group": "head",
            "rank": 0,
            "hit": {"2": 1, "3": 1},
            "ndcg": {"2": 1.0, "3": 1.0},
            "prediction": "It",
            "in_catalogue": True,
            "recommended": ["Emma", "It", "Dune"],
        },
    ]
    (row,) = rows(tmp_path)
    assert (row["HR_tail@3"], row["HR_head@3"], row["HR_middle@3"]) == ("0.5", "1.0", "")
    empty = "NDCG_middle@2, HR_middle@2, NDCG_middle@3, HR_middle@3"
    assert row["Notes"] == f"{empty}: no target in the catalogue is of the middle"


def test_what_each_user_got_as_parquet(tmp_path, data_dir):
    from pyarrow import parquet

    write_json(tmp_path / "p.json", [record(ranking=TITLES), record(ground_truth="-", ranking=TITLES)])
    main(arguments(tmp_path, tmp_path / "p.json", per_user=str(tmp_path / "deep/users.parquet")))
    content = read_json(tmp_path / "out/per_user/Books/p.json")
    table = parquet.read_table(tmp_path / "deep/users.parquet")
    assert table.to_pylist() == content.pop("users")
    assert json.loads(table.schema.metadata[b"evaluation"]) == content
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/users.parquet"]


def test_without_training_records_exposure_is_not_known(tmp_path, data_dir, capsys):
    write_json(tmp_path / "p.json", [record(ranking=TITLES)])
    main(arguments(tmp_path, tmp_path / "p.json"))
    (row,) = rows(tmp_path)
    assert row["Coverage@2"] == row["HR_tail@2"] == "" and row["Gini@2"] != ""
    assert row["Notes"] == "Coverage and accuracy by exposure: the data folder has no train_sample.json"
    assert f"note: {row['Notes']}" in capsys.readouterr().out
    (user,) = read_json(tmp_path / "out/per_user/Books/p.json")["users"]
    assert (user["target_exposure"], user["exposure_group"]) == (None, "")


def test_intervals_are_seeded_and_draw_whole_users(tmp_path, data_dir):
    """Each user's records all hit or all miss: five users know less than fifty records of as many."""
    hit, miss = ["Dune", "It", "Emma"], ["It", "Emma", "Ivanhoe"]

    def interval(name, users, seed=42):
        records = [record(ranking=hit if index % 5 < 3 else miss, user=users(index)) for index in range(50)]
        write_json(tmp_path / f"{name}.json", records)
        main(arguments(tmp_path, tmp_path / f"{name}.json", bootstrap=500, seed=seed))
        row = next(row for row in rows(tmp_path) if row["Model"] == name)
        assert float(row["HR@3"]) == 0.6
        return float(row["HR@3_low"]), float(row["HR@3_high"])

    alone = interval("alone", lambda index: "")
    of_five = interval("of five", lambda index: index % 5)
    assert of_five[1] - of_five[0] > 2 * (alone[1] - alone[0])
    assert interval("again", lambda index: "") == alone
    assert interval("numbered", lambda index: index) == alone
    assert interval("other seed", lambda index: "", seed=1) != alone


def test_an_interval_that_cannot_be_had_is_empty_and_says_why(tmp_path, data_dir):
    write_json(tmp_path / "p.json", [record(ranking=["It", "Emma", "Ivanhoe"])] * 4)
    main(arguments(tmp_path, tmp_path / "p.json", bootstrap=50))
    (row,) = rows(tmp_path)
    assert (row["HR@2"], row["HR@2_low"], row["HR@2_high"]) == ("0.0", "", "")
    assert "NDCG@2, HR@2" in row["Notes"] and "no interval, for the resamples do not differ" in row["Notes"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_an_empty_catalogue(tmp_path, data_dir):
    write_json(tmp_path / "p.json", [record()])
    for name in ("name2genre", "name2id", "id2name"):
        write_json(data_dir / f"{name}.json", {})
    with pytest.raises(InputError, match="name2genre.json: expected a JSON object that is not empty"):
        main(arguments(tmp_path, tmp_path / "p.json"))


def test_an_encoder_that_is_none(tmp_path, data_dir, encoder):
    broken = shutil.copytree(encoder, tmp_path / "broken")
    (broken / "modules.json").write_text("[]")
    write_json(tmp_path / "p.json", [record()])
    with pytest.raises(InputError, match="broken: cannot be loaded as a sentence encoder: "):
        main(arguments(tmp_path, tmp_path / "p.json", broken))
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="broken/model.safetensors: is damaged or cut short"):
        main(arguments(tmp_path, tmp_path / "p.json", broken))
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_an_unknown_flag_is_an_error(refusal):
    assert "did you mean topk" in refusal("evaluate", "--top_k", "5")
