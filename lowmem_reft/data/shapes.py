"""The rows in one JSON object that holds them all.

Read are a list under any name (``{"data": [...]}``), lists for several splits, and what pandas
writes: a column or a row under each key, or the names of the columns and the cells apart.
"""

from __future__ import annotations

import warnings
from typing import Any

from lowmem_reft.data.columns import CHATS, NAMES
from lowmem_reft.errors import InputError


def rows_in(whole: dict[str, Any], split: str, where: str) -> list[Any] | None:
    """Return the rows in an object; None if it is itself a row.

    Args:
        whole: The object that is all of a file.
        split: Which list to take where there are several.
        where: The file, for messages of errors.

    Raises:
        InputError: It holds several lists and none of the split's name, or columns that are not
            equally long.
    """
    if whole.keys() >= {"columns", "data"}:
        return _of_cells(whole["columns"], whole["data"], where)
    if NAMES & whole.keys():
        return _of_columns(whole, where)
    if whole and all(isinstance(row, dict) and NAMES & row.keys() for row in whole.values()):
        return list(whole.values())  # a row under each key
    lists = [name for name, value in whole.items() if _is_rows(value)]
    if not lists:
        return None
    chosen = split if split in lists else lists[0]
    if len(lists) > 1 and chosen != split:
        raise InputError(
            f"{where}: must hold one list of rows or one of the split {split!r}, got the lists "
            f"{', '.join(lists)}; name one of them as the split"
        )
    others = [name for name in whole if name != chosen]
    if others:
        warnings.warn(
            f"{where}: rows are those of {chosen!r}; what stands beside it is ignored: "
            f"{', '.join(others)}",
            stacklevel=2,
        )
    return list(whole[chosen])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and _holds(dict, value)


def _of_cells(names: Any, cells: Any, where: str) -> list[Any]:
    if not isinstance(names, list) or not isinstance(cells, list):
        return [{"columns": names, "data": cells}]
    if not all(isinstance(row, list) and len(row) == len(names) for row in cells):
        raise InputError(
            f"{where}: data must be a list of lists with a cell for each of the {len(names)} "
            "columns, got another length; correct the file"
        )
    return [dict(zip(names, row, strict=True)) for row in cells]


def _of_columns(whole: dict[str, Any], where: str) -> list[Any] | None:
    """Rows of columns that are objects by row, or lists; a list of messages is no column."""
    columns = list(whole.values())
    if all(isinstance(column, dict) for column in columns):
        keys = list(columns[0])
        different = any(list(column) != keys for column in columns)
        cells = [list(column.values()) for column in columns]
    elif all(isinstance(column, list) for column in columns):
        chats = [whole[name] for name in (*CHATS, "prompt") if name in whole]
        if any(not _holds(list, column) for column in chats if not _holds(str, column)):
            return None
        different = len({len(column) for column in columns}) > 1
        cells = columns
    else:
        return None
    if different:
        raise InputError(
            f"{where}: columns must have the same rows, got others in one of "
            f"{', '.join(map(str, whole))}; correct the file"
        )
    return [dict(zip(whole, row, strict=True)) for row in zip(*cells, strict=True)]


def _holds(kind: type, column: list[Any]) -> bool:
    return bool(column) and all(isinstance(cell, kind) for cell in column)
