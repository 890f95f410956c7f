"""Loads the base that a card describes, and an adapter on it, ready to score or to generate."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from lowmem_reft.attach import keep_dtypes, peft_notices_hidden, prepare_base
from lowmem_reft.base import load_base, load_config, load_tokenizer, share_pad_token
from lowmem_reft.errors import InputError
from lowmem_reft.frozen.split import find_first_resident
from lowmem_reft.identity import OTHER_BASE, checkpoint_digest, other_base
from lowmem_reft.training_card import load_card

if TYPE_CHECKING:
    from pathlib import Path

    from lowmem_reft.options import ModelOptions
    from lowmem_reft.training_card import TrainingCard

logger = logging.getLogger(__name__)


def load_frozen(
    options: ModelOptions, card: TrainingCard, tokenizer: Any, *, upper_for: Any = None
) -> Any:
    """Load the base as the card says, with the tokenizer's pad token.

    Args:
        options: Which base, and where to.
        card: How it is stored, and its task.
        tokenizer: The base's tokenizer.
        upper_for: Configuration of an adapter; only the blocks are loaded that it needs, see
            ``load_base``. None loads all of them.

    Raises:
        InputError: the base cannot be loaded.
    """
    resident: dict[str, Any] = {}
    if upper_for is not None:
        first = find_first_resident(
            load_config(options.model),
            upper_for,
            task_type=card.task_type,
            num_labels=card.num_classes,
        )
        resident = {"resident": "upper", "first_resident": first}
    base = load_base(
        options.model,
        storage=card.storage,
        compute_dtype=card.compute_dtype,
        device=options.device,
        task_type=card.task_type,
        num_labels=card.num_classes,
        **resident,
    )
    share_pad_token(base, tokenizer)
    return base


def load_adapted(
    options: ModelOptions, adapter: Path | None, card: TrainingCard, *, resident: str = "all"
) -> tuple[Any, Any]:
    """Load base, adapter (or None) and tokenizer, in evaluation mode.

    Args:
        options: Which base, and where to.
        adapter: Directory of the adapter.
        card: How the base is stored, and its task.
        resident: ``upper`` loads only the blocks that the adapter needs.

    Raises:
        InputError: the base, the adapter or the tokenizer cannot be loaded.
    """
    from peft import PeftConfig, PeftModel

    tokenizer = load_tokenizer(options.model)
    if adapter is not None:
        _warn_of_another_base(options.model, adapter, card)
    if adapter is None and resident != "all":
        raise InputError(f"resident must be all without an adapter, got {resident!r}; leave it out")
    upper_for = PeftConfig.from_pretrained(str(adapter)) if resident == "upper" else None
    base = load_frozen(options, card, tokenizer, upper_for=upper_for)
    if adapter is None:
        return base.eval(), tokenizer
    try:
        prepare_base(base, PeftConfig.from_pretrained(str(adapter)))
        with peft_notices_hidden():
            warnings.filterwarnings("ignore", OTHER_BASE, UserWarning)  # it is said by now
            model = PeftModel.from_pretrained(base, str(adapter)).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"adapter must fit the model {options.model!r}, got {str(adapter)!r}; it was made for "
            f"{card.base!r} ({str(error).splitlines()[0]})"
        ) from error
    keep_dtypes(model)
    return model, tokenizer


def _warn_of_another_base(model: str, adapter: Path, card: TrainingCard) -> None:
    """Say that an adapter is put on another base, or another quantization, than its own."""
    trained = load_card(adapter)
    if trained is not None:
        said = other_base(
            (trained.base, trained.storage, trained.base_digest),
            (model, card.storage, checkpoint_digest(model)),
        )
        if said is not None:
            logger.warning(said)
