"""Whose hits are next volumes: the accuracy of each row of a table where the target is of a series that the history
holds, and where it is not.

    python benchmarks/accuracy_by_series.py --results_csv output/results.csv --data_dir ../shared/goodreads
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cebs.per_user import find_per_user, mean_over_seeds
from cebs.prompts import read_records
from cebs.results import read_results
from cebs.series import continues_series
from utils import InputError, run_script


@dataclass
class Arguments:
    results_csv: str = field(metadata={"help": "The table, with its files per user beside it."})
    data_dir: str = field(metadata={"help": "Data folder of its rows."})
    topk: int = field(default=10, metadata={"help": "Titles of a recommendation."})


def main(args: Arguments) -> None:
    data_dir, table = Path(args.data_dir), read_results(Path(args.results_csv))
    records = read_records(data_dir / "test_sample.json")
    in_series = np.array([continues_series(record.target, record.history) for record in records])
    if not in_series.any() or in_series.all():
        raise InputError(f"{data_dir}: {in_series.sum()} of {len(records)} targets are of a series of their history")
    found = {}
    for row in table.rows:
        if contents := find_per_user(args.results_csv, table.name(row, "Dataset"), table.name(row, "Model")):
            found[table.name(row, "Model")] = mean_over_seeds(contents)["users"]
    if not found:
        raise InputError(f"{args.results_csv}: has no files per user beside it; evaluate.py writes them")
    width = max(map(len, found))
    print(f"{'':{width}}  {'in a series of the history':27}  others")
    print(f"{'method':{width}}" + f"  {'hits':>11}    HR@{args.topk}  NDCG@{args.topk}" * 2)
    for method, users in found.items():
        if any(user["target"] != record.target for user, record in zip(users, records, strict=False)):
            raise InputError(f"{args.results_csv}: {method}: its records are not those of {data_dir}; give another one")
        if str(args.topk) not in users[0]["hit"]:
            raise InputError(f"{args.results_csv}: {method}: has no figures at {args.topk}; give another --topk")
        hits, ndcg = (np.array([user[name][str(args.topk)] for user in users]) for name in ("hit", "ndcg"))
        line = f"{method:{width}}"
        for group in (in_series[: len(users)], ~in_series[: len(users)]):
            line += (
                f"  {hits[group].sum():4.0f} of {group.sum():3}  {hits[group].mean():7.4f}  {ndcg[group].mean():7.4f}"
            )
        print(line)


if __name__ == "__main__":
    run_script(main, TrlParser((Arguments,), description=__doc__))
