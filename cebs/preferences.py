"""Preference records, as stage 2 writes and stage 3 reads them: one chosen title, one or more rejected ones."""

from pathlib import Path
from typing import Any

from cebs.prompts import Record, quote
from utils import InputError, read_list


def preference_record(record: Record, rejected: list[str]) -> dict[str, Any]:
    """Returns `{"prompt", "chosen", "rejected"}`; `rejected` is a text for one title and a list for several."""
    titles = [quote(title) for title in rejected]
    return {
        "prompt": record.prompt,
        "chosen": quote(record.target),
        "rejected": titles[0] if len(titles) == 1 else titles,
    }


def read_preferences(path: str | Path) -> list[dict[str, Any]]:
    """Reads preference records; `rejected` is always a list in what is returned.

    Raises:
        `InputError`: naming the file and the first record that is not as it should be.
    """
    records = []
    for index, raw in enumerate(read_list(path, ("prompt", "chosen", "rejected"))):
        rejected = [raw["rejected"]] if isinstance(raw["rejected"], str) else raw["rejected"]
        if not isinstance(rejected, list) or not rejected:
            raise InputError(f"{path}: record {index}: rejected must be a title or a list of titles that is not empty")
        texts = [raw["prompt"], raw["chosen"], *rejected]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(f"{path}: record {index}: prompt, chosen and rejected must be text, and not empty")
        records.append({"prompt": raw["prompt"], "chosen": raw["chosen"], "rejected": rejected})
    return records
