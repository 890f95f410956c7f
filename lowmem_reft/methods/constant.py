"""What an adapter leaves constant of its base: the blocks below the first that it changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lowmem_reft.base.blocks import SUBMODULE, base_of, find_blocks
from lowmem_reft.base.synthetic import base_on_meta
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import peft_notices_hidden, prepare_base
from lowmem_reft.methods.weights import WeightsConfig
from lowmem_reft.reft.layer import ReftLayer


def num_constant_blocks(model: Any) -> int:
    """Return how many blocks, from the first, have outputs that no adapter and no training changes.

    A block whose output is edited is itself constant: the edit comes after it. 0 means that nothing
    can be reused, for example because the embedding is trained. The model is a PeftModel with any
    method: ReFT, LoRA on some layers, ...
    """
    configs = getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning or isinstance(config, WeightsConfig) for config in configs):
        return 0
    base = base_of(model)
    name, blocks = find_blocks(base)
    changed = {id(parameter) for parameter in _changed_parameters(base)}
    backbone = name.partition(".")[0]
    # All names: an embedding that the head shares is trained in both places.
    for path, parameter in base.named_parameters(remove_duplicate=False):
        below = path.startswith(f"{backbone}.") and not path.startswith(f"{name}.")
        if below and id(parameter) in changed:
            return 0
    for index, block in enumerate(blocks):
        layer = getattr(block, SUBMODULE, None)
        is_edited = isinstance(layer, ReftLayer) and len(layer.reft_phi) > 0
        edit = {id(p) for p in layer.parameters()} if isinstance(layer, ReftLayer) else set()
        if changed & {id(parameter) for parameter in block.parameters()} - edit:
            return index
        if is_edited:
            return index + 1
    return len(blocks)


def lower_part(base: Any, num_blocks: int) -> list[nn.Module]:
    """Return what a step from stored constants does not need: lower blocks and the embedding.

    The embedding stays where the head shares it, and in a classifier, which looks for the last
    token (``load_base(resident="upper")`` keeps it as well).
    """
    part: list[nn.Module] = list(find_blocks(base)[1][:num_blocks])
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        part.append(embedding)
    return part


def find_first_resident(
    config: Any, peft_config: Any, *, task_type: str, num_labels: int | None = None
) -> int:
    """Return which block is the first that training with an adapter needs on the device.

    Raises:
        InputError: The adapter changes the first block or the embedding: nothing is constant.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # which weights there are does not depend on their storage
    base = base_on_meta(config, storage="fp32", task_type=task_type, num_labels=num_labels)
    peft_config = copy.deepcopy(peft_config)
    prepare_base(base, peft_config)
    with peft_notices_hidden():
        first = num_constant_blocks(get_peft_model(base, peft_config))
    if first == 0:
        raise InputError(
            "resident must be all for a method that changes the first block or the embedding, got "
            "upper; choose higher layers, for example upper:0.5"
        )
    return first


def adapter_parts(base: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a base that hold the tensors of adapters, trained or not, with names."""
    for prefix, module in base.named_modules():
        names: Iterable[str] = ()
        if isinstance(module, BaseTunerLayer):
            names = module.adapter_layer_names
        elif isinstance(module, ModulesToSaveWrapper):
            names = ("modules_to_save",)
        for name in names:
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                yield f"{prefix}.{name}", part


def _changed_parameters(base: Any) -> Iterator[nn.Parameter]:
    """Yield what is trained and what belongs to adapters, trained or not."""
    yield from (parameter for parameter in base.parameters() if parameter.requires_grad)
    for _, part in adapter_parts(base):
        yield from part.parameters()
