"""Counts the operators of a training step on the meta device, and times each on the real one.

A decoder's blocks repeat a few dozen operators on the same shapes, so that a step of thousands of
them is known by timing each kind once. What Python takes between them (modules, hooks, autograd) is
measured on a small model, as seconds per call.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem_reft.machine.devices import seed_kept, synchronize
from lowmem_reft.memory.live import LiveMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lowmem_reft.memory.predict import Lengths, Predictor

MOST_WORK = {"cpu": 1.5e9, "cuda": 1e12}
"""Floating-point operations (or, of what does not multiply, 16 times the bytes) of one timed call
by device type: of a larger operator a part is timed."""
BUDGET_S = 1.2
"""Timing stops after so long; operators that are left are estimated by others of their kind."""

_LEAST_SIZE = 64
_WORK_OF_A_BYTE = 16
_NO_WORK = ("aten::_unsafe_view", "aten::_local_scalar_dense", "aten::lift_fresh", "aten::detach")
_FAILS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
"""What an operator raises that does not take made-up values."""


class Like(NamedTuple):
    """What a tensor's time depends on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the bytes that are read of it."""
        sizes = zip(self.shape, self.stride, strict=True)
        return self.dtype.itemsize * math.prod(size for size, step in sizes if step)

    def filled(self, device: torch.device) -> Tensor:
        """Return such a tensor: numbers near 1, indices 0, masks true."""
        sizes = zip(self.shape, self.stride, strict=True)
        extent = 1 + sum((size - 1) * step for size, step in sizes) if all(self.shape) else 0
        if self.dtype.is_floating_point:
            flat = torch.linspace(0.5, 1.5, extent, dtype=torch.float32, device=device)
            flat = flat.to(self.dtype)
        elif self.dtype == torch.bool:
            flat = torch.ones(extent, dtype=self.dtype, device=device)
        else:
            flat = torch.zeros(extent, dtype=self.dtype, device=device)
        return flat.as_strided(self.shape, self.stride)


class Call(NamedTuple):
    """An operator and what its time depends on: equal for calls that take as long."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, operator: Any, args: Any, kwargs: dict[str, Any]) -> Call:
        """Describe a call by the likeness of its tensors."""
        named = tuple((name, _recipe(value)) for name, value in kwargs.items())
        return cls(operator, _recipe(args), named)

    @property
    def name(self) -> str:
        """Return the operator's, for example ``aten::mm``."""
        return str(self.operator._schema.name)

    @property
    def tensors(self) -> list[Like]:
        """Return what it is given."""
        return [*_likes((self.args, [value for _, value in self.kwargs]))]

    @property
    def work(self) -> float:
        """Return its floating-point operations, or what stands for them: see `MOST_WORK`."""
        sizes = _product_sizes(self)
        if sizes is not None:
            return 2.0 * math.prod(sizes)
        if _is_attention(self):
            query, key = _query_and_key(self)
            return 4.0 * math.prod(query.shape) * key.shape[2]
        return float(_WORK_OF_A_BYTE * sum(like.num_bytes for like in self.tensors))

    def run(self, device: torch.device) -> Callable[[], Any]:
        """Make its arguments; calling what is returned runs it."""
        kwargs = {name: _filled(value, device) for name, value in self.kwargs}
        return partial(self.operator, *_filled(self.args, device), **kwargs)

    def shrunk(self, most: float) -> tuple[Call, float]:
        """Return a like call of at most so much work, and how many times longer this one takes."""
        call, times = self, 1.0
        while call.work > most:
            large = max((size for like in call.tensors for size in like.shape), default=0)
            if large < 2 * _LEAST_SIZE:
                break
            half = large // 2
            kwargs = tuple((n, _resized(v, large, half)) for n, v in call.kwargs)
            smaller = Call(call.operator, _resized(call.args, large, half), kwargs)
            if not 0 < smaller.work < call.work:
                break
            times, call = times * call.work / smaller.work, smaller
        return call, times


class Operators(LiveMemory):
    """Counts calls of operators on the meta device, by phase, in place of what is alive."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: dict[str, Counter[Call]] = {}
        """By phase (``forward``, ``recompute``, ``backward``, ``optimizer``)."""

    def add(self, *_: Any, **__: Any) -> None:
        """Do not follow a storage."""

    def discard(self, *_: Any, **__: Any) -> None:
        """Do not follow a storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or what it is made of, and count it."""
        kwargs = kwargs or {}
        assert self._kernels is not None
        substitute = self._kernels.substitute(func)
        if substitute is not None:
            with self:
                return substitute(*args, **kwargs)
        of_phase = self.calls.setdefault(self._current_phase(), Counter())
        of_phase[Call.of(func, args, kwargs)] += 1
        return self._outputs.call(func, args, kwargs)


def count_operators(predictor: Predictor, lengths: Lengths) -> dict[str, Counter[Call]]:
    """Return the calls of one forward and backward pass and one optimizer step, by phase.

    Raises:
        InputError: What ``Predictor.training`` does.
    """
    counter, predictor.counter = predictor.counter, Operators
    try:
        counted = predictor.training(lengths)
    finally:
        predictor.counter = counter
    assert isinstance(counted, Operators)
    return counted.calls


class Stopwatch:
    """Times operators on a device, each kind once.

    On a CPU it is the thread's own clock that times, which stands still while other programs
    compute; ``slowdown`` says what they cost.

    Args:
        device: The device.
        budget_s: Seconds after which the rest is estimated.
    """

    def __init__(self, device: torch.device, budget_s: float = BUDGET_S) -> None:
        self.device = device
        self.failure: Exception | None = None
        """Why the last operator that could not be timed could not."""
        self._left_s, self._left_wall_s = budget_s, 4 * budget_s
        self._clock = time.thread_time if device.type == "cpu" else time.perf_counter
        self._known: dict[Call, float | None] = {}
        self._rates: dict[str, list[tuple[float, float]]] = {}
        self._new_s: dict[Call, float] = {}
        self._own_s, self._wall_s = 0.0, 0.0

    @property
    def has_timed(self) -> bool:
        """Whether any operator was timed."""
        return bool(self._rates)

    @property
    def slowdown(self) -> float:
        """Return how many times longer the timing took than it did by its own clock."""
        return max(1.0, self._wall_s / self._own_s) if self._own_s else 1.0

    def seconds(self, calls: Counter[Call]) -> float:
        """Return how long calls take one after the other, if nothing else computes.

        What Python takes between them is left out.
        """
        at_work = {call: number for call, number in calls.items() if not _is_view(call.operator)}
        for call in sorted(at_work, key=lambda call: -call.work * at_work[call]):
            if call not in self._known and self._left_s > 0 and self._left_wall_s > 0:
                self._known[call] = self._timed(call)
        return sum(number * self._estimated(call) for call, number in at_work.items())

    def new_shapes_s(self, calls: Counter[Call]) -> float:
        """Return what calls take more where their sizes are new, known after ``seconds``.

        A CPU's bf16 products are compiled for each size.
        """
        return sum(self._new_s.get(call, 0.0) for call in calls)

    def taken(self, run: Callable[[], Any]) -> float:
        """Run something and return its seconds."""
        synchronize(self.device)
        wall, start = time.perf_counter(), self._clock()
        run()
        synchronize(self.device)
        took, wall = self._clock() - start, time.perf_counter() - wall
        self._own_s, self._wall_s = self._own_s + took, self._wall_s + wall
        self._left_s, self._left_wall_s = self._left_s - took, self._left_wall_s - wall
        return took

    def _timed(self, call: Call) -> float | None:
        """Time a call, or a part of a large one; None if it does not take made-up values."""
        part, times = call.shrunk(MOST_WORK.get(self.device.type, MOST_WORK["cuda"]))
        try:
            first, took = self._first_and_least(part.run(self.device))
        except _FAILS as error:
            self.failure = error
            return None
        self._rates.setdefault(call.name, []).append((part.work, took))
        multiplies = _product_sizes(call) is not None or _is_attention(call)
        if self.device.type == "cpu" and multiplies and _has(call, torch.bfloat16):
            self._new_s[call] = max(0.0, first - took)
        return took * times

    def _estimated(self, call: Call) -> float:
        """Return the time of a call: its own, or by its work that of the nearest of its kind."""
        known = self._known.get(call)
        if known is not None:
            return known
        kind = self._rates.get(call.name)
        if kind is None:
            each = [pair for pairs in self._rates.values() for pair in pairs]
            work, took = (sum(part) for part in zip(*each, strict=True)) if each else (0.0, 0.0)
            return took * call.work / work if work else 0.0
        work, took = min(kind, key=lambda pair: abs(math.log((pair[0] + 1) / (call.work + 1))))
        return took * (call.work + 1) / (work + 1)

    @torch.no_grad()
    def _first_and_least(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Run once, then more often the shorter it takes; return the first and least seconds."""
        first = self.taken(run)
        number = max(1, min(20, round(2e-4 / max(first, 1e-6))))

        def several() -> None:
            for _ in range(number):
                run()

        times = 2 if first > 0.02 else 3
        return first, min(self.taken(several) / number for _ in range(times))


class _CountOnly(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls on a real device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[Call.of(func, args, kwargs or {})] += 1
        return func(*args, **(kwargs or {}))


@cache
def overhead_s(device: torch.device) -> float:
    """Return the seconds that a call of an operator in a model takes beside the operator.

    Those of a small model's forward and backward pass, without those of its operators, by call.
    """
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with seed_kept(device), torch.device(device):
        model: Any = LlamaForCausalLM(config)
        ids = torch.zeros(1, 8, dtype=torch.long)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    with _CountOnly() as counted:
        step()
    watch = Stopwatch(device)
    took = min(watch.taken(step) for _ in range(5))
    return float(max(0.0, took - watch.seconds(counted.calls)) / counted.calls.total())


@cache
def _is_view(operator: Any) -> bool:
    if operator._schema.name in _NO_WORK or operator._schema.name.startswith("aten::empty"):
        return True
    returned = operator._schema.returns
    return bool(returned) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returned
    )


def _product_sizes(call: Call) -> tuple[int, ...] | None:
    """Return the sizes that a matrix product's work is the product of; None of another operator."""
    name = call.name.removeprefix("aten::")
    if name in ("mm", "bmm"):
        left, right = call.args[:2]
        return (*left.shape, right.shape[-1])
    if name in ("addmm", "baddbmm"):
        left, right = call.args[1:3]
        return (*left.shape, right.shape[-1])
    if name == "linear":
        return (*call.args[0].shape, call.args[1].shape[0])
    return None


def _has(call: Call, dtype: torch.dtype) -> bool:
    return any(like.dtype == dtype for like in call.tensors)


def _is_attention(call: Call) -> bool:
    return "_scaled_dot_product_" in call.name


def _query_and_key(call: Call) -> tuple[Like, Like]:
    tensors = call.tensors
    return (tensors[1], tensors[2]) if call.name.endswith("_backward") else (tensors[0], tensors[1])


def _recipe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(value.dtype, tuple(value.shape), value.stride())
    if isinstance(value, (list, tuple)):
        return tuple(map(_recipe, value))
    return value


def _likes(value: Any) -> Iterator[Like]:
    if isinstance(value, Like):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _likes(each)


def _filled(value: Any, device: torch.device) -> Any:
    if isinstance(value, Like):
        return value.filled(device)
    if isinstance(value, tuple):
        return [_filled(each, device) for each in value]
    return device if isinstance(value, torch.device) else value


def _resized(value: Any, size: int, to: int) -> Any:
    """Return arguments with another size wherever a size is that one."""
    if isinstance(value, Like):
        shape = tuple(to if each == size else each for each in value.shape)
        return value if shape == value.shape else Like(value.dtype, shape, _strides(value, shape))
    if isinstance(value, tuple):
        return tuple(_resized(each, size, to) for each in value)
    return to if type(value) is int and value == size else value


def _strides(like: Like, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return strides in the order of a tensor's, for another shape; broadcast ones stay."""
    order = sorted(range(len(shape)), key=lambda place: (like.stride[place], like.shape[place]))
    strides, step = [0] * len(shape), 1
    for place in order:
        if like.stride[place]:
            strides[place] = step
            step *= shape[place]
    return tuple(strides)
