"""Which rows a sweep trains on and scores, and the comparison that is to follow on the test rows.

The test rows are only ever named. Where there are none, a tenth of the training rows is put aside
before anything else; where there are no validation rows, another tenth.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lowmem_reft.compare.sources import Sources, find_all_sources
from lowmem_reft.data import embedded
from lowmem_reft.data.rows import holdout, load_rows, write_rows
from lowmem_reft.options import CompareOptions, SweepOptions


def find_rows(options: SweepOptions) -> tuple[CompareOptions, Sources, CompareOptions]:
    """The options of the trials, their rows, and the options of the comparison on the test rows.

    Raises:
        InputError: The rows or the model are not there.
    """
    final = _with_rows(options)
    trials = replace(
        final,
        eval_data=final.validation_data,
        eval_split=final.validation_split,
        eval_limit=final.validation_limit,
    )
    [sources] = find_all_sources(trials, scored="validation")
    # Labels may have become choices, which the epochs are to be scored on too.
    sources = replace(
        sources, validation=sources.evaluate, validation_digest=sources.evaluate_digest
    )
    return trials, sources, final


def _with_rows(options: SweepOptions) -> CompareOptions:
    """The comparison, with files for all three kinds of rows."""
    shared = {item.name for item in fields(CompareOptions)}
    given = {
        item.name: getattr(options, item.name) for item in fields(options) if item.name in shared
    }
    if options.task is not None:
        return CompareOptions(**given, tasks=options.task)
    if options.data is None:
        return _embedded(given)
    comparison = CompareOptions(**given)
    if options.validation_data is not None and options.eval_data is not None:
        return comparison
    rows = load_rows(options.data, split=options.split)
    parts: dict[str, Any] = {}
    for name in ("eval_data", "validation_data"):
        if getattr(options, name) is None:
            rows, part = holdout(rows)
            parts[name] = str(write_rows(options.output_dir / "rows" / f"{name}.jsonl", part))
    parts["data"] = str(write_rows(options.output_dir / "rows" / "data.jsonl", rows))
    return replace(comparison, **parts)


def _embedded(given: dict[str, Any]) -> CompareOptions:
    train, test = map(str, embedded.task_files())
    rows = {"data": train, "eval_data": test, "validation_data": str(embedded.validation_file())}
    return CompareOptions(**{**given, **rows})
