"""Chat templates, which are programs of whoever made the tokenizer: they end, and fit into memory.

transformers renders them in jinja2's sandbox, which keeps them from files and from Python, but
neither from running for ever nor from filling the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.limits import TimeLimitError, memory_limit, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""Of the processor, for one conversation; real templates take milliseconds."""
_MORE_BYTES = 2**30
"""Of memory that rendering may take, and ``_PER_CHARACTER`` for each that it is given."""
_PER_CHARACTER = 64
_LONGEST = 2**20
"""Characters that a template may write, and ``_PER_CHARACTER`` for each that it is given."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    source: str,
    **arguments: Any,
) -> str:
    """Return a conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: It has a chat template.
        messages: The conversation.
        source: Where it is from, for messages: file and row.
        arguments: What else ``apply_chat_template`` takes: ``add_generation_prompt``, ``tools``,
            variables of the template.

    Raises:
        InputError: The template refuses the messages, fails, or takes too long or too much memory.
    """
    size = len(str(messages)) + len(str(arguments))
    try:
        with time_limit(SECONDS), memory_limit(_MORE_BYTES + _PER_CHARACTER * size):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments)
    except TimeLimitError:
        raise _hostile(tokenizer, source, f"one that still ran after {SECONDS:g} s") from None
    except (MemoryError, OverflowError) as error:
        why = f"one that asks for too much ({type(error).__name__}: {error})"
        raise _hostile(tokenizer, source, why) from error
    except Exception as error:  # whatever a template calls; for example: roles must alternate
        raise InputError(
            f"{source}: messages must suit the chat template, got {_said(error)}; correct the "
            f"row, or the template in {_file_of(tokenizer)}"
        ) from error
    if not isinstance(text, str) or len(text) > _LONGEST + _PER_CHARACTER * size:
        raise _hostile(tokenizer, source, f"one that writes {len(text):,} characters for {size:,}")
    return text


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, source: str, **arguments: Any
) -> Any:
    """Return what the tokenizer makes of texts.

    Its regular expressions give up after ten million steps, as a panic of Rust, which is no
    ``Exception`` (tokenizers 0.22).

    Args:
        tokenizer: Any.
        texts: What it reads.
        source: Where these are from, for messages: file and row, or file alone.
        arguments: What else the tokenizer takes.

    Raises:
        InputError: It fails on a text.
    """
    try:
        return tokenizer(list(texts), **arguments)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{source}: the tokenizer in {str(tokenizer.name_or_path)!r} must read every text, got "
            f"{str(error).splitlines()[0]}; use the tokenizer of the model's authors"
        ) from error


def _hostile(tokenizer: Any, source: str, got: str) -> InputError:
    return InputError(
        f"{source}: the chat template in {_file_of(tokenizer)} must write a conversation, got "
        f"{got}; use the template of the model's authors"
    )


def _file_of(tokenizer: Any) -> str:
    """Where the template is, as far as the tokenizer knows where it is from."""
    directory = Path(str(tokenizer.name_or_path))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (directory / name).is_file():
            return str(directory / name)
    return f"the tokenizer {str(tokenizer.name_or_path)!r}"


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return (
        first
        if type(error).__module__.startswith("jinja2") and first
        else (f"{type(error).__name__}: {first}")
    )
