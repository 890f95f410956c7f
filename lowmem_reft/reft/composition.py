r"""Several interventions at once: their weighted sum, and disjoint subspaces of one R.

A *stack* of adapters needs nothing from here: ``model.base_model.set_adapter(["a", "b"])`` edits
with a, then with b, which reads what a made: h + φ_a(h) + φ_b(h + φ_a(h)).

The *weighted sum* reads the same h for all: h + Σ wᵢ φᵢ(h). LoReFT, NoReFT, ConsReFT and LobiReFT
without activation, both DiReFTs and steering vectors have the form φ(h) = Bᵀ f(Ah + c), and so has
their sum: it is a DiReFT whose A, c and B are those of all, one below the other. That makes
the sum an ordinary adapter, which is saved, loaded and put into mixed batches like any other.

*Disjoint subspaces of one R* (arXiv 2404.03592, compositional use): the rows of R are parted, each
part is trained for a task of its own, and then all are on at once. Here every part is an adapter.
``keep_orthogonal`` holds its rows orthogonal to those of others, whose training is not disturbed;
the sum of the parts is then the LoReFT whose R, W and b hold the rows of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowmem_reft.errors import InputError
from lowmem_reft.reft.config import ReftConfig, resolve_layers
from lowmem_reft.reft.interventions import (
    ConsReft,
    DiReft,
    LearnedSteering,
    LobiReft,
    LoReft,
    NoReft,
    OrthogonalDiReft,
    SteeringVector,
)
from lowmem_reft.reft.rotation import Rotation, orthonormal_rows


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """φ(h) = Bᵀ f(Ah + c)."""

    read: Float[Tensor, "rank hidden"]
    """A."""
    bias: Float[Tensor, " rank"]
    """c."""
    write: Float[Tensor, "rank hidden"]
    """B."""


_LEARNED = (LoReft, NoReft, DiReft, OrthogonalDiReft)  # and no class that changes what they do


def low_rank(phi: Any) -> LowRank:
    """Return an intervention in the form Bᵀ f(Ah + c), with its own activation f.

    Raises:
        InputError: It has another form.
    """
    activation = getattr(phi, "act", None)
    if type(phi) in _LEARNED and not (phi.subtracts and activation):
        write = phi.write()
        read = phi.source.weight - write if phi.subtracts else phi.source.weight
        return LowRank(read=read, bias=phi.source.bias, write=write)
    if type(phi) in (ConsReft, LobiReft):
        write = phi.rotation()
        read = -write if isinstance(phi, ConsReft) else torch.zeros_like(write)
        return LowRank(read=read, bias=phi.bias, write=write)
    if isinstance(phi, LearnedSteering | SteeringVector):
        write = phi.vector[None]
        return LowRank(
            read=torch.zeros_like(write), bias=write.new_full((1,), phi.alpha), write=write
        )
    what = type(phi).__name__ + (" with an activation" if activation else "")
    raise InputError(
        f"adapters must be low-rank edits to be summed, got {what}; make them active one after the "
        "other instead: model.base_model.set_adapter([...])"
    )


def weighted_sum(
    parts: Sequence[LowRank | None], weights: Sequence[float], into: nn.Module
) -> None:
    """Write Σ wᵢ φᵢ into a DiReFT whose rank is that of all together.

    A part is None where it does not edit; rows that no part takes become 0.
    """
    assert isinstance(into, DiReft)
    with torch.no_grad():
        for parameter in into.parameters():
            parameter.zero_()
        start = 0
        for part, weight in zip(parts, weights, strict=True):
            if part is None:
                continue
            rows = slice(start, start + part.write.shape[0])
            into.source.weight[rows] = part.read
            into.source.bias[rows] = part.bias
            into.projection.weight[rows] = weight * part.write
            start = rows.stop


def summed_config(
    configs: Mapping[str, ReftConfig], ranks: Mapping[str, int], num_layers: int
) -> ReftConfig:
    """Return the configuration of a sum of adapters: DiReFT where any of them edits.

    Raises:
        InputError: They edit different tokens or vectors, or bring modules of their own.
    """
    for field in ("positions", "tie", "component", "act", "task_type"):
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            got = ", ".join(f"{value!r} ({name})" for name, value in values.items())
            raise InputError(
                f"{field} must be the same in adapters that are summed, got {got}; make them "
                "active one after the other instead: model.base_model.set_adapter([...])"
            )
    with_modules = [name for name, config in configs.items() if config.modules_to_save]
    if with_modules:
        raise InputError(
            f"adapters must have no modules_to_save to be summed, got {', '.join(with_modules)}; "
            "there is no sum of two heads"
        )
    first = next(iter(configs.values()))
    layers = {
        layer for config in configs.values() for layer in resolve_layers(config.layers, num_layers)
    }
    return ReftConfig(
        task_type=first.task_type,
        intervention="direft",
        rank=sum(ranks.values()),
        layers=sorted(layers),
        positions=first.positions,
        tie=first.tie,
        component=first.component,
        act=first.act,
        init="paper",
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=True,
    )


class RotationBeside(Rotation):
    r"""R beside others: Gram–Schmidt goes on where their rows end, so RRᵀ = I and R R_otherᵀ = 0.

    The gradient reaches the rows of R alone. After every optimizer step the parameter becomes R
    itself, so that what is saved is an ordinary rotation, from which training goes on as it would.
    """

    def __init__(self, own: Rotation, others: Sequence[Rotation]) -> None:
        nn.Module.__init__(self)
        self.raw = own.raw
        self._cache = None
        self._placed: tuple[Any, ...] | None = None
        # Not submodules: they belong to their own adapters.
        self.__dict__["others"] = tuple(others)

    def forward(self) -> Float[Tensor, "rank hidden"]:
        """Return R, with RRᵀ = I to fp32 rounding."""
        if self.training and self._placed != self._stamp():
            self.place()
        return self._beside()

    def place(self) -> None:
        """Make the parameter R itself."""
        self.raw.data.copy_(self._beside().detach())
        self._placed = self._stamp()

    def _beside(self) -> Tensor:
        before = torch.cat([other() for other in self.__dict__["others"]]).detach()
        return orthonormal_rows(torch.cat([before, self.raw]))[len(before) :]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.raw.is_meta:
            self.place()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def keep_orthogonal(model: Any, adapter: str, to: Sequence[str]) -> None:
    """Keep the subspaces that one adapter edits orthogonal to those of others, also in training.

    Call it before training the adapter; while it is trained the others stay as they are. Loaded
    again, each is an ordinary adapter whose subspaces are orthogonal until it is trained further.

    Args:
        model: A PEFT model with ReFT adapters.
        adapter: The one that gives way.
        to: The others.

    Raises:
        InputError: One is not there or has no R, or there is no room for all subspaces.
    """
    num_found = 0
    for module in model.modules():
        by_name = getattr(module, "reft_phi", None)
        if by_name is None or adapter not in by_name:
            continue
        others = [phi for name in to if name in by_name for phi in by_name[name]]
        for phi in by_name[adapter]:
            num_found += len(others)
            if others:
                _place_beside(phi, others)
    if not num_found:
        raise InputError(
            f"adapter and to must name adapters that edit the same vectors, got {adapter!r} and "
            f"{', '.join(to)}; loaded are {', '.join(model.peft_config)}"
        )


def _place_beside(phi: nn.Module, others: Sequence[nn.Module]) -> None:
    rotations = [getattr(each, "rotation", None) for each in (phi, *others)]
    known = [each for each in rotations if isinstance(each, Rotation)]
    if len(known) < len(rotations):
        raise InputError(
            "adapters must have a rotation to have orthogonal subspaces, got "
            f"{type(phi).__name__} and {type(others[0]).__name__}; use loreft"
        )
    own, *fixed = known
    num_rows = sum(len(each.raw) for each in known)
    if num_rows > own.raw.shape[1]:
        raise InputError(
            f"ranks must be at most {own.raw.shape[1]}, the hidden size, together, got {num_rows}; "
            "lower the rank"
        )
    beside = RotationBeside(own, fixed)
    with torch.no_grad():
        if type(phi) is LoReft and phi.act is None:  # the edit keeps its A = W − R
            phi.source.weight -= own()
            phi.source.weight += beside()
        beside.place()
    phi.rotation = beside
