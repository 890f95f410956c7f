"""Loads the base that a card describes, and an adapter on it, ready to score or to generate."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from lowmem_reft.base.hub import load_config
from lowmem_reft.base.identity import OTHER_BASE, checkpoint_digest, other_base
from lowmem_reft.base.loading import load_base, load_tokenizer, share_pad_token
from lowmem_reft.base.trust import holding_tensors_alone
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import complete, peft_notices_hidden, prepare_base
from lowmem_reft.methods.card import TrainingCard, load_card
from lowmem_reft.methods.constant import find_first_resident
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
    options: ModelOptions, adapter: Path | None, card: TrainingCard, *, resident: str = "all"
) -> tuple[Any, Any]:
    """Load base, adapter (or None) and tokenizer, in evaluation mode.

    With ``resident="upper"`` only the blocks are loaded that the adapter needs.

    Raises:
        InputError: The base, the adapter or the tokenizer cannot be loaded.
    """
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model, config=config)
    if adapter is None and resident != "all":
        raise InputError(f"resident must be all without an adapter, got {resident!r}; leave it out")
    upper_for = PeftConfig.from_pretrained(str(adapter)) if resident == "upper" else None
    base = load_frozen(options, card, tokenizer, config=config, upper_for=upper_for)
    if adapter is None:
        return base.eval(), tokenizer
    try:
        prepare_base(base, PeftConfig.from_pretrained(str(adapter)))
        with other_base_said(options.model, adapter, card):
            model = PeftModel.from_pretrained(base, str(adapter)).eval()
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        named = f" {card.base!r}" if card.base != options.model else ", which it does not name"
        raise InputError(
            f"adapter must fit the model {options.model!r}, got {str(adapter)!r}; give the base "
            f"that it was made for{named} ({what_differs(error)})"
        ) from error
    complete(model)
    return model, tokenizer


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
