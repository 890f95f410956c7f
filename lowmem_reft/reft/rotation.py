r"""R: a matrix with orthonormal rows, trained through an unconstrained one of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowmem_reft.errors import InputError


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
            if self.shared:
                self.shared.clear()
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

    A new token costs less than the factorizations that it would take. They are made here and not
    in the first pass that needs one, which may be compiled.
    """
    before = {each: each.shared for each in model.modules() if isinstance(each, Rotation)}
    for rotation in before:
        rotation.shared = []
        if not rotation.training:
            # Of an adapter that is not active it is no error; whoever uses it is told.
            with torch.no_grad(), suppress(NotOrthonormalError):
                rotation.shared.append(orthonormal_rows(rotation.raw))
    try:
        yield
    finally:
        for rotation, shared in before.items():
            rotation.shared = shared
