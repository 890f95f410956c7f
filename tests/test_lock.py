"""lock.txt has all that pyproject.toml asks for, on every Python, and .venv is made of it."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest asks for it there

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "lock.txt"
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# What a torch for CUDA brings along: it asks for exact versions itself, and each torch for others.
OF_TORCH = re.compile("torch|triton|nvidia-.+|cuda-.+")
OUTSIDE = ("pip", "lowmem-reft")  # the one comes with Python, the other is this package


def environment(python: str) -> dict[str, Any]:
    """The markers of a Python on Linux."""
    of_python = {"python_version": python, "python_full_version": f"{python}.20"}
    return {**default_environment(), **of_python, "sys_platform": "linux"}


def lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(file: Path, markers: dict[str, Any]) -> dict[str, str]:
    """The version of each distribution, by its normalized name, that a file pins there."""
    pinned: dict[str, str] = {}
    for requirement in map(Requirement, lines(file)):
        if requirement.marker is None or requirement.marker.evaluate(markers):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{file.name} pins {name} twice"
            pinned[name] = str(requirement.specifier).removeprefix("==")
    return pinned


def extras() -> dict[str, list[str]]:
    found: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_bounds(python: str) -> None:
    markers = environment(python)
    pinned = {**pins(LOCK, markers), **pins(CONSTRAINTS, markers)}
    asked = [*PROJECT["project"]["dependencies"], *extras()["dev"]]
    asked += [*PROJECT["build-system"]["requires"], "editables"]  # which hatchling then asks for
    outside = []
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name), "no version")
        needed = requirement.marker is None or requirement.marker.evaluate(markers)
        if needed and (version == "no version" or version not in requirement.specifier):
            outside.append(f"{requirement}: {version}")
    assert outside == [], "`make lock` writes lock.txt anew"


def test_the_development_tools_include_every_other_extra() -> None:
    in_dev = {(r.name, r.specifier) for r in map(Requirement, extras()["dev"])}
    in_others = {(r.name, r.specifier) for e in extras().values() for r in map(Requirement, e)}
    assert in_others == in_dev, "the lock is made for the extra `dev`"


def test_the_libraries_whose_insides_are_used_have_an_upper_bound() -> None:
    asked = map(Requirement, [*PROJECT["project"]["dependencies"], *extras()["dev"]])
    bounded = {r.name for r in asked if any(s.operator == "<" for s in r.specifier)}
    leaned_on = {"accelerate", "bitsandbytes", "lm_eval", "peft", "ray", "transformers", "trl"}
    assert bounded == leaned_on


def test_the_lock_names_versions_only_and_leaves_torch_to_the_constraints() -> None:
    pin = re.compile(r"[a-z0-9-]+==[a-z0-9.]+( ; [a-z0-9_ .'=!<>*()-]+)?", re.IGNORECASE)
    locked = lines(LOCK)
    assert [line for line in locked if not pin.fullmatch(line)] == []
    assert [line for line in locked if OF_TORCH.fullmatch(Requirement(line).name)] == []
    assert "://" not in LOCK.read_text(encoding="utf-8")
    assert [Requirement(line).name for line in lines(CONSTRAINTS)] == ["torch"]


def test_everything_installed_is_in_the_lock_at_its_version() -> None:
    stamp = Path(sys.prefix) / ".installed"  # the Makefile writes what it installed with
    made_from = stamp.read_text(encoding="utf-8").split() if stamp.exists() else []
    if made_from != ["constraints.txt", "lock.txt"]:
        pytest.skip("this environment was not made from constraints.txt and lock.txt")
    markers = dict(default_environment())
    pinned = {**pins(LOCK, markers), **pins(CONSTRAINTS, markers)}
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    installed = {
        canonicalize_name(found.name): Version(found.version).public  # 2.13.0+cpu is 2.13.0
        for found in metadata.distributions(path=sorted(sites))
    }
    assert "torch" in installed
    other = {
        name: version
        for name, version in installed.items()
        if version != pinned.get(name)
        if name not in OUTSIDE
        if name in pinned or not OF_TORCH.fullmatch(name)
    }
    assert other == {}, "not of lock.txt; `make clean` starts over"


@pytest.mark.parametrize("variable", ["NAMES", "LOWER"])
def test_every_requirement_is_tested_with_its_newest_and_its_oldest_version(variable: str) -> None:
    """A name is taken whole: jinja2 is another project than jinja."""
    words = ["make", "-s", "--eval", f"show:\n\t@$({variable})", "show"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {re.split("[^A-Za-z0-9_-]", line)[0] for line in shown.splitlines()}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = project.partition("dependencies = [")[2].partition("]")[0]
    names = {*re.findall(r'"([A-Za-z0-9_-]+)', required)} - {"torch"}
    assert "jinja2" in names
    assert names <= listed
