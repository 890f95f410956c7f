"""What holds for the package as a whole: layout, imports, docstrings, version."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import house
import lowmem_reft

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowmem_reft"


def source_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def run_python(code):
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_package_is_eleven_folders_and_at_most_eight_files():
    listed = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert {path.name for path in listed if path.is_dir()} == set(house.FOLDERS)
    assert len([path for path in listed if path.is_file()]) <= 8


def test_imports_point_down_the_folders():
    rank = {name: index for index, name in enumerate(house.FOLDERS)}
    assert [(own, other) for own, other in house.arrows() if rank[other] > rank[own]] == []
    assert house.imports_of("errors") == set()


def test_the_longest_way_down_has_at_most_nineteen_files():
    chain = house.longest_chain()
    assert len(chain) <= 19, " -> ".join(chain)


def test_the_drawing_of_the_house_is_up_to_date():
    assert house.DRAWING.read_text(encoding="utf-8") == house.drawing(), "python docs/house.py"


def test_the_tree_of_the_readme_is_the_house():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## Where things are")[2]
    assert re.findall(r"^  (\w+)/ ", tree, re.MULTILINE) == list(house.FOLDERS)


def functions_that_import():
    """(file, line, source lines) of imports of own modules inside functions."""
    for path in source_files("lowmem_reft"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for inner in ast.walk(node):
                    module = getattr(inner, "module", None) or ""
                    if isinstance(inner, ast.ImportFrom) and module.startswith("lowmem_reft"):
                        yield path.relative_to(ROOT), inner, text.splitlines()


def test_an_import_inside_a_function_says_why():
    """A comment on its line, or above the block of imports that it is in."""
    silent = []
    for path, node, lines in functions_that_import():
        first = node.lineno - 1
        while re.match(r"\s+(from|import) ", lines[first - 1]) or lines[first - 1].endswith(","):
            first -= 1
        said = "#" in lines[node.end_lineno - 1] or lines[first - 1].strip().startswith("#")
        if not said:
            silent.append(f"{path}:{node.lineno}")
    assert silent == []


def test_no_module_is_longer_than_450_lines():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in source_files("lowmem_reft")
    }
    assert [str(path) for path, length in lengths.items() if length > 450] == []


def test_bitsandbytes_is_imported_in_the_base_and_for_its_kernels_alone():
    naming = {
        path.relative_to(PACKAGE).as_posix()
        for path in source_files("lowmem_reft")
        if re.search(
            r"^\s*(from|import) bitsandbytes|import_module\(.bitsandbytes",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    probing = "machine/contracts/libraries.py"  # tries out what the others rely on
    assert {n for n in naming if not n.startswith("base/")} == {"memory/kernels.py", probing}


@pytest.mark.parametrize(
    "imports",
    [
        "import lowmem_reft, sys; assert 'torch' not in sys.modules; import peft",
        "import peft; import lowmem_reft",
        "import lowmem_reft.reft.config",  # it imports peft before it has defined ReftConfig
    ],
)
def test_peft_knows_reft_after_any_order_of_imports_and_the_hook_is_gone(imports):
    run_python(
        f"{imports}\n"
        "import sys, peft\n"
        "peft.PeftType('REFT')\n"
        "assert not any('_peft_hook' in type(finder).__module__ for finder in sys.meta_path)\n"
        "assert peft.__spec__.loader is peft.__loader__\n"
        "assert 'lowmem_reft' not in type(peft.__loader__).__module__"
    )


def test_modules_are_found_under_the_names_that_they_had_before_the_folders():
    run_python(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    from lowmem_reft.loss import use_chunked_loss\n"
        "    from lowmem_reft.tasks.task import Task\n"
        "    from lowmem_reft.trainers import ReuseMixin\n"
        "import lowmem_reft.base.loss, lowmem_reft.data.tasks.task, lowmem_reft.reuse.mixins\n"
        "assert lowmem_reft.base.loss.use_chunked_loss is use_chunked_loss\n"
        "assert lowmem_reft.data.tasks.task.Task is Task\n"
        "assert lowmem_reft.reuse.mixins.ReuseMixin is ReuseMixin\n"
        "words = ' '.join(str(w.message) for w in said if w.category is FutureWarning)\n"
        "assert 'lowmem_reft.loss is now lowmem_reft.base.loss; use that name' in words, words\n"
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
