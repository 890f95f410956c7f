"""GLUE with an encoder: table 4 of the ReFT paper, eight sets, settings of their own for each.

Aim: RoBERTa-base and -large with LoReFT and DiReFT of rank 1 on all layers at the first tokens, and
a trained classification head. Half of the public validation rows (1,000 where there are more than
5,000) chooses the epoch, the other half is scored; metrics are the paper's (Matthews correlation
for CoLA, Pearson for STS-B, accuracy else).

    python recipes/glue.py --model FacebookAI/roberta-base
    python recipes/glue.py --model DIR --data-dir DIR --tasks rte,cola,mrpc --limit 500 --seeds 42
    python recipes/glue.py --small --model nreimers/MiniLM-L6-H384-uncased --data-dir DIR

The third form is for an encoder of 20 to 100 million parameters and a processor: SST-2, MRPC, CoLA,
RTE and STS-B, each trained on 500 of its rows for three epochs and scored once on 200, LoReFT
beside LoRA with one seed and settings of this recipe's, for so few steps. With MiniLM-L6 (2026-12,
one thread of an EPYC with other work beside it, 16 minutes) LoReFT had SST-2 75.0, MRPC 63.5, CoLA
0.0, RTE 53.2 and STS-B 56.9, LoRA 76.0, 63.5, 0.0, 55.4 and 13.7: so few rows teach an encoder
without knowledge of the sets little of CoLA, MRPC and RTE.

The paper counts the parameters of the interventions without those of the head, so the table does
too; the head's are printed below it. "Untied" has no effect on positions of one side: the table's
0.015 % are one intervention per layer.

Difference from the paper: where MRPC is read from its original files (msr_paraphrase_*.txt), a
tenth of the training rows chooses and the original test rows are scored.

Expected memory (predicted by ``lowmem-reft plan``, 32 × 256 tokens, fp32): RoBERTa-base 3.9 GiB,
-large 10.5. Expected scores: the paper's rows below; not repeated here, for want of the models.
2026-11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paper import (
    PaperConfig,
    Setting,
    compare,
    print_tasks,
    read_rows,
    run_recipe,
    with_overrides,
)
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import safe_open

from lowmem_reft.base import load_config
from lowmem_reft.data.tasks.registry import find_task
from lowmem_reft.errors import InputError
from lowmem_reft.methods import parse_methods
from lowmem_reft.options import OptimOptions, Storage

Size = Literal["base", "large"]

TASKS = {
    "mnli": "MNLI",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "cola": "CoLA",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "stsb": "STS-B",
}

SMALL = Setting(
    methods="loreft[rank=8,layers=upper:0.5,positions=all,lr=2.9e-3],lora[rank=8,lr=2e-3]",
    tasks="sst2,mrpc,cola,rte,stsb",
    seeds="42",
    num_train=500,
    num_validation=200,
    num_scored=200,
    max_length=96,
    optim=OptimOptions(epochs=3, batch_size=16, warmup_ratio=0.1),
)
"""Of a small encoder; rank 1 at the paper's rates needs its 40 to 60 epochs."""

COLUMNS = ("positions", "dropout", "lr", "weight_decay", "batch_size", "warmup_ratio", "epochs")
SETTINGS: dict[tuple[str, Size], str] = {
    ("loreft", "base"): """
        mnli f1  0.05 6e-4 0     32 0.06  40
        sst2 f3  0.10 6e-4 0     32 0.1   40
        mrpc f3  0.05 3e-4 0     32 0     40
        cola f3  0.20 4e-4 0     32 0.005 60
        qnli f11 0.05 9e-4 0     32 0.1   20
        qqp  f11 0.05 6e-4 0     32 0     40
        rte  f3  0.05 9e-4 0     32 0     60
        stsb f3  0.05 6e-4 0     32 0.03  60""",
    ("loreft", "large"): """
        mnli f1  0.05 6e-4 0     32 0     20
        sst2 f3  0.05 6e-4 0     32 0.10  20
        mrpc f3  0.20 3e-4 0     32 0.06  30
        cola f3  0.20 1e-4 0     32 0.20  30
        qnli f11 0.05 9e-4 0     32 0.10  20
        qqp  f11 0.05 6e-4 0     32 0.06  20
        rte  f3  0.05 6e-4 0     32 0     30
        stsb f3  0.05 8e-4 0     32 0.20  30""",
    ("direft", "base"): """
        mnli f1  0.05 6e-4 0     32 0.06  40
        sst2 f3  0.10 6e-4 0     32 0.1   40
        mrpc f5  0.05 3e-4 0     32 0.1   40
        cola f1  0    6e-4 0.04  32 0     60
        qnli f11 0.05 9e-4 0     32 0.1   20
        qqp  f11 0.05 6e-4 0     32 0     40
        rte  f1  0    9e-4 0.04  8  0     60
        stsb f3  0.05 6e-4 0     32 0.03  60""",
    ("direft", "large"): """
        mnli f1  0.05 6e-4 0     32 0     20
        sst2 f3  0.05 6e-4 0     32 0.1   20
        mrpc f1  0.10 9e-4 0     32 0     50
        cola f1  0.15 9e-4 0     32 0     60
        qnli f11 0.05 9e-4 0     32 0.1   20
        qqp  f7  0.05 9e-4 0     32 0.1   20
        rte  f3  0.05 6e-4 6e-3  32 0     30
        stsb f3  0.05 8e-4 0     32 0.1   30""",
}
"""The paper's hyperparameters per set; a column each of ``COLUMNS``."""

PAPER = read_rows(
    """
    RoBERTa-base  | FT, quoted         | 100   | 87.3 94.4 87.9 62.4 92.5 91.7 78.3 90.6 | 85.6
    RoBERTa-base  | Adapter, quoted    | 0.318 | 87.0 93.3 88.4 60.9 92.5 90.5 76.5 90.5 | 85.0
    RoBERTa-base  | LoRA, quoted       | 0.239 | 86.6 93.9 88.7 59.7 92.6 90.4 75.3 90.3 | 84.7
    RoBERTa-base  | AdapterFNN, quoted | 0.239 | 87.1 93.0 88.8 58.5 92.0 90.2 77.7 90.4 | 84.7
    RoBERTa-base  | BitFit, quoted     | 0.080 | 84.7 94.0 88.0 54.0 91.0 87.3 69.8 89.5 | 82.3
    RoBERTa-base  | RED, quoted        | 0.016 | 83.9 93.9 89.2 61.0 90.7 87.2 78.0 90.4 | 84.3
    RoBERTa-base  | DiReFT             | 0.015 | 82.5 92.6 88.3 58.6 91.3 86.4 76.4 89.3 | 83.2
    RoBERTa-base  | LoReFT             | 0.015 | 83.1 93.4 89.2 60.4 91.2 87.4 79.0 90.0 | 84.2
    RoBERTa-large | FT, quoted         | 100   | 88.8 96.0 91.7 68.2 93.8 91.5 85.8 92.6 | 88.6
    RoBERTa-large | Adapter, quoted    | 0.254 | 90.1 95.2 90.5 65.4 94.6 91.4 85.3 91.5 | 88.0
    RoBERTa-large | LoRA, quoted       | 0.225 | 90.2 96.0 89.8 65.5 94.7 90.7 86.3 91.7 | 88.1
    RoBERTa-large | AdapterFNN, quoted | 0.225 | 90.3 96.1 90.5 64.4 94.3 91.3 84.8 90.2 | 87.7
    RoBERTa-large | RED, quoted        | 0.014 | 89.5 96.0 90.3 68.1 93.5 88.8 86.2 91.3 | 88.0
    RoBERTa-large | DiReFT             | 0.014 | 88.7 95.4 88.5 66.7 93.9 88.1 86.9 91.2 | 87.4
    RoBERTa-large | LoReFT             | 0.014 | 89.2 96.2 90.1 68.0 94.1 88.5 87.5 91.6 | 88.2
    """
)
NOTE = (
    "Paper: mean of five seeds, in %; quoted rows are from Wu et al. 2024 (RED). Parameters are "
    "without the head's. On RoBERTa-base LoReFT is behind full fine-tuning, adapters and LoRA. "
    "Measured: means over the seeds, deviations in the reports."
)


@dataclass(frozen=True, kw_only=True)
class Config(PaperConfig):
    """What to run."""

    tasks: str | None = None
    """Sets to train on and to score; default: all eight, or five with --small."""
    methods: str | None = None
    """loreft and direft (the default) with the paper's settings of each set unless in brackets, or
    any others as compare --methods takes them; with --small nothing is the paper's."""
    size: Size | None = None
    """Whose settings to take; default: base for up to 12 layers, else large."""
    storage: Storage = "fp32"
    """How the frozen base is stored."""
    output_dir: Path = Path("glue-results")
    """Cells, results and a report per set; finished cells there are not run again."""


def main(config: Config) -> dict[str, Any]:
    """Train and score every method on every set with its settings, and print the paper's table."""
    given = config.tasks or (SMALL.tasks if config.small else ",".join(TASKS))
    tasks = [find_task(name.strip()).name for name in given.split(",")]
    if set(tasks) - set(TASKS):
        raise InputError(
            f"tasks must be among {', '.join(TASKS)}, got {given!r}; leave out the others"
        )
    size = config.size or model_size(config.model)
    reports, rows, heads = {}, [], {}
    for task in tasks:
        setting = SMALL if config.small else paper_setting(task, size)
        named = config.methods or setting.methods
        methods = named if config.small else task_methods(named, task, size)
        own = replace(config, methods=methods, output_dir=config.output_dir / task)
        reports[task] = compare(own, setting, tasks=task, task_type="SEQ_CLS")
        heads[task] = num_head_params(config.output_dir / task)
        names = [spec.label for spec in parse_methods(named)]
        for name, row in zip(names, reports[task]["rows"], strict=True):
            rows.append({**without_head(row, heads[task]), "method": name})
    title = "GLUE" if config.small else f"GLUE, {size} settings"
    note = setting.note(_note(heads))
    print_tasks(title, TASKS, PAPER, rows, model=config.model, note=note)
    return {"tasks": reports, "rows": rows, "num_head_params": heads, "size": size}


def model_size(model: str) -> Size:
    """Return whose settings suit a model, by its depth."""
    return "base" if load_config(model).get_text_config().num_hidden_layers <= 12 else "large"


def settings(method: str, task: str, size: Size) -> dict[str, str]:
    """Return the paper's hyperparameters of a method on a set."""
    for line in SETTINGS[method, size].strip().splitlines():
        name, *values = line.split()
        if name == task:
            return dict(zip(COLUMNS, values, strict=True))
    raise AssertionError(f"no settings for {task}")


def task_methods(methods: str, task: str, size: Size) -> str:
    """Give loreft and direft, where nothing is said about them, the paper's settings of a set."""
    entries = []
    for spec in parse_methods(methods):
        entry = spec.label
        if entry in ("loreft", "direft"):
            entry = with_overrides(entry, rank=1, layers="all", **settings(entry, task, size))
        entries.append(entry)
    return ",".join(entries)


def paper_setting(task: str, size: Size) -> Setting:
    """Return LoReFT's batch, warm-up and epochs on a set, for methods that bring no settings."""
    paper = settings("loreft", task, size)
    return Setting(
        methods="loreft,direft",
        tasks=task,
        seeds="42,43,44,45,46",
        max_length=256,
        optim=OptimOptions(
            batch_size=int(paper["batch_size"]),
            warmup_ratio=float(paper["warmup_ratio"]),
            epochs=float(paper["epochs"]),
        ),
    )


def num_head_params(directory: Path) -> int:
    """Return the parameters of the trained classification head; 0 if nothing was trained.

    They are stored in every adapter, under the names that PEFT knows heads by.
    """
    for path in sorted(directory.glob("cells/*/*/train/adapter/adapter_model.safetensors")):
        with safe_open(path, "pt") as tensors:
            return sum(
                tensors.get_tensor(name).numel()
                for name in tensors.keys()  # noqa: SIM118 - not a mapping
                if set(name.split(".")) & set(SEQ_CLS_HEAD_NAMES)
            )
    return 0


def without_head(row: Mapping[str, Any], num_head: int) -> dict[str, Any]:
    """Take the head's parameters out of a row of ``run_comparison``."""
    if not row["num_trainable_params"]:
        return dict(row)
    total = row["num_trainable_params"] / row["trainable_percent"] * 100
    kept = row["num_trainable_params"] - num_head
    return {**row, "num_trainable_params": kept, "trainable_percent": 100 * kept / total}


def _note(heads: Mapping[str, int]) -> str:
    counts: Iterable[str] = (f"{task} {count:,}" for task, count in heads.items() if count)
    return f"{NOTE} Parameters of the head, not counted above: {', '.join(counts) or 'none'}."


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
