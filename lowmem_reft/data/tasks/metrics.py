"""Metrics of the tasks, in numpy, equal to scikit-learn's and scipy's also where they degenerate.

Classes are integers, numbers floats, answers and responses texts. Shares and scores lie between 0
and 1, correlations between -1 and 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowmem_reft.data.tasks.answers import answers_equal
from lowmem_reft.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that predictions and references give."""

    name: str
    """Its key in ``METRICS``."""
    about: str
    """One line, with what holds where it is undefined."""
    of: Literal["classes", "numbers", "texts"]
    """What it compares."""
    function: Callable[[Sequence[Any], Sequence[Any]], float]
    """Computes it from as many predictions as references, at least one."""


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
    """Share of predictions that equal their reference."""
    pairs = zip(predictions, references, strict=True)
    return sum(bool(prediction == reference) for prediction, reference in pairs) / len(references)


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it is neither there nor predicted."""
    predicted, there = np.asarray(predictions) == 1, np.asarray(references) == 1
    total = int(predicted.sum() + there.sum())
    return 2 * int((predicted & there).sum()) / total if total else 0.0


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Matthews correlation of two or more classes; 0 if either side is constant."""
    classes, codes = np.unique(
        np.concatenate([np.asarray(predictions), np.asarray(references)]), return_inverse=True
    )
    predicted, there = np.split(codes, 2)
    num_predicted = np.bincount(predicted, minlength=len(classes)).astype(float)
    num_there = np.bincount(there, minlength=len(classes)).astype(float)
    total, right = len(there), float((predicted == there).sum())
    spread = (total**2 - num_predicted @ num_predicted) * (total**2 - num_there @ num_there)
    return float((right * total - num_predicted @ num_there) / math.sqrt(spread)) if spread else 0.0


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson correlation; NaN if either side is constant or has a single value."""
    sides = []
    for values in (predictions, references):
        side = np.asarray(values, dtype=np.float64)
        if len(side) < 2 or (side == side[0]).all():
            return math.nan
        side = side - side.mean()
        sides.append(side / np.linalg.norm(side))
    return float(np.clip(sides[0] @ sides[1], -1.0, 1.0))


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson correlation of the ranks, equal values sharing their mean rank; NaN as there."""
    if np.isnan(np.asarray([*predictions, *references], dtype=np.float64)).any():
        return math.nan
    return pearson(_ranks(predictions).tolist(), _ranks(references).tolist())


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


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="accuracy",
            about="share of right answers",
            of="classes",
            function=accuracy,
        ),
        Metric(
            name="f1",
            about="F1 of class 1; 0 if it is neither there nor predicted",
            of="classes",
            function=f1,
        ),
        Metric(
            name="matthews",
            about="Matthews correlation; 0 if the predictions or the references are constant",
            of="classes",
            function=matthews,
        ),
        Metric(
            name="pearson",
            about="Pearson correlation; undefined (NaN) if either side is constant",
            of="numbers",
            function=pearson,
        ),
        Metric(
            name="spearman",
            about="Spearman rank correlation; undefined (NaN) if either side is constant",
            of="numbers",
            function=spearman,
        ),
        Metric(
            name="exact_match",
            about="share of texts equal to the reference but for case and white space",
            of="texts",
            function=exact_match,
        ),
        Metric(
            name="overlap",
            about="overlap with the reference (ROUGE-L F1); of wording, not of quality",
            of="texts",
            function=overlap,
        ),
    )
}
"""Every metric by its name; higher is better in all of them."""


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    _, codes, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    ranks: np.ndarray[Any, np.dtype[np.float64]] = (last - (counts - 1) / 2)[codes]
    return ranks


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
