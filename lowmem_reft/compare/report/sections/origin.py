"""Where the numbers come from: model, data, machine, versions."""

from __future__ import annotations

from collections.abc import Sequence

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
    shown = {
        f"{result['method']}, seed {result['seed']}, shows": _names(result["examples"])
        for result in comparison.results
        if result.get("examples")
    }
    facts = {
        "model": comparison.listed("model"),
        "data": comparison.listed("task"),
        "scored rows": comparison.listed("num_examples"),
        **shown,
        "device": comparison.listed("device"),
        "commit": comparison.listed("commit"),
        "versions": ", ".join(sorted(packages)),
    }
    title = "Where the numbers come from"
    return Section(name="origin", title=title, parts=[html.facts(facts)])


def _names(sources: Sequence[str]) -> str:
    """Files and lines: the directories are the run's own."""
    return ", ".join(source.replace("\\", "/").rpartition("/")[2] for source in sources)
