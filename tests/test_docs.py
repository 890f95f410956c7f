"""Every code block of the documentation runs, and the site builds whole and by itself."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import lowmem_reft.memory
from browser import CHROMEDRIVER, CHROMIUM, FLAGS
from lowmem_reft import cli
from lowmem_reft.compare import child, report
from lowmem_reft.compare.cell import Cell, Result, write_cell
from lowmem_reft.compare.engines import processes
from lowmem_reft.compare.engines.launch import leave_result, result_or_cause
from lowmem_reft.data.tasks.registry import TASKS
from lowmem_reft.reft.interventions import INTERVENTIONS
from snippets import Block, Runner, read_blocks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [
    page
    for page in (ROOT / "README.md", *PAGES)
    if any(b.language != "text" for b in read_blocks(page))
]

QUICK = {
    "train": ["--max-steps", "3", "--device", "cpu"],
    "compare": ["--max-steps", "2", "--eval-limit", "4", "--device", "cpu"],
    "sweep": ["--trials", "1", "--max-steps", "2", "--device", "cpu"],
}
ROWS = [
    {"prompt": "is the film good or bad?", "choices": ["good", "bad"], "answer": 0},
    {"prompt": "the lazy dog is", "choices": ["good", "bad"], "answer": 1},
    {"prompt": "a little cat jumps over", "choices": ["good", "bad"], "answer": 1},
    {"prompt": "once upon a time", "choices": ["good", "bad"], "answer": 0},
] * 4

FIRST_HIT = "return document.querySelector('.md-search-result__item a')?.href ?? null"


class CellHere:
    """A cell of a comparison that runs in this process: the imports of another take seconds."""

    def __init__(self, todo: Cell, *_: object) -> None:
        self.cell = todo
        shutil.rmtree(todo.directory, ignore_errors=True)
        leave_result(write_cell(todo), child.run_cell)

    def ended(self) -> bool:
        return True

    def result(self) -> Result:
        return result_or_cause(self.cell, "left no result", 0.0)


@pytest.fixture(autouse=True)
def _tables_as_before() -> Iterator[None]:
    """Takes interventions and tasks that a page adds out of the tables again."""
    tables: list[dict[str, Any]] = [INTERVENTIONS, TASKS]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture
def runner(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Runner:
    """Runs blocks in a directory of their own; a tiny model stands for those of the hub."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(processes, "ProcessRun", CellHere)
    # Drawing takes longer than all the rest; test_report.py has its tests.
    monkeypatch.setattr(report, "write_report", lambda _, d, **_k: d / "report.html")
    monkeypatch.setattr("sys.stdin", io.StringIO("is it good?\n/base\n"))
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shutil.copytree(ROOT / "tests" / "support" / "pyreft" / "loreft_sides", "pyreft-run")
    model = str(tiny_llama_dir)
    search = "--seq-len 1024 --batch-size 8 --gpu 4060 --fit"  # of an 8B model it takes too long
    on_cpu = "bf16=False, use_cpu=True"  # TRL takes a GPU for granted
    return Runner(
        {
            "meta-llama/Llama-3.1-8B": model,
            f"llama-3.1-8b {search}": f"{model} {search}",
            "llama-3.2-1b": model,
            "--seeds 0,1,2": "--seeds 0",
            "learning_rate=9e-4, num_train_epochs=1": f"max_steps=1, {on_cpu}",
            "num_train_epochs=4": f"num_train_epochs=4, {on_cpu}",
            "recipes/accelerate/": f"{ROOT}/recipes/accelerate/",
        },
        arguments=QUICK,
        printed=lambda: "".join(capfd.readouterr()),
    )


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_holds_its_outputs(path: Path, runner: Runner) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        code = "".join(cell["source"]).replace("epochs=8", "epochs=1")
        runner.run(Block(place=path.name, language="python", title=None, code=code))
        if "lr.plan(" in code:  # a prediction has no other figures elsewhere
            kept = "".join(line for output in cell["outputs"] for line in output["text"])
            assert kept == runner.last_output
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds.count("display_data") == 2
    assert kinds.count("stream") >= 5
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What was uploaded, by repository: the hub is not asked."""
    uploaded: dict[str, list[str]] = {}

    def create(_: HfApi, repo_id: str, **options: Any) -> None:
        uploaded[repo_id] = []

    def upload(_: HfApi, *, repo_id: str, folder_path: str) -> None:
        uploaded[repo_id] += sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return uploaded


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, runner: Runner, uploads: dict[str, list[str]]) -> None:
    for block in read_blocks(page):
        runner.run(block)
    if page.name == "tutorial.md":
        names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"]
        assert uploads == {"me/tickets-loreft": names}
        answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        assert [answer["adapter"] for answer in answers] == ["run", "__base__"] * 2


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built strictly: a broken link or reference fails."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|link(?! rel=\"?canonical))[^>]*?(?:src|href)=\"?(https?:)?//[^\s>]*"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and 404.html
    assert [(page.name, m[0]) for page in pages for m in loaded.finditer(page.read_text())] == []
    loading = re.compile(r"(?:@import |url\()[\"']?(?:https?:)?//")
    assert not [path.name for path in site.rglob("*.css") if loading.search(path.read_text())]
    assert (site / "search" / "search_index.js").stat().st_size > 10_000  # search without a server


def test_the_reference_holds_every_public_name(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes()
    names = zlib.decompress(inventory.split(b"\n", 4)[4]).decode()
    public = [f"lowmem_reft.{name}" for name in lowmem_reft.__all__ if name != "__version__"]
    public += [f"lowmem_reft.memory.{name}" for name in lowmem_reft.memory.__all__]
    assert [name for name in public if not re.search(rf"^{name} ", names, re.MULTILINE)] == []


def test_the_reference_holds_every_option_of_every_subcommand(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (site / "reference" / "cli.html").read_text()
    _, *parts = re.split(r"<h2 id=\"([a-z-]+)\"", page)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    nested = {"reuse": ["reuse ls", "reuse rm"]}
    commands = [each for name in cli._COMMANDS for each in nested.get(name, [name])]
    assert list(sections) == [command.replace(" ", "-") for command in commands]
    for command, section in zip(commands, sections.values(), strict=True):
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        shown = capsys.readouterr().out
        flags = re.findall(r"^[│ ] (?:-\w, )?(--[a-z][a-z-]+)", shown, re.MULTILINE)
        flags.remove("--help")
        missing = [flag for flag in flags if f"<code>{flag}</code>" not in section]
        assert (command, missing) == (command, [])


def test_the_reports_of_kept_results_tell_methods_apart_by_their_answers(site: Path) -> None:
    for name in ("real_smollm2", "real_minilm", "real_minilm_sst2"):
        page = (site / "evidence" / f"{name}.html").read_text(encoding="utf-8")
        assert "not told apart" in page
        assert "for want of answers" not in page


def test_no_rendered_page_shows_markup(site: Path) -> None:
    left = re.compile(r"(?:^|>)(\|[ :|-]+\||::$|```|:::|\.\. \w+::)", re.MULTILINE)
    for page in site.rglob("*.html"):
        article = page.read_text().partition("<article")[2].partition("</article>")[0]
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", article, flags=re.DOTALL)
        assert left.search(text) is None, f"{page.name}: {left.search(text)}"


@pytest.fixture
def browser(tmp_path: Path) -> Any:
    """A headless Chromium that can reach nothing but files."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver on PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def test_a_reader_without_network_finds_words_and_no_page_is_wider_than_a_phone(
    site: Path, browser: Any
) -> None:
    browser.get((site / "reference" / "cli.html").as_uri())
    from selenium.webdriver.common.keys import Keys  # there is a browser, so it is installed

    field = browser.find_element("css selector", "input.md-search__input")
    found, deadline = None, time.monotonic() + 60
    while found is None and time.monotonic() < deadline:
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("orthonormal")  # again until the page listens
        time.sleep(1)
        found = browser.execute_script(FIRST_HIT)
    assert re.search(r"/(how-it-works|reference/interventions|from/pyreft)\.html", str(found))
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for page in PAGES:
        browser.get((site / page.relative_to(DOCS).with_suffix(".html")).as_uri())
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390, f"{page.name} is {width} pixels wide"
