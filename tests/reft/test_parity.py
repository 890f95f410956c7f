"""Logits and gradients on quantized bases against float64 on the dequantized weights.

The reference shares no arithmetic with the package: an adapter-free float64 copy of the dequantized
base, with LoReFT written out in a forward hook of each block (R by torch.linalg.qr, positions by
hand) and float64 leaves for R's parameter, W and b.

Tolerances are relative to the largest reference value. fp32 compute: 5e-6 for logits, 1e-5 for
gradients (measured 1e-6 and 2e-6). bf16 compute: 5e-2 and 10e-2 (measured 2e-2 and 5e-2; a bf16
mantissa has 8 bits). An int8 base in training mode dequantizes on a CPU and is as good as fp32; in
evaluation it quantizes the activations as well, which is a property of the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import lowmem_reft as lr
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from reference import dequantized_copy, relative_error

LAYERS = (1, 3)
NUM_PROMPT, NUM_RESPONSE = (7, 4), (3, 5)
WIDTH = 13
"""Positions are f2+l1: with a prompt of 7 tokens 0, 1, 6; with one of 4 tokens 0, 1, 3."""


def batch(padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.zeros(2, WIDTH, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(zip(NUM_PROMPT, NUM_RESPONSE, strict=True)):
        start = start_of(row, padding)
        stop = start + prompt + response
        ids[row, start:stop] = torch.randint(3, 128, (stop - start,), generator=generator)
        mask[row, start:stop] = 1
        labels[row, start + prompt : stop] = ids[row, start + prompt : stop]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "position_ids": position_ids,
    }


def start_of(row: int, padding: str) -> int:
    return WIDTH - NUM_PROMPT[row] - NUM_RESPONSE[row] if padding == "left" else 0


def edited_tokens(padding: str) -> tuple[Tensor, Tensor]:
    """Rows and columns of the first two and the last prompt token, by hand."""
    pairs = [
        (row, start_of(row, padding) + offset)
        for row, prompt in enumerate(NUM_PROMPT)
        for offset in (0, 1, prompt - 1)
    ]
    rows, columns = torch.tensor(pairs).T
    return rows, columns


def gram_schmidt(raw: Tensor) -> Tensor:
    q, r = torch.linalg.qr(raw.T)
    return (q * r.diagonal().sign()).T


class Reference:
    """LoReFT in float64 on the dequantized base."""

    def __init__(self, base: nn.Module, parameters: dict[str, Tensor], padding: str) -> None:
        self.base = dequantized_copy(base).train()
        self.leaves = {
            name: value.detach().double().requires_grad_() for name, value in parameters.items()
        }
        self.tokens = edited_tokens(padding)
        for layer in LAYERS:
            self.base.model.layers[layer].register_forward_hook(self._edit(layer))

    def _edit(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            names = ("rotation.raw", "source.weight", "source.bias")
            raw, w, b = (self.leaves[f"{layer}.{name}"] for name in names)
            r = gram_schmidt(raw)
            h = output[self.tokens]
            return output.index_put(self.tokens, h + (h @ w.T + b - h @ r.T) @ r)

        return hook

    def run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.base(**inputs)
        out.loss.backward()
        return out.logits.detach(), {name: leaf.grad for name, leaf in self.leaves.items()}


def loreft_parameters(model: Any) -> dict[str, Tensor]:
    """Return layer.name -> parameter."""
    blocks = model.get_base_model().model.layers
    return {
        f"{layer}.{name}": parameter
        for layer in LAYERS
        for name, parameter in blocks[layer].reft.reft_phi["default"][0].named_parameters()
    }


def adapted(directory: Path, storage: str, compute_dtype: str) -> tuple[Any, Any]:
    """Return (base, model under a LoReFT adapter of random parameters)."""
    base = lr.load_base(directory, storage=storage, compute_dtype=compute_dtype, device="cpu")
    config = lr.ReftConfig(
        task_type="CAUSAL_LM", rank=3, layers=list(LAYERS), positions="f2+l1", init="paper"
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in loreft_parameters(model).values():
            parameter.normal_(0, 0.3)
    return base, model


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(**inputs)
    out.loss.backward()
    parameters = loreft_parameters(model)
    return out.logits.detach(), {name: p.grad for name, p in parameters.items()}


def check(
    model: Any, reference: Reference, inputs: dict[str, Tensor], tolerance: tuple[float, float]
) -> None:
    found_logits, found = run(model, inputs)
    logits, expected = reference.run(inputs)
    attended = inputs["attention_mask"].bool()
    assert relative_error(found_logits[attended], logits[attended]) < tolerance[0]
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(found[name], gradient) < tolerance[1], name


FP32 = (5e-6, 1e-5)
BF16 = (5e-2, 10e-2)


@pytest.mark.parametrize("evaluate_first", [False, True], ids=["fresh", "after_evaluation"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("storage", ["fp32", "nf4", "fp4", "int8"])
def test_logits_and_gradients_equal_float64_on_the_dequantized_weights(
    tiny_llama_dir: Path, storage: str, padding: str, checkpointing: bool, evaluate_first: bool
) -> None:
    base, model = adapted(tiny_llama_dir, storage, "fp32")
    inputs = batch(padding)
    if evaluate_first:
        with torch.no_grad():
            model.eval()(**inputs)
    if checkpointing:
        enable_activation_checkpointing(base)
    parameters = loreft_parameters(model)
    reference = Reference(_without_adapter(tiny_llama_dir, storage, "fp32"), parameters, padding)
    check(model.train(), reference, inputs, FP32)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_bf16_compute_is_as_good_as_bf16(tiny_llama_dir: Path, storage: str, padding: str) -> None:
    _, model = adapted(tiny_llama_dir, storage, "bf16")
    parameters = loreft_parameters(model)
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    reference = Reference(_without_adapter(tiny_llama_dir, storage, "bf16"), parameters, padding)
    check(model.train(), reference, batch(padding), BF16)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_evaluation_gives_the_logits_of_training(tiny_llama_dir: Path, storage: str) -> None:
    _, model = adapted(tiny_llama_dir, storage, "fp32")
    inputs = batch("right")
    training = model.train()(**inputs).logits
    with torch.no_grad():
        evaluation = model.eval()(**inputs).logits
    assert relative_error(evaluation, training) < 1e-6


def test_accumulated_gradients_equal_those_of_the_whole_batch(tiny_llama_dir: Path) -> None:
    _, model = adapted(tiny_llama_dir, "nf4", "fp32")
    inputs = batch("right")
    num_items = int((inputs["labels"] != -100).sum())
    model.train()
    model(**inputs, num_items_in_batch=num_items).loss.backward()
    parameters = loreft_parameters(model)
    whole = {name: value.grad.clone() for name, value in parameters.items()}
    model.zero_grad()
    for row in range(2):
        model.train()
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        model(**part, num_items_in_batch=num_items).loss.backward()
    for name, value in parameters.items():
        assert relative_error(value.grad, whole[name]) < 1e-5, name


def _without_adapter(directory: Path, storage: str, compute_dtype: str) -> Any:
    return lr.load_base(directory, storage=storage, compute_dtype=compute_dtype, device="cpu")
