"""TREC: what kind of thing a question asks for, six coarse classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_reft.data.tasks.converters import classified
from lowmem_reft.data.tasks.files import read_lines
from lowmem_reft.data.tasks.task import Convert, HubSet, LocalFiles, Task
from lowmem_reft.errors import InputError

TREC_TYPES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
_NAMES = tuple(TREC_TYPES.values())
_HUB_ORDER = ("abbreviation", "entity", "description", "human", "location", "number")


def read_trec(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (``file:line``, question and coarse label) of lines ``LABEL:detail question``, Latin-1.

    Raises:
        InputError: If a line is of another form.
    """
    for place, line in read_lines(path, encoding="latin-1"):
        label, _, question = line.partition(" ")
        coarse = label.partition(":")[0]
        if coarse not in TREC_TYPES or not question.strip():
            raise InputError(
                f"{place}: a line must be 'LABEL:detail question' with LABEL one of "
                f"{', '.join(TREC_TYPES)}, got {line!r}; give the public file"
            )
        yield place, {"text": question, "label": coarse}


def _convert(column: str, values: Mapping[Any, str]) -> Convert:
    """Return the converter of records whose types are written with these values."""
    return classified(
        dict(zip(_NAMES, _NAMES, strict=True)),
        ("text", column),
        {value: _NAMES.index(name) for value, name in values.items()},
        form='{"text": "...", "coarse_label": 0 to 5}',
    )


TASKS = (
    Task(
        name="trec",
        family="classification",
        about="what kind of thing a question asks for, of six",
        template="Question: {prompt}\nType:",
        metric="accuracy",
        scoring="likelihood",
        max_new_tokens=8,
        labels=_NAMES,
        local=(
            LocalFiles(
                directories=("trec",),
                read=read_trec,
                convert=_convert("label", TREC_TYPES),
                rule="held_out",
                train=("TREC.train",),
                test=("TREC.test",),
            ),
        ),
        hub=HubSet(
            id="CogComp/trec",
            revision="refs/convert/parquet",
            convert=_convert("coarse_label", dict(enumerate(_HUB_ORDER))),
            rule="held_out",
            train=("train",),
            test=("test",),
        ),
    ),
)
