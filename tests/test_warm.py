"""A process that is forked from a warm one is as a fresh process is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from warm import CLIENT, close, warm_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are safe on Linux alone")

TOLD = """
import json, os, signal, sys
told = {"argv": sys.argv, "cwd": os.getcwd(), "said": sys.stdin.read(), "first": sys.path[0]}
told |= {"asked": os.environ.get("ASKED"), "name": __name__, "path": sys.path[:3]}
told |= {"sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler}
print(json.dumps(told))
print("for the log", file=sys.stderr)
"""
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def run(*words: str, warm: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python, in a fork or afresh."""
    command = [sys.executable, *words]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 60, **options}
    if not warm:
        return subprocess.run(command, **options)
    with warm_processes():
        done = subprocess.run(command, **options)
    assert done.args == command
    return done


def start(code: str, **options: Any) -> subprocess.Popen[str]:
    """Start code in a fork."""
    with warm_processes():
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options
        )


def is_gone(pid: int) -> bool:
    """Wait for the end of a process that is not ours."""
    until = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.01)
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("kind", ["file", "module", "code"])
def test_a_fork_has_the_arguments_directory_environment_and_streams_of_a_process(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    words = {"file": ["told.py"], "module": ["-m", "told"], "code": ["-c", TOLD]}[kind]
    where = {"cwd": tmp_path, "input": "hello", "env": {**os.environ, "ASKED": "yes"}}
    forked, fresh = (run(*words, "--a", "b c", warm=warm, **where) for warm in (True, False))
    assert (forked.returncode, forked.stderr) == (fresh.returncode, fresh.stderr)
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)


def test_a_fork_has_imported_the_libraries_and_a_fresh_process_has_not() -> None:
    code = "import sys; print('torch' in sys.modules, 'bitsandbytes' in sys.modules)"
    assert run("-c", code).stdout.split() == ["True", "True"]
    assert run("-c", code, warm=False).stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "code",
    [
        "",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('what was wrong')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "raise KeyboardInterrupt",
        "import atexit; atexit.register(print, 'at last'); print('first', end=' ')",
        "1 / 0",
    ],
)
def test_a_fork_ends_as_a_process_ends(code: str) -> None:
    forked, fresh = run("-c", code), run("-c", code, warm=False)
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_signal_reaches_the_fork() -> None:
    code = f"try:\n  {SLEEPS}\nexcept KeyboardInterrupt:\n  print('interrupted')"
    process = start(code)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert process.returncode == 0


def test_a_fork_dies_with_what_stands_for_it_and_takes_its_own_forks_along() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPS!r}])"
    process = start(code)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1].endswith(b"warm.py")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert is_gone(pid)


def test_a_fork_writes_at_once_where_it_is_told_to() -> None:
    code = "import os; print('written', end=''); os._exit(0)"
    assert run("-u", "-c", code).stdout == "written"
    assert run("-c", code).stdout == run("-c", code, warm=False).stdout


def test_each_fork_draws_other_numbers() -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    one, two = (run("-c", code).stdout.split() for _ in range(2))
    assert not {*one} & {*two}


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["-W", "error", "-c", SLEEPS], {}),
        (["-c", SLEEPS], {"OMP_NUM_THREADS": "2"}),
        (["-c", SLEEPS], {"PYTHONWARNINGS": "error"}),
    ],
)
def test_what_other_settings_would_have_changed_while_libraries_are_imported_is_fresh(
    words: list[str], environment: dict[str, str]
) -> None:
    with warm_processes():
        process = subprocess.Popen(
            [sys.executable, *words], env=os.environ | environment, stdout=subprocess.PIPE
        )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    assert str(CLIENT).encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    process.kill()
    process.communicate()


def test_a_path_that_was_set_when_the_warm_process_began_is_not_taken_from_later_forks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import sys; print(sys.path[1:])"
    close()
    monkeypatch.setenv("PYTHONPATH", str(Path(pytest.__file__).parent.parent))  # of the site, too
    assert run("-c", code).stdout == run("-c", code, warm=False).stdout
    monkeypatch.delenv("PYTHONPATH")
    assert run("-c", code).stdout == run("-c", code, warm=False).stdout
