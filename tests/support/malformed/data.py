"""Malformed rows and files of rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

from malformed.fault import Fault, Verdict
from malformed.values import DEEP, ODD, Raw, changed, cut, dumps, flipped
from malformed.world import CHOICES, ROWS, World, replace

_PLACES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "choices": (("prompt",), ("choices",), ("answer",), ("choices", 0), ("choices", 1)),
    "response": (("prompt",), ("response",)),
    "messages": (
        ("messages",),
        ("messages", 0),
        ("messages", 1),
        ("messages", 0, "role"),
        ("messages", 0, "content"),
        ("messages", 1, "content"),
        ("messages", 1, "role"),
    ),
    "label": (("text",), ("label",)),
}


def _argv(random: Random, world: World, path: Path, *, accepted: bool) -> list[str]:
    """Return a command that reads the rows; where they are refused, any that would."""
    if accepted:
        return world.evaluate("--max-new-tokens", "2", data=path)
    source = str(path)
    good = ["--data", str(world.root / "response.jsonl")]
    fresh = str(world.fresh() / "out")
    kind = random.randrange(6)
    if kind == 0:
        return world.train(Path(fresh), "--data", source)
    if kind == 1:
        option = random.choice(["--validation-data", "--eval-data"])
        return world.train(Path(fresh), *good, option, source)
    if kind == 2:
        words = ["--model", str(world.model), "--data", source, "--output-dir", fresh, "--quiet"]
        return ["compare", *words]
    if kind == 3:
        words = ["--space", "rank=1,2", "--model", str(world.model), "--data", source]
        return ["sweep", *words, "--output-dir", fresh, "--quiet"]
    return world.evaluate("--max-new-tokens", "2", data=path)


def _fault(
    random: Random, world: World, path: Path, what: str, verdict: Verdict, kind: str = "choices"
) -> Fault:
    valid = world.evaluate("--max-new-tokens", "2", data=world.root / f"{kind}.jsonl")
    return Fault(
        what=f"{path.name} ({kind}): {what}",
        argv=_argv(random, world, path, accepted=verdict != "refused"),
        verdict=verdict,
        names=(path.name,),
        valid=None if verdict in ("refused", "any") else world.result(valid),
    )


def value(random: Random, world: World) -> Fault:
    """A field of a row has a value that it must not have, or is missing."""
    kind = random.choice(list(_PLACES))
    place, (what, odd) = random.choice(_PLACES[kind]), random.choice([*ODD, ("missing", ...)])
    number, rows = random.randrange(4), list(ROWS[kind])
    rows[number] = changed(rows[number], place, odd)
    name = ".".join(map(str, place))
    path = world.fresh() / "data.jsonl"
    path.write_text("".join(dumps(row) + "\n" for row in rows))
    verdict = _verdict_of(kind, place, odd)
    return _fault(random, world, path, f"{name} of row {number + 1} is {what}", verdict, kind)


def _verdict_of(kind: str, place: tuple[Any, ...], odd: Any) -> Verdict:
    """What must become of a row with this value."""
    if isinstance(odd, Raw):
        return "refused"
    is_text = isinstance(odd, str) and "\ud800" not in odd
    if place == ("answer",):
        return "any" if odd == 0 and odd is not False else "refused"
    if place == ("label",):  # an integer is a class as well; a number may be one of pandas
        return "any" if (is_text and odd) or type(odd) in (int, float) else "refused"
    if place[-1] == "role":  # a template decides
        return "any" if is_text and place[1] == 0 else "refused"
    if place[-1] == "content":
        return "any" if is_text or odd in (None, ..., []) or isinstance(odd, list) else "refused"
    if place in (("prompt",), ("text",), ("response",)) and odd == "":
        return "any"  # an empty prompt or answer is a question of taste
    if kind == "choices" and place[0] == "choices" and len(place) == 2 and odd is ...:
        return "refused"  # one is no choice
    if kind == "messages" and place == ("messages", 1) and odd is ...:
        return "refused"  # nothing answers
    if kind == "messages" and place == ("messages", 0) and odd is ...:
        return "refused"  # nothing asks
    return "any" if is_text and odd else "refused"


_EVEN = ("blank lines", "a BOM", "CRLF", "no line feed at the end", "another order of keys")
_EVEN += ("a column that nobody reads", "nulls that nobody reads", "escaped letters", "blanks")


def harmless(random: Random, world: World) -> Fault:
    """A file is written otherwise and says the same."""
    kind = random.choice(list(ROWS))
    rows, what = ROWS[kind], random.choice(_EVEN)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if what == "blank lines":
        text = "\n" * random.randrange(1, 4) + text.replace("\n", "\n  \n\n")
    elif what == "a BOM":
        text = "\ufeff" + text
    elif what == "CRLF":
        text = text.replace("\n", "\r\n")
    elif what == "no line feed at the end":
        text = text.rstrip("\n")
    elif what == "another order of keys":
        text = "".join(json.dumps(dict(reversed(row.items()))) + "\n" for row in rows)
    elif what == "escaped letters":
        text = text.replace("film", "\\u0066ilm").replace("what", "\\u0077hat")
    elif what == "blanks":
        text = "".join(f"  {json.dumps(row, separators=(' , ', ' : '))}\t \n" for row in rows)
    else:
        more = {"zzz": None} if what.startswith("nulls") else {"id": random.randrange(99)}
        text = "".join(json.dumps({**row, **more}) + "\n" for row in rows)
    path = world.fresh() / random.choice(["data.jsonl", "data.json"])
    path.write_bytes(text.encode())
    return _fault(random, world, path, what, "same", kind)


def lines(random: Random, world: World) -> Fault:
    """JSON lines are cut, flipped or written over; a strict reader says what they hold."""
    kind = random.choice(["choices", "response"])
    data = (world.root / f"{kind}.jsonl").read_bytes()
    what, data = _damaged(random, data)
    path = world.fresh() / "data.jsonl"
    path.write_bytes(data)
    try:
        rows = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except (ValueError, RecursionError):
        rows = []
    verdict: Verdict = "same" if rows == ROWS[kind] else "any" if rows else "refused"
    return _fault(random, world, path, what, verdict, kind)


def _damaged(random: Random, data: bytes) -> tuple[str, bytes]:
    place = random.randrange(len(data))
    return random.choice(
        [
            ("cut", cut(random, data)),
            ("a bit flipped", flipped(random, data)),
            ("bits flipped", flipped(random, data, 20)),
            ("zeros in it", data[:place] + b"\0" * 8 + data[place + 8 :]),
            ("random bytes in it", data[:place] + random.randbytes(8) + data[place:]),
            ("a quote more", data[:place] + b'"' + data[place:]),
            ("a line feed more", data[:place] + b"\n" + data[place:]),
            ("a byte less", data[:place] + data[place + 1 :]),
        ]
    )


_RECORDS = ("[]", "17", "null", '"text"', "{}", "[1, 2]", "true", "{]", "{'prompt': 'a'}", "...")


def whole(random: Random, world: World) -> Fault:
    """A file is something else than rows."""
    directory, text = world.fresh(), (world.root / "choices.jsonl").read_text()
    rows = [json.dumps(row) for row in CHOICES]
    many = [
        ("empty", "data.jsonl", b""),
        ("blank lines alone", "data.jsonl", b"\n \n\t\n"),
        ("empty", "data.json", b""),
        ("empty", "data.csv", b""),
        ("empty", "data.parquet", b""),
        ("no list of rows", "data.json", b"[]"),
        ("an open list", "data.json", ("[" + ",".join(rows)).encode()),
        ("a comma at the end", "data.json", ("[" + ",".join(rows) + ",]").encode()),
        ("a list of lists", "data.json", ("[[" + ",".join(rows) + "]]").encode()),
        ("JSON that is nested too deeply", "data.json", DEEP.encode()),
        ("JSON that is nested too deeply", "data.jsonl", DEEP.encode()),
        ("JSON that is nested too deeply", "data.jsonl", b'{"prompt": ' + DEEP.encode() + b"}"),
        ("latin-1", "data.jsonl", text.replace("film", "filmé").encode("latin-1")),
        ("an LFS pointer", "data.parquet", b"version https://git-lfs.github.com/spec/v1\n"),
        ("a web page", "data.json", b"<!DOCTYPE html><html></html>"),
        ("a web page", "data.jsonl", b"<!DOCTYPE html>\n<html></html>\n"),
        ("an archive", "data.jsonl", b"PK\x03\x04" + random.randbytes(300)),
        ("a gzip that is cut", "data.jsonl.gz", gzip.compress(text.encode())[:-20]),
        ("a gzip that is flipped", "data.jsonl.gz", _flip_end(gzip.compress(text.encode()))),
        ("no gzip", "data.jsonl.gz", text.encode()),
        ("of no known kind", "data.txt", text.encode()),
        ("of no known kind", "data.xlsx", b"PK\x03\x04"),
        ("of no kind", "data", text.encode()),
    ]
    many += [(f"a line {row}", "data.jsonl", f"{text}{row}\n".encode()) for row in _RECORDS]
    many += [(f"a row {row}", "data.json", f"[{rows[0]},{row}]".encode()) for row in _RECORDS]
    what, name, data = random.choice(many)
    path = directory / name
    path.write_bytes(data)
    return _fault(random, world, path, what, "refused")


def _flip_end(data: bytes) -> bytes:
    return data[:-6] + bytes([data[-6] ^ 255]) + data[-5:]


def keys_twice(random: Random, world: World) -> Fault:
    """A row or a header names a column twice, or choices are equal."""
    row = CHOICES[3]
    key, others = random.choice(list(row)), "".join(json.dumps(row) + "\n" for row in CHOICES[:3])
    text = others + json.dumps(row)
    twice = text[:-1] + f", {json.dumps(key)}: {json.dumps(row[key])}}}\n"
    equal = others + json.dumps({**row, "choices": ["same", "same"]}) + "\n"
    cells = ',"[""x"", ""y""]",0,b\n'
    header = "prompt,choices,answer,prompt\n" + "".join(f"{n}{cells}" for n in range(4))
    what, name, data = random.choice(
        [
            (f"{key} twice", "data.jsonl", twice),
            ("equal choices", "data.jsonl", equal),
            ("a header that says prompt twice", "data.csv", header),
        ]
    )
    path = world.fresh() / name
    path.write_text(data)
    return _fault(random, world, path, what, "refused")


def table(random: Random, world: World) -> Fault:
    """A CSV file with wrong cells, or harmless ones."""
    rows = [[row["prompt"], json.dumps(row["choices"]), str(row["answer"])] for row in CHOICES]
    header, number, verdict = ["prompt", "choices", "answer"], random.randrange(4), "refused"
    what = random.choice(
        ["renamed", "less", "more", "number", "json", "quote", "empty", "zero", "BOM", "CRLF"]
    )
    if what == "renamed":
        header[random.choice([0, 2])] = "zzz"  # without choices these are prompts and responses
    elif what == "less":
        rows[number].pop()
    elif what == "more":
        rows[number] += ["zzz", "zzz"]
    elif what == "number":
        rows[number][2] = random.choice(["-1", "2", "x", "", "nan", "0.5", "9" * 5000, "1e0x"])
    elif what == "json":
        rows[number][1] = random.choice(["", "good", '["good"', "{}", '"good"', "[1, 2]", DEEP])
    elif what == "empty":
        rows[number][0] = random.choice(["", "  "])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    data = text.getvalue().encode()
    if what == "quote":
        data = data.rstrip() + b'\n"open,cell,0'
    elif what == "zero":
        verdict, data = "any", data.replace(b"film", b"fi\0lm", 1)
    elif what in ("BOM", "CRLF"):
        verdict = "same"
        data = b"\xef\xbb\xbf" + data if what == "BOM" else data.replace(b"\n", b"\r\n")
    path = world.fresh() / "data.csv"
    path.write_bytes(data)
    return _fault(random, world, path, f"{what}, row {number + 1}", verdict)


def columns(random: Random, world: World) -> Fault:
    """A Parquet file is damaged, or its columns have other types."""
    import pyarrow
    import pyarrow.parquet

    path, verdict = world.fresh() / "data.parquet", "refused"
    names = list(CHOICES[0])
    cells: dict[str, Any] = {name: [row[name] for row in CHOICES] for name in names}
    what = random.choice(["cut", "flipped", "type", "null", "missing", "none", "valid"])
    if what == "type":
        name = random.choice(names)
        wrong = random.choice([[1.5] * 4, [b"\xff"] * 4, [{"a": 1}] * 4, [True] * 4, [[[1]]] * 4])
        cells[name] = wrong
    elif what == "null":
        cells[random.choice(names)] = [None] * 4
    elif what == "missing":
        del cells[random.choice(names)]
    elif what == "none":
        cells = {name: values[:0] for name, values in cells.items()}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(cells), buffer)
    data = buffer.getvalue()
    if what == "cut":
        data = cut(random, data)
    elif what == "flipped":
        data, verdict = flipped(random, data, random.choice([1, 4])), "any"
    elif what == "valid":
        verdict = "same"
    path.write_bytes(data)
    return _fault(random, world, path, what, verdict)


def place(random: Random, world: World) -> Fault:
    """There is no readable file at the path."""
    directory, verdict = world.fresh(), "refused"
    path = directory / f"data.{random.choice(['jsonl', 'json', 'csv', 'parquet'])}"
    what = random.choice(
        [
            "nothing",
            "a directory",
            "a FIFO",
            "a device",
            "a dangling link",
            "a circle of links",
            "a link",
            "below a file",
            "a long name",
            "a socket",
            "an endless device",
        ]
    )
    if what == "a directory":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/null")
    elif what == "an endless device":
        path.symlink_to("/dev/zero")
    elif what == "a dangling link":
        path.symlink_to(directory / "gone.jsonl")
    elif what == "a circle of links":
        path.symlink_to(path)
    elif what == "a link":
        path, verdict = directory / "data.jsonl", "same"
        path.symlink_to(world.rows)
    elif what == "below a file":
        replace(directory / "file", "x")
        path = directory / "file" / path.name
    elif what == "a long name":
        path = directory / ("n" * 300 + path.suffix)
    elif what == "a socket":
        path = directory / path.name
        os.mknod(path, 0o140644)
    return _fault(random, world, path, what, verdict)


def prompts(random: Random, world: World) -> Fault:
    """The file of ``generate --input``, or the responses that a judge reads, are malformed."""
    is_judge = random.random() < 0.5
    rows: list[dict[str, Any]] = [dict(row) for row in ROWS["response"]]
    number, (what, odd) = random.randrange(4), random.choice([*ODD, ("missing", ...)])
    place = random.choice(["prompt", "response"]) if is_judge else "prompt"
    if isinstance(odd, str) and "\ud800" not in odd:
        odd, what = 17, "17"
    path = world.fresh() / "asked.jsonl"
    texts = [dumps(row) for row in rows]
    if random.random() < 0.3:
        what = "a damaged line"
        texts[number] = texts[number][: random.randrange(1, len(texts[number]))]
    else:
        texts[number] = dumps(changed(rows[number], (place,), odd))
        if not is_judge and isinstance(odd, type(...)):
            texts[number] = "{}"
    path.write_text("\n".join(texts) + "\n")
    if is_judge:
        argv = ["judge", str(world.root / "response.jsonl"), str(path), "--command", "cat"]
    else:
        argv = ["generate", "--model", str(world.model), "--input", str(path), "--quiet"]
        argv += ["--max-new-tokens", "2", "--storage", "fp32", "--device", "cpu"]
    name = "judge" if is_judge else "input"
    return Fault(
        what=f"{name} {path.name}: {place} of row {number + 1} is {what}",
        argv=argv,
        verdict="refused",
        names=(path.name,),
    )


KINDS = {
    "data: values": (value, 620),
    "data: harmless": (harmless, 120),
    "data: lines": (lines, 330),
    "data: whole files": (whole, 180),
    "data: twice": (keys_twice, 30),
    "data: CSV": (table, 130),
    "data: Parquet": (columns, 150),
    "data: paths": (place, 70),
    "data: prompts": (prompts, 120),
}
