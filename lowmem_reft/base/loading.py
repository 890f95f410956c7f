"""The frozen base: loaded quantized, guarded, saved; the only module that touches bitsandbytes.

4-bit storage is NF4 or FP4 with double quantization (QLoRA, https://arxiv.org/abs/2305.14314,
section 3); 8-bit storage is LLM.int8() (https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Params4bit
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.checkpointing import enable_activation_checkpointing, stop_input_gradients
from lowmem_reft.base.identity import commit_of
from lowmem_reft.base.residency import EMBEDDING, Checkpoint, Residency, fill_buffers
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.devices import (
    DTYPES,
    resolve_compute_dtype,
    resolve_device,
    resolve_storage,
    return_freed_memory,
)
from lowmem_reft.machine.notices import held
from lowmem_reft.machine.processes import shards_model
from lowmem_reft.options import Storage
from lowmem_reft.options.values import QUANTIZED

__all__ = [
    "AUTO_CLASSES",
    "STORAGES",
    "base_digest",
    "enable_activation_checkpointing",
    "guard_linear4bit",
    "load_base",
    "load_config",
    "load_tokenizer",
    "resolve_compute_dtype",
    "resolve_device",
    "save_base",
    "share_pad_token",
]

AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""Task type, as PEFT names it, to the class that loads it."""

STORAGES = (*QUANTIZED, *DTYPES)


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
        InputError: an argument is unknown, impossible on this machine or at odds with the model,
            or an untested version of a library breaks what is relied on.
    """
    check_versions()
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
    target = resolve_device(device)
    _, dtype = resolve_storage(storage, compute_dtype, target)
    config = load_config(model, revision) if config is None else copy.deepcopy(config)
    set_labels(config, task_type, num_labels)
    options = quantization_options(model, config, storage, dtype, task_type)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if resident == "upper":
        base = _load_upper(
            model, config, task_type, dtype, target, revision, options, first_resident
        )
    else:
        base = _from_pretrained(
            AUTO_CLASSES[task_type],
            model,
            config=config,
            dtype=dtype,
            device_map={"": str(target)},
            revision=revision,
            **options,
        )
    if storage in QUANTIZED:
        if "quantization_config" not in options:
            _cast_unquantized(base, dtype)
        _warn_of_unquantized_weights(base, storage)
    guard_linear4bit(base)
    if quant_storage is not None or shards_model():
        _hold_packed_as(base, dtype if quant_storage is None else DTYPES[quant_storage])
    freeze(base, task_type)
    if activation_checkpointing:
        enable_activation_checkpointing(base)
    base.config._commit_hash = commit_of(model, revision)  # which transformers has left out
    return_freed_memory()
    return base


def load_tokenizer(model: str | Path, *, revision: str = "main", config: Any = None) -> Any:
    """Load the tokenizer of a model; one without a pad token pads with eos (no embedding is added).

    Args:
        model: Hub id or local directory.
        revision: Branch, tag or commit of a hub id.
        config: What `load_config` has read, if it has been read: transformers would read it again.

    Raises:
        InputError: there is no tokenizer, or it has neither a pad nor an eos token.
    """
    _check_path(model)
    if config is None and not Path(model).is_dir():
        _check_on_hub(model, revision)  # transformers would ask for one file after the other
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(model), revision=revision, trust_remote_code=False, config=config
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model must have a tokenizer, got {str(model)!r}; save one beside it ({_line(error)})"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"model must have a tokenizer with a pad or an eos token, got {str(model)!r}; "
                "set its pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def share_pad_token(base: Any, tokenizer: Any) -> None:
    """Give the base the tokenizer's pad token, by which a decoder's classifier finds the end."""
    for config in (base.config, base.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def save_base(base: PreTrainedModel, directory: str | Path, tokenizer: Any = None) -> None:
    """Save the base as it is stored, quantized bytes included; `load_base` gives the same logits.

    Raises:
        InputError: the model carries an adapter, or only its upper blocks are resident.
    """
    if hasattr(base, "peft_config"):
        raise InputError(
            f"base must be a model without an adapter, got {type(base).__name__!r}; "
            "save the base before get_peft_model and the adapter with save_pretrained"
        )
    if hasattr(base, "residency"):
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


def guard_linear4bit(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weight, which breaks training after an evaluation.

    On a CPU with AVX512-BF16, in evaluation mode, bitsandbytes (0.50.2) repacks the weight in place
    for a kernel without a backward pass: gradients are wrong from then on, without an error, and
    the stored bytes have changed. `load_base` calls this; call it on models loaded otherwise.

    Raises:
        InputError: a weight is repacked already; its constants were rounded, so it is lost.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise InputError(
                    f"model must not have been evaluated yet, got a repacked weight in {name!r}; "
                    "load it again and call guard_linear4bit before its first forward pass"
                )
            module.support_avx512bf16_for_cpu = False


def _hold_packed_as(base: nn.Module, dtype: torch.dtype) -> None:
    """Let tensors of a floating-point dtype hold the bytes of 4-bit weights.

    A sharded weight comes back as a plain tensor; its layer then has to know the constants.
    """
    for module in base.modules():
        if isinstance(module, Linear4bit) and not module.weight.is_meta:
            weight: Any = module.weight
            if weight.numel() * weight.element_size() % dtype.itemsize:
                continue  # accelerate leaves such a weight whole
            weight.data = weight.data.flatten().view(dtype)[:, None]
            weight.quant_storage = module.quant_storage = dtype
            module.quant_state = weight.quant_state


@contextlib.contextmanager
def dequantized(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[int]:
    """Keep 4-bit layers dequantized for a while, so that no step pays for it; yield the bytes.

    The numbers are those that a step would compute, so results are the same. The quantized layers
    are put back at the end as they were.

    Args:
        modules: Where to look for 4-bit layers, at any depth.
        dtype: What the base computes in.
    """
    places = [
        (parent, name, child)
        for module in modules
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    size = 0
    try:
        for parent, name, child in places:
            stored: Any = child.weight
            weight = dequantize_4bit(stored.data, stored.quant_state).to(dtype)
            layer = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            if child.bias is not None:
                layer.bias = nn.Parameter(child.bias.data.to(dtype), requires_grad=False)
            parent._modules[name] = layer.train(child.training)
            size += weight.numel() * weight.element_size()
        yield size
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def base_digest(model: nn.Module, exclude: Callable[[str], bool] | None = None) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers.

    Quantized bytes and their constants (absmax, code books) are included. The names that PEFT puts
    around a base are taken off: a base has one digest, alone or under an adapter that is excluded.

    Args:
        model: The base, or a PeftModel on it.
        exclude: Tells from a name, as in ``state_dict``, whether to leave the tensor out.
    """
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    digest = hashlib.sha256()
    for name in sorted(tensors, key=_name_in_base):
        if exclude is not None and exclude(name):
            continue
        tensor = tensors[name].detach()
        if tensor.is_meta:  # of a block that is not resident: the checkpoint has a digest
            continue
        digest.update(f"{_name_in_base(name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _name_in_base(name: str) -> str:
    return re.sub(r"\.(base_layer|original_module)\.", ".", name.removeprefix("base_model.model."))


def _check_path(model: str | Path) -> None:
    if str(model).startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise InputError(
            f"model must be a hub id or an existing directory, got {str(model)!r}; check the path"
        )


def _check_on_hub(model: str | Path, revision: str) -> None:
    """Refuse a hub id of which nothing can be had."""
    try:
        cached_file(
            str(model), CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        raise _not_found(model, error) from error


def _not_found(model: str | Path, error: Exception) -> InputError:
    """Return what to say of a hub id, or a directory's name, that transformers does not find."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, LocalEntryNotFoundError):
        why = "the hub cannot be reached"
    elif isinstance(cause, GatedRepoError):
        why = "its repository on the hub is gated"
    elif isinstance(cause, RepositoryNotFoundError):
        why = "the hub has no such repository, or none that you may read"
    else:
        why = _line(error)
    return InputError(
        f"model must be a directory with a config.json or a hub id, got {str(model)!r}: there is "
        f"no such directory, and {why}; check name, network and access rights"
    )


def load_config(model: str | Path, revision: str = "main") -> Any:
    """Read the configuration of a hub id or a directory.

    Raises:
        InputError: there is none.
    """
    _check_path(model)
    try:
        return transformers.AutoConfig.from_pretrained(
            str(model), revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not Path(model).exists():
            raise _not_found(model, error) from error
        raise InputError(
            f"model must be a directory with a config.json or a hub id, got {str(model)!r}; check "
            f"what is there ({_line(error)})"
        ) from error


def _from_pretrained(auto_class: Any, model: str | Path, **options: Any) -> PreTrainedModel:
    try:
        with held("transformers.modeling_utils", "LOAD REPORT") as reports:
            base, differences = auto_class.from_pretrained(
                str(model),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
            if auto_class is not AUTO_CLASSES["CAUSAL_LM"] and _only_heads(base, differences):
                reports.clear()  # a checkpoint of a language model has no other
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"model must be one that {auto_class.__name__} loads from safetensors, "
            f"got {str(model)!r}; convert it or change the options ({_line(error)})"
        ) from error
    heads = tuple(f"{name}." for name in _head_names(base))
    base.has_new_head = any(name.startswith(heads) for name in differences["missing_keys"])
    return cast(PreTrainedModel, base)


def _only_heads(base: PreTrainedModel, differences: Mapping[str, Any]) -> bool:
    """Whether a checkpoint and a model differ in heads alone, as from_pretrained tells it."""
    of_backbone = {base.base_model_prefix, *(name for name, _ in base.base_model.named_children())}
    unread = {name for name in differences["unexpected_keys"] if ".pooler." not in name}
    return not differences["mismatched_keys"] and of_backbone.isdisjoint(
        name.split(".")[0] for name in unread | differences["missing_keys"]
    )


def _load_upper(
    model: str | Path,
    config: Any,
    task_type: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str,
    options: dict[str, Any],
    first_resident: int | None,
) -> PreTrainedModel:
    """Load the upper blocks and what is no block; leave the others on the meta device."""
    held = getattr(config, "quantization_config", None)
    options = dict(options)
    quantization = options.pop("quantization_config", held)
    quantizer = None
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=held is not None)
        config.quantization_config = quantizer.quantization_config

    def empty() -> PreTrainedModel:
        with torch.device("meta"):
            made = from_config(copy.deepcopy(config), task_type, dtype=dtype, **options)
        if quantizer is not None:
            quantizer.preprocess_model(model=made, dtype=dtype, device_map={"": str(device)})
        return made

    def finish(part: nn.Module) -> None:
        if held is not None:
            _cast_unquantized(part, dtype)
        guard_linear4bit(part)
        part.requires_grad_(False)

    base: Any = empty()
    name, blocks = find_blocks(base)
    first = len(blocks) // 2 if first_resident is None else first_resident
    if not 1 <= first <= len(blocks):
        raise InputError(
            f"first_resident must be from 1 to {len(blocks)}, got {first_resident!r}; it is the "
            "block above the lowest edited one"
        )
    checkpoint = Checkpoint(
        _weight_files(model, revision),
        empty(),
        dtype=dtype,
        device=device,
        quantizer=quantizer,
        finish=finish,
    )
    head = base.get_output_embeddings()
    # A classifier needs the tokens themselves to find the last one.
    keep = task_type != "CAUSAL_LM" or head is None or base.config.tie_word_embeddings
    checkpoint.read(
        base,
        lambda part: part is None or part >= first or (part == EMBEDDING and keep),
        device,
    )
    base.tie_weights()
    _initialize_head(base, task_type, device)
    lower = {id(module) for block in blocks[:first] for module in block.modules()}
    for module in base.modules():
        if id(module) not in lower:
            fill_buffers(base, module, device, recurse=False)
        elif isinstance(module, Linear4bit):
            count_as_stored(module)
    for part in (*base.children(), *blocks[first:]):
        if part is not base.base_model:
            checkpoint.check(part)
    if quantizer is not None:
        base.hf_quantizer = quantizer
        quantizer.postprocess_model(base)
    with contextlib.suppress(OSError):
        base.generation_config = transformers.GenerationConfig.from_pretrained(
            str(model), revision=revision
        )
    base.residency = Residency(base, checkpoint, first_resident=first, has_embedding=keep)
    # Two devices: the Trainer and accelerate leave such a model where it is.
    base.hf_device_map = {"": device, name: torch.device("meta")}
    base.eval()
    return cast(PreTrainedModel, base)


def _weight_files(model: str | Path, revision: str) -> list[Path]:
    """Return the safetensors files of a hub id or a directory."""

    def find(name: str) -> str | None:
        found: str | None = cached_file(
            str(model), name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return found

    try:
        index, whole = find("model.safetensors.index.json"), None
        if index is None:
            whole = find("model.safetensors")
            names = [] if whole is None else ["model.safetensors"]
        else:
            names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        files = [find(name) for name in names]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model must have readable safetensors, got {str(model)!r}; check it ({_line(error)})"
        ) from error
    if not files or None in files:
        raise InputError(
            f"model must have all of its safetensors, got {str(model)!r}; convert or download it"
        )
    return [Path(file) for file in files if file is not None]


def _initialize_head(base: Any, task_type: str, device: torch.device) -> None:
    """Give a classifier's head values where the checkpoint has none, as from_pretrained does."""
    for name in _head_names(base) if _has_head(task_type) else ():
        for module in base.get_submodule(name).modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                base._init_weights(module)


def count_as_stored(module: Linear4bit) -> None:
    """Give an empty layer the packed shape, by which PEFT counts parameters."""
    packed = torch.empty(-(-module.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
    module.weight = Params4bit(packed, requires_grad=False, bnb_quantized=True)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def set_labels(config: Any, task_type: str, num_labels: int | None) -> None:
    """Write into the config what a classifier reads there: its labels and the pad token."""
    if not _has_head(task_type):
        if num_labels is not None:
            raise InputError(
                f"num_labels must be left out with task_type {task_type}, got {num_labels!r}; "
                "only SEQ_CLS and TOKEN_CLS have a head"
            )
        return
    if num_labels is not None:
        if num_labels < 1:
            raise InputError(f"num_labels must be positive, got {num_labels!r}; count the classes")
        config.num_labels = num_labels
    if getattr(config, "pad_token_id", None) is None:
        # As in load_tokenizer: a decoder classifies from the last token that is not padding.
        eos = getattr(config, "eos_token_id", None)
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos


def quantization_options(
    model: str | Path, config: Any, storage: str, dtype: torch.dtype, task_type: str
) -> dict[str, Any]:
    """Return from_pretrained's options; a quantized checkpoint keeps its own, written to config."""
    skipped = None
    if _has_head(task_type):
        # transformers guesses the last layer, which misses heads of several layers or with a bias.
        with torch.device("meta"):
            skipped = [f"^{name}" for name in _head_names(from_config(config, task_type))]
    held = getattr(config, "quantization_config", None)
    if held is not None:
        held = held if isinstance(held, dict) else held.to_dict()
        _check_held_storage(model, held, storage)
        held["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        if skipped:
            held["llm_int8_skip_modules"] = (held.get("llm_int8_skip_modules") or []) + skipped
        config.quantization_config = held
    if held is not None or storage not in QUANTIZED:
        return {}
    quantization: Any = transformers.BitsAndBytesConfig
    return {
        "quantization_config": quantization(
            load_in_8bit=storage == "int8",
            load_in_4bit=storage != "int8",
            bnb_4bit_quant_type="nf4" if storage == "int8" else storage,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    }


def _check_held_storage(model: str | Path, held: dict[str, Any], storage: str) -> None:
    if held.get("load_in_8bit"):
        kind = "int8"
    elif held.get("load_in_4bit"):
        kind = held.get("bnb_4bit_quant_type", "fp4")
    else:
        raise InputError(
            f"model must be unquantized or quantized by bitsandbytes, got {str(model)!r} with "
            f"{held.get('quant_method')!r}; use another checkpoint of it"
        )
    if kind != storage:
        raise InputError(
            f"storage must be {kind} for {str(model)!r}, which is already quantized, "
            f"got {storage!r}; use {kind} or an unquantized checkpoint"
        )


def _has_head(task_type: str) -> bool:
    return task_type in ("SEQ_CLS", "TOKEN_CLS")


def from_config(config: Any, task_type: str, **options: Any) -> PreTrainedModel:
    """Build an untrained model of the task.

    Raises:
        InputError: the architecture has no such task.
    """
    try:
        model: PreTrainedModel = AUTO_CLASSES[task_type].from_config(config, **options)
    except ValueError as error:
        raise InputError(
            f"task_type must be one that {config.model_type} has, got {task_type!r}; use another "
            f"model or task ({_line(error)})"
        ) from error
    return model


def freeze(base: PreTrainedModel, task_type: str) -> None:
    """Make nothing trainable, make a head ready to be, and build no caches or input gradients."""
    base.config.use_cache = False
    base.requires_grad_(False)
    stop_input_gradients(base)
    for name in _head_names(base) if _has_head(task_type) else ():
        head = base.get_submodule(name).to(torch.float32)
        head.register_forward_pre_hook(_cast_input_to_own_dtype)


def _head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a classifier has outside its backbone, where they have weights."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and list(module.parameters())
    ]


def _cast_input_to_own_dtype(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(head.parameters()).dtype
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


def _cast_unquantized(base: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a quantized checkpoint left unquantized, which transformers keeps as it was."""
    for parameter in base.parameters():
        if parameter.is_meta:
            continue
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = dtype  # what it is dequantized to in the backward pass
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _warn_of_unquantized_weights(base: PreTrainedModel, storage: str) -> None:
    """Warn of matrices that bitsandbytes leaves alone, such as fused experts: memory is as before.

    Embeddings are left alone on purpose, and so is what lies outside the backbone (the head).
    """
    names = [
        f"{module_name}.{name}"
        for module_name, module in base.base_model.named_modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not isinstance(parameter, (Params4bit, Int8Params))
    ]
    if names:
        warnings.warn(
            f"{len(names)} weights cannot be stored as {storage} and keep full size: "
            f"{', '.join(names[:3])}{', ...' if names[3:] else ''}",
            stacklevel=3,
        )
