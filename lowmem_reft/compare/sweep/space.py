"""What a sweep varies: ``"rank=4,8,16 lr=1e-3..1e-2:log positions=f7+l7,all qlora.lr=1e-4..1e-3"``.

Names are those of the overrides of ``--methods``, separated by blanks. After the equals sign comes
a list with commas, or a range ``low..high``, ``low..high:log`` or ``low..high:step``. A name is
searched for every method that takes it; ``method.name`` is for one method and goes before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.methods.entries import MethodSpec, parse_methods
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import OptimOptions, written


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One of several values."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two, both included."""

    name: str
    low: float
    high: float
    step: float | None
    log: bool
    whole: bool
    """Whether only whole numbers are meant."""


Space = tuple[Choices | Range, ...]


def parse_space(text: str, methods: Sequence[MethodSpec]) -> list[Space]:
    """Parse what is varied, for each method what it takes.

    Raises:
        InputError: A word is malformed, a name or value is not the methods', a name is there twice
            or fixed by a method, or nothing is left to vary.
    """
    words: dict[tuple[str | None, str], str] = {}
    for word in text.split():
        match = re.fullmatch(r"(?:(?P<method>\w+)\.)?(?P<name>[\w-]+)=(?P<values>\S+)", word)
        if match is None:
            raise InputError(
                f"space must be words like rank=4,8 or lr=1e-3..1e-2:log, got {word!r}; mend it"
            )
        name = match["name"].replace("-", "_")
        key = (match["method"], "rank" if name == "r" else name)
        if key in words:
            raise InputError(f"space must name an option once, got {name} twice; drop one")
        words[key] = match["values"]
    if not words:
        raise InputError(
            f"space must name at least one option, got {text!r}; for example rank=4,8,16"
        )
    _check_names(words, methods)
    return [_space_of(method, words) for method in methods]


def size(space: Space) -> int | None:
    """How many settings there are; None: with ranges, too many to count."""
    lists = [part for part in space if isinstance(part, Choices)]
    return math.prod(len(part.values) for part in lists) if len(lists) == len(space) else None


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Every setting of a space without ranges; the last name varies fastest."""
    lists = [part for part in space if isinstance(part, Choices)]
    for values in product(*(part.values for part in lists)):
        yield {part.name: value for part, value in zip(lists, values, strict=True)}


def with_settings(entry: str, settings: dict[str, str]) -> str:
    """An entry of ``--methods`` with more overrides."""
    name, _, fixed = entry.rstrip("]").partition("[")
    given = [f"{key}={value}" for key, value in settings.items()]
    return f"{name}[{','.join([*filter(None, [fixed]), *given])}]"


def as_text(value: Any) -> str:
    """A drawn value as it is written, and trained: numbers to three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _check_names(words: dict[tuple[str | None, str], str], methods: Sequence[MethodSpec]) -> None:
    known = {method.name for method in methods}
    for method, name in words:
        if method is not None and method not in known:
            raise InputError(
                f"space must name methods among {', '.join(sorted(known))}, got {method!r}; "
                "correct it, or add it to --methods"
            )
        among = [method] if method else known
        if not any(name in _taken(candidate) for candidate in among):
            taken = sorted({option for one in among for option in _taken(one)})
            raise InputError(
                f"space must name options that {', '.join(sorted(among))} can have, got {name!r}; "
                f"choose among {', '.join(taken)}"
            )


def _taken(method: str) -> set[str]:
    return {*find_method(method).options, *written.types(OptimOptions), "storage"}


def _space_of(method: MethodSpec, words: dict[tuple[str | None, str], str]) -> Space:
    names = dict.fromkeys(name for own, name in words if own in (None, method.name))
    space = tuple(
        _part(method, name, words.get((method.name, name)) or words[None, name])
        for name in names
        if name in _taken(method.name)
    )
    if not space:
        raise InputError(
            f"space must name an option of each method, got none of {method.label!r}; add one, or "
            "leave the method out"
        )
    return space


def _part(method: MethodSpec, name: str, text: str) -> Choices | Range:
    fixed = re.findall(r"(\w+)\s*=", method.label.replace("-", "_"))
    if name in ["rank" if key == "r" else key for key in fixed]:
        raise InputError(
            f"space must not name {name}, which {method.label!r} fixes; leave out one of the two"
        )
    match = re.fullmatch(r"(?P<low>[^,:]+)\.\.(?P<high>[^,:]+)(?::(?P<how>.+))?", text)
    if match is not None:
        return _range(method, name, text, match)
    values = tuple(text.split(","))
    if not all(values) or len(set(values)) < len(values):
        raise InputError(f"space must list different values, got {name}={text!r}; mend the list")
    for value in values:
        _check_value(method, name, value)
    return Choices(name=name, values=values)


def _range(method: MethodSpec, name: str, text: str, match: re.Match[str]) -> Range:
    low = _check_value(method, name, match["low"])
    if isinstance(low, str):
        raise InputError(
            f"space must list the values of {name}, which are no numbers, got {text!r}; "
            "separate them by commas"
        )
    high = _check_value(method, name, match["high"])
    if not low < high:
        raise InputError(
            f"space must have ranges that rise, got {name}={text!r}; the smaller number goes first"
        )
    log, step = match["how"] == "log", Decimal(0)
    if log and low <= 0:
        raise InputError(f"space must have logarithms above 0, got {name}={text!r}; raise {low}")
    if match["how"] and not log:
        step = _step(match["how"])
        # Decimals, because 0.3 is no whole number of binary 0.05s.
        if not step or (Decimal(match["high"]) - Decimal(match["low"])) % step:
            raise InputError(
                f"space must have ranges of whole steps, got {name}={text!r}; write low..high:step "
                "or low..high:log"
            )
    whole = isinstance(low, int)
    if whole and step % 1:
        raise InputError(f"space must have whole steps for {name}, got {text!r}; change the step")
    return Range(name=name, low=low, high=high, step=float(step) or None, log=log, whole=whole)


def _step(text: str) -> Decimal:
    try:
        return max(Decimal(0), Decimal(text))
    except InvalidOperation:
        return Decimal(0)


def _check_value(method: MethodSpec, name: str, value: str) -> Any:
    """The value as the method takes it; refused here, not in the middle of the search."""
    try:
        return _value_of(method, name, value)
    except InputError as error:
        raise InputError(
            f"space must have values that {method.name} takes, got {name}={value!r}: {error}"
        ) from error


def _value_of(method: MethodSpec, name: str, value: str) -> Any:
    [spec] = parse_methods(with_settings(method.label, {name: value}))
    if name == "storage":
        return value
    if name in spec.optim_overrides:
        OptimOptions(**{name: spec.optim_overrides[name]})
        return spec.optim_overrides[name]
    build_peft_config(spec.options, task_type="CAUSAL_LM", num_layers=None)
    return written.values(spec.options)[name]
