"""What runs for the page: one command that takes long, or those who answer."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_reft.errors import InputError
from lowmem_reft.ui.commands import Command
from lowmem_reft.ui.talk import Talker


class Desk:
    """One training or comparison at a time, which has the memory to itself."""

    def __init__(self) -> None:
        self.command: Command | None = None
        """The one that runs, or ran last."""
        self._talker = Talker()

    def start(self, words: Sequence[str]) -> None:
        """Start a command; those who answer are ended.

        Raises:
            InputError: Another one runs.
        """
        self._check_free()
        self._talker.close()
        self.command = Command(words)

    def answers(
        self, words: Sequence[str], messages: Sequence[dict[str, str]]
    ) -> tuple[list[str], str]:
        """Let adapter and base answer; see ``Talker.answers``.

        Raises:
            InputError: A command runs, or something cannot be loaded or answered.
        """
        self._check_free()
        return self._talker.answers(words, messages)

    def stop(self) -> None:
        """End the command as Ctrl-C does."""
        if self.command is not None:
            self.command.stop()

    def close(self) -> None:
        """End everything."""
        self.stop()
        self._talker.close()

    def _check_free(self) -> None:
        if self.command is not None and self.command.code is None:
            raise InputError("one command runs at a time, and one does; wait, or press Stop")
