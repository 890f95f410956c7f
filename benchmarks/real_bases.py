"""Accuracy on two bases with real knowledge: fourteen methods, twelve sets, three seeds.

``python -m benchmarks.real_bases --base smollm2 --model DIR --data-dir DIR --output-dir OUT`` runs
one ``lowmem-reft compare`` per set of the base, into ``OUT/SET``. Bases: SmolLM2-135M-Instruct
(causal, choices by likelihood, answers by generation, instructions by held-out loss) and a
MiniLM-L6 encoder with a new classification head. ``python -m benchmarks.collect OUT/* --output
FILE`` keeps the results, ``lowmem-reft report OUT/* ...`` makes the page.

Each method's learning rate is the best of four multiples of its own, by the validation rows of one
set per base (``--search``; no test row but one is read there), and is kept for the other sets. All
methods get the same rows, batches, steps and validation rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from lowmem_reft.compare import run_comparison
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import write_entry
from lowmem_reft.options import CompareOptions, OptimOptions, Workers, written

_LORA_REFT = {"rank": "8", "lora_rank": "1"}

METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "loreft, all": ("loreft", {"rank": "8", "positions": "all", "layers": "all"}),
    "loreft, every": ("loreft", {"rank": "8", "positions": "every", "layers": "all"}),
    "loreft, f7+l7": ("loreft", {"rank": "8", "positions": "f7+l7", "layers": "all"}),
    "loreft, upper": ("loreft", {"rank": "8", "positions": "all", "layers": "upper:0.5"}),
    "loreft, upper l3": ("loreft", {"rank": "8", "positions": "l3", "layers": "upper:0.5"}),
    "lora_reft, upper": ("lora_reft", {**_LORA_REFT, "positions": "all", "layers": "upper:0.5"}),
    "lora_reft, upper l3": ("lora_reft", {**_LORA_REFT, "positions": "l3", "layers": "upper:0.5"}),
    "red_loreft": ("red_loreft", {"rank": "8"}),
    "red": ("red", {}),
    "bottleneck": ("bottleneck", {"rank": "8"}),
    "qlora": ("qlora", {"rank": "8"}),
    "qlora, equal": ("qlora", {"equal": "params"}),
    "qlora, upper r1": ("qlora", {"rank": "1", "layers": "upper:0.5"}),
    "qdora": ("qdora", {"rank": "8"}),
    "ia3": ("ia3", {}),
    "prefix": ("prefix", {}),
    "full": ("full", {}),
}
"""Entries by the names of ``--methods`` here, but for their learning rates."""

REFERENCE = "loreft[rank=8,positions=all,layers=all]"
"""What ``equal=params`` is equal to."""

SHARED_RATES = {
    "loreft, every": "loreft, all",
    "loreft, f7+l7": "loreft, all",
    "loreft, upper": "loreft, all",
    "loreft, upper l3": "loreft, upper",
    "red_loreft": "loreft, all",
    "lora_reft, upper l3": "lora_reft, upper",
    "qlora, equal": "qlora",
    "qlora, upper r1": "qlora",
    "qdora": "qlora",
}
"""Methods that take another one's rate where they have none: one search for a family."""

MULTIPLES = "0.3,1,3,10"
"""Of each method's own rate, in the search."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of a set is taken."""

    train: int
    validation: int
    scored: int
    epochs: float = 3
    batch_size: int = 8
    max_length: int = 192
    long_rows: Literal["cut", "drop"] = "cut"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base, its sets, and the learning rates that its search has chosen."""

    task_type: Literal["CAUSAL_LM", "SEQ_CLS"]
    sets: dict[str, Size]
    searched: str
    rates: dict[str, float]
    without: tuple[str, ...] = field(default_factory=tuple)
    """Methods that it refuses, or that are the same as another there."""


_CHOICES = Size(train=240, validation=100, scored=200)
_SENTENCES = Size(train=1600, validation=200, scored=400, batch_size=16, max_length=128)

BASES = {
    "smollm2": Base(
        task_type="CAUSAL_LM",
        sets={
            # In "the correct answer is answer2" all methods are at chance on 135 M parameters.
            **dict.fromkeys(
                ("trec", "sst2", "boolq", "arc-easy-cloze", "openbookqa-cloze"), _CHOICES
            ),
            "mawps": replace(_CHOICES, validation=32, scored=100),
            "ultrafeedback1k": Size(
                train=320,
                validation=80,
                scored=120,
                epochs=2,
                batch_size=4,
                max_length=320,
                long_rows="drop",  # two in three
            ),
        },
        searched="trec",
        rates={
            "loreft, all": 7.2e-4,
            "loreft, upper": 2.4e-3,
            "lora_reft, upper": 2.2e-3,
            "qlora": 5.3e-4,
            "red": 9e-3,
            "bottleneck": 2.7e-3,
            "ia3": 3e-2,
            "prefix": 3e-2,
            "full": 1e-4,
        },
    ),
    "minilm": Base(
        task_type="SEQ_CLS",
        sets={
            "sst2": replace(_SENTENCES, train=640),
            **dict.fromkeys(("mrpc", "rte", "stsb"), _SENTENCES),
            "cola": replace(_SENTENCES, train=3200),  # of fewer nothing is learned
        },
        searched="sst2",
        rates={
            "loreft, all": 2.9e-3,
            "loreft, upper": 5.9e-3,  # its own; SST-2 alone chose 2.9e-3 (all layers)
            "lora_reft, upper": 5.2e-3,
            "qlora": 6.5e-4,  # SST-2 alone chose 1.95e-3, with which it fails on STS-B
            "red": 9e-3,
            "bottleneck": 9e-3,
            "ia3": 9e-3,
            "full": 1e-4,
        },
        # A classifier has no answer to edit, or to stand before; transformers' BERT reads no keys
        # and values.
        without=("loreft, every", "loreft, upper l3", "lora_reft, upper l3", "prefix"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run."""

    base: Literal["smollm2", "minilm"]
    """Whose sets and sizes."""
    model: str
    """Hub id or directory of it."""
    data_dir: Path | None = None
    """Directory with the public files; default: their hub ids."""
    search: bool = False
    """Search the rates instead, on the set of the base that is for it."""
    sets: str | None = None
    """Comma-separated; default: all of the base."""
    methods: str | None = None
    """Semicolon-separated names of METHODS; default: all, or in the search one of each family."""
    seeds: str = "0,1,2"
    """Comma-separated."""
    forgetting: str | None = None
    """Held-out general text: see compare --forgetting."""
    workers: Workers = 1
    """Cells that run at the same time."""
    output_dir: Path = Path("real-bases")
    """A directory per set; finished cells there are not run again."""


def main(config: Config) -> int:
    """Run the comparisons, one after the other, and print one JSON object."""
    base = BASES[config.base]
    sets = [base.searched] if config.search else list(base.sets)
    if config.sets is not None:
        sets = config.sets.split(",")
        if set(sets) - set(base.sets):
            raise InputError(f"sets must be among {', '.join(base.sets)}, got {config.sets!r}")
    reports = {name: run_comparison(options_of(config, base, name)) for name in sets}
    print(json.dumps({name: report["rows"] for name, report in reports.items()}))
    return 0


def options_of(config: Config, base: Base, task: str) -> CompareOptions:
    """Return the comparison on a set: of the table, or of the search."""
    size = base.sets[task]
    options: dict[str, Any] = {
        "model": config.model,
        "task_type": base.task_type,
        "tasks": task,
        "data_dir": config.data_dir,
        "methods": ",".join(entries(config, base)),
        "seeds": config.seeds,
        "limit": size.train,
        "validation_limit": size.validation,
        "eval_limit": size.scored,
        "max_length": size.max_length,
        "long_rows": size.long_rows,
        "optim": OptimOptions(epochs=size.epochs, batch_size=size.batch_size),
        "workers": config.workers,
        "output_dir": config.output_dir / task,
        "quiet": True,
    }
    if config.search:
        # More rows to choose by, and no more test rows than a comparison must have.
        options |= {"lr_search": MULTIPLES, "seeds": "0", "eval_limit": 1}
        options["validation_limit"] = size.scored
    elif base.task_type == "CAUSAL_LM" and config.forgetting is not None:
        options |= {"forgetting": config.forgetting, "forgetting_limit": 12}
    if "equal=params" in options["methods"]:
        options["budget_reference"] = REFERENCE
    return written.build(CompareOptions, **options)


def entries(config: Config, base: Base) -> list[str]:
    """Return the methods as ``compare --methods`` takes them, with their rates unless searched."""
    names = [name for name in METHODS if name not in base.without]
    if config.search:
        names = [name for name in names if name not in SHARED_RATES]
    if config.methods is not None:
        names = [name.strip() for name in config.methods.split(";")]
        if set(names) - set(METHODS):
            raise InputError(f"methods must be among {'; '.join(METHODS)}, got {config.methods!r}")
    found = []
    for name in names:
        method, values = METHODS[name]
        if name == "red_loreft" and base.task_type == "SEQ_CLS":
            values = {**values, "positions": "all"}
        if not config.search:
            values = {**values, "lr": f"{_rate_of(name, base):g}"}
        found.append(write_entry(method, values))
    return found


def _rate_of(name: str, base: Base) -> float:
    return base.rates[name] if name in base.rates else _rate_of(SHARED_RATES[name], base)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
