"""transformers: the passes that ``generate`` makes, whatever it is asked for."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache

from breaking import contract, doing_nothing, with_value, without, wrapped

GENERATE = "transformers.generation.utils:GenerationMixin."


class Passes:
    """Notes what each pass of a model is given, and what it returns."""

    def __init__(self, model: Any) -> None:
        self.ids: list[Tensor] = []
        self.masks: list[Any] = []
        self.caches: list[Any] = []
        """Of each pass the one that it was given; None without."""
        self.held: list[int] = []
        """Tokens that it held then."""
        self.returned: list[Any] = []
        self.positional: list[bool] = []
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    def _before(self, _: Any, args: Any, kwargs: Any) -> None:
        found = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        assert len(found) <= 1
        self.ids.append(args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds")))
        self.positional.append(bool(args))
        self.masks.append(kwargs.get("attention_mask"))
        self.caches.append(found[0] if found else None)
        self.held.append(int(found[0].get_seq_length()) if found else 0)

    def _after(self, _: Any, __: Any, output: Any) -> None:
        found = [value for value in output.values() if isinstance(value, Cache)]
        self.returned.append(found[0] if found else None)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pass."""
        return [ids.shape[1] for ids in self.ids]


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return mask


@contract(
    "transformers",
    used_by="reft/selection.py reft/past.py",
    broken_by=wrapped(
        f"{GENERATE}_update_model_kwargs_for_generation",
        lambda update: (
            lambda self, outputs, kwargs, *a, **k: update(
                self, outputs, {n: v for n, v in kwargs.items() if n != "attention_mask"}, *a, **k
            )
        ),
    ),
)
def test_a_mask_of_padding_is_two_dimensional_and_as_wide_as_all_tokens(
    llama: Any, ids: Any
) -> None:
    passes = Passes(llama)
    llama.generate(ids, attention_mask=padded(ids), max_new_tokens=3, do_sample=False)
    assert [mask.shape for mask in passes.masks] == [(2, 5), (2, 6), (2, 7)]
    assert torch.equal(passes.masks[2][:, :5], padded(ids))


def _with_narrow_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "attention_mask": torch.ones(2, 1, dtype=torch.long)}


@contract(
    "transformers",
    used_by="reft/selection.py reft/past.py",
    broken_by=wrapped(
        f"{GENERATE}prepare_inputs_for_generation",
        lambda prepare: functools.wraps(prepare)(
            lambda *args, **kwargs: _with_narrow_mask(prepare(*args, **kwargs))
        ),
    ),
)
def test_a_mask_without_padding_is_as_wide_as_all_tokens_or_left_out(llama: Any, ids: Any) -> None:
    passes = Passes(llama)
    llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    widths = [None if mask is None else mask.shape[-1] for mask in passes.masks]
    assert widths in ([None] * 3, [5, 6, 7])


@contract(
    "transformers",
    used_by="reft/selection.py",
    broken_by=wrapped(
        f"{GENERATE}_prepare_attention_mask_for_generation",
        lambda _: lambda self, tensor, *a, **k: torch.ones(tensor.shape[:2], dtype=torch.long),
    ),
)
def test_a_mask_that_is_not_given_hides_pad_tokens_unless_they_end_texts(
    llama: Any, ids: Any
) -> None:
    ids = ids.clone()
    ids[0, :2] = 0
    for eos, wanted in ((None, ids != 0), (3, ids != 0), (0, None)):
        passes = Passes(llama)
        llama.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=eos)
        mask = passes.masks[0]
        if wanted is None:
            assert mask is None or bool(mask.all())
        else:
            assert mask is not None
            assert torch.equal(mask.bool(), wanted)


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=wrapped(
        f"{GENERATE}_expand_inputs_for_generation",
        lambda expand: lambda *a, **k: _shuffled(expand(*a, **k)),
    ),
)
def test_beams_and_returned_sequences_repeat_each_example_in_place(llama: Any, ids: Any) -> None:
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        passes = Passes(llama)
        llama.generate(ids, max_new_tokens=2, **options)
        assert torch.equal(passes.ids[0], ids.repeat_interleave(2, 0))
        assert passes.lengths == [5, 1]


def _shuffled(expanded: Any) -> Any:
    ids, kwargs = expanded
    return ids.flip(0), kwargs


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=wrapped(
        "transformers.cache_utils:Cache.get_seq_length",
        lambda function: lambda self, *a, **k: 0,
    ),
)
def test_chunked_prefill_goes_on_with_one_cache(llama: Any, ids: Any) -> None:
    passes = Passes(llama)
    llama.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=2)
    assert passes.lengths == [2, 2, 1, 1]
    assert passes.held == [0, 2, 4, 5]
    assert len({id(cache) for cache in passes.caches}) == 1
    assert torch.equal(torch.cat(passes.ids[:3], 1), ids)


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=wrapped(
        "transformers.generation.logits_process:"
        "UnbatchedClassifierFreeGuidanceLogitsProcessor.get_unconditional_logits",
        lambda function: lambda self, input_ids: torch.zeros(len(input_ids), 1, 24),
    ),
)
def test_classifier_free_guidance_runs_a_second_prompt_with_its_own_cache(
    llama: Any, ids: Any
) -> None:
    negative = torch.tensor([[11, 12], [13, 14]])
    for given, wanted in ((negative, negative), (None, ids[:, -1:])):
        passes = Passes(llama)
        options = {} if given is None else {"negative_prompt_ids": given}
        llama.generate(ids, max_new_tokens=2, do_sample=False, guidance_scale=1.5, **options)
        assert passes.lengths == [5, wanted.shape[1], 1, 1]
        assert torch.equal(passes.ids[1], wanted)
        first, second = passes.returned[:2]
        assert first is not second
        assert passes.caches[2] is first
        assert passes.caches[3] is second


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=doing_nothing("transformers.cache_utils:Cache.crop"),
)
def test_assisted_decoding_takes_tokens_back_from_the_cache(llama: Any) -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    passes = Passes(llama)
    llama.generate(ids, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    assert passes.lengths[0] >= 5
    assert passes.held[0] == 0
    assert len({id(cache) for cache in passes.caches if cache is not None}) == 1
    ends = [held + length for held, length in zip(passes.held, passes.lengths, strict=True)]
    assert any(held < end for held, end in zip(passes.held[1:], ends, strict=False))
    assert all(held >= 5 for held in passes.held[1:])


@contract(
    "transformers",
    used_by="reft/selection.py",
    broken_by=with_value(
        "transformers.cache_utils:Cache.is_compileable", property(lambda self: False)
    ),
)
def test_a_static_cache_gets_a_prepared_mask(llama: Any, ids: Any) -> None:
    passes = Passes(llama)
    llama.generate(
        ids,
        attention_mask=padded(ids),
        max_new_tokens=2,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    masks = [next(iter(mask.values())) if isinstance(mask, dict) else mask for mask in passes.masks]
    assert [mask.ndim for mask in masks] == [4, 4]
    own = masks[0][:, 0, :, :5].diagonal(dim1=-2, dim2=-1)  # a token that is attended sees itself
    own = own if own.dtype == torch.bool else own == 0
    assert torch.equal(own.long(), padded(ids))
    assert passes.held == [0, 5]


@contract(
    "transformers",
    used_by="base/heads.py runs/generate.py",
    broken_by=wrapped(
        f"{GENERATE}generate",
        lambda generate: lambda self, *a, **k: generate(self, *a, **{"use_cache": False, **k}),
    ),
)
def test_generate_uses_a_cache_although_the_model_does_not(llama: Any, ids: Any) -> None:
    llama.config.use_cache = False
    assert not any(isinstance(part, Cache) for part in llama(input_ids=ids).values())
    passes = Passes(llama)
    llama.generate(ids, max_new_tokens=2, do_sample=False)
    assert passes.lengths == [5, 1]


@contract(
    "transformers",
    used_by="reft/past.py reft/selection.py",
    broken_by=with_value("transformers:LlamaForCausalLM.main_input_name", "pixel_values"),
)
def test_generate_takes_a_prompt_by_three_names(llama: Any, ids: Any) -> None:
    embedded = llama.get_input_embeddings()(ids).detach()
    texts = [
        llama.generate(ids, max_new_tokens=2, do_sample=False)[:, 5:],
        llama.generate(inputs=ids, max_new_tokens=2, do_sample=False)[:, 5:],
        llama.generate(input_ids=ids, max_new_tokens=2, do_sample=False)[:, 5:],
        llama.generate(inputs_embeds=embedded, max_new_tokens=2, do_sample=False),
    ]
    assert all(torch.equal(text, texts[0]) for text in texts)


@contract(
    "transformers",
    used_by="reft/past.py",
    broken_by=wrapped(
        f"{GENERATE}_prefill",
        lambda prefill: (
            lambda self, ids, config, kwargs, **more: prefill(
                self, ids, config, {**kwargs, "use_cache": True}, **more
            )
        ),
    ),
)
def test_without_a_cache_every_pass_reads_all_tokens(llama: Any, ids: Any) -> None:
    passes = Passes(llama)
    llama.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert passes.lengths == [5, 6, 7]
    assert passes.returned == [None] * 3


@contract(
    "transformers",
    used_by="reft/tuner.py",
    broken_by=without("transformers.generation.continuous_batching:ContinuousMixin.generate_batch"),
)
def test_continuous_batching_goes_by_generate_batch(llama: Any) -> None:
    names = {name for name in dir(type(llama)) if "generate" in name and not name.startswith("_")}
    assert {"generate", "generate_batch"} <= names
    known = {"generate", "generate_batch", "adjust_generation_fn", "can_generate"}
    known |= {"prepare_inputs_for_generation", "load_custom_generate", "create_masks_for_generate"}
    assert names <= known, "a new way to generate, which the tuner does not know"


@contract(
    "transformers",
    used_by="runs/chat.py",
    broken_by=doing_nothing("transformers:TextStreamer.end"),
)
def test_a_streamer_hands_finished_text_on(breach: bool) -> None:
    texts: list[tuple[str, bool]] = []

    class Words:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(f"{token} " for token in tokens)

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            texts.append((text, stream_end))

    streamer = Streamer(Words(), skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.tensor([[1, 2]]))
    streamer.put(torch.tensor([3]))
    streamer.end()
    assert "".join(text for text, _ in texts) == "3 "
    assert [is_end for _, is_end in texts] == [False, True]
