"""Records become examples; one that does not look as it must is refused with its line.

A converter is made of the form that a record must have, as the message says it, and of a function
that finds an ``Example``'s fields in one. Whatever such a function stumbles over is a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from reprlib import repr as shortened
from typing import Any

from lowmem_reft.data.tasks.task import Convert, Example
from lowmem_reft.errors import InputError

Fields = Callable[[Any], dict[str, Any]]
"""Finds the fields of an ``Example``, but for its source, in an unchecked record."""


@contextmanager
def refusing(record: Any, place: str, form: str) -> Iterator[None]:
    """Refuse the record where the block does not find in it what it looks for.

    Raises:
        InputError: Names the place (``file:line``), the form and the record.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{place}: a row must be {form}, got {shortened(record)}; correct it or give the "
            "public file"
        ) from error


def converter(form: str, fields: Fields) -> Convert:
    """Return what makes examples of records of this form."""

    def convert(record: Any, place: str) -> Example:
        with refusing(record, place, form):
            return Example(source=place, **fields(record))

    return convert


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Return the text in a column, without white space around it.

    Raises:
        TypeError: It is no text, or the record no mapping.
        ValueError: It is empty.
    """
    text = str.strip(record[name])
    if not text:
        raise ValueError(f"{name} is empty")
    return text


def classified(
    words: Mapping[str, str],
    columns: tuple[str, ...],
    values: Mapping[Any, int] | None = None,
    *,
    prompt: str = "{}",
    form: str | None = None,
) -> Convert:
    """Return what makes examples of records with one or two texts and a class.

    Args:
        words: What a causal model chooses, by name of the class, in the order of their indices.
        columns: Those of the texts, then the class's.
        values: Index of the class that each value of its column means; None: it is the index.
        prompt: How the texts are written for a causal model, ``{}`` for each.
        form: How the message describes a record; None: by columns and values.
    """
    *texts, label = columns
    indices = {index: index for index in range(len(words))} if values is None else values
    wanted = f"{', '.join(columns)}, the last {' or '.join(map(str, indices))}"

    def fields(record: Any) -> dict[str, Any]:
        value = record[label]
        if isinstance(value, bool | float):  # equal to an index, but none
            raise TypeError(f"{label} is no index")
        index = indices[value]
        return {
            **written(record, texts, prompt),
            "choices": tuple(words.values()),
            "answer": index,
            "label": tuple(words)[index],
        }

    return converter(form or wanted, fields)


def written(record: Mapping[str, Any], columns: list[str], prompt: str) -> dict[str, Any]:
    """Return the fields of one text or of a pair: apart for a classifier, and in one prompt."""
    texts = [text_of(record, name) for name in columns]
    return {
        "prompt": prompt.format(*texts),
        **dict(zip(("text", "text_pair"), texts, strict=False)),
    }
