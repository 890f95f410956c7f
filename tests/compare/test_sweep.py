"""The search for settings: what is tried, stopped, gone on with, and never looked at.

The processes are real, the training in them is not: ``FAKE_CELL`` replaces it, and its scores
follow from the setting.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_model import config_alone
from fake_trial import BAD_RANK, FAILS_RANK, FAKE_CELL, SLOW_RANK
from lowmem_reft import cli
from lowmem_reft.compare.sweep import choose_sampler, run_sweep
from lowmem_reft.compare.sweep.best import best_of, remark
from lowmem_reft.compare.sweep.console import print_trials
from lowmem_reft.compare.sweep.search import Search, Trial
from lowmem_reft.compare.sweep.space import Choices, Range, parse_space, size
from lowmem_reft.data.rows import load_rows
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import CompareOptions, OptimOptions, ScoringOptions, SweepOptions
from lowmem_reft.options.written import build, changed

pytest.importorskip("optuna")

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{i} is", "choices": ["even", "odd"], "answer": i % 2} for i in range(40)]


@pytest.fixture
def fake_cell(tmp_path):
    path = tmp_path / "fake_cell.py"
    path.write_text(FAKE_CELL.replace("{runs!r}", repr(str(tmp_path / "runs.txt"))))
    return (sys.executable, str(path))


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model = config_alone(tmp_path)
    return build(
        SweepOptions,
        space="rank=4,8 lr=1e-3,4e-3",
        model=str(model),
        data=write_rows(tmp_path / "numbers.jsonl", ROWS),
        validation_data=write_rows(tmp_path / "validation.jsonl", ROWS[:4]),
        eval_data=str(tmp_path / "test.jsonl"),  # which is not there
        output_dir=tmp_path / "out",
        quiet=True,
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def runs_of(tmp_path):
    path = tmp_path / "runs.txt"
    return path.read_text().splitlines() if path.exists() else []


def searches_of(options):
    return json.loads((options.output_dir / "sweep.json").read_text())["searches"]


def trials_of(options):
    return [trial for search in searches_of(options) for trial in search["trials"]]


def outcomes(options):
    names = ("number", "method", "state", "value", "epochs")
    return [tuple(str(trial[name]) for name in names) for trial in trials_of(options)]


def spaces(text, methods="loreft"):
    return parse_space(text, parse_methods(methods))


# --- the space


def test_a_space_has_lists_and_ranges():
    [space] = spaces(
        "r=4,8 layers=all,upper:0.5,2;3 positions=f7+l7,all lr=1e-3..1e-2:log batch-size=4..16:4"
        " dropout=0..0.3:0.05 epochs=1..3"
    )
    assert space == (
        Choices(name="rank", values=("4", "8")),
        Choices(name="layers", values=("all", "upper:0.5", "2;3")),
        Choices(name="positions", values=("f7+l7", "all")),
        Range(name="lr", low=1e-3, high=1e-2, step=None, log=True, whole=False),
        Range(name="batch_size", low=4, high=16, step=4, log=False, whole=True),
        Range(name="dropout", low=0, high=0.3, step=0.05, log=False, whole=False),
        Range(name="epochs", low=1, high=3, step=None, log=False, whole=False),
    )
    assert size(space) is None
    assert size(space[:3]) == 12


def test_an_option_goes_to_the_methods_that_take_it_and_one_may_have_its_own():
    loreft, lora = spaces(
        "rank=4,8 positions=all,l3 lr=1e-3,2e-3 lora.lr=1e-4..1e-3:log lora.alpha=8,16",
        "loreft,lora[storage=nf4]",
    )
    assert [part.name for part in loreft] == ["rank", "positions", "lr"]
    assert loreft[2] == Choices(name="lr", values=("1e-3", "2e-3"))
    assert [part.name for part in lora] == ["rank", "lr", "alpha"]
    assert isinstance(lora[1], Range)


def test_every_option_of_a_method_can_be_varied():
    [space] = spaces(
        "act=relu,gelu init=paper,identity tie=tied,sides component=mlp_output,block_output",
        "loreft[positions=f1+l1]",
    )
    assert [part.name for part in space] == ["act", "init", "tie", "component"]


@pytest.mark.parametrize(
    ("text", "methods", "message"),
    [
        ("", "loreft", "space must name at least one option, got ''"),
        ("rank", "loreft", "space must be words like .* got 'rank'"),
        ("rank=4, 8", "loreft", "space must be words like .* got '8'"),
        ("rnak=4,8", "loreft", "space must name options that loreft can have, got 'rnak'; choose"),
        ("alpha=4,8", "loreft", "space must name options that loreft can have, got 'alpha'"),
        ("lora.rank=4,8", "loreft", "space must name methods among loreft, got 'lora'"),
        ("loreft.alpha=4,8", "loreft,lora", "options that loreft can have, got 'alpha'"),
        ("alpha=4,8", "loreft,lora", "space must name an option of each method, got none of 'lore"),
        ("rank=4,8 r=2,3", "loreft", "space must name an option once, got r twice"),
        ("rank=4,8", "loreft[r=2]", r"space must not name rank, which 'loreft\[r=2\]' fixes"),
        ("rank=4,4", "loreft", "space must list different values, got rank='4,4'"),
        ("rank=4,,8", "loreft", "space must list different values"),
        ("rank=4,0", "loreft", "rank must be at least 1, got 0"),
        ("rank=4,x", "loreft", "space must .* got rank='x': rank in .* must be a whole number"),
        ("rank=1.5..4", "loreft", "rank in .* must be a whole number, got '1.5'"),
        ("rank=8..4", "loreft", "space must have ranges that rise, got rank='8..4'"),
        ("rank=4..8:0.5", "loreft", "space must have whole steps for rank, got '4..8:0.5'"),
        ("rank=4..8:3", "loreft", "space must have ranges of whole steps, got rank='4..8:3'"),
        ("lr=1e-3..1e-2:lg", "loreft", "space must have ranges of whole steps"),
        ("dropout=0..0.3:log", "loreft", "space must have logarithms above 0"),
        ("dropout=0..1", "loreft", r"dropout must be in \[0, 1\), got 1.0"),
        ("lr=-1,1", "loreft", "lr must be finite and above 0, got -1.0"),
        ("layers=all..upper", "loreft", "space must list the values of layers"),
        ("positions=f7+l7,x3", "loreft", "positions must be .* got 'x3'"),
        ("schedule=linear,lineal", "loreft", "schedule must be one of .* got 'lineal'"),
        ("storage=nf4,nf5", "loreft", "storage in .* must be one of .* got 'nf5'"),
    ],
)
def test_a_wrong_space_is_refused_and_the_word_named(text, methods, message):
    with pytest.raises(InputError, match=message):
        spaces(text, methods)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": "lr=1e-3..1e-2"}, "trials must be given where not every setting is tried"),
        ({"sampler": "random"}, "trials must be given"),
        ({"sampler": "grid", "trials": 3}, "trials must be left out with sampler grid, got 3"),
        ({"space": "lr=1e-3..1e-2", "sampler": "grid"}, "sampler must be random or tpe"),
        ({"data": None}, "validation_data must come with data"),
        ({"task": "trec"}, "task must be given without data, got both"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"methods": "loreft,loreft"}, "methods must be different"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    options, fake_cell, tmp_path, change, message
):
    with pytest.raises(InputError, match=message):
        run_sweep(changed(options, **change), child_command=fake_cell)
    assert runs_of(tmp_path) == []


def test_a_wrong_space_exits_with_2_and_its_message_alone(capsys):
    assert cli.main(["sweep", "--space", "rnak=4,8", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lowmem-reft sweep: error: space must name options that loreft")


def test_optuna_is_asked_for_where_it_is_not_installed(options, fake_cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"sweep must have Optuna.*pip install .*\[sweep\]"):
        run_sweep(options, child_command=fake_cell)


@pytest.mark.parametrize(
    ("text", "trials", "sampler"),
    [("rank=2,4", None, "grid"), ("rank=2,4", 3, "tpe"), ("rank=2..4", 3, "tpe")],
)
def test_a_grid_is_tried_where_it_can_be_counted_and_no_number_is_given(
    options, text, trials, sampler
):
    options = changed(options, space=text, trials=trials)
    assert choose_sampler(options, spaces(text)) == sampler


# --- the trials


def test_a_grid_is_tried_for_every_method_and_the_best_of_each_named(options, fake_cell, tmp_path):
    options = changed(options, methods="loreft,lora[storage=nf4]", space="rank=4,8 lr=1e-3,4e-3")
    answer = run_sweep(options, child_command=fake_cell)
    assert (answer["num_trials"], answer["num_complete"], answer["metric"]) == (8, 8, "accuracy")
    assert sorted(runs_of(tmp_path)) == sorted(
        f"{method}rank={rank},lr={lr}]"
        for method in ("loreft[", "lora[storage=nf4,")
        for rank in (4, 8)
        for lr in ("1e-3", "4e-3")
    )
    assert answer["methods"] == "loreft[rank=8,lr=4e-3],lora[storage=nf4,rank=8,lr=4e-3]"
    assert [row["value"] for row in answer["best"]] == [0.9, 0.9]
    [first, *_] = trials_of(options)
    assert first["settings"] == {"rank": "4", "lr": "1e-3"}
    assert first["epochs"] == pytest.approx([0.807, 0.857])
    assert (first["state"], first["num_trainable_params"]) == ("complete", 4)


def tried(*outcomes, metric="accuracy", rows=400, **settings):
    """Complete trials with these values and losses, and the settings of each."""
    return [
        Trial(
            **{"number": n, "state": "complete", "metric": metric, "value": value, "loss": loss},
            **{"num_examples": rows, "method": f"loreft[{n}]", "drawn": {}},
            settings={name: texts[n] for name, texts in settings.items()},
        )
        for n, (value, loss) in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("outcomes", "others", "expected"),
    [
        # One standard error of 400 rows at 80 % is 2 points.
        ([(0.80, 1.0), (0.785, 0.5), (0.77, 0.1)], {}, 1),
        ([(0.80, 1.0), (0.785, 0.5)], {"rows": None}, 0),
        ([(0.80, 1.0), (0.785, 0.5)], {"metric": "f1"}, 0),
        ([(0.80, 1.0), (0.785, None)], {}, 0),
        ([(0.80, None), (0.80, None)], {}, 0),
        ([(0.79, 0.5), (0.80, 0.5), (0.80, 0.5)], {}, 1),
        ([(1.0, 2.0), (0.99, 1.0)], {}, 0),
    ],
)
def test_of_accuracies_within_a_standard_error_the_lowest_loss_is_the_best(
    outcomes, others, expected
):
    trials = tried(*outcomes, **others)
    assert best_of(trials).number == expected
    assert best_of([]) is None


def test_what_was_level_and_where_the_range_ends_is_said_of_the_best(capsys):
    settings = {"rank": ["8", "16", "4"], "lr": ["1e-3", "2e-3", "4e-3"]}
    settings |= {"dropout": ["0.1", "0", "0.2"], "layers": ["all", "8", "upper:0.5"]}
    trials = tried((0.80, 1.0), (0.79, 0.5), (0.5, 0.1), **settings)
    best = best_of(trials)
    said = remark(trials, best)
    assert said == (
        "the lowest loss of 2 within 2.0 points of the highest accuracy, one standard error of 400 "
        "validation rows; at the highest rank tried, so that a better one may lie beyond"
    )
    inside = tried((0.5, 1.0), (0.9, 1.0), (0.5, 1.0), rank=["4", "8", "16"])
    assert remark(inside, best_of(inside)) == ""
    one = tried((0.9, 1.0), (0.5, 1.0), rank=["1", "2"], lr=["1e-3", "1e-2"])
    assert remark(one, best_of(one)).startswith("at the lowest lr tried")
    search = {"method": "loreft", "best": 1, "importance": None}
    search["trials"] = [vars(trial) for trial in trials]
    row = {"method": best.method, "remark": said}
    print_trials({"metric": "accuracy", "best": [row], "searches": [search], "command": None})
    lines = capsys.readouterr().err.splitlines()
    assert f"best: {said}" in lines
    assert [line.split()[0] for line in lines[4:7]] == ["1", "0", "2"]  # the best comes first


def test_of_losses_the_lowest_is_the_best_and_the_high_ones_are_stopped():
    trials = [
        Trial(number=n, state="complete", metric="loss", value=value)
        for n, value in enumerate((2.0, 0.5, 1.0))
    ]
    assert best_of(trials).number == 1
    [space] = spaces("rank=2,4,8")
    search = Search(
        space, sampler="random", seed=0, prune=True, metric="loss", num_startup_trials=1
    )
    stopped = []
    for number, value in enumerate((1.0, 0.5, 2.0)):
        trial = Trial(number=number, metric="loss")
        search.draw(number)
        stopped.append(search.report(trial, value))
        trial.state, trial.value = "pruned" if stopped[-1] else "complete", value
        search.end(trial)
    assert stopped == [False, False, True]


def test_a_sweep_of_losses_ends_at_the_lowest_one(options, fake_cell):
    path = Path(fake_cell[1])
    path.write_text(path.read_text().replace('metric="accuracy"', 'metric="loss"'))
    options = changed(options, scoring=ScoringOptions(metric="loss"))
    answer = run_sweep(options, child_command=fake_cell)
    values = [trial["value"] for trial in trials_of(options)]
    assert answer["metric"] == "loss"
    assert [row["value"] for row in answer["best"]] == [min(values)]


def test_the_command_scores_the_best_settings_on_the_test_rows(options, fake_cell):
    options = changed(
        options,
        optim=OptimOptions(epochs=2.0),
        scoring=ScoringOptions(max_new_tokens=8),
        validation_limit=3,
        template="Number: {prompt}",
    )
    command = run_sweep(options, child_command=fake_cell)["command"]
    program, *arguments = shlex.split(command)
    assert program == "lowmem-reft"
    assert cli._parse(arguments) == build(
        CompareOptions,
        methods="loreft[rank=8,lr=4e-3]",
        seeds="0,1,2",
        model=options.base.model,
        data=options.rows.data,
        validation_data=options.rows.validation_data,
        validation_limit=3,
        eval_data=options.rows.eval_data,
        template="Number: {prompt}",
        optim=OptimOptions(epochs=2.0),
        scoring=ScoringOptions(max_new_tokens=8),
    )


def test_ended_trials_are_not_run_again_and_more_can_follow(options, fake_cell, tmp_path):
    options = changed(options, sampler="random", trials=2, space="rank=8..64 lr=1e-3..1e-2:log")
    run_sweep(options, child_command=fake_cell)
    two = outcomes(options)
    run_sweep(options, child_command=fake_cell)
    assert outcomes(options) == two
    assert len(runs_of(tmp_path)) == 2
    run_sweep(changed(options, trials=4), child_command=fake_cell)
    assert outcomes(options)[:2] == two
    assert len(runs_of(tmp_path)) == len(trials_of(options)) == 4


def test_a_failed_trial_is_named_and_run_again_alone(options, fake_cell, tmp_path):
    options = changed(options, space=f"rank=4,{FAILS_RANK},8")
    answer = run_sweep(options, child_command=fake_cell)
    assert (answer["num_complete"], answer["num_failed"]) == (2, 1)
    assert trials_of(options)[1]["error"] == "RuntimeError: out of luck"
    (tmp_path / "runs.txt.fast").touch()
    answer = run_sweep(options, child_command=fake_cell)
    assert (answer["num_complete"], answer["num_failed"]) == (3, 0)
    assert runs_of(tmp_path)[3:] == [f"loreft[rank={FAILS_RANK}]"]
    assert [trial["number"] for trial in trials_of(options)] == [0, 1, 2]


def test_a_search_that_was_interrupted_ends_as_if_it_had_not_been(options, fake_cell, tmp_path):
    """TPE: what is drawn depends on all that is known, so a difference anywhere would show."""
    space, trials = "rank=8..64:log lr=1e-3..1e-2:log positions=all,l3", 14
    options = changed(options, space=space, trials=trials, prune="none", workers=1)
    (tmp_path / "runs.txt.fast").touch()
    run_sweep(options, child_command=fake_cell)
    whole = outcomes(options)
    assert len(set(whole)) == trials
    parts = changed(options, output_dir=tmp_path / "parts")
    for until in (3, 12, trials):
        run_sweep(changed(parts, trials=until), child_command=fake_cell)
    assert outcomes(parts) == whole


def test_an_interrupt_stops_the_trial_and_the_same_command_goes_on(options, fake_cell, tmp_path):
    options = changed(options, space=f"rank=4,{SLOW_RANK},8")
    script = tmp_path / "interrupted.py"
    script.write_text(
        "from pathlib import Path\n"
        "from lowmem_reft.options import SweepOptions\n"
        "from lowmem_reft.options.written import build\n"
        "from lowmem_reft.compare.sweep import run_sweep\n"
        f"options = build(SweepOptions, space={options.search.space!r},\n"
        f"    model={options.base.model!r},\n"
        f"    data={options.rows.data!r}, validation_data={options.rows.validation_data!r},\n"
        f"    eval_data={options.rows.eval_data!r}, output_dir=Path({str(options.output_dir)!r}),\n"
        "    quiet=True)\n"
        f"run_sweep(options, child_command={fake_cell!r})\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(runs_of(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert "KeyboardInterrupt" in errors
    assert [trial["state"] for trial in trials_of(options)] == ["complete", "running"]
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True
    )
    assert fake_cell[1] not in listed.stdout
    (tmp_path / "runs.txt.fast").touch()
    run_sweep(options, child_command=fake_cell)
    assert runs_of(tmp_path) == [f"loreft[rank={rank}]" for rank in (4, SLOW_RANK, SLOW_RANK, 8)]
    assert {trial["state"] for trial in trials_of(options)} == {"complete"}


def test_a_bad_trial_is_stopped_while_it_runs(options, fake_cell, tmp_path):
    options = changed(options, space=f"rank=4,6,10,12,14,{BAD_RANK},8")
    answer = run_sweep(options, child_command=fake_cell)
    assert (answer["num_complete"], answer["num_pruned"]) == (6, 1)
    [pruned] = [trial for trial in trials_of(options) if trial["state"] == "pruned"]
    # Nobody waited for its second epoch, which comes after ten minutes.
    assert (pruned["settings"], pruned["epochs"]) == ({"rank": str(BAD_RANK)}, [0.05])
    assert answer["methods"] == "loreft[rank=8]"
    run_sweep(options, child_command=fake_cell)
    assert len(runs_of(tmp_path)) == 7  # what was stopped is not tried again


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_workers_try_the_same_settings(options, fake_cell, tmp_path, sampler):
    if sampler == "random":
        options = changed(options, sampler=sampler, trials=6, space="rank=8..64 lr=1e-3..1e-2")
    options = changed(options, prune="none")
    run_sweep(options, child_command=fake_cell)
    together = changed(options, workers=3, output_dir=tmp_path / "together")
    run_sweep(together, child_command=fake_cell)
    assert outcomes(together) == outcomes(options)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_setting_that_is_drawn_again_is_not_run_again(options, fake_cell, tmp_path, workers):
    options = changed(options, sampler="random", trials=6, space="rank=4,8", workers=workers)
    answer = run_sweep(options, child_command=fake_cell)
    assert answer["num_complete"] == 6
    assert sorted(runs_of(tmp_path)) == ["loreft[rank=4]", "loreft[rank=8]"]
    values = {trial["method"]: trial["value"] for trial in trials_of(options)}
    assert all(trial["value"] == values[trial["method"]] for trial in trials_of(options))


def test_another_space_is_another_search_but_runs_no_setting_twice(options, fake_cell, tmp_path):
    run_sweep(changed(options, space="rank=4,8"), child_command=fake_cell)
    run_sweep(changed(options, space="rank=8,16"), child_command=fake_cell)
    assert [trial["settings"]["rank"] for trial in trials_of(options)] == ["8", "16"]
    assert runs_of(tmp_path) == [f"loreft[rank={rank}]" for rank in (4, 8, 16)]


def test_other_rows_are_another_search(options, fake_cell, tmp_path):
    run_sweep(changed(options, space="rank=4,8"), child_command=fake_cell)
    write_rows(Path(options.rows.validation_data), ROWS[:6])
    run_sweep(changed(options, space="rank=4,8"), child_command=fake_cell)
    assert len(runs_of(tmp_path)) == 4


def test_a_broken_record_is_refused(options, fake_cell):
    options.output_dir.mkdir()
    (options.output_dir / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"output_dir must hold a sweep\.json that is whole"):
        run_sweep(options, child_command=fake_cell)


# --- the rows


def trial_rows(options):
    """The files that every trial trained on and was scored on."""
    logs = list(options.output_dir.glob("cells/**/log.txt"))
    named = {tuple(log.read_text().split()) for log in logs}
    assert len(named) == 1
    train, validation, evaluate = named.pop()
    assert validation == evaluate
    return load_rows(train), load_rows(validation)


def prompts(rows):
    return {row.prompt for row in rows}


def test_the_test_rows_need_not_even_be_there(options, fake_cell):
    assert not Path(options.rows.eval_data).exists()
    run_sweep(options, child_command=fake_cell)
    train, validation = trial_rows(options)
    assert (len(train), len(validation)) == (40, 4)


def test_without_other_rows_test_and_validation_rows_are_put_aside(options, fake_cell):
    options = changed(options, validation_data=None, eval_data=None)
    command = run_sweep(options, child_command=fake_cell)["command"]
    comparison = cli._parse(shlex.split(command)[1:])
    train, validation = trial_rows(options)
    test = load_rows(comparison.rows.eval_data)
    assert (len(train), len(validation), len(test)) == (32, 4, 4)
    assert prompts(train) | prompts(validation) | prompts(test) == {row["prompt"] for row in ROWS}
    assert prompts(load_rows(comparison.rows.data)) == prompts(train)
    assert prompts(load_rows(comparison.rows.validation_data)) == prompts(validation)


def test_labels_become_the_same_choices_for_training_and_scoring(options, fake_cell, tmp_path):
    rows = [{"text": f"text {i}", "label": ("good", "bad", "fair")[i % 3]} for i in range(30)]
    data = write_rows(tmp_path / "labels.jsonl", rows)
    options = changed(options, data=data, validation_data=None)
    run_sweep(options, child_command=fake_cell)
    train, validation = trial_rows(options)
    assert {row.choices for row in (*train, *validation)} == {("bad", "fair", "good")}


def test_of_a_task_only_training_and_validation_rows_are_asked_for(options, fake_cell, monkeypatch):
    asked = []

    def load_task(name, split, **_):
        asked.append((name, split))
        return load_rows(options.rows.data if split == "train" else options.rows.validation_data)

    monkeypatch.setattr("lowmem_reft.compare.sources.load_task", load_task)
    task = changed(options, task="boolq", data=None, validation_data=None, eval_data=None)
    answer = run_sweep(task, child_command=fake_cell)
    assert set(asked) == {("boolq", "train"), ("boolq", "validation")}
    comparison = cli._parse(shlex.split(answer["command"])[1:])
    assert (comparison.scored.tasks, comparison.rows.data) == ("boolq", None)


def test_the_built_in_task_is_searched_on_its_validation_rows(options, fake_cell):
    from lowmem_reft.data import embedded

    options = changed(options, model=None, data=None, validation_data=None, eval_data=None)
    command = run_sweep(options, child_command=fake_cell)["command"]
    _, validation = trial_rows(options)
    assert prompts(validation) == prompts(load_rows(embedded.validation_file()))
    comparison = cli._parse(shlex.split(command)[1:])
    assert comparison.rows.eval_data == str(embedded.task_files()[1])


# --- what is said


def test_the_table_names_the_best_and_what_mattered(options, fake_cell, capsys):
    options = changed(options, space="rank=2,4,8,16 lr=1e-3,2e-3,4e-3", quiet=False, prune="none")
    run_sweep(options, child_command=fake_cell)
    captured = capsys.readouterr()
    assert "[12/12] loreft[rank=16,lr=4e-3] seed 0: accuracy 82.0 %" in captured.err
    assert "importance: " in captured.err
    assert "lowmem-reft compare --methods 'loreft[rank=8,lr=4e-3]' --seeds 0,1,2" in captured.err
    [search] = searches_of(options)
    assert set(search["importance"]) == {"rank", "lr"}
    assert sum(search["importance"].values()) == pytest.approx(1)


def test_of_equal_values_the_lower_loss_wins_then_the_earlier_trial():
    values = [(0.5, 0.1), (0.7, 0.9), (0.7, 0.4), (0.7, 0.4), (0.9, 0.1)]
    trials = [
        Trial(number=n, state="complete", value=v, loss=loss) for n, (v, loss) in enumerate(values)
    ]
    trials[-1].state = "pruned"
    best = best_of(trials)
    assert best is not None
    assert best.number == 2
    assert best_of(trials[-1:]) is None


def test_an_epoch_without_a_score_decides_nothing():
    [space] = spaces("rank=1..64")
    search = Search(space, sampler="random", seed=0, prune=True, num_startup_trials=1)
    stopped = {}
    for number, scores in enumerate([(0.5, 0.5), (float("nan"), 0.6), (float("nan"), 0.1)]):
        trial = Trial(number=number)
        search.draw(number)
        stopped[number] = [search.report(trial, score) for score in scores]
        trial.state, trial.value = "complete", scores[1]
        search.end(trial)
    assert stopped == {0: [False] * 2, 1: [False] * 2, 2: [False, True]}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
def test_a_real_search_scores_the_best_epoch_on_the_validation_rows(
    options, tiny_llama_dir, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = changed(
        options,
        model=str(tiny_llama_dir),
        space="lr=1e-3,1e-2",
        methods="loreft[rank=2,positions=all]",
        limit=8,
        optim=OptimOptions(epochs=2, batch_size=4),
        device="cpu",
    )
    answer = run_sweep(options)
    assert (answer["num_complete"], answer["num_failed"]) == (2, 0)
    for trial in trials_of(options):
        assert len(trial["epochs"]) == 2
        assert trial["value"] == max(trial["epochs"])
        assert trial["num_examples"] == 4
    trials = trials_of(options)
    highest = max(trial["value"] for trial in trials)
    error = math.sqrt(highest * (1 - highest) / 4)
    level = [trial for trial in trials if trial["value"] >= highest - error]
    assert answer["best"][0]["loss"] == min(trial["loss"] for trial in level)
