"""What holds for the package as a whole: layout, imports, docstrings, version."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_reft

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowmem_reft"

# Bottom to top: a module imports only what stands before it. A package counts as one module.
ROWS = (
    (
        "errors",
        "notices",
        "marks",
        "files",
        "options",
        "progress",
        "devices",
        "distributed",
        "provenance",
        "embedded",
        "readers",
        "rows",
        "data",
        "contracts",
    ),
    (
        "interventions",
        "positions",
        "blocks",
        "identity",
        "registration",
        "config",
        "composition",
        "caches",
        "past",
        "selection",
        "tuner",
    ),
    ("lora_reft", "weights", "virtual_tokens"),
    ("checkpointing", "techniques", "residency", "base", "synthetic"),
    ("loss",),
    (
        "method_table",
        "method_configs",
        "attach",
        "methods",
        "method_list",
        "constant",
        "likelihood",
    ),
    ("frozen", "das", "memory", "trainers"),
    (
        "training_card",
        "adapted",
        "adapters",
        "answer_file",
        "generate",
        "chat",
        "harness",
        "evaluate",
        "validation",
        "plan",
        "model_card",
        "tracking",
        "run_directory",
        "train",
    ),
    ("sources", "cell", "engines", "schedule", "report", "budget", "compare", "sweep"),
    ("profile", "cache", "pyreft"),
    ("entry", "cli"),
)
LAYOUT = [module for row in ROWS for module in row]
WITHOUT_A_PLACE = {"__init__", "_peft_hook"}  # they only name modules; who uses a name imports it


def source_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path):
    """Top-level module or package below ``lowmem_reft`` that the file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Modules of this package that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            top = rest.partition(".")[0]
            if package == "lowmem_reft" and top in LAYOUT:
                yield top


def run_python(code):
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_every_module_has_its_place_in_the_layout():
    modules = {module_name(path) for path in source_files("lowmem_reft")}
    assert modules - WITHOUT_A_PLACE <= set(LAYOUT)


def test_every_module_is_in_the_tree_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## Where things are")[2]
    assert [name for name in LAYOUT if not re.search(rf"\b{name}(?:\.py|/)", tree)] == []


def test_imports_point_down_the_layout():
    upward = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in source_files("lowmem_reft")
        if (name := module_name(path)) not in WITHOUT_A_PLACE
        for imported in imported_modules(path)
        if LAYOUT.index(imported) > LAYOUT.index(name)
    ]
    assert upward == []


@pytest.mark.parametrize(
    "imports",
    [
        "import lowmem_reft, sys; assert 'torch' not in sys.modules; import peft",
        "import peft; import lowmem_reft",
        "import lowmem_reft.config",  # it imports peft before it has defined ReftConfig
    ],
)
def test_peft_knows_reft_after_any_order_of_imports_and_the_hook_is_gone(imports):
    run_python(
        f"{imports}\n"
        "import sys, peft\n"
        "peft.PeftType('REFT')\n"
        "assert not any('lowmem_reft' in type(finder).__module__ for finder in sys.meta_path)\n"
        "assert peft.__spec__.loader is peft.__loader__\n"
        "assert 'lowmem_reft' not in type(peft.__loader__).__module__"
    )


def test_every_public_name_can_be_imported():
    assert all(getattr(lowmem_reft, name) is not None for name in lowmem_reft.__all__)
    assert set(lowmem_reft.__all__) <= set(dir(lowmem_reft))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = lowmem_reft.no_such_name


def test_the_version_is_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', project, re.MULTILINE) == [lowmem_reft.__version__]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{lowmem_reft.__version__}]" in changelog


def test_every_public_function_and_class_has_a_docstring():
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    missing = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in source_files("lowmem_reft", "benchmarks", "recipes")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, definitions)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert missing == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    machine_path = re.compile(rb"(?<![\w.])/(?:home|root|work|opt)/\w")
    files = (ROOT / name for name in listed.stdout.splitlines())
    naming = [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix != ".safetensors"
        and path.is_file()
        and machine_path.search(path.read_bytes())
    ]
    assert naming == []
