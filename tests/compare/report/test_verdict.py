"""Which method to take: the cheapest of those that are level with the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowmem_reft.compare.cell import EMPTY_RESULT
from lowmem_reft.compare.report import write_results
from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.console import print_verdicts
from lowmem_reft.compare.report.verdict import Verdict, decide, sentences

ROWS = 200
MIB = 2**20


def cells(
    directory: Path, method: str, right: int, *, seeds: int = 1, task: str = "trec", **fields: Any
) -> list[dict[str, Any]]:
    """Runs of a method that gets the first ``right`` of the rows."""
    return [_cell(directory, method, right, seed, task, **fields) for seed in range(seeds)]


def _cell(
    directory: Path, method: str, right: int, seed: int, task: str, *, rows: int = ROWS, **own: Any
) -> dict[str, Any]:
    name = f"{task}-{method}-{seed}.jsonl"
    lines = [
        {"source": f"t:{i}", "prediction": int(i < right), "reference": 1, "correct": i < right}
        for i in range(rows)
    ]
    directory.joinpath(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = {"method": method, "task": task, "seed": seed, "predictions": name, "model": "tiny"}
    cost = {"num_trainable_params": 1000, "adapter_bytes": 4000, "peak_bytes": 10 * MIB}
    measured = {"metric": "accuracy", "value": right / rows, "train_time_s": 10.0, "command": "go"}
    return {**EMPTY_RESULT, **known, **cost, **measured, **own}


def base(directory: Path, right: int, storage: str = "nf4", **own: Any) -> list[dict[str, Any]]:
    cost = {"num_trainable_params": 0, "adapter_bytes": 0, "peak_bytes": None, "train_time_s": None}
    method = own.pop("method", f"base[storage={storage}]")
    return cells(directory, method, right, **{**cost, "storage": storage, **own})


def verdicts(directory: Path, *runs: list[dict[str, Any]]) -> list[Verdict]:
    return decide(Comparison.read([cell for run in runs for cell in run], directory))


def test_of_methods_that_are_level_the_one_with_the_fewest_parameters_is_taken(
    tmp_path: Path,
) -> None:
    small = cells(tmp_path, "loreft", 158, seeds=3, num_trainable_params=250, peak_bytes=9 * MIB)
    (found,) = verdicts(tmp_path, base(tmp_path, 60), small, cells(tmp_path, "qlora", 160, seeds=3))
    assert found == Verdict(
        "trec",
        "loreft",
        "its accuracy of 79.0 % is not told apart from the best, 80.0 % of qlora, with 200 rows "
        "and 3 seeds; of the 2 that are level it trains the fewest parameters; beside qlora 1.0 "
        "points worse, 250 trained parameters against 1,000, 9.0 MiB of peak memory against "
        "10.0, 10.0 s of training against 10.0",
    )


@pytest.mark.parametrize(
    ("costs", "why"),
    [
        ({"num_trainable_params": 900}, "trains the fewest parameters"),
        ({"num_trainable_params": 960, "peak_bytes": 9 * MIB}, "trains in the least memory"),
        ({"num_trainable_params": 1040, "peak_bytes": 9 * MIB}, "trains in the least memory"),
        ({"adapter_bytes": 2000, "peak_bytes": 90 * MIB}, "has the smallest adapter"),
        ({"peak_bytes": int(9.9 * MIB), "train_time_s": 5.0}, "trains in the least time"),
    ],
)
def test_parameters_come_before_memory_and_that_before_time_and_a_twentieth_is_no_difference(
    tmp_path: Path, costs: dict[str, Any], why: str
) -> None:
    (found,) = verdicts(tmp_path, cells(tmp_path, "a", 158, **costs), cells(tmp_path, "b", 160))
    assert found.take == "a"
    assert f"it {why}" in found.reason


def test_of_equal_costs_the_best_value_decides(tmp_path: Path) -> None:
    (found,) = verdicts(tmp_path, cells(tmp_path, "a", 158), cells(tmp_path, "b", 160))
    assert found.take == "b"
    assert "is the best, not told apart from a with 200 rows and one seed" in found.reason
    assert "has the best value of those that cost the least; beside a 1.0 points" in found.reason


def test_what_is_clearly_best_is_taken_whatever_it_costs(tmp_path: Path) -> None:
    dear = cells(tmp_path, "qlora", 190, seeds=2, num_trainable_params=10**6)
    (found,) = verdicts(tmp_path, dear, cells(tmp_path, "loreft", 100), base(tmp_path, 50))
    assert found.take == "qlora"
    assert found.reason.startswith(
        "its accuracy of 95.0 % is clearly the best, by 200 rows and 1 to 2 seeds; beside loreft "
        "45.0 points better, 1,000,000 trained parameters against 1,000"
    )


def test_where_training_did_not_beat_the_base_the_base_is_taken(tmp_path: Path) -> None:
    runs = [base(tmp_path, 158), cells(tmp_path, "qlora", 160), cells(tmp_path, "loreft", 100)]
    (found,) = verdicts(tmp_path, *runs)
    assert found.take == "base[storage=nf4]"
    assert found.reason == (
        "no training beat it: the best, 80.0 % of qlora, is not told apart from its 79.0 % with "
        "200 rows and one seed; beside qlora 1.0 points worse, 0 trained parameters against 1,000"
    )
    (found,) = verdicts(tmp_path, base(tmp_path, 190), *runs[1:])
    assert found.reason.startswith(
        "no training beat it: its accuracy of 95.0 % is the best, by 200"
    )


def test_a_base_without_examples_in_fewer_bits_is_the_cheapest(tmp_path: Path) -> None:
    shots = {"method": "base[shots=4,storage=nf4]", "examples": ["a:1"] * 4}
    runs = [base(tmp_path, 160, "bf16"), base(tmp_path, 158), base(tmp_path, 161, **shots)]
    (found,) = verdicts(tmp_path, *runs, cells(tmp_path, "loreft", 150))
    assert found.take == "base[storage=nf4]"
    assert "of the 3 bases that are level it is stored in the fewest bits" in found.reason
    (found,) = verdicts(tmp_path, base(tmp_path, 20), runs[2], cells(tmp_path, "loreft", 150))
    assert found.take == "base[shots=4,storage=nf4]"


def test_few_rows_tell_nothing_apart_and_that_is_said(tmp_path: Path) -> None:
    runs = [base(tmp_path, 3, rows=6), cells(tmp_path, "loreft", 5, rows=6)]
    (found,) = verdicts(tmp_path, *runs)
    assert found.take == "base[storage=nf4]"
    assert "is not told apart from its 50.0 % with 6 rows and one seed" in found.reason


def test_the_lower_loss_is_the_better_one(tmp_path: Path) -> None:
    def run(method: str, loss: float, **own: Any) -> list[dict[str, Any]]:
        found = cells(tmp_path, method, 100, metric="loss", value=loss, **own)
        path = tmp_path / found[0]["predictions"]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        text = (json.dumps({**line, "loss": loss, "num_tokens": 2}) + "\n" for line in lines)
        path.write_text("".join(text))
        return found

    (found,) = verdicts(tmp_path, run("loreft", 1.5), run("qlora", 2.0, num_trainable_params=10))
    assert found.take == "loreft"
    assert "its loss of 1.500 is clearly the best" in found.reason
    assert "beside qlora 0.500 nats per token better" in found.reason


def test_without_answers_the_best_value_is_taken_and_chance_is_said_to_be_untested(
    tmp_path: Path,
) -> None:
    runs = [cells(tmp_path, name, right) for name, right in (("a", 120), ("b", 160))]
    for run in runs:
        run[0]["predictions"] = None
    (found,) = verdicts(tmp_path, *runs)
    assert found.take == "b"
    assert "is the best, but chance could not be tested, for want of answers (one seed)" in (
        found.reason
    )
    some = cells(tmp_path, "c", 100)
    (found,) = verdicts(tmp_path, *runs, some, cells(tmp_path, "d", 101))
    assert found.take == "d"
    assert "a, b left no answers to compare and could not be taken" in found.reason


def test_what_failed_is_not_taken(tmp_path: Path) -> None:
    lost = cells(tmp_path, "a", 100, error="ValueError: no", value=None, metric=None)
    assert verdicts(tmp_path, lost) == [Verdict("trec", None, "no method has finished")]
    (found,) = verdicts(tmp_path, lost, cells(tmp_path, "b", 100))
    assert found == Verdict(
        "trec", "b", "nothing else has finished; its accuracy of 50.0 % (one seed)"
    )


def test_over_all_tasks_what_is_level_on_each_is_taken(tmp_path: Path) -> None:
    runs = [
        cells(tmp_path, method, right, task=task, num_trainable_params=number)
        for task in ("trec", "cola")
        for method, right, number in (("loreft", 158, 100), ("qlora", 160, 1000), ("red", 50, 10))
    ]
    every, trec, cola = verdicts(tmp_path, *runs)
    assert every == Verdict(
        "all tasks",
        "loreft",
        "it is level with the best on each of the 2 tasks; of the 2 that are it trains the fewest "
        "parameters; beside qlora 1.0 points worse, 100 trained parameters against 1,000, 10.0 MiB "
        "of peak memory against 10.0, 10.0 s of training against 10.0",
    )
    assert (trec.task, trec.take, cola.task, cola.take) == ("trec", "loreft", "cola", "loreft")
    assert sentences([every])[0].startswith("Take loreft: it is level")
    assert sentences([every, trec])[1].startswith("On trec take loreft: its accuracy")


def test_over_all_tasks_the_best_mean_is_taken_where_nothing_is_level_on_each(
    tmp_path: Path,
) -> None:
    runs = [
        cells(tmp_path, method, right, task=task)
        for task, one, two in (("trec", 190, 100), ("cola", 100, 150))
        for method, right in (("a", one), ("b", two))
    ]
    every, *_ = verdicts(tmp_path, *runs)
    assert every.take == "a"
    assert every.reason.startswith(
        "its accuracy of 72.5 % is the best mean; nothing is level with the best on every task, "
        "and it is on 1 of 2; beside b 10.0 points better"
    )
    every, *_ = verdicts(tmp_path, cells(tmp_path, "a", 1), cells(tmp_path, "b", 1, task="cola"))
    assert every == Verdict("all tasks", None, "no method has finished every task")


def test_the_sentence_stands_in_the_results_on_the_page_and_on_the_terminal(
    tmp_path: Path,
) -> None:
    runs = [*cells(tmp_path, "loreft[rank=8]", 158), *cells(tmp_path, "qlora", 60)]
    written = write_results(runs, tmp_path)
    (verdict,) = written["verdict"]
    assert (verdict["task"], verdict["take"]) == ("trec", "loreft[rank=8]")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [cell["verdict"] for cell in stored] == [[verdict]] * 2
    assert "verdict" not in (tmp_path / "results.csv").read_text().partition("\n")[0]
    (said,) = sentences([Verdict(**verdict)])
    assert f'<p class="verdict">{said}</p>' in (tmp_path / "report.html").read_text()
    console = Console(width=50, force_terminal=True, color_system=None)
    with console.capture() as capture:
        print_verdicts(written["verdict"], console)
    assert " ".join(capture.get().split()) == said
    assert max(map(len, capture.get().splitlines())) <= 50
