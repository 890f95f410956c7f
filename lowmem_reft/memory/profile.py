"""``lowmem-reft profile``: one training step for real, measured beside its prediction."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.loading import load_base
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import DTYPES, dtype_name, resolve_device, resolve_storage
from lowmem_reft.machine.files import write_json
from lowmem_reft.machine.provenance import device_name, versions
from lowmem_reft.memory.live import CATEGORIES, LiveMemory, label_model, track
from lowmem_reft.memory.measure import Measured, measure
from lowmem_reft.memory.planner import GIB, Card, Planner, read_config
from lowmem_reft.memory.predict import Setting
from lowmem_reft.memory.step import make_batch, optimizer_tensors, training_step, warm_up
from lowmem_reft.memory.verdict import lengths_of
from lowmem_reft.methods.attach import attach
from lowmem_reft.methods.table import find_method

if TYPE_CHECKING:
    from lowmem_reft.options import ProfileOptions


def run_profile(options: ProfileOptions) -> dict[str, Any]:
    """Measure a step, draw its timeline beside the predicted one, and print both.

    Returns:
        ``predicted_peak_bytes``, ``measured_peak_bytes`` (CPU: allocator events on top of what was
        there; CUDA: ``max_memory_allocated``), ``reserved_bytes`` (CUDA), ``predicted_bytes`` and
        ``live_bytes`` by category at the peak, ``peak_place``, ``largest`` and the paths of what
        was written.

    Raises:
        InputError: an option is wrong, or the model cannot be loaded.
    """
    device = resolve_device(options.model.device)
    setting = _setting(options, device)
    lengths = lengths_of(options.lengths)
    config = read_config(options.model.model)
    planner = Planner(config, Card(name="", memory_bytes=0))
    predicted = planner.plan(setting, lengths)
    timeline = planner.timeline(setting, lengths)
    model = build_model(
        config if options.random_weights else options.model.model,
        setting,
        device,
        random_weights=options.random_weights,
    )
    padded = lengths.batch_size > 1 if lengths.padded is None else lengths.padded
    batch = make_batch(
        lengths.batch_size,
        lengths.seq_len,
        min(lengths.seq_len - 1, lengths.response_len or max(1, lengths.seq_len // 2)),
        padded=padded,
        vocab_size=config.get_text_config().vocab_size,
    )
    batch = {key: value.to(device) for key, value in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    warm_up(model, optimizer)
    accumulation = lengths.gradient_accumulation
    step = partial(training_step, model, batch, optimizer, micro_batches=accumulation)
    step()  # kernels are chosen and caches filled in the first one
    measured, held = measure_step(device, model, optimizer, batch, step)
    with track(device.type, model=base_of(model), keep_timeline=True) as live:
        for value in batch.values():
            live.add(value, "inputs")
        label_model(live, model)
        for value in optimizer_tensors(optimizer):
            live.add(value, "optimizer")
        live.reset_peak()
        step(memory=live)
    result = {
        "predicted_peak_bytes": predicted.peak_bytes,
        "measured_peak_bytes": measured.allocated_bytes + held,
        "reserved_bytes": measured.reserved_bytes,
        "ratio": predicted.peak_bytes / (measured.allocated_bytes + held),
        "predicted_bytes": predicted.breakdown_bytes,
        "live_bytes": live.peak.breakdown_bytes,
        "peak_place": str(live.peak.place),
        "predicted_peak_place": predicted.peak_place,
        "largest": [
            {"bytes": b.num_bytes, "category": b.category, "place": str(b.place)}
            for b in live.peak.largest
        ],
        "device": device_name(options.model.device),
        "versions": versions(),
    }
    result.update(_write(options, result, live, timeline))
    if not options.json:
        _print(result)
    return result


def _setting(options: ProfileOptions, device: torch.device) -> Setting:
    storage, dtype = resolve_storage(
        options.model.storage,
        options.model.compute_dtype,
        device,
        default=find_method(options.method.method).storage,
    )
    return Setting(
        storage=storage,
        compute_dtype=dtype_name(dtype),
        method=options.method,
        memory=options.memory,
        chunked_loss=options.loss == "chunked",
        task_type=options.model.task_type or "CAUSAL_LM",
        **Setting.of_device(device),
    )


def build_model(model: Any, setting: Setting, device: torch.device, *, random_weights: bool) -> Any:
    """Load or make up a base, and put on it what the setting names.

    Args:
        model: Configuration for random weights, else hub id or directory.
        setting: What is trained and how.
        device: Where.
        random_weights: Make weights up.

    Raises:
        InputError: the model cannot be loaded, or does not go with the setting.
    """
    dtype = DTYPES[setting.compute_dtype]
    if random_weights:
        base: Any = base_with_random_weights(
            model,
            device=device,
            storage=setting.storage,
            compute_dtype=dtype,
            task_type=setting.task_type,
            attn_implementation=setting.attn_implementation,
        )
    else:
        base = load_base(
            model,
            storage=setting.storage,
            compute_dtype=dtype,
            device=device,
            task_type=setting.task_type,
            attn_implementation=setting.attn_implementation,
        )
    return attach(
        base,
        setting.method,
        task_type=setting.task_type,
        memory=setting.memory,
        chunked_loss=setting.chunked_loss,
    )


def measure_step(
    device: torch.device,
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    step: Any,
) -> tuple[Measured, int]:
    """Return what the allocator saw, and on a CPU the bytes that were there before."""
    measured = measure(device, step)
    if device.type == "cuda":
        return measured, 0
    held = LiveMemory(device.type)
    label_model(held, model)
    for value in optimizer_tensors(optimizer):
        held.add(value)
    for value in batch.values():
        held.add(value)
    return measured, held.current_bytes


def _write(
    options: ProfileOptions, result: dict[str, Any], live: LiveMemory, predicted: LiveMemory
) -> dict[str, Any]:
    """Write profile.json and the pictures; return their paths."""
    from lowmem_reft.memory.picture import draw_timeline, write_timeline_html

    directory = options.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "profile.json", result)
    title = f"{options.model.model}, {options.method.method}: live memory in one training step"
    paths = {
        "png": str(draw_timeline(directory / "timeline.png", live.timeline, title=title)),
        "html": None,
    }
    facts = [
        ("predicted peak", f"{result['predicted_peak_bytes'] / GIB:.4f} GiB"),
        ("measured peak", f"{result['measured_peak_bytes'] / GIB:.4f} GiB"),
        ("predicted / measured", f"{result['ratio']:.4f}"),
        ("the peak is at", result["peak_place"]),
        ("device", str(result["device"])),
    ]
    try:
        page = write_timeline_html(
            directory / "timeline.html",
            {"measured": live.timeline, "predicted": predicted.timeline},
            title=title,
            facts=facts,
            largest=live.peak.largest,
        )
        paths["html"] = str(page)
    except InputError as error:  # the page needs an optional package
        Console(stderr=True).print(str(error), style="yellow", highlight=False)
    return paths


def _print(result: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("category at the peak", "predicted MiB", "live MiB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in CATEGORIES:
        sizes = [result[key].get(name, 0) for key in ("predicted_bytes", "live_bytes")]
        if any(sizes):
            table.add_row(name.replace("_", " "), *(f"{size / 2**20:,.1f}" for size in sizes))
    console.print(table)
    console.print(
        f"predicted {result['predicted_peak_bytes'] / 2**20:,.1f} MiB, measured by the allocator "
        f"{result['measured_peak_bytes'] / 2**20:,.1f} MiB, ratio {result['ratio']:.4f}",
        style="bold",
    )
    if result["reserved_bytes"]:
        console.print(f"reserved by the allocator: {result['reserved_bytes'] / 2**20:,.1f} MiB")
    console.print(f"the peak is at {result['peak_place']}")
    console.print("largest storages made by the step:")
    for block in result["largest"][:10]:
        console.print(
            f"  {block['bytes'] / 2**20:10,.1f} MiB  {block['category']}  {block['place']}"
        )
    console.print(f"timeline: {result['png']}" + (f", {result['html']}" if result["html"] else ""))
