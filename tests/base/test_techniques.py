"""Ways to need less memory: they must leave losses and gradients as they are, and save memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base import techniques
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.techniques import (
    HostEmbedding,
    chunk_mlps,
    keep_embedding_on_host,
    save_memory,
)
from lowmem_reft.memory import track
from lowmem_reft.options import MemoryOptions
from lowmem_reft.reft import layer

NUM_EXAMPLES, SEQ = 3, 20
BASES = ["llama-fp32", "llama-nf4", "gpt2-fp32", "gpt2-nf4"]
INNER = {"llama": ["gate_proj", "up_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"]}


@pytest.fixture(scope="module")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random 4-layer fp32 GPT-2, whose head is its embedding; only read."""
    directory = tmp_path_factory.mktemp("tiny_gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=64,
        initializer_range=0.1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def load(tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> Callable[[str], Any]:
    """Return what loads a base of ``BASES``."""

    def load_base(kind: str) -> Any:
        name, storage = kind.split("-")
        directory = tiny_llama_dir if name == "llama" else tiny_gpt2_dir
        compute_dtype = "fp32" if storage == "nf4" else None
        return lr.load_base(directory, storage=storage, compute_dtype=compute_dtype, device="cpu")

    return load_base


ADAPTERS = ["loreft", "loreft_all", "lora"]


def adapt(base: Any, adapter: str, **fields: Any) -> Any:
    torch.manual_seed(1)
    if adapter == "lora":
        config: Any = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=1,
            target_modules="all-linear",
            init_lora_weights=False,
            fan_in_fan_out=base.config.model_type == "gpt2" and not hasattr(base, "hf_quantizer"),
            **fields,
        )
    else:
        positions = "all" if adapter == "loreft_all" else "f2+l2"
        config = lr.ReftConfig(
            task_type="CAUSAL_LM", rank=4, positions=positions, init="paper", **fields
        )
    return get_peft_model(base, config).train()


def make_batch(*, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 128, (NUM_EXAMPLES, SEQ), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :12] = -100
    if padded:
        mask[1, 17:], labels[1, 17:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, **extra: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients by name, and clear them."""
    torch.manual_seed(3)
    loss = model(**make_batch(), **extra).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]],
    wanted: tuple[Tensor, dict[str, Tensor]],
    tolerance: float = 1e-6,
) -> None:
    """Compare losses, and gradients in the L2 norm over all parameters."""
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=0)
    assert wanted[1]
    assert found[1].keys() == wanted[1].keys()
    one, two = (
        torch.cat([grads[name].flatten() for name in wanted[1]]).double()
        for grads in (found[1], wanted[1])
    )
    error = (one - two).norm() / two.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


# Losses and gradients stay.

CHECKPOINTING = {"activation_checkpointing": True}
WAYS: dict[str, dict[str, Any]] = {
    "mlp_tokens": {"mlp_tokens": 7},
    "checkpointing": CHECKPOINTING,
    "every_second_block": {**CHECKPOINTING, "checkpoint_every": 2},
    "offload": {**CHECKPOINTING, "offload_activations": True},
    "all": {
        **CHECKPOINTING,
        "checkpoint_every": 2,
        "offload_activations": True,
        "mlp_tokens": 7,
        "embedding_on_host": True,
    },
}


@pytest.fixture(scope="module")
def plain_steps() -> dict[Any, Any]:
    """Loss and gradients of models before anything is switched on, each computed once."""
    return {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", BASES)
def test_losses_and_gradients_are_the_plain_ones(
    load: Callable[[str], Any], plain_steps: dict[Any, Any], kind: str, adapter: str, way: str
) -> None:
    model = adapt(load(kind), adapter)
    if (kind, adapter) not in plain_steps:
        plain_steps[kind, adapter] = step(model)
    options = MemoryOptions(**WAYS[way])
    if kind.startswith("gpt2"):  # its head is its embedding
        options = MemoryOptions(**{**WAYS[way], "embedding_on_host": False})
    save_memory(model, options)
    assert_same(step(model), plain_steps[kind, adapter])


@pytest.mark.parametrize("component", ["mlp_output", "attention_output"])
def test_edits_inside_a_block_are_the_plain_ones_with_everything_on(
    load: Callable[[str], Any], component: str
) -> None:
    model = adapt(load("llama-fp32"), "loreft_all", component=component)
    wanted = step(model)
    save_memory(model, MemoryOptions(**WAYS["all"]))
    assert_same(step(model), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_an_evaluation_are_the_plain_ones(load: Callable[[str], Any], way: str) -> None:
    model, batch = adapt(load("llama-fp32"), "loreft").eval(), make_batch()
    with torch.no_grad():
        wanted = model(**batch).logits
        save_memory(model, MemoryOptions(**WAYS[way]))
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)


def test_generated_tokens_are_the_plain_ones_with_everything_on(
    load: Callable[[str], Any],
) -> None:
    model = adapt(load("llama-fp32"), "loreft").eval()
    arguments = {
        "input_ids": make_batch()["input_ids"],
        "attention_mask": make_batch()["attention_mask"].flip(1),
        "max_new_tokens": 5,
        "do_sample": False,
    }
    wanted = model.generate(**arguments)
    save_memory(model, MemoryOptions(**WAYS["all"]))
    assert torch.equal(model.generate(**arguments), wanted)


# MLPs in chunks.


def tokens_of_calls(model: Any, names: list[str]) -> dict[str, list[int]]:
    """Return, filled by hooks as the model runs, how many tokens reach each layer of block 1."""
    counts: dict[str, list[int]] = {name: [] for name in names}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if ".1.mlp." in path and name in counts:

            def count(_module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                counts[name].append(args[0].numel() // args[0].shape[-1])

            module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 60, 1000])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_more_than_the_named_number_of_tokens_reaches_an_mlp(
    load: Callable[[str], Any], name: str, num_tokens: int, checkpointing: bool
) -> None:
    model = adapt(load(f"{name}-fp32"), "loreft")
    counts = tokens_of_calls(model, INNER[name])
    chunk_mlps(model, num_tokens)
    if checkpointing:
        enable_activation_checkpointing(model)
    loss = model(**make_batch()).loss
    in_forward = copy.deepcopy(counts)
    loss.backward()
    for inner in INNER[name]:
        assert sum(in_forward[inner]) == NUM_EXAMPLES * SEQ
        assert len(in_forward[inner]) <= -(-NUM_EXAMPLES * SEQ // num_tokens)
        assert max(counts[inner]) <= num_tokens


def test_an_evaluation_runs_its_mlps_in_chunks_too(load: Callable[[str], Any]) -> None:
    model = adapt(load("llama-fp32"), "loreft").eval()
    counts = tokens_of_calls(model, ["up_proj"])
    chunk_mlps(model, 7)
    with torch.no_grad():
        model(**make_batch())
    assert max(counts["up_proj"]) <= 7


def test_another_number_of_tokens_replaces_the_first(load: Callable[[str], Any]) -> None:
    model = adapt(load("llama-fp32"), "loreft")
    counts = tokens_of_calls(model, ["up_proj"])
    chunk_mlps(model, 7)
    chunk_mlps(model, 15)
    model(**make_batch())
    assert max(counts["up_proj"]) == 15


def test_dropout_inside_an_mlp_is_recomputed_as_it_was(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(load("llama-fp32"), "lora", lora_dropout=0.3)
    chunk_mlps(model, 7)
    found = step(model)
    monkeypatch.setattr(techniques, "checkpoint", lambda function, part, **_: function(part))
    assert_same(found, step(model))


def test_a_deep_copy_of_a_chunked_model_runs_its_own_mlps(load: Callable[[str], Any]) -> None:
    model = adapt(load("llama-fp32"), "loreft")
    chunk_mlps(model, 7)
    wanted = step(model)
    twin = copy.deepcopy(model)
    assert_same(step(twin), wanted)
    with torch.no_grad():
        twin.get_base_model().model.layers[1].mlp.down_proj.weight.zero_()
    assert not torch.equal(step(twin)[0], wanted[0])
    assert_same(step(model), wanted)


# What is kept between the forward and the backward pass.


def kept_bytes(model: Any, batch: dict[str, Tensor] | None = None, **extra: Any) -> int:
    """Return the bytes that a forward pass leaves behind for its backward pass."""
    batch = batch or make_batch()
    model(**batch, **extra).loss.backward()  # caches of the first step
    model.zero_grad()
    gc.collect()  # what another test has left would be freed meanwhile
    with track("cpu") as memory:
        before = memory.current_bytes
        loss = model(**batch, **extra).loss
        kept = memory.current_bytes - before
        loss.backward()
    model.zero_grad()
    return kept


@pytest.mark.parametrize("adapter", ["loreft", "lora"])
def test_each_way_keeps_less_for_the_backward_pass(
    load: Callable[[str], Any], adapter: str
) -> None:
    model = adapt(load("llama-fp32"), adapter)
    kept = {"plain": kept_bytes(model)}
    for way in ("mlp_tokens", "every_second_block", "checkpointing"):
        model = adapt(load("llama-fp32"), adapter)
        save_memory(model, MemoryOptions(**WAYS[way]))
        kept[way] = kept_bytes(model)
    assert kept["mlp_tokens"] < 0.9 * kept["plain"]
    assert kept["checkpointing"] < 0.9 * kept["every_second_block"]
    assert kept["every_second_block"] < 0.9 * kept["plain"]


# The embedding in host memory.


@pytest.mark.parametrize("kind", ["llama-fp32", "llama-nf4"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_embedding_on_the_host_changes_no_bit(
    load: Callable[[str], Any], kind: str, adapter: str
) -> None:
    model = adapt(load(kind), adapter)
    wanted, logits = step(model), model(**make_batch()).logits
    keep_embedding_on_host(model)
    found = step(model)
    assert torch.equal(model(**make_batch()).logits, logits)
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


def test_an_embedding_that_is_also_the_head_is_refused(load: Callable[[str], Any]) -> None:
    base = load("gpt2-fp32")
    embedding = base.get_input_embeddings()
    with pytest.raises(InputError, match="embedding_on_host must be left out for GPT2LMHeadModel"):
        keep_embedding_on_host(base)
    assert base.get_input_embeddings() is embedding


def test_an_embedding_on_the_host_does_not_follow_the_model(load: Callable[[str], Any]) -> None:
    base = load("llama-fp32")
    table = base.get_input_embeddings().weight.clone()
    keep_embedding_on_host(base)
    nn.Module.to(base, "meta", torch.bfloat16)
    held = base.get_input_embeddings()
    assert base.lm_head.weight.is_meta
    assert held.weight.device.type == "cpu"
    assert torch.equal(held.weight, table)


def test_keeping_an_embedding_on_the_host_twice_is_the_same_as_once(
    load: Callable[[str], Any],
) -> None:
    base = load("llama-fp32")
    keep_embedding_on_host(base)
    once = base.get_input_embeddings()
    keep_embedding_on_host(base)
    assert base.get_input_embeddings() is once
    assert isinstance(once, HostEmbedding)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_trained_with_everything_on_loads_onto_a_plain_base(
    load: Callable[[str], Any], adapter: str, tmp_path: Path
) -> None:
    model, batch = adapt(load("llama-fp32"), adapter), make_batch()
    wanted = model.eval()(**batch).logits
    save_memory(model, MemoryOptions(**WAYS["all"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load("llama-fp32"), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, wanted)


# What is refused.


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_a_number_of_tokens_below_one_is_refused(
    load: Callable[[str], Any], num_tokens: int
) -> None:
    with pytest.raises(InputError, match=f"mlp_tokens must be at least 1, got {num_tokens}"):
        chunk_mlps(load("llama-fp32"), num_tokens)
    with pytest.raises(InputError, match="mlp_tokens must be"):
        MemoryOptions(mlp_tokens=num_tokens)


@pytest.mark.parametrize("every", [0, -2])
def test_checkpointing_every_less_than_one_block_is_refused(
    load: Callable[[str], Any], every: int
) -> None:
    with pytest.raises(InputError, match=f"every_n_layers must be at least 1, got {every}"):
        enable_activation_checkpointing(load("llama-fp32"), every)
    with pytest.raises(InputError, match="checkpoint_every must be"):
        MemoryOptions(checkpoint_every=every)


def test_offloading_without_checkpointing_is_refused(load: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="offload_activations must go with activation_check"):
        save_memory(load("llama-fp32"), MemoryOptions(offload_activations=True))


def test_an_architecture_without_a_known_mlp_is_refused() -> None:
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    )
    base = transformers.OPTForCausalLM(config)
    with pytest.raises(InputError, match="mlp_tokens must be left out for OPTForCausalLM, got 7"):
        chunk_mlps(base, 7)


def test_an_mlp_that_returns_more_than_hidden_vectors_is_refused() -> None:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    base = transformers.GptOssForCausalLM(config)
    chunk_mlps(base, 7)
    with pytest.raises(InputError, match=r"mlp_tokens must be left out for GptOssMLP, .* got 7"):
        base(input_ids=torch.ones(1, 8, dtype=torch.long))


# Edits of all tokens in chunks.

ALL_TOKENS = {"intervention_mask": torch.ones(NUM_EXAMPLES, SEQ, dtype=torch.bool)}
TOKENS: dict[str, dict[str, Any]] = {"prompts": {}, "all_tokens": ALL_TOKENS}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["llama-fp32", "llama-nf4", "gpt2-fp32"])
def test_edits_in_chunks_are_the_edits_of_all_at_once(
    load: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tokens: str,
    checkpointing: bool,
) -> None:
    model, extra = adapt(load(kind), "loreft_all"), TOKENS[tokens]
    wanted = step(model, **extra)
    with torch.no_grad():
        logits = model(**make_batch(), **extra).logits
    sizes = record_sizes_of_edits(model)
    monkeypatch.setattr(layer, "CHUNK_TOKENS", 8)
    if checkpointing:
        enable_activation_checkpointing(model)
    assert_same(step(model, **extra), wanted)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**make_batch(), **extra).logits, logits, rtol=1e-5, atol=1e-5
        )
    assert max(sizes) == 8


def record_sizes_of_edits(model: Any) -> list[int]:
    """Return, filled by hooks as the model runs, the numbers of vectors edited at once."""
    sizes: list[int] = []
    for path, module in model.named_modules():
        if path.endswith("reft_phi.default.0"):
            module.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    assert not sizes
    return sizes


def test_dropout_on_an_edit_in_chunks_is_recomputed_as_it_was(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(load("llama-fp32"), "loreft_all", dropout=0.3)
    monkeypatch.setattr(layer, "CHUNK_TOKENS", 8)
    found = step(model)
    monkeypatch.setattr(layer, "checkpoint", lambda function, part, **_: function(part))
    assert_same(found, step(model))


@pytest.mark.parametrize("tokens", TOKENS)
def test_edits_in_chunks_of_a_16_bit_base_keep_no_fp32_copies(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    model = adapt(load("llama-bf16"), "loreft_all")
    at_once = kept_bytes(model, **TOKENS[tokens])
    monkeypatch.setattr(layer, "CHUNK_TOKENS", 8)
    in_chunks = kept_bytes(model, **TOKENS[tokens])
    num_edited = NUM_EXAMPLES * (SEQ if tokens == "all_tokens" else 12)
    num_layers, hidden = 4, 64
    # What the base computes with is kept instead: 2 bytes for 4.
    assert at_once - in_chunks >= (4 - 2) * num_layers * num_edited * hidden
