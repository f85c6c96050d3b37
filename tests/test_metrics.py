"""The metrics against plain loops, the search for the nearest titles against a full sort, and the CSV."""

import csv
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cebs import grounding
from cebs.grounding import nearest_titles
from cebs.metrics import evaluate_rankings, genre_weights, hit_ranks, ndcg_at
from cebs.results import format_results, print_results, read_results, results_columns, update_results
from utils import PROJECT, InputError

GENRES = ["a", "b", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def plain_figures(ranked, targets, histories, genres, counted, k):
    """The protocol of the paper, a user and a rank at a time."""
    ndcg = hits = judged = 0
    recommended = Counter()
    for ranking, target in zip(ranked, targets, strict=True):
        if target == -1:
            continue
        judged += 1
        for rank, title in enumerate(ranking[:k]):
            recommended[title] += 1
            if title == target:
                hits += 1
                ndcg += math.log(2) / math.log(rank + 2)

    def shares(titles):
        totals = dict.fromkeys(counted, 0.0)
        for title in titles:
            own = [genre for genre in genres[title] if genre in counted]
            for genre in own:
                totals[genre] += 1 / len(own)
        whole = sum(totals.values())
        return [total / whole if whole else math.nan for total in totals.values()]

    difference = [p - h for p, h in zip(shares(recommended.elements()), shares(histories), strict=True)]
    isnan = any(map(math.isnan, difference))
    total = sum(recommended.values())
    return {
        "users": len(targets),
        "NDCG": ndcg / len(targets),
        "HR": hits / len(targets),
        "Diversity": len(recommended),
        "DivRatio": len(recommended) / (judged * k) if judged else math.nan,
        "DGU": math.nan if isnan else max(difference) - min(difference),
        "MGU": math.nan if isnan else sum(map(abs, difference)) / len(difference),
        "ORRatio": sum(count for _, count in recommended.most_common(3)) / total if total else math.nan,
    }


@st.composite
def evaluations(draw):
    """Random rankings: targets outside the catalogue, no history, titles without genres, k beyond the catalogue."""
    num_titles = draw(st.integers(1, 8))
    num_users = draw(st.integers(1, 6))
    topk = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
    depth = min(max(topk), num_titles)
    ranked = [draw(st.permutations(range(num_titles)))[:depth] for _ in range(num_users)]
    targets = draw(st.lists(st.integers(-1, num_titles - 1), min_size=num_users, max_size=num_users))
    histories = draw(st.lists(st.integers(0, num_titles - 1), max_size=12))
    titles_genres = st.lists(st.sampled_from([*GENRES, "uncounted"]), unique=True)
    genres = draw(st.lists(titles_genres, min_size=num_titles, max_size=num_titles))
    return np.array(ranked), np.array(targets), histories, genres, topk


@settings(max_examples=200, deadline=None)
@given(evaluations())
def test_metrics_equal_plain_loops(evaluation):
    ranked, targets, histories, genres, topk = evaluation
    counts = np.bincount(np.array(histories, int), minlength=len(genres))
    figures = evaluate_rankings(ranked, targets, counts, genre_weights(genres, GENRES), topk)
    assert list(figures) == topk
    for k in topk:
        expected = plain_figures(ranked, targets, histories, genres, GENRES, k)
        assert figures[k] == pytest.approx(expected, nan_ok=True, abs=1e-12), k


def test_metrics_by_hand():
    ranked = np.array([[0, 1], [0, 2], [1, 0]])
    weights = genre_weights([["a"], ["b", "a"], ["x"]], ["a", "b"])
    assert weights.tolist() == [[1, 0], [0.5, 0.5], [0, 0]]
    figures = evaluate_rankings(ranked, np.array([1, 1, -1]), np.array([1, 0, 0]), weights, [2])[2]
    assert figures["HR"] == 1 / 3  # over all users, the one whose target is unknown included
    assert figures["NDCG"] == pytest.approx(math.log(2) / math.log(3) / 3)
    assert figures["Diversity"] == 3
    assert figures["DivRatio"] == 3 / 4  # over the users whose target is known
    # recommended 0, 1, 0, 2: P = (2.5, 0.5) / 3, H = (1, 0)
    assert figures["DGU"] == pytest.approx(1 / 3)
    assert figures["MGU"] == pytest.approx(1 / 6)
    assert figures["ORRatio"] == 1.0


def test_what_each_user_got():
    ranks = hit_ranks(np.array([[4, 2], [4, 2], [4, 2], [4, 2]]), np.array([4, 2, 0, -1]))
    assert ranks.tolist() == [0, 1, -1, -1]
    assert ndcg_at(ranks, 1).tolist() == [1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


def plain_nearest(queries, catalogue, k):
    distances = [[float(np.sum((query - title) ** 2)) for title in catalogue] for query in queries]
    return [sorted(range(len(catalogue)), key=lambda title: (row[title], title))[:k] for row in distances]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nearest_titles_equal_a_full_sort(data):
    """Whole coordinates make many exact ties; blocks smaller than the catalogue make many merges."""
    size = st.integers(1, 40)
    shape_q, shape_m, dimensions = data.draw(size), data.draw(size), data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([1, 2, 50]))
    queries = random.integers(-spread, spread + 1, (shape_q, dimensions)).astype(np.float32)
    catalogue = random.integers(-spread, spread + 1, (shape_m, dimensions)).astype(np.float32)
    k = data.draw(st.integers(1, 45))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grounding, "SEARCHED_QUERIES", data.draw(st.integers(1, 50)))
        patch.setattr(grounding, "SEARCHED_TITLES", data.draw(st.integers(1, 50)))
        patch.setattr(grounding, "SPARE", data.draw(st.integers(1, 5)))
        nearest = nearest_titles(queries, catalogue, k)
    assert nearest.tolist() == plain_nearest(queries, catalogue, k)


def test_equal_embeddings_come_in_the_order_of_their_ids():
    """The bug this guards against: a matrix product rounds by a title's place, so equal titles came in any order."""
    random = np.random.default_rng(0)
    distinct = random.normal(size=(50, 384)).astype(np.float32)
    catalogue = np.concatenate([distinct, np.repeat(distinct[:1], 40, axis=0), distinct])
    nearest = nearest_titles(distinct + np.float32(1e-3), catalogue, 30)
    assert nearest[0].tolist() == [0, *range(50, 79)]  # more equal titles than are spared
    for query in range(1, 50):
        assert nearest[query, :2].tolist() == [query, 90 + query]
    assert nearest.tolist() == nearest_titles(distinct + np.float32(1e-3), catalogue, 30).tolist()


def test_nearest_titles_of_embeddings_far_from_the_origin():
    """|q|² - 2qt + |t|² loses the digits that tell such titles apart; the differences do not."""
    random = np.random.default_rng(1)
    catalogue = (1000 + random.normal(size=(300, 8)) * 1e-3).astype(np.float32)
    queries = catalogue[:20] + np.float32(1e-4)
    assert nearest_titles(queries, catalogue, 10).tolist() == plain_nearest(
        queries.astype(np.float64), catalogue.astype(np.float64), 10
    )


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
    assert header.split(",") == ["Dataset", "Model", *at_k, "NotInRatio", "Users", "Encoder", "Protocol"]


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
    assert any(line.startswith("=1+1 ") for line in format_results(read_results(path), "Books"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"a,b\n1,2\n", "no columns Dataset and Model"),
        (b"Dataset,Model\nBooks,\xe9\n", "not UTF-8"),
        (b"Dataset,Model\nBooks," + b"x" * 200_000 + b"\n", "cannot be read as CSV"),
    ],
)
def test_a_csv_that_cannot_be_read_is_left_alone(tmp_path, contents, message):
    path = tmp_path / "r.csv"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=f"r.csv: .*{message}"):
        update_results(path, figures())
    assert path.read_bytes() == contents


def test_several_processes_lose_no_row(tmp_path):
    path, processes, rows = tmp_path / "r.csv", 8, 4
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from cebs.results import results_columns, update_results\n"
        "for row in range(int(sys.argv[4])):\n"
        "    figures = dict.fromkeys(results_columns([5, 10 + row]), 0.5)\n"
        "    names = {'Dataset': 'Books', 'Model': f'{sys.argv[3]}-{row}', 'Encoder': ''}\n"
        "    update_results(sys.argv[2], figures | names)"
    )
    command = [sys.executable, "-c", program, str(PROJECT), str(path)]
    running = [subprocess.Popen([*command, str(number), str(rows)]) for number in range(processes)]
    assert [process.wait(timeout=120) for process in running] == [0] * processes
    written = sorted(row["Model"] for row in cells(path))
    assert written == sorted(f"{number}-{row}" for number in range(processes) for row in range(rows))


def test_the_table(tmp_path, capsys):
    path = tmp_path / "r.csv"
    update_results(path, figures(model="SFT", value=0.123456, **{"Diversity@5": 388}))
    update_results(path, figures(model="two\nlines", **{"MGU@5": math.nan}))
    update_results(path, figures(dataset="Films"))
    print_results(path, "Books")
    printed = capsys.readouterr().out
    for header in ("NDCG↑", "HR↑", "Diversity↑", "DivRatio↑", "DGU↓", "MGU↓", "ORRatio↓", "NotInRatio↓"):
        assert header in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("SFT")]
    assert row.split() == ["SFT", "0.1235", "0.1235", "388", *["0.1235"] * 5]
    (row,) = [line for line in printed.splitlines() if line.startswith("two lines")]
    assert row.split()[7] == "-"
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
