"""How long a training run will take, said before it begins: operators counted and timed.

The step is counted on the meta device at two sizes of its batches, the kinds of its operators are
timed on the device (`memory.operators`), and what lies between and beyond is a straight line.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lowmem_reft.base.blocks import base_of, find_blocks
from lowmem_reft.base.stored import in_one_line
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.packing import packed_rows
from lowmem_reft.data.rows import as_choices
from lowmem_reft.data.tokens import encode_all_choices, encode_labelled, encode_rows
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import free_cached, resolve_device, seed_kept
from lowmem_reft.machine.terminal import harmless
from lowmem_reft.memory.operators import Call, Stopwatch, count_operators, overhead_s
from lowmem_reft.memory.predict import Lengths
from lowmem_reft.methods.constant import num_constant_blocks
from lowmem_reft.methods.likelihood import by_length
from lowmem_reft.options.values import QUANTIZED
from lowmem_reft.reuse.disk import ReuseError
from lowmem_reft.reuse.prepare import check_worthwhile
from lowmem_reft.reuse.split import find_constant
from lowmem_reft.runs.fitting import planned
from lowmem_reft.runs.lengths import LikeLengths
from lowmem_reft.runs.score import way_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.row import Row
    from lowmem_reft.memory.planner import Planner
    from lowmem_reft.memory.predict import Setting
    from lowmem_reft.runs.checkpoints import Checkpoint
    from lowmem_reft.runs.resolve import Run
    from lowmem_reft.runs.score import ScoringSettings

CALLS_OF_A_STEP = 900
"""What the Trainer does around an optimizer step (batches, schedule, callbacks, the norm of the
gradients), in calls of operators: an estimate, whose error is in ``docs/how-it-works.md``."""
CALLS_OF_A_PASS = 250
"""The same around each forward and backward pass of a step."""
CALLS_OF_A_PART = 40
"""The same to let each packed example attend within itself, in each block."""
OF_A_MODEL = 2.0
"""How many times more Python takes between operators in an adapted model, with the adapter's hooks
and its quantized layers, than in the small plain one that is measured: an estimate too."""

SAID_FROM = 1.5
"""The slowdown from which on it is said: it is that of a second, and may be another a minute on."""

_SAMPLED = 64
"""Validation rows that are tokenized to know how long they are."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a run will take."""

    num_steps: int = 0
    """Optimizer steps that are left."""
    step_s: float | None = None
    """Seconds of one of them, on average; None: not predicted."""
    build_s: float = 0.0
    """To compute and prove what is reused."""
    num_validations: int = 0
    """How often validation rows are scored."""
    validation_s: float | None = 0.0
    """Seconds of each time; None: not predicted."""
    held_out_s: float | None = 0.0
    """To score ``eval_data`` at the end; None: not predicted."""
    slowdown: float = 1.0
    """How many times longer the timing took than if no other program had computed: all the above
    are taken to last so much longer too."""
    why: str = ""
    """Why it is not predicted."""

    @property
    def predicted_s(self) -> float | None:
        """Return the seconds from the first step, or the store, to the end; None: not predicted."""
        if self.step_s is None:
            return None
        scoring = self.num_validations * (self.validation_s or 0.0) + (self.held_out_s or 0.0)
        return self.num_steps * self.step_s + self.build_s + scoring

    def __str__(self) -> str:
        """Say it in words."""
        total = self.predicted_s
        if total is None or self.step_s is None:
            return f"not predicted ({self.why})"
        parts = [f"{self.num_steps:,} steps of {in_words(self.step_s)}"]
        if self.build_s:
            parts.append(f"{in_words(self.build_s)} for what is reused")
        left_out = []
        if self.num_validations and self.validation_s is None:
            left_out.append("validation")
        elif self.num_validations:
            parts.append(
                f"validation {self.num_validations:,} x {in_words(self.validation_s or 0)}"
            )
        if self.held_out_s is None:
            left_out.append("eval_data")
        elif self.held_out_s:
            parts.append(f"eval_data {in_words(self.held_out_s)}")
        without = ""
        if left_out:
            without = f"; without {' and '.join(left_out)}, for which answers are generated"
        shared = ""
        if self.slowdown >= SAID_FROM:
            shared = f", {self.slowdown:.1f} times as slow as alone, as other programs compute too"
        return (
            f"about {in_words(total)} ({', '.join(parts)}); by operators timed on this "
            f"device{shared}{without}"
        )


def in_words(seconds: float) -> str:
    """Return a time in two digits or so, in the unit that people would choose."""
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 9.95 * 60:
        return f"{seconds / 60:.1f} min"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class _Batch(NamedTuple):
    """What goes through the model at once."""

    num_rows: int
    seq_len: int
    """Tokens of a row; of packed examples, their share of the tokens that are computed."""
    num_supervised: int
    """Supervised tokens of a row."""
    is_padded: bool

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.seq_len

    @property
    def lengths(self) -> Lengths:
        return Lengths(
            seq_len=self.seq_len,
            response_len=max(1, min(self.num_supervised, self.seq_len - 1)),
            batch_size=self.num_rows,
            padded=self.is_padded,
        )


class _Line(NamedTuple):
    """Seconds by tokens: a + b * tokens."""

    at_none: float
    per_token: float

    def at(self, num_tokens: float) -> float:
        return self.at_none + self.per_token * num_tokens

    @classmethod
    def through(cls, points: dict[int, float]) -> _Line:
        """Put a line through one or two points; neither part is negative."""
        (fewest, least), (most, longest) = min(points.items()), max(points.items())
        if most == fewest:
            return cls(0.0, longest / most)
        slope = min(max(0.0, (longest - least) / (most - fewest)), longest / most)
        return cls(longest - slope * most, slope)


class _Times(NamedTuple):
    """Of a step."""

    passes: _Line
    """A forward and a backward pass."""
    forward: _Line
    """The forward pass alone."""
    optimizer_s: float
    """What comes once a step."""


def predict_duration(
    run: Run,
    validation: Sequence[Row],
    held_out: Sequence[Row],
    scoring: ScoringSettings,
    *,
    begun: Checkpoint | None = None,
) -> Duration:
    """Predict how long a run takes on its device, which computes for about a second meanwhile.

    Random numbers stay as they were: a new head, which the base is loaded with, is drawn later.

    Args:
        run: The run.
        validation: Rows that are scored meanwhile.
        held_out: Rows that are scored after it.
        scoring: How.
        begun: The checkpoint that it goes on from; None begins.
    """
    if processes.num_processes() > 1:
        return Duration(why="for several processes it is not")
    device = resolve_device(run.options.model.device)
    try:
        with seed_kept(device):
            return _predicted(run, device, validation, held_out, scoring, begun)
    except Exception as error:  # of a kind of model that cannot be counted, but may be trained
        return Duration(why=harmless(in_one_line(error)))
    finally:
        free_cached(device)


def _predicted(
    run: Run,
    device: torch.device,
    validation: Sequence[Row],
    held_out: Sequence[Row],
    scoring: ScoringSettings,
    begun: Checkpoint | None,
) -> Duration:
    planner, setting, _ = planned(run, None)
    setting = replace(setting, reuse="off", resident="all")
    watch, between_s = Stopwatch(device), OF_A_MODEL * overhead_s(device)
    mode = _mode_of_reuse(run, planner.predictor(setting).model)
    is_packed = _is_packed(run, mode, planner.predictor(setting).model)
    batches = _batches(run, is_packed=is_packed)
    calls_of_a_row = CALLS_OF_A_PART * run.num_layers if is_packed else 0
    clock = _Clock(planner, watch, between_s, batches, calls_of_a_row)
    plain = clock.times(setting, with_passes=mode == "off")
    times, build_s = plain, 0.0
    if mode != "off":
        # Dequantizing is spared where the upper blocks stay as they are.
        spared = run.options.reuse.dequantize_upper != "off" and setting.storage in QUANTIZED
        times = clock.times(
            replace(setting, reuse=mode), without="bitsandbytes::" if spared else ""
        )
        through = 1.0
        if mode == "trunk":
            model = planner.predictor(setting).model
            through = num_constant_blocks(model) / len(find_blocks(base_of(model))[1])
        build_s = through * sum(plain.forward.at(batch.num_tokens) for batch in batches)
    if not watch.has_timed:
        why = "" if watch.failure is None else f": {in_one_line(watch.failure)}"
        return Duration(why=f"no operator could be timed{why}")
    slowdown = watch.slowdown
    pass_s = statistics.fmean(times.passes.at(batch.num_tokens) for batch in batches)
    num_passes = min(run.optim.gradient_accumulation, len(batches))
    left = run.num_steps - (0 if begun is None else begun.step)

    def scored(rows: Sequence[Row]) -> float | None:
        seconds = _scoring_s(run, rows, scoring, plain.forward)
        return None if seconds is None else slowdown * seconds

    return Duration(
        num_steps=left,
        step_s=slowdown * (num_passes * pass_s + times.optimizer_s),
        build_s=slowdown * build_s,
        num_validations=_num_validations(run, left) if validation else 0,
        validation_s=scored(validation),
        held_out_s=scored(held_out),
        slowdown=slowdown,
    )


@dataclass(frozen=True)
class _Clock:
    """Counts and times a run's step in some setting."""

    planner: Planner
    watch: Stopwatch
    between_s: float
    batches: list[_Batch]
    calls_of_a_row: int
    """What each row of a batch takes besides, in calls of operators."""

    def times(self, setting: Setting, *, with_passes: bool = True, without: str = "") -> _Times:
        """Return the times of a step; ``without`` operators whose names begin so, if it is given.

        ``with_passes`` False leaves out the backward pass.
        """
        forward, passes, optimizer_s = {}, {}, 0.0
        new = len({batch[:2] for batch in self.batches}) / len(self.batches)
        predictor = self.planner.predictor(setting)
        for batch in _two_of(self.batches):
            counted = count_operators(predictor, batch.lengths)
            by_phase = {phase: _without(calls, without) for phase, calls in counted.items()}
            found = {
                phase: self._seconds(calls) + new * self.watch.new_shapes_s(calls)
                for phase, calls in by_phase.items()
                if with_passes or phase == "forward"
            }
            optimizer_s = found.pop("optimizer", 0.0) + CALLS_OF_A_STEP * self.between_s
            forward[batch.num_tokens] = found["forward"]
            around = CALLS_OF_A_PASS + self.calls_of_a_row * batch.num_rows
            passes[batch.num_tokens] = sum(found.values()) + around * self.between_s
        return _Times(_Line.through(passes), _Line.through(forward), optimizer_s)

    def _seconds(self, calls: Counter[Call]) -> float:
        return self.watch.seconds(calls) + self.between_s * calls.total()


def _without(calls: Counter[Call], prefix: str) -> Counter[Call]:
    if not prefix:
        return calls
    return Counter({call: n for call, n in calls.items() if not call.name.startswith(prefix)})


def _two_of(batches: list[_Batch]) -> list[_Batch]:
    """Return a large and a small batch; one alone where all are of about one size."""
    ordered = sorted(batches, key=lambda batch: batch.num_tokens)
    small, large = ordered[len(ordered) // 8], ordered[-1 - len(ordered) // 8]
    if large.num_tokens < 1.2 * small.num_tokens:
        return [ordered[len(ordered) // 2]]
    return [large, small]


def _is_packed(run: Run, mode: str, model: Any) -> bool:
    """Return whether examples probably share rows: `packing.why_not` asks the loaded base."""
    optim, causal = run.optim, run.card.task_type == "CAUSAL_LM"
    if optim.packing == "off" or mode == "prefix" or not causal or run.num_virtual:
        return False
    return "position_ids" in inspect.signature(base_of(model).forward).parameters


def _batches(run: Run, *, is_packed: bool) -> list[_Batch]:
    """Return the batches of an epoch in an order such as the Trainer draws."""
    lengths = [len(example["input_ids"]) for example in run.examples]
    labels = [example["labels"] for example in run.examples]
    supervised = [
        1 if not isinstance(each, list) else len(each) - each.count(IGNORED_LABEL)
        for each in labels
    ]
    size, number, seed = run.optim.batch_size, len(lengths), run.options.run.seed
    if run.optim.group_by_length:
        order = [*LikeLengths(lengths, size, seed)]
    else:
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for start in range(0, number, size):
        each = order[start : start + size]
        of_batch = [lengths[index] for index in each]
        rows = packed_rows(of_batch) if is_packed and len(each) > 1 else None
        width = max(of_batch)
        if rows is not None:  # each attends within itself
            tokens = len(rows) * max(sum(of_batch[place] for place in row) for row in rows)
            width = math.ceil(tokens / len(each))
        mean = math.ceil(sum(supervised[index] for index in each) / len(each))
        found.append(_Batch(len(each), width, mean, len({*of_batch}) > 1))
    return found


def _mode_of_reuse(run: Run, model: Any) -> Any:
    """Return what the run will probably reuse: off, trunk or prefix; see `reuse.prepare`."""
    options = run.options.reuse
    if options.reuse == "off" and options.resident == "all":
        return "off"
    try:
        constant = find_constant(model, run.examples, prefix=options.reuse != "trunk")
        if options.reuse == "auto" and options.resident == "all":
            tokens = sum(len(example["input_ids"]) for example in run.examples)
            check_worthwhile(run.num_layers, tokens, constant, run.num_epochs)
    except ReuseError:
        return "off"
    return "prefix" if any(constant.first_edited) else "trunk"


def _num_validations(run: Run, num_steps: int) -> int:
    every = run.options.choosing.eval_steps or run.optim.steps_per_epoch(len(run.examples))
    return math.ceil(num_steps / every)


def _scoring_s(
    run: Run, rows: Sequence[Row], settings: ScoringSettings, forward: _Line
) -> float | None:
    """Return the seconds of scoring rows; None where answers are generated, of unknown length."""
    if not rows:
        return 0.0
    sampled = rows[:: math.ceil(len(rows) / _SAMPLED)]
    lengths = _scored_lengths(run, sampled, settings)
    if lengths is None:
        return None
    passes = by_length(lengths, settings.batch_size)
    seconds = sum(forward.at(len(each) * lengths[each[0]]) for each in passes)
    return seconds * len(rows) / len(sampled)


def _scored_lengths(run: Run, rows: Sequence[Row], settings: ScoringSettings) -> list[int] | None:
    """Return the tokens that are read for each row; None where answers are generated."""
    card, tokenizer = run.card, run.tokenizer
    how: dict[str, Any] = {"max_length": card.max_length, "long_rows": "cut"}
    if card.task_type == "SEQ_CLS":
        encoded = encode_labelled(rows, tokenizer, label_names=card.label_names, **how)
        return [len(example["input_ids"]) for example in encoded.examples]
    rows = as_choices(rows, card.label_names)
    way = way_of(rows, settings, card.task_type)
    if way == "generated":
        return None
    if way == "responses":
        encoded = encode_rows(rows, tokenizer, **card.prompts | how)
        return [len(example["input_ids"]) for example in encoded.examples]
    lengths = []
    for of_row in encode_all_choices(rows, tokenizer, **card.prompts | how):
        prompt = of_row.examples[0]["labels"].count(IGNORED_LABEL)
        # A choice's last token is predicted, not read.
        read = (len(example["input_ids"]) - prompt - 1 for example in of_row.examples)
        lengths.append(prompt + sum(read))
    return lengths
