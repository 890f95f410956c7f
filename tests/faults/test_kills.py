"""A run that is killed, wherever, and resumed ends as one that nobody disturbed.

The whole, by ``make faults``: a kill at every change of the file system, and random ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kills import Figures, Trainings

NUM_RANDOM = 320
SEED = 0
ROWS = [
    {"prompt": f"is the {noun} good or bad? label:", "choices": ["good", "bad"], "answer": answer}
    for noun, answer in [("cat", 0), ("dog", 1), ("fox", 0), ("film", 1), ("time", 0), ("fou", 1)]
    for _ in range(2)
][:8]
METHODS = {
    "loreft": ["--method", "loreft", "--rank", "2", "--positions", "l1", "--dropout", "0.1"],
    "lora": ["--method", "lora", "--rank", "2", "--dropout", "0.1"],
}
SAVES = {"steps": ["--save-steps", "2"], "epochs": []}


@pytest.fixture(scope="module")
def trainings(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trainings]:
    """Nine steps in three epochs, scored; checkpoints every second step, or at an epoch's end."""
    directory = tmp_path_factory.mktemp("kills")
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = [
        *("--model", str(tiny_llama_dir), "--storage", "fp32", "--compute-dtype", "fp32"),
        *("--device", "cpu", "--data", str(data), "--validation-data", str(data)),
        *("--layers", "upper:0.5", "--reuse", "trunk", "--epochs", "3", "--batch-size", "3"),
        *("--lr", "1e-2", "--logging-steps", "5"),
    ]
    flags = {
        f"{method}-{save}": [*common, *chosen, *saving]
        for method, chosen in METHODS.items()
        for save, saving in SAVES.items()
    }
    made = Trainings(directory, flags)
    yield made
    made.close()


def test_a_run_killed_here_and_there_resumes_to_the_same_adapter_epochs_and_losses(
    trainings: Trainings,
) -> None:
    figures, draw = Figures(), random.Random(1)
    for kind in ("loreft-steps", "lora-epochs"):
        for number in draw.sample(range(1, trainings.num_changes[kind] + 1), 5):
            trainings.kill(kind, figures, trainings.at_change(kind, number))
        for _ in range(2):
            trainings.kill(kind, figures, trainings.at_random(kind, draw))
    assert figures.num_faults == 0, "\n".join(figures.examples)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["loreft-steps", "lora-steps", "loreft-epochs"])
def test_a_kill_at_any_change_of_the_file_system_changes_nothing(
    trainings: Trainings, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = Figures()
    for number in range(1, trainings.num_changes[kind] + 1):
        trainings.kill(kind, figures, trainings.at_change(kind, number))
    with capsys.disabled():
        print("\n" + figures.table(f"a kill at every change of the file system: {kind}"))
    assert figures.num_faults == 0, "\n".join(figures.examples)


@pytest.mark.faults
def test_kills_at_random_times_by_any_signal_change_nothing(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, draw = Figures(), random.Random(SEED)
    kinds = sorted(trainings.flags)
    while figures.counts["kills"] < NUM_RANDOM:
        kind = draw.choice(kinds)
        again = [trainings.at_random(kind, draw) for _ in range(draw.choice([1, 1, 2]))]
        trainings.kill(kind, figures, *again)
    with capsys.disabled():
        print("\n" + figures.table("kills at random times"))
    assert figures.num_faults == 0, "\n".join(figures.examples)
