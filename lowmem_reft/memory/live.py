"""Counts live tensor storages while code runs: what a device has to hold, by category and line.

Works on any device type; on the meta device it is how a peak is predicted (``predict.py``).
"""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_reft.machine.marks import CATEGORY_OF, STEPS
from lowmem_reft.memory.outputs import KnownOutputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import CodeType, FrameType

    from lowmem_reft.memory.kernels import Kernels

CATEGORIES = (
    "weights",
    "quantization_constants",
    "adapter",
    "gradients",
    "optimizer",
    "inputs",
    "activations",
    "loss",
    "workspace",
    "store",
)
"""What a live byte can belong to; ``workspace`` is what the backward pass and kernels make."""

# Frames of these say nothing about which line of a model asked for memory.
_PLUMBING = ("/torch/", "/lowmem_reft/memory/", "/bitsandbytes/", "/peft/", "/contextlib.py")
_LOSSES = "/transformers/loss/loss_utils.py"  # a model's own, in lines that we cannot mark
_DEQUANTIZE = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the program a storage was made."""

    operator: str
    """Name of the torch operator, for example ``aten::mm``."""
    line: str
    """``file.py:123`` of the model, loss or adapter that ran it; "" if only torch did."""
    module: str
    """Path of the innermost module, for example ``model.layers.3.mlp``; "" outside any."""
    phase: str
    """``forward``, ``recompute``, ``backward`` or ``optimizer``."""
    category: str | None = None
    """What the line is marked with (``marks.allocates``)."""

    def __str__(self) -> str:
        """Say it in words."""
        where = ", ".join(part for part in (self.module, self.line) if part)
        return f"{self.operator} in the {self.phase} pass" + (f" ({where})" if where else "")


@dataclass(slots=True)
class LiveStorage:
    """One live storage."""

    num_bytes: int
    category: str
    place: Origin | None
    """None for what existed before the counting began."""

    def as_json(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {"bytes": self.num_bytes, "category": self.category, "place": str(self.place)}


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes were live."""

    num_bytes: int
    breakdown_bytes: dict[str, int]
    """Bytes by category; the categories without any are left out."""
    place: Origin | None
    """What was allocated last."""
    largest: list[LiveStorage] = field(repr=False)
    """The largest storages alive then that were made during the counting."""


class LiveMemory(TorchDispatchMode):
    """Bytes of live storages on one device type, now and at the peak.

    A storage counts from the operator that returns it until it is freed; views share one storage.
    What an operator allocates and frees inside itself is not seen, unless ``kernels`` tells how the
    operator is made of smaller ones.

    Args:
        device_type: ``cpu``, ``cuda`` or ``meta``.
        names: Module to path, to say where storages are made; without it only lines are recorded.
        kernels: For the meta device: what the kernels of the real device do.
        keep_timeline: Record ``timeline``.
    """

    def __init__(
        self,
        device_type: str,
        *,
        names: dict[nn.Module, str] | None = None,
        kernels: Kernels | None = None,
        keep_timeline: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.current_bytes = 0
        self.by_category: Counter[str] = Counter()
        self.phase = "forward"
        """What runs outside backward passes: ``forward`` or ``optimizer``."""
        self.peak = Peak(0, {}, None, [])
        self.timeline: list[tuple[str, dict[str, int]]] = []
        """(phase, bytes by category) after every change, if it is kept."""
        self._keep_timeline = keep_timeline
        self._names = {id(module): name for module, name in (names or {}).items()}
        self._kernels = kernels
        self._outputs = KnownOutputs()
        self._blocks: dict[int, tuple[weakref.ref[Any], LiveStorage]] = {}
        self._elsewhere: set[int] = set()
        self._callers_of_nodes: dict[int, _Caller] = {}
        self._last_caller = _NOBODY

    @property
    def peak_bytes(self) -> int:
        """Return the most bytes that were live at once so far."""
        return self.peak.num_bytes

    def add(self, tensor: Tensor, category: str | None = None, place: Origin | None = None) -> None:
        """Count the storage of ``tensor`` if it is on the device; give it ``category`` if named."""
        if tensor.device.type != self.device_type:
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
            return
        key, size = storage._cdata, self._rounded(storage.nbytes())
        if key in self._elsewhere:
            return
        known = self._blocks.get(key)
        if known is not None:
            block = known[1]
            self._count(block, size - block.num_bytes)  # resized in place
            block.num_bytes = size
            if category is not None and category != block.category:
                self.by_category[block.category] -= size
                self.by_category[category] += size
                block.category = category
        else:
            block = LiveStorage(size, category or "activations", place)
            self._blocks[key] = (weakref.ref(storage, partial(self._free, key)), block)
            self._count(block, size)
        if self.current_bytes > self.peak.num_bytes:
            self._note_peak(place)

    def discard(self, tensor: Tensor) -> None:
        """Stop counting the storage of ``tensor``: it is on the host, whatever its device says."""
        key = tensor.untyped_storage()._cdata
        self._elsewhere.add(key)  # views of it come up whenever it is used
        self._forget(key)

    def _forget(self, key: int) -> None:
        known = self._blocks.pop(key, None)
        if known is not None:
            self._count(known[1], -known[1].num_bytes)

    def end(self) -> None:
        """Follow no storage any more; figures stay as they are.

        Otherwise each is followed until it is freed, where Python prints and forgets a signal.
        """
        self._blocks.clear()

    def reset_peak(self) -> None:
        """Forget the peak and the timeline so far."""
        self.timeline.clear()
        self.peak = Peak(0, {}, None, [])
        self._note_peak(None)

    def _rounded(self, size: int) -> int:
        unit = self._kernels.allocation_bytes if self._kernels else 1
        return -(-size // unit) * unit

    def _count(self, block: LiveStorage, change: int) -> None:
        self.current_bytes += change
        self.by_category[block.category] += change
        if self._keep_timeline and change:
            self.timeline.append((self._current_phase(), dict(self.by_category)))

    def _note_peak(self, place: Origin | None) -> None:
        breakdown = {name: size for name, size in self.by_category.items() if size}
        self.peak = Peak(self.current_bytes, breakdown, place, [])

    def _free(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._blocks.get(key)
        if known is not None and known[0] is reference:
            if self.current_bytes == self.peak.num_bytes and not self.peak.largest:
                self._keep_largest()
            self._forget(key)

    def _keep_largest(self, count: int = 20) -> None:
        """Complete the peak's record: called just before the first byte of it is freed."""
        made = [block for _, block in self._blocks.values() if block.place is not None]
        made.sort(key=lambda block: -block.num_bytes)
        self.peak = replace(self.peak, largest=made[:count])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or what it is made of, and count what it returns."""
        kwargs = kwargs or {}
        substitute = self._kernels.substitute(func) if self._kernels else None
        if substitute is not None:
            with self:
                return substitute(*args, **kwargs)
        out = self._outputs.call(func, args, kwargs) if self._kernels else func(*args, **kwargs)
        extra = self._kernels.workspace_bytes(func, args) if self._kernels else 0
        if extra:
            workspace = torch.empty(extra, dtype=torch.uint8, device=self.device_type)
            self.add(workspace, "workspace", self._place(func))
        for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._record(func, leaf)
        return out

    def _record(self, func: Any, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        known = tensor.untyped_storage()._cdata in self._blocks
        place = None if known else self._place(func)
        self.add(tensor, None if place is None else self._category(place), place)

    def _category(self, place: Origin) -> str:
        if place.category is not None:
            return place.category
        if place.phase == "optimizer":
            return "optimizer"
        if place.phase == "backward" or place.operator in _DEQUANTIZE:
            return "workspace"
        return "activations"

    def _current_phase(self) -> str:
        if torch._C._current_graph_task_id() == -1:  # no backward pass is running
            return self.phase
        return "recompute" if torch.is_grad_enabled() else "backward"

    def _place(self, func: Any) -> Origin:
        caller = _caller(sys._getframe(2), self._names)
        phase = self._current_phase()
        number = torch._C._autograd._get_sequence_nr()
        if phase != "backward":
            self._callers_of_nodes[number - 1] = caller
        elif not caller.line:
            node = torch._C._current_autograd_node()
            if node is not None:
                caller = self._callers_of_nodes.get(node._sequence_nr(), _NOBODY)
            # Gradients of a tensor with several uses are added up between the nodes.
            caller = caller if caller.line else self._last_caller
        self._last_caller = caller
        return Origin(func._schema.name, caller.line, caller.module, phase, caller.category)


class _Caller(NamedTuple):
    """Who asked for memory."""

    line: str
    """The innermost outside torch and its kind."""
    module: str
    """The innermost named one."""
    category: str | None
    """The mark of the line's function."""


_NOBODY = _Caller("", "", None)


def _caller(frame: FrameType | None, names: dict[int, str]) -> _Caller:
    line, module, category = _NOBODY
    while frame is not None and not (line and module):
        source = _source(frame.f_code)
        if not line and not source.is_plumbing:
            line, category = f"{source.file}:{frame.f_lineno}", source.category
            if not names:
                break
        if names and source.is_method:
            owner = frame.f_locals.get("self")
            module = names.get(id(owner), "")
        if source.begins_step:
            break
        frame = frame.f_back
    return _Caller(line, module, category)


class _Source(NamedTuple):
    """What the code of a frame says about who asked for memory."""

    file: str
    is_plumbing: bool
    is_method: bool
    category: str | None
    begins_step: bool
    """Frames further out are none of the model's."""


@cache
def _source(code: CodeType) -> _Source:
    path = code.co_filename
    return _Source(
        file=path.rpartition("/")[2],
        is_plumbing=any(part in path for part in _PLUMBING),
        is_method=code.co_varnames[:1] == ("self",),
        category="loss" if path.endswith(_LOSSES) else CATEGORY_OF.get(code),
        begins_step=code in STEPS,
    )


def label_model(memory: LiveMemory, model: nn.Module) -> None:
    """Count a model's parameters and buffers: weights, quantization constants and adapter.

    What does not require a gradient is the base's, whatever adds it.
    """
    for parameter in model.parameters():
        memory.add(parameter.detach(), "adapter" if parameter.requires_grad else "weights")
    for constant in quantization_constants(model):
        memory.add(constant, "quantization_constants")
    for buffer in model.buffers():
        memory.add(buffer, "weights")


def quantization_constants(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors beside quantized weights.

    Beside a 4-bit one: absmax (itself quantized), code books and offset; an 8-bit one: row scales.
    """
    for module in model.modules():
        # Not module.weight: PEFT's layers forward that name.
        holders = (*module._parameters.values(), module.__dict__.get("state"))
        for holder in holders:
            found = [getattr(holder, "SCB", None)]
            state = getattr(holder, "quant_state", None)
            while state is not None:
                found += (state.absmax, state.code, state.offset)
                state = state.state2
            yield from (tensor for tensor in found if isinstance(tensor, Tensor))


@contextmanager
def gradients_labelled(memory: LiveMemory, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Give gradients their category as soon as they are accumulated."""

    def label(parameter: Tensor) -> None:
        if parameter.grad is not None:
            memory.add(parameter.grad, "gradients")

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(label) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def track(
    device_type: str | None = None,
    *,
    model: nn.Module | None = None,
    keep_timeline: bool = False,
) -> Iterator[LiveMemory]:
    """Count live storages inside the ``with`` block, those that exist at its start included.

    Args:
        device_type: ``cpu`` or ``cuda``; default: that of the model, else CUDA if there is any.
        model: Names the modules that allocate, and tells weights from activations.
        keep_timeline: Record every change, for a plot.

    Yields:
        ``LiveMemory``, whose ``peak_bytes``, ``peak`` and ``current_bytes`` can be read at any
        time.
    """
    if device_type is None and model is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    names = {module: name for name, module in model.named_modules()} if model else None
    model = model or nn.Module()
    device_type = device_type or next(model.parameters()).device.type
    memory = LiveMemory(device_type, names=names, keep_timeline=keep_timeline)
    label_model(memory, model)
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            memory.add(thing)
    with gradients_labelled(memory, model.parameters()), memory:
        yield memory


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_so_far_bytes() -> int:
    """Return the most that was allocated on a CUDA device so far, else that of this process."""
    if not torch.cuda.is_initialized():
        return peak_rss_bytes()
    return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
