"""The CSV, its table with the tests in words, the files per user behind them, and several seeds in one table."""

import csv
import math
import multiprocessing
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from cebs.files import PROJECT
from cebs.per_user import find_per_user, per_user_file, read_per_user, write_per_user
from cebs.results import (
    ReferenceTests,
    aggregate_seeds,
    compare_with_reference,
    format_results,
    mean_rows,
    print_results,
    read_results,
    results_columns,
    update_results,
)
from utils import InputError, write_json

# ---------------------------------------------------------------------------------------------------------------------
# The CSV
# ---------------------------------------------------------------------------------------------------------------------


def figures(dataset="Books", model="SFT", topk=(5,), value=0.5, **more):
    row = dict.fromkeys(results_columns(topk), value)
    return {**row, "Dataset": dataset, "Model": model, "Users": 10, "Encoder": "mini", "Protocol": "grounded", **more}


def cells(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_columns_of_the_contract(tmp_path):
    update_results(tmp_path / "r.csv", figures(topk=(10, 5)))
    header = (tmp_path / "r.csv").read_text().splitlines()[0]
    metrics = ["NDCG", "HR", "Diversity", "DivRatio", "DGU", "MGU", "ORRatio"]
    at_k = [f"{metric}@{k}" for k in (5, 10) for metric in metrics]
    tail = [
        "Coverage",
        "Gini",
        *(f"{metric}_{group}" for group in ("head", "middle", "tail") for metric in metrics[:2]),
    ]
    tail = [f"{metric}@{k}" for k in (5, 10) for metric in tail]
    ends = [f"{figure}_{end}" for figure in (*at_k, "NotInRatio", *tail) for end in ("low", "high")]
    contract = ["Dataset", "Model", *at_k, "NotInRatio"]
    assert header.split(",") == [*contract, "Users", "Encoder", "Protocol", *tail, *ends, "Notes"]


def test_a_row_is_updated_in_place_and_in_full_precision(tmp_path):
    path = tmp_path / "folder" / "r.csv"
    for model in ("Origin", "SFT", "DPO"):
        update_results(path, figures(model=model, value=1.0))
    assert update_results(path, figures(model="SFT", value=0.1 + 0.2, **{"DGU@5": math.nan})) == []
    rows = cells(path)
    assert [row["Model"] for row in rows] == ["Origin", "SFT", "DPO"]
    assert rows[1]["NDCG@5"] == "0.30000000000000004" and rows[1]["DGU@5"] == "" and rows[1]["Users"] == "10"
    assert rows[0]["NDCG@5"] == "1.0"
    assert sorted(file.name for file in path.parent.iterdir() if file.name != ".r.csv.lock") == ["r.csv"]


def test_more_k_find_their_place_and_older_ones_are_emptied(tmp_path):
    path = tmp_path / "r.csv"
    update_results(path, figures(model="SFT", topk=(5, 20)))
    update_results(path, figures(model="DPO", topk=(5, 20)))
    notices = update_results(path, figures(model="SFT", topk=(1, 10), value=0.25))
    rows = cells(path)
    assert list(rows[0]) == results_columns((1, 5, 10, 20))
    assert (rows[0]["NDCG@1"], rows[0]["NDCG@5"], rows[0]["HR@10"], rows[0]["HR@20"]) == ("0.25", "", "0.25", "")
    assert (rows[1]["NDCG@1"], rows[1]["NDCG@5"], rows[1]["HR@20"]) == ("", "0.5", "0.5")
    (notice,) = notices
    assert "@5, @20" in notice


def test_a_csv_edited_by_hand_survives(tmp_path):
    path = tmp_path / "r.csv"
    path.write_bytes(
        "\ufeffRemark;Model;HR@5;Dataset;MyScore\r\n"
        "published, table 2;SPRec;0.0130;Books;007\r\n"
        "\r\n"
        ';SFT;1e-3;Books;"a ""quoted""; cell"\r\n'
        "a;b;c;d;e;one cell too many\r\n".encode()
    )
    update_results(path, figures(model="SFT", value=0.25))
    update_results(path, figures(model="New", value=0.75))
    raw = path.read_bytes().decode()
    assert raw.startswith("\ufeff") and raw.count("\r\n") == raw.count("\n") == 6
    header, *rows = csv.reader(raw.removeprefix("\ufeff").splitlines(), delimiter=";")
    kept = [header.index(name) for name in ("Remark", "Model", "HR@5", "Dataset", "MyScore")]
    assert kept == sorted(kept)
    assert [rows[0][place] for place in kept] == ["published, table 2", "SPRec", "0.0130", "Books", "007"]
    assert rows[1] == []
    assert [rows[2][place] for place in kept] == ["", "SFT", "0.25", "Books", 'a "quoted"; cell']
    assert rows[3][-1] == "one cell too many"
    assert [rows[4][place] for place in kept] == ["", "New", "0.75", "Books", ""]
    assert rows[4][header.index("NDCG@5")] == "0.75"


def test_an_update_without_change_leaves_the_bytes(tmp_path):
    path = tmp_path / "r.csv"
    update_results(path, figures())
    before = path.read_bytes()
    update_results(path, figures())
    assert path.read_bytes() == before


def test_figures_of_different_encoders_are_not_mixed_in_silence(tmp_path):
    path = tmp_path / "r.csv"
    update_results(path, figures(model="SFT"))
    update_results(path, figures(model="Pop", Encoder="", Protocol="ranked"))
    assert update_results(path, figures(dataset="Films", Encoder="large")) == []
    (notice,) = update_results(path, figures(model="DPO", Encoder="large"))
    assert "mini" in notice and "cannot be compared" in notice
    replaced = update_results(path, figures(model="DPO", Encoder="mini"))
    assert replaced == ["Books, DPO: its figures were by the encoder large; they are replaced"]


def test_names_cannot_become_formulas(tmp_path):
    path = tmp_path / "r.csv"
    for model in ("=1+1", "+x", "-x", "@x", 'plain, "quoted"'):
        for _ in range(2):
            update_results(path, figures(model=model, value=-0.5))
    rows = cells(path)
    assert [row["Model"] for row in rows] == ["'=1+1", "'+x", "'-x", "'@x", 'plain, "quoted"']
    assert rows[0]["NDCG@5"] == "-0.5"
    assert any(
        line.startswith("=1+1 ") for line in format_results(read_results(path), "Books", ReferenceTests("SFT", {}, []))
    )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"a,b\n1,2\n", "no columns Dataset and Model"),
        (b"Dataset,Model\nBooks,\xe9\n", "cannot be read as UTF-8 text"),
        (b"Dataset,Model\nBooks," + b"x" * 200_000 + b"\n", "cannot be read as CSV"),
    ],
)
def test_a_csv_that_cannot_be_read_is_left_alone(tmp_path, contents, message):
    path = tmp_path / "r.csv"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=f"r.csv: .*{message}"):
        update_results(path, figures())
    assert path.read_bytes() == contents


def finish(path, number, at_once):
    """What the end of a job does: its row, here with a k that only some of the others have."""
    row = figures(model=f"job {number}", topk=(5, 10 + number % 3), value=number / 100)
    at_once.wait()
    update_results(path, row)


def test_twenty_processes_that_finish_at_once_lose_no_row(tmp_path):
    path, processes = tmp_path / "r.csv", 20
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cebs.results"])  # imports once, not twenty times
    at_once = context.Barrier(processes, timeout=60)
    jobs = [context.Process(target=finish, args=(path, number, at_once)) for number in range(processes)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0] * processes
    found = {row["Model"]: row for row in cells(path)}
    assert len(cells(path)) == len(found) == processes
    for number in range(processes):
        row = found[f"job {number}"]
        assert (row["NDCG@5"], row[f"HR@{10 + number % 3}"]) == (str(number / 100), str(number / 100))
        assert row[f"HR@{10 + (number + 1) % 3}"] == ""


def test_a_sheet_sorted_and_with_columns_moved_survives(tmp_path):
    """A spreadsheet sorts the rows, reorders columns and adds one; updates find their cells, and nothing else moves."""
    path = tmp_path / "r.csv"
    for place, model in enumerate(("SFT", "DPO", "Random")):
        update_results(path, figures(model=model, value=place / 10))
    table = list(csv.reader(path.open(newline="")))
    order = [
        "HR@5",
        "Model",
        "My note",
        "Dataset",
        *(name for name in table[0] if name not in ("HR@5", "Model", "Dataset")),
    ]
    rows = [{**dict(zip(table[0], row, strict=True)), "My note": f"note {row[1]}"} for row in table[1:]]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, order)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["Model"]))
    update_results(path, figures(model="SFT", value=0.9))
    update_results(path, figures(model="SASRec", topk=(5, 10), value=0.7))
    found = cells(path)
    assert [row["Model"] for row in found] == ["DPO", "Random", "SFT", "SASRec"]
    assert [row["My note"] for row in found] == ["note DPO", "note Random", "note SFT", ""]
    assert [row["HR@5"] for row in found] == ["0.1", "0.2", "0.9", "0.7"]
    assert [row["NDCG@5_low"] for row in found] == ["0.1", "0.2", "0.9", "0.7"]
    assert [name for name in found[0] if name in order] == order
    assert (found[3]["HR@10"], found[0]["HR@10"]) == ("0.7", "")


def test_a_column_of_ones_own_that_starts_like_a_figure_is_kept(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("Dataset,Model,HR@5,HR@5 (paper)\nBooks,SFT,0.1,0.013\n")
    update_results(path, figures(topk=(10,)))
    (row,) = cells(path)
    assert (row["HR@5"], row["HR@5 (paper)"], row["HR@10"]) == ("", "0.013", "0.5")


def test_the_table(tmp_path, capsys):
    path = tmp_path / "r.csv"
    update_results(path, figures(model="SFT", value=0.123456, **{"Diversity@5": 388}))
    update_results(path, figures(model="two\nlines", **{"MGU@5": math.nan}))
    update_results(path, figures(dataset="Films"))
    print_results(path, "Books")
    printed = capsys.readouterr().out
    for header in ("NDCG↑", "HR↑", "Diversity↑", "DivRatio↑", "DGU↓", "MGU↓", "ORRatio↓", "NotInRatio↓"):
        assert header in printed
    row, more = [line for line in printed.splitlines() if line.startswith("SFT")]
    assert row.split() == ["SFT", "0.1235", "0.1235", "388", *["0.1235"] * 5]
    assert more.split() == ["SFT", *["0.1235", "to", "0.1235"] * 2, *["0.1235"] * 8]
    row, _ = [line for line in printed.splitlines() if line.startswith("two lines")]
    assert row.split()[7] == "-"
    for header in ("NDCG, 95 %", "HR, 95 %", "Coverage↑", "Gini↓", "NDCG_tail↑", "HR_head↑"):
        assert header in printed
    assert "Films" not in printed and "encoder mini, protocol grounded" in printed


def test_the_table_on_a_terminal_without_arrows(tmp_path):
    path = tmp_path / "r.csv"
    update_results(path, figures(model="é"))
    command = [sys.executable, "-m", "cebs.results"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    result = subprocess.run([*command, str(path)], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "NDCG+" in result.stdout and "DGU-" in result.stdout and "\n? " in result.stdout
    missing = subprocess.run([*command, "none.csv"], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "none.csv" in missing.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Files per user
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=16).filter(str.strip), min_size=2, max_size=2)
)
def test_names_of_files_per_user_are_safe_and_tell_rows_apart(names):
    folder = PROJECT / "out"
    files = [per_user_file(folder / "r.csv", name, name) for name in names]
    for file, name in zip(files, names, strict=True):
        assert file.resolve() == file and file.parent.parent == folder / "per_user"  # nothing like `..` in it
        assert not file.name.startswith(".") and urllib.parse.unquote(file.name.removesuffix(".json")) == name.strip()
    assert (files[0] == files[1]) == (names[0].strip() == names[1].strip())


@pytest.mark.parametrize("name", ["..", ".", "../../x", "/etc/x", "a/b", ".hidden", "%2e%2e"])
def test_names_that_would_leave_the_folder(tmp_path, name):
    file = per_user_file(tmp_path / "r.csv", name, name)
    write_per_user(file, {})
    assert file.parent.parent == tmp_path / "per_user" and len(list(tmp_path.rglob("*.json"))) == 1


def test_a_table_that_another_process_writes_in_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("cebs.results.LOCK_TIMEOUT_S", 0)
    with FileLock(tmp_path / ".r.csv.lock"), pytest.raises(InputError, match="r.csv: another process has been writing"):
        update_results(tmp_path / "r.csv", {"Dataset": "Books", "Model": "SFT", "Encoder": ""})


def test_a_name_too_long_for_a_file_is_said(tmp_path):
    with pytest.raises(InputError, match="is too long for the name of a file; give a shorter --dataset or --method"):
        per_user_file(tmp_path / "r.csv", "Books", "x" * 300)
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        write_per_user(tmp_path / f"{'x' * 300}.json", {})


def per_user(path, method, ranks, *, users=None, targets=None, topk=(5,), write=True):
    """A row of the CSV and its file per user, from the places of the targets; -1 is no hit."""
    ranks = np.array(ranks)
    hits, ndcgs = (
        {k: (values * ((ranks >= 0) & (ranks < k))).tolist() for k in topk}
        for values in (np.ones(len(ranks), int), np.log(2) / np.log(np.maximum(ranks, 0) + 2))
    )
    content = {
        "dataset": "Books",
        "method": method,
        "topk": list(topk),
        "users": [
            {
                "user": users[index] if users else "",
                "target": targets[index] if targets else f"T{index}",
                "hit": {str(k): hits[k][index] for k in topk},
                "ndcg": {str(k): ndcgs[k][index] for k in topk},
            }
            for index in range(len(ranks))
        ],
    }
    write_json(per_user_file(path, "Books", method), content)
    row = figures(model=method, topk=topk, Users=len(ranks))
    row |= {f"HR@{k}": float(np.mean(hits[k])) for k in topk} | {f"NDCG@{k}": float(np.mean(ndcgs[k])) for k in topk}
    update_results(path, row)
    return content


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("[]", "expected an object"),
        ('{"dataset": "B", "method": "M", "topk": [5], "users": []}', "has no users"),
        ('{"dataset": "B", "method": "M", "topk": 5, "users": [{}]}', "'topk' must be list"),
        (
            '{"dataset": "B", "method": "M", "topk": [5], "users": [{"user": "", "target": "T"}]}',
            "user 0: 'hit' must be",
        ),
        (
            '{"dataset": "B", "method": "M", "topk": [5], '
            '"users": [{"user": "", "target": "T", "hit": {"5": 1}, "ndcg": {}}]}',
            "user 0: 'hit' and 'ndcg' must hold a number from 0 to 1 for k 5",
        ),
    ],
)
def test_bad_files_per_user(tmp_path, contents, message):
    (tmp_path / "u.json").write_text(contents)
    with pytest.raises(InputError) as raised:
        read_per_user(tmp_path / "u.json")
    assert str(raised.value).startswith(f"{tmp_path / 'u.json'}: ") and message in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Tests against the reference
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dagger_marks_what_differs_and_words_say_what_does_not(tmp_path, capsys):
    path = tmp_path / "r.csv"
    per_user(path, "SFT", [0] * 2 + [-1] * 198)
    per_user(path, "Same", [1] * 2 + [-1] * 198)
    per_user(path, "Better", [0] * 40 + [-1] * 160)
    print_results(path, "Books")
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in reversed(printed.splitlines()) if "95" not in line and line}
    assert rows["SFT"][1:3] == ["0.0100", "0.0100"]
    assert rows["Same"][1:3] == ["0.0063", "0.0100"]
    assert rows["Better"][1:3] == ["0.2000†", "0.2000†"]
    assert (
        "Same: no difference from SFT can be seen with 200 users (p = 0.500 for NDCG@5, p = 1.000 for HR@5; " in printed
    )
    assert "the smallest difference in HR@5 that this test set could have shown: 0.0" in printed
    assert "Better: differs from SFT in NDCG@5 and HR@5 (p < 0.001 for NDCG@5, p < 0.001 for HR@5)" in printed
    assert "† differs from SFT" in printed

    print_results(path, "Books", reference="Better")
    assert "Same: differs from Better" in capsys.readouterr().out
    print_results(path, "Books", reference="Nobody")
    printed = capsys.readouterr().out
    assert "note: no row Nobody: nothing is tested" in printed and "†" not in printed


def test_holm_is_over_the_rows(tmp_path):
    """Six hits more and none less are significant for one row, p = 0.03125, and not as one of two."""
    path = tmp_path / "r.csv"
    per_user(path, "SFT", [-1] * 50)
    per_user(path, "One", [0] * 6 + [-1] * 44)
    (one,) = compare_with_reference(path, read_results(path), "Books", "SFT").at_k[5].values()
    assert one.hr_p == pytest.approx(2 / 2**6) and one.hr_differs
    per_user(path, "Two", [-1] * 44 + [0] * 6)
    one, two = compare_with_reference(path, read_results(path), "Books", "SFT").at_k[5].values()
    assert one.hr_p == two.hr_p == pytest.approx(4 / 2**6) and not one.hr_differs


def test_rows_that_cannot_be_tested_are_named(tmp_path):
    path = tmp_path / "r.csv"
    per_user(path, "SFT", [0, -1, -1])
    update_results(path, figures(model="Published"))
    per_user(path, "Other records", [0, -1, -1], targets=["X", "Y", "Z"])
    per_user(path, "Stale", [0, -1, -1])
    update_results(path, figures(model="Stale", value=0.7))
    tested = compare_with_reference(path, read_results(path), "Books", "SFT")
    assert tested.at_k == {}
    published, other, stale = tested.notes
    assert published.startswith("Published: not tested, there is no file per user")
    assert "files per user of SFT and Other records are not of the same test records" in other
    assert stale.startswith("Stale: not tested, its file per user is of another evaluation")


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds
# ---------------------------------------------------------------------------------------------------------------------


def test_means_and_deviations_over_seeds(tmp_path):
    paths = [tmp_path / f"{seed}.csv" for seed in (1, 2, 3)]
    for path, value in zip(paths, (0.1, 0.2, 0.6), strict=True):
        update_results(path, figures(value=value, **{"DGU@5": math.nan if value == 0.2 else value}))
    update_results(paths[0], figures(model="=Once", value=0.3, Encoder="a"))
    update_results(paths[0], figures(dataset="Films", value=0.4))
    assert aggregate_seeds(paths, tmp_path / "out.csv") == ["Books: other rows are by the encoder mini, not by a; "
        "their figures cannot be compared with this one's"]  # fmt: skip
    sft, once, films = cells(tmp_path / "out.csv")
    assert (sft["Model"], once["Model"], films["Dataset"]) == ("SFT", "'=Once", "Films")
    assert float(sft["HR@5"]) == pytest.approx(0.3) and float(sft["HR@5_std"]) == pytest.approx(0.07**0.5)
    assert float(sft["Gini@5_std"]) == pytest.approx(0.07**0.5) and sft["DGU@5"] == sft["DGU@5_std"] == ""
    assert (sft["Seeds"], once["Seeds"], once["HR@5"], once["HR@5_std"]) == ("3", "1", "0.3", "")
    assert sft.get("HR@5_low", "") == ""
    assert (sft["Users"], sft["Encoder"], sft["Protocol"]) == ("10", "mini", "grounded")


def test_a_seed_with_a_decimal_comma(tmp_path):
    (tmp_path / "a.csv").write_text("Dataset;Model;HR@5\nBooks;SFT;0,25\n")
    (tmp_path / "b.csv").write_text("Dataset,Model,HR@5\nBooks,SFT,0.75\n")
    (row,) = mean_rows([read_results(tmp_path / name) for name in ("a.csv", "b.csv")])
    assert row["HR@5"] == 0.5


def test_the_test_over_users_and_seeds(tmp_path):
    """Each user's NDCG and hits are means over the seeds; the seeds' own folders hold the files."""
    output = tmp_path / "results.csv"
    ranks = {1: {"SFT": [-1] * 30, "DPO": [0] * 12 + [-1] * 18}, 2: {"SFT": [-1] * 30, "DPO": [1] * 10 + [-1] * 20}}
    for seed, methods in ranks.items():
        for method, places in methods.items():
            per_user(tmp_path / f"seed_{seed}" / "results.csv", method, places)
    aggregate_seeds([tmp_path / f"seed_{seed}" / "results.csv" for seed in ranks], output)
    assert len(find_per_user(output, "Books", "DPO")) == 2
    tested = compare_with_reference(output, read_results(output), "Books", "SFT")
    test = tested.at_k[5]["DPO"]
    assert tested.notes == [] and test.num_users == 30
    assert test.hr_difference == pytest.approx((12 + 10) / 60)
    assert test.ndcg_difference == pytest.approx((12 + 10 * math.log(2) / math.log(3)) / 60)
    assert test.ndcg_p == test.hr_p == pytest.approx(2 / 2**12)  # all twelve users, all signs gone through


def test_aggregate_on_the_command_line(tmp_path):
    for seed, value in ((1, 0.2), (2, 0.4)):
        update_results(tmp_path / f"{seed}.csv", figures(value=value))
    command = [sys.executable, "-m", "cebs.results", "--aggregate", tmp_path / "out.csv", *tmp_path.glob("?.csv")]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "± 0.1414 (seeds)" in result.stdout and len(cells(tmp_path / "out.csv")) == 1


def test_aggregate_refuses_what_is_wrong(tmp_path):
    update_results(tmp_path / "a.csv", figures())
    before = (tmp_path / "a.csv").read_bytes()
    with pytest.raises(InputError, match="b.csv: no such file"):
        aggregate_seeds([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out.csv")
    with pytest.raises(InputError, match="a.csv: is the output and an input"):
        aggregate_seeds([tmp_path / "a.csv"], tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == before and not (tmp_path / "out.csv").exists()
