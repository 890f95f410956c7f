"""Where an answer ends: at the tokens that training puts after a response.

Training ends a response with the tokenizer's EOS and, in a chat, with what the chat template writes
after it. What a base's configuration calls an end is not asked: it may be another one, or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_reft.data.texts import around_answer
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_ids(tokenizer: PreTrainedTokenizerBase, *, chats: bool = False) -> list[int]:
    """Return the ids of the tokens that end an answer, in ascending order; perhaps none.

    Args:
        tokenizer: The one that prompts are read with.
        chats: Whether prompts are chats, written by the tokenizer's chat template.
    """
    turn = _end_of_turn(tokenizer) if chats and tokenizer.chat_template else None
    return sorted({found for found in (tokenizer.eos_token_id, turn) if found is not None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token of its own that the template writes after an answer.

    Many tokens, such as those of "### End", are none: an answer may begin like them, and the EOS
    after them was trained.
    """
    try:
        _, rest = around_answer(tokenizer, [{"role": "user", "content": "a"}], source="a chat")
    except InputError:  # rows are refused with more to say
        return None
    rest = rest.lstrip()
    own = tokenizer.get_added_vocab() | dict(
        zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    )
    starts = [token for token in own if token.strip() and rest.startswith(token.strip())]
    return own[max(starts, key=len)] if starts else None
