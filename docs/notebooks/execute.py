"""Run the notebooks here and keep what their cells print and draw: ``make notebooks``.

Jupyter is not needed for it: a cell is Python, what it prints is text, its figures are pictures.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells that are code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(cell: dict[str, Any], names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell and return its outputs, as a notebook holds them.

    Args:
        cell: Its code.
        names: The namespace, which the next cell goes on with.
    """
    import matplotlib.pyplot as plt

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        exec(compile("".join(cell["source"]), "cell", "exec"), names)
    outputs: list[dict[str, Any]] = []
    if text := said.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80, bbox_inches="tight")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def main() -> int:
    """Run each notebook in a directory of its own, and write it with its outputs."""
    import matplotlib

    matplotlib.use("agg")
    for path in sorted(HERE.glob("*.ipynb")):
        notebook, names = json.loads(path.read_text(encoding="utf-8")), {"__name__": "__main__"}
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            for number, cell in enumerate(code_cells(notebook), 1):
                cell["outputs"], cell["execution_count"] = run_cell(cell, names), number
            os.chdir(HERE)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
