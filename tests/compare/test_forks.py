"""Cells that are forked from one process, the nursery: to who looks on the same, only sooner."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from lowmem_reft.compare.cell import Cell, write_cell
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.engines import forks, open_engine, processes, stop
from lowmem_reft.compare.engines.launch import CHILD_COMMAND
from lowmem_reft.compare.engines.processes import ProcessEngine
from lowmem_reft.compare.sources import find_sources
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import (
    CompareOptions,
    DataOptions,
    EvaluateOptions,
    ModelOptions,
    OptimOptions,
)
from lowmem_reft.options.written import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")

ROOT = Path(__file__).parents[2]

FAKE_NURSERY = """
import os, signal, sys, time
from lowmem_reft.compare import cell
from lowmem_reft.compare.engines.launch import leave_result
from lowmem_reft.compare.nursery import serve

def may_fork():
    print("said while it was starting", flush=True)
    return True

def run_cell(todo):
    do = todo.record["method"]
    print("threads", os.environ["OMP_NUM_THREADS"], "input", repr(sys.stdin.read()))
    (todo.directory / "begun.txt").write_text(f"{os.getpid()} {os.getppid()} {os.getpgid(0)}")
    if do == "raises":
        raise RuntimeError("the loss is not a number")
    if do == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "takes the nursery along":
        os.kill(os.getppid(), signal.SIGKILL)
    if do == "says nothing":
        sys.exit("no such thing")
    if do == "will not end":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if do in ("is slow", "will not end", "takes the nursery along"):
        (todo.directory / "waits.txt").touch()
        time.sleep(600)
    return {**cell.EMPTY_RESULT, "metric": "accuracy", "value": 0.5, **todo.record}

path = serve(may_fork)
if path is None:
    os._exit(0)
sys.exit(leave_result(path, run_cell))
"""

ALONE = FAKE_NURSERY.replace("serve(may_fork)", "__import__('pathlib').Path(sys.argv[1])")
"""The process of a cell that is not forked."""


@pytest.fixture(autouse=True)
def _own_nursery(monkeypatch):
    """As outside the tests, every engine here has its own."""
    monkeypatch.setattr(processes, "Nursery", forks.Nursery)


@pytest.fixture
def nursery(tmp_path, monkeypatch):
    """Fork what is above, and not what trains."""
    path = tmp_path / "nursery.py"
    path.write_text(FAKE_NURSERY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setattr(processes, "NURSERY_COMMAND", (sys.executable, str(path)))
    return path


def make_cell(directory, method):
    model, data = ModelOptions(model="none", device="cpu"), DataOptions(data="rows.jsonl")
    evaluate = EvaluateOptions(model=model, data=data)
    record = {"method": method, "task": "none", "seed": 0, "key": "k"}
    return Cell(directory=directory / method, train=None, evaluate=evaluate, record=record)


def wait_for(condition):
    deadline = time.monotonic() + 600  # of a machine with much else to do
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outcome(engine, cell):
    run = engine.start(cell)
    wait_for(run.ended)
    return run.result()


def is_there(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_cell_is_a_process_of_its_own_with_its_own_log(nursery, tmp_path):
    with open_engine(1) as engine:
        cells = [make_cell(tmp_path, method) for method in ("first", "second")]
        results = [outcome(engine, cell) for cell in cells]
    assert [result["value"] for result in results] == [0.5, 0.5]
    pids, parents, groups = zip(
        *((cell.directory / "begun.txt").read_text().split() for cell in cells), strict=True
    )
    assert len({*pids, str(os.getpid())}) == 3
    assert len(set(parents)) == 1
    assert set(groups) == {str(os.getpgid(0))}  # as Ctrl-C goes to a group
    for cell in cells:
        said = (cell.directory / "log.txt").read_text()
        assert said == "said while it was starting\nthreads 6 input ''\n"
    assert not is_there(parents[0])


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("raises", "RuntimeError: the loss is not a number"),
        ("is killed", "killed by signal 9 (Killed); out of memory?"),
        ("says nothing", "ended with exit code 1 and no result: no such thing"),
        ("takes the nursery along", "killed by signal 9 (Killed); out of memory?"),
    ],
)
def test_a_cell_that_fails_says_why_and_the_next_one_runs(
    nursery, tmp_path, monkeypatch, method, error
):
    alone = tmp_path / "alone.py"
    alone.write_text(ALONE)  # for when the nursery is gone
    monkeypatch.setattr(processes, "CHILD_COMMAND", (sys.executable, str(alone)))
    with open_engine(1, child_command=processes.CHILD_COMMAND) as engine:
        assert outcome(engine, make_cell(tmp_path, method))["error"] == error
        assert outcome(engine, make_cell(tmp_path, "next"))["value"] == 0.5


def test_two_workers_run_at_the_same_time_and_share_the_threads(nursery, tmp_path):
    with open_engine(2) as engine:
        slow = make_cell(tmp_path, "is slow")
        run = engine.start(slow)
        quick = make_cell(tmp_path, "quick")
        assert outcome(engine, quick)["value"] == 0.5
        assert not run.ended()
        stop([run])
    assert "threads 3" in (quick.directory / "log.txt").read_text()


@pytest.mark.parametrize("method", ["is slow", "will not end"])
def test_a_cell_that_takes_too_long_is_stopped(nursery, tmp_path, method):
    cell = make_cell(tmp_path, method)
    with open_engine(1) as engine:
        run = engine.start(cell)
        wait_for((cell.directory / "waits.txt").exists)
        run.cancel()
        run.join(0.2)
        assert run.ended()
        pid = (cell.directory / "begun.txt").read_text().split()[0]
        assert not is_there(pid)
        number = 15 if method == "is slow" else 9
        assert run.result()["error"].startswith(f"killed by signal {number} ")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_who_runs_cells_is_theirs(nursery, tmp_path, how):
    cell = make_cell(tmp_path, "is slow")
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lowmem_reft.compare.cell import read_cell\n"
        "from lowmem_reft.compare.engines import open_engine, processes, stop\n"
        f"processes.NURSERY_COMMAND = (sys.executable, {str(nursery)!r})\n"
        "with open_engine(1) as engine:\n"
        f"    run = engine.start(read_cell(Path({str(write_cell(cell))!r})))\n"
        "    try:\n"
        "        while not run.ended():\n"
        "            time.sleep(0.05)\n"
        "    finally:\n"
        "        stop([run])\n"
    )
    driver = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    wait_for((cell.directory / "waits.txt").exists)
    pids = (cell.directory / "begun.txt").read_text().split()[:2]
    os.kill(driver.pid, how)
    _, errors = driver.communicate(timeout=300)
    assert ("KeyboardInterrupt" in errors) is (how == signal.SIGINT)
    wait_for(lambda: not any(map(is_there, pids)))
    assert not cell.result_path.exists()


def test_a_cell_hears_ctrl_c_as_a_process_of_its_own_does(nursery, tmp_path):
    cell = make_cell(tmp_path, "is slow")
    with open_engine(1) as engine:
        run = engine.start(cell)
        wait_for((cell.directory / "waits.txt").exists)
        pid, parent = map(int, (cell.directory / "begun.txt").read_text().split()[:2])
        os.kill(parent, signal.SIGINT)  # the whole group has it
        os.kill(pid, signal.SIGINT)
        wait_for(run.ended)
        assert run.result()["error"].startswith("killed by signal 2 ")
        assert "KeyboardInterrupt" in (cell.directory / "log.txt").read_text()
        assert outcome(engine, make_cell(tmp_path, "next"))["value"] == 0.5


def test_an_answer_that_ctrl_c_kept_from_being_read_is_not_taken_for_the_next(nursery, tmp_path):
    with open_engine(1) as engine:
        run = engine.start(make_cell(tmp_path, "is slow"))
        asked = engine._nursery._process.stdin
        asked.write(json.dumps([-1, "poll", run._process.pid]).encode() + b"\n")
        asked.flush()
        assert not run.ended()
        stop([run])
        assert run._process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("may_fork", ["False", "sys.exit('no such module')"])
def test_where_nothing_can_be_forked_a_cell_starts_as_a_process(
    nursery, tmp_path, monkeypatch, may_fork
):
    nursery.write_text(nursery.read_text().replace("return True", f"return {may_fork}"))
    alone = tmp_path / "alone.py"
    alone.write_text(ALONE)
    monkeypatch.setattr(processes, "CHILD_COMMAND", (sys.executable, str(alone)))
    with open_engine(1, child_command=processes.CHILD_COMMAND) as engine:
        for method in ("first", "second"):
            assert outcome(engine, make_cell(tmp_path, method))["value"] == 0.5
    begun = (tmp_path / "second" / "begun.txt").read_text().split()
    assert begun[1] == str(os.getpid())


def test_a_forked_cell_computes_bitwise_what_one_in_a_fresh_process_does(tmp_path):
    """Beside another one, so that nothing of that gets into it."""
    outcomes, peaks = {}, []
    for way in ("forked", "fresh"):
        options = build(
            CompareOptions,
            methods="loreft",
            **{"limit": 12, "eval_limit": 4, "device": "cpu"},
            optim=OptimOptions(epochs=1.0),
            output_dir=tmp_path / way,
        )
        cells = build_cells(options, parse_methods("loreft[rank=2]"), [0], find_sources(options))
        engine = ProcessEngine(2 if way == "forked" else 1, CHILD_COMMAND)
        engine._may_fork = way == "forked"
        engine._environment["OMP_NUM_THREADS"] = "1"
        with closing(engine):
            runs = [engine.start(cell) for cell in (cells if way == "forked" else cells[1:])]
            for run in runs:
                wait_for(run.ended)
            assert engine._may_fork == (way == "forked")  # it could, and has
        result = runs[-1].result()
        assert result["error"] is None
        measured = ("value", "loss", "loss_history", "num_steps", "num_examples")
        files = ("train/adapter/adapter_model.safetensors", "predictions.jsonl")
        outcomes[way] = [result[name] for name in measured]
        outcomes[way] += [(cells[1].directory / name).read_bytes() for name in files]
        peaks.append(result["peak_bytes"])
    # A hundred bytes of it wait for the next collection of garbage, or do not.
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-4)
    assert outcomes["forked"] == outcomes["fresh"]
