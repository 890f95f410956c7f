"""The head of a task: which class loads it, its labels, what a classifier has of its own."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_reft.base.checkpointing import stop_input_gradients
from lowmem_reft.base.hub import first_line
from lowmem_reft.base.stored import in_one_line
from lowmem_reft.errors import InputError, is_of_the_machine

AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""Task type, as PEFT names it, to the class that loads it."""


_TEXT_ALONE = frozenset(
    {
        *("aya_vision", "deepseek_vl", "glm4v", "idefics3", "internvl", "lfm2_vl", "llava"),
        *("llava_next", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
        *("qwen3_vl_moe", "smolvlm"),
    }
)
"""Kinds of models for images and text whose language model is right on text alone: as it is in a
batch, step by step, and after a prompt. PaliGemma's, for one, reads an answer in both directions.
"""

_IGNORES_PADDING = frozenset({"rwkv"})


def auto_class(config: Any, task_type: str) -> Any:
    """Return the class that loads a model of a task.

    A language model inside one that sees images comes with it, where transformers has no class for
    the text alone: its blocks are those of the text (``blocks.find_blocks``).

    Raises:
        InputError: A kind of model that is not right on text alone, or in a batch.
    """
    if task_type != "CAUSAL_LM":
        return AUTO_CLASSES[task_type]
    kind = config.model_type
    if kind in _IGNORES_PADDING:
        raise InputError(
            f"model must be of a kind that passes over padding, got {kind}, whose answers depend "
            "on the prompts beside it; use another model"
        )
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AUTO_CLASSES[task_type]
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AUTO_CLASSES[task_type]  # which says what it knows
    if kind not in _TEXT_ALONE:
        raise InputError(
            f"model must be one that reads text alone, got {kind}, which needs images or is not "
            "known here to be right without; use a language model, or one for images and text "
            f"among {', '.join(sorted(_TEXT_ALONE))}"
        )
    return transformers.AutoModelForImageTextToText


def from_config(config: Any, task_type: str, **options: Any) -> PreTrainedModel:
    """Build an untrained model of the task.

    Raises:
        InputError: The architecture has no such task, or no such attention, or the configuration
            describes no model.
    """
    attention = options.get("attn_implementation")
    try:
        model: PreTrainedModel = auto_class(config, task_type).from_config(config, **options)
    except (ImportError, ValueError) as error:
        if attention and re.search("attn|attention|kernels", str(error), re.IGNORECASE):
            raise InputError(
                f"attn_implementation must be one that {config.model_type} has here, got "
                f"{attention!r}; leave it out, or write eager ({first_line(error)})"
            ) from error
        raise InputError(
            f"task_type must be one that {config.model_type} has, got {task_type!r}; use another "
            f"model or task ({first_line(error)})"
        ) from error
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise InputError(
            f"model must have a config.json that describes a {config.model_type}, got one of which "
            f"none can be built ({in_one_line(error)}); mend it"
        ) from error
    return model


def set_labels(config: Any, task_type: str, num_labels: int | None) -> None:
    """Write into the config what a classifier reads there: its labels and the pad token."""
    if not has_head(task_type):
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


def has_head(task_type: str) -> bool:
    """Return whether the task has a classifier's head."""
    return task_type in ("SEQ_CLS", "TOKEN_CLS")


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a classifier has outside its backbone, where they have weights."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and list(module.parameters())
    ]


def initialize_head(base: Any, task_type: str, device: torch.device) -> None:
    """Give a classifier's head values where the checkpoint has none, as from_pretrained does."""
    for name in head_names(base) if has_head(task_type) else ():
        for module in base.get_submodule(name).modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                base._init_weights(module)


def freeze(base: PreTrainedModel, task_type: str) -> None:
    """Make nothing trainable, make a head ready to be, and build no caches or input gradients."""
    base.config.use_cache = False
    base.requires_grad_(False)
    stop_input_gradients(base)
    for name in head_names(base) if has_head(task_type) else ():
        head = base.get_submodule(name).to(torch.float32)
        head.register_forward_pre_hook(_cast_input_to_own_dtype)


def _cast_input_to_own_dtype(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(head.parameters()).dtype
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
