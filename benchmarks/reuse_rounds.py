"""Steps of reused and of other training that take turns on a base of 246 M parameters.

``benchmarks.reuse`` says what is measured.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.common import say, summarize
from benchmarks.reuse_steps import (
    PLAIN,
    PLAIN_CHECKPOINTED,
    QLORA,
    QLORA_CHECKPOINTED,
    QLORA_OURS,
    REUSED,
    REUSED_DEQUANTIZED,
    Method,
    ReuseBenchmark,
    Shape,
    Stepper,
    adapted,
    arithmetic,
    build_arithmetic,
    gain,
    make_examples,
    plain_stepper,
    reused_stepper,
    split,
    stacked,
    take_turns,
)
from lowmem_reft import load_base
from lowmem_reft.base import save_base
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.memory.live import LiveMemory, label_model
from lowmem_reft.memory.profile import measure_step
from lowmem_reft.reuse.proof import prove
from lowmem_reft.reuse.reuse import Reuse

CPU = torch.device("cpu")
METHODS = (QLORA, QLORA_OURS, QLORA_CHECKPOINTED, PLAIN, REUSED, REUSED_DEQUANTIZED)
UPPER = "LoReFT, reused, upper blocks resident"

FIRST = Shape(
    name="layer 8, l1", prompt=192, response=64, batch_size=4, layers="8", positions="l1", lowest=8
)
SHAPES = (
    FIRST,
    replace(FIRST, name="upper half, all", layers="upper:0.5", positions="all"),
    Shape(
        name="long prompt, layer 12, l1",
        prompt=960,
        response=64,
        batch_size=1,
        layers="12",
        positions="l1",
        lowest=12,
    ),
)
PROMPTS = (64, 384, 768, 960)
"""Prompt tokens of 1,024 (layer 8)."""
LAYERS = (2, 8, 12, 14)
"""Edited layers (768 + 256 tokens)."""
MICRO_BATCHES = (1, 2, 4, 8)
"""Examples per step (192 + 64 tokens, layer 8)."""
EPOCHS = (1, 2, 3, 4, 6, 8, 12, 16, 20)


def config_of(*, small: bool) -> Any:
    """Return the shape of the base."""
    width, layers, vocab = (64, 16, 512) if small else (1024, 16, 32000)
    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=width * 11 // 4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=vocab,
    )


def random_base(config: Any) -> Any:
    """Return the same random NF4 base every time, computing in fp32."""
    return base_with_random_weights(config, device=CPU, storage="nf4", compute_dtype=torch.float32)


def compare(shape: Shape, options: ReuseBenchmark, directory: Path) -> dict[str, Any]:
    """Measure every method on one shape."""
    config = config_of(small=options.small)
    examples = make_examples(config, shape, shape.batch_size * options.batches)
    indices = split(examples, shape.batch_size)
    batches = [stacked([examples[i] for i in part]) for part in indices]
    steps, error = {}, 0.0
    with ExitStack() as stack:
        for method in METHODS:
            model = adapted(random_base(config), method, shape)
            if not method.reused:
                steps[method.label] = plain_stepper(model, batches)
                continue
            if method.dequantized:
                again = Reuse(model, examples, directory / "0")
                stack.enter_context(again.dequantized())
            else:
                builds = [
                    Reuse(model, examples, directory / f"{i}") for i in range(options.repeats or 3)
                ]
                again = reuse = builds[-1]
            error = max(error, *map(partial(prove, again), indices, batches))
            if not method.dequantized and again.may_stay_dequantized(shape.batch_size):
                stack.enter_context(again.dequantized())  # as ``train`` does of itself
            steps[method.label] = reused_stepper(again, indices)
        seconds = take_turns(steps, rounds=options.repeats or 3, turn_s=options.turn_s)
    build = summarize([each.build_time_s for each in builds])
    return {
        "shape": asdict(shape),
        "rows": rows_of(config, shape, seconds),
        "mode": reuse.mode,
        "store_bytes": reuse.layout.total_bytes,
        "build_time_s": build["median_s"],
        "build": build,
        "num_batches": len(batches),
        "max_grad_rel_error": error,
    }


def rows_of(config: Any, shape: Shape, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return times per method, and what the reused step gains over it beside what it could."""
    fastest = statistics.median(seconds[REUSED.label])
    rows = {}
    for method in METHODS:
        row = summarize(seconds[method.label])
        rows[method.label] = row | gain(config, shape, method, row["median_s"] / fastest)
    return rows


def ratio(result: dict[str, Any], slower: Method) -> float:
    """Return how many times longer a method's median step takes than the reused one."""
    return float(result["rows"][slower.label]["speed_up"])


def dequantized_ratio(result: dict[str, Any], slower: Method = QLORA) -> float:
    """Return how many times longer the slower step takes than the reused, dequantized one."""
    slow, fast = (result["rows"][m.label]["median_s"] for m in (slower, REUSED_DEQUANTIZED))
    return float(slow / fast)


def over_epochs(result: dict[str, Any], epochs: int, reused: Method = REUSED) -> float:
    """Return the time of PEFT QLoRA's epochs over that of reused ones with the build."""
    steps = result["num_batches"] * epochs
    slow, fast = (result["rows"][m.label]["median_s"] * steps for m in (QLORA, reused))
    return float(slow / (fast + result["build_time_s"]))


def ratios_of(results: list[dict[str, Any]], peak: dict[str, Any]) -> dict[str, float]:
    """Return the contract's ratios."""
    first, upper, long = results
    return {
        "reuse_vs_qlora": ratio(first, QLORA),
        "reuse_vs_qlora_our_loss": ratio(first, QLORA_OURS),
        "reuse_vs_qlora_checkpointing": ratio(first, QLORA_CHECKPOINTED),
        "reuse_vs_plain_loreft": ratio(first, PLAIN),
        "six_epochs_vs_qlora": over_epochs(first, 6),
        "reuse_dequantized_vs_qlora": dequantized_ratio(first),
        "reuse_dequantized_vs_qlora_checkpointing": dequantized_ratio(first, QLORA_CHECKPOINTED),
        "six_epochs_dequantized_vs_qlora": over_epochs(first, 6, REUSED_DEQUANTIZED),
        "long_prompt_dequantized_vs_qlora": dequantized_ratio(long),
        "upper_all_vs_qlora_checkpointing": ratio(upper, QLORA_CHECKPOINTED),
        "long_prompt_vs_qlora": ratio(long, QLORA),
        "upper_resident_share": peak["upper_resident_share"],
        "max_grad_rel_error": max(item["max_grad_rel_error"] for item in (*results, peak)),
    }


def peak_of(stepper: Stepper, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the peak of one step, which is not the first, and the base's share of it."""
    stepper(0)
    base = LiveMemory("cpu")
    label_model(base, stepper.model)
    sizes = base.by_category
    measured, held = measure_step(CPU, stepper.model, stepper.optimizer, batch, partial(stepper, 0))
    return {
        "peak_bytes": measured.allocated_bytes + held,
        "base_bytes": sizes["weights"] + sizes["quantization_constants"],
    }


def peak_of_reused(reuse: Reuse) -> dict[str, int]:
    """Return the peak of a step on the whole data set, and the batch that is read meanwhile."""
    batch = list(range(len(reuse.examples)))
    row = peak_of(reused_stepper(reuse, [batch], ahead=False), {})
    ahead = reuse.layout.total_bytes
    return row | {"peak_bytes": row["peak_bytes"] + ahead, "read_ahead_bytes": ahead}


def peaks(shape: Shape, options: ReuseBenchmark, directory: Path) -> dict[str, Any]:
    """Measure the memory of a plain step, a reused one, and one with upper blocks only."""
    config = config_of(small=options.small)
    examples = make_examples(config, shape, shape.batch_size)
    batch, rows = stacked(examples), {}
    for method in (PLAIN, PLAIN_CHECKPOINTED):
        model = adapted(random_base(config), method, shape)
        rows[method.label] = peak_of(plain_stepper(model, [batch]), batch)
    base = random_base(config)
    save_base(base, directory / "base")
    rows[REUSED.label] = peak_of_reused(
        Reuse(adapted(base, REUSED, shape), examples, directory / "whole")
    )
    base = load_base(
        directory / "base",
        storage="nf4",
        compute_dtype="fp32",
        device="cpu",
        resident="upper",
        first_resident=shape.lowest + 1,
    )
    upper = Reuse(adapted(base, REUSED, shape), examples, directory / "upper")
    error = prove(upper, list(range(len(examples))), batch)
    rows[UPPER] = peak_of_reused(upper)
    return {
        "shape": asdict(shape),
        "rows": rows,
        "upper_resident_share": rows[UPPER]["peak_bytes"] / rows[PLAIN.label]["peak_bytes"],
        "max_grad_rel_error": error,
    }


def curves_of(
    options: ReuseBenchmark, first: dict[str, Any], directory: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return the points of each curve: what stands on the axis as ``x``, seconds, and the gain."""
    shape = options.sized(FIRST)
    long = options.sized(replace(FIRST, prompt=768, response=256, batch_size=1))
    total = long.prompt + long.response
    prompts = [total * prompt // 1024 for prompt in PROMPTS]
    by_prompt = [replace(long, prompt=prompt, response=total - prompt) for prompt in prompts]
    by_layer = [replace(long, name=f"layer {k}, l1", layers=f"{k}", lowest=k) for k in LAYERS]
    shapes = dict.fromkeys([*by_prompt, *by_layer])
    points = against_one_qlora(shapes, options, directory / "long")
    return {
        "prompt": [{"x": each.prompt, **points[each]} for each in by_prompt],
        "layer": [{"x": each.lowest, **points[each]} for each in by_layer],
        "micro_batch": by_micro_batch(shape, options, directory / "micro"),
        "epochs": [by_epochs(shape, options, first, epochs) for epochs in EPOCHS],
    }


def against_one_qlora(
    shapes: Iterable[Shape], options: ReuseBenchmark, directory: Path
) -> dict[Shape, dict[str, Any]]:
    """Measure shapes of equally many tokens.

    A step of PEFT QLoRA is the same whatever the prompt's share of them and whatever LoReFT edits,
    so one takes turns with the reused steps of all shapes.
    """
    config = config_of(small=options.small)
    steps: dict[Any, Stepper] = {}
    for number, shape in enumerate(shapes):
        examples = make_examples(config, shape, 1)
        batch = stacked(examples)
        if not steps:
            steps[QLORA] = plain_stepper(adapted(random_base(config), QLORA, shape), [batch])
        model = adapted(random_base(config), REUSED, shape)
        reuse = Reuse(model, examples, directory / f"{number}")
        prove(reuse, [0], batch)
        steps[shape] = reused_stepper(reuse, [[0]])
    seconds = take_turns(steps, rounds=options.rounds.curve_repeats, turn_s=options.turn_s)
    slow = seconds.pop(QLORA)
    return {shape: point(config, shape, slow, fast) for shape, fast in seconds.items()}


def by_micro_batch(shape: Shape, options: ReuseBenchmark, directory: Path) -> list[dict[str, Any]]:
    """Measure steps with different numbers of the same examples."""
    config = config_of(small=options.small)
    examples = make_examples(config, shape, max(MICRO_BATCHES))
    qlora = adapted(random_base(config), QLORA, shape)
    reuse = Reuse(adapted(random_base(config), REUSED, shape), examples, directory)
    prove(reuse, [0], stacked(examples[:1]))
    steps: dict[Any, Stepper] = {}
    for size in MICRO_BATCHES:
        steps[size, QLORA] = plain_stepper(qlora, [stacked(examples[:size])])
        steps[size, REUSED] = reused_stepper(reuse, [list(range(size))])
    seconds = take_turns(steps, rounds=options.rounds.curve_repeats, turn_s=options.turn_s)
    shapes = {size: replace(shape, batch_size=size) for size in MICRO_BATCHES}
    return [
        {"x": size, **point(config, each, seconds[size, QLORA], seconds[size, REUSED])}
        for size, each in shapes.items()
    ]


def point(config: Any, shape: Shape, slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Return one point of a curve from the seconds of steps."""
    slow_s, fast_s = statistics.median(slow), statistics.median(fast)
    return {"qlora_s": slow_s, "reused_s": fast_s, **gain(config, shape, QLORA, slow_s / fast_s)}


def by_epochs(
    shape: Shape, options: ReuseBenchmark, first: dict[str, Any], epochs: int
) -> dict[str, Any]:
    """Compute the point of so many passes over the data, the build counted, and its limit."""
    config = config_of(small=options.small)
    slow, fast = (epochs * arithmetic(config, shape, method) for method in (QLORA, REUSED))
    limit = slow / (fast + build_arithmetic(config, shape))
    speed_up = over_epochs(first, epochs)
    return {"x": epochs, "speed_up": speed_up, "limit": limit, "share_of_limit": speed_up / limit}


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Plot the speed-up and its limit, a panel per curve."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    tokens = curves["prompt"][-1]["x"] + curves["prompt"][0]["x"]
    labels = {
        "prompt": f"prompt, tokens of {tokens:,} (layer 8)",
        "layer": "edited layer, of 16 (75 % prompt)",
        "micro_batch": "examples per step (layer 8, 75 % prompt)",
        "epochs": "epochs, the build counted (layer 8, 75 % prompt)",
    }
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        places = [each["x"] for each in points]
        speed_ups, limits = ([each[key] for each in points] for key in ("speed_up", "limit"))
        marker = None if name == "epochs" else "o"
        axes.plot(places, speed_ups, marker=marker, label="measured" if marker else "from medians")
        axes.plot(places, limits, color="grey", linestyle="--", label="limit of the arithmetic")
        for each in points if marker else points[::4]:
            share, place = f"{100 * each['share_of_limit']:.0f} %", (each["x"], each["speed_up"])
            axes.annotate(share, place, (0, -14), textcoords="offset points", ha="center")
        axes.margins(x=0.1)
        axes.set_yscale("log")
        axes.set_ylim(min(1, *speed_ups), 1.3 * max(limits + speed_ups))
        axes.set_yticks([tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= axes.get_ylim()[1]])
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places)
        axes.set_xlabel(labels[name])
        axes.set_ylabel("times faster than PEFT QLoRA")
        axes.legend(frameon=False, loc="lower right")
    figure.suptitle("LoReFT l1 from stored constants; percentages are shares of the limit")
    figure.savefig(path, dpi=150)
    return path


def measure_rounds(options: ReuseBenchmark, directory: Path) -> dict[str, Any]:
    """Measure shapes, memory and, if they are asked for, curves."""
    results = []
    for number, shape in enumerate(SHAPES):
        say(f"{shape.name} ...")
        results.append(compare(options.sized(shape), options, directory / f"{number}"))
        gc.collect()
    say("memory ...")
    peak = peaks(options.sized(FIRST), options, directory / "peak")
    result = {
        "ratios": ratios_of(results, peak),
        "max_grad_rel_error": max(item["max_grad_rel_error"] for item in (*results, peak)),
        "results": results,
        "peak": peak,
    }
    if options.rounds.curves:
        say("curves ...")
        result["curves"] = curves_of(options, results[0], directory / "curves")
    return result
