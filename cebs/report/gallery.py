"""Which plots a report has, with their captions, and texts for readers who do not see them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from cebs.report import plots
from cebs.report.inputs import Material, Recommendations, named


@dataclass(frozen=True)
class Plot:
    """A plot of a report.

    Args:
        name (`str`): of its files, without suffix.
        title (`str`): what it shows.
        caption (`str`): how to read it.
        alt (`str`): what is to be seen in it, for those who do not see it.
        draw (`Callable`): draws it from `arguments`.
        arguments (`tuple`): of `draw`.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[..., Figure]
    arguments: tuple[Any, ...]


def choose_plots(material: Material, k: int) -> list[Plot]:
    """Returns the plots that there is material for."""
    methods, found = material.methods, []
    reference = material.tested.reference
    with_both = [method for method in methods if {f"NDCG@{k}", f"Diversity@{k}"} <= method.estimates.keys()]
    if with_both:
        accurate = max(with_both, key=lambda method: method.value(f"NDCG@{k}"))
        diverse = max(with_both, key=lambda method: method.value(f"Diversity@{k}"))
        found.append(
            Plot(
                name="accuracy-diversity",
                title="Accuracy against diversity",
                caption="Each point is a method, by the number of its row; the list below has both figures of each. "
                "Lines are 95 % intervals or, where a row is a mean over seeds, one standard deviation to either side. "
                "Up and to the right is better.",
                alt=f"Scatter plot of NDCG@{k} against Diversity@{k} of {len(with_both)} methods, and a list of both "
                f"with intervals. Highest NDCG: {accurate.name}, {accurate.value(f'NDCG@{k}'):.4f}. Most distinct "
                f"titles: {diverse.name}, {diverse.value(f'Diversity@{k}'):,.0f}.",
                draw=plots.plot_accuracy_diversity,
                arguments=(methods, reference, k),
            )
        )
    if material.recommendations:
        found += _recommendation_plots(material, material.recommendations)
    for name, title, quantity, caption, draw in (
        (
            "losses",
            "Losses over training",
            "loss",
            "Loss over optimiser steps. The panels of preference training share one scale, those of supervised "
            "fine-tuning another.",
            plots.plot_losses,
        ),
        (
            "margins",
            "Reward margins over training",
            "rewards/margins",
            "Over optimiser steps, how much greater the implicit reward of the chosen title is than that of the "
            "rejected ones. All panels share one scale.",
            plots.plot_margins,
        ),
    ):
        trained = [method for method in methods if plots.has_curve(method, quantity)]
        if trained:
            alt = f"A panel with curves of training and validation for each of {named(trained)}."
            found.append(Plot(name, title, caption, alt, draw, (methods,)))
    if material.candidates:
        most = max(material.candidates, key=lambda run: run.candidates_per_record)
        found.append(
            Plot(
                name="candidates",
                title="Candidates needed for a record",
                caption="Titles are proposed in rounds until one lies inside the user's interest cluster. A bar shows "
                "which share of the records needed how many rounds; at its right stand the mean number of titles "
                "proposed, and how many records had no match after the last round.",
                alt=f"A bar for each of {len(material.candidates)} sets of records. Most candidates a record: "
                f"{most.name}, {most.split}, {most.candidates_per_record:.1f}.",
                draw=plots.plot_candidates,
                arguments=(material.candidates,),
            )
        )
    return found


def _recommendation_plots(material: Material, recommendations: Recommendations) -> list[Plot]:
    exposure = Plot(
        name="exposure",
        title="Recommendations against exposure",
        caption="Lorenz curves. The titles of the catalogue stand from left to right by their exposure in the training "
        "records, the least exposed first; the curve shows which share of the recommendations the titles up to there "
        "have. The lower it runs, the more goes to what is seen often anyway. The number is the share of the "
        "recommendations outside the 20 % most exposed titles (Coverage).",
        alt=f"A Lorenz curve for each of {len(recommendations.counts)} methods, with the share of its "
        "recommendations outside the 20 % most exposed titles.",
        draw=plots.plot_exposure,
        arguments=(material.methods, recommendations),
    )
    names = {method.number: method.name for method in material.methods}
    differences = {
        (names[number], genre): 100 * (share - past)
        for number, shares in recommendations.shares.items()
        for genre, share, past in zip(recommendations.genres, shares, recommendations.history, strict=True)
        if math.isfinite(share - past)
    }
    if not differences:  # no histories, or no genres
        return [exposure]
    (method, genre), greatest = max(differences.items(), key=lambda item: abs(item[1]))
    genres = Plot(
        name="genre-shares",
        title="Genres: recommendations against histories",
        caption="Above, the share of each genre in the histories. Below, by how many percentage points its share in a "
        "method's recommendations is greater (orange, +) or smaller (violet, −). DGU is the distance between the "
        "greatest and the smallest of a row.",
        alt=f"Coloured table of {len(recommendations.shares)} methods by {len(recommendations.genres)} genres. "
        f"Greatest difference: {method}, {genre}, {greatest:+.1f} percentage points.",
        draw=plots.plot_genre_shares,
        arguments=(material.methods, recommendations),
    )
    return [genres, exposure]
