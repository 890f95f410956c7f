"""Text of models and files does not steer a terminal."""

from __future__ import annotations

import io

from lowmem_reft.machine.terminal import for_stream, harmless


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_replaced_and_text_is_kept() -> None:
    assert harmless("a\x1b[2Jb\x07\x9b31m\rc\x7f") == "a�[2Jb��31m�c�"
    assert (
        harmless("one\r\ntwo\tשלום 日本 é 👩‍👩‍👧 [bold]") == "one\ntwo\tשלום 日本 é 👩‍👩‍👧 [bold]"
    )
    assert harmless("a\u202etxt.exe") == "a�txt.exe"


def test_files_and_pipes_get_the_text_as_it_is() -> None:
    assert for_stream("\x1b[2J", io.StringIO()) == "\x1b[2J"
    assert for_stream("\x1b[2J", Terminal()) == "�[2J"
