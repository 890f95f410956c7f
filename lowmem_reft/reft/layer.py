"""The interventions on one module's output: which vectors are edited is told by the selection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_reft.errors import InputError
from lowmem_reft.machine.processes import shards_model
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.interventions import READS_INPUT, build_intervention
from lowmem_reft.reft.past import Place
from lowmem_reft.reft.selection import Selection, Selector, Tokens

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

CHUNK_TOKENS = 1024
"""More edited vectors than this are edited, and recomputed in the backward pass, in chunks."""

NO_MERGE = (
    "ReFT edits hidden vectors at some positions, which no change of weights can express, so there "
    "is nothing to merge; save the adapter with save_pretrained and load it beside the base"
)


class CurrentSelection:
    """The selection of the running forward pass, shared by the tuners and layers of one model."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.value: Selection | None = None
        self.place: Place | None = None
        """Where the tokens of the running forward pass stand."""
        self.generate: Any = None
        """The model's own ``generate``, which knows no prompt."""
        self.had_generate = False
        """The model had one that is not its class's."""
        self.handles: list[Any] = []
        """The hooks on the model that set the selection."""

    @contextmanager
    def use(self, selection: Selection | None) -> Iterator[None]:
        """Make ``selection`` the current one for a while."""
        before, self.value = self.value, selection
        try:
            yield
        finally:
            self.value = before


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions of every adapter on one module's output."""

    adapter_layer_names: tuple[str, ...] = ("reft_phi",)
    other_param_names: tuple[str, ...] = ("reft_dropout", "reft_reads_input")

    def __init__(self, hidden: int, current: CurrentSelection) -> None:
        nn.Module.__init__(self)
        self.hidden_size = hidden
        self.current = current
        self.reft_phi = nn.ModuleDict()
        self.reft_dropout: dict[str, float] = {}
        self.reft_reads_input: dict[str, bool] = {}
        # fp32 values as last seen: some trainers cast trainable parameters to 16 bit.
        self._full_precision: dict[str, Tensor] = {}
        self.device = torch.device("cpu")
        self.handle: Any = None
        self.is_edited = False
        """The output that comes next was edited inside a checkpoint."""
        self._disable_adapters = False
        self.merged_adapters = []

    def add(self, adapter_name: str, config: ReftConfig, device: torch.device) -> None:
        """Create the φ of ``adapter_name``, one per parameter group, in fp32 on ``device``."""
        phi = nn.ModuleList(
            build_intervention(config.intervention, self.hidden_size, **config.fields())
            for _ in range(config.num_groups)
        )
        if not any(parameter.is_meta for parameter in phi.parameters()):
            phi.to(device)
        self.device = device
        self.reft_phi[adapter_name] = phi
        self.reft_dropout[adapter_name] = config.dropout
        self.reft_reads_input[adapter_name] = config.intervention in READS_INPUT
        self.restore_full_precision()

    def phis(self, adapter_name: str) -> list[nn.Module]:
        """Return the φ of an adapter, one per parameter group."""
        return list(self.reft_phi[adapter_name].children())

    def edit_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: return ``output`` edited, unless a checkpoint has done it already."""
        if self.is_edited:
            self.is_edited = False
            return output
        if self.current.value == {}:  # a decode step, where every microsecond counts
            return output
        return self.edited(output, args[0] if args else kwargs.get("hidden_states"))

    def edited(self, output: Any, source: Tensor | None = None) -> Any:
        """Return a module's output with the selected hidden vectors edited.

        Args:
            output: Of the module; hidden vectors, or a tuple that starts with them.
            source: What went into it, (batch, seq, hidden), for interventions that read that.

        Raises:
            InputError: The output is not (batch, seq, hidden).
            RuntimeError: The block runs outside the adapted model's own forward.
        """
        if self.disable_adapters or not self.reft_phi:
            return output
        if self.current.value is None:
            raise RuntimeError(
                "an adapted block ran outside the forward pass of the adapted model, so the token "
                "positions are unknown; call the model itself, not a part of it"
            )
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim != 3:
            raise InputError(
                "layers must be blocks that return hidden vectors (batch, seq, hidden), got "
                f"{tuple(hidden.shape)}: which of them are whose token is not known here; this "
                "architecture can be trained with LoRA"
            )
        edited = hidden
        for adapter_name, groups in self.current.value.items():
            if adapter_name in self.reft_phi:
                read = _vectors(source) if self.reft_reads_input[adapter_name] else None
                for group, index in enumerate(groups):
                    phi = self.reft_phi.get_submodule(f"{adapter_name}.{group}")
                    edited = self._edit(edited, phi, index, self.reft_dropout[adapter_name], read)
        if edited is hidden:
            return output
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _edit(
        self,
        hidden: Tensor,
        phi: nn.Module,
        index: Tokens,
        dropout: float,
        source: Tensor | None = None,
    ) -> Tensor:
        """Return ``hidden`` (batch, seq, hidden) with the vectors at ``index`` changed by φ.

        φ reads them, or the vectors at the same places in ``source`` if there is one.
        """
        num_all = hidden.shape[0] * hidden.shape[1]
        num_tokens = num_all if index is None else index[0].numel()
        if num_tokens == 0 and not (self.training and shards_model()):
            return hidden  # else φ gets a gradient of 0: each process has to reduce the same ones
        apply = partial(_edit_vectors, phi=phi, dropout=dropout if self.training else 0.0)
        tensors = (hidden,) if source is None else (hidden, source)
        if index is None or num_tokens == num_all:  # nothing to gather
            return _in_chunks(apply, *(part.flatten(0, 1) for part in tensors)).view_as(hidden)
        rows, columns = (part.to(hidden.device) for part in index)
        new = _in_chunks(apply, *(part[rows, columns] for part in tensors))
        return hidden.index_put((rows, columns), new)

    def train(self, mode: bool = True) -> ReftLayer:
        """Switch the mode; entering training also undoes a cast of the interventions to 16 bit."""
        super().train(mode)
        if mode:
            self.restore_full_precision()
        return self

    def restore_full_precision(self) -> bool:
        """Give parameters that something cast to 16 bit their fp32 values back; say if any was."""
        restored = False
        tensors = (self.reft_phi.named_parameters(), self.reft_phi.named_buffers())
        for name, parameter in chain.from_iterable(tensors):
            if parameter.dtype in HALF:
                before = self._full_precision.get(name, parameter.data).to(parameter.device)
                # Values loaded after the cast are newer than ours: keep those, as far as they go.
                same = torch.equal(before.to(parameter.dtype), parameter.data)
                parameter.data = (before if same else parameter.data).float()
                restored = True
            if not parameter.is_meta:
                self._full_precision[name] = parameter.data
        if restored:  # nothing to act on: TRL does it to every quantized base
            logger.info("something cast the interventions to 16 bit; they are restored to fp32")
        return restored

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT calls this after it has loaded values into empty parameters (low_cpu_mem_usage).
        if adapter_name in self.reft_phi:
            self.reft_phi[adapter_name].to(device or self.device)
            self.restore_full_precision()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer and choose another active one (PEFT's rules)."""
        super().delete_adapter(adapter_name)
        kept = self.reft_phi.state_dict()
        self._full_precision = {k: v for k, v in self._full_precision.items() if k in kept}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: an edit of some positions is not a change of weights.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(NO_MERGE)


def _vectors(source: Any) -> Tensor:
    if not isinstance(source, Tensor):
        raise RuntimeError(
            "the edited module was called without hidden vectors as its first argument or as "
            "hidden_states, which the intervention reads; use one that reads the output"
        )
    return source


def _in_chunks(apply: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    """Apply to (n, hidden) vectors; recompute many in the backward pass, a chunk at a time.

    What is kept for many vectors is then what the base computes with, not fp32 copies of it.
    """
    if vectors[0].shape[0] <= CHUNK_TOKENS:
        return apply(*vectors)
    chunks = zip(*(part.split(CHUNK_TOKENS) for part in vectors), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([apply(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(apply, *chunk, use_reentrant=False) for chunk in chunks])


def _edit_vectors(
    vectors: Tensor, source: Tensor | None = None, *, phi: nn.Module, dropout: float
) -> Tensor:
    """Return h + φ(x) for (n, hidden) vectors h: computed in fp32, in the dtype of ``vectors``.

    x is ``source``, or h without one.
    """
    kind = vectors.device.type
    # Autocast would take the products to 16 bit; the meta device has none.
    is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if is_cast else nullcontext():
        exact = vectors.to(_dtype_of(phi))
        change = phi(exact if source is None else source.to(exact.dtype))
        if dropout:
            change = nn.functional.dropout(change, dropout)
        edited: Tensor = (exact + change).to(vectors.dtype)
        return edited


def _dtype_of(phi: nn.Module) -> torch.dtype:
    tensor = next(phi.parameters(), None)
    return next(phi.buffers()).dtype if tensor is None else tensor.dtype
