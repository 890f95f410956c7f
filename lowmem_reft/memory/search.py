"""What would fit: the ways to save memory from none to all, and the longest example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from lowmem_reft.errors import InputError
from lowmem_reft.memory.planner import Planner, loading_peak_bytes
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import MemoryOptions, written


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the same training."""

    setting: Setting
    """What is trained and how."""
    lengths: Lengths
    """The batch, split into forward passes."""
    cost: float
    """Estimated time per token, relative to a forward and a backward pass without recomputation."""


DEQUANTIZATION_TOKENS = {"nf4": 225, "fp4": 225, "int8": 120}
"""Tokens whose arithmetic takes as long as dequantizing the weights once (an estimate for a card
with 600 GB/s and 60 TFLOPS): small forward passes pay for it more often."""


def estimated_cost(setting: Setting, lengths: Lengths) -> float:
    """Return the time per token relative to one forward and one backward pass: an estimate.

    Frozen matrices take one product in each pass; recomputation repeats forward passes.
    """
    memory = setting.memory
    passes = 2.0
    if memory.activation_checkpointing:
        passes += 1 / memory.checkpoint_every
    passes += 0.65 if memory.mlp_tokens else 0.0
    passes += 0.1 if memory.offload_activations else 0.0
    passes += 0.01 if memory.embedding_on_host else 0.0
    tokens = lengths.batch_size * lengths.seq_len
    return passes / 2 * (1 + DEQUANTIZATION_TOKENS.get(setting.storage, 0) / tokens)


def memory_ladder(config: Any, seq_len: int, setting: Setting) -> list[MemoryOptions]:
    """Return ways to save memory that the setting's method can be trained with, little to all.

    Those that the setting has already stay in every one.
    """
    untied = not getattr(config.get_text_config(), "tie_word_embeddings", False)
    mlp_tokens = max(4096, seq_len // 8)
    plain = MemoryOptions()
    rungs = [plain]
    method = find_method(setting.method.method)
    if method.allows_checkpointing:
        saving = replace(plain, activation_checkpointing=True)
        rungs += [replace(saving, checkpoint_every=every) for every in (4, 2, 1)]
    if seq_len > 2048:
        rungs.append(replace(rungs[-1], mlp_tokens=mlp_tokens))
    if setting.device_type == "cuda":
        if method.allows_checkpointing:
            rungs.append(replace(rungs[-1], offload_activations=True))
        if untied and method.allows_embedding_on_host:
            rungs += [replace(rung, embedding_on_host=True) for rung in rungs]
    return list(dict.fromkeys(_both(rung, setting.memory) for rung in rungs))


def _both(rung: MemoryOptions, given: MemoryOptions) -> MemoryOptions:
    """Return a way to save memory that saves at least as much as either."""
    checkpointing = [way for way in (rung, given) if way.activation_checkpointing] or [given]
    tokens = [way.mlp_tokens for way in (rung, given) if way.mlp_tokens is not None]
    return MemoryOptions(
        activation_checkpointing=checkpointing[0].activation_checkpointing,
        checkpoint_every=min(way.checkpoint_every for way in checkpointing),
        offload_activations=rung.offload_activations or given.offload_activations,
        mlp_tokens=min(tokens, default=None),
        embedding_on_host=rung.embedding_on_host or given.embedding_on_host,
    )


def fit(
    planner: Planner,
    setting: Setting,
    lengths: Lengths,
    *,
    storages: tuple[Any, ...] = (),
    report: Callable[[str], None] = lambda _: None,
) -> Candidate | None:
    """Return the fastest way to run a training that the card holds; None if there is none.

    The product of batch size and gradient accumulation stays, so what is learned does too. The
    setting's own ways to save memory are kept and others added, and its storage is chosen among
    ``storages`` if there are any; ``report`` is told what is being tried.

    Raises:
        InputError: The planner has no card, or the setting is impossible.
    """
    card = planner.card
    if card is None:
        raise InputError("gpu must be given (or memory_gib) to fit into, got neither; give one")
    best: Candidate | None = None
    known: dict[tuple[str, bool], tuple[int, int]] = {}
    ladder = memory_ladder(planner.config, lengths.seq_len, setting)
    for storage, memory in itertools.product(storages or (setting.storage,), ladder):
        way = replace(setting, storage=storage, memory=memory)
        of_base = (storage, memory.embedding_on_host)
        if of_base not in known:
            predictor = planner.predictor(way)
            known[of_base] = predictor.base_bytes, loading_peak_bytes(predictor)
        held, loading = known[of_base]
        if not card.holds(loading):
            continue
        per_example = 0.0  # as far as larger forward passes have shown
        for option in _split(way, lengths):
            if best is not None and option.cost >= best.cost:
                break
            size = option.lengths.batch_size
            if not card.holds(round(0.97 * (held + per_example * size))):
                continue
            report(describe(option))
            peak = planner.training_peak_bytes(option.setting, option.lengths)
            if card.holds(peak) and card.holds(
                planner.needed_bytes(option.setting, option.lengths)
            ):
                best = option
                break
            per_example = (peak - held) / size
    return best


def _split(setting: Setting, lengths: Lengths) -> Iterator[Candidate]:
    """Yield the batch in ever smaller forward passes, the largest and fastest first."""
    total = lengths.batch_size * lengths.gradient_accumulation
    for size in range(lengths.batch_size, 0, -1):
        if total % size == 0:
            part = replace(lengths, batch_size=size, gradient_accumulation=total // size)
            cost = estimated_cost(setting, part)
            yield Candidate(setting=setting, lengths=part, cost=cost)


def describe(candidate: Candidate) -> str:
    """Return a candidate as flags of ``train``."""
    lengths = candidate.lengths
    words = [
        f"--storage {candidate.setting.storage}",
        f"--batch-size {lengths.batch_size}",
        f"--gradient-accumulation {lengths.gradient_accumulation}",
        *written.flags(candidate.setting.memory, without={"memory_gib"}),
    ]
    return " ".join(words)


def longest_seq_len(
    planner: Planner,
    setting: Setting,
    *,
    report: Callable[[str], None] = lambda _: None,
    granularity: int = 64,
) -> int:
    """Return the longest example, batch size 1, that the card holds with every way to save memory.

    Tokens: a multiple of ``granularity``, or the model's own limit of positions; 0 if not even
    ``granularity`` tokens fit. ``report`` is told what is being tried.
    """
    card = planner.card
    assert card is not None
    limit = int(getattr(planner.config.get_text_config(), "max_position_embeddings", 0) or 2**20)
    known: dict[int, int] = {}

    def spare(seq_len: int) -> int:
        """Return the bytes that stay free (negative: that are missing)."""
        if seq_len not in known:
            report(f"{seq_len:,} tokens")
            rungs = memory_ladder(planner.config, seq_len, setting)
            way = replace(setting, memory=rungs[-1])
            peak = planner.needed_bytes(way, Lengths(seq_len=seq_len))
            known[seq_len] = card.memory_bytes - card.required_bytes(peak)
        return known[seq_len]

    low, high = granularity, limit - limit % granularity
    if spare(low) < 0:
        return 0
    if high <= low or spare(high) >= 0:
        return limit
    while high - low > granularity:
        width = high - low
        # Memory grows almost linearly with the length, so the crossing is close to this.
        share = spare(low) / (spare(low) - spare(high))
        guess = low + round(width * share) // granularity * granularity
        guess = min(high - granularity, max(low + granularity, guess))
        for seq_len in (guess, guess + granularity, guess - granularity, (low + high) // 2):
            seq_len -= seq_len % granularity
            done = high - low <= width // 2 and seq_len != guess + granularity
            if low < seq_len < high and not done:
                if spare(seq_len) >= 0:
                    low = seq_len
                else:
                    high = seq_len
    return low


def reporter(*, quiet: bool) -> Callable[[str], None]:
    """Return what tells a person at a terminal what is being tried."""
    console = Console(stderr=True, markup=False)
    if quiet or not console.is_terminal:
        return lambda _: None
    return lambda text: console.print(f"trying {text}", style="dim", highlight=False)
