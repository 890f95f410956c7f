"""Equal budgets: the same parameters, memory or time for every method of a comparison."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmem_reft as lr
from lowmem_reft import cli
from lowmem_reft.base.hub import load_config
from lowmem_reft.compare.budget import (
    NUM_TIMED_STEPS,
    Equalized,
    ParameterCounter,
    equalize,
    nearest_size,
    num_steps,
)
from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.child import run_cell
from lowmem_reft.compare.matrix import run_comparison
from lowmem_reft.compare.sources import find_sources
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import attach
from lowmem_reft.methods.entries import expand_methods, parse_methods, with_overrides
from lowmem_reft.methods.table import METHODS
from lowmem_reft.options import CompareOptions, MemoryOptions, MethodOptions, OptimOptions
from lowmem_reft.options.written import build, changed
from lowmem_reft.runs.fitting import changed_flags, fit_into_memory
from lowmem_reft.runs.resolve import resolve

ROWS = [
    {"prompt": f"is the {noun} good or bad? label:", "choices": ["good", "bad"], "answer": answer}
    for noun, answer in [("cat", 0), ("dog", 1), ("quick brown fox", 0), ("film", 1), ("time", 0)]
]


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> CompareOptions:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return build(
        CompareOptions,
        model=str(tiny_llama_dir),
        data=str(data),
        eval_data=str(data),
        output_dir=tmp_path / "out",
        compute_dtype="fp32",
        device="cpu",
        optim=OptimOptions(epochs=2.0, batch_size=3),
        quiet=True,
    )


def no_run(cells: Sequence[Cell]) -> list[Result]:
    raise AssertionError("nothing is timed")


def equalized(
    options: CompareOptions, methods: str, run: Callable[..., list[Result]] = no_run, **chosen: Any
) -> tuple[Equalized, list[Cell]]:
    """Return what is chosen for methods, and the cells that come of it."""
    specs = parse_methods(methods, with_equal=True)
    options = changed(options, methods=methods, **chosen)
    sources = find_sources(options)

    def cells_of(own: CompareOptions, some: Sequence[Any]) -> list[Cell]:
        return build_cells(own, some, [0], sources)

    equal = equalize(options, specs, cells_of=cells_of, run=run)
    return equal, [cell for cell in cells_of(equal.options, equal.specs) if cell.train]


@pytest.mark.parametrize("target", [1, 5, 99, 100, 101, 149, 151, 4000, 10**6])
@pytest.mark.parametrize(
    "count",
    [lambda n: 100 * n, lambda n: 7 + 3 * n, lambda n: n * n + 40 * n, lambda n: 2**n, lambda n: 9],
    ids=["linear", "affine", "quadratic", "exponential", "constant"],
)
def test_the_nearest_size_is_found(count: Callable[[int], int], target: int) -> None:
    found = nearest_size(count, target, most=64)
    assert abs(count(found) - target) == min(abs(count(n) - target) for n in range(1, 65))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.size])
def test_a_method_comes_as_near_to_the_references_parameters_as_its_size_allows(
    options: CompareOptions, tiny_llama_dir: Path, method: str
) -> None:
    equal, (cell,) = equalized(
        options, method, equal="params", budget_reference="loreft[rank=3,layers=1;2]"
    )
    target = 2 * (2 * 64 * 3 + 3)
    assert cell.train is not None
    base = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
    model = attach(
        base, cell.train.method, task_type="CAUSAL_LM", memory=MemoryOptions(), chunked_loss=True
    )
    count = model.get_nb_trainable_parameters()[0]
    assert equal.notes[equal.specs[0].label] == f"equal params: {count:,} of {target:,}"
    counter = ParameterCounter(load_config(tiny_llama_dir), "CAUSAL_LM")
    for size in range(1, counter.largest(equal.specs[0]) + 1, 7):
        other = counter(counter.resized(equal.specs[0], size).options)
        assert abs(count - target) <= abs(other - target)


def test_what_has_no_size_or_cannot_be_trained_keeps_its_own_and_says_so(
    options: CompareOptions,
) -> None:
    equal, cells = equalized(options, "qlora[lr=1e-3],ia3,bitfit,qlora[rank=2]", equal="params")
    assert [spec.label for spec in equal.specs][:3] == ["qlora[lr=1e-3]", "ia3", "bitfit"]
    assert equal.specs[3].options.rank == 16
    assert "nothing sets the size of ia3, which keeps its own" in equal.notes["ia3"]
    assert equal.notes["bitfit"].startswith("not equalized: method must not be bitfit")
    assert [cell.record["method"] for cell in cells] == [spec.label for spec in equal.specs]


def test_an_entry_alone_gets_the_references_parameters_beside_the_same_method_at_its_own(
    options: CompareOptions,
) -> None:
    methods = "qlora,qlora[equal=params,lr=1e-3],loreft[rank=40],ia3[equal=params]"
    equal, cells = equalized(options, methods, budget_reference="loreft[rank=40]")
    labels = [spec.label for spec in equal.specs]
    rank = equal.specs[1].options.rank
    assert labels == ["qlora", f"qlora[lr=0.001,rank={rank}]", "loreft[rank=40]", "ia3"]
    assert list(equal.notes) == [labels[1], "ia3"]
    assert all(spec.equal is None for spec in equal.specs)
    # Two ranks times a low-rank map and a bias for every block; LoRA on the shapes of each layer.
    base = lr.load_base(options.base.model, storage="fp32", device="cpu")
    linear = [m for m in base.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    per_rank = sum(sum(module.weight.shape) for module in linear)
    target = len(base.model.layers) * (2 * 64 * 40 + 40)
    assert rank is not None
    assert rank > 1
    assert rank == min(range(1, 64), key=lambda size: abs(size * per_rank - target))
    assert equal.notes[labels[1]] == f"equal params: {rank * per_rank:,} of {target:,}"
    assert [cell.record["method"] for cell in cells] == labels


def test_the_reference_of_such_an_entry_is_the_first_other_one(options: CompareOptions) -> None:
    equal, _ = equalized(options, "prefix[equal=params],loreft[rank=8],qlora")
    assert [spec.label for spec in equal.specs] == [
        "prefix[num_virtual_tokens=16]",
        "loreft[rank=8]",
        "qlora",
    ]


@pytest.mark.parametrize(
    ("methods", "chosen", "message"),
    [
        ("loreft[equal=params]", {}, "budget_reference must be given where every entry has equal"),
        ("loreft,qlora[equal=params]", {"equal": "time"}, "methods must have no equal of their ow"),
        (
            "loreft[rank=8],loreft[equal=params,rank=2]",
            {},
            r"methods must be different, got 'loreft\[equal=params,rank=2\]', which at the size of "
            r"'loreft\[rank=8\]' is 'loreft\[rank=8\]', and that one too; drop one",
        ),
        ("ia3,ia3[equal=params]", {}, "methods must be different"),
        ("loreft,qlora[equal=memory]", {}, "overrides of .* must be among .*equal=params.* got"),
        (
            "qlora[equal=params]",
            {"budget_reference": "loreft[equal=params]"},
            "budget_reference: overrides of",
        ),
    ],
)
def test_a_budget_of_one_entry_that_contradicts_another_is_refused(
    options: CompareOptions, methods: str, chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        equalized(options, methods, **chosen)


def test_only_a_comparison_knows_a_reference() -> None:
    with pytest.raises(InputError, match=r"overrides of .* must be among"):
        parse_methods("qlora[equal=params]")


def test_the_tiny_model_suits_an_entry_with_a_budget_of_its_own_too() -> None:
    given = "qlora,qlora[equal=params],qlora[equal=params,lr=1]"
    suited = "qlora[rank=8,lr=2e-3],qlora[rank=8,lr=2e-3,equal=params],qlora[equal=params,lr=1]"
    assert expand_methods(given, embedded=True) == suited


@pytest.mark.filterwarnings("ignore:the trained weights are torch.bfloat16")
def test_ranks_from_1_to_64_full_training_and_others_are_entries_beside_each_other(
    options: CompareOptions,
) -> None:
    loras = "lora[rank=1],lora[rank=8],lora[rank=64,storage=nf4],qdora[rank=2]"
    methods = f"{loras},full[lr=1e-3],full[storage=bf16],ia3,prefix[num_virtual_tokens=3]"
    small = changed(options, optim=OptimOptions(max_steps=1, batch_size=2), limit=2, eval_limit=2)
    _, cells = equalized(small, methods)
    counts = {}
    for cell in cells:
        assert cell.train is not None
        assert cell.evaluate.model.storage == cell.record["storage"]
        result = run_cell(cell)
        assert (result["error"], result["num_steps"], result["num_examples"]) == (None, 1, 2)
        counts[result["method"]] = result["num_trainable_params"]
    assert counts["lora[rank=8]"] == 8 * counts["lora[rank=1]"]
    assert counts["lora[rank=64,storage=nf4]"] == 64 * counts["lora[rank=1]"]
    base = lr.load_base(options.base.model, storage="fp32", device="cpu")
    every = sum(parameter.numel() for parameter in base.parameters())
    assert counts["full[lr=1e-3]"] == counts["full[storage=bf16]"] == every


def test_what_is_chosen_is_in_the_configuration_and_in_the_command_of_the_row(
    options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, cell) = equalized(options, "loreft[rank=8],prefix[lr=0.1]", equal="params")
    assert cell.record["config"]["method"]["num_virtual_tokens"] == 16
    words = shlex.split(cell.record["command"])
    assert "--equal" not in words
    seen: list[CompareOptions] = []
    monkeypatch.setattr(cli, "_handler", lambda _: lambda given: seen.append(given) or {})
    cli.main([*words[1:], "--output-dir", str(options.output_dir)])
    (again,) = build_cells(
        seen[0], parse_methods(seen[0].matrix.methods or ""), [0], find_sources(seen[0])
    )[1:]
    assert again.record["config"] == cell.record["config"]
    assert again.record["key"] == cell.record["key"]


def test_no_method_needs_more_memory_than_the_reference(options: CompareOptions) -> None:
    options = changed(options, optim=changed(options.optim, batch_size=4, epochs=0.5))
    equal, cells = equalized(options, "prompt,p_tuning", equal="memory")
    budget = equal.options.memory.memory_gib
    assert budget is not None
    assert [spec.label for spec in equal.specs] == ["prompt", "p_tuning"]
    assert equal.notes["p_tuning"] == f"equal memory: at most {budget:g} GiB, which prompt needs"
    assert all(cell.record["config"]["memory"]["memory_gib"] == budget for cell in cells)
    assert f"--memory-gib {budget}" in cells[1].record["command"]
    alone, _ = equalized(options, "p_tuning", equal="memory")
    assert alone.options.memory.memory_gib is not None
    assert alone.options.memory.memory_gib > budget
    for cell in cells:
        assert 0.5 * budget * 2**30 < run_cell(cell)["peak_bytes"] <= budget * 2**30


def test_a_dry_run_fits_every_method_into_the_memory_of_the_reference(
    options: CompareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = changed(options.optim, batch_size=4, epochs=0.5)
    options = changed(
        options, methods="prompt,p_tuning", equal="memory", optim=optim, dry_run=True, quiet=False
    )
    prompt, p_tuning = run_comparison(options)["methods"]
    said = capsys.readouterr()
    _, (_, cell) = equalized(changed(options, quiet=True), "prompt,p_tuning", equal="memory")
    assert cell.train is not None
    fitted = fit_into_memory(resolve(cell.train)).options
    budget = fitted.memory.memory_gib
    assert budget is not None
    assert prompt["fitted"] == ""
    assert p_tuning["fitted"] == changed_flags(cell.train, fitted)
    assert p_tuning["fitted"] in said.out
    assert "checkpointing" in p_tuning["fitted"]
    assert p_tuning["batch_size"] == fitted.optim.batch_size
    assert max(prompt["peak_bytes"], p_tuning["peak_bytes"]) <= budget * 2**30
    assert "to fit into" not in said.err


def test_a_dry_run_tells_of_a_method_that_nothing_fits_into_its_memory(
    options: CompareOptions,
) -> None:
    options = changed(options, methods="loreft", memory_gib=0.0001, dry_run=True)
    (found,) = run_comparison(options)["methods"]
    assert "memory_gib must be at least" in found["error"]
    assert found["peak_bytes"] is None


def run_with(step_times: dict[str, Any], seen: list[Cell]) -> Callable[..., list[Result]]:
    """Return a stand-in for running cells: a step time, or an error, by method."""

    def run(cells: Sequence[Cell]) -> list[Result]:
        seen.extend(cells)
        found = [step_times[cell.train.method.method] for cell in cells if cell.train]
        return [
            {"error": value, "step_time_s": None}
            if isinstance(value, str)
            else {"error": None, "step_time_s": value}
            for value in found
        ]

    return run


def test_steps_are_those_of_the_references_time(options: CompareOptions) -> None:
    seen: list[Cell] = []
    times = {"loreft": 0.1, "qlora": 0.4, "lora": 0.05, "red": "InputError: no"}
    methods = "loreft[rank=2],loreft[epochs=4],qlora[epochs=9,lr=0.001],lora[max_steps=3],red"
    equal, cells = equalized(
        options, methods, run_with(times, seen), equal="time", budget_reference="loreft[epochs=4]"
    )
    # 20 rows in batches of 3 are 7 steps, 4 epochs take 28 of 0.1 s.
    assert [spec.label for spec in equal.specs] == [
        "loreft[rank=2,max_steps=28]",
        "loreft[epochs=4]",
        "qlora[lr=0.001,max_steps=7]",
        "lora[max_steps=56]",
        "red",
    ]
    assert equal.notes["red"] == "not equalized: InputError: no"
    assert equal.notes["lora[max_steps=56]"].startswith(
        "equal time: 56 steps of 0.05 s for the 2.8"
    )
    assert [cell.train.optim.max_steps for cell in cells if cell.train] == [28, -1, 7, 56, -1]
    for cell in seen:
        assert cell.train is not None
        assert cell.train.optim.max_steps == NUM_TIMED_STEPS
        assert cell.train.held_out.validation_data is None
        assert cell.evaluate.data.limit == 1
        assert options.output_dir / "timing" in cell.directory.parents


def test_a_reference_that_does_not_train_is_refused(options: CompareOptions) -> None:
    run = run_with({"full": "InputError: integers", "qlora": 1.0}, [])
    with pytest.raises(InputError, match=r"budget_reference must .* got 'full': InputError: int"):
        equalized(options, "qlora", run, equal="time", budget_reference="full")
    with pytest.raises(InputError, match="method must not be bitfit"):
        equalized(options, "qlora", equal="params", budget_reference="bitfit")


def test_steps_are_counted_as_the_trainer_counts_them(options: CompareOptions) -> None:
    optim = OptimOptions(epochs=1.5, batch_size=3, gradient_accumulation=2)
    cells = build_cells(
        changed(options, optim=optim), parse_methods("loreft"), [0], find_sources(options)
    )
    train = cells[-1].train
    assert train is not None
    assert num_steps(train) == 6  # 7 forward passes are 4 steps an epoch
    assert run_cell(cells[-1])["num_steps"] == 6
    assert num_steps(replace(train, optim=replace(optim, max_steps=5))) == 5


def test_steps_are_those_of_the_rows_that_are_trained_on(options: CompareOptions) -> None:
    own = changed(options, max_length=12, long_rows="drop", optim=OptimOptions(batch_size=1))
    Path(str(own.rows.data)).write_text(
        "".join(json.dumps({"prompt": "a" * n, "response": "b"}) + "\n" for n in (2, 3, 90, 90))
    )
    train = build_cells(own, parse_methods("loreft"), [0], find_sources(own))[-1].train
    assert train is not None
    with pytest.warns(UserWarning, match="2 of 4 rows were left out"):
        assert num_steps(train) == 20  # ten epochs of two rows


def test_further_overrides_are_added_to_an_entry_or_replace_those_in_it() -> None:
    (spec,) = parse_methods("loreft[rank=4,positions=f7+l7,lr=1e-3,storage=bf16]")
    changed = with_overrides(spec, {"rank": 2, "max_steps": 7})
    assert changed.label == "loreft[rank=2,positions=f7+l7,lr=0.001,max_steps=7,storage=bf16]"
    assert changed.options == MethodOptions(method="loreft", rank=2, positions="f7+l7")
    assert (changed.storage, changed.optim_overrides) == ("bf16", {"lr": 1e-3, "max_steps": 7})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_reference": "qlora"}, "budget_reference must come with equal"),
        ({"equal": "params", "budget_reference": "qlorra"}, "method must be one of"),
        (
            {"equal": "memory", "memory": MemoryOptions(memory_gib=1.0)},
            "memory_gib must be left out with equal=memory, got 1.0",
        ),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(
    options: CompareOptions, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_comparison(changed(options, methods="loreft,qlora", **changes))
