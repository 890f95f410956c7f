"""Φ against its equation, written out here in float64 with an orthonormal R of torch.linalg.qr."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from lowmem_reft import InputError, ReftConfig
from lowmem_reft.reft import rotation as rotations
from lowmem_reft.reft.interventions import (
    INTERVENTIONS,
    InterchangeIntervention,
    build_intervention,
    intervention_options,
)
from lowmem_reft.reft.rotation import Rotation, orthonormal_rows

HIDDEN, RANK, TOKENS = 24, 3, 7
ORTHONORMAL = ("loreft", "orthogonal_direft", "consreft", "lobireft")
WITH_ACT = ("loreft", "noreft", "direft", "orthogonal_direft", "red_loreft", "bottleneck")
ACTS = {
    "relu": lambda x: x.clamp(min=0),
    "tanh": torch.tanh,
    "silu": lambda x: x / (1 + (-x).exp()),
}


def gram_schmidt(raw: Tensor) -> Tensor:
    """Orthonormal rows by QR, with the signs of Gram-Schmidt."""
    q, r = torch.linalg.qr(raw.double().T)
    return (q * r.diagonal().sign()).T


def randomized(name: str, **fields: Any) -> nn.Module:
    phi = build_intervention(name, HIDDEN, rank=RANK, **fields)
    with torch.no_grad():
        for tensor in (*phi.parameters(), *phi.buffers()):
            tensor.normal_()
    return phi


def equation(name: str, phi: Any, h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Φ(h) − h as the table of the paper has it, in float64; R, W, b, ... as in the equations."""
    p = {key: value.detach().double() for key, value in phi.state_dict().items()}
    part = "loreft." if "loreft.rotation.raw" in p else ""
    r = gram_schmidt(p[f"{part}rotation.raw"]) if f"{part}rotation.raw" in p else torch.empty(0)

    def source() -> Tensor:
        return act(h @ p[f"{part}source.weight"].T + p[f"{part}source.bias"])

    changes: dict[str, Callable[[], Tensor]] = {
        "loreft": lambda: (source() - h @ r.T) @ r,
        "noreft": lambda: (source() - h @ p["projection.weight"].T) @ p["projection.weight"],
        "direft": lambda: source() @ p["projection.weight"],
        "orthogonal_direft": lambda: source() @ r,
        "consreft": lambda: (p["bias"] - h @ r.T) @ r,
        "lobireft": lambda: (p["bias"] @ r).expand_as(h),
        "red": lambda: p["scale"] * h + p["bias"] - h,
        "red_loreft": lambda: p["red.scale"] * h + p["red.bias"] - h + (source() - h @ r.T) @ r,
        "fixed_steering": lambda: (0.5 * p["vector"]).expand_as(h),
        "steering": lambda: (0.5 * p["vector"]).expand_as(h),
        "bottleneck": lambda: (
            act(h @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]
        ),
    }
    changes["parallel_bottleneck"] = changes["bottleneck"]
    return changes[name]()


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_the_change_follows_the_equation(name: str) -> None:
    act = "relu" if "bottleneck" in name else None
    phi = randomized(name, alpha=0.5)
    h = torch.randn(TOKENS, HIDDEN)
    expected = equation(name, phi, h.double(), ACTS["relu"] if act else lambda x: x)
    torch.testing.assert_close(phi(h).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", WITH_ACT)
def test_the_non_linearity_falls_on_the_learned_source_only(name: str, act: str) -> None:
    phi = randomized(name, act=act, init="paper")
    h = torch.randn(TOKENS, HIDDEN)
    expected = equation(name, phi, h.double(), ACTS[act])
    torch.testing.assert_close(phi(h).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in INTERVENTIONS if name != "fixed_steering"])
def test_gradients_equal_those_of_the_equation(name: str) -> None:
    phi = randomized(name, alpha=0.5).double()
    parameters = dict(phi.named_parameters())
    h, weight = torch.randn(TOKENS, HIDDEN).double(), torch.randn(TOKENS, HIDDEN).double()
    (phi(h) * weight).sum().backward()
    leaves = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}

    class Plain:
        @staticmethod
        def state_dict() -> Any:
            return {key: _Undetachable(value) for key, value in leaves.items()}

    act = ACTS["relu"] if "bottleneck" in name else lambda x: x
    (equation(name, Plain, h, act) * weight).sum().backward()
    for key, value in parameters.items():
        torch.testing.assert_close(
            value.grad, leaves[key].grad, msg=lambda m, key=key: f"{key}: {m}"
        )


class _Undetachable:
    """Lets `equation` build a graph through the parameters it would otherwise detach."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def detach(self) -> _Undetachable:
        return self

    def double(self) -> Tensor:
        return self.value


def test_an_interchange_puts_the_subspace_of_the_source_run_into_the_base_run() -> None:
    phi = InterchangeIntervention(HIDDEN, rank=RANK)
    base, source = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    r = gram_schmidt(phi.rotation.raw.detach())
    b, s = base.double(), source.double()
    expected = b + (s @ r.T - b @ r.T) @ r
    torch.testing.assert_close((base + phi(base, source)).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loreft", "noreft", "direft", "orthogonal_direft", "lobireft"])
def test_the_edit_lies_in_the_row_space(name: str) -> None:
    phi: Any = randomized(name)
    rows = phi.rotation.raw if hasattr(phi, "rotation") else phi.projection.weight
    basis = gram_schmidt(rows.detach())
    change = phi(torch.randn(TOKENS, HIDDEN)).detach().double()
    outside = change - change @ basis.T @ basis
    assert outside.abs().max() < 1e-5 * change.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "loreft",
        "noreft",
        "direft",
        "orthogonal_direft",
        "lobireft",
        "red",
        "red_loreft",
        "fixed_steering",
        "steering",
        "bottleneck",
    ],
)
def test_the_identity_start_changes_nothing_at_all(name: str) -> None:
    phi = build_intervention(name, HIDDEN, rank=RANK, init="identity")
    assert torch.equal(phi(10 * torch.randn(TOKENS, HIDDEN)), torch.zeros(TOKENS, HIDDEN))


@pytest.mark.parametrize("name", ["loreft", "noreft", "direft", "orthogonal_direft", "red_loreft"])
def test_the_papers_start_is_an_edit(name: str) -> None:
    phi = build_intervention(name, HIDDEN, rank=RANK, init="paper")
    assert phi(torch.randn(TOKENS, HIDDEN)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["loreft", "noreft", "red_loreft"])
def test_a_non_linear_source_has_no_identity_start(name: str) -> None:
    with pytest.raises(InputError, match="init must be 'paper'"):
        build_intervention(name, HIDDEN, rank=RANK, act="relu", init="identity")


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_parameters_are_fp32_and_few_more_than_two_matrices_of_rank_rows(name: str) -> None:
    phi = build_intervention(name, HIDDEN, rank=RANK)
    tensors = [*phi.parameters(), *phi.buffers()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors) <= 2 * (RANK + 1) * HIDDEN + RANK


@pytest.mark.parametrize("rank", [0, HIDDEN + 1])
def test_a_rank_outside_the_hidden_size_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match="rank must be between 1 and the hidden size 24"):
        build_intervention("loreft", HIDDEN, rank=rank)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_option_of_an_intervention_is_a_field_of_the_configuration(name: str) -> None:
    assert set(intervention_options(name)) <= set(ReftConfig().fields())


def test_an_unknown_intervention_is_refused_with_the_list() -> None:
    with pytest.raises(InputError, match=r"one of loreft, noreft, .*got 'lora'"):
        build_intervention("lora", HIDDEN)


def test_dii_points_to_the_class() -> None:
    with pytest.raises(InputError, match="InterchangeIntervention directly"):
        build_intervention("dii", HIDDEN)


# Orthonormal rows.


def test_orthonormal_rows_passes_gradcheck() -> None:
    raw = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_rows, (raw,))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    raw = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    loss = orthonormal_rows(raw).pow(3).sum()
    (first,) = torch.autograd.grad(loss, raw, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (8, 8), (8, 200)])
def test_orthonormal_rows_equals_gram_schmidt_by_qr(shape: tuple[int, int]) -> None:
    raw = torch.randn(shape)
    torch.testing.assert_close(orthonormal_rows(raw).double(), gram_schmidt(raw), rtol=0, atol=2e-6)


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_rows_of_a_badly_conditioned_matrix_become_orthonormal(condition: float) -> None:
    u, v = (torch.linalg.qr(torch.randn(n, n).double()).Q for n in (8, 64))
    raw = (
        u @ torch.diag(torch.logspace(0, -1, 8).double() ** torch.tensor(condition).log10()) @ v[:8]
    )
    q = orthonormal_rows(raw.float()).double()
    assert (q @ q.T - torch.eye(8)).abs().max() < 1e-6


@pytest.mark.parametrize("value", [1.0, 0.1, 0.0, float("nan"), float("inf")])
def test_dependent_or_infinite_rows_are_an_error_that_says_what_to_do(value: float) -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rate or the rank"):
        orthonormal_rows(torch.full((2, 8), value))


def test_rows_stay_orthonormal_through_two_hundred_steps() -> None:
    phi: Any = build_intervention("loreft", 64, rank=8)
    optimizer = torch.optim.AdamW(phi.parameters(), lr=1e-2)
    h, target = torch.randn(32, 64), torch.randn(32, 64)
    start = (phi(h) - target).square().mean().item()
    worst = 0.0
    for _ in range(200):
        loss = (phi(h) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        r = phi.rotation().detach().double()
        worst = max(worst, (r @ r.T - torch.eye(8)).abs().max().item())
    assert worst <= 1e-6
    assert loss.item() < 0.95 * start  # it did learn, so R did move


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_no_tensor_is_larger_than_rank_or_tokens_times_hidden(name: str) -> None:
    hidden, rank, tokens = 256, 4, 8
    with _LargestTensor() as largest:
        phi = build_intervention(name, hidden, rank=rank)
        optimizer = torch.optim.AdamW(phi.parameters(), lr=1e-3)
        for _ in range(2):
            phi(torch.randn(tokens, hidden)).square().sum().backward()
            optimizer.step()
        copy.deepcopy(phi)
    assert largest.numel <= max(rank, tokens) * hidden


# The factorization is shared within an optimizer step and never stale.

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "adamw_foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw_fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "sgd": partial(torch.optim.SGD, lr=1e-1),
    "adafactor": partial(Adafactor, lr=1e-2, scale_parameter=False, relative_step=False),
    "adamw_8bit": partial(bnb.optim.AdamW8bit, lr=1e-2, min_8bit_size=16),
    "paged_adamw_8bit": partial(bnb.optim.PagedAdamW8bit, lr=1e-2, min_8bit_size=16),
}


@pytest.fixture
def num_factorizations(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    real = rotations._factorize

    def counted(raw: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(None)
        return real(raw)

    monkeypatch.setattr(rotations, "_factorize", counted)
    return calls


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_one_factorization_serves_each_optimizer_step_and_is_never_stale(
    optimizer_name: str, num_factorizations: list[None]
) -> None:
    rotation = Rotation(HIDDEN, RANK)
    optimizer = OPTIMIZERS[optimizer_name](rotation.parameters())
    num_factorizations.clear()
    h = torch.randn(TOKENS, HIDDEN)
    for _ in range(3):
        before = rotation.raw.detach().clone()
        for _ in range(4):  # gradient accumulation, as Trainer does it: train() every time
            rotation.train()
            r = rotation()
            torch.testing.assert_close(r.detach().double(), gram_schmidt(before), rtol=0, atol=2e-6)
            (h @ r.T).pow(3).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # bitsandbytes: paged optimizers are plain ones on a CPU
            optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(rotation.raw.detach(), before)
    assert len(num_factorizations) == 3


def _load_state_dict(rotation: Rotation, values: Tensor) -> None:
    rotation.load_state_dict({"raw": values})


def _assign(rotation: Rotation, values: Tensor) -> None:
    rotation.load_state_dict({"raw": values}, assign=True)


def _copy(rotation: Rotation, values: Tensor) -> None:
    with torch.no_grad():
        rotation.raw.copy_(values)


def _set_data(rotation: Rotation, values: Tensor) -> None:
    rotation.raw.data = values


@pytest.mark.parametrize("write", [_load_state_dict, _assign, _copy, _set_data])
def test_values_written_while_training_are_used_at_once(
    write: Callable[[Rotation, Tensor], None],
) -> None:
    rotation = Rotation(HIDDEN, RANK)
    for _ in range(3):  # more than once: a freed address may come back
        rotation()
        values = torch.randn(RANK, HIDDEN)
        write(rotation, values.clone())
        torch.testing.assert_close(
            rotation().detach().double(), gram_schmidt(values), rtol=0, atol=2e-6
        )


def test_values_written_behind_the_back_are_used_in_evaluation() -> None:
    rotation = Rotation(HIDDEN, RANK)
    rotation()
    values = torch.randn(RANK, HIDDEN)
    rotation.raw.data.copy_(values)  # leaves the version counter as it was
    rotation.eval()
    torch.testing.assert_close(
        rotation().detach().double(), gram_schmidt(values), rtol=0, atol=2e-6
    )


def test_a_copy_does_not_share_the_factorization() -> None:
    rotation = Rotation(HIDDEN, RANK)
    rotation()
    twin = copy.deepcopy(rotation)
    values = torch.randn(RANK, HIDDEN)
    twin.raw.data.copy_(values)
    torch.testing.assert_close(twin().detach().double(), gram_schmidt(values), rtol=0, atol=2e-6)


def test_a_rotation_cast_to_bf16_is_still_usable() -> None:
    r = Rotation(HIDDEN, RANK).to(torch.bfloat16)().detach()
    assert r.dtype == torch.bfloat16
    assert (r.double() @ r.double().T - torch.eye(RANK)).abs().max() < 0.02
