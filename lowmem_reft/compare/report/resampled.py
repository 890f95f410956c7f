"""Metrics of many draws at once: examples are weighted by how often they are in a draw.

``compute`` of ``metrics.py`` scores one list of predictions; ten thousand draws of several
seeds would take minutes. These say the same (tested) as matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Callable[[Floats, Floats, Floats], Floats]
"""Counts (draws, examples), predictions (examples,), references (examples,) -> (draws,)."""


def f1(counts: Floats, predictions: Floats, references: Floats) -> Floats:
    """2 · tp / (2 · tp + fp + fn) of class 1; 0 where there is none of either."""
    predicted, actual = predictions == 1, references == 1
    both = 2 * counts @ (predicted & actual)
    return _ratio(both, both + counts @ (predicted ^ actual))


def matthews(counts: Floats, predictions: Floats, references: Floats) -> Floats:
    """Matthews' correlation of classes, of any number (Gorodkin 2004); 0 where one is constant."""
    classes = np.unique([predictions, references])
    predicted = counts @ (predictions[:, None] == classes)
    actual = counts @ (references[:, None] == classes)
    total = counts.sum(axis=1)
    covariance = total * (counts @ (predictions == references)) - (predicted * actual).sum(axis=1)
    spread = total**2 - (predicted**2).sum(axis=1), total**2 - (actual**2).sum(axis=1)
    return _ratio(covariance, np.sqrt(spread[0] * spread[1]))


def pearson(counts: Floats, predictions: Floats, references: Floats) -> Floats:
    """Pearson's correlation; 0 where one side is constant."""
    x, y = (
        np.broadcast_to(_standardized(side), counts.shape) for side in (predictions, references)
    )
    return _correlation(counts, x, y)


def spearman(counts: Floats, predictions: Floats, references: Floats) -> Floats:
    """Pearson's correlation of the ranks within the draw, ties at their mean rank."""
    return _correlation(counts, _ranks(counts, predictions), _ranks(counts, references))


METRICS: dict[str, Metric] = {each.__name__: each for each in (f1, matthews, pearson, spearman)}
"""By the names that ``metrics.py`` uses."""


def _ranks(counts: Floats, values: Floats) -> Floats:
    """Rank of every example in every draw, from -1 to 1; (draws, examples)."""
    _, places = np.unique(values, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(places.max() + 1))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    half = counts.shape[1] / 2
    ranks: Floats = (sizes.cumsum(axis=1) - sizes / 2 - half)[:, places] / half
    return ranks


def _standardized(values: Floats) -> Floats:
    """Mean 0 and deviation 1: differences of large sums lose digits otherwise."""
    centred: Floats = values - values.mean()
    return centred / (centred.std() or 1.0)


def _correlation(counts: Floats, x: Any, y: Any) -> Floats:
    def mean(values: Any) -> Floats:
        means: Floats = np.einsum("ij,ij->i", counts, values) / counts.sum(axis=1)
        return means

    mean_x, mean_y = mean(x), mean(y)
    spread = (mean(x * x) - mean_x**2).clip(0) * (mean(y * y) - mean_y**2).clip(0)
    return _ratio(mean(x * y) - mean_x * mean_y, np.sqrt(spread))


def _ratio(above: Floats, below: Floats) -> Floats:
    """Quotient; 0 where the divisor is (nearly) 0."""
    safe = below > 1e-12
    return np.where(safe, above / np.where(safe, below, 1.0), 0.0)
