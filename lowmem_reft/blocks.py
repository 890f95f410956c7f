"""Finds the blocks of a transformer and the modules whose output is a component of one.

Works by structure rather than by a table of architectures: the blocks are the one ``ModuleList`` of
as many modules as the configuration has layers; their attention and MLP go by few names.
"""

from __future__ import annotations

from torch import nn

from lowmem_reft.errors import InputError

# First match wins. BERT-like blocks add the residual inside `output`, so the component is the
# projection before it; in all others the sub-layer's own output is what enters the residual stream.
_SUBMODULES = {
    "block_output": ("",),
    "attention_output": (
        "attention.output.dense",
        "self_attn",
        "attn",
        "self_attention",
        "attention",
    ),
    "mlp_output": ("output.dense", "mlp", "feed_forward", "ffn"),
}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's blocks.

    Raises:
        InputError: no list of blocks is found, or the model is an encoder-decoder.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model must be a decoder-only or encoder-only transformer, got {type(model).__name__}; "
            "ReFT positions are not defined for encoder-decoder models here"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists:
        raise InputError(
            f"model must have a ModuleList of config.num_hidden_layers={num_layers!r} blocks, got "
            f"{type(model).__name__}; this architecture is not supported"
        )
    # A vision tower or a list of norms may have the same length: the blocks hold the most parameters.
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def component_path(block: nn.Module, component: str) -> str:
    """Return the path below ``block`` of the module whose output is ``component`` ("" is the block).

    Raises:
        InputError: the block has no such module.
    """
    names = dict(block.named_modules())
    for path in _SUBMODULES[component]:
        if path in names:
            return path
    raise InputError(
        f"component must exist in {type(block).__name__}, got {component!r}; use block_output"
    )


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden vectors that leave a block."""
    config = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text_config.hidden_size)
