"""Which file of a tokenizer is at fault: transformers does not say, or makes an empty tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem_reft.base.stored import in_one_line, is_pointer, not_whole, read_json_object
from lowmem_reft.errors import InputError

_JSON = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
)
_TEXT = ("chat_template.jinja", "merges.txt", "vocab.txt")
_VOCABULARIES = ("tokenizer*.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""What holds a tokenizer's tokens; its configuration alone does not."""

_SMALL_BYTES = 1 << 20


def check_tokenizer_files(directory: Path, *, every: bool = False) -> None:
    """Refuse files of a tokenizer that are not what they are called.

    Large ones are looked at closely only where something is known to be wrong (``every``): to read
    them takes as long as to load the tokenizer.

    Raises:
        InputError: One is a pointer of git-LFS, or not of its kind.
    """
    for name in _JSON:
        path = directory / name
        if path.is_file():
            if every or path.stat().st_size <= _SMALL_BYTES:
                read_json_object(path)
            elif is_pointer(path):
                raise not_whole(path, "a JSON object", ValueError())
    for path in (*(directory / name for name in _TEXT), *directory.glob("*.model")):
        if path.is_file() and is_pointer(path):
            raise not_whole(path, "a file of the tokenizer", ValueError())
        if every and path.is_file() and path.suffix != ".model":
            try:
                path.read_text(encoding="utf-8")
            except ValueError as error:
                raise not_whole(path, "UTF-8 text", error) from error


def check_vocabulary(directory: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that was made without its tokens, of whose files none is there.

    Raises:
        InputError: There is no file of the kind.
    """
    names = tokenizer.vocab_files_names.values()
    if not names:  # of bytes
        return
    found = (path.name for pattern in _VOCABULARIES for path in directory.glob(pattern))
    if not any(name != "tokenizer_config.json" for name in found):
        raise InputError(
            f"{directory / 'tokenizer.json'} must be there, as the configuration of the tokenizer "
            f"beside it holds no tokens, got none of {', '.join(sorted({*names}))}; download it "
            "again"
        )


def not_loaded(model: str | Path, error: Exception) -> InputError:
    """Return what to say of a tokenizer that could not be loaded; it names the file, if it can."""
    if Path(model).is_dir():
        try:
            check_tokenizer_files(Path(model), every=True)
        except InputError as named:
            return named
    return InputError(
        f"model must have a tokenizer, got {str(model)!r}; save one beside it, or download "
        f"tokenizer.json and tokenizer_config.json again ({in_one_line(error)})"
    )
