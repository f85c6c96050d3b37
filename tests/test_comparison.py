"""The graph of the comparison, and its runner: what is shared, resumed, left out and said."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cebs.comparison import chosen_rows, is_done, main, make_parser, order_rows, run_stages
from cebs.files import PROJECT
from cebs.plan import Plan, Settings, Stage, read_description, slug
from utils import InputError, read_json

DESCRIPTION = PROJECT / "configs/comparison.yaml"


@pytest.fixture(scope="module")
def description() -> dict:
    return read_description(DESCRIPTION)


def make_plan(description: dict, *rows: str, data_dir: str = "data", iterations: int = 2) -> Plan:
    settings = Settings(
        data_dir=data_dir,
        model_name_or_path="model",
        encoder="encoder",
        output=Path("out"),
        results_csv=Path("out/results.csv"),
        sizes={"train": 8, "preferences": 4, "valid": 2, "test": 3},
        seed=7,
        iterations=iterations,
    )
    plan = Plan(description, settings)
    for row in rows:
        plan.add_row(row)
    return plan


# -- The graph --------------------------------------------------------------------------------------------------------


def test_every_stage_comes_after_what_it_reads(description):
    plan = make_plan(description, *description["rows"])
    places = {name: place for place, name in enumerate(plan.stages)}
    for name, stage in plan.stages.items():
        assert all(places[before] < places[name] for before in stage.after), name
    results = [stage.result for stage in plan.stages.values()]
    assert len(set(results)) == len(results), "two stages have one result"


def test_every_file_that_a_stage_reads_is_the_result_of_a_stage_before_it(description):
    plan = make_plan(description, *description["rows"])
    for stage in plan.stages.values():
        flags = dict(zip(stage.command, stage.command[1:], strict=False))
        results = {str(plan.stages[name].result) for name in stage.after}
        for flag in ("--adapter", "--train_data", "--candidates", "--predictions"):
            assert flags.get(flag, "") == "" or flags[flag] in results, (stage.name, flag)


@pytest.mark.parametrize("name", ["comparison", "recipe", "recipe_negatives"])
def test_the_commands_are_what_the_scripts_take(name):
    """Each command of the whole graph goes through the parser of its script."""
    import importlib

    description = read_description(PROJECT / f"configs/{name}.yaml")
    for stage in make_plan(description, *description["rows"]).stages.values():
        script = importlib.import_module(stage.command[0].removesuffix(".py"))
        script.make_parser().parse_args_and_config(stage.command[1:])


def test_rows_share_one_sft_and_one_generation_of_candidates(description):
    plan = make_plan(description, "SFT", "ClusterIn", "ClusterOut-LowExposure", "Two negatives", "Base ClusterIn")
    scripts = [stage.command[0] for stage in plan.stages.values()]
    assert scripts.count("sft_smol.py") == 1
    generations = [stage for stage in plan.stages.values() if "--candidate_source" in stage.command]
    assert len(generations) == 1
    chosen = [name for name in plan.stages if name.startswith("negatives/")]
    assert len(chosen) == 3, "ClusterIn and Base ClusterIn train on the same data"


def test_the_base_rows_train_without_an_adapter(description):
    command = make_plan(description, "Base ClusterIn").stages["base_clusterin/train"].command
    assert command[command.index("--adapter") + 1] == ""


def test_a_curriculum_trains_on_the_adapter_of_its_first_training(description):
    stages = make_plan(description, "Curriculum").stages
    first, second = stages["curriculum/train_1"], stages["curriculum/train"]
    assert str(first.result) in second.command
    assert second.result == Path("out/curriculum/final_model")


@pytest.mark.parametrize("iterations", [1, 3])
def test_iterated_self_play_predicts_tunes_and_aligns_in_each_round(description, iterations):
    stages = make_plan(description, "SPRec iterated", iterations=iterations).stages
    own = [stage for stage in stages.values() if "sprec_iterated" in str(stage.result)]
    scripts = [stage.command[0] for stage in own]
    rounds = ["dataset_generate.py", "sft_smol.py", "DPO_from_dpoData.py"] * iterations
    assert scripts == [*rounds, "generate_predict_batch.py", "evaluate.py"]
    for before, after in zip(own[2::3], own[3::3], strict=False):
        assert str(before.result) in after.command, "a round begins with the model of the round before"


def test_no_training_reads_from_inside_the_folder_that_it_writes(description):
    """A folder at work counts as unfinished, and so does what lies right below it (`cebs.runs.require_done`)."""
    for stage in make_plan(description, *description["rows"]).stages.values():
        flags = dict(zip(stage.command, stage.command[1:], strict=False))
        for flag in ("--adapter", "--train_data"):
            if stage.command[0] == "DPO_from_dpoData.py" and flags[flag]:
                assert Path(flags["--output_dir"]) not in Path(flags[flag]).parents[:2], stage.name


def test_random_negatives_wait_for_no_model(description):
    stage = make_plan(description, "DPO-RN").stages["negatives/random"]
    assert stage.after == ["downloads"] and "--model_name_or_path" not in stage.command


def test_a_fused_row_needs_the_predictions_of_its_parts_and_shares_them():
    description = read_description(PROJECT / "configs/recipe.yaml")
    stages = make_plan(description, *description["rows"]).stages
    assert stages["sft_itemknn/predict"].after == ["sft/predict", "itemknn/predict"]
    assert set(stages) == set(make_plan(description, "SFT + ItemKNN + SASRec", *description["rows"]).stages)
    stages = make_plan(description, *description["main_job"]).stages
    assert sum(stage.command[0] == "generate_predict_batch.py" for stage in stages.values()) == 1


def test_one_model_can_be_judged_by_two_protocols():
    """A row with the model of another predicts by its own flags, and trains nothing."""
    description = read_description(PROJECT / "configs/recipe_negatives.yaml")
    alone = make_plan(description, "ClusterIn").stages
    both = make_plan(description, "ClusterIn", "ClusterIn, grounded").stages
    assert set(both) - set(alone) == {"clusterin_grounded/predict", "clusterin_grounded/evaluate"}
    ranked, grounded = (both[f"{row}/predict"] for row in ("clusterin", "clusterin_grounded"))
    assert ranked.after == grounded.after == ["clusterin/train"]
    assert "constrained_beam" in ranked.command and "--exclude_history" in ranked.command
    assert "constrained_greedy" in grounded.command and "--exclude_history" not in grounded.command
    assert set(make_plan(description, "ClusterIn, grounded").stages) == set(both) - {
        "clusterin/predict",
        "clusterin/evaluate",
    }


def test_movielens_is_made_where_no_data_folder_is_given(description):
    assert "data" in make_plan(description, "Origin", data_dir="").stages
    assert "data" not in make_plan(description, "Origin").stages


def test_a_row_can_be_asked_for_by_its_folder_name(description):
    assert chosen_rows(["two_negatives", "SFT"], [], description) == ["SFT", "Two negatives"]
    with pytest.raises(InputError, match="no such row; there are: .*ClusterIn"):
        chosen_rows(["ClusterInn"], [], description)


def test_row_names_have_folders_of_their_own(description):
    assert len({slug(row) for row in description["rows"]}) == len(description["rows"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("flags"), "section 'flags' is missing"),
        (lambda d: d["rows"].update(New={"strat": "sft"}), "row 'New': unknown key 'strat'"),
        (lambda d: d["rows"].update(New={"start": "dpo"}), "row 'New': start must be origin or sft"),
        (lambda d: d["rows"].update(New={"start": "sft", "candidates": "mcts"}), "no candidates 'mcts'"),
        (lambda d: d["rows"].update(New={"fuse": ["SFT", "Nobody"]}), "row 'New': fuse names 'Nobody'"),
        (lambda d: d["rows"].update(New={"fuse": ["New"]}), "row 'New': fuse names 'New', which is no row with"),
        (lambda d: d["rows"].update(New={"fuse": ["ItemKNN", "SFT"]}), "fuse names 'SFT', which predicts one title"),
        (lambda d: d["rows"].update(New={"model_of": "Nobody"}), "row 'New': model_of names 'Nobody', which is no row"),
        (
            lambda d: d["rows"].update(New={"model_of": "ItemKNN"}),
            "model_of names 'ItemKNN', which is no row with a start",
        ),
        (lambda d: d["rows"].update(New={"model_of": "New"}), "model_of names 'New', which is no row with a start"),
        (lambda d: d["rows"].update(New={"model_of": "SFT", "predict": "'"}), "row 'New': predict: must be flags"),
        (lambda d: d["rows"].update(New={"start": "sft", "choose": "'"}), "row 'New': choose: must be flags"),
        (lambda d: d["sizes"].update(tiny={"train": 1}), "size 'tiny': needs train, preferences"),
        (lambda d: d["main_job"].append("New"), "main_job: there is no row 'New'"),
    ],
)
def test_a_wrong_description_is_told_by_row(tmp_path, change, message):
    description = yaml.safe_load(DESCRIPTION.read_text(encoding="utf-8"))
    change(description)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(description), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_description(path)


# -- The runner -------------------------------------------------------------------------------------------------------


def writes(name: str, folder: Path, after: tuple[str, ...] = (), code: str = "") -> Stage:
    """A stage that adds a line to its result."""
    path = folder / f"{name}.txt"
    return Stage(name, ["-c", f"{code}\nopen({str(path)!r}, 'a').write('x')"], list(after), path, 1.0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_done_is_skipped_and_what_follows_a_new_result_is_not(tmp_path, jobs):
    stages = [writes("a", tmp_path), writes("b", tmp_path, ("a",)), writes("c", tmp_path)]
    assert run_stages({tmp_path: stages}, jobs) == {}
    assert run_stages({tmp_path: stages}, jobs) == {}
    assert [stage.result.read_text() for stage in stages] == ["x", "x", "x"]
    stages[0].result.unlink()
    assert run_stages({tmp_path: stages}, jobs) == {}
    assert [stage.result.read_text() for stage in stages] == ["x", "xx", "x"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_a_stage_is_being_started_leaves_no_process_behind(tmp_path, monkeypatch, signum):
    """It ran on, and the next start found its folder taken."""
    started = []

    def interrupted_start(*args, start=subprocess.Popen, **kwargs):
        started.append(start(*args, **kwargs))
        os.kill(os.getpid(), signum)
        return started[0]

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line has it
    monkeypatch.setattr(subprocess, "Popen", interrupted_start)
    try:
        with pytest.raises(KeyboardInterrupt, match=signum.name):
            run_stages({tmp_path: [writes("a", tmp_path, code="import time; time.sleep(60)")]}, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0].poll() is not None


def test_another_command_line_is_another_stage(tmp_path):
    run_stages({tmp_path: [writes("a", tmp_path)]}, 1)
    run_stages({tmp_path: [writes("a", tmp_path, code="# changed")]}, 1)
    assert (tmp_path / "a.txt").read_text() == "xx"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_takes_along_what_needs_it_and_nothing_else(tmp_path, capfd, jobs):
    fails = writes("bad", tmp_path, code="raise SystemExit(2)")
    stages = [
        fails,
        writes("needs", tmp_path, ("bad",)),
        writes("needs_that", tmp_path, ("needs",)),
        writes("c", tmp_path),
    ]
    missing = run_stages({tmp_path: stages}, jobs)
    assert missing["bad"].startswith("exit code 2")
    assert missing["needs"] == "not run, for want of bad"
    assert missing["needs_that"] == "not run, for want of needs"
    assert (tmp_path / "c.txt").exists()
    mended = [writes("bad", tmp_path), *stages[1:]]
    assert run_stages({tmp_path: mended}, jobs) == {}
    assert (tmp_path / "c.txt").read_text() == "x"


def test_seeds_run_side_by_side_and_what_they_share_runs_once(tmp_path):
    """Each second stage waits for the other seed's: one after the other, they would wait for ever."""
    one, two = tmp_path / "seed_1", tmp_path / "seed_2"
    meet = (
        "import time; from pathlib import Path; Path({0!r}).touch()\nwhile not Path({1!r}).exists(): time.sleep(0.01)"
    )
    plans = {}
    for here, there in ((one, two), (two, one)):
        code = meet.format(str(here / "here"), str(there / "here"))
        plans[here] = [writes("downloads", tmp_path), writes("sft", here, ("downloads",), code)]
    assert run_stages(plans, 2) == {}
    assert [(folder / "sft.txt").read_text() for folder in plans] == ["x", "x"]
    assert run_stages({two: plans[two]}, 1) == {}
    plans[tmp_path / "seed_3"] = [writes("downloads", tmp_path), writes("bad", tmp_path, ("downloads",), "exit(3)")]
    missing = run_stages(plans, 2)
    assert list(missing) == [f"{tmp_path / 'seed_3'}: bad"]
    assert (tmp_path / "downloads.txt").read_text() == (one / "sft.txt").read_text() == "x"


def test_a_stage_that_was_killed_is_run_again(tmp_path):
    kill = "import os, signal, pathlib; p = pathlib.Path('{0}'); first = not p.exists(); p.touch()\n"
    kill += "if first: os.kill(os.getpid(), signal.SIGKILL)"
    stage = writes("a", tmp_path, code=kill.format(tmp_path / "was_here"))
    assert run_stages({tmp_path: [stage]}, 1) == {"a": "exit code -9"}
    assert not is_done(stage, tmp_path / ".stages/a.txt")
    assert run_stages({tmp_path: [stage]}, 1) == {}


def test_rows_are_put_in_the_order_of_the_description(tmp_path):
    csv = tmp_path / "results.csv"
    csv.write_text("Dataset,Model\nd,mine\nd,SFT\nd,Origin\n")
    order_rows(csv, ["Origin", "SFT"])
    assert csv.read_text() == "Dataset,Model\nd,Origin\nd,SFT\nd,mine\n"


# -- The command ------------------------------------------------------------------------------------------------------


def test_the_commands_can_be_had_without_running_them(capsys):
    assert main(make_parser().parse_args(["--dry_run", "--only", "SFT", "--seeds", "1", "2"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("sft_smol.py" in line for line in lines) == 2
    assert any("output/ml-100k_quick/seed_1/sft" in line for line in lines)


def test_the_pipeline_is_the_comparison_with_its_main_rows(description, capsys):
    assert main(make_parser().parse_args(["--dry_run", "--main_job"])) == 0
    evaluated = [line for line in capsys.readouterr().out.splitlines() if "evaluate.py" in line]
    assert len(evaluated) == len(description["main_job"]) == 5


def test_the_comparison_from_data_to_table(tmp_path, tiny_model, data_dir, encoder):
    """Two rows on a tiny model, with the real command; killed in the middle and started again.

    More test records are asked for than there are, as in a small data folder at a large size.
    """
    words = [sys.executable, "-m", "cebs.comparison", "--only", "Popularity", "SFT", "--data_dir", str(data_dir)]
    words += ["--model_name_or_path", str(tiny_model), "--encoder", str(encoder), "--train", "4", "--valid", "2"]
    words += ["--preferences", "2", "--test", "1000", "--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    first = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in first.stdout:
        if line.startswith("== sft "):
            first.terminate()
            break
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 130, out
    second = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Popularity" in second.stdout and "done, skipped" in second.stdout
    assert read_json(tmp_path / "out/sft/run.json")["state"] == "done"
    table = (tmp_path / "out/results.csv").read_bytes()
    third = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert third.returncode == 0 and "== sft/evaluate: done, skipped" in third.stdout
    assert (tmp_path / "out/results.csv").read_bytes() == table


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(tmp_path):
    """`./run_comparison.sh --dry_run | head`"""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cebs.comparison", "--dry_run", "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, cwd=PROJECT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
