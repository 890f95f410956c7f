"""Metrics of the tasks: scikit-learn's and scipy's, two of texts, and the loss.

Classes are integers, numbers floats, answers and responses texts. Shares and scores lie between 0
and 1, correlations between -1 and 1; the higher is better. The loss is in nats per token, and the
lower one is better: whoever ranks values asks ``gain``, whoever shows them ``unit_of``.

The two libraries are imported where they are used: that takes them a second or two, which commands
that only name the metrics need not wait for.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from lowmem_reft.data.tasks.answers import answers_equal, find_extractor
from lowmem_reft.errors import InputError, naming

if TYPE_CHECKING:
    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import ScoringOptions

    AnyScoring = TypeVar("AnyScoring", bound=ScoringOptions)


@dataclass(frozen=True)
class Metric:
    """A figure that predictions and references give."""

    name: str
    """Its key in ``METRICS``."""
    of: Literal["classes", "numbers", "texts", "losses"]
    """What it compares; losses are no predictions, and their tokens take the references' place."""
    function: Callable[[Sequence[Any], Sequence[Any]], float]
    """Computes it from as many predictions as references, at least one."""
    about: str
    """One line, with what holds where it is undefined."""


class Unit(NamedTuple):
    """How values of a metric are written."""

    scale: float
    """What they are multiplied by."""
    digits: int
    sign: str
    """What comes after the number."""

    def text(self, value: float | None) -> str:
        """Return the number without its sign; a dash for none."""
        return "–" if value is None else f"{self.scale * value:.{self.digits}f}"


PERCENT, NATS = Unit(100.0, 1, " %"), Unit(1.0, 3, "")


def unit_of(metric: str | None) -> Unit:
    """Return how a metric is written: in per cent, but the loss in nats per token."""
    return NATS if is_lower_better(metric) else PERCENT


def is_lower_better(metric: str | None) -> bool:
    """Whether the lower of two values is better: of the loss, and of nothing else."""
    return metric == "loss"


def gain(metric: str | None, value: float) -> float:
    """Return a number that is higher for the better value, whatever the metric."""
    return -value if is_lower_better(metric) else value


def with_metric(scoring: AnyScoring, rows: Sequence[Row]) -> AnyScoring:
    """Return the options with the metric for these rows, where none is named.

    It is accuracy; but the loss for responses without choices, unless an answer is looked for in
    generated text (by ``scoring``, ``extractor`` or ``answer_pattern``): hardly any model writes a
    free text as its reference has it, and where all are wrong none would be better.
    """
    if scoring.metric is not None:
        return scoring
    is_text = bool(rows) and rows[0].kind in ("response", "messages")
    is_answer = scoring.scoring == "generation" or scoring.extractor or scoring.answer_pattern
    return replace(scoring, metric="loss" if is_text and not is_answer else "accuracy")


def find_metric(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        InputError: If there is none.
    """
    if name not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {name!r}; choose one")
    return METRICS[name]


def compute(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Compute a metric.

    Args:
        name: Key in ``METRICS``.
        predictions: One per example.
        references: The right ones, in the same order.

    Returns:
        The figure; NaN for a correlation with a constant.

    Raises:
        InputError: If there is no such metric, or not one reference per prediction.
    """
    metric = find_metric(name)
    if not len(predictions) or len(predictions) != len(references):
        raise InputError(
            f"predictions must be as many as references and at least one, got {len(predictions)} "
            f"for {len(references)}; give one per example"
        )
    return float(metric.function(predictions, references))


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of predictions that equal their reference; also of answers, of which some are None."""
    pairs = zip(predictions, references, strict=True)
    return sum(bool(prediction == reference) for prediction, reference in pairs) / len(references)


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it is neither there nor predicted."""
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]

    predicted, there = ([value == 1 for value in side] for side in (predictions, references))
    return float(f1_score(there, predicted, zero_division=0.0))


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Matthews correlation of two or more classes; 0 if either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return _without_warnings(matthews_corrcoef, references, predictions)


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson correlation; NaN if either side is constant or has a single value."""
    from scipy.stats import pearsonr  # type: ignore[import-untyped]

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson correlation of the ranks, equal values sharing their mean rank; NaN as there."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def exact_match(predictions: Sequence[str | None], references: Sequence[str | None]) -> float:
    """Share of texts that equal their reference but for case and white space."""
    pairs = zip(predictions, references, strict=True)
    return sum(answers_equal(None, *pair) for pair in pairs) / len(references)


def overlap(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L: F1 of the longest common subsequence of words, lower-cased, without stemming.

    It says how much of a reference's wording a response shares, not how good the response is.
    """
    pairs = zip(predictions, references, strict=True)
    return sum(_rouge_l(prediction, reference) for prediction, reference in pairs) / len(references)


def loss_per_token(losses: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Sum of the examples' summed losses over all their tokens, not the mean of their means."""
    return math.fsum(losses) / sum(num_tokens)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classes", accuracy, "share of right answers"),
        Metric("f1", "classes", f1, "F1 of class 1; 0 if it is neither there nor predicted"),
        Metric(
            "matthews",
            "classes",
            matthews,
            "Matthews correlation; 0 if the predictions or the references are constant",
        ),
        Metric(
            "pearson",
            "numbers",
            pearson,
            "Pearson correlation; undefined (NaN) if either side is constant",
        ),
        Metric(
            "spearman",
            "numbers",
            spearman,
            "Spearman rank correlation; undefined (NaN) if either side is constant",
        ),
        Metric(
            "exact_match",
            "texts",
            exact_match,
            "share of texts equal to the reference but for case and white space",
        ),
        Metric(
            "overlap",
            "texts",
            overlap,
            "overlap with the reference (ROUGE-L F1); of wording, not of quality",
        ),
        Metric(
            "loss",
            "losses",
            loss_per_token,
            "negative log-likelihood of the right responses in nats per token, all tokens alike; "
            "the lower one is better",
        ),
    )
}
"""Every metric by its name; of the loss the lower one is better (``gain``)."""


def _correlation(
    function: Callable[..., Any], predictions: Sequence[float], references: Sequence[float]
) -> float:
    if len(references) < 2:  # of which scipy refuses to say anything
        return math.nan
    return _without_warnings(lambda *sides: function(*sides).statistic, predictions, references)


def _without_warnings(function: Callable[..., Any], *sides: Sequence[Any]) -> float:
    """What holds where a metric is undefined is said by ``METRICS``, not by a warning each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(*sides))


def _rouge_l(prediction: str, reference: str) -> float:
    first, second = _words(prediction), _words(reference)
    if not first or not second:
        return 0.0
    codes = {word: code for code, word in enumerate({*first, *second})}
    columns = np.array([codes[word] for word in second])
    lengths = np.zeros(len(second) + 1, dtype=np.int64)
    for word in first:
        # A step right or down keeps the best length; a match adds one to that of the diagonal.
        lengths[1:] = np.maximum(lengths[1:], lengths[:-1] + (columns == codes[word]))
        lengths = np.maximum.accumulate(lengths)
    return float(2 * lengths[-1] / (len(first) + len(second)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def check_names(scoring: ScoringOptions) -> None:
    """Refuse a metric or an extractor that there is not, before the work.

    Raises:
        InputError: See above.
    """
    if scoring.metric is not None:
        find_metric(scoring.metric)
    if scoring.extra_metrics is not None:
        with naming("extra_metrics"):
            for name in scoring.extra_metrics.split(","):
                find_metric(name.strip())
    if scoring.extractor is not None:
        find_extractor(scoring.extractor)
