"""The table of methods: what each is, where it comes from, its options and its defaults.

To add a method, enter it in ``METHODS``; if it is of no family that is there, add the family's
builder to ``method_configs.BUILDERS``. No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lowmem_reft.errors import InputError
from lowmem_reft.options import Storage
from lowmem_reft.options.values import QUANTIZED

Family = Literal["reft", "lora", "lora_reft", "ia3", "ln_tuning", "virtual_tokens", "weights"]

REFT = "arXiv 2404.03592"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the method table."""

    family: Family
    """Which builder makes its configuration."""
    storage: Storage = "nf4"
    """How the base is stored unless the user says otherwise."""
    lr: float
    """Peak learning rate unless the user says otherwise."""
    about: str
    """One line for people."""
    source: str
    """The paper that describes it."""
    options: tuple[str, ...] = ()
    """Fields of ``MethodOptions`` that it takes."""
    size: str | None = None
    """The option that sets how many parameters it trains; None: nothing does."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that make the method what it is."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that the user may override."""
    embedded: str = ""
    """Overrides for the tiny model that the package ships, which wants higher rates."""


_WHERE = ("profile", "layers", "positions", "tie", "component", "dropout")
_LORA = ("rank", "layers", "dropout", "alpha", "target_modules")


def _reft(about: str, *options: str, intervention: str, source: str = REFT, **rest: Any) -> Method:
    """An intervention; ``options`` are those that it reads beside where it edits."""
    return Method(
        family="reft",
        **{"lr": 9e-4, "size": "rank" if "rank" in options else "layers", **rest},
        about=about,
        source=source,
        options=(*options, *_WHERE),
        fixed={"intervention": intervention},
    )


def _lora(about: str, *, source: str, storage: Storage, embedded: str, **fixed: Any) -> Method:
    return Method(
        family="lora",
        storage=storage,
        lr=2e-4,
        about=about,
        source=source,
        options=_LORA,
        size="rank",
        fixed=fixed,
        embedded=embedded,
    )


def _virtual_tokens(about: str, *options: str, kind: str, **rest: Any) -> Method:
    return Method(
        family="virtual_tokens",
        **rest,
        about=about,
        options=("num_virtual_tokens", *options),
        size="rank" if "rank" in options else "num_virtual_tokens",
        fixed={"kind": kind},
    )


def _weights(about: str, *, part: str, **rest: Any) -> Method:
    return Method(family="weights", storage="fp32", about=about, fixed={"part": part}, **rest)


METHODS: dict[str, Method] = {
    "loreft": _reft(
        "low-rank linear subspace ReFT on a 4-bit base",
        *("rank", "act", "init"),
        intervention="loreft",
        embedded="rank=8,lr=4e-3",
    ),
    "noreft": _reft(
        "LoReFT without the orthonormal constraint",
        *("rank", "act", "init"),
        intervention="noreft",
        embedded="rank=8,lr=4e-3",
    ),
    "direft": _reft(
        "the paper's DiReFT: no constraint, no subtraction",
        *("rank", "act", "init"),
        intervention="direft",
        embedded="rank=8,lr=4e-3",
    ),
    "orthogonal_direft": _reft(
        "DiReFT with orthonormal rows",
        *("rank", "act", "init"),
        intervention="orthogonal_direft",
        embedded="rank=8,lr=4e-3",
    ),
    "consreft": _reft(
        "sets the subspace to a learned constant",
        "rank",
        intervention="consreft",
        embedded="rank=8,lr=4e-3",
    ),
    "lobireft": _reft(
        "a learned steering vector of bounded rank",
        "rank",
        intervention="lobireft",
        embedded="rank=8,lr=5e-2",
    ),
    "red": _reft(
        "learned scale and bias of hidden vectors",
        intervention="red",
        source="arXiv 2402.15179",
        defaults={"positions": "all"},
        embedded="lr=1e-2",
    ),
    "steering": _reft(
        "a learned steering vector of full rank",
        "alpha",
        intervention="steering",
        source="arXiv 2308.10248; learned: arXiv 2406.00045",
        defaults={"positions": "all"},
        embedded="positions=l1,lr=1e-1",
    ),
    "bottleneck": _reft(
        "series bottleneck adapters after the MLPs",
        *("rank", "act"),
        intervention="bottleneck",
        source="arXiv 1902.00751",
        defaults={"positions": "all", "component": "mlp_output", "rank": 8},
        embedded="lr=1e-2",
    ),
    "parallel_bottleneck": _reft(
        "parallel bottleneck adapters beside the MLPs",
        *("rank", "act"),
        intervention="parallel_bottleneck",
        source="arXiv 2110.04366",
        defaults={"positions": "all", "component": "mlp_output", "rank": 8},
        embedded="lr=1e-2",
    ),
    "lora": _lora(
        "LoRA on all linear layers, 16-bit base",
        source="arXiv 2106.09685",
        storage="bf16",
        embedded="rank=8,lr=2e-3",
    ),
    "qlora": _lora(
        "LoRA on all linear layers, 4-bit base",
        source="arXiv 2305.14314",
        storage="nf4",
        embedded="rank=8,lr=2e-3",
    ),
    "dora": _lora(
        "weight-decomposed LoRA, 16-bit base",
        source="arXiv 2402.09353",
        storage="bf16",
        embedded="rank=8,lr=2e-3",
        use_dora=True,
    ),
    "qdora": _lora(
        "weight-decomposed LoRA, 4-bit base",
        source="arXiv 2402.09353",
        storage="nf4",
        embedded="rank=8,lr=2e-3",
        use_dora=True,
    ),
    "lora_reft": Method(
        family="lora_reft",
        lr=4e-4,
        about="LoRA on all linear layers and LoReFT, trained together, 4-bit base",
        source=REFT,
        options=(
            *("rank", "lora_rank", "alpha", "target_modules", "act", "init"),
            *("layers", "positions", "tie", "component", "dropout"),
        ),
        size="lora_rank",
        fixed={"intervention": "loreft"},
        embedded="rank=8,lora_rank=8,lr=2e-3",
    ),
    "ia3": Method(
        family="ia3",
        lr=3e-3,
        about="learned scales of keys, values and MLP activations",
        source="arXiv 2205.05638",
        embedded="lr=5e-2",
    ),
    "ln_tuning": Method(
        family="ln_tuning",
        lr=1e-3,
        about="the base's norm layers, as trained copies",
        source="arXiv 2312.11420",
        options=("layers",),
        size="layers",
        embedded="lr=3e-2",
    ),
    "prefix": _virtual_tokens(
        "prefix tuning: trained keys and values before the prompt",
        kind="prefix",
        lr=1e-2,
        source="arXiv 2101.00190",
        embedded="lr=3e-2",
    ),
    "prompt": _virtual_tokens(
        "prompt tuning: trained embeddings before the prompt",
        kind="prompt",
        lr=3e-2,
        source="arXiv 2104.08691",
        embedded="lr=3e-1",
    ),
    "p_tuning": _virtual_tokens(
        "P-tuning: embeddings before the prompt, made by a trained network",
        "rank",
        kind="p_tuning",
        lr=1e-3,
        source="arXiv 2103.10385",
        defaults={"rank": 128},
        embedded="lr=1e-2",
    ),
    "full": _weights(
        "every weight of the base, in place; not on a quantized base",
        part="all",
        lr=1e-5,
        source="-",
        embedded="lr=1e-3",
    ),
    "bitfit": _weights(
        "the base's bias terms, in place; not for bases without any, such as Llama",
        part="bias",
        lr=4e-4,
        source="arXiv 2106.10199",
    ),
    "head": _weights(
        "the head alone, in place: a linear probe; not where it is the input embedding too",
        part="head",
        lr=1e-3,
        source="-",
    ),
}


PROFILES: dict[str, dict[str, Any]] = {
    "fast": {"layers": "upper:0.5", "positions": "l3", "rank": 16},
    "balanced": {"layers": "upper:0.5", "positions": "all", "rank": 16},
    "paper": {"layers": "all", "positions": "f7+l7", "rank": 8},
}
"""Name to what ``--profile`` stands for: the less is edited, the more is computed once. Accuracy
and cost of such settings are in docs/choose.md."""


def find_method(name: str) -> Method:
    """Return the table's entry for ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}; choose one")
    return METHODS[name]


def check_storage(name: str, storage: str) -> None:
    """Refuse to train all weights of a base that is stored as 4- or 8-bit integers.

    Raises:
        InputError: the method cannot be trained on a base that is stored so.
    """
    if find_method(name).fixed.get("part") == "all" and storage in QUANTIZED:
        raise InputError(
            f"storage must be fp32, bf16 or fp16 for method {name!r}, got {storage!r}: quantized "
            "weights are integers, which take no gradient; choose another storage, or qlora"
        )
