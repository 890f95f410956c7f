"""Which tokens are edited, against a reference in plain Python for one prompt at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lowmem_reft import InputError
from lowmem_reft.reft.positions import (
    Positions,
    assign_groups,
    find_prompt,
    find_response,
    has_later_prompt,
    num_groups,
    packed_segments,
    parse_positions,
)

SPECS = ("f1", "f3", "l1", "l4", "f3+l3", "f1+l5", "f7+l7")
TIES = ("tied", "sides", "positions")
SPECS_AND_TIES = [
    ("all", "tied"),
    ("every", "tied"),
    ("every", "sides"),
    *(
        (spec, tie)
        for spec in (*SPECS, "response", "l1+response", "f3+l3+response")
        for tie in TIES
    ),
]


@pytest.mark.parametrize(
    ("spec", "first", "last"),
    [("f7+l7", 7, 7), ("f3", 3, 0), ("l1", 0, 1), ("f10+l2", 10, 2), (" f1+l1 ", 1, 1)],
)
def test_a_position_spec_is_parsed(spec: str, first: int, last: int) -> None:
    assert parse_positions(spec) == Positions(first=first, last=last)


def test_all_means_every_prompt_token() -> None:
    assert parse_positions("all") == Positions(prompt=True)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("response", Positions(response=True)),
        ("l1+response", Positions(last=1, response=True)),
        ("f3+l2+response", Positions(first=3, last=2, response=True)),
        ("all+response", Positions(prompt=True, response=True)),
        (" every ", Positions(prompt=True, response=True)),
    ],
)
def test_the_answer_is_a_part_of_its_own(spec: str, expected: Positions) -> None:
    assert parse_positions(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "x3",
        "f-1",
        "f0",
        "l0",
        "l",
        "f",
        "f3l3",
        "f3+",
        "+l3",
        "l3+f3",
        "f3+f3",
        "f3 + l3",
        "F3",
        "f3+l3+l1",
        "f3.5",
        "f03",
        "first3",
        "all+l1",
        "all+l1+response",
        "response+response",
        "response+l1",
        "+response",
        "l1+",
        "l1++response",
        "every+response",
        "every+l1",
        "answer",
        "all+answer",
        "3",
        None,
        7,
    ],
)
def test_a_wrong_position_spec_is_refused_with_the_grammar(spec: object) -> None:
    with pytest.raises(InputError, match=r"'all', 'fN' \(first N\), .* 'response' or 'every'"):
        parse_positions(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "tie", "count"),
    [
        ("all", "tied", 1),
        ("f3+l2", "tied", 1),
        ("f3+l2", "sides", 2),
        ("f3", "sides", 1),
        ("l2", "sides", 1),
        ("f3+l2", "positions", 5),
        ("l2", "positions", 2),
        ("every", "tied", 1),
        ("every", "sides", 2),
        ("response", "sides", 1),
        ("response", "positions", 1),
        ("f3+l2+response", "sides", 3),
        ("f3+l2+response", "positions", 6),
    ],
)
def test_the_number_of_parameter_sets(spec: str, tie: str, count: int) -> None:
    assert num_groups(parse_positions(spec), tie) == count


@pytest.mark.parametrize("tie", ["sides", "positions"])
def test_all_positions_can_only_be_tied(tie: str) -> None:
    with pytest.raises(InputError, match="tie must be 'tied' with positions='all'"):
        num_groups(parse_positions("all"), tie)


def test_each_token_of_a_whole_prompt_cannot_have_its_own_parameters() -> None:
    with pytest.raises(InputError, match="tie must be 'tied' or 'sides' with positions='every'"):
        num_groups(parse_positions("all+response"), "positions")


def test_an_unknown_tie_is_refused() -> None:
    with pytest.raises(InputError, match="tie must be one of tied, sides, positions, got 'loose'"):
        num_groups(parse_positions("f1"), "loose")


# The reference: one sample at a time.


def groups_of_one_prompt(spec: str, tie: str, length: int) -> list[int]:
    """Return the index of the φ of each of ``length`` prompt tokens, or -1."""
    if spec in ("all", "every"):
        return [0] * length
    spec = spec.removesuffix("response").removesuffix("+")
    if not spec:
        return [-1] * length
    numbers = {
        side: int(number) for side, number in [(part[0], part[1:]) for part in spec.split("+")]
    }
    first, last = numbers.get("f", 0), numbers.get("l", 0)
    if first + last <= length:
        num_first, num_last = first, last
    elif first >= length / 2 and last >= length / 2:
        num_first, num_last = length // 2, length - length // 2
    else:  # the smaller side has what it asks for, the other the rest
        num_first = first if first < length / 2 else length - last
        num_last = length - num_first
    if last == 0:
        num_first, num_last = min(first, length), 0
    result = [-1] * length
    for index in range(num_first):
        result[index] = index if tie == "positions" else 0
    for index in range(num_last):
        group = {"tied": 0, "sides": 1 if first else 0, "positions": first + last - 1 - index}[tie]
        result[length - 1 - index] = group
    return result


def group_of_a_response(spec: str, tie: str) -> int:
    """Return the index of the φ of each token of an answer, or -1."""
    if "response" not in spec and spec != "every":
        return -1
    numbers = [int(part[1:]) for part in spec.split("+") if part[0] in "fl"]
    return {"tied": 0, "sides": len(numbers) + (spec == "every"), "positions": sum(numbers)}[tie]


def test_the_sides_of_a_short_prompt_are_disjoint_and_cover_it() -> None:
    assert groups_of_one_prompt("f3+l3", "sides", 4) == [0, 0, 1, 1]
    assert groups_of_one_prompt("f3+l3", "sides", 5) == [0, 0, 1, 1, 1]
    assert groups_of_one_prompt("f1+l5", "positions", 3) == [0, 4, 5]


def random_row(
    rng: random.Random, width: int, padding: str
) -> tuple[list[int], list[int], list[int]]:
    """Return attention mask, labels, and the places of the prompt's tokens."""
    num_prompt = rng.randint(0, width)
    num_response = rng.randint(0, width - num_prompt)
    num_padding = width - num_prompt - num_response
    before = {"left": num_padding, "right": 0, "both": num_padding // 2}[padding]
    mask = [0] * before + [1] * (num_prompt + num_response) + [0] * (num_padding - before)
    labels = [-100] * width
    for place in range(before + num_prompt, before + num_prompt + num_response):
        labels[place] = rng.randint(0, 9)
    return mask, labels, list(range(before, before + num_prompt))


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize(("spec", "tie"), SPECS_AND_TIES)
def test_groups_equal_the_reference_for_prompts_of_every_length(
    spec: str, tie: str, padding: str
) -> None:
    rng = random.Random(f"{spec} {tie} {padding}")
    rows = [random_row(rng, 17, padding) for _ in range(60)]
    mask, labels = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    found = assign_groups(
        parse_positions(spec), tie, find_prompt(mask, labels), attended=mask.bool()
    )
    response = group_of_a_response(spec, tie)
    for row, (_, own, places) in enumerate(rows):
        expected = [-1 if label < 0 else response for label in own]
        for place, group in zip(places, groups_of_one_prompt(spec, tie, len(places)), strict=True):
            expected[place] = group
        assert found[row].tolist() == expected


@pytest.mark.parametrize(("spec", "tie"), SPECS_AND_TIES)
def test_groups_of_packed_samples_equal_the_reference(spec: str, tie: str) -> None:
    rng = random.Random(f"packed {spec} {tie}")
    for _ in range(20):
        mask, labels, position_ids, expected = [], [], [], []
        for _ in range(3):
            num_prompt, num_response = rng.randint(0, 9), rng.randint(1, 5)
            mask += [1] * (num_prompt + num_response)
            labels += [-100] * num_prompt + [5] * num_response
            position_ids += range(num_prompt + num_response)
            expected += groups_of_one_prompt(spec, tie, num_prompt)
            expected += [group_of_a_response(spec, tie)] * num_response
        mask, labels = [*mask, 0, 0], [*labels, -100, -100]
        position_ids, expected = [*position_ids, 0, 0], [*expected, -1, -1]
        attended = torch.tensor([mask])
        segments = packed_segments(torch.tensor([position_ids]), attended)
        prompt = find_prompt(attended, torch.tensor([labels]), segments)
        found = assign_groups(parse_positions(spec), tie, prompt, segments, attended.bool())
        assert found.tolist() == [expected]


def test_the_answer_is_what_follows_a_prompt_unsupervised_or_not() -> None:
    attended = torch.tensor([[0, 1, 1, 1, 1, 1, 0]]).bool()
    prompt = torch.tensor([[0, 0, 1, 1, 0, 0, 0]]).bool()
    response = find_response(attended, prompt)  # and not what comes before a prompt
    assert response.tolist() == [[False, False, False, False, True, True, False]]


def test_a_text_without_a_prompt_is_an_answer() -> None:
    attended = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    assert torch.equal(find_response(attended, torch.zeros_like(attended)), attended)


@pytest.mark.parametrize("spec", ["f2+l2", "l1", "f3", "all"])
def test_left_and_right_padding_edit_the_same_tokens(spec: str) -> None:
    lengths, width = [3, 6, 9], 9
    right = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    left = right.flip(1)
    parsed = parse_positions(spec)
    tie = "tied" if spec == "all" else "positions"
    groups_right = assign_groups(parsed, tie, find_prompt(right))
    groups_left = assign_groups(parsed, tie, find_prompt(left))
    for row, n in enumerate(lengths):
        assert groups_right[row, :n].tolist() == groups_left[row, width - n :].tolist()
        assert (groups_right[row, n:] == -1).all()
        assert (groups_left[row, : width - n] == -1).all()


def test_tokens_after_the_first_supervised_one_are_not_prompt() -> None:
    mask = torch.ones(1, 6, dtype=torch.long)
    prompt = find_prompt(mask, torch.tensor([[-100, -100, 7, -100, 7, -100]]))
    assert prompt.tolist() == [[True, True, False, False, False, False]]


def test_a_second_prompt_is_seen() -> None:
    mask = torch.ones(1, 4, dtype=torch.long)
    assert has_later_prompt(mask, torch.tensor([[-100, 7, -100, 7]]))


def test_an_unsupervised_tail_is_no_second_prompt() -> None:
    mask = torch.ones(1, 4, dtype=torch.long)
    assert not has_later_prompt(mask, torch.tensor([[-100, 7, 7, -100]]))


def test_padding_between_spans_is_no_second_prompt() -> None:
    mask, labels = torch.tensor([[1, 1, 0, 1]]), torch.tensor([[-100, 7, -100, 7]])
    assert not has_later_prompt(mask, labels)
    assert find_prompt(mask, labels).tolist() == [[True, False, False, False]]


def test_supervised_samples_packed_in_a_row_are_not_several_spans() -> None:
    mask = torch.ones(1, 6, dtype=torch.long)
    segments = packed_segments(torch.tensor([[0, 1, 2, 0, 1, 2]]), mask)
    labels = torch.tensor([[-100, 7, 7, -100, -100, 7]])
    assert not has_later_prompt(mask, labels, segments)
    prompt = find_prompt(mask, labels, segments)
    assert prompt.tolist() == [[True, False, False, True, True, False]]


@pytest.mark.parametrize(
    "position_ids",
    [
        None,
        torch.tensor([[0, 1, 2, 3]]),
        torch.tensor([[0, 0, 0, 1]]),  # left padding, as transformers numbers it
        torch.tensor([[[0, 1, 0, 1]]] * 3),  # one set per dimension of an image
    ],
)
def test_position_ids_that_do_not_start_again_mean_one_sample_a_row(
    position_ids: Tensor | None,
) -> None:
    assert packed_segments(position_ids, torch.tensor([[0, 0, 1, 1]])) is None
