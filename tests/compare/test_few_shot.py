"""The base prompted with training rows: a row of the comparison beside the base as it is."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft.compare.cell import Cell, read_cell, write_cell
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.child import run_cell
from lowmem_reft.compare.engines.node import data_files, read_content
from lowmem_reft.compare.sources import find_sources
from lowmem_reft.data.rows import load_rows
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import CompareOptions, EvaluateOptions
from lowmem_reft.options.values import parse_seeds
from lowmem_reft.options.written import build, changed, values

NOUNS = ("cat", "dog", "fox", "film", "time", "answer", "question", "label")
ROWS = [
    {"prompt": f"is the {noun} {word}? label:", "choices": ["good", "bad"], "answer": i % 2}
    for word in ("lazy", "quick")
    for i, noun in enumerate(NOUNS)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> CompareOptions:
    return build(
        CompareOptions,
        model=str(tiny_llama_dir),
        data=write(tmp_path / "train.jsonl", ROWS),
        validation_data=write(tmp_path / "validation.jsonl", ROWS[:3]),
        eval_data=write(tmp_path / "test.jsonl", ROWS[3:6]),
        methods="loreft,lora[storage=fp32],qlora",
        seeds="1,2",
        few_shot=4,
        output_dir=tmp_path / "out",
        device="cpu",
        quiet=True,
    )


def cells_of(options: CompareOptions) -> list[Cell]:
    specs, seeds = parse_methods(options.matrix.methods or ""), parse_seeds(options.matrix.seeds)
    return build_cells(options, specs, seeds, find_sources(options))


def test_each_storage_and_seed_has_a_row_beside_the_base_as_it_is(options: CompareOptions) -> None:
    rows = [(c.record["method"], c.record["seed"]) for c in cells_of(options) if c.train is None]
    assert rows == [
        ("base[storage=nf4]", 0),
        ("base[storage=fp32]", 0),
        ("base[shots=4,storage=nf4]", 1),
        ("base[shots=4,storage=nf4]", 2),
        ("base[shots=4,storage=fp32]", 1),
        ("base[shots=4,storage=fp32]", 2),
    ]


def test_examples_are_training_rows_alone_and_the_result_says_which(
    options: CompareOptions,
) -> None:
    held_out = {row["prompt"] for row in ROWS[:6]}
    drawn = []
    for cell in (c for c in cells_of(options) if c.evaluate.prompts.examples):
        rows = load_rows(cell.evaluate.prompts.examples or "")
        assert len(rows) == 4
        assert Counter(row.answer for row in rows) == {0: 2, 1: 2}
        assert not held_out & {row.prompt for row in rows}
        places = [int(where.rpartition(":")[2]) for where in cell.record["examples"]]
        assert [ROWS[place - 1]["prompt"] for place in places] == [row.prompt for row in rows]
        drawn.append(cell.record["examples"])
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]
    with pytest.raises(InputError, match="few_shot must be at most 10, the different training row"):
        find_sources(changed(options, few_shot=11))
    with pytest.raises(InputError, match="few_shot must be at most 2"):
        find_sources(changed(options, limit=8))


def test_other_cells_are_those_without_the_option(options: CompareOptions) -> None:
    plain = cells_of(changed(options, few_shot=None))
    others = [cell for cell in cells_of(options) if not cell.evaluate.prompts.examples]
    assert [cell.record for cell in others] == [cell.record for cell in plain]
    assert all("prompts" not in cell.record["config"] for cell in plain)


def test_a_cell_has_another_key_for_each_draw_and_its_command_scores_the_same(
    options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [cell for cell in cells_of(options) if cell.train is None]
    shown = [cell for cell in cells if cell.evaluate.prompts.examples]
    assert len({cell.record["key"] for cell in shown}) == 4
    seen: list[EvaluateOptions] = []
    monkeypatch.setattr(cli, "_handler", lambda _: lambda given: seen.append(given) or {})
    for cell in cells:
        cli.main(shlex.split(cell.record["command"])[1:])
        without = {"predictions": None, "quiet": False}
        assert values(seen[-1]) == {**values(cell.evaluate), **without}


def test_a_cell_is_scored_with_its_examples_and_goes_to_another_machine_with_them(
    options: CompareOptions,
) -> None:
    cell = next(cell for cell in cells_of(options) if cell.evaluate.prompts.examples)
    path = write_cell(cell)
    assert read_cell(path) == cell
    assert cell.evaluate.prompts.examples in data_files(read_content(path))
    result = run_cell(cell)
    assert result["error"] is None
    assert (result["num_examples"], result["few_shot"]["num_short"]) == (3, 0)
    assert len(result["examples"]) == 4
    assert result["num_trainable_params"] == 0
    plain = next(each for each in cells_of(options) if each.train is None)
    assert run_cell(plain)["loss"] != result["loss"]


def test_a_classification_head_is_shown_nothing(options: CompareOptions) -> None:
    with pytest.raises(InputError, match="few_shot must be left out with task_type SEQ_CLS, got 4"):
        changed(options, task_type="SEQ_CLS")
