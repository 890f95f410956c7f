"""Training, validation and test rows of a task that share no input, from what is public.

An input that is in two of a set's public splits (MAWPS and CoLA have some) stays in the test rows,
or else in the validation rows, and leaves the others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from lowmem_reft.data.rows import Row, holdout
from lowmem_reft.data.tasks.task import SPLITS, Example, Rule, Split

SEED = 42
"""Draws the half of GLUE's validation rows that chooses; the same for every method and seed."""
NUM_TAIL = 300
"""Training rows of GSM8K that the paper validates on."""
NUM_LARGE, NUM_CHOOSING = 5_000, 1_000
"""Of more validation rows than that, this many choose, as in the paper's code."""


def divide(
    public: Mapping[Split, Sequence[Example]], rule: Rule
) -> tuple[dict[Split, list[Example]], int]:
    """Make the three splits of the public ones.

    Args:
        public: Examples by public split.
        rule: How validation rows are made (``task.RULES``).

    Returns:
        Examples by split, without those that cannot be had, in the order of the files; and how many
        training and validation rows were left out because validation or test hold the same.
    """
    rows: dict[Split, list[Example]] = {name: list(examples) for name, examples in public.items()}
    if rule == "halved" and "validation" in rows:
        rows["validation"], rows["test"] = _halves(rows["validation"])
    if rule == "tail" and len(rows.get("train", ())) > NUM_TAIL:
        rows["train"], rows["validation"] = rows["train"][:-NUM_TAIL], rows["train"][-NUM_TAIL:]
    if rule == "held_out_twice" and "train" in rows:
        rows["train"], rows["test"] = _held_out(rows["train"])
    if rule in ("held_out", "held_out_twice") and "train" in rows:
        rows["train"], rows["validation"] = _held_out(rows["train"])
    num_before = sum(map(len, rows.values()))
    seen: set[tuple[str, ...]] = set()
    for name in reversed(SPLITS):
        if name in rows:
            rows[name] = [example for example in rows[name] if _input(example) not in seen]
            seen.update(map(_input, rows[name]))
    return rows, num_before - sum(map(len, rows.values()))


def _halves(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(Those that choose, those to test on), each in their order."""
    num_choosing = NUM_CHOOSING if len(examples) > NUM_LARGE else len(examples) // 2
    indices = list(range(len(examples)))
    random.Random(SEED).shuffle(indices)
    sides = sorted(indices[:num_choosing]), sorted(indices[num_choosing:])
    choosing, others = ([examples[index] for index in side] for side in sides)
    return choosing, others


def _held_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(Kept, held out) by a hash of the inputs, so that equal ones land on one side."""
    rows = [
        Row(source=str(index), prompt="\t".join(_input(example)))
        for index, example in enumerate(examples)
    ]
    kept, held_out = ([examples[int(row.source)] for row in side] for side in holdout(rows))
    return kept, held_out


def _input(example: Example) -> tuple[str, ...]:
    """What a model is given, but for white space."""
    return tuple(" ".join(text.split()) for text in (example.text, example.text_pair or ""))
