"""Timelines of live memory made ready to draw: thinned, with phases, colours and units.

A timeline's axis counts allocations and frees, not seconds: on the meta device there is no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lowmem_reft.errors import InputError
from lowmem_reft.machine.pages import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, YELLOW

if TYPE_CHECKING:
    from numpy.typing import NDArray

Timeline = Sequence[tuple[str, Mapping[str, int]]]
"""(phase, bytes by category) after every change."""

COLORS = {
    "weights": BLUE,
    "quantization_constants": SKY,
    "store": "#9A9A9A",
    "adapter": GREEN,
    "optimizer": PURPLE,
    "gradients": YELLOW,
    "inputs": INK,
    "activations": ORANGE,
    "loss": VERMILION,
    "workspace": "#7B4B94",
}
"""Category to colour, from the bottom of the stack, what never changes first. Beside Okabe and
Ito's set a grey and a violet far from what they touch."""

PHASE_COLORS = {
    "forward": "#E3E8EE",
    "recompute": "#B4BFCC",
    "backward": "#8493A6",
    "optimizer": "#4A5768",
}
"""Phase to colour: greys, so that none is taken for a category."""

_OTHER = "#C8C8C8"
_MADE_BY_STEP = ("activations", "loss", "workspace")
_MAX_POINTS = 2000
_MAX_BANDS = 400
_ENTRIES_PER_BIN = 16


@dataclass(frozen=True, eq=False)
class Curve:
    """A timeline, thinned to what a screen can show."""

    start: int
    """Entry of the timeline at which the step begins."""
    num_changes: int
    """Entries from there on."""
    moments: NDArray[np.int64]
    """The entries that are drawn, counted from ``start``."""
    phases: list[str]
    """Of the entries that are drawn."""
    sizes: dict[str, NDArray[np.float64]]
    """Category to bytes at these entries, from the bottom of the stack."""
    bands: list[tuple[float, float, str]]
    """(first entry, entry after the last, phase) of every stretch that is wide enough to see."""

    @property
    def all_phases(self) -> list[str]:
        """Return every phase that has a band, once, in order."""
        return list(dict.fromkeys(phase for *_, phase in self.bands))

    @property
    def totals(self) -> NDArray[np.float64]:
        """Return the bytes of all categories."""
        totals: NDArray[np.float64] = np.sum(list(self.sizes.values()), axis=0)
        return totals

    @property
    def peak(self) -> int:
        """Return which of ``moments`` is the highest, the first one if there are several."""
        return int(self.totals.argmax())

    @property
    def peak_bytes(self) -> int:
        """Return the bytes at the peak."""
        return int(self.totals[self.peak])

    @property
    def at_peak(self) -> dict[str, float]:
        """Return the bytes at the peak by category."""
        return {name: float(sizes[self.peak]) for name, sizes in self.sizes.items()}


def curve_of(timeline: Timeline) -> Curve:
    """Return what there is to draw of a timeline.

    Raises:
        InputError: It is empty.
    """
    if not timeline:
        raise InputError(
            "timeline must hold at least one change, got none; count with keep_timeline=True"
        )
    start = _start(timeline)
    timeline = timeline[start:]
    moments = thinned(np.array([sum(sizes.values()) for _, sizes in timeline]))
    drawn = [timeline[index] for index in moments]
    names = [*COLORS, *sorted({name for _, sizes in drawn for name in sizes} - set(COLORS))]
    sizes = {name: np.array([float(sizes.get(name, 0)) for _, sizes in drawn]) for name in names}
    return Curve(
        start=start,
        num_changes=len(timeline),
        moments=moments,
        phases=[phase for phase, _ in drawn],
        sizes={name: values for name, values in sizes.items() if values.any()} or sizes,
        bands=_bands([phase for phase, _ in timeline]),
    )


def thinned(totals: NDArray[Any], max_points: int = _MAX_POINTS) -> NDArray[np.int64]:
    """Return at most about ``max_points`` indices: the ends, and of every stretch high and low."""
    if len(totals) <= max_points:
        return np.arange(len(totals))
    edges = np.linspace(0, len(totals), max_points // 2 + 1).astype(int)
    kept = {0, len(totals) - 1}
    for start, end in pairwise(edges):
        part = totals[start:end]
        kept |= {int(start + part.argmax()), int(start + part.argmin())}
    return np.array(sorted(kept))


def _start(timeline: Timeline) -> int:
    """Return the last entry before the step: those up to it count what was there, one by one."""
    for index, (_, sizes) in enumerate(timeline):
        if any(sizes.get(name) for name in _MADE_BY_STEP):
            return max(0, index - 1)
    return 0


def _bands(phases: Sequence[str]) -> list[tuple[float, float, str]]:
    """Return the stretches of one phase, each bin of the axis having the phase it mostly is in.

    Where blocks are recomputed the phase changes a thousand times, often for a few operators only.
    """
    names = list(dict.fromkeys(phases))
    codes = np.array([names.index(phase) for phase in phases])
    num_bins = min(_MAX_BANDS, max(len(phases) // _ENTRIES_PER_BIN, min(len(phases), 40)))
    bins = np.arange(len(phases)) * num_bins // len(phases)
    counts = np.zeros((num_bins, len(names)), dtype=int)
    np.add.at(counts, (bins, codes), 1)
    mostly = counts.argmax(axis=1)
    edges = [0, *(np.flatnonzero(np.diff(mostly)) + 1).tolist(), num_bins]
    width = len(phases) / num_bins
    return [(start * width, end * width, names[mostly[start]]) for start, end in pairwise(edges)]


def words(category: str) -> str:
    """Return a category's name for people."""
    return category.replace("_", " ")


def color_of(category: str) -> str:
    """Return the colour of a category, a grey for one that is not known here."""
    return COLORS.get(category, _OTHER)


def phase_color(phase: str) -> str:
    """Return the colour of a phase, a grey for one that is not known here."""
    return PHASE_COLORS.get(phase, _OTHER)


def unit_of(num_bytes: int) -> tuple[float, str]:
    """Return the unit, in bytes, in which numbers up to this one read well, and its symbol."""
    return (2.0**30, "GiB") if num_bytes >= 2**30 else (2.0**20, "MiB")


def size_text(num_bytes: float) -> str:
    """Return a number of bytes in its own unit; a dash for none."""
    for unit, symbol in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.{2 if unit == 2**30 else 1}f} {symbol}"
    return f"{num_bytes:.0f} B" if num_bytes else "–"
