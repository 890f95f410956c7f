"""Is a method better than the reference, or was it lucky with these test examples?

The paired bootstrap: the test examples are drawn again with replacement, both methods are scored on
the same draw, and that is repeated 10,000 times (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993; for test sets of language tasks Koehn, EMNLP 2004). With d the difference of the
scores and d* that of a draw:

    interval = the 2.5th to the 97.5th percentile of d*
    p = 2 · min(#{d* ≤ 0} + 1, #{d* ≥ 0} + 1) / (draws + 1), at most 1

Several methods against one reference are several tests; Holm's step-down correction (1979) keeps
the chance of even one false difference below the level. What is drawn again are examples: how much
seeds vary is told by the standard deviation over them, not by this interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowmem_reft.compare.report.answers import MethodAnswers, TaskAnswers
from lowmem_reft.compare.report.resampled import METRICS, Floats
from lowmem_reft.data.tasks.metrics import compute

NUM_RESAMPLES = 10_000
LEVEL = 0.05
_COUNTS_AT_ONCE = 4_000_000
_TOLERANCE = 1e-6
_ZERO = 1e-12

Scorer = Callable[[Floats], Floats]
"""Counts (draws, examples) -> a method's metric on each draw, mean over its seeds."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method's value minus the reference's, both means over their seeds."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p: float
    """Two-sided, of this test alone."""
    p_holm: float
    """The same, corrected for the number of methods that were compared."""

    @property
    def is_clear(self) -> bool:
        """Whether the corrected p is below ``LEVEL``."""
        return self.p_holm < LEVEL


@dataclass(frozen=True, kw_only=True)
class Significance:
    """Every method of one task against one of them."""

    reference: str
    metric: str
    differences: dict[str, Difference]
    """By method, without the reference and those that cannot be compared."""
    num_examples: int
    num_resamples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Methods of one task, scored on all their common examples and on the same draws of them."""

    metric: str
    num_examples: int
    num_resamples: int
    scores: dict[str, Floats]
    """By method: (1 + draws,), on all examples first."""

    def value(self, method: str) -> float:
        """The method's metric on all examples."""
        return float(self.scores[method][0])

    def against(self, reference: str, methods: Sequence[str]) -> Significance | None:
        """Compare methods with one of them; those that were not scored are left out.

        Returns:
            None if there is nothing to compare.
        """
        others = [name for name in methods if name in self.scores and name != reference]
        if reference not in self.scores or not others:
            return None
        found = {m: _difference(self.scores[m] - self.scores[reference]) for m in others}
        corrected = holm([difference.p for difference in found.values()])
        return Significance(
            reference=reference,
            metric=self.metric,
            differences={
                name: replace(difference, p_holm=p)
                for (name, difference), p in zip(found.items(), corrected, strict=True)
            },
            num_examples=self.num_examples,
            num_resamples=self.num_resamples,
        )


def score_draws(
    answers: TaskAnswers,
    methods: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Draws | None:
    """Score methods on draws of the examples that all of them answered.

    Args:
        answers: What the methods answered.
        methods: Those to score.
        num_resamples: Draws.
        seed: Of the draws; all methods are scored on the same ones.

    Returns:
        None if there is nothing to draw from. Methods without answers, or with answers that do not
        give the values that the cells have, are left out.
    """
    num_examples = len(answers.examples)
    scorers = {
        name: scorer
        for name in methods
        if name in answers.methods
        and (scorer := _scorer(answers, answers.methods[name])) is not None
    }
    if num_examples < 2 or not scorers:
        return None
    parts: dict[str, list[Floats]] = {name: [] for name in scorers}
    draws = draw_counts(num_examples, num_resamples, seed)
    for counts in itertools.chain([np.ones((1, num_examples))], draws):  # first all, as they are
        for name, score in scorers.items():
            parts[name].append(score(counts))
    return Draws(
        metric=answers.metric,
        num_examples=num_examples,
        num_resamples=num_resamples,
        scores={name: np.concatenate(part) for name, part in parts.items()},
    )


def compare_with(
    answers: TaskAnswers,
    reference: str,
    methods: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Significance | None:
    """Compare methods with a reference; the arguments are those of the two steps before."""
    every = (reference, *methods)
    draws = score_draws(answers, every, num_resamples=num_resamples, seed=seed)
    return None if draws is None else draws.against(reference, methods)


def draw_counts(num_examples: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each example is in each draw, (draws, examples), in parts that fit into memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _COUNTS_AT_ONCE // num_examples)
    for start in range(0, num_resamples, rows):
        num_rows = min(rows, num_resamples - start)
        places = generator.integers(0, num_examples, (num_rows, num_examples))
        places += num_examples * np.arange(num_rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=num_rows * num_examples)
        yield counts.reshape(num_rows, num_examples).astype(np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: the i-th smallest times n - i + 1."""
    order = np.argsort(p_values, kind="stable")
    corrected = [min(1.0, (len(p_values) - i) * p_values[k]) for i, k in enumerate(order)]
    rising = itertools.accumulate(corrected, max)
    return [p for _, p in sorted(zip(order.tolist(), rising, strict=True))]


def _difference(scores: Floats) -> Difference:
    """The difference on all examples, which comes first, with what its draws say of it."""
    value, drawn = float(scores[0]), scores[1:]
    low, high = map(float, np.percentile(drawn, [2.5, 97.5]))
    # Equal scores that were summed in another order still count as equal.
    num_below, num_above = int((drawn <= _ZERO).sum()), int((drawn >= -_ZERO).sum())
    p = min(1.0, 2 * (min(num_below, num_above) + 1) / (len(drawn) + 1))
    return Difference(value=value, low=low, high=high, p=p, p_holm=p)


def _scorer(answers: TaskAnswers, method: MethodAnswers) -> Scorer | None:
    """How the method is scored on draws; None where that is not what its cells measured."""
    references = [example.reference for example in answers.examples]

    def score(counts: Floats) -> Floats:
        mean: Floats = (
            counts @ shares / len(shares)
            if metric is None
            else np.mean([metric(counts, seed, right) for seed in seeds], axis=0)
        )
        return mean

    metric = METRICS.get(answers.metric)
    try:
        if answers.metric == "loss":
            score = partial(_loss, method)
        elif metric is None:
            shares = _example_scores(answers.metric, method, references).mean(axis=0)
        else:
            right, *seeds = map(_numbers, (references, *method.predictions))
        measured = float(score(np.ones((1, len(references))))[0])
    except (TypeError, ValueError):
        return None  # a metric that is not known, or predictions of another kind
    if math.isnan(measured):
        return None
    return score if answers.num_left_out or _agrees(measured, method) else None


def _loss(method: MethodAnswers, counts: Floats) -> Floats:
    """Loss per token of all examples of a draw, mean over the seeds; NaN where it is not known."""
    if method.losses is None or method.num_tokens is None:
        raise ValueError("no losses")
    means: Floats = np.mean(
        [
            counts @ losses / (counts @ tokens)
            for losses, tokens in zip(method.losses, method.num_tokens, strict=True)
        ],
        axis=0,
    )
    return means


def _example_scores(metric: str, method: MethodAnswers, references: Sequence[Any]) -> Floats:
    """(seeds, examples), of a metric that is the mean over examples."""
    if metric == "accuracy":
        return method.correct.astype(np.float64)
    pairs = [zip(row, references, strict=True) for row in method.predictions]
    return np.array([[compute(metric, [given], [right]) for given, right in row] for row in pairs])


def _agrees(measured: float, method: MethodAnswers) -> bool:
    known = [value for value in method.values if value is not None]
    return len(known) == len(method.values) and abs(measured - np.mean(known)) < _TOLERANCE


def _numbers(values: Sequence[Any]) -> Floats:
    """Raises ValueError or TypeError unless all values are numbers."""
    return np.array([float(value) for value in values])
