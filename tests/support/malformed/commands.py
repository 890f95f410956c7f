"""A valid command line of every subcommand, and cells that take no time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import EMPTY_RESULT, Cell
from lowmem_reft.machine.files import write_json
from malformed.world import World

TIE = """sed 's/.*/{"preferred":"tie"}/'"""
"""A judge that prefers nothing."""
PYREFT = Path(__file__).parents[1] / "pyreft" / "loreft_tied"


class _Ended:
    """A cell that has ended as soon as it starts."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        value = (sum(map(ord, cell.record["method"])) % 97) / 97
        measured = {"metric": "accuracy", "value": value, "loss": 1.0, "num_examples": 4}
        measured |= {"num_trainable_params": 10, "peak_bytes": 1000, "wall_time_s": 1.0}
        measured |= {"validation": [{"epoch": 1, "metric": "accuracy", "value": value}]}
        self._result = {**EMPTY_RESULT, **measured, **cell.record}
        write_json(cell.result_path, self._result)

    def ended(self) -> bool:
        return True

    def result(self) -> dict[str, Any]:
        return self._result

    def cancel(self) -> None:
        pass

    def join(self, _timeout_s: float) -> None:
        pass


class _Engine:
    slots = 2
    start = _Ended


@contextmanager
def no_engine(_workers: object, *, child_command: Sequence[str] = ()) -> Iterator[_Engine]:
    """Stands for the engine that starts a process for every cell."""
    yield _Engine()


def comparison(world: World, output: Path) -> list[str]:
    """Return the words of a comparison."""
    words = ["compare", "--model", str(world.model), "--data", str(world.rows), "--json"]
    words += ["--eval-data", str(world.rows), "--methods", "lora,loreft", "--device", "cpu"]
    return [*words, "--output-dir", str(output), "--quiet"]


def sweep(world: World, output: Path) -> list[str]:
    """Return the words of a search."""
    words = ["sweep", "--space", "rank=1,2", "--model", str(world.model), "--data", str(world.rows)]
    words += ["--validation-data", str(world.rows), "--device", "cpu", "--quiet", "--json"]
    return [*words, "--output-dir", str(output)]


def plan(world: World, model: Path | None = None) -> list[str]:
    """Return the words of a prediction."""
    words = ["plan", "--model", str(model or world.model), "--device", "cpu", "--seq-len", "16"]
    return [*words, "--max-new-tokens", "4", "--storage", "fp32", "--json", "--quiet"]


def generate(world: World, *more: str, model: Path | None = None) -> list[str]:
    """Return the words of a command that answers one prompt."""
    words = ["generate", "--model", str(model or world.model), "--prompt", "what is it?"]
    words += ["--max-new-tokens", "4", "--storage", "fp32", "--device", "cpu"]
    return [*words, "--quiet", "--json", *more]


def importing(directory: Path, output: str) -> list[str]:
    """Return the words that import a checkpoint of pyreft."""
    words = ["import-pyreft", str(directory), "--positions", "l1", "--act", "none"]
    return [*words, "--output-dir", output]


def valid(world: World, command: str) -> list[str]:
    """Return a valid command line, which writes to a place of its own."""
    output = world.fresh() / "out"
    response = str(world.root / "response.jsonl")
    if command == "train":
        return world.train(output)
    if command == "evaluate":
        return world.evaluate()
    if command == "generate":
        return generate(world)
    if command == "chat":
        words = ["chat", "--model", str(world.model), "--storage", "fp32", "--device", "cpu"]
        return [*words, "--max-new-tokens", "2", "--quiet"]
    if command == "compare":
        return comparison(world, output)
    if command == "sweep":
        return sweep(world, output)
    if command == "plan":
        return plan(world)
    if command == "data":
        return ["data", str(world.rows), "--model", str(world.model), "--json", "--quiet"]
    if command == "profile":
        words = ["profile", "--model", str(world.model), "--device", "cpu", "--storage", "fp32"]
        return [*words, "--seq-len", "16", "--output-dir", str(output), "--quiet", "--json"]
    if command == "judge":
        return ["judge", response, response, "--command", TIE, "--quiet", "--json"]
    if command == "report":
        return ["report", str(compared(world)), "--output-dir", str(output), "--json", "--quiet"]
    if command == "reuse ls":
        return ["reuse", "ls", "--reuse-dir", str(world.store), "--json"]
    if command == "reuse rm":
        store = str(world.copied(world.store))
        return ["reuse", "rm", "--all", "--reuse-dir", store, "--json"]
    if command == "import-pyreft":
        return importing(PYREFT, str(output))
    if command == "export-pyreft":
        adapter = str(world.trained("loreft") / "adapter")
        return ["export-pyreft", adapter, "--output-dir", str(output), "--json"]
    return [command, "--json"]


def compared(world: World) -> Path:
    """Return the directory of a finished comparison."""
    path = world.root / "compared"
    if not path.is_dir():
        world.result(comparison(world, path))
    return path


def swept(world: World) -> Path:
    """Return the directory of a finished search."""
    path = world.root / "swept"
    if not path.is_dir():
        world.result(sweep(world, path))
    return path
