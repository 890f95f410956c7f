"""The parts of ``report.html``, from top to bottom.

A section is a module with ``render(comparison) -> Section | None``; None where there is nothing to
show. A new one is a module here and a line in ``SECTIONS``; what several of them need stands in
``templates/parts.html`` (HTML), ``figures.py`` (charts) and ``comparison.py`` (the data).
"""

from __future__ import annotations

from collections.abc import Callable

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.html import Section
from lowmem_reft.compare.report.sections import (
    costs,
    curves,
    examples,
    failures,
    frontier,
    heatmap,
    memory,
    origin,
    ranking,
    rates,
    runs,
)

SECTIONS: tuple[Callable[[Comparison], Section | None], ...] = (
    ranking.render,
    frontier.render,
    curves.render,
    rates.render,
    examples.render,
    memory.render,
    heatmap.render,
    failures.render,
    costs.render,
    runs.render,
    origin.render,
)
