"""What a training has spent so far: seconds of its steps, and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowmem_reft.data.packing import is_of_rows
from lowmem_reft.machine import processes

if TYPE_CHECKING:
    from lowmem_reft.runs.checkpoints import Checkpoint


@dataclass
class Spent:
    """Counts on over checkpoints; of one that says nothing of it, what is spent is not known."""

    num_virtual: int = 0
    """Trained embeddings that a method puts before each example, which the model computes too."""
    before: dict[str, float | None] = field(default_factory=dict)
    """What a checkpoint says."""
    time_s: float = 0.0
    """Of optimizer steps in this process, without loading, scoring and building stores."""
    num_computed: int = 0
    """Tokens that went through the model in this process, with padding and virtual ones; with
    stored constants some blocks were spared."""
    num_real: int | Tensor = 0
    """Those of them that are of rows. A sum on the device is not waited for."""

    @classmethod
    def since(cls, begun: Checkpoint | None, *, num_virtual: int) -> Spent:
        """Start from nothing, or from what a checkpoint says."""
        before = {} if begun is None else begun.note.get("spent", dict.fromkeys(_NAMES))
        return cls(num_virtual, before)

    def count(self, batch: dict[str, Any]) -> None:
        """Count the tokens of a batch, packed or not."""
        mask = is_of_rows(batch)
        self.num_computed += mask.numel() + len(mask) * self.num_virtual
        self.num_real = self.num_real + mask.sum().detach()

    def of_all(self) -> dict[str, float | None]:
        """Return ``train_time_s``, ``num_computed_tokens`` and ``num_real_tokens`` of the run.

        Tokens are those of all processes, every one of which has to ask; the time is the first
        one's. None: not known.
        """
        each = processes.everyones([self.time_s, self.num_computed, int(self.num_real)])
        computed, real = (sum(part[i] for part in each) for i in (1, 2))
        now = dict(zip(_NAMES, (each[0][0], computed, real), strict=True))
        return {
            name: None if (past := self.before.get(name, 0)) is None else past + value
            for name, value in now.items()
        }


_NAMES = ("train_time_s", "num_computed_tokens", "num_real_tokens")
