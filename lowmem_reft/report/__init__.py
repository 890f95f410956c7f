"""What a comparison shows: the table, the plots and one self-contained ``report.html``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_report(results: Sequence[dict[str, Any]], directory: Path) -> Path:
    """Write the PNG plots and ``report.html`` of a comparison.

    Args:
        results: The cells, as in ``results.json``.
        directory: Where the files go; the cells' ``predictions`` are relative to it.

    Returns:
        The path of ``report.html``.
    """
    from lowmem_reft.report.comparison import Comparison
    from lowmem_reft.report.page import render_page
    from lowmem_reft.report.sections import SECTIONS

    directory.mkdir(parents=True, exist_ok=True)
    comparison = Comparison.read(results, directory)
    sections = [section for render in SECTIONS if (section := render(comparison)) is not None]
    for section in sections:
        for name, figure in section.figures.items():
            figure.savefig(directory / f"{name}.png", dpi=200, facecolor="white")
    path = directory / "report.html"
    path.write_text(render_page(comparison, sections), encoding="utf-8")
    return path
