"""Which negatives are next volumes: of each file of preferences the share of chosen and of rejected titles that are of
a series which the history holds. Who has read two volumes may well read the third: often a false negative.

    python benchmarks/negatives_by_series.py --preferences output/cluster_exposure/data/dpo_hard_train.json
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cebs.preferences import read_preferences
from cebs.prompts import quoted_titles, unquote
from cebs.series import continues_series
from utils import run_script


@dataclass
class Arguments:
    preferences: list[str] = field(metadata={"help": "Files of preferences: prompt, chosen, rejected."})


def main(args: Arguments) -> None:
    width = max(map(len, args.preferences))
    print(f"{'of a series of the history':{width}}  {'chosen':>16}  {'rejected':>16}")
    for file in args.preferences:
        line = f"{file:{width}}"
        records = read_preferences(file)
        histories = [quoted_titles(record["prompt"]) for record in records]
        for titles in ([[record["chosen"]] for record in records], [record["rejected"] for record in records]):
            continuing = [
                continues_series(unquote(title), history)
                for own, history in zip(titles, histories, strict=True)
                for title in own
            ]
            line += f"  {sum(continuing):>7,} of {len(continuing):>5,}"
        print(line)


if __name__ == "__main__":
    run_script(main, TrlParser((Arguments,), description=__doc__))
