"""General text: what is read, and how it is cut into windows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lowmem_reft.data.general import WINDOW_TOKENS, encode_windows, general_digest, read_general
from lowmem_reft.errors import InputError

TEXT = "the quick brown fox jumps over the lazy dog. once upon a time there was a cat.\r\n" * 40


def test_text_is_read_from_a_file_or_from_rows(tmp_path: Path) -> None:
    plain, packed, rows = (tmp_path / name for name in ("a.txt", "a.txt.gz", "a.jsonl"))
    plain.write_bytes(TEXT.encode())
    packed.write_bytes(gzip.compress(TEXT.encode("utf-16")))
    rows.write_text("".join(json.dumps({"text": part}) + "\n" for part in (TEXT, "é")))
    assert read_general(str(plain)) == read_general(str(packed)) == TEXT.replace("\r\n", "\n")
    assert read_general(str(rows)) == f"{TEXT}\n\né"
    assert general_digest(read_general(str(plain))) != general_digest(read_general(str(rows)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "forgetting must be an existing file, got "),
        ("a.txt", b"a few words", "forgetting must hold at least 256 characters of text, got 9 in"),
        ("a.txt", b"caf\xe9 " * 99, "forgetting must be a readable file of UTF-8 text, got"),
        ("a.txt.gz", b"no archive", "forgetting must be a readable file of UTF-8 text, got"),
        ("a.md", TEXT.encode(), "forgetting must be a .jsonl, .*csv.* file or a datasets id, got"),
        ("a.jsonl", b'{"prompt": "a"}', "a.jsonl:1: a row of forgetting must have a text, got Non"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: a row of forgetting must have a text, got 3"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_general(str(path))


def test_windows_follow_each_other_and_their_second_half_is_scored(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = encode_windows(TEXT, tokenizer, limit=3)
    assert len(windows) == 3
    joined = [token for window in windows for token in window["input_ids"]]
    assert joined == ids[: 3 * WINDOW_TOKENS]
    for window in windows:
        half = WINDOW_TOKENS // 2
        assert window["labels"] == [-100] * half + window["input_ids"][half:]


def test_windows_begin_as_prompts_do_and_leave_room_in_a_base_of_few_positions(
    tiny_llama_dir: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = encode_windows(TEXT, _WithBos(tokenizer), limit=10**6, num_positions=64)
    assert {len(window["input_ids"]) for window in windows} == {32}
    assert {window["input_ids"][0] for window in windows} == {1}
    joined = [token for window in windows for token in window["input_ids"][1:]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < 31  # what is left over is no window


def test_a_text_of_less_than_a_window_is_one(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "the quick brown fox"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [window] = encode_windows(text, tokenizer, limit=4)
    half = len(ids) // 2
    assert window == {"input_ids": ids, "labels": [-100] * half + ids[half:]}


class _WithBos:
    """A tokenizer that begins texts with BOS."""

    def __init__(self, inner: object) -> None:
        self.inner, self.bos_token_id = inner, 1

    def __call__(self, text: str, *, add_special_tokens: bool = True, **more: object) -> object:
        found = self.inner(text, add_special_tokens=False, **more)  # type: ignore[operator]
        start = [self.bos_token_id] if add_special_tokens else []
        return {"input_ids": start + found["input_ids"]}
