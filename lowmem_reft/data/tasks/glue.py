"""GLUE: eight sets of sentences and sentence pairs, as tab-separated files or from the hub.

The answers of GLUE's test rows are not public, so the paper divides the validation rows: one half
chooses the epoch and the settings, the other is the test (arXiv 2404.03592, appendix; of the large
validation sets, 1,000 rows choose). Metrics are the paper's: Matthews correlation for CoLA, Pearson
for STS-B, accuracy for the others, MRPC and QQP included.

Encoders get the two sentences of a pair as a pair; causal models get them written out, and a word
for each class to choose from. STS-B is a regression: causal models choose among the whole numbers
from 0 to 5, beside which the exact number is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowmem_reft.data.tasks.converters import classified, converter, written
from lowmem_reft.data.tasks.files import read_table
from lowmem_reft.data.tasks.task import Convert, HubSet, LocalFiles, Rule, Task

SCORES = ("0", "1", "2", "3", "4", "5")
"""What a causal model chooses from on STS-B."""


@dataclass(frozen=True)
class _Tables:
    """The files of a set; columns are those of the texts, then the class's or the number's."""

    directories: tuple[str, ...]
    columns: tuple[str, ...]
    train: str = "train.tsv"
    validation: tuple[str, ...] = ("dev.tsv",)
    test: tuple[str, ...] = ()
    rule: Rule = "halved"
    header: tuple[str, ...] | None = None
    """All columns, of files that do not name them."""
    by_name: bool = False
    """Whether classes are named, not numbered."""
    skip_broken: bool = False


def _task(
    name: str,
    about: str,
    template: str,
    words: Mapping[str, str],
    hub_columns: tuple[str, ...],
    *local: _Tables,
    prompt: str = "{}",
    metric: str = "accuracy",
    extra_metrics: tuple[str, ...] = (),
    hub_validation: str = "validation",
) -> Task:
    """Return a task; classes are numbered as in ``words``, and without any a number is predicted.

    Columns of the hub are those of the texts; the class's is ``label``.
    """

    def convert(columns: tuple[str, ...], values: Mapping[Any, int] | None = None) -> Convert:
        if not words:
            return _scored(columns, prompt)
        return classified(words, columns, values, prompt=prompt)

    def files(tables: _Tables) -> LocalFiles:
        names = words if tables.by_name else map(str, range(len(words)))
        return LocalFiles(
            directories=tables.directories,
            read=partial(
                read_table,
                needed=tables.columns,
                columns=tables.header,
                skip_broken=tables.skip_broken,
            ),
            convert=convert(tables.columns, {name: index for index, name in enumerate(names)}),
            rule=tables.rule,
            train=(tables.train,),
            validation=tables.validation,
            test=tables.test,
        )

    return Task(
        name=name,
        family="glue",
        about=about,
        template=template,
        metric=metric,
        extra_metrics=extra_metrics,
        scoring="likelihood",
        max_new_tokens=8,
        labels=tuple(words),
        local=tuple(map(files, local)),
        hub=HubSet(
            id="nyu-mll/glue",
            config=name,
            convert=convert((*hub_columns, "label")),
            rule="halved",
            train=("train",),
            validation=(hub_validation,),
        ),
    )


def _scored(columns: tuple[str, ...], prompt: str) -> Convert:
    """Return the converter of STS-B: a number to predict, and the nearest one to choose."""
    *texts, number = columns

    def fields(record: Any) -> dict[str, Any]:
        target = float(record[number])
        if not 0 <= target <= 5:
            raise ValueError(f"{number} is out of range")
        return {
            **written(record, texts, prompt),
            "choices": SCORES,
            "answer": math.floor(target + 0.5),
            "target": target,
        }

    return converter(f"{', '.join(columns)}, the last 0 to 5", fields)


_SENTENCES = "Sentence 1: {}\nSentence 2: {}"
_NLI = "Premise: {}\nHypothesis: {}"
_MSR = ("#1 String", "#2 String", "Quality")
_COLA = _Tables(
    ("CoLA",),
    ("sentence", "label"),
    header=("origin", "label", "mark", "sentence"),
)

TASKS = (
    _task(
        "mnli",
        "does the premise entail or contradict the hypothesis, or neither",
        "{prompt}\nEntailed:",
        {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
        ("premise", "hypothesis"),
        _Tables(
            ("MNLI",),
            ("sentence1", "sentence2", "gold_label"),
            validation=("dev_matched.tsv",),
            by_name=True,
        ),
        prompt=_NLI,
        hub_validation="validation_matched",
    ),
    _task(
        "sst2",
        "is what a film review says positive",
        "Review: {prompt}\nSentiment:",
        {"negative": "negative", "positive": "positive"},
        ("sentence",),
        _Tables(("SST-2",), ("sentence", "label")),
        _Tables(("sst2-glue",), ("sentence", "label"), train="train_full.tsv"),
    ),
    _task(
        "mrpc",
        "do two sentences from the news mean the same",
        "{prompt}\nSame meaning:",
        {"different": "no", "equivalent": "yes"},
        ("sentence1", "sentence2"),
        _Tables(("MRPC",), _MSR),
        _Tables(  # the original files, whose test rows have answers
            ("mrpc", "MRPC"),
            _MSR,
            train="msr_paraphrase_train.txt",
            validation=(),
            test=("msr_paraphrase_test.txt",),
            rule="held_out",
        ),
        prompt=_SENTENCES,
        extra_metrics=("f1",),
    ),
    _task(
        "cola",
        "is a sentence grammatical",
        "Sentence: {prompt}\nGrammatical:",
        {"unacceptable": "no", "acceptable": "yes"},
        ("sentence",),
        _COLA,
        replace(
            _COLA,
            directories=("cola", "cola_public/raw"),
            train="in_domain_train.tsv",
            validation=("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
        ),
        metric="matthews",
        extra_metrics=("accuracy",),
    ),
    _task(
        "qnli",
        "does a sentence answer a question",
        "{prompt}\nAnswered:",
        {"entailment": "yes", "not_entailment": "no"},
        ("question", "sentence"),
        _Tables(("QNLI",), ("question", "sentence", "label"), by_name=True),
        prompt="Question: {}\nSentence: {}",
    ),
    _task(
        "qqp",
        "do two questions ask the same",
        "{prompt}\nSame question:",
        {"different": "no", "duplicate": "yes"},
        ("question1", "question2"),
        _Tables(
            ("QQP",),
            ("question1", "question2", "is_duplicate"),
            skip_broken=True,  # the public file has a few
        ),
        prompt="Question 1: {}\nQuestion 2: {}",
        extra_metrics=("f1",),
    ),
    _task(
        "rte",
        "does the premise entail the hypothesis",
        "{prompt}\nEntailed:",
        {"entailment": "yes", "not_entailment": "no"},
        ("sentence1", "sentence2"),
        _Tables(("RTE", "rte"), ("sentence1", "sentence2", "label"), by_name=True),
        prompt=_NLI,
    ),
    _task(
        "stsb",
        "how similar two sentences are, from 0 to 5",
        "{prompt}\nSimilarity from 0 to 5:",
        {},
        ("sentence1", "sentence2"),
        _Tables(("STS-B",), ("sentence1", "sentence2", "score")),
        _Tables(
            ("stsb", "stsbenchmark"),
            ("sentence1", "sentence2", "score"),
            train="sts-train.csv",
            validation=("sts-dev.csv",),
            header=("genre", "file", "year", "number", "score", "sentence1", "sentence2"),
        ),
        prompt=_SENTENCES,
        metric="pearson",
        extra_metrics=("spearman",),
    ),
)
