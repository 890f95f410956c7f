"""Where nothing else fits: the blocks below those that are trained never come onto the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lowmem_reft.base.hub import num_blocks
from lowmem_reft.errors import InputError
from lowmem_reft.memory.planner import Planner
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.search import Candidate, fit
from lowmem_reft.methods.constant import num_constant_blocks
from lowmem_reft.methods.table import all_options, find_method, for_base
from lowmem_reft.options import MethodOptions
from lowmem_reft.reft.config import resolve_layers

SHARES = (1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16, 0)
"""Of the blocks, from the top, that are tried to be trained one after the other; 0: the last."""


@dataclass(frozen=True, kw_only=True)
class UpperFit:
    """A training that fits with ``--resident upper --reuse trunk``."""

    candidate: Candidate
    """How it is run."""
    changed_blocks: int | None
    """From the top so many are trained; None: those that were asked for."""
    num_blocks: int
    """Blocks of the base."""

    @property
    def in_words(self) -> str:
        """Say what is done."""
        kept = "the blocks below are read one after the other, once, and never stay on the card"
        if self.changed_blocks is None:
            return f"the same training; {kept}"
        if 2 * self.changed_blocks == self.num_blocks:
            return f"with only the upper half edited: another training; {kept}"
        return (
            f"with only the upper {self.changed_blocks} of {self.num_blocks} blocks edited: "
            f"another training; {kept}"
        )


def fit_upper(
    planner: Planner,
    setting: Setting,
    lengths: Lengths,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> UpperFit | None:
    """Return a way to train upper blocks alone that the card holds; None if there is none.

    First those that the setting trains, where others are below them; then half of the blocks of the
    base, then fewer. A setting that fits as it is should not be asked about.
    """
    count = num_blocks(planner.config)
    ways = [
        (changed, replace(setting, method=method, reuse="trunk", resident="upper"))
        for changed, method in _methods(setting, count)
        if changed is not None or setting.resident == "all"  # else it is what was tried
    ]
    try:
        if not ways or not _weights_fit(planner, ways[-1][1]):
            return None
        for changed, way in ways:
            if _weights_fit(planner, way) and (found := fit(planner, way, lengths, report=report)):
                return UpperFit(candidate=found, changed_blocks=changed, num_blocks=count)
    except InputError:  # the method does not train from a store
        return None
    return None


def _methods(setting: Setting, num_blocks: int) -> Iterator[tuple[int | None, MethodOptions]]:
    """Yield the method on the layers asked for, then on ever fewer upper ones, with their number.

    A method that takes no layers trains all of them.
    """
    method = setting.method
    if "layers" not in find_method(method.method).options:
        return
    method = for_base(method, task_type=setting.task_type, num_layers=lambda: num_blocks)
    layers = all_options(method).get("layers") or "all"
    last = num_blocks - resolve_layers(layers, num_blocks)[0]
    yield None, method
    for share in SHARES:
        number = max(1, round(share * num_blocks))
        if number < last:
            last = number
            yield number, replace(method, layers=f"upper:{number / num_blocks:.4g}")


def _weights_fit(planner: Planner, setting: Setting) -> bool:
    """Return whether the card holds the weights that stay on it and one block that passes."""
    predictor = planner.predictor(setting)
    assert planner.card is not None
    if num_constant_blocks(predictor.model) == 0:
        return False
    return planner.card.holds(predictor.base_bytes + predictor.streamed_bytes)
