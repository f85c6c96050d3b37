"""Files per user: what each test record got from a method, so that any figure, interval or test can be made again.

They lie beside the CSV, `per_user/<dataset>/<method>.json`:

```json
{"dataset": "goodreads", "method": "SFT", "protocol": "grounded", "encoder": "all-MiniLM-L6-v2", "topk": [5, 10],
 "seed": 42, "data_dir": "sampled_data/goodreads", "predictions": {"file": "...", "sha256": "..."},
 "users": [{"record": 0, "user": "", "target": "Emma", "target_exposure": 7, "exposure_group": "middle", "rank": 1,
            "hit": {"5": 1, "10": 1}, "ndcg": {"5": 0.63, "10": 0.63}, "prediction": "Emma", "in_catalogue": true,
            "recommended": ["Persuasion", "Emma", ...]}, ...]}
```

`rank` counts from 0 within the deepest k and is null without a hit; `user` is empty where the data do not tell.
"""

import json
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cebs.errors import InputError
from cebs.files import named_by_the_user, read_json, write_json, written_whole

FOLDER = "per_user"
LONGEST_NAME = 200  # signs of a file's name, which most file systems limit to 255 bytes
FILE_KEYS = {"dataset": str, "method": str, "topk": list, "users": list}
USER_KEYS = {"user": str, "target": str, "hit": dict, "ndcg": dict}


def per_user_file(results_csv: str | Path, dataset: str, method: str) -> Path:
    """Returns the file of a row. Signs that a file's name cannot hold are written as in a URL, `%2F` for a slash.

    Raises:
        `InputError`: if a name is too long for a file.
    """
    return Path(results_csv).parent / FOLDER / _file_name(dataset) / f"{_file_name(method)}.json"


def _file_name(name: str) -> str:
    quoted = urllib.parse.quote(name.strip(), safe=" ")
    if len(quoted) > LONGEST_NAME:
        raise InputError(f"{name[:50]}...: is too long for the name of a file; give a shorter --dataset or --method")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted  # neither `..` nor hidden


def check_per_user(path: str) -> None:
    """Checks the name of a file that will be written.

    Raises:
        `InputError`: if it is neither JSON nor Parquet, or is a folder.
    """
    if Path(path).suffix not in (".json", ".parquet"):
        raise InputError(f"{path}: --per_user needs a file that ends in .json or .parquet")
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; give --per_user a file")


def write_per_user(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a file per user as JSON, or as Parquet: a row for each of `users`, and the rest as JSON in the metadata.

    Raises:
        `InputError`: if it cannot be written.
    """
    path = Path(path)
    with named_by_the_user(path, "give a shorter or another name"):
        if path.suffix == ".parquet":
            _write_parquet(path, content)
        else:
            write_json(path, content)


def _write_parquet(path: Path, content: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    origin = {name: value for name, value in content.items() if name != "users"}
    table = pyarrow.Table.from_pylist(content["users"])
    table = table.replace_schema_metadata({"evaluation": json.dumps(origin, ensure_ascii=False)})
    with written_whole(path) as temporary:
        parquet.write_table(table, temporary)


def read_per_user(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file per user.

    Raises:
        `InputError`: naming the file, and the user that is wrong.
    """
    content = _checked(read_json(path), FILE_KEYS, str(path))
    if not content["users"]:
        raise InputError(f"{path}: has no users; evaluate again")
    if not content["topk"] or not all(type(k) is int and k > 0 for k in content["topk"]):
        raise InputError(f"{path}: 'topk' must hold whole numbers of 1 or more; evaluate again")
    for index, user in enumerate(content["users"]):
        place = f"{path}: user {index}"
        _checked(user, USER_KEYS, place)
        for k in map(str, content["topk"]):
            if not all(_is_share(user[measure].get(k)) for measure in ("hit", "ndcg")):
                raise InputError(f"{place}: 'hit' and 'ndcg' must hold a number from 0 to 1 for k {k}; evaluate again")
    return content


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _checked(value: Any, keys: dict[str, type], place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected an object with {', '.join(keys)}; evaluate.py writes such files")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            raise InputError(f"{place}: {key!r} must be {kind.__name__}; evaluate.py writes such files")
    return value


def find_per_user(results_csv: str | Path, dataset: str, method: str) -> list[dict[str, Any]]:
    """Reads the file of a row: the one beside the CSV, or of several seeds those beside `seed_*/` CSVs below it.

    Returns:
        `list[dict]`: a content for each seed; empty where there is no file.
    """
    here = per_user_file(results_csv, dataset, method)
    if here.is_file():
        return [read_per_user(here)]
    below = here.relative_to(Path(results_csv).parent)
    files = [folder / below for folder in sorted(Path(results_csv).parent.glob("seed_*"))]
    return [read_per_user(file) for file in files if file.is_file()]


def mean_over_seeds(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns hits and NDCG of each record as means over the seeds; one seed comes back as it is.

    Raises:
        `InputError`: if the seeds were not evaluated on the same records.
    """
    first = contents[0]
    if len(contents) == 1:
        return first
    for content in contents[1:]:
        check_same_records(first, content)
    topk = sorted(set.intersection(*(set(content["topk"]) for content in contents)))
    users = []
    for of_seeds in zip(*(content["users"] for content in contents), strict=True):
        means = {
            measure: {str(k): sum(user[measure][str(k)] for user in of_seeds) / len(of_seeds) for k in topk}
            for measure in ("hit", "ndcg")
        }
        users.append({"user": of_seeds[0]["user"], "target": of_seeds[0]["target"], **means})
    return {"dataset": first["dataset"], "method": first["method"], "topk": topk, "users": users}


def check_same_records(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Checks that two files are of the same test records, in the same order.

    Raises:
        `InputError`: if they are not.
    """
    records = [[(user["user"], user["target"]) for user in content["users"]] for content in (one, other)]
    if records[0] != records[1]:
        names = dict.fromkeys((other["method"], one["method"]))
        raise InputError(
            f"{one['dataset']}: the files per user of {' and '.join(names)} are not of the same test records in the "
            "same order; make all predictions from one test_sample.json"
        )
