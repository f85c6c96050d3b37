"""Prediction records: what stage 4 writes and `evaluate.py` reads."""

from typing import Any

from cebs.prompts import Record


def prediction_record(record: Record, prediction: str, ranking: list[str] | None = None) -> dict[str, Any]:
    """Returns what is written for a record; `user` and `ranking` only where there are any."""
    return (
        {"prompt": record.prompt, "prediction": prediction, "ground_truth": record.target}
        | ({"user": record.user} if record.user else {})
        | ({"ranking": ranking} if ranking is not None else {})
    )
