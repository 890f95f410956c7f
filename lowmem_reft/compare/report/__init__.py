"""What a comparison shows: the table, the plots and one self-contained ``report.html``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import EMPTY_RESULT
from lowmem_reft.machine.files import write_json, write_text_whole, write_whole

CSV_FIELDS = tuple(
    name
    for name in EMPTY_RESULT
    if name not in ("config", "versions", "loss_history", "validation", "breakdown_bytes", "extra")
)
"""Columns of results.csv: every field of a result that is one value."""


def write_results(
    results: Sequence[dict[str, Any]], directory: Path, *, texts: bool = True
) -> dict[str, str]:
    """Write ``results.json``, ``results.csv`` and the report of a comparison.

    Args:
        results: The cells.
        directory: Where the files go; the cells' ``predictions`` are relative to it.
        texts: Whether the page may hold the texts of the examples.

    Returns:
        The paths: ``output_dir``, ``results``, ``csv`` and ``report``.
    """
    write_json(directory / "results.json", results)
    write_csv(directory / "results.csv", results)
    return {
        "output_dir": str(directory),
        "results": str(directory / "results.json"),
        "csv": str(directory / "results.csv"),
        "report": str(write_report(results, directory, texts=texts)),
    }


def write_csv(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """One line per cell; nested fields (config, versions, losses) are in results.json only."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def write_report(results: Sequence[dict[str, Any]], directory: Path, *, texts: bool = True) -> Path:
    """Write the PNG plots and ``report.html``; the arguments are those of ``write_results``."""
    # Matplotlib takes a second to import; whoever asks for the table alone need not wait for it.
    from lowmem_reft.compare.report.comparison import Comparison
    from lowmem_reft.compare.report.html import render_page
    from lowmem_reft.compare.report.sections import SECTIONS

    directory.mkdir(parents=True, exist_ok=True)
    comparison = Comparison.read(results, directory, texts=texts)
    sections = [section for render in SECTIONS if (section := render(comparison)) is not None]
    for section in sections:
        for name, chart in section.charts.items():
            picture = partial(chart.figure.savefig, format="png", dpi=200, facecolor="white")
            write_whole(directory / f"{name}.png", picture)
    return write_text_whole(directory / "report.html", render_page(comparison, sections))
