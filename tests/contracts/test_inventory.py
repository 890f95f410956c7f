"""Nothing private of another library is used that no probe names."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import lowmem_reft

PACKAGE = Path(lowmem_reft.__file__).parent
HERE = Path(__file__).parent

NO_CONTRACT = {
    "_exit": "os: ends a process, as its documentation says",
    "_getframe": "sys: documented, of CPython",
}
"""Private names that need no probe, and why."""

NO_PROBES = {"test_inventory.py", "test_run_time.py"}


@functools.cache
def sources() -> list[tuple[Path, ast.Module]]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if "contracts" not in path.parts]
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in files]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_set_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"


def own_names() -> set[str]:
    """What the package defines itself: functions, classes, fields, attributes of ``self``."""
    names: set[str] = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and is_set_on_self(node):
                names.add(node.attr)
    return names


def names_used(tree: ast.Module) -> Iterator[str]:
    """Private names of attributes, of imports, and in the text of getattr and of patches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lowmem"):
            yield from (alias.name for alias in node.names)
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("getattr", "hasattr", "setattr", "delattr"):
                values = (a.value for a in node.args if isinstance(a, ast.Constant))
                yield from (value for value in values if isinstance(value, str))


def names_patched(tree: ast.Module) -> Iterator[str]:
    """What is replaced in other libraries, private or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(r"\bpatch(\.object)?$", ast.unparse(node.func)):
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value.rpartition(".")[2]


def names_overridden() -> Iterator[tuple[str, str]]:
    """Private methods that replace one of a class of another library."""
    for path, tree in sources():
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or not node.bases:
                continue
            module = ".".join(("lowmem_reft", *path.relative_to(PACKAGE).with_suffix("").parts))
            try:
                kind = getattr(importlib.import_module(module), node.name)
            except ModuleNotFoundError:  # a part that needs an optional library
                continue
            foreign = [base for base in inspect.getmro(kind) if "lowmem" not in base.__module__]
            for method in node.body:
                name = getattr(method, "name", "")
                if is_private(name) and any(name in vars(base) for base in foreign):
                    yield path.name, name


def probed() -> str:
    files = [*HERE.glob("test_*.py"), *(PACKAGE / "machine" / "contracts").glob("*.py")]
    return "\n".join(f.read_text(encoding="utf-8") for f in files if f != Path(__file__))


def test_every_private_name_is_in_a_contract() -> None:
    own, text = own_names(), probed()
    used = {
        (path.name, name)
        for path, tree in sources()
        for name in names_used(tree)
        if is_private(name) and name not in own
    }
    missing = sorted(
        f"{file}: {name}"
        for file, name in used | {*names_overridden()}
        if name not in NO_CONTRACT and not re.search(rf"\b{name}\b", text)
    )
    assert missing == []


def test_everything_that_is_replaced_in_a_library_is_in_a_contract() -> None:
    text = probed()
    patched = {(path.name, name) for path, tree in sources() for name in names_patched(tree)}
    assert patched
    assert [each for each in sorted(patched) if not re.search(rf"\b{each[1]}\b", text)] == []


def test_the_scan_finds_every_way_to_use_a_private_name() -> None:
    code = """
import a._b
from c._d import _e
x._f = getattr(y, "_g", None)
with mock.patch("h.i", 1), patch.object(torch, "_j", 2):
    pass
"""
    tree = ast.parse(code)
    private = {name for name in names_used(tree) if is_private(name)}
    assert private == {"_b", "_d", "_e", "_f", "_g"}
    assert {*names_patched(tree)} == {"i", "_j"}
    overridden = {*names_overridden()}
    assert ("tuner.py", "_pre_injection_hook") in overridden
    assert ("weights.py", "_enable_adapter_layers") in overridden


def test_names_without_a_contract_are_used() -> None:
    used = {name for _, tree in sources() for name in names_used(tree)}
    assert {*NO_CONTRACT} <= used


def test_every_test_of_a_library_is_a_probe_that_names_files_that_are_there() -> None:
    for path in sorted(HERE.glob("test_*.py")):
        if path.name in NO_PROBES:
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                assert any(mark.startswith("contract(") for mark in marks), node.name
        named = {file for files in re.findall(r'used_by="([^"]+)"', text) for file in files.split()}
        assert [file for file in sorted(named) if not (PACKAGE / file).is_file()] == []
