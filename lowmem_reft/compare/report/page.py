"""One self-contained ``report.html``: opens from a file, fetches nothing, fits a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath
from string import Template

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.markup import Section, listed

_MAX_TASKS_IN_TITLE = 5
_ASSETS = Path(__file__).with_name("assets")


def render_page(comparison: Comparison, sections: Sequence[Section]) -> str:
    """The page: a heading, links to the sections, the sections, and the scripts they need."""
    tasks = ", ".join(comparison.tasks)
    if len(comparison.tasks) > _MAX_TASKS_IN_TITLE:
        tasks = f"{len(comparison.tasks)} tasks"
    model = PurePath(listed(comparison.results, "model")).name
    return Template(_asset("page.html")).substitute(
        title=escape(f"{tasks} on {model}"),
        summary=escape(_summary(comparison)),
        links=" ".join(f'<a href="#{each.name}">{escape(each.title)}</a>' for each in sections),
        sections="\n".join(
            f'<section id="{each.name}">\n<h2>{escape(each.title)}</h2>\n{each.body}\n</section>'
            for each in sections
        ),
        style=_asset("page.css"),
        script=_asset("tables.js") + _asset("examples.js"),
    )


def _summary(comparison: Comparison) -> str:
    results = comparison.results
    num_failed = sum(result["error"] is not None for result in results)
    num_seeds = len({result["seed"] for result in results})
    untrained = {r.method for r in comparison.rows if r.num_trainable_params == 0}
    num_methods = len({row.method for row in comparison.rows} - untrained)
    words = [
        f"{num_methods} {'method' if num_methods == 1 else 'methods'}",
        f"{len(comparison.tasks)} tasks" if len(comparison.tasks) > 1 else "",
        f"{num_seeds} {'seed' if num_seeds == 1 else 'seeds'}",
        f"{len(results)} runs",
        f"{num_failed} failed" if num_failed else "",
        listed(results, "device"),
        _budget(comparison),
    ]
    return " · ".join(word for word in words if word)


def _budget(comparison: Comparison) -> str:
    """What all methods were given the same of, if they were."""
    found: list[str] = []
    for result in comparison.results:
        budget = result.get("budget")
        if budget:
            words = (
                ", ".join(f"{name} {value}" for name, value in budget.items())
                if isinstance(budget, dict)
                else str(budget)
            )
            found.append(words)
    return f"equal budget: {'; '.join(dict.fromkeys(found))}" if found else ""


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
