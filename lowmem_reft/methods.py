"""Named methods: what ``--methods`` accepts, and the PEFT configuration behind each.

To add a method, enter it in ``METHODS``; if it is neither ReFT nor LoRA, add its family's builder.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from lowmem_reft.errors import InputError
from lowmem_reft.options import MemoryOptions, MethodOptions, OptimOptions, Storage

if TYPE_CHECKING:
    from peft import PeftConfig

_REFT_OPTIONS = {
    "profile",
    "rank",
    "layers",
    "positions",
    "tie",
    "component",
    "act",
    "dropout",
    "init",
}
_LORA_OPTIONS = {"rank", "layers", "dropout", "alpha", "target_modules"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the method table."""

    family: Literal["reft", "lora"]
    """Which builder makes its configuration."""
    storage: Storage
    """How the base is stored unless the user says otherwise."""
    lr: float
    """Peak learning rate unless the user says otherwise."""
    about: str
    """One line for people."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that make the method what it is."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that the user may override."""


def _reft(intervention: str, about: str, **defaults: Any) -> Method:
    return Method(
        family="reft",
        storage="nf4",
        lr=9e-4,
        about=about,
        fixed={"intervention": intervention},
        defaults=defaults,
    )


METHODS: dict[str, Method] = {
    "loreft": _reft("loreft", "low-rank linear subspace ReFT on a 4-bit base"),
    "noreft": _reft("noreft", "LoReFT without the orthonormal constraint"),
    "direft": _reft("direft", "the paper's DiReFT: no constraint, no subtraction"),
    "orthogonal_direft": _reft("orthogonal_direft", "DiReFT with orthonormal rows"),
    "consreft": _reft("consreft", "sets the subspace to a learned constant"),
    "lobireft": _reft("lobireft", "a learned steering vector of bounded rank"),
    "red": _reft("red", "learned scale and bias", positions="all"),
    "bottleneck": _reft(
        "bottleneck", "series bottleneck adapters", positions="all", component="mlp_output", rank=8
    ),
    "lora": Method(
        family="lora", storage="bf16", lr=2e-4, about="LoRA on all linear layers, 16-bit base"
    ),
    "qlora": Method(
        family="lora", storage="nf4", lr=2e-4, about="LoRA on all linear layers, 4-bit base"
    ),
    "dora": Method(
        family="lora",
        storage="bf16",
        lr=2e-4,
        about="weight-decomposed LoRA, 16-bit base",
        fixed={"use_dora": True},
    ),
}


PROFILES: dict[str, dict[str, Any]] = {
    "fast": {"layers": "upper:0.5", "positions": "l3", "rank": 16},
    "balanced": {"layers": "upper:0.5", "positions": "all", "rank": 16},
    "paper": {"layers": "all", "positions": "f7+l7", "rank": 8},
}
"""Name to what ``--profile`` stands for: the less is edited, the more is computed once. Accuracy
and cost of each are in the README."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method with overrides, as one entry of ``--methods``."""

    label: str
    """The entry as it was written."""
    name: str
    """Key of ``METHODS``."""
    storage: Storage
    """How the base is stored."""
    options: MethodOptions
    """The method's own options."""
    optim_overrides: dict[str, Any]
    """Fields of ``OptimOptions`` that this entry overrides."""


def find_method(name: str) -> Method:
    """Return the table's entry for ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}; choose one")
    return METHODS[name]


def parse_methods(text: str) -> list[MethodSpec]:
    """Parse ``"loreft[rank=8,positions=f7+l7],qlora[lr=1e-3]"``.

    Overrides are fields of ``MethodOptions`` (``r`` is short for ``rank``) or ``OptimOptions``, or
    ``storage``.

    Raises:
        InputError: unknown method or override, a value of the wrong type, or two equal entries.
    """
    entries = [entry.strip() for entry in re.split(r",(?![^\[]*\])", text) if entry.strip()]
    if not entries:
        raise InputError(
            f"methods must name at least one method, got {text!r}; for example loreft,qlora"
        )
    repeated = {entry for entry in entries if entries.count(entry) > 1}
    if repeated:
        raise InputError(f"methods must be different, got {', '.join(repeated)} twice; drop one")
    return [_parse_method(entry) for entry in entries]


def _parse_method(entry: str) -> MethodSpec:
    match = re.fullmatch(r"(?P<name>[^\[\]]+)(?:\[(?P<overrides>[^\[\]]*)\])?", entry)
    if match is None:
        raise InputError(
            f"methods must look like name or name[key=value,...], got {entry!r}; mend it"
        )
    method = find_method(match["name"])
    own: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    storage: Any = method.storage
    for item in filter(None, (part.strip() for part in (match["overrides"] or "").split(","))):
        key, equals, value = item.partition("=")
        key = {"r": "rank"}.get(key.strip(), key.strip().replace("-", "_"))
        if equals and key == "storage":
            storage = _storage(value.strip(), entry)
        elif equals and key in _names(MethodOptions) - {"method"}:
            own[key] = _convert(MethodOptions, key, value.strip(), entry)
        elif equals and key in _names(OptimOptions):
            optim[key] = _convert(OptimOptions, key, value.strip(), entry)
        else:
            known = sorted(
                (_names(MethodOptions) | _names(OptimOptions) | {"storage"}) - {"method"}
            )
            raise InputError(
                f"overrides of {entry!r} must be among {', '.join(known)}, got {item!r}; mend it"
            )
    options = MethodOptions(method=match["name"], **own)
    _check_options(options)
    return MethodSpec(
        label=entry, name=match["name"], storage=storage, options=options, optim_overrides=optim
    )


def _storage(value: str, entry: str) -> str:
    if value not in get_args(Storage):
        raise InputError(
            f"storage in {entry!r} must be one of {', '.join(get_args(Storage))}, got {value!r}; "
            "mend it"
        )
    return value


def _names(cls: type) -> set[str]:
    return {item.name for item in fields(cls)}


def _convert(cls: type, key: str, value: str, entry: str) -> Any:
    kind = get_type_hints(cls)[key]
    kinds = getattr(kind, "__args__", (kind,))
    for target in (int, float):
        if target in kinds:
            try:
                return target(value)
            except ValueError:
                wanted = "a whole number" if target is int else "a number"
                raise InputError(
                    f"{key} in {entry!r} must be {wanted}, got {value!r}; mend it"
                ) from None
    return value


def _given(options: MethodOptions) -> dict[str, Any]:
    values = {item.name: getattr(options, item.name) for item in fields(options)}
    del values["method"]
    return {key: value for key, value in values.items() if value is not None}


def _check_options(options: MethodOptions) -> None:
    allowed = _REFT_OPTIONS if find_method(options.method).family == "reft" else _LORA_OPTIONS
    wrong = sorted(set(_given(options)) - allowed)
    if wrong:
        raise InputError(
            f"{', '.join(wrong)} must not be given with method {options.method!r}; it takes "
            f"{', '.join(sorted(allowed))}"
        )


def resolve_learning_rate(options: MethodOptions, optim: OptimOptions) -> OptimOptions:
    """Fill in the method's own learning rate where none is given."""
    return replace(optim, lr=find_method(options.method).lr) if optim.lr is None else optim


def build_peft_config(
    options: MethodOptions, *, task_type: str, num_layers: int | None
) -> PeftConfig:
    """Build the PEFT configuration of a method.

    Args:
        options: the user's choice; unset fields take the method's defaults.
        task_type: PEFT task type, for example CAUSAL_LM.
        num_layers: blocks of the base, to resolve ``layers`` for LoRA; None checks the options
            before there is a base.

    Raises:
        InputError: an option breaks its rule or does not belong to the method.
    """
    method = find_method(options.method)
    _check_options(options)
    user = _given(options)
    profile = PROFILES.get(user.pop("profile", ""), {})
    given = {**method.defaults, **user}
    if method.family == "reft":
        from lowmem_reft.config import ReftConfig
        from lowmem_reft.interventions import intervention_options

        name = method.fixed["intervention"]
        read = {"layers", "positions", *intervention_options(name)}
        profile = {key: value for key, value in profile.items() if key in read}
        given = {**method.defaults, **profile, **user}
        unread = {"rank", "act", "init"} & set(given) - set(intervention_options(name))
        if unread:
            raise InputError(
                f"{', '.join(sorted(unread))} must not be given with method {options.method!r}, "
                "which has none; leave it out"
            )
        return ReftConfig(task_type=task_type, **method.fixed, **given)
    return _lora_config(task_type, num_layers, given, method.fixed)


def check_target_modules(options: MethodOptions, model: str, *, task_type: str) -> None:
    """Refuse ``target_modules`` that the base has not got, before its weights are loaded.

    Args:
        options: the method; without ``target_modules`` nothing is done.
        model: hub id or directory of the base.
        task_type: PEFT task type, for example CAUSAL_LM.

    Raises:
        InputError: a name is no linear layer's, or there is no configuration.
    """
    if options.target_modules is None:
        return
    import torch

    from lowmem_reft.base import from_config, load_config

    with torch.device("meta"):
        _check_targets(options.target_modules, from_config(load_config(model), task_type))


def _check_targets(target_modules: str, base: Any) -> None:
    """Refuse a name that no linear layer has: PEFT would leave it out if another one matches."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = base.named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    for target in _split_targets(target_modules):
        # By PEFT's rule: a whole name, or the end of one.
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(
                f"target_modules must name linear layers of the base, got {target!r}; choose among "
                f"{', '.join(known)}"
            )


def _split_targets(target_modules: str) -> list[str]:
    return [target.strip() for target in target_modules.split(",")]


def attach(
    base: Any, options: MethodOptions, *, task_type: str, memory: MemoryOptions, chunked_loss: bool
) -> Any:
    """Put a method's adapter on a base, switch on what saves memory, and give it our loss.

    Args:
        base: the frozen base, on its device.
        options: the method.
        task_type: PEFT task type, for example CAUSAL_LM.
        memory: how memory is saved.
        chunked_loss: whether a causal model's loss is ours; else its own, with all logits.

    Raises:
        InputError: the base, the method or a way to save memory does not go with the others.
    """
    from peft import get_peft_model

    from lowmem_reft.blocks import device_of, find_blocks
    from lowmem_reft.loss import use_chunked_loss
    from lowmem_reft.techniques import save_memory

    config = build_peft_config(options, task_type=task_type, num_layers=len(find_blocks(base)[1]))
    if options.target_modules is not None:
        _check_targets(options.target_modules, base)
    # On the meta device PEFT would otherwise draw an adapter's values on the CPU.
    device = device_of(base)
    with device if device.type == "meta" else nullcontext():
        model: Any = get_peft_model(base, config)
    save_memory(model, memory)
    if chunked_loss and task_type == "CAUSAL_LM":
        use_chunked_loss(model)
    return model


def _lora_config(
    task_type: str, num_layers: int | None, given: dict[str, Any], fixed: dict[str, Any]
) -> PeftConfig:
    from peft import LoraConfig

    from lowmem_reft.config import resolve_layers

    rank = given.get("rank", 16)
    targets = given.get("target_modules")
    layers = given.get("layers", "all")
    config = LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=given.get("alpha", 2 * rank),
        lora_dropout=given.get("dropout", 0.0),
        target_modules=_split_targets(targets) if targets else "all-linear",
        **fixed,
    )
    if layers != "all":
        # Set afterwards: the constructor refuses it beside the shorthand "all-linear", which PEFT
        # turns into a list of names before it looks at the layers.
        config.layers_to_transform = resolve_layers(layers, num_layers)
    return config
