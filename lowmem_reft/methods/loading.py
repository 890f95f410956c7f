"""Loads the base that a card describes, and an adapter on it, ready to score or to generate."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_reft.base.hub import load_config
from lowmem_reft.base.identity import OTHER_BASE, checkpoint_digest, other_base
from lowmem_reft.base.loading import load_base, share_pad_token
from lowmem_reft.base.trust import holding_tensors_alone
from lowmem_reft.errors import InputError, is_of_the_machine
from lowmem_reft.methods.attach import complete, peft_notices_hidden, prepare_base
from lowmem_reft.methods.card import TrainingCard, load_card
from lowmem_reft.methods.constant import find_first_resident
from lowmem_reft.methods.saved import put_on, read_config, read_shapes
from lowmem_reft.methods.tokenizers import tokenizer_for
from lowmem_reft.options import ModelOptions

logger = logging.getLogger(__name__)


def load_frozen(
    options: ModelOptions,
    card: TrainingCard,
    tokenizer: Any,
    *,
    config: Any,
    upper_for: Any = None,
) -> Any:
    """Load the base as the card says, with the tokenizer's pad token.

    With ``upper_for``, the configuration of an adapter, only the blocks are loaded that it needs;
    ``config`` is what ``load_config`` has read.

    Raises:
        InputError: The base cannot be loaded.
    """
    task: dict[str, Any] = {"task_type": card.task_type, "num_labels": card.num_classes}
    resident: dict[str, Any] = {}
    if upper_for is not None:
        first = find_first_resident(config, upper_for, **task)
        resident = {"resident": "upper", "first_resident": first}
    base = load_base(
        options.model,
        storage=card.storage,
        compute_dtype=card.compute_dtype,
        device=options.device,
        config=config,
        **task,
        **resident,
    )
    share_pad_token(base, tokenizer)
    return base


def load_adapted(
    options: ModelOptions,
    adapter: Path | None,
    card: TrainingCard,
    *,
    resident: str = "all",
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Load base, adapter (or None) and tokenizer (the adapter's own, if any), in evaluation mode.

    With ``resident="upper"`` only the blocks are loaded that the adapter needs. A ``tokenizer``
    that was loaded for it before is the one that is returned.

    Raises:
        InputError: The base, the adapter or the tokenizer cannot be loaded.
    """
    config = load_config(options.model)
    if tokenizer is None:
        tokenizer = tokenizer_for(options.model, adapter, card, config=config)
    if adapter is None and resident != "all":
        raise InputError(f"resident must be all without an adapter, got {resident!r}; leave it out")
    peft_config = None
    if adapter is not None:  # before the base, which takes longer
        peft_config = read_config(adapter)
        read_shapes(adapter)
    upper_for = peft_config if resident == "upper" else None
    base = load_frozen(options, card, tokenizer, config=config, upper_for=upper_for)
    if adapter is None:
        return base.eval(), tokenizer
    with fitting(options.model, adapter, card):
        prepare_base(base, peft_config)
        model = put_on(base, adapter).eval()
    complete(model)
    return model, tokenizer


@contextmanager
def fitting(model: str, adapter: Path, card: TrainingCard, beside: str = "") -> Iterator[None]:
    """Load an adapter meanwhile: refuse one that does not fit, say that it is of another base.

    ``beside`` names the adapter that is there already.

    Raises:
        InputError: Something is said against it while it is loaded.
    """
    try:
        with other_base_said(model, adapter, card):
            yield
    except Exception as error:
        if isinstance(error, InputError) or is_of_the_machine(error):
            raise
        named = f" {card.base!r}" if card.base != model else ", which it does not name"
        raise InputError(
            f"adapter must fit the model {model!r}{beside and f' beside {beside!r}'}, got "
            f"{str(adapter)!r}; give the base that it was made for{named} ({what_differs(error)})"
        ) from error


def what_differs(error: Exception) -> str:
    """Return the first thing that torch, or whoever raised it, says of an adapter and a base."""
    first, *rest = (line.strip() for line in str(error).splitlines() or [type(error).__name__])
    return rest[0] if first.endswith(":") and rest else first


@contextmanager
def other_base_said(model: str, adapter: Path, card: TrainingCard) -> Iterator[None]:
    """Say that an adapter is put on another base, or another storage, than its own, and only once.

    PEFT loads the adapter meanwhile; the card tells how the base at hand is stored.
    """
    trained, said = load_card(adapter), None
    if trained is not None:
        said = other_base(
            (trained.base, trained.storage, trained.base_digest),
            (model, card.storage, checkpoint_digest(model)),
        )
    with peft_notices_hidden(), holding_tensors_alone("adapter", adapter):
        if said is not None:
            logger.warning(said)
            warnings.filterwarnings("ignore", OTHER_BASE, UserWarning)
        yield
