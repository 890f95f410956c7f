"""Rows become prompt tokens and supervised response tokens; what is cut is counted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.cutting import fitted, refuse_longer
from lowmem_reft.data.joint import bos_of, end_response, one_begins_another, tokenized, with_end
from lowmem_reft.data.packing import joined
from lowmem_reft.data.rows import Row, class_index
from lowmem_reft.data.texts import asked, written
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lowmem_reft.data.packing import Pack
    from lowmem_reft.options import Joint, LongRows


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
    longest: int = 0
    """Most tokens of an example, before any was cut."""


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    joint: Joint = "auto",
    max_length: int = 512,
    long_rows: LongRows = "cut",
) -> EncodedRows:
    r"""Tokenize rows for training: BOS if the tokenizer adds one, prompt, response, EOS.

    Labels are -100 on the prompt, then the tokens of the response and EOS. The right choice of a
    ``choices`` row gets no EOS unless one of its choices begins another: what is trained is what
    ``encode_choices`` scores, and a base whose EOS was never trained would spend most of its loss
    on it. Prompts that do not fit are cut, see ``cutting``.

    Args:
        rows: Rows with a response.
        tokenizer: The base's tokenizer.
        template: How a prompt is written: ``{prompt}`` is replaced by it, ``\n`` is a new line.
            ``chat``: it is the user's message, and the response the assistant's, in the tokenizer's
            chat template, which chats are always written by.
        joint: What is put between prompt and response, see ``texts.written``.
        max_length: Most tokens of an example.
        long_rows: ``drop`` cuts nothing: longer rows are refused, see ``cutting``.

    Raises:
        InputError: If the template is wrong, a row does not fit (all such rows are named), or a
            tokenizer merges prompt and response; the message names the line.
    """
    rows = asked(rows, template)
    texts = [
        written(row, tokenizer, template=template, joint=joint, responses=[_response(row)])
        for row in rows
    ]
    encoded = tokenized(rows, texts, tokenizer)
    responses = [response for _, (response,) in encoded]
    for row, response, ends in zip(rows, responses, with_end(rows, tokenizer), strict=True):
        if ends:
            end_response(row, response, tokenizer)
    sizes = list(map(len, responses))
    prompts = fitted(rows, encoded, sizes, tokenizer, template, max_length, long_rows)
    examples = [_example(*pair) for pair in zip(prompts, responses, strict=True)]
    return _encoded(examples, _cuts(encoded, prompts))


def encode_choices(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    joint: Joint = "auto",
    max_length: int = 512,
    long_rows: LongRows = "cut",
) -> EncodedRows:
    """Tokenize every choice of a row for scoring: as in ``encode_rows``.

    There is one example per choice. The prompt's tokens are the same in all of them; it is cut for
    the longest choice, and counted once. No choice has an EOS, or, if one begins another, all do.

    Raises:
        InputError: If the row has no choices, the template is wrong or a choice does not fit.
    """
    (encoded,) = encode_all_choices(
        [row],
        tokenizer,
        template=template,
        joint=joint,
        max_length=max_length,
        long_rows=long_rows,
    )
    return encoded


def encode_all_choices(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    joint: Joint = "auto",
    max_length: int = 512,
    long_rows: LongRows = "cut",
) -> list[EncodedRows]:
    """Return ``encode_choices`` of every row.

    Raises:
        InputError: As there; all rows that do not fit are named.
    """
    for row in rows:
        if not row.choices:
            raise InputError(
                f"{row.source}: a row must have choices, got a {row.kind} row; add them"
            )
    rows = asked(rows, template)
    texts = [
        written(row, tokenizer, template=template, joint=joint, responses=row.choices)
        for row in rows
    ]
    encoded = tokenized(rows, texts, tokenizer)
    for row, (_, responses), ends in zip(rows, encoded, with_end(rows, tokenizer), strict=True):
        for response in responses if ends else ():
            end_response(row, response, tokenizer)
        if one_begins_another(responses):
            raise InputError(
                f"{row.source}: no choice may begin another in this tokenizer's tokens, got "
                f"{list(row.choices)}; write them otherwise"
            )
    sizes = [max(map(len, responses)) for _, responses in encoded]
    prompts = fitted(rows, encoded, sizes, tokenizer, template, max_length, long_rows)
    cuts = _cuts(encoded, prompts)
    return [
        _encoded([_example(prompt, response) for response in responses], [cut])
        for prompt, (_, responses), cut in zip(prompts, encoded, cuts, strict=True)
    ]


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "{prompt}",
    max_length: int = 512,
    long_rows: LongRows = "cut",
) -> EncodedRows:
    """Tokenize prompts alone for generation: the tokens they have in training, cut as there.

    Raises:
        InputError: If the template is wrong, a prompt has no token, or its frame is too long.
    """
    rows = asked(rows, template)
    texts = [written(row, tokenizer, template=template, joint="none", responses=()) for row in rows]
    encoded = tokenized(rows, texts, tokenizer)
    sizes = [0] * len(rows)
    prompts = fitted(rows, encoded, sizes, tokenizer, template, max_length, long_rows)
    return _encoded([{"input_ids": prompt} for prompt in prompts], _cuts(encoded, prompts))


def encode_texts(
    texts: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    adds_bos: bool = True,
    source: str = "text",
) -> list[tuple[list[int], list[int]]]:
    """Tokenize (prompt, response) texts as rows are: for those who write texts themselves.

    Spaces at the end of a prompt go to its response; nothing is put between them. An empty response
    has no tokens.

    Args:
        texts: The texts; a prompt without a token of its own has BOS, or nothing.
        tokenizer: The base's tokenizer.
        adds_bos: Begin with BOS if the tokenizer does; not for what a chat template wrote.
        source: Names the texts in messages.

    Raises:
        InputError: The tokenizer merges prompt and response and cannot take them apart.
    """
    rows = [Row(source=source, prompt=prompt) for prompt, _ in texts]
    starts = [prompt.rstrip(" ") for prompt, _ in texts]
    both = [
        (start, [prompt[len(start) :] + response] if response else [])
        for start, (prompt, response) in zip(starts, texts, strict=True)
    ]
    bos = bos_of(tokenizer) if adds_bos else []
    return [
        (prompt, responses[0] if responses else [])
        for prompt, responses in tokenized(rows, both, tokenizer, bos=bos)
    ]


def encode_labelled(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    label_names: Sequence[str] | None,
    long_rows: LongRows = "cut",
) -> EncodedRows:
    """Tokenize rows with ``text`` (and ``text_pair``) for a classification or regression head.

    Special tokens are the tokenizer's own. Long texts are cut at its truncation side, which is the
    right unless it says otherwise; of a pair, the longer text is cut first.

    Args:
        rows: Rows with a label, or with a target.
        tokenizer: The base's tokenizer.
        max_length: Most tokens of an example.
        label_names: Class names that ``labels`` index; None: ``labels`` are the rows' targets.
        long_rows: ``drop`` cuts nothing: longer rows are refused, see ``cutting``.

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
    if long_rows == "drop":
        refuse_longer(rows, [len(ids) for ids in whole["input_ids"]], max_length)
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
    (batch,) for classification and, in fp32, for regression. Packed, ``input_ids``, ``labels`` and
    ``position_ids``, each (rows, seq).
    """

    tokenizer: PreTrainedTokenizerBase
    """Says which id pads (0 if it names none)."""
    padding_side: Literal["left", "right"] = "right"
    """Where padding goes; left for generation."""
    pack: Pack | None = None
    """Tells which examples, with labels of their tokens, stand one after the other in a row."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack the examples of a batch."""
        import torch

        sequences = [example["input_ids"] for example in examples]
        rows = None if self.pack is None else self.pack([len(ids) for ids in sequences])
        if rows is not None:
            positions = [range(len(ids)) for ids in sequences]
            labels = [example["labels"] for example in examples]
            return {
                "input_ids": self._stack(joined(sequences, rows), self.tokenizer.pad_token_id or 0),
                "position_ids": self._stack(joined(positions, rows), 0),
                # What stands before an example does not predict its first token.
                "labels": self._stack(joined(labels, rows, first=IGNORED_LABEL), IGNORED_LABEL),
            }
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
    # The choices of a row share a prompt, and so what was cut from it.
    sizes = (len(each["input_ids"]) + cut for each, cut in zip(examples, cycle(cuts)))
    return EncodedRows(
        examples=examples,
        num_cut_prompts=sum(cut > 0 for cut in cuts),
        num_cut_tokens=sum(cuts),
        longest=max(sizes, default=0),
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


def _cuts(
    encoded: Sequence[tuple[list[int], list[list[int]]]], kept: Sequence[list[int]]
) -> list[int]:
    return [len(prompt) - len(rest) for (prompt, _), rest in zip(encoded, kept, strict=True)]


def _example(prompt: list[int], response: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + response, "labels": [IGNORED_LABEL] * len(prompt) + response}
