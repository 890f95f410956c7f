"""What a sweep says on the terminal: progress, the table of trials and what to run next."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowmem_reft.compare.cell import Cell
from lowmem_reft.compare.report.console import Progress
from lowmem_reft.compare.report.table import titled
from lowmem_reft.compare.sweep.search import Trial
from lowmem_reft.data.tasks.metrics import gain, unit_of

_SHOWN = 20


class Told:
    """Says how each trial ended, in a line above the bar with those that run."""

    def __init__(self, progress: Progress) -> None:
        """Write above ``progress``."""
        self._progress, self.started = progress, progress.started

    def ended(self, trial: Trial, cell: Cell | None) -> None:
        """Say how the trial ended; ``cell`` is None if nothing was started for it."""
        outcome = f"{_score(trial.metric, trial.value)}"
        if trial.state == "failed":
            outcome = f"failed: {trial.error}"
        elif trial.state == "pruned":
            outcome = f"stopped after epoch {len(trial.epochs)} at {outcome}"
        if cell is None:
            outcome += ", known before"
        name = trial.method if cell is None else cell.name
        self._progress.ended(name, outcome, ran=cell is not None, failed=trial.state == "failed")


def print_trials(content: dict[str, Any]) -> None:
    """Print each method's best trials, what mattered, and the command for the test rows."""
    out = Console(stderr=True, soft_wrap=True)
    remarks = {row["method"]: row["remark"] for row in content["best"]}
    for search in content["searches"]:
        ranked = sorted(search["trials"], key=partial(_rank, search))
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, title_justify="left")
        table.add_column("trial", justify="right", no_wrap=True, min_width=len("trial"))
        names = list(ranked[0]["settings"]) if ranked else []
        metric = titled(content["metric"] or "value", [content["metric"]])
        for title in (*names, metric, "held-out loss", "epochs", "s"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("")
        for trial in ranked[:_SHOWN]:
            table.add_row(*_row(trial, names), style="bold" if _is_best(search, trial) else None)
        out.print(escape(search["method"]), style="bold", highlight=False)
        out.print(table)
        if len(ranked) > _SHOWN:
            out.print(f"and {len(ranked) - _SHOWN} more in sweep.json", highlight=False)
        words = [remarks.get(trial["method"]) for trial in ranked if _is_best(search, trial)]
        for said in filter(None, words):
            out.print(f"best: {said}", markup=False, highlight=False)
        if search["importance"]:
            shares = (f"{name} {100 * share:.0f} %" for name, share in search["importance"].items())
            out.print(f"importance: {', '.join(shares)}", highlight=False)
    if content["command"]:
        out.print("\nOn the test rows, which nothing has been chosen by:", highlight=False)
        out.print(content["command"], markup=False, highlight=False)


def _rank(search: dict[str, Any], trial: dict[str, Any]) -> tuple[bool, int, float, float]:
    """The best first, then those that ended by value."""
    state = ("complete", "pruned").index(trial["state"]) if trial["error"] is None else 2
    value, loss = trial["value"], trial["loss"]
    loss = float("inf") if loss is None else loss
    return not _is_best(search, trial), state, -gain(trial["metric"], value or 0.0), loss


def _is_best(search: dict[str, Any], trial: dict[str, Any]) -> bool:
    return bool(trial["number"] == search["best"])


def _row(trial: dict[str, Any], names: list[str]) -> list[str]:
    loss, seconds = trial["loss"], trial["wall_time_s"]
    note = {"complete": "", "pruned": "stopped", "failed": str(trial["error"])}[trial["state"]]
    return [
        str(trial["number"]),
        *(escape(trial["settings"][name]) for name in names),
        unit_of(trial["metric"]).text(trial["value"]),
        "–" if loss is None else f"{loss:.3f}",
        str(len(trial["epochs"])),
        "–" if seconds is None else f"{seconds:.0f}",
        escape(note),
    ]


def _score(metric: str | None, value: float | None) -> str:
    unit = unit_of(metric)
    return f"{metric or 'value'} {unit.text(value)}{'' if value is None else unit.sign}"
