"""Several adapters on one base: found and compared by their cards, loaded together, chosen by name.

PEFT holds adapters of one type in a model. ReFT and LoRA of several kinds go into one batch, row by
row (``adapter_names``); with other types, the rows of each adapter go by themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_reft.base.hub import load_config
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import complete
from lowmem_reft.methods.card import (
    TrainingCard,
    find_adapter,
    load_card,
    merge_card,
    with_template,
)
from lowmem_reft.methods.loading import fitting, load_adapted
from lowmem_reft.methods.saved import holds_base_weights, put_on, read_config
from lowmem_reft.methods.table import MIXED_IN_A_BATCH, REPLACING_THE_BASE
from lowmem_reft.methods.tokenizers import tokenizer_for, what_differs_in
from lowmem_reft.options import ModelOptions
from lowmem_reft.reft.peft_method import type_of

BASE = "__base__"
"""PEFT's name for no adapter."""


@dataclass(frozen=True, kw_only=True)
class NamedAdapter:
    """One of the adapters that answer, or the base."""

    name: str
    """The name of its folder (of the run's, where that is ``adapter``), or ``__base__``."""
    peft_name: str
    """Its name in the model, which may not hold dots."""
    directory: Path | None
    """Where it was saved; None for the base."""
    card: TrainingCard
    """How it reads prompts, and what it was trained on."""


def find_adapters(
    given: str | None,
    model: ModelOptions,
    *,
    template: str | None,
    max_length: int | None,
    raw: bool = False,
) -> list[NamedAdapter]:
    """Find the adapters that an option names and check that they go together.

    Args:
        given: Directories with commas between them, ``__base__`` for the base; None: the base.
        model: The base as the user gave it.
        template: How prompts are written; None: as in each adapter's training. The base is asked
            as the first adapter is; alone through its tokenizer's chat template, if it has one.
        max_length: Tokens of a prompt; None likewise.
        raw: The template is to be "{prompt}".

    Raises:
        InputError: One is not there, names are not unique, or they do not go together.
    """
    parts = _split(given)
    _check_names([_name(part) for part in parts])
    directories = [None if part == BASE else find_adapter(Path(part)) for part in parts]
    own = [None if path is None else load_card(path) for path in directories]
    first = next((card for card in own if card is not None), None)
    adapters: list[NamedAdapter] = []
    for part, path, card in zip(parts, directories, own, strict=True):
        read = merge_card(
            card if path else first, model, template=template, max_length=max_length, raw=raw
        )
        if read.task_type != "CAUSAL_LM":
            raise InputError(
                f"task_type must be CAUSAL_LM to generate, got {read.task_type!r}; a classifier is "
                "scored with evaluate"
            )
        number = sum(other.directory is not None for other in adapters)
        peft_name = BASE if path is None else f"adapter_{number}" if number else "default"
        adapters.append(
            NamedAdapter(name=_name(part), peft_name=peft_name, directory=path, card=read)
        )
    _check_agreement(adapters)
    if all(each.card.template for each in adapters):
        return adapters
    # Of the base alone the tokenizer says how it is asked.
    config = load_config(model.model)
    tokenizer = tokenizer_for(model.model, None, adapters[0].card, config=config)
    return [replace(each, card=with_template(each.card, tokenizer)) for each in adapters]


def load_together(options: ModelOptions, adapters: Sequence[NamedAdapter]) -> tuple[Any, Any]:
    """Load the base, every adapter on it and the tokenizer, in evaluation mode.

    Raises:
        InputError: One of them cannot be loaded, or they cannot be in one model.
    """
    trained = [adapter for adapter in adapters if adapter.directory is not None]
    if len(adapters) > 1:
        _check_types(trained, alone=len(trained) < len(adapters))
    card = (trained or adapters)[0].card
    model, tokenizer = load_adapted(options, trained[0].directory if trained else None, card)
    _check_tokenizers(trained, tokenizer, options.model)
    for adapter in trained[1:]:
        directory = Path(str(adapter.directory))
        with fitting(options.model, directory, adapter.card, beside=trained[0].name):
            put_on(model, directory, adapter.peft_name)
    for adapter in trained if len(adapters) > 1 else ():
        if type_of(model.peft_config[adapter.peft_name]) != REPLACING_THE_BASE and (
            holds_base_weights(Path(str(adapter.directory)), model)
        ):
            raise InputError(
                f"adapter must name one adapter where it holds weights of the base itself, as of a "
                f"resized embedding, got {str(adapter.directory)!r} among others; run the command "
                "once for each"
            )
    if len(trained) > 1:
        complete(model)
    return model.eval(), tokenizer


@contextmanager
def answering(model: Any, peft_name: str) -> Iterator[None]:
    """Let one adapter (or ``__base__``) answer for a while; then the one that did before.

    The model is one that ``load_together`` returns, the name is the adapter's in it.
    """
    if not hasattr(model, "peft_config"):
        yield
    elif peft_name == BASE:
        with model.disable_adapter():
            yield
    else:
        before = model.active_adapter
        model.set_adapter(peft_name, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(before, inference_mode=True)


def mixes_in_a_batch(model: Any) -> bool:
    """Return whether PEFT can give every row of a batch an adapter of its own."""
    return all(map(_mixes, getattr(model, "peft_config", {}).values()))


def _mixes(config: Any) -> bool:
    if getattr(config, "use_dora", False) or getattr(config, "alora_invocation_tokens", None):
        return False
    return type_of(config) in MIXED_IN_A_BATCH


def _split(given: str | None) -> list[str]:
    if given is None:
        return [BASE]
    if Path(given).is_dir():  # its own name may hold a comma
        return [given]
    return [part.strip() for part in given.split(",")]


def _name(part: str) -> str:
    if part == BASE:
        return part
    path = Path(part).resolve()
    run = path.parent.name  # empty for /adapter
    return run if run and path.name == "adapter" else path.name


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"adapter must name folders with different names, got {twice[0]!r} more than once; "
            "answers carry the name, so rename one"
        )


def _check_agreement(adapters: Sequence[NamedAdapter]) -> None:
    """Refuse adapters that want the one base stored differently; warn of different bases."""
    for field in ("storage", "compute_dtype"):
        values = {adapter.name: getattr(adapter.card, field) for adapter in adapters}
        if len(set(values.values())) > 1:
            got = ", ".join(f"{value} ({name})" for name, value in values.items())
            raise InputError(
                f"{field} must be given for adapters that were trained with different ones, got "
                f"{got}; choose one for all of them"
            )
    bases = {adapter.name: adapter.card.base for adapter in adapters}
    if len(set(bases.values())) > 1:
        got = ", ".join(f"{base!r} ({name})" for name, base in bases.items())
        warnings.warn(
            f"the adapters were trained on bases of different names, {got}; their answers are "
            "right only if these are the same",
            stacklevel=3,
        )


def _check_types(trained: Sequence[NamedAdapter], *, alone: bool) -> None:
    kinds = {a.name: type_of(read_config(Path(str(a.directory)))) for a in trained}
    got = ", ".join(f"{kind} ({name})" for name, kind in kinds.items())
    if len(set(kinds.values())) > 1:
        raise InputError(
            f"adapter must name adapters of one PEFT type to load them together, got {got}; run "
            "the command once for each type"
        )
    if REPLACING_THE_BASE in kinds.values() and (alone or len(trained) > 1):
        raise InputError(
            f"adapter must name one adapter where that replaces the base's own weights, got {got}; "
            "run the command once for each, and without it for the base"
        )


def _check_tokenizers(trained: Sequence[NamedAdapter], first: Any, model: str) -> None:
    """Refuse adapters that read prompts with different tokenizers or chat templates."""
    for adapter in trained[1:]:
        config = load_config(model)
        other = tokenizer_for(model, adapter.directory, adapter.card, config=config)
        differing = what_differs_in(first, other)
        if differing:
            raise InputError(
                f"adapter must name adapters with one tokenizer to load them together, got another "
                f"{differing} for {adapter.name!r} than for {trained[0].name!r}; run the command "
                "once for each"
            )
