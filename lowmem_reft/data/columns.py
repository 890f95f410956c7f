"""Names of the columns that are read, from most to least preferred where one is enough."""

from __future__ import annotations

KINDS = {
    "messages": ("messages",),
    "choices": ("prompt", "choices", "answer"),
    "response": ("prompt", "response"),
    "label": ("text", "label"),
    "target": ("text", "target"),
}
"""Columns that a row of each kind must have."""

PROMPTS = ("prompt", "instruction", "question", "query", "input")
"""A prompt."""

RESPONSES = ("response", "completion", "output", "answer")
"""A response."""

CHATS = ("messages", "conversations", "conversation")
"""A chat."""

SYSTEMS = ("system", "system_prompt")
"""A system message beside a chat or a prompt."""

TOGETHER = {"instruction": ("input", "context")}
"""What is written below a prompt of this name: Alpaca's and Dolly's second column."""

FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")
"""What a chat template is given besides the messages."""

_OTHERS = ("text", "text_pair", "label", "target", "choices", "history", "context")

NAMES = frozenset((*PROMPTS, *RESPONSES, *CHATS, *SYSTEMS, *FOR_TEMPLATES, *_OTHERS))
"""All of them."""
