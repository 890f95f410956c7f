"""The search for each method's learning rate: what is tried, chosen, read, and run again.

Nothing is trained: ``FakeRun`` stands for the processes, and a value follows from the method and
its rate.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fake_model import config_alone
from lowmem_reft import cli
from lowmem_reft.compare import queue, report
from lowmem_reft.compare.cell import EMPTY_RESULT, Cell, Result, write_cell
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.child import run_cell
from lowmem_reft.compare.engines import processes
from lowmem_reft.compare.engines.launch import leave_result, result_or_cause
from lowmem_reft.compare.lr_search import search_rates
from lowmem_reft.compare.matrix import run_comparison
from lowmem_reft.compare.sources import find_sources
from lowmem_reft.data import embedded
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.methods.table import METHODS
from lowmem_reft.options import CompareOptions
from lowmem_reft.options.written import build, changed

ROWS = [{"prompt": f"{i} is", "choices": ["even", "odd"], "answer": i % 2} for i in range(20)]


class FakeRun:
    """In place of a cell's process: its value falls with the distance from the best rate."""

    best: ClassVar[dict[str, float | None]] = {}
    seen: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, cell: Cell, *_: object) -> None:
        self.cell = cell
        write_cell(cell)
        leave_result(cell.directory / "cell.json", self.measured)

    def measured(self, cell: Cell) -> Result:
        train, data = cell.train, cell.evaluate.data
        lr = None if train is None else train.optim.lr
        place = None if train is None else train.run.output_dir
        known = {name: cell.record[name] for name in ("method", "seed")}
        asked = {"scored": Path(data.data).name, "limit": data.limit}
        self.seen.append({**known, **asked, "lr": lr, "training": place})
        value = 0.1
        if train is not None and lr is not None:
            best = self.best[train.method.method]
            if best is None or lr > 30 * best:
                raise FloatingPointError("the loss is not a number")
            value = round(max(0.0, 1 - abs(math.log10(lr / best))), 3)
        found = {"metric": "accuracy", "value": value, "loss": 1.0, "wall_time_s": 1.0}
        return {**EMPTY_RESULT, **found, **cell.record}

    def ended(self) -> bool:
        return True

    def result(self) -> Result:
        return result_or_cause(self.cell, "left no result", 0.0)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareOptions:
    monkeypatch.setattr(processes, "ProcessRun", FakeRun)
    monkeypatch.setattr(queue, "POLL_S", 0)
    monkeypatch.setattr(report, "write_report", lambda _, d, **_k: d / "report.html")
    model = config_alone(tmp_path)
    return build(
        CompareOptions,
        model=str(model),
        data=write(tmp_path / "train.jsonl", ROWS),
        validation_data=write(tmp_path / "validation.jsonl", ROWS[:6]),
        eval_data=write(tmp_path / "test.jsonl", ROWS[:4]),
        methods="loreft,qlora,lora[lr=1e-3]",
        lr_search="0.3,1,3",
        seeds="1,2",
        eval_limit=3,
        validation_limit=5,
        output_dir=tmp_path / "out",
        quiet=True,
    )


def run(options: CompareOptions, **best: float | None) -> list[dict[str, Any]]:
    """Run a comparison whose methods have these best rates; return what ran."""
    FakeRun.best, FakeRun.seen = best, []
    run_comparison(options)
    return FakeRun.seen


def validated(runs: list[dict[str, Any]]) -> list[float]:
    return [each["lr"] for each in runs if each["scored"] == "validation.jsonl"]


def results_of(options: CompareOptions) -> dict[tuple[str, int], dict[str, Any]]:
    results = json.loads((options.output_dir / "results.json").read_text())
    return {(result["method"], result["seed"]): result for result in results}


def test_every_method_is_tried_as_often_on_validation_rows_and_its_best_rate_is_taken(
    options: CompareOptions,
) -> None:
    runs = [each for each in run(options, loreft=2.596e-3, qlora=2e-4, lora=1e-3) if each["lr"]]
    names = ("method", "lr", "seed", "limit")
    tried, scored = (
        [tuple(each[name] for name in names) for each in runs if each["scored"] == file]
        for file in ("validation.jsonl", "test.jsonl")
    )
    assert tried == [
        ("loreft[lr=0.00027]", 2.7e-4, 1, 5),
        ("loreft[lr=0.0009]", 9e-4, 1, 5),
        ("loreft[lr=0.0027]", 2.7e-3, 1, 5),
        ("qlora[lr=6e-05]", 6e-5, 1, 5),
        ("qlora[lr=0.0002]", 2e-4, 1, 5),
        ("qlora[lr=0.0006]", 6e-4, 1, 5),
    ]
    assert scored == [
        (method, lr, seed, 3)
        for method, lr in (
            ("loreft[lr=searched]", 2.7e-3),
            ("qlora[lr=searched]", 2e-4),
            ("lora[lr=1e-3]", 1e-3),
        )
        for seed in (1, 2)
    ]
    found = results_of(options)["loreft[lr=searched]", 2]
    assert found["config"]["optim"]["lr"] == 2.7e-3
    trials = found["lr_search"]
    assert [(t["method"], t["lr"], t["chosen"], t["error"]) for t in trials] == [
        ("loreft[lr=0.00027]", 2.7e-4, False, None),
        ("loreft[lr=0.0009]", 9e-4, False, None),
        ("loreft[lr=0.0027]", 2.7e-3, True, None),
    ]
    assert [t["value"] for t in trials] == pytest.approx([0.016, 0.539, 0.984], abs=2e-3)
    kept = results_of(options)["lora[lr=1e-3]", 1]["lr_search"]
    assert [(t["method"], t["lr"], t["chosen"]) for t in kept] == [("lora[lr=1e-3]", 1e-3, True)]
    assert results_of(options)["base[storage=nf4]", 0]["lr_search"] is None


def test_what_was_trained_in_the_search_is_where_the_row_looks_for_it(
    options: CompareOptions,
) -> None:
    runs = run(options, loreft=9e-4, qlora=2e-4, lora=1e-3)
    places = Counter(each["training"] for each in runs if each["lr"])
    assert sorted(places.values()) == [1] * 8 + [2, 2]
    for result in results_of(options).values():
        if result["lr_search"] and result["seed"] == 1 and len(result["lr_search"]) > 1:
            assert places[options.output_dir / "trained" / _slug(result)] == 2


def _slug(result: dict[str, Any]) -> str:
    (best,) = (trial for trial in result["lr_search"] if trial["chosen"])
    return f"{best['method'].replace('[', '-').rstrip(']')}-seed1"


def test_a_row_takes_over_the_adapter_of_its_trial_and_a_changed_training_does_not(
    options: CompareOptions, tiny_llama_dir: Path
) -> None:
    short = changed(options, model=str(tiny_llama_dir), max_steps=1, device="cpu")
    specs, results = parse_methods("loreft[lr=1e-3]"), []
    for folder, own in (
        ("lr-search", short),
        ("cells", short),
        ("cells", changed(short, max_steps=2)),
    ):
        cell = build_cells(own, specs, [1], find_sources(own), folder=folder)[-1]
        results.append(run_cell(cell))
    trial, row, other = results
    assert trial["train_time_s"] == row["train_time_s"]
    assert [each["num_steps"] for each in results] == [1, 1, 2]
    assert other["train_time_s"] != row["train_time_s"]


def test_the_command_of_a_row_has_the_rate_and_gives_the_same_cell(
    options: CompareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(options, loreft=9e-4, qlora=6e-4, lora=1e-3)
    result = results_of(options)["qlora[lr=searched]", 2]
    words = shlex.split(result["command"])
    assert words[words.index("--methods") + 1] == "qlora[lr=0.0006]"
    assert "--lr-search" not in words
    seen: list[CompareOptions] = []
    monkeypatch.setattr(cli, "_handler", lambda _: lambda given: seen.append(given) or {})
    cli.main([*words[1:], "--output-dir", str(tmp_path / "again")])
    cells = build_cells(
        seen[0], parse_methods(seen[0].matrix.methods or ""), [2], find_sources(seen[0])
    )
    assert cells[-1].record["key"] == result["key"]


def test_trials_that_ended_are_not_run_again_and_other_multiples_reuse_them(
    options: CompareOptions,
) -> None:
    best: dict[str, float] = {"loreft": 9e-4, "qlora": 2e-4, "lora": 1e-3}
    run(options, **best)
    results = results_of(options)
    assert run(options, **best) == []
    assert results_of(options) == results
    new = run(changed(options, lr_search="1,10"), **best)
    assert [each["lr"] for each in new] == [9e-3, 2e-3]  # the rates that were taken are the same
    trials = results_of(options)["qlora[lr=searched]", 1]["lr_search"]
    assert [trial["lr"] for trial in trials] == [2e-4, 2e-3]


def test_what_diverges_is_worst_and_a_method_that_always_does_keeps_its_rate_and_fails(
    options: CompareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = changed(options, lr_search="1,1000,0.1", quiet=False)
    run(options, loreft=9e-5 / 0.9, qlora=None, lora=1e-3)
    trials = results_of(options)["loreft[lr=searched]", 1]["lr_search"]
    assert [(t["lr"], t["chosen"], t["value"]) for t in trials] == [
        (9e-4, False, pytest.approx(0.046, abs=1e-3)),
        (0.9, False, None),
        (9e-5, True, pytest.approx(0.954, abs=1e-3)),
    ]
    assert trials[1]["error"] == "FloatingPointError: the loss is not a number"
    lost = results_of(options)["qlora", 2]
    assert not any(trial["chosen"] for trial in lost["lr_search"])
    assert lost["config"]["optim"]["lr"] == METHODS["qlora"].lr
    said = capsys.readouterr().err
    assert "loreft[lr=9e-05]: learning rate: 9e-05 of 0.0009, 0.9, 9e-05; best at" in said
    assert "failed at 0.9" in said
    assert "qlora: learning rate: none of 0.0002, 0.2, 2e-05; every trial failed" in said
    assert "lora[lr=1e-3]: learning rate: 0.001; not searched, as the entry names it" in said


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([(0.5, 1.0), (0.7, 2.0), (0.6, 0.1)], 1),
        ([(0.7, 2.0), (0.7, 1.0), (0.7, 1.5)], 1),  # of equal values the lower loss
        ([(0.7, None), (0.7, None), (0.6, None)], 0),
        ([(None, 0.1), (-0.2, 3.0), (-0.3, 1.0)], 1),  # a correlation that is no number
    ],
)
def test_the_best_is_the_highest_value_then_the_lower_loss_then_the_earlier(
    options: CompareOptions, outcomes: list[tuple[float | None, float | None]], expected: int
) -> None:
    def given(cells: Any) -> list[dict[str, Any]]:
        return [
            {"method": c.record["method"], "metric": "m", "value": v, "loss": loss, "error": None}
            for c, (v, loss) in zip(cells, outcomes, strict=True)
        ]

    specs, sources = parse_methods("qlora"), find_sources(options)
    (found,) = search_rates(options, specs, fixed=[False], seed=1, sources=sources, run=given)
    assert [trial["chosen"] for trial in found.trials].index(True) == expected
    assert sum(trial["chosen"] for trial in found.trials) == 1
    assert found.spec.optim_overrides["lr"] == found.trials[expected]["lr"]


def test_an_entry_of_equal_budget_is_searched_at_its_size(options: CompareOptions) -> None:
    seen = []

    def given(cells: Any) -> list[dict[str, Any]]:
        seen.extend(cell.record["method"] for cell in cells)
        done = {"metric": "m", "value": 0.5, "loss": None, "error": None}
        return [{"method": cell.record["method"], **done} for cell in cells]

    specs = parse_methods("qlora[rank=3,storage=fp4]")
    (found,) = search_rates(
        options, specs, fixed=[False], seed=0, sources=find_sources(options), run=given
    )
    assert seen == [f"qlora[rank=3,lr={lr},storage=fp4]" for lr in ("6e-05", "0.0002", "0.0006")]
    assert found.spec.label == "qlora[rank=3,lr=searched,storage=fp4]"
    assert found.spec.entry == "qlora[rank=3,lr=6e-05,storage=fp4]"


def test_the_common_rate_is_what_is_multiplied_if_there_is_one(
    options: CompareOptions,
) -> None:
    common = changed(options, lr=1e-4, lr_search="1,2")
    runs = run(common, loreft=1e-4, qlora=1e-4, lora=1e-3)
    assert validated(runs) == [1e-4, 2e-4, 1e-4, 2e-4]


def test_the_tiny_model_and_its_rows_are_searched_too(
    options: CompareOptions,
) -> None:
    none = {"model": None, "data": None, "validation_data": None, "eval_data": None}
    runs = run(changed(options, methods=None, **none), loreft=4e-3, qlora=2e-3, lora=2e-3)
    found = {method for method, _ in results_of(options) if not method.startswith("base")}
    assert found == {
        "loreft[rank=8,lr=searched]",
        "loreft[rank=8,lr=searched,storage=bf16]",
        "lora[rank=8,lr=searched]",
        "qlora[rank=8,lr=searched]",
    }
    assert {each["scored"] for each in runs} == {
        embedded.validation_file().name,
        embedded.task_files()[1].name,
    }


def test_one_search_serves_all_tasks_of_one_training_also_where_it_fails(
    options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = find_sources(options)
    named = [replace(sources, task=name, evaluate_digest=name) for name in ("boolq", "piqa")]
    monkeypatch.setattr("lowmem_reft.compare.matrix.find_all_sources", lambda _: named)
    files = {"data": None, "validation_data": None, "eval_data": None}
    own = {**files, "tasks": "boolq,piqa", "train_task": "commonsense170k", "methods": "qlora"}
    assert validated(run(changed(options, **own), qlora=None)) == [6e-5, 2e-4, 6e-4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_data": None}, "lr_search must come with validation rows, got '0.3,1,3' with"),
        ({"methods": "lora[lr=1],qlora[lr=2]"}, "lr_search must have a method without a rate of"),
        ({"lr_search": "1"}, "lr_search must be two or more different positive numbers, got '1'"),
        ({"lr_search": "1,1.0"}, "lr_search must be two or more different positive numbers"),
        ({"lr_search": "0,1"}, "lr_search must be two or more different positive numbers"),
        ({"lr_search": "1,x"}, "lr_search must be two or more different positive numbers"),
        ({"lr_search": "1,nan"}, "lr_search must be two or more different positive numbers"),
        ({"lr_search": ""}, "lr_search must be two or more different positive numbers"),
        ({"lr_search": "1,inf"}, "lr_search must be two or more different positive numbers"),
    ],
)
def test_a_search_with_nothing_to_choose_or_to_choose_by_is_refused(
    options: CompareOptions, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(changed(options, **changes))
    assert FakeRun.seen == []


def test_rates_that_round_to_the_same_are_refused_by_their_option(options: CompareOptions) -> None:
    with pytest.raises(InputError, match="lr_search must be numbers that differ in their first"):
        run(changed(options, lr_search="1,1.0001"), loreft=1e-3, qlora=1e-3, lora=1e-3)
