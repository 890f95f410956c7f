"""TREC-6 and SST-2: where does LoReFT stand beside QLoRA on a small pretrained model?

Aim: accuracy, trainable parameters and cost of LoReFT at several positions and layers against QLoRA
on an NF4 base. Every setting is chosen on a validation split of the training file (``--stage
search``); the test file is read by ``--stage final`` and ``--stage frontier`` alone.

    python recipes/text_classification.py --task trec --source DIR --model MODEL --stage search
    python recipes/text_classification.py --task trec --source DIR --model MODEL --stage final

``--source`` holds TREC.train and TREC.test (https://cogcomp.seas.upenn.edu/Data/QA/QC), or SST-2's
train_full.tsv and dev.tsv with a header and ``sentence<TAB>label`` lines.

Expected with a 3 M-parameter TinyStories Llama: benchmarks/RESULTS.md; about an hour for TREC
and 20 minutes for SST-2 on one core, 2026-11.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from paper import RecipeConfig, run_recipe

from lowmem_reft.compare import run_comparison
from lowmem_reft.data.rows import Row, as_records, holdout
from lowmem_reft.data.tasks.registry import file_rows, find_task
from lowmem_reft.data.tasks.task import Split
from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    BaseOptions,
    CompareOptions,
    MatrixOptions,
    OptimOptions,
    ReuseOptions,
    RowsOptions,
    ScoredOptions,
)


@dataclass(frozen=True)
class Plan:
    """What is run on a task."""

    final: str
    """Methods of the final stage."""
    test: Split = "test"
    """The public rows that the final stage is scored on."""
    num_train: int | None = None
    """Rows drawn from the training file (seed 0); None takes all."""
    epochs: float = 4


FINAL_TREC = (
    "qlora[rank=8,lr=1e-3,batch_size=16],"
    "loreft[rank=12,layers=0;1;2;3,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=8,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=8,positions=f3+l3,lr=8e-3,batch_size=8],"
    "loreft[rank=8,positions=l3,lr=8e-3,batch_size=8],"
    "loreft[rank=8,layers=upper:0.5,positions=all,lr=8e-3,batch_size=8]"
)
FINAL_SST2 = (
    "qlora[rank=8,lr=1e-3],loreft[rank=8,positions=all,lr=8e-3],"
    "direft[rank=8,positions=all,lr=4e-3],loreft[rank=8,positions=f3+l3,lr=8e-3],"
    "loreft[rank=8,positions=l3,lr=8e-3],loreft[rank=8,layers=upper:0.5,positions=all,lr=8e-3]"
)
"""What searches on TREC's validation rows chose (benchmarks/LOG.md): the last one, on three tenths
of all rows, for TREC's rank and layers; the first one, on 2,500 rows, for SST-2."""


def frontier(epochs: float) -> str:
    """Return methods that show accuracy against cost where frozen computation is reused.

    Fixed beforehand and reported whole, so that nothing is chosen on test rows.

    Args:
        epochs: QLoRA's; those here are such that no row costs more than it.
    """
    longer, longest = f"{1.5 * epochs:g}", f"{2.5 * epochs:g}"
    settings = (
        f"rank=8,layers=upper:0.5,positions=all,epochs={epochs:g}",
        f"rank=16,layers=upper:0.5,positions=all,epochs={longest}",
        f"rank=8,layers=2;3;4;5,positions=all,epochs={longer}",
        f"rank=16,layers=upper:0.5,positions=l3,epochs={longest}",
    )
    return ",".join(f"loreft[{setting},lr=8e-3,batch_size=8]" for setting in settings)


PLANS = {
    "trec": Plan(FINAL_TREC),
    "sst2": Plan(FINAL_SST2, test="validation", num_train=1000, epochs=3),
}

WORDS = {
    "abbreviation": "word",
    "description": "about",
    "entity": "thing",
    "human": "person",
    "location": "place",
    "number": "number",
    "negative": "bad",
    "positive": "good",
}
"""Classes as words that are one token each for TinyStories' tokenizer, for ``--one-token``. The
public names have up to six, and all but the first are written after the last edit."""

SEARCH = (
    "qlora[rank=8,lr=1e-3],qlora[rank=8,lr=1e-3,batch_size=8],"
    "loreft[rank=8,positions=all,lr=8e-3],loreft[rank=8,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=8,positions=all,lr=4e-3,batch_size=8],"
    "loreft[rank=8,positions=all,lr=4e-3,batch_size=4],"
    "loreft[rank=8,positions=all,lr=1.6e-2,batch_size=8],"
    "loreft[rank=8,positions=all,lr=8e-3,batch_size=8,epochs=8],"
    "loreft[rank=8,positions=all,lr=8e-3,act=gelu],"
    "loreft[rank=8,positions=all,lr=8e-3,component=mlp_output],"
    "loreft[rank=8,positions=all,lr=8e-3,component=attention_output],"
    "noreft[rank=8,positions=all,lr=8e-3],"
    "loreft[rank=10,layers=0;1;2;3;4,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=12,layers=0;1;2;3,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=12,layers=0;1;2;3,positions=all,lr=8e-3,batch_size=8,epochs=6],"
    "loreft[rank=12,layers=1;2;3;4,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=16,layers=0;1;2,positions=all,lr=8e-3,batch_size=8],"
    "loreft[rank=16,layers=1;2;3,positions=all,lr=8e-3,batch_size=8]"
)


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """What to run."""

    task: str
    """trec or sst2."""
    source: Path
    """Directory with the task's files."""
    model: str
    """Hub id or directory of the base."""
    stage: str = "final"
    """search (scored on validation rows), final (all rows, scored on the test file) or frontier (as
    final, accuracy against cost with frozen computation reused)."""
    fold: int = 0
    """Which tenth of the training rows a search is scored on, from 0 to 9."""
    methods: str | None = None
    """Methods of the stage; default: those above."""
    seeds: str | None = None
    """Default: 0 for search, 0,1,2 for final."""
    output_dir: Path = Path("text-classification")
    """Prepared rows and results."""
    limit: int | None = None
    """Use only the first N training rows and test rows."""
    epochs: float | None = None
    """Default: the task's."""
    one_token: bool = False
    """Call the classes by words that are one token each, for all methods."""
    workers: int = 1
    """Cells that run at the same time."""


def main(config: Config) -> dict[str, object]:
    """Prepare the rows of the stage and compare."""
    if config.task not in PLANS:
        raise InputError(f"task must be one of {', '.join(PLANS)}, got {config.task!r}; choose one")
    plan = PLANS[config.task]
    directory = config.output_dir / (config.task + "-one-token" * config.one_token)
    stages = {"search": SEARCH, "final": plan.final, "frontier": frontier(plan.epochs)}
    if config.stage not in stages:
        raise InputError(
            f"stage must be one of {', '.join(stages)}, got {config.stage!r}; choose one"
        )

    def read(split: Split) -> list[Row]:
        found = file_rows(config.task, split, config.source)
        return [in_one_token(row) for row in found] if config.one_token else found

    rows = read("train")
    if plan.num_train is not None:
        random.Random(0).shuffle(rows)
        rows = rows[: plan.num_train]
    if config.stage == "search":
        directory /= f"fold-{config.fold}"
        fit, validation = holdout(rows, 0.1, fold=config.fold)
        train = write_rows(directory / "fit.jsonl", fit)
        test = write_rows(directory / "validation.jsonl", validation)
    else:
        train = write_rows(directory / "train.jsonl", rows)
        test = write_rows(directory / "test.jsonl", read(plan.test))
    return run_comparison(
        CompareOptions(
            # Blocks this small are slower in bf16 on a CPU.
            base=BaseOptions(model=config.model, compute_dtype="fp32"),
            rows=RowsOptions(
                data=str(train),
                eval_data=str(test),
                template=find_task(config.task).template,
                limit=config.limit,
            ),
            scored=ScoredOptions(eval_limit=config.limit),
            matrix=MatrixOptions(
                methods=config.methods or stages[config.stage],
                seeds=config.seeds or ("0" if config.stage == "search" else "0,1,2"),
            ),
            output_dir=directory / config.stage,
            optim=OptimOptions(epochs=config.epochs or plan.epochs, batch_size=16),
            reuse=ReuseOptions(reuse="auto" if config.stage == "frontier" else "off"),
            workers=config.workers,
        )
    )


def in_one_token(row: Row) -> Row:
    """Return the row with the words of ``WORDS``."""
    choices = tuple(WORDS[choice] for choice in row.choices)
    return replace(row, choices=choices, response=WORDS.get(row.response or "", row.response))


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write JSONL, making the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record) + "\n" for record in as_records(rows))
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
