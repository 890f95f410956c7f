"""DAS: learns in which subspace of a hidden vector a model keeps a causal variable.

Source: distributed alignment search, https://arxiv.org/abs/2303.02536. A model runs on a base and
on a source prompt; the base run takes the source's value in a subspace of one hidden vector
(``InterchangeIntervention``), and R is learned so that it gives the answer that a causal model of
the task gives when one of its variables is exchanged.

The model is frozen, so all that lies below the exchanged vector is a constant: it is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowmem_reft.base.blocks import device_of, hidden_size
from lowmem_reft.base.partial import feeding, run_up_to
from lowmem_reft.reft.interventions import InterchangeIntervention

CHUNK_PROMPTS = 512
"""Prompts of a forward pass without gradients."""

Exchange = Callable[[Tensor, Tensor], Tensor]
"""From base and source vectors, (n, hidden) in fp32, to the change of the base's."""


@dataclass(frozen=True)
class Pairs:
    """Base and source prompts, with the causal model's answers under the interchange."""

    base: Int[Tensor, "n seq"]
    """Token ids; all prompts are equally long."""
    source: Int[Tensor, "n seq"]
    """Token ids."""
    answers: Int[Tensor, " n"]
    """Indices among the possible answers."""


class Interchanges:
    """Pairs of runs that meet in one hidden vector: what leaves block ``layer`` at ``position``.

    Args:
        model: A frozen causal language model.
        pairs: The prompts and the wanted answers.
        choices: Token ids of the possible answers, (num_answers,).
        layer: 0-based block.
        position: Index of the token in the prompts.
    """

    def __init__(
        self, model: Any, pairs: Pairs, *, choices: Tensor, layer: int, position: int
    ) -> None:
        device = device_of(model)
        self.model, self.layer, self.position = model, layer, position
        self.choices, self.answers = choices.to(device), pairs.answers.to(device)
        self.ids = pairs.base.to(device)
        self.base = self._record(self.ids)
        self.source = self._record(pairs.source.to(device))

    def at(self, position: int) -> Interchanges:
        """Return the same runs, meeting at another token; nothing is computed again."""
        other = copy.copy(self)
        other.position = position
        return other

    @torch.no_grad()
    def _record(self, ids: Tensor) -> Float[Tensor, "n seq hidden"]:
        parts = [{"input_ids": part} for part in ids.split(CHUNK_PROMPTS)]
        return torch.cat([run_up_to(self.model, self.layer + 1, part) for part in parts])

    def logits(self, change: Exchange, rows: Tensor) -> Float[Tensor, "n num_answers"]:
        """Return the logits of the possible answers after the interchange in some of the pairs."""
        hidden = self.base[rows]
        base, source = (h[:, self.position].float() for h in (hidden, self.source[rows]))
        hidden[:, self.position] = (base + change(base, source)).to(hidden.dtype)
        with feeding(self.model, self.layer + 1, hidden):
            logits = self.model(input_ids=self.ids[rows], logits_to_keep=1).logits
        return logits[:, -1, self.choices].float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def accuracy(self, change: Exchange) -> float:
        """Interchange-intervention accuracy: the share of pairs that end in the wanted answer."""
        rows = torch.arange(len(self.ids), device=self.ids.device)
        found = torch.cat(
            [self.logits(change, part).argmax(1) for part in rows.split(CHUNK_PROMPTS)]
        )
        return float((found == self.answers).float().mean())


def whole_vector(base: Tensor, source: Tensor) -> Tensor:
    """Exchange all of the vector, without any subspace."""
    return source - base


def random_subspace(model: Any, rank: int) -> InterchangeIntervention:
    """Return an interchange of a random subspace, the start of the search and its control."""
    return InterchangeIntervention(hidden_size(model), rank=rank).to(device_of(model)).eval()


def learn_subspace(
    runs: Interchanges, *, rank: int, num_steps: int, lr: float = 5e-2, batch_size: int = 32
) -> InterchangeIntervention:
    """Learn R by Adam with a linear schedule, from the cross-entropy of the wanted answers.

    Args:
        runs: What R is learned from; the model stays as it is.
        rank: Dimension of the subspace.
        num_steps: Optimizer steps.
        lr: Learning rate at the start.
        batch_size: Pairs of a step.
    """
    phi = random_subspace(runs.model, rank).train()
    optimizer = torch.optim.Adam(phi.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for _ in range(num_steps):
        rows = torch.randint(len(runs.ids), (batch_size,), device=runs.ids.device)
        cross_entropy(runs.logits(phi, rows), runs.answers[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return phi.eval()


@torch.no_grad()
def principal_angles(
    first: Float[Tensor, "rank hidden"], second: Float[Tensor, "rank hidden"]
) -> list[float]:
    """Angles between the spans of two sets of orthonormal rows, in degrees, smallest first.

    All are 0 for the same subspace and 90 for orthogonal ones.
    """
    cosines = torch.linalg.svdvals(first @ second.T).clamp(max=1.0)
    return [float(angle) for angle in cosines.arccos().rad2deg()]
