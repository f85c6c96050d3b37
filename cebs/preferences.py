"""Preference data: what both scripts of stage 2 take and read, and the records that they write and stage 3 reads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cebs.catalogue import CATALOGUE_FILES
from cebs.commands import RunArguments
from cebs.errors import InputError
from cebs.files import read_list
from cebs.prompts import Record, quote, read_records

SPLITS = ("train", "valid")


@dataclass(kw_only=True)
class PreferenceArguments(RunArguments):
    """What both scripts of stage 2 take, beside the arguments of every run.

    Args:
        data_dir (`str`): data folder with `train_sample.json`, `valid_sample.json` and the catalogue.
        max_train_samples, max_eval_samples (`int`, *optional*): use only the first records of a file.
    """

    data_dir: str = field(metadata={"help": "Data folder: records and catalogue."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first validation records."})

    @property
    def record_files(self) -> dict[str, Path]:
        """The file of each split."""
        return {split: Path(self.data_dir) / f"{split}_sample.json" for split in SPLITS}

    @property
    def data_files(self) -> list[Path]:
        """All files of the data folder that are read."""
        return [*self.record_files.values(), *(Path(self.data_dir) / name for name in CATALOGUE_FILES)]

    def read_splits(self) -> tuple[dict[str, list[Record]], list[Record]]:
        """Returns the records of each split that get negatives, and all training records, which say what is common."""
        records = {split: read_records(file) for split, file in self.record_files.items()}
        limits = {"train": self.max_train_samples, "valid": self.max_eval_samples}
        return {split: records[split][: limits[split]] for split in SPLITS}, records["train"]


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
        if raw["chosen"].strip() in [title.strip() for title in rejected]:
            raise InputError(f"{path}: record {index}: the chosen title {raw['chosen'].strip()} is also rejected")
        records.append({"prompt": raw["prompt"], "chosen": raw["chosen"], "rejected": rejected})
    return records
