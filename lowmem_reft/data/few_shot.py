"""Solved examples before each prompt: the base prompted, beside which training has to show.

An example is written as it is in training, template, joint and response, and parted from the next
by an empty line; in a chat it is an earlier turn of the conversation. (Brown et al., Language
Models are Few-Shot Learners, NeurIPS 2020.)
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import zip_longest
from random import Random
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.texts import asked, written
from lowmem_reft.data.tokens import encode_all_choices, encode_rows
from lowmem_reft.data.turns import of_turns
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import Joint


def draw_examples(
    rows: Sequence[Row], num: int, *, seed: int, without: Sequence[Row] = ()
) -> list[Row]:
    """Draw rows to be shown solved, in a drawn order; of rows with choices each answer alike.

    Args:
        rows: Training rows; of those that ask the same, the first counts.
        num: How many.
        seed: Of the draw.
        without: Rows whose questions are not drawn: those that are validated or tested on.

    Raises:
        InputError: There are fewer such rows.
    """
    held_out = {asked for row in without for asked in _asked_in(row)}
    different: dict[str, Row] = {}
    for row in rows:
        if not held_out & _asked_in(row):
            different.setdefault(_asked(row), row)
    if len(different) < num:
        raise InputError(
            f"few_shot must be at most {len(different)}, the different training rows that are not "
            f"validated or tested on, got {num}; lower it, or give more rows"
        )
    random = Random(seed)
    by_answer: dict[int | None, list[Row]] = defaultdict(list)
    for row in random.sample([*different.values()], len(different)):
        by_answer[row.answer].append(row)
    in_turn = [row for turn in zip_longest(*by_answer.values()) for row in turn if row is not None]
    return random.sample(in_turn[:num], num)


def separator(examples: Sequence[Row]) -> str:
    """Return the line breaks after an example, two or more: as many as no response has."""
    gap = "\n\n"
    while any(gap in (example.response or "") for example in examples):
        gap += "\n"
    return gap


def with_examples(
    rows: Sequence[Row],
    examples: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    joint: Joint,
    max_length: int,
) -> tuple[list[Row], list[int]]:
    """Put solved examples before the prompts; where they do not fit, the first are dropped.

    Args:
        rows: Rows to score, all of one kind.
        examples: What is put before each, in this order. Of chats it is every turn but system
            messages: there is one, the row's. With the template ``chat`` all are chats.
        tokenizer: The base's tokenizer.
        template: How a prompt is written, see ``tokens.encode_rows``; so are the next two.
        joint: What is put between prompt and response.
        max_length: Most tokens of examples, prompt and response (or longest choice).

    Returns:
        The rows, and how many examples each has.

    Raises:
        InputError: An example is among the rows, or of another kind than they are.
    """
    rows, examples = asked(rows, template), asked(examples, template)
    _check(rows, examples)
    gap = separator(examples)
    how: dict[str, Any] = {"template": template, "joint": joint}
    texts = []
    for example in [] if rows[0].messages else examples:
        prompt, (rest,) = written(example, tokenizer, responses=[example.response or ""], **how)
        texts.append(prompt + rest + gap)

    def after(row: Row, num: int) -> Row:
        if not row.messages:
            return replace(row, before="".join(texts[-num:]))
        num_systems = 0 if row.messages[0]["role"] == "user" else 1
        shown = [turn for example in examples[-num:] for turn in example.messages]
        turns = [turn for turn in shown if turn["role"] not in ("system", "developer")]
        start, rest = row.messages[:num_systems], row.messages[num_systems:]
        return replace(row, messages=(*start, *turns, *rest))

    found, counts = list(rows), [0] * len(rows)
    waiting = list(range(len(rows)))
    for num in range(len(examples), 0, -1):
        tried = [after(rows[index], num) for index in waiting]
        sizes = _sizes(tried, tokenizer, **how)
        for index, row, size in zip(waiting, tried, sizes, strict=True):
            if size <= max_length:
                found[index], counts[index] = row, num
        waiting = [index for index in waiting if not counts[index]]
        if not waiting:
            break
    return found, counts


def _sizes(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, **how: Any) -> list[int]:
    """Tokens of each row with its longest choice, or its response."""
    if rows[0].choices:
        by_row = encode_all_choices(rows, tokenizer, max_length=sys.maxsize, **how)
        return [max(len(each["input_ids"]) for each in row.examples) for row in by_row]
    encoded = encode_rows(rows, tokenizer, max_length=sys.maxsize, **how)
    return [len(example["input_ids"]) for example in encoded.examples]


def _check(rows: Sequence[Row], examples: Sequence[Row]) -> None:
    shown = {asked: example for example in examples for asked in _asked_in(example)}
    for row in rows:
        if (same := shown.get(_asked(row))) is not None:
            raise InputError(
                f"{row.source}: examples must hold no row that is scored, got {same.source}, which "
                "asks the same; leave it out"
            )
    for example in examples:
        if bool(example.messages) != bool(rows[0].messages):
            words = (
                "chats, as the rows are" if rows[0].messages else "no chats, as the rows are none"
            )
            raise InputError(
                f"examples must be {words}, got the {example.kind} row {example.source}; give rows "
                "like those of the training"
            )
        for row in rows if example.messages else ():
            if example.template_arguments != row.template_arguments:
                raise InputError(
                    f"{row.source}: examples must come with the tools, documents and "
                    f"chat_template_kwargs of the rows, got {example.template_arguments} in "
                    f"{example.source}; leave it out"
                )


def _asked(row: Row) -> str:
    """What a row asks, without what is right; a chat's system message is not part of it.

    White space at the ends of texts is none of it, nor is the order of choices.
    """
    turns = [turn for turn in row.prompt_messages if turn["role"] not in ("system", "developer")]
    texts = [(text or "").strip() for text in (row.prompt, row.text_pair)]
    return json.dumps([*texts, turns, sorted(row.choices or ())], sort_keys=True, default=str)


def _asked_in(row: Row) -> set[str]:
    """What is asked in a row: of a chat in every turn, since its answers are shown."""
    return {_asked(part) for part in of_turns([row], "all")} | {_asked(row)}
