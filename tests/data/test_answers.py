"""What counts as the answer in generated text: hard cases, one by one."""

from __future__ import annotations

import pytest

from lowmem_reft.data.tasks.answers import EXTRACTORS, answers_equal

NUMBERS = {
    "The answer is 42.": "42",
    "She pays 1,234.50 in all": "1234.5",
    "The total is $18.00.": "18",
    "the three are 1, 2, 3": "3",
    "1,2,3": "3",
    "1,234,567": "1234567",
    "in 2019, 500 people came": "500",
    "Rs. 1,00,000": "100000",
    "It costs 1.234,50 euros": "1234.5",
    "1{,}234": "1234",
    "about 1\u202f234 km": "1234",
    "12 000 people": "12000",
    "-5": "-5",
    "the temperature is \u22125 degrees": "-5",
    "it fell to -3 degrees": "-3",
    "it fell to \u20133 degrees": "-3",
    "7 - 10 = -3": "-3",
    "x = - 5": "-5",
    "(-5)": "-5",
    "5-(-3)": "-3",
    "**-7**": "-7",
    "-$5": "-5",
    "$-5": "-5",
    "10-4": "4",
    "10 - 4": "4",
    "so 5 -3": "3",
    "pages 5\u201310": "10",
    "- 5 apples": "5",
    "The rest \u2014 5 apples": "5",
    "a boeing-747": "747",
    "42 apples and no more": "42",
    "5km": "5",
    "the 12th": "12",
    "42 cm^2": "42",
    "42 m\u00b2": "42",
    "7 cubic cm3": "7",
    "5 molecules of H2O": "5",
    "Let x1 be what is asked: 9": "9",
    "50%": "50",
    "US$ 20": "20",
    "\u20ac1.5": "1.5",
    "\u00a33": "3",
    "Rs.500": "500",
    "USD50": "50",
    "2.5 million": "2500000",
    "1.5e3": "1500",
    "5e-3": "0.005",
    "3 \u00d7 10^5": "300000",
    r"3 \times 10^{5}": "300000",
    "10^3": "1000",
    "1/2": "0.5",
    "3 1/2": "3.5",
    "3\u00bd": "3.5",
    "-1/2": "-0.5",
    "48/2 = 24": "24",
    r"\frac{3}{4}": "0.75",
    r"-\frac{1}{2}": "-0.5",
    r"\boxed{12} because 3 and 4 give 12, as 3": "12",
    r"\boxed{42\text{ cm}^2}": "42",
    r"$\boxed{\dfrac{3}{4}}$": "0.75",
    r"first \boxed{1}, then \boxed{2}": "2",
    "9 * 2 = <<9*2=18>>18\n#### 18\n\nQuestion: 7 eggs": "18",
    "#### Step 1\nadd 2\n#### Answer\n5": "5",
    "#### -1,200": "-1200",
    "on 12/25/2020": "2020",
    "cost is .5": "0.5",
    "done.42": "42",
    "3.0": "3",
    "007": "7",
    "-0": "0",
    "a double dash --5": "5",
    "no number": None,
    "": None,
    "1/0": None,
    "1e9999": None,
    "9" * 5000: None,
}

LETTERS = {
    "B": "B",
    "e": "E",
    "(B) 61 m": "B",
    "B) 61 m": "B",
    "C. 62": "C",
    "D: none of these": "D",
    "A 60 m": "A",
    "(b)": "B",
    "The answer is (D).": "D",
    "The answer is D and not E": "D",
    "The answer is A because 5 is less": "A",
    "the answer is a.": "A",
    "the answer is a number": None,
    "Answer: B": "B",
    "Answer = E": "E",
    "Ans: C": "C",
    "Answer: A train needs an hour": None,
    "The answer is **B**": "B",
    "The answer is:\n(C)": "C",
    "The answer is therefore option C": "C",
    "the correct option is B": "B",
    "The answer must be D.": "D",
    "The answer is not B but (C)": "C",
    "First the answer is (A). No: the answer is (B).": "B",
    "The answer is 62 m, which is (C)": "C",
    "I compare (A) with (B), so (C)": "C",
    "Hence, option E is correct": "E",
    r"\boxed{B}": "B",
    r"\boxed{\text{(D) } 61}": "D",
    "Answer Choices: (A) 60 (B) 61 (C) 62 (D) 63 (E) 64": None,
    "Answer Choices: (A) 60 (B) 61 The answer is (B)": "B",
    "A train travels at 60 km/h": None,
    "A train travels, so it is (C)": "C",
    "Let A be 5. So I choose C": "C",
    "E = mc^2, hence the answer is B": "B",
    "ABCDE": None,
    "": None,
}

TRUTHS = {
    "true": "true",
    "the correct answer is true": "true",
    "False.": "false",
    "It is not true": "false",
    "That isn't true": "false",
    "not false": "true",
    "Answer format: true/false\n\nthe correct answer is false": "false",
    "True or false? The statement is true": "true",
    "false\n\nthe next question is true": "false",
    "It may be true, but the correct answer is false": "false",
    "untrue": None,
    "yes": None,
    "": None,
}

WORDS = {
    "the correct answer is solution1": "solution1",
    "Solution 2": "solution2",
    "ending3": "ending3",
    "option 1.": "option1",
    "the correct answer is answer2\n\nPlease choose ... the correct answer is answer4": "answer2",
    "Answer format: answer1/answer2/answer3\n\nanswer3": "answer3",
    "Answer1: a dog Answer2: a cat. I choose answer2": "answer2",
    "answer2: a cat": "answer2",
    "Answer1: a dog Answer2: a cat": None,
    "answer1 looks right, but the correct answer is answer3": "answer3",
    "The correct answer is: **option2**": "option2",
    "answer12": None,
    "the correct answer is 2": None,
    "": None,
}

CASES = [
    (name, text, answer)
    for name, cases in (
        ("number", NUMBERS),
        ("option_letter", LETTERS),
        ("true_false", TRUTHS),
        ("choice_word", WORDS),
    )
    for text, answer in cases.items()
]


@pytest.mark.parametrize(("name", "text", "answer"), CASES, ids=[repr(c[1][:40]) for c in CASES])
def test_the_answer_is_found_as_a_person_reads_it(name: str, text: str, answer: str | None) -> None:
    assert EXTRACTORS[name](text) == answer


@pytest.mark.parametrize(
    ("kind", "first", "second", "equal"),
    [
        ("number", "18", "18.0", True),
        ("number", "18.0009", "18", True),
        ("number", "18.002", "18", False),
        ("number", "-5", "5", False),
        ("number", None, "5", False),
        ("number", None, None, False),
        ("option_letter", "B", "b", True),
        ("choice_word", "answer1", "answer2", False),
        (None, "A  long\nanswer", "a long answer", True),
    ],
)
def test_answers_are_equal_within_a_tolerance_and_but_for_case(
    kind: str | None, first: str | None, second: str | None, equal: bool
) -> None:
    assert answers_equal(kind, first, second) is equal
