"""Who imports whom in the package, read from its sources; ``python docs/house.py`` draws it.

Used by ``tests/test_package.py``, which holds what the drawing shows, and that it is up to date.
"""

from __future__ import annotations

import ast
import functools
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowmem_reft"
DRAWING = ROOT / "docs" / "assets" / "house.svg"

FOLDERS = {
    "options": "every option once: command line, help and Python",
    "machine": "files, bars, devices, processes, other libraries",
    "data": "rows become tokens; the public tasks are rows too",
    "base": "the frozen base: loaded, quantized, in part, its loss",
    "reft": "⟨Φ, P, L⟩: what is edited, where, as a PEFT method",
    "methods": "a name, its configuration, its place on a base",
    "reuse": "what is constant is computed once",
    "memory": "does it fit? predicted, counted, measured, drawn",
    "runs": "one run: train it, score it, let it answer",
    "compare": "many runs: cells, equal budgets, search, report",
    "ui": "a page in the browser over the commands",
}
"""Top to bottom: a folder imports only from those before it, and from errors.py, the ground."""


@functools.cache
def modules() -> dict[str, Path]:
    """The files of the package by their dotted names below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@functools.cache
def imports_of(name: str, *, for_types: bool = True) -> set[str]:
    """The modules of the package that a module imports anywhere, also inside functions.

    Without ``for_types``, what is imported for type checkers alone is left out: it loads nothing.
    """
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    checks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and _checks_types(n.test))
    only_types = {inner for check in checks for inner in ast.walk(check)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in only_types and not for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {_below(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            # A name of a package may be a module of it.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {
                _below(n) if _below(n) in modules() else _below(str(node.module)) for n in whole
            }
    return found & set(modules()) - {name}


def _checks_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _below(name: str) -> str:
    return name.removeprefix("lowmem_reft.") if name.startswith("lowmem_reft.") else ""


def folder_of(name: str) -> str | None:
    """The folder that a module is in; None for the files beside them."""
    folder = name.partition(".")[0]
    return folder if folder in FOLDERS else None


def arrows() -> set[tuple[str, str]]:
    """Pairs of folders of which the first imports from the second."""
    pairs = (
        (folder_of(name), folder_of(imported))
        for name in modules()
        for imported in imports_of(name)
    )
    return {(own, other) for own, other in pairs if own and other and own != other}


def longest_chain() -> list[str]:
    """The longest way down from import to import.

    The folders' own ``__init__`` are left aside: they name public things, and load none of them.

    Raises:
        RecursionError: modules import each other in a circle.
    """
    known: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...] = ()) -> list[str]:
        if name in above:
            raise RecursionError(f"a circle of imports: {' -> '.join((*above, name))}")
        if name not in known:
            below = imports_of(name, for_types=False) - set(FOLDERS)
            chains = (chain(each, (*above, name)) for each in sorted(below))
            known[name] = [name, *max(chains, key=len, default=[])]
        return known[name]

    starts = (name for name in modules() if folder_of(name) and name not in FOLDERS)
    return max(map(chain, starts), key=len)


def drawing() -> str:
    """The folders as an SVG: a mark where the folder of the row imports from that of the column."""
    found, names = arrows(), list(FOLDERS)
    size, left, top = 34, 440, 92
    width, height = left + size * len(names) + 16, top + size * len(names) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">',
        "<title>Which folder imports from which: every mark is left of the diagonal</title>",
        "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>",
    ]
    for column, name in enumerate(names):
        x, y = left + size * (column + 0.5), top - 10
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-55 {x} {y})">{name}</text>')
    for row, (name, about) in enumerate(FOLDERS.items()):
        y = top + size * row
        parts.append(f'<text x="8" y="{y + 21}" font-weight="600">{name}/</text>')
        parts.append(f'<text x="84" y="{y + 21}" opacity="0.75">{escape(about)}</text>')
        for column, other in enumerate(names):
            fill = "#888" if name == other else "#5c6bc0" if (name, other) in found else "none"
            parts.append(
                f'<rect x="{left + size * column + 2}" y="{y + 2}" width="{size - 4}" '
                f'height="{size - 4}" rx="4" fill="{fill}" fill-opacity="0.6" stroke="#888" '
                'stroke-opacity="0.4"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    DRAWING.write_text(drawing(), encoding="utf-8")
