"""The plots: functions from what `inputs` read to a matplotlib figure, and the file that keeps it.

They are made for paper: 7.2 inches wide, text of 7 points or more. Colours are those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), which the colour-blind can tell apart, and never stand alone. A method is known by
its number and name; the numbers are those of the tables. Names are plain text: nothing in them is read as a formula.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from cebs.metrics import MOST_EXPOSED
from cebs.report.inputs import CandidateRun, Method, Recommendations, curve

BLACK, GREY, LIGHT_GREY = "#000000", "#6b6b6b", "#d0d0d0"
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
WIDTH = 7.2  # inches; the text block of a page
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "text.parse_math": False,
    "svg.hashsalt": "cebs",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}
LONGEST_NAME = 38  # characters of a method's name in a plot; the tables have the whole
MOST_GENRES = 20  # columns of the plot of genres; the rest is one column
HEAD = 1 / MOST_EXPOSED  # share of the titles that is most exposed, as in the metric Coverage
NO_DATES = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def render(plot: Callable[..., Figure], *args: Any) -> dict[str, bytes]:
    """Draws a plot and returns its files by suffix; the same input gives the same bytes."""
    with matplotlib.rc_context(STYLE):
        figure = plot(*args)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # settled once, for all three files
        files = {}
        for suffix, metadata in NO_DATES.items():
            file = io.BytesIO()
            figure.savefig(file, format=suffix, metadata=metadata)
            files[suffix] = file.getvalue()
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy and diversity
# ---------------------------------------------------------------------------------------------------------------------


def plot_accuracy_diversity(methods: Sequence[Method], reference: str, k: int) -> Figure:
    """Accuracy against diversity, and below, as its key, both figures of each method with their intervals.

    Args:
        methods: at least one with both figures.
        reference: name of the method that the others are tested against; those whose NDCG differs are filled.
        k: how many titles are recommended.
    """
    diversity, accuracy = f"Diversity@{k}", f"NDCG@{k}"
    shown = [method for method in methods if {diversity, accuracy} <= method.estimates.keys()]
    list_height = 0.45 + 0.19 * len(methods)
    figure = Figure(figsize=(WIDTH, 4.1 + list_height), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.1, list_height])

    axes = top.subplots()
    for method in shown:
        colour, at = _role(method, reference)[0], {column: method.value(column) for column in (diversity, accuracy)}
        axes.plot(_interval(method, diversity), [at[accuracy]] * 2, color=colour, linewidth=0.6, alpha=0.6)
        axes.plot([at[diversity]] * 2, _interval(method, accuracy), color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(at[diversity], at[accuracy], **_marker(method, reference), clip_on=False)
    # figures near 0 are many, and a hit ratio's spread grows with its root: on this scale the bars are of like length
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_ylim(0, 1.1 * _greatest(shown, accuracy))
    axes.set_yticks(_root_ticks(axes.get_ylim()[1]))
    _scale_diversity(axes, shown, diversity)
    axes.grid(True)
    axes.set_xlabel(f"{diversity}: distinct titles among all recommendations →")
    axes.set_ylabel(f"{accuracy}, on a square-root scale →")
    top.legend(handles=_role_handles(shown, reference), loc="outside upper center", ncols=3)

    panels = bottom.subplots(1, 2, sharey=True)
    for panel, column in zip(panels, (accuracy, diversity), strict=True):
        _list_figures(panel, methods, reference, column)
    panels[0].set_xlim(-0.03 * _greatest(shown, accuracy), 1.05 * _greatest(shown, accuracy))
    panels[0].xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    panels[0].set_yticks(range(len(methods)), [label(method) for method in methods])
    _scale_diversity(panels[1], shown, diversity)

    points = [(method.value(diversity), method.value(accuracy)) for method in shown]
    _place_labels(figure, axes, points, [str(method.number) for method in shown])
    return figure


def _list_figures(axes: Axes, methods: Sequence[Method], reference: str, column: str) -> None:
    """Draws a figure of each method with its interval, a row a method, and a line at the reference's."""
    for place, method in enumerate(methods):
        if place % 2 == 0:
            axes.axhspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=-1, linewidth=0)
        if column not in method.estimates:
            continue
        if method.name == reference:
            axes.axvline(method.value(column), color=VERMILLION, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        axes.plot(_interval(method, column), [place] * 2, color=_role(method, reference)[0], linewidth=1.0)
        axes.plot(method.value(column), place, **_marker(method, reference))
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{column} →")


def _greatest(methods: Sequence[Method], column: str) -> float:
    """Returns the end of a scale that holds a figure of all methods and its intervals; not 0."""
    return max(max(*_interval(method, column), method.value(column)) for method in methods) or 1.0


def _scale_diversity(axes: Axes, methods: Sequence[Method], column: str) -> None:
    """Makes the horizontal axis logarithmic where some methods name more than ten times the titles of others."""
    values = [method.value(column) for method in methods]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())  # its labels are mathematics, which names must not be


def _root_ticks(top: float) -> list[float]:
    """Returns round numbers from 0 to `top` that stand apart on a square-root scale."""
    powers = range(-6, 1)
    ticks = [mantissa * 10.0**power for power in powers for mantissa in (1, 2, 4)]
    return [0.0, *(tick for tick in ticks if top / 100 < tick <= top)]


def _interval(method: Method, column: str) -> list[float]:
    """Returns the ends of a figure's interval, or of one standard deviation over seeds, or the figure twice."""
    estimate = method.estimates[column]
    spread = estimate.std or 0.0
    return list(estimate.interval or (estimate.value - spread, estimate.value + spread))


def _marker(method: Method, reference: str) -> dict[str, Any]:
    colour, shape, size, _ = _role(method, reference)
    filled = method.name == reference or (method.test is not None and method.test.ndcg_differs)
    return {
        "color": colour,
        "marker": shape,
        "markersize": size,
        "markerfacecolor": colour if filled else "white",
        "markeredgewidth": 1.0,
    }


def _role(method: Method, reference: str) -> tuple[str, str, float, str]:
    """Returns colour, marker, its size, and what they mean."""
    if method.name == reference:
        return VERMILLION, "D", 4.5, "the reference"
    if method.is_baseline:
        return BLACK, "s", 4.5, "a baseline without a language model"
    if method.facts["Protocol"].startswith("ranked"):
        return GREEN, "^", 5.0, "a language model that ranks titles itself"
    return BLUE, "o", 4.5, "a language model, grounded"


def _role_handles(methods: Sequence[Method], reference: str) -> list[Line2D]:
    roles = dict.fromkeys(_role(method, reference) for method in methods)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=size, linestyle="", label=meaning, markerfacecolor=face)
        for colour, marker, size, meaning in roles
        for face in [colour if meaning == "the reference" else "white"]
    ]
    if any(method.test and method.test.ndcg_differs for method in methods):
        meaning = "filled: NDCG differs from it (p < 0.05)"
        handles.append(Line2D([], [], color=GREY, marker="o", markersize=4.5, linestyle="", label=meaning))
    return handles


def _place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Writes a text beside each point where it hides no other point or text, and a thin line where it stands away."""
    figure.draw_without_rendering()  # the layout is settled before anything is measured
    renderer = FigureCanvasAgg(figure).get_renderer()
    pixel = figure.dpi / 72
    centres = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - 3.2 * pixel, y - 3.2 * pixel, x + 3.2 * pixel, y + 3.2 * pixel) for x, y in centres]
    frame = axes.get_window_extent(renderer)
    for (x, y), point, text in zip(centres, points, texts, strict=True):
        probe = axes.text(*point, text, fontsize=7)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        best: tuple[float, float, float, Bbox] | None = None
        for distance, angle in _offsets():
            dx = distance * pixel * math.cos(angle)
            dy = distance * pixel * math.sin(angle)
            box = Bbox.from_bounds(
                x + dx - extent.width / 2 - pixel, y + dy - extent.height / 2, extent.width + 2 * pixel, extent.height
            )
            hidden = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, frame)
            if best is None or hidden + outside < best[0]:
                best = (hidden + outside, dx, dy, box)
            if hidden + outside == 0:
                break
        _, dx, dy, box = best
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": GREY, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            text,
            point,
            (dx / pixel, dy / pixel),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            arrowprops=line if math.hypot(dx, dy) > 9 * pixel else None,
        ).set_in_layout(False)  # the axes must not move any more


def _offsets() -> Iterator[tuple[float, float]]:
    """Places around a point: distance in points and angle, near ones and upper ones first."""
    for distance in range(8, 64, 4):
        for step in range(16):
            yield distance, math.pi / 4 + (1 if step % 2 else -1) * ((step + 1) // 2) * math.pi / 8


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return both.width * both.height if both is not None else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Genres
# ---------------------------------------------------------------------------------------------------------------------


def plot_genre_shares(methods: Sequence[Method], recommendations: Recommendations) -> Figure:
    """Genre shares of the histories, and by how much those of each method's recommendations differ from them."""
    shares = {number: share for number, share in recommendations.shares.items() if np.isfinite(share).all()}
    shown = [method for method in methods if method.number in shares]
    order = np.argsort(-recommendations.history, kind="stable")
    first, rest = order[:MOST_GENRES], order[MOST_GENRES:]

    def columns(shares: np.ndarray) -> np.ndarray:
        return np.append(shares[first], shares[rest].sum()) if len(rest) else shares[first]

    names = [recommendations.genres[place] for place in first] + ([f"{len(rest)} other genres"] if len(rest) else [])
    history = columns(recommendations.history)  # [G']
    difference = 100 * np.array([columns(shares[m.number]) - history for m in shown])  # [methods, G']
    limit = max(5.0, float(np.abs(difference).max()))

    figure = Figure(figsize=(WIDTH, 2.7 + 0.2 * len(shown)), layout="constrained")
    bars, heat = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 0.2 + 0.2 * len(shown)])
    bars.bar(range(len(names)), 100 * history, color=GREY, width=0.7)
    for place, share in enumerate(history):
        bars.annotate(
            f"{100 * share:.0f}", (place, 100 * share), (0, 1), textcoords="offset points", ha="center", va="bottom"
        )
    bars.set_ylabel("share in the\nhistories, %")
    bars.margins(y=0.2)
    bars.tick_params(axis="x", which="both", length=0, labelbottom=False)

    heat.imshow(difference, cmap="PuOr_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for (row, column), value in np.ndenumerate(difference):
        strong = abs(value) > 0.6 * limit
        points = f"{value:+.0f}".replace("-", "−") if round(value) else "0"
        heat.text(column, row, points, ha="center", va="center", color="white" if strong else BLACK, fontsize=7)
    heat.set_yticks(range(len(shown)), [label(method) for method in shown])
    heat.set_xticks(range(len(names)), [shorten(name, 30) for name in names], rotation=40, ha="right")
    heat.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    heat.set_yticks(np.arange(len(shown) + 1) - 0.5, minor=True)
    heat.grid(which="minor", color="white", linewidth=1)
    heat.tick_params(which="both", length=0)
    heat.spines[:].set_visible(False)
    heat.set_title("recommendations minus histories, percentage points", loc="left")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Exposure
# ---------------------------------------------------------------------------------------------------------------------


def lorenz_curve(exposure: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a Lorenz curve of counts over titles in the order of their exposure, the least exposed first.

    Titles of the same exposure have no order among themselves: they are one straight piece of the curve.

    Args:
        exposure (`np.ndarray` of shape `[M]`): what the titles are ordered by.
        counts (`np.ndarray` of shape `[M]`): what is summed.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: cumulative shares of the titles and of the counts, from 0 to 1, with a point
        for each level of exposure.

    ```python
    >>> lorenz_curve(np.array([5, 0, 0, 1]), np.array([2, 1, 0, 1]))
    (array([0.  , 0.5 , 0.75, 1.  ]), array([0.  , 0.25, 0.5 , 1.  ]))
    ```
    """
    _, level, titles = np.unique(exposure, return_inverse=True, return_counts=True)
    counted = np.bincount(level, weights=counts)
    return tuple(np.concatenate([[0.0], np.cumsum(sums) / sums.sum()]) for sums in (titles, counted))


def plot_exposure(methods: Sequence[Method], recommendations: Recommendations) -> Figure:
    """A Lorenz curve for each method: its recommendations over titles in the order of their exposure in training."""
    shown = [method for method in methods if method.number in recommendations.counts]
    curves = {m.number: lorenz_curve(recommendations.exposure, recommendations.counts[m.number]) for m in shown}
    training = lorenz_curve(recommendations.exposure, recommendations.exposure)
    figure, panels = _small_multiples(shown, height=1.0, share=True)
    for method, axes in panels:
        axes.axvline(1 - HEAD, color=LIGHT_GREY, linewidth=0.6)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, linestyle=":")
        axes.plot(*training, color=BLACK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.plot(*curves[method.number], color=BLUE, linewidth=1.7)
        tail = np.interp(1 - HEAD, *curves[method.number])
        axes.text(0.05, 0.95, f"{tail:.0%}", transform=axes.transAxes, va="top", color=BLUE)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.4, 0.8], yticks=[0, 0.5, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.supxlabel("share of the catalogue's titles, the least exposed in training first", fontsize=7.5)
    figure.supylabel("share of the recommendations", fontsize=7.5)
    _legend_on_top(
        figure,
        [
            Line2D(
                [],
                [],
                color=BLUE,
                linewidth=1.7,
                label="recommendations",
            ),
            Line2D([], [], color=BLACK, linewidth=0.8, linestyle=(0, (4, 2)), label="training records"),
            Line2D([], [], color=GREY, linewidth=0.7, linestyle=":", label="all titles alike"),
            Line2D([], [], color=LIGHT_GREY, linewidth=1, label=f"from here on: the {HEAD:.0%} most exposed titles"),
        ],
    )
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def plot_losses(methods: Sequence[Method]) -> Figure:
    """Training and validation loss over steps, a panel a method; preference training shares one axis, SFT another."""
    return _plot_training(methods, "loss", "loss")


def plot_margins(methods: Sequence[Method]) -> Figure:
    """Reward margins of chosen over rejected titles over steps, a panel a method."""
    return _plot_training(methods, "rewards/margins", "reward margin (chosen minus rejected)")


def has_curve(method: Method, name: str) -> bool:
    return any(curve(log, name)[0] for log in method.logs)


def _plot_training(methods: Sequence[Method], name: str, axis_label: str) -> Figure:
    shown = [method for method in methods if has_curve(method, name)]
    figure, panels = _small_multiples(shown, height=1.05)
    for method, axes in panels:
        for log in method.logs:
            axes.plot(*curve(log, name), color=BLUE, linewidth=1.0)
            axes.plot(*curve(log, f"eval_{name}"), color=VERMILLION, marker="D", markersize=3, linewidth=0.8)
        axes.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    for aligned in (True, False):
        _same_limits([axes for method, axes in panels if has_curve(method, "rewards/margins") == aligned])
    figure.supxlabel("optimiser steps", fontsize=7.5)
    figure.supylabel(axis_label, fontsize=7.5)
    _legend_on_top(
        figure,
        [
            Line2D([], [], color=BLUE, label="training"),
            Line2D([], [], color=VERMILLION, marker="D", markersize=3, label="validation"),
        ],
    )
    return figure


def _same_limits(panels: Sequence[Axes]) -> None:
    limits = [axes.get_ylim() for axes in panels]
    low, high = min((low for low, _ in limits), default=0), max((high for _, high in limits), default=1)
    for axes in panels:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))  # markers at an end stay whole


# ---------------------------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------------------------


def plot_candidates(runs: Sequence[CandidateRun]) -> Figure:
    """How many rounds of candidates the records needed: a bar for each run and split."""
    rounds = sorted({number for run in runs for number in run.rounds})
    colours = matplotlib.colormaps["Blues"](np.linspace(0.25, 0.95, len(rounds)))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.27 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for place, run in enumerate(runs):
        left = 0.0
        for number, colour in zip(rounds, colours, strict=True):
            share = run.rounds.get(number, 0) / run.records
            axes.barh(place, share, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.74)
            if share > 0.05:
                ink = BLACK if colour[:3].mean() > 0.6 else "white"
                axes.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=7)
            left += share
        axes.text(1.08, place, f"{run.candidates_per_record:.1f}", va="center", ha="right", fontsize=7)
        axes.text(1.31, place, f"{run.without_match} of {run.records:,}", va="center", ha="right", fontsize=7)
    axes.text(1.08, -0.6, "candidates\na record", va="bottom", ha="right", fontsize=7)
    axes.text(1.31, -0.6, "records without\na match", va="bottom", ha="right", fontsize=7)
    axes.set_yticks(range(len(runs)), [f"{_ends_of(run.name)}, {run.split}" for run in runs])
    axes.set(xlim=(0, 1.31), ylim=(len(runs) - 0.5, -0.5), xlabel="share of the records", xticks=np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_label_coords(0.5 / 1.31, -0.32 / (0.27 * len(runs)))
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    handles = [Patch(color=colour) for colour in colours]
    labels = [f"{number} round{'s' if number > 1 else ''}" for number in rounds]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(rounds), 8))
    return figure


def _ends_of(path: str) -> str:
    """Returns a path that is too long by its beginning and its end."""
    path = plain(path)
    return path if len(path) <= LONGEST_NAME else f"{path[:10]}…{path[11 - LONGEST_NAME :]}"


# ---------------------------------------------------------------------------------------------------------------------
# Shared
# ---------------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Returns a name as one line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def shorten(text: str, longest: int = LONGEST_NAME) -> str:
    text = plain(text)
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def label(method: Method) -> str:
    """Returns number and name of a method, as an axis shows it."""
    return f"{shorten(method.name)}  {method.number}"


def _small_multiples(
    methods: Sequence[Method], height: float, share: bool = False
) -> tuple[Figure, list[tuple[Method, Axes]]]:
    """Returns a figure with a titled panel for each method, up to five in a row; `share` writes the axes once."""
    columns = min(5, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(WIDTH * min(1, 0.1 + 0.3 * columns), 0.8 + (height + 0.42) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    panels = list(zip(methods, grid.flat, strict=False))
    for method, axes in panels:
        title = textwrap.wrap(f"{method.number}  {plain(method.name)}", 20, max_lines=3, placeholder="…")
        axes.set_title("\n".join(title), loc="left", fontsize=7)
    for axes in grid.flat[len(methods) :]:
        axes.set_axis_off()
    if share:
        for axes in grid.flat[max(len(methods) - columns, 0) : len(methods)]:
            axes.tick_params(labelbottom=True)  # also above an empty place
    return figure, panels


def _legend_on_top(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
