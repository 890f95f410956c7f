"""Instruction following in Alpaca's form: a response to an instruction, with or without input.

No measure of quality comes with the rows. The metric is the held-out loss, for which nothing is
generated; ``overlap`` says how much of the reference's wording a response shares, and ``judge``
compares the responses of two models.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lowmem_reft.data.tasks.arithmetic import INSTRUCTION_TEMPLATE
from lowmem_reft.data.tasks.converters import converter, text_of
from lowmem_reft.data.tasks.task import HubSet, LocalFiles, Task


def _instruction(record: Any) -> dict[str, Any]:
    """Find the response; an input follows the instruction under Alpaca's heading for it."""
    instruction, response = text_of(record, "instruction"), text_of(record, "output")
    given = str.strip(record.get("input") or "")
    prompt = f"{instruction}\n\n### Input:\n{given}" if given else instruction
    return {"prompt": prompt, "response": response}


_source: dict[str, Any] = {
    "convert": converter('{"instruction": "...", "input": "", "output": "..."}', _instruction),
    "rule": "held_out_twice",
}
_task = partial(
    Task,
    family="instruction",
    template=INSTRUCTION_TEMPLATE,
    metric="loss",
    scoring="likelihood",
    max_new_tokens=512,
)

TASKS = (
    _task(
        name="alpaca",
        about="52k instructions and responses of a language model, cleaned: "
        "what the paper trains on",
        local=(
            LocalFiles(
                directories=("alpaca", "ft-training_set"),
                train=("alpaca_data_cleaned.json",),
                **_source,
            ),
        ),
        hub=HubSet(id="yahma/alpaca-cleaned", train=("train",), **_source),
    ),
    _task(
        name="ultrafeedback1k",
        about="1,000 instructions with the responses that were rated best: the paper's small set",
        local=(
            LocalFiles(
                directories=("ultrafeedback_1k",), train=("ultrafeedback_1k.json",), **_source
            ),
        ),
    ),
)
