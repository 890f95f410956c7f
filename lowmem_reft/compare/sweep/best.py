"""Which trial of a search is the best, and what is to be said of it.

Accuracies on n validation rows that differ by less than their standard error are level:

    standard error = sqrt(v · (1 - v) / n), of the highest accuracy v

Of the trials that are level with the highest, the one with the lowest loss on these rows is the
best: the loss counts how sure each answer is, so that chance moves it less. Where the metric is
another one, or rows or losses are not known, only equal values are level. Of equal losses the
higher value is better, then the earlier trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowmem_reft.compare.report.rates import end_of
from lowmem_reft.compare.sweep.search import Trial
from lowmem_reft.data.tasks.metrics import gain, unit_of


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the lowest loss of those whose value is level with the best."""

    def rank(trial: Trial) -> tuple[float, float, int]:
        return -_loss(trial), _gain(trial), -trial.number

    return max(_level(trials)[0], key=rank, default=None)


def remark(trials: Sequence[Trial], best: Trial) -> str:
    """What is to be said of the best: that others were level, and where a range is too narrow."""
    level, error = _level(trials)
    words = []
    if len(level) > 1 and error:
        unit = unit_of(best.metric)
        words.append(
            f"the lowest loss of {len(level)} within {unit.text(error)} points of the highest "
            f"{best.metric}, one standard error of {best.num_examples:,} validation rows"
        )
    if edges := _edges(trials, best):
        words.append(f"at {' and '.join(edges)} tried, so that a better one may lie beyond")
    return "; ".join(words)


def _level(trials: Sequence[Trial]) -> tuple[list[Trial], float]:
    """The complete trials that are level with the highest value, and by how much they may differ.

    The difference is 0 where the values that are level are equal.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        return [], 0.0
    highest = max(complete, key=_gain)
    error = _standard_error(highest)
    level = [trial for trial in complete if _gain(trial) >= _gain(highest) - error]
    if any(trial.loss is None for trial in level):
        error = 0.0
        level = [trial for trial in level if trial.value == highest.value]
    return level, error


def _standard_error(trial: Trial) -> float:
    if trial.metric != "accuracy" or not trial.num_examples or trial.value is None:
        return 0.0
    return math.sqrt(max(0.0, trial.value * (1 - trial.value)) / trial.num_examples)


def _edges(trials: Sequence[Trial], best: Trial) -> list[str]:
    """The options that are numbers and whose best value is the lowest or the highest tried."""
    found = []
    for name, text in best.settings.items():
        tried = _numbers([trial.settings[name] for trial in trials if trial.ended])
        value = _numbers([text])
        end = end_of(value[0], tried) if value and tried else None
        if end == "highest" or (end == "lowest" and not _is_least(value[0], tried)):
            found.append(f"the {end} {name}")
    return found


def _numbers(texts: Sequence[str]) -> list[float]:
    """The numbers that these texts are; none if one of them is no number."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []


def _is_least(value: float, tried: Sequence[float]) -> bool:
    """Whether nothing can lie below: no share is below 0, no count below 1."""
    return value <= 0 or (value == 1 and all(number.is_integer() for number in tried))


def _gain(trial: Trial) -> float:
    assert trial.value is not None
    return gain(trial.metric, trial.value)


def _loss(trial: Trial) -> float:
    return math.inf if trial.loss is None else trial.loss
