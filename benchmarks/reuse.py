"""Training from stored constants beside the plain step and PEFT's QLoRA.

Run ``python -m benchmarks.reuse`` (``--curves`` adds the curves and the plot). A randomly
initialised NF4 Llama (d = 1024, 16 layers, 246 M parameters); every method trains on the same
examples with AdamW; one warm-up round, then rounds in which the methods take turns, forwards and
backwards. All methods compute the loss with ``lowmem_reft.base.loss`` except "PEFT QLoRA", which
forms all logits, as PEFT does.

In training the steps of one method follow each other, so in its turn a method goes on for a second
(a slow one takes one step), and the turn's time is the median of its steps: a reused step of 0.25 s
that comes once after 10 s of other methods would read all its weights from cold caches.

Shapes: batch 4 x (192 prompt + 64 response), LoReFT r4 at layer 8, ``l1``; the upper half with
``all``; batch 1 x (960 + 64) at layer 12, ``l1``. Beside each speed-up stand two ratios of
arithmetic, forward and backward (``reuse_steps`` says what is counted): ``arithmetic_ratio`` of
blocks times tokens (9.0 for the first shape without checkpointing, 84 for the last), and ``limit``
with the head, which PEFT's QLoRA step runs on all tokens and a reused step on the supervised ones
(7.6 and 51). ``share_of_limit`` is the speed-up over the latter. Reused rows keep upper blocks
dequantized where ``train`` does so by itself (a long prompt), those called "upper dequantized"
always; the peaks below are without. Stores are built ``repeats`` times too, and the median counts.

``peak``: the most memory of one step of the first shape by the allocator's own events, weights and
a batch that was read ahead included; also with only the blocks above the edited one loaded. The
store is mapped from the page cache and not counted.

Curves: speed-up of the reused step over PEFT QLoRA's, in the same rounds, against prompt tokens of
1,024, edited layer (768 + 256 tokens), examples per step (192 + 64 tokens each); and, computed from
the first shape's build and steps, against epochs.

Run ``python -m benchmarks.reuse --device cuda --shape llama-3.1-8b`` (or ``llama-3.3-70b``) for the
shapes of real models on a card. Weights are random and drawn as they are stored, so there is no
checkpoint. Examples have 1,536 prompt and 512 supervised tokens, AdamW, bf16; tokens per second are
all tokens of the examples over the median step. Methods run one after the other, each alone on the
card; out of memory is a row.

- 8B, batch 4: PEFT QLoRA r16 with its own loss, and with ours; LoReFT r4 at layer 15 ``l1`` and on
  the upper half ``all``, plain and reused; layer 15 also with only the blocks above it on the card.
- 70B, batch 2: LoReFT r4 at layer 60 ``l1`` under a hard limit of 24 GiB
  (``torch.cuda.set_per_process_memory_fraction``) with only the blocks above 60 on the card; PEFT
  QLoRA under the same limit, and on the whole card.

Beside reused steps and those under a limit stands the memory that is predicted for them.

PEFT keeps its adapters in fp32 and, without autocast, computes them so: QLoRA is measured with bf16
autocast too, as the Trainer runs it with ``bf16=True``, and the faster of the two is the peer.
Blocks that are not on the card are drawn anew whenever they are to be read, so ``build_time_s`` has
the arithmetic and the store but no reading of a checkpoint; otherwise it has the base's digest.
``max_grad_rel_error`` is of one example, reused against plain, in bf16. ``--seconds`` bounds the
whole command.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import environment, failed, finish, keep, say
from benchmarks.reuse_at_size import measure_at_size
from benchmarks.reuse_rounds import draw, measure_rounds
from benchmarks.reuse_steps import EIGHT, ReuseBenchmark
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import resolve_device


def show(result: dict[str, Any], *, json_only: bool) -> None:
    """Print tables of times, peaks and ratios."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=json_only, width=130)
    table = Table("shape", "method", title="seconds per step", box=None, pad_edge=False)
    for column in ("median", "min", "max", "reused is faster", "limit", "share of it"):
        table.add_column(column, justify="right")
    for item in result["results"]:
        for label, row in item["rows"].items():
            times = [f"{row[key]:.3f}" for key in ("median_s", "min_s", "max_s")]
            gains = [f"{row[key]:.1f}x" for key in ("speed_up", "limit")]
            share = f"{100 * row['share_of_limit']:.0f} %"
            table.add_row(item["shape"]["name"], label, *times, *gains, share)
    console.print(table)
    table = Table("method", "peak MiB", "of it base", title="one step", box=None, pad_edge=False)
    for label, row in result["peak"]["rows"].items():
        table.add_row(label, *(f"{row[key] / 2**20:.1f}" for key in ("peak_bytes", "base_bytes")))
    console.print(table)
    for name, points in result.get("curves", {}).items():
        values = ", ".join(
            f"{each['x']}: {each['speed_up']:.1f} of {each['limit']:.1f}" for each in points
        )
        console.print(f"{name}: {values}")
    for name, value in result["ratios"].items():
        console.print(f"{name:36} {value:8.3g}")


def measured(
    options: ReuseBenchmark, device: torch.device, directory: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """Measure at the shape of a real model, if one is named, else in rounds."""
    if options.at_size.shape is not None:
        return measure_at_size(
            options, device, directory, lambda rows: keep(result | {"rows": rows}, options.output)
        )
    # Small operators on two threads take turns waiting when anything else runs.
    torch.set_num_threads(1 if options.small else options.rounds.threads)
    return measure_rounds(options, directory)


def main(options: ReuseBenchmark) -> int:
    """Print what was measured and one JSON line; 1 if a row failed, 2 without such a device."""
    try:
        device = resolve_device(options.device)
    except InputError as error:
        say(f"benchmarks.reuse: {error}")
        return 2
    if device.type == "cuda" and options.at_size.shape is None:
        options = replace(options, at_size=replace(options.at_size, shape=EIGHT))
    disable_progress_bar()  # one for every block that is read
    result: dict[str, Any] = {
        "benchmark": "reuse",
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "environment": environment(device.type),
    }
    directory = Path(tempfile.mkdtemp(prefix="lowmem-reft-reuse-"))
    try:
        result |= measured(options, device, directory, result)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if "results" in result:
        show(result, json_only=options.json)
    finish(result, options.output)
    if options.output is not None and "curves" in result:
        draw(result["curves"], options.output.with_suffix(".png"))
    return int(failed(result.get("rows", [])))


if __name__ == "__main__":
    gc.freeze()  # what the libraries have made is not to be walked after every row
    sys.exit(main(tyro.cli(ReuseBenchmark, description=__doc__)))
