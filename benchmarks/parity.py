"""Whether a device computes what the CPU does: logits, losses, gradients, answers, adapters.

Run ``python -m benchmarks.parity --device cuda``. A tiny random Llama, quantized once on the CPU,
carries LoReFT with random values. The CPU computes in fp32; the device computes the same from the
same bytes:

- by storage, arithmetic and way to save memory: logits in evaluation, then loss and gradient;
- what it quantizes itself, against the bytes that the CPU makes;
- the gradient of a step from stored constants, also with only the upper blocks resident;
- greedy answers, token by token, of several rows and of one (which takes other kernels);
- the ``train`` and ``evaluate`` commands on the embedded model.

Errors are relative (L2), and of bytes and tokens the share that differs. A row is ``ok`` if all of
its errors are within its tolerance; the exit code is 1 if one is not.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import lowmem_reft
from benchmarks.common import environment, free, keep, measured_or_error, report
from benchmarks.generate import give_random_values
from benchmarks.reuse_steps import stacked
from benchmarks.step import Shape, write_inputs
from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.data import embedded
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import resolve_device
from lowmem_reft.memory.step import make_batch
from lowmem_reft.methods.attach import attach
from lowmem_reft.options import MemoryOptions, MethodOptions, Storage
from lowmem_reft.reuse.proof import TOLERANCE
from lowmem_reft.reuse.reuse import Reuse

SHAPE = Shape(
    hidden_size=128,
    num_layers=4,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
)
PROMPT, RESPONSE = 40, 12
LOREFT = MethodOptions(method="loreft", rank=4, layers="all", positions="f7+l7")
UPPER = MethodOptions(method="loreft", rank=4, positions="l1", layers="2;3")
KINDS: tuple[tuple[Storage, str, float], ...] = (
    ("nf4", "fp32", TOLERANCE["fp32"]),
    ("nf4", "bf16", TOLERANCE["bf16"]),
    ("bf16", "bf16", TOLERANCE["bf16"]),
    # Activations are rounded to 8 bits too: on the CPU in evaluation alone.
    ("int8", "bf16", 0.1),
)
"""Storage, arithmetic, tolerance."""
QUANTIZED: tuple[Storage, ...] = ("nf4", "int8")
CHECKPOINTED = MemoryOptions(activation_checkpointing=True)
TECHNIQUES = {
    "plain": MemoryOptions(),
    "checkpointing": CHECKPOINTED,
    "offloaded activations": replace(CHECKPOINTED, offload_activations=True),
    "embedding on host, MLP in parts": MemoryOptions(embedding_on_host=True, mlp_tokens=16),
}
BYTES_TOLERANCE = 1e-3
"""Share of quantized weights that may be rounded to the other neighbour."""
TRAINED_TOLERANCE = 1e-2

COLUMNS: dict[str, Callable[[Any], str]] = {
    "errors": lambda row: ", ".join(f"{k} {v:.1e}" for k, v in row["errors"].items()),
    "tolerance": lambda row: f"{row['tolerance']:g}",
    "ok": lambda row: "yes" if row["ok"] else "NO",
}


@dataclass(frozen=True, kw_only=True)
class ParityBenchmark:
    """Compare a device with the CPU."""

    device: Literal["cpu", "cuda"] = "cuda"
    """What is compared; cpu shows that the benchmark works."""
    only: str | None = None
    """Only rows that begin so."""
    small: bool = False
    """No effect: it is small."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too, after each row."""


def checks(directory: Path, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yield the name of each row, and what computes its errors and tolerance."""
    for storage, dtype, tolerance in KINDS:
        for name, memory in TECHNIQUES.items():
            step = partial(step_errors, directory, storage, dtype, memory, device)
            yield f"{storage}, {dtype}, {name}", (step, tolerance)
    for resident in ("all", "upper"):
        reused = partial(reuse_errors, directory, resident, device)
        yield f"reuse, resident {resident}", (reused, TOLERANCE["fp32"])
    for num_rows in (3, 1):
        said = partial(generation_errors, directory, num_rows, device)
        yield f"generation, rows: {num_rows}", (said, TOLERANCE["fp32"])
    for quantized in QUANTIZED:
        share = partial(quantization_errors, directory, quantized, device)
        yield f"{quantized}, quantized there", (share, BYTES_TOLERANCE)
    yield "training", (partial(training_errors, directory, device), TRAINED_TOLERANCE)


def write_bases(directory: Path) -> None:
    """Write the base in full precision, and as the CPU quantizes it."""
    (directory / "fp32").mkdir()
    write_inputs(SHAPE, directory / "fp32")
    for storage in QUANTIZED:
        base = lowmem_reft.load_base(
            directory / "fp32", storage=storage, compute_dtype="fp32", device="cpu"
        )
        lowmem_reft.save_base(base, directory / storage)


def load(
    directory: Path, storage: Storage, dtype: str, device: torch.device, **options: Any
) -> Any:
    """Load the base from the bytes that all places share."""
    stored = directory / (storage if storage in QUANTIZED else "fp32")
    return lowmem_reft.load_base(
        stored, storage=storage, compute_dtype=dtype, device=device, **options
    )


def adapted(base: Any, method: MethodOptions, memory: MemoryOptions | None = None) -> Any:
    """Return the base with an adapter of random values, the same everywhere."""
    memory = memory or MemoryOptions()
    torch.manual_seed(0)
    model = attach(base, method, task_type="CAUSAL_LM", memory=memory, chunked_loss=True)
    give_random_values(model)
    return model


def step_outcome(model: Any) -> dict[str, Tensor]:
    """Return logits of an evaluation, and loss and gradient of the training step after it."""
    batch = make_batch(3, PROMPT + RESPONSE, RESPONSE, padded=True, vocab_size=SHAPE.vocab_size)
    batch = {name: value.to(device_of(model)) for name, value in batch.items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    model.train()
    loss = model(**batch)["loss"]
    loss.backward()
    return {"logits": logits, "loss": loss.detach(), "gradient": gradient_of(model)}


def gradient_of(model: Any) -> Tensor:
    """Return the gradient of all that is trained, as one vector."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten().cpu() for p in trained if p.grad is not None])


@cache
def reference(directory: Path, storage: Storage, method: MethodOptions) -> dict[str, Tensor]:
    """Return the same of the CPU in fp32."""
    cpu = torch.device("cpu")
    # A 16-bit weight is there in full.
    base = load(directory, "fp32" if storage == "bf16" else storage, "fp32", cpu)
    return step_outcome(adapted(base, method))


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative difference of each, L2."""
    pairs = {name: (found[name].cpu().double(), expected[name].cpu().double()) for name in found}
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def step_errors(
    directory: Path, storage: Storage, dtype: str, memory: MemoryOptions, device: torch.device
) -> dict[str, float]:
    """Compare one step."""
    model = adapted(load(directory, storage, dtype, device), LOREFT, memory)
    return relative(step_outcome(model), reference(directory, storage, LOREFT))


def quantization_errors(
    directory: Path, storage: Storage, device: torch.device
) -> dict[str, float]:
    """Compare what the device makes of full precision with the bytes of the CPU."""
    expected = load(directory, storage, "fp32", torch.device("cpu"))
    found = lowmem_reft.load_base(
        directory / "fp32", storage=storage, compute_dtype="fp32", device=device
    )
    first, second = (
        torch.cat([p.data.flatten().cpu() for p in base.parameters() if not p.is_floating_point()])
        for base in (found, expected)
    )
    return {"bytes": float((first != second).double().mean())}


def reuse_errors(directory: Path, resident: str, device: torch.device) -> dict[str, float]:
    """Compare the gradient of a step from a store on the device with a plain one of the CPU."""
    generator = torch.Generator().manual_seed(0)
    size = (3, PROMPT + RESPONSE)
    ids = torch.randint(3, SHAPE.vocab_size, size, generator=generator).tolist()
    examples = [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids]
    plain = adapted(load(directory, "nf4", "fp32", torch.device("cpu")), UPPER).train()
    plain(**stacked(examples))["loss"].backward()
    more = {"resident": "upper", "first_resident": 3} if resident == "upper" else {}
    model = adapted(load(directory, "nf4", "fp32", device, **more), UPPER).train()
    reuse = Reuse(model, examples, directory / f"store-{resident}")
    reuse.announce([0, 1, 2])
    reuse.loss([0, 1, 2]).backward()
    return relative({"gradient": gradient_of(model)}, {"gradient": gradient_of(plain)})


def generation_errors(directory: Path, num_rows: int, device: torch.device) -> dict[str, float]:
    """Compare greedy answers: tokens, and the logits they were chosen by."""
    said = [answers(directory, num_rows, place) for place in (device, torch.device("cpu"))]
    tokens = [each.pop("tokens").cpu() for each in said]
    differing = float((tokens[0] != tokens[1]).double().mean())
    return relative(*said) | {"tokens": differing}


def answers(directory: Path, num_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return (tokens, rows, vocabulary) logits and (rows, sequence) tokens."""
    model = adapted(load(directory, "nf4", "fp32", device), LOREFT).eval()
    base_of(model).generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SHAPE.vocab_size, (num_rows, PROMPT), generator=generator).to(device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=RESPONSE,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return {"logits": torch.stack(made.logits), "tokens": made.sequences}


def training_errors(directory: Path, device: torch.device) -> dict[str, float]:
    """Compare what the train command makes, plain and from a store, and what evaluate says."""
    given = {"model": str(embedded.model_dir()), "data": str(embedded.task_files()[0])}
    given |= {"storage": "nf4", "compute_dtype": "fp32"}
    common: dict[str, Any] = {**given, "limit": 8, "batch_size": 4, "quiet": True}
    cpu = torch.device("cpu")

    def adapter(place: torch.device, reuse: str) -> Path:
        output = directory / f"trained-{place.type}-{reuse}"
        run = {"output_dir": output, "device": str(place), "reuse": reuse, "epochs": 1.0}
        edit = {"method": "loreft", "layers": "upper:0.5", "positions": "l1"}
        lowmem_reft.train(**common, **run, **edit, overwrite=True)
        return output / "adapter"

    def vector(adapter: Path) -> Tensor:
        return torch.cat([v.flatten() for v in load_file(adapter / WEIGHTS_NAME).values()])

    def loss(place: torch.device) -> float:
        said = lowmem_reft.evaluate(**common, adapter=str(of_cpu), device=str(place))
        return float(said["loss"])

    of_cpu = adapter(cpu, "off")
    expected = vector(of_cpu)
    found = {f"reuse {reuse}": vector(adapter(device, reuse)) for reuse in ("off", "auto")}
    scored, on_cpu = loss(device), loss(cpu)
    off = abs(scored - on_cpu) / abs(on_cpu)
    return {**relative(found, dict.fromkeys(found, expected)), "evaluation": off}


def measured(errors: Callable[[], dict[str, float]], tolerance: float) -> dict[str, Any]:
    """Return what a row says of its errors."""
    started = time.perf_counter()
    found = errors()
    # What is no number is no agreement.
    ok = all(error <= tolerance for error in found.values())
    return {
        "errors": found,
        "tolerance": tolerance,
        "ok": ok,
        "seconds": time.perf_counter() - started,
    }


def run(options: ParityBenchmark, device: torch.device) -> dict[str, Any]:
    """Compare row by row and return the result."""
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "parity",
        "rows": rows,
        "ratios": [],
        "environment": environment(device.type),
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_bases(directory)
        for label, (errors, tolerance) in checks(directory, device):
            if not label.startswith(options.only or ""):
                continue
            rows.append(
                {"method": label, **measured_or_error(partial(measured, errors, tolerance))}
            )
            free(device)
            keep(result, options.output)
        reference.cache_clear()
    return result


def main(options: ParityBenchmark) -> int:
    """Print the rows and one JSON line; 1 if a row is not ok, 2 if there is no such device."""
    try:
        device = resolve_device(options.device)
    except InputError as error:
        print(f"benchmarks.parity: {error}", file=sys.stderr)
        return 2
    disable_progress_bar()  # one for every base that is loaded
    result = run(options, device)
    report(
        result,
        title=f"{device} beside the CPU",
        columns=COLUMNS,
        json_only=options.json,
        output=options.output,
    )
    return int(not all(row.get("ok") for row in result["rows"]))


if __name__ == "__main__":
    gc.freeze()  # what the libraries have made is not to be walked after every row
    sys.exit(main(tyro.cli(ParityBenchmark, description=__doc__)))
