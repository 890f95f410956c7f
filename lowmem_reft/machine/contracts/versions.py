"""Compares installed versions with the tested ones, and runs contracts where they differ."""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata

from lowmem_reft.errors import InputError, is_out_of_memory
from lowmem_reft.machine.contracts import adapters, libraries, models
from lowmem_reft.machine.contracts.contract import Contract, apart

DISTRIBUTION = "lowmem-reft"

CONTRACTS: tuple[Contract, ...] = (
    *models.CONTRACTS,
    *adapters.CONTRACTS,
    *libraries.CONTRACTS,
)
"""All that is checked at run time."""


@dataclass(frozen=True, kw_only=True)
class Untested:
    """A library whose installed version was not tested."""

    name: str
    """Of its distribution."""
    installed: str
    """Its version."""
    tested: str
    """The range, as pip takes it: ``>=5.17,<5.25``."""


def check_versions(extra: str | None = None) -> None:
    """Check that the installed libraries are those that the package was tested with; once each.

    Args:
        extra: An optional part of the package, whose libraries are checked instead of those that
            it always needs: ``eval``, ``ray``. (TRL is checked once it has been imported.)

    Raises:
        InputError: a version was not tested, and something that is relied on does not hold with it.
    """
    _check(extra)
    if extra is None and "trl" in sys.modules:
        _check("trl")


@functools.cache
def _check(extra: str | None) -> None:
    untested = {library.name: library for library in find_untested(extra)}
    if not untested:
        return
    found = ", ".join(f"{each.name} {each.installed}" for each in untested.values())
    ranges = ", ".join(each.name + each.tested for each in untested.values())
    warnings.warn(
        f"{DISTRIBUTION} {_own_version()} was tested with {ranges} and not with {found}; what it "
        "relies on is checked now",
        stacklevel=3,
    )
    for contract in CONTRACTS:
        concerned = [untested[name] for name in contract.libraries if name in untested]
        if concerned:
            _hold(contract, concerned)


def find_untested(extra: str | None = None) -> list[Untested]:
    """Return the installed libraries, of those that contracts name, whose version was not tested.

    Args:
        extra: As in `check_versions`.
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
            untested.append(Untested(name=name, installed=installed, tested=",".join(bounds)))
    return untested


def _requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return []


def _own_version() -> str:
    return metadata.version(DISTRIBUTION)


def _hold(contract: Contract, untested: list[Untested]) -> None:
    """Run a contract.

    Raises:
        InputError: it does not hold; the message names the versions.
    """
    try:
        with apart():
            contract.check()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{' and '.join(each.name for each in untested)} must be "
            f"{' and '.join(each.tested for each in untested)} for {DISTRIBUTION} "
            f"{_own_version()}, got {' and '.join(each.installed for each in untested)}, with "
            f"which this does not hold: {contract.sentence} ({type(error).__name__}: "
            f"{first_line}); pip install "
            + " ".join(f"'{each.name}{each.tested}'" for each in untested)
        ) from error
