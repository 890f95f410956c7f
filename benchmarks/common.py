"""What benchmarks share: alternated child processes, timers, ratios, the table and the JSON line.

Each method runs in a process of its own and measures one sample when it is told to. The parent
goes round the methods, so that a machine that slows down slows all of them. Only the standard
library is imported at the top: a worker also runs in a peer's own environment, which may have
nothing else of ours.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
PYREFT_PYTHON_VARIABLE = "LOWMEM_REFT_PYREFT_PYTHON"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "pyreft", "pyvene")


class WorkerError(RuntimeError):
    """A worker process ended before it answered; the message ends with what it wrote last."""


@dataclass(kw_only=True)
class Worker:
    """A child process that prepares one method, then measures one sample each time it is told to.

    Both directions carry one line per message: the parent sends ``sample``, the child answers with
    JSON.
    """

    label: str
    module: str
    spec: Mapping[str, Any]
    python: str = sys.executable
    threads: int = 1
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)
    _log: IO[str] | None = field(default=None, repr=False)

    def start(self) -> dict[str, Any]:
        """Start the process, wait until it is prepared and return what it says about itself."""
        # An activated environment of ours must not leak into a peer's interpreter.
        environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
        environment |= {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [self.python, "-m", self.module, json.dumps(self.spec)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self._answer()

    def sample(self) -> dict[str, Any]:
        """Measure once."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer then says why the child is gone
            self._process.stdin.write("sample\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._log is not None:
            self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._log is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            tail = " | ".join(self._log.read().strip().splitlines()[-3:])
            raise WorkerError(f"{self.label} ended with exit code {code}: {tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(prepare: Callable[[], tuple[dict[str, Any], Callable[[], dict[str, Any]]]]) -> None:
    """Be the child: prepare, say so, then answer each line on standard input with one sample.

    Whatever libraries print goes to standard error, so that standard output carries the answers
    only.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts, sample = prepare()
    _say(answers, facts | {"versions": versions()})
    for _ in sys.stdin:
        _say(answers, sample())


def alternate(
    workers: Sequence[Worker], *, num_warmup: int, num_repeats: int
) -> list[dict[str, Any]]:
    """Measure all workers in turn and return one row per worker, in the same order.

    Every other round runs backwards, so that a steady drift favours nobody. A worker that fails is
    a row with its ``error``; the others go on.

    Returns:
        Rows with ``method``, the worker's own facts, ``samples_s``, ``median_s``, ``min_s``,
        ``max_s`` and the other values of its last sample; seconds are per call.
    """
    rows: list[dict[str, Any]] = [{"method": worker.label} for worker in workers]
    samples: list[list[dict[str, Any]]] = [[] for _ in workers]
    try:
        for worker, row in zip(workers, rows, strict=True):
            row.update(_answer_or_error(worker.start))
        for index_round in range(num_warmup + num_repeats):
            order = range(len(workers)) if index_round % 2 == 0 else reversed(range(len(workers)))
            for i in order:
                if "error" not in rows[i]:
                    print(f"round {index_round}: {workers[i].label}", file=sys.stderr, flush=True)
                    samples[i].append(_answer_or_error(workers[i].sample))
                    rows[i].update(samples[i][-1])
    finally:
        for worker in workers:
            worker.close()
    for row, taken in zip(rows, samples, strict=True):
        if "error" not in row:
            del row["seconds"]
            row.update(summarize([sample["seconds"] for sample in taken[num_warmup:]]))
    return rows


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread of timed samples, with the samples themselves."""
    return {
        "samples_s": list(seconds),
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
    }


def ratio(
    rows: Sequence[Mapping[str, Any]], ours: str, theirs: str, goal: float
) -> dict[str, Any] | None:
    """Our time over theirs, round by round, against the goal; None if either was not measured.

    Samples of one round were taken next to each other, so their ratio is what drift disturbs least.
    """
    samples = {row["method"]: row["samples_s"] for row in rows if "samples_s" in row}
    if ours not in samples or theirs not in samples:
        return None
    per_round = [a / b for a, b in zip(samples[ours], samples[theirs], strict=True)]
    median = statistics.median(per_round)
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": median,
        "min_ratio": min(per_round),
        "max_ratio": max(per_round),
        "goal": goal,
        "met": median <= goal,
    }


def timed_calls(
    action: Callable[[], object], *, min_sample_s: float
) -> Callable[[], dict[str, Any]]:
    """A sample of a short action: calls that fill ``min_sample_s``, as seconds per call."""
    num_calls = 1
    for _ in range(2):  # the first call is a warm-up, and enough of one where it fills a sample
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        if seconds >= min_sample_s:
            break
        num_calls = round(min_sample_s / max(seconds, 1e-7))

    def sample() -> dict[str, Any]:
        started = time.perf_counter()
        for _ in range(num_calls):
            action()
        return {"seconds": (time.perf_counter() - started) / num_calls, "num_calls": num_calls}

    return sample


def now(device: torch.device) -> float:
    """Return a clock's seconds once the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measured_or_error(
    measure: Callable[[], dict[str, Any]], *, started: float | None = None, seconds: float = 0
) -> dict[str, Any]:
    """Return what is measured, or as ``error`` why it is not, so that other rows can be.

    What was not to be expected is in ``traceback`` too: see :func:`failed`.

    Args:
        measure: Measures one row.
        started: When the benchmark started, by ``time.perf_counter``; None: without a limit.
        seconds: A row that would start later than this is left out.
    """
    import torch

    from lowmem_reft.errors import InputError

    if started is not None and time.perf_counter() - started > seconds:
        return {"error": f"left out after {seconds:g} s"}
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    except InputError as error:  # such as a tied embedding that cannot leave the card
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        said = (str(error).splitlines() or [""])[0]
        lines = traceback.format_exc().splitlines()
        return {"error": f"{type(error).__name__}: {said}", "traceback": lines[-12:]}


def failed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row failed for a reason that was not to be expected, as no memory or time left."""
    return any("traceback" in row for row in rows)


def reset_peak_rss() -> None:
    """Start a new peak of resident memory where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int | None:
    """Peak resident memory since :func:`reset_peak_rss`; None where /proc does not tell.

    ``getrusage`` is of no use here: a child inherits its parent's peak.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as this environment has them."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment(device: str = "cpu", peer_python: str | None = None) -> dict[str, Any]:
    """Versions, device, commit, command, date and load average, as they are when the run starts.

    The path of the peer's interpreter is left out of the command: it means nothing on another
    machine.
    """
    from lowmem_reft.machine import provenance
    from lowmem_reft.machine.devices import device_name

    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return {
        "versions": provenance.versions(),
        "device": device_name(device),
        "commit": provenance.commit(),
        "command": command.replace(peer_python, "PYTHON") if peer_python else command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def pyreft_python(option: str | None) -> str | None:
    """The interpreter of an environment with pyreft: the option, else the environment variable."""
    return option or os.environ.get(PYREFT_PYTHON_VARIABLE) or None


def report(
    result: Mapping[str, Any],
    *,
    title: str,
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
    json_only: bool,
    output: Path | None,
) -> None:
    """Print the table and the ratios, write the file, and end with the result as one JSON line.

    Args:
        result: The whole result; ``rows`` become the table and ``ratios`` the lines below it.
        title: Title of the table.
        columns: Header to cell text.
        json_only: Keep standard output to the JSON line; the table goes to standard error.
        output: File that receives the result too.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=json_only)
    table = Table(title=title)
    for header in ("method", *columns):
        table.add_column(header, no_wrap=header == "method")
    for row in result["rows"]:
        failed = "error" in row
        cells = ["failed"] if failed else [cell(row) for cell in columns.values()]
        table.add_row(row["method"], *cells)
    console.print(table)
    for row in result["rows"]:
        if "error" in row:
            console.print(row["error"], style="red", markup=False)
    for entry in filter(None, result["ratios"]):
        verdict = "met" if entry["met"] else "missed"
        spread = f"{entry['min_ratio']:.3g} to {entry['max_ratio']:.3g}"
        console.print(f"{entry['ours']} / {entry['theirs']}", style="bold")
        console.print(f"  {entry['ratio']:.3g} ({spread}), goal {entry['goal']:g}: {verdict}")
    finish(result, output)


def finish(result: Mapping[str, Any], output: Path | None) -> None:
    """Write the file, if one is named, and end with the result as one JSON line."""
    keep(result, output)
    print(json.dumps(result))


def say(line: str) -> None:
    """Print a line for who waits."""
    print(line, file=sys.stderr, flush=True)


def write(result: Mapping[str, Any], output: Path) -> None:
    """Write the file that keeps a result: whole, or what was there before stays."""
    from lowmem_reft.machine.files import write_json

    write_json(output, result)


def keep(result: Mapping[str, Any], output: Path | None) -> None:
    """Write what there is so far, if a file is named: a run that is killed leaves its rows."""
    if output is not None:
        write(result, output)


def tiny_llama(num_layers: int) -> Any:
    """Return the configuration that stands for a real model's where it must be quick."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama",
        hidden_size=64,
        num_hidden_layers=num_layers,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )


def _answer_or_error(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask()
    except WorkerError as error:
        return {"error": str(error)}


def _say(stream: TextIO, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
