"""Instruction following in Alpaca's form: a response to an instruction, with or without input.

No measure of quality comes with the rows: beside the held-out loss, ``overlap`` says how much of
the reference's wording a response shares, and ``judge`` compares the responses of two models.
"""

from __future__ import annotations

from typing import Any

from lowmem_reft.data.tasks.arithmetic import INSTRUCTION_TEMPLATE
from lowmem_reft.data.tasks.files import read_json, refused, text_of
from lowmem_reft.data.tasks.task import Example, HubSet, LocalFiles, Task

_FORM = '{"instruction": "...", "input": "", "output": "..."}'


def convert(record: Any, place: str) -> Example:
    """Check a record; an input follows the instruction under Alpaca's heading for it.

    Raises:
        InputError: If it has another form.
    """
    instruction = text_of(record, "instruction", place, form=_FORM)
    response = text_of(record, "output", place, form=_FORM)
    given = record.get("input") or ""
    if not isinstance(given, str):
        raise refused(place, _FORM, record)
    if given.strip():
        instruction = f"{instruction}\n\n### Input:\n{given.strip()}"
    return Example(source=place, prompt=instruction, text=instruction, response=response)


def _task(name: str, about: str, directories: tuple[str, ...], file: str, hub: str | None) -> Task:
    return Task(
        name=name,
        family="instruction",
        about=about,
        template=INSTRUCTION_TEMPLATE,
        metric="overlap",
        scoring="generation",
        max_new_tokens=512,
        local=(
            LocalFiles(
                directories=directories,
                read=read_json,
                convert=convert,
                rule="held_out_twice",
                train=(file,),
            ),
        ),
        hub=None
        if hub is None
        else HubSet(id=hub, convert=convert, rule="held_out_twice", train=("train",)),
    )


TASKS = (
    _task(
        "alpaca",
        "52k instructions and responses of a language model, cleaned: what the paper trains on",
        ("alpaca", "ft-training_set"),
        "alpaca_data_cleaned.json",
        "yahma/alpaca-cleaned",
    ),
    _task(
        "ultrafeedback1k",
        "1,000 instructions with the responses that were rated best: the paper's small set",
        ("ultrafeedback_1k",),
        "ultrafeedback_1k.json",
        None,
    ),
)
