"""Puts a method on a base: its adapter, what saves memory, and our loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from peft.tuners.ia3 import IA3Layer
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_reft.base.blocks import device_of, find_blocks
from lowmem_reft.base.caches import cache_argument, caches_in, keeps_keys_and_values
from lowmem_reft.base.heads import from_config
from lowmem_reft.base.hub import load_config, num_blocks
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.techniques import save_memory
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.methods.configs import build_peft_config, split_targets
from lowmem_reft.methods.table import all_options, check_options, check_storage, find_method
from lowmem_reft.methods.virtual_tokens import take_prefix_as_cache
from lowmem_reft.methods.weights import trained_names
from lowmem_reft.options import MemoryOptions, MethodOptions
from lowmem_reft.reft.config import resolve_layers
from lowmem_reft.reft.peft_method import type_of


def check_target_modules(
    options: MethodOptions, model: Any, *, task_type: str, storage: str | None = None
) -> None:
    """Refuse what the base has not got, before its weights are loaded.

    That is ``target_modules`` that name none of its linear layers, and a part of it to train (its
    biases, its head, all of it) that it does not have or that is stored as integers.

    Raises:
        InputError: The base has not got it, or there is no configuration.
    """
    check_options(options)
    if storage is not None:
        check_storage(options.method, storage)
    part = find_method(options.method).fixed.get("part")
    if not isinstance(model, str):
        _check_blocks(options, model)
    if options.target_modules is None and part is None:
        return
    config = load_config(model) if isinstance(model, str) else copy.deepcopy(model)
    with torch.device("meta"):
        base = from_config(config, task_type)
    if options.target_modules is not None:
        _check_targets(options.target_modules, base)
    if part is not None:
        trained_names(base, part)


def _check_blocks(options: MethodOptions, config: Any) -> None:
    """Refuse blocks that a base has not got.

    And to edit those of Gemma 3n, which return several vectors for each token.
    """
    if (layers := all_options(options).get("layers")) is not None:
        resolve_layers(layers, num_blocks(config))
    several = getattr(config.get_text_config(), "altup_num_inputs", None)
    if several and "intervention" in find_method(options.method).fixed:
        raise InputError(
            f"method must edit no hidden vectors of {config.model_type}, whose blocks return "
            f"{several} for each token, got {options.method!r}; use lora or qlora"
        )


def _check_targets(target_modules: str, base: Any) -> None:
    """Refuse a name that no linear layer has: PEFT would leave it out if another one matches."""
    modules = base.named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    for target in split_targets(target_modules):
        # By PEFT's rule: a whole name, or the end of one.
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(
                f"target_modules must name linear layers of the base, got {target!r}; choose among "
                f"{', '.join(known)}"
            )


def attach(
    base: Any, options: MethodOptions, *, task_type: str, memory: MemoryOptions, chunked_loss: bool
) -> Any:
    """Put a method's adapter on a base, switch on what saves memory, and give it our loss.

    Args:
        base: On its device.
        options: The method.
        task_type: PEFT task type, for example CAUSAL_LM.
        memory: How memory is saved.
        chunked_loss: Whether a causal model's loss is ours; else its own, with all logits.

    Raises:
        InputError: The base, the method or a way to save memory does not go with the others.
    """
    check_versions()
    check_run(options, memory)
    needs_cache = find_method(options.method).needs_cache
    config = build_peft_config(options, task_type=task_type, num_layers=len(find_blocks(base)[1]))
    if options.target_modules is not None:
        _check_targets(options.target_modules, base)
    if needs_cache and not (cache_argument(base) and keeps_keys_and_values(base.config)):
        raise InputError(
            f"method must not be {options.method} for {type(base).__name__}, which reads no cache "
            "of keys and values; choose another method"
        )
    prepare_base(base, config)
    # On the meta device PEFT would otherwise draw an adapter's values on the CPU.
    device = device_of(base)
    with device if device.type == "meta" else nullcontext(), peft_notices_hidden():
        try:
            model: Any = get_peft_model(base, config)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"method must suit the base, got {options.method!r} for {type(base).__name__}: "
                f"{str(error).splitlines()[0]}; choose another method"
            ) from error
    complete(model)
    if needs_cache and device.type != "meta":
        _start_from_vocabulary(model)
    save_memory(model, memory)
    if config.is_prompt_learning:
        model.word_embeddings = base.get_input_embeddings()  # which may have moved to the host
    if chunked_loss and task_type == "CAUSAL_LM":
        use_chunked_loss(model)
    return model


def check_run(options: MethodOptions, memory: MemoryOptions, *, resume: bool = False) -> None:
    """Refuse ways to run that the method cannot be trained with.

    Raises:
        InputError: One would leave out what is trained.
    """
    method = find_method(options.method)
    if memory.activation_checkpointing and not method.allows_checkpointing:
        raise InputError(
            f"activation_checkpointing must be False with method {options.method!r}, got True: "
            "recomputed blocks read no cache, which is where its keys and values are; leave it out"
        )
    if memory.embedding_on_host and not method.allows_embedding_on_host:
        raise InputError(
            f"embedding_on_host must be False with method {options.method!r}, got True: the "
            "embedding is trained where the optimizer is; leave it out"
        )
    if resume and not method.allows_resume:
        raise InputError(
            f"resume must be False with method {options.method!r}, got True: PEFT saves the "
            "embeddings that its network makes and not the network; start anew in another "
            "output_dir"
        )


@contextmanager
def peft_notices_hidden() -> Iterator[None]:
    """Keep a notice off the terminal with which PEFT greets every norm that LN-tuning copies."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type .*Norm", UserWarning)
        yield


def prepare_base(base: Any, config: Any) -> None:
    """Make a base ready for an adapter, before PEFT attaches or loads it.

    For LN-tuning all norms are named, which PEFT knows of few architectures, and put in fp32, where
    small updates of a scale near 1 are not rounded away; what they return is as before. For LoRA on
    some layers of a small base its linear layers are named, as PEFT would take those of all layers.
    The names are written into the configuration.
    """
    prepare = _PREPARED_BY.get(type_of(config))
    if prepare is not None:
        prepare(base, config)


def _name_layers_in_full(base: Any, config: Any) -> None:
    """Replace "all-linear" by names where PEFT would take it for all layers, whichever are chosen.

    It looks at the layers of suffixes alone (0.21), which it makes of the names if they are many.
    """
    layers = config.layers_to_transform
    if config.target_modules != "all-linear" or layers is None:
        return
    prefix, blocks = find_blocks(base)
    linear = [
        (index, f"{prefix}.{index}.{name}")
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if len(linear) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        config.target_modules = {name for index, name in linear if index in layers}


def _name_norms(base: Any, config: Any) -> None:
    norms = {
        name: module
        for name, module in base.named_modules()
        if type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None
    }
    config.target_modules = config.target_modules or list(norms)
    for norm in norms.values():
        _compute_in_full_precision(norm)


_PREPARED_BY = {
    "LN_TUNING": _name_norms,
    "LORA": _name_layers_in_full,
    "LORA_REFT": _name_layers_in_full,
}
"""PEFT type to what makes a base ready for it."""


def _compute_in_full_precision(norm: Any) -> None:
    """Keep a norm's parameters in fp32; it returns the dtype that it is given, as before."""
    if norm.weight.dtype == torch.float32:
        return
    norm.float()
    norm.register_forward_pre_hook(_note_dtype)
    norm.register_forward_hook(_restore_dtype)


def _note_dtype(norm: Any, args: Any) -> Any:
    """Forward pre-hook; RMSNorms round to this dtype before they scale, as the base is used to."""
    norm.input_dtype = args[0].dtype
    return (args[0].float(), *args[1:]) if isinstance(norm, nn.LayerNorm) else args


def _restore_dtype(norm: Any, _args: Any, output: Any) -> Any:
    return output.to(norm.input_dtype)


def complete(model: Any) -> None:
    """Do what PEFT leaves undone once it has attached or loaded an adapter.

    IA3's layers on a quantized base return the dtype that they are given, not fp32; a prefix
    reaches the base under the name that its version of transformers has for a cache.
    """
    take_prefix_as_cache(model)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, IA3Layer)]
    for layer in layers:
        layer.register_forward_hook(_as_given)


def _as_given(_layer: Any, args: Any, output: Any) -> Any:
    return output.to(args[0].dtype)


def _start_from_vocabulary(model: Any) -> None:
    """Set the prefix to the base's own keys and values of random tokens.

    As the paper found, and unlike PEFT's normal values, that is where keys and values belong.
    """
    base = model.get_base_model()
    config = model.active_peft_config
    embedding = base.get_input_embeddings().weight
    ids = torch.randint(0, embedding.shape[0], (1, config.num_virtual_tokens))
    was_training = base.training
    base.eval()
    with torch.no_grad():
        output = base(input_ids=ids.to(embedding.device), use_cache=True)
    (cache,) = caches_in(output.values())
    base.train(was_training)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
