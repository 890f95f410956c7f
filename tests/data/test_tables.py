from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft.data.rows import load_rows
from lowmem_reft.errors import InputError

PAIRS = [("Où est le café ?", "Là-bas."), ("Wo ist der Bär?", "Dort; im Wald, dort.")]


def _table(path: Path, *, encoding: str = "utf-8", head: str = "", **style: Any) -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        file.write(head)
        csv.writer(file, **style).writerows([("prompt", "response"), *PAIRS])
    return path


def _pairs(path: Path) -> list[tuple[str, str | None]]:
    return [(row.prompt, row.response) for row in load_rows(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"], ids=["comma", ";", "tab", "bar"])
def test_the_separator_and_the_encoding_are_found(
    separator: str, encoding: str, tmp_path: Path
) -> None:
    path = _table(tmp_path / "rows.csv", encoding=encoding, delimiter=separator)
    assert _pairs(path) == PAIRS


def test_files_of_tabs_may_be_named_tsv_and_a_line_before_the_header_may_name_the_separator(
    tmp_path: Path,
) -> None:
    assert _pairs(_table(tmp_path / "rows.tsv", delimiter="\t")) == PAIRS
    path = _table(tmp_path / "rows.csv", delimiter=";", head="sep=;\r\n")
    assert _pairs(path) == PAIRS
    assert load_rows(path)[0].source == f"{path}:3"


def test_windows_1252_is_read_with_a_warning(tmp_path: Path) -> None:
    path = _table(tmp_path / "rows.csv", encoding="cp1252", delimiter=";")
    with pytest.warns(UserWarning, match=r"rows\.csv: read as Windows-1252, because it is not UTF"):
        assert _pairs(path) == PAIRS


def test_names_of_columns_may_have_spaces_around_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt, response\na, "b, c"\n')
    assert _pairs(path) == [("a", "b, c")]
    path.write_text("prompt ,response \na, b\n")
    assert _pairs(path) == [("a", " b")]


def test_columns_without_a_name_are_named_if_something_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt;response;;\na;b;;\n;;;\nc;d;;\n")
    assert _pairs(path) == [("a", "b"), ("c", "d")]
    path.write_text(",prompt,response\n0,a,b\n")
    with pytest.warns(UserWarning, match="columns that are ignored: one without a name$"):
        assert _pairs(path) == [("a", "b")]


def test_a_repeated_column_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,prompt\na,b,c\n")
    with pytest.raises(InputError, match=r"rows\.csv:1: must have every column once, got 'prompt'"):
        load_rows(path)


def test_cells_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,response\n{'a' * 200_000},b\n")
    assert len(load_rows(path)[0].prompt) == 200_000


def test_whole_numbers_that_pandas_made_floats_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,1.0\nb,0\nc,1.5\n")
    assert [row.label for row in load_rows(path)] == ["1", "0", "1.5"]
    path.write_text('prompt,choices,answer\na,"[""b"", ""c""]",1.0\n')
    assert load_rows(path)[0].answer == 1


def test_an_answer_in_digits_to_a_question_without_choices_is_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n6 * 7?,42\n")
    assert _pairs(path) == [("6 * 7?", "42")]


def test_chats_and_what_their_template_is_given_are_json_in_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    chat = (
        '[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]'
    )
    path.write_text(f'messages,tools,system\n"{chat}","[{{""name"": ""x""}}]",You help.\n')
    (row,) = load_rows(path)
    assert (len(row.messages), row.template_arguments) == (3, {"tools": [{"name": "x"}]})


def test_an_empty_response_is_none_where_it_is_still_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\na,\n")
    (row,) = load_rows(path, require_response=False)
    assert (row.prompt, row.response) == ("a", None)
