"""What the package relies on inside young libraries, checked where a version of them is untested.

The tested versions are the bounds in the package's own metadata. Inside of them nothing is run. A
version outside, which somebody has forced, is said in one line, and what would otherwise go wrong
without a word is tried out: each ``Contract`` is a probe of a few milliseconds on a tiny model.
All other assumptions are probed in ``tests/contracts``, which runs these as well.

Importing this package loads no torch; neither does a check that finds all versions tested.
"""

from lowmem_reft.machine.contracts.versions import CONTRACTS, check_versions

__all__ = ["CONTRACTS", "check_versions"]
