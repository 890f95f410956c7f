"""Keeps the results of comparisons as one file for ``benchmarks/results``.

``python -m benchmarks.collect OUT_DIR... --output benchmarks/results/NAME.json`` joins the
``results.json`` of output directories of ``lowmem-reft compare``: cells in their order, the last
one of equal ones, loss histories thinned to 50 points. Failed cells stay, with their errors. With
``--reference METHOD`` each cell also says how far its method is from that one on its task, by the
paired bootstrap over the answers. These are kept without their texts in ``NAME.answers.gz``, so
that a file kept before can be given among the directories, and later cells be paired with it.

``--searched`` takes cells of a task that differ in their learning rate alone as the trials of a
search, as ``compare --lr-search`` would have run them: the rate that is best on the validation rows
of seed 0 keeps its cells, the others stay as trials in ``lr_search``. Cells that scored fewer test
rows than others of their task are trials alone.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowmem_reft.compare.lr_search import best_of
from lowmem_reft.compare.report import write_report
from lowmem_reft.compare.report.answers import read_answers
from lowmem_reft.compare.report.joining import join
from lowmem_reft.compare.report.relative import relate
from lowmem_reft.compare.report.significance import compare_with
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods, with_searched_rate

POINTS = 50
"""Most points of a loss history."""

ANSWER = ("source", "prediction", "reference", "correct", "loss", "num_tokens")
"""What is kept of an answer."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """What to join."""

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output directories of comparisons, and files that were kept before."""
    output: Path
    """Where the file goes."""
    reference: str | None = None
    """The method, as it is called in the results, that the others are compared with."""
    searched: bool = False
    """Choose each method's rate on each task among the cells."""


def collect(directories: tuple[Path, ...], scratch: Path) -> list[dict[str, Any]]:
    """Return the cells of all directories, each once, with what they say beside each other.

    Args:
        directories: Of comparisons, or files that were kept.
        scratch: A directory for the answers of these.
    """
    cells = relate(join(directories, relative_to=Path()))
    kept = {key: path for source in directories for key, path in unpacked(source, scratch).items()}
    return [{**cell, "predictions": cell["predictions"] or kept.get(_key(cell))} for cell in cells]


def unpacked(source: Path, scratch: Path) -> dict[tuple[str, ...], str]:
    """Write each cell's answers that were kept with a file; return where, by task, method, seed."""
    found: dict[tuple[str, ...], str] = {}
    if not answers_of(source).is_file():
        return found
    with gzip.open(answers_of(source), "rt", encoding="utf-8") as lines:
        for line in lines:
            cell = json.loads(line)
            path = scratch / f"{source.stem}-{len(found)}.jsonl"
            rows = [dict(zip(ANSWER, row, strict=True)) for row in cell["answers"]]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            found[_key(cell)] = str(path)
    return found


def pack(cells: list[dict[str, Any]], path: Path) -> None:
    """Write the answers of all cells that have them, a line each."""
    text = ""
    for cell in cells:
        if not cell["predictions"]:
            continue
        rows = map(json.loads, Path(cell["predictions"]).read_text(encoding="utf-8").splitlines())
        answers = [
            [row["source"].replace("\\", "/").rpartition("/")[2], *map(row.get, ANSWER[1:])]
            for row in rows
        ]
        named = {name: cell[name] for name in ("task", "method", "seed")}
        text += json.dumps({**named, "answers": answers}, separators=(",", ":")) + "\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def answers_of(output: Path) -> Path:
    """Where the answers of a file are kept."""
    return output.with_suffix(".answers.gz")


def _key(cell: dict[str, Any]) -> tuple[str, ...]:
    return cell["task"], cell["method"], str(cell["seed"])


def compared(cells: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Add to each cell the ``difference`` of its method from the reference: None where unknown.

    Values, bounds of the 95 % interval and ``p_holm`` are those of ``significance.Difference``;
    Holm's correction is over the methods of a task.
    """
    found = {}
    for task, answers in read_answers(cells, Path()).items():
        others = [name for name in answers.methods if name != reference]
        significance = compare_with(answers, reference, others)
        for method, difference in (significance.differences if significance else {}).items():
            found[task, method] = {"reference": reference, **asdict(difference)}
    return [{**cell, "difference": found.get((cell["task"], cell["method"]))} for cell in cells]


def page_of(source: Path) -> str:
    """Return the report of a file that was kept, as HTML without a row's texts."""
    with tempfile.TemporaryDirectory() as scratch:
        cells = collect((source,), Path(scratch))
        report = write_report(cells, Path(scratch) / "report", texts=False)
        return report.read_text(encoding="utf-8")


def with_chosen_rates(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells at each method's best rate on each task, called alike whatever it is.

    A method of one rate on a task stays as it is. Cells whose rate was chosen before bring their
    trials with them.

    Raises:
        InputError: The chosen rate was not scored on all test rows.
    """
    most: dict[str, int] = {}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        task, trials = cell["task"], cell["lr_search"] or []
        method = next((each["method"] for each in trials if each["chosen"]), cell["method"])
        most[task] = max(most.get(task, 0), cell["num_examples"] or 0)
        groups.setdefault((task, _of_any_rate(method)), []).append({**cell, "method": method})
    found = []
    for (task, label), group in groups.items():
        scored = [each for each in group if each["num_examples"] == most[task]]
        trials = {each["lr"]: each for cell in group for each in _trials(cell)}
        if len(trials) < 2:
            found += scored
            continue
        ordered = [trials[rate] for rate in sorted(trials)]
        best = best_of(ordered)
        assert best is not None
        if not any(each["method"] == best["method"] for each in scored):
            raise InputError(
                f"{best['method']!r}, the best on the validation rows of {task}, must be scored on "
                f"all {most[task]} test rows; run it"
            )
        tried = [{**each, "chosen": each is best} for each in ordered]
        chosen = {"method": label, "lr_search": tried}
        found += [{**each, **chosen} for each in scored if each["method"] == best["method"]]
    return found


def _of_any_rate(entry: str) -> str:
    """Return what a method is called whose rate was searched; what names no rate, as it is."""
    if "lr=" not in entry:
        return entry
    spec = parse_methods(entry)[0]
    return with_searched_rate(spec, spec.optim_overrides["lr"]).label


def _trials(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials that a cell was chosen among, or what it is as one; of other seeds none."""
    if cell["lr_search"]:
        return list(cell["lr_search"])
    if cell["seed"] != 0 or cell["validation_value"] is None or "lr=" not in cell["method"]:
        return []
    epoch = next(each for each in cell["validation"] if each["epoch"] == cell["best_epoch"])
    return [
        {
            **{name: cell[name] for name in ("method", "metric", "error")},
            "value": cell["validation_value"],
            "loss": epoch["loss"],
            "lr": parse_methods(cell["method"])[0].optim_overrides["lr"],
            "chosen": False,
        }
    ]


def thinned(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell without what only its own directory has, its loss history shortened."""
    history = cell.get("loss_history") or []
    step = -(-len(history) // POINTS) or 1
    return {**cell, "loss_history": history[::step], "predictions": None}


def main(options: Collect) -> int:
    """Write the file; say how many cells there are and which failed."""
    with tempfile.TemporaryDirectory() as scratch:
        cells = collect(options.directories, Path(scratch))
        if options.searched:
            cells = with_chosen_rates(cells)
        pack(cells, answers_of(options.output))
        if options.reference is not None:
            cells = compared(cells, options.reference)
    cells = [thinned(cell) for cell in cells]
    options.output.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    failed = [f"{cell['task']} {cell['method']}" for cell in cells if cell["error"]]
    print(f"{len(cells)} cells, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Collect, description=__doc__)))
