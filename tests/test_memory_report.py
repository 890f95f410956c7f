"""Pictures of a step's memory keep its maximum and need no network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.memory.live import Block, Place
from lowmem_reft.report.memory import draw_timeline, thinned, write_timeline_html

TIMELINE = [
    ("forward" if i < 6000 else "backward", {"weights": 2**20, "activations": 1000 * (i % 977)})
    for i in range(12_000)
]
LARGEST = [Block(3 * 2**20, "loss", Place("aten::mm", "a<b>.py:7", "model.head", "forward"))]


def total(entry: tuple[str, dict[str, int]]) -> int:
    return sum(entry[1].values())


def test_thinning_keeps_the_maximum_and_the_order() -> None:
    points = thinned(TIMELINE, 300)
    assert len(points) <= 310
    assert max(map(total, points)) == max(map(total, TIMELINE))
    assert points[0] == TIMELINE[0]
    assert thinned(TIMELINE[:10], 300) == TIMELINE[:10]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = draw_timeline(tmp_path / "t.png", TIMELINE, title="a step", budget_bytes=2**21)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_the_page_is_self_contained_escaped_and_holds_the_facts(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = write_timeline_html(
        tmp_path / "t.html",
        {"measured": TIMELINE, "predicted": TIMELINE},
        title="a <step>",
        facts=[("predicted peak", "1.5 GiB")],
        largest=LARGEST,
    ).read_text(encoding="utf-8")
    assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="https?:', page)
    for text in ("a &lt;step&gt;", "1.5 GiB", "a&lt;b&gt;.py:7", "3.00"):
        assert text in page


def test_a_missing_plotly_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"pip install 'lowmem-reft\[report\]'"):
        write_timeline_html(tmp_path / "t.html", {}, title="", facts=[], largest=[])
