"""A base and an adapter that answer the same conversation, in a process that holds both."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import shlex
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from lowmem_reft.runs.chat import Chat

_chats: dict[tuple[str, ...], Chat] = {}
"""Of the process that answers: the one that is loaded."""


class Talker:
    """Keeps what was loaded for the next message; ``close`` gives its memory back."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def answers(
        self, words: Sequence[str], messages: Sequence[dict[str, str]]
    ) -> tuple[list[str], str]:
        """Return what the adapter and the base answer to a conversation, and what was noted.

        Args:
            words: ``chat`` and its flags; without ``--adapter`` the base alone answers.
            messages: ``role`` and ``content``; the last one is the user's.

        Returns:
            The answers, that of the adapter first; and notes, a line each.

        Raises:
            InputError: Something cannot be loaded or answered, or the process was ended.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=signal.signal,  # Ctrl-C is the page's
                initargs=(signal.SIGINT, signal.SIG_IGN),
            )
        try:
            return self._pool.submit(_answers, tuple(words), messages).result()
        except BrokenProcessPool as error:
            self.close()
            raise InputError(
                f"model must fit into memory to answer, got {shlex.join(words)!r}, whose process "
                "was ended; wait for other commands to end, or choose another"
            ) from error

    def close(self) -> None:
        """End the process that holds the model."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _answers(words: tuple[str, ...], messages: Sequence[dict[str, str]]) -> tuple[list[str], str]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as notes,
    ):
        try:
            chat = _chat(words)
        except SystemExit as error:  # of flags that there are not; what is wrong has been said
            raise InputError(notes.getvalue().strip()) from error
        chat.messages = [*messages]
        chat.say_how_messages_are_written()
        return [chat.answer(name) for name in _names(chat)], notes.getvalue()


def _names(chat: Chat) -> list[str]:
    from lowmem_reft.methods.several import BASE  # here, as it imports torch

    return list(dict.fromkeys([chat.current, BASE]))


def _chat(words: tuple[str, ...]) -> Chat:
    # Here, as they import torch, of which the page's own process has no need.
    from lowmem_reft.machine import own_modules
    from lowmem_reft.options import ChatOptions, parsing
    from lowmem_reft.runs.chat import load_chat

    if words not in _chats:
        _chats.clear()
        options = parsing.parse(own_modules.take(words), {"chat": ChatOptions}, "")
        _chats[words] = load_chat(options)
    return _chats[words]
