"""What trackers (TensorBoard, Weights & Biases, Trackio, ...) are told beside the Trainer's losses.

The run's facts are part of the training arguments, which every tracker records; memory, speed and
scores are logged when they are known, after the training that makes a tracker end its run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lowmem_reft.options import written

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer

    from lowmem_reft.runs.resolve import Run


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments and the facts of a run."""

    lowmem_reft: dict[str, Any] = field(default_factory=dict)
    """Base, storage, digests, method and its settings."""


class Trackers:
    """Keeps the trackers of a run open until its last figures are logged."""

    def __init__(self, run: Run) -> None:
        settings = written.values(run.options.method).items()
        self.facts = {**asdict(run.card), **{name: v for name, v in settings if v is not None}}
        self._trainer: Any = None
        self._held: list[tuple[Any, Callable[..., None]]] = []

    def hold(self, trainer: Trainer) -> None:
        """Tell a trainer's trackers the facts, and let them not end with the training."""
        self._trainer = trainer
        args: Any = trainer.args
        args.lowmem_reft = self.facts
        known = tuple(INTEGRATION_TO_CALLBACK.values())
        callback: Any
        for callback in trainer.callback_handler.callbacks:
            if type(callback) in known:
                self._held.append((callback, callback.on_train_end))
                callback.on_train_end = lambda *_args, **_kwargs: None

    def log(self, result: dict[str, Any]) -> None:
        """Log the figures of a result, nested ones as ``eval/accuracy``."""
        for callback, _ in self._held:
            callback.on_log(*self._state(), logs=dict(_figures(result)), model=self._trainer.model)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for _, end in self._held:
            end(*self._state(), model=self._trainer.model)

    def _state(self) -> tuple[Any, Any, Any]:
        return self._trainer.args, self._trainer.state, self._trainer.control


def _figures(result: dict[str, Any], prefix: str = "final") -> list[tuple[str, float]]:
    figures: list[tuple[str, float]] = []
    for name, value in result.items():
        if isinstance(value, dict):
            figures += _figures(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            figures.append((f"{prefix}/{name}", value))
    return figures
