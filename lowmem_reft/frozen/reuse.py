"""Trains from stored constants: the upper blocks only, on the tokens that an edit can reach.

``trunk`` holds for every PEFT method whose lowest trained block is k: hidden vectors that leave the
blocks below are stored once and fed in. ``prefix`` is ReFT's alone: on a causal model nothing an
edit does reaches the tokens before the first edited position, so their keys and values above k are
constants too, and training runs on the rest of each example. (LoRA changes the keys and values of
the prompt.)

Source of the idea: the frozen base itself; related: Skip2-LoRA's forward cache (arXiv 2410.21073),
aLoRA's reuse of keys and values (arXiv 2504.12397).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowmem_reft.base import base_digest
from lowmem_reft.blocks import base_of, device_of, find_blocks, hidden_size
from lowmem_reft.devices import dtype_name
from lowmem_reft.frozen.split import Feed, TrunkReached, num_constant_blocks
from lowmem_reft.frozen.store import CorruptShardError, Layout, Record, Shape, Store, key_of
from lowmem_reft.positions import IGNORED_LABEL
from lowmem_reft.tuner import ReftModel

logger = logging.getLogger(__name__)

Example = dict[str, Any]
"""``input_ids`` and ``labels``: lists of integers (labels: an integer for a classifier)."""

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest relative difference, in L2, between the gradients of the reused and the plain step."""


class ReuseError(Exception):
    """Why nothing can be reused here, in words that end a sentence."""


class NoRoomError(ReuseError):
    """The disk, or the limit, has no room for a store."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What of each example is constant."""

    num_blocks: int
    """Blocks whose outputs are constant."""
    first_edited: list[int]
    """Per example: tokens before the first one that training can change; 0 without a prefix."""


def find_split(model: Any, examples: Sequence[Example], *, prefix: bool) -> Split:
    """Return what is constant.

    Args:
        model: A PeftModel.
        examples: The data set.
        prefix: Whether keys and values of a constant prefix may be used.

    Raises:
        ReuseError: nothing is constant.
    """
    num_blocks = num_constant_blocks(model)
    if num_blocks == 0:
        raise ReuseError("the first block or the embedding is trained")
    dropout = _dropout(base_of(model))
    if dropout is not None:
        raise ReuseError(f"the base drops out activations ({dropout})")
    first = [0] * len(examples)
    if prefix and _prefix_is_constant(model):
        first = [_first_edited(model, example) for example in examples]
    return Split(num_blocks=num_blocks, first_edited=first)


def _dropout(base: Any) -> str | None:
    """Return the name of something in the base that drops out activations; None if nothing does."""
    for name, module in base.named_modules():
        if "lora_" in name or "reft" in name:
            continue
        rate = (
            module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        )
        rate = rate.p if isinstance(rate, nn.Dropout) else rate
        if isinstance(rate, float) and rate > 0:
            return f"{name}: {rate}"
    return None


def _prefix_is_constant(model: Any) -> bool:
    """Whether all that is trained sits in ReFT layers of a causal model without sliding windows.

    Checkpointed blocks read no cache, so with activation checkpointing there is no prefix.
    """
    base = base_of(model)
    if any(getattr(block, "gradient_checkpointing", False) for block in find_blocks(base)[1]):
        return False
    if not isinstance(getattr(model, "base_model", None), ReftModel):
        return False
    if any("reft_phi" not in name for name, p in model.named_parameters() if p.requires_grad):
        return False  # a head, say, that is trained on hidden vectors of the prefix
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return bool(base.can_generate()) and kinds == {"full_attention"}


def _first_edited(model: Any, example: Example) -> int:
    """Return how many tokens come before the first edited one (and before the first prediction)."""
    groups = _groups(model, [example])
    edited = (groups >= 0).any(0).nonzero()
    labels = torch.tensor(example["labels"])
    supervised = (labels != IGNORED_LABEL).nonzero()
    # The vector before the first supervised token predicts it, so it is needed above.
    ends = [int(edited[0]) if len(edited) else len(labels) - 1]
    ends.append(int(supervised[0]) - 1 if len(supervised) else len(labels) - 1)
    return max(0, min(ends))


def _groups(model: Any, examples: Sequence[Example]) -> Tensor:
    """Return (batch, seq), right-padded: the index of the φ that edits each token, or -1."""
    length = max(len(example["input_ids"]) for example in examples)
    labels = torch.full((len(examples), length), IGNORED_LABEL)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        labels[row, :size] = torch.tensor(example["labels"])
        mask[row, :size] = 1
    call = {"input_ids": labels, "attention_mask": mask, "labels": labels}
    selector = model.base_model.current.selector
    groups = torch.full((len(examples), length), -1)
    selection, _ = selector.select(list(model.base_model.active_adapters), (), call, training=True)
    for indices in selection.values():
        for group, (rows, columns) in enumerate(indices):
            groups[rows, columns] = group
    return groups


class Reuse:
    """The constants of one data set under one adapted model, and the loss computed from them.

    Args:
        model: A PeftModel on its device.
        examples: The data set, in the order of the indices that batches name.
        root: Directory of stores.
        prefix: Whether to keep keys and values of constant prefixes.
        split: What is constant, if ``find_split`` has said so already.
        limit_bytes: Most that the store may take; None for no limit.
        report: Told about progress: (done, total) shards.

    Raises:
        ReuseError: nothing can be reused; the message says why.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        root: Path,
        *,
        prefix: bool = True,
        split: Split | None = None,
        limit_bytes: int | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.model = model
        self.examples = examples
        self.split = split or find_split(model, examples, prefix=prefix)
        self.base = base_of(model)
        self.feed = Feed(model, self.split.num_blocks)
        self.num_layers = len(find_blocks(self.base)[1])
        self.layout = self._layout()
        self.store = Store(root, key_of(self._facts), self.layout, self._facts)
        self.build_time_s = 0.0
        self._build(limit_bytes, report)

    @property
    def mode(self) -> str:
        """Return ``prefix`` if keys and values are stored as well, else ``trunk``."""
        return "prefix" if any(self.split.first_edited) else "trunk"

    def _layout(self) -> Layout:
        config = self.base.config.get_text_config()
        heads = config.num_attention_heads
        return Layout(
            shapes=[
                Shape(first, len(example["input_ids"]) - first)
                for first, example in zip(self.split.first_edited, self.examples, strict=True)
            ],
            hidden_size=hidden_size(self.base),
            num_cached_layers=self.num_layers - self.split.num_blocks,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden_size(self.base) // heads,
            dtype=dtype_name(self._dtype()),
        )

    def _dtype(self) -> torch.dtype:
        """Return what blocks compute in, which is what norms and embeddings are stored in."""
        dtypes: list[torch.dtype] = [
            parameter.dtype
            for parameter in self.base.parameters()
            if parameter.is_floating_point() and not parameter.requires_grad
        ]
        return dtypes[0] if dtypes else torch.float32

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Return everything that the stored numbers depend on."""
        return {
            "base": base_digest(self.base, exclude=_belongs_to_an_adapter),
            "architecture": type(self.base).__name__,
            "config": key_of({"config": self.base.config.to_json_string(use_diff=False)}),
            "tokens": key_of({"tokens": [example["input_ids"] for example in self.examples]}),
            "num_blocks": self.split.num_blocks,
            "first_edited": key_of({"first": self.split.first_edited}),
            "dtype": self.layout.dtype,
            "attention": str(self.base.config._attn_implementation),
        }

    def _build(self, limit_bytes: int | None, report: Callable[[int, int], None]) -> None:
        started = time.perf_counter()
        with self.store.locked():
            reason = self.store.check_space(limit_bytes)
            if reason is not None:
                raise NoRoomError(reason)
            missing = self.store.missing_shards()
            for done, shard in enumerate(missing):
                report(done, len(missing))
                self.store.write(shard, self._compute(self.layout.shards[shard]))
        self.build_time_s += time.perf_counter() - started

    def read(self, index: int) -> Record:
        """Return the constants of an example; a damaged shard is built again, once."""
        try:
            return self.store.read(index)
        except CorruptShardError as error:
            logger.warning("%s; it is built again", error)
            with self.store.locked():
                self.store.forget(error.shard)
                self.store.write(error.shard, self._compute(self.layout.shards[error.shard]))
            return self.store.read(index)

    @torch.no_grad()
    def _compute(self, indices: Sequence[int], batch_size: int = 16) -> list[Record]:
        """Run the base over examples, like lengths together, and keep what is constant."""
        # In training mode: quantized layers may compute otherwise in evaluation mode (int8 on a CPU
        # quantizes activations then), and there is no dropout that could differ.
        was_training = self.base.training
        self.base.train()
        order = sorted(indices, key=lambda index: -len(self.examples[index]["input_ids"]))
        records: dict[int, Record] = {}
        try:
            with self.model.disable_adapter():
                for start in range(0, len(order), batch_size):
                    part = order[start : start + batch_size]
                    records.update(zip(part, self._compute_batch(part), strict=True))
        finally:
            self.base.train(was_training)
        return [records[index] for index in indices]

    def _compute_batch(self, indices: Sequence[int]) -> list[Record]:
        device = device_of(self.base)
        lengths = [len(self.examples[index]["input_ids"]) for index in indices]
        ids = torch.zeros(len(indices), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = torch.tensor(self.examples[index]["input_ids"])
            mask[row, : lengths[row]] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        with_prefix = any(self.split.first_edited[index] for index in indices)
        hidden, cache = self._run(inputs, with_prefix=with_prefix)
        records = []
        for row, index in enumerate(indices):
            shape = self.layout.shapes[index]
            end = shape.prefix + shape.suffix
            kept = hidden[row, shape.prefix : end].cpu()
            empty = torch.empty(
                (self.layout.num_cached_layers, self.layout.num_kv_heads, 0, self.layout.head_dim),
                dtype=hidden.dtype,
            )
            keys = values = empty
            if cache is not None and shape.prefix:
                upper: Any = cache.layers[self.split.num_blocks :]
                keys = torch.stack([layer.keys[row, :, : shape.prefix] for layer in upper]).cpu()
                values = torch.stack(
                    [layer.values[row, :, : shape.prefix] for layer in upper]
                ).cpu()
            records.append(Record(kept, keys, values))
        return records

    def _run(
        self, inputs: dict[str, Tensor], *, with_prefix: bool
    ) -> tuple[Tensor, DynamicCache | None]:
        """Return the trunk, (batch, seq, hidden), and the cache of a pass over all blocks."""
        if not with_prefix or self.layout.num_cached_layers == 0:
            with self.feed.recording():
                try:
                    self.base(**inputs)
                except TrunkReached as reached:
                    return reached.hidden, None
            raise RuntimeError("the forward pass never came to the end of the trunk")
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        cache = DynamicCache(config=self.base.config)
        handle = self.feed.blocks[-1].register_forward_hook(keep, prepend=True)
        try:
            self.base(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            handle.remove()
        return seen[0], cache

    def loss(
        self, indices: Sequence[int], labels: Tensor, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the training loss of examples, with gradients for what is trained.

        Args:
            indices: Which examples.
            labels: (batch, seq) of the examples padded on the right, or (batch,) classes.
            num_items_in_batch: As the Trainer passes it.
        """
        records = [self.read(int(index)) for index in indices]
        device = device_of(self.base)
        suffix, prefix = (max(sizes) for sizes in zip(*map(_sizes, records), strict=True))
        batch, dtype = len(records), self._dtype()
        hidden = torch.zeros(batch, suffix, self.layout.hidden_size, dtype=dtype)
        mask = torch.zeros(batch, prefix + suffix, dtype=torch.long)
        positions = torch.zeros(batch, suffix, dtype=torch.long)
        for row, record in enumerate(records):
            size, before = _sizes(record)
            hidden[row, :size] = record.hidden
            mask[row, prefix - before : prefix + size] = 1
            positions[row] = torch.arange(before, before + suffix)
        trunk = hidden.to(device)
        arguments: dict[str, Any] = {"attention_mask": mask.to(device)}
        if labels.ndim == 1:  # a classifier looks for the last token that is not padding
            arguments["input_ids"] = self._input_ids(indices, suffix).to(device)
        else:
            arguments["inputs_embeds"] = trunk  # what the blocks below would get plays no part
        if labels.ndim == 2:
            aligned = torch.full((batch, suffix), IGNORED_LABEL)
            for row, record in enumerate(records):
                size, before = _sizes(record)
                aligned[row, :size] = labels[row, before : before + size]
            labels = aligned.to(device)
        arguments["labels"] = labels
        if num_items_in_batch is not None:
            arguments["num_items_in_batch"] = num_items_in_batch
        if prefix:
            groups = _groups(self.model, [self.examples[int(index)] for index in indices])
            edited = torch.full((batch, suffix), -1)
            for row, record in enumerate(records):
                size, before = _sizes(record)
                edited[row, :size] = groups[row, before : before + size]
            arguments["intervention_mask"] = edited.to(device)
            arguments["position_ids"] = positions.to(device)
            arguments["past_key_values"] = self._cache(records, prefix, device, dtype)
            arguments["use_cache"] = True
        with self.feed.feeding(trunk):
            loss: Tensor = self.model(**arguments)["loss"]
        return loss

    def _input_ids(self, indices: Sequence[int], length: int) -> Tensor:
        """Return the token ids of examples, (batch, length), padded on the right."""
        pad = getattr(self.base.config.get_text_config(), "pad_token_id", None) or 0
        ids = torch.full((len(indices), length), pad)
        for row, index in enumerate(indices):
            tokens = self.examples[int(index)]["input_ids"]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def _cache(
        self, records: Sequence[Record], length: int, device: torch.device, dtype: torch.dtype
    ) -> DynamicCache:
        """Return a cache with the prefixes' keys and values, padded on the left to ``length``."""
        layout, cache = self.layout, DynamicCache(config=self.base.config)
        batch = len(records)
        # Masks are sized by the first layer, which is fed and has no keys of its own.
        nothing = torch.zeros(batch, 1, length, 1, dtype=dtype, device=device)
        for layer in range(self.split.num_blocks):
            cache.update(nothing, nothing, layer)
        shape = (layout.num_cached_layers, batch, layout.num_kv_heads, length, layout.head_dim)
        keys, values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        for row, record in enumerate(records):
            before = record.keys.shape[2]
            if before:
                keys[:, row, :, length - before :] = record.keys
                values[:, row, :, length - before :] = record.values
        keys, values = keys.to(device), values.to(device)
        for layer in range(layout.num_cached_layers):
            cache.update(keys[layer], values[layer], self.split.num_blocks + layer)
        return cache

    def prove(self, indices: Sequence[int], batch: dict[str, Tensor]) -> float:
        """Compare the reused step with the plain one; return the relative gradient difference.

        Args:
            indices: Examples of the batch.
            batch: What the plain step gets: ``input_ids``, ``attention_mask``, ``labels``.

        Raises:
            ReuseError: losses or gradients differ by more than rounding; the message names the
                module whose gradient is furthest off.
        """
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        was_training = self.model.training
        self.model.train()
        state = torch.get_rng_state()
        try:
            plain_loss = self.model(**batch)["loss"]
            plain = torch.autograd.grad(plain_loss, list(trained.values()), allow_unused=True)
            torch.set_rng_state(state)
            try:
                loss = self.loss(indices, batch["labels"])
                reused = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ReuseError(
                    f"{type(self.base).__name__} cannot be fed stored hidden vectors "
                    f"({type(error).__name__}: {str(error).splitlines()[0]})"
                ) from error
        finally:
            torch.set_rng_state(state)
            self.model.train(was_training)
        tolerance = TOLERANCE[self.layout.dtype]
        worst, total = _largest_difference(list(trained), plain, reused)
        before, after = plain_loss.item(), loss.item()
        off = abs(after - before) / max(abs(before), 1e-12)
        if not (total <= tolerance and off <= tolerance):
            raise ReuseError(
                f"gradients differ by {total:.1e} and the loss by {off:.1e} (at most "
                f"{tolerance:.0e} would be rounding), most of all in {worst}"
            )
        return total


def _largest_difference(
    names: list[str], plain: Sequence[Tensor | None], reused: Sequence[Tensor | None]
) -> tuple[str, float]:
    """Return the parameter that differs most, and the relative L2 difference of all."""
    squares: dict[str, float] = {}
    norm = 0.0
    for name, first, second in zip(names, plain, reused, strict=True):
        if first is None and second is None:
            continue
        a = torch.zeros(()) if first is None else first.double()
        b = torch.zeros(()) if second is None else second.double()
        squares[name] = float((a - b).square().sum())
        norm += float(a.square().sum())
    worst = max(squares, key=lambda name: squares[name], default="")
    return worst, (sum(squares.values()) / norm) ** 0.5 if norm else 0.0


def _sizes(record: Record) -> tuple[int, int]:
    """Return (suffix, prefix) tokens of a record."""
    return record.hidden.shape[0], record.keys.shape[2]


def _belongs_to_an_adapter(name: str) -> bool:
    return any(part in name for part in ("reft_phi", "lora_", "modules_to_save"))


def prepare(
    model: Any,
    examples: Sequence[Example],
    batch: dict[str, Tensor],
    *,
    mode: str,
    root: Path,
    limit_bytes: int | None,
    epochs: float,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Reuse | None:
    """Build what a training run can reuse, and prove it on a batch; None trains the plain way.

    Args:
        model: A PeftModel on its device.
        examples: The data set.
        batch: The first of the examples as the plain step gets them.
        mode: ``off``; ``trunk``: hidden vectors only; ``prefix``: keys and values of constant
            prefixes as well, where there are any; ``auto``: whichever saves time, or neither.
        root: Directory of stores.
        limit_bytes: Most that the store may take; None for no limit.
        epochs: Passes over the data that will be made.
        report: Told about progress.

    Returns:
        What to train from. If nothing can be reused, None; the reason is logged.
    """
    if mode == "off":
        return None
    try:
        split = find_split(model, examples, prefix=mode != "trunk")
        share = _estimated_share(model, examples, split, epochs)
        if mode == "auto" and share > WORTHWHILE:
            raise ReuseError(f"it would save only {100 * (1 - share):.0f} % of the arithmetic")
        reuse = _build(model, examples, split, mode, root, limit_bytes, report)
        reuse.prove(list(range(len(batch["labels"]))), batch)
    except ReuseError as error:
        level = logging.INFO if mode == "auto" else logging.WARNING
        logger.log(level, "no frozen computation is reused: %s", error)
        return None
    return reuse


WORTHWHILE = 0.9
"""``auto`` reuses if the arithmetic of the whole run shrinks to at most this share."""


def _build(
    model: Any,
    examples: Sequence[Example],
    split: Split,
    mode: str,
    root: Path,
    limit_bytes: int | None,
    report: Callable[[int, int], None],
) -> Reuse:
    """Build the larger store if there is room for it, else the smaller one."""
    try:
        return Reuse(model, examples, root, split=split, limit_bytes=limit_bytes, report=report)
    except NoRoomError:
        if mode != "auto":
            raise
        return Reuse(model, examples, root, prefix=False, limit_bytes=limit_bytes, report=report)


def _estimated_share(model: Any, examples: Sequence[Example], split: Split, epochs: float) -> float:
    """Return the arithmetic of a reused run over that of a plain one, in blocks times tokens."""
    layers = len(find_blocks(base_of(model))[1])
    upper = layers - split.num_blocks
    tokens = sum(len(example["input_ids"]) for example in examples)
    kept = tokens - sum(split.first_edited)
    plain = epochs * (layers + upper) * tokens
    reused = layers * tokens + epochs * 2 * upper * kept
    return reused / plain
