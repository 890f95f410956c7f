"""Rows become tokens; the public tasks are rows too. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_reft.machine.lazy import names_on_use

if TYPE_CHECKING:
    from lowmem_reft.data.rows import (
        Row,
        as_choices,
        as_records,
        class_index,
        holdout,
        label_names,
        load_rows,
        rows_digest,
        write_rows,
    )
    from lowmem_reft.data.tokens import (
        Collator,
        EncodedRows,
        encode_all_choices,
        encode_choices,
        encode_labelled,
        encode_prompts,
        encode_rows,
        encode_texts,
    )
    from lowmem_reft.data.turns import split_turns

__all__ = [
    "IGNORED_LABEL",
    "Collator",
    "EncodedRows",
    "Row",
    "as_choices",
    "as_records",
    "class_index",
    "encode_all_choices",
    "encode_choices",
    "encode_labelled",
    "encode_prompts",
    "encode_rows",
    "encode_texts",
    "holdout",
    "label_names",
    "load_rows",
    "rows_digest",
    "split_turns",
    "write_rows",
]

IGNORED_LABEL = -100
"""Label of a token that is not supervised (the default of torch's cross-entropy)."""

_ROWS = {
    "Row",
    "as_choices",
    "as_records",
    "class_index",
    "holdout",
    "label_names",
    "load_rows",
    "rows_digest",
    "write_rows",
}
__getattr__, __dir__ = names_on_use(
    __name__,
    {
        "rows": _ROWS,
        "turns": {"split_turns"},
        "tokens": {*__all__} - _ROWS - {"IGNORED_LABEL", "split_turns"},
    },
)
