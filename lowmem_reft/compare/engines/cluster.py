"""Cells as tasks of a Ray cluster: that of RAY_ADDRESS, or that runs here, else a new one.

The model of a cell must be on every node under the same name (a hub id, or a directory with the
same path), and this package in the same version. Rows are sent along, and everything that a cell
writes comes back, so that no file system is shared. What several cells share is looked for under
the driver's paths, and made again on each node that has none: stores of ``--reuse``, and the
adapters of ``--train-task`` and ``--lr-search``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import Cell, Result, write_cell
from lowmem_reft.compare.engines.launch import available_threads, result_or_cause
from lowmem_reft.compare.engines.node import (
    HANDED_OVER,
    Input,
    Part,
    data_files,
    read_content,
    run_on_node,
)
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.files import open_itself

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started here: rows and parts of files are all that goes through it."""

_ANSWER_S = 10.0
_POLL_S = 0.1


@contextmanager
def connected() -> Iterator[None]:
    """Connect to a cluster, or start one that ends with this block.

    Raises:
        InputError: Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it, a warning about a future default: tasks without a GPU are to see all of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "workers must be a number where Ray is not installed, got 'ray'; install it: "
            "pip install 'lowmem-reft[ray]'"
        ) from error
    check_versions("ray")
    if ray.is_initialized():  # the caller's own
        yield
        return
    with _same_sigterm_handler():
        _connect(ray)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition(":")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if colon and port.isdecimal() and "/" not in host:
            # Ray would go on asking for minutes.
            socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
        try:
            ray.init(object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        except ValueError:  # there is a cluster, and its memory is not ours to choose
            ray.init(**quiet)
    except OSError as error:  # ConnectionError is one
        raise InputError(
            f"RAY_ADDRESS must name a cluster that answers, got {address!r} ({error}); mend it, or "
            "use RAY_ADDRESS=local"
        ) from error


@contextmanager
def _same_sigterm_handler() -> Iterator[None]:
    """Ray replaces the program's handler by one that exits without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


class RayRun:
    """The task of one cell."""

    def __init__(self, cell: Cell, stream: Any) -> None:
        """Watch the task behind ``stream``."""
        self.cell = cell
        self._stream = stream
        self._start = time.perf_counter()
        self._cause: str | None = None

    def ended(self) -> bool:
        """Take over what has come in; whether it was the last."""
        import ray

        while self._cause is None and ray.wait([self._stream], timeout=0)[0]:
            try:
                item = ray.get(next(self._stream))
            except (ray.exceptions.RayError, StopIteration) as error:
                # A worker or node that died, or that ran out of memory; only the first line is
                # about this cell.
                lines = str(error).splitlines() or ["no result"]
                self._cause = f"Ray: {type(error).__name__}: {lines[0]}"
            else:
                self._take(item)
        return self._cause is not None

    def _take(self, item: Part | str) -> None:
        if isinstance(item, str):
            self._cause = item
            return
        path = self.cell.directory / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_itself(path, "ab") as file:
            file.write(item.data)

    def result(self) -> Result:
        """The result that came in, or one that says why none did."""
        assert self._cause is not None
        return result_or_cause(self.cell, self._cause, time.perf_counter() - self._start)

    def cancel(self) -> None:
        """Cancel the task, which stops its process on its node."""
        import ray

        ray.cancel(self._stream)

    def join(self, timeout_s: float) -> None:
        """Wait until the task is gone; else its worker is killed, and the process with it."""
        import ray

        deadline = time.monotonic() + timeout_s
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not self.ended():
            ray.cancel(self._stream, force=True)


class RayEngine:
    """As many cells at the same time as the cluster has room for.

    Each has one GPU where the cluster has any, else as many cores as a sequential run has threads:
    OMP_NUM_THREADS, or all of this machine's. A task is tried once; a cell whose worker died is a
    row with an error, and runs again with the next command.
    """

    def __init__(self, child_command: Sequence[str]) -> None:
        """Run cells with ``child_command``, which begins with Python; the cluster is connected."""
        import ray

        self._arguments = tuple(child_command[1:])
        self._variables = {name: os.environ.get(name) for name in HANDED_OVER}
        self._task = ray.remote(num_returns="streaming", max_retries=0)(run_on_node)
        self._inputs: dict[str, Any] = {}

    @property
    def slots(self) -> int:
        """Cells that the nodes which are there now can run at the same time."""
        nodes = _nodes()
        need = _need(nodes)
        return max(1, sum(min(int(node.get(n, 0) // need[n]) for n in need) for node in nodes))

    def start(self, cell: Cell) -> RayRun:
        """Send a cell to the cluster."""
        import ray

        shutil.rmtree(cell.directory, ignore_errors=True)
        content = read_content(write_cell(cell))
        inputs = data_files(content)
        for path in inputs:
            if path not in self._inputs:
                self._inputs[path] = ray.put(Input(path, Path(path).read_bytes()))
        need = _need(_nodes())
        device = cell.evaluate.model.device
        task = self._task.options(
            num_cpus=need["CPU"], num_gpus=0 if device == "cpu" else need.get("GPU", 0)
        )
        references = [self._inputs[path] for path in inputs]
        return RayRun(
            cell,
            task.remote(
                content,
                os.path.abspath(cell.directory),
                self._arguments,
                self._variables,
                *references,
            ),
        )


def _nodes() -> list[dict[str, float]]:
    """What every node that is alive has, at least one core."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if node.get("CPU", 0) >= 1]


def _need(nodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """What one cell takes; with more cores than the largest node has it would wait for ever."""
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        return {"CPU": 1, "GPU": 1}
    largest = max((node["CPU"] for node in nodes), default=1.0)
    return {"CPU": min(float(available_threads()), largest)}
