"""From a method's options to its PEFT configuration: one builder per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from lowmem_reft.errors import InputError
from lowmem_reft.methods.table import Method, all_options, check_options, find_method, for_base
from lowmem_reft.methods.weights import WeightsConfig
from lowmem_reft.options import MethodOptions
from lowmem_reft.reft.config import ReftConfig, resolve_layers
from lowmem_reft.reft.lora_reft import LoraReftConfig

NUM_VIRTUAL_TOKENS = 20
"""As in PEFT's examples."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a builder goes by."""

    method: Method
    """The table's entry."""
    given: dict[str, Any]
    """The method's defaults with the user's options over them."""
    task_type: str
    """PEFT task type, for example CAUSAL_LM."""
    num_layers: int | None
    """Blocks of the base; None checks the options before there is one."""


def build_peft_config(
    options: MethodOptions, *, task_type: str, num_layers: int | None
) -> PeftConfig:
    """Build the PEFT configuration of a method; options that are not set take its defaults.

    ``num_layers``, the blocks of the base, resolve ``layers``; None checks the options before there
    is a base.

    Raises:
        InputError: An option breaks its rule or does not belong to the method.
    """
    method = find_method(options.method)
    check_options(options)
    if num_layers is not None:
        blocks = num_layers
        options = for_base(options, task_type=task_type, num_layers=lambda: blocks)
    request = Request(
        method=method,
        given=all_options(options),
        task_type=task_type,
        num_layers=num_layers,
    )
    return BUILDERS[method.family](request)


def _reft(request: Request) -> PeftConfig:
    return ReftConfig(task_type=request.task_type, **request.method.fixed, **request.given)


def _lora(request: Request) -> PeftConfig:
    return _on_layers(LoraConfig(**_lora_fields(request, "rank"), **request.method.fixed), request)


def _lora_reft(request: Request) -> PeftConfig:
    names = ("rank", "act", "init", "layers", "positions", "tie", "component", "dropout")
    reft = {name: request.given[name] for name in names if name in request.given}
    fields = _lora_fields(request, "lora_rank")
    return _on_layers(LoraReftConfig(**fields, reft={**request.method.fixed, **reft}), request)


def _lora_fields(request: Request, rank_name: str) -> dict[str, Any]:
    given = request.given
    rank = given.get(rank_name, 16)
    targets = given.get("target_modules")
    return {
        "task_type": request.task_type,
        "r": rank,
        "lora_alpha": given.get("alpha", 2 * rank),
        "lora_dropout": given.get("dropout", 0.0),
        "target_modules": split_targets(targets) if targets else "all-linear",
    }


def _on_layers(config: LoraConfig, request: Request) -> PeftConfig:
    """Restrict LoRA to the blocks that ``layers`` names."""
    layers = request.given.get("layers", "all")
    if layers != "all":
        # Set afterwards: the constructor refuses it beside the shorthand "all-linear", which PEFT
        # turns into a list of names before it looks at the layers (see ``attach.prepare_base``).
        config.layers_to_transform = resolve_layers(layers, request.num_layers)
    return config


def split_targets(target_modules: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [target.strip() for target in target_modules.split(",")]


def _ia3(request: Request) -> PeftConfig:
    return IA3Config(task_type=request.task_type)


def _ln_tuning(request: Request) -> PeftConfig:
    layers = request.given.get("layers", "all")
    targets = None  # all norms, found where the base is known: ``attach.prepare_base``
    if layers != "all":
        indices = "|".join(map(str, resolve_layers(layers, request.num_layers)))
        targets = rf"(?i).*\.({indices})\.(.*\.)?[^.]*(norm|ln_)[^.]*"
    return LNTuningConfig(task_type=request.task_type, target_modules=targets)


def _virtual_tokens(request: Request) -> PeftConfig:
    kind = request.method.fixed["kind"]
    if request.task_type != "CAUSAL_LM" and kind != "prefix":
        raise InputError(
            f"task_type must be CAUSAL_LM for method {kind!r}, got {request.task_type!r}: a "
            "classifier that is given embeddings cannot see where the text ends; choose prefix "
            "where the base reads keys and values, else another method"
        )
    common = {
        "task_type": request.task_type,
        "num_virtual_tokens": request.given.get("num_virtual_tokens", NUM_VIRTUAL_TOKENS),
    }
    if kind == "prefix":
        return PrefixTuningConfig(**common)
    if kind == "prompt":
        # From the vocabulary: the paper's choice, and of the size that embeddings have.
        return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **common)
    return PromptEncoderConfig(encoder_hidden_size=request.given["rank"], **common)


def _weights(request: Request) -> PeftConfig:
    return WeightsConfig(task_type=request.task_type, **request.method.fixed)


BUILDERS: dict[str, Callable[[Request], PeftConfig]] = {
    "reft": _reft,
    "lora": _lora,
    "lora_reft": _lora_reft,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "virtual_tokens": _virtual_tokens,
    "weights": _weights,
}
"""Family to what makes its configuration."""
