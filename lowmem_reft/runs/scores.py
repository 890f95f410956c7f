"""What an evaluation found, example by example, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.tasks.metrics import compute

if TYPE_CHECKING:
    from lowmem_reft.reuse.reuse import Reuse


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-example outcomes of one evaluation."""

    predictions: list[Any]
    """What was answered: the index of a choice or class, a number, or the extracted text; None
    where nothing was asked but the loss."""
    references: list[Any]
    """What is right, in the same form."""
    correct: list[bool] = field(default_factory=list)
    """Whether each example was answered rightly; empty where nothing was asked but the loss."""
    losses: list[float] = field(default_factory=list)
    """Negative log-likelihood in nats of each right response or class, summed over its tokens; of a
    number the squared error. Empty where it is not known."""
    num_tokens: list[int] = field(default_factory=list)
    """Tokens of each right response; 1 for a class or a number."""
    num_cut_prompts: int = 0
    """Prompts that were cut to fit."""
    texts: list[str] = field(default_factory=list)
    """What was generated, where answers were."""
    metric: str = "accuracy"
    """What ``value`` is; a name in ``tasks.metrics.METRICS``."""
    extra_metrics: str | None = None
    """Comma-separated further ones."""
    reuse: Reuse | None = None
    """What scored the rows from stored constants, if something did."""
    general_loss: float | None = None
    """Negative log-likelihood per token of general text, see ``forgetting.general_loss``."""

    @property
    def value(self) -> float:
        """The metric over all examples: a share (accuracy, f1, ...), a correlation or the loss."""
        return self._computed(self.metric)

    def _computed(self, metric: str) -> float:
        if metric == "accuracy":
            return sum(self.correct) / len(self.correct)
        if metric == "loss":
            return compute(metric, self.losses, self.num_tokens)
        return compute(metric, self.predictions, self.references)

    def summary(self) -> dict[str, Any]:
        """Return ``metric``, ``value``, ``num_examples``, ``num_cut_prompts`` and what is known.

        That may be ``accuracy`` (where answers were asked for), ``extra`` (by name) and ``loss``:
        per supervised token of all examples together, so that long responses count for more.
        """
        summary: dict[str, Any] = {"metric": self.metric, "value": self.value}
        if self.correct:
            summary["accuracy"] = self._computed("accuracy")
        summary |= {"num_examples": len(self.predictions), "num_cut_prompts": self.num_cut_prompts}
        if self.extra_metrics is not None:
            names = map(str.strip, self.extra_metrics.split(","))
            summary["extra"] = {name: self._computed(name) for name in names}
        if self.losses:
            summary["loss"] = self._computed("loss")
        if self.general_loss is not None:
            summary["general_loss"] = self.general_loss
        if self.reuse is not None:
            summary["reuse"] = self.reuse.mode
            summary["store_bytes"] = self.reuse.layout.total_bytes
            summary["build_time_s"] = self.reuse.build_time_s
        return summary
