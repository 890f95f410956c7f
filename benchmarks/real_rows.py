"""Scoring and training on rows as people have them: short and long, with choices.

``python -m benchmarks.real_rows --model SmolLM2-135M-Instruct --data-dir DIR`` measures on a real
base in NF4 that computes in fp32, on the CPU. Methods take turns, forwards and backwards; ratios
are of medians; ``--output FILE`` writes the JSON and a plot beside it.

Scoring: made-up sentences with six emotions to choose from, and ARC-Easy, with a LoReFT r8 adapter
on all layers and prompt tokens. "Prompt shared" is what ``evaluate``, ``train`` and ``compare`` do:
one pass over the prompt, whose keys and values all choices read. "Whole rows" runs prompt and
choice for each choice. lm-eval's own ``HFLM`` has the base without adapter and the same tokens, and
so has "prompt shared, bare base", with which it is compared. For choices of one token it needs one
pass as well. ``largest_difference`` is of log-likelihoods, in nats.

Training: made-up chats of log-normal lengths, and ultrafeedback_1k without its longest
rows. ``train``, LoReFT r8 as it comes, beside TRL's SFTTrainer with PEFT's QLoRA r8 on
the same base and the same tokens: padded, which is TRL's default, and packed (bfd). All take one
pass over the same rows with AdamW. TRL packs beforehand into rows of ``--max-length``, of which an
optimizer step has as many as hold the tokens of a batch: all in one pass, where TRL lays them out
in a single row, or a pass for each ("a row at a time"), which without FlashAttention is less to
compute and takes less memory.

Tokens per second are those of rows, without padding, over the wall time from the beginning of the
first step to the end of the last. The first round is a warm-up on a batch of the longest rows:
there the most memory above what was held before the training (weights and adapter) is measured by
the allocator's own events. Activation checkpointing, which TRL switches on, is off in every method
unless ``--checkpointing``, and TRL's adapters are kept in fp32. First losses of ``train`` and of
TRL padded are those of the bare base on the same batch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro

from benchmarks.common import environment, finish, tiny_llama
from benchmarks.real_rows_child import LOREFT, TRL
from benchmarks.real_rows_scoring import (
    ARC,
    EMOTIONS,
    HFLM_BARE,
    SHARED,
    SHARED_BARE,
    WHOLE,
    Scoring,
    emotion_rows,
    measure_scoring,
)
from benchmarks.real_rows_training import Training, measure_training

if TYPE_CHECKING:
    from collections.abc import Mapping

GOALS = {
    "scoring_emotions_vs_whole_rows": 4.0,
    "scoring_arc_vs_whole_rows": 3.0,
    "lognormal_vs_trl_best": 1.3,
    "ultrafeedback_vs_trl_best": 1.3,
    "share_of_real_tokens": 0.95,
}
"""The least that is wanted."""
PEAK_GOAL = 1.0
"""Peaks are to be lower than TRL's."""


@dataclass(frozen=True, kw_only=True)
class RealRowsBenchmark:
    """Score and train on rows of many lengths."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id or directory of a causal base."""
    data_dir: Path | None = None
    """Directory with the public files; default: the hub, which has no ultrafeedback_1k."""
    scoring: Scoring = field(default_factory=Scoring)
    training: Training = field(default_factory=Training)
    repeats: int = 3
    """Rounds."""
    threads: int = 2
    """Threads of every process."""
    small: bool = False
    """A tiny base and few rows, which only show that the benchmark works."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too, and the plot beside it."""


def rehearsal(options: RealRowsBenchmark, directory: Path) -> RealRowsBenchmark:
    """Return options with a tiny base, which is written to a directory, and few rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([row.prompt for row in emotion_rows(40)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(directory)
    config = tiny_llama(4)
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    write_public_files(directory)
    scoring, training = options.scoring, options.training
    return replace(
        options,
        model=str(directory),
        data_dir=directory,
        scoring=replace(scoring, emotion_rows=6, arc_rows=4, scoring_batch=4, fp32_rows=3),
        training=replace(
            training,
            steps=2,
            batch_size=4,
            max_length=256,
            ultrafeedback_longest=256,
            longest=250,
            median=100,
        ),
        threads=1,
    )


def write_public_files(directory: Path) -> None:
    """Write made-up rows where the public sets would be."""
    question = "Please choose the correct answer to the question: How does number {} feel?\n\n"
    answers = "Answer1: {} with joy Answer2: close to tears Answer3: furious Answer4: stunned\n\n"
    arc = [
        {
            "instruction": (question + answers).format(number, number)
            + "Answer format: answer1/answer2/answer3/answer4",
            "input": "",
            "output": "the correct answer is answer2",
            "answer": "answer2",
        }
        for number in range(60)
    ]
    chats = [
        {"instruction": f"Say {number} times why.", "input": "", "output": "so glad " * number}
        for number in range(1, 31)
    ]
    for name, file, rows in (
        ("ARC-Easy", "train.json", arc),
        ("ultrafeedback_1k", "ultrafeedback_1k.json", chats),
    ):
        (directory / name).mkdir()
        (directory / name / file).write_text(json.dumps(rows), encoding="utf-8")


def ratios_of(
    scoring: Mapping[str, dict[str, Any]], training: Mapping[str, dict[str, Any]]
) -> dict[str, float]:
    """Return how many times faster ours is, its share of real tokens, and its share of peaks.

    Methods that failed are left out; of peaks TRL's fastest and its lowest are the measure.
    """
    ratios: dict[str, float] = {}
    for name in (EMOTIONS, ARC):
        rows = scoring[name]["rows"]
        for label, ours, theirs in (
            ("whole_rows", SHARED, WHOLE),
            ("hflm", SHARED_BARE, HFLM_BARE),
        ):
            for suffix, key in (("", "median_s"), ("_cpu", "cpu_s")):
                ratios[f"scoring_{name}_vs_{label}{suffix}"] = rows[theirs][key] / rows[ours][key]
    shares = []
    for name, item in training.items():
        rows = {label: row for label, row in item["rows"].items() if "error" not in row}
        peers = [rows[label] for label in TRL if label in rows]
        if LOREFT not in rows or not peers:
            continue
        ours = rows[LOREFT]
        best = max(peers, key=lambda row: row["tokens_per_s"])
        ratios[f"{name}_vs_trl_best"] = ours["tokens_per_s"] / best["tokens_per_s"]
        peak = "peak_over_weights_bytes"
        ratios[f"{name}_peak_vs_trl_best"] = ours[peak] / best[peak]
        ratios[f"{name}_peak_vs_trl_lowest"] = ours[peak] / min(row[peak] for row in peers)
        shares.append(ours["real_share"])
    if shares:
        ratios["share_of_real_tokens"] = min(shares)
    return ratios


def verdicts(ratios: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return, of each ratio that has a goal, the goal and whether it is met."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in ratios.items():
        if name in GOALS:
            found[name] = {"goal": GOALS[name], "met": value >= GOALS[name]}
        elif "_peak_" in name:
            found[name] = {"goal": PEAK_GOAL, "met": value < PEAK_GOAL}
    return found


def show(result: Mapping[str, Any], *, json_only: bool) -> None:
    """Print a table of each part, and the ratios with their goals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=json_only, width=130)
    table = Table("rows", "way", title="scoring", box=None, pad_edge=False)
    for column in ("median s", "min", "max", "CPU s", "computed tokens"):
        table.add_column(column, justify="right")
    for name, item in result["results"]["scoring"].items():
        for label, row in item["rows"].items():
            times = [f"{row[key]:.2f}" for key in ("median_s", "min_s", "max_s", "cpu_s")]
            table.add_row(name, label, *times, f"{row['num_computed_tokens']:,}")
    console.print(table)
    for name, item in result["results"]["scoring"].items():
        for beside in ("fp32", "nf4", "hflm"):
            apart = item[beside]
            console.print(
                f"{name}, {beside}: log-likelihoods apart by {apart['largest_difference']:.1e} "
                f"({apart['largest_relative_difference']:.1e} of them), "
                f"{apart['num_changed_picks']} of {apart['num_rows']} picks change"
            )
    table = Table("rows", "method", title="training", box=None, pad_edge=False)
    for column in ("real tokens/s", "min", "max", "real %", "peak MiB", "first loss", "last loss"):
        table.add_column(column, justify="right")
    for name, item in result["results"]["training"].items():
        for label, row in item["rows"].items():
            if "error" in row:
                table.add_row(name, label, "failed")
                continue
            speeds = [row["num_real_tokens"] / row[f"{key}_s"] for key in ("median", "max", "min")]
            losses = [f"{row[key]:.3f}" for key in ("first_loss", "last_loss")]
            peak = row["peak_over_weights_bytes"] / 2**20
            cells = [f"{value:.0f}" for value in speeds]
            table.add_row(
                name, label, *cells, f"{100 * row['real_share']:.1f}", f"{peak:,.0f}", *losses
            )
    console.print(table)
    for item in result["results"]["training"].values():
        for label, row in item["rows"].items():
            if "error" in row:
                console.print(f"{label}: {row['error']}", style="red", markup=False)
    for name, value in result["ratios"].items():
        goal = result["goals"].get(name)
        said = "" if goal is None else f"goal {goal['goal']:g}: {_met(goal['met'])}"
        console.print(f"{name:36} {value:8.3g}  {said}")


def _met(met: bool) -> str:
    return "met" if met else "missed"


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Plot tokens per second of training and seconds of scoring, a panel per kind of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, (name, item) in zip(panels[0], results["training"].items(), strict=True):
        rows = {label: row for label, row in item["rows"].items() if "error" not in row}
        _bars(axes, {label: row["tokens_per_s"] for label, row in rows.items()}, "{:.0f}")
        axes.set_title(f"training, {name}")
        axes.set_xlabel("tokens of rows per second")
    for axes, (name, item) in zip(panels[1], results["scoring"].items(), strict=True):
        _bars(axes, {label: row["median_s"] for label, row in item["rows"].items()}, "{:.1f}")
        axes.set_title(f"scoring {item['num_rows']} rows, {name}")
        axes.set_xlabel("seconds")
    figure.savefig(path, dpi=150)
    return path


def _bars(axes: Any, values: Mapping[str, float], form: str) -> None:
    ours = (LOREFT, SHARED, SHARED_BARE)
    colours = ["#1f77b4" if label in ours else "#b0b0b0" for label in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def described(options: RealRowsBenchmark) -> dict[str, Any]:
    """Return what is measured, where and how, without directories of this machine."""
    record = environment()
    model = Path(options.model)
    names = [(str(model), f"DIR/{model.name}")] if model.is_absolute() else []
    if options.data_dir is not None:
        names.append((str(options.data_dir), "DIR"))
    for path, name in names:
        record["command"] = record["command"].replace(path, name)
    chosen = {**asdict(options), "model": model.name if model.is_absolute() else options.model}
    for name in ("output", "data_dir"):
        del chosen[name]
    return {"benchmark": "real_rows", "options": chosen, "environment": record}


def run(options: RealRowsBenchmark) -> dict[str, Any]:
    """Measure both parts and return the result."""
    result = described(options)
    with tempfile.TemporaryDirectory(prefix="lowmem-reft-base-") as directory:
        if options.small:
            options = rehearsal(options, Path(directory))
        torch.set_num_threads(options.threads)
        scoring = measure_scoring(
            options.model, options.data_dir, options.scoring, repeats=options.repeats
        )
        training = measure_training(
            options.model,
            options.data_dir,
            options.training,
            repeats=options.repeats,
            threads=options.threads,
        )
    ratios = ratios_of(scoring, training)
    return result | {
        "results": {"scoring": scoring, "training": training},
        "ratios": ratios,
        "goals": verdicts(ratios),
    }


def main(options: RealRowsBenchmark) -> int:
    """Print what was measured and one JSON line; 1 if a method failed."""
    result = run(options)
    show(result, json_only=options.json)
    if options.output is not None:
        draw(result["results"], options.output.with_suffix(".png"))
    finish(result, options.output)
    items = result["results"]["training"].values()
    return int(any("error" in row for item in items for row in item["rows"].values()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RealRowsBenchmark, description=__doc__)))
