"""The lengths of a data file, read as ``train`` reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.cutting import encode_those_that_fit
from lowmem_reft.data.rows import as_choices, label_names, load_rows
from lowmem_reft.data.tokens import EncodedRows, encode_labelled, encode_rows
from lowmem_reft.data.turns import of_turns
from lowmem_reft.errors import InputError
from lowmem_reft.memory.command import train_name
from lowmem_reft.methods.card import merge_card, with_template
from lowmem_reft.options import ModelOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.row import Row
    from lowmem_reft.options import PlanOptions


def longest_of(examples: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the tokens, and the supervised ones, to plan for: the most that any example has."""
    return (
        max(len(example["input_ids"]) for example in examples),
        max(_num_supervised(example["labels"]) for example in examples),
    )


def _num_supervised(labels: Any) -> int:
    """Return the supervised tokens of an example; a class label counts as one."""
    return sum(label != IGNORED_LABEL for label in labels) if isinstance(labels, list) else 1


def read_examples(options: PlanOptions, config: Any) -> tuple[list[dict[str, Any]], int | None]:
    """Return the rows of ``--data`` as tokens, and the labels of a classification head.

    Raises:
        InputError: A row or the template is wrong, or the model has no tokenizer.
    """
    given, prompts, task_type = options.rows, options.rows.prompts, options.shape.task_type
    name = train_name(options.shape.model)
    card = merge_card(
        None,
        ModelOptions(model=name, task_type=task_type),
        template=given.template,
        max_length=given.max_length,
        raw=prompts.raw,
        joint=prompts.joint,
    )
    rows = of_turns(load_rows(given.data, split=given.split, limit=given.limit), prompts.turns)
    kind = rows[0].kind
    if (task_type == "SEQ_CLS") != (kind in ("label", "target")) and kind != "label":
        wanted = "text, label or text, target" if task_type == "SEQ_CLS" else "other"
        raise InputError(
            f"data must hold {wanted} rows for task_type {task_type}, got {kind} rows; convert "
            "them or change the task type"
        )
    names = label_names(rows) if kind == "label" else None
    tokenizer = load_tokenizer(name, config=config)
    card = with_template(card, tokenizer)

    def encode(some: Sequence[Row]) -> EncodedRows:
        if task_type == "SEQ_CLS":
            return encode_labelled(
                some,
                tokenizer,
                max_length=card.max_length,
                label_names=names,
                long_rows=prompts.long_rows,
            )
        some = as_choices(some, names)
        return encode_rows(some, tokenizer, **card.prompts, long_rows=prompts.long_rows)

    _, encoded = encode_those_that_fit(rows, encode, long_rows=prompts.long_rows)
    labels = None if task_type != "SEQ_CLS" else (1 if names is None else len(names))
    return encoded.examples, labels
