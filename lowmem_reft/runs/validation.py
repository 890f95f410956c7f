"""The best epoch: scores validation rows after each and keeps the weights of the best one.

With ``--eval-steps`` rows are scored after so many optimizer steps instead; what is called an epoch
here is then a part of one. ``epochs.jsonl`` in the run's directory has a line for each score, for
whoever looks on: the score, and what the training had spent by then (optimizer steps, their
seconds, tokens with padding and without). ``best.safetensors`` holds what was trainable after the
best one. A run that goes on takes both from its checkpoint instead, so that neither can be ahead of
it.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lowmem_reft.base.blocks import device_of
from lowmem_reft.data.tasks.metrics import gain
from lowmem_reft.machine.devices import seed_kept
from lowmem_reft.machine.files import write_text_whole, write_whole
from lowmem_reft.machine.processes import agree, is_main, set_trained_values, trained_values
from lowmem_reft.runs.checkpoints import BEST, EPOCHS_FILE, Checkpoint
from lowmem_reft.runs.said import Reports
from lowmem_reft.runs.spent import Spent

if TYPE_CHECKING:
    from lowmem_reft.options import ChoosingOptions


class BestEpoch(TrainerCallback):
    """Scores the model after every epoch; ``restore`` puts the weights of the best one back.

    The better value counts; of two equal ones the one with the lower loss, then the earlier. Where
    as many as ``patience`` in a row were no better than the best, the training ends.
    """

    def __init__(
        self,
        model: Any,
        score: Callable[[], dict[str, Any]],
        directory: Path,
        begun: Checkpoint | None,
        choosing: ChoosingOptions,
    ) -> None:
        """Start anew, or after the epochs that the checkpoint ``begun`` holds.

        ``score`` returns ``metric``, ``value`` and, where known, ``loss`` of the model as it is;
        ``choosing`` says when it is asked, and when that ends the training.
        """
        self._model, self._score, self._directory = model, score, directory
        self._choosing = choosing
        self.epochs: list[dict[str, Any]] = [] if begun is None else [*begun.note["epochs"]]
        self.spent = Spent()
        """What the training has spent; ``fit`` gives the one that counts."""
        self.reports = Reports(self.spent, quiet=True)
        """Told every score; ``fit`` gives those that are heard."""
        if not is_main():
            return
        if self.epochs and begun is not None:
            copy = partial(shutil.copyfile, begun.best_weights)
            write_whole(directory / BEST, copy)
            self._write({})
        else:
            (directory / EPOCHS_FILE).unlink(missing_ok=True)
            (directory / BEST).unlink(missing_ok=True)

    @property
    def best(self) -> dict[str, Any] | None:
        """The line of the best epoch so far; None before the first one."""
        return max(self.epochs, key=_rank, default=None)

    @property
    def is_over(self) -> bool:
        """Whether the last scores, as many as ``patience``, were no better than the best."""
        patience, best = self._choosing.patience, self.best
        if patience is None or best is None:
            return False
        return len(self.epochs) - 1 - self.epochs.index(best) >= patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score an epoch that was over when its checkpoint was saved, and not scored yet."""
        if not state.global_step:
            return
        step, every = state.global_step, self._choosing.eval_steps
        is_due = float(state.epoch).is_integer() if every is None else step % every == 0
        if is_due or step >= state.max_steps:
            self._score_epoch(state, control)
        control.should_training_stop = self.is_over

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With ``eval_steps``: what ``on_epoch_end`` does."""
        every, is_last = self._choosing.eval_steps, state.global_step >= state.max_steps
        if every is not None and (state.global_step % every == 0 or is_last):
            self._score_unless_interrupted(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score, write the line, and keep the weights if they are the best ones."""
        if self._choosing.eval_steps is None:
            self._score_unless_interrupted(state, control)

    def _score_unless_interrupted(self, state: Any, control: Any) -> None:
        if control.should_training_stop and state.global_step < state.max_steps:
            return  # what is over is scored when the run goes on
        self._score_epoch(state, control)

    def _score_epoch(self, state: Any, control: Any) -> None:
        if any(known.get("num_steps") == state.global_step for known in self.epochs):
            return
        epoch = round(float(state.epoch), 4)
        with self.reports.paused(), _same_draws(device_of(self._model)):
            summary = agree(self._score())
        line = {"epoch": epoch, **{name: summary.get(name) for name in ("metric", "value", "loss")}}
        line |= {"num_steps": state.global_step, **self.spent.of_all()}
        self.epochs = [*self.epochs, line]
        values = trained_values(self._model) if self.best is line else {}
        if is_main():
            self._write({name: value.cpu().contiguous() for name, value in values.items()})
        self._model.train()
        assert self.best is not None
        self.reports.score(line, self.best)
        if self.is_over:
            # The checkpoint lets a run that is resumed end here again.
            control.should_save = control.should_training_stop = True

    def _write(self, weights: dict[str, Any]) -> None:
        """Write the epochs and, unless there are none, the weights of the best one."""
        if weights:
            write_whole(self._directory / BEST, lambda path: save_file(weights, path))
        lines = "".join(json.dumps(known) + "\n" for known in self.epochs)
        write_text_whole(self._directory / EPOCHS_FILE, lines)

    def restore(self) -> dict[str, Any]:
        """Load the weights of the best epoch, if any was scored; return its part of the result.

        They stay on the disk for a run that goes on.
        """
        best, path = self.best, self._directory / BEST
        if best is None:
            return {}
        set_trained_values(self._model, load_file(path) if is_main() else {})
        chosen = {"best_epoch": best["epoch"], "validation_value": best["value"]}
        return {"validation": self.epochs, **chosen}


def _rank(line: dict[str, Any]) -> tuple[float, float, float]:
    value, loss = (line[name] for name in ("value", "loss"))
    # The correlation with answers that are all the same is no number.
    known = value is not None and not math.isnan(value)
    value = gain(line.get("metric"), value) if known else float("-inf")
    return value, float("-inf") if loss is None else -loss, -line["epoch"]


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Let the training draw the same numbers whether an epoch is scored before or not."""
    states = random.getstate(), np.random.get_state()
    with seed_kept(device):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
