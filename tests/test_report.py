"""The table, the charts and the page that a comparison leaves behind."""

from __future__ import annotations

import itertools
import random
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Annotation
from rich.console import Console

from lowmem_reft.cell import EMPTY_RESULT, Cell
from lowmem_reft.options import DataOptions, EvaluateOptions, ModelOptions
from lowmem_reft.report import write_report
from lowmem_reft.report.console import Progress, print_table
from lowmem_reft.report.html import render_html
from lowmem_reft.report.plots import draw_plots, svg_text
from lowmem_reft.report.table import aggregate, columns, markdown

HOSTILE = '<script>alert("x")</script> & [bold]more[/bold]'


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


def base():
    return result("base[storage=nf4]", value=0.2, num_trainable_params=0, peak_bytes=None)


@pytest.fixture
def results():
    tuned = [result(method, seed) for method in ("loreft[rank=8]", "qlora") for seed in range(3)]
    return [base(), *tuned, failed(), failed("qlora", 3)]


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


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_table_is_not_cut(results, width):
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        print_table(aggregate(results), console)
    text = capture.get()
    assert "…" not in text
    assert "81.0 ± 1.0" in text
    assert "dora seed 0: ValueError: no" in text
    assert ("eval" in text) == (width == 140)


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


def test_quiet_progress_says_nothing(tmp_path, capsys):
    with Progress(2, quiet=True):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_report_writes_its_files(results, tmp_path):
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy_vs_memory.png",
        "accuracy_vs_parameters.png",
        "loss_curves.png",
        "report.html",
    ]


@pytest.mark.parametrize("cells", [[base()], [failed()], [base(), failed()]])
def test_a_comparison_in_which_nothing_was_trained_has_a_report_too(cells, tmp_path):
    text = write_report(cells, tmp_path).read_text(encoding="utf-8")
    assert "trec on tiny" in text


@pytest.fixture
def page(results):
    cells = [*results, failed(HOSTILE, error=HOSTILE), result("mine", command=HOSTILE)]
    charts = {
        name: svg_text(figure) for name, figure in draw_plots(aggregate(cells), cells).items()
    }
    return render_html(cells, charts)


def test_the_page_is_well_formed(page):
    # Stricter than HTML asks: every tag is closed, every attribute quoted, every id there once.
    root = ElementTree.fromstring(page.partition("\n")[2])
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


def test_the_page_shows_errors_commands_device_and_versions(page):
    for text in ("ValueError: no", "run it", "a machine, 2 threads", "torch 2.13", "81.0 ± 1.0"):
        assert text in page


def names_in(figure):
    figure.canvas.draw()
    [axes] = figure.axes
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    return axes.get_window_extent(), {
        " ".join(text.get_text().split()): super(Annotation, text).get_window_extent()
        for text in texts
    }


@pytest.mark.parametrize("num_methods", [2, 7, 12])
def test_no_name_in_a_chart_covers_another(num_methods):
    rng = random.Random(num_methods)
    cells = [
        base(),
        result("base[storage=bf16]", value=0.9, num_trainable_params=0, peak_bytes=None),
    ]
    for i in range(num_methods):
        fields = {
            "value": rng.uniform(0.8, 0.95),
            "num_trainable_params": rng.choice([1_000, 18_000, 160_000]),
            "peak_bytes": rng.randrange(20, 60) * 2**20,
            "loss_history": [[10, 2.0], [20, rng.uniform(0.1, 0.4)]],
        }
        name = "lora" if i % 3 else f"loreft[rank={i},positions=f7+l7]"
        cells.append(result(f"{name}{i}", **fields))
    for name, figure in draw_plots(aggregate(cells), cells).items():
        frame, boxes = names_in(figure)
        assert len(boxes) >= num_methods
        for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
            assert not box.overlaps(second), f"{name}: {one} covers {other}"
        if name != "loss_curves":
            assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes.values())


def test_loss_curves_are_means_over_seeds():
    cells = [result(seed=0), result(seed=1)]
    figure = draw_plots(aggregate(cells), cells)["loss_curves"]
    [line] = figure.axes[0].lines
    assert list(line.get_ydata()) == [2.0, 1.5]
