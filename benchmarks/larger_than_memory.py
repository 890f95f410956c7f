"""Training a base that does not fit: under a hard limit of memory, against the run without one.

Run ``python -m benchmarks.larger_than_memory``. An NF4 Llama of the shape of an 8B model (4.1 GB as
stored, random, written one block after the other) is trained with LoReFT at one upper layer by the
``train`` command twice: with the whole base, and with ``--resident upper`` under ``RLIMIT_DATA``,
which limits all private memory of the process. The limit is what the same command takes for a tiny
model, plus half of the base's quantized size. The two adapters must be equal. The base's files may
stay in the page cache, which is the system's, not the process's. Linux only.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

from benchmarks.common import environment, finish
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.data import embedded

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class LargerThanMemory:
    """What to train."""

    num_layers: int = 32
    """Blocks of the base."""
    layer: int = 24
    """The block that LoReFT edits."""
    hidden_size: int = 4096
    """Width; the MLP is 3.5 times as wide."""
    num_examples: int = 16
    """Examples of the data set."""
    epochs: int = 2
    """Passes over it."""
    share: float = 0.5
    """Part of the quantized size that the limited run may take beside its own footprint."""
    directory: Path | None = None
    """Where the base and the runs go; default: a temporary directory."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/larger_than_memory.json)."""


def write_base(directory: Path, options: LargerThanMemory) -> int:
    """Write a random NF4 checkpoint, never more than a block in memory; return its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=options.hidden_size,
        num_hidden_layers=1,
        intermediate_size=options.hidden_size * 7 // 2,
        num_attention_heads=options.hidden_size // 128,
        num_key_value_heads=max(1, options.hidden_size // 512),
        vocab_size=32000,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    weight_map: dict[str, str] = {}
    total = 0
    for index in range(options.num_layers):
        base: Any = base_with_random_weights(
            copy.deepcopy(config), device=torch.device("cpu"), seed=index, storage="nf4"
        )
        tensors = {
            name.replace("layers.0.", f"layers.{index}."): value.contiguous()
            for name, value in base.state_dict().items()
            if index == 0 or "layers.0." in name
        }
        name = f"model-{index + 1:05d}-of-{options.num_layers:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    config.num_hidden_layers = options.num_layers
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    quantization: Any = BitsAndBytesConfig
    config.quantization_config = quantization(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.model_dir() / name, directory / name)
    return total


def train(
    model: Path, output: Path, options: LargerThanMemory, *, limit: int | None, upper: bool
) -> dict[str, Any]:
    """Run the train command in a process of its own; say how long it took and what it held."""
    layer = "1" if model == embedded.model_dir() else str(options.layer)
    command = [sys.executable, "-m", "lowmem_reft.cli", "train", "--model", str(model)]
    command += ["--data", str(embedded.task_files()[0]), "--limit", str(options.num_examples)]
    command += ["--method", "loreft", "--rank", "4", "--layers", layer, "--positions", "l1"]
    command += ["--storage", "nf4", "--compute-dtype", "bf16", "--device", "cpu"]
    command += ["--epochs", str(options.epochs), "--batch-size", "4", "--seed", "0"]
    command += ["--output-dir", str(output), "--reuse", "trunk", "--json", "--quiet"]
    command += ["--resident", "upper" if upper else "all"]

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (output / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=restrict
        )
        watch = _Watch(process.pid)
        printed, _ = process.communicate()
    watch.stop()
    if process.returncode != 0:
        raise RuntimeError(f"train ended with {process.returncode}: {output / 'log.txt'}")
    result = json.loads(printed.strip().splitlines()[-1])
    return {
        "wall_s": time.perf_counter() - started,
        "peak_data_bytes": watch.peak,
        "limit_bytes": limit,
        **{key: result[key] for key in ("reuse", "store_bytes", "build_time_s", "step_time_s")},
    }


class _Watch:
    """Samples the private memory (VmData) of a process."""

    def __init__(self, pid: int) -> None:
        self.path = Path(f"/proc/{pid}/status")
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.01):
            try:
                text = self.path.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("VmData:"):
                    self.peak = max(self.peak, 1024 * int(line.split()[1]))

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self._thread.join()


def run(options: LargerThanMemory, directory: Path) -> dict[str, Any]:
    """Write the base, train thrice, compare the adapters."""
    facts = environment("cpu")
    base = directory / "base"
    quantized = write_base(base, options)
    _say(f"base as stored: {quantized / GIB:.2f} GiB")
    tiny = train(embedded.model_dir(), directory / "tiny", options, limit=None, upper=False)
    _say(f"footprint with a tiny model: {tiny['peak_data_bytes'] / GIB:.2f} GiB")
    limit = int(tiny["peak_data_bytes"] + options.share * quantized)
    limited = train(base, directory / "upper", options, limit=limit, upper=True)
    _say(f"upper blocks, at most {limit / GIB:.2f} GiB: {limited['wall_s']:.0f} s")
    whole = train(base, directory / "all", options, limit=None, upper=False)
    _say(f"whole base, {whole['peak_data_bytes'] / GIB:.2f} GiB: {whole['wall_s']:.0f} s")
    one, two = (
        load_file(directory / name / "adapter" / "adapter_model.safetensors")
        for name in ("upper", "all")
    )
    squares = [((one[key] - two[key]).norm() ** 2, two[key].norm() ** 2) for key in two]
    difference = float(sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
    return {
        "benchmark": "larger_than_memory",
        "options": {k: v for k, v in asdict(options).items() if k not in ("output", "directory")},
        "environment": facts,
        "quantized_bytes": quantized,
        "footprint_bytes": tiny["peak_data_bytes"],
        "limited": limited,
        "whole": whole,
        "adapter_relative_difference": difference,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(options: LargerThanMemory) -> int:
    """Print what was measured and one JSON line."""
    directory = options.directory or Path(tempfile.mkdtemp(prefix="lowmem-reft-larger-"))
    try:
        result = run(options, directory)
    finally:
        if options.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    finish(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LargerThanMemory, description=__doc__)))
