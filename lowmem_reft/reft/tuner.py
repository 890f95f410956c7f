"""L: where Φ is attached. ReFT as an ordinary PEFT method.

A ``ReftLayer`` sits as a submodule ``reft`` in each edited block (or MLP, or attention) and edits
that module's output in a forward hook; the base's own modules, names and weights are untouched.
A forward pre-hook on the base model turns the masks of the call into a ``Selection``: which tokens
each adapter edits with which φ. The selection holds for that one forward pass, and for its
recomputation under activation checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lowmem_reft.base.blocks import SUBMODULE, component_path, device_of, find_blocks, hidden_size
from lowmem_reft.base.identity import note_base
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.processes import refuse_casts
from lowmem_reft.reft.composition import low_rank, summed_config, weighted_sum
from lowmem_reft.reft.config import ReftConfig, resolve_layers
from lowmem_reft.reft.interventions import READS_INPUT
from lowmem_reft.reft.layer import HALF, NO_MERGE, CurrentSelection, ReftLayer
from lowmem_reft.reft.loaded import check_loaded
from lowmem_reft.reft.peft_method import NAME, PREFIX, find_best_of_named, register
from lowmem_reft.reft.positions import Positions
from lowmem_reft.reft.recompute import SelectionKeepingCheckpoint, keep_selection_in_recompute
from lowmem_reft.reft.rotation import computed_once
from lowmem_reft.reft.selection import Selector


class ReftModel(BaseTuner):
    """PEFT tuner that attaches ``ReftLayer`` to the modules that a ``ReftConfig`` names."""

    prefix: str = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        check_versions()
        note_base(config, model)
        generates = getattr(model, "can_generate", lambda: True)()
        if config.where == Positions(response=True) and not generates:
            raise InputError(
                f"positions must edit the prompt of {type(model).__name__}, which has no answers, "
                f"got {config.positions!r}; for example 'all'"
            )
        found = device_of(model)  # for blocks that are not there; there may be none at all
        self._device = torch.device("cpu") if found.type == "meta" else found
        existing = next((m for m in model.modules() if isinstance(m, ReftLayer)), None)
        if existing is not None:  # a second tuner, as transformers' add_adapter makes
            self.current = existing.current
            return
        configs: Any = self.peft_config
        self.current = CurrentSelection(Selector(model, configs))

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if adapter_name != "default" and not config.inference_mode:
            find_best_of_named()
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
        is_new = place.is_decoding and not model.training and "intervention_mask" not in kwargs
        if is_new and not self._edits_answers():
            self.current.value = {}  # without a walk over all modules
            return args, kwargs
        if not is_new:
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
        keep_selection_in_recompute(model, self.current)
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.current.place is not None and output is not None:
            self.current.place.passed(output)
        self.current.value = self.current.place = None

    def _edits_answers(self) -> bool:
        return any(config.where.response for config in self.current.selector.configs.values())

    def _layers(self) -> Iterator[ReftLayer]:
        return (module for module in self.model.modules() if isinstance(module, ReftLayer))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model's ``generate``, telling its prompt from new tokens."""
        if self.current.generate is None:
            raise AttributeError(f"{type(self.model).__name__} does not generate")
        with (
            self.current.selector.generation(self.model, args, kwargs) as model_kwargs,
            computed_once(self.model),
        ):
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
            adapters: Names of loaded adapters that edit the same positions.
            weights: One each, of either sign.
            adapter_name: Of the sum; a new name.

        Raises:
            InputError: A name is wrong, or the adapters have no such sum.
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
            if isinstance(function, SelectionKeepingCheckpoint):
                parent._gradient_checkpointing_func = function.checkpoint
        return super().unload()

    def _check_merge_allowed(self) -> None:  # asked by merge_adapter and merge_and_unload
        raise NotImplementedError(NO_MERGE)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".reft_phi.{adapter_name}.", ".reft_phi.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        named: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_loaded(model, adapter_name, named)
        return named


def reft_configs(model: nn.Module) -> list[ReftConfig]:
    """Return the configurations of the ReFT adapters on a model; there may be none."""
    layer = next((module for module in model.modules() if isinstance(module, ReftLayer)), None)
    return [] if layer is None else list(layer.current.selector.configs.values())


def prompt_arguments(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return what to pass to ``model`` so that it knows the prompt although labels are not passed.

    A model without ReFT needs nothing. Labels are (batch, seq), -100 where not supervised.
    """
    if not reft_configs(model):
        return {}
    return {"prompt_mask": ((labels != IGNORED_LABEL).cumsum(1) == 0).long()}


def groups_of(model: Any, examples: Sequence[dict[str, Any]]) -> Tensor:
    """Return (batch, seq), right-padded: the index of the φ that edits each token, or -1.

    Only ``labels`` of the examples are read: what is not supervised is prompt.
    """
    rows = [torch.tensor(example["labels"], dtype=torch.long) for example in examples]
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED_LABEL)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    call = {"input_ids": labels, "attention_mask": mask, "labels": labels}
    layer: Any = next(module for module in model.modules() if isinstance(module, ReftLayer))
    selector, active = layer.current.selector, list(layer.active_adapters)
    groups = torch.full_like(labels, -1)
    # Not as in training, where a batch without any prompt is refused: this may be one example.
    selection, _ = selector.select(active, (), call, training=False)
    for indices in selection.values():
        for group, (rows, columns) in enumerate(indices):
            groups[rows, columns] = group
    return groups


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


register(NAME, ReftConfig, ReftModel, prefix=PREFIX)
