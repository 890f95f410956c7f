"""Trains from a store: the upper blocks only, on the tokens that an edit can reach.

``trunk`` holds for every PEFT method whose lowest trained block is k: hidden vectors that leave the
blocks below are stored once and fed in. ``prefix`` is ReFT's alone: on a causal model nothing an
edit does reaches the tokens before the first edited position, so their keys and values above k are
constants too, and training runs on the rest of each example. (LoRA changes the keys and values of
the prompt.)

Source of the idea: the frozen base itself; related: Skip2-LoRA's forward cache (arXiv 2410.21073),
aLoRA's reuse of keys and values (arXiv 2504.12397).
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.identity import base_digest
from lowmem_reft.base.loss import log_likelihood_of
from lowmem_reft.base.ours import ours
from lowmem_reft.base.partial import blocks_of
from lowmem_reft.base.quantization import dequantized, dequantized_bytes
from lowmem_reft.base.residency import Residency
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.packing import Pack
from lowmem_reft.machine.devices import dtype_name
from lowmem_reft.machine.processes import main_first
from lowmem_reft.methods.constant import adapter_parts
from lowmem_reft.reft.tuner import groups_of, prompt_arguments
from lowmem_reft.reuse.batch import ReadAhead, Stacked, aligned, run_stacked, stack
from lowmem_reft.reuse.build import Below, compute, records_of, without_adapters
from lowmem_reft.reuse.disk import NoRoomError
from lowmem_reft.reuse.layout import Layout, Shape, in_common
from lowmem_reft.reuse.split import (
    Constant,
    Example,
    feeding_errors,
    find_constant,
    is_causal,
)
from lowmem_reft.reuse.store import CorruptShardError, Record, Store, key_of

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Told about progress: shards done, and all of them."""

FEW_TOKENS = 1024
"""Tokens that run in a step, up to which dequantizing is a share of it that is worth memory: a 20th
on two cores from 512 on, where products take longer, a tenth on a card."""

FROM_STORE = ("input_ids", "attention_mask", "labels", "position_ids", "use_cache")
"""Arguments of a forward pass that a stored batch brings with it."""


class Reuse:
    """What is constant of one data set under one adapted model, and the loss computed from it.

    A base of which only upper blocks are resident is run block by block: each lower block is read
    once, runs over the whole data set and is dropped.

    Args:
        model: A PeftModel on its device.
        examples: The data set, in the order of the indices that batches name.
        root: Directory of stores.
        prefix: Whether to keep keys and values of constant prefixes.
        constant: What is, if ``find_constant`` has said so already.
        recompute: Whether to compute the prefixes' keys and values from their hidden vectors in
            every step, without a graph, instead of storing them: less space, more time.
        training: Whether it is for training, or for scoring.
        limit_bytes: Most that the store may take; None for no limit.
        report: Told about progress: (done, total) shards.

    Raises:
        ReuseError: Nothing can be reused; the message says why.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        root: Path,
        *,
        prefix: bool = True,
        constant: Constant | None = None,
        recompute: bool = False,
        training: bool = True,
        limit_bytes: int | None = None,
        report: Report = lambda done, total: None,
    ) -> None:
        started = time.perf_counter()
        self.pack: Pack | None = None
        """Tells which examples of a batch stand one after the other in rows; not with prefixes."""
        self.spared_bytes = 0
        """What a plain step keeps for its backward pass and a reused one does not, at most; 0 until
        ``proof.prove`` has compared them."""
        self.model = model
        self.examples = examples
        self.training = training
        self.constant = constant or find_constant(model, examples, prefix=prefix)
        self.base = base_of(model)
        self.residency: Residency | None = ours(self.base).residency
        self.num_layers = len(blocks_of(model))
        self.root = root
        self._tokens = [example["input_ids"] for example in examples]
        self._common = in_common(self._tokens, causal=is_causal(self.base))
        first_edited = self.constant.first_edited
        self.recompute = recompute and any(first_edited)
        self.shapes = self._shapes(first_edited)
        kept = [0] * len(examples) if recompute else first_edited
        self.layout, self.store = self._store(self.constant.num_blocks, kept)
        self.was_built = False
        self._limit_bytes = limit_bytes
        self._build(report)
        self._ahead = ReadAhead(lambda indices: self._stack(indices, self.store.read))
        self.build_time_s = time.perf_counter() - started

    @property
    def mode(self) -> str:
        """Return ``prefix`` if keys and values are stored as well, else ``trunk``."""
        return "prefix" if any(self.constant.first_edited) else "trunk"

    def describe(self) -> str:
        """Say what is reused, in one line."""
        what = f"{self.mode}, {self.constant.num_blocks} of {self.num_layers} blocks are constant"
        size = f"{self.layout.total_bytes / 2**20:,.1f} MiB in {self.store.directory}"
        took = f"built in {self.build_time_s:.1f} s" if self.was_built else "found"
        return f"{what}; {size}, {took}"

    def _shapes(self, first_edited: Sequence[int]) -> list[Shape]:
        pairs = zip(first_edited, self._tokens, strict=True)
        return [Shape(first, len(tokens) - first) for first, tokens in pairs]

    def _store(
        self, num_blocks: int, first_edited: Sequence[int], **more: Any
    ) -> tuple[Layout, Store]:
        """Return a store of what is constant, as it is or is to be; ``more`` facts name it."""
        shapes = self._shapes(first_edited)
        layout = Layout.of(self.base, num_blocks, shapes, self._dtype, self._common)
        facts = {
            **self._facts,
            "num_blocks": num_blocks,
            "first_edited": key_of({"first": first_edited}),
            **more,
        }
        return layout, Store(self.root, key_of(facts), layout, facts)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """What blocks compute in, which is what norms and embeddings are stored in."""
        frozen = (p.dtype for p in self.base.parameters() if not p.requires_grad)
        return next((dtype for dtype in frozen if dtype.is_floating_point), torch.float32)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Everything that the stored numbers depend on, but for what is constant."""
        adapters = tuple(f"{name}." for name, _ in adapter_parts(self.base))
        return {
            "base": base_digest(self.base, exclude=lambda name: name.startswith(adapters)),
            "missing": None if self.residency is None else self.residency.checkpoint.digest(),
            "architecture": type(self.base).__name__,
            "config": key_of({"config": self.base.config.to_json_string(use_diff=False)}),
            "tokens": key_of({"tokens": self._tokens}),
            "dtype": dtype_name(self._dtype),
            "training": self.training,
            "attention": str(self.base.config._attn_implementation),
        }

    def _build(self, report: Report) -> None:
        with main_first(self.store.locked()):
            if not self.store.missing_shards():
                self._remove_stages()  # of a build that was killed at its very end
                return
            self.was_built = True
            self.store.check_room(self._limit_bytes)  # before lower blocks run for nothing
            try:
                below = None if self.residency is None else self._stream(self.residency, report)
                if not self.store.is_complete:  # else the last of the stages is this one
                    self._fill(self.store, self.constant.num_blocks, below, report)
                    if below is not None:
                        below.store.remove()
            except NoRoomError:
                self._remove_stages()  # a smaller store has stages of its own
                raise

    def _stream(self, residency: Residency, report: Report) -> Below:
        """Run the blocks that are not resident, one after the other, over the whole data set.

        Each has a stage, the store of its output, which is removed once the next one is complete;
        a killed build goes on from the last that was begun. Stages belong to this store alone.
        """
        stages = self._stages()
        last = len(stages) - 1
        done = next((i for i in range(last, -1, -1) if stages[i].is_complete), -1)
        for stage in stages[: max(0, done)]:
            stage.remove()  # of a build that was killed just before it did so
        for index in range(done + 1, last + 1):
            below = Below(store=stages[index - 1], num_blocks=index) if index else None
            with ExitStack() as stack:
                for stage in stages[max(0, index - 1) : index + 1]:
                    if stage is not self.store:
                        stack.enter_context(stage.locked())  # nobody may remove it meanwhile
                stack.enter_context(residency.loaded(index, training=self.training))
                self._fill(stages[index], index + 1, below)
            if below is not None:
                below.store.remove()
            report(index + 1, last + 1)
        return Below(store=stages[last], num_blocks=last + 1)

    def _stages(self) -> list[Store]:
        """Return the stores of missing blocks' outputs; the last may be the final one."""
        num_blocks = 0 if self.residency is None else self.residency.first_resident
        everything = [0] * len(self.examples)
        stages = [
            self._store(index + 1, everything, stage_of=self.store.key)[1]
            for index in range(num_blocks)
        ]
        stores_hidden_alone = not any(shape.prefix for shape in self.layout.shapes)
        if stages and num_blocks == self.constant.num_blocks and stores_hidden_alone:
            stages[-1] = self.store
        return stages

    def _remove_stages(self) -> None:
        for stage in self._stages():
            if stage is not self.store:
                stage.remove()

    def _fill(
        self,
        store: Store,
        num_blocks: int,
        below: Below | None,
        report: Report = lambda done, total: None,
    ) -> None:
        """Compute and write what is missing from a locked store."""
        store.check_room(self._limit_bytes)
        missing = store.missing_shards()
        for done, shard in enumerate(missing):
            report(done, len(missing))
            examples = store.layout.shards[shard]
            try:
                records = self._compute(examples, store.layout, num_blocks, below)
            except CorruptShardError as error:  # of the blocks below: from the tokens again
                logger.warning("%s; what it held is computed again", error)
                with self.whole():
                    records = self._compute(examples, store.layout, num_blocks, None)
            try:
                with feeding_errors(self.base):
                    store.write(shard, records)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise NoRoomError(f"the disk is full ({store.directory})") from error

    def _compute(
        self, indices: Sequence[int], layout: Layout, num_blocks: int, below: Below | None
    ) -> list[Record]:
        what = (self.model, self.examples, indices, layout, num_blocks, below)
        with feeding_errors(self.base):
            return compute(*what, training=self.training)

    def whole(self) -> AbstractContextManager[None]:
        """Let the whole model run, for as long as the context lasts, wherever its blocks are."""
        return nullcontext() if self.residency is None else self.residency.streaming()

    def dequantized(self) -> AbstractContextManager[int]:
        """Keep the blocks that training runs dequantized; see ``base.dequantized``."""
        return dequantized(self._upper, self._dtype)

    @property
    def _upper(self) -> Sequence[nn.Module]:
        return blocks_of(self.model)[self.constant.num_blocks :]

    def may_stay_dequantized(self, batch_size: int) -> bool:
        """Return whether ``dequantized`` makes steps faster in no more memory than a plain step.

        That is what a run is predicted to take, and it has room for. It takes no more where the
        bytes are fewer than what the reused step was seen to spare of a plain one on the same
        examples; and steps get faster where the tokens that run in them are few.
        """
        num_tokens = batch_size * sum(shape.suffix for shape in self.shapes) / len(self.shapes)
        needed = dequantized_bytes(self._upper, self._dtype)
        return 0 < needed <= self.spared_bytes and num_tokens <= FEW_TOKENS

    def read(self, index: int) -> Record:
        """Return what is stored of an example; damaged shards are built again."""
        for _ in self.layout.shards:  # a record may span several
            try:
                return self.store.read(index)
            except CorruptShardError as error:
                logger.warning("%s; it is built again", error)
                examples = self.layout.shards[error.shard]
                with self.store.locked(), self.whole():
                    if self.store.is_damaged(error.shard):  # no other process has mended it
                        what = (examples, self.layout, self.constant.num_blocks, None)
                        self.store.write(error.shard, self._compute(*what))
        return self.store.read(index)

    def loss(self, indices: Sequence[int], num_items_in_batch: Any = None) -> Tensor:
        """Return the training loss of examples; ``num_items_in_batch`` is as the Trainer has it."""
        more = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        loss: Tensor = self.supervised(indices, **more)["loss"]
        return loss

    def supervised(self, indices: Sequence[int], *, model: Any = None, **arguments: Any) -> Any:
        """Return what ``forward`` returns when it is also given the examples' labels.

        What else a Trainer passes of a batch is left out: a stored batch brings it with it.
        """
        if isinstance(self.examples[indices[0]]["labels"], int | float):
            labels = torch.tensor([self.examples[index]["labels"] for index in indices])
        else:
            labels = self._aligned(indices, "labels", IGNORED_LABEL)
        labels = labels.to(device_of(self.base))
        more = {name: value for name, value in arguments.items() if name not in FROM_STORE}
        return self.forward(indices, model=model, labels=labels, **more)

    def log_likelihood(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return what ``response_log_likelihood`` does, for a model in evaluation mode."""
        labels = self._aligned(indices, "labels", IGNORED_LABEL)
        # With a prefix the edited tokens are passed; without one the model has to find the prompt.
        has_prefix = any(self.shapes[index].prefix for index in indices)
        arguments = {} if has_prefix else prompt_arguments(self.model, labels)
        return log_likelihood_of(
            self.base, labels, lambda **more: self.forward(indices, **arguments, **more)
        )

    def forward(self, indices: Sequence[int], *, model: Any = None, **arguments: Any) -> Any:
        """Return what the model returns for examples, from what is stored of them.

        Outputs cover the tokens after each constant prefix, padded on the right.

        Args:
            indices: Which examples.
            model: What is called in the model's place: DDP's wrapper around it, which adds up the
                gradients of all processes.
            arguments: Further ones of the model's forward, such as ``labels``.
        """
        stacked = self._ahead.take(indices) or self._stack(indices, self.read)
        if self.recompute:
            stacked = self._with_prefixes(indices, stacked)
        if not is_causal(self.base):
            pad = getattr(self.base.config.get_text_config(), "pad_token_id", None) or 0
            arguments["input_ids"] = self._aligned(indices, "input_ids", pad)
        if stacked.prefix:
            groups = groups_of(self.model, [self.examples[index] for index in indices])
            arguments["groups"] = aligned(stacked.shapes, groups.tolist(), -1)
        num_blocks = self.constant.num_blocks
        return run_stacked(self.model, num_blocks, stacked, wrapped=model, **arguments)

    def announce(self, indices: Sequence[int]) -> None:
        """Begin to read what is stored of a batch that will be asked for."""
        self._ahead.announce(indices)

    def _rows(self, indices: Sequence[int]) -> list[list[int]] | None:
        return None if self.pack is None else self.pack([self.shapes[i].length for i in indices])

    def _stack(self, indices: Sequence[int], read: Callable[[int], Record]) -> Stacked:
        pinned = device_of(self.base).type == "cuda"
        return stack([*map(read, indices)], self.layout, pinned=pinned, rows=self._rows(indices))

    def _aligned(self, indices: Sequence[int], name: str, fill: int) -> Tensor:
        values = [self.examples[index][name] for index in indices]
        shapes = [self.shapes[index] for index in indices]
        return aligned(shapes, values, fill, self._rows(indices))

    @torch.no_grad()
    def _with_prefixes(self, indices: Sequence[int], stacked: Stacked) -> Stacked:
        """Run the prefixes through the upper blocks; keep their keys and values."""
        shapes = [self.shapes[index] for index in indices]
        prefixes = torch.tensor([[shape.prefix] for shape in shapes])
        if not prefixes.any():
            return stacked
        hidden = stacked.hidden.to(device_of(self.base), non_blocking=True)
        mask = (torch.arange(int(prefixes.max())) < prefixes).long().to(hidden.device)
        what = (self.model, self.layout, self.constant.num_blocks, shapes, hidden, mask)
        with without_adapters(self.model):
            records = records_of(*what)
        return stack(records, self.layout, pinned=False)
