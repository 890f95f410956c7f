"""L: where Φ is attached. ReFT as an ordinary PEFT method.

A ``ReftLayer`` sits as a submodule ``reft`` in each edited block (or MLP, or attention) and edits
that module's output in a forward hook; the base's own modules, names and weights are untouched.
A forward pre-hook on the base model turns the masks of the call into a ``Selection``: which tokens
each adapter edits with which φ. The selection holds for that one forward pass, and for its
recomputation under activation checkpointing.
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_reft.base.blocks import SUBMODULE, component_path, device_of, find_blocks, hidden_size
from lowmem_reft.base.identity import note_base
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.processes import refuse_casts, shards_model
from lowmem_reft.reft.composition import low_rank, summed_config, weighted_sum
from lowmem_reft.reft.config import ReftConfig, resolve_layers
from lowmem_reft.reft.interventions import READS_INPUT, build_intervention
from lowmem_reft.reft.peft_method import NAME, PREFIX, register
from lowmem_reft.reft.positions import num_groups, parse_positions
from lowmem_reft.reft.selection import Selection, Selector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lowmem_reft.reft.past import Place

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

CHUNK_TOKENS = 1024
"""More edited vectors than this are edited, and recomputed in the backward pass, in chunks."""


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
        groups = num_groups(parse_positions(config.positions), config.tie)
        phi = nn.ModuleList(
            build_intervention(config.intervention, self.hidden_size, **config.fields())
            for _ in range(groups)
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
            output: of the module; hidden vectors, or a tuple that starts with them.
            source: what went into it, (batch, seq, hidden), for interventions that read that.

        Raises:
            RuntimeError: the block runs outside the adapted model's own forward.
        """
        if self.disable_adapters or not self.reft_phi:
            return output
        if self.current.value is None:
            raise RuntimeError(
                "an adapted block ran outside the forward pass of the adapted model, so the token "
                "positions are unknown; call the model itself, not a part of it"
            )
        hidden = output[0] if isinstance(output, tuple) else output
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
        index: tuple[Tensor, Tensor],
        dropout: float,
        source: Tensor | None = None,
    ) -> Tensor:
        """Return ``hidden`` (batch, seq, hidden) with the vectors at ``index`` changed by φ.

        φ reads them, or the vectors at the same places in ``source`` if there is one.
        """
        num_tokens = index[0].numel()
        if num_tokens == 0 and not (self.training and shards_model()):
            return hidden  # else φ gets a gradient of 0: each process has to reduce the same ones
        apply = partial(_edit_vectors, phi=phi, dropout=dropout if self.training else 0.0)
        tensors = (hidden,) if source is None else (hidden, source)
        if num_tokens == hidden.shape[0] * hidden.shape[1]:  # all of them: nothing to gather
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
        """Give parameters that something cast to 16 bit their fp32 values back.

        Returns:
            Whether any parameter had been cast.
        """
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
        raise NotImplementedError(_NO_MERGE)


class ReftModel(BaseTuner):
    """PEFT tuner that attaches ``ReftLayer`` to the modules that a ``ReftConfig`` names."""

    prefix: str = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        check_versions()
        note_base(config, model)
        found = device_of(model)  # for blocks that are not there; there may be none at all
        self._device = torch.device("cpu") if found.type == "meta" else found
        existing = next((m for m in model.modules() if isinstance(m, ReftLayer)), None)
        if existing is not None:  # a second tuner, as transformers' add_adapter makes
            self.current = existing.current
            return
        configs: Any = self.peft_config
        self.current = CurrentSelection(Selector(model, configs))

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if not self.current.handles:  # last of all: a refused configuration leaves no hook behind
            self.current.handles = [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, always_call=True),
            ]
            # Also where the model itself is called, as after transformers' own add_adapter.
            self.current.generate = getattr(model, "generate", None)
            self.current.had_generate = "generate" in vars(model)
            if self.current.generate is not None:
                model.generate = self.generate  # type: ignore[assignment]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # PEFT matches module names; this is the one hook that add_adapter goes through as well.
        name, blocks = find_blocks(self.model)
        layers = resolve_layers(peft_config.layers, len(blocks))
        path = component_path(
            blocks[0],
            peft_config.component,
            whole_sublayer=peft_config.intervention in READS_INPUT,
        )
        suffix = re.escape(f".{path}") if path else ""
        indices = "|".join(str(layer) for layer in layers)
        peft_config.target_modules = rf"{re.escape(name)}\.({indices}){suffix}"
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        existing = getattr(target, SUBMODULE, None)
        layer = existing or ReftLayer(hidden_size(self.model), self.current)
        weights = (p.device for p in target.parameters() if not p.is_meta)
        layer.add(adapter_name, peft_config, next(weights, self._device))
        if existing is None:
            target.add_module(SUBMODULE, layer)
            # First among the hooks, so that recorded hidden states are the edited ones.
            layer.handle = target.register_forward_hook(
                layer.edit_output, prepend=True, with_kwargs=True
            )
        if adapter_name not in self.active_adapters:
            layer.reft_phi[adapter_name].requires_grad_(False)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Walk the model; who looks for its parameters this way (an optimizer, DDP) finds fp32."""
        self.restore_full_precision()
        yield from super().named_modules(*args, **kwargs)

    def restore_full_precision(self) -> None:
        """Give interventions and trained heads that something cast to 16 bit fp32 values back."""
        if not hasattr(self, "model"):  # still under construction
            return
        for module in self.model.modules():
            if isinstance(module, ReftLayer):
                module.restore_full_precision()
            elif isinstance(module, ModulesToSaveWrapper):
                _restore_head(module)

    # Compiled, what is counted would have every step of a static cache compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        training = model.training and torch.is_grad_enabled()
        place = self.current.selector.place(args, kwargs, training=training)
        self.current.place = place
        if place.is_decoding and not model.training and "intervention_mask" not in kwargs:
            self.current.value = {}  # without a walk over all modules
            return args, kwargs
        refuse_casts()
        self.restore_full_precision()
        enabled = next((layer for layer in self._layers() if not layer.disable_adapters), None)
        selection, kwargs = self.current.selector.select(
            [] if enabled is None else list(enabled.active_adapters),
            args,
            kwargs,
            training=training,
            place=place,
        )
        self.current.value = selection
        _keep_selection_in_recompute(model, self.current)
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.current.place is not None and output is not None:
            self.current.place.passed(output)
        self.current.value = self.current.place = None

    def _layers(self) -> Iterator[ReftLayer]:
        return (module for module in self.model.modules() if isinstance(module, ReftLayer))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model's ``generate``; the prompt is edited, new tokens are not."""
        if self.current.generate is None:
            raise AttributeError(f"{type(self.model).__name__} does not generate")
        with self.current.selector.generation(self.model, args, kwargs) as model_kwargs:
            return self.current.generate(*args, **model_kwargs)

    def generate_batch(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse: continuous batching mixes prompts and new tokens in one sequence.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "ReFT edits prompts, which generate_batch packs together with new tokens; use generate"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's entry for ``adapter_names``: one adapter (or ``__base__``) per example."""
        adapter_names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.model.training:
            raise ValueError(
                "adapter_names must not be given in training mode; call model.eval() first"
            )
        unknown = sorted({*adapter_names} - {*self.peft_config, "__base__"})
        if unknown:
            raise InputError(
                f"adapter_names must be loaded adapters or '__base__', got {', '.join(unknown)}; "
                f"loaded are {', '.join(self.peft_config)}"
            )
        handles = [
            module.register_forward_pre_hook(
                partial(_with_adapter_names, adapter_names=list(adapter_names)), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            with self.current.selector.mixed(adapter_names):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Add an adapter that is the weighted sum Σ wᵢ φᵢ(h) of others; see ``composition``.

        Args:
            adapters: names of loaded adapters that edit the same positions.
            weights: one each, of either sign.
            adapter_name: of the sum; a new name.

        Raises:
            InputError: a name is wrong, or the adapters have no such sum.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or len(set(adapters)) < max(len(adapters), 1) or len(weights) != len(adapters):
            raise InputError(
                "adapters must be loaded adapters, each once and with a weight, got "
                f"{list(adapters)} with {list(weights)}; loaded are {', '.join(self.peft_config)}"
            )
        if adapter_name in self.peft_config:
            raise InputError(f"adapter_name must be new, got {adapter_name!r}; choose another")
        layers = list(self._layers())
        parts = [
            {n: [low_rank(p) for p in layer.phis(n)] for n in adapters if n in layer.reft_phi}
            for layer in layers
        ]
        ranks = {name: len(p[name][0].write) for p in parts for name in adapters if name in p}
        configs: Any = {name: self.peft_config[name] for name in adapters}
        config: Any = summed_config(configs, ranks, len(find_blocks(self.model)[1]))
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer, of_adapter in zip(layers, parts, strict=True):
            if adapter_name in layer.reft_phi:
                for group, phi in enumerate(layer.phis(adapter_name)):
                    these = [of_adapter[n][group] if n in of_adapter else None for n in adapters]
                    weighted_sum(these, weights, into=phi)
        self.set_requires_grad([adapter_name], requires_grad=False)

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base model as it was."""
        for handle in self.current.handles:
            handle.remove()
        if vars(self.model).pop("generate", None) is not None and self.current.had_generate:
            self.model.generate = self.current.generate
        for parent in list(self.model.modules()):
            layer = getattr(parent, SUBMODULE, None)
            if isinstance(layer, ReftLayer):
                layer.handle.remove()
                delattr(parent, SUBMODULE)
            function = getattr(parent, "_gradient_checkpointing_func", None)
            if isinstance(function, _SelectionKeepingCheckpoint):
                parent._gradient_checkpointing_func = function.checkpoint
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(_NO_MERGE)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Refuse: an edit of some positions is not a change of weights.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_MERGE)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".reft_phi.{adapter_name}.", ".reft_phi.", 1)


def prompt_arguments(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return what to pass to ``model`` so that it knows the prompt although labels are not passed.

    Args:
        model: any model; one without ReFT needs nothing.
        labels: (batch, seq), -100 where a token is not supervised.
    """
    if not any(isinstance(module, ReftLayer) for module in model.modules()):
        return {}
    return {"prompt_mask": ((labels != IGNORED_LABEL).cumsum(1) == 0).long()}


_NO_MERGE = (
    "ReFT edits hidden vectors at some positions, which no change of weights can express, so there "
    "is nothing to merge; save the adapter with save_pretrained and load it beside the base"
)


def _restore_head(wrapper: ModulesToSaveWrapper) -> None:
    """Give copies of an fp32 head that something cast to 16 bit fp32 values back."""
    originals = dict(wrapper.original_module.named_parameters())
    for copy in wrapper.modules_to_save.values():
        for name, parameter in copy.named_parameters():
            before = originals[name].data
            if parameter.dtype in HALF and before.dtype == torch.float32:
                same = torch.equal(before.to(parameter.device, parameter.dtype), parameter.data)
                exact = before.clone() if same else parameter.data.float()
                parameter.data = exact.to(parameter.device)


def _with_adapter_names(
    module: nn.Module, args: Any, kwargs: Any, *, adapter_names: list[str]
) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}


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
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        exact = vectors.to(_dtype_of(phi))
        change = phi(exact if source is None else source.to(exact.dtype))
        if dropout:
            change = nn.functional.dropout(change, dropout)
        edited: Tensor = (exact + change).to(vectors.dtype)
        return edited


def _dtype_of(phi: nn.Module) -> torch.dtype:
    tensor = next(phi.parameters(), None)
    return next(phi.buffers()).dtype if tensor is None else tensor.dtype


def _keep_selection_in_recompute(model: nn.Module, current: CurrentSelection) -> None:
    """Make checkpointed blocks recompute under the selection of their own forward pass.

    MLP and attention are recomputed with their hooks, and so are whole blocks in transformers
    before 5.23; by then another forward pass may have run (a reference model in DPO, say).
    """
    if not (model.training and torch.is_grad_enabled()):
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _SelectionKeepingCheckpoint):
            wrapped = _SelectionKeepingCheckpoint(function, current)
            module._gradient_checkpointing_func = wrapped  # type: ignore[assignment]


class _SelectionKeepingCheckpoint:
    """A checkpoint function whose recomputation sees the selection of the forward pass."""

    def __init__(self, checkpoint: Any, current: CurrentSelection) -> None:
        self.checkpoint, self.current = checkpoint, current

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        selection = self.current.value
        layer = _layer_outside(function)

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with self.current.use(selection):
                output = function(*inner_args, **inner_kwargs)
                return output if layer is None else layer.edited(output)

        output = self.checkpoint(run, *args, **kwargs)
        if layer is not None:
            layer.is_edited = True
        return output


def _layer_outside(function: Any) -> ReftLayer | None:
    """Return the ``ReftLayer`` of the block whose bare ``forward`` a checkpoint recomputes.

    transformers 5.23 leaves hooks, and so the edit, outside the checkpoint: what the edit needs for
    its gradient would then be kept for every block. Older versions have the hooks inside.
    """
    block = next(iter(getattr(function, "args", ())), None)
    layer = getattr(block, SUBMODULE, None) if isinstance(block, nn.Module) else None
    return layer if isinstance(layer, ReftLayer) else None


register(NAME, ReftConfig, ReftModel, prefix=PREFIX)
