"""Loads the upper blocks of a base alone; the others are read when they run (``residency``)."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.heads import from_config, initialize_head
from lowmem_reft.base.hub import weight_files
from lowmem_reft.base.quantization import cast_unquantized, count_as_stored, guard_linear4bit
from lowmem_reft.base.residency import EMBEDDING, Checkpoint, Residency, fill_buffers
from lowmem_reft.errors import InputError


def load_upper(
    model: str | Path,
    config: Any,
    task_type: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str,
    options: dict[str, Any],
    first_resident: int | None,
) -> PreTrainedModel:
    """Load the upper blocks and what is no block; leave the others on the meta device.

    All as in ``load_base``; ``options`` are ``from_pretrained``'s further ones.

    Raises:
        InputError: There is no such block, or the checkpoint cannot be read in parts.
    """
    held = getattr(config, "quantization_config", None)
    options = dict(options)
    quantization = options.pop("quantization_config", held)
    quantizer = None
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=held is not None)
        config.quantization_config = quantizer.quantization_config

    empty = partial(_empty, config, task_type, dtype, str(device), quantizer, options)
    base: Any = empty()
    blocks = find_blocks(base)[1]
    first = len(blocks) // 2 if first_resident is None else first_resident
    if not 1 <= first <= len(blocks):
        raise InputError(
            f"first_resident must be from 1 to {len(blocks)}, got {first_resident!r}; it is the "
            "block above the lowest edited one"
        )
    checkpoint = Checkpoint(
        weight_files(model, revision),
        empty,
        dtype=dtype,
        device=device,
        quantizer=quantizer,
        finish=partial(_finish, dtype=None if held is None else dtype),
    )
    has_embedding = _read_upper(base, checkpoint, task_type, first)
    if quantizer is not None:
        base.hf_quantizer = quantizer
        quantizer.postprocess_model(base)
    with contextlib.suppress(OSError):
        base.generation_config = transformers.GenerationConfig.from_pretrained(
            str(model), revision=revision
        )
    Residency(base, checkpoint, first_resident=first, has_embedding=has_embedding).begin()
    base.eval()
    return cast(PreTrainedModel, base)


def _empty(
    config: Any, task_type: str, dtype: torch.dtype, device: str, quantizer: Any, options: Any
) -> PreTrainedModel:
    """Make the model on the meta device, prepared for quantization."""
    with torch.device("meta"):
        made = from_config(copy.deepcopy(config), task_type, dtype=dtype, **options)
    if quantizer is not None:
        quantizer.preprocess_model(model=made, dtype=dtype, device_map={"": device})
    return made


def _finish(part: nn.Module, dtype: torch.dtype | None) -> None:
    """Guard and freeze a part that was read; cast what a quantized checkpoint left as it was."""
    if dtype is not None:
        cast_unquantized(part, dtype)
    guard_linear4bit(part)
    part.requires_grad_(False)


def _read_upper(base: Any, checkpoint: Checkpoint, task_type: str, first: int) -> bool:
    """Read blocks from ``first`` on and what is no block; return whether the embedding is there."""
    blocks, device = find_blocks(base)[1], checkpoint.device
    head = base.get_output_embeddings()
    # A classifier needs the tokens themselves to find the last one.
    keep = bool(task_type != "CAUSAL_LM" or head is None or base.config.tie_word_embeddings)
    checkpoint.read(
        base,
        lambda part: part is None or part >= first or (part == EMBEDDING and keep),
        device,
    )
    base.tie_weights()
    initialize_head(base, task_type, device)
    lower = {id(module) for block in blocks[:first] for module in block.modules()}
    for module in base.modules():
        if id(module) not in lower:
            fill_buffers(base, module, device, recurse=False)
        elif isinstance(module, Linear4bit):
            count_as_stored(module)
    for part in (*base.children(), *blocks[first:]):
        if part is not base.base_model:
            checkpoint.check(part)
    elsewhere = {id(p) for block in blocks[:first] for p in block.parameters()}
    if not keep:
        elsewhere |= {id(p) for p in base.get_input_embeddings().parameters()}
    checkpoint.check_there(
        name for name, p in base.named_parameters() if p.is_meta and id(p) not in elsewhere
    )
    checkpoint.check_values(base)
    return keep
