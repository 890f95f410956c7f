"""Arithmetic word problems: AQuA, GSM8K, MAWPS, SVAMP, and LLM-Adapters' training mix for them.

LLM-Adapters' test files hold a model's reasoning, which is often wrong, beside the right answer;
the response here is the right answer alone: "The answer is 8." The paper trains on ``math10k``,
whose reasoning was kept where it came to the right answer, and tests on each set.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lowmem_reft.data.tasks.answers import number
from lowmem_reft.data.tasks.converters import converter, text_of
from lowmem_reft.data.tasks.task import HubSet, LocalFiles, Task

INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
"""Alpaca's, for an instruction without input; the paper's for arithmetic and instructions."""


def _digits(text: str) -> str:
    found = number(text)
    if found is None:
        raise ValueError(f"no number is in {text!r}")
    return found


def _with_number(record: Any) -> dict[str, Any]:
    """A problem whose answer is a number: LLM-Adapters' form, or SVAMP's own."""
    if "Body" in record:
        body, question = text_of(record, "Body"), text_of(record, "Question")
        # Some bodies of SVAMP end without a full stop.
        problem = f"{body} {question}" if body[-1] in ".,?!" else f"{body}. {question}"
        answer = str(record.get("Answer"))
    else:
        problem, answer = text_of(record, "instruction"), text_of(record, "answer")
    return {"prompt": problem, "response": f"The answer is {_digits(answer)}."}


def _aqua(record: Any) -> dict[str, Any]:
    """A problem with options A to E: LLM-Adapters' form, or AQuA's own."""
    if "options" in record:
        options = " ".join(f"({str(option).replace(')', ') ', 1)}" for option in record["options"])
        question = f"{text_of(record, 'question')} Answer Choices: {options}"
        reasoning, answer = f"{text_of(record, 'rationale')}\n", text_of(record, "correct")
    else:
        question, reasoning = text_of(record, "instruction"), ""
        answer = text_of(record, "answer")
    if answer not in ("A", "B", "C", "D", "E") or f"({answer})" not in question:
        raise ValueError(f"there is no option {answer}")
    return {"prompt": question, "response": f"{reasoning}The answer is ({answer})."}


def _gsm8k(record: Any) -> dict[str, Any]:
    """As in the paper, "The final answer is:" stands for the hash marks."""
    reasoning, mark, answer = text_of(record, "answer").rpartition("####")
    if not mark or number(answer) is None:
        raise ValueError("no number is after hash marks")
    response = f"{reasoning}The final answer is: {answer.strip()}"
    return {"prompt": text_of(record, "question"), "response": response}


def _mawps(record: Any) -> dict[str, Any]:
    """A problem with the equation that solves it."""
    answer = _digits(str(record.get("ans")))  # in some rows it is a text
    response = f"{text_of(record, 'equation')}\nThe answer is {answer}."
    return {"prompt": text_of(record, "original_text"), "response": response}


def _mix(record: Any) -> dict[str, Any]:
    """A problem of the training mix, whose reasoning is the response as it stands."""
    return {"prompt": text_of(record, "instruction"), "response": text_of(record, "output")}


_number_converter = converter('{"instruction": "...", "answer": "8.0"}', _with_number)
_aqua_converter = converter(
    '{"instruction": "... Answer Choices: (A) 21 (B) 22 ...", "answer": "B"}', _aqua
)
_gsm8k_converter = converter('{"question": "...", "answer": "... #### 8"}', _gsm8k)
_mawps_converter = converter('{"original_text": "...", "equation": "X=3+5", "ans": 8.0}', _mawps)
_mix_converter = converter('{"instruction": "...", "output": "...", "answer": "8.0"}', _mix)

_task = partial(
    Task,
    family="arithmetic",
    template=INSTRUCTION_TEMPLATE,
    metric="accuracy",
    scoring="generation",
    answer="number",
    max_new_tokens=512,
)
# LLM-Adapters' files.
_files = partial(LocalFiles, convert=_number_converter, train=("train.json",), test=("test.json",))

TASKS = (
    _task(
        name="math10k",
        about="word problems with right reasoning: what the paper trains on",
        answer="number_or_letter",
        local=(
            LocalFiles(
                directories=("math_10k", "ft-training_set"),
                convert=_mix_converter,
                rule="held_out",
                train=("math_10k.json",),
            ),
        ),
    ),
    _task(
        name="aqua",
        about="algebra word problems with five options",
        answer="option_letter",
        local=(
            _files(
                directories=("AQuA", "llm-adapters-AQuA"),
                convert=_aqua_converter,
                rule="own",
                validation=("dev.json",),
            ),
        ),
        hub=HubSet(
            id="deepmind/aqua_rat",
            config="raw",
            convert=_aqua_converter,
            rule="own",
            train=("train",),
            validation=("validation",),
            test=("test",),
        ),
    ),
    _task(
        name="gsm8k",
        about="grade-school word problems of several steps",
        template="{prompt}\nAnswer the above question. First think step by step and then answer "
        "the final number.\n",
        max_new_tokens=256,
        local=(
            LocalFiles(
                directories=("gsm8k",),
                convert=_gsm8k_converter,
                rule="tail",
                train=("train.jsonl",),
                test=("test.jsonl",),
            ),
            _files(directories=("gsm8k",), rule="tail"),
        ),
        hub=HubSet(
            id="openai/gsm8k",
            config="main",
            convert=_gsm8k_converter,
            rule="tail",
            train=("train",),
            test=("test",),
        ),
    ),
    _task(
        name="mawps",
        about="short word problems with their equations",
        max_new_tokens=96,
        local=(
            LocalFiles(
                directories=("mawps",),
                convert=_mawps_converter,
                rule="own",
                train=("trainset.json",),
                validation=("validset.json",),
                test=("testset.json",),
            ),
            _files(directories=("mawps",), rule="own"),  # made from testset.json
        ),
    ),
    _task(
        name="svamp",
        about="short word problems, varied so that shortcuts fail",
        local=(_files(directories=("SVAMP", "llm-adapters-SVAMP"), rule="held_out"),),
        # The paper tests on all 1,000 rows.
        hub=HubSet(
            id="ChilleD/SVAMP", convert=_number_converter, rule="held_out", test=("train", "test")
        ),
    ),
)
