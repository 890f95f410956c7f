"""Comparisons over named tasks: splits, metrics, the best epoch, one training for several tasks."""

import json
from pathlib import Path

import pytest

from lowmem_reft.compare.cell import read_cell, write_cell
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.child import run_cell
from lowmem_reft.compare.matrix import run_comparison
from lowmem_reft.compare.sources import find_all_sources
from lowmem_reft.data.tasks.metrics import compute
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import CompareOptions, OptimOptions
from lowmem_reft.options.written import build, changed

LABELS = ("LOC:city", "NUM:count", "HUM:ind")


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> CompareOptions:
    data = tmp_path / "public"
    for name, count in (("trec/TREC.train", 24), ("trec/TREC.test", 6)):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{LABELS[n % 3]} where is the {name[-4:]} fox {n} ?\n" for n in range(count)]
        (data / name).write_text("".join(lines))
    for task, answers in (("boolq", ("true", "false")), ("openbookqa", ("answer1", "answer2"))):
        (data / task).mkdir()
        shown = "/".join(
            ("answer1", "answer2", "answer3", "answer4") if task[0] == "o" else answers
        )
        for split, count in (("train", 20), ("test", 4)):
            rows = [
                {
                    "instruction": f"Please answer: is it {split} {n}?\n\nAnswer format: {shown}",
                    "input": "",
                    "output": f"the correct answer is {answers[n % 2]}",
                    "answer": answers[n % 2],
                }
                for n in range(count)
            ]
            (data / task / f"{split}.json").write_text(json.dumps(rows))
    return build(
        CompareOptions,
        model=str(tiny_llama_dir),
        tasks="trec",
        data_dir=data,
        methods="loreft[rank=2,lr=1e-2]",
        device="cpu",
        compute_dtype="fp32",
        optim=OptimOptions(epochs=2, batch_size=8),
        output_dir=tmp_path / "out",
        quiet=True,
    )


def cells_of(options: CompareOptions) -> list:
    specs = parse_methods(options.matrix.methods or "")
    return [
        cell
        for sources in find_all_sources(options)
        for cell in build_cells(options, specs, [0], sources)
    ]


def test_a_task_is_trained_validated_and_scored_on_rows_of_its_own(
    options: CompareOptions,
) -> None:
    result = run_comparison(options)
    assert result["num_failed"] == 0
    base, tuned = json.loads(Path(result["results"]).read_text())
    assert (base["task"], base["metric"], base["num_examples"]) == ("trec", "accuracy", 6)
    assert tuned["best_epoch"] in (1, 2)
    best = max(tuned["validation"], key=lambda epoch: (epoch["value"], -epoch["loss"]))
    assert (best["epoch"], best["value"]) == (tuned["best_epoch"], tuned["validation_value"])
    lines = (options.output_dir / tuned["predictions"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    predictions, references = ([row[name] for row in rows] for name in ("prediction", "reference"))
    assert tuned["value"] == compute("accuracy", predictions, references)
    assert all("TEST" in row["prompt"] or "test" in row["prompt"] for row in rows)
    assert sum(tuned["breakdown_bytes"].values()) == tuned["peak_bytes"]
    assert "--tasks trec" in tuned["command"]


def test_splits_share_no_row(options: CompareOptions) -> None:
    (sources,) = find_all_sources(options)
    texts = [
        {json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()}
        for path in (sources.train, sources.validation, sources.evaluate)
    ]
    assert [len(text) for text in texts] == [22, 2, 6]
    assert len(set.union(*texts)) == 30


def test_a_limit_draws_the_same_rows_every_time(options: CompareOptions) -> None:
    limited = changed(options, limit=5)
    (first,), (second,) = find_all_sources(limited), find_all_sources(limited)
    assert first.train_digest == second.train_digest
    rows = [json.loads(line)["prompt"] for line in Path(first.train).read_text().splitlines()]
    assert len(rows) == 5
    (whole,) = find_all_sources(options)
    order = [json.loads(line)["prompt"] for line in Path(whole.train).read_text().splitlines()]
    assert rows != order[:5]


@pytest.mark.parametrize("limit", ["limit", "validation_limit", "eval_limit"])
def test_a_limit_takes_every_class_of_a_sorted_file(options: CompareOptions, limit: str) -> None:
    assert options.rows.data_dir is not None
    for name, count in (("TREC.train", 600), ("TREC.test", 60)):
        lines = [f"{LABELS[3 * n // count]} where is {name} fox {n} ?\n" for n in range(count)]
        (options.rows.data_dir / "trec" / name).write_text("".join(lines))
    (sources,) = find_all_sources(changed(options, **{limit: 15}))
    part = {"limit": "train", "validation_limit": "validation", "eval_limit": "evaluate"}[limit]
    path = Path(getattr(sources, part))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 15
    assert len({row["answer"] for row in rows}) == 3


def test_what_is_trained_on_long_answers_may_write_long_ones(
    options: CompareOptions, tmp_path: Path
) -> None:
    rows = [
        {"original_text": f"what is {n} and 2 ?", "equation": f"x={n}+2", "ans": n + 2.0}
        for n in range(40)
    ]
    for name, part in (("train", rows[:20]), ("valid", rows[20:30]), ("test", rows[30:])):
        path = tmp_path / f"public/mawps/{name}set.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(part))
    mix = [
        {"instruction": f"{n} and 9?", "output": f"It is {n + 9}.", "answer": f"{n + 9}.0"}
        for n in range(40)
    ]
    (tmp_path / "public/math_10k.json").write_text(json.dumps(mix))
    own, other = (
        find_all_sources(changed(options, tasks="mawps", train_task=train))[0].scoring
        for train in ("mawps", "math10k")
    )
    assert (own.extractor, own.max_new_tokens, other.max_new_tokens) == ("number", 96, 512)


def test_one_training_serves_all_tasks(options: CompareOptions) -> None:
    shared = changed(options, tasks="boolq,openbookqa", train_task="boolq")
    _, first, _, second = cells_of(shared)
    assert first.train == second.train
    results = [run_cell(cell) for cell in (first, second)]
    assert [result["task"] for result in results] == ["boolq", "openbookqa"]
    assert results[0]["train_time_s"] == results[1]["train_time_s"]
    assert results[0]["loss_history"] == results[1]["loss_history"]
    # Another seed or rate is another training.
    other = cells_of(changed(shared, optim=changed(shared.optim, epochs=1)))[1]
    assert run_cell(other)["train_time_s"] != results[0]["train_time_s"]


def test_a_cell_of_a_task_survives_its_file(options: CompareOptions) -> None:
    cell = cells_of(options)[1]
    assert read_cell(write_cell(cell)) == cell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "trek"}, "task must be one of"),
        ({"tasks": "trec,trec"}, "tasks must be different"),
        ({"train_task": "trec", "tasks": None}, "train_task must come with tasks"),
        ({"data": "rows.jsonl"}, "tasks must be given without data"),
        ({"validation_data": "rows.jsonl", "tasks": None}, "validation_data must come with data"),
        ({"tasks": "svamp"}, "data_dir must hold the files of svamp"),
    ],
)
def test_wrong_tasks_are_refused(options: CompareOptions, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_all_sources(changed(options, **change))
