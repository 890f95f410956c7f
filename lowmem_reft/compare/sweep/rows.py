"""Which rows a sweep trains on and scores, and the comparison that is to follow on the test rows.

The test rows are only ever named. Where there are none, a tenth of the training rows is put aside
before anything else; where there are no validation rows, another tenth.
"""

from __future__ import annotations

from dataclasses import replace

from lowmem_reft.compare.outputs import keep_rows
from lowmem_reft.compare.sources import Sources, find_all_sources, with_embedded_rows
from lowmem_reft.data.rows import holdout, load_rows
from lowmem_reft.options import CompareOptions, ScoredOptions, SweepOptions, written


def find_rows(options: SweepOptions) -> tuple[CompareOptions, Sources, CompareOptions]:
    """The options of the trials, their rows, and the options of the comparison on the test rows.

    Raises:
        InputError: The rows or the model are not there.
    """
    final = _with_rows(options)
    trials = written.changed(
        final,
        eval_data=final.rows.validation_data,
        eval_split=final.rows.validation_split,
        eval_limit=final.rows.validation_limit,
    )
    [sources] = find_all_sources(trials, scored="validation")
    # Labels may have become choices, which the epochs are to be scored on too.
    sources = replace(
        sources, validation=sources.evaluate, validation_digest=sources.evaluate_digest
    )
    return trials, sources, final


def _with_rows(options: SweepOptions) -> CompareOptions:
    """The comparison, with files for all three kinds of rows."""
    shared = (
        "base",
        "rows",
        "scoring",
        "optim",
        "memory",
        "reuse",
        "output_dir",
        "workers",
    )
    groups = {name: getattr(options, name) for name in (*shared, "quiet")}
    comparison = CompareOptions(scored=ScoredOptions(tasks=options.task), **groups)
    given = options.rows
    if options.task is not None or (given.validation_data and given.eval_data):
        return comparison
    if given.data is None:
        return with_embedded_rows(comparison)
    rows = load_rows(given.data, split=given.split)
    parts: dict[str, str] = {}
    for name in ("eval_data", "validation_data"):
        if getattr(given, name) is None:
            rows, part = holdout(rows)
            parts[name] = str(keep_rows(options, f"rows/{name}.jsonl", part))
    parts["data"] = str(keep_rows(options, "rows/data.jsonl", rows))
    return written.changed(comparison, **parts)
