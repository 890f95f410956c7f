"""Finds the blocks of a transformer and the modules whose output is a component of one.

Works by structure rather than by a table of architectures: the blocks are the one ``ModuleList`` of
as many modules as the configuration has layers; their attention and MLP go by few names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowmem_reft.base.ours import ours
from lowmem_reft.errors import InputError

SUBMODULE = "reft"
"""Child of a block (or of a part of it) that edits its output: the name in state dicts."""

# The first match is what enters the residual stream. BERT-like blocks add the residual inside
# `output`, so it is the projection before that; Gemma 2, OLMo 2 and GLM 4 norm the sub-layer's
# output first; elsewhere it is the sub-layer's own output.
_SUBMODULES = {
    "block_output": ("",),
    "attention_output": (
        "attention.output.dense",
        "post_self_attn_layernorm",
        "self_attn",
        "attn",
        "self_attention",
        "attention",
    ),
    "mlp_output": (
        "output.dense",
        "post_mlp_layernorm",
        "post_feedforward_layernorm",
        "mlp",
        "feed_forward",
        "ffn",
    ),
}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's blocks.

    They are remembered, and looked for again where others have taken their place.

    Raises:
        InputError: No list of blocks is found, or the model is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            "model must be a decoder-only or encoder-only transformer, got "
            f"{type(model).__name__}; positions are not defined for encoder-decoder models here"
        )
    text = _text_config(model)
    num_layers = getattr(text, "num_hidden_layers", None)
    held = ours(model)
    if held.blocks is not None:
        name, blocks = held.blocks
        if len(blocks) == num_layers and _child(model, name) is blocks:
            return name, blocks
    # Beside a vision tower the blocks are in the part that is made of the text's configuration.
    parts = [
        (f"{name}.", module)
        for name, module in model.named_modules()
        if getattr(module, "config", None) is text
    ]
    start, part = parts[0] if text is not getattr(model, "config", None) and parts else ("", model)
    lists = [
        (start + name, module)
        for name, module in part.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists or not num_layers:
        raise InputError(
            f"model must have a ModuleList of config.num_hidden_layers={num_layers!r} blocks, got "
            f"{type(model).__name__}; this architecture is not supported"
        )
    # A vision tower or a list of norms may be as long: the blocks hold the most parameters.
    held.blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return held.blocks


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """Return what stands at a path in a module; None if nothing does."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def component_path(block: nn.Module, component: str, *, whole_sublayer: bool = False) -> str:
    """Return the path below ``block`` of the module whose output is ``component`` ("": itself).

    Args:
        block: One of the model's blocks.
        component: block_output, mlp_output or attention_output.
        whole_sublayer: Find the module of the sub-layer, whose input are hidden vectors too, even
            where its output is normed or projected by another one.

    Raises:
        InputError: The block has no such module.
    """
    names = dict(block.named_modules())
    candidates = _SUBMODULES[component]
    if whole_sublayer:
        # Where a part of it is named instead, residual and norm are inside the sub-layer's module.
        inside = any(name in names for name in candidates if "." in name)
        candidates = () if inside else tuple(name for name in candidates if "norm" not in name)
    elif component == "attention_output" and "post_feedforward_layernorm" in names:
        # Elsewhere (Llama) the norm of this name comes before the MLP.
        candidates = ("post_attention_layernorm", *candidates)
    for path in candidates:
        if path in names:
            return path
    instead = "another intervention" if whole_sublayer else "block_output"
    raise InputError(
        f"component must exist in {type(block).__name__}, got {component!r}; use {instead}"
    )


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden vectors that leave a block."""
    return int(_text_config(model).hidden_size)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def base_of(model: Any) -> Any:
    """Return the transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: Any) -> torch.device:
    """Return where the blocks compute; the embedding, and blocks on meta, may be elsewhere."""
    base = base_of(model)
    parameters = find_blocks(base)[1].parameters()
    first = next(parameters).device
    if first.type != "meta":
        return first
    residency = ours(base).residency  # there may be no block at all
    if residency is not None:
        first = residency.checkpoint.device
    return next((p.device for p in parameters if not p.is_meta), first)


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let something else run in a module's place for a while; the module's hooks stay."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
