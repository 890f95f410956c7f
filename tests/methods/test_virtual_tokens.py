"""Prompt learning: the loss is PEFT's own; padding changes neither scores nor generated text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lowmem_reft.base import ours as hung
from lowmem_reft.base.caches import caches_in
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import attach, complete
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.methods.virtual_tokens import (
    embeds_virtual_tokens,
    generate,
    num_virtual_tokens,
    with_virtual_tokens,
)
from lowmem_reft.options import MemoryOptions, MethodOptions
from reference import relative_error

METHODS = ("prefix", "prompt", "p_tuning")
NUM_VIRTUAL = 5
LENGTHS = (9, 11, 12)

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=16)),  # soft-caps
    "gpt2": lambda: GPT2LMHeadModel(  # absolute positions
        GPT2Config(
            vocab_size=128,
            n_embd=64,
            n_layer=2,
            n_head=4,
            initializer_range=0.1,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
}


def adapted(name: str, method: str) -> Any:
    base = BASES[name]().requires_grad_(False)
    base.config.use_cache = False
    return attach(
        base,
        MethodOptions(method=method, num_virtual_tokens=NUM_VIRTUAL),
        task_type="CAUSAL_LM",
        memory=MemoryOptions(),
        chunked_loss=True,
    )


def batch_of(padding_side: str) -> dict[str, Tensor]:
    """Return examples of ``LENGTHS``; the last four tokens of each are supervised."""
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if padding_side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, 128, (length,), generator=generator)
        mask[row, place] = 1
        supervised = slice(place.stop - 4, place.stop)
        labels[row, supervised] = ids[row, supervised]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = model.train()(**batch).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BASES)
def test_loss_and_gradients_are_those_of_peft_on_full_logits(name: str, method: str) -> None:
    model = adapted(name, method).double()
    loss, ours = gradients(model, batch_of("right"))
    base = model.get_base_model()
    base.forward = hung.ours(base).forward_with_logits
    expected, theirs = gradients(model, batch_of("right"))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)  # fp32 sums
    for one, two in zip(ours, theirs, strict=True):
        assert relative_error(one, two) < 1e-6


@torch.no_grad()
def likelihood_by_peft(model: Any, batch: dict[str, Tensor], row: int) -> Tensor:
    """Score one example without padding from PEFT's own logits, in float64."""
    keep = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row, keep], batch["labels"][row, keep]
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
    log_probs = logits[-len(ids) :].double().log_softmax(-1)
    wanted = labels[1:] != -100
    return log_probs[:-1][wanted].gather(1, labels[1:][wanted][:, None]).sum()


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BASES)
def test_likelihoods_are_those_of_each_example_alone(
    name: str, method: str, padding_side: str
) -> None:
    model = adapted(name, method).eval()
    batch = batch_of(padding_side)
    sums, counts = response_log_likelihood(model, batch)
    expected = torch.stack([likelihood_by_peft(model, batch, row) for row in range(len(LENGTHS))])
    assert counts == [4] * len(LENGTHS)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_a_head_that_is_not_recognized_are_the_same() -> None:
    for method in METHODS:
        model = adapted("llama", method).eval()
        batch = batch_of("left")
        expected, _ = response_log_likelihood(model, batch)
        model.get_base_model().lm_head.weight.requires_grad_(True)  # as if it were trained
        sums, _ = response_log_likelihood(model, batch)
        torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BASES)
def test_generated_tokens_are_those_of_each_prompt_alone_without_a_cache(
    name: str, method: str
) -> None:
    model = adapted(name, method).eval()
    batch = batch_of("left")
    del batch["labels"]
    new = generate(
        model,
        batch,
        max_new_tokens=5,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    for row, length in enumerate(LENGTHS):
        ids = batch["input_ids"][row : row + 1, -length:]
        for _ in range(5):
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert new[row].tolist() == ids[0, length:].tolist()


def test_virtual_tokens_stand_between_padding_and_prompt() -> None:
    model = adapted("llama", "prompt")
    prompt = model.prompt_encoder["default"].embedding.weight
    for side, first in (("left", (3, 1, 0)), ("right", (0, 0, 0))):
        batch = batch_of(side)
        longer = with_virtual_tokens(model, **batch)
        assert longer["attention_mask"].sum(1).tolist() == [n + NUM_VIRTUAL for n in LENGTHS]
        for row, start in enumerate(first):
            end, length = start + NUM_VIRTUAL, LENGTHS[row]
            assert torch.equal(longer["inputs_embeds"][row, start:end], prompt)
            tokens = model.word_embeddings(batch["input_ids"][row, start : start + length])
            assert torch.equal(longer["inputs_embeds"][row, end : end + length], tokens)
            kept = longer["position_ids"][row, start : end + length]
            assert torch.equal(kept, torch.arange(NUM_VIRTUAL + length))
            (supervised,) = (longer["labels"][row] != -100).nonzero(as_tuple=True)
            assert supervised.tolist() == list(range(end + length - 4, end + length))


def test_only_prompt_learning_that_is_on_adds_tokens() -> None:
    assert num_virtual_tokens(BASES["llama"]()) == 0
    assert num_virtual_tokens(adapted_with_lora()) == 0
    model = adapted("llama", "prompt")
    assert (num_virtual_tokens(model), embeds_virtual_tokens(model)) == (NUM_VIRTUAL, True)
    with model.disable_adapter():
        assert (num_virtual_tokens(model), embeds_virtual_tokens(model)) == (0, False)
    prefix = adapted("llama", "prefix")
    assert (num_virtual_tokens(prefix), embeds_virtual_tokens(prefix)) == (NUM_VIRTUAL, False)


def adapted_with_lora() -> Any:
    return attach(
        BASES["llama"](),
        MethodOptions(method="qlora"),
        task_type="CAUSAL_LM",
        memory=MemoryOptions(),
        chunked_loss=True,
    )


def test_a_prefix_starts_as_keys_and_values_of_the_base() -> None:
    model = adapted("llama", "prefix").eval()
    prefix = model.prompt_encoder["default"].embedding.weight
    keys = prefix.view(NUM_VIRTUAL, 2, 2, 2, 16)[:, 0, 0]  # (token, head, width): first layer
    base = model.get_base_model()
    with torch.no_grad():
        output = base(input_ids=torch.arange(128)[:, None], use_cache=True)
    (cache,) = caches_in(output.values())
    first = cache.layers[0].keys[:, :, 0]  # (vocab, head, width): all tokens at position 0
    assert (first - keys[0]).abs().amax((1, 2)).min() < 1e-5


def test_a_second_prefix_finds_the_cache_named_as_the_first_did(tmp_path: Path) -> None:
    model = adapted("llama", "prefix").eval()
    ids = torch.tensor([[5, 9, 23, 40], [6, 17, 99, 12]])
    greedy: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="again")
    complete(model)
    model.set_adapter("again")
    again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 2},
    ],
)
@pytest.mark.parametrize("way", ["argument", "configuration", "default"])
def test_what_a_prefix_does_not_go_with_is_refused_in_generate(
    options: dict[str, Any], way: str
) -> None:
    model = adapted("llama", "prefix").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    (name,) = options
    given = options if way == "argument" else {}
    if way == "configuration":
        given = {"generation_config": GenerationConfig(**options, max_new_tokens=2)}
    if way == "default":
        setattr(model.get_base_model().generation_config, name, options[name])
    with pytest.raises(InputError, match=f"{name} must be left out of generate with prefix tuning"):
        model.generate(input_ids=ids, **given)
    with model.disable_adapter():
        model.generate(input_ids=ids, max_new_tokens=2)
    model.get_base_model().generation_config = GenerationConfig()
    cached = model.generate(
        input_ids=ids, max_new_tokens=2, use_cache=True, cache_implementation="dynamic"
    )
    assert cached.shape == (1, 6)
