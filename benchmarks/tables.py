"""Writes the tables of README.md, RESULTS.md and docs/ from ``benchmarks/results/*.json``.

``python -m benchmarks.tables`` fills what stands between ``<!-- table:NAME -->`` and
``<!-- /table -->``; with ``--check`` it changes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem_reft.compare.report.significance import LEVEL
from lowmem_reft.compare.report.table import aggregate, markdown
from lowmem_reft.data.tasks.metrics import gain

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "docs" / "choose.md",
    ROOT / "docs" / "reference" / "measured.md",
    ROOT / "docs" / "small-model.md",
)
_GLUE = "\u00a0"
"""A space at which a cell of a wide table does not break."""
BLOCK = re.compile(r"(<!-- table:(?P<name>\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def _origin(result: list[dict[str, Any]]) -> str:
    """What the cells of a comparison were measured on and with, each once."""
    trained = [row for row in result if row["num_trainable_params"]]
    devices = " and ".join(dict.fromkeys(row["device"] for row in trained))
    names = ("torch", "transformers", "bitsandbytes")
    versions = dict.fromkeys(
        ", ".join(f"{name} {row['versions'][name]}" for name in names) for row in trained
    )
    return f"{devices}; {'; '.join(versions)}."


def comparison(result: list[dict[str, Any]]) -> str:
    """Methods with means over seeds, as ``lowmem-reft compare`` writes them."""
    return f"{markdown(aggregate(result))}\n{_origin(result)}\n"


def tasks(result: list[dict[str, Any]]) -> str:
    """A row per method, a column per task, and the mean over tasks; the best methods first."""
    rows: dict[str, dict[str, Any]] = {}
    metrics = {}
    for row in aggregate(result):
        rows.setdefault(row.method, {})[row.task] = row
        metrics[row.task] = row.metric or metrics.get(row.task)

    def mean(method: str) -> float:
        values = [row.value_mean for row in rows[method].values()]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(metrics) else -1.0

    titles = [f"{task} ({metric})" for task, metric in metrics.items()]
    lines = [
        f"| method | trainable | {' | '.join(titles)} | mean |",
        f"|:--|--:|{'--:|' * len(titles)}--:|",
    ]
    for method in sorted(rows, key=mean, reverse=True):
        by_task = rows[method]
        cells = [_value(by_task.get(task)) for task in metrics]
        trainable = next(iter(by_task.values())).num_trainable_params or 0
        total = f"{100 * mean(method):.1f}" if mean(method) >= 0 else "–"
        lines.append(f"| {method} | {trainable:,} | {' | '.join(cells)} | {total} |")
    return "\n".join([*lines, "", _origin(result), ""])


def against_reference(result: list[dict[str, Any]]) -> str:
    """A row per method, best mean first: what it takes, its values, and where it is behind.

    Signs say where the paired bootstrap tells a method from the reference (Holm over the methods of
    a set): + ahead, - behind. The last columns count sets, if there are several, on which its mean
    is not lower, and those on which it is not told apart as behind. Sets on which the reference
    was not run are left out, and methods that were not run on all others.
    """
    differences = {(row["task"], row["method"]): row.get("difference") for row in result}
    (reference,) = {found["reference"] for found in differences.values() if found}
    rows: dict[str, dict[str, Any]] = {}
    metrics: dict[str, str] = {}
    for row in aggregate(result):
        rows.setdefault(row.method, {})[row.task] = row
        metrics[row.task] = row.metric or metrics.get(row.task, "")
    metrics = {task: metric for task, metric in metrics.items() if task in rows[reference]}
    # Means over other sets would not be comparable.
    rows = {
        name: {task: of[task] for task in metrics}
        for name, of in rows.items()
        if metrics.keys() <= of.keys()
    }
    ahead = {name: _sets_kept(by_task, rows[reference]) for name, by_task in rows.items()}

    def place(method: str) -> float:
        values = [gain(metrics[task], row.value_mean) for task, row in rows[method].items()]
        return -statistics.fmean(values)

    titles = [
        task if metrics[task] == "accuracy" else f"{task}, {metrics[task]}" for task in metrics
    ]
    lost = {name: [r.forgetting for r in of.values() if r.forgetting] for name, of in rows.items()}
    has_lost = any(lost.values())
    more = ["forgotten, nats"] if has_lost else []
    counted = ["not lower", "not behind"] if len(metrics) > 1 else []
    titles = ["method", "trained", "peak MiB", *more, *titles, *counted]
    lines = [f"| {' | '.join(titles)} |", f"|:--|{'--:|' * (len(titles) - 1)}"]
    for method in sorted(rows, key=place):
        by_task = rows[method]
        cells = [
            _scored(by_task.get(task), metrics[task], differences.get((task, method)))
            for task in metrics
        ]
        trained = max(row.num_trainable_params or 0 for row in by_task.values())
        peaks = [row.peak_bytes for row in by_task.values() if row.peak_bytes]
        peak = f"{statistics.median(peaks) / 2**20:,.0f}" if peaks else "–"
        behind = sum(cell.endswith(f"{_GLUE}-") for cell in cells)
        counts = (ahead[method], len(metrics) - behind)
        kept = ["" if method == reference else f"{count} of {len(metrics)}" for count in counts]
        kept = kept if counted else []
        if has_lost:
            cells.insert(0, f"{statistics.fmean(lost[method]):.2f}" if lost[method] else "–")
        name = method.replace(",", ", ")  # where it may break
        lines.append(f"| {name} | {trained:,} | {peak} | {' | '.join([*cells, *kept])} |")
    return "\n".join([*lines, "", _origin(result), ""])


def _sets_kept(by_task: dict[str, Any], reference: dict[str, Any]) -> int:
    pairs = [(row, reference[task]) for task, row in by_task.items() if task in reference]
    return sum(
        gain(row.metric, row.value_mean) >= gain(row.metric, other.value_mean)
        for row, other in pairs
        if row.value_mean is not None and other.value_mean is not None
    )


def _scored(row: Any, metric: str, difference: dict[str, Any] | None) -> str:
    if metric != "loss" or row is None or row.value_mean is None:
        text = _value(row)
    else:
        spread = "" if row.value_sd is None else f" ± {row.value_sd:.3f}"
        text = f"{row.value_mean:.3f}{spread}"
    text = text.replace("± ", f"±{_GLUE}")
    if difference is None or difference["p_holm"] >= LEVEL:
        return text
    return f"{text}{_GLUE}{'+' if gain(metric, difference['value']) > 0 else '-'}"


def grid(result: list[dict[str, Any]]) -> str:
    """A row per choice of layers, a column per choice of positions."""
    values: dict[str, dict[str, str]] = {}
    for row in result:
        method = row["config"].get("method", {})
        if row["num_trainable_params"]:
            values.setdefault(method["layers"], {})[method["positions"]] = (
                f"{100 * row['value']:.1f}"
            )
    columns = list(next(iter(values.values())))
    lines = [f"| layers | {' | '.join(columns)} |", f"|:--|{'--:|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(row[c] for c in columns)} |" for name, row in values.items()]
    return "\n".join([*lines, ""])


def _value(row: Any) -> str:
    if row is None or row.value_mean is None:
        return "failed" if row is not None and row.errors else "–"
    return _percent(row.value_mean, row.value_sd)


def _percent(mean: float, deviation: float | None) -> str:
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return f"{round(100 * mean, 1) + 0.0:.1f}{spread}"  # + 0.0: no -0.0


def figure(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def timings(result: dict[str, Any]) -> str:
    """Median, spread and ratios of a benchmark that times methods."""
    unit = 1.0 if result["benchmark"] in ("step", "generate") else 1e3
    name = "s" if unit == 1.0 else "ms"
    lines = [f"| method | median {name} | min | max |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['method']} | {figure(row['median_s'] * unit)} | {figure(row['min_s'] * unit)} | "
        f"{figure(row['max_s'] * unit)} |"
        for row in result["rows"]
        if "median_s" in row
    ]
    lines += [
        "",
        "| ratio, round by round | median | smallest | largest |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {ratio['ours']} / {ratio['theirs']} | {ratio['ratio']:.3g} | "
        f"{ratio['min_ratio']:.3g} | {ratio['max_ratio']:.3g} |"
        for ratio in result["ratios"]
        if ratio.get("ratio") is not None
    ]
    record = result["environment"]
    torch = record["versions"]["torch"]
    return "\n".join([*lines, "", f"{record['device']}; torch {torch}; `{record['command']}`.", ""])


def mebibytes(num_bytes: float) -> str:
    """MiB with one decimal."""
    return f"{num_bytes / 2**20:,.1f}"


def memory(result: dict[str, Any]) -> str:
    """Peak over weights of one shape, and how far predictions were off."""
    lines = [
        "| setting | peak over weights, MiB | loss | activations | workspace "
        "| optimizer and adapter | predicted / measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["floor"]:
        parts = row["breakdown_bytes"]
        trained = sum(parts.get(name, 0) for name in ("optimizer", "adapter", "gradients"))
        sizes = [parts.get(name, 0) for name in ("loss", "activations", "workspace")]
        cells = [mebibytes(size) for size in (row["over_weights_bytes"], *sizes, trained)]
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {row['ratio']:.4f} |")
    record = result["environment"]
    lines += [
        "",
        f"{result['num_settings']} further settings: predicted / measured from "
        f"{result['smallest_ratio']:.4f} to {result['largest_ratio']:.4f}, "
        f"{result['num_under']} below 1. {record['device']}; torch {record['versions']['torch']}; "
        f"`{record['command']}`.",
        "",
    ]
    return "\n".join(lines)


def reuse(result: dict[str, Any]) -> str:
    """Steps from stored constants beside the plain step and QLoRA."""
    lines = [
        "| shape | method | median s | min | max | times slower than reused |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for item in result["results"]:
        fastest = item["rows"]["LoReFT, reused"]["median_s"]
        for name, row in item["rows"].items():
            times = [figure(row[key]) for key in ("median_s", "min_s", "max_s")]
            lines.append(
                f"| {item['shape']['name']} | {name} | {' | '.join(times)} | "
                f"{row['median_s'] / fastest:.1f} |"
            )
    record = result["environment"]
    lines += [
        "",
        "Building the stores took "
        + ", ".join(f"{item['build_time_s']:.1f} s" for item in result["results"])
        + f" for {result['results'][0]['num_batches']} batches each; gradients differ from the "
        f"plain step's by at most {result['max_grad_rel_error']:.0e}. {record['device']}; torch "
        f"{record['versions']['torch']}; `{record['command']}`.",
        "",
    ]
    return "\n".join(lines)


def larger_than_memory(result: dict[str, Any]) -> str:
    """Training under a hard limit of memory beside the run without one."""

    def gibibytes(num_bytes: float) -> str:
        return f"{num_bytes / 2**30:.2f}"

    lines = [
        "| run | limit, GiB | most held, GiB | build s | step s | whole run s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in (("upper blocks", result["limited"]), ("whole base", result["whole"])):
        limit = row["limit_bytes"]
        held = [gibibytes(limit) if limit else "none", gibibytes(row["peak_data_bytes"])]
        times = [figure(row[key]) for key in ("build_time_s", "step_time_s", "wall_s")]
        lines.append(f"| {name} | {' | '.join([*held, *times])} |")
    record = result["environment"]
    lines += [
        "",
        f"Base as stored: {gibibytes(result['quantized_bytes'])} GiB; the command alone: "
        f"{gibibytes(result['footprint_bytes'])} GiB. Relative difference of the two adapters: "
        f"{result['adapter_relative_difference']:g}. {record['device']}; torch "
        f"{record['versions']['torch']}; `{record['command']}`.",
        "",
    ]
    return "\n".join(lines)


def real_rows(result: dict[str, Any]) -> str:
    """Scoring and training on rows of many lengths, and the ratios with their goals."""
    lines = [
        "| rows | scored by | median s | min | max | tokens computed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, item in result["results"]["scoring"].items():
        for label, row in item["rows"].items():
            times = [figure(row[key]) for key in ("median_s", "min_s", "max_s")]
            cells = [kind, label, *times, f"{row['num_computed_tokens']:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| rows | trained by | tokens of rows/s | min | max | real % | peak over weights, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, item in result["results"]["training"].items():
        for label, row in item["rows"].items():
            if "error" in row:
                lines.append(f"| {kind} | {label} | failed | | | | |")
                continue
            speeds = [row["num_real_tokens"] / row[f"{key}_s"] for key in ("median", "max", "min")]
            cells = [kind, label, *map(figure, speeds), f"{100 * row['real_share']:.1f}"]
            lines.append(f"| {' | '.join(cells)} | {mebibytes(row['peak_over_weights_bytes'])} |")
    lines += ["", "| ratio of medians | value | goal |", "| --- | ---: | ---: |"]
    for name, value in result["ratios"].items():
        goal = result["goals"].get(name)
        bound = "below" if "_peak_" in name else "at least"
        wanted = "" if goal is None else f"{bound} {goal['goal']:g}"
        lines.append(f"| {name} | {value:.3g} | {wanted} |")
    record = result["environment"]
    origin = f"{record['device']}; torch {record['versions']['torch']}; `{record['command']}`."
    return "\n".join([*lines, "", origin, ""])


def defaults(result: list[dict[str, Any]]) -> str:
    """What comes without options beside the best of a search, a row per base, set and method."""
    lines = [
        "| base | set | method | as it comes | best of the search | which | tried |",
        "|:--|:--|:--|--:|--:|:--|--:|",
    ]
    for row in result:
        own, best = row["as_it_comes"], row["searched"]
        cells = [_percent(each["mean"], _deviation(each["values"])) for each in (own, best)]
        which = "the same" if best["entry"] == own["entry"] else f"`{best['entry']}`"
        named = [row["model"], row["set"], row["method"]]
        lines.append(f"| {' | '.join([*named, *cells, which, str(len(row['trials']))])} |")
    return "\n".join([*lines, "", _origin([{**result[0]["as_it_comes"], **result[0]}]), ""])


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


TABLES: dict[str, Callable[[Any], str]] = {
    "embedded": comparison,
    "trec": comparison,
    "trec_one_token": comparison,
    "trec2500": comparison,
    "ten_methods": tasks,
    "trec_frontier": comparison,
    "sst2": comparison,
    "sst2_frontier": comparison,
    "layers_positions": grid,
    "tasks": tasks,
    "real_smollm2": against_reference,
    "real_minilm": against_reference,
    "real_minilm_sst2": against_reference,
    "defaults": defaults,
    "methods": comparison,
    "step": timings,
    "generate": timings,
    "orthonormal": timings,
    "memory": memory,
    "reuse": reuse,
    "larger_than_memory": larger_than_memory,
    "real_rows": real_rows,
}


def render(page: str) -> str:
    """Return the page with every table filled from its result."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[name](result)}{match[3]}"

    return BLOCK.sub(fill, page)


def main() -> int:
    """Write or check the pages; the exit code is 1 if one is out of date."""
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        rendered = render(page)
        if rendered == page:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv[1:]:
            path.write_text(rendered, encoding="utf-8")
    if "--check" in sys.argv[1:] and stale:
        print(f"{', '.join(stale)} out of date; run python -m benchmarks.tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
