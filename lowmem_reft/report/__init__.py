"""What a comparison shows: the table, the plots and one self-contained ``report.html``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_report(results: Sequence[dict[str, Any]], directory: Path) -> Path:
    """Write the PNG plots and ``report.html`` of a comparison.

    Args:
        results: The cells, as in ``results.json``.
        directory: Where the files go.

    Returns:
        The path of ``report.html``.
    """
    from lowmem_reft.report.html import render_html
    from lowmem_reft.report.plots import draw_plots, svg_text
    from lowmem_reft.report.table import aggregate

    directory.mkdir(parents=True, exist_ok=True)
    charts: dict[str, str] = {}
    for name, figure in draw_plots(aggregate(results), results).items():
        figure.savefig(directory / f"{name}.png", dpi=200, facecolor="white")
        charts[name] = svg_text(figure)
    path = directory / "report.html"
    path.write_text(render_html(results, charts), encoding="utf-8")
    return path
