"""What an installation pulls in: pinned to the last package, and what it resolves to is what is pinned."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cebs.files import PROJECT


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (PROJECT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pins(name: str) -> dict[str, str]:
    """Returns the version of each package that a file pins, by the package's canonical name."""
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements(name)
    }


PINS = pins("requirements.txt") | pins("constraints.txt")


def installed_closure() -> dict[str, str]:
    """Returns the installed version of every package that `requirements.txt` needs, and that these need in turn."""
    versions: dict[str, str] = {}
    waiting, done = requirements("requirements.txt"), set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, *sorted(extras)) in done:
            continue
        done.add((name, *sorted(extras)))
        distribution = importlib.metadata.distribution(requirement.name)
        versions[name] = distribution.version
        for needed in map(Requirement, distribution.requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return versions


def public(version: str) -> str:
    """Returns a version without its build: 2.13.0 of torch's 2.13.0+cpu."""
    return Version(version).public


def is_pinned_by_torch(name: str) -> bool:
    """torch's builds for CUDA name the exact versions of NVIDIA's packages and of Triton themselves."""
    return name.startswith(("nvidia-", "cuda-", "triton"))


def test_every_requirement_is_one_exact_version():
    for name in ("requirements.txt", "constraints.txt", "requirements-gpu.txt"):
        for requirement in requirements(name):
            assert len(requirement.specifier) == 1, requirement
            assert str(requirement.specifier).startswith("==") and "*" not in str(requirement.specifier), requirement
    shared = pins("requirements.txt").keys() & pins("constraints.txt").keys()
    assert {name: pins("requirements.txt")[name] for name in shared} == {
        name: pins("constraints.txt")[name] for name in shared
    }


def test_everything_that_is_pulled_in_is_pinned_at_the_version_installed():
    installed = installed_closure()
    missing = [name for name in installed if name not in PINS and not is_pinned_by_torch(name)]
    assert not missing, "add to constraints.txt: " + " ".join(f"{name}=={installed[name]}" for name in missing)
    differing = {name: installed[name] for name in PINS.keys() & installed if public(installed[name]) != PINS[name]}
    assert not differing
    assert PINS.keys() <= installed.keys()  # nothing is pinned that nothing needs


@pytest.mark.skipif(
    "RESOLVE" not in os.environ,
    reason="asks the package index, and may download torch: RESOLVE=1 ./run_tests.sh tests/test_supply.py",
)
def test_a_fresh_environment_resolves_to_exactly_the_pins(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    files = ["--requirement", PROJECT / "requirements.txt", "--report", tmp_path / "report.json"]
    subprocess.run([*command, *files], check=True, timeout=900)
    report = json.loads((tmp_path / "report.json").read_text())
    resolved = {
        canonicalize_name(found["metadata"]["name"]): public(found["metadata"]["version"])
        for found in report["install"]
    }
    assert {name: version for name, version in resolved.items() if not is_pinned_by_torch(name)} == PINS
