"""Arrays that take minutes to compute and serve many runs, kept in files that are named for what they depend on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from cebs.files import written_whole


def kept_file(folder: Path, depends_on: Any) -> Path:
    """Returns the file of an array; its name changes with anything in `depends_on`, which must be JSON-ready."""
    return folder / f"{hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]}.safetensors"


def read_kept(path: Path) -> np.ndarray | None:
    """Returns a kept array, or None where there is none or the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            array, kept_sum = file.get_tensor("array"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return array if kept_sum == _sum(array) else None


def write_kept(path: Path, array: np.ndarray, name: str) -> None:
    """Keeps an array, whole or not at all; where that cannot be done, a note says so and it is computed again."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with written_whole(path) as temporary:
            save_file({"array": array}, temporary, metadata={"sha256": _sum(array)})
    except (OSError, SafetensorError) as error:
        print(f"note: {name} are not kept: {error}")


def _sum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
