"""What a search for learning rates says of itself: ``lr_search`` of a result, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Trials = Sequence[dict[str, Any]]


def chosen(trials: Trials) -> dict[str, Any] | None:
    """The trial whose rate was taken; None if every one failed."""
    return next((trial for trial in trials if trial["chosen"]), None)


def at_edge(trials: Trials) -> str | None:
    """The end of the range at which the best rate is: ``lowest`` or ``highest``; None if inside."""
    best, rates = chosen(trials), [trial["lr"] for trial in trials]
    return None if best is None else end_of(best["lr"], rates)


def end_of(best: float, tried: Sequence[float]) -> str | None:
    """The end of what was tried at which the best is; None if inside, or if one alone was tried."""
    if len(set(tried)) < 2 or min(tried) < best < max(tried):
        return None
    return "lowest" if best == min(tried) else "highest"


def in_words(trials: Trials) -> str:
    """The rate that was taken, among which, and what to make of it."""
    best = chosen(trials)
    taken = "none" if best is None else f"{best['lr']:g}"
    among = ", ".join(f"{trial['lr']:g}" for trial in trials)
    tried = f" of {among}" if len(trials) > 1 else ""
    return "; ".join(filter(None, (f"{taken}{tried}", remark(trials))))


def remark(trials: Trials) -> str:
    """What is to be said of the choice; empty if nothing is."""
    if len(trials) == 1:
        return "not searched, as the entry names it"
    if chosen(trials) is None:
        return "every trial failed, so it keeps its own"
    words = [f"best at the {end} rate tried"] if (end := at_edge(trials)) else []
    failed = [f"{trial['lr']:g}" for trial in trials if trial.get("error") is not None]
    return "; ".join(words + ([f"failed at {', '.join(failed)}"] if failed else []))
