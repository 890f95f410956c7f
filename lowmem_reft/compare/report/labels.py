"""Names beside points and at the ends of curves, placed so that none covers another."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

_WIDTH_CHARACTERS = 24
_FONT_SIZE = 8.8
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
    frame = axes.get_window_extent().padded(-3 * pixels)
    taken = [_corners(_mark(axes, label, frame, pixels)) for label in labels]
    for one, other in pairwise(axes.transData.transform(list(path)) if path else ()):
        low, high = np.minimum(one, other), np.maximum(one, other)
        taken.append(np.concatenate((low - 2 * pixels, high + 2 * pixels)))
    for label in sorted(labels, key=lambda label: -label.y):
        x, y = axes.transData.transform((1.0 if label.x is None else label.x, label.y))
        size = _size(axes, label.name)
        places = (
            _places_on_line(y, size, frame, pixels)
            if label.x is None
            else _places_at_point(x, y, size, pixels)
        )
        covered = np.array(taken)
        place = min(places, key=lambda box: _covered(box, covered, frame))
        taken.append(_corners(place))
        _write(axes, label, place, (x, y), color)


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
    ends = [axes.transData.transform((label.x or 0.0, label.y)) for label in ordered]
    centers = _apart([y for _, y in ends], [height + 3 for _, height in sizes], frame.y0, frame.y1)
    for label, end, (width, height), center in zip(ordered, ends, sizes, centers, strict=True):
        box = Bbox.from_bounds(frame.x1 + 14, center - height / 2, width, height)
        _write(axes, label, box, (end[0], end[1]), color)


def _write(axes: Axes, label: Label, place: Bbox, point: tuple[float, float], color: str) -> None:
    figure: Any = axes.figure
    x, y = point
    gap_x = max(place.x0 - x, x - place.x1, 0.0)
    gap_y = max(place.y0 - y, y - place.y1, 0.0)
    far = label.x is not None and max(gap_x, gap_y) * 72 / figure.dpi >= _LEADER_POINTS
    line = {"arrowstyle": "-", "color": color, "alpha": 0.45, "lw": 0.7, "shrinkA": 1, "shrinkB": 5}
    text = axes.annotate(
        _wrapped(label.name),
        (x / figure.bbox.width, y / figure.bbox.height),
        (place.x0 / figure.bbox.width, place.y0 / figure.bbox.height),
        xycoords="figure fraction",
        color=color,
        fontsize=_FONT_SIZE,
        linespacing=1.05,
        ha="left",
        va="bottom",
        arrowprops={**line, "relpos": _nearest(place, point)} if far else None,
    )
    text.set_in_layout(False)


def _nearest(place: Bbox, point: tuple[float, float]) -> tuple[float, float]:
    """The spot of the box, as fractions of its size, that is nearest to the point."""
    x = (point[0] - place.x0) / place.width
    y = (point[1] - place.y0) / place.height
    return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)


def _places_at_point(
    x: float, y: float, size: tuple[float, float], pixels: float
) -> Iterator[Bbox]:
    width, height = size
    for distance in _DISTANCES_POINTS:
        for side_x, side_y in _SIDES:
            center_x = x + side_x * (distance * pixels + width / 2)
            center_y = y + side_y * (distance * pixels + height / 2)
            yield Bbox.from_bounds(center_x - width / 2, center_y - height / 2, width, height)


def _places_on_line(
    y: float, size: tuple[float, float], frame: Bbox, pixels: float
) -> Iterator[Bbox]:
    width, height = size
    for bottom in (y + 2 * pixels, y - height - 2 * pixels):
        for share in (0.0, 1.0, 0.25, 0.5, 0.75):
            left = frame.x0 + 3 * pixels + share * (frame.width - width - 6 * pixels)
            yield Bbox.from_bounds(left, bottom, width, height)


def _covered(place: Bbox, taken: NDArray[np.float64], frame: Bbox) -> float:
    """Pixels of the place that lie on something else (x0, y0, x1, y1) or outside the chart."""
    box = _corners(place)
    outside = place.width * place.height - _overlaps(box, _corners(frame)[None]).sum()
    return float(outside + _overlaps(box, taken).sum())


def _overlaps(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    areas: NDArray[np.float64] = sides.clip(0).prod(axis=1)
    return areas


def _corners(box: Bbox) -> NDArray[np.float64]:
    return np.array((box.x0, box.y0, box.x1, box.y1))


def _mark(axes: Axes, label: Label, frame: Bbox, pixels: float) -> Bbox:
    """What the point with its error bar, or the line, covers."""
    (x, low), (_, high) = axes.transData.transform(
        [
            (1.0 if label.x is None else label.x, label.y + sign * label.half_height)
            for sign in (-1, 1)
        ]
    )
    if label.x is None:
        return Bbox.from_extents(frame.x0, low - pixels, frame.x1, high + pixels)
    margin = 5 * pixels
    return Bbox.from_extents(x - margin, low - margin, x + margin, high + margin)


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


def _size(axes: Axes, name: str) -> tuple[float, float]:
    """Width and height of the name in pixels."""
    text = axes.text(0, 0, _wrapped(name), fontsize=_FONT_SIZE, linespacing=1.05)
    box = text.get_window_extent()
    text.remove()
    return box.width, box.height


def _wrapped(name: str) -> str:
    if len(name) <= _WIDTH_CHARACTERS:
        return name
    spaced = name.replace("[", " [").replace(",", ", ")
    return "\n".join(textwrap.wrap(spaced, _WIDTH_CHARACTERS))
