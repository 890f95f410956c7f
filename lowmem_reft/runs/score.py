"""Scoring: by the likelihood of choices, a classification head, generated answers, or the loss.

Each way but the last gives a prediction per example, of which the metric (``metrics.py``) makes one
number. Each gives the loss of what is right, per supervised token, as the training counts it.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.limits import Limits
from lowmem_reft.base.ours import ours
from lowmem_reft.data.cutting import RowsTooLongError, encode_those_that_fit
from lowmem_reft.data.rows import as_choices, class_index
from lowmem_reft.data.tasks.answers import answers_equal, extract_answer, find_extractor
from lowmem_reft.data.tasks.metrics import check_names, with_metric
from lowmem_reft.data.tokens import (
    Collator,
    EncodedRows,
    encode_all_choices,
    encode_labelled,
    encode_prompts,
    encode_rows,
)
from lowmem_reft.data.turns import of_turns
from lowmem_reft.errors import InputError
from lowmem_reft.machine.progress import progress
from lowmem_reft.methods.choices import choices_log_likelihood
from lowmem_reft.methods.likelihood import (
    by_length,
    check_finite,
    each_log_likelihood,
)
from lowmem_reft.methods.virtual_tokens import num_virtual_tokens
from lowmem_reft.options import CHAT_TEMPLATE, PromptOptions, ReuseOptions, ScoringOptions
from lowmem_reft.reuse.likelihood import reused_log_likelihood
from lowmem_reft.runs.chosen import choices_for
from lowmem_reft.runs.generate import generate_batches
from lowmem_reft.runs.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.rows import Row
    from lowmem_reft.methods.card import TrainingCard
    from lowmem_reft.options import LongRows
    from lowmem_reft.reuse.reuse import Reuse

logger = logging.getLogger(__name__)

_OF_A_REFERENCE = ("loss", "overlap")
"""Metrics that need the loss: without a right answer, the reference's likelihood says more."""


Way = Literal["classes", "choices", "responses", "generated"]


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(ScoringOptions):
    """How rows are scored, and with what means."""

    batch_size: int = 16
    """Sequences per forward pass."""
    quiet: bool = True
    """No progress bar."""
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    """What may be computed once, and how much it may take on the disk."""
    reuse_dir: Path | None = None
    """Where that is kept; None computes everything anew."""
    stop: str | None = None
    """Text at which a generated answer ends: what parts the examples before the prompts."""
    prepared: list[Reuse] = field(default_factory=list, compare=False)
    """What scoring has stored and proven so far: once is enough for a model and its rows."""

    @property
    def metrics(self) -> set[str]:
        """All that are wanted; none is named as long as it depends on the rows."""
        names = [self.metric or "", *(self.extra_metrics or "").split(",")]
        return {name.strip() for name in names} - {""}

    def answer_in(self, text: str) -> str | None:
        """Return the answer that a text gives; None if it gives none."""
        if self.extractor is not None:
            return find_extractor(self.extractor)(text)
        return extract_answer(text, self.answer_pattern)


def way_of(rows: Sequence[Row], settings: ScoringSettings, task_type: str) -> Way:
    """Return how rows, all of one kind, are scored."""
    settings = with_metric(settings, rows)
    if task_type == "SEQ_CLS":
        return "classes"
    chosen, has_choices = settings.scoring, bool(rows[0].choices)
    if chosen != "generation" and not has_choices and settings.metrics == {"loss"}:
        return "responses"
    by_likelihood = chosen == "likelihood" or (chosen == "auto" and has_choices)
    return "choices" if by_likelihood else "generated"


def check_scoring(options: ScoringOptions) -> None:
    """Refuse a metric, an extractor or a pattern that there is not, before the work.

    Raises:
        InputError: See above.
    """
    check_names(options)
    extract_answer("", options.answer_pattern)


def check_rows(rows: Sequence[Row], card: TrainingCard) -> None:
    """Refuse rows that cannot be scored as the card says, before a base is loaded for them.

    Raises:
        InputError: A row has a label that the card does not know, or none for a classifier.
    """
    if card.regression:
        for row in rows:
            if row.target is None:
                raise InputError(
                    f"{row.source}: a row must have text and target, as in the training, got a "
                    f"{row.kind} row; convert the file"
                )
    elif card.task_type == "SEQ_CLS":
        for row in rows:
            class_index(row, card.label_names or [])
    else:
        as_choices(rows, card.label_names)


def rows_to_score(
    rows: Sequence[Row],
    tokenizer: Any,
    card: TrainingCard,
    settings: ScoringSettings,
    prompts: PromptOptions,
    limits: Limits,
    *,
    num_virtual: int = 0,
) -> list[Row]:
    """Return the rows as they will be scored, before a base is loaded for them.

    Of a chat it is each turn that counts; rows that do not fit are refused or left out.

    Raises:
        InputError: A row cannot be scored as the card says, does not fit and is not to be left out,
            or has a token without an embedding or more tokens than the base has positions.
    """
    rows = of_turns(rows, prompts.turns)
    check_rows(rows, card)
    if not rows:
        return rows
    settings = with_metric(settings, rows)

    def encoded(some: Sequence[Row]) -> _Scoring:
        if card.task_type != "SEQ_CLS":
            some = as_choices(some, card.label_names)
        scoring = _Scoring(
            None, tokenizer, some, card, settings, limits, num_virtual, prompts.long_rows
        )
        scoring.encoded, scoring.responses  # noqa: B018 - which are kept
        return scoring

    kept, scoring = encode_those_that_fit(rows, encoded, long_rows=prompts.long_rows)
    scoring.check()
    if isinstance(scoring.responses, InputError):
        logger.warning("the loss is not computed: %s", scoring.responses)
    return kept


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings | None = None,
) -> Scores:
    """Score a loaded model on rows; see ``evaluate.run_evaluation``.

    A base of which only upper blocks are resident is scored from stored constants where nothing is
    generated; otherwise its lower blocks are read again for every forward pass.
    """
    settings = with_metric(settings or ScoringSettings(), rows)
    model.eval()
    residency = ours(base_of(model)).residency
    if card.task_type != "SEQ_CLS":
        rows = as_choices(rows, card.label_names)
    limits = Limits.of(model, tokenizer, task_type=card.task_type)
    num_virtual = num_virtual_tokens(model)
    scoring = _Scoring(model, tokenizer, rows, card, settings, limits, num_virtual)
    scoring.check()
    with nullcontext() if residency is None else residency.streaming():
        if scoring.way == "classes":
            scores = scoring.of_classes()
        elif scoring.way == "choices":
            scores = scoring.of_choices()
        elif scoring.way == "responses":
            scores = scoring.of_responses()
        else:
            scores = scoring.of_generated()
    assert settings.metric is not None
    return replace(scores, metric=settings.metric, extra_metrics=settings.extra_metrics)


@dataclass(frozen=True)
class _Scoring:
    """The ways to score rows with a model."""

    model: Any
    tokenizer: Any
    rows: Sequence[Row]
    card: TrainingCard
    settings: ScoringSettings
    limits: Limits
    num_virtual: int
    long_rows: LongRows = "cut"

    @property
    def way(self) -> Way:
        """Return how these rows are scored."""
        return way_of(self.rows, self.settings, self.card.task_type)

    @cached_property
    def encoded(self) -> list[EncodedRows]:
        """The tokens: of each row's choices apart, else of all rows together."""
        rows, tokenizer, card = self.rows, self.tokenizer, self.card
        how: dict[str, Any] = {"max_length": card.max_length, "long_rows": self.long_rows}
        if self.way == "choices":
            return encode_all_choices(rows, tokenizer, **card.prompts | how)
        if self.way == "responses":
            return [encode_rows(rows, tokenizer, **card.prompts | how)]
        if self.way == "generated":
            return [encode_prompts(rows, tokenizer, template=card.template, **how)]
        return [encode_labelled(rows, tokenizer, label_names=card.label_names, **how)]

    @cached_property
    def responses(self) -> EncodedRows | InputError | None:
        """Of rows that are generated for: the tokens that training would supervise, for the loss.

        What keeps them from being scored is returned where no metric needs them.
        """
        if self.way != "generated":
            return None
        try:
            how = {**self.card.prompts, "long_rows": self.long_rows}
            encoded = encode_rows(self.rows, self.tokenizer, **how)
            self._check([row.source for row in self.rows], [encoded], new=0)
        except InputError as error:
            if self.long_rows == "drop" and isinstance(error, RowsTooLongError):
                raise  # the row is left out
            if self.settings.metrics.intersection(_OF_A_REFERENCE):
                raise
            return error
        return encoded

    def check(self) -> None:
        """Refuse rows whose tokens the base has no place for.

        Raises:
            InputError: A token has no embedding, or there are more than positions.
        """
        sources = [row.source for row in self.rows]
        if self.way == "choices":
            counted = zip(sources, self.encoded, strict=True)
            sources = [source for source, encoded in counted for _ in encoded.examples]
        new = self.settings.max_new_tokens if self.way == "generated" else 0
        self._check(sources, self.encoded, new=new)

    def _check(self, sources: list[str], every: Sequence[EncodedRows], *, new: int) -> None:
        ids = [example["input_ids"] for encoded in every for example in encoded.examples]
        self.limits.check(sources, ids, virtual=self.num_virtual, new=new)

    @torch.no_grad()
    def of_choices(self) -> Scores:
        """Pick the choice whose tokens have the highest summed log-likelihood after the prompt."""
        encoded = self.encoded
        reuse, totals = self._of_each_choice([by_choice.examples for by_choice in encoded])
        for row, scored in zip(self.rows, totals, strict=True):
            check_finite((total for total, _ in scored), row.source)
        answers = [max(range(len(t)), key=lambda choice: t[choice][0]) for t in totals]
        right: list[Any] = [row.answer for row in self.rows]
        of_right = [by_choice[answer] for by_choice, answer in zip(totals, right, strict=True)]
        predictions, references = list[Any](answers), right
        if self.rows[0].target is not None:
            pairs = zip(self.rows, totals, strict=True)
            predictions = [_expected(row, by_choice) for row, by_choice in pairs]
            references = [row.target for row in self.rows]
        return Scores(
            correct=[a == r for a, r in zip(answers, right, strict=True)],
            predictions=predictions,
            references=references,
            losses=[-total for total, _ in of_right],
            num_tokens=[count for _, count in of_right],
            num_cut_prompts=sum(by_choice.num_cut_prompts for by_choice in encoded),
            reuse=reuse,
        )

    @torch.no_grad()
    def of_classes(self) -> Scores:
        """Pick the class with the highest logit of the head; of one output, take its value."""
        device, (encoded,) = self.model.device, self.encoded
        examples, collate = encoded.examples, Collator(self.tokenizer)
        predictions: list[Any] = [None] * len(examples)
        losses = [0.0] * len(examples)
        lengths = [len(example["input_ids"]) for example in examples]
        batches = by_length(lengths, self.settings.batch_size)
        for indices in progress(batches, "scoring", quiet=self.settings.quiet):
            batch = collate([examples[index] for index in indices])
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            logits = self.model(**batch).logits.float()
            for index, values in zip(indices, logits.tolist(), strict=True):
                check_finite(values, self.rows[index].source, "logits")
            if logits.shape[-1] == 1:  # a regression
                predicted = logits[:, 0]
                each = (predicted - labels).square()
            else:
                predicted = logits.argmax(-1)
                each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            for index, value, loss in zip(indices, predicted.tolist(), each.tolist(), strict=True):
                predictions[index], losses[index] = value, loss
        references = [example["labels"] for example in examples]
        return Scores(
            correct=[p == r for p, r in zip(predictions, references, strict=True)],
            predictions=predictions,
            references=references,
            losses=losses,
            num_tokens=[1] * len(losses),
            num_cut_prompts=encoded.num_cut_prompts,
        )

    def of_responses(self) -> Scores:
        """Generate nothing: the likelihood of the right responses is all that is asked for."""
        (encoded,) = self.encoded
        reuse, losses, num_tokens = self._losses(encoded, reused=True)
        nothing = [None] * len(losses)
        return Scores(
            predictions=nothing,
            references=nothing,
            losses=losses,
            num_tokens=num_tokens,
            num_cut_prompts=encoded.num_cut_prompts,
            reuse=reuse,
        )

    def of_generated(self) -> Scores:
        """Generate greedily, extract the answer and compare it with the one in the response."""
        settings = self.settings
        references = [settings.answer_in(row.response or "") for row in self.rows]
        for row, answer in zip(self.rows, references, strict=True):
            if answer is None:
                name = "extractor" if settings.extractor else "answer_pattern"
                raise InputError(
                    f"{row.source}: response must match {name} {getattr(settings, name)!r}, got "
                    f"{row.response!r}; correct the {name} or the row"
                )
        (encoded,) = self.encoded
        texts = list(
            generate_batches(
                self.model,
                self.tokenizer,
                [example["input_ids"] for example in encoded.examples],
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                stop=settings.stop,
                choices=choices_for(self.rows, self.card),
                chats=bool(self.rows[0].messages) or self.card.template == CHAT_TEMPLATE,
                quiet=settings.quiet,
            )
        )
        losses, num_tokens = list[float](), list[int]()
        if isinstance(self.responses, EncodedRows):
            _, losses, num_tokens = self._losses(self.responses, reused=False)
        predictions = [settings.answer_in(text) for text in texts]
        pairs = zip(predictions, references, strict=True)
        return Scores(
            correct=[answers_equal(settings.extractor, p, r) for p, r in pairs],
            predictions=predictions,
            references=references,
            texts=texts,
            losses=losses,
            num_tokens=num_tokens,
            num_cut_prompts=encoded.num_cut_prompts,
        )

    def _of_each_choice(
        self, rows: list[list[dict[str, Any]]]
    ) -> tuple[Reuse | None, list[list[tuple[float, int]]]]:
        """Return for each row the summed log-likelihood of each choice, and its number of tokens.

        A row's choices share their prompt unless stored constants, which are of whole sequences,
        score them.
        """
        reused = self._reused([example for by_choice in rows for example in by_choice])
        if reused is not None:
            reuse, found = reused
            rest = iter(found)
            return reuse, [list(islice(rest, len(by_choice))) for by_choice in rows]
        return None, choices_log_likelihood(self.model, rows, self.tokenizer, **self._batching)

    @property
    def _batching(self) -> dict[str, Any]:
        return {"batch_size": self.settings.batch_size, "quiet": self.settings.quiet}

    def _losses(
        self, encoded: EncodedRows, *, reused: bool
    ) -> tuple[Reuse | None, list[float], list[int]]:
        """Return the summed loss of each row's response, its tokens, and what scored them."""
        stored = self._reused(encoded.examples) if reused else None
        reuse, found = stored or (
            None,
            each_log_likelihood(self.model, encoded.examples, self.tokenizer, **self._batching),
        )
        for row, (total, _) in zip(self.rows, found, strict=True):
            check_finite([total], row.source)
        return reuse, [-total for total, _ in found], [count for _, count in found]

    def _reused(
        self, examples: list[dict[str, Any]]
    ) -> tuple[Reuse, list[tuple[float, int]]] | None:
        """Score from stored constants, if they are to be kept and there are any."""
        settings = self.settings
        if settings.reuse_dir is None or not hasattr(self.model, "peft_config"):
            return None
        return reused_log_likelihood(
            self.model,
            examples,
            self.tokenizer,
            settings.reuse,
            root=settings.reuse_dir,
            prepared=settings.prepared,
            **self._batching,
        )


def _expected(row: Row, scored: Sequence[tuple[float, int]]) -> float:
    """The choices are numbers: their mean under the softmax of their log-likelihoods."""
    top = max(total for total, _ in scored)
    weights = [math.exp(total - top) for total, _ in scored]
    weighted = sum(w * float(choice) for w, choice in zip(weights, row.choices, strict=True))
    return weighted / sum(weights)
