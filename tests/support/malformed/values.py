"""Mutations of JSON, of text and of bytes."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
"""JSON that is nested too deeply to be read."""


class Raw:
    """JSON that is written as it stands, as no value of Python is written so."""

    def __init__(self, text: str) -> None:
        self.text = text


ODD: tuple[tuple[str, Any], ...] = (
    ("null", None),
    ("true", True),
    ("-1", -1),
    ("0", 0),
    ("a fraction", 0.5),
    ("a huge number", 10**30),
    ("a number of 5,000 digits", Raw("9" * 5000)),
    ("1e999", Raw("1e999")),
    ("NaN", Raw("NaN")),
    ("-Infinity", Raw("-Infinity")),
    ("an empty text", ""),
    ("a text", "zzz"),
    ("a lone surrogate", Raw('"\\ud800"')),
    ("a text with line breaks", "a\nb\r\nc"),
    ("an empty list", []),
    ("a list", [1, "zzz", None]),
    ("an empty object", {}),
    ("an object", {"zzz": [1]}),
    ("a deeply nested list", Raw(DEEP)),
)
"""Values that most fields must not have."""


def dumps(content: Any, **options: Any) -> str:
    """Write JSON, with ``Raw`` in it as it stands."""
    raws: list[str] = []

    def default(value: Any) -> str:
        if not isinstance(value, Raw):
            raise TypeError(type(value))
        raws.append(value.text)
        return f"\0raw{len(raws) - 1}\0"

    text = json.dumps(content, default=default, **options)
    for number, raw in enumerate(raws):
        text = text.replace(f'"\\u0000raw{number}\\u0000"', raw)
    return text


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of nested JSON with another value at ``path``; ``...`` takes it away."""
    content = copy.deepcopy(content)
    place = content
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def flipped(random: Random, data: bytes, count: int = 1) -> bytes:
    """Return the bytes with some of them changed."""
    found = bytearray(data)
    for _ in range(count):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def cut(random: Random, data: bytes) -> bytes:
    """Return the beginning of the bytes, never all of them."""
    return data[: random.randrange(len(data))]


def broken_text(random: Random, data: bytes) -> tuple[str, bytes]:
    """Return what no JSON reader takes, made of a JSON object, and what was done."""
    start = data.rstrip()
    return random.choice(
        [
            ("cut", start[: random.randrange(1, len(start) - 1)]),
            ("empty", b""),
            ("not UTF-8", start[:1] + b' "\xff\xfe\xfa": 1, ' + start[1:]),
            ("UTF-16", data.decode().encode("utf-16")),
            ("zeros", b"\0" * len(data)),
            ("random bytes", random.randbytes(200)),
            ("twice", start + start),
            ("an error page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
            ("an LFS pointer", LFS_POINTER),
            ("a list", b"[1, 2, 3]"),
            ("a number", b"17"),
            ("null", b"null"),
            ("deeply nested", DEEP.encode()),
            ("a number of 5,000 digits", start[:1] + b'"zzz": ' + b"9" * 5000 + b", " + start[1:]),
        ]
    )


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
