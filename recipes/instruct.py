"""Instruction following: table 3 of the ReFT paper, win rates after tuning on UltraFeedback.

Aim: LoReFT and DiReFT with the paper's hyperparameters beside QLoRA. The paper's figure is the win
rate over text-davinci-003 on Alpaca-Eval 1.0 with GPT-4 as the judge. No such judge is asked here:
measured are the loss on held-out responses and how much of the references' wording the model's
responses share (ROUGE-L). Neither is a win rate, and a ranking by them need not be the judge's.
The responses are in the cells' predictions.jsonl; ``lowmem-reft judge`` compares two of them by a
judge of your own.

    python recipes/instruct.py --model meta-llama/Llama-2-7b-hf --data-dir DIR --memory-gib 24
    python recipes/instruct.py --model DIR --data-dir DIR --limit 200 --epochs 3 --seeds 0
    python recipes/instruct.py --small --model HuggingFaceTB/SmolLM2-135M-Instruct --data-dir DIR

The third form is for a base of 100 to 200 million parameters and a processor: rows of up to 256
tokens, of which 100 are trained on, and the held-out loss of 40 alone: nothing is generated. With
SmolLM2-135M-Instruct (2026-12, one thread of an EPYC with other work beside it, 14 minutes) it is
1.999 for the base, 1.910 for LoReFT and 1.741 for QLoRA.

``--data-dir`` holds ultrafeedback_1k.json, the paper's "1K examples"; ``--task alpaca`` comes from
the hub too.

Untied means one intervention for the prefix and one for the suffix (``tie=sides``), as in the
paper's code: 4 layers × 2 × (2 · 4096 · 4 + 4) = 262,176 parameters are the 0.0039 % of its table.
Its text says one per position, which ``tie=positions`` is: 1,310,880, or 0.019 %.

Differences from the paper: the base is NF4 (``--storage bf16`` for the paper's); the epoch is
chosen on 50 held-out rows; rows of more than 768 tokens are left out, which it cuts. Responses are
decoded greedily, 512 tokens at most; the paper's no_repeat_ngram_size 5, repetition_penalty 1.1 and
max_length 2048 our scoring does not support.

Expected memory for Llama-2-7B (predicted by ``lowmem-reft plan``, 768 tokens): LoReFT on NF4 14.7
GiB, in bf16 23.7. ``--memory-gib`` chooses a split of the batch that fits.
Expected win rates: the paper's rows below; not repeated here, for want of a GPU and that judge.
2026-11.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper import (
    PaperConfig,
    Setting,
    compare,
    decimals,
    percent,
    print_table,
    read_rows,
    run_recipe,
    trained_percent,
)

from lowmem_reft.base import load_tokenizer
from lowmem_reft.data.tasks.registry import as_records, find_task, load_task
from lowmem_reft.data.tasks.task import SPLITS, Split
from lowmem_reft.errors import InputError
from lowmem_reft.options import OptimOptions, ScoringOptions

# ReFT: the paper's. QLoRA: this package's defaults, on all linear layers.
SETTING = Setting(
    methods="loreft[rank=4,layers=3;9;18;24,positions=f5+l5,tie=sides,lr=9e-4],"
    "direft[rank=4,layers=3;9;18;24,positions=f5+l5,tie=sides,lr=9e-4],"
    "qlora[rank=16,lr=2e-4,epochs=3]",
    tasks="ultrafeedback1k",
    num_validation=50,
    max_length=768,
    scoring=ScoringOptions(scoring="generation", metric="overlap", max_new_tokens=512),
    optim=OptimOptions(epochs=9, batch_size=4, gradient_accumulation=32, warmup_ratio=0.0),
)
SMALL = Setting(
    methods="loreft[rank=8,layers=upper:0.5,positions=l3,lr=2.4e-3],qlora[rank=8,lr=5.3e-4]",
    tasks="ultrafeedback1k",
    seeds="42",
    num_train=100,
    num_validation=20,
    num_scored=40,
    max_length=256,
    scoring=ScoringOptions(metric="loss"),
    optim=OptimOptions(epochs=2, batch_size=4, warmup_ratio=0.0),
)

PAPER = read_rows(
    """
    GPT-3.5-turbo-1106 | quoted            | -      | - | 86.30
    Llama-2-Chat-13B   | quoted            | -      | - | 81.10
    Llama-2-Chat-7B    | quoted            | -      | - | 71.40
    Llama-2-7B         | full, quoted      | 100    | - | 80.93
    Llama-2-7B         | LoRA, quoted      | 0.1245 | - | 81.48
    Llama-2-7B         | RED, quoted       | 0.0039 | - | 81.69
    Llama-2-7B         | DiReFT            | 0.0039 | - | 84.85
    Llama-2-7B         | LoReFT            | 0.0039 | - | 85.60
    Llama-2-7B         | LoReFT, half rank | 0.0019 | - | 84.12
    Llama-2-7B         | LoReFT, 1K examples | 0.0039 | - | 81.91
    """
)
NOTE = (
    "Paper: win rate in % over text-davinci-003, judged by GPT-4; quoted rows are from Wu et al. "
    "2024 (RED). 1K examples took it 18 minutes on one A100 40 GB. Measured: overlap with the "
    "references (ROUGE-L) and loss per token of held-out responses, means over the seeds; neither "
    "is a win rate."
)


@dataclass(frozen=True, kw_only=True)
class Config(PaperConfig):
    """What to run."""

    task: str = SETTING.tasks
    """What to train on and to hold rows out of: ultrafeedback1k or alpaca."""
    output_dir: Path = Path("instruct-results")
    """Cells, results and report; finished cells there are not run again."""


def main(config: Config) -> dict[str, Any]:
    """Train every method once per seed, score held-out rows, and print the paper's table."""
    setting = SMALL if config.small else SETTING
    paths, num_left_out = write_rows(config, setting.max_length)
    result = compare(
        config,
        setting,
        data=str(paths["train"]),
        validation_data=str(paths["validation"]),
        eval_data=str(paths["test"]),
        template=find_task(config.task).template,
    )
    quoted = [
        [row.model, row.method, decimals(row.params_percent, 4), decimals(row.mean, 2), "–", "–"]
        for row in PAPER
    ]
    ours = [_cells(row, Path(config.model).name) for row in result["rows"]]
    print_table(
        f"instruction following, trained on {config.task}",
        ["win rate %", "overlap %", "loss"],
        quoted,
        ours,
        note=f"{setting.note(NOTE)} Rows of more than {setting.max_length} tokens, left out: "
        f"{num_left_out}.",
    )
    return {**result, "num_left_out": num_left_out}


def write_rows(config: Config, max_length: int) -> tuple[dict[Split, Path], int]:
    """Write the rows of every split that fit whole; return the files and how many do not fit.

    Raises:
        InputError: The task, its files or the tokenizer are not there, or no row of a split fits.
    """
    task, tokenizer = find_task(config.task), load_tokenizer(config.model)
    paths: dict[Split, Path] = {}
    num_left_out = 0
    for split in SPLITS:
        rows = load_task(task.name, split, data_dir=config.data_dir)
        texts = [
            task.template.replace("{prompt}", row.prompt) + (row.response or "") for row in rows
        ]
        lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]  # and the end
        kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
        if not kept:
            raise InputError(
                f"task must have {split} rows of up to {max_length} tokens, got {config.task!r} "
                "without; choose another task or a model with a larger vocabulary"
            )
        num_left_out += len(rows) - len(kept)
        paths[split] = config.output_dir / "rows" / task.name / f"{split}.jsonl"
        paths[split].parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(record) + "\n" for record in as_records(kept))
        paths[split].write_text("".join(lines), encoding="utf-8")
    return paths, num_left_out


def _cells(row: Mapping[str, Any], model: str) -> list[str]:
    overlap = None if row["metric"] == "loss" else percent(row)  # nothing was generated
    scores = ["–", decimals(overlap), decimals(row["loss"], 3)]
    return [model, row["method"], trained_percent([row], 4), *scores]


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
