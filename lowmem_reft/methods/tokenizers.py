"""Which tokenizer and chat template an adapter is asked with: its own, where they lie beside it.

TRL saves them with every adapter and checkpoint. An adapter that was trained by ``train`` has the
base's; its card holds digests, by which a base whose tokenizer has changed since is noticed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json
from lowmem_reft.methods.card import TrainingCard

logger = logging.getLogger(__name__)

# One of these makes a tokenizer; others (tokenizer_config.json) change one.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"

# Read by rules that differ between tokenizers of one vocabulary.
_PROBE = "The  quick\n\n\tÄffin, 1234.5 don't\u3000日本 <s>"


def vocabulary_digest(tokenizer: Any) -> str:
    """Digest of tokens and ids, of BOS and EOS, and of how a text is cut into them; 16 digits."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer(_PROBE, verbose=False)["input_ids"],
    ]
    return _digest(parts)


def template_digest(tokenizer: Any) -> str:
    """Digest of the chat template, also of none; 16 digits."""
    return _digest(tokenizer.chat_template)


def own_tokenizer(adapter: Path, base: Any, *, config: Any = None) -> Any:
    """Return the tokenizer that lies beside an adapter, perhaps the base's with its chat template.

    Args:
        adapter: Its directory.
        base: The base's tokenizer; None: it has none.
        config: The base's configuration, which may tell the kind of tokenizer.

    Returns:
        None if nothing of the kind is there.

    Raises:
        InputError: What is there cannot be read.
    """
    if any(any(adapter.glob(pattern)) for pattern in _VOCABULARIES):
        try:
            return load_tokenizer(adapter, config=config)
        except InputError as error:
            raise InputError(
                f"adapter must have a tokenizer that can be read beside it, or none, got "
                f"{str(adapter)!r}; save it again or delete it ({error})"
            ) from error
    template = _template_in(adapter)
    if template is None or base is None:
        return None
    found = copy.copy(base)
    found.chat_template = template
    return found


def _template_in(adapter: Path) -> Any:
    path = adapter / _TEMPLATE
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        path = adapter / _SETTINGS
        said = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return said.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} must hold a chat template or settings of a tokenizer, got {error}; save it "
            "again or delete it"
        ) from error


def tokenizer_for(model: str, adapter: Path | None, card: TrainingCard, *, config: Any) -> Any:
    """Return the tokenizer that an adapter, or a base alone, is asked with.

    It is said where an adapter's own is not the base's, and where neither is that of the training.

    Args:
        model: Hub id or directory of the base.
        adapter: The adapter's directory; None: the base alone.
        card: The adapter's.
        config: The base's configuration.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    try:
        of_base = load_tokenizer(model, config=config)
    except InputError:
        own = None if adapter is None else own_tokenizer(adapter, None, config=config)
        if own is None:
            raise
        return own
    if adapter is None:
        return of_base
    own = own_tokenizer(adapter, of_base, config=config)
    if own is None:
        _say_what_changed(of_base, model, card)
        return of_base
    differing = what_differs_in(own, of_base)
    if differing:
        logger.warning(
            "the tokenizer that lies beside the adapter %s is used, for the base's answers too: it "
            "has another %s than that of %s",
            *(adapter, differing, model),
        )
    return own


def what_differs_in(first: Any, second: Any) -> str:
    """Return in words what two tokenizers differ in; empty if in nothing."""
    digests = {"vocabulary": vocabulary_digest, "chat template": template_digest}
    return " and ".join(name for name, of in digests.items() if of(first) != of(second))


def _say_what_changed(tokenizer: Any, model: str, card: TrainingCard) -> None:
    trained = {
        "vocabulary": (card.vocabulary_digest, vocabulary_digest),
        "chat template": (card.template_digest, template_digest),
    }
    changed = [name for name, (then, of) in trained.items() if then and then != of(tokenizer)]
    if changed:
        logger.warning(
            "the %s of %s is not the one that the adapter was trained with, so it reads other "
            "prompts; give the base as it was then, or train again",
            *(" and ".join(changed), model),
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
