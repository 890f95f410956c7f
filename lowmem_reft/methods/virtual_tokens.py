"""Where the trained tokens of prompt learning stand: right before the first token of each prompt.

PEFT puts virtual embeddings at the front of a batch, in front of the padding if that is on the
left, and drops the position ids: what an example gets would then depend on the padding beside it.
Here they stand between padding and prompt, as they do in training, where padding is on the right.
Prefix tuning has its tokens in the cache, whose positions PEFT counts rightly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.caches import cache_argument
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError


def num_virtual_tokens(model: Any) -> int:
    """Return how many trained tokens a forward pass adds to each example, in cache or input.

    A model without prompt learning, or with its adapter disabled, adds none.
    """
    config = _active_config(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def embeds_virtual_tokens(model: Any) -> bool:
    """Return whether the virtual tokens are embeddings, which lengthen the input."""
    config = _active_config(model)
    return config is not None and config.peft_type != "PREFIX_TUNING"


def _active_config(model: Any) -> Any:
    if getattr(model, "_adapters_disabled", True) or not hasattr(model, "active_peft_config"):
        return None
    config = model.active_peft_config
    return config if config.is_prompt_learning else None


def with_virtual_tokens(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"] | None = None,
) -> dict[str, Tensor]:
    """Return what the *base* is to be called with, v virtual tokens longer.

    Padding may be on either side; labels are -100 where a token is not supervised.

    Returns:
        ``inputs_embeds`` (batch, v + seq, hidden), ``attention_mask`` and ``position_ids``
        (batch, v + seq), which count from the first virtual token, and ``labels`` if given.
    """
    batch, length = input_ids.shape
    num_virtual = num_virtual_tokens(model)
    embedded = model.word_embeddings(input_ids.to(model.word_embeddings.weight.device))
    prompts = model.get_prompt(batch_size=batch).to(embedded)
    # Of what is laid out as [virtual | padding and tokens], the index that each place takes.
    first = attention_mask.argmax(1, keepdim=True)  # (batch, 1): the first token of the prompt
    place = torch.arange(num_virtual + length, device=first.device).expand(batch, -1)
    virtual = (place >= first) & (place < first + num_virtual)
    index = torch.where(
        place < first, place + num_virtual, torch.where(virtual, place - first, place)
    )

    def extended(values: Tensor, virtual_value: int) -> Tensor:
        front = values.new_full((batch, num_virtual), virtual_value)
        return torch.cat([front, values], 1).gather(1, index.to(values.device))

    both = torch.cat([prompts, embedded], 1)
    mask = extended(attention_mask, 1)
    result = {
        "inputs_embeds": both.gather(1, index.to(both.device)[..., None].expand_as(both)),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    if labels is not None:
        result["labels"] = extended(labels, IGNORED_LABEL)
    return result


# As PEFT 0.21 hands a prefix to the base, and looks for the cache in the arguments of generate.
_NAME_IN_PEFT = "past_key_values"


def take_prefix_as_cache(model: Any) -> None:
    """Make the base take PEFT's prefix as its cache, whatever transformers calls the argument.

    transformers 5.24 calls it ``cache``. PEFT 0.21 then refuses classifiers, and in ``generate``
    it sees no cache, so that every step got a new prefix, which the base ignored. A model without
    prefix tuning, or done already, is left alone.
    """
    if all(config.peft_type != "PREFIX_TUNING" for config in model.peft_config.values()):
        return
    if hasattr(type(model), "generate"):
        model.generate = functools.partial(_generate_with_prefix, model)
    base = model.get_base_model()
    plain, name = base.forward, cache_argument(base)
    signature = inspect.signature(plain)
    if name is None or _NAME_IN_PEFT in signature.parameters:
        return
    older = inspect.Parameter(_NAME_IN_PEFT, inspect.Parameter.KEYWORD_ONLY, default=None)
    *first, last = signature.parameters.values()
    parameters = [*first, older, last] if last.kind is last.VAR_KEYWORD else [*first, last, older]
    base.forward = functools.wraps(plain)(functools.partial(_with_cache_as, plain, name))
    base.forward.__signature__ = signature.replace(parameters=parameters)
    if hasattr(model, "base_model_prepare_inputs_for_generation"):
        model.base_model_prepare_inputs_for_generation = functools.partial(
            _with_cache_for_peft, model.base_model_prepare_inputs_for_generation, name
        )


def _with_cache_as(forward: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a base's forward: take the cache under PEFT's name for it, too."""
    cache = kwargs.pop(_NAME_IN_PEFT, None)
    return forward(*args, **(kwargs if cache is None else {**kwargs, name: cache}))


def _with_cache_for_peft(prepare: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Prepare the inputs of a step of ``generate``, with the cache under PEFT's name for it."""
    inputs = prepare(*args, **kwargs)
    inputs[_NAME_IN_PEFT] = inputs.pop(name, None)
    return inputs


def _generate_with_prefix(model: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Generate as PEFT does; refuse what its prefix, which is a cache of PEFT's, does not go into.

    Raises:
        InputError: An option of ``generate`` needs another cache, or none.
    """
    if num_virtual_tokens(model) and not embeds_virtual_tokens(model):
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        configs = (given, base_of(model).generation_config)
        for name, is_possible in _WITH_PREFIX.items():
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            value = next((value for value in values if value is not None), None)
            if value is not None and not is_possible(value):
                raise InputError(
                    f"{name} must be left out of generate with prefix tuning, whose tokens stand "
                    f"in a cache of PEFT's, got {value!r}; prompt and p_tuning have none"
                )
    return type(model).generate(model, *args, **kwargs)


_WITH_PREFIX: dict[str, Callable[[Any], bool]] = {
    "use_cache": lambda value: value is True,
    "cache_implementation": lambda value: value == "dynamic",
    "prefill_chunk_size": lambda value: False,
    "prompt_lookup_num_tokens": lambda value: False,
    "assistant_model": lambda value: False,
}
"""Options of ``generate``, and which values a prefix goes with."""


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Int[Tensor, "batch new"]:
    """Continue the prompts of a left-padded batch; return the new tokens alone.

    ``batch`` has ``input_ids`` and ``attention_mask``; options are those of ``generate``. Nothing
    else is gone by: a base's own ``generation_config`` may penalize, search beams, stop the clock
    or draw.

    Raises:
        InputError: The model gives no numbers to choose a token by.
    """
    known = vars(GenerationConfig())
    settings = GenerationConfig(**{key: options[key] for key in options if key in known})
    more = {key: options[key] for key in options if key not in known}
    more["logits_processor"] = LogitsProcessorList([_Numbers()])
    with _without_defaults(model):
        if embeds_virtual_tokens(model):
            inputs = with_virtual_tokens(model, batch["input_ids"], batch["attention_mask"])
            del inputs["position_ids"]  # generate counts them from the mask, in every step
            base = model.get_base_model()
            new: Tensor = base.generate(**inputs, generation_config=settings, **more)
            return new
        output: Tensor = model.generate(**batch, generation_config=settings, **more)
    return output[:, batch["input_ids"].shape[1] :]


class _Numbers(LogitsProcessor):
    """Changes nothing, and refuses what has no greatest number: some token would come of it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        greatest = scores.amax(-1)  # NaN where there is one
        if not greatest.isfinite().all():
            raise InputError(
                f"model must give numbers to choose tokens by, got {greatest.tolist()}; look for "
                "NaN in the base's and the adapter's weights, or compute in bf16 or fp32 "
                "(--compute-dtype)"
            )
        return scores


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Take away what a base brings for everything that ``generate`` is not told."""
    # PEFT gives the base what the model around it has.
    holders = [base_of(model), *([model] if "generation_config" in vars(model) else [])]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config
