"""What evaluation costs after the encoder, on made-up embeddings: time, memory, and the ratio to a plain loop.

    python benchmarks/bench_evaluate.py --titles 1000000 --users 10000 --json FILE

Work is the search for the nearest titles and all figures at both k, intervals left out. The plain loop goes user by
user: distances to all titles, a full sort, and a look at each rank; it is measured at the size of the published tables
and must find the same. Larger sizes show that time is linear in titles and in users, and what is held in memory on top
of the embeddings.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, peak_mb, report, seconds, time_row
from cebs.grounding import nearest_titles
from cebs.metrics import EvaluationSet, record_sums
from cebs.statistics import intervals
from utils import run_script

PUBLISHED = (4058, 1000)  # titles and users of Goodreads as SPRec sampled it
DIMENSIONS, GENRES, TOPK = 384, 27, (5, 10)
CPU = torch.device("cpu")


@dataclass
class Arguments:
    titles: int = field(default=1_000_000, metadata={"help": "Titles of the largest catalogue."})
    users: int = field(default=10_000, metadata={"help": "Users of the largest test set."})
    resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap, at the published size."})
    repetitions: int = field(default=3, metadata={"help": "Interleaved repetitions; the median counts."})
    json: str | None = field(default=None, metadata={"help": "File for the rows."})


class Case(NamedTuple):
    """Made-up embeddings of predictions `[N, D]` and titles `[M, D]`, and what the figures need beside them."""

    queries: np.ndarray
    catalogue: np.ndarray
    evaluation_set: EvaluationSet

    def of(self, titles: int, users: int) -> "Case":
        """Returns the case with only the first titles and users."""
        whole = self.evaluation_set
        targets = whole.targets[:users] % titles
        return Case(
            self.queries[:users],
            self.catalogue[:titles],
            EvaluationSet(
                targets,
                whole.history_genres[:users],
                whole.genre_weights[:titles],
                whole.exposure[:titles],
                whole.exposure[targets],
            ),
        )


def made_up(titles: int, users: int) -> Case:
    rng = np.random.default_rng(0)
    targets = rng.integers(titles, size=users)
    weights = rng.random((titles, GENRES), np.float32)
    exposure = rng.poisson(1e4 / np.arange(1, titles + 1))
    return Case(
        rng.standard_normal((users, DIMENSIONS), np.float32),
        rng.standard_normal((titles, DIMENSIONS), np.float32),
        EvaluationSet(targets, weights[targets], weights, exposure, exposure[targets]),
    )


def ours(case: Case) -> dict[int, dict[str, float]]:
    ranked = nearest_titles(case.queries, case.catalogue, max(TOPK))
    is_invented = np.zeros(len(ranked), bool)
    return {k: record_sums(ranked, is_invented, case.evaluation_set, k).figures() for k in TOPK}


def plain(case: Case) -> dict[int, dict[str, float]]:
    """HR, NDCG, Diversity, ORRatio, DGU and MGU by loops over users and ranks; the other figures are left out."""
    titles_genres, found = case.evaluation_set.genre_weights, {}
    for k in TOPK:
        hits, ndcg, counts, genres = 0, 0.0, Counter(), np.zeros(GENRES)
        for query, target in zip(case.queries, case.evaluation_set.targets, strict=True):
            order = np.argsort(np.linalg.norm(case.catalogue - query, axis=1), kind="stable")
            for rank in range(k):
                title = int(order[rank])
                counts[title] += 1
                genres += titles_genres[title]
                if title == target:
                    hits += 1
                    ndcg += math.log(2) / math.log(rank + 2)
        history = case.evaluation_set.history_genres.sum(axis=0)
        difference = genres / genres.sum() - history / history.sum()
        found[k] = {
            "HR": hits / len(case.queries),
            "NDCG": ndcg / len(case.queries),
            "Diversity": len(counts),
            "ORRatio": sum(count for _, count in counts.most_common(3)) / counts.total(),
            "DGU": difference.max() - difference.min(),
            "MGU": np.abs(difference).mean(),
        }
    return found


def check_same(case: Case) -> None:
    expected, figures = plain(case), ours(case)
    for k in TOPK:
        for metric, figure in expected[k].items():
            assert math.isclose(figures[k][metric], figure, rel_tol=1e-4), (metric, k, figures[k][metric], figure)


def main(args: Arguments) -> None:
    published = made_up(*PUBLISHED)
    check_same(published)
    plain_s, ours_s = interleaved([lambda: plain(published), lambda: ours(published)], args.repetitions, CPU)
    titles, users = PUBLISHED
    rows = [time_row(f"{titles:,} titles x {users:,} users, plain loop", plain_s, ours_s, None)]
    ranked = nearest_titles(published.queries, published.catalogue, max(TOPK))
    sums = [record_sums(ranked, np.zeros(users, bool), published.evaluation_set, k) for k in TOPK]
    bootstrap_s = seconds(lambda: [intervals(of_k, args.resamples, seed=0) for of_k in sums], CPU)
    rows.append(time_row(f"the same, intervals from {args.resamples:,} resamples", None, bootstrap_s, None))

    largest = made_up(args.titles, args.users)
    embeddings_mb = (largest.queries.nbytes + largest.catalogue.nbytes) / 1e6
    for part in (4, 2):
        for size in ((args.titles // part, args.users), (args.titles, args.users // part)):
            part_s = seconds(lambda size=size: ours(largest.of(*size)), CPU)
            rows.append(time_row(f"{size[0]:,} titles x {size[1]:,} users", None, part_s, None))
    times: list[float] = []
    memory_mb = peak_mb(lambda: times.append(seconds(lambda: ours(largest), CPU)), CPU)
    rows.append(time_row(f"{args.titles:,} titles x {args.users:,} users", None, times[0], None))
    rows.append(
        {
            "case": f"{args.titles:,} x {args.users:,}, on top of {embeddings_mb:,.0f} MB of embeddings",
            "baseline_mb": None,
            "ours_mb": memory_mb,
            "ratio": None,
        }
    )
    report(rows, args.json)


if __name__ == "__main__":
    run_script(main, TrlParser((Arguments,), description=__doc__))
