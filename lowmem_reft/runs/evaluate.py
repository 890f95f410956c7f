"""``lowmem-reft evaluate``: a base, or a base with an adapter, is loaded and scored on rows."""

from __future__ import annotations

import gc
import json
import logging
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.base.hub import load_config
from lowmem_reft.base.limits import Limits
from lowmem_reft.base.ours import ours
from lowmem_reft.data.few_shot import separator, with_examples
from lowmem_reft.data.rows import as_choices, label_names, load_rows
from lowmem_reft.data.texts import described
from lowmem_reft.errors import is_out_of_memory, naming
from lowmem_reft.machine.files import write_text_whole
from lowmem_reft.methods.card import (
    TrainingCard,
    find_adapter,
    load_card,
    merge_card,
    with_template,
)
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.methods.tokenizers import tokenizer_for
from lowmem_reft.options import CHAT_TEMPLATE
from lowmem_reft.runs.forgetting import Windows, general_loss, windows_to_score
from lowmem_reft.runs.outputs import check_evaluation
from lowmem_reft.runs.score import (
    ScoringSettings,
    check_scoring,
    rows_to_score,
    score,
    way_of,
)
from lowmem_reft.runs.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import EvaluateOptions

logger = logging.getLogger(__name__)


def run_evaluation(options: EvaluateOptions) -> dict[str, Any]:
    """Score a base, or a base with an adapter, on rows.

    What the command line leaves open (storage, task, template, length, classes) is taken from the
    adapter's training card, so that scoring matches training.

    Returns:
        ``metric``, ``value``, ``accuracy`` (the share of right answers, where these were asked
        for), ``extra`` (of ``extra_metrics``, by name), ``num_examples``, ``storage``,
        ``num_cut_prompts``, where known ``loss`` (see ``Scores.summary``), with ``--examples``
        ``few_shot`` (the rows ``shown``, the prompts ``num_short`` of some of them and the
        ``fewest`` that one has), with ``--forgetting`` ``general_loss`` (see
        ``forgetting.general_loss``) and, where stored
        constants were used, ``reuse``, ``store_bytes`` and ``build_time_s``. Where the adapter was
        trained on another storage also ``trained_storage``, ``value_trained_storage``,
        ``accuracy_trained_storage`` and ``loss_trained_storage``. With ``--lm-eval`` see
        ``harness.run_harness``.

    Raises:
        InputError: An option, a file or a row is wrong.
    """
    check_evaluation(options)
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    check_scoring(options.scoring)
    if options.predictions is not None:
        options.predictions.parent.mkdir(parents=True, exist_ok=True)
    trained, card = _cards(options, adapter)
    if options.harness.lm_eval is not None:
        # Here, as it needs an optional package.
        from lowmem_reft.runs.harness import run_harness

        return run_harness(options, adapter, card)
    rows, card, tokenizer, limits = _read(options, adapter, card)
    if trained is None and card.template == CHAT_TEMPLATE and not options.quiet:
        print(described(card.template, rows), file=sys.stderr)
    few_shot, stop = None, None
    if options.prompts.examples is not None:
        is_generated = way_of(rows, _settings(options, None), card.task_type) == "generated"
        room = limits.room(new=options.scoring.max_new_tokens if is_generated else 0)
        fitting = replace(card, max_length=min(card.max_length, room or card.max_length))
        rows, few_shot, stop = _with_examples(rows, options.prompts.examples, tokenizer, fitting)
    windows = windows_to_score(options.beside, tokenizer, limits, task_type=card.task_type)
    scores = _load_and_score(options, adapter, card, rows, tokenizer, windows=windows, stop=stop)
    if scores.reuse is None and options.reuse.reuse in ("prefix", "trunk"):
        logger.warning(
            "reuse %s has no effect: it needs --reuse-dir, an adapter and rows that are not "
            "generated for",
            options.reuse.reuse,
        )
    if options.predictions is not None:
        lines = (json.dumps(line) + "\n" for line in _prediction_lines(rows, scores, card))
        write_text_whole(options.predictions, "".join(lines))
    summary = scores.summary() | {"storage": card.storage}
    if few_shot is not None:
        summary["few_shot"] = few_shot
    differs = trained is not None and trained.storage not in (None, card.storage)
    if trained is not None and differs and not options.beside.only_given_storage:
        own = replace(card, storage=trained.storage, compute_dtype=trained.compute_dtype)
        summary |= _score_as_trained(options, adapter, own, rows, tokenizer)
    return summary


def check_rows_of(options: EvaluateOptions) -> None:
    """Refuse rows that could not be scored, as ``run_evaluation`` would, before a base is loaded.

    Raises:
        InputError: A file or a row is wrong.
    """
    _read(options, None, _cards(options, None)[1])


def _cards(
    options: EvaluateOptions, adapter: Path | None
) -> tuple[TrainingCard | None, TrainingCard]:
    """Return what the adapter was trained as, and what is scored."""
    trained = None if adapter is None else load_card(adapter)
    data, prompts = options.data, options.prompts
    card = merge_card(
        trained,
        options.model,
        template=data.template,
        max_length=data.max_length,
        raw=prompts.raw,
        joint=prompts.joint,
    )
    return trained, card


def _read(
    options: EvaluateOptions, adapter: Path | None, card: TrainingCard
) -> tuple[list[Row], TrainingCard, Any, Limits]:
    """Return the rows to score, the card that says how, the tokenizer and what the base bears."""
    data = options.data
    rows = load_rows(data.data, split=data.split, limit=data.limit)
    if card.label_names is None and rows[0].kind == "label":
        card = replace(card, label_names=label_names(rows))
    config = load_config(options.model.model)
    tokenizer = tokenizer_for(options.model.model, adapter, card, config=config)
    card = with_template(card, tokenizer)
    limits = Limits.of(config, tokenizer, task_type=card.task_type)
    rows = rows_to_score(rows, tokenizer, card, _settings(options, None), options.prompts, limits)
    return rows, card, tokenizer, limits


def _with_examples(
    rows: Sequence[Row], path: str, tokenizer: Any, card: TrainingCard
) -> tuple[list[Row], dict[str, Any], str | None]:
    """The rows with the examples of a file before them, what was shown, and where answers end."""
    with naming("examples"):
        examples = as_choices(load_rows(path), card.label_names)
    rows = as_choices(rows, card.label_names)
    rows, counts = with_examples(rows, examples, tokenizer, **card.prompts)
    num_short = sum(count < len(examples) for count in counts)
    if num_short:
        logger.warning(
            "%s of %s prompts have fewer than the %s examples before them, one %s: max_length %s "
            "has no room for more",
            *(num_short, len(rows), len(examples), min(counts), card.max_length),
        )
    shown = [example.source for example in examples]
    found = {"shown": shown, "num_short": num_short, "fewest": min(counts)}
    return rows, found, None if rows[0].messages else separator(examples)


def _score_as_trained(
    options: EvaluateOptions,
    adapter: Path | None,
    card: TrainingCard,
    rows: Sequence[Row],
    tokenizer: Any,
) -> dict[str, Any]:
    """Score again on a base that is stored as in the training."""
    logger.warning(
        "scoring on %s as well, as in the training; --only-given-storage leaves that out",
        card.storage,
    )
    gc.collect()  # the first model, before there is a second one
    try:
        summary = _load_and_score(options, adapter, card, rows, tokenizer).summary()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("not scored on %s: out of memory (%s)", card.storage, error)
        summary = {}
    names = ("value", "accuracy", "loss")
    scores = {f"{name}_trained_storage": summary[name] for name in names if name in summary}
    return {"trained_storage": card.storage, **scores}


def _load_and_score(
    options: EvaluateOptions,
    adapter: Path | None,
    card: TrainingCard,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    windows: Windows | None = None,
    stop: str | None = None,
) -> Scores:
    """Load the model that the card says and score it on rows and, if given, on general text."""
    model, _ = load_adapted(
        options.model, adapter, card, resident=options.reuse.resident, tokenizer=tokenizer
    )
    if adapter is None and card.task_type == "SEQ_CLS" and ours(model).has_new_head:
        logger.warning(
            "%s has no classification head: it got a new one, of random weights, and its scores "
            "say nothing; give the --adapter that was trained with one",
            options.model.model,
        )
    with ExitStack() as stack:
        directory = options.reuse.reuse_dir
        if directory is None and options.reuse.resident == "upper":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = replace(_settings(options, directory), stop=stop)
        scores = score(model, tokenizer, rows, card, settings)
    if not windows:
        return scores
    loss = general_loss(
        model,
        tokenizer,
        windows,
        batch_size=options.batch_size,
        source=str(options.beside.forgetting),
        quiet=options.quiet,
    )
    return replace(scores, general_loss=loss)


def _settings(options: EvaluateOptions, reuse_dir: Path | None) -> ScoringSettings:
    return ScoringSettings(
        **vars(options.scoring),
        batch_size=options.batch_size,
        quiet=options.quiet,
        reuse=options.reuse,
        reuse_dir=reuse_dir,
    )


def _prediction_lines(
    rows: Sequence[Row], scores: Scores, card: TrainingCard
) -> Iterator[dict[str, Any]]:
    """What is written per example: where it is from, what was asked, answered and right."""
    nothing = [None] * len(rows)
    found = (scores.predictions, scores.references)
    known = (scores.correct or nothing, scores.texts or nothing)
    losses = list(zip(scores.losses, scores.num_tokens, strict=True)) or nothing
    for row, prediction, reference, correct, text, loss in zip(
        rows, *found, *known, losses, strict=True
    ):
        line = {
            "source": row.source,
            "prompt": row.prompt or row.prompt_messages[-1]["content"],
            "prediction": prediction,
            "reference": reference,
            "correct": correct,
        }
        names = row.choices or card.label_names or ()
        if type(prediction) is int and names:
            line["prediction_text"], line["reference_text"] = names[prediction], names[reference]
        elif text is not None:
            line["prediction_text"], line["reference_text"] = text, row.response
        if loss is not None:
            line["loss"], line["num_tokens"] = loss[0] / loss[1], loss[1]
        yield line
