"""Continues prompts in left-padded batches, from a file or the command line."""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.adapted import load_adapted
from lowmem_reft.data import Collator, Row, encode_prompts, load_rows
from lowmem_reft.errors import InputError
from lowmem_reft.progress import progress
from lowmem_reft.training_card import find_adapter, load_card, merge_card
from lowmem_reft.virtual_tokens import generate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowmem_reft.data import EncodedRows
    from lowmem_reft.options import GenerateOptions
    from lowmem_reft.training_card import TrainingCard


def run_generation(options: GenerateOptions) -> dict[str, Any]:
    """Write one JSON line with ``prompt`` (or ``messages``) and ``response`` per prompt.

    Returns:
        ``num_examples``, ``num_cut_prompts``, ``output`` (path or None), ``num_new_tokens``,
        ``tokens_per_s`` and, for a single ``prompt``, ``response``.

    Raises:
        InputError: an option, a file or a row is wrong.
    """
    rows = _rows(options)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    card = _card(options, None if adapter is None else load_card(adapter))
    model, tokenizer = load_adapted(options.model, adapter, card)
    encoded = encode_prompts(rows, tokenizer, template=card.template, max_length=card.max_length)
    _warn_of_cuts(encoded, card.max_length)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    continuations = generate_batches(
        model,
        tokenizer,
        [example["input_ids"] for example in encoded.examples],
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        quiet=options.quiet,
    )
    texts = _write(rows, continuations, options)
    num_tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = {
        "num_examples": len(rows),
        "num_cut_prompts": encoded.num_cut_prompts,
        "output": None if options.output is None else str(options.output),
        "num_new_tokens": num_tokens,
        "tokens_per_s": num_tokens / (time.perf_counter() - started),
    }
    return result if options.prompt is None else {**result, "response": texts[0]}


def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    quiet: bool = True,
) -> Iterator[str]:
    """Continue tokenized prompts, batch by batch.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        prompts: token ids, of unequal lengths.
        batch_size: prompts per forward pass.
        max_new_tokens: most tokens per continuation.
        temperature: 0 is greedy.
        quiet: no progress bar.

    Yields:
        The continuations, without special tokens, in the order of the prompts.
    """
    collate = Collator(tokenizer, padding_side="left")
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    for start in progress(range(0, len(prompts), batch_size), "generating", quiet=quiet):
        batch = collate([{"input_ids": ids} for ids in prompts[start : start + batch_size]])
        with torch.no_grad():
            new = generate(
                model,
                {key: value.to(model.device) for key, value in batch.items()},
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                **sampling,
            )
        yield from tokenizer.batch_decode(new, skip_special_tokens=True)


def _card(options: GenerateOptions, trained: TrainingCard | None) -> TrainingCard:
    card = merge_card(
        trained, options.model, template=options.template, max_length=options.max_length
    )
    if card.task_type != "CAUSAL_LM":
        raise InputError(
            f"task_type must be CAUSAL_LM to generate, got {card.task_type!r}; a classifier is "
            "scored with evaluate"
        )
    return card


def _warn_of_cuts(encoded: EncodedRows, max_length: int) -> None:
    if encoded.num_cut_prompts:
        warnings.warn(
            f"{encoded.num_cut_prompts} of {len(encoded.examples)} prompts had more than "
            f"max_length {max_length} tokens and were cut from the left; raise max_length",
            stacklevel=3,
        )


def _write(
    rows: Sequence[Row], continuations: Iterator[str], options: GenerateOptions
) -> list[str]:
    """Write every continuation as soon as it is there, and return all."""
    texts = []
    stream = sys.stdout if options.output is None else options.output.open("w")
    try:
        for row, text in zip(rows, continuations, strict=True):
            texts.append(text)
            source = {"messages": list(row.messages)} if row.messages else {"prompt": row.prompt}
            stream.write(json.dumps({**source, "response": text}, ensure_ascii=False) + "\n")
            stream.flush()
    finally:
        if options.output is not None:
            stream.close()
    return texts


def _rows(options: GenerateOptions) -> list[Row]:
    if (options.prompt is None) == (options.input is None):
        raise InputError(
            "input must be given, or prompt, and not both; for example --prompt 'Once upon a time'"
        )
    if options.prompt is not None:
        return [Row(source="--prompt", prompt=options.prompt)]
    return load_rows(str(options.input), require_response=False)
