"""One method's search with Optuna: which setting is next, and whether a trial goes on.

A trial is drawn from the seed, its number and the trials that have ended, and from nothing else: a
search that was interrupted goes on as if it had not been, and grid and random searches try the same
settings whatever runs at the same time. (TPE does so with one worker; with more it knows less when
it is asked.) A setting is stored as it was drawn, so that no study needs to outlive the process.
"""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, Literal, get_type_hints

from lowmem_reft.compare.sweep.space import Choices, Range, Space, as_text
from lowmem_reft.data.tasks.metrics import is_lower_better
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import fits

State = Literal["waiting", "running", "complete", "pruned", "failed"]

_ENOUGH_FOR_IMPORTANCE = 8


@dataclass(kw_only=True)
class Trial:
    """One setting of one method, as ``sweep.json`` has it."""

    number: int
    state: State = "waiting"
    method: str = ""
    """The setting as an entry of ``--methods``."""
    settings: dict[str, str] = field(default_factory=dict)
    """What was varied, as it is written in ``method``."""
    drawn: dict[str, Any] | None = None
    """The same before numbers were rounded, which is what the search goes on from."""
    metric: str | None = None
    value: float | None = None
    """On validation rows, with the adapter of the best epoch; of a pruned trial its best so far."""
    loss: float | None = None
    epochs: list[float | None] = field(default_factory=list)
    """``value`` after each epoch; None is no number."""
    num_examples: int | None = None
    """Validation rows that ``value`` is of."""
    num_trainable_params: int | None = None
    peak_bytes: int | None = None
    wall_time_s: float | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether there is something to learn from it; what failed is tried again."""
        return self.state in ("complete", "pruned")


def read_trial(content: dict[str, Any]) -> Trial:
    """Return a trial as ``sweep.json`` has it.

    Raises:
        ValueError: A value is of another type, or one is missing that the state needs.
        TypeError: A name is unknown, or the number is missing.
    """
    trial = Trial(**content)
    for name, hint in get_type_hints(Trial).items():
        if not fits(getattr(trial, name), hint):
            raise ValueError(f"{name} of a trial is {shortened(getattr(trial, name))}")
    if trial.ended and (trial.drawn is None or not trial.method):
        raise ValueError(f"trial {trial.number} has ended and no setting")
    if trial.number < 0 or (trial.state == "complete" and trial.value is None):
        raise ValueError(f"trial {trial.number} is complete and has no value")
    return trial


class Search:
    """Settings of one method, drawn one after the other."""

    def __init__(
        self,
        space: Space,
        *,
        sampler: Literal["grid", "random", "tpe"],
        seed: int,
        prune: bool,
        metric: str | None = None,
        num_startup_trials: int = 5,
    ) -> None:
        """Search ``space``; with ``grid`` nothing is drawn: the settings are given.

        With ``prune``, trials are stopped that are worse than the median of the others after as
        many epochs, once ``num_startup_trials`` are complete.

        Raises:
            InputError: Optuna is not installed.
        """
        optuna = _optuna()
        self._space, self._sampler, self._seed = space, sampler, seed
        self._distributions = {part.name: _distribution(part) for part in space}
        pruners = optuna.pruners
        self._study = optuna.create_study(
            direction="minimize" if is_lower_better(metric) else "maximize",
            pruner=pruners.MedianPruner(num_startup_trials) if prune else pruners.NopPruner(),
        )
        self._asked: dict[int, Any] = {}

    def restore(self, trial: Trial) -> None:
        """Take over a trial that ended before."""
        optuna = _optuna()
        states = optuna.trial.TrialState
        epochs = enumerate(trial.epochs, start=1)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=states.COMPLETE if trial.state == "complete" else states.PRUNED,
                value=trial.value,
                params=trial.drawn or {},
                distributions=self._distributions,
                intermediate_values={n: value for n, value in epochs if value is not None},
            )
        )

    def draw(self, number: int, drawn: dict[str, Any] | None = None) -> dict[str, Any]:
        """The setting of trial ``number``: ``drawn`` if it is known already."""
        optuna = _optuna()
        seed = zlib.crc32(f"{self._seed} {number}".encode())
        samplers = optuna.samplers
        sampler = samplers.TPESampler if self._sampler == "tpe" else samplers.RandomSampler
        self._study.sampler = sampler(seed=seed)
        if drawn is not None:
            self._study.enqueue_trial(drawn)
        self._asked[number] = self._study.ask(self._distributions)
        return dict(self._asked[number].params)

    def report(self, trial: Trial, value: float | None) -> bool:
        """Take the value after the next epoch; whether the trial is not worth going on with.

        A correlation is no number while all predictions are the same: that epoch decides nothing.
        """
        if value is None or math.isnan(value):
            trial.epochs.append(None)
            return False
        trial.epochs.append(value)
        asked = self._asked[trial.number]
        asked.report(value, step=len(trial.epochs))
        return bool(asked.should_prune())

    def end(self, trial: Trial) -> None:
        """Take note of how a trial ended."""
        states = _optuna().trial.TrialState
        asked = self._asked.pop(trial.number)
        if trial.state == "complete":
            self._study.tell(asked, trial.value)
        else:
            self._study.tell(asked, state=states.PRUNED if trial.state == "pruned" else states.FAIL)

    def importance(self) -> dict[str, float] | None:
        """Share of each option in what good trials have in common (PED-ANOVA); None: too few."""
        optuna = _optuna()
        complete = self._study.get_trials(
            deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)
        )
        values = {trial.value for trial in complete}
        if len(complete) < _ENOUGH_FOR_IMPORTANCE or len(values) < 2:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return dict(
                optuna.importance.get_param_importances(
                    self._study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
                )
            )


def settings_of(drawn: dict[str, Any]) -> dict[str, str]:
    """A drawn setting as it is written."""
    return {name: as_text(value) for name, value in drawn.items()}


def _distribution(part: Choices | Range) -> Any:
    distributions = _optuna().distributions
    if isinstance(part, Choices):
        return distributions.CategoricalDistribution(part.values)
    if part.whole:
        low, high, step = int(part.low), int(part.high), int(part.step or 1)
        return distributions.IntDistribution(low, high, log=part.log, step=step)
    return distributions.FloatDistribution(part.low, part.high, log=part.log, step=part.step)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "sweep must have Optuna, which is not installed; install it: "
            "pip install 'lowmem-reft[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
