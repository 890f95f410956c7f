"""Continues prompts in left-padded batches, from a file or the command line.

Every adapter answers every prompt. Answers are written as they come, prompt by prompt and adapter
by adapter, and a file that is there is completed if the same would have made its answers.
"""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import StoppingCriteriaList

from lowmem_reft.base.identity import checkpoint_digest
from lowmem_reft.base.limits import Limits
from lowmem_reft.data.ends import end_ids
from lowmem_reft.data.rows import Row, load_rows
from lowmem_reft.data.texts import described
from lowmem_reft.data.tokens import Collator, encode_prompts
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import dtype_name, resolve_storage
from lowmem_reft.machine.progress import progress
from lowmem_reft.machine.provenance import file_digest
from lowmem_reft.machine.terminal import for_stream
from lowmem_reft.methods.several import (
    BASE,
    answering,
    find_adapters,
    load_together,
    mixes_in_a_batch,
)
from lowmem_reft.methods.virtual_tokens import generate, num_virtual_tokens
from lowmem_reft.options import CHAT_TEMPLATE, DecodingOptions
from lowmem_reft.runs.answer_file import as_line, keep_answers, opened
from lowmem_reft.runs.chosen import EndAtChoices, came_to_no_end, choices_of, why_cut
from lowmem_reft.runs.outputs import check_generation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowmem_reft.methods.several import NamedAdapter
    from lowmem_reft.options import GenerateOptions


def run_generation(options: GenerateOptions) -> dict[str, Any]:
    """Write one JSON line per prompt and adapter.

    A line holds ``prompt`` (or ``messages``), ``adapter`` where one was named, and ``response``.

    Returns:
        ``num_examples`` (lines), ``num_kept`` of an earlier run, ``num_cut_prompts``, ``output``
        (path or None), ``num_new_tokens``, ``tokens_per_s`` and, for a single ``prompt``,
        ``response`` (of several adapters ``responses``, by name).

    Raises:
        InputError: An option, a file or a row is wrong.
    """
    rows = _rows(options)
    asking = options.asking
    adapters = find_adapters(
        options.adapter,
        options.model,
        template=asking.template,
        max_length=options.max_length,
        raw=asking.raw,
    )
    named = options.adapter is not None
    questions = [_question(row, each if named else None) for row in rows for each in adapters]
    run = {} if options.output is None else _run(options, adapters)
    texts = _kept(options, questions, run)
    num_kept, num_cut, num_new, seconds = len(texts), 0, 0, 1.0
    if len(texts) == len(questions):
        print(f"{options.output} holds all answers; --overwrite writes it anew", file=sys.stderr)
    else:
        model, tokenizer = load_together(options.model, adapters)
        # Of a base of the hub it may be known only now.
        run["base_digest"] = checkpoint_digest(options.model.model)
        prompts, num_cut = _encode(rows, adapters, tokenizer)
        _check_room(model, tokenizer, rows, adapters, prompts, options.decoding)
        started = time.perf_counter()
        names = [each.peft_name for _ in rows for each in adapters]
        _say_how_the_base_is_asked(rows, adapters, options)
        are_chats = any(each.card.template == CHAT_TEMPLATE for each in adapters)
        ends = end_ids(tokenizer, chats=are_chats or any(row.messages for row in rows))
        choices = [choices_of(each, options.decoding) for _ in rows for each in adapters]
        new = _new_answers(model, tokenizer, prompts, names, choices, num_kept, ends, options)
        answers = list(_written(new, questions, num_kept, options, run))
        _say_what_was_cut(answers, adapters, num_kept, options)
        texts = [*texts, *(answer.text for answer in answers)]
        num_new = sum(answer.num_tokens for answer in answers)
        seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "num_examples": len(questions),
        "num_kept": num_kept,
        "num_cut_prompts": num_cut,
        "output": None if options.output is None else str(options.output),
        "num_new_tokens": num_new,
        "tokens_per_s": num_new / seconds,
    }
    if options.prompt is not None and len(adapters) == 1:
        result["response"] = texts[0]
    elif options.prompt is not None:
        by_name = zip(adapters, texts, strict=True)
        result["responses"] = {each.name: text for each, text in by_name}
    return result


def _say_how_the_base_is_asked(
    rows: Sequence[Row], adapters: Sequence[NamedAdapter], options: GenerateOptions
) -> None:
    templates = {each.card.template for each in adapters if each.name == BASE} - {"{prompt}"}
    if templates and options.asking.template is None and not (rows[0].messages or options.quiet):
        as_first = f"{BASE} is asked as the first adapter is: " if len(adapters) > 1 else ""
        print(as_first + described(templates.pop(), rows), file=sys.stderr)


def _say_what_was_cut(
    answers: Sequence[Answer],
    adapters: Sequence[NamedAdapter],
    num_kept: int,
    options: GenerateOptions,
) -> None:
    """Say of each adapter how many answers had no end, where the training is why."""
    if options.quiet or options.decoding.stop:
        return
    own = [adapters[place % len(adapters)] for place in range(num_kept, num_kept + len(answers))]
    for adapter in adapters:
        of_it = [answer for each, answer in zip(own, answers, strict=True) if each is adapter]
        num_cut = sum(came_to_no_end(answer, adapter) for answer in of_it)
        why = why_cut(adapter, options.decoding.max_new_tokens) if num_cut else ""
        if why:
            text = f"{adapter.name}: {num_cut:,} of {len(of_it):,} answers {why}"
            print(for_stream(text, sys.stderr), file=sys.stderr)


def _new_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    choices: Sequence[Sequence[str]],
    num_kept: int,
    ends: Sequence[int],
    options: GenerateOptions,
) -> Iterator[Answer]:
    """Yield the answers after the first ``num_kept``, in the batches of an uninterrupted run."""
    size = options.batch_size
    starts = range(num_kept // size * size, len(prompts), size)
    for start in progress(starts, "generating", quiet=options.quiet):
        torch.manual_seed((options.decoding.seed * 1_000_003 + start) % 2**63)
        part = slice(start, start + size)
        answers = continue_prompts(
            model,
            tokenizer,
            prompts[part],
            options.decoding,
            adapters=names[part],
            ends=ends,
            choices=choices[part],
        )
        yield from answers[max(num_kept - start, 0) :]


def _written(
    answers: Iterator[Answer],
    questions: Sequence[dict[str, Any]],
    num_kept: int,
    options: GenerateOptions,
    run: dict[str, Any],
) -> Iterator[Answer]:
    """Write every answer after the first ``num_kept`` as soon as it is there, and pass it on."""
    start = None if options.overwrite else num_kept
    output: Any = nullcontext(sys.stdout)
    if options.output is not None:
        output = opened(options.output, run, num_kept=start)
    with output as stream:
        for question, answer in zip(questions[num_kept:], answers, strict=True):
            stream.write(for_stream(as_line(question, answer.text), stream))
            stream.flush()
            yield answer


class Answer(NamedTuple):
    """What was generated after a prompt."""

    text: str
    """Without special tokens, and without its end."""
    num_tokens: int
    """Tokens that were generated, its end among them."""
    is_cut: bool = False
    """Whether it came to no end."""


def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: str | None = None,
    choices: Sequence[str] = (),
    chats: bool = False,
    quiet: bool = True,
) -> Iterator[str]:
    """Continue prompts greedily, batch by batch, in their order: see ``continue_prompts``.

    ``stop`` is a text at which an answer ends, ``choices`` are answers that end there; ``chats``
    tells whether a chat template wrote the prompts.
    """
    stops = () if stop is None else (stop,)
    decoding = DecodingOptions(max_new_tokens=max_new_tokens, stop=stops)
    ends = end_ids(tokenizer, chats=chats)
    for start in progress(range(0, len(prompts), batch_size), "generating", quiet=quiet):
        part = prompts[start : start + batch_size]
        own = [choices] * len(part)
        for answer in continue_prompts(model, tokenizer, part, decoding, ends=ends, choices=own):
            yield answer.text


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    decoding: DecodingOptions,
    *,
    adapters: Sequence[str] | None = None,
    ends: Sequence[int],
    choices: Sequence[Sequence[str]] | None = None,
    streamer: Any = None,
) -> list[Answer]:
    """Continue prompts, token ids of unequal lengths, in one batch.

    What the base's own ``generation_config`` says is not gone by. ``adapters`` are the name in the
    model of each prompt's adapter (``__base__``: none); where PEFT cannot mix them, the prompts of
    each adapter are a batch of their own. Without names, what is active answers all. ``ends`` are
    the tokens at which an answer ends, see ``data.ends``; ``choices``, of each prompt, the texts
    that are whole answers, see ``data.chosen``. A streamer is given the tokens of a single prompt
    as they come.

    Raises:
        InputError: There is a streamer for several prompts.
    """
    if streamer is not None and len(prompts) > 1:
        raise InputError(
            f"prompts must be one with a streamer, got {len(prompts)}; leave the streamer out"
        )
    options: dict[str, Any] = {"ends": ends, "streamer": streamer}
    choices = choices or [()] * len(prompts)
    if adapters is None:
        options["choices"] = choices
        return _continue(model, tokenizer, prompts, decoding, **options)
    different = list(dict.fromkeys(adapters))
    if len(different) > 1 and mixes_in_a_batch(model):
        options |= {"adapter_names": list(adapters), "choices": choices}
        return _continue(model, tokenizer, prompts, decoding, **options)
    answers: dict[int, Answer] = {}
    for name in different:
        places = [place for place, other in enumerate(adapters) if other == name]
        own = [prompts[place] for place in places]
        options["choices"] = [choices[place] for place in places]
        with answering(model, name):
            new = _continue(model, tokenizer, own, decoding, **options)
        answers |= zip(places, new, strict=True)
    return [answers[place] for place in range(len(prompts))]


def _continue(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    decoding: DecodingOptions,
    *,
    ends: Sequence[int],
    choices: Sequence[Sequence[str]],
    **options: Any,
) -> list[Answer]:
    batch = Collator(tokenizer, padding_side="left")([{"input_ids": ids} for ids in prompts])
    if decoding.stop:
        options |= {"stop_strings": list(decoding.stop_texts), "tokenizer": tokenizer}
    if decoding.temperature:
        # top_k 0: transformers would draw among fifty.
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    ends = [*ends, *_ends_of_base(model, tokenizer)]
    at_choices = EndAtChoices(tokenizer, choices, ends)
    if any(choices):
        options["stopping_criteria"] = StoppingCriteriaList([at_choices])
    with torch.no_grad():
        new = generate(
            model,
            {key: value.to(model.device) for key, value in batch.items()},
            max_new_tokens=decoding.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends or None,
            use_cache=True,
            do_sample=decoding.temperature > 0,
            **options,
        )
    stops = decoding.stop_texts
    return [
        Answer(str(reader.found), reader.num_tokens)
        if reader.is_over
        else _answer(row, tokenizer, ends, stops)
        for row, reader in zip(new.tolist(), at_choices.readers, strict=True)
    ]


def _ends_of_base(model: Any, tokenizer: Any) -> list[int]:
    """What a base without an adapter was trained to end with, besides: no end of ours was.

    Only special tokens are taken for ends; its configuration may be another model's.
    """
    named = None if hasattr(model, "peft_config") else model.generation_config.eos_token_id
    ids: list[int] = named if isinstance(named, list) else [-1 if named is None else named]
    return [number for number in ids if number in tokenizer.all_special_ids]


def _answer(ids: list[int], tokenizer: Any, ends: Sequence[int], stops: Sequence[str]) -> Answer:
    """Read what was generated up to its end; what follows is padding."""
    size = next((place for place, number in enumerate(ids) if number in ends), len(ids))
    text = str(tokenizer.decode(ids[:size], skip_special_tokens=True))
    if text != (stopped := until_stop(text, stops)):
        while size and ids[size - 1] == tokenizer.pad_token_id:
            size -= 1
        return Answer(stopped, size)
    return Answer(text, min(size + 1, len(ids)), is_cut=size == len(ids))


def until_stop(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first stop text; the whole text if there is none in it."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _question(row: Row, adapter: NamedAdapter | None) -> dict[str, Any]:
    asked = {"messages": list(row.messages)} if row.messages else {"prompt": row.prompt}
    return asked if adapter is None else {**asked, "adapter": adapter.name}


def _kept(
    options: GenerateOptions, questions: Sequence[dict[str, Any]], run: dict[str, Any]
) -> list[str]:
    check_generation(options)
    output = options.output
    return [] if output is None or options.overwrite else keep_answers(output, questions, run)


def _run(options: GenerateOptions, adapters: Sequence[NamedAdapter]) -> dict[str, Any]:
    """Return what determines the answers to given prompts, as JSON has it."""
    base, card = Path(options.model.model), adapters[0].card
    storage, dtype = resolve_storage(card.storage, card.compute_dtype, options.model.device)
    run: dict[str, Any] = {
        "base": str(base.resolve()) if base.is_dir() else options.model.model,
        "base_digest": checkpoint_digest(options.model.model),
        "storage": storage,
        "compute_dtype": dtype_name(dtype),
        "adapters": [adapter.name for adapter in adapters],
    }
    for adapter in adapters:
        if adapter.directory is not None:
            run[f"{adapter.name}: digest"] = _adapter_digest(adapter.directory)
        run[f"{adapter.name}: template"] = adapter.card.template
        run[f"{adapter.name}: max_length"] = adapter.card.max_length
        run[f"{adapter.name}: choices"] = choices_of(adapter, options.decoding) or None
    decoding = asdict(options.decoding)
    run |= decoding | {"stop": list(options.decoding.stop), "batch_size": options.batch_size}
    if not options.decoding.temperature:  # nothing is drawn
        del run["seed"], run["batch_size"]
    return run


def _adapter_digest(directory: Path) -> str:
    """Digest of an adapter's weights and configuration."""
    files = sorted(path for path in directory.glob("adapter_*") if path.is_file())
    digests = [file_digest(file) for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _encode(
    rows: Sequence[Row], adapters: Sequence[NamedAdapter], tokenizer: Any
) -> tuple[list[list[int]], int]:
    """Return each prompt as each adapter reads it, prompt by prompt, and how many were cut."""
    by_adapter, num_cut = [], 0
    for adapter in adapters:
        template, max_length = adapter.card.template, adapter.card.max_length
        encoded = encode_prompts(rows, tokenizer, template=template, max_length=max_length)
        by_adapter.append([example["input_ids"] for example in encoded.examples])
        if encoded.num_cut_prompts and not num_cut:
            warnings.warn(
                f"{encoded.num_cut_prompts} of {len(rows)} prompts had more than max_length "
                f"{max_length} tokens and were cut; raise max_length",
                stacklevel=3,
            )
        num_cut += encoded.num_cut_prompts
    return [ids for same in zip(*by_adapter, strict=True) for ids in same], num_cut


def _check_room(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    adapters: Sequence[NamedAdapter],
    prompts: Sequence[list[int]],
    decoding: DecodingOptions,
) -> None:
    """Refuse prompts whose tokens, with those to come, the base has no place for."""
    limits, sources = Limits.of(model, tokenizer), [row.source for row in rows]
    for place, adapter in enumerate(adapters):
        with answering(model, adapter.peft_name):
            virtual = num_virtual_tokens(model)
        own = prompts[place :: len(adapters)]
        limits.check(sources, own, virtual=virtual, new=decoding.max_new_tokens)


def _rows(options: GenerateOptions) -> list[Row]:
    if (options.prompt is None) == (options.input is None):
        raise InputError(
            "input must be given, or prompt, and not both; for example --prompt 'Once upon a time'"
        )
    if options.prompt is not None:
        return [Row(source="--prompt", prompt=options.prompt)]
    return load_rows(str(options.input), require_response=False)
