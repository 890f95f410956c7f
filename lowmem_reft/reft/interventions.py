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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowmem_reft.errors import InputError

Init = Literal["identity", "paper"]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class _OrthonormalRows(torch.autograd.Function):
    r"""Q = L⁻¹A with AAᵀ = LLᵀ, and its pull-back Ā = L⁻ᵀ(Q̄ − (tril(M) + tril(M, −1)ᵀ) Q), M = Q̄Qᵀ.

    Q and L come in precomputed, so that one factorization serves every forward pass of a step.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, orthonormal: Tensor, lower: Tensor) -> Tensor:
        ctx.save_for_backward(orthonormal, lower)
        return orthonormal.view_as(orthonormal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        orthonormal, lower = ctx.saved_tensors
        (grad,) = grads
        q, g = orthonormal.double(), grad.double()
        m = g @ q.T
        tangent = g - (m.tril() + m.tril(-1).T) @ q
        pulled = torch.linalg.solve_triangular(lower.T, tangent, upper=True)
        return pulled.to(grad.dtype), None, None


class NotOrthonormalError(InputError, FloatingPointError):
    """A rotation has no orthonormal rows."""


def _factorize(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Q, L) for ``raw`` of shape (rank, hidden): fp64 Cholesky of the rank × rank Gram."""
    a = raw.detach().double()
    gram = a @ a.T
    lower, failed = torch.linalg.cholesky_ex(gram)
    # Each pivot is a row's distance from the span of the rows above it. Rounding alone leaves about
    # 1e-8 of the row's length, and below 1e-6 the result would no longer be orthonormal in fp32.
    sound = (failed == 0) & (lower.diagonal() > 1e-6 * gram.diagonal().sqrt()).all()
    if not raw.is_meta and not sound:
        raise NotOrthonormalError(
            "the rows of the rotation are linearly dependent or not finite, so they cannot be made "
            "orthonormal; lower the learning rate or the rank"
        )
    q = torch.linalg.solve_triangular(lower, a, upper=False)
    return q.to(raw.dtype), lower


def orthonormal_rows(raw: Float[Tensor, "rank hidden"]) -> Float[Tensor, "rank hidden"]:
    r"""Orthonormalize the rows of ``raw`` by Cholesky-QR (Gram–Schmidt), differentiably.

    Q = L⁻¹A where LLᵀ = AAᵀ. The Gram matrix is formed in fp64, which keeps QQᵀ = I to fp32
    rounding for condition numbers up to about 1e4; no hidden × hidden buffer is ever formed and
    the backward pass is closed-form: O(hidden · rank²) both ways.

    Raises:
        NotOrthonormalError: Rows linearly dependent or not finite.
    """
    q, lower = _factorize(raw)
    out: Tensor = _OrthonormalRows.apply(raw, q, lower)  # type: ignore[no-untyped-call]
    return out


_num_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


# Some optimizers write through data pointers and leave the version counter as it was, so the number
# of optimizer steps is part of the cache key too.
register_optimizer_step_post_hook(_count_optimizer_step)


class Rotation(nn.Module):
    r"""R: ``rank`` orthonormal rows, a function of an unconstrained parameter of the same shape.

    While training, the factorization runs once per optimizer step and is shared by every forward
    pass until then; ``computed_once`` shares R among the passes of a generation.
    """

    shared: list[Tensor] | None = None
    """R, once it was computed; None where every pass computes its own."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= hidden_size:
            raise InputError(
                f"rank must be between 1 and the hidden size {hidden_size}, got {rank!r}; lower it"
            )
        self.raw = nn.Parameter(torch.empty(rank, hidden_size))
        # What R was computed from, the values themselves, and the factorization.
        self._cache: tuple[Any, Tensor, tuple[Tensor, Tensor]] | None = None
        nn.init.normal_(self.raw)
        if not self.raw.is_meta:
            # Starting on the manifold keeps the Gram matrix well conditioned from the first step.
            with torch.no_grad():
                self.raw.copy_(orthonormal_rows(self.raw))

    def train(self, mode: bool = True) -> Rotation:
        """Switch the mode; a change forgets the factorization, whoever wrote to the parameter."""
        if mode != self.training:  # trainers call train() before every forward pass
            self._cache = None
        return super().train(mode)

    def _stamp(self) -> tuple[Any, ...]:
        """What changes whenever an optimizer, or a load, writes to the parameter."""
        return (self.raw._version, self.raw.data_ptr(), self.raw.device, _num_optimizer_steps)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the factorization out of copies and pickles."""
        return {**self.__dict__, "_cache": None, "shared": None}

    def forward(self) -> Float[Tensor, "rank hidden"]:
        """Return R, with RRᵀ = I to fp32 rounding."""
        if not self.training:
            # Nothing tells whether `raw.data` was written to.
            if self.shared is None or torch.is_grad_enabled():
                return orthonormal_rows(self.raw)
            if not self.shared:
                self.shared.append(orthonormal_rows(self.raw))
            return self.shared[0]
        key = self._stamp()
        if self._cache is None or self._cache[0] != key:
            # The values are kept so that no later ones can come to lie at the same address.
            self._cache = (key, self.raw.detach(), _factorize(self.raw))
        factors = self._cache[2]
        out: Tensor = _OrthonormalRows.apply(self.raw, *factors)  # type: ignore[no-untyped-call]
        return out


@contextmanager
def computed_once(model: nn.Module) -> Iterator[None]:
    """Compute each R of a model once for as long as the context lasts, in which nothing is written.

    A new token costs less than the factorizations that it would take.
    """
    rotations = [module for module in model.modules() if isinstance(module, Rotation)]
    for rotation in rotations:
        rotation.shared = []
    try:
        yield
    finally:
        for rotation in rotations:
            rotation.shared = None


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
