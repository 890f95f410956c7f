"""The table of methods: what each is, where it comes from, its options and its defaults.

To add a method, enter it in ``METHODS``; if it is of no family that is there, add the family's
builder to ``configs.BUILDERS``. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lowmem_reft.errors import InputError
from lowmem_reft.options import MethodOptions, Storage, written
from lowmem_reft.options.values import QUANTIZED, check_choice

Family = Literal["reft", "lora", "lora_reft", "ia3", "ln_tuning", "virtual_tokens", "weights"]

PAPER = "arXiv 2404.03592"

WIDTH = 4096
RANK = 8
BLOCKS = 16
FEW_BLOCKS = 4
"""Fewer edited blocks than these bear no higher rate."""
DEFAULT_RANK = 8
"""Of an intervention that has one, as ``ReftConfig`` has it."""

DEEP = 12
"""Blocks from which on a base counts as deep; measured with 6 and with 30."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the method table."""

    family: Family
    """Which builder makes its configuration."""
    storage: Storage = "nf4"
    """How the base is stored unless the user says otherwise."""
    lr: float
    """Peak learning rate unless the user says otherwise, on a base of ``WIDTH`` (7B to 8B models),
    at rank ``RANK`` and with ``BLOCKS`` edited blocks."""
    lr_by_width: float = 0.0
    """Power of WIDTH / hidden size in the rate for another base; see ``Method.rate``."""
    lr_by_rank: float = 0.0
    """Power of RANK / rank in the rate at another rank."""
    lr_by_blocks: float = 0.0
    """Power of BLOCKS / edited blocks in the rate where others are edited."""
    about: str
    """One line for people."""
    source: str
    """The paper that describes it."""
    options: tuple[str, ...] = ()
    """Fields of ``MethodOptions`` that it takes."""
    size: str | None = None
    """The option that sets how many parameters it trains; None: nothing does."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that make the method what it is; none of them is in ``options``."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that the user may override."""
    deep: dict[str, Any] = field(default_factory=dict)
    """Where a causal language model of ``DEEP`` blocks or more is edited: see ``for_base``."""
    embedded: str = ""
    """Overrides for the tiny model that the package ships, which wants higher rates."""
    needs_cache: bool = False
    """What it trains reaches the base as keys and values in its cache."""
    allows_checkpointing: bool = True
    """False: recomputed blocks would not see what is trained."""
    allows_embedding_on_host: bool = True
    """False: the embedding is trained, so it stays where the optimizer is."""
    allows_resume: bool = True
    """False: what PEFT saves is not all that is trained."""
    allows_quantized: bool = True
    """False: it trains every weight, and integers take no gradient."""

    def rate(self, hidden_size: int, rank: int, blocks: int = BLOCKS) -> float:
        r"""Return the rate: lr · (WIDTH / hidden)^a · (RANK / rank)^b · (BLOCKS / blocks)^c.

        A step of Adam moves each entry of a matrix by about the rate, whatever the gradient's
        length. For W of rank × hidden numbers, Wh then moves by up to rate · √(hidden · rank)
        lengths of h: what is the same on every base is this product, hence a = b = 1/2 for edits
        that read h through W, and a = 1/2, b = 0 for LoRA, whose update is divided by the rank.
        Edits of several blocks add up as independent vectors do, hence c = 1/2 for those.
        What was measured is in benchmarks/LOG.md (2026-11-29 and 2026-11-30).
        """
        by_width, by_rank = WIDTH / hidden_size, RANK / rank
        by_blocks = BLOCKS / max(blocks, FEW_BLOCKS)
        rate = self.lr * by_width**self.lr_by_width * by_rank**self.lr_by_rank
        rate *= by_blocks**self.lr_by_blocks
        return float(f"{rate:.2g}")


_WHERE = ("profile", "layers", "positions", "tie", "component", "dropout")
_SOURCE = ("rank", "act", "init")
_WIDTH = ("rank", "act")
_ALL = {"positions": "all", "rank": DEFAULT_RANK}
_DEEP = {"layers": "upper:0.5", "positions": "l3"}
_EVERY = {"positions": "every"}  # new tokens too, as in their papers
_MLPS = {**_EVERY, "component": "mlp_output", "rank": 8}
_DORA: dict[str, Any] = {"use_dora": True}

# Name, options that it reads beside where it edits, defaults, overrides, and what it is.
_REFT: tuple[tuple[str, tuple[str, ...], dict[str, Any], str, str], ...] = (
    ("loreft", _SOURCE, _ALL, "rank=8,lr=4e-3", "low-rank linear subspace ReFT on a 4-bit base"),
    ("noreft", _SOURCE, _ALL, "rank=8,lr=4e-3", "LoReFT without the orthonormal constraint"),
    (
        "direft",
        _SOURCE,
        _ALL,
        "rank=8,lr=4e-3",
        "the paper's DiReFT: no constraint, no subtraction",
    ),
    ("orthogonal_direft", _SOURCE, _ALL, "rank=8,lr=4e-3", "DiReFT with orthonormal rows"),
    ("consreft", ("rank",), _ALL, "rank=8,lr=4e-3", "sets the subspace to a learned constant"),
    ("lobireft", ("rank",), _ALL, "rank=8,lr=5e-2", "a learned steering vector of bounded rank"),
    ("red", (), _EVERY, "lr=1e-2", "learned scale and bias of hidden vectors"),
    (
        "red_loreft",
        _SOURCE,
        {**_EVERY, "rank": DEFAULT_RANK},
        "rank=4,lr=4e-3",
        "LoReFT with a learned scale and bias beside it",
    ),
    ("steering", ("alpha",), _EVERY, "lr=1e-1", "a learned steering vector of full rank"),
    ("bottleneck", _WIDTH, _MLPS, "lr=1e-2", "series bottleneck adapters after the MLPs"),
    (
        "parallel_bottleneck",
        _WIDTH,
        _MLPS,
        "lr=1e-2",
        "parallel bottleneck adapters beside the MLPs",
    ),
)
_BY_SIZE: dict[str, Any] = {"lr": 9e-4, "lr_by_width": 0.5, "lr_by_rank": 0.5, "lr_by_blocks": 0.5}
_RATES = dict.fromkeys(("loreft", "noreft", "direft", "orthogonal_direft", "red_loreft"), _BY_SIZE)
_OTHER_PAPERS = {
    "red": "arXiv 2402.15179",
    "red_loreft": "arXiv 2402.15179 and 2404.03592",
    "steering": "arXiv 2308.10248; learned: arXiv 2406.00045",
    "bottleneck": "arXiv 1902.00751",
    "parallel_bottleneck": "arXiv 2110.04366",
}
_LORA: tuple[tuple[str, Storage, str, str, dict[str, Any]], ...] = (
    ("lora", "bf16", "LoRA on all linear layers, 16-bit base", "arXiv 2106.09685", {}),
    ("qlora", "nf4", "LoRA on all linear layers, 4-bit base", "arXiv 2305.14314", {}),
    ("dora", "bf16", "weight-decomposed LoRA, 16-bit base", "arXiv 2402.09353", _DORA),
    ("qdora", "nf4", "weight-decomposed LoRA, 4-bit base", "arXiv 2402.09353", _DORA),
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
    **{
        name: Method(
            family="reft",
            **_RATES.get(name, {"lr": 9e-4}),
            about=about,
            source=_OTHER_PAPERS.get(name, PAPER),
            options=(*options, *_WHERE),
            size="rank" if "rank" in options else "layers",
            fixed={"intervention": name},
            defaults=defaults,
            deep=_DEEP if defaults is _ALL else {},
            embedded=embedded,
        )
        for name, options, defaults, embedded, about in _REFT
    },
    **{
        name: Method(
            family="lora",
            storage=storage,
            lr=2e-4,
            lr_by_width=0.5,
            about=about,
            source=source,
            options=("rank", "layers", "dropout", "alpha", "target_modules"),
            size="rank",
            fixed=fixed,
            embedded="rank=8,lr=2e-3",
        )
        for name, storage, about, source, fixed in _LORA
    },
    "lora_reft": Method(
        family="lora_reft",
        lr=8e-4,  # measured on two bases, with a LoRA of rank 1
        lr_by_width=0.5,
        lr_by_blocks=0.5,
        about="LoReFT and a small LoRA on all linear layers, trained together, 4-bit base",
        source=PAPER,
        options=(
            *("rank", "lora_rank", "alpha", "target_modules", "act", "init"),
            *("layers", "positions", "tie", "component", "dropout"),
        ),
        size="lora_rank",
        fixed={"intervention": "loreft"},
        defaults={**_ALL, "lora_rank": 1},
        deep=_DEEP,
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
        needs_cache=True,
        allows_checkpointing=False,
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
        allows_resume=False,
        lr=1e-3,
        source="arXiv 2103.10385",
        defaults={"rank": 128},
        embedded="lr=1e-2",
    ),
    "full": _weights(
        "every weight of the base, in place; not on a quantized base",
        part="all",
        allows_quantized=False,
        allows_embedding_on_host=False,
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


MIXED_IN_A_BATCH = ("REFT", "LORA", "LORA_REFT")
"""PEFT types whose adapters each row of a batch can have one of."""

REPLACING_THE_BASE = "WEIGHTS"
"""The PEFT type whose adapters overwrite the base, so that there is one at a time."""

PROFILES: dict[str, dict[str, Any]] = {
    "fast": {"layers": "upper:0.5", "positions": "l3", "rank": 8},
    "balanced": {"layers": "upper:0.5", "positions": "all", "rank": 16},
    "paper": {"layers": "all", "positions": "f7+l7", "rank": 8},
}
"""Name to what ``--profile`` stands for: the less is edited, the more is computed once. Accuracy
and cost of such settings are in docs/choose.md."""


def find_method(name: str) -> Method:
    """Return the table's entry for ``name``.

    Raises:
        InputError: There is none.
    """
    check_choice("method", name, tuple(METHODS))
    return METHODS[name]


def given_options(options: MethodOptions) -> dict[str, Any]:
    """Return the options that the user has set, without the method's name."""
    items = written.values(options).items()
    return {name: value for name, value in items if value is not None and name != "method"}


def all_options(options: MethodOptions) -> dict[str, Any]:
    """Return the method's defaults with those of the profile and of the user over them."""
    method, user = find_method(options.method), given_options(options)
    profile = PROFILES.get(user.pop("profile", ""), {})
    profile = {key: value for key, value in profile.items() if key in method.options}
    return {**method.defaults, **profile, **user}


def for_base(
    options: MethodOptions, *, task_type: str, num_layers: Callable[[], int]
) -> MethodOptions:
    """Return the options with where a deep base is edited, if it is one and they do not say where.

    On a base of many blocks an edit of the upper ones learns as much or more, costs less and leaves
    other text alone; one of few blocks needs all (benchmarks/LOG.md, 2026-11-30).

    Args:
        options: The user's; a profile, layers or positions say where.
        task_type: PEFT task type: a classification head needs all blocks.
        num_layers: Returns the blocks of the base; called where they decide.
    """
    deep = find_method(options.method).deep
    if not deep or any((options.profile, options.layers, options.positions)):
        return options
    if task_type != "CAUSAL_LM" or num_layers() < DEEP:
        return options
    return replace(options, **deep)


def check_options(options: MethodOptions) -> None:
    """Refuse options that the method does not take.

    Raises:
        InputError: One does not belong to it; the message names those that do.
    """
    allowed = find_method(options.method).options
    wrong = sorted(set(given_options(options)) - set(allowed))
    if wrong:
        raise InputError(
            f"{', '.join(wrong)} must not be given with method {options.method!r}; it takes "
            f"{', '.join(sorted(allowed)) or 'no options'}"
        )


def check_storage(name: str, storage: str) -> None:
    """Refuse to train all weights of a base that is stored as 4- or 8-bit integers.

    Raises:
        InputError: The method cannot be trained on a base that is stored so.
    """
    if storage in QUANTIZED and not find_method(name).allows_quantized:
        raise InputError(
            f"storage must be fp32, bf16 or fp16 for method {name!r}, got {storage!r}: quantized "
            "weights are integers, which take no gradient; choose another storage, or qlora"
        )
