"""One malformed input, what must become of it, and what did."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lowmem_reft import cli

LIMIT_S = 60.0
"""A command that takes longer hangs."""
MOST_CHARACTERS = 3000
"""Of a line that somebody can read."""

Verdict = Literal["refused", "same", "sound", "any", "full"]
"""refused: exit 2, and a line that names the culprit; same: exit 0 with the result of the valid
input; sound: one of these two; any: another valid input, so any result, or a refusal; full: the
disk is, and this is said."""

OUTCOMES = (
    "right",
    "wrongly accepted",
    "wrongly refused",
    "unclear",
    "traceback",
    "exit 1",
    "hang",
)
"""What may become of an input; unclear: refused, but not in one line that names the culprit."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A command with one malformed input."""

    what: str
    """What is wrong with it, in words."""
    argv: Sequence[str]
    verdict: Verdict
    names: Sequence[str] = ()
    """A refusal holds one of these."""
    valid: Any = None
    """The result of the valid input, which an accepted one must have too."""
    result: Callable[[Ran], Any] = field(default=lambda ran: ran.figures())
    """What of a run is compared with it."""
    stdin: str = ""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command did."""

    code: int | None
    """Exit code; None: it hung, or an exception left ``main``."""
    out: str
    err: str
    raised: str = ""
    """Traceback of what left ``main``."""

    def figures(self) -> dict[str, Any]:
        """The figures of ``--json`` that do not depend on the place or the time."""
        found: dict[str, Any] = json.loads(self.out.strip().split("\n")[-1])
        return {name: found[name] for name in _FIGURES if name in found}


_FIGURES = ("metric", "value", "accuracy", "extra", "num_examples", "loss", "response")
_FIGURES += ("wins", "ties", "losses", "win_rate", "num_cells", "num_failed", "loss_history")
_FIGURES += ("peak_bytes", "breakdown_bytes", "num_trainable_params", "num_steps", "rows")
_FIGURES += ("num_trials", "best")


class Hang(BaseException):
    """The command took too long."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(_signum: int, _frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(argv: Sequence[str], stdin: str = "", limit_s: float = LIMIT_S) -> Ran:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    code, raised, before = None, "", sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
            _alarm(limit_s),
        ):
            warnings.simplefilter("ignore")  # of libraries, on top of what is refused
            code = cli.main(list(argv))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except Hang:
        raised = "hang"
    except BaseException:
        raised = traceback.format_exc()
    finally:
        sys.stdin = before
    return Ran(code=code, out=out.getvalue(), err=err.getvalue(), raised=raised)


def judge(fault: Fault, ran: Ran) -> tuple[str, str]:
    """Say what became of an input, and why that is wrong; "right" has no reason."""
    if ran.raised == "hang":
        return "hang", f"took more than {LIMIT_S:g} s"
    if ran.raised or "Traceback (most recent call last)" in ran.err:
        return "traceback", (ran.raised or ran.err)[-600:]
    if fault.verdict == "full" and ran.code in (1, 2) and "the disk is full" in ran.err:
        return "right", ""
    if ran.code == 2:
        return _refusal(fault, ran.err)
    if ran.code != 0:
        return "exit 1", f"exit {ran.code}: {ran.err.strip()[-400:]}"
    if fault.verdict in ("refused", "full"):
        return "wrongly accepted", ran.out.strip()[-200:]
    if fault.verdict in ("same", "sound"):
        try:
            result = fault.result(ran)
        except (ValueError, LookupError, OSError) as error:
            return "wrongly accepted", f"no result: {error!r}; {ran.out[-200:]}"
        if result != fault.valid:
            return "wrongly accepted", f"result {result!r:.300}, not {fault.valid!r:.300}"
    return "right", ""


def _refusal(fault: Fault, err: str) -> tuple[str, str]:
    """A refusal is one line, in words, that names the culprit."""
    lines = [line for line in err.split("\n") if line.strip()]
    said = [line for line in lines if ": error: " in line]
    if fault.verdict == "same":
        return "wrongly refused", err[-400:]
    if len(lines) != 1 or len(said) != 1 or len(said[0]) > MOST_CHARACTERS:
        return "unclear", f"{len(lines)} lines, {len(err)} characters: {err[:500]}"
    if fault.names and not any(name in said[0] for name in fault.names):
        return "unclear", f"names none of {list(fault.names)}: {said[0][:400]}"
    return "right", ""
