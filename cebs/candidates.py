"""`candidates.json`: the titles that a model proposed for each record, from which negatives are chosen, also again."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cebs.catalogue import interest_cluster
from cebs.errors import InputError
from cebs.files import read_json
from cebs.negatives import Candidate, NegativeSampler
from cebs.preferences import SPLITS
from cebs.prompts import Record
from cebs.selectors import Selector


def candidates_as_json(
    records: dict[str, list[Record]],
    candidates: dict[str, list[list[Candidate]]],
    sampler: NegativeSampler,
    data_sums: dict[str, str],
) -> dict[str, Any]:
    """Returns what `candidates.json` holds: every candidate in the order generated, and the cluster of its record."""
    stored: dict[str, Any] = {"data_sha256": data_sums}
    for split in SPLITS:
        stored[split] = [
            {
                "record": index,
                "cluster": interest_cluster(record.history, sampler.catalogue),
                "candidates": [{"order": order, **asdict(candidate)} for order, candidate in enumerate(proposed)],
            }
            for index, (record, proposed) in enumerate(zip(records[split], candidates[split], strict=True))
        ]
    return stored


def read_candidates(
    path: Path, records: dict[str, list[Record]], data_sums: dict[str, str], selectors: Iterable[Selector]
) -> dict[str, list[list[tuple[str, float | None]]]]:
    """Reads the titles of a stored `candidates.json` and their log-probabilities, `None` where it has none.

    Raises:
        `InputError`: if the file is of another form, belongs to other records, or lacks what a selector needs.
    """
    stored = read_json(path)
    by_likelihood = next((selector for selector in selectors if selector.order == "likely"), None)
    proposals = {}
    for split in SPLITS:
        try:
            proposals[split] = [
                [(candidate["title"], candidate.get("log_prob")) for candidate in entry["candidates"]]
                for entry in stored[split]
            ]
            same_data = stored["data_sha256"][split] == data_sums[split]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: is not a candidates.json of this script ({split}: {error!r})") from error
        for index, proposed in enumerate(proposals[split]):
            for title, log_prob in proposed:
                if not isinstance(title, str):
                    raise InputError(f"{path}: a title of {split} is not text; give a candidates.json of this script")
                if log_prob is None and by_likelihood:
                    raise InputError(
                        f"{path}: {split}, record {index}: {title!r} has no log_prob, which {by_likelihood} needs; "
                        "generate the candidates again"
                    )
                if log_prob is not None and not (type(log_prob) in (int, float) and math.isfinite(log_prob)):
                    raise InputError(f"{path}: {split}, record {index}: log_prob of {title!r} is not a number")
        if not same_data or len(proposals[split]) < len(records[split]):
            raise InputError(f"{path}: was made from another {split}_sample.json; give the data folder it belongs to")
        proposals[split] = proposals[split][: len(records[split])]
    return proposals
