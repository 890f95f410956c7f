"""Commonsense reasoning: eight multiple-choice sets in LLM-Adapters' form, and their training mix.

A record is ``{"instruction": "... Answer format: answer1/answer2", "output": "the correct answer is
answer2", "answer": "answer2"}``; the choices are "the correct answer is ..." with every label that
the instruction names. Records of the original sets on the hub are brought into this form first.
ARC and OpenBookQA are there with the options written out too (``arc-easy-cloze``): the question
alone is the prompt, as in the evaluation harness, which small bases can answer.
The paper trains on the mix of all eight (``commonsense170k``) and tests on each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lowmem_reft.data.tasks.converters import converter, refusing, text_of
from lowmem_reft.data.tasks.task import Convert, Example, HubSet, LocalFiles, Task

_FORM = (
    '{"instruction": "... Answer format: answer1/answer2", "output": "the correct answer is '
    'answer2", "answer": "answer2"}'
)
_QUESTION = "Please choose the correct answer to the question: "
_LABELS = re.compile(r"Answer format: (\S+(?:/\S+)+)\s*\Z")


def _listed(record: Any) -> dict[str, Any]:
    """A record in LLM-Adapters' form."""
    instruction, answer = text_of(record, "instruction"), text_of(record, "answer")
    found = _LABELS.search(instruction)
    labels = found[1].split("/") if found else []
    return {
        "prompt": instruction,
        "choices": tuple(f"the correct answer is {label}" for label in labels),
        "answer": labels.index(answer),
        "label": answer,
    }


_convert = converter(_FORM, _listed)


def _written_out(record: Any) -> dict[str, Any]:
    """The question of a record in LLM-Adapters' form, and its options in words."""
    listed = _listed(record)
    question, _, rest = listed["prompt"].removeprefix(_QUESTION).rpartition("\n\nAnswer1: ")
    options, texts = rest.rpartition("\n\n")[0], []
    for number in range(2, len(listed["choices"]) + 1):
        text, mark, options = options.partition(f" Answer{number}: ")
        if not mark:
            raise ValueError(f"there is no answer{number}")
        texts.append(text)
    return {
        "prompt": str.strip(question),
        "choices": (*texts, options),
        "answer": listed["answer"],
    }


_convert_written_out = converter(_FORM, _written_out)


def _from_hub(listed: Callable[[Any], dict[str, str]], convert_it: Convert = _convert) -> Convert:
    """Return the converter for records that ``listed`` brings into LLM-Adapters' form."""

    def convert(record: Any, place: str) -> Example:
        with refusing(record, place, "one of the original set"):
            brought = listed(record)
        return convert_it(brought, place)

    return convert


def _asked(question: str, word: str, options: Sequence[str], answer: Any) -> dict[str, str]:
    """Write a question with its options; they are named by the word and counted from 1."""
    labels = [f"{word}{number}" for number in range(1, len(options) + 1)]
    # Only the two long solutions of PIQA stand on lines of their own.
    listed = ("\n\n" if word == "solution" else " ").join(
        f"{name.capitalize()}: {option}" for name, option in zip(labels, options, strict=True)
    )
    return {
        "instruction": f"{question}\n\n{listed}\n\nAnswer format: {'/'.join(labels)}",
        "answer": f"{word}{int(answer)}",
    }


def _boolq(record: Any) -> dict[str, str]:
    question = (
        "Please answer the following question with true or false, question: "
        f"{record['question'].rstrip('?')}?\n\nAnswer format: true/false"
    )
    if not isinstance(record["answer"], bool):
        raise TypeError("answer is no truth value")
    return {"instruction": question, "answer": str(record["answer"]).lower()}


def _piqa(record: Any) -> dict[str, str]:
    question = f"Please choose the correct solution to the question: {record['goal']}"
    return _asked(question, "solution", (record["sol1"], record["sol2"]), record["label"] + 1)


def _siqa(record: Any) -> dict[str, str]:
    question = f"{_QUESTION}{record['context']} {record['question']}"
    options = (record["answerA"], record["answerB"], record["answerC"])
    return _asked(question, "answer", options, record["label"])


def _hellaswag(record: Any) -> dict[str, str]:
    question = (
        "Please choose the correct ending to complete the given sentence: "
        f"{record['activity_label']}: {record['ctx']}"
    )
    return _asked(question, "ending", record["endings"], int(record["label"]) + 1)


def _winogrande(record: Any) -> dict[str, str]:
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{record['sentence']}"
    )
    return _asked(question, "option", (record["option1"], record["option2"]), record["answer"])


def _multiple_choice(record: Any) -> dict[str, str]:
    """ARC and OpenBookQA; their options are named by letters or, in some rows of ARC, by digits."""
    names, options = record["choices"]["label"], record["choices"]["text"]
    question = f"{_QUESTION}{record.get('question_stem') or record['question']}"
    return _asked(question, "answer", options, names.index(record["answerKey"]) + 1)


_task = partial(
    Task,
    family="commonsense",
    template="{prompt}\n",
    metric="accuracy",
    scoring="likelihood",
    answer="choice_word",
)


def _files(*directories: str, convert: Convert = _convert) -> tuple[LocalFiles, ...]:
    """LLM-Adapters' files of a set."""
    return (
        LocalFiles(
            directories=directories,
            convert=convert,
            rule="held_out",
            train=("train.json",),
            test=("test.json",),
        ),
    )


# These sets keep the answers of their test rows to themselves: the validation rows are the test.
_hidden_test = partial(HubSet, rule="held_out", train=("train",), test=("validation",))
_open_test = partial(
    HubSet,
    rule="own",
    train=("train",),
    validation=("validation",),
    test=("test",),
    convert=_from_hub(_multiple_choice),
)
_PARQUET = "refs/convert/parquet"


def _multiple_choice_tasks(
    name: str, *, about: str, hub: HubSet, directory: str, labels: tuple[str, ...] = ()
) -> tuple[Task, Task]:
    """Return a set with its options to be chosen by label, and by their own words."""
    return (
        _task(name=name, about=about, local=_files(directory), hub=hub, labels=labels),
        _task(
            name=f"{name}-cloze",
            about=f"{about}; options written out",
            template="Question: {prompt}\nAnswer:",
            answer=None,
            local=_files(directory, convert=_convert_written_out),
            hub=replace(hub, convert=_from_hub(_multiple_choice, _convert_written_out)),
        ),
    )


TASKS = (
    _task(
        name="commonsense170k",
        about="the eight commonsense sets mixed: what the paper trains on",
        answer="choice_or_truth",
        local=(
            LocalFiles(
                directories=("commonsense_170k", "ft-training_set"),
                convert=_convert,
                rule="held_out",
                train=("commonsense_170k.json",),
            ),
        ),
        hub=HubSet(
            id="zwhe99/commonsense_170k", convert=_convert, rule="held_out", train=("train",)
        ),
    ),
    _task(
        name="boolq",
        about="yes-or-no questions that people asked a search engine",
        local=_files("boolq"),
        hub=_hidden_test(id="google/boolq", convert=_from_hub(_boolq)),
        answer="true_false",
        labels=("false", "true"),
    ),
    _task(
        name="piqa",
        about="which of two solutions works: physical commonsense",
        local=_files("piqa", "llm-adapters-piqa"),
        hub=_hidden_test(id="ybisk/piqa", revision=_PARQUET, convert=_from_hub(_piqa)),
        labels=("solution1", "solution2"),
    ),
    _task(
        name="siqa",
        about="what people feel, want or do: social commonsense",
        local=_files("social_i_qa", "llm-adapters-social_i_qa"),
        hub=_hidden_test(id="allenai/social_i_qa", revision=_PARQUET, convert=_from_hub(_siqa)),
        labels=("answer1", "answer2", "answer3"),
    ),
    _task(
        name="hellaswag",
        about="which ending continues a described scene",
        local=_files("hellaswag"),
        hub=_hidden_test(id="Rowan/hellaswag", convert=_from_hub(_hellaswag)),
        labels=("ending1", "ending2", "ending3", "ending4"),
    ),
    _task(
        name="winogrande",
        about="which of two names fills the blank",
        local=_files("winogrande", "llm-adapters-winogrande"),
        hub=_hidden_test(
            id="allenai/winogrande", config="winogrande_xl", convert=_from_hub(_winogrande)
        ),
        labels=("option1", "option2"),
    ),
    *_multiple_choice_tasks(
        "arc-easy",
        about="school science questions, the easy ones",
        hub=_open_test(id="allenai/ai2_arc", config="ARC-Easy"),
        directory="ARC-Easy",
    ),
    *_multiple_choice_tasks(
        "arc-challenge",
        about="school science questions that retrieval and co-occurrence get wrong",
        hub=_open_test(id="allenai/ai2_arc", config="ARC-Challenge"),
        directory="ARC-Challenge",
    ),
    *_multiple_choice_tasks(
        "openbookqa",
        about="elementary science questions that need a fact and common knowledge",
        hub=_open_test(id="allenai/openbookqa", config="main"),
        directory="openbookqa",
        labels=("answer1", "answer2", "answer3", "answer4"),
    ),
)
