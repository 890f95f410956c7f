"""The best epoch: scores validation rows after each and keeps the weights of the best one.

``epochs.jsonl`` in the run's directory has a line per epoch; ``best.safetensors`` holds what was
trainable after the best one, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lowmem_reft.machine.files import write_text_whole, write_whole
from lowmem_reft.machine.processes import agree, is_main, set_trained_values, trained_values

EPOCHS_FILE = "epochs.jsonl"
WEIGHTS_FILE = "best.safetensors"


class BestEpoch(TrainerCallback):
    """Scores the model after every epoch; ``restore`` puts the weights of the best one back.

    The higher metric is better; of two equal ones the one with the lower loss, then the earlier.
    """

    def __init__(
        self, model: Any, score: Callable[[], dict[str, Any]], directory: Path, *, resume: bool
    ) -> None:
        """Start anew, or, to ``resume``, after the epochs that are written in the directory.

        ``score`` returns ``metric``, ``value`` and, where known, ``loss`` of the model as it is.
        """
        self._model, self._score, self._directory = model, score, directory
        self.epochs: list[dict[str, Any]] = []
        path = directory / EPOCHS_FILE
        if agree(resume and path.is_file()):
            self.epochs = [json.loads(line) for line in path.read_text().splitlines()]
        elif is_main():
            path.unlink(missing_ok=True)
            (directory / WEIGHTS_FILE).unlink(missing_ok=True)

    @property
    def best(self) -> dict[str, Any] | None:
        """The line of the best epoch so far; None before the first one."""
        return max(self.epochs, key=_rank, default=None)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score, write the line, and keep the weights if they are the best ones."""
        if control.should_training_stop and state.global_step < state.max_steps:
            return  # interrupted: this epoch is not over
        summary = agree(self._score())
        epoch = round(float(state.epoch), 4)
        line = {"epoch": epoch, **{name: summary.get(name) for name in ("metric", "value", "loss")}}
        # A run that was killed before its checkpoint comes here again with the same epoch.
        self.epochs = [*(known for known in self.epochs if known["epoch"] < epoch), line]
        values = trained_values(self._model) if self.best is line else {}
        if is_main():
            self._write({name: value.cpu().contiguous() for name, value in values.items()})
        self._model.train()

    def _write(self, weights: dict[str, Any]) -> None:
        """Write the epochs and, unless there are none, the weights of the best one."""
        if weights:
            write_whole(self._directory / WEIGHTS_FILE, lambda path: save_file(weights, path))
        lines = "".join(json.dumps(known) + "\n" for known in self.epochs)
        write_text_whole(self._directory / EPOCHS_FILE, lines)

    def restore(self) -> dict[str, Any]:
        """Load the weights of the best epoch, if any was scored; return its part of the result.

        They stay on the disk for a run that goes on.
        """
        best, path = self.best, self._directory / WEIGHTS_FILE
        if best is None:
            return {}
        set_trained_values(self._model, load_file(path) if is_main() else {})
        chosen = {"best_epoch": best["epoch"], "validation_value": best["value"]}
        return {"validation": self.epochs, **chosen}


def _rank(line: dict[str, Any]) -> tuple[float, float, float]:
    loss = line["loss"]
    return line["value"], float("-inf") if loss is None else -loss, -line["epoch"]
