r"""Φ: what happens to one hidden vector. Pure tensor modules, one equation each.

Every intervention maps hidden vectors ``h`` of shape ``(num_positions, hidden)`` to the *change* of
``h`` with the same shape, so that dropout can fall on the change alone and a zero change leaves the
base bit for bit as it was. Parameters and arithmetic are fp32; the caller casts.

Source of the definitions: arXiv 2404.03592 (section 3.2 and appendix); RED: arXiv 2402.15179;
interchange interventions: arXiv 2303.02536; bottleneck adapters: arXiv 1902.00751, parallel ones:
arXiv 2110.04366.

To add an intervention: write a module here whose constructor takes ``hidden_size`` and, by keyword,
the configuration fields named in ``options``; return the change of ``h`` from ``forward``; enter it
in ``INTERVENTIONS``, and in ``methods.table`` if ``--methods`` is to know it. An option that no
other intervention has is a field of ``ReftConfig`` and of its ``fields()``, and of
``MethodOptions``. Say in ``tests/reft/test_composition.py`` whether such adapters can be summed,
and in ``test_interventions.py`` what the change is, in float64. A whole one is in
``docs/how-to/intervention.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowmem_reft.errors import InputError
from lowmem_reft.reft.rotation import Rotation, orthonormal_rows

Init = Literal["identity", "paper"]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class LearnedSource(nn.Module):
    r"""h + Vᵀ(f(Wh + b) − Vh), or without −Vh: what the four interventions below have in common.

    V is a rotation with orthonormal rows or a plain matrix. With −Vh and without f the change is
    computed as Vᵀ((W − V)h + b): one product less, and exactly zero at the identity start W = V,
    b = 0. Without −Vh the identity start is W = 0, b = 0.
    """

    options: ClassVar[tuple[str, ...]] = ("rank", "act", "init")
    is_orthonormal: ClassVar[bool]
    """V is a rotation."""
    subtracts: ClassVar[bool]
    """The projection Vh is taken off the source."""

    def __init__(
        self, hidden_size: int, *, rank: int, act: str | None = None, init: Init = "identity"
    ) -> None:
        super().__init__()
        self.act = _activation(act)
        if self.is_orthonormal:
            self.rotation = Rotation(hidden_size, rank)
        else:
            self.projection = nn.Linear(hidden_size, rank, bias=False)
        self.source = nn.Linear(hidden_size, rank)  # torch's start is that of the paper's code
        if init != "identity":
            return
        if self.subtracts and act is not None:
            raise InputError(
                f"init must be 'paper' with act={act!r}, got 'identity'; a non-linear learned "
                "source has no identity start here"
            )
        with torch.no_grad():
            self.source.bias.zero_()
            if not self.subtracts:
                self.source.weight.zero_()
            elif not self.is_orthonormal:
                self.source.weight.copy_(self.projection.weight)
            elif not self.source.weight.is_meta:
                # Not by calling it, which would remember R: TRL writes to `raw.data` later.
                self.source.weight.copy_(orthonormal_rows(self.rotation.raw))

    def write(self) -> Float[Tensor, "rank hidden"]:
        """Return V."""
        matrix: Tensor = self.rotation() if self.is_orthonormal else self.projection.weight
        return matrix

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return Vᵀ(f(Wh + b) − Vh), or Vᵀ f(Wh + b)."""
        write = self.write()
        if self.subtracts and self.act is None:
            edit = nn.functional.linear(hidden, self.source.weight - write, self.source.bias)
        else:
            edit = self.source(hidden)
            if self.act is not None:
                edit = self.act(edit)
            if self.subtracts:
                edit = edit - hidden @ write.T
        return edit @ write


class LoReft(LearnedSource):
    r"""LoReFT, equation 2 of arXiv 2404.03592: h + Rᵀ(f(Wh + b) − Rh), RRᵀ = I; default: f = id."""

    is_orthonormal = True
    subtracts = True


class NoReft(LearnedSource):
    r"""NoReFT: h + W₂ᵀ(f(W₁h + b) − W₂h); LoReFT without the orthonormal constraint."""

    is_orthonormal = False
    subtracts = True


class DiReft(LearnedSource):
    r"""DiReFT, the paper's: h + W₂ᵀ f(W₁h + b), no constraint; pyreft's NodireftIntervention."""

    is_orthonormal = False
    subtracts = False


class OrthogonalDiReft(LearnedSource):
    r"""Orthogonal DiReFT: h + Rᵀ f(Wh + b), RRᵀ = I; pyreft's DireftIntervention."""

    is_orthonormal = True
    subtracts = False


class _ConstantSource(nn.Module):
    """R and b, of one value for every h."""

    options: ClassVar[tuple[str, ...]] = ("rank",)

    def __init__(self, hidden_size: int, *, rank: int) -> None:
        super().__init__()
        self.rotation = Rotation(hidden_size, rank)
        self.bias = nn.Parameter(torch.zeros(rank))


class ConsReft(_ConstantSource):
    r"""ConsReFT: h + Rᵀ(b − Rh), RRᵀ = I: the subspace becomes a constant; no identity start."""

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return Rᵀ(b − Rh)."""
        rotation: Tensor = self.rotation()
        return (self.bias - hidden @ rotation.T) @ rotation


class LobiReft(_ConstantSource):
    r"""LobiReFT: h + Rᵀb, RRᵀ = I: a learned steering vector, the same for every h."""

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return Rᵀb, once per position."""
        rotation: Tensor = self.rotation()
        return (self.bias @ rotation).expand_as(hidden)


class Red(nn.Module):
    r"""RED, arXiv 2402.15179: s ⊙ h + b, from s = 1, b = 0; the change is (s − 1) ⊙ h + b."""

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return (s − 1) ⊙ h + b."""
        return (self.scale - 1) * hidden + self.bias


class RedLoReft(nn.Module):
    r"""RED and LoReFT of the same h: s ⊙ h + c + Rᵀ(f(Wh + b) − Rh), from s = 1, c = 0, RRᵀ = I.

    A full diagonal beside a low rank, for 2 · hidden parameters: one rank of LoReFT.
    """

    options: ClassVar[tuple[str, ...]] = LoReft.options

    def __init__(
        self, hidden_size: int, *, rank: int, act: str | None = None, init: Init = "identity"
    ) -> None:
        super().__init__()
        self.red = Red(hidden_size)
        self.loreft = LoReft(hidden_size, rank=rank, act=act, init=init)

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return (s − 1) ⊙ h + c + Rᵀ(f(Wh + b) − Rh)."""
        change: Tensor = self.red(hidden) + self.loreft(hidden)
        return change


class SteeringVector(nn.Module):
    r"""Fixed steering vector: h + αv. ``vector`` is a buffer: saved, fixed, zero until set."""

    options: ClassVar[tuple[str, ...]] = ("alpha",)
    vector: Tensor

    def __init__(self, hidden_size: int, *, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("vector", torch.zeros(hidden_size))

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return αv, once per position."""
        return (self.alpha * self.vector).expand_as(hidden)


class LearnedSteering(nn.Module):
    r"""Learned steering vector of full rank: h + αv, from v = 0."""

    options: ClassVar[tuple[str, ...]] = ("alpha",)

    def __init__(self, hidden_size: int, *, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.vector = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return αv, once per position."""
        return (self.alpha * self.vector).expand_as(hidden)


class Bottleneck(nn.Module):
    r"""Series bottleneck adapter, arXiv 1902.00751: h + W_up f(W_down h + c) + b; default f: relu.

    Meant for ``mlp_output`` or ``attention_output`` and ``positions="every"``; starts with W_up = 0
    and b = 0. As ``parallel_bottleneck`` (arXiv 2110.04366) it is given x, which goes into the
    sub-layer that h comes out of: h + W_up f(W_down x + c) + b.
    """

    options: ClassVar[tuple[str, ...]] = ("rank", "act")

    def __init__(self, hidden_size: int, *, rank: int, act: str | None = None) -> None:
        super().__init__()
        self.act = _activation(act or "relu")
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """Return W_up f(W_down h + c) + b."""
        assert self.act is not None
        edit: Tensor = self.up(self.act(self.down(hidden)))
        return edit


class InterchangeIntervention(nn.Module):
    r"""DII, arXiv 2303.02536: b + Rᵀ(Rs − Rb): the subspace takes the source run's value.

    DAS learns R so that the counterfactual output comes out. It needs a second run's hidden vectors
    and is therefore called directly, not named in a ``ReftConfig``.
    """

    def __init__(self, hidden_size: int, *, rank: int) -> None:
        super().__init__()
        self.rotation = Rotation(hidden_size, rank)

    def forward(
        self, base: Float[Tensor, "n hidden"], source: Float[Tensor, "n hidden"]
    ) -> Float[Tensor, "n hidden"]:
        """Return the change of ``base``: Rᵀ(R·source − R·base)."""
        rotation: Tensor = self.rotation()
        return ((source - base) @ rotation.T) @ rotation


INTERVENTIONS: dict[str, type[nn.Module]] = {
    "loreft": LoReft,
    "noreft": NoReft,
    "direft": DiReft,
    "orthogonal_direft": OrthogonalDiReft,
    "consreft": ConsReft,
    "lobireft": LobiReft,
    "red": Red,
    "red_loreft": RedLoReft,
    "fixed_steering": SteeringVector,
    "steering": LearnedSteering,
    "bottleneck": Bottleneck,
    "parallel_bottleneck": Bottleneck,
}

READS_INPUT = ("parallel_bottleneck",)
"""Interventions that are given what goes into the edited module instead of what comes out."""


def intervention_options(name: str) -> tuple[str, ...]:
    """Return the configuration fields that the intervention ``name`` reads.

    Raises:
        InputError: ``name`` is not in the table.
    """
    if name not in INTERVENTIONS:
        hint = "use InterchangeIntervention directly" if name == "dii" else "choose one of these"
        raise InputError(
            f"intervention must be one of {', '.join(INTERVENTIONS)}, got {name!r}; {hint}"
        )
    options: tuple[str, ...] = INTERVENTIONS[name].options  # type: ignore[attr-defined]
    return options


def build_intervention(name: str, hidden_size: int, **fields: Any) -> nn.Module:
    """Build intervention ``name`` in fp32 from those of ``fields`` that it reads.

    Args:
        name: Key of ``INTERVENTIONS``.
        hidden_size: Width of the hidden vectors.
        fields: ``rank``, ``act``, ``init``, ``alpha``; others than ``name`` reads are ignored.

    Raises:
        InputError: Unknown name or activation, rank out of range, or no identity start.
    """
    used = {key: fields[key] for key in intervention_options(name) if key in fields}
    return INTERVENTIONS[name](hidden_size, **used).float()


def _activation(name: str | None) -> Activation | None:
    if name is not None and name not in ACTIVATIONS:
        raise InputError(
            f"act must be one of {', '.join(ACTIVATIONS)}, got {name!r}; or leave it out"
        )
    return None if name is None else ACTIVATIONS[name]
