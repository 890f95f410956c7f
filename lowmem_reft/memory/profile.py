"""``lowmem-reft profile``: one training step for real, measured beside its prediction."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Column, Table

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.loading import load_base
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.errors import InputError
from lowmem_reft.machine.destinations import check_directory, read_or_none
from lowmem_reft.machine.devices import device_name, dtype_name, resolve_device, resolve_storage
from lowmem_reft.machine.files import write_json
from lowmem_reft.machine.provenance import versions
from lowmem_reft.machine.run_files import check_run_file, write_run_file
from lowmem_reft.memory.live import CATEGORIES, LiveMemory, label_model, track
from lowmem_reft.memory.measure import Measured, measure
from lowmem_reft.memory.planner import GIB, Card, Planner, read_config
from lowmem_reft.memory.predict import Setting
from lowmem_reft.memory.step import optimizer_tensors, training_step, warm_up
from lowmem_reft.memory.verdict import lengths_of
from lowmem_reft.methods.table import find_method

if TYPE_CHECKING:
    from pathlib import Path

    from lowmem_reft.options import ProfileOptions


def run_profile(options: ProfileOptions) -> dict[str, Any]:
    """Measure a step, draw its timeline beside the predicted one, and print both.

    Returns:
        ``predicted_peak_bytes``, ``measured_peak_bytes`` (CPU: allocator events on top of what was
        there; CUDA: ``max_memory_allocated``), ``reserved_bytes`` (CUDA), ``predicted_bytes`` and
        ``live_bytes`` by category at the peak, ``peak_place``, ``largest`` and the paths of what
        was written.

    Raises:
        InputError: An option is wrong, or the model cannot be loaded.
    """
    check_directory(
        "output_dir",
        options.output_dir,
        written=("profile.json", "timeline.png", "timeline.html"),
        is_ours=_holds_profile,
    )
    check_run_file(options.output_dir)
    device = resolve_device(options.model.device)
    setting = _setting(options, device)
    lengths = lengths_of(options.lengths)
    config = read_config(options.model.model)
    planner = Planner(config, Card(name="", memory_bytes=0))
    predicted = planner.plan(setting, lengths)
    timeline = planner.predictor(setting).training(lengths, keep_timeline=True)
    made_up = options.random_weights
    source = config if made_up else options.model.model
    model = build_model(source, setting, device, random_weights=made_up)
    batch = {key: value.to(device) for key, value in lengths.make_batch(config).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    warm_up(model, optimizer)
    accumulation = lengths.gradient_accumulation
    step = partial(training_step, model, batch, optimizer, micro_batches=accumulation)
    step()  # kernels are chosen and caches filled in the first one
    measured, held = measure_step(device, model, optimizer, batch, step)
    peak_bytes = measured.allocated_bytes + held
    with track(device.type, model=base_of(model), keep_timeline=True) as live:
        _label(live, model, optimizer, batch)
        live.reset_peak()
        step(memory=live)
    result = {
        "predicted_peak_bytes": predicted.peak_bytes,
        "measured_peak_bytes": peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "ratio": predicted.peak_bytes / peak_bytes,
        "predicted_bytes": predicted.breakdown_bytes,
        "live_bytes": live.peak.breakdown_bytes,
        "peak_place": str(live.peak.place),
        "predicted_peak_place": predicted.peak_place,
        "largest": [storage.as_json() for storage in live.peak.largest],
        "device": device_name(options.model.device),
        "versions": versions(),
    }
    result.update(_write(options, result, live, timeline))
    if not options.json:
        _print(result)
    return result


def _holds_profile(directory: Path) -> bool:
    profile = read_or_none(directory / "profile.json")
    return isinstance(profile, dict) and "predicted_peak_bytes" in profile


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
    """Load a base, or make one up of a configuration, and put on it what the setting names.

    Raises:
        InputError: The model cannot be loaded, or does not go with the setting.
    """
    make: Any = base_with_random_weights if random_weights else load_base
    return setting.attached_to(make(model, device=device, **setting.of_base()))


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
    _label(held, model, optimizer, batch)
    return measured, held.current_bytes


def _label(memory: LiveMemory, model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> None:
    """Count what is there before a step."""
    for value in batch.values():
        memory.add(value, "inputs")
    label_model(memory, model)
    for value in optimizer_tensors(optimizer):
        memory.add(value, "optimizer")


def _write(
    options: ProfileOptions, result: dict[str, Any], live: LiveMemory, predicted: LiveMemory
) -> dict[str, Any]:
    """Write profile.json and the pictures; return their paths."""
    # Here, as a drawing needs matplotlib, which others who measure a step do not.
    from lowmem_reft.memory.picture import draw_timeline, write_timeline_html

    directory = options.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "profile.json", result)
    write_run_file(directory, "profile", options)
    title = f"{options.model.model}, {options.method.method}: live memory in one training step"
    png = draw_timeline(directory / "timeline.png", live.timeline, title=title)
    paths = {"png": str(png), "html": None}
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
        Console(stderr=True, markup=False).print(str(error), style="yellow", highlight=False)
    return paths


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _print(result: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    sizes = [Column(f"{kind} MiB", justify="right") for kind in ("predicted", "live")]
    table = Table("category at the peak", *sizes, box=None, pad_edge=False)
    for name in CATEGORIES:
        both = [result[key].get(name, 0) for key in ("predicted_bytes", "live_bytes")]
        if any(both):
            table.add_row(name.replace("_", " "), *map(_mib, both))
    console.print(table)
    console.print(
        f"predicted {_mib(result['predicted_peak_bytes'])} MiB, measured by the allocator "
        f"{_mib(result['measured_peak_bytes'])} MiB, ratio {result['ratio']:.4f}",
        style="bold",
    )
    if result["reserved_bytes"]:
        console.print(f"reserved by the allocator: {_mib(result['reserved_bytes'])} MiB")
    console.print(f"the peak is at {result['peak_place']}")
    console.print("largest storages made by the step:")
    for block in result["largest"][:10]:
        console.print(f"  {_mib(block['bytes']):>10} MiB  {block['category']}  {block['place']}")
    console.print(f"timeline: {result['png']}" + (f", {result['html']}" if result["html"] else ""))
