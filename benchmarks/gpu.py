"""All that a GPU is wanted for, in the order of what matters, within a given time.

Run ``python -m benchmarks.gpu --minutes 12 --output gpu.json`` where there is a card;
``--rehearse`` runs the same on the CPU with tiny shapes, so that nothing trivial fails on the day.
Each part is a benchmark of its own in a process of its own, which is ended with all that it has
started when its time is over. The file holds command, commit, versions and device, and for each
part its status, seconds, figures (also of one that was ended: those that it had by then) and, if it
failed, what it wrote last; it is written anew after each part. No weights are needed: bases of real
shapes are random, drawn as they are stored. One card must hold seven 8B bases in NF4 for decode.

- parity: logits, losses, gradients and answers are those of the CPU (``benchmarks.parity``);
- memory: predicted, allocated and reserved, 12 settings of the 8B shape (``benchmarks.memory``);
- step: the same for PEFT's QLoRA and LoReFT at other lengths, with times;
- reuse: steps from stored constants at the 8B shape, also with upper blocks alone resident, beside
  PEFT's QLoRA (``benchmarks.reuse``);
- decode: what an adapter costs in generation at the 8B shape (``benchmarks.generate``);
- 70b: a 70B shape trained above layer 60 within 24 GiB (``benchmarks.reuse``).

The exit code is 1 if a part of parity failed, 2 if there is no card.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import ROOT, environment, finish, keep, say
from lowmem_reft.errors import InputError

EIGHT, SEVENTY = "llama-3.1-8b", "llama-3.3-70b"
LEAST_S = 20
"""A part that has less than this is skipped: it would only have loaded its libraries."""
TAIL_LINES = 30
REHEARSAL_FACTOR = 10
"""A rehearsal may share two cores with other work: so much longer its parts may take."""
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
SETTINGS = {ALLOCATOR: "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
"""Environment variables of the parts, unless they are set: predictions count on the first."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One benchmark."""

    module: str
    """What is run."""
    arguments: tuple[str, ...] = ()
    """With these, and with where and how large."""
    limit_s: float
    """The most that it may take, in seconds."""
    is_correctness: bool = False
    """Whether results are worth nothing if it fails."""
    stops_itself: bool = False
    """Whether it takes ``--seconds``, and leaves out rows that would start later."""

    def command(self, *, rehearse: bool, limit_s: float, output: Path) -> list[str]:
        """Return the command line within a limit that may be less than its own."""
        where = ("--device", "cpu", "--small") if rehearse else ("--device", "cuda")
        # The last row, which begins in time, has to end in time.
        more = ("--seconds", f"{0.8 * limit_s:.0f}") if self.stops_itself else ()
        out = ("--json", "--output", str(output))
        return [sys.executable, "-m", self.module, *self.arguments, *where, *more, *out]


AT_8B = ("--model", EIGHT)
PARTS: dict[str, Part] = {
    "parity": Part(module="benchmarks.parity", limit_s=180, is_correctness=True),
    "memory": Part(
        module="benchmarks.memory",
        arguments=(*AT_8B, "--tokens", "2048"),
        limit_s=180,
        stops_itself=True,
    ),
    "step": Part(
        module="benchmarks.memory",
        arguments=(*AT_8B, "--tokens", "512,8192", "--methods", "QLoRA", "7+l7", "half l1"),
        limit_s=150,
        stops_itself=True,
    ),
    "reuse": Part(
        module="benchmarks.reuse",
        arguments=("--shape", EIGHT, "--repeats", "3"),
        limit_s=180,
        stops_itself=True,
    ),
    "decode": Part(
        module="benchmarks.generate",
        arguments=(*AT_8B, "--compute-dtype", "bf16", "--repeats", "2"),
        limit_s=120,
    ),
    "70b": Part(
        module="benchmarks.reuse",
        arguments=("--shape", SEVENTY, "--methods", "reused", "--repeats", "3"),
        limit_s=150,
        stops_itself=True,
    ),
}
"""What is measured, the most important first."""


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """Measure all that needs a GPU, within some minutes."""

    minutes: float = 12
    """All that there is; what there is no time for is skipped, and said."""
    parts: tuple[str, ...] = ()
    """Only parts of these names; default: all."""
    rehearse: bool = False
    """On the CPU, with tiny shapes."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too, after each part."""


def run_part(part: Part, *, rehearse: bool, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own and return what came of it.

    Returns:
        ``command``, ``status`` (ok, failed, timed out), ``seconds``, ``figures`` (None if it had
        none yet) and, unless it is ok, ``stderr``: the last lines.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as log:
        output = Path(directory) / "figures.json"
        command = part.command(rehearse=rehearse, limit_s=limit_s, output=output)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=SETTINGS | dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            with suppress(ProcessLookupError):  # all of them are gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        figures = None
        with suppress(FileNotFoundError):
            figures = json.loads(output.read_text(encoding="utf-8"))
        result: dict[str, Any] = {
            "command": " ".join(["python", *command[1:-2]]),
            "status": status,
            "seconds": time.perf_counter() - started,
            "figures": figures,
        }
        if status != "ok":
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            result["stderr"] = [line[:500] for line in lines[-TAIL_LINES:]]
    return result


def run_parts(
    parts: Mapping[str, Part], options: GpuBenchmark, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Run parts in their order until the time is over; keep the result after each."""
    end = time.monotonic() + 60 * options.minutes
    done: dict[str, Any] = {}
    given = {k: v for k, v in asdict(options).items() if k != "output"}
    result = {"benchmark": "gpu", "options": given, "environment": record, "parts": done}
    for name, part in parts.items():
        most_s = part.limit_s * (REHEARSAL_FACTOR if options.rehearse else 1)
        limit_s = min(most_s, end - time.monotonic())
        if limit_s < min(most_s, LEAST_S):
            done[name] = {"status": "skipped", "error": f"{max(0, limit_s):.0f} s were left"}
        else:
            done[name] = run_part(part, rehearse=options.rehearse, limit_s=limit_s)
        keep(result, options.output)
        say("\n".join(said(name, done[name])))
    return result


def said(name: str, found: Mapping[str, Any]) -> Iterable[str]:
    """Yield what came of a part in lines."""
    yield f"{name}: {found['status']}, {found.get('seconds', 0):.0f} s {found.get('error', '')}"
    for row in (found.get("figures") or {}).get("rows", []):
        if "error" in row or row.get("ok") is False:
            yield f"  {row['method']}: {row.get('error') or row.get('errors')}"
    for line in found.get("stderr", [])[-5:]:
        yield f"  | {line}"


def is_wrong(parts: Mapping[str, Part], result: Mapping[str, Any]) -> bool:
    """Whether a part failed, or was ended, without which the others are worth nothing."""
    found = result["parts"]
    bad = ("failed", "timed out")
    return any(part.is_correctness and found[n]["status"] in bad for n, part in parts.items())


def chosen(names: Sequence[str]) -> dict[str, Part]:
    """Return the parts of these names, in their own order; none means all.

    Raises:
        InputError: There is no such part.
    """
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise InputError(
            f"parts must be of {', '.join(PARTS)}, got {unknown[0]!r}; choose of these"
        )
    return {name: part for name, part in PARTS.items() if not names or name in names}


def main(options: GpuBenchmark) -> int:
    """Run all parts; print one JSON line."""
    try:
        parts = chosen(options.parts)
        record = environment("cpu" if options.rehearse else "cuda")
    except InputError as error:
        say(f"benchmarks.gpu: {error}")
        return 2
    allocator = os.environ.get(ALLOCATOR, SETTINGS[ALLOCATOR])
    result = run_parts(parts, options, {**record, "allocator": allocator})
    finish(result, options.output)
    return int(is_wrong(parts, result))


if __name__ == "__main__":
    # Whoever ends this process ends the part that runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(tyro.cli(GpuBenchmark, description=__doc__)))
