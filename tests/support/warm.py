"""Processes of tests as copies of one that has imported what most of them need.

Python that imports torch, transformers, PEFT and bitsandbytes takes seconds of a core before it
does anything, and a benchmark starts it for every row. Where :func:`warm_processes` holds, a
process that ``subprocess`` would start as ``python -m module``, ``python file.py`` or
``python -c code`` is a thin client instead (``warm_client.py``): it hands its arguments,
environment, directory and streams to a warm process, which forks and runs them, and it ends as the
fork ends. What is done to the client is done to the fork: a signal reaches it, and it dies when the
client does. What a fork starts in this way is forked too.

Not for tests of what only a fresh process shows: what it imports and when, how long that takes, how
much memory it holds, which process the system lists or kills. An environment with other settings
that are read while libraries are imported starts a fresh process by itself, and so does a machine
with a GPU, or one that is not Linux.

``python warm.py SOCKET PYTHONPATH`` is the warm process.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

CLIENT = Path(__file__).with_name("warm_client.py")
PRELOADED = (
    "torch._inductor.compile_fx",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "datasets",
    "scipy.stats",
    "lowmem_reft.compare.child",
    "lowmem_reft.cli",
)
"""All that is here would be imported by most of the processes; none of it computes anything."""

AT_IMPORT = ("BNB_", "HF_", "LANG", "LC_", "LD_", "MKL_", "OMP_", "PYTHON", "TRANSFORMERS_")
"""What begins so is read while libraries are imported, or before."""
NOT_AT_IMPORT = {"HF_HUB_OFFLINE", "PYTHONPATH"}
"""No test asks the hub, so its answer is the same; the path is set anew in each fork."""

_PR_SET_PDEATHSIG = 1
"""The option of ``prctl`` that names the signal which the parent's death sends."""

# The tests' side


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process, forked from the warm one where its command and its environment allow."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        """Start it."""
        words = _warmed(args, options) if not more else None
        super().__init__(args if words is None else words, *more, **options)
        self.args = args


_Fresh = subprocess.Popen
_socket: str | None = None
_known: dict[str, str] = {}
_process: subprocess.Popen[bytes] | None = None


def _warmed(args: Any, options: dict[str, Any]) -> list[str] | None:
    """The command of a client for ``args``; None if it has to be a fresh process."""
    if _socket is None or isinstance(args, str | bytes) or not os.path.exists(_socket):
        return None
    words = [os.fspath(word) for word in args]
    if len(words) < 2 or words[0] != sys.executable:
        return None
    what = words[2] if words[1] == "-u" and len(words) > 2 else words[1]
    is_runnable = what in ("-m", "-c") or what.endswith(".py")
    unknown = any(options.get(name) for name in ("executable", "pass_fds", "preexec_fn", "shell"))
    environment = options.get("env")
    is_known = _read_at_import(os.environ if environment is None else environment) == _known
    if not is_runnable or unknown or not is_known:
        return None
    return [sys.executable, "-IS", str(CLIENT), _socket, *words[1:]]


def _read_at_import(environment: Any) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(AT_IMPORT) and name not in NOT_AT_IMPORT
    }


@contextmanager
def warm_processes() -> Iterator[None]:
    """Processes that start while this lasts are forked; the first use starts the warm process."""
    global _socket, _known, _process
    if sys.platform != "linux":
        yield
        return
    if _process is None:
        directory = Path(tempfile.mkdtemp(prefix="warm-"))
        path = directory / "socket"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # Handed over apart: what the interpreter finds by itself is the same for every fork.
        path_of_python = environment.pop("PYTHONPATH", "")
        _process = _Fresh(
            [sys.executable, __file__, str(path), path_of_python],
            env=environment,
            stdout=subprocess.PIPE,
        )
        assert _process.stdout is not None
        is_ready = _process.stdout.readline() == b"ready\n"
        _socket, _known = str(path) if is_ready else None, _read_at_import(environment)
    subprocess.Popen = _Popen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = _Fresh  # type: ignore[misc]


def close() -> None:
    """End the warm process, if there is one, and what it has forked."""
    global _process, _socket
    if _process is not None:
        _process.terminate()
        _process.communicate()
        _process = None
        if _socket is not None:
            shutil.rmtree(Path(_socket).parent)
        _socket = None


# The warm process


_site: list[str] = []
"""Where the interpreter looks for modules by itself."""


def serve(path: str, path_of_python: str) -> dict[str, Any]:
    """Fork for each client until it is told to end; return in the fork what that has to run."""
    global _socket, _known
    _site[:] = sys.path[1:]
    os.environ["PYTHONPATH"] = path_of_python
    sys.path[1:1] = _python_path()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    listening = socket.socket(socket.AF_UNIX)
    subprocess.Popen = _Popen  # type: ignore[misc]
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # or it would not be in forks
    import torch  # a card is looked for before the others are imported

    if torch.cuda.is_available():
        raise SystemExit(0)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    if not _is_alone():
        raise SystemExit("warm.py: an import has started a thread")
    del os.environ["JE_ARROW_MALLOC_CONF"]
    _socket, _known = path, _read_at_import(os.environ)
    listening.bind(path)
    listening.listen(64)
    print("ready", flush=True)
    return _Server(listening).run()


def _is_alone() -> bool:
    """Whether a copy would lack no thread; OpenBLAS ends its own before a fork."""
    copy = os.fork()
    if copy == 0:
        os._exit(0)
    os.waitpid(copy, 0)
    return len(os.listdir("/proc/self/task")) == 1


class _Server:
    """Forks, forwards signals, and says how forks end."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._clients: dict[int, socket.socket] = {}
        self._select = selectors.DefaultSelector()
        self._select.register(listening, selectors.EVENT_READ, self._accept)
        self._select.register(self._woken, selectors.EVENT_READ, self._reap)

    def run(self) -> dict[str, Any]:
        """Serve; return in a fork alone."""
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the clients
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker)
        while True:
            for key, _ in self._select.select():
                job = key.data(key.fileobj)
                if job is not None:
                    return job  # type: ignore[no-any-return]

    def _end(self) -> NoReturn:
        for pid in self._clients:
            _kill_all(pid)
        os._exit(0)

    def _accept(self, _: Any) -> dict[str, Any] | None:
        client, _ = self._listening.accept()
        message, streams, _, _ = socket.recv_fds(client, 2**20, 3)
        while not message.endswith(b"\n"):
            message += client.recv(2**20)
        pid = os.fork()
        if pid == 0:
            self._leave()
            return {**json.loads(message), "streams": streams}
        for stream in streams:
            os.close(stream)
        self._clients[pid] = client
        self._select.register(client, selectors.EVENT_READ, lambda each: self._hear(pid, each))
        return None

    def _leave(self) -> None:
        """Be no server any more."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        self._select.close()
        self._listening.close()
        for handle in (self._woken, self._waker):
            os.close(handle)
        for client in self._clients.values():
            client.close()

    def _hear(self, pid: int, client: socket.socket) -> None:
        numbers = b""
        with suppress(ConnectionResetError):
            numbers = client.recv(64)
        if not numbers:  # the client was killed
            self._select.unregister(client)
            _kill_all(pid)
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self, _: Any) -> None:
        os.read(self._woken, 2**10)
        for pid, client in list(self._clients.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._clients[pid]
                with suppress(KeyError):
                    self._select.unregister(client)
                with suppress(BrokenPipeError):
                    client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                client.close()


def _kill_all(pid: int) -> None:
    """Kill a fork, and what is in its session."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def become(job: dict[str, Any]) -> tuple[str, str]:
    """Be the process of a job, as if it had been started as one; return what is to be run."""
    os.setsid()
    for number, stream in enumerate(job["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    ignored = signal.SIGINT in job["ignored"]
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    words = job["words"]
    if words[0] == "-u":
        words = words[1:]
        raw = io.FileIO(1, "w", closefd=False)  # what is under a text stream would keep it
        sys.stdout = io.TextIOWrapper(raw, sys.stdout.encoding, write_through=True)  # type: ignore[type-var]
    kind, *words = words if words[0] in ("-m", "-c") else ["", *words]
    first = {"-m": job["cwd"], "-c": "", "": os.path.dirname(os.path.abspath(words[0]))}[kind]
    own = _python_path()
    sys.path[:] = [first, *own, *(entry for entry in _site if entry not in own)]
    importlib.invalidate_caches()
    sys.orig_argv[1:] = job["words"]
    sys.argv[:] = ["-c", *words[1:]] if kind == "-c" else words
    random.seed()
    import numpy

    numpy.random.seed()
    return kind, words[0]


def _python_path() -> list[str]:
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(entry) for entry in entries if entry]


def run(kind: str, what: str) -> int:
    """Run a module, code or a file as the interpreter does; return the exit code."""
    code = 1
    try:
        if kind == "-m":
            sys.modules.pop(what, None)  # that it has been imported already is no news
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "":
            runpy.run_path(what, run_name="__main__")
        else:
            module = types.ModuleType("__main__")
            sys.modules["__main__"] = module
            exec(compile(what, "<string>", "exec"), module.__dict__)
        code = 0
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            code = left.code or 0
        else:
            print(left.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code


def main() -> NoReturn:
    """Serve; in a fork run its job, and end."""
    code = run(*become(serve(*sys.argv[1:3])))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    main()
