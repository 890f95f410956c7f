"""Where the tokens of a forward pass stand, whatever a library calls its cache.

The reference is a greedy loop without any cache: all tokens in one pass, the edited ones named by
an explicit mask. Generation gives the same, or is refused; it never edits a new token.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    StoppingCriteria,
)
from transformers.utils import ModelOutput

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base.caches import cache_argument, caches_in, states_in, tokens_in, with_cache

IDS = torch.tensor([[5, 9, 23, 40, 41, 60, 7, 81], [6, 17, 99, 12, 33, 52, 8, 90]])
NEW = 5
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
NAME = cache_argument(LlamaForCausalLM(CONFIG)) or ""
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


class Opaque:
    """A cache that says nothing of itself."""

    def __init__(self, cache: DynamicCache) -> None:
        self.insides = [cache]


class Slotted:
    """The same, without a dictionary of attributes."""

    __slots__ = ("insides",)

    def __init__(self, cache: DynamicCache) -> None:
        self.insides = deque([cache])


class Liar(DynamicCache):
    """A cache whose length is wrong by ``error``; the model is given the right one."""

    error = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(0, super().get_seq_length(layer_idx) + self.error)


class Renamed(LlamaForCausalLM):
    """Takes and returns its cache under a name that nobody has seen."""

    shows_mask = True
    wraps = False
    hides = False
    hidden: Any = None

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        what_was_read: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        cache = self.hidden if self.hides else what_was_read
        cache = cache.insides[0] if isinstance(cache, Opaque) else cache
        kwargs.pop("return_dict", None)
        if cache is None and kwargs.get("use_cache"):
            cache = DynamicCache(config=self.config)
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask if self.shows_mask else self._mask(input_ids, cache),
            position_ids=position_ids,  # worked out by the model where there are none
            **{NAME: cache},
            **kwargs,
        )
        self.hidden = cache
        given = Opaque(cache) if self.wraps and cache is not None else cache
        parts = {"logits": out.logits, "what_was_read": None if self.hides else given}
        return ModelOutput({name: part for name, part in parts.items() if part is not None})

    def _mask(self, input_ids: Tensor, cache: Any) -> Tensor:
        past = 0 if cache is None else cache.get_seq_length()
        return torch.ones(len(input_ids), past + input_ids.shape[1], dtype=torch.long)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["what_was_read"] = inputs.pop(NAME, None)
        if self.wraps and inputs["what_was_read"] is not None:
            inputs["what_was_read"] = Opaque(inputs["what_was_read"])
        if self.hides:
            self.hidden = inputs.pop("what_was_read")
        if not self.shows_mask:
            inputs.pop("attention_mask", None)
            inputs.pop("position_ids", None)
        return inputs


class OnlyKeywords(Renamed):
    """The same, with a signature that says nothing."""

    def forward(self, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(**kwargs)

    def _validate_model_kwargs(self, model_kwargs: Any) -> None:
        """Let through what the signature does not name."""


def make(kind: type = LlamaForCausalLM, **fields: Any) -> Any:
    """Return a tiny Llama under a random adapter; all kinds have the same values."""
    torch.manual_seed(1)
    base: Any = kind(copy.deepcopy(CONFIG)).eval()
    config = {"task_type": "CAUSAL_LM", "rank": 2, "positions": "f1+l1", "layers": "0;2", **fields}
    model = get_peft_model(base, lr.ReftConfig(**config))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".reft_phi." in name:
                tensor.normal_(0, 1)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return make()


def edited(mask: Tensor, positions: str) -> Tensor:
    """Return the tokens of a prompt that are edited, worked out by hand."""
    if positions == "all":
        return mask.bool()
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    rows = torch.arange(len(mask))
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    chosen[rows, last] = True
    if positions == "f1+l1":
        chosen[rows, mask.long().argmax(1)] = True
    return chosen


@torch.no_grad()
def scores_by_hand(model: Any, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Return the logits of the last token, from one pass over everything."""
    new = ids.shape[1] - chosen.shape[1]
    mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    result: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        intervention_mask=nn.functional.pad(chosen, (0, new)),
        use_cache=False,
    ).logits[:, -1]
    return result


def by_hand(model: Any, ids: Tensor, mask: Tensor | None = None, positions: str = "f1+l1") -> Any:
    """Greedy decoding without a cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    chosen = edited(mask, positions)
    for _ in range(NEW):
        best = scores_by_hand(model, ids, mask, chosen).argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids


# The next rename.

DISGUISES: dict[str, dict[str, Any]] = {
    "name": {},
    "no_length": {"wraps": True},
    "inside_the_model": {"hides": True},
}


@pytest.mark.parametrize("positions", ["all", "f1+l1", "l1"])
@pytest.mark.parametrize("shows_mask", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("kind", [Renamed, OnlyKeywords])
def test_a_cache_under_an_unknown_name_gives_the_right_answer_or_is_refused(
    kind: type, disguise: str, use_cache: bool, shows_mask: bool, positions: str
) -> None:
    expected = by_hand(make(positions=positions), IDS, positions=positions)
    model = make(kind, positions=positions)
    base = model.get_base_model()
    for name, value in {**DISGUISES[disguise], "shows_mask": shows_mask}.items():
        setattr(base, name, value)
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **GREEDY}
    can_be_told = disguise == "name" or shows_mask or not use_cache
    if can_be_told:
        assert torch.equal(model.generate(use_cache=use_cache, **arguments), expected)
    else:
        with pytest.raises(InputError, match=r"cannot be told.*transformers \d.*intervention_mask"):
            model.generate(use_cache=use_cache, **arguments)


@pytest.mark.parametrize("error", [-100, -3, 2, 100])
def test_a_cache_whose_length_is_not_what_was_counted_is_refused(model: Any, error: int) -> None:
    cache = Liar(config=CONFIG)
    base = model.get_base_model()
    handle = base.register_forward_hook(lambda *_: setattr(cache, "error", error))
    before = base.register_forward_pre_hook(lambda *_: setattr(cache, "error", 0))
    with pytest.raises(InputError, match=r"8 tokens were read and the cache holds|cannot be told"):
        model.generate(input_ids=IDS, **{NAME: cache}, **GREEDY)
    handle.remove()
    before.remove()


def test_a_model_without_an_adapter_that_edits_is_never_refused() -> None:
    model = make(Renamed)
    base = model.get_base_model()
    base.wraps, base.shows_mask = True, False
    with model.disable_adapter():
        answer = model.generate(input_ids=IDS, **GREEDY)
    plain = make()
    with plain.disable_adapter():
        assert torch.equal(answer, plain.generate(input_ids=IDS, **GREEDY))


# Classifier-free guidance: a second prompt, edited as a prompt of its own.


def guided_by_hand(model: Any, ids: Tensor, negative: Tensor, scale: float, mask: Tensor) -> Tensor:
    ones = torch.ones_like(ids)
    chosen, away = edited(ones, "f1+l1"), edited(mask, "f1+l1")
    for _ in range(NEW):
        wanted = scores_by_hand(model, ids, ones, chosen).log_softmax(-1)
        unwanted = scores_by_hand(model, negative, mask, away).log_softmax(-1)
        best = (scale * (wanted - unwanted) + unwanted).argmax(-1, keepdim=True)
        ids, negative = torch.cat([ids, best], 1), torch.cat([negative, best], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [None, 1, 3, 8, 12])
def test_guidance_edits_the_negative_prompt_as_a_prompt(
    model: Any, length: int | None, use_cache: bool
) -> None:
    negative = torch.randint(3, 128, (2, length or 1)) if length else IDS[:, -1:]
    arguments = {"negative_prompt_ids": negative} if length else {}
    answer = model.generate(
        input_ids=IDS, guidance_scale=1.7, use_cache=use_cache, **arguments, **GREEDY
    )
    mask = torch.ones_like(negative)
    assert torch.equal(answer, guided_by_hand(model, IDS, negative, 1.7, mask))


@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, 9, 10])
def test_guidance_away_from_a_prompt_that_begins_alike(
    model: Any, length: int, way: dict[str, Any]
) -> None:
    negative = by_hand(model, IDS)[:, :length]
    answer = model.generate(
        input_ids=IDS, guidance_scale=1.7, negative_prompt_ids=negative, **way, **GREEDY
    )
    expected = guided_by_hand(model, IDS, negative, 1.7, torch.ones_like(negative))
    assert torch.equal(answer, expected)


def test_an_explicit_mask_does_not_go_with_a_second_prompt(model: Any) -> None:
    with pytest.raises(InputError, match="intervention_mask must not be given with guidance_scale"):
        model.generate(
            input_ids=IDS,
            intervention_mask=torch.ones_like(IDS).bool(),
            guidance_scale=1.7,
            **GREEDY,
        )


# By hand.


def chunk(model: Any, ids: Tensor, cache: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(
            input_ids=ids, **with_cache(model.get_base_model(), cache), **arguments
        ).logits
    return result


@pytest.mark.parametrize("sizes", [[5, 3], [3, 3, 2], [1] * 8])
def test_a_prompt_in_chunks_by_hand_is_refused(model: Any, sizes: list[int]) -> None:
    cache = DynamicCache(config=CONFIG)
    first, *rest = IDS.split(sizes, 1)
    chunk(model, first, cache)
    with pytest.raises(InputError, match=r"prompt or of the answer.*intervention_mask"):
        chunk(model, rest[0], cache)


@pytest.mark.parametrize("sizes", [[5, 3], [3, 3, 2], [1] * 8])
def test_a_prompt_in_chunks_with_its_edits_named_is_that_of_one_pass(
    model: Any, sizes: list[int]
) -> None:
    cache, chosen = DynamicCache(config=CONFIG), edited(torch.ones_like(IDS), "f1+l1")
    parts = [
        chunk(model, ids, cache, intervention_mask=named)
        for ids, named in zip(IDS.split(sizes, 1), chosen.split(sizes, 1), strict=True)
    ]
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_single_tokens_after_a_prompt_by_hand_are_not_edited(model: Any, static: bool) -> None:
    cache = StaticCache(CONFIG, max_cache_len=16) if static else DynamicCache(config=CONFIG)
    ids = IDS
    for _ in range(NEW):
        scores = chunk(model, ids if ids is IDS else ids[:, -1:], cache)[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, by_hand(model, IDS))


def test_a_state_without_a_length_is_refused_by_hand() -> None:
    model = make(Renamed)
    model.get_base_model().wraps = True
    with torch.no_grad():
        state = model(input_ids=IDS, use_cache=True)["what_was_read"]
        with pytest.raises(InputError, match="may be a cache, but not its length"):
            model(input_ids=IDS[:, :1], what_was_read=state)
        model(input_ids=IDS[:, :1], what_was_read=state, attention_mask=torch.ones(2, 9))


def test_a_state_is_found_in_slots_and_queues() -> None:
    cache = DynamicCache(config=CONFIG)
    assert states_in([Slotted(cache), Opaque(cache), {"a": 1}, "text"]) == []
    chunk(make(), IDS, cache)
    assert len(states_in([Slotted(cache), Opaque(cache), {"a": 1}, "text"])) == 2


def test_a_prompt_mask_is_not_ignored_behind_a_cache(model: Any) -> None:
    cache = DynamicCache(config=CONFIG)
    chunk(model, IDS, cache)
    with pytest.raises(InputError, match="intervention_mask"):
        chunk(model, IDS[:, :1], cache, prompt_mask=torch.ones(2, 1, dtype=torch.long))


# Ways to generate.


@pytest.mark.parametrize("positions", ["all", "f1+l1"])
def test_the_models_own_generate_knows_the_prompt_too(positions: str) -> None:
    model = make(positions=positions)
    expected = by_hand(model, IDS, positions=positions)
    own = model.get_base_model().generate
    ways: list[dict[str, Any]] = [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ]
    for way in ways:
        assert torch.equal(own(input_ids=IDS, **GREEDY, **way), expected), way
    one = own(input_ids=IDS[:1], prompt_lookup_num_tokens=2, **GREEDY)
    assert torch.equal(one, expected[:1])


def test_a_prompt_that_generate_makes_up_is_the_first_pass(model: Any) -> None:
    bos = torch.tensor([[CONFIG.bos_token_id]])
    assert torch.equal(model.generate(**GREEDY), by_hand(model, bos))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_of_one_token_is_edited_once(model: Any, use_cache: bool) -> None:
    answer = model.generate(input_ids=IDS[:, :1], use_cache=use_cache, **GREEDY)
    assert torch.equal(answer, by_hand(model, IDS[:, :1]))


def test_a_prompt_of_embeddings_is_edited_as_its_tokens_are(model: Any) -> None:
    embeds = model.get_input_embeddings()(IDS)
    new = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(new, by_hand(model, IDS)[:, IDS.shape[1] :])


def test_only_the_new_tokens_of_a_longer_prompt_are_given_with_its_cache(model: Any) -> None:
    cache, chosen = DynamicCache(config=CONFIG), edited(torch.ones_like(IDS), "f1+l1")
    chunk(model, IDS[:, :5], cache, intervention_mask=chosen[:, :5])
    answer = model.generate(
        input_ids=IDS[:, 5:], attention_mask=torch.ones_like(IDS), **{NAME: cache}, **GREEDY
    )
    assert torch.equal(answer[:, 3:], by_hand(model, IDS)[:, IDS.shape[1] :])


def test_a_cache_of_another_text_is_refused(model: Any) -> None:
    cache = DynamicCache(config=CONFIG)
    chunk(model, IDS[:, :5], cache)
    with pytest.raises(InputError, match="other tokens first than the prompt"):
        model.generate(input_ids=IDS[:, 5:], **{NAME: cache}, **GREEDY)


def test_a_copy_of_an_adapted_model_generates_by_itself(model: Any) -> None:
    expected = model.generate(input_ids=IDS, **GREEDY)
    twin = copy.deepcopy(model)
    model.base_model.unload()
    assert torch.equal(twin.generate(input_ids=IDS, **GREEDY), expected)
    assert twin.get_base_model().generate.__self__ is not model.base_model


def test_nothing_is_left_on_a_model_whose_adapters_were_removed(model: Any) -> None:
    base = model.base_model.unload()
    assert "generate" not in vars(base)
    untouched = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    untouched.load_state_dict(base.state_dict())
    assert torch.equal(base.generate(IDS, **GREEDY), untouched.generate(IDS, **GREEDY))


def test_a_second_thread_is_refused_while_one_generates(model: Any) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Wait:
        def put(self, _: Any) -> None:
            begun.set()
            go_on.wait(30)

        def end(self) -> None:
            pass

    thread = threading.Thread(
        target=lambda: model.generate(input_ids=IDS[:1], streamer=Wait(), **GREEDY)
    )
    thread.start()
    assert begun.wait(30)
    try:
        with pytest.raises(InputError, match="one thread at a time"):
            model.generate(input_ids=IDS, **GREEDY)
    finally:
        go_on.set()
        thread.join()


def test_counting_compiles_no_step_anew(model: Any) -> None:
    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True  # on a GPU static caches are compiled without asking
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    way = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(model.generate(input_ids=IDS, **way, **GREEDY), by_hand(model, IDS))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1


def test_an_error_in_a_pass_is_not_counted(model: Any) -> None:
    expected = model.generate(input_ids=IDS, **GREEDY)
    with pytest.raises(IndexError):
        model.generate(input_ids=torch.full((1, 4), 10_000), **GREEDY)
    assert torch.equal(model.generate(input_ids=IDS, **GREEDY), expected)


class Aside(StoppingCriteria):
    """Runs the model beside its own generate."""

    def __init__(self, model: Any, *, disabled: bool, explicit: bool, use_cache: bool) -> None:
        self.model, self.disabled, self.explicit = model, disabled, explicit
        self.use_cache = use_cache

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        named = {"intervention_mask": torch.zeros_like(input_ids).bool()} if self.explicit else {}
        with self.model.disable_adapter() if self.disabled else nullcontext():
            self.model(input_ids=input_ids, use_cache=self.use_cache, **named)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("own_cache", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("disabled", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
def test_passes_that_are_not_generates_own_change_nothing(
    model: Any, explicit: bool, disabled: bool, use_cache: bool, own_cache: bool
) -> None:
    aside = Aside(model, disabled=disabled, explicit=explicit, use_cache=use_cache)
    arguments = {"attention_mask": torch.ones_like(IDS), "use_cache": own_cache, **GREEDY}
    answer = model.generate(input_ids=IDS, stopping_criteria=[aside], **arguments)
    assert torch.equal(answer, by_hand(model, IDS))


def test_guidance_without_a_cache_may_return_hidden_states(model: Any) -> None:
    negative = torch.cat([IDS, IDS[:, :3]], 1)
    answer = model.generate(
        input_ids=IDS,
        guidance_scale=1.7,
        negative_prompt_ids=negative,
        use_cache=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
        **GREEDY,
    ).sequences
    expected = guided_by_hand(model, IDS, negative, 1.7, torch.ones_like(negative))
    assert torch.equal(answer, expected)


def test_several_ends_may_come_as_a_tensor(model: Any) -> None:
    settings = {"eos_token_id": torch.tensor([126, 127]), "pad_token_id": 0}
    padded = nn.functional.pad(IDS, (2, 0))
    answer = model.generate(padded, max_new_tokens=1, do_sample=False, **settings)
    expected = by_hand(model, padded, (padded != 0).long())
    assert torch.equal(answer, expected[:, : padded.shape[1] + 1])


def test_a_copy_of_the_cache_is_past_the_prompt_too(model: Any) -> None:
    def with_copies(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        cache = DynamicCache(config=CONFIG)
        for _ in range(NEW):
            new = input_ids if cache.get_seq_length() == 0 else input_ids[:, -1:]
            with torch.no_grad():
                scores = model(input_ids=new, **with_cache(model, cache)).logits[:, -1]
            cache = copy.deepcopy(cache)
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        return input_ids

    answer = model.generate(input_ids=IDS, custom_generate=with_copies, **GREEDY)
    assert torch.equal(answer, by_hand(model, IDS))


def test_a_pass_in_another_thread_is_none_of_generates(model: Any) -> None:
    other = torch.cat([IDS[:1], torch.tensor([[9, 9, 4]])], 1)
    with torch.no_grad():
        expected = model(input_ids=other).logits
    found: list[Tensor] = []

    def score() -> None:
        with torch.no_grad():
            found.append(model(input_ids=other).logits)

    class Between:
        def put(self, _: Any) -> None:
            thread = threading.Thread(target=score)
            thread.start()
            thread.join()

        def end(self) -> None:
            pass

    answer = model.generate(input_ids=IDS[:1], streamer=Between(), **GREEDY)
    assert torch.equal(answer, by_hand(model, IDS[:1]))
    assert len(found) > 1
    assert all(torch.equal(each, expected) for each in found)


def test_a_configuration_without_its_name_is_read(model: Any) -> None:
    settings = GenerationConfig(**GREEDY, pad_token_id=0, guidance_scale=1.7)
    model.get_base_model().generation_config.pad_token_id = None
    negative = IDS[:, :3]
    by_name = model.generate(IDS, generation_config=settings, negative_prompt_ids=negative)
    assert torch.equal(model.generate(IDS, settings, negative_prompt_ids=negative), by_name)
    padded, settings.guidance_scale = nn.functional.pad(IDS, (2, 0)), None
    answer = model.generate(padded, settings)
    assert torch.equal(answer, by_hand(model, padded, (padded != 0).long()))


def test_positions_may_start_elsewhere(model: Any) -> None:
    positions = torch.arange(3, 11).expand(2, -1)
    arguments = {"input_ids": IDS, "position_ids": positions, **GREEDY}
    cached = model.generate(use_cache=True, **arguments)
    assert torch.equal(model.generate(use_cache=False, **arguments), cached)


def test_a_generate_of_the_instance_comes_back(model: Any) -> None:
    base = model.base_model.unload()
    base.generate = own = partial(LlamaForCausalLM.generate, base)
    again = get_peft_model(base, lr.ReftConfig(task_type="CAUSAL_LM", rank=2, positions="f1+l1"))
    assert base.generate is not own
    assert again.base_model.unload().generate is own


@pytest.mark.filterwarnings("ignore")  # that fast kernels are not installed
def test_a_state_that_does_not_count_is_counted_by_hand() -> None:
    torch.manual_seed(1)
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    base = MambaForCausalLM(config).eval()
    model = get_peft_model(base, lr.ReftConfig(task_type="CAUSAL_LM", positions="all")).eval()
    cache = DynamicCache(config=config)
    chunk(model, IDS[:, :1], cache)
    with pytest.raises(InputError, match="1 in a cache"):
        chunk(model, IDS[:, 1:2], cache)
    cache = DynamicCache(config=config)
    chunk(model, IDS, cache)
    chunk(model, IDS[:, :1], cache)
    with pytest.raises(InputError, match="may be a cache, but not its length"):
        chunk(model, IDS[:, :1], copy.deepcopy(cache))


def test_an_empty_cache_under_a_wide_mask_is_refused_by_hand(model: Any) -> None:
    with pytest.raises(InputError, match="an empty cache and a mask of 8 tokens before"):
        chunk(model, IDS[:, :1], Liar(config=CONFIG), attention_mask=torch.ones(2, 9))


def test_further_inputs_are_no_cache_beside_a_whole_prompt() -> None:
    model = make(Renamed)
    images = {"encoded": torch.ones(2, 3)}
    with torch.no_grad():
        model(input_ids=IDS, labels=images, attention_mask=torch.ones_like(IDS))


# What a cache is.


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_is_found_by_what_it_is_and_tells_its_length(static: bool) -> None:
    base = LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()
    cache = StaticCache(CONFIG, max_cache_len=16) if static else DynamicCache(config=CONFIG)
    assert tokens_in(cache) == (0, True)
    with torch.no_grad():
        output = base(input_ids=IDS, **with_cache(base, cache))
    assert caches_in([None, 1, IDS, "cache", {"inner": cache}, cache]) == [cache]
    assert caches_in(output.values()) == [cache]
    assert tokens_in(cache) == (8, True)


def test_a_model_without_a_cache_says_so() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    with pytest.raises(TypeError, match=r"forward of Plain takes no cache.*transformers"):
        with_cache(Plain(), DynamicCache(config=CONFIG))


@pytest.mark.parametrize("by_hand_too", [True, False])
def test_two_caches_that_differ_are_refused(by_hand_too: bool) -> None:
    model = make(Renamed)
    other, base = DynamicCache(config=CONFIG), model.get_base_model()
    chunk(make(), IDS[:, :3], other)
    base.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "labels": {"another": other}}),
        with_kwargs=True,
        prepend=True,
    )
    cache = DynamicCache(config=CONFIG)
    run = partial(model, what_was_read=cache) if by_hand_too else partial(model.generate, **GREEDY)
    with pytest.raises(InputError, match="caches of different lengths"):
        run(input_ids=IDS)
