"""What a cell forgot, and how soon it was as good as the reference."""

from __future__ import annotations

import itertools
import re

import pytest
from rich.console import Console

from lowmem_reft.compare.cell import EMPTY_RESULT, what_is_wrong
from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.console import print_table
from lowmem_reft.compare.report.relative import relate
from lowmem_reft.compare.report.sections import costs, curves, frontier, ranking
from lowmem_reft.compare.report.table import aggregate, columns, over_tasks

TEXT = {"forgetting": {"text": "digest", "limit": 64}}


def cell(method, seed=0, scores=(), *, seconds=2.0, loss=None, **fields):
    """A run whose epochs scored these values, each after as many seconds, 5 steps and 80 tokens."""
    validation = [
        {
            **{"epoch": float(i), "metric": "accuracy", "value": value, "loss": 1.0},
            **{"num_steps": 5 * i, "train_time_s": seconds * i},
            **{"num_computed_tokens": 80 * i, "num_real_tokens": 60 * i},
        }
        for i, value in enumerate(scores, start=1)
    ]
    known = {"method": method, "task": "trec", "seed": seed, "storage": "nf4", "model": "tiny"}
    measured = {
        **{"metric": "accuracy", "value": 0.8, "num_trainable_params": 100, "config": TEXT},
        **{"validation": validation or None, "general_loss": loss, "command": "run it"},
        **{"loss_history": [[1, 2.0], [2, 1.0]], "peak_bytes": 2**20, "adapter_bytes": 2**21},
    }
    found = {**EMPTY_RESULT, **measured, **known, **fields}
    assert what_is_wrong(found) is None
    return found


def base(loss, **fields):
    return cell("base[storage=nf4]", loss=loss, num_trainable_params=0, value=0.2, **fields)


def row_of(results, method):
    return next(row for row in aggregate(results) if row.method == method)


def as_read(results):
    return Comparison(results=results, rows=aggregate(results), answers={})


def plain(html):
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("\N{NO-BREAK SPACE}", " ").split())


def test_forgetting_is_the_rise_over_the_base_that_is_stored_the_same_way():
    results = relate(
        [
            base(2.0),
            base(1.5, storage="bf16"),
            cell("loreft", loss=2.25),
            cell("loreft", 1, loss=2.75),
            cell("lora", loss=1.25, storage="bf16"),
            cell("ia3", loss=None, error="lost"),
        ]
    )
    assert [each["forgetting"] for each in results] == [0, 0, 0.25, 0.75, -0.25, None]
    assert row_of(results, "loreft").forgetting == 0.5


def test_another_text_or_task_is_no_measure_and_what_was_known_stays():
    other = {"forgetting": {"text": "other", "limit": 64}}
    known = cell("loreft", loss=9.0, config=other, forgetting=0.5)
    results = relate([base(2.0), known, cell("lora", loss=9.0, task="sst2")])
    assert [each["forgetting"] for each in results] == [0, 0.5, None]


def test_another_base_is_no_measure():
    small, large = ({**TEXT, "model": {"model": digest}} for digest in ("small", "large"))
    results = relate(
        [base(3.0, config=small), base(1.0, config=large), cell("lora", loss=3.5, config=small)]
    )
    assert [each["forgetting"] for each in results] == [0, 0, 0.5]


def test_the_first_epoch_that_is_no_worse_than_the_reference_s_best_counts():
    results = relate(
        [
            cell("loreft", scores=[0.6, 0.8, 0.9], seconds=1.5),
            cell("qlora", scores=[0.5, 0.8, 0.7]),
            cell("ia3", scores=[0.7, 0.7, 0.7]),
            cell("dora", scores=[0.9], error="lost"),
            cell("lora"),
        ]
    )
    fields = ("time_to_reference_s", "steps_to_reference", "tokens_to_reference")
    assert [[each[name] for name in fields] for each in results] == [
        [3.0, 10, 160],
        [4.0, 10, 160],
        [None, None, None],
        [2.0, 5, 80],
        [None, None, None],
    ]
    assert [each["reference_value"] for each in results] == [0.8, 0.8, 0.8, 0.8, None]
    shown = {column.field: column for column in columns(aggregate(results))}
    words = {row.method: shown["time_to_reference_s"].text(row) for row in aggregate(results)}
    assert words == {
        **{"loreft": "3.0", "qlora": "4.0", "ia3": "not reached"},
        **{"dora": "–", "lora": "–"},  # one failed, the other was never scored
    }


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 4])
def test_the_reference_reaches_its_own_best_whatever_its_seeds(num_seeds):
    scores = [[0.5 + seed / 10, 0.4] for seed in range(num_seeds)]
    cells = [cell("qlora", seed, scores[seed]) for seed in range(num_seeds)]
    assert row_of(relate(cells), "qlora").time_to_reference_s == pytest.approx(2.0)


def test_a_seed_that_never_reached_it_took_longer_than_all():
    reference = [cell("qlora", seed, [0.8]) for seed in range(3)]
    late, never = [0.1, 0.1, 0.9], [0.1, 0.1, 0.1]
    for others, median in (([late, late, never], 6.0), ([late, never, never], None)):
        cells = [cell("loreft", seed, scores) for seed, scores in enumerate(others)]
        assert row_of(relate([*reference, *cells]), "loreft").time_to_reference_s == median


def test_over_tasks_a_method_is_as_good_only_if_it_is_on_all():
    cells = [
        cell(method, scores=scores, task=task, loss=loss)
        for task, loss in (("trec", 2.5), ("sst2", 3.5))
        for method, scores in (("qlora", [0.5, 0.8]), ("loreft", [0.8 if task == "trec" else 0.1]))
    ]
    bases = [base(2.0, task=task) for task in ("trec", "sst2")]
    rows = {row.method: row for row in over_tasks(relate([*bases, *cells]))}
    assert (rows["qlora"].time_to_reference_s, rows["loreft"].time_to_reference_s) == (4.0, None)
    assert rows["loreft"].reference_value == 0.8
    assert rows["loreft"].forgetting == pytest.approx(1.0)


@pytest.fixture
def results():
    return relate(
        [
            base(2.0),
            *(
                cell(method, seed, scores, seconds=seconds, loss=loss)
                for (method, scores, seconds, loss), seed in itertools.product(
                    (
                        ("loreft", [0.6, 0.9], 1.0, 1.9),
                        ("qlora", [0.5, 0.8], 2.0, 2.5),
                        ("ia3", [0.4, 0.4], 3.0, 2.0),
                    ),
                    (0, 1),
                )
            ),
        ]
    )


def test_the_page_has_the_columns_and_says_what_they_mean(results):
    comparison = as_read(results)
    body = plain(costs.render(comparison).body)
    for words in ("adapter KiB", "peak MiB", "forgetting", "s to reference", "tokens to reference"):
        assert words in body
    assert "2,048.0" in body
    assert "Forgetting: how much the loss on general text has risen" in body
    assert "the best of qlora (80.0 %; of several seeds the lower median)" in body
    assert "not reached" in body
    assert "forgetting" in plain(ranking.render(comparison).body)
    without = plain(costs.render(as_read([cell("loreft"), cell("qlora")])).body)
    assert "orgetting" not in without
    assert "reference" not in without


def test_forgetting_has_a_chart_with_an_axis_on_which_nought_is_a_place(results):
    found = frontier.render(as_read(results)).charts["accuracy_vs_forgetting"]
    [axes] = found.figure.axes
    assert axes.get_xscale() == "linear"
    points = sorted(line.get_xdata()[0] for line in axes.lines if line.get_marker() in "osD^vP")
    assert points == pytest.approx([-0.1, 0.0, 0.5])
    assert "accuracy_vs_forgetting" not in frontier.render(as_read([cell("a")])).charts


def test_validation_is_drawn_against_seconds_and_tokens(results):
    results[1]["validation"][1]["train_time_s"] = 4.0  # of loreft's first seed, after 2 epochs
    section = curves.render(as_read(results))
    assert [*section.charts] == ["loss_curves", "validation_vs_time", "validation_vs_tokens"]
    by_name = {}
    for name in ("time", "tokens"):
        [axes] = section.charts[f"validation_vs_{name}"].figure.axes
        *lines, target = axes.lines
        assert set(target.get_ydata()) == {80.0}
        by_name[name] = [(*line.get_xdata(), *line.get_ydata()) for line in lines]
    assert by_name["time"] == [
        pytest.approx(each) for each in ((1, 3, 60, 90), (2, 4, 50, 80), (3, 6, 40, 40))
    ]
    assert by_name["tokens"][0] == pytest.approx((80, 160, 60, 90))


def test_epochs_that_say_nothing_of_what_was_spent_have_no_curve(results):
    old = [{**each, "validation": [{"epoch": 1.0, "value": 0.5}]} for each in results]
    assert [*curves.render(as_read(relate(old))).charts] == ["loss_curves"]
    assert all(each["reference_value"] is None for each in relate(old))


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_with_all_columns_is_not_cut(results, width):
    console = Console(width=width, force_terminal=True, color_system=None)
    more = {"step_time_s": 0.05, "train_time_s": 100.5, "tokens_per_s": 2000.0, "loss": 0.5}
    results = [{**each, **more, "trainable_percent": 0.123} for each in results]
    with console.capture() as capture:
        print_table(aggregate(results), console)
    assert "…" not in capture.get()
    assert "forgetting" in capture.get()
    assert ("not reached" in capture.get()) == (width == 120)
