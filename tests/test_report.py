"""report.py as a user runs it, its words, its escaping, and pictures in which nothing hides anything else."""

import base64
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
from conftest import Result, edit_json, listing, run_main, start_script
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from markdown_it import MarkdownIt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from cebs.metrics import METRICS_AT_K, TAIL_METRICS_AT_K, long_tail
from cebs.report.gallery import choose_plots
from cebs.report.inputs import CandidateRun, Estimate, Material, Method, Recommendations, read_material, read_methods
from cebs.report.pages import LATEX, Section, escape_latex, report_html, report_markdown, table_latex
from cebs.report.plots import (
    STYLE,
    lorenz_curve,
    plain,
    plot_accuracy_diversity,
    plot_candidates,
    plot_exposure,
    plot_genre_shares,
    plot_losses,
)
from cebs.report.tables import FIGURE_TABLES, Cell, Column, Table, make_tables
from cebs.results import ReferenceTests, read_results
from cebs.statistics import PairedTest
from report import file_names
from utils import InputError, read_json, write_json

HOSTILE = '<script>alert(1)</script> | *x* `y` $z_1$ 50% & "#" \\end{table}'
FORMULA = "=1+1"
CANDIDATES = {
    "script": "dataset_generate_cluster_batch.py",
    "state": "done",
    "inputs": {},
    "counts": {
        split: {"records": 12, "with_match": 11, "rounds": {"1": 8, "2": 3, "4": 1}} for split in ("train", "valid")
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, data_dir):
    """What five evaluations leave: the CSV, files per user, and the runs that the predictions came from."""
    folder = tmp_path_factory.mktemp("results")
    titles = sorted(read_json(data_dir / "name2id.json"))
    records = read_json(data_dir / "test_sample.json")
    for place, method in enumerate(("SFT", "ClusterIn", HOSTILE, FORMULA, "Popularity")):
        run = folder / "runs" / f"run_{place}"
        generator = np.random.default_rng(place)
        predictions = [
            {
                "prompt": record["input"],
                "prediction": titles[0],
                "ground_truth": record["output"],
                "ranking": list(generator.choice(titles, 10, replace=False)),
            }
            for record in records
        ]
        write_json(run / "predictions" / "raw_results_8.json", predictions)
        run_main(
            "evaluate",
            *("--predictions", run / "predictions", "--data_dir", data_dir, "--dataset", "classics", "--topk", 5, 10),
            *("--method", method, "--results_csv", folder / "results.csv", "--bootstrap", 20),
        )
    log = [{"step": step, "loss": 1 / step, "rewards/margins": step / 9} for step in (1, 2, 3)]
    write_json(folder / "runs" / "run_0" / "training_log.json", [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2}])
    for checkpoint in (9, 10):  # by number, not by name
        state = {"log_history": log if checkpoint == 10 else []}
        write_json(folder / "runs" / "run_1" / f"checkpoint-{checkpoint}" / "trainer_state.json", state)
    arguments = {"data_dir": str(data_dir), "num_candidates": 10, "seed": 1}
    write_json(folder / "cluster_exposure" / "run.json", CANDIDATES | {"arguments": arguments})
    return folder


@pytest.fixture(scope="module")
def report(results, run_script, tmp_path_factory):
    """The real command line on `results`."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "published.csv").write_text("Setting,Model,NDCG@10,NotInRatio\nas published,SFT,0.0043,\n")
    result = run_script(
        "report.py",
        *("--results_csv", results / "results.csv", "--output_dir", "out", "--published", "published.csv"),
        cwd=folder,
    )
    assert result.code == 0, result.stderr
    return folder / "out", result.stdout


@pytest.fixture(scope="module")
def run_script(tmp_path_factory):
    def run(name, *args, cwd):
        process = start_script(name, *args, cwd=cwd)
        stdout, stderr = process.communicate(timeout=180)
        return Result(process.returncode, stdout, stderr)

    return run


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------------------------------------------------------------
# The real command line
# ---------------------------------------------------------------------------------------------------------------------

PLOTS = ("accuracy-diversity", "genre-shares", "exposure", "losses", "margins", "candidates")


def test_everything_is_written(report):
    folder, stdout = report
    tables = {path.name for path in (folder / "tables").iterdir()}
    assert {"classics-accuracy.tex", "classics-diversity.tex", "classics-genres.tex", "published.tex"} < tables
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"classics-{name}.{suffix}" for name in PLOTS for suffix in ("png", "pdf")
    }
    for path in (folder / "plots").iterdir():
        content = path.read_bytes()
        assert content.startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix]) and len(content) > 5000
        assert b"CreationDate" not in content
    run = read_json(folder / "run.json")
    assert run["state"] == "done" and run["arguments"]["k"] == 10 and len(run["inputs"]) > 10
    assert "classics: 6 tables, 6 plots" in stdout and str(Path("out") / "report.html") in stdout


def test_the_page_is_complete_in_itself(report):
    folder, _ = report
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    images = page.all("img")
    assert len(images) == len(PLOTS)
    for image in images:
        assert image["alt"] and image["src"].startswith("data:image/svg+xml;base64,")
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        assert "</svg>" in svg and not re.findall(r"(?:href|src)=.(?!#)[^\"']*//", svg.split("<defs>", 1)[1])
    outside = [url for _, attributes in page.elements for url in (attributes.get("href"), attributes.get("src")) if url]
    assert all(url.startswith(("#", "data:")) for url in outside)
    text = "".join(page.texts)
    assert HOSTILE in text and FORMULA in text
    anchors = {attributes["href"][1:] for attributes in page.all("a")}
    assert anchors <= {attributes.get("id") for attributes in page.all("section")}


def test_the_words(report):
    folder, _ = report
    text = "".join(Page((folder / "report.html").read_text(encoding="utf-8")).texts)
    assert "NDCG: no difference from SFT can be seen with this many users (8)." in text
    assert "In brackets: the 95 % interval" in text
    assert "All rows are over 8 test records." in text
    assert "The protocol of all rows is ranked (the method's own ranking" in text
    assert "Every row is of one seed" in text
    assert "No training logs were found for" in text and "No finished run" not in text
    assert "From published.csv" in text and "As published, not measured here." in text


def test_markdown_points_at_the_plots(report):
    folder, _ = report
    text = (folder / "report.md").read_text(encoding="utf-8")
    page = Page(MarkdownIt("commonmark").enable("table").render(text))
    assert not page.all("script")
    images = [folder / image["src"] for image in page.all("img")]
    assert len(images) == len(PLOTS) and all(image.is_file() for image in images)
    assert HOSTILE in "".join(page.texts)


def test_same_input_same_bytes(report, results, tmp_path, monkeypatch):
    folder, _ = report
    monkeypatch.chdir(folder.parent)
    command = ("--results_csv", results / "results.csv", "--published", "published.csv")
    run_main("report", *command, "--output_dir", tmp_path / "again")
    mine, other = listing(folder), listing(tmp_path / "again")
    for name in ("run.json", ".report.py.lock"):
        mine.pop(name), other.pop(name)
    assert mine == other


# ---------------------------------------------------------------------------------------------------------------------
# What is not there
# ---------------------------------------------------------------------------------------------------------------------


def test_a_csv_alone(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("Dataset,Model,NDCG@10,Diversity@10\nA,SFT,0.1,20\nA,Other,0.0,10\n")
    run_main("report", "--results_csv", tmp_path / "results.csv", "--output_dir", tmp_path / "out")
    output = capsys.readouterr().out
    assert "A: 3 tables, 1 plots" in output
    for missing in ("No files per user", "No training logs", "No finished run of dataset_generate_cluster_batch.py"):
        assert missing in output
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The CSV has no intervals" in text and "No row could be tested against SFT." in text
    assert "The CSV does not say what these rest on: SFT (1) and Other (2)." in text


def test_an_earlier_report_is_replaced(tmp_path):
    table = tmp_path / "results.csv"
    command = ("report", "--results_csv", table, "--output_dir", tmp_path / "out")
    table.write_text("Dataset,Model,HR@10\nA,SFT,0.1\n")
    run_main(*command)
    table.write_text("Dataset,Model,HR@10\nA,SFT,0.25\n")
    with pytest.raises(InputError, match="holds another run of report.py"):
        run_main(*command, "--overwrite", "false")
    run_main(*command)
    assert "0.2500" in (tmp_path / "out" / "report.md").read_text()


def test_files_of_another_evaluation_are_left_out(results, tmp_path):
    table = read_results(results / "results.csv")
    row = table.method_rows("classics", "ClusterIn")[0]
    table.set_cell(row, "HR@10", "0.875")
    material = read_material(results / "results.csv", table, "classics", "SFT", 10)
    assert next(method for method in material.methods if method.name == "ClusterIn").per_user == []
    assert any("is of another evaluation (HR@10" in note for note in material.notes)


def test_genres_and_exposure_are_those_of_the_figures(results):
    """The plots count titles anew, from files per user and prompts: they must come to what the CSV says."""
    table = read_results(results / "results.csv")
    material = read_material(results / "results.csv", table, "classics", "SFT", 10)
    found = material.recommendations
    assert len(found.counts) == len(material.methods) == 5
    for method in material.methods:
        assert np.ptp(found.shares[method.number] - found.history) == pytest.approx(method.value("DGU@10"))
        assert np.count_nonzero(found.counts[method.number]) == method.value("Diversity@10")
        tail = np.interp(0.8, *lorenz_curve(found.exposure, found.counts[method.number]))
        assert tail == pytest.approx(method.value("Coverage@10"))


def test_without_predictions_there_are_no_genres(results, tmp_path):
    folder = shutil.copytree(results, tmp_path / "results")
    for path in (folder / "per_user").glob("*/*.json"):
        content = read_json(path)
        write_json(path, content | {"predictions": content["predictions"] | {"sha256": "of other predictions"}})
    material = read_material(folder / "results.csv", read_results(folder / "results.csv"), "classics", "SFT", 10)
    assert [plot.name for plot in choose_plots(material, 10)] == [name for name in PLOTS if name != "genre-shares"]
    assert any(note.startswith("Genres are not shown: no predictions") for note in material.notes)


def test_a_method_on_other_records_is_not_tested_and_not_plotted(results, tmp_path):
    folder = shutil.copytree(results, tmp_path / "results")
    (path,) = (folder / "per_user").glob("*/ClusterIn.json")
    edit_json(path, lambda content: content["users"].reverse())
    material = read_material(folder / "results.csv", read_results(folder / "results.csv"), "classics", "SFT", 10)
    (place,) = (method.number for method in material.methods if method.name == "ClusterIn")
    assert material.methods[place - 1].test is None and place not in material.recommendations.counts
    assert "ClusterIn was evaluated on other test records than the rest: not in these plots." in material.notes
    assert "Not tested, for they were not evaluated on the same records as SFT: ClusterIn (3)." in (
        make_tables(material, 10)[0].notes
    )


def test_rows_by_another_encoder_are_not_tested(results):
    table = read_results(results / "results.csv")
    for name, encoder in (("SFT", "small"), ("ClusterIn", "large"), (HOSTILE, "small")):
        table.set_cell(table.method_rows("classics", name)[0], "Encoder", encoder)
    material = read_material(results / "results.csv", table, "classics", "SFT", 10)
    assert {method.name for method in material.methods if method.test} == {"Popularity", HOSTILE, FORMULA}
    accuracy, *_, basis = make_tables(material, 10)
    assert any(note.endswith("another encoder than that of SFT was used: ClusterIn (3).") for note in accuracy.notes)
    assert any("Rows by different encoders cannot be compared" in note for note in basis.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Rows, tables, words
# ---------------------------------------------------------------------------------------------------------------------


def test_baselines_come_first_and_of_two_rows_the_first_counts(tmp_path):
    names = ("SFT", "SASRec", "Item-KNN (k = 9)", "Origin", "popularity", "item_knn 2", "Random", "SFT")
    lines = [f"A,{name},{place}" for place, name in enumerate(names)]
    (tmp_path / "r.csv").write_text("\n".join(["Dataset,Model,HR@10", *lines, "A,,1", "B,Random,1"]))
    methods = read_methods(read_results(tmp_path / "r.csv"), "A")
    assert [method.name for method in methods] == [
        *("Random", "popularity", "Item-KNN (k = 9)", "SASRec"),
        *("SFT", "Origin", "item_knn 2"),
    ]
    assert [method.number for method in methods] == list(range(1, 8))
    assert [method.is_baseline for method in methods] == [True] * 4 + [False] * 3
    assert methods[4].value("HR@10") == 0 and np.isnan(methods[4].value("NDCG@10"))


def test_every_metric_has_its_table():
    metrics = [metric for _, _, columns in FIGURE_TABLES for metric in columns]
    assert sorted(metrics) == sorted([*METRICS_AT_K, *TAIL_METRICS_AT_K, "NotInRatio"])


def method(number, name, test=None, protocol="grounded", encoder="tiny", **figures):
    estimates = {column: Estimate(value, 0.8 * value, 1.2 * value, None) for column, value in figures.items()}
    facts = {"Users": "1000", "Encoder": encoder, "Protocol": protocol, "Seeds": "", "Notes": ""}
    return Method(number, name, False, estimates, facts, test=test)


def paired(ndcg_p, hr_p, difference, smallest=0.01):
    return PairedTest(10, 1000, difference, ndcg_p, difference, hr_p, smallest)


def accuracy_notes(*methods):
    material = Material("A", list(methods), ReferenceTests("SFT", {}, []), None, [], [], [])
    return make_tables(material, 10)[0]


def test_what_differs_has_a_dagger_and_is_named():
    table = accuracy_notes(
        method(1, "SFT", **{"NDCG@10": 0.004, "HR@10": 0.01}),
        method(2, "A, with a comma", paired(0.01, 0.2, 0.01, 0.008), **{"NDCG@10": 0.02, "HR@10": 0.02}),
        method(3, "B", paired(0.0004, 0.04, -0.003), **{"NDCG@10": 0.001, "HR@10": 0.001}),
        method(4, "C", paired(0.9, 0.9, 0.0), protocol="ranked", encoder="", **{"NDCG@10": 0.004, "HR@10": 0.01}),
    )
    assert [[cell.differs for cell in row[2:4]] for row in table.rows] == [
        *([False, False], [True, False], [True, True], [False, False]),
    ]
    assert [cell.text for cell in table.rows[2][-2:]] == ["< 0.001", "0.040"]
    assert table.rows[0][2] == Cell("0.0040", ("0.0032", "0.0048"))
    text = "\n".join(table.notes)
    assert (
        "NDCG: higher than SFT in A, with a comma (2); lower than SFT in B (3); for the other 1 no difference can be "
        "seen with this many users (1,000)." in text
    )
    assert "HR: lower than SFT in B (3); for the other 2 no difference" in text
    assert "would have shown in 80 of 100 cases: 0.0080 to 0.0100, by the row." in text
    assert "Of another protocol than SFT, so that a difference may come from the protocol: C (4)." in text


def test_one_hit_in_a_thousand_users_is_no_difference():
    table = accuracy_notes(
        method(1, "SFT", **{"HR@10": 0.010}), method(2, "DPO", paired(0.8, 0.75, 0.002, np.inf), **{"HR@10": 0.012})
    )
    assert not any(cell.differs for row in table.rows for cell in row)
    assert "HR: no difference from SFT can be seen with this many users (1,000)." in table.notes
    assert "With this many users no difference in HR, however large, would have been shown." in table.notes


def test_deviations_over_seeds_are_in_the_cell():
    row = method(1, "SFT")
    row.estimates |= {"NDCG@10": Estimate(0.01, None, None, 0.002), "Diversity@10": Estimate(1234.5, None, None, 20.25)}
    accuracy, diversity, _ = make_tables(Material("A", [row], ReferenceTests("SFT", {}, []), None, [], [], []), 10)
    assert accuracy.rows[0][2].text == "0.0100 ± 0.0020" and diversity.rows[0][2].text == "1,234 ± 20.2"
    assert "Behind ±: the standard deviation over seeds." in accuracy.notes


def test_names_of_files():
    assert file_names(["ml-100k", "ML 100K", "ml_100k", "書籍", "!", "../x"]) == {
        **{"ml-100k": "ml-100k", "ML 100K": "ml-100k-2", "ml_100k": "ml-100k-3"},
        **{"書籍": "dataset", "!": "dataset-2", "../x": "x"},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Escaping
# ---------------------------------------------------------------------------------------------------------------------

NAMES = st.text(max_size=30) | st.lists(
    st.sampled_from(
        ["|", "*", "`", "_", "<b>", "</td>", "&amp;", "$", "\\", "{", "}", "%", "#", "~", "^", "--", "=", "-"]
    )
    | st.sampled_from([" ", "\n", "[x](y)", "![", "1. ", "+ ", "> ", "a", "\\|", "<!--", '"', "'", "\x00"]),
    max_size=8,
).map("".join)


def page_with(name):
    table = Table("t", name, [Column("#"), Column("Method", is_number=False)], [[Cell("1"), Cell(name)]], [name])
    section = Section(name, "slug", [table], [], {}, [name])
    return {"sections": [section], "published": None, "k": 10, "results_csv": "results.csv"}


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_names_are_only_text_in_html(name):
    page, harmless = (Page(report_html(**page_with(text))) for text in (name, "harmless"))
    assert page.elements == harmless.elements
    assert "".join(page.texts) == "".join(harmless.texts).replace("harmless", plain(name))


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_names_are_only_text_in_markdown(name):
    markdown = MarkdownIt("commonmark").enable("table")
    page = Page(markdown.render(report_markdown(**page_with(name))))
    harmless = Page(markdown.render(report_markdown(**page_with("harmless"))))
    if plain(name):  # a cell or an item without text has no paragraph
        assert page.elements == harmless.elements
    assert "".join(page.texts).split() == "".join(harmless.texts).replace("harmless", plain(name)).split()


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_names_are_only_text_in_latex(name):
    escaped = escape_latex(name)
    commands = {command: char for char, command in LATEX.items()}
    read = re.sub(
        "|".join(map(re.escape, sorted(commands, key=len, reverse=True))) + r"|\{\}|[\\{}$&#^_%~]",
        lambda match: commands.get(match[0], "" if match[0] == "{}" else "UNESCAPED"),
        escaped,
    )
    assert read == plain(name) and "--" not in escaped
    assert escaped in table_latex(page_with(name)["sections"][0].tables[0], "label")


def test_latex_has_rules_and_as_many_cells_as_columns():
    table = accuracy_notes(
        method(1, "SFT", **{"NDCG@10": 0.004, "HR@10": 0.01}),
        method(2, "50 % & more_", paired(0.01, 0.2, 0.01), **{"NDCG@10": 0.02, "HR@10": 0.02}),
    )
    text = table_latex(table, "a-accuracy")
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert r"\begin{tabular}{rlrrrr}" in text and r"NDCG@10 $\uparrow$" in text
    lines = text[text.index(r"\toprule") : text.index(r"\bottomrule")].splitlines()
    assert [len(re.findall(r"(?<!\\)&", line)) for line in lines if line.endswith(r" \\")] == [5, 5, 5]
    assert r"2 & 50 \% \& more\_ & " in text
    assert (
        r"\begin{tabular}[t]{@{}r@{}}0.0200\rlap{$^\dagger$}\\[-2pt]{\scriptsize [0.0160, 0.0240]}\end{tabular}" in text
    )
    assert text.count("{") == text.count("}")


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    numpy_strategies.arrays(int, st.integers(1, 30), elements=st.integers(0, 5)).flatmap(
        lambda exposure: st.tuples(
            st.just(exposure), numpy_strategies.arrays(int, len(exposure), elements=st.integers(0, 9))
        )
    )
)
def test_lorenz_curve_passes_through_the_metric_coverage(drawn):
    exposure, counts = drawn
    counts[0] += 1
    titles, recommendations = lorenz_curve(exposure, counts)
    assert (np.diff(titles) > 0).all() and (np.diff(recommendations) >= 0).all()
    assert titles[0] == recommendations[0] == 0 and titles[-1] == pytest.approx(1) == recommendations[-1]
    coverage = (long_tail(exposure) * counts).sum() / counts.sum()
    assert np.interp(0.8, titles, recommendations) == pytest.approx(coverage)


def many_methods(count=25):
    """Methods with long names whose figures are close together."""
    generator = np.random.default_rng(0)
    methods = []
    for number in range(1, count + 1):
        name = f"ClusterOut-LowExposure, DPO on the base model, variant {number} of a long name"
        figures = {"NDCG@10": generator.uniform(0.004, 0.007), "Diversity@10": generator.uniform(400, 600)}
        methods.append(method(number, name if number % 3 else f"S-DPO {number}", **figures))
        methods[-1].logs = [[{"step": step, "loss": generator.uniform(0, 3)} for step in range(0, 1000, 100)]]
    methods[0].name = "SFT"
    return methods


def texts_in(figure):
    """The texts that are drawn in a figure."""
    figure.draw_without_rendering()
    drawn = []
    with mock.patch.object(Text, "draw", lambda text, renderer: drawn.append(text)):
        figure.draw(FigureCanvasAgg(figure).get_renderer())
    return [text for text in dict.fromkeys(drawn) if text.get_visible() and text.get_text()]


def hidden(figure):
    """The texts that reach beyond the paper, and the pairs of level texts that overlap."""
    boxes = [(text, Text.get_window_extent(text)) for text in texts_in(figure)]  # without an annotation's arrow
    width, height = figure.bbox.width + 1, figure.bbox.height + 1
    outside = [text.get_text() for text, box in boxes if min(box.x0, box.y0) < -1 or box.x1 > width or box.y1 > height]
    level = [(text.get_text(), box) for text, box in boxes if not text.get_rotation()]
    pairs = [
        (one, other)
        for place, (one, a) in enumerate(level)
        for other, b in level[:place]
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]
    return outside, pairs


METHODS = many_methods()
SHARES = np.random.default_rng(1).dirichlet(np.ones(18), 26)
RECOMMENDATIONS = Recommendations(
    genres=[f"Genre {number}" for number in range(18)],
    history=SHARES[0],
    shares=dict(enumerate(SHARES[1:], start=1)),
    exposure=np.arange(40) // 8,
    counts={number: np.random.default_rng(number).integers(0, 9, 40) for number in range(1, 26)},
)
RUNS = [
    CandidateRun(
        Path("run.json"), f"a_comparison/seed_0/candidates_of_run_{number}", split, 10, {1: 800, 2: 5, 4: 90}, 7
    )
    for number in range(4)
    for split in ("train", "valid")
]


@pytest.mark.parametrize(
    ("plot", "arguments"),
    [
        (plot_accuracy_diversity, (METHODS, "SFT", 10)),
        (plot_genre_shares, (METHODS, RECOMMENDATIONS)),
        (plot_genre_shares, (METHODS[:2], RECOMMENDATIONS)),
        (plot_exposure, (METHODS, RECOMMENDATIONS)),
        (plot_losses, (METHODS,)),
        (plot_candidates, (RUNS,)),
    ],
)
def test_no_text_hides_another_also_with_25_methods_of_long_names(plot, arguments):
    with matplotlib.rc_context(STYLE):
        assert hidden(plot(*arguments)) == ([], [])


def test_names_are_no_formulas_in_plots():
    broken = "$\\frac{1}{$ _hidden\x00"
    with matplotlib.rc_context(STYLE):
        figure = plot_losses([replace(METHODS[0], name=broken)])
        assert any("$\\frac{1}{$" in text.get_text() for text in texts_in(figure))


def test_figures_of_nothing_and_without_intervals():
    methods = [method(1, "SFT", **{"NDCG@10": 0.0, "Diversity@10": 0.0}), method(2, "B", **{"NDCG@10": 0.1})]
    methods[0].estimates["NDCG@10"] = Estimate(0.0, None, None, None)
    with matplotlib.rc_context(STYLE):
        assert hidden(plot_accuracy_diversity(methods, "SFT", 10)) == ([], [])
