"""A model's cache of the tokens that it has seen: known by what it is, not by what it is called.

transformers has called the argument ``past_key_values``, ``cache_params``, ``state`` and, since
5.24, ``cache``. Nothing here or above relies on such a name.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from lowmem_reft.machine.provenance import installed

_PLAIN = (type(None), Tensor, bool, int, float, str)

# Where a forward declares no type: names that attention caches have had, the newest first.
_OLDER_NAMES = ("cache", "past_key_values")

# Objects that are searched for tensors before an argument is taken to hold none.
_MOST_VISITED = 10_000


class Seen(NamedTuple):
    """How many tokens a cache holds."""

    tokens: int
    is_exact: bool
    """False: at least one; a recurrent state does not count them."""


def caches_in(values: Iterable[Any]) -> list[Any]:
    """Return what is a cache among arguments of a forward or parts of its output, each once."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, _PLAIN) or any(value is other for other in found):
            continue
        if is_cache(value):
            found.append(value)
        elif isinstance(value, dict):  # arguments in a dictionary of their own
            found += caches_in(value.values())
    return found


def is_cache(value: Any) -> bool:
    """Return whether a value is a cache whose length can be asked for."""
    return isinstance(value, Cache) or any(
        hasattr(value, name) for name in ("get_seq_length", "has_previous_state", "seqlen_offset")
    )


def tokens_in(cache: Any) -> Seen | None:
    """Return how many tokens a cache holds; None where it does not say."""
    length = _answer(cache, "get_seq_length")  # None: layers without keys have no length
    if length:
        return Seen(length, True)
    is_filled = _answer(cache, "has_previous_state")
    if is_filled is None:
        offset = getattr(cache, "seqlen_offset", length)
        return None if offset is None else Seen(int(offset), True)
    return Seen(1, False) if is_filled else Seen(0, True)


def _answer(cache: Any, question: str) -> int | None:
    """Return what a method of a cache says; None if there is none or it does not apply."""
    try:
        return int(getattr(cache, question)())
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return None


def states_in(values: Iterable[Any]) -> list[Any]:
    """Return what holds tensors and is none, such as a list: it may be a state without a length.

    ``values`` are arguments of a model's forward without masks, or the parts of its output.
    """
    return [v for v in values if not isinstance(v, _PLAIN) and _has_tensor(v)]


def _has_tensor(value: Any) -> bool:
    """Return whether a value holds a tensor at any depth, in containers and in attributes."""
    waiting: list[Any] = [value]
    visited: set[int] = set()
    while waiting and len(visited) < _MOST_VISITED:
        value = waiting.pop()
        if isinstance(value, Tensor):
            return True
        if id(value) in visited or isinstance(value, (*_PLAIN, nn.Module, type)):
            continue
        visited.add(id(value))
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | deque):
            waiting += value
        else:
            waiting += getattr(value, "__dict__", {}).values()
            waiting += [getattr(value, name, None) for name in getattr(value, "__slots__", ())]
    return False


def cache_argument(model: Any) -> str | None:
    """Return the name under which the forward of a model (not wrapped) takes a cache, or None."""
    parameters = inspect.signature(model.forward).parameters
    for name, parameter in parameters.items():
        if re.search(r"\b(Dynamic|EncoderDecoder)?Cache\b", str(parameter.annotation)):
            return name
    return next((name for name in _OLDER_NAMES if name in parameters), None)


def keeps_keys_and_values(config: Any) -> bool:
    """Return whether a model's cache holds keys and values, and not recurrent states alone."""
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True


def can_be_parted(config: Any) -> bool:
    """Return whether a model's cache is keys and values throughout, which `with_rows` parts."""
    try:
        layers = DynamicCache(config=config).layers
    except ValueError:
        return False
    # Nothing that is derived from them: it may hold more.
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def has_windows(config: Any) -> bool:
    """Return whether some layers attend to the last tokens alone, padding between them included."""
    # GPT-Neo, whose cache keeps all tokens, calls such layers so.
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return True
    return any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)


def changing_rotation(config: Any, longest: int) -> str | None:
    """Return the kind of rotary scaling that turns all keys otherwise once rows are so long.

    None: keys are the same whatever follows them.
    """
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Of each type of layer its own, or one for all.
    for scaling in [given, *(each for each in given.values() if isinstance(each, dict))]:
        kind = str(scaling.get("rope_type", scaling.get("type")))
        starts = {
            "dynamic": getattr(text, "max_position_embeddings", None),
            "longrope": scaling.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None),
        }
        start = starts.get(kind)
        if kind in starts and (start is None or longest > start):
            return kind
    return None


def with_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a cache of some rows of another, each as often as its index is in ``rows``.

    The other stays as it is. ``cache`` is of a configuration that `can_be_parted`: what a pass
    adds to a copy, it adds to new tensors.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_select_indices(rows)
    return copied


def repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """Return a cache of one row as of so many; nothing is copied until a pass adds to it.

    The other stays as it is, and is as in `with_rows`.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    layers: Any = copied.layers  # keys and values each, which a union of all kinds does not say
    for layer in layers:
        layer.keys, layer.values = (
            each.expand(count, -1, -1, -1) for each in (layer.keys, layer.values)
        )
    return copied


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments that hand a cache, to read and fill, to a model that is not wrapped.

    Raises:
        TypeError: Its forward takes none, or not under a name that can be recognized.
    """
    name = cache_argument(model)
    if name is None:
        raise TypeError(
            f"the forward of {type(model).__name__} takes no cache of keys and values that can be "
            f"recognized ({installed('transformers')})"
        )
    return {name: cache, "use_cache": True}
