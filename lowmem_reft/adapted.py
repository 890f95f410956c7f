"""Loads the base that a card describes, and an adapter on it, ready to score or to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_reft.base import load_base, load_tokenizer, share_pad_token
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from lowmem_reft.options import ModelOptions
    from lowmem_reft.training_card import TrainingCard


def load_frozen(options: ModelOptions, card: TrainingCard, tokenizer: Any) -> Any:
    """Load the base as the card says, with the tokenizer's pad token.

    Raises:
        InputError: the base cannot be loaded.
    """
    base = load_base(
        options.model,
        storage=card.storage,
        compute_dtype=card.compute_dtype,
        device=options.device,
        task_type=card.task_type,
        num_labels=card.num_classes,
    )
    share_pad_token(base, tokenizer)
    return base


def load_adapted(
    options: ModelOptions, adapter: Path | None, card: TrainingCard
) -> tuple[Any, Any]:
    """Load base, adapter (or None) and tokenizer, in evaluation mode.

    Raises:
        InputError: the base, the adapter or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(options.model)
    base = load_frozen(options, card, tokenizer)
    if adapter is None:
        return base.eval(), tokenizer
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter)).eval(), tokenizer
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"adapter must fit the model {options.model!r}, got {str(adapter)!r}; it was made for "
            f"{card.base!r} ({str(error).splitlines()[0]})"
        ) from error
