"""The matrix of cells: isolation, skipping, failures as rows, and the files that come out.

The processes are real, the training in them is not: ``FAKE_CELL`` replaces it, and its behaviour
follows from the method's learning rate.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fake_model import config_alone
from lowmem_reft.cli import main
from lowmem_reft.compare import report
from lowmem_reft.compare.cell import EMPTY_RESULT, read_cell, training_key, write_cell
from lowmem_reft.compare.cells import build_cells, command_line
from lowmem_reft.compare.child import run_cell
from lowmem_reft.compare.engines.node import data_files, read_content
from lowmem_reft.compare.matrix import run_comparison
from lowmem_reft.compare.sources import Sources, find_sources, task_name
from lowmem_reft.data import embedded
from lowmem_reft.errors import InputError
from lowmem_reft.machine.locks import alone
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.methods.table import METHODS
from lowmem_reft.options import (
    CompareOptions,
    MemoryOptions,
    OptimOptions,
    ReuseOptions,
    ScoringOptions,
)
from lowmem_reft.options.values import parse_seeds
from lowmem_reft.options.written import build, changed

ROOT = Path(__file__).parents[2]
FAILS, KILLED, SILENT, SLOW = 0.5, 0.25, 0.125, 0.0625

FAKE_CELL = f"""
import os, signal, sys, time
from pathlib import Path
from lowmem_reft.compare import cell
from lowmem_reft.compare.engines.launch import leave_result

def run_cell(todo):
    lr = todo.train.optim.lr if todo.train else 0
    log = todo.directory.parents[1] / "runs.txt"
    with log.open("a") as file:
        file.write(f"{{todo.directory.name}} {{os.environ.get('OMP_NUM_THREADS')}}\\n")
    if lr == {FAILS}:
        raise RuntimeError("the loss is <b>not</b> a number,\\nand more")
    if lr == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    if lr == {SILENT}:
        sys.exit("no such thing")
    if lr == {SLOW}:
        time.sleep(600)
    print("said on standard output")
    measured = dict(metric="accuracy", value=0.5 + todo.record["seed"] / 10, device="a machine",
                    num_trainable_params=100 if todo.train else 0, num_examples=4, wall_time_s=1.0)
    if todo.train:
        measured.update(peak_bytes=2**20, step_time_s=0.1, tokens_per_s=float("nan"),
                        loss_history=[[1, 2.0], [2, 1.0]], adapter_bytes=400)
    return {{**cell.EMPTY_RESULT, **measured, **todo.record}}

sys.exit(leave_result(Path(sys.argv[1]), run_cell))
"""

ROWS = [{"prompt": f"{i} is", "choices": ["even", "odd"], "answer": i % 2} for i in range(20)]


@pytest.fixture
def fake_cell(tmp_path):
    path = tmp_path / "fake_cell.py"
    path.write_text(FAKE_CELL)
    return (sys.executable, str(path))


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Drawing takes longer than all the rest; test_report.py has its tests.
    monkeypatch.setattr(report, "write_report", lambda _, d, **_k: d / "report.html")
    model = config_alone(tmp_path)
    return build(
        CompareOptions,
        model=str(model),
        data=str(write_rows(tmp_path / "numbers.jsonl", ROWS)),
        eval_data=str(write_rows(tmp_path / "held_out.jsonl", ROWS[:4])),
        methods="loreft,qlora",
        output_dir=tmp_path / "out",
        quiet=True,
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results_of(options):
    return json.loads((options.output_dir / "results.json").read_text())


def runs_of(options):
    path = options.output_dir / "runs.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[0] for line in lines]


def test_every_method_runs_with_every_seed_after_the_untuned_base(options, fake_cell):
    options = changed(options, methods="loreft,qlora[rank=2],lora", seeds="0,1")
    answer = run_comparison(options, child_command=fake_cell)
    cells = [(result["method"], result["seed"]) for result in results_of(options)]
    assert cells == [
        ("base[storage=nf4]", 0),
        ("base[storage=bf16]", 0),
        *((method, seed) for method in ("loreft", "qlora[rank=2]", "lora") for seed in (0, 1)),
    ]
    assert (answer["num_cells"], answer["num_failed"]) == (8, 0)
    assert answer["rows"][2]["value_mean"] == pytest.approx(0.55)


def test_a_result_has_the_fields_that_scripts_rely_on(options, fake_cell):
    run_comparison(options, child_command=fake_cell)
    result = results_of(options)[1]
    names = "method task seed metric value num_trainable_params adapter_bytes peak_bytes"
    assert set(f"{names} step_time_s error".split()) <= set(result)
    assert result["task"] == "numbers"
    assert result["tokens_per_s"] is None  # nan is no JSON
    assert result["config"]["optim"]["lr"] == 9e-4  # of rank 8 on a base of 4096
    stored = options.output_dir / "cells" / "loreft-seed0" / "result.json"
    assert json.loads(stored.read_text()) == {**result, "verdict": None}
    [verdict] = result["verdict"]  # what only all cells together say
    assert set(verdict) == {"task", "take", "reason"}
    assert verdict["task"] == "numbers"


def test_a_dry_run_lists_what_is_to_run_and_runs_nothing(
    options, fake_cell, tiny_llama_dir, tmp_path, capsys
):
    options = changed(options, model=str(tiny_llama_dir), methods="loreft[rank=2],lora")
    run_comparison(options, child_command=fake_cell)
    before = sorted(options.output_dir.rglob("*"))
    more = changed(
        options, methods="loreft[rank=2],lora,prefix", seeds="0,1", dry_run=True, quiet=False
    )
    found = run_comparison(more, child_command=("false",))
    assert sorted(options.output_dir.rglob("*")) == before
    assert (found["num_cells"], found["num_finished"]) == (8, 4)
    assert [cell["seed"] for cell in found["cells"] if cell["finished"]] == [0, 0, 0, 0]
    loreft, lora, _ = found["methods"]
    assert (loreft["rank"], loreft["positions"], lora["rank"]) == (2, "all", 16)
    assert loreft["peak_bytes"] > 0
    assert all(each["lr"] > 0 for each in found["methods"])
    titles, *lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("numbers  loreft[rank=2]      1             0 ") for line in lines)
    assert [each["epochs"] for each in found["methods"]] == [10, 10, 10]
    assert " epochs " in titles
    bounded = run_comparison(changed(more, max_steps=3, quiet=True))["methods"][0]
    assert bounded["epochs"] == 1.2  # 3 steps of 8 of the 20 rows
    new = changed(more, output_dir=tmp_path / "new", methods="bitfit", quiet=True)
    assert "bias" in run_comparison(new)["methods"][0]["error"]
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="lr_search must be left out with dry_run"):
        run_comparison(changed(more, lr_search="1,3"))


def test_finished_cells_are_not_run_again(options, fake_cell):
    run_comparison(options, child_command=fake_cell)
    before, results = runs_of(options), results_of(options)
    run_comparison(options, child_command=fake_cell)
    assert runs_of(options) == before
    assert results_of(options) == results
    run_comparison(changed(options, methods="loreft,qlora,red"), child_command=fake_cell)
    assert runs_of(options) == [*before, "red-seed0"]


@pytest.mark.parametrize(
    "change",
    [
        {"optim": OptimOptions(epochs=1.0)},
        {"limit": 3, "max_length": 64},
        {"memory": MemoryOptions(activation_checkpointing=True)},
    ],
)
def test_a_changed_configuration_is_run_again(options, fake_cell, change):
    run_comparison(options, child_command=fake_cell)
    run_comparison(changed(options, **change), child_command=fake_cell)
    assert runs_of(options).count("loreft-seed0") == 2


@pytest.mark.parametrize("name", ["numbers.jsonl", "held_out.jsonl", "model/config.json"])
def test_changed_inputs_are_run_again_although_their_paths_are_the_same(
    options, fake_cell, tmp_path, name
):
    run_comparison(options, child_command=fake_cell)
    path = tmp_path / name
    path.write_text(
        path.read_text().replace("19", "21").replace("3 is", "5 is").replace("4096", "2048")
    )
    run_comparison(options, child_command=fake_cell)
    assert runs_of(options).count("loreft-seed0") == 2


def test_inputs_that_have_moved_are_the_same_inputs(options, fake_cell, tmp_path):
    run_comparison(options, child_command=fake_cell)
    Path(options.base.model).rename(tmp_path / "moved")
    run_comparison(changed(options, model=str(tmp_path / "moved")), child_command=fake_cell)
    assert runs_of(options).count("loreft-seed0") == 1


@pytest.mark.parametrize(
    ("lr", "error"),
    [
        (FAILS, "RuntimeError: the loss is <b>not</b> a number, and more"),
        (KILLED, "killed by signal 9 (Killed); out of memory?"),
        (SILENT, "ended with exit code 1 and no result: no such thing"),
    ],
)
def test_a_cell_that_fails_is_a_row_and_the_rest_goes_on(options, fake_cell, lr, error):
    options = changed(options, methods=f"loreft,red[lr={lr}],qlora")
    answer = run_comparison(options, child_command=fake_cell)
    results = {result["method"]: result for result in results_of(options)}
    failed = results[f"red[lr={lr}]"]
    assert (failed["error"], failed["value"]) == (error, None)
    assert failed["config"]["optim"]["lr"] == lr
    assert results["qlora"]["error"] is None
    assert answer["num_failed"] == 1
    # It gets a second chance; those that have finished do not.
    run_comparison(options, child_command=fake_cell)
    assert runs_of(options).count(f"red-lr={lr}-seed0") == 2
    assert runs_of(options).count("qlora-seed0") == 1


def test_the_output_of_a_cell_is_in_its_log(options, fake_cell, capfd):
    run_comparison(changed(options, methods=f"loreft,red[lr={FAILS}]"), child_command=fake_cell)
    cells = options.output_dir / "cells"
    assert "said on standard output" in (cells / "loreft-seed0" / "log.txt").read_text()
    assert "Traceback" in (cells / f"red-lr={FAILS}-seed0" / "log.txt").read_text()
    assert capfd.readouterr().out == ""


def test_a_truncated_result_is_run_again(options, fake_cell):
    run_comparison(options, child_command=fake_cell)
    path = options.output_dir / "cells" / "loreft-seed0" / "result.json"
    path.write_text(path.read_text()[:100])
    run_comparison(options, child_command=fake_cell)
    assert json.loads(path.read_text())["error"] is None


def test_workers_run_at_the_same_time_and_share_the_threads(options, fake_cell, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    options = changed(options, workers=3, seeds="0,1,2")
    run_comparison(options, child_command=fake_cell)
    lines = (options.output_dir / "runs.txt").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"2"}
    seeds = [result["seed"] for result in results_of(options) if result["method"] == "qlora"]
    assert seeds == [0, 1, 2]  # the order of the matrix, whichever came first


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_comparison_stops_its_children_and_keeps_what_has_finished(
    options, fake_cell, tmp_path, how
):
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from lowmem_reft.compare.matrix import run_comparison\n"
        "from lowmem_reft.options import CompareOptions\n"
        "from lowmem_reft.options.written import build\n"
        f"options = build(CompareOptions, model={options.base.model!r},\n"
        f"    data={options.rows.data!r},\n"
        f"    eval_data={options.rows.eval_data!r}, methods='loreft,red[lr={SLOW}]',\n"
        f"    output_dir=Path({str(options.output_dir)!r}), quiet=True)\n"
        f"run_comparison(options, child_command={fake_cell!r})\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    slow = f"red-lr={SLOW}-seed0"
    deadline = time.monotonic() + 300
    while slow not in runs_of(options) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=300)
    assert ("KeyboardInterrupt" in errors) is (how == signal.SIGINT)
    cells = options.output_dir / "cells"
    assert json.loads((cells / "loreft-seed0" / "result.json").read_text())["error"] is None
    assert not (cells / slow / "result.json").exists()
    # The child writes its row when it wakes up, 60 seconds later, unless it has been stopped.
    listing = ["ps", "-ww", "-eo", "args"]  # wide, or long paths are cut
    listed = subprocess.run(listing, capture_output=True, text=True, check=True)
    if how == signal.SIGINT or sys.platform == "linux":  # elsewhere nobody is left to stop it
        assert str(cells / slow) not in listed.stdout


def test_csv_and_json_hold_the_same(options, fake_cell):
    run_comparison(changed(options, methods=f"loreft,red[lr={FAILS}]"), child_command=fake_cell)
    with (options.output_dir / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    results = results_of(options)
    assert len(lines) == len(results)
    for line, result in zip(lines, results, strict=True):
        assert line == {
            name: "" if result[name] is None else str(result[name]) for name in report.CSV_FIELDS
        }


def test_rows_to_evaluate_on_that_are_trained_too_are_counted(options, fake_cell, capsys, tmp_path):
    assert find_sources(options).also_trained.startswith("4 of 4 of its rows are trained on too")
    run_comparison(changed(options, quiet=False), child_command=fake_cell)
    assert "eval_data of numbers: 4 of 4 of its rows" in capsys.readouterr().err
    new = write_rows(tmp_path / "new.jsonl", [{**row, "prompt": "new"} for row in ROWS[:4]])
    assert find_sources(changed(options, eval_data=str(new))).also_trained == ""


def test_a_cell_file_holds_the_whole_cell(options):
    cells = build_cells(options, parse_methods("loreft[rank=2]"), [3], find_sources(options))
    for cell in cells:
        assert read_cell(write_cell(cell)) == cell
        assert cell.train is None or cell.train.reuse.reuse == "off"


def test_the_keys_of_cells_stay_so_that_finished_ones_are_found(tmp_path):
    options = build(
        CompareOptions,
        **{"limit": 7, "eval_limit": 5, "compute_dtype": "fp32", "template": "{prompt}!"},
        optim=OptimOptions(epochs=2.0),
        memory=MemoryOptions(activation_checkpointing=True),
        scoring=ScoringOptions(max_new_tokens=8),
        output_dir=tmp_path,
    )
    sources = Sources(
        **{"model": "m", "model_name": "m", "model_digest": "d", "task": "numbers"},
        **{"train": "t.jsonl", "train_digest": "t", "validation": "v.jsonl"},
        **{"validation_digest": "v", "evaluate": "e.jsonl", "evaluate_digest": "e"},
    )
    methods = (
        "loreft[rank=2,positions=f1,tie=tied,act=relu,dropout=0.1,lr=9e-4],"
        "lora[alpha=8,target_modules=q_proj,lr=2e-4],prefix[num_virtual_tokens=3,lr=0.01]"
    )
    cells = build_cells(options, parse_methods(methods), [3], sources)
    assert [cell.record["key"][:16] for cell in cells] == [
        "42d311f1b2c513ea",
        "3ce363e72d73543c",
        "1fb59395280f6b8c",
        "6f4a34de6c88cbb6",
        "8cd36be6546de11b",
    ]


def test_a_cell_whose_default_depends_on_the_base_has_a_key_of_its_own_on_a_deep_one(tmp_path):
    def keys(num_layers):
        sources = Sources(
            **{"model": "m", "model_name": "m", "model_digest": "d", "task": "numbers"},
            **{"train": "t.jsonl", "train_digest": "t"},
            **{"evaluate": "e.jsonl", "evaluate_digest": "e"},
        )
        vars(sources)["num_layers"] = num_layers
        methods = "loreft[rank=2,lr=9e-4],lora[lr=2e-4]"
        options = build(CompareOptions, compute_dtype="fp32", output_dir=tmp_path)
        _, _, *cells = build_cells(options, parse_methods(methods), [0], sources)
        return [cell.record["key"] for cell in cells]

    (few, lora), (more, same) = keys(11), keys(12)
    assert few != more
    assert lora == same


def test_general_text_is_scored_by_every_cell_and_is_part_of_its_key(options, tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text("once upon a time " * 50)
    methods = parse_methods("loreft")
    plain = build_cells(options, methods, [0], find_sources(options))
    keys = [[cell.record["key"] for cell in plain]]
    for content, limit in (("once upon a time ", 64), ("another text ", 64), ("another text ", 8)):
        text.write_text(content * 50)
        asked = changed(options, forgetting=str(text), forgetting_limit=limit)
        cells = build_cells(asked, methods, [0], find_sources(asked))
        keys.append([cell.record["key"] for cell in cells])
        assert {cell.evaluate.beside.forgetting for cell in cells} == {str(text)}
        assert {training_key(cell) for cell in cells[1:]} == {training_key(plain[1])}
        assert data_files(read_content(write_cell(cells[0]))).count(str(text)) == 1
    assert f"--forgetting {text} --forgetting-limit 8" in cells[1].record["command"]
    assert len({tuple(each) for each in keys}) == len({key for each in keys for key in each}) / 2


def test_a_finished_cell_that_is_scored_on_something_else_keeps_its_training(
    options, fake_cell, tmp_path
):
    text = tmp_path / "wiki.txt"
    text.write_text("once upon a time " * 50)
    run_comparison(changed(options, methods="loreft"), child_command=fake_cell)
    training = options.output_dir / "cells" / "loreft-seed0" / "train"
    [cell] = build_cells(options, parse_methods("loreft"), [0], find_sources(options))[1:]

    def train(key):
        (training / "adapter").mkdir(parents=True, exist_ok=True)
        (training / "adapter" / "adapter_model.safetensors").touch()
        (training / "trained.json").write_text(json.dumps({"key": key, "result": {}}))

    def is_kept(**change):
        before = len(runs_of(options))
        run_comparison(changed(options, methods="loreft", **change), child_command=fake_cell)
        assert len(runs_of(options)) > before
        return training.exists()

    train(training_key(cell))
    assert is_kept(forgetting=str(text))
    assert is_kept(forgetting=str(text), eval_limit=2)
    (training.parent / "result.json").write_text("{")  # what has not finished is trained again
    assert not is_kept(forgetting=str(text), eval_limit=2)
    train("another training")
    assert not is_kept()
    train(training_key(cell))
    (training / "adapter" / "adapter_model.safetensors").unlink()
    assert not is_kept(eval_limit=2)


def test_forgetting_is_in_the_results_of_the_comparison_and_not_in_its_cells(options, tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text("once upon a time " * 50)
    fake = tmp_path / "fake.py"
    known = "todo.evaluate.beside.forgetting and 2.0 + 0.5 * (todo.train is not None)"
    fake.write_text(FAKE_CELL.replace("num_examples=4", f"num_examples=4, general_loss={known}"))
    asked = changed(options, methods="loreft", forgetting=str(text))
    answer = run_comparison(asked, child_command=(sys.executable, str(fake)))
    assert [result["forgetting"] for result in results_of(options)] == [0, 0.5]
    assert [row["forgetting"] for row in answer["rows"]] == [0, 0.5]


def test_a_cell_file_without_groups_of_the_methods_options_is_read(options):
    cell = build_cells(options, parse_methods("loreft[act=relu]"), [3], find_sources(options))[-1]
    path = write_cell(cell)
    content = json.loads(path.read_text())
    method = content["train"]["method"]
    method |= method.pop("edit")
    path.write_text(json.dumps(content))
    assert read_cell(path) == cell


def test_only_the_training_of_a_cell_dequantizes(options):
    options = changed(options, reuse=ReuseOptions(dequantize_upper="on"))
    (*_, cell) = build_cells(options, parse_methods("loreft"), [0], find_sources(options))
    assert cell.train.reuse == replace(cell.evaluate.reuse, dequantize_upper="on")


def test_without_evaluation_data_a_tenth_is_held_out(options):
    sources = find_sources(changed(options, eval_data=None))
    train, held_out = (
        [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]
        for path in (sources.train, sources.evaluate)
    )
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted(train + held_out) == sorted(row["prompt"] for row in ROWS)


def test_labels_become_the_same_choices_for_training_and_scoring(options, tmp_path):
    rows = [{"text": f"text {label}", "label": label} for label in ("good", "bad", "fair")]
    data = write_rows(tmp_path / "train.jsonl", rows)
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[:1])
    sources = find_sources(
        changed(options, data=str(data), eval_data=str(held_out), validation_data=str(held_out))
    )
    for path in (sources.evaluate, sources.validation):
        assert json.loads(Path(path).read_text()) == {
            "prompt": "text good",
            "choices": ["bad", "fair", "good"],
            "answer": 2,
        }
    assert len(Path(sources.train).read_text().splitlines()) == 3


def test_the_command_line_names_what_is_not_the_default():
    options = build(
        CompareOptions,
        data="a b.jsonl",
        memory=MemoryOptions(activation_checkpointing=True),
        optim=OptimOptions(epochs=1.5),
        reuse=ReuseOptions(reuse="trunk", reuse_limit_gib=5),
        workers=4,
    )
    assert command_line(options, "loreft[rank=8]", 2) == (
        "lowmem-reft compare --methods 'loreft[rank=8]' --seeds 2 --data 'a b.jsonl' "
        "--activation-checkpointing --epochs 1.5 --reuse trunk --reuse-limit-gib 5"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": "0,x"}, "seeds must be different non-negative integers, got '0,x'"),
        ({"seeds": "1,1"}, "seeds must be different"),
        ({"seeds": ""}, "seeds must be different"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"methods": "loreft,loreft"}, "methods must be different"),
        ({"methods": "lora[rank=0]"}, "rank must be at least 1, got 0"),
        ({"methods": "lora[lr=-1]"}, "lr must be finite and above 0, got -1.0"),
        ({"methods": "lora[schedule=lineal]"}, "schedule must be one of linear, .* got 'lineal'"),
        ({"methods": "lora[optim=adam]"}, "optim must be one of adamw_torch, .* got 'adam'"),
        ({"methods": "loreft[rank=2],loreft[ rank=2]"}, "methods must be different"),
        ({"data": None}, "eval_data must come with data"),
        ({"model": "/no/such/model"}, "model must be a directory or a hub id"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"forgetting_limit": 8}, "forgetting_limit must come with forgetting, got 8 alone"),
        ({"forgetting": "gone.txt"}, "forgetting must be an existing file, got 'gone.txt'"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options, fake_cell, change, message):
    with pytest.raises(InputError, match=message):
        run_comparison(changed(options, **change), child_command=fake_cell)
    assert runs_of(options) == []


def test_seeds_are_numbers():
    assert parse_seeds("0, 1,12") == [0, 1, 12]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("a/trec/train.jsonl", "trec"),
        ("a/numbers.csv", "numbers"),
        ("org/set:main", "org/set:main"),
        (str(embedded.task_files()[0]), "embedded-task"),
    ],
)
def test_a_task_is_named_after_its_file_or_folder(data, name):
    assert task_name(data) == name


def test_of_all_methods_those_that_are_refused_are_rows_and_no_failures(options, monkeypatch):
    def run_all(cells, **_):
        errors = {"bitfit": "InputError: method must not be bitfit", "full": "RuntimeError: broken"}
        return [
            {
                **EMPTY_RESULT,
                **cell.record,
                "value": 0.5,
                "error": errors.get(cell.record["method"]),
            }
            for cell in cells
        ]

    monkeypatch.setattr("lowmem_reft.compare.matrix.run_cells", run_all)
    answer = run_comparison(changed(options, methods="all"))
    names = [result["method"] for result in results_of(options)]
    assert names[3:] == list(METHODS)  # after the base in three storages
    assert answer["num_failed"] == 1
    named = run_comparison(changed(options, methods="bitfit"))
    assert named["num_failed"] == 1


def test_an_equal_budget_is_in_the_entry_and_the_result_of_each_row(
    options, tiny_llama_dir, fake_cell
):
    options = changed(
        options, model=str(tiny_llama_dir), methods="loreft[rank=2],prefix", equal="params"
    )
    run_comparison(options, child_command=fake_cell)
    base, loreft, prefix = results_of(options)
    assert base["budget"] is None
    assert loreft["budget"] == "equal params: 1,032 of 1,032"
    assert prefix["method"] == "prefix[num_virtual_tokens=4]"
    assert prefix["budget"] == "equal params: 1,024 of 1,032"
    assert "--equal" not in prefix["command"]


def test_a_real_cell_trains_and_scores(tiny_llama_dir, tmp_path):
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS[:8]))
    options = build(CompareOptions, output_dir=tmp_path / "out", optim=OptimOptions(max_steps=2))
    sources = Sources(
        model=str(tiny_llama_dir),
        model_name="tiny",
        model_digest="m",
        train=rows,
        train_digest="t",
        evaluate=rows,
        evaluate_digest="e",
        task="numbers",
    )
    base, tuned = build_cells(options, parse_methods("loreft[rank=2,storage=fp32]"), [0], sources)
    for cell in (base, tuned):
        write_cell(cell)
    untrained, trained = run_cell(base), run_cell(tuned)
    assert set(untrained) == set(trained) == set(EMPTY_RESULT)
    assert (untrained["num_trainable_params"], untrained["peak_bytes"]) == (0, None)
    assert trained["num_trainable_params"] == 4 * (2 * 64 * 2 + 2)
    assert trained["adapter_bytes"] >= 4 * trained["num_trainable_params"]
    assert trained["peak_bytes"] > 0
    assert (trained["num_steps"], trained["num_examples"]) == (2, 8)
    assert (tuned.directory / "predictions.jsonl").is_file()
    assert [path.name for path in (tuned.directory / "train").iterdir() if path.is_dir()] == [
        "adapter"
    ]


def test_rows_that_cannot_be_scored_do_not_cost_a_training(tiny_llama_dir, tmp_path):
    train = str(write_rows(tmp_path / "train.jsonl", ROWS[:8]))
    long = {**ROWS[0], "prompt": 200 * "0 is "}
    options = changed(
        build(CompareOptions, output_dir=tmp_path / "out", optim=OptimOptions(max_steps=1)),
        data=train,
        eval_data=str(write_rows(tmp_path / "long.jsonl", [long])),
        model=str(tiny_llama_dir),
        max_length=64,
        long_rows="drop",
    )
    specs = parse_methods("loreft[rank=2,storage=fp32]")
    _, tuned = build_cells(options, specs, [0], find_sources(options))
    with pytest.raises(InputError, match=r"long.jsonl:1: .* at most max_length 64"):
        run_cell(tuned)
    assert not (tuned.directory / "train").exists()


def test_pairs_and_targets_survive_being_held_out(options, tmp_path):
    rows = [{"text": f"a {n}", "text_pair": f"b {n}", "target": n / 2} for n in range(20)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    sources = find_sources(changed(options, data=str(data), eval_data=None, task_type="SEQ_CLS"))
    kept = [
        json.loads(line)
        for path in (sources.train, sources.evaluate)
        for line in Path(path).read_text().splitlines()
    ]
    assert sorted(kept, key=lambda row: row["target"]) == rows


@pytest.mark.parametrize("kind", ["compare", "sweep"])
def test_a_second_command_on_the_directory_is_refused_while_the_first_is_at_work(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [kind, "--methods", "loreft", "--output-dir", str(tmp_path), "--quiet"]
    if kind == "sweep":
        arguments += ["--space", "lr=1e-3,1e-2"]
    with alone(tmp_path, tmp_path / ".lock"):
        assert main(arguments) == 2
    assert "output_dir must be written to by one run at a time" in capsys.readouterr().err
