"""What a comparison shows: the table, the plots and one self-contained ``report.html``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.compare.cell import EMPTY_RESULT
from lowmem_reft.machine.files import write_json, write_text_whole, write_whole

if TYPE_CHECKING:
    from lowmem_reft.compare.report.comparison import Comparison

_NESTED = (
    *("config", "versions", "loss_history", "validation", "breakdown_bytes", "extra"),
    *("few_shot", "examples", "lr_search", "verdict"),
)

CSV_FIELDS = tuple(name for name in EMPTY_RESULT if name not in _NESTED)
"""Columns of results.csv: every field of a result that is one value."""

_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uFF1D\uFF0B\uFF0D\uFF20]")
"""How a text begins that spreadsheets take for a formula, in full width too."""


def write_results(
    results: Sequence[dict[str, Any]], directory: Path, *, texts: bool = True
) -> dict[str, Any]:
    """Write ``results.json``, ``results.csv`` and the report of a comparison.

    Args:
        results: The cells.
        directory: Where the files go; the cells' ``predictions`` are relative to it.
        texts: Whether the page may hold the texts of the examples.

    Returns:
        The paths, ``output_dir``, ``results``, ``csv`` and ``report``; and ``verdict``: which
        method to take, as a list of ``task``, ``take`` and ``reason``. A cell in ``results.json``
        has what is said of its task and of all tasks.
    """
    # Matplotlib takes a second to import, which those who only read the column names need not.
    from lowmem_reft.compare.report.comparison import Comparison
    from lowmem_reft.compare.report.table import ALL_TASKS

    directory.mkdir(parents=True, exist_ok=True)  # predictions are found by paths from there
    comparison = Comparison.read(results, directory, texts=texts)
    verdict = [asdict(each) for each in comparison.verdicts]
    judged = [
        {**cell, "verdict": [each for each in verdict if each["task"] in (cell["task"], ALL_TASKS)]}
        for cell in results
    ]
    write_json(directory / "results.json", judged)
    write_csv(directory / "results.csv", judged)
    return {
        "output_dir": str(directory),
        "results": str(directory / "results.json"),
        "csv": str(directory / "results.csv"),
        "report": str(write_report(results, directory, texts=texts, comparison=comparison)),
        "verdict": verdict,
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


def write_report(
    results: Sequence[dict[str, Any]],
    directory: Path,
    *,
    texts: bool = True,
    comparison: Comparison | None = None,
) -> Path:
    """Write the PNG plots and ``report.html``; the arguments are those of ``write_results``.

    ``comparison`` is what was read of the results, if that has been done.
    """
    # Matplotlib takes a second to import; whoever asks for the table alone need not wait for it.
    import matplotlib

    # As do these.
    from lowmem_reft.compare.report.comparison import Comparison
    from lowmem_reft.compare.report.html import render_page
    from lowmem_reft.compare.report.sections import SECTIONS

    directory.mkdir(parents=True, exist_ok=True)
    if comparison is None:
        comparison = Comparison.read(results, directory, texts=texts)
    with matplotlib.rc_context({"text.parse_math": False}):  # names of users may hold dollar signs
        sections = [section for render in SECTIONS if (section := render(comparison)) is not None]
        for section in sections:
            for name, chart in section.charts.items():
                picture = partial(chart.figure.savefig, format="png", dpi=200, facecolor="white")
                write_whole(directory / f"{name}.png", picture)
    return write_text_whole(directory / "report.html", render_page(comparison, sections))
