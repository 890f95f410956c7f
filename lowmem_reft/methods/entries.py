"""Entries of ``--methods``: a method of the table with overrides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lowmem_reft.errors import InputError
from lowmem_reft.methods.table import (
    BLOCKS,
    DEFAULT_RANK,
    METHODS,
    all_options,
    check_options,
    check_storage,
    find_method,
    given_options,
)
from lowmem_reft.options import MethodOptions, OptimOptions, Storage, written

_OWN, _OPTIM = written.types(MethodOptions), written.types(OptimOptions)
del _OWN["method"]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method with overrides, as one entry of ``--methods``."""

    label: str
    """What its rows are called: the entry, unless its learning rate was searched for."""
    entry: str
    """As it is written in ``--methods``."""
    name: str
    """Key of ``METHODS``."""
    storage: Storage
    """How the base is stored."""
    options: MethodOptions
    """The method's own options."""
    optim_overrides: dict[str, Any]
    """Fields of ``OptimOptions`` that this entry overrides."""
    equal: Literal["params"] | None = None
    """Of which the entry is to have as many as the reference of a comparison has."""


def expand_methods(text: str, *, embedded: bool) -> str:
    """Return what ``--methods`` was given with ``all`` as every method of the table.

    On the ``embedded`` base, the tiny model that the package ships, names without overrides (but
    ``equal``) get those that suit it.
    """
    entries = list(METHODS) if text.strip() == "all" else _entries(text)
    return ",".join(map(_suited, entries) if embedded else entries)


def _suited(entry: str) -> str:
    name, bracket, rest = entry.partition("[")
    suiting = METHODS[name].embedded if name in METHODS else ""
    if not suiting or (bracket and rest != "equal=params]"):
        return entry
    return f"{name}[{suiting}{',' + rest if bracket else ']'}"


def write_entry(name: str, overrides: Mapping[str, Any]) -> str:
    """Return the entry of ``--methods`` for a method with overrides."""
    written_as = ",".join(f"{key}={value}" for key, value in overrides.items())
    return f"{name}[{written_as}]" if overrides else name


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in re.split(r",(?![^\[]*\])", text) if entry.strip()]


def with_overrides(spec: MethodSpec, overrides: Mapping[str, Any]) -> MethodSpec:
    """Return a method with further overrides, and the entry of ``--methods`` that says so."""
    (found,) = parse_methods(_more(spec, overrides))
    return found


def with_searched_rate(spec: MethodSpec, rate: float) -> MethodSpec:
    """Return a method with a rate that was searched; its rows are called the same whatever it is.

    On another task it may be another one.
    """
    return replace(with_overrides(spec, {"lr": rate}), label=_more(spec, {"lr": "searched"}))


def _more(spec: MethodSpec, overrides: Mapping[str, Any]) -> str:
    """Write the entry of a method with further overrides."""
    items = {**given_options(spec.options), **spec.optim_overrides, **overrides}
    if spec.storage != find_method(spec.name).storage:
        items["storage"] = spec.storage
    return write_entry(spec.name, items)


def parse_methods(text: str, *, with_equal: bool = False) -> list[MethodSpec]:
    """Parse ``"loreft[rank=8,positions=f7+l7],qlora[lr=1e-3]"``.

    Overrides are fields of ``MethodOptions`` (``r`` is short for ``rank``) or ``OptimOptions``, or
    ``storage``; and, for those who know a reference (``with_equal``), ``equal=params``.

    Raises:
        InputError: Unknown method or override, a value of the wrong type, or two equal entries.
    """
    entries = _entries(text)
    if not entries:
        raise InputError(
            f"methods must name at least one method, got {text!r}; for example loreft,qlora"
        )
    repeated = {entry for entry in entries if entries.count(entry) > 1}
    if repeated:
        raise InputError(f"methods must be different, got {', '.join(repeated)} twice; drop one")
    return [_parse_method(entry, with_equal) for entry in entries]


def _parse_method(entry: str, with_equal: bool) -> MethodSpec:
    match = re.fullmatch(r"(?P<name>[^\[\]]+)(?:\[(?P<overrides>[^\[\]]*)\])?", entry)
    if match is None:
        raise InputError(
            f"methods must look like name or name[key=value,...], got {entry!r}; mend it"
        )
    method = find_method(match["name"])
    own: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    storage: Any = method.storage
    equal: Literal["params"] | None = None
    for item in filter(None, (part.strip() for part in (match["overrides"] or "").split(","))):
        key, equals, value = item.partition("=")
        key = {"r": "rank"}.get(key.strip(), key.strip().replace("-", "_"))
        if equals and key == "storage":
            storage = value.strip()
            if storage not in get_args(Storage):
                raise InputError(
                    f"storage in {entry!r} must be one of {', '.join(get_args(Storage))}, got "
                    f"{storage!r}; mend it"
                )
        elif equals and key in _OWN:
            own[key] = _convert(_OWN[key], key, value.strip(), entry)
        elif equals and key in _OPTIM:
            optim[key] = _convert(_OPTIM[key], key, value.strip(), entry)
        elif with_equal and (key, value.strip()) == ("equal", "params"):
            equal = "params"
        else:
            known = sorted({*_OWN, *_OPTIM, "storage", *(["equal=params"] if with_equal else [])})
            raise InputError(
                f"overrides of {entry!r} must be among {', '.join(known)}, got {item!r}; mend it"
            )
    try:
        OptimOptions(**optim)
    except InputError as error:
        raise InputError(f"{entry!r} of methods: {error}") from error
    options = written.build(MethodOptions, method=match["name"], **own)
    check_options(options)
    check_storage(match["name"], storage)
    return MethodSpec(
        label=entry,
        entry=entry,
        name=match["name"],
        storage=storage,
        options=options,
        optim_overrides=optim,
        equal=equal,
    )


def _convert(kind: Any, key: str, value: str, entry: str) -> Any:
    kinds = getattr(kind, "__args__", (kind,))
    for target in (int, float):
        if target in kinds:
            try:
                return target(value)
            except ValueError:
                wanted = "a whole number" if target is int else "a number"
                raise InputError(
                    f"{key} in {entry!r} must be {wanted}, got {value!r}; mend it"
                ) from None
    return value


def resolve_learning_rate(
    options: MethodOptions,
    optim: OptimOptions,
    hidden_size: Callable[[], int],
    num_layers: Callable[[], int] | None = None,
) -> OptimOptions:
    """Fill in the method's own learning rate where none is given; only then the base is asked.

    Args:
        options: Of the method, on its base: see ``table.for_base``.
        optim: With a learning rate, or without.
        hidden_size: Returns the width of the base.
        num_layers: Returns its blocks; None: as if ``table.BLOCKS`` were edited.
    """
    if optim.lr is not None:
        return optim
    from lowmem_reft.reft.config import resolve_layers  # of torch, which a list of methods is not

    method, given = find_method(options.method), all_options(options)
    blocks = BLOCKS
    if method.lr_by_blocks and num_layers is not None:
        blocks = len(resolve_layers(given.get("layers") or "all", num_layers()))
    rate = method.rate(hidden_size(), given.get("rank", DEFAULT_RANK), blocks)
    return replace(optim, lr=rate)
