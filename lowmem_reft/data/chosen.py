"""Where an answer ends that is one of a few known choices, after which no end was trained.

Rows with choices are scored by likelihood, and what is trained is what is scored: the choice alone.
A model that has said one goes on. What all rows chose among tells where it could have stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.row import Row

MOST_CHOICES = 64
"""More are no classes: rows with as many are hardly about the same thing."""
LONGEST_CHOICE = 100
"""Letters of a choice. Longer ones are sentences, whose words one generates rather than picks."""


def shared_choices(rows: Sequence[Row]) -> list[str] | None:
    """Return what every row chooses among, in the first row's order and without outer white space.

    Returns:
        None where rows have no choices, not all the same, too many or too long ones.
    """
    first, *rest = list(dict.fromkeys(row.choices for row in rows)) or [()]
    choices = [choice.strip() for choice in first]
    if any({choice.strip() for choice in other} != set(choices) for other in rest):
        return None
    return choices if are_choices(choices) else None


def are_choices(choices: Sequence[str]) -> bool:
    """Whether texts can be what an answer is chosen among: different, not empty, few and short."""
    return (
        0 < len(choices) <= MOST_CHOICES
        and len(set(choices)) == len(choices)
        and all(c == c.strip() and 0 < len(c) <= LONGEST_CHOICE for c in choices)
    )


class ChoiceReader:
    """Reads one answer as it grows, and tells when it is one of the choices.

    It ends as soon as it is one that no other choice begins with. Where one does, as "no idea" does
    with "no", it ends with the token that makes it neither, and before that token. A text that can
    become no choice any more does not end here.
    """

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = frozenset(choices)
        self.found: str | None = None
        """The last that the text was, with the white space before it."""
        self.num_tokens = 0
        """Tokens that ``found`` was read of."""
        self.is_over = False
        """Whether the answer ended as ``found``."""
        self.may_become = bool(choices)
        """Whether the text may still be, or become, a choice."""

    def read(self, text: str, num_tokens: int) -> bool:
        """Read the whole text so far, of ``num_tokens`` tokens; return whether it is over."""
        if not self.may_become:
            return self.is_over
        said = text.strip()
        if said.endswith("\ufffd"):  # the first bytes of a letter
            return False
        if said in self.choices:
            self.found, self.num_tokens = text.rstrip(), num_tokens
        self.may_become = any(c != said and c.startswith(said) for c in self.choices)
        self.is_over = self.found is not None and not self.may_become
        return self.is_over
