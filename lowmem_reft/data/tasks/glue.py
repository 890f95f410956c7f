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
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowmem_reft.data.tasks.files import read_table, refused, text_of
from lowmem_reft.data.tasks.task import Convert, Example, HubSet, LocalFiles, Read, Task

SCORES = ("0", "1", "2", "3", "4", "5")
"""What a causal model chooses from on STS-B."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the examples of one set are written; the indices of classes are GLUE's."""

    labels: tuple[str, ...]
    """Class names for a classifier; none: a number from 0 to 5."""
    words: tuple[str, ...]
    """What a causal model chooses from."""
    prompt: str = "{first}"
    """How both sentences are written for a causal model."""


def _convert(
    form: Form, first: str, second: str | None, label: str, values: Mapping[Any, int] | None = None
) -> Convert:
    """Return the converter for records with these columns.

    Args:
        form: How examples are written.
        first: Column of the text, or of the first one.
        second: Column of the second text.
        label: Column of the class or the number.
        values: Index of the class that each value of the column means; default: it is the index.
    """
    columns = [column for column in (first, second, label) if column]
    said = "0 to 5" if not form.labels else " or ".join(map(str, values or range(len(form.labels))))
    wanted = f"{', '.join(columns)}, the last {said}"

    def convert(record: Any, place: str) -> Example:
        text = text_of(record, first, place, form=wanted)
        pair = None if second is None else text_of(record, second, place, form=wanted)
        prompt = form.prompt.replace("{first}", text)
        prompt = prompt if pair is None else prompt.replace("{second}", pair)
        value = record.get(label)
        example = partial(
            Example, source=place, prompt=prompt, text=text, text_pair=pair, choices=form.words
        )
        if not form.labels:
            target = _score(value)
            if target is None:
                raise refused(place, wanted, record)
            return example(target=target, answer=math.floor(target + 0.5))
        index = values.get(value) if values else value
        if type(index) is not int or not 0 <= index < len(form.labels):
            raise refused(place, wanted, record)
        return example(answer=index, label=form.labels[index])

    return convert


def _score(value: Any) -> float | None:
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if 0 <= score <= 5 else None


def _table(needed: tuple[str, ...], **options: Any) -> Read:
    return partial(read_table, needed=needed, **options)


def _task(
    name: str,
    about: str,
    template: str,
    form: Form,
    local: tuple[LocalFiles, ...],
    hub_columns: tuple[str, str | None],
    *,
    metric: str = "accuracy",
    extra_metrics: tuple[str, ...] = (),
    hub_validation: str = "validation",
) -> Task:
    return Task(
        name=name,
        family="glue",
        about=about,
        template=template,
        metric=metric,
        extra_metrics=extra_metrics,
        scoring="likelihood",
        max_new_tokens=8,
        labels=form.labels,
        local=local,
        hub=HubSet(
            id="nyu-mll/glue",
            config=name,
            convert=_convert(form, *hub_columns, "label"),
            rule="halved",
            train=("train",),
            validation=(hub_validation,),
        ),
    )


def _files(
    form: Form,
    directories: tuple[str, ...],
    said: tuple[str, str | None, str],
    values: Mapping[str, int] | None,
    *,
    train: str = "train.tsv",
    validation: tuple[str, ...] = ("dev.tsv",),
    **options: Any,
) -> LocalFiles:
    return LocalFiles(
        directories=directories,
        read=_table(tuple(column for column in said if column), **options),
        convert=_convert(form, *said, values),
        rule="halved",
        train=(train,),
        validation=validation,
    )


_DIGITS = {"0": 0, "1": 1}
_ENTAILMENT = {"entailment": 0, "not_entailment": 1}
_NLI = "Premise: {first}\nHypothesis: {second}"
_SENTENCES = "Sentence 1: {first}\nSentence 2: {second}"

_sst2 = Form(labels=("negative", "positive"), words=("negative", "positive"))
_cola = Form(labels=("unacceptable", "acceptable"), words=("no", "yes"))
_mrpc = Form(labels=("different", "equivalent"), words=("no", "yes"), prompt=_SENTENCES)
_qqp = Form(
    labels=("different", "duplicate"),
    words=("no", "yes"),
    prompt="Question 1: {first}\nQuestion 2: {second}",
)
_mnli = Form(
    labels=("entailment", "neutral", "contradiction"), words=("yes", "maybe", "no"), prompt=_NLI
)
_rte = Form(labels=("entailment", "not_entailment"), words=("yes", "no"), prompt=_NLI)
_qnli = Form(
    labels=("entailment", "not_entailment"),
    words=("yes", "no"),
    prompt="Question: {first}\nSentence: {second}",
)
_stsb = Form(labels=(), words=SCORES, prompt=_SENTENCES)
_MSR = ("#1 String", "#2 String", "Quality")

TASKS = (
    _task(
        "mnli",
        "does the premise entail or contradict the hypothesis, or neither",
        "{prompt}\nEntailed:",
        _mnli,
        (
            _files(
                _mnli,
                ("MNLI",),
                ("sentence1", "sentence2", "gold_label"),
                {name: index for index, name in enumerate(_mnli.labels)},
                validation=("dev_matched.tsv",),
            ),
        ),
        ("premise", "hypothesis"),
        hub_validation="validation_matched",
    ),
    _task(
        "sst2",
        "is what a film review says positive",
        "Review: {prompt}\nSentiment:",
        _sst2,
        (
            _files(_sst2, ("SST-2",), ("sentence", None, "label"), _DIGITS),
            _files(
                _sst2, ("sst2-glue",), ("sentence", None, "label"), _DIGITS, train="train_full.tsv"
            ),
        ),
        ("sentence", None),
    ),
    _task(
        "mrpc",
        "do two sentences from the news mean the same",
        "{prompt}\nSame meaning:",
        _mrpc,
        (
            _files(_mrpc, ("MRPC",), _MSR, _DIGITS),
            LocalFiles(  # the original files, whose test rows have answers
                directories=("mrpc", "MRPC"),
                read=_table(_MSR),
                convert=_convert(_mrpc, *_MSR, _DIGITS),
                rule="held_out",
                train=("msr_paraphrase_train.txt",),
                test=("msr_paraphrase_test.txt",),
            ),
        ),
        ("sentence1", "sentence2"),
        extra_metrics=("f1",),
    ),
    _task(
        "cola",
        "is a sentence grammatical",
        "Sentence: {prompt}\nGrammatical:",
        _cola,
        (
            _files(
                _cola,
                ("CoLA",),
                ("sentence", None, "label"),
                _DIGITS,
                columns=("origin", "label", "mark", "sentence"),
            ),
            _files(
                _cola,
                ("cola", "cola_public/raw"),
                ("sentence", None, "label"),
                _DIGITS,
                train="in_domain_train.tsv",
                validation=("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
                columns=("origin", "label", "mark", "sentence"),
            ),
        ),
        ("sentence", None),
        metric="matthews",
        extra_metrics=("accuracy",),
    ),
    _task(
        "qnli",
        "does a sentence answer a question",
        "{prompt}\nAnswered:",
        _qnli,
        (_files(_qnli, ("QNLI",), ("question", "sentence", "label"), _ENTAILMENT),),
        ("question", "sentence"),
    ),
    _task(
        "qqp",
        "do two questions ask the same",
        "{prompt}\nSame question:",
        _qqp,
        (
            _files(
                _qqp,
                ("QQP",),
                ("question1", "question2", "is_duplicate"),
                _DIGITS,
                skip_broken=True,  # the public file has a few
            ),
        ),
        ("question1", "question2"),
        extra_metrics=("f1",),
    ),
    _task(
        "rte",
        "does the premise entail the hypothesis",
        "{prompt}\nEntailed:",
        _rte,
        (_files(_rte, ("RTE", "rte"), ("sentence1", "sentence2", "label"), _ENTAILMENT),),
        ("sentence1", "sentence2"),
    ),
    _task(
        "stsb",
        "how similar two sentences are, from 0 to 5",
        "{prompt}\nSimilarity from 0 to 5:",
        _stsb,
        (
            _files(_stsb, ("STS-B",), ("sentence1", "sentence2", "score"), None),
            _files(
                _stsb,
                ("stsb", "stsbenchmark"),
                ("sentence1", "sentence2", "score"),
                None,
                train="sts-train.csv",
                validation=("sts-dev.csv",),
                columns=("genre", "file", "year", "number", "score", "sentence1", "sentence2"),
            ),
        ),
        ("sentence1", "sentence2"),
        metric="pearson",
        extra_metrics=("spearman",),
    ),
)
