"""Arithmetic word problems: AQuA, GSM8K, MAWPS, SVAMP, and LLM-Adapters' training mix for them.

LLM-Adapters' test files hold a model's reasoning, which is often wrong, beside the right answer;
the response here is the right answer alone: "The answer is 8." The paper trains on ``math10k``,
whose reasoning was kept where it came to the right answer, and tests on each set.
"""

from __future__ import annotations

from typing import Any

from lowmem_reft.data.tasks.answers import number
from lowmem_reft.data.tasks.files import read_json, refused, text_of
from lowmem_reft.data.tasks.task import Example, HubSet, LocalFiles, Task

INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
"""Alpaca's, for an instruction without input; the paper's for arithmetic and instructions."""

_GSM8K_TEMPLATE = (
    "{prompt}\nAnswer the above question. First think step by step and then answer the final "
    "number.\n"
)
_FORM = '{"instruction": "...", "answer": "8.0"}'
_AQUA_FORM = '{"instruction": "... Answer Choices: (A) 21 (B) 22 ...", "answer": "B"}'
_GSM8K_FORM = '{"question": "...", "answer": "... #### 8"}'
_MAWPS_FORM = '{"original_text": "...", "equation": "X=3+5", "ans": 8.0}'
_MIX_FORM = '{"instruction": "...", "output": "...", "answer": "8.0"}'


def convert_number(record: Any, place: str) -> Example:
    """Check a problem whose answer is a number: LLM-Adapters' form, or SVAMP's own.

    Raises:
        InputError: If it has another form.
    """
    if isinstance(record, dict) and "Body" in record:
        body, question = (text_of(record, name, place, form=_FORM) for name in ("Body", "Question"))
        # Some bodies of SVAMP end without a full stop.
        problem = f"{body} {question}" if body[-1] in ".,?!" else f"{body}. {question}"
        answer = number(str(record.get("Answer")))
    else:
        problem = text_of(record, "instruction", place, form=_FORM)
        answer = number(text_of(record, "answer", place, form=_FORM))
    if answer is None:
        raise refused(place, _FORM, record)
    return _example(place, problem, f"The answer is {answer}.")


def convert_aqua(record: Any, place: str) -> Example:
    """Check a problem with options A to E: LLM-Adapters' form, or AQuA's own.

    Raises:
        InputError: If it has another form.
    """
    if isinstance(record, dict) and "options" in record:
        question = text_of(record, "question", place, form=_AQUA_FORM)
        reasoning = f"{text_of(record, 'rationale', place, form=_AQUA_FORM)}\n"
        answer = text_of(record, "correct", place, form=_AQUA_FORM)
        options = " ".join(f"({str(option).replace(')', ') ', 1)}" for option in record["options"])
        question = f"{question} Answer Choices: {options}"
    else:
        question = text_of(record, "instruction", place, form=_AQUA_FORM)
        answer, reasoning = text_of(record, "answer", place, form=_AQUA_FORM), ""
    if answer not in ("A", "B", "C", "D", "E") or f"({answer})" not in question:
        raise refused(place, _AQUA_FORM, record)
    return _example(place, question, f"{reasoning}The answer is ({answer}).")


def convert_gsm8k(record: Any, place: str) -> Example:
    """Check a problem of GSM8K; as in the paper, "The final answer is:" stands for the hash marks.

    Raises:
        InputError: If it has another form.
    """
    question = text_of(record, "question", place, form=_GSM8K_FORM)
    reasoning, mark, answer = text_of(record, "answer", place, form=_GSM8K_FORM).rpartition("####")
    if not mark or number(answer) is None:
        raise refused(place, _GSM8K_FORM, record)
    return _example(place, question, f"{reasoning}The final answer is: {answer.strip()}")


def convert_mawps(record: Any, place: str) -> Example:
    """Check a problem of MAWPS with the equation that solves it.

    Raises:
        InputError: If it has another form.
    """
    problem = text_of(record, "original_text", place, form=_MAWPS_FORM)
    equation = text_of(record, "equation", place, form=_MAWPS_FORM)
    answer = number(str(record.get("ans")))  # in some rows it is a text
    if answer is None:
        raise refused(place, _MAWPS_FORM, record)
    return _example(place, problem, f"{equation}\nThe answer is {answer}.")


def convert_mix(record: Any, place: str) -> Example:
    """Check a problem of the training mix: the response is the reasoning as it stands.

    Raises:
        InputError: If it has another form.
    """
    problem = text_of(record, "instruction", place, form=_MIX_FORM)
    return _example(place, problem, text_of(record, "output", place, form=_MIX_FORM))


def _example(place: str, problem: str, response: str) -> Example:
    return Example(source=place, prompt=problem, text=problem, response=response)


TASKS = (
    Task(
        name="math10k",
        family="arithmetic",
        about="word problems with right reasoning: what the paper trains on",
        template=INSTRUCTION_TEMPLATE,
        metric="accuracy",
        scoring="generation",
        answer="number_or_letter",
        max_new_tokens=512,
        local=(
            LocalFiles(
                directories=("math_10k", "ft-training_set"),
                read=read_json,
                convert=convert_mix,
                rule="held_out",
                train=("math_10k.json",),
            ),
        ),
    ),
    Task(
        name="aqua",
        family="arithmetic",
        about="algebra word problems with five options",
        template=INSTRUCTION_TEMPLATE,
        metric="accuracy",
        scoring="generation",
        answer="option_letter",
        max_new_tokens=512,
        local=(
            LocalFiles(
                directories=("AQuA", "llm-adapters-AQuA"),
                read=read_json,
                convert=convert_aqua,
                rule="own",
                train=("train.json",),
                validation=("dev.json",),
                test=("test.json",),
            ),
        ),
        hub=HubSet(
            id="deepmind/aqua_rat",
            config="raw",
            convert=convert_aqua,
            rule="own",
            train=("train",),
            validation=("validation",),
            test=("test",),
        ),
    ),
    Task(
        name="gsm8k",
        family="arithmetic",
        about="grade-school word problems of several steps",
        template=_GSM8K_TEMPLATE,
        metric="accuracy",
        scoring="generation",
        answer="number",
        max_new_tokens=256,
        local=(
            LocalFiles(
                directories=("gsm8k",),
                read=read_json,
                convert=convert_gsm8k,
                rule="tail",
                train=("train.jsonl",),
                test=("test.jsonl",),
            ),
            LocalFiles(  # LLM-Adapters'
                directories=("gsm8k",),
                read=read_json,
                convert=convert_number,
                rule="tail",
                train=("train.json",),
                test=("test.json",),
            ),
        ),
        hub=HubSet(
            id="openai/gsm8k",
            config="main",
            convert=convert_gsm8k,
            rule="tail",
            train=("train",),
            test=("test",),
        ),
    ),
    Task(
        name="mawps",
        family="arithmetic",
        about="short word problems with their equations",
        template=INSTRUCTION_TEMPLATE,
        metric="accuracy",
        scoring="generation",
        answer="number",
        max_new_tokens=512,
        local=(
            LocalFiles(
                directories=("mawps",),
                read=read_json,
                convert=convert_mawps,
                rule="own",
                train=("trainset.json",),
                validation=("validset.json",),
                test=("testset.json",),
            ),
            LocalFiles(  # LLM-Adapters', made from testset.json
                directories=("mawps",),
                read=read_json,
                convert=convert_number,
                rule="own",
                train=("train.json",),
                test=("test.json",),
            ),
        ),
    ),
    Task(
        name="svamp",
        family="arithmetic",
        about="short word problems, varied so that shortcuts fail",
        template=INSTRUCTION_TEMPLATE,
        metric="accuracy",
        scoring="generation",
        answer="number",
        max_new_tokens=512,
        local=(
            LocalFiles(
                directories=("SVAMP", "llm-adapters-SVAMP"),
                read=read_json,
                convert=convert_number,
                rule="held_out",
                train=("train.json",),
                test=("test.json",),
            ),
        ),
        # The paper tests on all 1,000 rows.
        hub=HubSet(
            id="ChilleD/SVAMP", convert=convert_number, rule="held_out", test=("train", "test")
        ),
    ),
)
