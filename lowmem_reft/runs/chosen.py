"""Lets answers of an adapter that was trained on choices end, and says why others did not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from lowmem_reft.data.chosen import ChoiceReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from lowmem_reft.data.row import Row
    from lowmem_reft.methods.card import TrainingCard
    from lowmem_reft.methods.several import NamedAdapter
    from lowmem_reft.options import DecodingOptions
    from lowmem_reft.runs.generate import Answer


def choices_of(adapter: NamedAdapter, decoding: DecodingOptions) -> list[str]:
    """Return the choices at which an adapter's answers end: none where ``stop`` says where.

    The base's end at none: it was not trained to choose. Nor do those of an adapter that was
    trained to end them itself.
    """
    if decoding.stop or adapter.directory is None:
        return []
    return ends_at(adapter.card)


def ends_at(card: TrainingCard) -> list[str]:
    """Return the choices of a training after which it has taught no end."""
    return [] if card.has_end else card.choices or []


def choices_for(rows: Sequence[Row], card: TrainingCard) -> Sequence[str]:
    """Return the choices of the training, where all that rows are to be answered is among them."""
    choices = ends_at(card)
    return choices if all((row.response or "").strip() in choices for row in rows) else ()


class EndAtChoices(StoppingCriteria):
    """Ends each row of a batch that is one of its choices (none: the row ends elsewhere).

    transformers calls it after each new token.
    """

    def __init__(
        self, tokenizer: Any, choices: Sequence[Sequence[str]], ends: Sequence[int]
    ) -> None:
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.readers = [ChoiceReader(each) for each in choices]
        self._start: int | None = None
        self._has_ended = [False] * len(self.readers)

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, ...], **kwargs: Any
    ) -> Bool[Tensor, " batch"]:
        """Tell which rows are over."""
        if self._start is None:  # of embeddings there are no ids
            self._start = input_ids.shape[1] - 1
        for place, row in enumerate(input_ids[:, self._start :].tolist()):
            reader = self.readers[place]
            self._has_ended[place] |= row[-1] in self.ends
            if reader.may_become and not self._has_ended[place]:  # padding follows an end
                reader.read(self.tokenizer.decode(row, skip_special_tokens=True), len(row))
        return torch.tensor([reader.is_over for reader in self.readers], device=input_ids.device)


def came_to_no_end(answer: Answer, adapter: NamedAdapter) -> bool:
    """Whether an answer was cut, and not as one of two choices of which one begins the other."""
    return answer.is_cut and answer.text.strip() not in (adapter.card.choices or ())


def why_cut(adapter: NamedAdapter, max_new_tokens: int) -> str:
    """Say why answers reached ``max_new_tokens``, where rows with choices may be the reason.

    Returns:
        One line; empty of the base, and where rows had responses, which train their end.
    """
    card = adapter.card
    if adapter.directory is None or card.has_end:
        return ""
    cut = f"cut at max_new_tokens {max_new_tokens}"
    cure = "--stop TEXT ends one, and evaluate picks a choice by its likelihood"
    if card.choices is not None:
        named = ", ".join(map(repr, card.choices[:6])) + (", ..." if card.choices[6:] else "")
        return f"{cut}, being none of the training's choices ({named}), where one ends; {cure}"
    if card.has_end is False:
        return f"{cut}: the training rows had choices, after which no end was trained; {cure}"
    if card.has_end is None and card.data_digest is not None:
        return (
            f"{cut}: the adapter is of an earlier version; if its rows had choices, no end was "
            f"trained after them; {cure}"
        )
    return ""
