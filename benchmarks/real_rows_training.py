"""Training, for ``benchmarks.real_rows``: ``lowmem-reft train`` beside TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import Worker, alternate, summarize
from benchmarks.real_rows_child import LOREFT, OWN_QLORA, REUSED, TRL
from lowmem_reft.data.row import Row
from lowmem_reft.data.tasks.registry import find_task, load_task
from lowmem_reft.data.tokens import encode_rows
from lowmem_reft.machine.files import write_text_whole
from lowmem_reft.options import CHAT_TEMPLATE

LOGNORMAL, ULTRAFEEDBACK = "lognormal", "ultrafeedback"

_WORDS = (
    "the a of and to in is that it was for on as with his they at be this have from or one "
    "had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like "
    "him into time has look two more write go see number no way could people my than first "
    "water been call who oil its now find long down day did get come made may part over new "
    "sound take only little work"
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained."""

    steps: int = 2
    """Batches."""
    batch_size: int = 8
    """Rows of each optimizer step."""
    max_length: int = 1024
    """Tokens of a row at most. TRL packs into as many."""
    ultrafeedback_longest: int = 640
    """Tokens of a row of ultrafeedback_1k at most; others are left out."""
    shortest: int = 40
    """Tokens of a made-up row at least."""
    longest: int = 1000
    """Tokens of a made-up row at most."""
    median: int = 150
    """Median of the log-normal lengths."""
    sigma: float = 0.8
    """Standard deviation of their logarithms."""
    checkpointing: bool = False
    """Recompute activations, in every method."""
    more: bool = False
    """Also QLoRA in train, and LoReFT on the upper half with what is below it stored."""


def lognormal_rows(tokenizer: Any, part: Training, number: int, seed: int = 0) -> list[Row]:
    """Return made-up chats: a prompt and a response whose tokens are log-normal in number."""
    draw = random.Random(seed)
    known = _WORDS.split()
    rate = len(tokenizer(" " + _WORDS)["input_ids"]) / len(known)
    rows = []
    for index in range(number):
        length = math.exp(draw.gauss(math.log(part.median), part.sigma))
        wanted = min(max(length, part.shortest), part.longest)
        words = [draw.choice(known) for _ in range(max(4, int(wanted / rate)))]
        cut = max(1, int(draw.uniform(0.2, 0.6) * len(words)))
        prompt, response = " ".join(words[:cut]), " ".join(words[cut:])
        rows.append(Row(source=f"lognormal:{index + 1}", prompt=prompt, response=response))
    return rows


def ultrafeedback_rows(data_dir: Path | None, seed: int = 0) -> list[Row]:
    """Return the rows of ultrafeedback_1k in an order of their own."""
    rows = load_task("ultrafeedback1k", "train", data_dir=data_dir)
    random.Random(seed).shuffle(rows)
    return rows


def template_of(tokenizer: Any, name: str) -> str:
    """Return how prompts are written: by the tokenizer's chat template if there is one."""
    if tokenizer.chat_template:
        return CHAT_TEMPLATE
    return find_task("ultrafeedback1k").template if name == ULTRAFEEDBACK else "{prompt}"


def fitting(
    rows: Sequence[Row], tokenizer: Any, template: str, *, number: int, fewest: int, most: int
) -> dict[str, int]:
    """Return the first rows whose tokens are within the limits, as JSON, with their lengths.

    Raises:
        RuntimeError: There are too few.
    """
    kept: dict[str, int] = {}
    for row in rows:
        (example,) = encode_rows([row], tokenizer, template=template, max_length=10**6).examples
        size = len(example["input_ids"])
        if fewest <= size <= most and len(kept) < number:
            kept[json.dumps({"prompt": row.prompt, "response": row.response})] = size
    if len(kept) < number:
        raise RuntimeError(f"{len(kept)} rows have {fewest} to {most} tokens, not {number}")
    return kept


def measure_training(
    model: str, data_dir: Path | None, part: Training, *, repeats: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Train on both kinds of rows with each method, in turns; the figures of each kind."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    number = part.steps * part.batch_size
    with tempfile.TemporaryDirectory(prefix="lowmem-reft-rows-") as directory:
        found, common = {}, []
        for name, rows, fewest, most in (
            (LOGNORMAL, lognormal_rows(tokenizer, part, 2 * number), part.shortest, part.longest),
            (ULTRAFEEDBACK, ultrafeedback_rows(data_dir), 1, part.ultrafeedback_longest),
        ):
            template = template_of(tokenizer, name)
            kept = fitting(rows, tokenizer, template, number=number, fewest=fewest, most=most)
            sizes = list(kept.values())
            longest = sorted(kept, key=lambda line: -kept[line])[: part.batch_size]
            for lines, more in ((list(kept), ""), (longest, "-longest")):
                write_text_whole(Path(directory) / f"{name}{more}.jsonl", "\n".join(lines) + "\n")
            packed = max(1, round(part.batch_size * statistics.fmean(sizes) / part.max_length))
            found[name] = {"num_rows": number, "lengths": spread(sizes), "packed_rows": packed}
            spec = {"name": name, "template": template, "packed_rows": packed}
            common.append(spec | {"model": model, "directory": directory})
        chosen = {
            name: getattr(part, name) for name in ("batch_size", "max_length", "checkpointing")
        }
        workers = [
            Worker(
                label=label,
                module="benchmarks.real_rows_child",
                spec={"specs": [spec | chosen | {"method": label} for spec in common]},
                threads=threads,
            )
            for label in (LOREFT, *TRL, *([OWN_QLORA, REUSED] if part.more else []))
        ]
        measured = alternate(workers, num_warmup=1, num_repeats=repeats)
    for name, item in found.items():
        item["rows"] = {row["method"]: figures_of(row, name) for row in measured}
    return found


def spread(sizes: Sequence[int]) -> dict[str, float]:
    """Return what lengths there are, in tokens."""
    return {
        "shortest": min(sizes),
        "median": statistics.median(sizes),
        "mean": statistics.fmean(sizes),
        "longest": max(sizes),
    }


def figures_of(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what a worker has measured on rows of one kind: the first run is the warm-up."""
    if "error" in row:
        return {"error": row["error"]}
    first, *rest = row["runs"][name]
    seconds = summarize([each["seconds"] for each in rest])
    figures = {**first, **rest[-1], **seconds}
    del figures["seconds"]
    return figures | {"tokens_per_s": figures["num_real_tokens"] / seconds["median_s"]}
