"""Runs operators on the meta device, and answers like calls from memory.

A decoder's blocks repeat the same operators on the same shapes, and torch finds most of these
shapes in Python: 50 to 200 µs an operator, which is most of what a prediction takes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable

_PLAIN = frozenset(
    {bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
    | {type(None)}
)
"""Types of arguments that are compared by their value."""


class _UnlikeAnyError(Exception):
    """An argument decides about the output by more than can be compared."""


class KnownOutputs:
    """Outputs of the operators seen so far, by what they depend on.

    On the meta device an operator that neither writes to its arguments nor returns a view of one
    makes a storage whose size follows from the shapes, strides and dtypes of its arguments and from
    their values where they are no tensors. A like call gets a new storage of that size.
    """

    def __init__(self) -> None:
        self._outputs: dict[Any, tuple[Any, Any, torch.dtype]] = {}

    def call(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what the operator returns."""
        if not _makes_a_tensor(operator):
            return operator(*args, **kwargs)
        try:
            key = (operator, _likeness(args), *kwargs, _likeness(kwargs.values()))
        except _UnlikeAnyError:
            return operator(*args, **kwargs)
        known = self._outputs.get(key)
        if known is not None:
            size, stride, dtype = known
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        out = operator(*args, **kwargs)
        if isinstance(out, Tensor) and _is_plain(out) and _is_new(out, (args, kwargs)):
            self._outputs[key] = (out.shape, out.stride(), out.dtype)
        return out


@cache
def _makes_a_tensor(operator: Any) -> bool:
    """Return whether an operator only reads its arguments and returns one tensor of its own."""
    schema = operator._schema
    if schema.name == "aten::_unsafe_view":  # a view, though it does not say so
        return False
    returned = [value.type.kind() for value in schema.returns]
    aliased = any(value.alias_info for value in (*schema.arguments, *schema.returns))
    return returned == ["TensorType"] and not schema.is_mutable and not aliased


def _likeness(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return what an output depends on: equal for arguments that lead to the same.

    Raises:
        _UnlikeAnyError: An argument is neither a plain value nor a plain tensor on the meta device.
    """
    facts: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            facts += (kind, value)  # the type as well: 1 == 1.0 == True
        elif isinstance(value, Tensor):
            if not _is_plain(value):
                raise _UnlikeAnyError
            facts += (value.dtype, value.shape, value.stride())
        elif kind is list or kind is tuple:
            facts.append(_likeness(value))
        else:
            raise _UnlikeAnyError
    return tuple(facts)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether shape, strides and dtype say all.

    Not of complex tensors, which may be conjugated, nor of those on a CPU, where a tensor without
    dimensions may be a plain number, which has less say in the choice of a dtype.
    """
    return tensor.is_meta and not tensor.is_complex()


def _is_new(out: Tensor, inputs: Any) -> bool:
    """Return whether a tensor fills a storage of its own."""
    storage = out.untyped_storage()
    alike = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    return storage.nbytes() == alike.untyped_storage().nbytes() and all(
        tensor.untyped_storage()._cdata != storage._cdata
        for tensor in tree_leaves(inputs)
        if isinstance(tensor, Tensor)
    )
