"""TREC: what kind of thing a question asks for, six coarse classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem_reft.data.tasks.files import read_lines, refused, text_of
from lowmem_reft.data.tasks.task import Example, HubSet, LocalFiles, Task
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
_HUB_ORDER = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")


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


def convert(record: Any, place: str) -> Example:
    """Make an example of a question and its coarse label, by name or, on the hub, by number.

    Raises:
        InputError: If the record has another form.
    """
    form = '{"text": "...", "coarse_label": 0 to 5}'
    question, label = text_of(record, "text", place, form=form), record.get("label")
    if label is None:
        try:
            label = _HUB_ORDER[record["coarse_label"]]
        except (KeyError, IndexError, TypeError) as error:
            raise refused(place, form, record) from error
    name = TREC_TYPES[label]
    return Example(
        source=place,
        prompt=question,
        text=question,
        choices=_NAMES,
        answer=_NAMES.index(name),
        label=name,
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
                convert=convert,
                rule="held_out",
                train=("TREC.train",),
                test=("TREC.test",),
            ),
        ),
        hub=HubSet(
            id="CogComp/trec",
            revision="refs/convert/parquet",
            convert=convert,
            rule="held_out",
            train=("train",),
            test=("test",),
        ),
    ),
)
