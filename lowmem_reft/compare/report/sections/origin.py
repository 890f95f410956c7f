"""Where the numbers come from: model, data, machine, versions."""

from __future__ import annotations

from html import escape

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.markup import Section, listed


def render(comparison: Comparison) -> Section:
    """What all runs share, or everything that some of them had."""
    results = comparison.results
    packages = {
        f"{name} {version}"
        for result in results
        for name, version in (result["versions"] or {}).items()
        if version
    }
    facts = {
        "model": listed(results, "model"),
        "data": listed(results, "task"),
        "scored rows": listed(results, "num_examples"),
        "device": listed(results, "device"),
        "commit": listed(results, "commit"),
        "versions": ", ".join(sorted(packages)),
    }
    rows = "\n".join(
        f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value
    )
    return Section(name="origin", title="Where the numbers come from", body=f"<dl>\n{rows}\n</dl>")
