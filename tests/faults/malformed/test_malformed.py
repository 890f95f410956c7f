"""No malformed input is accepted, ends in a traceback or hangs; what is harmless changes nothing.

``pytest -m faults tests/faults/malformed`` gives all of them; a part is always run. An input of a
failing test is made again by its kind and number: ``MALFORMED='data: values 17' pytest ...``.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from random import Random

import pytest

from malformed import adapters, data, models, options, runs
from malformed.fault import judge, run
from malformed.world import World

KINDS = {**data.KINDS, **options.KINDS, **models.KINDS, **adapters.KINDS, **runs.KINDS}
PART = 20
"""Inputs of a test; each has a part of its own, so that several processes share the work."""
CHUNKS = [
    (kind, start, min(start + PART, count))
    for kind, (_, count) in KINDS.items()
    for start in range(0, count, PART)
]


def outcomes(
    world: World, kind: str, numbers: range, record_property: pytest.FixtureRequest
) -> list[str]:
    """Run inputs, count what became of them, and return those that went wrong, in words."""
    make, counts, wrong = KINDS[kind][0], Counter[str](), []
    for number in numbers:
        fault = make(Random(f"{kind} {number}"), world)
        outcome, why = judge(fault, run(fault.argv, fault.stdin))
        counts[outcome] += 1
        if outcome != "right":
            words = shlex.join(fault.argv)
            wrong.append(f"[{kind} {number}] {outcome}: {fault.what}: {why}\n    {words:.600}")
    record_property(kind, {"inputs": len(numbers), **counts})
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_malformed_inputs_of_every_kind_are_refused_in_one_line(kind, world, record_property):
    wrong = outcomes(world, kind, range(2), record_property)
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "start", "end"), CHUNKS)
def test_malformed_inputs_are_refused_in_one_line_and_harmless_ones_change_nothing(
    kind, start, end, world, record_property
):
    wrong = outcomes(world, kind, range(start, end), record_property)
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.faults
@pytest.mark.skipif("MALFORMED" not in os.environ, reason="runs the input that MALFORMED names")
def test_the_input_that_was_named(world, record_property):
    kind, _, number = os.environ["MALFORMED"].rpartition(" ")
    wrong = outcomes(world, kind, range(int(number), int(number) + 1), record_property)
    assert not wrong, "\n" + "\n".join(wrong)
