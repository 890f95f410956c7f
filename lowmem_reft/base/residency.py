"""A base of which only the upper blocks are on the device: the others are read when they run.

The checkpoint is read in parts by transformers' own loader (renaming, conversion and quantization
as in ``from_pretrained``), so a block that is read alone has the bytes that it has in the whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from lowmem_reft.base.blocks import SUBMODULE, find_blocks, standing_in
from lowmem_reft.base.ours import ours
from lowmem_reft.base.stored import read_header, some
from lowmem_reft.base.whole import (
    check_finite,
    check_read,
    check_stored,
    quantized_finite,
    source_of,
)
from lowmem_reft.errors import InputError
from lowmem_reft.machine.progress import without_bars_of_transformers

EMBEDDING = -1
"""Stands for the input embedding among indices of blocks."""


@dataclass(eq=False)
class Checkpoint:
    """The weights of a model on disk, read in parts."""

    files: list[Path]
    """Its safetensors files."""
    make_empty: Callable[[], Any]
    """Makes the model on the meta device, prepared for quantization."""
    dtype: torch.dtype
    """What unquantized weights are cast to."""
    device: torch.device
    """Where weights go."""
    quantizer: Any
    """What quantizes them (transformers); None leaves them as they are."""
    finish: Callable[[nn.Module], None]
    """Called with each part that was read: freezes and guards it."""
    _digest: str | None = None
    _not_finite: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the empty model; remember what its parts are called, and what is stored."""
        self.empty = self.make_empty()
        self.stored = {n: tensor for path in self.files for n, tensor in read_header(path).items()}
        self.source = source_of(type(self.empty).__name__, self.files[0].parent)
        self._blocks = find_blocks(self.empty)[0]
        self._embedding = _name_of(self.empty, self.empty.get_input_embeddings())

    def __deepcopy__(self, _memo: dict[int, Any]) -> Checkpoint:
        return self  # the files are the same

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the empty model: weights of bitsandbytes on the meta device do not pickle."""
        return {name: value for name, value in vars(self).items() if name != "empty"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.empty = self.make_empty()

    def read(self, model: Any, wanted: Callable[[int | None], bool], device: torch.device) -> None:
        """Fill the wanted parts of a model that is like ``empty``, on a device.

        ``wanted`` is told the index of a block, ``EMBEDDING`` or, for all else, None.
        """
        with ExitStack() as stack:
            weights: dict[str, Any] = {}
            for path in self.files:
                # Not memory-mapped: a private map counts as memory, whole, while a tensor lives.
                file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                names = [name for name in file.keys() if wanted(self._part(name))]  # noqa: SIM118
                weights.update((name, file.get_slice(name)) for name in names)
            mapping: Any = get_model_conversion_mapping(model, None, self.quantizer)
            config = LoadStateDictConfig(
                device_map={"": device},
                dtype=self.dtype,
                dtype_plan=model._get_dtype_plan(self.dtype),
                hf_quantizer=self.quantizer,
                weight_mapping=mapping,
            )
            # One bar per block says nothing.
            with without_bars_of_transformers(), quantized_finite() as quantized:
                read, _ = model._load_pretrained_model(
                    model, weights, None, config, expected_keys=[]
                )
        model._adjust_missing_and_unexpected_keys(read)
        check_read(model, read.to_dict(), self.source)
        self._not_finite = quantized

    def _part(self, name: str) -> int | None:
        """Return the index of the block that a tensor belongs to, ``EMBEDDING``, or None."""
        short = self._short(name)
        if short.startswith(self._short(self._embedding) + "."):
            return EMBEDDING
        start = self._short(self._blocks) + "."
        if short.startswith(start):
            index = short.removeprefix(start).partition(".")[0]
            return int(index) if index.isdecimal() else None
        return None

    def _short(self, name: str) -> str:
        """Leave out the backbone's name, which checkpoints have elsewhere or not at all.

        As in ``language_model.model.layers``, which is in ``model.language_model`` when loaded.
        """
        return ".".join(part for part in name.split(".") if part != self.empty.base_model_prefix)

    def block(self, index: int) -> nn.Module:
        """Read one block.

        Raises:
            InputError: The checkpoint has not all of its weights under names that are understood.
        """
        blocks = find_blocks(self.empty)[1]
        return self._part_alone(
            index, lambda: blocks[index], partial(blocks.__setitem__, index), self.device
        )

    def embedding(self) -> nn.Module:
        """Read the input embedding, into host memory.

        Raises:
            InputError: The checkpoint has none under a name that is understood.
        """
        empty = self.empty
        return self._part_alone(
            EMBEDDING, empty.get_input_embeddings, empty.set_input_embeddings, torch.device("cpu")
        )

    def _part_alone(
        self,
        wanted: int,
        get: Callable[[], nn.Module],
        put: Callable[[nn.Module], None],
        device: torch.device,
    ) -> nn.Module:
        """Read a part into a copy of it that stands in its place in ``empty`` meanwhile."""
        empty = get()
        put(_empty_copy(empty))
        try:
            self.read(self.empty, lambda part: part == wanted, device)
            read = get()
            fill_buffers(self.empty, read, device)
            self.check(read)
            return read
        finally:
            put(empty)

    def check(self, module: nn.Module) -> None:
        """Finish a part, or refuse it if it was not read whole.

        Raises:
            InputError: A weight is still missing, or is not what it should be.
        """
        self.check_there(name for name, value in module.named_parameters() if value.is_meta)
        self.check_values(module)
        self.finish(module)

    def check_there(self, missing: Iterable[str]) -> None:
        """Refuse the checkpoint if there are names of weights that it should have had.

        Raises:
            InputError: There are.
        """
        names = list(missing)
        if names:
            raise InputError(
                f"{self.source} must have all weights of {type(self.empty).__name__}, under names "
                f"that can be read in parts, got none for {some(names)}; download the model again, "
                "mend its config.json, or load it whole"
            )

    def check_values(self, module: nn.Module) -> None:
        """Refuse weights of a part that was read that are misshapen or not finite.

        Raises:
            InputError: There is one.
        """
        check_stored(module, self.stored, is_quantized=self._is_quantized(), source=self.source)
        check_finite(module, self._not_finite, self.files)

    def _is_quantized(self) -> bool:
        return bool(getattr(self.quantizer, "pre_quantized", False))

    def digest(self) -> str:
        """Return the SHA-256 over the files and how they are stored when loaded."""
        if self._digest is None:
            digest = hashlib.sha256()
            quantization = getattr(self.quantizer, "quantization_config", None)
            stored = None if quantization is None else quantization.to_dict()
            digest.update(json.dumps([str(self.dtype), stored], default=str).encode())
            for path in self.files:
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    while chunk := file.read(2**24):
                        digest.update(chunk)
            self._digest = digest.hexdigest()
        return self._digest


@dataclass(eq=False)
class Residency:
    """Which blocks of a base are on its device, and how the others come there."""

    base: Any
    """The base; blocks below ``first_resident`` are on the meta device."""
    checkpoint: Checkpoint
    """Where they are read from."""
    first_resident: int
    """The first block that is there."""
    has_embedding: bool
    """Whether the input embedding is there."""

    def begin(self) -> None:
        """Be the residency of the base, which the Trainer and accelerate leave where it is."""
        ours(self.base).residency = self.base.residency = self
        # Two devices: that is how they tell.
        name = find_blocks(self.base)[0]
        self.base.hf_device_map = {"": self.checkpoint.device, name: torch.device("meta")}

    @contextmanager
    def loaded(self, index: int, *, training: bool = True) -> Iterator[None]:
        """Read a block, and for the first one the embedding, and let it run in its place."""
        with ExitStack() as stack:
            if index == 0:
                stack.enter_context(self._embedding())
            block = stack.enter_context(self._borrowed(index))
            stack.enter_context(standing_in(self._blocks()[index], block.train(training)))
            yield

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Read every missing block anew whenever it runs: slow, and within the same memory."""

        def read(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                with self._borrowed(index) as block:
                    return block.train(self.base.training)(*args, **kwargs)

            return forward

        with ExitStack() as stack:
            stack.enter_context(self._embedding())
            for index, block in enumerate(self._blocks()[: self.first_resident]):
                stack.enter_context(standing_in(block, read(index)))
            yield

    @contextmanager
    def _borrowed(self, index: int) -> Iterator[nn.Module]:
        """Read a block and let go of all of it at once afterwards."""
        block = self.checkpoint.block(index)
        try:
            yield block
        finally:
            # bitsandbytes' weights point back at their layers: a cycle that would wait for the
            # garbage collector.
            for parameter in block.parameters():
                if hasattr(parameter, "module"):
                    parameter.module = None

    def restore(self) -> None:
        """Read everything that is missing into its place: the base is whole again.

        Raises:
            InputError: The checkpoint has not all weights under names that are understood, or an
                adapter sits inside a block that is missing.
        """
        lower = self._blocks()[: self.first_resident]
        for block in lower:
            inside = (child for name, child in block.named_children() if name != SUBMODULE)
            if any(isinstance(m, BaseTunerLayer) for child in inside for m in child.modules()):
                raise InputError(
                    "base must carry no adapter inside blocks that are missing, got one; restore "
                    "before get_peft_model"
                )
        for index, block in enumerate(lower):
            _move_into(block, self.checkpoint.block(index))
        if not self.has_embedding:
            self.base.set_input_embeddings(self.checkpoint.embedding().to(self.checkpoint.device))
        self.first_resident, self.has_embedding = 0, True
        ours(self.base).residency = None
        del self.base.residency, self.base.hf_device_map

    def _blocks(self) -> list[nn.Module]:
        return list(find_blocks(self.base)[1])

    @contextmanager
    def _embedding(self) -> Iterator[None]:
        if self.has_embedding:
            yield
            return
        table = self.checkpoint.embedding()
        device = self.checkpoint.device

        def look_up(input_ids: Tensor) -> Tensor:
            rows: Tensor = table(input_ids.to("cpu"))
            return rows.to(device)

        with standing_in(self.base.get_input_embeddings(), look_up):
            yield


def _move_into(module: nn.Module, read: nn.Module) -> None:
    """Give a module on the meta device what was read, and keep its hooks and its adapters."""
    for name, child in read.named_children():
        module._modules[name] = child
    module._parameters.update(read._parameters)
    module._buffers.update(read._buffers)
    module.train(module.training)


def fill_buffers(
    model: Any, part: nn.Module, device: torch.device, *, recurse: bool = True
) -> None:
    """Compute what buffers of a part of a model on the meta device hold, as loading does.

    These are rotary frequencies, for example. They go to ``device``; weights that are not on the
    meta device stay as they are.
    """
    for module in part.modules() if recurse else (part,):
        empty = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        if not empty:
            continue
        for name, buffer in empty.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps its values
        with torch.no_grad():
            model._init_weights(module)


def _empty_copy(module: nn.Module) -> nn.Module:
    """Copy a module on the meta device; bitsandbytes' parameters cannot be copied there."""
    memo: dict[int, Any] = {
        id(parameter): type(parameter)(
            torch.empty_like(parameter.data), requires_grad=False, **vars(parameter)
        )
        for parameter in module.parameters()
    }
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for parameter in part.parameters(recurse=False):
            if hasattr(parameter, "module"):
                parameter.module = part
    return copied


def _name_of(model: Any, wanted: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]
