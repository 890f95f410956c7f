"""How likely a model with any adapter holds each choice of a row: their prompt is read once.

What the prompts of many rows begin with, such as a system message or solved examples, is read once
for all of them. Pass 1 reads what all choices of a row share: the prompt and the tokens that all of
them begin with. Its last vector gives the probability of each choice's first own token, which for
choices such as "yes" and "no" is all of it. Pass 2 reads the rest of longer choices behind the keys
and values of pass 1, as generation reads new tokens, and edits it as such.

Nothing is approximated: the sums are those of prompt and choice in one sequence, up to rounding. On
an int8 base rounding depends on what else is in a batch, here as anywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.caches import (
    cache_argument,
    can_be_parted,
    changing_rotation,
    has_windows,
    repeated,
    with_cache,
    with_rows,
)
from lowmem_reft.base.loss import log_likelihoods_at
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.tokens import Collator
from lowmem_reft.machine.marks import allocates
from lowmem_reft.machine.progress import progress
from lowmem_reft.methods.likelihood import by_length, each_log_likelihood, forward_of
from lowmem_reft.methods.virtual_tokens import num_virtual_tokens
from lowmem_reft.reft.tuner import groups_of, reft_configs

_LEAST_BEGINNING = 8
"""Tokens that are worth a pass of their own."""
_COMPARED = 64
"""Rows whose edited tokens are compared at once: a data set's would take gigabytes."""


@dataclass(frozen=True)
class Shared:
    """A row's choices, parted where they part ways."""

    prompt: list[int]
    common: list[int]
    """Tokens that every choice begins with."""
    rests: list[list[int]]
    """Each choice's own tokens, at least one."""

    @classmethod
    def of(cls, prompt: list[int], choices: Sequence[list[int]]) -> Shared:
        """Part choices, of at least one token each, behind a prompt of at least one."""
        # Each keeps its last token: one may begin another, or be alone.
        shortest = min(map(len, choices))
        together = zip(*(choice[: shortest - 1] for choice in choices), strict=True)
        common = [tokens[0] for tokens in takewhile(lambda tokens: len({*tokens}) == 1, together)]
        return cls(prompt, common, [choice[len(common) :] for choice in choices])

    @classmethod
    def of_examples(cls, examples: Sequence[dict[str, Any]]) -> Shared | None:
        """Part a row by its examples, prompt and choice each; None if there is nothing to share.

        That is where the prompt, or a choice, has no token.
        """
        start = examples[0]["labels"].count(IGNORED_LABEL)
        choices = [example["input_ids"][start:] for example in examples]
        return cls.of(examples[0]["input_ids"][:start], choices) if start and all(choices) else None

    @property
    def longer(self) -> list[int]:
        """The choices of which something is left for pass 2."""
        return [choice for choice, rest in enumerate(self.rests) if len(rest) > 1]

    def __len__(self) -> int:
        """Return how many tokens pass 1 reads."""
        return len(self.prompt) + len(self.common)


@torch.no_grad()
def choices_log_likelihood(
    model: Any,
    rows: Sequence[Sequence[dict[str, Any]]],
    tokenizer: Any,
    *,
    batch_size: int,
    quiet: bool = True,
) -> list[list[tuple[float, int]]]:
    """Return for each row the summed log-likelihood of each choice, and its number of tokens.

    Rows that cannot be parted so are scored in whole sequences, which gives the same: longer
    choices where the model does not `continues_from_cache`, and rows without a prompt.

    Args:
        model: Causal and in evaluation mode, with or without an adapter.
        rows: Of each row its examples: prompt and choice, of which only the choice is supervised.
        tokenizer: Says which id pads.
        batch_size: Sequences per forward pass, prompts in pass 1 and choices in pass 2.
        quiet: No progress bar.
    """
    parted = {index: row for index, each in enumerate(rows) if (row := Shared.of_examples(each))}
    if not continues_from_cache(model, longest_of(parted.values())):
        parted = {index: row for index, row in parted.items() if not row.longer}
    found: list[list[tuple[float, int]]] = [[] for _ in rows]
    scores = shared_log_likelihood(
        model, [*parted.values()], tokenizer, batch_size=batch_size, quiet=quiet
    )
    for (index, row), of_row in zip(parted.items(), scores, strict=True):
        sizes = [len(row.common) + len(rest) for rest in row.rests]
        found[index] = [(total, size) for (total, _), size in zip(of_row, sizes, strict=True)]
    whole = [(index, example) for index, each in enumerate(rows) for example in each]
    whole = [(index, example) for index, example in whole if index not in parted]
    scored = each_log_likelihood(
        model, [example for _, example in whole], tokenizer, batch_size=batch_size, quiet=quiet
    )
    for (index, _), of_choice in zip(whole, scored, strict=True):
        found[index].append(of_choice)
    return found


@torch.no_grad()
def shared_log_likelihood(
    model: Any, rows: Sequence[Shared], tokenizer: Any, *, batch_size: int, quiet: bool = True
) -> list[list[tuple[float, bool]]]:
    """Return for each row the log-likelihood of each choice, and whether it is greedy.

    That is, whether each of its tokens is the most likely one. Arguments are those of
    `choices_log_likelihood`, rows parted; if any choice has more than one own token, the model
    `continues_from_cache`.
    """
    found: list[list[tuple[float, bool]]] = [[] for _ in rows]
    begun = _read_beginning(model, rows)
    # Those that need no cache apart: they need less memory.
    batches = []
    for is_longer in (True, False):
        alike = [index for index, row in enumerate(rows) if bool(row.longer) == is_longer]
        lengths = [len(rows[index]) for index in alike]
        batches += [[alike[i] for i in places] for places in by_length(lengths, batch_size)]
    for batch in progress(batches, "scoring", quiet=quiet):
        these = [rows[index] for index in batch]
        inputs = shared_batch(these, tokenizer)
        if begun is not None:
            inputs = begun.left_of(inputs, these, _groups_of(model, these))
        totals, greedy = log_likelihoods_of_batch(
            model,
            inputs,
            these,
            batch_size=batch_size,
            begun=None if begun is None else begun.cache,
        )
        for index, *of_row in zip(batch, totals.tolist(), greedy.tolist(), strict=True):
            found[index] = list(zip(*of_row, strict=True))[: len(rows[index].rests)]
    return found


def longest_of(rows: Iterable[Shared]) -> int:
    """Return the tokens of the longest prompt with a choice."""
    return max((len(row) + len(rest) for row in rows for rest in row.rests), default=0)


def continues_from_cache(model: Any, longest: int = 0) -> bool:
    """Return whether several new tokens can be read behind the keys and values of a prompt.

    They cannot where a recurrent state was carried over the prompt, where the forward takes no
    cache, where trained tokens stand in front (PEFT makes the cache, or the embeddings, anew in
    each pass), in a model with a vision tower, whose positions are its own, where active adapters
    name the parameters of the answer differently, and where rotary positions are scaled otherwise
    for rows as long as the ``longest`` one than for what they begin with.
    """
    base = base_of(model)
    config = base.config
    return (
        not num_virtual_tokens(model)
        and config.get_text_config() is config
        and cache_argument(base) is not None
        and can_be_parted(config)
        and changing_rotation(config, longest) is None
        and len(_groups_of_answers(model)) <= 1
    )


@torch.no_grad()
@allocates("loss")
def log_likelihoods_of_batch(
    model: Any,
    batch: dict[str, Tensor],
    rows: Sequence[Shared],
    *,
    batch_size: int,
    begun: DynamicCache | None = None,
) -> tuple[Float[Tensor, "batch choices"], Bool[Tensor, "batch choices"]]:
    """Return the summed log-likelihood of each choice of each row; all prompts are read at once.

    And whether each of its tokens is the most likely one. Rows with fewer choices than others have
    numbers of no meaning behind theirs.

    Args:
        model: If any choice has more than one own token, one that `continues_from_cache`.
        batch: The rows' `shared_batch`.
        rows: Where their choices part ways.
        batch_size: Choices in each pass 2.
        begun: Keys and values of tokens before those of the batch, of one row for all.
    """
    longer = [(row, choice) for row, shared in enumerate(rows) for choice in shared.longer]
    cache = DynamicCache(config=base_of(model).config) if longer else None
    if begun is not None:
        cache = repeated(begun, len(rows))
    sums, greedy = _pass_1(model, batch, rows, cache)
    lengths = [len(rows[row].rests[choice]) for row, choice in longer]
    for indices in by_length(lengths, batch_size):
        places, choices = torch.tensor([longer[index] for index in indices]).unbind(1)
        rests = [rows[row].rests[choice] for row, choice in (longer[index] for index in indices)]
        assert cache is not None
        before = batch["attention_mask"][places]
        more, is_greedy = _pass_2(model, rests, before, with_rows(cache, places))
        at = places.to(sums.device), choices.to(sums.device)
        sums[at] += more
        greedy[at] &= is_greedy
    return sums, greedy


def shared_batch(rows: Sequence[Shared], tokenizer: Any) -> dict[str, Tensor]:
    """Return what pass 1 reads, (batch, shared) each, padded on the left.

    Where the choices have nothing in common no token is supervised: the row is all prompt.
    """
    examples = [
        {
            "input_ids": row.prompt + row.common,
            "labels": [IGNORED_LABEL] * len(row.prompt) + row.common,
        }
        for row in rows
    ]
    return Collator(tokenizer, padding_side="left")(examples)


@dataclass(frozen=True)
class _Begun:
    """What all prompts begin with, read."""

    cache: DynamicCache
    length: int
    """Its tokens."""

    def left_of(
        self, batch: dict[str, Tensor], rows: Sequence[Shared], edited: Tensor | None
    ) -> dict[str, Tensor]:
        """Return what is left to read of a left-padded `shared_batch`, and its whole mask.

        The beginning, which stood between padding and rest, is now in front of both. ``edited`` are
        the rows' ``_groups_of``.
        """
        longest = batch["input_ids"].shape[1] - self.length
        rest = {name: value[:, -longest:].clone() for name, value in batch.items()}
        mask, groups = rest["attention_mask"], torch.full_like(rest["labels"], -1)
        for place, row in enumerate(rows):
            start = longest - (len(row) - self.length)
            mask[place, :start] = 0
            if edited is not None:
                groups[place, start:] = edited[place, self.length : len(row)]
        rest["attention_mask"] = pad(mask, (self.length, 0), value=1)
        return rest if edited is None else {**rest, "intervention_mask": groups}


def _groups_of(model: Any, rows: Sequence[Shared]) -> Tensor | None:
    """Return (rows, tokens), right-padded: which φ edits each token that pass 1 reads, or -1.

    None without ReFT.
    """
    if not reft_configs(model):
        return None
    labels = [[IGNORED_LABEL] * len(row.prompt) + row.common for row in rows]
    return groups_of(model, [{"labels": of_row} for of_row in labels])


def _read_beginning(model: Any, rows: Sequence[Shared]) -> _Begun | None:
    """Read what all prompts begin with; None if that is little, or cannot be read by itself.

    Each row keeps a token of its own. A window of attention would count the padding that comes to
    stand behind the beginning.
    """
    base = base_of(model)
    known = inspect.signature(base.forward).parameters
    if not continues_from_cache(model, longest_of(rows)) or has_windows(base.config):
        return None
    if "position_ids" not in known:
        return None
    together = zip(*(row.prompt[:-1] for row in rows), strict=False)
    beginning = [tokens[0] for tokens in takewhile(lambda tokens: len({*tokens}) == 1, together)]
    if len(rows) < 2 or len(beginning) < _LEAST_BEGINNING:
        return None
    if len({(config.positions, config.tie) for config in reft_configs(model)}) > 1:
        return None
    groups = _groups_of(model, rows[:1])
    for start in range(0, len(rows), _COMPARED):
        others = _groups_of(model, rows[start : start + _COMPARED])
        if groups is not None and others is not None:
            size = len(beginning)
            alike = (others[:, :size] == groups[:, :size]).all(0)
            beginning = beginning[: int(alike.long().cumprod(0).sum())]
    if len(beginning) < _LEAST_BEGINNING:
        return None
    device = device_of(base)
    inputs = {"input_ids": torch.tensor([beginning], device=device)}
    if groups is not None:
        inputs["intervention_mask"] = groups[:1, : len(beginning)].to(device)
    cache = DynamicCache(config=base.config)
    few = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    model(**inputs, **with_cache(base, cache), **few)
    return _Begun(cache=cache, length=len(beginning))


@allocates("loss")
def _pass_1(
    model: Any, batch: dict[str, Tensor], rows: Sequence[Shared], cache: DynamicCache | None
) -> tuple[Float[Tensor, "batch choices"], Bool[Tensor, "batch choices"]]:
    """Return the log-likelihood of what choices have in common and of each one's first own token.

    And whether these are the most likely tokens. ``cache`` is filled if there is one.
    """
    base = base_of(model)
    run, labels = forward_of(model, batch)
    # Whatever stands in front, the tokens end at the right.
    asked = pad(labels[:, 1:] != IGNORED_LABEL, (0, 1), value=True)
    places, columns = asked.nonzero(as_tuple=True)
    is_last = columns == labels.shape[1] - 1
    targets = torch.zeros(len(places), max(len(row.rests) for row in rows), dtype=torch.long)
    targets = targets.to(labels.device)
    targets[~is_last, 0] = labels[places[~is_last], columns[~is_last] + 1]
    firsts = [torch.tensor([rest[0] for rest in row.rests]) for row in rows]
    targets[is_last] = torch.nn.utils.rnn.pad_sequence(firsts, batch_first=True).to(labels.device)
    kept = {} if cache is None else with_cache(base, cache)
    each, is_top = log_likelihoods_at(
        base, places, columns, targets, lambda **more: run(**kept, **more)
    )
    device = each.device
    of_common, of_rests = ((is_last == last).nonzero()[:, 0].to(device) for last in (False, True))
    common = each.new_zeros(len(rows))
    row = places.to(device)[of_common]
    common.index_add_(0, row, each[of_common, 0])
    # Counted, as a prediction on the meta device knows no values.
    missed = torch.zeros_like(common).index_add_(0, row, 1 - is_top[of_common, 0].to(each.dtype))
    return common[:, None] + each[of_rests], (missed == 0)[:, None] & is_top[of_rests]


@allocates("loss")
def _pass_2(
    model: Any, rests: Sequence[list[int]], before: Tensor, cache: DynamicCache
) -> tuple[Float[Tensor, " choices"], Bool[Tensor, " choices"]]:
    """Return the log-likelihood of what follows each choice's first own token.

    And whether these are the most likely tokens.

    Args:
        model: See ``continues_from_cache``.
        rests: Each choice's own tokens, at least two.
        before: (choices, shared): the attended tokens of pass 1.
        cache: Their keys and values, which grow.
    """
    base = base_of(model)
    # The last token of a choice is predicted and not read.
    read = [torch.tensor(rest[:-1]) for rest in rests]
    ids = torch.nn.utils.rnn.pad_sequence(read, batch_first=True)
    counts = torch.tensor([len(tokens) for tokens in read])
    attended = torch.arange(ids.shape[1]) < counts[:, None]
    mask = torch.cat([before.cpu(), attended.long()], 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    for group in _groups_of_answers(model):
        inputs["intervention_mask"] = torch.where(attended, group, -1)
    places, columns = attended.nonzero(as_tuple=True)
    following = torch.cat([torch.tensor(rest[1:]) for rest in rests])
    device = device_of(base)
    there = "cpu" if device.type == "meta" else device
    inputs = {name: value.to(there) for name, value in inputs.items()}
    kept = with_cache(base, cache)
    each, is_top = log_likelihoods_at(
        base, places, columns, following[:, None], lambda **more: model(**inputs, **kept, **more)
    )
    places = places.to(each.device)
    sums, missed = each.new_zeros(2, len(rests))
    sums.index_add_(0, places, each[:, 0])
    missed.index_add_(0, places, 1 - is_top[:, 0].to(each.dtype))
    return sums, missed == 0


def _groups_of_answers(model: Any) -> set[int]:
    """Return which φ edits an answer's tokens, -1 for none, in each ReFT adapter of a model."""
    configs = reft_configs(model)
    return {config.num_groups - 1 if config.where.response else -1 for config in configs}
