"""``lowmem-reft data``: rows as the tokens that training takes, and figures of all of them.

What is shown comes from the functions of training: ``data.tokens`` cuts and labels, and
``reft.positions`` says which tokens are edited.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lowmem_reft.base.hub import load_config, num_blocks
from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.mixture import read_mixture
from lowmem_reft.data.rows import as_choices, label_names
from lowmem_reft.data.texts import described, unused_arguments
from lowmem_reft.data.tokens import encode_labelled, encode_rows
from lowmem_reft.data.turns import of_turns
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import merge_card, with_template
from lowmem_reft.methods.table import all_options, for_base
from lowmem_reft.options import MethodOptions, ModelOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.runs.marked import end_ids_of, legend, marked, parts_of, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lowmem_reft.data.rows import Row
    from lowmem_reft.data.tokens import EncodedRows
    from lowmem_reft.options import ShowOptions

    Encode = Callable[[Sequence[Row], int], EncodedRows]

NAMED_ROWS = 5
"""Of rows that do not fit or hold unknown tokens so many are named."""

_MOST_CHARACTERS = 2000
"""Of a row that is printed, its beginning and its end together."""

_WHOLE = 2**31
"""A max_length that cuts nothing."""


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A row, tokenized whole and as it is trained."""

    row: Row
    whole: dict[str, Any]
    trained: dict[str, Any] | None
    """None: it does not fit."""


def run_show(options: ShowOptions) -> dict[str, Any]:
    """Print rows as tokens, and figures.

    Returns:
        ``num_rows``, ``kind`` and ``columns`` as they were read, ``ignored_columns``,
        ``unused_template_arguments``, ``lengths`` in tokens (min, median, p95 and max of prompt,
        response and whole, before anything is cut), ``num_cut_rows`` and ``num_cut_tokens``,
        ``num_too_long`` rows that do not fit with the longest of them in ``too_long``,
        ``num_with_unknown_tokens`` with the first in ``with_unknown_tokens``, ``num_with_end`` and
        ``end_tokens``; and ``rows`` (``source``, ``tokens``, ``ids``, and the indices of those that
        are ``prompt``, ``edited``, ``supervised`` and ``end``; ``label`` with a classification or
        regression head).

    Raises:
        InputError: An option, the file, a row or the model is wrong.
    """
    data = options.data
    model = ModelOptions(model=options.model, task_type=options.task_type)
    card = merge_card(
        None,
        model,
        template=data.template,
        max_length=data.max_length,
        raw=options.prompts.raw,
        joint=options.prompts.joint,
    )
    read = read_mixture(data.data, split=data.split, limit=data.limit)
    config = load_config(options.model)
    method = for_base(
        MethodOptions(positions=options.positions),
        task_type=options.task_type,
        num_layers=lambda: num_blocks(config),
    )
    positions = all_options(method)["positions"]
    edit = ReftConfig(task_type=options.task_type, positions=positions)
    tokenizer = load_tokenizer(options.model, config=config)
    card = with_template(card, tokenizer)
    names = label_names(read.rows) if read.rows[0].kind == "label" else None
    rows = of_turns(read.rows, options.prompts.turns)
    if card.task_type != "SEQ_CLS":
        rows = as_choices(rows, names)

    def encode(rows: Sequence[Row], max_length: int) -> EncodedRows:
        if card.task_type == "SEQ_CLS":
            return encode_labelled(rows, tokenizer, max_length=max_length, label_names=names)
        return encode_rows(rows, tokenizer, **{**card.prompts, "max_length": max_length})

    seen = _seen(rows, encode, card.max_length, cut=options.prompts.long_rows == "cut")
    end_ids = end_ids_of(tokenizer, config)
    result = {
        "data": data.data,
        "model": options.model,
        "num_rows": len(rows),
        "kind": read.rows[0].kind,
        "columns": list(read.columns),
        "ignored_columns": list(read.ignored),
        "unused_template_arguments": unused_arguments(rows, tokenizer),
        "template": None if rows[0].kind in ("messages", "label", "target") else card.template,
        "asked": described(card.template, rows) if card.task_type != "SEQ_CLS" else None,
        "max_length": card.max_length,
        "positions": positions,
        **_figures(seen, tokenizer, end_ids),
        "rows": [_shown(each, tokenizer, edit, end_ids) for each in seen[: options.num]],
    }
    if not options.json:
        _print(result, quiet=options.quiet)
    return result


def _seen(rows: Sequence[Row], encode: Encode, max_length: int, *, cut: bool) -> list[_Seen]:
    """Tokenize rows whole, and those that are too long as training does."""
    seen = []
    for row, whole in zip(rows, encode(rows, _WHOLE).examples, strict=True):
        trained: dict[str, Any] | None = whole
        if len(whole["input_ids"]) > max_length:
            trained = None
            # What is refused does not fit: all else was found before.
            with contextlib.suppress(InputError):
                trained = encode([row], max_length).examples[0] if cut else None
        seen.append(_Seen(row=row, whole=whole, trained=trained))
    return seen


def _figures(seen: Sequence[_Seen], tokenizer: Any, end_ids: set[int]) -> dict[str, Any]:
    parts: dict[str, list[int]] = {"prompt": [], "response": [], "whole": []}
    too_long: list[tuple[int, str]] = []
    unknown, cuts, num_with_end = [], [], 0
    special = end_ids | {tokenizer.bos_token_id}
    for each in seen:
        ids, labels = each.whole["input_ids"], each.whole["labels"]
        parts["whole"].append(len(ids))
        if isinstance(labels, list):
            parts["prompt"].append(labels.count(IGNORED_LABEL))
            parts["response"].append(len(ids) - labels.count(IGNORED_LABEL))
            num_with_end += labels[-1] in end_ids
        if each.trained is None:
            too_long.append((len(ids), each.row.source))
        elif each.trained is not each.whole:
            cuts.append(len(ids) - len(each.trained["input_ids"]))
        # Some tokenizers have one token for all that is special.
        if tokenizer.unk_token_id in set(ids) - special:
            unknown.append(each.row.source)
    end_tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(end_ids))]
    return {
        "lengths": {name: _spread(sizes) for name, sizes in parts.items() if sizes},
        "num_cut_rows": len(cuts),
        "num_cut_tokens": sum(cuts),
        "num_too_long": len(too_long),
        "too_long": [
            {"source": source, "num_tokens": size}
            for size, source in sorted(too_long, reverse=True)[:NAMED_ROWS]
        ],
        "num_with_unknown_tokens": len(unknown),
        "with_unknown_tokens": unknown[:NAMED_ROWS],
        "num_with_end": num_with_end if parts["response"] else None,
        "end_tokens": end_tokens,
    }


def _spread(sizes: list[int]) -> dict[str, int]:
    ordered = sorted(sizes)
    return {
        "min": ordered[0],
        "median": statistics.median_low(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }


def _shown(each: _Seen, tokenizer: Any, edit: ReftConfig, end_ids: set[int]) -> dict[str, Any]:
    """One row's tokens, and which of them are what; as far as it goes if it does not fit."""
    parts = parts_of(each.row, each.trained or each.whole, tokenizer, edit, end_ids)
    return {**parts, "fits": each.trained is not None}


def _print(result: dict[str, Any], *, quiet: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if not quiet:
        about = "(| between tokens, · space, ↵ new line)"
        console.print(Text("tokens: prompt  ").append(legend()).append(about))
        for row in result["rows"]:
            head = f"\n{row['source']}{'' if row['fits'] else ' (does not fit)'}\n"
            console.print(Text(head).append(shortened(marked(row), _MOST_CHARACTERS)))
        console.print()
    spreads = [Column(name, justify="right") for name in ("min", "median", "p95", "max")]
    table = Table("tokens", *spreads, box=None, pad_edge=False)
    for name, spread in result["lengths"].items():
        table.add_row(name, *(f"{size:,}" for size in spread.values()))
    console.print(table)
    for line in _said(result):
        console.print(line, markup=False)


def _said(result: dict[str, Any]) -> list[str]:
    """The figures besides the lengths, a line each."""
    number, limit = result["num_rows"], result["max_length"]
    lines = [f"{number:,} rows of kind {result['kind']}, read from {', '.join(result['columns'])}"]
    for name in ("ignored_columns", "unused_template_arguments"):
        if result[name]:
            lines.append(f"{name.replace('_', ' ')}: {', '.join(result[name])}")
    if result["asked"]:
        lines.append(result["asked"])
    lines.append(
        f"cut to max_length {limit}: {result['num_cut_rows']:,} rows, by "
        f"{result['num_cut_tokens']:,} tokens in all"
    )
    longest = [f"{row['source']} ({row['num_tokens']:,} tokens)" for row in result["too_long"]]
    for what, count, places in (
        ("do not fit", result["num_too_long"], longest),
        ("have unknown tokens", result["num_with_unknown_tokens"], result["with_unknown_tokens"]),
    ):
        named = f": {', '.join(places)}{', ...' if count > len(places) else ''}" if places else ""
        lines.append(f"{count:,} rows {what}{named}")
    if result["num_with_end"] is not None:
        ends = " or ".join(result["end_tokens"])
        lines.append(f"{result['num_with_end']:,} of {number:,} responses end with {ends}")
    return [_printable(line) for line in lines]


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
