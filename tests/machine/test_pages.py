"""Templates of pages: text is escaped, what is missing is an error, colours are written once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import lowmem_reft
from lowmem_reft.machine import pages

HOSTILE = '<script>alert("x")</script> & \''


@pytest.fixture
def page(tmp_path):
    (tmp_path / "own.html").write_text(
        '{% extends "page.html" %}{% block main %}<p title="{{ words }}">{{ words }}</p>'
        '<script type="application/json">{{ data | tojson }}</script>{% endblock %}'
    )
    return pages.templates(tmp_path).get_template("own.html")


def test_text_is_escaped_in_the_page_its_attributes_and_its_data(page):
    made = page.render(title=HOSTILE, words=HOSTILE, data=[HOSTILE])
    assert "alert" in made
    assert not re.search(r"<script>alert|</script> &|\(\"x", made)
    assert made.count("&lt;script&gt;") == 4  # the title twice


def test_what_a_template_is_not_given_is_an_error(page):
    with pytest.raises(UndefinedError, match="words"):
        page.render(title="t", data=[])


def test_every_colour_of_the_page_is_there_for_light_and_dark(page):
    made = page.render(title="t", words="w", data=[])
    assert re.findall(r"--ink: (#\w+);", made) == [pages.INK, "#e6e9ee"]
    used = {name for name in re.findall(r"var\(--(\w+)\)", made)}
    assert used <= set(re.findall(r"--(\w+): #", made))


def test_a_colour_is_written_once():
    root = Path(lowmem_reft.__file__).parent
    files = [path for end in ("py", "html", "css", "js") for path in root.rglob(f"*.{end}")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files).lower()
    found = re.findall(r"#[0-9a-f]{6}\b", text)
    plain = {"#ffffff", "#000000"}
    assert sorted(set(found) - plain) == sorted(each for each in found if each not in plain)
