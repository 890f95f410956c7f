"""Several files of rows, each whole or a share of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lowmem_reft.data.mixture import Part, load_mixture, parts_of, read_mixture
from lowmem_reft.data.rows import load_rows, rows_digest
from lowmem_reft.errors import InputError
from written import json_lines


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Files of ten rows and of twenty."""
    one, two = (
        json_lines(
            tmp_path / f"{name}.jsonl",
            *({"prompt": f"{name} {number}", "response": "yes"} for number in range(size)),
        )
        for name, size in (("one", 10), ("two", 20))
    )
    return one, two


def test_commas_stand_between_files_and_a_share_after_an_at() -> None:
    assert parts_of("a.jsonl") == [Part("a.jsonl")]
    assert parts_of("a.jsonl, me/rows:main@0.25") == [Part("a.jsonl"), Part("me/rows:main", 0.25)]
    assert parts_of("a.jsonl@2") == [Part("a.jsonl", 2.0)]


def test_a_file_of_that_very_name_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b@0.5", "c@2"):
        Path(name).touch()
        assert parts_of(name) == [Part(name)]
    assert parts_of("d,c@2,c@2@0.5") == [Part("d"), Part("c@2"), Part("c@2", 0.5)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.jsonl,", "data must name a file between commas"),
        ("a.jsonl@half", "must have a number above 0 after @, got 'half' in 'a.jsonl@half'"),
        ("b.jsonl,a.jsonl@0", "must have a number above 0 after @, got '0'"),
        ("a.jsonl@nan", "must have a number above 0 after @, got 'nan'"),
        ("@1", "must have a number above 0 after @"),
    ],
)
def test_what_is_no_mixture_is_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parts_of(source)


def test_rows_are_those_of_all_files_in_their_order(files: tuple[Path, Path]) -> None:
    one, two = files
    rows = load_mixture(f"{one},{two}")
    assert rows == [*load_rows(one), *load_rows(two)]
    assert load_mixture(str(one)) == load_rows(one)
    assert [row.prompt for row in load_mixture(f"{one},{two}", limit=1)] == ["one 0", "two 0"]


def test_a_share_is_drawn_by_the_seed_and_the_digest_is_that_of_all(
    files: tuple[Path, Path],
) -> None:
    one, two = files
    source = f"{one},{two}@0.5"
    rows = load_mixture(source, seed=1)
    assert len(rows) == 20
    assert rows[:10] == load_rows(one)
    assert [row for row in load_rows(two) if row in rows[10:]] == rows[10:]  # each once, in order
    assert load_mixture(source, seed=1) == rows
    digests = {rows_digest(load_mixture(source, seed=seed)) for seed in range(3)}
    digests.add(rows_digest(load_mixture(f"{one},{two}")))
    assert len(digests) == 4


def test_a_weight_above_one_repeats_rows_and_none_is_below_a_row(files: tuple[Path, Path]) -> None:
    one, _ = files
    counts = Counter(row.prompt for row in load_mixture(f"{one}@2.5"))
    assert sorted(counts.values()) == [2] * 5 + [3] * 5
    assert len(load_mixture(f"{one}@0.001")) == 1


def test_errors_name_file_and_line_of_the_right_file(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    one, _ = files
    wrong = json_lines(tmp_path / "wrong.jsonl", {"prompt": "a", "response": "b"}, {"prompt": 3})
    with pytest.raises(InputError, match=r"wrong\.jsonl:2"):
        load_mixture(f"{one},{wrong}")
    other = json_lines(tmp_path / "other.jsonl", {"text": "a", "label": "b"})
    with pytest.raises(InputError, match=r"other\.jsonl:1: all rows must be of one kind, got 'lab"):
        load_mixture(f"{one},{other}")
    with pytest.raises(InputError, match=r"existing file, got .*nowhere\.jsonl'"):
        load_mixture(f"{one},{tmp_path}/nowhere.jsonl")


def test_columns_of_all_files_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = files
    more = json_lines(tmp_path / "more.jsonl", {"prompt": "a", "response": "b", "id": 3})
    read = read_mixture(f"{one},{more}")
    assert (read.columns, read.ignored) == (("prompt", "response"), ("id",))
    with pytest.warns(UserWarning, match="columns that are ignored: id"):
        load_mixture(f"{one},{more}")
