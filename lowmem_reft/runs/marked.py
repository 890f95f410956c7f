"""The tokens of one row with their parts marked: prompt, edited, supervised, end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from lowmem_reft.reft.positions import find_prompt

if TYPE_CHECKING:
    from lowmem_reft.data.rows import Row
    from lowmem_reft.reft.config import ReftConfig

MARKS = {
    "prompt": ("", "", ""),
    "edited": ("[", "]", "cyan"),
    "supervised": ("{", "}", "green"),
    "end": ("<<", ">>", "bold magenta"),
    "edited supervised": ("[{", "}]", "green"),
    "edited end": ("[<<", ">>]", "bold magenta"),
}
"""How each part is written around its tokens, and in which style."""

_SHOWN = {" ": "·", "\n": "↵", "\t": "→"}


def legend() -> Text:
    """Return the parts as they are marked."""
    text = Text()
    for part in ("edited", "supervised", "end"):
        opening, closing, style = MARKS[part]
        text.append(f"{opening}{part}{closing}", style=style).append("  ")
    return text


def end_ids_of(tokenizer: Any, config: Any) -> set[int]:
    """Ids that end an answer, by the tokenizer and by the base's configuration."""
    own = getattr(config.get_text_config(), "eos_token_id", None)
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def parts_of(
    row: Row,
    example: dict[str, Any],
    tokenizer: Any,
    edit: ReftConfig | None,
    end_ids: set[int],
) -> dict[str, Any]:
    """Return a row's tokens, and which of them are what.

    Args:
        row: The row.
        example: Its tokens and labels as training takes them.
        tokenizer: What made them.
        edit: Which tokens are edited; None: none.
        end_ids: Tokens that end an answer.
    """
    ids, labels = example["input_ids"], example["labels"]
    mask = torch.ones((1, len(ids)), dtype=torch.long)
    is_labelled = isinstance(labels, list)
    prompt = find_prompt(mask, torch.tensor([labels]) if is_labelled else None)
    edited: list[int] = []
    if edit is not None:
        edited = (edit.groups(prompt, attended=mask.bool())[0] >= 0).nonzero().flatten().tolist()
    supervised = [i for i, label in enumerate(labels if is_labelled else []) if label >= 0]
    answered = set(supervised)
    parts = {
        "source": row.source,
        "ids": ids,
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "texts": [_text_of(token, tokenizer) for token in ids],
        "prompt": [i for i in range(len(ids)) if i not in answered],
        "edited": edited,
        "supervised": supervised,
        "end": [i for i in supervised if ids[i] in end_ids],
    }
    # A target may be 0.
    label = row.target if row.label is None else row.label
    return parts if is_labelled else {**parts, "label": label}


def marked(parts: dict[str, Any]) -> Text:
    """Return the tokens of ``parts_of`` with their parts marked: also without colour."""
    text, kinds, edited = Text(), ["prompt"] * len(parts["ids"]), set(parts["edited"])
    for kind in ("edited", "supervised", "end"):
        for index in parts[kind]:
            both = kind != "edited" and index in edited
            kinds[index] = f"edited {kind}" if both else kind
    start = 0
    while start < len(kinds):
        stop = start
        while stop < len(kinds) and kinds[stop] == kinds[start]:
            stop += 1
        opening, closing, style = MARKS[kinds[start]]
        tokens = "|".join(map(_visible, parts["texts"][start:stop]))
        text.append(f"{opening}{tokens}{closing}", style=style).append(" ")
        start = stop
    if "label" in parts:
        text.append(f"label: {_visible(str(parts['label']))}", style="green")
    return text


def shortened(text: Text, most: int) -> Text:
    """Return a text without its middle, where it says how much is left out."""
    half = most // 2
    num_left_out = len(text) - 2 * half
    if num_left_out <= 0:
        return text
    said = f" ... ({num_left_out:,} characters left out) ... "
    return text[:half].append(said).append(text[-half:])


def _text_of(token_id: int, tokenizer: Any) -> str:
    """The text of one token; the token's name where it is a part of a letter."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    text = str(tokenizer.decode([token_id]))
    if not text or "\ufffd" in text:
        return token
    # Decoded alone, a token that begins a word loses the space before it.
    return f" {text}" if token[:1] in "▁Ġ" and not text[0].isspace() else text


def _visible(text: str) -> str:
    """Spaces and line breaks as signs; what would move a terminal's cursor as an escape."""
    return "".join(
        _SHOWN.get(letter) or (letter if letter.isprintable() else repr(letter)[1:-1])
        for letter in text
    )
