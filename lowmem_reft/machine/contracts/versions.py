"""Compares installed versions with the tested ones, and runs contracts where they differ."""

from __future__ import annotations

import functools
import sys
import warnings
from importlib import metadata
from typing import NamedTuple

from lowmem_reft.errors import InputError, is_out_of_memory
from lowmem_reft.machine.contracts import adapters, libraries, models
from lowmem_reft.machine.contracts.contract import Contract, apart

DISTRIBUTION = "lowmem-reft"

CONTRACTS = tuple(
    each
    for module in (models, adapters, libraries)
    for each in vars(module).values()
    if isinstance(each, Contract)
)
"""All that is checked at run time."""


class Untested(NamedTuple):
    """A distribution whose version was not tested; ``tested`` as pip takes it: ``>=5.17,<5.25``."""

    name: str
    tested: str
    installed: str


def check_versions(extra: str | None = None) -> None:
    """Check that the installed libraries are those that the package was tested with; once each.

    Args:
        extra: An optional part of the package, whose libraries are checked instead of those that
            it always needs: ``eval``, ``ray``. (TRL is checked once it has been imported.)

    Raises:
        InputError: A version was not tested, and something that is relied on does not hold with it.
    """
    _check(extra)
    if extra is None and "trl" in sys.modules:
        _check("trl")


@functools.cache
def _check(extra: str | None) -> None:
    untested = find_untested(extra)
    if not untested:
        return
    found = ", ".join(f"{each.name} {each.installed}" for each in untested)
    ranges = ", ".join(each.name + each.tested for each in untested)
    warnings.warn(
        f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)} was tested with {ranges} and not with "
        f"{found}; what it relies on is checked now",
        stacklevel=3,
    )
    for contract in CONTRACTS:
        concerned = [each for each in untested if each.name in contract.libraries]
        if concerned:
            _hold(contract, concerned)


def find_untested(extra: str | None = None) -> list[Untested]:
    """Return the installed libraries, of those that contracts name, whose version was not tested.

    ``extra`` is as in `check_versions`.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    known = {canonicalize_name(name): name for each in CONTRACTS for name in each.libraries}
    untested: list[Untested] = []
    for line in _requirements():
        requirement = Requirement(line)
        name, marker = known.get(canonicalize_name(requirement.name)), requirement.marker
        is_always = marker is None or marker.evaluate({"extra": ""})
        is_asked_for = marker is not None and marker.evaluate({"extra": extra or ""})
        if name is None or not (is_always if extra is None else is_asked_for and not is_always):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            bounds = sorted(map(str, requirement.specifier), reverse=True)  # the lower one first
            untested.append(Untested(name, ",".join(bounds), installed))
    return untested


def _requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return []


def _hold(contract: Contract, untested: list[Untested]) -> None:
    """Run a contract; refuse the versions, and name them, if it does not hold."""
    try:
        with apart():
            contract.check()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        names, ranges, versions = (" and ".join(each) for each in zip(*untested, strict=True))
        first_line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{names} must be {ranges} for {DISTRIBUTION} {metadata.version(DISTRIBUTION)}, got "
            f"{versions}, with which this does not hold: {contract.sentence} "
            f"({type(error).__name__}: {first_line}); pip install "
            + " ".join(f"'{each.name}{each.tested}'" for each in untested)
        ) from error
