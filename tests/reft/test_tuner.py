"""The ReFT tuner as a PEFT method: what PEFT promises for its methods, and what ReFT adds to it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    RwkvConfig,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.modeling_layers import GradientCheckpointingLayer

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base.caches import caches_in, with_cache
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.identity import base_digest
from lowmem_reft.base.techniques import chunk_mlps
from lowmem_reft.reft.rotation import orthonormal_rows
from lowmem_reft.reft.tuner import prompt_arguments
from warm import warm_processes

PAD = 0
IDS = torch.tensor([[5, 9, 23, 40, 41, 60, 7, 81], [6, 17, 99, 12, 33, 52, 8, 90]])
LABELS = IDS.masked_fill(torch.arange(8) < 5, -100)  # the prompt is the first five tokens


@pytest.fixture
def base(tiny_llama_dir: Path) -> Any:
    return lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")


@pytest.fixture
def nf4_base(tiny_llama_dir: Path) -> Any:
    return lr.load_base(tiny_llama_dir, storage="nf4", compute_dtype="fp32", device="cpu")


def reft_config(**fields: Any) -> lr.ReftConfig:
    return lr.ReftConfig(**{"task_type": "CAUSAL_LM", "rank": 2, "positions": "f1+l1", **fields})


def randomize(model: nn.Module, adapter: str = "default", scale: float = 1.0) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if f".reft_phi.{adapter}." in name:
                tensor.normal_(0, scale)


def adapt(base: Any, **fields: Any) -> Any:
    """Return the base under a random adapter, in evaluation mode."""
    model = get_peft_model(base, reft_config(**fields))
    randomize(model)
    return model.eval()


def add(model: Any, name: str, **fields: Any) -> None:
    model.add_adapter(name, reft_config(**fields))
    randomize(model, name)
    model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    result: Tensor = model(input_ids=ids, **arguments).logits
    return result


def reft_layer(model: Any, layer: int) -> Any:
    return model.get_base_model().model.layers[layer].reft


# Saving and loading.

LOAD_AND_RUN = """
import sys, torch, lowmem_reft as lr
from peft import PeftModel
torch.set_num_threads(1)
base_dir, storage, out = sys.argv[1:4]
for index, adapter_dir in enumerate(sys.argv[4:]):
    base = lr.load_base(base_dir, storage=storage, compute_dtype="fp32", device="cpu")
    model = PeftModel.from_pretrained(base, adapter_dir)
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(out + "/ids.pt")).logits, f"{out}/{index}.pt")
"""

SAVED: list[dict[str, Any]] = [
    {},
    {"positions": "f2+l2", "tie": "positions", "layers": "1;3", "component": "mlp_output"},
    {"act": "relu", "positions": "l3", "tie": "sides", "layers": "upper:0.5"},
    {"intervention": "red", "positions": "all", "component": "attention_output", "dropout": 0.1},
    {"intervention": "red_loreft", "positions": "l2", "tie": "positions"},
    {"intervention": "fixed_steering", "alpha": 0.3},
    {"intervention": "bottleneck", "positions": "all", "act": "gelu"},
]


def test_an_adapter_gives_bitwise_the_same_logits_in_a_new_process(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    expected = []
    for index, fields in enumerate(SAVED):
        base = lr.load_base(tiny_llama_dir, storage="nf4", compute_dtype="fp32", device="cpu")
        untuned = logits(base)
        model = adapt(base, **fields)
        expected.append(logits(model))
        assert not torch.equal(expected[-1], untuned)
        model.save_pretrained(tmp_path / f"adapter{index}")
    torch.save(IDS, tmp_path / "ids.pt")
    adapters = [str(tmp_path / f"adapter{index}") for index in range(len(SAVED))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD_AND_RUN, str(tiny_llama_dir), "nf4", str(tmp_path)]
    with warm_processes():
        subprocess.run([*command, *adapters], check=True, env=environment, timeout=300)
    for index, value in enumerate(expected):
        assert torch.equal(torch.load(tmp_path / f"{index}.pt"), value), SAVED[index]


def test_the_adapter_file_holds_the_parameters_and_nothing_of_the_base(
    base: Any, tmp_path: Path
) -> None:
    adapt(base, layers="2").save_pretrained(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.reft.reft_phi.0."
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        f"{prefix}rotation.raw": (2, 64),
        f"{prefix}source.weight": (2, 64),
        f"{prefix}source.bias": (2,),
    }


def test_every_field_survives_saving_and_loading(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "intervention": "noreft",
        "rank": 3,
        "layers": [1, 3],
        "positions": "f2+l1",
        "tie": "sides",
        "component": "mlp_output",
        "act": "silu",
        "dropout": 0.25,
        "init": "paper",
        "alpha": 0.5,
        "modules_to_save": ["score"],
        "task_type": "SEQ_CLS",
        "inference_mode": True,
    }
    config = lr.ReftConfig(**fields)
    defaults = lr.ReftConfig()
    assert all(getattr(defaults, name) != value for name, value in fields.items())
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, lr.ReftConfig)
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("layers", [range(1, 3), (1, 2)])
def test_any_sequence_of_layers_can_be_saved(layers: Any, tmp_path: Path) -> None:
    lr.ReftConfig(layers=layers).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers"] == [1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"intervention": "lora"}, "intervention must be one of loreft"),
        ({"positions": "x3"}, "positions must be 'all', 'fN'"),
        ({"tie": "both"}, "tie must be one of"),
        ({"positions": "all", "tie": "sides"}, "tie must be 'tied'"),
        ({"component": "mlp"}, "component must be one of block_output"),
        ({"act": "sin"}, "act must be one of relu"),
        ({"intervention": "lobireft", "act": "relu"}, "act must be .* got 'relu' for lobireft"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"init": "zero"}, "init must be 'identity' or 'paper'"),
        ({"layers": "1,2"}, "layers must be 'all'"),
        ({"layers": "upper:0"}, "layers must be 'all'"),
        ({"layers": "upper:1.5"}, "layers must be 'all'"),
        ({"layers": []}, "layers must be 'all'"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": [-1]}, "counted from 0"),
        ({"layers": 8}, "layers must be 'all'"),
    ],
)
def test_a_wrong_option_is_refused_with_its_rule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lr.ReftConfig(**fields)


@pytest.mark.parametrize(
    ("layers", "edited"),
    [("all", [0, 1, 2, 3]), ("0;2", [0, 2]), ([3], [3]), ("upper:0.5", [2, 3]), ("upper:0.1", [3])],
)
def test_the_named_layers_are_edited(base: Any, layers: Any, edited: list[int]) -> None:
    model = adapt(base, layers=layers)
    blocks = model.get_base_model().model.layers
    assert [index for index, block in enumerate(blocks) if hasattr(block, "reft")] == edited


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"layers": "4"}, "layers must be below 4"), ({"rank": 65}, "rank must be between 1 and")],
)
def test_a_refused_adapter_leaves_the_base_as_it_was(
    base: Any, fields: dict[str, Any], message: str
) -> None:
    untuned = logits(base)
    with pytest.raises(InputError, match=message):
        get_peft_model(base, reft_config(**fields))
    assert not any(hasattr(module, "reft") for module in base.modules())
    assert not base._forward_pre_hooks
    model = adapt(base)
    assert not torch.equal(logits(model), untuned)


# Several adapters.


@pytest.fixture
def two(base: Any) -> Any:
    """A model with adapters "default" and "other", which differ in everything."""
    model = adapt(base, layers="1;2")
    add(model, "other", layers="2;3", positions="all", intervention="red", component="mlp_output")
    return model


def logits_of(model: Any, name: str, **arguments: Any) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, **arguments)
    model.set_adapter(name)
    return logits(model, **arguments)


def test_set_adapter_switches_between_adapters(two: Any) -> None:
    of = {name: logits_of(two, name) for name in ("default", "other", "__base__")}
    assert not torch.equal(of["default"], of["other"])
    assert not torch.equal(of["other"], of["__base__"])
    assert torch.equal(of["default"], logits_of(two, "default"))


def test_an_added_adapter_equals_the_same_adapter_alone(
    two: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    two.save_pretrained(tmp_path)
    base = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
    alone = PeftModel.from_pretrained(base, tmp_path / "other")
    assert torch.equal(logits(alone), logits_of(two, "other"))
    alone.load_adapter(tmp_path, adapter_name="first")
    assert torch.equal(logits_of(alone, "first"), logits_of(two, "default"))


def test_an_adapter_loads_onto_empty_parameters(
    two: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    two.save_pretrained(tmp_path)
    base = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
    alone = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    alone.load_adapter(tmp_path / "other", adapter_name="other", low_cpu_mem_usage=True)
    for name in ("default", "other"):
        assert torch.equal(logits_of(alone, name), logits_of(two, name))


def test_disable_adapter_gives_bitwise_the_base(base: Any) -> None:
    untuned = logits(base)
    model = adapt(base)
    with model.disable_adapter():
        assert torch.equal(logits(model), untuned)
    assert not torch.equal(logits(model), untuned)


def test_an_adapter_that_changes_nothing_gives_bitwise_the_base(nf4_base: Any) -> None:
    untuned = logits(nf4_base)
    model = get_peft_model(nf4_base, reft_config(positions="all")).eval()
    assert torch.equal(logits(model), untuned)


def test_deleting_an_adapter_leaves_the_other_as_it_was(two: Any) -> None:
    expected = logits_of(two, "other")
    two.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        two.delete_adapter("default")
    two.set_adapter("other")
    assert torch.equal(logits(two), expected)
    assert not any(".default." in name for name in two.state_dict())


def test_only_the_active_adapter_is_trainable(two: Any) -> None:
    two.set_adapter("other")
    trainable = [name for name, value in two.named_parameters() if value.requires_grad]
    assert trainable
    assert all(".reft_phi.other." in name for name in trainable)


MIXED = ["default", "__base__", "other", "default", "other"]


def mixed_ids() -> Tensor:
    return torch.randint(3, 128, (len(MIXED), 8), generator=torch.Generator().manual_seed(1))


def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(two: Any) -> None:
    ids = mixed_ids()
    together = logits(two, ids, adapter_names=MIXED)
    for row, name in enumerate(MIXED):
        assert torch.equal(together[row], logits_of(two, name, ids=ids)[row])


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_each_row_of_a_mixed_generation_equals_its_adapter_alone(
    two: Any, arguments: dict[str, int]
) -> None:
    ids = mixed_ids()
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": ids > 0, **arguments}
    together = two.generate(input_ids=ids, adapter_names=MIXED, **arguments)
    per_row = len(together) // len(MIXED)
    for row, name in enumerate(MIXED):
        if name == "__base__":
            with two.disable_adapter():
                alone = two.generate(input_ids=ids, **arguments)
        else:
            two.set_adapter(name)
            alone = two.generate(input_ids=ids, **arguments)
        part = slice(row * per_row, (row + 1) * per_row)
        assert _equal_up_to_padding(together[part], alone[part])


def _equal_up_to_padding(a: Tensor, b: Tensor) -> bool:
    width = max(a.shape[1], b.shape[1])
    a, b = (nn.functional.pad(x, (0, width - x.shape[1]), value=PAD) for x in (a, b))
    return torch.equal(a, b)


def test_an_unknown_name_in_a_mixed_batch_is_refused(two: Any) -> None:
    with pytest.raises(InputError, match=r"adapter_names must be loaded adapters .* got nobody"):
        logits(two, adapter_names=["nobody", "default"])


def test_a_mixed_batch_needs_one_name_per_example(two: Any) -> None:
    for count in (1, 3):
        with pytest.raises(InputError, match=rf"one name per example \(2\), got {count}"):
            logits(two, adapter_names=["default"] * count)


def test_a_mixed_batch_is_refused_in_training(two: Any) -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        two.train()(input_ids=IDS, labels=LABELS, adapter_names=["default", "other"])


def classifier(directory: Path, storage: str = "fp32") -> Any:
    torch.manual_seed(3)
    return lr.load_base(directory, storage=storage, device="cpu", task_type="SEQ_CLS", num_labels=3)


def test_a_classification_head_is_saved_loaded_and_mixed(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    config = partial(reft_config, task_type="SEQ_CLS", positions="all")
    model = get_peft_model(classifier(tiny_llama_dir), config())
    model.add_adapter("other", config(layers="1"))
    for name in ("default", "other"):
        randomize(model, name)
        with torch.no_grad():
            model.get_base_model().score.modules_to_save[name].weight.normal_()
    model.eval()
    of = {name: logits_of(model, name) for name in ("default", "other", "__base__")}
    assert not torch.equal(of["default"], of["other"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(tiny_llama_dir), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("default", "other"):
        assert torch.equal(logits_of(loaded, name), of[name])
    mixed = logits(loaded, adapter_names=["other", "__base__"])
    # PEFT applies the heads to parts of the batch, which rounds differently.
    torch.testing.assert_close(mixed[0], of["other"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], of["__base__"][1], rtol=1e-5, atol=1e-5)


def test_two_adapters_can_be_active_at_once(base: Any) -> None:
    model = adapt(base, layers="1", positions="f1")
    add(model, "other", layers="1", positions="l1")
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.equal(both, logits_of(model, "default"))
    assert not torch.equal(both, logits_of(model, "other"))


# Merging, unloading, copying.


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(base: Any, method: str) -> None:
    with pytest.raises(NotImplementedError, match="nothing to merge; save the adapter with"):
        getattr(adapt(base), method)()


def test_unload_gives_the_base_back_without_a_trace(base: Any) -> None:
    untuned, keys = logits(base), list(base.state_dict())
    num_hooks = _num_hooks(base)
    model = adapt(base)
    model.train()
    enable_activation_checkpointing(base)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    unloaded = model.unload()
    assert unloaded is base
    assert list(base.state_dict()) == keys
    assert _num_hooks(base) == num_hooks
    assert torch.equal(logits(base.eval()), untuned)


def test_a_base_can_be_adapted_again_after_unload(base: Any) -> None:
    first = adapt(base, component="mlp_output").train()
    enable_activation_checkpointing(base)
    first(input_ids=IDS, labels=LABELS).loss.backward()
    second = adapt(first.unload(), component="mlp_output").train()
    second(input_ids=IDS, labels=LABELS).loss.backward()
    assert reft_layer_gradient(second) > 0


def reft_layer_gradient(model: Any) -> float:
    return max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)


def _num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_deep_copy_is_independent(base: Any) -> None:
    model = adapt(base)
    expected = logits(model)
    model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    twin = copy.deepcopy(model.eval())
    assert torch.equal(logits(twin), expected)
    randomize(twin)
    changed = logits(twin)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(twin), changed)
    twin.unload()
    assert torch.equal(logits(model), expected)


# Counting.


def test_the_number_of_parameters_of_an_8b_model_is_the_formula() -> None:
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=8, intermediate_size=8)
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), reft_config(rank=8, positions="f7+l7"))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 32 * (2 * 4096 * 8 + 8)


def test_the_trainable_share_is_the_same_on_a_4_bit_base(base: Any, nf4_base: Any) -> None:
    counts = [adapt(model).get_nb_trainable_parameters() for model in (base, nf4_base)]
    assert counts[0] == counts[1]
    total = sum(value.numel() for value in base.parameters())
    assert counts[0] == (4 * (2 * 2 * 64 + 2), total)


# Which tokens are edited.


def block_outputs(model: Any, layer: int, **arguments: Any) -> Tensor:
    outputs: list[Tensor] = []
    block = model.get_base_model().model.layers[layer]
    handle = block.register_forward_hook(lambda *call: outputs.append(call[2].detach().clone()))
    try:
        logits(model, **arguments)
    finally:
        handle.remove()
    return outputs[0]


@pytest.mark.parametrize("storage", ["base", "nf4_base"])
def test_unselected_positions_are_bitwise_unchanged(
    storage: str, request: pytest.FixtureRequest
) -> None:
    model = adapt(request.getfixturevalue(storage), layers="1", positions="f1+l2")
    with model.disable_adapter():
        before = block_outputs(model, 1, labels=LABELS)
    after = block_outputs(model, 1, labels=LABELS)
    changed = (before != after).any(-1)
    assert changed.tolist() == [[True, False, False, True, True, False, False, False]] * 2


def test_the_edit_is_the_intervention_of_the_hidden_vector(base: Any) -> None:
    model = adapt(base, layers="2", positions="l1")
    with model.disable_adapter():
        before = block_outputs(model, 2, labels=LABELS)[:, 4].double()
    after = block_outputs(model, 2, labels=LABELS)[:, 4].double()
    phi = reft_layer(model, 2).reft_phi["default"][0]
    r = orthonormal_rows(phi.rotation.raw.detach().double())
    w, b = phi.source.weight.detach().double(), phi.source.bias.detach().double()
    expected = before + (before @ w.T + b - before @ r.T) @ r
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_each_position_has_its_own_parameters_when_untied(base: Any) -> None:
    model = adapt(base, layers="2", positions="f1+l2", tie="positions", intervention="lobireft")
    with model.disable_adapter():
        before = block_outputs(model, 2, labels=LABELS)
    change = (block_outputs(model, 2, labels=LABELS) - before)[0]
    phis = reft_layer(model, 2).reft_phi["default"]
    for position, phi in zip((0, 3, 4), phis, strict=True):
        expected = phi(torch.zeros(1, 64))[0].detach()
        torch.testing.assert_close(change[position], expected, rtol=1e-4, atol=1e-5)


def test_recorded_hidden_states_are_the_edited_ones(base: Any) -> None:
    model = adapt(base, layers="1")
    seen = block_outputs(model, 1)
    with torch.no_grad():
        recorded = model(input_ids=IDS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(recorded, seen)
    with model.disable_adapter():
        assert not torch.equal(recorded, block_outputs(model, 1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [PAD, 9])  # 9 occurs in the text, as when pad is eos
def test_padding_does_not_change_what_is_edited(base: Any, side: str, pad: int) -> None:
    model = adapt(base, layers="1;3", positions="f2+l2")
    short = IDS[:, :6]
    padding = torch.full((2, 3), pad)
    parts = (padding, short) if side == "left" else (short, padding)
    ids = torch.cat(parts, 1)
    mask = torch.cat([torch.full_like(part, part is short) for part in parts], 1)
    place = slice(3, None) if side == "left" else slice(0, 6)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, ids, attention_mask=mask, position_ids=position_ids)[:, place]
    torch.testing.assert_close(padded, logits(model, short), rtol=1e-4, atol=1e-4)


def test_labels_and_prompt_mask_mean_the_same(base: Any) -> None:
    model = adapt(base, positions="f2+l2")
    assert torch.equal(
        logits(model, labels=LABELS), logits(model, **prompt_arguments(model, LABELS))
    )


def test_a_model_without_reft_needs_no_prompt_arguments(base: Any) -> None:
    assert prompt_arguments(base, LABELS) == {}
    lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert prompt_arguments(lora, LABELS) == {}


def test_packed_samples_are_edited_like_single_ones(base: Any) -> None:
    model = adapt(base, layers="2", positions="f1+l2")
    alone = block_outputs(model, 2, labels=LABELS)
    packed = block_outputs(
        model,
        2,
        ids=IDS.reshape(1, -1),
        labels=LABELS.reshape(1, -1),
        position_ids=torch.arange(8).repeat(2)[None],
    )
    with model.disable_adapter():
        base_packed = block_outputs(
            model, 2, ids=IDS.reshape(1, -1), position_ids=torch.arange(8).repeat(2)[None]
        )
    changed = (packed != base_packed).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [0, 3, 4, 8, 11, 12]
    torch.testing.assert_close(packed.reshape(2, 8, -1), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["bool", "integers"])
def test_an_explicit_mask_says_what_is_edited(base: Any, given: str) -> None:
    model = adapt(base, layers="1")
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 2] = mask[1, 7] = True
    argument = mask if given == "bool" else torch.where(mask, 0, -1)
    with model.disable_adapter():
        before = block_outputs(model, 1, intervention_mask=argument)
    after = block_outputs(model, 1, intervention_mask=argument, labels=LABELS)
    assert torch.equal((after != before).any(-1), mask)


def test_an_explicit_mask_holds_the_index_of_the_intervention(base: Any) -> None:
    model = adapt(base, layers="1", positions="f1+l1", tie="sides")
    by_hand = torch.full((2, 8), -1)
    by_hand[:, 0], by_hand[:, 4] = 0, 1
    assert torch.equal(logits(model, labels=LABELS), logits(model, intervention_mask=by_hand))


def test_an_explicit_mask_reaches_a_forward_pass_with_a_cache(base: Any) -> None:
    model = adapt(base, layers="2")
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 6] = True
    expected = logits(model, intervention_mask=mask)[:, 5:]
    with torch.no_grad():
        first = model(input_ids=IDS[:, :5], intervention_mask=mask[:, :5], use_cache=True)
    (cache,) = caches_in(first.values())
    rest = logits(model, IDS[:, 5:], **with_cache(base, cache), intervention_mask=mask[:, 5:])
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.bool), r"shape of the input, \(2, 8\), got \(2, 7\)"),
        (torch.zeros(2, 8), "must be bool, or integers"),
        (torch.ones(2, 8, dtype=torch.long), "integers from -1 to 0"),
    ],
)
def test_a_wrong_explicit_mask_is_refused(base: Any, mask: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        logits(adapt(base), intervention_mask=mask)


def test_a_bool_mask_is_refused_where_it_is_ambiguous(base: Any) -> None:
    with pytest.raises(InputError, match="index of the φ"):
        logits(adapt(base, tie="sides"), intervention_mask=torch.ones(2, 8, dtype=torch.bool))


def test_a_prompt_mask_of_another_shape_is_refused(base: Any) -> None:
    with pytest.raises(InputError, match="prompt_mask must have the shape of the input"):
        logits(adapt(base), prompt_mask=torch.ones(1, 8))


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("query_length", [1, 8])
def test_a_prepared_mask_gives_the_attended_tokens(
    base: Any, query_length: int, as_dict: bool
) -> None:
    from lowmem_reft.reft.selection import _attended

    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    prepared: Any = (mask[:, None, None, :] == 0).float() * -1e9
    if query_length == 8:
        causal = torch.full((8, 8), -1e9).triu(1)
        prepared = torch.minimum(prepared, causal[None, None])
    if as_dict:
        prepared = {"full_attention": None, "sliding_attention": prepared}
    found = _attended({"input_ids": IDS, "attention_mask": prepared}, 2, 8)
    assert torch.equal(found, mask)


def test_training_without_labels_is_refused(base: Any) -> None:
    with pytest.raises(InputError, match="labels must be given in training"):
        adapt(base).train()(input_ids=IDS)


def test_a_block_outside_its_models_forward_pass_is_refused(base: Any) -> None:
    model = adapt(base)
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.get_base_model().model(input_ids=IDS)


def test_an_error_in_the_forward_pass_leaves_no_selection_behind(base: Any) -> None:
    model = adapt(base)
    expected = logits(model)
    with pytest.raises(IndexError):
        logits(model, torch.full((2, 8), 10_000))
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.get_base_model().model(input_ids=IDS)
    assert torch.equal(logits(model), expected)


# Generation.


def generated_by_hand(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Greedy decoding without a cache: first and last prompt token edited, by explicit mask."""
    prompt_length = ids.shape[1]
    first = mask.long().argmax(1)
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    chosen[torch.arange(len(ids)), first] = True
    chosen[:, prompt_length - 1] = True
    for _ in range(steps):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        arguments = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        out = logits(model, ids, intervention_mask=chosen, **arguments)
        ids = torch.cat([ids, out[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], 1)
        chosen = torch.cat([chosen, torch.zeros(len(ids), 1, dtype=torch.bool)], 1)
    return ids


WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "no_cache": {"use_cache": False},
    "static_cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked_prefill": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_edits_the_prompt_and_nothing_else(base: Any, way: str, padded: bool) -> None:
    model = adapt(base, layers="0;2")
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if padded:
        ids[0, :3], mask[0, :3] = PAD, 0
    base.generation_config.eos_token_id = None
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **WAYS[way]
    )
    assert torch.equal(new, generated_by_hand(model, ids, mask, 5))
    with model.disable_adapter():
        untuned = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False
        )
    assert not torch.equal(new, untuned)


@pytest.mark.parametrize("with_config", [False, True])
def test_generation_without_a_mask_leaves_padding_alone(base: Any, with_config: bool) -> None:
    from transformers import GenerationConfig

    model = adapt(base, layers="0;2")
    ids = IDS.clone()
    ids[0, :3] = PAD
    base.generation_config.pad_token_id = PAD
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    if with_config:
        arguments = {"generation_config": GenerationConfig(**arguments)}
    with_mask = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), **arguments)
    assert torch.equal(model.generate(input_ids=ids, **arguments), with_mask)


@pytest.mark.parametrize("way", ["empty", "chunked", "of_the_start", "assisted"])
def test_generation_from_a_cache_of_the_caller_edits_the_same_tokens(base: Any, way: str) -> None:
    model = adapt(base, layers="0;2")
    ids = IDS[:1]
    base.generation_config.eos_token_id = None
    cache, more = DynamicCache(config=base.config), {}
    if way == "chunked":
        more = {"prefill_chunk_size": 3}
    if way == "assisted":
        more = {"assistant_model": copy.deepcopy(base)}
    if way == "of_the_start":
        edited = torch.zeros(1, 5, dtype=torch.bool)
        edited[0, 0] = True
        with torch.no_grad():
            model(input_ids=ids[:, :5], **with_cache(base, cache), intervention_mask=edited)
    new = model.generate(
        input_ids=ids, **with_cache(base, cache), max_new_tokens=5, do_sample=False, **more
    )
    assert torch.equal(new, generated_by_hand(model, ids, torch.ones_like(ids), 5))


def test_a_model_that_assists_itself_generates_the_same(base: Any) -> None:
    model = adapt(base, layers="0;2")
    arguments = {"input_ids": IDS[:1], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**arguments)
    assert torch.equal(model.generate(assistant_model=model, **arguments), expected)


@pytest.mark.filterwarnings("ignore")  # that fast kernels are not installed
@pytest.mark.parametrize("num_prompt", [1, 6])
@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    ],
    ids=["mamba", "rwkv"],
)
def test_a_recurrent_model_edits_the_prompt_and_no_new_token(config: Any, num_prompt: int) -> None:
    model = adapt(AutoModelForCausalLM.from_config(config).eval(), positions="all")
    ids = torch.randint(1, 64, (1, num_prompt))

    def scores(**arguments: Any) -> Tensor:
        out = model.generate(
            input_ids=ids,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **arguments,
        )
        return torch.stack(out.logits)

    from_state = scores(use_cache=True)
    torch.testing.assert_close(from_state, scores(use_cache=False), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(from_state, scores(), atol=1e-4)


def test_continuous_batching_is_refused(base: Any) -> None:
    with pytest.raises(NotImplementedError, match="use generate"):
        adapt(base).generate_batch([[1, 2, 3]])


def test_generation_takes_positional_input(base: Any) -> None:
    model = adapt(base)
    arguments = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(IDS, **arguments), model.generate(input_ids=IDS, **arguments))


def test_an_explicit_mask_is_used_in_generation(base: Any) -> None:
    model = adapt(base, layers="0;2")
    chosen = torch.zeros_like(IDS, dtype=torch.bool)
    chosen[:, [0, 7]] = True
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids=IDS, intervention_mask=chosen, **arguments),
        model.generate(input_ids=IDS, **arguments),
    )
    elsewhere = chosen.flip(1).roll(3, 1)
    assert not torch.equal(
        model.generate(input_ids=IDS, intervention_mask=elsewhere, **arguments),
        model.generate(input_ids=IDS, **arguments),
    )


# Precision.


@pytest.mark.parametrize("name", ["loreft", "fixed_steering"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_16_bit_costs_no_precision(
    base: Any, dtype: torch.dtype, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lowmem_reft")
    model = adapt(base, layers="1", intervention=name)
    expected = logits(model)
    for tensor in (*reft_layer(model, 1).parameters(), *reft_layer(model, 1).buffers()):
        tensor.data = tensor.data.to(dtype)
    assert torch.equal(logits(model), expected)
    assert "restored to fp32" in caplog.text


def test_a_cast_before_training_is_undone_when_training_starts(base: Any) -> None:
    model = adapt(base, layers="1")
    before = [value.detach().clone() for value in reft_layer(model, 1).parameters()]
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.to(torch.bfloat16)
    model.train()
    after = list(reft_layer(model, 1).parameters())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    optimizer = torch.optim.AdamW(after, lr=1e-3)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert {value.grad.dtype for value in after if value.grad is not None} == {torch.float32}
    optimizer.step()
    assert not torch.equal(before[0], after[0])


def test_a_cast_right_after_loading_onto_empty_parameters_costs_no_precision(
    base: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = adapt(base, layers="1")
    model.save_pretrained(tmp_path)
    fresh = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True)
    for value in reft_layer(loaded, 1).parameters():
        value.data = value.data.to(torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))


def test_values_loaded_after_a_cast_are_kept(base: Any) -> None:
    model = adapt(base, layers="1")
    source = reft_layer(model, 1).reft_phi["default"][0].source
    source.bias.data = source.bias.data.to(torch.bfloat16)
    source.bias.data.copy_(torch.tensor([3.0, 4.0]))
    logits(model)
    assert source.bias.dtype == torch.float32
    assert source.bias.tolist() == [3.0, 4.0]


def test_the_edit_is_computed_in_fp32_under_autocast(base: Any) -> None:
    model = adapt(base, layers="1")
    layer = reft_layer(model, 1)
    hidden = torch.randn(1, 4, 64)
    index = (torch.zeros(2, dtype=torch.long), torch.tensor([0, 3]))
    phi = layer.reft_phi["default"][0]
    expected = layer._edit(hidden, phi, index, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._edit(hidden, phi, index, 0.0), expected)


def test_training_under_autocast_gives_fp32_gradients(base: Any) -> None:
    model = adapt(base).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    assert reft_layer(model, 0).reft_phi["default"][0].rotation.raw.grad.dtype == torch.float32


def test_dropout_falls_on_the_change_alone(base: Any) -> None:
    model = adapt(base, layers="1", intervention="lobireft", dropout=0.5)
    layer = reft_layer(model, 1)
    hidden = torch.randn(1, 50, 64)
    index = (torch.zeros(50, dtype=torch.long), torch.arange(50))
    phi = layer.reft_phi["default"][0]
    change = phi(hidden[0]).detach()
    layer.train()
    dropped = (layer._edit(hidden, phi, index, 0.5) - hidden)[0].detach()
    kept = dropped.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * change[kept], rtol=1e-3, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer._edit(hidden, phi, index, 0.5)[0], hidden[0] + change)


# Training.


def train_steps(model: Any, num_steps: int, lr: float = 1e-2) -> list[float]:
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(num_steps):
        model.train()
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_bytes_of_a_4_bit_base_are_the_same_after_training(nf4_base: Any) -> None:
    before = base_digest(nf4_base)
    model = get_peft_model(nf4_base, reft_config(positions="all", rank=4))
    losses = train_steps(model, 3)
    logits(model.eval())
    assert losses[-1] < losses[0]
    assert base_digest(model.unload()) == before


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("hooks_inside", [False, True], ids=["hooks_outside", "hooks_inside"])
@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_output"])
def test_a_reference_pass_before_the_backward_pass_changes_no_gradient(
    base: Any, component: str, hooks_inside: bool
) -> None:
    model = adapt(base, layers="1;2;3", component=component, positions="f2+l2", dropout=0.0)
    model.train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    expected = gradients(model)
    enable_activation_checkpointing(base)
    if hooks_inside:
        checkpoint_hooks_as_well(base)
    loss = model(input_ids=IDS, labels=LABELS).loss
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=IDS.flip(1)[:, :4])  # another shape, another selection: none
    with torch.no_grad():
        model(input_ids=IDS.flip(1), labels=LABELS.flip(1))
    loss.backward()
    assert_same_gradients(gradients(model), expected)


def checkpoint_hooks_as_well(base: Any) -> None:
    """Checkpoint each block's call, hooks included, as transformers did before 5.23."""
    for block in base.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = False
            block.__class__ = _with_checkpointed_call(type(block))


def _with_checkpointed_call(block_class: Any) -> Any:
    class Old(block_class):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            call = partial(super().__call__, **kwargs)
            return self._gradient_checkpointing_func(call, *args) if self.training else call(*args)

    return Old


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_below_the_first_intervention_get_no_backward_pass(
    base: Any, checkpointing: bool
) -> None:
    model = adapt(base, layers="2;3").train()
    if checkpointing:
        enable_activation_checkpointing(base)
        base.enable_input_require_grads()  # as Trainer and TRL call it
    grad_functions: list[Any] = []
    calls = [0] * 4
    for index, block in enumerate(base.model.layers):
        block.register_forward_hook(lambda *call: grad_functions.append(call[2].grad_fn))
        block.mlp.register_forward_pre_hook(partial(_count, calls, index))
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert [function is not None for function in grad_functions[:4]] == [False, False, True, True]
    # Block 2 is edited at its output: transformers recomputes it only before 5.23, with its hooks.
    assert calls[:2] == [1, 1]
    assert calls[3] == (2 if checkpointing else 1)


def _count(calls: list[int], index: int, *_: Any) -> None:
    calls[index] += 1


# Other ways to attach an adapter.


refused_by_transformers = pytest.mark.xfail(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    raises=InputError,
    reason="transformers demands a newer peft, and the InputError says what to do",
)


@refused_by_transformers
def test_transformers_own_add_adapter_works(base: Any, tmp_path: Path) -> None:
    expected_model = adapt(copy.deepcopy(base), layers="1")
    expected_model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base.eval()), logits(expected_model))
    base.disable_adapters()
    with expected_model.disable_adapter():
        assert torch.equal(logits(base), logits(expected_model))


@refused_by_transformers
def test_transformers_add_adapter_takes_several(base: Any) -> None:
    untuned = logits(base)
    base.add_adapter(reft_config(layers="1"), "one")
    randomize(base, "one")
    one = logits(base.eval())
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        base.add_adapter(reft_config(layers="2"), "two")
    randomize(base, "two")
    two = logits(base.eval())
    assert not torch.equal(one, two)
    base.set_adapter("one")
    assert torch.equal(logits(base), one)
    base.disable_adapters()
    assert torch.equal(logits(base), untuned)


def test_adapting_twice_edits_with_the_newer_adapter(base: Any) -> None:
    first = adapt(base, layers="1")
    of_first = logits(first)
    with pytest.warns(UserWarning, match=r"second time|Already found"):
        second = get_peft_model(base, reft_config(layers="1"), adapter_name="again")
    randomize(second, "again")
    second.eval()
    assert not torch.equal(logits(second), of_first)
    second.generate(input_ids=IDS, max_new_tokens=2)
    second.unload()
    assert _num_hooks(base) == 0


# What goes into a sub-layer.


@pytest.mark.parametrize("positions", ["all", "f2+l1"])
@pytest.mark.parametrize("component", ["mlp_output", "attention_output"])
def test_a_parallel_adapter_adds_what_it_makes_of_the_sub_layers_input(
    base: Any, component: str, positions: str
) -> None:
    fields = {"intervention": "parallel_bottleneck", "act": "tanh", "layers": "2"}
    model = adapt(base, **fields, component=component, positions=positions)
    block = base.model.layers[2]
    module = block.mlp if component == "mlp_output" else block.self_attn
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        source = args[0] if args else kwargs["hidden_states"]
        seen.append((source, output[0] if isinstance(output, tuple) else output))

    module.register_forward_hook(note, with_kwargs=True)
    logits(model)
    with model.disable_adapter():
        logits(model)
    (source, edited), (same, plain) = seen
    assert torch.equal(source, same)
    phi = module.reft.reft_phi["default"][0]
    chosen = torch.zeros(8, dtype=torch.bool)
    chosen[{"all": slice(None), "f2+l1": [0, 1, 7]}[positions]] = True
    change = phi(source[:, chosen])
    torch.testing.assert_close(edited[:, chosen], plain[:, chosen] + change)
    assert torch.equal(edited[:, ~chosen], plain[:, ~chosen])


@pytest.mark.parametrize("mlp_tokens", [None, 3])
def test_a_parallel_adapter_has_the_same_gradients_recomputed_and_in_chunks(
    base: Any, mlp_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"intervention": "parallel_bottleneck", "component": "mlp_output", "positions": "all"}
    model = adapt(base, **fields).train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    expected = gradients(model)
    monkeypatch.setattr("lowmem_reft.reft.layer.CHUNK_TOKENS", 5)
    enable_activation_checkpointing(base)
    if mlp_tokens:
        chunk_mlps(base, mlp_tokens)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_a_parallel_adapter_beside_a_whole_block_is_refused() -> None:
    with pytest.raises(InputError, match="component must be mlp_output or attention_output for"):
        reft_config(intervention="parallel_bottleneck")
