"""What every script shares, gathered in one place to import from: command lines, files, run folders, models.

The rooms are in `cebs/`: `commands` and `errors`, `files` and `prompts` (JSON in and out), `runs` (run folders),
`processes` (ranks and seeds) and `models`. The package itself imports from the rooms.
"""

from cebs.commands import RunArguments, ScriptParser, run_script
from cebs.errors import InputError, errors_in_one_line
from cebs.files import PROJECT, read_json, read_list, read_yaml, sha256, write_json, write_text, written_whole
from cebs.models import (
    DEFAULT_MODEL,
    base_fingerprint,
    check_adapter,
    load_for_inference,
    load_model,
    load_tokenizer,
    save_adapter,
    token_limit,
)
from cebs.processes import record_seed
from cebs.prompts import read_records, read_user
from cebs.runs import ADAPTER_WEIGHTS, Run, recorded_runs, require_done, run_folder

__all__ = [
    "ADAPTER_WEIGHTS",
    "DEFAULT_MODEL",
    "PROJECT",
    "InputError",
    "Run",
    "RunArguments",
    "ScriptParser",
    "base_fingerprint",
    "check_adapter",
    "errors_in_one_line",
    "load_for_inference",
    "load_model",
    "load_tokenizer",
    "read_json",
    "read_list",
    "read_records",
    "read_user",
    "read_yaml",
    "record_seed",
    "recorded_runs",
    "require_done",
    "run_folder",
    "run_script",
    "save_adapter",
    "sha256",
    "token_limit",
    "write_json",
    "write_text",
    "written_whole",
]
