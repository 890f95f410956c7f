"""How pages and pictures look: every colour, and HTML from jinja2 templates."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

INK = "#1f2329"
"""Text and lines; in a page, the colour of the page's own text."""
# Okabe and Ito's set, which colour-blind readers can tell apart.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
SKY = "#56B4E9"
YELLOW = "#F0E442"
MIDDLE_GREY = "#808892"
"""Lines that are seen on a light page and on a dark one."""
_PAGE = {
    "ink": (INK, "#e6e9ee"),
    "muted": ("#5c6570", "#9aa4b0"),
    "line": ("#d9dee4", "#343b44"),
    "page": ("#ffffff", "#15181c"),
    "soft": ("#f4f6f8", "#1e2329"),
    "good": ("#00694b", "#5fd3a8"),
    "bad": ("#b3261e", "#ff8a80"),
    "accent": ("#005a9c", "#7cc0f5"),
}
"""CSS variable to its colour on a light page and on a dark one."""


def templates(directory: Path) -> Environment:
    """The templates of a directory, which may extend ``page.html`` beside this file.

    What is written into them is escaped, and what is missing is an error.
    """
    made = Environment(
        loader=FileSystemLoader([directory, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    made.globals |= {"page_colors": _PAGE, "middle_grey": MIDDLE_GREY}
    return made
