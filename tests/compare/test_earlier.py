"""A comparison that is run again with other methods keeps the cells that are still its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_model import config_alone
from lowmem_reft.compare import report
from lowmem_reft.compare.cell import EMPTY_RESULT, Cell, write_cell
from lowmem_reft.compare.matrix import run_comparison
from lowmem_reft.compare.report.joining import join
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import write_json
from lowmem_reft.options import CompareOptions
from lowmem_reft.options.written import build, changed

ROWS = [{"prompt": f"{i} is", "choices": ["even", "odd"], "answer": i % 2} for i in range(20)]


def ended(cells: list[Cell], **_: Any) -> list[dict[str, Any]]:
    """Give every cell a result, as its process would."""
    results = []
    for cell in cells:
        measured = {"metric": "accuracy", "value": 0.5, "num_trainable_params": 100}
        results.append({**EMPTY_RESULT, **measured, **cell.record})
        write_cell(cell)
        write_json(cell.result_path, results[-1])
    return results


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareOptions:
    monkeypatch.setattr(report, "write_report", lambda _, d, **_k: d / "report.html")
    monkeypatch.setattr("lowmem_reft.compare.matrix.run_cells", ended)
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return build(
        CompareOptions,
        model=str(config_alone(tmp_path)),
        data=str(tmp_path / "train.jsonl"),
        eval_data=str(tmp_path / "test.jsonl"),
        methods="loreft,qlora",
        seeds="0,1",
        output_dir=tmp_path / "out",
    )


def run(options: CompareOptions, **changes: Any) -> list[tuple[str, int]]:
    """Run a comparison; return the cells of its results."""
    run_comparison(changed(options, **changes))
    stored = json.loads((options.output_dir / "results.json").read_text())
    return [(cell["method"], cell["seed"]) for cell in stored]


def test_earlier_methods_and_seeds_stay_in_the_results_and_are_named(
    options: CompareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    run(options)
    assert "kept" not in capsys.readouterr().err
    assert run(options, methods="lora[rank=2]", seeds="0") == [
        ("base[storage=bf16]", 0),
        ("lora[rank=2]", 0),
        ("base[storage=nf4]", 0),
        ("loreft", 0),
        ("loreft", 1),
        ("qlora", 0),
        ("qlora", 1),
    ]
    said = capsys.readouterr().err
    assert "lowmem-reft compare: kept from earlier runs: base[storage=nf4] seed 0, loreft" in said
    assert "left out" not in said
    answer = run_comparison(changed(options, methods="lora[rank=2]", seeds="0", quiet=True))
    assert [row["method"] for row in answer["rows"]] == ["base[storage=bf16]", "lora[rank=2]"]
    assert answer["num_cells"] == 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"epochs": 1.0}, "another optim: loreft seed 0"),
        ({"epochs": 3.0}, "another optim: loreft seed 0"),  # of few rows there would be more
        ({"limit": 3}, "another data: loreft seed 0"),
        ({"eval_limit": 3}, "another eval_data: base[storage=nf4] seed 0, loreft seed 0"),
        ({"max_new_tokens": 3}, "another scoring and validation_scoring: loreft seed 0"),
        ({"activation_checkpointing": True}, "another memory: loreft seed 0"),
        ({"lr": 1e-5}, "another optim: loreft seed 0"),
    ],
)
def test_cells_of_other_rows_or_settings_are_left_out_and_named(
    options: CompareOptions,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    why: str,
) -> None:
    run(options, seeds="0", methods="loreft")
    found = run(options, seeds="0", methods="lora", **changes)
    assert ("loreft", 0) not in found
    assert f"left out of the report, as an earlier run had {why}" in capsys.readouterr().err


def test_another_model_task_or_broken_cell_is_no_part_of_it(
    options: CompareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(options, methods="loreft", seeds="0")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("4096", "2048"))
    assert run(options, methods="lora", seeds="0") == [("base[storage=bf16]", 0), ("lora", 0)]
    said = capsys.readouterr().err
    assert "had another model: base[storage=nf4] seed 0" in said
    assert "had another model and optim: loreft seed 0" in said  # the rate follows the width
    other = tmp_path / "others.jsonl"
    other.write_text((tmp_path / "train.jsonl").read_text())
    lora = options.output_dir / "cells" / "lora-seed0" / "result.json"
    lora.write_text(lora.read_text()[:100])
    assert run(options, methods="red", seeds="0", data=str(other)) == [
        ("base[storage=nf4]", 0),
        ("red", 0),
    ]
    assert "had another task: base[storage=bf16] seed 0, loreft seed 0" in capsys.readouterr().err


def test_failed_cells_of_earlier_runs_are_no_rows(options: CompareOptions) -> None:
    run(options, methods="loreft,qlora", seeds="0")
    path = options.output_dir / "cells" / "qlora-seed0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "error": "lost"}))
    assert run(options, methods="loreft", seeds="0") == [("base[storage=nf4]", 0), ("loreft", 0)]


def test_a_searched_rate_and_a_prompted_base_are_known_again(options: CompareOptions) -> None:
    valid = {"validation_data": options.rows.eval_data, "seeds": "0"}
    train = Path(options.rows.data or "")
    rows = [{**row, "prompt": f"shown {row['prompt']}"} for row in ROWS]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(options, methods="qlora", lr_search="1,3", few_shot=2, **valid)
    found = run(options, methods="loreft", **valid)
    assert sorted(found) == [
        ("base[shots=2,storage=nf4]", 0),
        ("base[storage=nf4]", 0),
        ("loreft", 0),
        ("qlora[lr=searched]", 0),
    ]


def test_a_comparison_that_was_killed_is_reported_as_far_as_it_came(
    options: CompareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(options, seeds="0")
    (options.output_dir / "results.json").unlink()
    (options.output_dir / "cells" / "qlora-seed0" / "result.json").unlink()
    capsys.readouterr()
    cells = join([options.output_dir], relative_to=tmp_path)
    assert [cell["method"] for cell in cells] == ["base[storage=nf4]", "loreft"]
    assert cells[1]["predictions"] == "out/cells/loreft-seed0/predictions.jsonl"
    said = capsys.readouterr().err
    assert "has not ended: 2 cells have finished, 0 failed and 1 were begun and have no" in said
    for name in ("base-storage=nf4-seed0", "loreft-seed0"):
        (options.output_dir / "cells" / name / "result.json").unlink()
    with pytest.raises(InputError, match="give one in which a comparison has ended"):
        join([options.output_dir], relative_to=tmp_path)
