"""Trainings that are killed: a warm process forks one for each kill, so that it takes a second.

``python kills.py`` is that process: it reads one job a line and answers with one line each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST_S = 120.0
"""A training of a few steps that has not ended by then hangs."""

_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


# The warm process


def serve() -> None:
    """Train once, so that all is imported and at hand; then fork a child for each job."""
    from lowmem_reft.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs ignore it
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = main(sys.argv[1:])
    assert code == 0
    gc.collect()  # ends the threads of what has been trained, which would not survive a fork
    while threading.active_count() > 1:
        time.sleep(0.01)
    gc.freeze()
    os.fsync = lambda _handle: None  # which guards against a loss of power, and takes time
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    said = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    child = os.fork()
    if child == 0:
        _train(job, said)
    os.close(said)
    waiting = [*job.get("signals", [])]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {"code": code, "seconds": seconds, "hangs": False}
        if waiting and seconds >= waiting[0][0]:
            os.kill(child, waiting.pop(0)[1])
        elif seconds > LONGEST_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"code": None, "seconds": seconds, "hangs": True}
        pause = min(waiting[0][0] - seconds if waiting else 0.005, 0.005)
        select.select([], [], [], max(pause, 0))


def _train(job: dict[str, Any], said: int) -> None:
    """Run the command in this forked process, which never returns."""
    code = 70
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        from lowmem_reft.cli import main

        changes = _Changes(job["root"], job.get("at_change"))
        sys.addaudithook(changes.hear)
        changes.hear_native()
        code = main(job["argv"])
        if "changes" in job:
            Path(job["changes"]).write_text(str(changes.num))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass
class _Changes:
    """Counts the changes of the file system below a directory, and kills the process at one."""

    root: str
    kill_at: int | None
    num: int = 0

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Take note of an event of the interpreter that changes a file's name or content."""
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes | os.PathLike) and (flags or 0) & _WRITING:
                self.count(path)
        elif event in _CHANGES:
            self.count(args[0])

    def count(self, path: Any) -> None:
        """Count one, before it happens."""
        if isinstance(path, int) or not os.fspath(path).startswith(self.root):
            return
        self.num += 1
        if self.num == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear_native(self) -> None:
        """Count the writes of libraries, once before and once when half of it is written."""
        import safetensors.torch
        import torch

        for module, name, which in ((torch, "save", 1), (safetensors.torch, "save_file", 1)):
            self._wrap(module, name, which)
        import peft.peft_model
        import peft.utils.save_and_load

        from lowmem_reft.runs import validation

        for other in (peft.peft_model, validation):
            if hasattr(other, "safe_save_file"):
                self._wrap(other, "safe_save_file", 1)
            elif hasattr(other, "save_file"):
                other.save_file = safetensors.torch.save_file

    def _wrap(self, module: Any, name: str, which: int) -> None:
        original = getattr(module, name)

        def writing(*args: Any, **kwargs: Any) -> Any:
            path = args[which] if len(args) > which else kwargs.get("filename", kwargs.get("f"))
            is_path = isinstance(path, str | os.PathLike)
            if is_path:
                self.count(path)
            result = original(*args, **kwargs)
            if is_path and os.fspath(path).startswith(self.root):
                if self.num + 1 == self.kill_at:
                    os.truncate(path, os.path.getsize(path) // 2)
                self.count(path)
            return result

        setattr(module, name, writing)


# The tests' side


@dataclass
class Figures:
    """What became of killed runs; all but ``kills`` ought to be 0."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    KINDS = ("wrong adapter", "other epochs", "other loss history", "stuck", "traceback", "hang")

    def add(self, what: str, example: str) -> None:
        """Count a fault and keep what it was."""
        self.counts[what] += 1
        self.examples.append(f"{what}: {example}")

    def table(self, title: str) -> str:
        """Return the figures as lines."""
        rows = [("kills", self.counts["kills"])]
        rows += [(kind, self.counts[kind]) for kind in self.KINDS]
        return "\n".join([title, *(f"  {name:<20}{number:>6}" for name, number in rows)])

    @property
    def num_faults(self) -> int:
        """All that ought to be 0."""
        return sum(self.counts[kind] for kind in self.KINDS)


class Trainings:
    """Runs trainings of a few steps, kills them and resumes them until they are done."""

    def __init__(self, directory: Path, flags: dict[str, list[str]]) -> None:
        """Train each kind of ``flags`` undisturbed; ``directory`` is for runs and logs."""
        self.directory, self.flags = directory, flags
        self._num = 0
        first = [*next(iter(flags.values())), "--output-dir", str(directory / "warm"), "--quiet"]
        self._log = (directory / "server.log").open("w")
        self._server = subprocess.Popen(
            [sys.executable, __file__, "train", *first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self.wanted: dict[str, dict[str, Any]] = {}
        self.num_changes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for kind in flags:
            out, noted = directory / f"whole-{kind}", directory / f"{kind}.changes"
            ended, said = self.run(kind, out, changes=str(noted))
            assert ended["code"] == 0, said[-3000:]
            self.wanted[kind], self.seconds[kind] = outcome(out), ended["seconds"]
            self.num_changes[kind] = int(noted.read_text())

    def close(self) -> None:
        """End the warm process."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        self._log.close()

    def _ask(self, **job: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return dict(json.loads(self._server.stdout.readline()))

    def run(self, kind: str, out: Path, *more: str, **job: Any) -> tuple[dict[str, Any], str]:
        """Run the command once; return how it ended and what it said."""
        log = out.with_name(f"{out.name}.log")
        argv = ["train", *self.flags[kind], "--output-dir", str(out), "--quiet", *more]
        ended = self._ask(argv=argv, root=str(out), log=str(log), **job)
        return ended, log.read_text(errors="replace")

    def kill(self, kind: str, figures: Figures, *jobs: dict[str, Any]) -> None:
        """Run and kill as each job says, one after the other, resume to the end and compare."""
        self._num += 1
        out = self.directory / f"{kind}-{self._num}"
        more: list[str] = []
        for job in jobs:
            ended, said = self.run(kind, out, *more, **job)
            if more and _had_not_begun(ended, said):
                ended, said = self.run(kind, out, **job)
            figures.counts["kills"] += ended["code"] != 0
            if self._is_fault(ended, said, figures, str(job), (-9, -15, -2, 130, 0)):
                return
            more = ["--resume"]
        ended, said = self.run(kind, out, *more)
        if _had_not_begun(ended, said):
            ended, said = self.run(kind, out)
        if self._is_fault(ended, said, figures, str(jobs), (0,)):
            return
        found = outcome(out)
        for name, what in zip(("adapter", "epochs", "losses"), Figures.KINDS[:3], strict=True):
            if found[name] != self.wanted[kind][name]:
                figures.add(what, f"{kind} {jobs}")
        _remove(out)

    def _is_fault(
        self, ended: dict[str, Any], said: str, figures: Figures, job: str, right: tuple[int, ...]
    ) -> bool:
        if ended["hangs"]:
            figures.add("hang", job)
        elif "Traceback" in said:
            figures.add("traceback", f"{job}: {said[-1500:]}")
        elif ended["code"] not in right:
            figures.add("stuck", f"{job}: exit {ended['code']}: {said[-500:]}")
        else:
            return False
        return True

    def at_change(self, kind: str, number: int) -> dict[str, Any]:
        """Return the job that kills at a change of the file system, counted from 1."""
        return {"at_change": number}

    def at_random(self, kind: str, draw: random.Random) -> dict[str, Any]:
        """Return a job that kills at some time, by some signal."""
        begun = draw.uniform(0, self.seconds[kind])
        which = draw.choice(["KILL", "TERM", "INT", "INT twice"])
        first = getattr(signal, f"SIG{which.split()[0]}")
        signals = [[begun, int(first)]]
        if which == "INT twice":
            signals.append([begun + draw.uniform(0, 0.2), int(first)])
        return {"signals": signals}


def outcome(out: Path) -> dict[str, Any]:
    """Return what a run ended in: the adapter's bytes, its epochs and its losses, but no times."""
    result = json.loads((out / "result.json").read_text())
    for line in result.get("validation") or ():
        del line["train_time_s"]
    files = ("adapter_model.safetensors", "adapter_config.json")
    return {
        "adapter": [(out / "adapter" / name).read_bytes() for name in files],
        "epochs": [result.get(name) for name in ("validation", "best_epoch", "validation_value")],
        "losses": [result["loss_history"], result["num_steps"]],
    }


def _had_not_begun(ended: dict[str, Any], said: str) -> bool:
    return ended["code"] == 2 and "leave it out" in said


def _remove(out: Path) -> None:
    import shutil

    shutil.rmtree(out)
    out.with_name(f"{out.name}.log").unlink()


if __name__ == "__main__":
    serve()
