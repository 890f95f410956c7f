"""``lowmem-reft ui``: the words of commands, what is refused, and a server that is asked."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from browser import CHROMEDRIVER, CHROMIUM, FLAGS
from lowmem_reft import cli
from lowmem_reft.data import embedded
from lowmem_reft.errors import InputError
from lowmem_reft.runs.said import Reports
from lowmem_reft.runs.spent import Spent
from lowmem_reft.ui.commands import Command, steps_of, words_of
from warm import warm_processes

MODEL, ROWS = str(embedded.model_dir()), str(embedded.task_files()[0])
FIELDS = (MODEL, ROWS, "loreft", "2", "4", "run", "1", "", "")
"""Of training: method, rank, batch size, directory, epochs, learning rate, validation rows."""
SMALL = "--limit 8 --device cpu --compute-dtype fp32"
LOGGED = f"{SMALL} --storage fp32 --logging-steps 1"
TRAINED = f"{LOGGED} --max-steps 2"
NO_SUCH_TIME_S = 300.0
"""Nothing here takes so long, on a busy machine either."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def test_fields_become_words_and_empty_ones_are_left_out() -> None:
    words = words_of("train", "--layers 'upper:0.5'", model="m", rank="", batch_size=8, lr=None)
    assert words == ["train", "--model", "m", "--batch-size", "8", "--layers", "upper:0.5"]


def test_a_quotation_that_does_not_end_is_refused() -> None:
    with pytest.raises(InputError, match="more flags must be written as on a command line"):
        words_of("train", "--template 'a")


def test_the_steps_that_a_training_says_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    reports = Reports(Spent(time_s=1.0), quiet=False)
    for step, loss in ((10, 2.5), (20, 1e-5)):
        state: Any = SimpleNamespace(global_step=step, max_steps=20, is_world_process_zero=True)
        reports.on_log(None, state, None, logs={"loss": loss, "learning_rate": 1e-3})
    steps = steps_of(f"rows: 8\n{capsys.readouterr().err}adapter_dir  run\n")
    assert steps["step"] == [10, 20]
    assert steps["loss"] == [2.5, 1e-5]
    assert all(peak > 0.05 for peak in steps["peak"])
    assert steps_of("no step") == {"step": [], "loss": [], "peak": []}


@pytest.mark.parametrize(
    ("words", "code", "said"), [(["methods"], 0, "qlora"), (["trian"], 2, "train")]
)
def test_a_command_says_what_it_says_in_a_terminal(words: list[str], code: int, said: str) -> None:
    command = Command(words)
    assert said in command.wait()
    assert command.code == code
    assert command.line == f"lowmem-reft {words[0]}"
    command.stop()  # which does nothing any more


def test_without_gradio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowmem_reft.ui.server.find_spec", lambda _: None)
    assert cli.main(["ui"]) == 2
    assert "pip install 'lowmem-reft[ui]'" in capsys.readouterr().err


def test_a_port_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", "--port", "70000"]) == 2
    assert "port must be from 1 to 65535, got 70000" in capsys.readouterr().err


class Page:
    """A server of the page, asked over HTTP as the page asks it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        words = ["-m", "lowmem_reft", "ui", "--port", str(self.port), "--no-browser"]
        with warm_processes():
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=directory, stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdout is not None
        assert self.address in self.process.stdout.readline()

    def call(self, name: str, *data: Any) -> list[Any]:
        """Return what a button or field of the page gets."""
        url = f"{self.address}/gradio_api/call/{name}"
        body = json.dumps({"data": data}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=NO_SUCH_TIME_S) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{url}/{event}", timeout=NO_SUCH_TIME_S) as answer:
            events = answer.read().decode().strip().split("\n\n")
        kind, _, content = events[-1].partition("\n")
        assert kind == "event: complete", content
        found: list[Any] = json.loads(content.removeprefix("data: "))
        return found

    def ended(self) -> str:
        """Wait for the command that runs, and return what it has said."""
        began = time.monotonic()
        while True:
            command, said = self._looked()
            if command != "Runs":
                return said
            assert time.monotonic() - began < NO_SUCH_TIME_S, said
            time.sleep(0.5)

    def _looked(self) -> tuple[str, str]:
        found = self.call("look")
        return found[1]["label"], found[6]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    pytest.importorskip("gradio")
    page = Page(tmp_path_factory.mktemp("ui"))
    yield page
    with page.process:  # which closes its pipe
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(60) == 0


def train(page: Page, more: str) -> None:
    page.call("train", more, *FIELDS)


def test_rows_and_a_plan_are_shown(page: Page) -> None:
    (shown,) = page.call("data", MODEL, ROWS, "1", "--template '{prompt} ?'")
    assert shown.startswith(f"lowmem-reft data {ROWS} --model")
    assert "|?] {·doc|string}" in shown
    (planned,) = page.call("plan", "8 GiB", "--limit 8", *FIELDS)
    assert "--memory-gib 8" in planned.splitlines()[0]
    assert "lowmem-reft train --model" in planned
    (here,) = page.call("plan", "", SMALL, *FIELDS)
    assert here.startswith("lowmem-reft train")
    assert "--dry-run" in here.splitlines()[0]
    assert "num_steps" in here


def test_a_training_is_followed_to_its_end_and_then_talked_to(page: Page) -> None:
    train(page, TRAINED)
    with pytest.raises(AssertionError, match="one command runs at a time"):
        train(page, TRAINED)
    said = page.ended()
    assert steps_of(said)["step"] == [1, 2]
    assert "adapter_dir" in said
    adapter, base, noted, *_ = page.call("reply", MODEL, "run", "", "Text: return\nKind:")
    assert [message["role"] for message in adapter] == ["user", "assistant"]
    assert base[0] == adapter[0]
    assert "the tokenizer has no chat template" in noted
    _, shown, *_ = page.call("reply", MODEL, "", "--max-new-tokens 1 --raw", "Text: return")
    assert len(shown[1]["content"][0]["text"]) < 12  # of one token


def test_a_line_is_drawn_from_its_second_point_on(page: Page) -> None:
    for num_steps in (1, 2):
        train(page, f"{LOGGED} --max-steps {num_steps} --overwrite")
        assert len(steps_of(page.ended())["step"]) == num_steps
        assert page.call("look")[3]["visible"] == (num_steps > 1)


def test_a_training_is_stopped(page: Page) -> None:
    train(page, f"{SMALL} --storage fp32 --max-steps 100000 --overwrite --quiet")
    page.call("stop")
    assert page.ended() == "" or "interrupted" in page.ended()


def test_what_is_refused_is_said_on_the_page(page: Page) -> None:
    (said,) = page.call("data", MODEL, "no-such.jsonl", "1", "")
    assert "no-such.jsonl" in said
    (said,) = page.call("data", MODEL, "", "1", "")
    assert "''" not in said
    assert "data" in said
    with pytest.raises(AssertionError, match="directory must be that of a finished comparison"):
        page.call("report", "nowhere")
    with pytest.raises(AssertionError, match="adapter must be"):
        page.call("reply", MODEL, "nowhere", "", "a")
    with pytest.raises(AssertionError, match="message must have words"):
        page.call("reply", MODEL, "nowhere", "", " ")
    with pytest.raises(AssertionError, match="unknown options: --no-such"):
        page.call("reply", MODEL, "", "--no-such 1", "a")


def test_a_report_is_shown_apart_from_the_page(page: Page, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<p title="a">5 &lt; 6</p>', encoding="utf-8")
    (shown,) = page.call("report", str(tmp_path))
    assert 'sandbox="allow-scripts"' in shown
    assert "&lt;p title=&quot;a&quot;&gt;5 &amp;lt; 6" in shown


def test_only_this_machine_is_answered_and_only_by_its_own_name(page: Page) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", page.port), timeout=5)
    request = urllib.request.Request(page.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


def test_a_port_that_is_taken_is_refused(page: Page) -> None:
    words = [sys.executable, "-m", "lowmem_reft", "ui", "--no-browser", "--port", str(page.port)]
    with warm_processes():
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"port must be free on this machine, got {page.port}" in ended.stderr
    assert "--port" in ended.stderr


class Browser:
    """A headless Chromium that shows the page."""

    def __init__(self, driver: Any, address: str, width: int) -> None:
        self.driver, self.address = driver, address
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get("about:blank")
        driver.get_log("browser")  # of the page before, which was left while it asked
        driver.get(address)
        self.until("return document.querySelector('button[role=tab]')")

    def until(self, script: str) -> Any:
        """Return what a script returns, once that is something."""
        began = time.monotonic()
        while not (found := self.driver.execute_script(script)):
            assert time.monotonic() - began < NO_SUCH_TIME_S, script
            time.sleep(0.5)
        return found

    def click(self, name: str, kind: str = "button:not([role=tab])") -> None:
        """Click what is visible and has this name."""
        self.until(
            f"const found = [...document.querySelectorAll('{kind}')].find((e) => "
            f"e.textContent.trim() === '{name}' && e.checkVisibility()); found?.click(); "
            "return found"
        )

    def tab(self, name: str) -> None:
        self.click(name, "button[role=tab]")

    def field(self, label: str) -> Any:
        """Return the field with a label."""
        return self.until(
            "return [...document.querySelectorAll('input, textarea')].find((e) => "
            "e.checkVisibility() && "
            f"(e.ariaLabel ?? e.closest('label')?.textContent.trim()) === '{label}')"
        )

    def type(self, label: str, text: str) -> str:
        """Type over a field and press Enter; return what it has then."""
        field = self.field(label)
        field.send_keys("\ue009a\ue000", text, "\ue007")  # Ctrl-A, Enter
        time.sleep(0.5)
        value: str = field.get_attribute("value")
        return value


needs_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver on PATH"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


@pytest.fixture(params=[1280, 390])
def browser(page: Page, driver: Any, request: pytest.FixtureRequest) -> Browser:
    return Browser(driver, page.address, request.param)


def wrong_in(browser: Browser) -> list[str]:
    logged = browser.driver.get_log("browser")
    return [entry["message"] for entry in logged if entry["level"] == "SEVERE"]


@needs_browser
def test_in_a_browser_nothing_is_wrong_wide_or_fetched(browser: Browser) -> None:
    names = browser.until(
        "return [...document.querySelectorAll('button[role=tab]')].map((e) => e.textContent.trim())"
    )
    assert names == ["Data", "Train", "Compare", "Report", "Talk"]
    for name in names:
        browser.tab(name)
        time.sleep(0.5)
        wide, shown = browser.driver.execute_script(
            "return [document.documentElement.scrollWidth, innerWidth]"
        )
        assert wide <= shown
        covered = browser.driver.execute_script(
            "return [...document.querySelectorAll('.icon-wrap')].filter((e) => "
            "e.checkVisibility() && e.getBoundingClientRect().left < "
            "e.parentElement.querySelector('input').getBoundingClientRect().right "
            "- parseFloat(getComputedStyle(e.parentElement.querySelector('input')).paddingRight))"
            ".length"
        )
        assert covered == 0  # by the arrow of a field
    fetched = browser.driver.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert [url for url in fetched if not url.startswith(browser.address)] == []
    assert wrong_in(browser) == []


@needs_browser
def test_what_is_typed_is_taken_as_it_was_typed(browser: Browser) -> None:
    # Each is a part of what is there to choose.
    base = "Base: hub id or directory"
    assert browser.type(base, "Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    assert browser.type(base, "model") == "model"
    assert browser.type(base, "Qwen2.5-7B-Ins\ue015") == "Qwen/Qwen2.5-7B-Instruct"  # chosen
    browser.tab("Train")
    assert browser.type("Card to plan for, or GiB", "24") == "24"


@needs_browser
def test_a_page_that_is_open_shows_what_was_started_elsewhere_and_its_end(
    page: Page, browser: Browser
) -> None:
    train(page, f"{LOGGED} --max-steps 2 --overwrite")
    browser.until("return document.querySelector('svg.marks, canvas.marks')")
    page.ended()
    browser.until("return document.body.textContent.includes('Has ended')")
    train(page, "--help")
    browser.until(
        "const said = [...document.querySelectorAll('.said textarea')].at(-1); "
        "return said.value.includes('--per-device-train-batch-size') && "
        "said.scrollHeight > 2 * said.clientHeight && "
        "said.scrollTop + said.clientHeight > said.scrollHeight - 20"
    )
    assert wrong_in(browser) == []


@needs_browser
def test_a_link_of_a_report_stays_in_it(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(
        "<!doctype html><html><head><title>a</title></head><body><a href='#b'>to b</a>"
        "<p id='b'>here</p></body></html>"
    )
    browser.tab("Report")
    browser.type("Directory of a comparison", str(tmp_path))
    browser.click("Show")
    browser.driver.switch_to.frame(browser.until("return document.querySelector('iframe')"))
    try:
        browser.driver.find_element("link text", "to b").click()
        time.sleep(0.5)
        assert "here" in browser.driver.find_element("tag name", "body").text
    finally:
        browser.driver.switch_to.default_content()
    right = browser.driver.execute_script(
        "return document.querySelector('iframe').getBoundingClientRect().right - innerWidth"
    )
    assert right <= 0


@needs_browser
def test_what_is_refused_hides_no_conversation(browser: Browser) -> None:
    browser.tab("Talk")
    browser.type("Adapter, or directory of its run", "nowhere")
    assert browser.type("Message", "a") == "a"
    browser.until("return document.body.textContent.includes('adapter must be')")
    hidden = browser.driver.execute_script(
        "return [...document.querySelectorAll('.error')].filter((e) => e.checkVisibility() && "
        "e.closest('.block')?.querySelector('.bubble-wrap, textarea:not([disabled])')).length"
    )
    assert hidden == 0
