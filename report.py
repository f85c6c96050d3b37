r"""
Stage 6: the report. The CSV of all methods, and what lies beside it, become tables and plots.

# The default, configs/report.yaml: output/results.csv -> output/report/report.html
```bash
python report.py
```

# One data set at another k, with published figures set beside ours
```bash
python report.py --results_csv output/goodreads/results.csv --output_dir output/goodreads/report \
    --dataset Goodreads --k 5 --published published_results.csv
```

The folder gets `report.html` (one file that needs no other), `report.md`, `tables/*.tex`, `plots/*.png` and
`plots/*.pdf`. The tables need the CSV alone. Tests, genres and exposure need the files per user that evaluate.py writes
beside it, learning curves the training runs that the predictions came from, and rounds of candidates the runs below the
CSV's folder. What is not there is left out, and the report says so.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from cebs.report.gallery import choose_plots
from cebs.report.inputs import read_material
from cebs.report.pages import Section, report_html, report_markdown, table_latex
from cebs.report.plots import render
from cebs.report.tables import make_tables, published_table
from cebs.results import ResultsTable, read_results
from utils import InputError, RunArguments, ScriptParser, run_folder, run_script, write_text, written_whole


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """
    Arguments of this stage.

    Args:
        results_csv (`str`): the CSV of all methods.
        dataset (`str`, *optional*): only this data set of the CSV.
        k (`int`): the figures of the first k titles.
        reference (`str`): the method that the others are tested against.
        published (`str`, *optional*): CSV of published figures, shown as they are.
    """

    results_csv: str = field(metadata={"help": "The CSV of all methods, as evaluate.py writes it."})
    dataset: str | None = field(default=None, metadata={"help": "Only this data set of the CSV."})
    k: int = field(metadata={"help": "Show the figures of the first k titles."})
    reference: str = field(metadata={"help": "The method that the others are tested against."})
    published: str | None = field(
        default=None, metadata={"help": "CSV of published figures (a column Model), to be set beside ours."}
    )


def main(script_args: ScriptArguments) -> None:
    # -- Input --------------------------------------------------------------------------------------------------------
    results_csv, k = Path(script_args.results_csv), script_args.k
    if not results_csv.is_file():
        raise InputError(f"{results_csv}: no such file; evaluate.py writes it")
    table = read_results(results_csv)
    slugs = file_names(choose_datasets(table, script_args))
    published = published_table(script_args.published) if script_args.published else None
    materials = [read_material(results_csv, table, dataset, script_args.reference, k) for dataset in slugs]
    inputs = [results_csv, *filter(None, [script_args.published]), *(path for m in materials for path in m.inputs)]

    with run_folder(
        script_args.output_dir,
        script=__file__,
        arguments=asdict(script_args),
        inputs=dict.fromkeys(map(str, inputs)),
        outputs=[
            *("report.html", "report.md", "tables/published.tex"),
            *(f"{folder}/{slug}-*" for folder in ("tables", "plots") for slug in slugs.values()),
        ],
        overwrite=script_args.overwrite,
    ) as run:
        if run.done:
            return
        for folder in ("tables", "plots"):
            (run.path / folder).mkdir(exist_ok=True)

        # -- Tables and plots -----------------------------------------------------------------------------------------
        sections = []
        for material in materials:
            slug = slugs[material.dataset]
            tables, plots, images = make_tables(material, k), choose_plots(material, k), {}
            for made in tables:
                write_text(run.path / "tables" / f"{slug}-{made.name}.tex", table_latex(made, f"{slug}-{made.name}"))
            for plot in tqdm(plots, desc=f"plots, {material.dataset}", unit="plot"):
                files = render(plot.draw, *plot.arguments)
                images[plot.name] = files.pop("svg")
                for suffix, content in files.items():
                    with written_whole(run.path / "plots" / f"{slug}-{plot.name}.{suffix}") as temporary:
                        temporary.write_bytes(content)
            sections.append(Section(material.dataset, slug, tables, plots, images, material.notes))
        if published:
            write_text(run.path / "tables" / "published.tex", table_latex(published, "published"))

        # -- Pages ----------------------------------------------------------------------------------------------------
        content = {"sections": sections, "published": published, "k": k, "results_csv": results_csv.name}
        write_text(run.path / "report.md", report_markdown(**content))
        write_text(run.path / "report.html", report_html(**content))
        run.counts |= {
            section.dataset: {"tables": len(section.tables), "plots": len(section.plots)} for section in sections
        }
    print_summary(run.path, sections)


def choose_datasets(table: ResultsTable, script_args: ScriptArguments) -> list[str]:
    """Returns the data sets to report on, in the order of the CSV.

    Raises:
        `InputError`: if the CSV does not have the data set, or no figures at k.
    """
    path, k = script_args.results_csv, script_args.k
    datasets = [name for name in dict.fromkeys(table.name(row, "Dataset") for row in table.rows) if name]
    if not datasets:
        raise InputError(f"{path}: has no rows; evaluate.py writes one a method")
    if k not in table.topk():
        raise InputError(f"{path}: has no figures at k {k}, but at {', '.join(map(str, table.topk()))}; give --k")
    if script_args.dataset is None:
        return datasets
    if script_args.dataset not in datasets:
        raise InputError(f"{path}: has no data set {script_args.dataset!r}; it has {', '.join(datasets)}")
    return [script_args.dataset]


def file_names(datasets: Sequence[str]) -> dict[str, str]:
    """Returns a name for the files of each data set: letters, digits and hyphens, and no name twice."""
    names: dict[str, str] = {}
    for dataset in datasets:
        name = "-".join(re.findall(r"[a-z0-9]+", dataset.lower())) or "dataset"
        number = 2
        while name in names.values():
            name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
        names[dataset] = name
    return names


def print_summary(path: Path, sections: Sequence[Section]) -> None:
    for section in sections:
        print(f"{section.dataset}: {len(section.tables)} tables, {len(section.plots)} plots")
        for note in section.notes:
            print(f"  {note}")
    print(f"written to {path / 'report.html'}")


def make_parser() -> ScriptParser:
    return ScriptParser((ScriptArguments,), __doc__, defaults="configs/report.yaml")


if __name__ == "__main__":
    run_script(main, make_parser())
