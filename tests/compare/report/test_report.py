"""The table, the charts and the page that a comparison leaves behind."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Annotation
from rich.console import Console

from lowmem_reft.compare.cell import EMPTY_RESULT, Cell
from lowmem_reft.compare.report import write_csv, write_report
from lowmem_reft.compare.report.answers import read_answers
from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.console import Progress, print_table
from lowmem_reft.compare.report.names import short_names
from lowmem_reft.compare.report.sections import (
    SECTIONS,
    curves,
    examples,
    frontier,
    heatmap,
    memory,
    origin,
    ranking,
    rates,
    runs,
)
from lowmem_reft.compare.report.table import aggregate, columns, markdown, over_tasks
from lowmem_reft.options import (
    DataOptions,
    EvaluateOptions,
    ModelOptions,
    RunOptions,
    TrainOptions,
)

HOSTILE = '<script>alert("x")</script> & [bold]more[/bold] $\\frac{$ |'


def result(method="loreft", seed=0, **fields):
    measured = {
        "metric": "accuracy",
        "value": 0.8 + seed / 100,
        "loss": 0.5,
        "num_trainable_params": 1000,
        "trainable_percent": 0.1,
        "adapter_bytes": 4096,
        "peak_bytes": (30 + seed) * 2**20,
        "step_time_s": 0.05,
        "tokens_per_s": 2000.0,
        "loss_history": [[10, 2.0], [20, 1.0 + seed]],
        "wall_time_s": 3.0,
        "device": "a machine, 2 threads",
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    known = {"method": method, "task": "trec", "seed": seed, "model": "tiny", "command": "run it"}
    return {**EMPTY_RESULT, **measured, **known, **fields}


def failed(method="dora", seed=0, error="ValueError: no"):
    nothing = dict.fromkeys(
        ("metric", "value", "num_trainable_params", "peak_bytes", "loss_history", "device")
    )
    return result(method, seed, error=error, **nothing)


def answered(directory, cell, correct, **lines):
    """The cell with predictions of which these are right, and the value that they have."""
    name = f"{cell['task']}-{cell['method']}-{cell['seed']}.jsonl"
    rows = [
        {
            "source": f"/data/test.jsonl:{i}",
            "prompt": lines.get("prompt", f"question {i}"),
            "prediction": int(right),
            "reference": 1,
            "prediction_text": "right" if right else lines.get("wrong", "wrong"),
            "reference_text": "right",
            "correct": bool(right),
        }
        for i, right in enumerate(correct)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / name).write_text(text, encoding="utf-8")
    return {**cell, "predictions": name, "value": sum(correct) / len(correct)}


def compared(cells):
    return Comparison(results=cells, rows=aggregate(cells), answers={})


def plain(html):
    """The text of the markup."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("\N{NO-BREAK SPACE}", " ").split())


def base():
    return result("base[storage=nf4]", value=0.2, num_trainable_params=0, peak_bytes=None)


def some_results():
    tuned = [result(method, seed) for method in ("loreft[rank=8]", "qlora") for seed in range(3)]
    return [base(), *tuned, failed(), failed("qlora", 3)]


@pytest.fixture
def results():
    return some_results()


def test_means_and_standard_deviations_are_numpys(results):
    values = [0.91, 0.87, 0.9]
    cells = [result(seed=i, value=value) for i, value in enumerate(values)]
    [row] = aggregate(cells)
    assert row.value_mean == pytest.approx(np.mean(values))
    assert row.value_sd == pytest.approx(np.std(values, ddof=1))
    assert row.num_seeds == 3
    assert row.peak_bytes == 32 * 2**20  # the largest


def test_the_build_of_a_store_stands_apart_from_the_steps():
    [built] = aggregate([result(seed=i, build_time_s=t) for i, t in enumerate((3.0, 0.0, 0.1))])
    assert built.build_time_s == 3.0  # later seeds find the store
    assert "build s" in [column.title for column in columns([built])]
    [plain] = aggregate([result(build_time_s=0.0)])
    assert "build s" not in [column.title for column in columns([plain])]


def test_one_seed_has_no_standard_deviation():
    [row] = aggregate([result()])
    assert (row.value_mean, row.value_sd) == (0.8, None)


def test_failed_seeds_do_not_count_in_the_mean_and_are_named():
    [row] = aggregate([result(seed=0), failed("loreft", 1), failed("loreft", 2)])
    assert (row.value_mean, row.num_seeds) == (0.8, 1)
    assert row.errors == ["seed 1, 2: ValueError: no"]


def test_tasks_are_rows_of_their_own():
    rows = aggregate([result(), result(task="sst2"), result(seed=1)])
    assert [(row.task, row.num_seeds) for row in rows] == [("trec", 2), ("sst2", 1)]
    assert "task" in [column.title for column in columns(rows)]


def test_columns_without_a_measurement_are_left_out(results):
    titles = [column.title for column in columns(aggregate(results))]
    assert "peak MiB" in titles
    assert "reserved MiB" not in titles
    rows = aggregate([*results, result("lora", reserved_bytes=2**30)])
    assert "reserved MiB" in [column.title for column in columns(rows)]


def test_the_markdown_table_has_a_line_per_method_and_names_the_error(results):
    lines = markdown(aggregate(results)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| loreft[rank=8] | 81.0 ± 1.0 | 0.500 | 1,000 |")
    assert "failed: seed 0: ValueError: no" in lines[5]


def test_a_refusal_is_told_from_a_failure_in_the_markdown_table(results):
    refused = {**failed("full", 0), "error": "InputError: method must not be full; choose another"}
    assert "| refused: method must not be full; choose another |" in markdown(
        aggregate([*results, refused])
    )


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_terminal_table_is_not_cut_but_leaves_out_what_matters_least(results, width):
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        print_table(aggregate(results), console)
    text = capture.get()
    assert "…" not in text
    assert "81.0 ± 1.0" in text
    assert "dora seed 0: ValueError: no" in text
    left_out = {60: ("0.100", "0.500", "2,000"), 80: ("0.100",), 140: ()}[width]
    measured = ("0.100", "0.500", "2,000", "4.0", "50.0")
    assert [words for words in measured if words not in text] == [*left_out]


@pytest.mark.parametrize("width", [40, 50, 60])
def test_on_a_narrow_terminal_every_name_is_whole_with_its_figures_below(width):
    name = "loreft[rank=8,lr=4e-3,storage=bf16,positions=f7+l7]"
    large = {"num_trainable_params": 26_214_400, "adapter_bytes": 10**9, "train_time_s": 1e5}
    cells = [base(), result(name, **large), result("qlora", **large), failed("dora")]
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        print_table(aggregate(cells), console)
    lines = capture.get().splitlines()
    assert name in "".join(line for line in lines if not line.startswith(" "))
    assert {"base[storage=nf4]", "qlora", "dora"} <= set(lines)
    assert max(map(len, lines)) <= width
    figures = " ".join(line.strip() for line in lines)
    assert "accuracy % 80.0, trainable 26,214,400, adapter KiB 976,562.5, peak MiB 30.0," in figures


def test_brackets_in_names_and_errors_are_shown_as_they_are(capsys):
    console = Console(width=120)
    print_table(aggregate([result("loreft[red]"), failed("x", error=HOSTILE)]), console)
    text = capsys.readouterr().out
    assert "loreft[red]" in text
    assert HOSTILE in text


def test_progress_is_plain_lines_where_no_one_is_watching(tmp_path, capsys):
    evaluate = EvaluateOptions(model=ModelOptions(model="m"), data=DataOptions(data="d"))
    record = {"method": "loreft[r=2]", "seed": 1}
    cell = Cell(directory=tmp_path, train=None, evaluate=evaluate, record=record)
    with Progress(2) as progress:
        progress.started(cell)
        progress.finished(cell, result(), skipped=False)
        progress.finished(cell, failed(), skipped=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first == "[1/2] loreft[r=2] seed 1: accuracy 80.0 % in 3 s"
    assert second.startswith("[2/2] loreft[r=2] seed 1: failed: ValueError: no (see ")


def test_the_bar_has_the_step_of_each_cell_that_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes a pipe a terminal for rich
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    evaluate = EvaluateOptions(model=ModelOptions(model="m"), data=DataOptions(data="d"))
    cells = [
        Cell(
            directory=tmp_path / name,
            train=None,
            evaluate=evaluate,
            record={"method": name, "seed": 0},
        )
        for name in ("lora", "red[r=1]")
    ]
    cells[0].directory.mkdir()
    with Progress(2) as progress:
        for cell in cells:
            progress.started(cell)
        (tmp_path / "lora" / "log.txt").write_text("progress: step 3/40\nfurther\n")
        progress._bar.refresh()
        progress.finished(cells[0], result("lora"), skipped=False)
    said = capsys.readouterr().err
    assert "lora seed 0 step 3/40, red[r=1] seed 0" in said
    assert said.count("[1/2] lora seed 0") == 1


def test_the_time_left_is_told_from_the_cells_that_trained_and_how_many_run_at_once(
    tmp_path, capsys
):
    seconds = [0.0]
    evaluate = EvaluateOptions(model=ModelOptions(model="m"), data=DataOptions(data="d"))
    run = RunOptions(output_dir=tmp_path)
    train = TrainOptions(model=ModelOptions(model="m"), data=DataOptions(data="d"), run=run)
    base_cell, *tuned = (
        Cell(directory=tmp_path, train=how, evaluate=evaluate, record={"method": name, "seed": 0})
        for name, how in (("base", None), ("a", train), ("b", train), ("c", train))
    )
    with Progress(8, clock=lambda: seconds[0]) as progress:
        progress.finished(base_cell, result(), skipped=True)
        progress.started(base_cell)
        seconds[0] = 5.0
        progress.finished(base_cell, result(), skipped=False)  # which trains nothing
        progress.started(tuned[0])
        progress.started(tuned[1])
        seconds[0] = 605.0
        progress.finished(tuned[0], result(), skipped=False)
        progress.started(tuned[2])
        seconds[0] = 705.0
        progress.finished(tuned[1], failed(), skipped=False)  # which tells nothing
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("about ")[2] for line in lines] == [
        "",
        "",
        "20 min left",  # four of 600 s, two at the same time; the one that runs is due
        "19 min left",  # three, and 500 s of the one that runs
    ]


def test_quiet_progress_says_nothing(tmp_path, capsys):
    with Progress(2, quiet=True):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_report_writes_its_files(results, tmp_path):
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy_vs_memory.png",
        "accuracy_vs_parameters.png",
        "accuracy_vs_time.png",
        "loss_curves.png",
        "report.html",
    ]


@pytest.mark.parametrize("cells", [[base()], [failed()], [base(), failed()], [result("one")]])
def test_a_comparison_in_which_nearly_nothing_was_trained_has_a_report_too(cells, tmp_path):
    text = write_report(cells, tmp_path).read_text(encoding="utf-8")
    assert "trec on tiny" in text


def test_results_without_the_fields_that_came_later_have_a_report_too(results, tmp_path):
    later = ("train_time_s", "breakdown_bytes", "predictions", "best_epoch", "validation_value")
    old = [{k: v for k, v in cell.items() if k not in later} for cell in results]
    text = write_report(old, tmp_path).read_text(encoding="utf-8")
    assert "time of the run" in text  # there is no other time
    assert "What the memory is for" not in text


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with every section, and with markup in every text that users write."""
    tmp_path = tmp_path_factory.mktemp("page")
    cells = [*some_results(), failed(HOSTILE, error=HOSTILE), result("mine", command=HOSTILE)]
    cells = [
        {**cell, "budget": {HOSTILE: 1}, "breakdown_bytes": {"weights": 5, HOSTILE: 7}}
        for cell in cells
    ]
    for i, method in enumerate(("loreft[rank=8]", "qlora")):
        cell = result(method, 7)
        correct = [i == 0, True, False] * 5
        cells.append(answered(tmp_path, cell, correct, prompt=f"{HOSTILE}</script>", wrong=HOSTILE))
    for layers, positions in itertools.product(("all", HOSTILE), ("f1", "l1")):
        config = {"method": {"layers": layers, "positions": positions}}
        cells.append(result(f"red[{layers},{positions}]", config=config))
    cells.append(result(f"lora[{HOSTILE}]", lr_search=searched(0.5, None, chosen=1)))
    cells.append(result("base[shots=1]", examples=[HOSTILE], num_trainable_params=0))
    return write_report(cells, tmp_path).read_text(encoding="utf-8")


def test_the_page_has_every_section_in_order_and_links_to_it(page):
    anchors = re.findall(r'<section id="([\w-]+)">', page)
    assert len(anchors) == len(SECTIONS)
    assert re.findall(r'<a href="#([\w-]+)">', page) == anchors


def test_the_page_is_well_formed(page):
    # Stricter than HTML asks: every tag is closed, every attribute quoted, every id there once.
    markup = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page, flags=re.DOTALL)
    root = ElementTree.fromstring(markup.partition("\n")[2])
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0


def test_the_page_fetches_nothing(page):
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]+"', "", page))
    assert not re.search(r"<(link|img|iframe|base)\b|@import|\bfetch\(", page)
    assert set(re.findall(r'(?:src|href)="(.)', page)) <= {"#"}


def test_every_reference_inside_a_chart_has_its_target(page):
    targets = set(re.findall(r'\bid="([^"]+)"', page))
    references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {first or second for first, second in references} <= targets


def test_text_of_users_cannot_become_markup(page):
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 3
    [data] = re.findall(r'<script type="application/json" id="\S+">(.*?)</script>', page)
    assert not set("<>&") & set(data)
    prompts = {example[1] for task in json.loads(data)["tasks"] for example in task["examples"]}
    assert prompts == {f"{HOSTILE}</script>"}


def test_the_page_shows_errors_commands_device_versions_and_the_budget(page):
    for text in ("ValueError: no", "run it", "a machine, 2 threads", "torch 2.13", "equal budget"):
        assert text in page


def test_short_names_leave_out_what_methods_of_a_name_share():
    loreft, bf16 = "loreft[rank=8,lr=1]", "loreft[rank=8,lr=1,storage=bf16]"
    assert short_names([loreft, bf16, "lora[rank=8]", "base[storage=nf4]", "red"]) == {
        loreft: "loreft",
        bf16: "loreft[storage=bf16]",
        "lora[rank=8]": "lora",
        "base[storage=nf4]": "base",
        "red": "red",
    }


def test_short_names_stay_different():
    names = ["lora[r=1,r=2]", "lora[r=2,r=1]"]
    assert short_names(names) == {name: name for name in names}


def test_a_chart_names_a_method_with_many_settings_by_its_place():
    settings = ("layers=upper:0.5,positions=f7+l7", "layers=all,positions=f3+l3")
    methods = [f"loreft[{each}]" for each in settings]
    cells = [result("lora"), *(result(m, value=i / 2) for i, m in enumerate(methods, 1))]
    assert list(compared(cells).chart_names.values()) == ["lora", "loreft (3)", "loreft (1)"]


@pytest.fixture
def with_answers(tmp_path):
    """loreft gets 90 of 100 examples, lora 80 as qlora does, dora 55; two seeds each."""
    cells = [answered(tmp_path, base(), [1] * 20 + [0] * 80)]
    for method, num_right in (("loreft", 90), ("lora[rank=8]", 80), ("qlora", 80), ("dora", 55)):
        for seed in range(2):
            correct = [1] * num_right + [0] * (100 - num_right)
            cells.append(answered(tmp_path, result(method, seed), correct))
    return cells


def test_the_ranking_says_what_is_better_than_the_reference_and_how_surely(with_answers, tmp_path):
    comparison = Comparison.read(with_answers, tmp_path)
    text = plain(ranking.render(comparison).body)
    assert comparison.reference == "qlora"
    assert "Clearly better than qlora: loreft. Clearly worse than qlora: dora." in text
    assert "Not told apart from qlora: lora. (100 examples)" in text
    order = re.findall(r"(\d) (loreft|lora|qlora|dora|base)\b", text)
    assert [name for _, name in order][:5] == ["loreft", "lora", "qlora", "dora", "base"]
    assert "90.0 ± 0.0 ▲ +10.0 +5.0 to +16.0" in text
    assert "Other seeds move it too" in text
    assert set(comparison.significance["trec"].differences) == {"loreft", "lora[rank=8]", "dora"}


def test_without_qlora_the_first_tuned_method_is_the_reference(with_answers, tmp_path):
    cells = [cell for cell in with_answers if cell["method"] != "qlora"]
    assert "Clearly worse than loreft: " in ranking.render(Comparison.read(cells, tmp_path)).body


def test_value_and_difference_stand_beside_the_name(with_answers, tmp_path):
    body = str(ranking.render(Comparison.read(with_answers, tmp_path)).body)
    titles = [plain(title) for title in re.findall(r"<th scope=\"col\".*?</th>", body, re.DOTALL)]
    assert titles[:3] == ["method", "accuracy %", "against qlora"]


def test_without_predictions_the_ranking_says_that_it_cannot_tell(results):
    assert "No significance" in ranking.render(compared(results)).body


def test_several_tasks_are_averaged_over_methods_that_finished_all():
    cells = [
        result(method, seed, task=task, value=value + seed / 10, peak_bytes=peak * 2**20)
        for method in ("loreft", "qlora")
        for seed in range(2)
        for task, value, peak in (("trec", 0.6, 30), ("sst2", 0.8, 40))
    ]
    cells[0]["error"] = "lost"  # loreft's seed 0 on trec
    cells += [failed("dora"), result("dora", task="sst2")]
    rows = {row.method: row for row in over_tasks(cells)}
    assert set(rows) == {"loreft", "qlora"}
    assert rows["qlora"].value_mean == pytest.approx(0.75)
    assert rows["qlora"].value_sd == pytest.approx(math.sqrt(2) * 0.05)
    assert rows["loreft"].value_mean == pytest.approx(0.8)  # of seed 1 alone
    assert rows["qlora"].peak_bytes == 40 * 2**20
    text = plain(ranking.render(compared(cells)).body)
    assert re.search(r"dora – failed 80\.0", text)


def test_what_was_not_run_on_every_task_is_folded_away_and_what_failed_is_not():
    cells = [result(method, task=task) for method in ("loreft", "qlora") for task in ("a", "b")]
    cells += [result("ia3", task="a"), result("red", task="a"), failed("dora") | {"task": "a"}]
    body = ranking.render(compared(cells)).body
    overview, rest = body.split("2 that were not run on every task")
    assert [name in plain(overview) for name in ("dora", "ia3", "red")] == [True, False, False]
    folded_away = plain(rest.split("</details>")[0])
    assert [name in folded_away for name in ("dora", "ia3", "red")] == [False, True, True]


def of_loss(directory, method, per_token, **fields):
    """A cell whose examples have these losses per token, of 1, 2, 3, ... tokens."""
    name = f"{method}-loss.jsonl"
    nothing = dict.fromkeys(("prediction", "reference", "correct"))
    rows = [
        {"source": f"t:{i}", "prompt": "p", **nothing, "loss": loss, "num_tokens": i + 1}
        for i, loss in enumerate(per_token)
    ]
    (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = np.arange(1, len(per_token) + 1)
    value = float((tokens * per_token).sum() / tokens.sum())
    cell = result(method, metric="loss", value=value, loss=value, task="texts")
    return {**cell, "predictions": name, "validation_value": value, **fields}


def test_the_lower_loss_is_the_better_one_everywhere_on_the_page(tmp_path):
    generator = np.random.default_rng(0)
    bad, good = generator.uniform(2, 3, 40), generator.uniform(0.5, 1, 40)
    cells = [
        of_loss(tmp_path, "qlora", bad, num_trainable_params=500),
        of_loss(tmp_path, "loreft", good),
        of_loss(tmp_path, "lora", bad + 1, num_trainable_params=2000),
    ]
    comparison = Comparison.read(cells, tmp_path)
    page = ranking.render(comparison).body
    lead, table = page.split("<table>")
    places = [table.index(f'data-value="{name}"') for name in ("loreft", "qlora", "lora")]
    assert places == sorted(places)
    assert "Clearly better than qlora: loreft. Clearly worse than qlora: lora." in plain(lead)
    assert 'aria-sort="ascending"' in table
    assert f"{cells[1]['value']:.3f}" in plain(table)
    # One is cheaper, the next is better, the last is neither.
    _, axes = frontier.new_figure()
    front = frontier._draw_points(comparison, axes, comparison.rows, frontier._PARAMETERS)
    assert [row.method for row in front] == ["qlora", "loreft"]
    assert "%" not in plain(runs.render(comparison).body)
    report = write_report(cells, tmp_path).read_text(encoding="utf-8")
    assert "loss, nats per token" in report


def test_a_loss_is_shown_as_it_is_in_every_table(tmp_path):
    cell = of_loss(tmp_path, "loreft", np.array([0.25, 0.25]))
    rows = aggregate([cell, {**cell, "seed": 1, "value": 0.5}])
    assert [column.title for column in columns(rows)][:2] == ["method", "loss"]
    assert "0.375 ± 0.177" in markdown(rows)
    assert "eval loss" not in markdown(rows)
    mixed = aggregate([cell, result(value=0.5)])
    assert columns(mixed)[2].title == "value, % or nats"
    assert [columns(mixed)[2].text(row) for row in mixed] == ["0.250", "50.0"]


def test_a_loss_has_no_mean_with_shares():
    cells = [result(value=0.5), result(task="texts", metric="loss", value=3.0)]
    [row] = over_tasks(cells)
    assert (row.metric, row.value_mean) == ("accuracy", 0.5)
    losses = [result(task=t, metric="loss", value=v) for t, v in (("a", 1.0), ("b", 2.0))]
    [row] = over_tasks(losses)
    assert (row.metric, row.value_mean) == ("loss", 1.5)


def test_the_map_frames_the_lowest_loss():
    def cell(layers, positions, value):
        name = f"loreft[layers={layers},positions={positions}]"
        config = {"method": {"layers": layers, "positions": positions}}
        return result(name, metric="loss", value=value, config=config)

    values = {("1", "f1"): 2.0, ("1", "l1"): 0.5, ("2", "f1"): 1.0, ("2", "l1"): 3.0}
    [grid] = heatmap.find_grids(compared([cell(*place, v) for place, v in values.items()]))
    assert grid.title == "loreft: loss"
    axes = heatmap.draw(grid).axes[0]
    assert "0.500" in {text.get_text() for text in axes.texts}
    [frame] = [patch for patch in axes.patches if not patch.get_fill()]
    assert (frame.get_x() + 0.46, frame.get_y() + 0.46) == pytest.approx((1, 0))


def test_metrics_that_differ_are_averaged_as_they_are():
    [row] = over_tasks([result(value=0.5), result(task="cola", metric="matthews", value=0.1)])
    assert (row.metric, row.value_mean) == ("mean", pytest.approx(0.3))


def test_the_front_is_what_no_other_method_beats():
    points = [(1, 0.5), (2, 0.7), (2, 0.6), (3, 0.7), (4, 0.9), (5, 0.8), (1, 0.5)]
    assert sorted(frontier.pareto_front(points)) == [0, 1, 4, 6]
    beaten = [
        any(a <= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points
    ]  # fmt: skip
    assert [i for i, is_beaten in enumerate(beaten) if not is_beaten] == [0, 1, 4, 6]


def names_in(figure):
    figure.canvas.draw()
    [axes] = figure.axes
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    return axes.get_window_extent(), {
        " ".join(text.get_text().split()): super(Annotation, text).get_window_extent()
        for text in texts
    }


@pytest.mark.parametrize("num_methods", [2, 7, 12, 22])
def test_no_name_in_a_chart_covers_another(num_methods):
    rng = random.Random(num_methods)
    cells = [
        base(),
        result("base[storage=bf16]", value=0.9, num_trainable_params=0, peak_bytes=None),
    ]
    for i in range(num_methods):
        fields = {
            "value": rng.uniform(0.6, 0.95),
            "num_trainable_params": rng.choice([1_000, 18_000, 160_000]),
            "peak_bytes": rng.randrange(20, 60) * 2**20,
            "train_time_s": rng.uniform(10, 100),
            "loss_history": [[10, 2.0], [20, rng.uniform(0.1, 0.4)]],
        }
        name = f"lora{i}" if i % 3 else f"loreft[rank={i},positions=f7+l7]"
        cells.append(result(name, **fields))
    comparison = compared(cells)
    drawn = {
        **frontier.draw(comparison, comparison.rows),
        **curves.render(comparison).charts,
    }
    assert len(drawn) == 4
    for name, (_, figure) in drawn.items():
        frame, boxes = names_in(figure)
        assert len(boxes) >= min(num_methods, 9)
        for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
            assert not box.overlaps(second), f"{name}: {one} covers {other}"
        if name != "loss_curves":
            assert len(boxes) >= num_methods
            assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes.values())


def searched(*values, chosen=None, **errors):
    """Trials at 1e-4, 2e-4, ... with these values."""
    return [
        {"method": f"m[lr={i}e-4]", "lr": i * 1e-4, "value": value, "loss": 1.0,
         "error": None if value is not None else "FloatingPointError: " + HOSTILE,
         "chosen": i == chosen}
        for i, value in enumerate(values, start=1)
    ]  # fmt: skip


def test_searched_rates_are_drawn_and_their_edges_and_failures_said():
    cells = [
        base(),
        result("loreft[lr=searched]", lr_search=searched(0.5, 0.7, 0.9, chosen=3)),
        result("qlora[lr=searched]", lr_search=searched(0.5, 0.75, None, chosen=2)),
        result("lora", lr_search=searched(None, None)),
        result("red[lr=2e-4]", lr_search=[{**searched(None)[0], "error": None, "chosen": True}]),
    ]
    section = rates.render(compared(cells))
    text = plain(section.body)
    assert "a better rate may lie beyond it: loreft." in text
    assert "0.0003 90.0 % best at the highest rate tried 0.0001: 50.0, 0.0002: 70.0, 0.0003" in text
    assert "0.0002 75.0 % failed at 0.0003 0.0001: 50.0, 0.0002: 75.0, 0.0003: failed" in text
    assert "every trial failed, so it keeps its own 0.0001: failed, 0.0002: failed" in text
    assert "not searched, as the entry names it" in text
    [axes] = section.charts["learning_rates"].figure.axes
    assert axes.get_xscale() == "log"
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    assert [line.get_xdata().tolist() for line in lines] == [
        pytest.approx([1e-4, 2e-4, 3e-4]),
        pytest.approx([1e-4, 2e-4]),
    ]
    rings = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == "None"]
    assert rings == [[pytest.approx([3e-4, 90])], [pytest.approx([2e-4, 75])]]
    assert rates.render(compared([base(), result()])) is None


def test_rates_of_several_tasks_have_a_chart_each():
    cells = [
        result("lora[lr=searched]", task=task, lr_search=searched(0.5, 0.7, chosen=chosen))
        for task, chosen in (("boolq", 1), ("piqa", 2))
    ]
    section = rates.render(compared(cells))
    assert [chart.title for chart in section.charts.values()] == [
        "Validation value, boolq",
        "Validation value, piqa",
    ]


def test_the_base_with_examples_is_compared_and_says_what_it_was_shown(tmp_path):
    shown = {
        "few_shot": {"num_short": 3, "fewest": 1, "shown": []},
        "examples": ["/data/me/train.jsonl:4", "/data/me/train.jsonl:7"],
        "num_trainable_params": 0,
        "num_examples": 40,
    }
    right = [True] * 30 + [False] * 10
    cells = [
        answered(tmp_path, base(), [False] * 40),
        *(
            answered(tmp_path, result("base[shots=2,storage=nf4]", seed, **shown), right)
            for seed in (0, 1)
        ),
        answered(tmp_path, result("qlora"), [True] * 40),
    ]
    comparison = Comparison.read(cells, tmp_path)
    found = comparison.significance["trec"]
    assert list(found.differences) == ["base[shots=2,storage=nf4]"]
    assert found.differences["base[shots=2,storage=nf4]"].value == pytest.approx(-0.25)
    assert found.differences["base[shots=2,storage=nf4]"].is_clear
    text = plain(ranking.render(comparison).body)
    assert "the base, untrained, with 2 solved training rows before each prompt" in text
    assert "6 of 80 prompts have fewer, for want of room in --max-length" in text
    assert comparison.summary.startswith("1 method ")
    assert "seed 1, shows train.jsonl:4, train.jsonl:7" in plain(origin.render(comparison).body)
    assert "/data/me" not in origin.render(comparison).body


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ({"loreft": [0], "qlora": [0]}, "One seed: nothing here says how far another one would"),
        ({"loreft": [0, 1], "qlora": [0, 1]}, "told by its ±: trust no difference that is smaller"),
        ({"loreft": [0, 1], "qlora": [0]}, "smaller. With fewer than 2 seeds: qlora (1)."),
    ],
)
def test_what_seeds_tell_is_said(seeds, said):
    cells = [result(method, seed) for method, some in seeds.items() for seed in some]
    assert said in plain(ranking.render(compared([base(), *cells])).body)


def test_loss_curves_are_means_over_seeds():
    figure = curves.render(compared([result(seed=0), result(seed=1)])).charts["loss_curves"].figure
    [line] = figure.axes[0].lines
    assert list(line.get_ydata()) == [2.0, 1.5]


def test_tasks_that_one_training_served_share_their_loss_curves():
    cells = [result(task=task) for task in ("boolq", "piqa")]
    assert list(curves.render(compared(cells)).charts) == ["loss_curves"]
    cells.append(result(task="trec", loss_history=[[10, 3.0], [20, 1.0]]))
    section = curves.render(compared(cells))
    assert list(section.charts) == ["loss_curves", "loss_curves-1"]
    assert "boolq, piqa" in section.body


def test_the_memory_breakdown_is_of_the_run_with_the_highest_peak():
    cells = [
        result("qlora", 0, breakdown_bytes={"weights": 10, "adapter": 9, "loss": 0}),
        result("loreft", 0, breakdown_bytes={"weights": 10, "adapter": 1}),
        result("loreft", 1, breakdown_bytes={"weights": 10, "adapter": 3}),
        base(),
    ]
    found = memory.largest_breakdowns(compared(cells))
    assert list(found.items()) == [
        ("loreft", {"weights": 10, "adapter": 3}),
        ("qlora", {"weights": 10, "adapter": 9}),
    ]
    assert memory.categories(found) == ["weights", "adapter"]
    [axes] = memory.render(compared(cells)).charts["memory_breakdown"].figure.axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches[-2:]]
    assert np.multiply(ends, 2**20) == pytest.approx([13, 19])


def placed(layers, positions, seed=0, rank=4, **fields):
    config = {"method": {"layers": layers, "positions": positions, "rank": rank}, "seed": seed}
    return result(f"loreft[{layers},{positions},{rank}]", seed, config=config, **fields)


def test_a_grid_of_layers_and_positions_is_drawn_with_its_values():
    cells = [
        placed(layers, positions, seed, value=value + seed / 50)
        for layers, positions, value in (
            *(("10", "l1", 0.5), ("10", "f7+l7", 0.6)),
            *(("9", "l1", 0.7), ("9", "f7+l7", 0.8), ("9", "all", 0.9)),
        )
        for seed in (0, 1)
    ]
    cells += [placed("9", "l1", rank=8), result("qlora", config={"method": {"rank": 4}})]
    [grid] = heatmap.find_grids(compared(cells))
    assert (grid.layers, grid.positions) == (["9", "10"], ["l1", "f7+l7", "all"])
    [axes] = heatmap.draw(grid).axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {
        **{(0, 0): "71.0", (1, 0): "81.0", (2, 0): "91.0"},
        **{(0, 1): "51.0", (1, 1): "61.0"},
    }
    hatched = [patch.get_xy() for patch in axes.patches if patch.get_hatch()]
    assert hatched == [(1.5, 0.5)]


@pytest.mark.parametrize("places", [("0l", "1l"), ("0l", "1f"), ("0l", "0f", "1l")])
def test_a_few_places_are_no_grid(places):
    assert heatmap.find_grids(compared([placed(*place) for place in places])) == []


def test_methods_that_differ_in_more_than_the_place_are_no_grid():
    cells = [placed(layers, p, rank=i) for i, (layers, p) in enumerate(
        itertools.product("01", ("l1", "f1")))]  # fmt: skip
    assert heatmap.find_grids(compared(cells)) == []


def test_answers_are_aligned_by_source_and_line(tmp_path):
    cells = [answered(tmp_path, result(seed=s), [1, 0, 1]) for s in (0, 1)]
    path = tmp_path / cells[1]["predictions"]
    lines = path.read_text(encoding="utf-8").splitlines()
    again = json.dumps({**json.loads(lines[0]), "correct": False})
    path.write_text("\n".join([lines[2], lines[0], again]), encoding="utf-8")
    found = read_answers(cells, tmp_path)["trec"]
    assert [example.source[-1] for example in found.examples] == ["0", "2"]
    assert found.methods["loreft"].correct.tolist() == [[True, True], [True, True]]
    assert found.num_left_out == 2  # example 1, and the second line from line 0


def test_answers_are_aligned_where_the_files_have_moved(tmp_path):
    cells = [answered(tmp_path, result(seed=s), [1, 0, 1]) for s in (0, 1)]
    path = tmp_path / cells[1]["predictions"]
    path.write_text(path.read_text(encoding="utf-8").replace("/data/", "D:\\\\other\\\\"))
    assert read_answers(cells, tmp_path)["trec"].num_left_out == 0


def test_predictions_that_cannot_be_read_are_left_out_with_a_warning(tmp_path):
    cells = [answered(tmp_path, result(seed=s), [1, 0]) for s in (0, 1)]
    (tmp_path / cells[1]["predictions"]).write_text('{"source": "x"}\n', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"leaves out the predictions in .*1\.jsonl: KeyError"):
        found = read_answers(cells, tmp_path)
    assert found["trec"].methods["loreft"].seeds == (0,)


def test_predictions_that_are_gone_are_left_out(tmp_path):
    assert read_answers([result(predictions="cells/gone/predictions.jsonl")], tmp_path) == {}


def unpacked(section):
    [data] = re.findall(r'id="examples-data">(.*?)</script>', section.body)
    return json.loads(data)


def test_the_browser_holds_every_answer(with_answers, tmp_path):
    data = unpacked(examples.render(Comparison.read(with_answers, tmp_path)))
    assert data["pair"] == ["loreft", "qlora"]
    [task] = data["tasks"]
    assert task["methods"] == ["base", "loreft", "lora", "qlora", "dora"]
    assert len(task["examples"]) == task["total"] == 100
    source, prompt, reference, answers = task["examples"][85]
    assert (source, prompt) == ("test.jsonl:85", "question 85")
    assert task["texts"][reference] == "right"
    words = [[(task["texts"][a >> 1], a % 2) for a in seeds] for seeds in answers]
    assert words[1] == [("right", 1), ("right", 1)]
    assert words[3] == [("wrong", 0), ("wrong", 0)]


def test_a_page_without_texts_says_of_each_example_only_whether_it_is_right(tmp_path):
    cells = [
        answered(tmp_path, result(m), [1, 0] * 5, prompt="a secret", wrong="another secret")
        for m in ("loreft", "qlora")
    ]
    path = write_report(cells, tmp_path, texts=False)
    page = path.read_text(encoding="utf-8")
    assert "secret" not in page
    data = unpacked(examples.render(Comparison.read(cells, tmp_path, texts=False)))
    assert (data["texts"], data["tasks"][0]["texts"]) == (False, [""])
    assert data["tasks"][0]["examples"][0] == ["test.jsonl:0", "", 0, [[1], [1]]]
    assert "secret" in write_report(cells, tmp_path).read_text(encoding="utf-8")


def test_where_not_all_examples_fit_those_with_disagreement_come_first(
    with_answers, tmp_path, monkeypatch
):
    monkeypatch.setattr(examples, "MAX_EXAMPLES", 40)
    [task] = unpacked(examples.render(Comparison.read(with_answers, tmp_path)))["tasks"]
    numbers = [int(example[0].rpartition(":")[2]) for example in task["examples"]]
    assert (len(numbers), task["total"]) == (40, 100)
    assert numbers == sorted(numbers)
    assert set(range(55, 90)) <= set(numbers)  # some methods are right and some are wrong


def test_the_browser_stays_within_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_CHARACTERS", 20_000)
    cells = [answered(tmp_path, result(m), [1, 0] * 50, prompt="x" * 5000) for m in ("a", "b")]
    section = examples.render(Comparison.read(cells, tmp_path))
    [task] = unpacked(section)["tasks"]
    assert 5 < len(task["examples"]) < 20
    assert len(section.body) < 30_000
    assert len(task["examples"][0][1]) < 1300


def test_a_regression_has_no_right_and_wrong_to_browse(with_answers, tmp_path):
    cells = [{**cell, "metric": "pearson"} for cell in with_answers]
    assert examples.render(Comparison.read(cells, tmp_path)) is None


def test_runs_show_the_chosen_epoch_and_the_validation_value():
    body = runs.render(compared([result(best_epoch=2, validation_value=0.875)])).body
    assert "best epoch" in plain(body)
    assert "87.5" in body
    assert "best epoch" not in plain(runs.render(compared([result()])).body)


def test_no_cell_of_the_csv_file_is_a_formula_and_nothing_is_lost(tmp_path):
    texts = ["=1+1", "+a", "-b", "@c", "\td", "\re", "'=f", "''-g", "'h", "plain", "a=b"]
    write_csv(tmp_path / "a.csv", [result(text, loss=-0.5) for text in texts])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["loss"] for row in rows} == {"-0.5"}  # a number stays one
    assert not any(row["method"].startswith(tuple("=+-@\t\r")) for row in rows)
    back = [re.sub(r"^'(?='*[=+\-@\t\r])", "", row["method"]) for row in rows]
    assert back == texts
