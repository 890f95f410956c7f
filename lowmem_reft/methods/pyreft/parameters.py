r"""One intervention's tensors, from pyreft's form into ours and back.

pyreft multiplies rows by a rotation of orthonormal *columns* (hidden, rank); ours has orthonormal
rows, its transpose. It keeps the rotation of a LoReFT as it is, and that of the other three as
``original`` and ``base`` of torch's ``parametrizations.orthogonal``, from which it is computed.

The name trap: the paper's DiReFT, without a constraint, is pyreft's ``NodireftIntervention``, and
its ``DireftIntervention`` has the constraint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lowmem_reft.errors import InputError
from lowmem_reft.reft.rotation import orthonormal_rows

ROTATION = "rotate_layer"
ORIGINAL = "rotate_layer.parametrizations.weight.original"
BASE = "rotate_layer.parametrizations.weight.0.base"
PROJECTION_BIAS = "proj_layer.bias"

_SOURCE = {"source.weight": "learned_source.weight", "source.bias": "learned_source.bias"}
_PROJECTED = {"projection.weight": "proj_layer.weight", **_SOURCE}
_STORED = {ROTATION: "dr"}
_PARAMETRIZED = {ORIGINAL: "dr", BASE: "dd"}

_MAX_ROTATION_ERROR = 1e-3  # more than this from orthonormal is nothing that pyreft could train
_ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of pyreft's classes."""

    name: str
    """Ours, in ``interventions.INTERVENTIONS``."""
    copied: dict[str, str]
    """Our parameters to pyreft's tensors that hold the same numbers."""
    rotation: dict[str, str]
    """pyreft's tensors that the rotation comes from, with their shapes in r (rank), d (hidden)."""
    has_act: bool = True
    """Whether its learned source may have a non-linearity."""

    @property
    def shapes(self) -> dict[str, str]:
        """All of pyreft's tensors that are needed, with their shapes."""
        pairs = self.copied.items()
        copied = {theirs: "rd" if ours.endswith("weight") else "r" for ours, theirs in pairs}
        return {**self.rotation, **copied}


KINDS: dict[str, Kind] = {
    "LoreftIntervention": Kind(
        name="loreft",
        copied={"source.weight": "weight", "source.bias": "bias"},
        rotation=_STORED,
    ),
    "NoreftIntervention": Kind(name="noreft", copied=_PROJECTED, rotation={}),
    "DireftIntervention": Kind(name="orthogonal_direft", copied=_SOURCE, rotation=_PARAMETRIZED),
    "NodireftIntervention": Kind(name="direft", copied=_PROJECTED, rotation={}),
    "ConsreftIntervention": Kind(
        name="consreft", copied={"bias": "learned_source"}, rotation=_PARAMETRIZED, has_act=False
    ),
    "LobireftIntervention": Kind(
        name="lobireft", copied={"bias": "learned_source"}, rotation=_PARAMETRIZED, has_act=False
    ),
}
"""pyreft's class to what it is here."""


def fitting_classes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the classes that save tensors of these names."""
    return [name for name, kind in KINDS.items() if kind.shapes.keys() <= tensors.keys()]


def check_tensors(class_name: str, tensors: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """Check names, shapes and values of a file's tensors; return rank and hidden size.

    Raises:
        InputError: A tensor is missing, of another shape, or not finite.
    """
    shapes = KINDS[class_name].shapes
    if not shapes.keys() <= tensors.keys():
        raise InputError(
            f"{where} must hold {', '.join(shapes)} for a {class_name}, got "
            f"{', '.join(tensors) or 'nothing'}; give another --intervention or fetch the file "
            "again"
        )
    first, axes = next((name, shape) for name, shape in shapes.items() if set(shape) == {*"rd"})
    found = list(tensors[first].shape)
    size = dict(zip(axes, found, strict=False))
    for name, axes in shapes.items():
        if list(tensors[name].shape) != [size.get(axis) for axis in axes]:
            raise InputError(
                f"{where} must hold tensors of one rank and width, got {first} of shape {found} "
                f"and {name} of {list(tensors[name].shape)}; fetch the file again"
            )
        if not bool(tensors[name].isfinite().all()):
            raise InputError(
                f"{where} must hold finite numbers, got NaN or infinity in {name}; use an earlier "
                "checkpoint"
            )
    return size["r"], size["d"]


def from_pyreft(
    class_name: str, tensors: Mapping[str, Tensor], act: str | None, where: str
) -> tuple[dict[str, Tensor], set[str]]:
    """Turn checked tensors of a file of pyreft's into the fp32 parameters of our intervention.

    Returns:
        Parameters by name, and what the user should know about them.

    Raises:
        InputError: Ours cannot hold it.
    """
    kind, notes = KINDS[class_name], set()
    ours = {name: tensors[theirs].float().contiguous() for name, theirs in kind.copied.items()}
    if any(tensors[name].element_size() < 4 for name in kind.shapes):
        notes.add(
            "tensors of 16 bit are widened to fp32, without loss; they are computed with in fp32 "
            "here, where pyreft rounds to 16 bit in between"
        )
    if class_name == "NoreftIntervention" and PROJECTION_BIAS in tensors:
        # f(W₁h + b₁) − (W₂h + b₂): without f there is only one bias.
        extra = tensors[PROJECTION_BIAS].float()
        if act is not None and bool(extra.any()):
            raise InputError(
                f"{where} must hold no {PROJECTION_BIAS} together with act {act!r}, got one: a "
                "NoReFT here has only the bias inside of the non-linearity; train it again with "
                "add_bias=False"
            )
        ours["source.bias"] = ours["source.bias"] - extra
        notes.add(f"{PROJECTION_BIAS} is subtracted from the bias of the learned source: the same")
    if kind.rotation:
        ours["rotation.raw"], error = _rotation(tensors, where)
        if error > _ROUNDING:
            notes.add(
                f"a rotation is {error:.0e} away from orthonormal and is made orthonormal, so "
                "logits differ from pyreft's by about as much"
            )
    return ours, notes


def _rotation(tensors: Mapping[str, Tensor], where: str) -> tuple[Tensor, float]:
    """Return R of shape (rank, hidden) in fp32, and how far it is from orthonormal."""
    if ROTATION in tensors:
        columns = tensors[ROTATION].double()
    else:
        columns = orthogonal_columns(tensors[ORIGINAL].double(), tensors[BASE].double())
    identity = torch.eye(columns.shape[1], dtype=torch.float64)
    error = (columns.T @ columns - identity).abs().max().item()
    if error > _MAX_ROTATION_ERROR:
        raise InputError(
            f"{where} must hold a rotation with orthonormal columns, got one that is {error:.2g} "
            "away from it. pyreft loses it under weight decay: it then edits nothing, or something "
            "else than it was trained to; train again without weight decay"
        )
    return columns.T.float().contiguous(), error


def orthogonal_columns(
    original: Float[Tensor, "hidden rank"], base: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, "hidden rank"]:
    """Return what torch's ``parametrizations.orthogonal`` computes from its two tensors.

    base · H₁…H_r · diag(original), with Householder vectors below the diagonal of ``original``; a
    square one is base · exp(A), with the skew-symmetric A of its lower triangle.
    """
    hidden, rank = original.shape
    if hidden == rank:
        lower = original.tril()
        return base @ torch.matrix_exp(lower - lower.T)
    vectors = original.tril(diagonal=-1)
    product = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    # torch cuts the signs on the diagonal to whole numbers: 0.99 is 0 there, and so it is here.
    columns: Tensor = base @ (product * original.diagonal().int())
    return columns


def to_pyreft(class_name: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the fp32 tensors, and two integers, that pyreft's class loads for our parameters."""
    kind = KINDS[class_name]
    theirs = {name: ours[own].float() for own, name in kind.copied.items()}
    if kind.rotation:
        columns = orthonormal_rows(ours["rotation.raw"].float()).detach().T.contiguous()
        hidden = columns.shape[0]
        if kind.rotation is _STORED:
            return {**theirs, ROTATION: columns}
        # As torch starts: all of it in a square base, and −1 on the diagonal for the identity.
        theirs[ORIGINAL] = -torch.eye(*columns.shape)
        theirs[BASE] = _completed(columns)
    else:
        hidden = ours["projection.weight"].shape[1]
    sizes = {"embed_dim": torch.tensor(hidden), "interchange_dim": torch.tensor(hidden)}
    return {**sizes, **theirs}


def _completed(columns: Float[Tensor, "hidden rank"]) -> Float[Tensor, "hidden hidden"]:
    """Return an orthogonal matrix that begins with ``columns``."""
    hidden, rank = columns.shape
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(hidden, hidden - rank, generator=generator)
    q = torch.linalg.qr(torch.cat([columns, rest], dim=1)).Q
    return torch.cat([columns, q[:, rank:]], dim=1)
