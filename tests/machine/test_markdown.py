"""What users write is text in Markdown, whatever it holds."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from lowmem_reft.machine.markdown import code, fenced, plain, table

READ = MarkdownIt("commonmark").enable("table").enable("strikethrough")

HOSTILE = [
    "a`b",
    "``` \n# x",
    "a | b",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "**bold** _it_ ~~no~~",
    "---\nlicense: mit\n---",
    "\n\n<img src=x onerror=alert(1)>\n\n",
    "`",
    " ` | ` ",
    "\\`x\\|y",
    "&lt;b&gt;",
    "![x](http://x/y.png)",
    "\u2028# x",
]


def texts(markdown: str) -> list[str]:
    """All text and code that is shown; nothing else may be there but paragraphs and tables."""
    shown = []
    for token in READ.parse(markdown):
        inner = token.children or []
        assert token.type != "html_block"
        assert not {"html_inline", "link_open", "image", "strong_open", "em_open"} & {
            child.type for child in inner
        }
        if token.type == "inline":
            shown.append("".join(child.content for child in inner))
    return shown


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text: str) -> None:
    assert [words(each) for each in texts(f"# {plain(text)}")] == [words(text)]


@pytest.mark.parametrize("text", HOSTILE)
def test_code_stays_one_piece_of_code_in_a_table(text: str) -> None:
    cells = texts(table([("name", f"{code(text)}, more"), ("next", "1")]))
    assert cells[2:] == ["name", f"{words(text)}, more", "next", "1"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_code_ends_where_it_should(text: str) -> None:
    tokens = READ.parse(f"{fenced(text, 'bash')}\n\nafter")
    assert [token.type for token in tokens][:2] == ["fence", "paragraph_open"]
    assert tokens[0].content == f"{text}\n"
