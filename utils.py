"""What the scripts share, in one place to import from: command lines, JSON in and out, run folders, models.

The rooms are `cebs/{commands,errors,files,processes,runs,models}.py`; the package itself imports from there.
"""

from cebs.commands import RunArguments, ScriptParser, run_script
from cebs.errors import InputError
from cebs.files import read_json, sha256, write_json, write_text, written_whole
from cebs.models import base_fingerprint, check_adapter, load_tokenizer, token_limit
from cebs.processes import record_seed
from cebs.runs import require_done, run_folder

__all__ = [
    "InputError",
    "RunArguments",
    "ScriptParser",
    "base_fingerprint",
    "check_adapter",
    "load_tokenizer",
    "read_json",
    "record_seed",
    "require_done",
    "run_folder",
    "run_script",
    "sha256",
    "token_limit",
    "write_json",
    "write_text",
    "written_whole",
]
