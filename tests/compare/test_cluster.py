"""Cells as Ray tasks: the results of a sequential run, and nothing lost but what was killed.

A local Ray with two cores; ``FAKE_CELL`` replaces the training, as in ``test_compare.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_model import config_alone
from fake_trial import BAD_RANK
from fake_trial import FAKE_CELL as FAKE_TRIAL
from lowmem_reft.compare import report
from lowmem_reft.compare.engines import open_engine, stop
from lowmem_reft.compare.engines.cluster import _need
from lowmem_reft.compare.matrix import run_comparison
from lowmem_reft.compare.sweep import run_sweep
from lowmem_reft.errors import InputError
from lowmem_reft.options import CompareOptions, OptimOptions, SweepOptions
from lowmem_reft.options.written import build, changed

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
FAILS, KILLED, KILLS_WORKER, SLOW = 0.5, 0.25, 0.125, 0.0625

FAKE_CELL = f"""
import json, os, signal, sys, time
from pathlib import Path
from lowmem_reft.compare import cell
from lowmem_reft.compare.engines.launch import leave_result

def run_cell(todo):
    lr = todo.train.optim.lr if todo.train else 0
    name = f"{{todo.record['method']}} {{todo.record['seed']}}"
    with Path({{runs!r}}).open("a") as file:
        file.write(name + "\\n")
    print(name, os.environ.get("OMP_NUM_THREADS"), todo.directory, todo.evaluate.data.data)
    if lr == {FAILS}:
        raise RuntimeError(f"{{todo.evaluate.data.data}}:3: not a number")
    if lr == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    if lr == {KILLS_WORKER}:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if lr == {SLOW}:
        time.sleep(600)
    rows = Path(todo.evaluate.data.data).read_text().splitlines()
    if todo.train:
        adapter = todo.train.run.output_dir / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)))
        (todo.train.run.output_dir / "checkpoint-1").mkdir()
        (todo.train.run.output_dir / "checkpoint-1" / "optimizer.pt").write_text("large")
    answer = dict(prompt="", prediction="even", reference="even", correct=True)
    lines = [json.dumps(dict(source=f"rows.jsonl:{{i}}", **answer)) for i in range(len(rows))]
    todo.evaluate.predictions.write_text("\\n".join(lines) + "\\n")
    measured = dict(metric="accuracy", value=0.5 + todo.record["seed"] / 10,
                    num_examples=len(rows), wall_time_s=1.0)
    return {{**cell.EMPTY_RESULT, **measured, **todo.record}}

sys.exit(leave_result(Path(sys.argv[1]), run_cell))
"""

ROWS = [{"prompt": f"{i} is", "choices": ["even", "odd"], "answer": i % 2} for i in range(8)]


@pytest.fixture(scope="module")
def cluster():
    """A local Ray for the tests that do not want one of their own."""
    if ray.is_initialized():
        pytest.skip("Ray is in use")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 * 2**20,
        )
        yield
        ray.shutdown()


@pytest.fixture
def fake_cell(tmp_path):
    path = tmp_path / "fake_cell.py"
    path.write_text(FAKE_CELL.replace("{runs!r}", repr(str(tmp_path / "runs.txt"))))
    return (sys.executable, str(path))


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(report, "write_report", lambda _, d, **_k: d / "report.html")
    model = config_alone(tmp_path)
    rows = tmp_path / "numbers.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return build(
        CompareOptions,
        model=str(model),
        data=str(rows),
        eval_data=str(rows),
        methods="loreft,qlora",
        output_dir=tmp_path / "out",
        workers="ray",
        quiet=True,
    )


def results_of(options):
    """The results without what no two runs have in common: times, the commit, which somebody who
    works here may change meanwhile, and the process's own memory: a copy of one that has
    imported everything holds some bytes of tensors more.
    """
    results = json.loads((options.output_dir / "results.json").read_text())
    apart = ("rss_bytes", "commit", "peak_bytes", "breakdown_bytes")
    return [
        {n: value for n, value in result.items() if not n.endswith("_s") and n not in apart}
        for result in results
    ]


def runs_of(tmp_path):
    path = tmp_path / "runs.txt"
    return path.read_text().splitlines() if path.exists() else []


def files_of(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def processes():
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True
    )
    return listed.stdout


def test_ray_and_a_sequential_run_give_the_same_results(options, fake_cell, tmp_path, cluster):
    methods = f"loreft,red[lr={FAILS}],qlora[lr={KILLED}],lora"
    options = changed(options, methods=methods, seeds="0,1")
    run_comparison(options, child_command=fake_cell)
    sequential = changed(options, workers=1, output_dir=tmp_path / "sequential")
    run_comparison(sequential, child_command=fake_cell)
    assert results_of(options) == results_of(sequential)
    errors = [result["error"] for result in results_of(options) if result["error"]]
    assert errors == [
        *[f"RuntimeError: {options.rows.data}:3: not a number"] * 2,
        *["killed by signal 9 (Killed); out of memory?"] * 2,
    ]


def test_a_real_matrix_gives_the_same_results_and_adapters(
    options, tiny_llama_dir, tmp_path, cluster
):
    options = changed(
        options,
        model=str(tiny_llama_dir),
        methods="loreft[rank=2,dropout=0.1]",
        device="cpu",
        optim=OptimOptions(max_steps=2, batch_size=2),
    )
    run_comparison(options)
    sequential = changed(options, workers=1, output_dir=tmp_path / "sequential")
    run_comparison(sequential)
    assert results_of(options) == results_of(sequential)
    assert [result["error"] for result in results_of(options)] == [None] * 2
    for name in ("train/adapter/adapter_model.safetensors", "predictions.jsonl"):
        [ours] = options.output_dir.glob(f"cells/loreft*/{name}")
        [theirs] = sequential.output_dir.glob(f"cells/loreft*/{name}")
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_a_cell_writes_comes_back_and_its_rows_go_along(options, fake_cell, cluster):
    run_comparison(options, child_command=fake_cell)
    cells = options.output_dir / "cells"
    assert files_of(cells / "loreft-seed0") == {
        "cell.json",
        "log.txt",
        "predictions.jsonl",
        "result.json",
        "train/adapter/adapter_model.safetensors",
    }
    weights = cells / "loreft-seed0" / "train" / "adapter" / "adapter_model.safetensors"
    assert weights.read_bytes() == bytes(range(256))
    _, seed, threads, directory, data = (cells / "loreft-seed0" / "log.txt").read_text().split()
    assert (seed, threads) == ("0", "1")
    # Neither the driver's directory nor its file of rows was needed; the copies are gone.
    assert not Path(directory).exists()
    assert data != options.rows.data
    assert not Path(data).exists()


def test_a_killed_worker_loses_only_its_cell_and_only_that_one_runs_again(
    options, fake_cell, tmp_path, cluster
):
    lost = f"red[lr={KILLS_WORKER}]"
    options = changed(options, methods=f"loreft,{lost},qlora,lora")
    answer = run_comparison(options, child_command=fake_cell)
    assert (answer["num_cells"], answer["num_failed"]) == (6, 1)
    errors = {result["method"]: result["error"] for result in results_of(options)}
    assert errors.pop(lost).startswith("Ray: WorkerCrashedError: ")
    assert set(errors.values()) == {None}
    # Its process went with it: it would have slept for ten minutes.
    assert str(fake_cell[1]) not in processes()
    before = runs_of(tmp_path)
    assert len(before) == 6
    run_comparison(options, child_command=fake_cell)
    assert runs_of(tmp_path)[6:] == [f"{lost} 0"]


def test_a_stopped_cell_takes_its_process_with_it(options, fake_cell, cluster, tmp_path):
    from lowmem_reft.compare.cells import build_cells
    from lowmem_reft.compare.sources import find_sources
    from lowmem_reft.methods.entries import parse_methods

    specs = parse_methods(f"red[lr={SLOW}]")
    *_, cell = build_cells(options, specs, [0], find_sources(options))
    with open_engine("ray", child_command=fake_cell) as engine:
        run = engine.start(cell)
        deadline = time.monotonic() + 300
        while not runs_of(tmp_path) and time.monotonic() < deadline:
            assert not run.ended()
            time.sleep(0.05)
        stop([run])
        assert run.ended()
    assert fake_cell[1] not in processes()
    assert not cell.result_path.exists()


def test_a_sweep_follows_the_epochs_of_its_trials_and_stops_bad_ones(options, tmp_path, cluster):
    fake_cell = tmp_path / "fake_trial.py"
    fake_cell.write_text(FAKE_TRIAL.replace("{runs!r}", repr(str(tmp_path / "runs.txt"))))
    sweep = build(
        SweepOptions,
        space=f"rank=4,6,10,12,14,{BAD_RANK},8",
        model=options.base.model,
        data=options.rows.data,
        validation_data=options.rows.data,
        eval_data=options.rows.data,
        output_dir=tmp_path / "sweep",
        workers="ray",
        quiet=True,
    )
    answer = run_sweep(sweep, child_command=(sys.executable, str(fake_cell)))
    assert (answer["num_complete"], answer["num_pruned"]) == (6, 1)
    [search] = json.loads((sweep.output_dir / "sweep.json").read_text())["searches"]
    # Nobody waited for its second epoch, which comes after ten minutes.
    assert [trial["epochs"] for trial in search["trials"] if trial["state"] == "pruned"] == [[0.05]]
    assert answer["methods"] == "loreft[rank=8]"
    assert str(fake_cell) not in processes()


def test_an_interrupt_leaves_nothing_running(options, fake_cell, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from lowmem_reft.compare.matrix import run_comparison\n"
        "from lowmem_reft.options import CompareOptions\n"
        "from lowmem_reft.options.written import build\n"
        f"options = build(CompareOptions, model={options.base.model!r},\n"
        f"    data={options.rows.data!r},\n"
        f"    eval_data={options.rows.eval_data!r}, methods='loreft,red[lr={SLOW}]',\n"
        f"    output_dir=Path({str(options.output_dir)!r}), quiet=True, workers='ray')\n"
        "signal.signal(signal.SIGTERM, handler := lambda *_: None)\n"
        "try:\n"
        f"    run_comparison(options, child_command={fake_cell!r})\n"
        "finally:\n"
        "    assert signal.getsignal(signal.SIGTERM) is handler\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "RAY_ADDRESS": "local"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C reaches all processes of the terminal
    )
    slow = f"red[lr={SLOW}] 0"
    finished = options.output_dir / "cells" / "loreft-seed0" / "result.json"
    deadline = time.monotonic() + 300
    while not (slow in runs_of(tmp_path) and finished.is_file()) and time.monotonic() < deadline:
        time.sleep(0.05)
    was_running = fake_cell[1] in processes()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert was_running
    assert "KeyboardInterrupt" in errors
    assert "arning" not in errors
    assert fake_cell[1] not in processes()
    in_session = subprocess.run(
        ["ps", "-o", "args", "--sid", str(process.pid)], capture_output=True, text=True, check=False
    )
    assert in_session.stdout.splitlines()[1:] == []
    assert json.loads(finished.read_text())["error"] is None


def test_ray_is_asked_for_where_it_is_not_installed(options, fake_cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"workers must be a number .* pip install .*\[ray\]"):
        run_comparison(options, child_command=fake_cell)


def test_a_cluster_that_does_not_answer_is_refused(options, fake_cell, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match=r"RAY_ADDRESS must .* answers, got '127\.0\.0\.1:1'"):
        run_comparison(options, child_command=fake_cell)


@pytest.mark.parametrize(
    ("nodes", "threads", "need"),
    [
        ([{"CPU": 8.0}], "2", {"CPU": 2}),
        ([{"CPU": 2.0}, {"CPU": 4.0}], "16", {"CPU": 4}),  # 16 would wait for ever
        ([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}], "8", {"CPU": 1, "GPU": 1}),
    ],
)
def test_a_cell_takes_what_some_node_has(nodes, threads, need, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert _need(nodes) == need
