"""``lowmem-reft report``: comparisons that have ended, as one page."""

from __future__ import annotations

import csv
import json

import pytest

from lowmem_reft import cli
from lowmem_reft.compare.report.joining import join
from lowmem_reft.errors import InputError


def comparison(directory, task, methods, *, seeds=(0, 1), num_examples=40, limit=None):
    """An output directory of compare; method i is wrong on the first 4 * i examples."""
    cells = []
    for place, method in enumerate(methods):
        for seed in seeds:
            name = f"cells/{task}-{method}-{seed}.jsonl"
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                {
                    "source": f"{directory}/data/{task}.jsonl:{i + 1}",
                    "prompt": f"secret {i}",
                    "prediction": int(i >= 4 * place),
                    "reference": 1,
                    "correct": i >= 4 * place,
                }
                for i in range(num_examples)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            known = {"method": method, "task": task, "seed": seed, "error": None}
            cells.append(
                known
                | {
                    "metric": "accuracy",
                    "value": 1 - 4 * place / num_examples,
                    "num_trainable_params": 100,
                    "predictions": name,
                    "versions": None,
                    "command": "run it",
                    "model": "tiny",
                    "config": {"eval_data": {"limit": limit}},
                }
            )
    (directory / "results.json").write_text(json.dumps(cells))
    return directory


def report(*arguments):
    return cli.main(["report", *map(str, arguments), "--quiet", "--json"])


def test_two_comparisons_become_one_with_significance_across_them(tmp_path, capsys):
    one = comparison(tmp_path / "one", "trec", ["qlora", "loreft"])
    two = comparison(tmp_path / "two", "cola", ["qlora", "loreft"])
    more = comparison(tmp_path / "more", "trec", ["direft"])
    assert report(one, two, more, "-o", tmp_path / "all") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_cells"] == 10
    rows = {(row["task"], row["method"]): row["value_mean"] for row in answer["rows"]}
    assert rows["trec", "loreft"] == pytest.approx(0.9)
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert all((tmp_path / "all" / cell["predictions"]).is_file() for cell in results)
    page = (tmp_path / "all" / "report.html").read_text()
    assert "(40 examples)" in page  # of trec, those of both directories
    assert "secret 3" in page
    with (tmp_path / "all" / "results.csv").open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["trec"] * 4 + ["cola"] * 4 + [
            "trec"
        ] * 2


def test_the_page_can_be_written_without_texts(tmp_path):
    one = comparison(tmp_path / "one", "trec", ["qlora", "loreft"])
    assert report(one, "--hide-texts", "--output-dir", tmp_path / "public") == 0
    assert "secret" not in (tmp_path / "public" / "report.html").read_text()


def test_a_file_of_results_without_its_cells_has_a_report_too(tmp_path):
    one = comparison(tmp_path / "one", "trec", ["qlora", "loreft"])
    kept = tmp_path / "kept.json"
    kept.write_text((one / "results.json").read_text())
    assert report(kept, "-o", tmp_path / "out") == 0
    assert "No significance" in (tmp_path / "out" / "report.html").read_text()


def test_of_a_run_that_is_there_twice_the_last_counts(tmp_path):
    first = comparison(tmp_path / "first", "trec", ["qlora"], seeds=(0,))
    second = comparison(tmp_path / "second", "trec", ["loreft", "qlora"], seeds=(0,))
    cells = join([first, second], relative_to=tmp_path)
    assert [(cell["method"], cell["value"]) for cell in cells] == [("qlora", 0.9), ("loreft", 1.0)]


def test_a_task_that_was_scored_on_different_rows_is_named(tmp_path, capsys):
    first = comparison(tmp_path / "first", "trec", ["qlora"])
    second = comparison(tmp_path / "second", "trec", ["loreft"], limit=10)
    other = comparison(tmp_path / "other", "cola", ["loreft"], limit=10)
    join([first, second, other], relative_to=tmp_path)
    said = capsys.readouterr().err
    assert "trec was scored on different rows" in said
    assert str(first) in said
    assert str(second) in said
    assert "cola" not in said


@pytest.mark.parametrize(
    "change",
    [{"metric": "loss"}, {"config": {"eval_data": {"limit": None}, "model": {"model": "m"}}}],
)
def test_a_task_that_was_scored_over_another_base_or_by_another_metric_is_named(
    tmp_path, capsys, change
):
    first = comparison(tmp_path / "first", "trec", ["qlora"])
    second = comparison(tmp_path / "second", "trec", ["loreft"])
    join([first, second], relative_to=tmp_path)
    assert not capsys.readouterr().err
    file = second / "results.json"
    file.write_text(json.dumps([{**cell, **change} for cell in json.loads(file.read_text())]))
    join([first, second], relative_to=tmp_path)
    assert "trec was scored on different rows" in capsys.readouterr().err
    both = tmp_path / "both.json"
    cells = [json.loads((each / "results.json").read_text()) for each in (first, second)]
    both.write_text(json.dumps([cell for of in cells for cell in of]))
    join([both], relative_to=tmp_path)
    assert f"metrics, in {both}; do not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"got '.*gone' \(gone: No such file"),
        ("[{", "results.json' .*line 1 column"),
        ("[]", "a list of cells with method, task, seed"),
        ('[{"method": "loreft"}]', "a list of cells with method, task, seed"),
        ("{}", "a list of cells with method, task, seed"),
    ],
)
def test_what_holds_no_results_is_refused(tmp_path, content, said):
    directory = tmp_path / "gone"
    if content is not None:
        directory.mkdir()
        (directory / "results.json").write_text(content)
    with pytest.raises(InputError, match=said):
        join([directory], relative_to=tmp_path)


def test_no_source_is_bad_input(tmp_path, capsys):
    assert report("-o", tmp_path / "out") == 2
    assert "sources must name a directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value", "0.5"),
        ("value", float("nan")),
        ("method", ["lora"]),
        ("seed", None),
        ("breakdown_bytes", 3),
        ("validation", [{"epoch": 1}]),
        ("validation", [{"epoch": None, "value": 0.5}]),
        ("validation", [{"epoch": 1, "value": 0.5, "train_time_s": "2"}]),
    ],
)
def test_a_cell_whose_values_are_no_values_is_refused_and_named(tmp_path, name, value):
    cells = [{"method": "lora", "task": "t", "seed": 0}, {"method": "b", "task": "t", "seed": 0}]
    cells[1][name] = value
    (tmp_path / "results.json").write_text(json.dumps(cells))
    with pytest.raises(InputError, match=f"cell 2: {name} must"):
        join([tmp_path], relative_to=tmp_path)
