"""``lowmem-reft methods``: what methods there are, their options and defaults. No torch here."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_reft.methods.table import BLOCKS, DEEP, METHODS, PROFILES, RANK, WIDTH, Method
from lowmem_reft.options import MethodsOptions

_NOT_LISTED = {item.name for item in fields(Method) if isinstance(item.default, bool)}
"""What a method cannot do is said where somebody asks for it."""


def run_methods(options: MethodsOptions) -> dict[str, Any]:
    """List the methods; print them on standard output unless they are wanted as JSON.

    Returns:
        ``methods``: for each ``name`` and the fields of the table's entry: ``family``, ``about``,
        ``source``, ``storage``, ``lr`` (with ``lr_by_width``, ``lr_by_rank`` and ``lr_by_blocks``:
        see ``Method.rate``), ``options`` (those it takes), ``size`` (the one that sets its number
        of parameters), ``defaults`` and ``fixed`` (of its configuration), ``deep`` (where a deep
        base is edited: see ``table.for_base``), ``embedded`` (overrides for the tiny model that the
        package ships); ``profiles``: what each stands for.
    """
    methods = [
        {"name": name, **{key: v for key, v in asdict(method).items() if key not in _NOT_LISTED}}
        for name, method in METHODS.items()
    ]
    if not options.json:
        _print(methods)
    return {"methods": methods, "profiles": PROFILES}


def _print(methods: list[dict[str, Any]]) -> None:
    table = Table("method", "base", "lr", "what is trained", "options", "source", box=None)
    table.columns[0].no_wrap, table.columns[2].justify = True, "right"
    table.columns[0].min_width = max(len(method["name"]) for method in methods)
    for method in methods:
        table.add_row(
            method["name"],
            method["storage"],
            f"{method['lr']:g}",
            method["about"],
            ", ".join(method["options"]) or "-",
            method["source"],
        )
    console = Console(soft_wrap=True)
    console.print(table, markup=False)
    console.print(
        f"lr: on a base of hidden size {WIDTH}, at rank {RANK} in {BLOCKS} blocks; on others it "
        "follows these"
    )
    alike = [method["name"] for method in methods if method["deep"]]
    place = " and ".join(f"{name} {value}" for name, value in METHODS[alike[0]].deep.items())
    console.print(
        f"{', '.join(alike)}: all of the prompt in all blocks, but on a causal language model of "
        f"{DEEP} blocks or more, where neither is given, {place}"
    )
