"""``report.html`` in a headless Chromium, at the width of a desktop and of a phone."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from browser import CHROMEDRIVER, CHROMIUM, FLAGS
from lowmem_reft.compare.cell import EMPTY_RESULT
from lowmem_reft.compare.report import write_report

WIDTHS = {"desktop": 1280, "phone": 390}
METHODS = {"base[storage=nf4]": 0.3, "loreft[rank=8,lr=4e-3]": 0.85, "qlora[rank=8]": 0.8}
NUM_EXAMPLES = 60

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver on PATH"
)


def comparison(directory):
    """Two tasks, a method, its reference and the base, a failure, a grid of layers x positions."""
    results = []
    for task, (method, share), seed in itertools.product(
        ("trec", "a task with a long name"), METHODS.items(), range(2)
    ):
        tuned = 0 if method.startswith("base") else 2000
        name = f"{len(results)}.jsonl"
        generator = random.Random(len(results))
        answers = [generator.random() < share for _ in range(NUM_EXAMPLES)]
        lines = [
            {
                "source": f"test.jsonl:{i}",
                "prompt": f"</script><b>question</b> {i} " + "verylongword" * 9,
                "prediction": int(answer),
                "reference": 1,
                "correct": answer,
            }
            for i, answer in enumerate(answers)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / name).write_text(text, encoding="utf-8")
        results.append(
            result(method, task, seed, value=sum(answers) / NUM_EXAMPLES, predictions=name)
            | {"num_trainable_params": tuned}
        )
    for layers, positions in itertools.product(("0", "1"), ("f1+l1", "f7+l7")):
        config = {"method": {"layers": layers, "positions": positions}}
        method = f"loreft[layers={layers},positions={positions}]"
        results.append(result(method, "trec", 0, value=0.7, config=config))
    results.append(result("dora", "trec", 0, error="ValueError: " + "no" * 90, value=None))
    return results


def result(method, task, seed, **fields):
    measured = {
        "metric": "accuracy",
        "num_trainable_params": 2000,
        "peak_bytes": 30 * 2**20,
        "train_time_s": 5.0,
        "wall_time_s": 9.0,
        "breakdown_bytes": {"weights": 20 * 2**20, "activations": 10 * 2**20},
        "loss_history": [[10, 2.0], [20, 0.4]],
        "command": "lowmem-reft compare " + "--a-long-option value " * 9,
        "model": "tiny",
        "device": "a machine",
        "versions": {"torch": "2.13"},
    }
    return {**EMPTY_RESULT, **measured, "method": method, "task": task, "seed": seed, **fields}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    return write_report(comparison(directory), directory).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(params=WIDTHS, scope="module")
def page(request, browser, address):
    width = WIDTHS[request.param]
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    return browser


def ask(page, script, *arguments):
    return page.execute_script(f"return {script}", *arguments)


def texts(page, selector):
    """The text of every element that the selector finds."""
    return ask(
        page, "[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def column(page, table, index):
    return texts(page, f"#{table} table tbody tr > :nth-child({index + 1})")


def click(page, selector):
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


def test_nothing_is_logged_and_nothing_is_fetched(page):
    assert page.get_log("browser") == []
    assert ask(page, "performance.getEntriesByType('resource').length") == 0


def test_the_page_does_not_scroll_sideways(page):
    # Also with everything unfolded; tables scroll within their frames.
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    width, shown = ask(page, "[document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown
    too_wide = ask(
        page,
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))",
    )
    assert too_wide == []


def test_value_and_difference_are_seen_without_scrolling(page):
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    right = ask(
        page,
        "[...document.querySelectorAll('#ranking details table thead th:nth-child(3)')]"
        ".map((e) => e.getBoundingClientRect().right - "
        "e.closest('.scroll').getBoundingClientRect().right)",
    )
    assert right
    assert max(right) <= 0


def test_every_chart_is_drawn_with_its_text(page):
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    boxes = ask(
        page,
        "[...document.querySelectorAll('figure svg')].map((svg) => { "
        "const box = svg.getBoundingClientRect(); "
        "return [box.width, box.height, svg.querySelectorAll('text').length]; })",
    )
    # cost charts of the mean and both tasks, loss of both tasks, memory, the grid
    assert len(boxes) == 3 * 3 + 2 + 1 + 1
    assert all(width > 200 and height > 100 and words > 3 for width, height, words in boxes)


def test_a_table_sorts_on_click_and_the_other_way_on_the_next(page):
    heading = "#failures ~ #measurements thead th:nth-child({}) button"
    click(page, heading.format(3))
    values = [text.split()[0] for text in column(page, "measurements", 2)]
    numbers = [float(text) for text in values if text[0].isdigit()]
    assert numbers == sorted(numbers, reverse=True)
    assert values[-1] == "failed"  # what has no value stays last
    click(page, heading.format(3))
    values = [text.split()[0] for text in column(page, "measurements", 2)]
    assert [float(text) for text in values[:-1]] == sorted(numbers)
    assert values[-1] == "failed"
    click(page, heading.format(1))
    names = column(page, "measurements", 0)
    assert names == sorted(names)
    marked = texts(page, "#measurements th[aria-sort]")
    assert marked == ["method"]


def outcomes(page):
    return [int(text) for text in texts(page, ".outcomes strong")]


def choose(page, control, value):
    page.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input'))",
        f"#examples-{control} select, #examples-{control} input",
        value,
    )


def test_the_examples_are_those_that_one_method_gets_and_the_other_misses(page):
    only_one, only_two, both, none = outcomes(page)
    assert only_one + only_two + both + none == NUM_EXAMPLES
    assert only_one > 0
    assert len(texts(page, ".examples > li")) == min(only_one, 10)
    first = texts(page, ".examples li:first-child dt")
    assert first == ["right answer", "A: loreft[rank=8,lr=4e-3]", "B: qlora"]
    assert ask(page, "document.querySelector('.examples dd:nth-of-type(2) span').className") == (
        "good"
    )
    prompt = texts(page, ".examples li:first-child .prompt")[0]
    assert prompt.startswith("</script><b>question</b>")  # as text
    choose(page, "one", "2")  # the same method on both sides
    choose(page, "two", "2")
    assert outcomes(page)[:2] == [0, 0]
    choose(page, "one", "1")
    assert outcomes(page) == [only_one, only_two, both, none]


def test_the_examples_can_be_searched_and_turned(page):
    choose(page, "search", "")
    click(page, ".outcomes button:nth-child(3)")
    total = outcomes(page)[2]
    assert total > 10
    first = texts(page, ".examples .source")
    click(page, "#examples-next")
    second = texts(page, ".examples .source")
    assert len(first) == 10
    assert not set(first) & set(second)
    assert texts(page, "#examples-page")[0].startswith("page 2 of")
    choose(page, "search", " QUESTION</b> 5")
    assert sum(outcomes(page)) == 11  # 5 and 50 to 59
    choose(page, "search", "nowhere")
    assert outcomes(page) == [0, 0, 0, 0]
    assert texts(page, ".examples li") == ["Nothing was found."]
    choose(page, "search", "")


def test_another_task_has_its_own_examples(page):
    before = outcomes(page)
    choose(page, "task", "1")
    assert sum(outcomes(page)) == NUM_EXAMPLES
    assert outcomes(page) != before
    choose(page, "task", "0")
    assert outcomes(page) == before


def test_nothing_has_gone_wrong_meanwhile(page):
    assert page.get_log("browser") == []


def test_a_page_without_texts_says_right_or_wrong(browser, tmp_path):
    path = write_report(comparison(tmp_path), tmp_path, texts=False)
    browser.get(path.as_uri())
    assert texts(browser, ".examples .prompt") == []
    assert texts(browser, ".examples li:first-child dt") == [
        "A: loreft[rank=8,lr=4e-3]",
        "B: qlora",
    ]
    assert texts(browser, ".examples li:first-child .source")[0].startswith("test.jsonl:")
    said = {text.split()[1] for text in texts(browser, ".examples dd span:first-child")}
    assert said == {"right", "wrong"}
    assert browser.get_log("browser") == []
