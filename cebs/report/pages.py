"""The report as HTML, Markdown and LaTeX: templates, in which every value is escaped.

Names of methods, titles and genres are data, whatever they look like.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cebs.report.gallery import Plot
from cebs.report.plots import plain
from cebs.report.tables import Table

TEMPLATES = Path(__file__).parent / "templates"
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "–": r"\textendash{}",
    "…": r"\ldots{}",
}


@dataclass(frozen=True)
class Section:
    """What a report says of one data set.

    Args:
        dataset (`str`): the name in the CSV.
        slug (`str`): the same in names of files.
        tables (`list[Table]`): in order.
        plots (`list[Plot]`): in order.
        images (`dict[str, bytes]`): the plots as SVG, by name.
        notes (`list[str]`): what is left out, and why.
    """

    dataset: str
    slug: str
    tables: list[Table]
    plots: list[Plot]
    images: dict[str, bytes]
    notes: list[str]

    def image_url(self, plot: Plot) -> Markup:
        """Returns the image itself as a URL, so that a page needs no other file."""
        return Markup(f"data:image/svg+xml;base64,{base64.b64encode(self.images[plot.name]).decode()}")


def escape_latex(text: str) -> str:
    """Returns text that LaTeX prints as it stands."""
    escaped = "".join(LATEX.get(char, char) for char in plain(text))
    return re.sub("-(?=-)", "-{}", escaped)  # two hyphens would be a dash


def escape_markdown(text: str) -> str:
    """Returns text that Markdown shows as it stands, in a table, a list or a paragraph."""
    text = re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", plain(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    opens_block = r"^(?:(\d+)(?=[.)](?: |$))|(?=[-+=]))"  # a list, or a line that makes a heading of the one before it
    return re.sub(opens_block, r"\1\\", text)


def _environment(escape: Callable[[str], str] | None, **delimiters: str) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape is None,
        finalize=lambda value: value if isinstance(value, Markup) else (escape or plain)(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **delimiters,
    )


HTML = _environment(None)
MARKDOWN = _environment(escape_markdown)
TEX = _environment(
    escape_latex,
    block_start_string="<%",
    block_end_string="%>",
    variable_start_string="<<",
    variable_end_string=">>",
    comment_start_string="<#",
    comment_end_string="#>",
)


def report_html(**content: Any) -> str:
    """Returns the report as one page of HTML: no file and no network is needed to show it."""
    return HTML.get_template("report.html").render(content)


def report_markdown(**content: Any) -> str:
    """Returns the report in Markdown; its plots are files beside it."""
    return MARKDOWN.get_template("report.md").render(content)


def table_latex(table: Table, label: str) -> str:
    """Returns a table in LaTeX, for a document that uses booktabs."""
    return TEX.get_template("table.tex").render(table=table, label=label)
