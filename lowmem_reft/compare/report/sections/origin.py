"""Where the numbers come from: model, data, machine, versions."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.html import Section, html


def render(comparison: Comparison) -> Section:
    """What all runs share, or everything that some of them had."""
    packages = {
        f"{name} {version}"
        for result in comparison.results
        for name, version in (result["versions"] or {}).items()
        if version
    }
    facts = {
        "model": comparison.listed("model"),
        "data": comparison.listed("task"),
        "scored rows": comparison.listed("num_examples"),
        "device": comparison.listed("device"),
        "commit": comparison.listed("commit"),
        "versions": ", ".join(sorted(packages)),
    }
    title = "Where the numbers come from"
    return Section(name="origin", title=title, parts=[html.facts(facts)])
