"""The pictures of a step's memory: what they must show, whatever the timeline."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from lowmem_reft import InputError
from lowmem_reft.memory.live import CATEGORIES, LiveStorage, Origin
from lowmem_reft.memory.picture import draw_timeline, write_timeline_html
from lowmem_reft.memory.timeline import COLORS, PHASE_COLORS, curve_of, size_text, thinned

MIB = 2**20
HOSTILE = '<script>alert("x")</script> & $y_1$'
LARGEST = [
    LiveStorage(
        12 * MIB, "activations", Origin("aten::mm", "model.py:7", "layers.3.mlp", "forward")
    ),
    LiveStorage(3 * MIB, "quantization_constants", None),
    LiveStorage(MIB, "loss", Origin(HOSTILE, HOSTILE, HOSTILE, "backward")),
]


def step(num_changes=60, peak_bytes=300 * MIB):
    """A timeline that rises to its peak in the middle and falls again."""
    timeline = []
    for i in range(num_changes):
        share = 1 - abs(2 * i / (num_changes - 1) - 1)
        phase = ("forward", "recompute", "backward", "optimizer")[4 * i // num_changes]
        made = int(share * (peak_bytes - 100 * MIB))
        timeline.append((phase, {"weights": 100 * MIB, "activations": made, "loss": 0}))
    peak = max(range(num_changes), key=lambda i: timeline[i][1]["activations"])
    timeline[peak] = (timeline[peak][0], {"weights": 100 * MIB, "activations": 200 * MIB})
    return timeline


def test_every_category_has_a_colour_of_its_own():
    assert set(COLORS) == set(CATEGORIES)
    assert len(set(COLORS.values()) | set(PHASE_COLORS.values())) == len(COLORS) + len(PHASE_COLORS)


@pytest.mark.parametrize("num_changes", [1, 2, 1999, 2000, 2001, 4001, 50_000])
def test_thinning_keeps_the_ends_the_highest_and_the_lowest(num_changes):
    totals = np.random.default_rng(num_changes).integers(0, 10**9, num_changes)
    kept = thinned(totals)
    assert len(kept) <= 2002
    assert (np.diff(kept) > 0).all()
    assert {0, num_changes - 1} <= set(kept)
    assert totals[kept].max() == totals.max()
    assert totals[kept].min() == totals.min()


@pytest.mark.parametrize("position", [0, 1, 777, 24_999, 49_998, 49_999])
def test_a_peak_of_one_entry_is_not_lost(position):
    timeline = [("forward", {"activations": 10})] * 50_000
    timeline[position] = ("backward", {"activations": 10, "loss": 90})
    curve = curve_of(timeline)
    assert curve.peak_bytes == 100
    assert (curve.moments[curve.peak], curve.phases[curve.peak]) == (position, "backward")
    assert curve.at_peak == {"activations": 10, "loss": 90}


def test_the_bytes_drawn_are_those_of_the_timeline():
    timeline = step(5000)
    curve = curve_of(timeline)
    for name, sizes in curve.sizes.items():
        assert sizes.tolist() == [timeline[i + curve.start][1].get(name, 0) for i in curve.moments]
    assert "loss" not in curve.sizes  # never any


def test_what_was_there_before_the_step_is_its_first_entry():
    before = [("forward", {"weights": i * MIB}) for i in range(1, 101)]
    before[50] = ("forward", {"weights": 900 * MIB})  # counted, then moved to the host
    curve = curve_of([*before, *step()[1:]])
    assert (curve.start, curve.peak_bytes) == (99, 300 * MIB)
    assert curve.totals[0] == 100 * MIB


def test_phases_cover_the_step_and_small_interruptions_are_left_out():
    phases = ["forward"] * 5000 + (["recompute"] * 90 + ["backward"] * 10) * 50
    phases += ["forward"] * 3 + ["optimizer"] * 500
    curve = curve_of([(phase, {"activations": 1}) for phase in phases])
    assert [name for *_, name in curve.bands] == ["forward", "recompute", "optimizer"]
    ends = [end for _, end, _ in curve.bands]
    assert [start for start, *_ in curve.bands] == [0, *ends[:-1]]
    assert ends[-1] == curve.num_changes


def test_categories_and_phases_that_are_not_known_are_drawn_too(tmp_path):
    timeline = [("warm-up", {"inventions": MIB, "activations": MIB}), ("forward", {})]
    assert curve_of(timeline).at_peak == {"activations": MIB, "inventions": MIB}
    assert draw_timeline(tmp_path / "t.png", timeline, title="t").exists()
    pytest.importorskip("plotly")
    page = write_page(tmp_path / "t.html", {"t": timeline})
    assert "inventions" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("num_changes", [1, 2, 60, 20_000])
@pytest.mark.parametrize("budget_bytes", [None, 200 * MIB, 24 * 2**30])
def test_the_picture_is_made_and_shows_something(tmp_path, num_changes, budget_bytes):
    timeline = step(60)[30:31] if num_changes == 1 else step(num_changes)
    path = tmp_path / "made" / "timeline.png"
    assert draw_timeline(path, timeline, title=HOSTILE, budget_bytes=budget_bytes) == path
    pixels = imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    weights = np.array([int(COLORS["weights"][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    assert (abs(pixels[..., :3] - weights) < 0.01).all(-1).any()


def write_page(path, timelines):
    return write_timeline_html(path, timelines, title="a step", facts=[], largest=[])


def test_an_empty_timeline_is_refused(tmp_path):
    refusal = "timeline must hold at least one change, got none"
    with pytest.raises(InputError, match=refusal):
        draw_timeline(tmp_path / "t.png", [], title="t")
    pytest.importorskip("plotly")
    with pytest.raises(InputError, match=refusal):
        write_page(tmp_path / "t.html", {"measured": step(), "predicted": []})
    assert not list(tmp_path.iterdir())


class Page(HTMLParser):
    """What of a page is markup and what is text; scripts are neither."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.texts, self.opened = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.opened.append(tag)

    def handle_endtag(self, tag):
        while self.opened and self.opened.pop() != tag:
            pass

    def handle_data(self, data):
        if self.opened[-1:] != ["script"] and data.strip():
            self.texts.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    pytest.importorskip("plotly")
    path = tmp_path_factory.mktemp("page") / "made" / "timeline.html"
    timelines = {"measured": step(5000), HOSTILE: step(60, 250 * MIB)}
    facts = [("predicted peak", "0.2951 GiB"), (HOSTILE, HOSTILE)]
    written = write_timeline_html(path, timelines, title=HOSTILE, facts=facts, largest=LARGEST)
    assert written == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_the_page_fetches_nothing(source, page):
    assert page.links == []
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert "plotly.js v" in source  # it is in the page, not elsewhere
    assert "@import" not in re.sub(r"<script.*?</script>", "", source, flags=re.DOTALL)


def test_the_page_holds_the_facts_the_peaks_and_the_largest_allocations(page):
    assert {"predicted peak", "0.2951 GiB"} <= set(page.texts)
    assert {"100.00", "200.00", "300.00"} <= set(page.texts)  # weights, activations, total in MiB
    row = ["12.00", "activations", "aten::mm", "forward", "layers.3.mlp", "model.py:7"]
    start = page.texts.index("12.00")
    assert page.texts[start : start + 6] == row
    assert {"3.00", "quantization constants", "before the step"} <= set(page.texts)


def test_the_charts_show_bytes_by_category_and_phases_to_one_scale(source):
    assert "x unified" in source
    for phase in ("forward", "recompute", "backward", "optimizer"):
        assert f'"{phase}"' in source
    assert len(re.findall(r'"range":\[0,336\.0', source)) == 2  # 300 MiB and some air


def test_text_of_users_cannot_become_markup(source, page):
    assert "<script>alert" not in source
    assert page.texts.count(HOSTILE) >= 7  # title twice, fact twice, peaks, operator, module, line
    assert page.tags.count("script") == source.count("</script>")


def test_the_page_needs_plotly_and_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"pip install 'lowmem-reft\[report\]'"):
        write_page(tmp_path / "t.html", {"measured": step()})
    assert not list(tmp_path.iterdir())


def test_nothing_that_draws_is_imported_before_something_is_drawn():
    heavy = "{'matplotlib', 'plotly', 'torch'}"
    code = f"import sys, lowmem_reft.memory.picture; print({heavy} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.strip() == "set()", finished.stderr


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "–"), (100, "100 B"), (2**10, "1.0 KiB"), (3 * MIB // 2, "1.5 MiB"), (2**31, "2.00 GiB")],
)
def test_sizes_are_in_the_unit_in_which_they_read_well(num_bytes, text):
    assert size_text(num_bytes) == text
