"""transformers: what a cache of keys and values is, and how it says how many tokens it holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
)

from breaking import contract, doing_nothing, with_result, with_value, without, wrapped
from lowmem_reft.machine.contracts.models import cache_parameter

CACHE = "transformers.cache_utils:"
MASKS = "transformers.masking_utils:"
WINDOW = 4


def sliding_config() -> Any:
    """Of a model whose layers see a window alone."""
    return transformers.MistralConfig(
        sliding_window=WINDOW,
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
    )


def full_config() -> Any:
    return transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )


def recurrent_config() -> Any:
    return transformers.MambaConfig(
        num_hidden_layers=2, hidden_size=16, state_size=4, vocab_size=24
    )


def keys(length: int, start: int = 0) -> Tensor:
    """(1, 1, length, 8): each token's numbers are its position."""
    return torch.arange(start, start + length).view(1, 1, -1, 1).expand(1, 1, -1, 8).float()


OtherCache = type(
    "OtherCache",
    (),
    {name: value for name, value in vars(Cache).items() if name not in ("__dict__", "__weakref__")},
)
"""Has all that a cache has, and is none."""


def all_caches() -> dict[str, Any]:
    return {
        "dynamic": DynamicCache(),
        "dynamic of a model": DynamicCache(config=full_config()),
        "dynamic with windows": DynamicCache(config=sliding_config()),
        "static": StaticCache(config=full_config(), max_cache_len=8),
        "static with windows": StaticCache(config=sliding_config(), max_cache_len=8),
    }


def grow(cache: Any, length: int, start: int = 0) -> None:
    for layer in range(2):
        cache.update(keys(length, start), keys(length, start), layer)


@contract(
    "transformers",
    used_by="base/caches.py reft/past.py memory/predict.py",
    broken_by=with_result(f"{CACHE}StaticLayer.get_seq_length", lambda length: length * 0),
)
def test_every_cache_counts_its_tokens_also_beyond_a_window(breach: bool) -> None:
    for name, cache in all_caches().items():
        counts = [int(cache.get_seq_length())]
        for start, more in ((0, 3), (3, 1), (4, 2)):  # beyond the window of 4
            grow(cache, more, start)
            counts.append(int(cache.get_seq_length()))
        assert counts == [0, 3, 4, 6], name


@contract(
    "transformers",
    used_by="base/caches.py",
    broken_by=with_value(
        f"{__name__}:StaticCache", lambda **_: OtherCache(layer_class_to_replicate=DynamicLayer)
    ),
)
def test_every_cache_is_a_cache_by_its_class(breach: bool) -> None:
    assert all(isinstance(cache, Cache) for cache in all_caches().values())
    assert isinstance(DynamicCache(config=recurrent_config()), Cache)


@contract(
    "transformers",
    used_by="base/caches.py",
    broken_by=with_result(f"{CACHE}Cache.has_previous_state", lambda has: True),
)
def test_a_recurrent_state_has_no_length_but_says_whether_it_is_empty(ids: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(recurrent_config()).eval()
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="get_seq_length"):
        cache.get_seq_length()
    assert not cache.has_previous_state()
    output = model(input_ids=ids, use_cache=True)
    states = [part for part in output.values() if isinstance(part, Cache)]
    assert len(states) == 1
    assert states[0].has_previous_state()
    with pytest.raises(ValueError, match="has_previous_state"):
        DynamicCache(config=full_config()).has_previous_state()


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=doing_nothing(f"{CACHE}Cache.crop"),
)
def test_a_cache_is_cropped_by_a_number_of_tokens(breach: bool) -> None:
    for cache in (DynamicCache(), DynamicCache(config=full_config())):
        grow(cache, 5)
        cache.crop(-2)
        assert cache.get_seq_length() == 3
        assert cache.layers[1].keys.shape[2] == 3


@contract(
    "transformers",
    used_by="base/partial.py reuse/batch.py memory/predict.py",
    broken_by=wrapped(
        f"{CACHE}DynamicLayer.update",
        lambda update: lambda self, k, v, *a, **kw: update(self, k.flip(2), v, *a, **kw),
    ),
)
def test_a_dynamic_cache_has_a_layer_per_block_whose_keys_can_be_replaced(breach: bool) -> None:
    cache: Any = DynamicCache(config=full_config())
    assert len(cache.layers) == 2
    assert torch.equal(cache.update(keys(3), keys(3), 1)[0], keys(3))
    layer = cache.layers[1]
    layer.keys, layer.values = keys(2, 5), keys(2, 5)
    joined, _ = cache.update(keys(1, 7), keys(1, 7), 1)
    assert torch.equal(joined, keys(3, 5))


@contract(
    "transformers",
    used_by="memory/predict.py",
    broken_by=with_value(f"{CACHE}DynamicSlidingWindowLayer.update", DynamicLayer.update),
)
def test_a_sliding_layer_keeps_one_less_than_its_window_and_counts_all(breach: bool) -> None:
    cache: Any = DynamicCache(config=sliding_config())
    layer = cache.layers[0]
    assert isinstance(layer, DynamicSlidingWindowLayer)
    assert layer.sliding_window == WINDOW
    grow(cache, 6)
    assert layer.keys.shape == (1, 1, WINDOW - 1, 8)
    assert layer.cumulative_length == 6
    layer.cumulative_length = 9  # as if more had been seen
    assert cache.get_seq_length() == 9


@contract(
    "transformers",
    used_by="base/caches.py methods/choices.py",
    broken_by=doing_nothing(f"{CACHE}DynamicLayer.batch_select_indices"),
)
@pytest.mark.parametrize("config", [full_config(), sliding_config()], ids=["full", "sliding"])
def test_rows_of_a_copied_cache_can_be_chosen_and_grow_without_the_cache_they_are_of(
    config: Any, breach: bool
) -> None:
    cache = DynamicCache(config=config)
    both = torch.cat([keys(6), keys(6, 10)])
    for layer in range(2):
        cache.update(both, both, layer)
    held = [layer.keys.clone() for layer in cache.layers]
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_select_indices(torch.tensor([1, 1, 0]))
    more = keys(2, 90).expand(3, -1, -1, -1)
    for layer in range(2):
        seen, _ = copied.update(more, more, layer)
        kept = held[layer].shape[2]
        assert torch.equal(seen[:, :, -2:], more)
        assert torch.equal(seen[:, :, :-2], held[layer][[1, 1, 0]][:, :, -kept:])
        assert torch.equal(cache.layers[layer].keys, held[layer])
    assert cache.get_seq_length() == 6
    assert copied.get_seq_length() == 8


@contract(
    "transformers",
    used_by="reuse/batch.py",
    broken_by=wrapped(
        f"{MASKS}_preprocess_mask_arguments",
        lambda function: lambda *args, **kwargs: _of_layer(function, 1, *args, **kwargs),
    ),
)
def test_masks_are_sized_by_the_first_layer_of_a_cache(llama: Any, ids: Any) -> None:
    cache: Any = DynamicCache(config=llama.config)
    nothing = torch.zeros(2, 1, 3, 1)  # one number per token: the layer is fed
    cache.update(nothing, nothing, 0)
    asked: list[int] = []
    sizes = cache.get_mask_sizes

    def get_mask_sizes(query_length: int, layer_idx: int) -> Any:
        asked.append(layer_idx)
        return sizes(query_length, layer_idx)

    cache.get_mask_sizes = get_mask_sizes
    llama.model.layers[0].forward = lambda hidden, *_, **__: hidden
    masks: list[Any] = []
    llama.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 1)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 0] = 0
    llama(input_ids=ids, attention_mask=mask, **{cache_parameter(llama): cache})
    assert {*asked} == {0}
    assert masks[0].shape == (2, 1, 5, 8)


def _of_layer(function: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    for cache in (*args, *kwargs.values()):
        if isinstance(cache, Cache):
            cache.get_mask_sizes(1, layer)
    return result


@contract(
    "transformers",
    used_by="base/partial.py",
    broken_by=wrapped(
        "transformers.models.llama.modeling_llama:LlamaAttention.forward",
        lambda forward: lambda self, *a, **kw: _without_cache(forward, self, *a, **kw),
    ),
)
def test_blocks_hand_keys_and_values_to_update_of_the_cache_that_is_given(
    llama: Any, ids: Any
) -> None:
    class StopError(BaseException):
        pass

    class Stopping(DynamicCache):
        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *a: Any, **k: Any
        ) -> Any:
            result = super().update(key_states, value_states, layer_idx, *a, **k)
            if layer_idx == 1:
                raise StopError
            return result

    cache: Any = Stopping(config=llama.config)
    with pytest.raises(StopError):
        llama(input_ids=ids, **{cache_parameter(llama): cache}, use_cache=True)
    assert [layer.keys.shape for layer in cache.layers] == [(2, 1, 5, 8)] * 2


def _without_cache(forward: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    kept = {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}
    return forward(self, *args, **kept)


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=without(f"{CACHE}Cache.reorder_cache"),
)
def test_beams_reorder_a_cache_in_place(breach: bool) -> None:
    cache = DynamicCache(config=full_config())
    both = torch.cat([keys(2), keys(2, 5)])
    for layer in range(2):
        cache.update(both, both, layer)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys, torch.cat([keys(2, 5)] * 2))
