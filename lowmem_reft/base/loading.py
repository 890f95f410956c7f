"""The frozen base: loaded quantized, guarded, saved."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.heads import AUTO_CLASSES, auto_class, freeze, head_names, set_labels
from lowmem_reft.base.hub import (
    check_on_hub,
    check_path,
    files_in,
    load_config,
    local_directory,
)
from lowmem_reft.base.identity import commit_of
from lowmem_reft.base.limits import pad_with_known_token
from lowmem_reft.base.ours import ours
from lowmem_reft.base.quantization import (
    STORAGES,
    cast_unquantized,
    guard_linear4bit,
    hold_packed_as,
    quantization_options,
    warn_of_unquantized_weights,
)
from lowmem_reft.base.stored import check_checkpoint, in_one_line
from lowmem_reft.base.tokenizer_files import (
    check_tokenizer_files,
    check_vocabulary,
    not_loaded,
)
from lowmem_reft.base.upper import load_upper
from lowmem_reft.base.whole import (
    check_finite,
    check_keys,
    check_sizes,
    check_stored,
    quantized_finite,
    source_of,
)
from lowmem_reft.errors import InputError, is_of_the_machine
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.devices import (
    DTYPES,
    resolve_device,
    resolve_storage,
    return_freed_memory,
)
from lowmem_reft.machine.notices import held
from lowmem_reft.machine.processes import shards_model
from lowmem_reft.options import Storage
from lowmem_reft.options.values import QUANTIZED


def load_base(
    model: str | Path,
    *,
    storage: Storage = "nf4",
    compute_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    task_type: str = "CAUSAL_LM",
    activation_checkpointing: bool = False,
    num_labels: int | None = None,
    attn_implementation: str | None = None,
    revision: str = "main",
    resident: Literal["all", "upper"] = "all",
    first_resident: int | None = None,
    quant_storage: Literal["bf16", "fp16", "fp32"] | None = None,
    config: Any = None,
) -> PreTrainedModel:
    """Load a pretrained model as a frozen base, quantized on the way in.

    Every linear layer of the blocks is quantized. Embeddings, norms and the output head
    (``lm_head``, which transformers never quantizes) stay in the compute dtype: nothing is cast up.
    The head of a classifier stays unquantized and in fp32, its input is cast to fp32, so that it
    can be trained (PEFT's ``modules_to_save``). No parameter requires a gradient. Only safetensors
    are read and no code of the checkpoint is run. The model comes in evaluation mode and without
    ``config.use_cache``, which training does not need; ``generate`` still uses a cache.

    int8 quantizes the activations too: always on CUDA, in evaluation mode on a CPU. Its layers keep
    their inputs until the backward pass, so activation checkpointing saves less with it.

    Args:
        model: Hub id or local directory, of an unquantized or a bitsandbytes checkpoint.
        storage: How the frozen weights are stored: nf4, fp4, int8, bf16, fp16 or fp32.
        compute_dtype: bf16, fp16, fp32, or auto or None: see `resolve_compute_dtype`.
        device: cpu, cuda, cuda:N, or auto or None: see `resolve_device`.
        task_type: CAUSAL_LM, SEQ_CLS, TOKEN_CLS or FEATURE_EXTRACTION.
        activation_checkpointing: See `enable_activation_checkpointing`.
        num_labels: Classes of a SEQ_CLS or TOKEN_CLS head; default: as the checkpoint says.
        attn_implementation: eager, sdpa, ...; default: what transformers picks.
        revision: Branch, tag or commit of a hub id.
        resident: ``upper`` loads the upper blocks only, for training from stored constants: see
            ``lowmem_reft.reuse``. The others, and an embedding that the head does not share, are
            on the meta device and are read from the checkpoint when they run
            (``base.residency``; its ``restore()`` makes the base whole).
        first_resident: The first block that is loaded with ``upper``; default: half of them.
        quant_storage: bf16, fp16 or fp32: the dtype in which tensors hold the 4-bit weights, as
            FSDP2 shards floating-point tensors only. The bytes are the same. Default: the compute
            dtype where the launcher asks for FSDP, else bytes.
        config: What `load_config` has read, if it has been read; it is not changed.

    Raises:
        InputError: An argument is unknown, impossible on this machine or at odds with the model,
            or an untested version of a library breaks what is relied on.
    """
    check_versions()
    _check_choices(storage, task_type, resident)
    target = resolve_device(device)
    _, dtype = resolve_storage(storage, compute_dtype, target)
    config = load_config(model, revision) if config is None else copy.deepcopy(config)
    set_labels(config, task_type, num_labels)
    options = quantization_options(model, config, storage, dtype, task_type)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if resident == "upper":
        base = load_upper(
            model, config, task_type, dtype, target, revision, options, first_resident
        )
    else:
        base = _load_whole(
            model,
            task_type,
            config=config,
            dtype=dtype,
            device_map={"": str(target)},
            revision=revision,
            **options,
        )
    if storage in QUANTIZED:
        if "quantization_config" not in options:
            cast_unquantized(base, dtype)
        warn_of_unquantized_weights(base, storage)
    guard_linear4bit(base)
    if quant_storage is not None or shards_model():
        hold_packed_as(base, dtype if quant_storage is None else DTYPES[quant_storage])
    freeze(base, task_type)
    if activation_checkpointing:
        enable_activation_checkpointing(base)
    base.config._commit_hash = commit_of(model, revision)  # which transformers has left out
    return_freed_memory()
    return base


def _check_choices(storage: str, task_type: str, resident: str) -> None:
    if storage not in STORAGES:
        raise InputError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}; use nf4")
    if task_type not in AUTO_CLASSES:
        raise InputError(
            f"task_type must be one of {', '.join(AUTO_CLASSES)}, got {task_type!r}; use CAUSAL_LM "
            "for a language model"
        )
    if resident not in ("all", "upper"):
        raise InputError(f"resident must be all or upper, got {resident!r}; use all")
    if resident == "upper" and task_type == "FEATURE_EXTRACTION":
        raise InputError(
            "resident must be all with task_type FEATURE_EXTRACTION, got 'upper'; nothing is "
            "trained from stored constants there"
        )


def _load_whole(model: str | Path, task_type: str, **options: Any) -> PreTrainedModel:
    """Load all of a base with ``from_pretrained``'s options, and look that it is whole.

    Raises:
        InputError: It cannot be loaded, or the checkpoint is not whole.
    """
    # An interrupted download is gone on with: what is of the hub is looked at afterwards.
    stored = check_checkpoint(Path(model)) if Path(model).is_dir() else None
    check_sizes(options["config"], stored, model)
    is_quantized = getattr(options["config"], "quantization_config", None) is not None
    with held("transformers.modeling_utils", "LOAD REPORT") as reports:
        try:
            with quantized_finite() as quantized:
                base, differences = _from_pretrained(
                    auto_class(options["config"], task_type), model, **options
                )
            found = local_directory(str(model), options["revision"])
            if stored is None:
                stored = {} if found is None else check_checkpoint(found)
            source = source_of(model, found)
            check_keys(base, differences, task_type, source)
            check_stored(base, stored, is_quantized=is_quantized, source=source)
            check_finite(base, quantized, [] if found is None else files_in(found))
        except InputError:
            reports.clear()  # the one line says it
            raise
        if task_type != "CAUSAL_LM" and _only_heads(base, differences):
            reports.clear()  # a checkpoint of a language model has no other
    heads = tuple(f"{name}." for name in head_names(base))
    ours(base).has_new_head = any(name.startswith(heads) for name in differences["missing_keys"])
    return base


def _from_pretrained(
    kind: Any, model: str | Path, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and what differs between it and the checkpoint."""
    try:
        return cast(
            "tuple[PreTrainedModel, dict[str, Any]]",
            kind.from_pretrained(
                str(model),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused with their names
                **options,
            ),
        )
    except Exception as error:
        if is_of_the_machine(error):
            raise
        found = local_directory(str(model), options["revision"])
        if isinstance(error, SafetensorError) and found is not None:
            check_checkpoint(found)  # it says which file it is
        raise InputError(
            f"model must be one that {kind.__name__} loads from safetensors, "
            f"got {str(model)!r}; convert it, mend its config.json or change the options "
            f"({in_one_line(error)})"
        ) from error


def _only_heads(base: PreTrainedModel, differences: Mapping[str, Any]) -> bool:
    """Whether a checkpoint and a model differ in heads alone, as from_pretrained tells it."""
    of_backbone = {base.base_model_prefix, *(name for name, _ in base.base_model.named_children())}
    unread = {name for name in differences["unexpected_keys"] if ".pooler." not in name}
    return not differences["mismatched_keys"] and of_backbone.isdisjoint(
        name.split(".")[0] for name in unread | differences["missing_keys"]
    )


def load_tokenizer(model: str | Path, *, revision: str = "main", config: Any = None) -> Any:
    """Load the tokenizer of a model; it pads with a token that the model has an embedding for.

    That is eos where it has no pad token, or one that the model has no embedding for.

    Args:
        model: Hub id or local directory.
        revision: Branch, tag or commit of a hub id.
        config: What `load_config` has read, if it has been read: transformers would read it again.

    Raises:
        InputError: There is no tokenizer, a file of it is at fault, or it has no token to pad with.
    """
    check_path(model)
    if Path(model).is_dir():
        check_tokenizer_files(Path(model))
    elif config is None:
        check_on_hub(model, revision)  # transformers would ask for one file after the other
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(model), revision=revision, trust_remote_code=False, config=config
        )
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise not_loaded(model, error) from error
    if Path(model).is_dir():
        check_vocabulary(Path(model), tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"model must have a tokenizer with a pad or an eos token, got {str(model)!r}; "
                "set its pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if config is None:
        with contextlib.suppress(InputError):  # a tokenizer may lie alone
            config = load_config(model, revision)
    if config is not None:
        pad_with_known_token(tokenizer, config)
    return tokenizer


def share_pad_token(base: Any, tokenizer: Any) -> None:
    """Give the base the tokenizer's pad token, by which a decoder's classifier finds the end."""
    for config in (base.config, base.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def save_base(base: PreTrainedModel, directory: str | Path, tokenizer: Any = None) -> None:
    """Save the base as it is stored, quantized bytes included; `load_base` gives the same logits.

    Raises:
        InputError: The model carries an adapter, or only its upper blocks are resident.
    """
    if hasattr(base, "peft_config"):
        raise InputError(
            f"base must be a model without an adapter, got {type(base).__name__!r}; "
            "save the base before get_peft_model and the adapter with save_pretrained"
        )
    if ours(base).residency is not None:
        raise InputError(
            "base must be loaded whole to be saved, got one of which only upper blocks are "
            "resident; call base.residency.restore() first"
        )
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and getattr(base.config, "quantization_config", None) is None:
        base.config.quantization_config = quantizer.quantization_config  # of a made-up base
    base.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
