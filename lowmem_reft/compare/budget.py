"""``compare --equal``: every method gets what one of them, the reference, gets.

An entry with ``equal=params`` in its brackets gets it alone, beside others at their own sizes.

- params: as many trained parameters, as nearly as the option goes that sets a method's size (rank,
  virtual tokens, or the number of upper layers). A method without such an option keeps its own.
- memory: no more predicted memory than the reference needs as it is given. The batch is split into
  forward passes, and memory saved, as ``train --memory-gib`` does it: examples per step stay.
- time: as many optimizer steps as take as long as the reference's, by each method's median step in
  a short run of its own. The learning rate then falls over those steps.

What is chosen becomes part of a row's entry or of its ``--memory-gib``, so that the row's command
runs it again without ``--equal``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem_reft.base.hub import load_config
from lowmem_reft.base.synthetic import base_on_meta
from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.errors import InputError, naming
from lowmem_reft.methods.attach import attach
from lowmem_reft.methods.entries import MethodSpec, parse_methods, with_overrides
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import (
    CompareOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    TrainOptions,
    written,
)
from lowmem_reft.runs.fitting import required_gib
from lowmem_reft.runs.resolve import resolve

NUM_TIMED_STEPS = 12
"""Of which the first are left out, as in every run (``fit.NUM_WARMUP_STEPS``)."""


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """A comparison whose methods have equal budgets."""

    options: CompareOptions
    """Without ``equal``, and with what all methods share."""
    specs: list[MethodSpec]
    """The methods with what was chosen for each."""
    notes: dict[str, str] = field(default_factory=dict)
    """By the label of a method: what its budget is, and how near it comes."""


CellsOf = Callable[[CompareOptions, Sequence[MethodSpec]], list[Cell]]
"""Makes the cells of methods, one each, on the task at hand."""

RunCells = Callable[[Sequence[Cell]], list[Result]]
"""Runs cells, one after the other, and returns their results."""


def equalize(
    options: CompareOptions, specs: Sequence[MethodSpec], *, cells_of: CellsOf, run: RunCells
) -> Equalized:
    """Give every method the budget of the reference.

    What a method would be trained with is known from its cell; to be timed, cells are run.

    Raises:
        InputError: The reference cannot be trained, or something that is chosen here is given.
    """
    kind = options.matrix.equal
    reference = _reference(options, specs)
    plain = written.changed(options, equal=None, budget_reference=None)
    if kind in ("params", None):
        return _equal_params(plain, specs, reference, cells_of, all_methods=kind is not None)
    if kind == "memory":
        return _equal_memory(plain, specs, reference, cells_of)
    return _equal_time(plain, specs, reference, cells_of, run)


def _reference(options: CompareOptions, specs: Sequence[MethodSpec]) -> MethodSpec:
    """The method that sets the budget; the first one with a size of its own if none is named."""
    of_its_own = [spec for spec in specs if spec.equal is None]
    if options.matrix.equal is not None and len(of_its_own) < len(specs):
        raise InputError(
            f"methods must have no equal of their own with equal={options.matrix.equal}, got "
            f"{options.matrix.methods!r}; leave out one of the two"
        )
    if options.matrix.budget_reference is not None:
        with naming("budget_reference"):
            return parse_methods(options.matrix.budget_reference)[0]
    if not of_its_own:
        raise InputError(
            f"budget_reference must be given where every entry has equal, got "
            f"{options.matrix.methods!r}; for example --budget-reference loreft"
        )
    return of_its_own[0]


def _train_options(options: CompareOptions, spec: MethodSpec, cells_of: CellsOf) -> TrainOptions:
    train = next(cell.train for cell in cells_of(options, [spec]) if cell.train is not None)
    return train


# Parameters.


class ParameterCounter:
    """Counts what methods train on one base, of which only the configuration is needed."""

    def __init__(self, config: Any, task_type: str) -> None:
        self.config, self.task_type = config, task_type
        text = config.get_text_config()
        self.num_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size

    def __call__(self, options: MethodOptions) -> int:
        """Return the number of trained parameters.

        Raises:
            InputError: The method cannot be trained on this base.
        """
        base = base_on_meta(copy.deepcopy(self.config), storage="fp32", task_type=self.task_type)
        model = attach(
            base, options, task_type=self.task_type, memory=MemoryOptions(), chunked_loss=False
        )
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def resized(self, spec: MethodSpec, size: int) -> MethodSpec:
        """Return a method whose size is ``size``: a rank, tokens, or layers from the top."""
        option = find_method(spec.name).size
        assert option is not None
        value: Any = size
        if option == "layers":
            first = self.num_layers - size
            value = ";".join(map(str, range(first, self.num_layers))) if first else "all"
        return with_overrides(spec, {option: value})

    def largest(self, spec: MethodSpec) -> int:
        """Return the largest size that is tried: all layers, or as many as the base is wide."""
        is_layers = find_method(spec.name).size == "layers"
        return int(self.num_layers if is_layers else self.hidden_size)


def nearest_size(count: Callable[[int], int], target: int, *, most: int) -> int:
    """Return the size from 1 to ``most`` whose count, which grows with it, is nearest to target."""
    known: dict[int, int] = {}

    def of(size: int) -> int:
        if size not in known:
            known[size] = count(size)
        return known[size]

    low, high = 1, most
    while high - low > 1 and of(low) < target < of(high):
        # Counts are almost always linear in the size: then this is it, or beside it.
        share = (target - of(low)) / (of(high) - of(low))
        middle = min(high - 1, max(low + 1, low + round(share * (high - low))))
        low, high = (middle, high) if of(middle) <= target else (low, middle)
    return min((low, high), key=lambda size: (abs(of(size) - target), size))


def _equal_params(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    reference: MethodSpec,
    cells_of: CellsOf,
    *,
    all_methods: bool,
) -> Equalized:
    """Equalize all methods, or those whose entries ask for it."""
    model = _train_options(options, reference, cells_of).model.model
    counter = ParameterCounter(load_config(model), options.base.task_type)
    target = counter(reference.options)
    chosen, notes = [], {}
    for spec in specs:
        if not all_methods and spec.equal is None:
            chosen.append(spec)
            continue
        entry, spec = spec.label, with_overrides(spec, {}) if spec.equal else spec
        spec, note = _of_equal_size(spec, reference, target, counter)
        if not all_methods and any(spec.label == other.label for other in (*chosen, *specs)):
            raise InputError(
                f"methods must be different, got {entry!r}, which at the size of "
                f"{reference.label!r} is {spec.label!r}, and that one too; drop one of the two"
            )
        chosen.append(spec)
        notes[spec.label] = note
    return Equalized(options=options, specs=chosen, notes=notes)


def _of_equal_size(
    spec: MethodSpec, reference: MethodSpec, target: int, counter: ParameterCounter
) -> tuple[MethodSpec, str]:
    """Return the method at the size nearest to the target, and what to say of it."""
    size_option = find_method(spec.name).size
    try:
        if size_option is None or spec.label == reference.label:
            found, count = spec, counter(spec.options)
        else:
            size = nearest_size(
                lambda size: counter(counter.resized(spec, size).options),
                target,
                most=counter.largest(spec),
            )
            found, own = counter.resized(spec, size), counter(spec.options)
            count = counter(found.options)
            if own == count:  # an entry that says nothing new stays as it is written
                found = spec
    except InputError as error:  # its row will say so too
        return spec, f"not equalized: {error}"
    note = f"equal params: {count:,} of {target:,}"
    if size_option is None and count != target:
        note += f"; nothing sets the size of {spec.name}, which keeps its own"
    return found, note


# Memory.


def _equal_memory(
    options: CompareOptions, specs: Sequence[MethodSpec], reference: MethodSpec, cells_of: CellsOf
) -> Equalized:
    if options.memory.memory_gib is not None:
        raise InputError(
            f"memory_gib must be left out with equal=memory, got {options.memory.memory_gib!r}: "
            "the reference sets it; leave out one of the two"
        )
    train = _train_options(options, reference, cells_of)
    budget = required_gib(resolve(train))
    note = f"equal memory: at most {budget:g} GiB, which {reference.label} needs"
    return Equalized(
        options=written.changed(options, memory_gib=budget),
        specs=list(specs),
        notes={spec.label: note for spec in specs},
    )


# Time.


def _equal_time(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    reference: MethodSpec,
    cells_of: CellsOf,
    run: RunCells,
) -> Equalized:
    train = _train_options(options, reference, cells_of)
    times = _step_times(options, [reference, *specs], cells_of, run)
    step_time = times[reference.label]
    if isinstance(step_time, str):
        raise InputError(
            f"budget_reference must be a method that trains here, got {reference.label!r}: "
            f"{step_time}; choose another"
        )
    budget = num_steps(train) * step_time
    chosen, notes = [], {}
    for spec in specs:
        found = times[spec.label]
        if isinstance(found, str):
            chosen.append(spec)
            notes[spec.label] = f"not equalized: {found}"
            continue
        steps = max(1, round(budget / found))
        if spec.label != reference.label:
            spec = with_overrides(_without_length(spec), {"max_steps": steps})
        chosen.append(spec)
        notes[spec.label] = (
            f"equal time: {steps:,} steps of {found:.3g} s for the {budget:.3g} s that "
            f"{reference.label} takes"
        )
    return Equalized(options=options, specs=chosen, notes=notes)


def _without_length(spec: MethodSpec) -> MethodSpec:
    kept = {k: v for k, v in spec.optim_overrides.items() if k not in ("epochs", "max_steps")}
    return replace(spec, optim_overrides=kept)


def _step_times(
    options: CompareOptions, specs: Sequence[MethodSpec], cells_of: CellsOf, run: RunCells
) -> dict[str, float | str]:
    """Return each method's median seconds per step, or why it has none, from short runs."""
    short = written.changed(
        options,
        output_dir=options.output_dir / "timing",
        **{"eval_limit": 1, "validation_limit": 1, "forgetting": None},
    )
    cells: dict[str, Cell] = {}
    for spec in specs:
        timed = with_overrides(_without_length(spec), {"max_steps": NUM_TIMED_STEPS})
        cell = next(cell for cell in cells_of(short, [timed]) if cell.train is not None)
        assert cell.train is not None
        # Nothing is chosen here, so nothing is validated.
        train = replace(cell.train, held_out=HeldOutOptions())
        cells[spec.label] = replace(cell, train=train)
    distinct = {cell.directory: cell for cell in cells.values()}
    results = dict(zip(distinct, run(list(distinct.values())), strict=True))
    return {
        label: results[cell.directory]["error"] or results[cell.directory]["step_time_s"]
        for label, cell in cells.items()
    }


def num_steps(options: TrainOptions) -> int:
    """Return the optimizer steps of a run: of its rows as they are trained on."""
    return resolve(options).num_steps
