"""What a row says, as text: its prompt, and each response as it follows the prompt.

The prompt is the same text whatever follows it, so that what is trained, scored, generated and
chatted begins alike. Spaces at the joint belong to the response (" positive" is one token).

Chats are written by the tokenizer's chat template. The prompt is what the template writes for
generation; where that opens or closes a block of reasoning that the template does not write before
an answer (``<think>``), the answer follows the prompt and an open block is closed. Where the
template has no prompt for generation, it is what the template writes up to an answer.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.row import answer_of, one_turn
from lowmem_reft.data.templates import render
from lowmem_reft.errors import InputError
from lowmem_reft.options.values import CHAT_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import Joint

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "THAI", "LAO", "KHMER")
"""How the Unicode names of characters begin that are written without spaces between words."""
_NOTHING_AFTER = frozenset("([{<>/\\=_@#$|~`&^%*+“‘«¿¡")
"""Characters after which text goes on without a space."""
_NOTHING_BEFORE = frozenset(",.;:!?)]}>/\\=_%”’»")
"""Characters before which there is no space."""
_BLOCK = re.compile(r"<([^<>/]*(?:think|thought|reason|channel|analysis)[^<>]*)>.*", re.DOTALL)
"""What a generation prompt ends with that leads a model into its reasoning, or past it."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_ANSWER = "lowmemreft"
"""Stands for an answer, to see what a template writes before and after one."""


def asked(rows: Sequence[Row], template: str) -> list[Row]:
    """Return the rows as they are asked: with the template ``chat``, as chats of one turn."""
    if template != CHAT_TEMPLATE:
        return list(rows)
    return [row if row.messages else one_turn(row) for row in rows]


def described(template: str, rows: Sequence[Row]) -> str:
    """Return in words how the prompts of rows, all of one kind, are written."""
    if rows[0].messages:
        return "prompts are written by the tokenizer's chat template"
    if template == CHAT_TEMPLATE:
        return "prompts are written by the tokenizer's chat template; --raw writes them as they are"
    return f"prompts are written as {template!r}"


def around_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **arguments: Any
) -> tuple[str, str]:
    """Return what the chat template writes up to an answer, and after it; nothing without one.

    Raises:
        InputError: As ``templates.render``; ``arguments`` are its.
    """
    text = render(tokenizer, [*messages, answer_of(_ANSWER)], **arguments)
    before, answer, after = text.rpartition(_ANSWER)
    return (before, after) if answer else ("", "")


def written(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    joint: Joint,
    responses: Sequence[str],
) -> tuple[str, list[str]]:
    r"""Return the prompt's text, without spaces at its end, and the text of each response after it.

    Args:
        row: The row, as it is ``asked``. The response of a chat is its last message, as the chat
            template writes it; its choices are written in the place of that.
        tokenizer: Has the chat template, and the special tokens after which nothing is put.
        template: How a prompt is written; ``\n`` in it is a new line.
        joint: What is put between prompt and response where neither has white space: a space,
            nothing, or what suits the characters (``auto``: nothing beside text that is written
            without spaces and after special tokens; for responses also nothing after an opening
            bracket, an operator or a slash and before punctuation).
        responses: Texts that may follow, all of them for the choices of a row; none: the prompt
            alone.

    Raises:
        InputError: The template is wrong or does not suit the chat; the message names the row.
    """
    if row.messages:
        prompt, rest = _chat(row, tokenizer, responses)
    else:
        # An option on the command line holds a backslash and an n.
        template = template.replace("\\n", "\n")
        if "{prompt}" not in template:
            raise InputError(
                f"template must contain {{prompt}}, got {template!r}; write 'Question: {{prompt}}'"
            )
        # Not str.format: prompts and templates hold other braces.
        prompt = row.before + template.replace("{prompt}", row.prompt)
        rest = [_between(prompt, text, joint, row, tokenizer) + text for text in responses]
    start = prompt.rstrip(" ")
    return start, [prompt[len(start) :] + text for text in rest]


def up_to_answer(
    prompt: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **arguments: Any
) -> str:
    """Return a chat's prompt with what comes before an answer, if its template leaves that out.

    Args:
        prompt: As the chat template writes it for generation.
        tokenizer: Has the template. If that knows no ``add_generation_prompt``, what it writes
            before an answer is not there yet.
        messages: The chat without the answer.
        arguments: Of ``templates.render``.

    Raises:
        InputError: As there.
    """
    if "add_generation_prompt" in str(tokenizer.chat_template):
        return prompt
    before, _ = around_answer(tokenizer, messages, **arguments)
    return before if before.startswith(prompt) else prompt


def unused_arguments(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of what rows give the chat template and it does not ask for."""
    given = dict.fromkeys(name for row in rows for name in row.template_arguments)
    template = str(tokenizer.chat_template)
    return [name for name in given if not re.search(rf"\b{re.escape(name)}\b", template)]


def _between(
    prompt: str, response: str, joint: Joint, row: Row, tokenizer: PreTrainedTokenizerBase
) -> str:
    """What is put between a prompt and a response: a space or nothing."""
    last, first = prompt[-1:], response[:1]
    if joint == "none" or not last or not first or last.isspace() or first.isspace():
        return ""
    if joint == "space":
        return " "
    is_unspaced = any(unicodedata.name(c, "").startswith(_UNSPACED) for c in (last, first))
    if is_unspaced or any(prompt.endswith(token) for token in tokenizer.all_special_tokens):
        return ""
    # A choice is an answer of its own, whatever the text before it ends with.
    glued = not row.choices and (last in _NOTHING_AFTER or first in _NOTHING_BEFORE)
    return "" if glued else " "


def _chat(
    row: Row, tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]
) -> tuple[str, list[str]]:
    """The chat up to the response, without spaces at its end, and each response after it."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{row.source}: messages must come with a tokenizer that has a chat template, got "
            "none; use an instruction-tuned model, or convert the rows to prompt and response, "
            "which --raw writes as they are (messages it does not)"
        )
    prompt = _rendered(row, tokenizer, row.prompt_messages, add_generation_prompt=True)
    arguments = {**row.template_arguments, "source": row.source}
    prompt = up_to_answer(prompt, tokenizer, row.prompt_messages, **arguments)
    start, rest = prompt.rstrip(" "), []
    for text in responses:
        answered = row
        if row.choices:
            answered = replace(row, messages=(*row.prompt_messages, answer_of(text)))
        # White space after the end of the turn (ChatML's new line) belongs to the next turn.
        whole = _rendered(row, tokenizer, list(answered.messages)).rstrip()
        if whole.startswith(start):
            rest.append(whole[len(start) :])
        else:
            after = _after_reasoning(answered, tokenizer, prompt, whole)
            rest.append(prompt[len(start) :] + after)
        _check_said(row, answered.messages[-1:], rest[-1])
    questions = [message for message in row.prompt_messages if message["role"] == "user"]
    _check_said(row, questions[-1:], prompt)
    return start, rest


def _check_said(row: Row, messages: Sequence[Any], text: str) -> None:
    """Refuse a chat template that leaves out what a message says, as one for lists of parts does.

    White space aside, and reasoning, which templates take out of an answer.
    """
    for message in messages:
        content = message.get("content")
        said = content.rpartition("</")[2].partition(">")[2] if "</" in str(content) else content
        if isinstance(said, str) and "".join(said.split()) not in "".join(text.split()):
            raise InputError(
                f"{row.source}: the chat template must write what the {message['role']} says, got "
                f"{text[-80:]!r} without {said[:40]!r}; use a template for text"
            )


def _rendered(
    row: Row, tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any
) -> str:
    arguments = {**row.template_arguments, **options}
    return render(tokenizer, messages, source=row.source, **arguments)


def _after_reasoning(row: Row, tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str) -> str:
    """What follows a generation prompt that opens or closes a block of reasoning.

    Raises:
        InputError: The template writes something else, or the row's reasoning has no place.
    """
    history = _rendered(row, tokenizer, row.prompt_messages)
    block = _BLOCK.search(prompt, num_shared(history, prompt))
    tags = re.findall(r"<[^<>]*>", block[0]) if block is not None else []
    is_open = len(tags) == 1
    if (
        block is None
        or not whole.startswith(prompt[: block.start()])
        or (is_open and not re.fullmatch(r"[A-Za-z][\w-]*", block[1]))
    ):
        raise InputError(
            f"{row.source}: the chat template must write a response after its generation prompt "
            f"{prompt[-40:]!r}, got {whole[-80:]!r}; convert to prompt and response rows"
        )
    own, answer = _own_reasoning(row, whole[block.start() :], re.escape(block[1]))
    if is_open:
        # Reasoning that a template cuts off leaves the lines behind it.
        return f"{own or chr(10)}</{block[1]}>\n\n{answer.lstrip(chr(10)) if own else answer}"
    if own:
        raise InputError(
            f"{row.source}: the chat template must leave room for the reasoning in the response, "
            f"got the generation prompt {prompt[-40:]!r}, which closes it; take the reasoning out, "
            "or switch it on with chat_template_kwargs {'enable_thinking': true}"
        )
    return answer


def _own_reasoning(row: Row, answer: str, tag: str) -> tuple[str, str]:
    """The reasoning that the response has, ending its line, and the answer without it.

    It stands in what the template wrote, or, where the template left it out, in the message.
    """
    inside = re.match(rf"\s*(?:<{tag}>)?(.*?)</{tag}>\s*", answer, re.DOTALL)
    if inside is not None:
        return _line(inside[1]), answer[inside.end() :]
    last = row.messages[-1]
    for key in _REASONING_KEYS:
        if isinstance(last.get(key), str):
            return _line(last[key]), answer
    left_out = re.match(rf"\s*(?:<{tag}>)?(.*?)</{tag}>", str(last.get("content") or ""), re.DOTALL)
    return ("" if left_out is None else _line(left_out[1])), answer


def _line(text: str) -> str:
    return f"{text.strip()}\n" if text.strip() else ""


def num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many letters, or tokens, both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
