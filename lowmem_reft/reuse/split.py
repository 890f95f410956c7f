"""Where the constant part of an adapted model, and of each example, ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from lowmem_reft.base.blocks import base_of, find_blocks
from lowmem_reft.base.caches import changing_rotation
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError, is_out_of_memory
from lowmem_reft.methods.constant import num_constant_blocks
from lowmem_reft.reft.tuner import ReftModel, groups_of
from lowmem_reft.reuse.disk import ReuseError
from lowmem_reft.reuse.store import CorruptShardError

Example = dict[str, Any]
"""``input_ids`` and ``labels``: lists of integers (labels: one number for a head over texts)."""


class NothingToReuseError(ReuseError):
    """Nothing is constant, or too little to be worth a store: nothing went wrong."""


_CANNOT_BE_FED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
"""What a model's forward raises when it does not take what is fed."""


@contextmanager
def feeding_errors(base: Any) -> Iterator[None]:
    """Turn what a model raises when it is fed into a reason not to reuse.

    Raises:
        ReuseError: Something was raised, but for a lack of memory.
    """
    try:
        yield
    except _CANNOT_BE_FED as error:
        lines = str(error).splitlines() or [""]
        if isinstance(error, (InputError, CorruptShardError)) or is_out_of_memory(error):
            raise
        raise ReuseError(
            f"{type(base).__name__} cannot be fed stored hidden vectors ({type(error).__name__}: "
            f"{lines[0]})"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Constant:
    """What of each example is constant."""

    num_blocks: int
    """Blocks whose outputs are constant."""
    first_edited: list[int]
    """Per example: tokens before the first one that training can change; 0 without a prefix."""


def find_constant(model: Any, examples: Sequence[Example], *, prefix: bool) -> Constant:
    """Return what is constant of a data set under a PeftModel.

    ``prefix`` says whether keys and values of constant prefixes may be used.

    Raises:
        ReuseError: Nothing is constant.
    """
    num_blocks = num_constant_blocks(model)
    if num_blocks == 0:
        raise NothingToReuseError("the first block or the embedding is trained")
    base = base_of(model)
    dropout = _dropout(base)
    if dropout is not None:
        raise ReuseError(f"the base drops out activations ({dropout})")
    longest = max((len(example["input_ids"]) for example in examples), default=0)
    _refuse_length_dependent_rotation(base, longest)
    first = [0] * len(examples)
    if prefix and _prefix_is_constant(model, longest):
        first = [_first_edited(model, example) for example in examples]
    return Constant(num_blocks=num_blocks, first_edited=first)


def _dropout(base: Any) -> str | None:
    """Return the name of something in the base that drops out activations; None if nothing does."""
    for name, module in base.named_modules():
        if "lora_" in name or "reft" in name:
            continue
        rate = getattr(module, "attention_dropout", module)
        rate = rate.p if isinstance(rate, nn.Dropout) else rate
        if isinstance(rate, float) and rate > 0:
            return f"{name}: {rate}"
    return None


def _refuse_length_dependent_rotation(base: Any, longest: int) -> None:
    """Refuse rotary scaling that depends on the longest example, if one is that long."""
    kind = changing_rotation(base.config, longest)
    if kind is not None:
        raise ReuseError(f"{kind} rotary scaling depends on what else is in a batch")


def _prefix_is_constant(model: Any, longest: int) -> bool:
    """Whether all that is trained sits in ReFT layers of a causal model without sliding windows.

    Checkpointed blocks read no cache, so with activation checkpointing there is no prefix.
    """
    base = base_of(model)
    if any(getattr(block, "gradient_checkpointing", False) for block in find_blocks(base)[1]):
        return False
    if not isinstance(getattr(model, "base_model", None), ReftModel):
        return False
    if any("reft_phi" not in name for name, p in model.named_parameters() if p.requires_grad):
        return False  # a head, say, that is trained on hidden vectors of the prefix
    if any(isinstance(module, ModulesToSaveWrapper) for module in base.modules()):
        return False
    text = base.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    default = "full_attention" if window is None or longest <= window else "sliding_attention"
    kinds = set(getattr(text, "layer_types", None) or [default])
    return is_causal(base) and kinds == {"full_attention"}


def is_causal(base: Any) -> bool:
    """Whether a hidden vector depends on the tokens before it alone, as in a language model."""
    text = base.config.get_text_config()
    both_ways = getattr(text, "use_bidirectional_attention", None)
    one_way = not both_ways and getattr(text, "is_causal", True) is not False
    return bool(base.can_generate()) and one_way


def _first_edited(model: Any, example: Example) -> int:
    """Return how many tokens come before the first edited one (and before the first prediction)."""
    edited = [group >= 0 for group in groups_of(model, [example])[0].tolist()]
    supervised = [label != IGNORED_LABEL for label in example["labels"]]
    ends = [len(edited) - 1]
    if any(edited):
        ends.append(edited.index(True))
    if any(supervised):
        ends.append(supervised.index(True) - 1)  # the vector that predicts it is needed above
    return max(0, min(ends))
