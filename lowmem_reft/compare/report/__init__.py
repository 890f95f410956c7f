"""What a comparison shows: the table, the plots and one self-contained ``report.html``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import EMPTY_RESULT
from lowmem_reft.machine.files import write_json, write_text_whole, write_whole

_NESTED = (
    *("config", "versions", "loss_history", "validation", "breakdown_bytes", "extra"),
    *("few_shot", "examples", "lr_search"),
)

CSV_FIELDS = tuple(name for name in EMPTY_RESULT if name not in _NESTED)
"""Columns of results.csv: every field of a result that is one value."""

_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uFF1D\uFF0B\uFF0D\uFF20]")
"""How a text begins that spreadsheets take for a formula, in full width too."""


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
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: _no_formula(cell) for name, cell in row.items()} for row in results)
    # As bytes: the line ends are those of CSV, on every system.
    write_whole(path, lambda part: part.write_bytes(text.getvalue().encode()))


def _no_formula(cell: Any) -> Any:
    """Return a cell that no spreadsheet computes (OWASP: CSV injection): a quote goes before it.

    Taking one quote away again gives every text back, also one that began with quotes.
    """
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def write_report(results: Sequence[dict[str, Any]], directory: Path, *, texts: bool = True) -> Path:
    """Write the PNG plots and ``report.html``; the arguments are those of ``write_results``."""
    # Matplotlib takes a second to import; whoever asks for the table alone need not wait for it.
    import matplotlib

    # As do these.
    from lowmem_reft.compare.report.comparison import Comparison
    from lowmem_reft.compare.report.html import render_page
    from lowmem_reft.compare.report.sections import SECTIONS

    directory.mkdir(parents=True, exist_ok=True)
    comparison = Comparison.read(results, directory, texts=texts)
    with matplotlib.rc_context({"text.parse_math": False}):  # names of users may hold dollar signs
        sections = [section for render in SECTIONS if (section := render(comparison)) is not None]
        for section in sections:
            for name, chart in section.charts.items():
                picture = partial(chart.figure.savefig, format="png", dpi=200, facecolor="white")
                write_whole(directory / f"{name}.png", picture)
    return write_text_whole(directory / "report.html", render_page(comparison, sections))
