"""ReFT on every supported architecture, tiny and randomly initialised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base.blocks import component_path, find_blocks
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.heads import AUTO_CLASSES
from lowmem_reft.base.identity import base_digest

HIDDEN, NUM_LAYERS = 32, 2
COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**GEMMA),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "glm4": lambda: transformers.Glm4Config(**GROUPED, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(**COMMON),
    "bert": lambda: transformers.BertConfig(**COMMON),
    "roberta": lambda: transformers.RobertaConfig(**COMMON),
    "deberta": lambda: transformers.DebertaConfig(**COMMON, relative_attention=True),
    "deberta_v2": lambda: transformers.DebertaV2Config(**COMMON, relative_attention=True),
    "modernbert": lambda: transformers.ModernBertConfig(
        **COMMON, cls_token_id=1, sep_token_id=2, reference_compile=False
    ),
}
ENCODERS = ("bert", "roberta", "deberta", "deberta_v2", "modernbert")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)
NOT_IN_TRANSFORMERS = {("gemma3", "TOKEN_CLS"), ("olmo2", "TOKEN_CLS")}
CASES = [
    (name, task)
    for name in CONFIGS
    for task in AUTO_CLASSES
    if (name, task) not in NOT_IN_TRANSFORMERS and not (name in ENCODERS and task == "CAUSAL_LM")
]
IDS = torch.tensor([[5, 9, 23, 40, 41, 60, 7, 31], [6, 17, 50, 12, 33, 52, 0, 0]])
MASK = (IDS != 0).long()


def tiny(name: str, task: str) -> Any:
    torch.manual_seed(0)
    model = AUTO_CLASSES[task].from_config(CONFIGS[name](), attn_implementation="eager")
    with torch.no_grad():  # at the usual 0.02 so small a model hardly reacts to its input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.requires_grad_(False).eval()


def reft_config(task: str, **fields: Any) -> lr.ReftConfig:
    return lr.ReftConfig(**{"task_type": task, "rank": 2, "positions": "f1+l1", **fields})


def output(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, **arguments)
    return out.logits if "logits" in out else out.last_hidden_state


def loss_of(model: Any, task: str) -> Tensor:
    labels = {
        "CAUSAL_LM": IDS.masked_fill((torch.arange(8) < 4) | (MASK == 0), -100),
        "SEQ_CLS": torch.tensor([0, 2]),
        "TOKEN_CLS": (IDS % 3).masked_fill(MASK == 0, -100),
    }
    if task == "FEATURE_EXTRACTION":
        out = model(input_ids=IDS, attention_mask=MASK)
        return out.last_hidden_state.pow(2).mean()
    loss: Tensor = model(input_ids=IDS, attention_mask=MASK, labels=labels[task]).loss
    return loss


def base_bytes(model: Any) -> str:
    return base_digest(model, exclude=lambda key: ".reft." in key or ".modules_to_save." in key)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_an_adapter_starts_as_the_base_learns_alone_and_survives_saving(
    name: str, task: str, tmp_path: Path
) -> None:
    base = tiny(name, task)
    untuned, before = output(base), base_bytes(base)

    model = get_peft_model(base, reft_config(task)).eval()
    assert torch.equal(output(model), untuned)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    adapter = [value for key, value in model.named_parameters() if ".reft_phi." in key]
    assert len(adapter) == 3 * NUM_LAYERS
    for _ in range(2):  # at the start W = R and b = 0 make the gradient of R vanish
        optimizer.zero_grad()
        loss_of(model.train(), task).backward()
        optimizer.step()
    for parameter in trainable:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    tuned = output(model.eval())
    assert not torch.equal(tuned, untuned)
    assert base_bytes(model) == before
    with model.disable_adapter():
        assert torch.equal(output(model), untuned)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name, task), tmp_path)
    assert torch.equal(output(loaded), tuned)


# Components: what is edited must be what enters the residual stream.


def silence(block: nn.Module, path: str) -> None:
    """Make the sub-layer at ``path`` add nothing, whatever enters it."""
    with torch.no_grad():
        for parameter in block.get_submodule(path).parameters():
            parameter.zero_()


def constant_edit(name: str, component: str) -> tuple[Any, Tensor]:
    """Return a model whose last block's component is shifted at every token, and by how much."""
    base = tiny(name, "FEATURE_EXTRACTION")
    config = reft_config(
        "FEATURE_EXTRACTION",
        intervention="lobireft",
        positions="all",
        layers=[NUM_LAYERS - 1],
        component=component,
    )
    model = get_peft_model(base, config).eval()
    layer = next(module.reft for module in base.modules() if hasattr(module, "reft"))
    phi = layer.reft_phi["default"][0]
    with torch.no_grad():
        phi.bias.normal_(0, 2)
    return model, phi(torch.zeros(1, HIDDEN))[0].detach()


def recorded(model: Any, module: nn.Module, *, inputs: bool) -> Tensor:
    """Return what enters or leaves ``module``."""
    seen: list[Any] = []
    if inputs:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda *call: seen.append(call[2]))
    output(model)
    handle.remove()
    value = seen[0]
    return (value[0] if isinstance(value, tuple) else value).clone()


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_output"])
@pytest.mark.parametrize("name", [*DECODERS, "modernbert"])
def test_a_shift_of_a_component_shifts_the_residual_stream_by_as_much(
    name: str, component: str
) -> None:
    model, shift = constant_edit(name, component)
    block: Any = find_blocks(model.get_base_model())[1][-1]
    if component == "attention_output":  # else the MLP answers to the shift
        silence(block, "mlp")
    after = recorded(model, block, inputs=False)
    with model.disable_adapter():
        before = recorded(model, block, inputs=False)
    torch.testing.assert_close(after - before, shift * MASK[..., None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("component", ["mlp_output", "attention_output"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_parallel_adapter_finds_a_sub_layer_that_reads_hidden_vectors_or_is_refused(
    name: str, component: str
) -> None:
    base = tiny(name, "FEATURE_EXTRACTION")
    fields = {"intervention": "parallel_bottleneck", "positions": "all", "component": component}
    config = reft_config("FEATURE_EXTRACTION", **fields)
    if name in ("bert", "roberta", "deberta", "deberta_v2"):  # no module is the sub-layer alone
        with pytest.raises(lr.InputError, match=r"component must exist in .*; use another"):
            get_peft_model(base, config)
        return
    untuned = output(base)
    model = get_peft_model(base, config).eval()
    assert torch.equal(output(model), untuned)
    randomized = [p for key, p in model.named_parameters() if ".reft_phi." in key]
    with torch.no_grad():
        for parameter in randomized:
            parameter.normal_()
    assert not torch.equal(output(model), untuned)


NORMS = {"attention_output": "attention.output.LayerNorm", "mlp_output": "output.LayerNorm"}


@pytest.mark.parametrize("component", list(NORMS))
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta_v2"])
def test_a_shift_of_a_component_shifts_what_a_post_norm_block_normalizes(
    name: str, component: str
) -> None:
    model, shift = constant_edit(name, component)
    block: Any = find_blocks(model.get_base_model())[1][-1]
    norm = block.get_submodule(NORMS[component])
    after = recorded(model, norm, inputs=True)
    with model.disable_adapter():
        before = recorded(model, norm, inputs=True)
    torch.testing.assert_close(after - before, shift * MASK[..., None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = get_peft_model(tiny(name, "CAUSAL_LM"), reft_config("CAUSAL_LM", init="paper"))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_activation_checkpointing(model)
        model.zero_grad()
        loss_of(model.train(), "CAUSAL_LM").backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=16
    )
    with pytest.raises(InputError, match="decoder-only or encoder-only transformer, got T5"):
        get_peft_model(transformers.T5Model(config), reft_config("FEATURE_EXTRACTION"))


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="must have a ModuleList"):
        find_blocks(nn.Linear(2, 2))


def test_a_block_without_the_component_is_refused() -> None:
    with pytest.raises(InputError, match="component must exist in Linear, got 'mlp_output'"):
        component_path(nn.Linear(2, 2), "mlp_output")


def test_blocks_whose_hidden_vectors_come_several_at_once_are_refused() -> None:
    """Gemma 3n's return (altup, batch, seq, hidden): the first two axes are not batch and seq."""
    config = transformers.AutoConfig.for_model(
        "gemma3n_text",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, lr.ReftConfig(task_type="CAUSAL_LM", rank=2, layers="2")).eval()
    with pytest.raises(InputError, match=r"\(batch, seq, hidden\), got \(4, 1, 6, 32\)"):
        model(input_ids=torch.arange(1, 7)[None])
