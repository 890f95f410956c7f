"""Rows become prompt tokens and supervised response tokens; what is cut is counted.

The joint: one space is put between prompt and response if neither has white space there, and all
spaces at the joint belong to the response (" positive" is one token, as in lm-eval). The whole text
is tokenized at once; the prompt is what its tokens share with those of the prompt alone, so a token
that reaches into the response is supervised. This needs no character offsets, which slow tokenizers
lack and byte-level ones trim at white space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.rows import (
    Row,
    class_index,
)
from lowmem_reft.errors import InputError
from lowmem_reft.machine.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 8192
"""Texts that are tokenized together; with more there is a progress bar."""


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Token ids of rows, with what had to be cut."""

    examples: list[dict[str, Any]]
    """``input_ids`` and ``labels``: lists (-100 on the prompt), one int for classification or one
    float for regression; prompts alone have no labels. Pairs have ``token_type_ids`` where the
    tokenizer tells the two texts apart by them."""
    num_cut_prompts: int
    """Prompts (texts, for classification) that did not fit whole."""
    num_cut_tokens: int
    """Tokens that were cut from them in all."""


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    max_length: int = 512,
) -> EncodedRows:
    r"""Tokenize rows for training: BOS if the tokenizer adds one, prompt, response, EOS.

    Labels are -100 on the prompt, then the tokens of the response and EOS. The right choice of a
    ``choices`` row gets no EOS: what is trained is what ``encode_choices`` scores, and a base whose
    EOS was never trained would spend most of its loss on it. Prompts that do not fit are cut from
    the left; BOS stays.

    Args:
        rows: Rows with a response.
        tokenizer: The base's tokenizer.
        template: How a prompt is written: ``{prompt}`` is replaced by it, ``\n`` is a new line.
            Chats use the tokenizer's chat template instead.
        max_length: Most tokens of an example.

    Raises:
        InputError: If the template is wrong or a response does not fit; the message names the line.
    """
    texts = [_texts(row, tokenizer, template, [_response(row)]) for row in rows]
    prompts = _tokenize([prompt for prompt, _ in texts], tokenizer)
    wholes = _tokenize([whole for _, (whole,) in texts], tokenizer)
    bos, eos_id = _bos(tokenizer), tokenizer.eos_token_id
    examples, cuts = [], []
    for row, prompt_ids, whole_ids in zip(rows, prompts, wholes, strict=True):
        prompt, (response,) = _split(row, prompt_ids, [whole_ids], bos)
        if not row.choices and eos_id is not None and response[-1:] != [eos_id]:
            response.append(eos_id)
        kept = _cut_left(row, prompt, len(response), tokenizer, max_length)
        examples.append(_example(kept, response))
        cuts.append(len(prompt) - len(kept))
    return _encoded(examples, cuts)


def encode_choices(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    max_length: int = 512,
) -> EncodedRows:
    """Tokenize every choice of a row for scoring: as in ``encode_rows``, without EOS.

    There is one example per choice. The prompt's tokens are the same in all of them; it is cut for
    the longest choice, and counted once.

    Raises:
        InputError: If the row has no choices, the template is wrong or a choice does not fit.
    """
    if not row.choices:
        raise InputError(f"{row.source}: a row must have choices, got a {row.kind} row; add them")
    prompt_text, whole_texts = _texts(row, tokenizer, template, row.choices)
    prompt_ids, *wholes = _tokenize([prompt_text, *whole_texts], tokenizer)
    prompt, responses = _split(row, prompt_ids, wholes, _bos(tokenizer))
    kept = _cut_left(row, prompt, max(map(len, responses)), tokenizer, max_length)
    examples = [_example(kept, response) for response in responses]
    return _encoded(examples, [len(prompt) - len(kept)])


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    max_length: int = 512,
) -> EncodedRows:
    """Tokenize prompts alone for generation: the tokens they have in training, cut from the left.

    Raises:
        InputError: If the template is wrong or a prompt has no token.
    """
    texts = [_texts(row, tokenizer, template, [])[0] for row in rows]
    bos = _bos(tokenizer)
    examples, cuts = [], []
    for row, prompt_ids in zip(rows, _tokenize(texts, tokenizer), strict=True):
        prompt, _ = _split(row, prompt_ids, [], bos)
        kept = _cut_left(row, prompt, 0, tokenizer, max_length)
        examples.append({"input_ids": kept})
        cuts.append(len(prompt) - len(kept))
    return _encoded(examples, cuts)


def encode_labelled(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    label_names: Sequence[str] | None,
) -> EncodedRows:
    """Tokenize rows with ``text`` (and ``text_pair``) for a classification or regression head.

    Special tokens are the tokenizer's own. Long texts are cut at its truncation side, which is the
    right unless it says otherwise; of a pair, the longer text is cut first.

    Args:
        rows: Rows with a label, or with a target.
        tokenizer: The base's tokenizer.
        max_length: Most tokens of an example.
        label_names: Class names that ``labels`` index; None: ``labels`` are the rows' targets.

    Raises:
        InputError: If a row has no label or one that is not in ``label_names``, or no target.
    """
    if label_names is None:
        labels: list[Any] = [_number(row) for row in rows]
    else:
        labels = [class_index(row, label_names) for row in rows]
    pairs = _pairs(rows)
    whole = tokenizer([row.prompt for row in rows], pairs, verbose=False)
    names = ["input_ids"]
    if pairs is not None and "token_type_ids" in whole:
        names.append("token_type_ids")
    examples: list[dict[str, Any]] = []
    cuts = []
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        encoded: dict[str, list[int]] = {name: whole[name][index] for name in names}
        size = len(encoded["input_ids"])
        if size > max_length:
            encoded = tokenizer(row.prompt, row.text_pair, truncation=True, max_length=max_length)
        examples.append({**{name: encoded[name] for name in names}, "labels": label})
        cuts.append(size - len(examples[-1]["input_ids"]))
    return _encoded(examples, cuts)


@dataclass(frozen=True)
class Collator:
    """Pad examples to one length; the mask follows from lengths, never from ids: pad may be eos.

    Gives ``input_ids`` and ``attention_mask`` (batch, seq) and, if the examples have them,
    ``token_type_ids`` (batch, seq) and ``labels``: (batch, seq) with -100 on the padding, or
    (batch,) for classification and, in fp32, for regression.
    """

    tokenizer: PreTrainedTokenizerBase
    """Says which id pads (0 if it names none)."""
    padding_side: Literal["left", "right"] = "right"
    """Where padding goes; left for generation."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack the examples of a batch."""
        import torch

        sequences = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": self._stack(sequences, self.tokenizer.pad_token_id or 0),
            "attention_mask": self._stack([[1] * len(ids) for ids in sequences], 0),
        }
        if "token_type_ids" in examples[0]:
            types = [example["token_type_ids"] for example in examples]
            batch["token_type_ids"] = self._stack(types, self.tokenizer.pad_token_type_id)
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            is_one = isinstance(labels[0], int | float)
            batch["labels"] = torch.tensor(labels) if is_one else self._stack(labels, IGNORED_LABEL)
        return batch

    def _stack(self, sequences: list[list[int]], fill: int) -> Tensor:
        import torch

        size = max(map(len, sequences))
        stacked = torch.full((len(sequences), size), fill)
        for row, ids in zip(stacked, sequences, strict=True):
            start = 0 if self.padding_side == "right" else size - len(ids)
            row[start : start + len(ids)] = torch.tensor(ids)
        return stacked


def _encoded(examples: list[dict[str, Any]], cuts: list[int]) -> EncodedRows:
    return EncodedRows(
        examples=examples, num_cut_prompts=sum(cut > 0 for cut in cuts), num_cut_tokens=sum(cuts)
    )


def _pairs(rows: Sequence[Row]) -> list[str] | None:
    """The second texts; None if there are none.

    Raises:
        InputError: If only some rows have one.
    """
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    if pairs and len(pairs) < len(rows):
        where = next(row.source for row in rows if row.text_pair is None)
        raise InputError(f"{where}: text_pair must be in all rows or in none; add or remove it")
    return pairs or None


def _number(row: Row) -> float:
    if row.target is None:
        raise InputError(
            f"{row.source}: a row must have text and target for regression, got a {row.kind} row; "
            "convert the file"
        )
    return row.target


def _response(row: Row) -> str:
    if row.response is None:
        raise InputError(f"{row.source}: a row must have a response, got none; add it")
    return row.response


def _texts(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: str, responses: Sequence[str]
) -> tuple[str, list[str]]:
    """The prompt's text without the spaces at the joint, and the whole text for each response."""
    if row.kind == "messages":
        prompt, wholes = _chat_texts(row, tokenizer, answered=bool(responses))
        return prompt.rstrip(" "), wholes
    # An option on the command line holds a backslash and an n.
    template = template.replace("\\n", "\n")
    if "{prompt}" not in template:
        raise InputError(
            f"template must contain {{prompt}}, got {template!r}; write 'Question: {{prompt}}'"
        )
    # Not str.format: prompts and templates hold other braces.
    prompt = template.replace("{prompt}", row.prompt)
    wholes = []
    for response in responses:
        is_joined = prompt[-1].isspace() or response[0].isspace()
        wholes.append(prompt + response if is_joined else f"{prompt} {response}")
    return prompt.rstrip(" "), wholes


def _chat_texts(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, answered: bool
) -> tuple[str, list[str]]:
    """The chat up to the response, and with it, as the tokenizer's chat template writes them."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InputError(
            f"{row.source}: messages must come with a tokenizer that has a chat template, "
            "got none; use an instruction-tuned model or convert the rows to prompt and response"
        )
    try:
        prompt = tokenizer.apply_chat_template(
            row.prompt_messages,
            tokenize=False,
            add_generation_prompt=True,
            **row.template_arguments,
        )
        if not answered:
            return str(prompt), []
        whole = tokenizer.apply_chat_template(
            list(row.messages), tokenize=False, **row.template_arguments
        )
    except TemplateError as error:  # for example: roles must alternate
        raise InputError(
            f"{row.source}: messages must suit the chat template, got {error}; correct the row"
        ) from error
    if not str(whole).startswith(str(prompt).rstrip(" ")):
        raise InputError(
            f"{row.source}: the chat template must write a response after its generation prompt "
            f"{str(prompt)[-40:]!r}, got {str(whole)[-80:]!r}; convert to prompt and response rows"
        )
    # White space after the end of the turn (ChatML's new line) belongs to the next turn.
    return str(prompt), [str(whole).rstrip()]


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids without special tokens, so that an EOS of the tokenizer's own is never there."""
    ids: list[list[int]] = []
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    for start in progress(starts, "tokenizing", quiet=len(starts) < 2):
        part = list(texts[start : start + TEXTS_AT_ONCE])
        ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer starts texts with one, else []."""
    start: list[int] = tokenizer("")["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []


def _split(
    row: Row, prompt_ids: list[int], wholes: list[list[int]], bos: list[int]
) -> tuple[list[int], list[list[int]]]:
    """Prompt (with BOS) and responses: whole texts share the prompt's tokens, then differ."""
    size = min((_num_shared(prompt_ids, whole) for whole in wholes), default=len(prompt_ids))
    if any(len(whole) == size for whole in wholes):
        raise InputError(
            f"{row.source}: response must have tokens, got none from this tokenizer; "
            "use a model that knows its characters"
        )
    # Chat templates write their own BOS or none.
    head = [] if row.kind == "messages" or prompt_ids[:1] == bos else bos
    return head + prompt_ids[:size], [whole[size:] for whole in wholes]


def _num_shared(first: list[int], second: list[int]) -> int:
    """Length of the common start."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _cut_left(
    row: Row,
    prompt: list[int],
    num_response: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[int]:
    """The last tokens of the prompt that fit beside the response, after its BOS."""
    if not prompt:
        raise InputError(
            f"{row.source}: prompt must have a token of its own before the response, got none; "
            "make it longer"
        )
    head = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    room = max_length - num_response - len(head)
    if room < 1:
        raise InputError(
            f"{row.source}: response must leave room for the prompt in max_length {max_length}, "
            f"got {num_response} tokens; raise max_length or shorten the response"
        )
    return head + prompt[len(head) :][-room:]


def _example(prompt: list[int], response: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + response, "labels": [IGNORED_LABEL] * len(prompt) + response}
