"""Commonsense reasoning: eight multiple-choice sets in LLM-Adapters' form, and their training mix.

A record is ``{"instruction": "... Answer format: answer1/answer2", "output": "the correct answer is
answer2", "answer": "answer2"}``; the choices are "the correct answer is ..." with every label that
the instruction names. Records of the original sets on the hub are brought into this form first.
The paper trains on the mix of all eight (``commonsense170k``) and tests on each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lowmem_reft.data.tasks.files import read_json, refused, text_of
from lowmem_reft.data.tasks.task import Example, HubSet, LocalFiles, Rule, Task

_FORM = (
    '{"instruction": "... Answer format: answer1/answer2", "output": "the correct answer is '
    'answer2", "answer": "answer2"}'
)
_LABELS = re.compile(r"Answer format: (\S+(?:/\S+)+)\s*\Z")


def convert(record: Any, place: str) -> Example:
    """Check a record in LLM-Adapters' form.

    Raises:
        InputError: If it has another form or its answer is none of the choices.
    """
    instruction = text_of(record, "instruction", place, form=_FORM)
    answer = text_of(record, "answer", place, form=_FORM)
    found = _LABELS.search(instruction)
    labels = found[1].split("/") if found else []
    if answer not in labels:
        raise refused(place, _FORM, record)
    return Example(
        source=place,
        prompt=instruction,
        text=instruction,
        choices=tuple(f"the correct answer is {label}" for label in labels),
        answer=labels.index(answer),
        label=answer,
    )


def _from_hub(ask: Callable[[Any], tuple[str, str, Sequence[str], Any]]) -> Any:
    """Return the converter for records from which ``ask`` gets question, word, options, answer."""

    def convert_record(record: Any, place: str) -> Example:
        try:
            question, word, options, answer = ask(record)
            label = f"{word}{int(answer)}"
        except (KeyError, TypeError, ValueError) as error:
            raise refused(place, "one of the original set", record) from error
        labels = [f"{word}{number}" for number in range(1, len(options) + 1)]
        # Only the two long solutions of PIQA stand on lines of their own.
        joint = "\n\n" if word == "solution" else " "
        listed = joint.join(
            f"{name.capitalize()}: {option}" for name, option in zip(labels, options, strict=True)
        )
        instruction = f"{question}\n\n{listed}\n\nAnswer format: {'/'.join(labels)}"
        return convert({"instruction": instruction, "answer": label}, place)

    return convert_record


def _boolq(record: Any, place: str) -> Example:
    if not isinstance(record.get("answer"), bool):
        raise refused(place, "one of the original set", record)
    question = record["question"].rstrip("?")
    instruction = (
        f"Please answer the following question with true or false, question: {question}?\n\n"
        "Answer format: true/false"
    )
    return convert({"instruction": instruction, "answer": str(record["answer"]).lower()}, place)


def _piqa(record: Any) -> tuple[str, str, Sequence[str], Any]:
    question = f"Please choose the correct solution to the question: {record['goal']}"
    return question, "solution", (record["sol1"], record["sol2"]), record["label"] + 1


def _siqa(record: Any) -> tuple[str, str, Sequence[str], Any]:
    asked = f"{record['context']} {record['question']}"
    options = (record["answerA"], record["answerB"], record["answerC"])
    return _question(asked), "answer", options, record["label"]


def _hellaswag(record: Any) -> tuple[str, str, Sequence[str], Any]:
    question = (
        "Please choose the correct ending to complete the given sentence: "
        f"{record['activity_label']}: {record['ctx']}"
    )
    return question, "ending", record["endings"], int(record["label"]) + 1


def _winogrande(record: Any) -> tuple[str, str, Sequence[str], Any]:
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{record['sentence']}"
    )
    return question, "option", (record["option1"], record["option2"]), record["answer"]


def _multiple_choice(record: Any) -> tuple[str, str, Sequence[str], Any]:
    """ARC and OpenBookQA; their options are named by letters or, in some rows of ARC, by digits."""
    names, options = record["choices"]["label"], record["choices"]["text"]
    asked = record.get("question_stem") or record["question"]
    return _question(asked), "answer", options, names.index(record["answerKey"]) + 1


def _question(asked: str) -> str:
    return f"Please choose the correct answer to the question: {asked}"


def _task(
    name: str,
    about: str,
    directories: tuple[str, ...],
    hub: HubSet,
    answer: str = "choice_word",
    labels: tuple[str, ...] = (),
) -> Task:
    return Task(
        name=name,
        family="commonsense",
        about=about,
        template="{prompt}\n",
        metric="accuracy",
        scoring="likelihood",
        answer=answer,
        max_new_tokens=32,
        labels=labels,
        local=(
            LocalFiles(
                directories=directories,
                read=read_json,
                convert=convert,
                rule="held_out",
                train=("train.json",),
                test=("test.json",),
            ),
        ),
        hub=hub,
    )


# These sets keep the answers of their test rows to themselves: the validation rows are the test.
_hidden_test = partial(HubSet, rule="held_out", train=("train",), test=("validation",))
_all_splits: Rule = "own"
_open_test = partial(
    HubSet,
    rule=_all_splits,
    train=("train",),
    validation=("validation",),
    test=("test",),
    convert=_from_hub(_multiple_choice),
)
_PARQUET = "refs/convert/parquet"

TASKS = (
    Task(
        name="commonsense170k",
        family="commonsense",
        about="the eight commonsense sets mixed: what the paper trains on",
        template="{prompt}\n",
        metric="accuracy",
        scoring="likelihood",
        answer="choice_or_truth",
        local=(
            LocalFiles(
                directories=("commonsense_170k", "ft-training_set"),
                read=read_json,
                convert=convert,
                rule="held_out",
                train=("commonsense_170k.json",),
            ),
        ),
        hub=HubSet(
            id="zwhe99/commonsense_170k", convert=convert, rule="held_out", train=("train",)
        ),
    ),
    _task(
        "boolq",
        "yes-or-no questions that people asked a search engine",
        ("boolq",),
        _hidden_test(id="google/boolq", convert=_boolq),
        answer="true_false",
        labels=("false", "true"),
    ),
    _task(
        "piqa",
        "which of two solutions works: physical commonsense",
        ("piqa", "llm-adapters-piqa"),
        _hidden_test(id="ybisk/piqa", revision=_PARQUET, convert=_from_hub(_piqa)),
        labels=("solution1", "solution2"),
    ),
    _task(
        "siqa",
        "what people feel, want or do: social commonsense",
        ("social_i_qa", "llm-adapters-social_i_qa"),
        _hidden_test(id="allenai/social_i_qa", revision=_PARQUET, convert=_from_hub(_siqa)),
        labels=("answer1", "answer2", "answer3"),
    ),
    _task(
        "hellaswag",
        "which ending continues a described scene",
        ("hellaswag",),
        _hidden_test(id="Rowan/hellaswag", convert=_from_hub(_hellaswag)),
        labels=("ending1", "ending2", "ending3", "ending4"),
    ),
    _task(
        "winogrande",
        "which of two names fills the blank",
        ("winogrande", "llm-adapters-winogrande"),
        _hidden_test(
            id="allenai/winogrande", config="winogrande_xl", convert=_from_hub(_winogrande)
        ),
        labels=("option1", "option2"),
    ),
    _task(
        "arc-easy",
        "school science questions, the easy ones",
        ("ARC-Easy",),
        _open_test(id="allenai/ai2_arc", config="ARC-Easy"),
    ),
    _task(
        "arc-challenge",
        "school science questions that retrieval and co-occurrence get wrong",
        ("ARC-Challenge",),
        _open_test(id="allenai/ai2_arc", config="ARC-Challenge"),
    ),
    _task(
        "openbookqa",
        "elementary science questions that need a fact and common knowledge",
        ("openbookqa",),
        _open_test(id="allenai/openbookqa", config="main"),
        labels=("answer1", "answer2", "answer3", "answer4"),
    ),
)
