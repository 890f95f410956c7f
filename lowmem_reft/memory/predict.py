"""Runs the real model and the real step on the meta device and counts what would be alive.

Nothing is loaded and nothing is computed: tensors have shapes and no values. The classes are those
that ``train`` uses, so the prediction cannot drift from the code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from lowmem_reft.base.blocks import base_of, find_blocks
from lowmem_reft.base.caches import with_cache
from lowmem_reft.base.synthetic import base_on_meta
from lowmem_reft.base.techniques import HostEmbedding
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import DTYPES
from lowmem_reft.machine.marks import begins_step
from lowmem_reft.memory.kernels import Kernels
from lowmem_reft.memory.live import (
    LiveMemory,
    gradients_labelled,
    label_model,
    quantization_constants,
)
from lowmem_reft.memory.step import make_batch, optimizer_tensors, training_step, warm_up
from lowmem_reft.methods.attach import attach
from lowmem_reft.methods.choices import Shared, continues_from_cache, log_likelihoods_of_batch
from lowmem_reft.methods.constant import lower_part, num_constant_blocks
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.methods.table import find_method
from lowmem_reft.methods.virtual_tokens import num_virtual_tokens
from lowmem_reft.options import MemoryOptions, MethodOptions, Storage
from lowmem_reft.reft.rotation import computed_once
from lowmem_reft.reft.tuner import groups_of
from lowmem_reft.reuse.batch import Stacked, aligned, run_stacked
from lowmem_reft.reuse.disk import ReuseError
from lowmem_reft.reuse.layout import Layout, Shape
from lowmem_reft.reuse.split import find_constant, is_causal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from lowmem_reft.reuse.split import Example

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers whose memory is predicted."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything but lengths and batch sizes that a step's memory depends on."""

    storage: Storage = "nf4"
    """How the frozen weights are stored."""
    compute_dtype: str = "bf16"
    """Arithmetic of the base: bf16, fp16 or fp32."""
    method: MethodOptions = field(default_factory=MethodOptions)
    """What is trained."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    """How memory is saved."""
    chunked_loss: bool = True
    """Whether the loss is ours; False is a model's own, on the logits of all tokens."""
    optim: str = "adamw_torch"
    """Optimizer, by its transformers name."""
    task_type: str = "CAUSAL_LM"
    """PEFT task type."""
    num_labels: int | None = None
    """Classes of a SEQ_CLS head."""
    attn_implementation: str | None = None
    """eager, sdpa, ...; default: what transformers picks."""
    reuse: Literal["off", "trunk", "prefix"] = "off"
    """What a training step reads from a store: see ``options.ReuseOptions``."""
    resident: Literal["all", "upper"] = "all"
    """Whether the blocks below the constants are on the device too."""
    device_type: str = "cuda"
    """``cuda`` or ``cpu``."""
    bf16: bool = True
    """Whether the card computes in bf16 (compute capability >= 8.0), and so has flash attention."""

    def of_base(self) -> dict[str, Any]:
        """Return what loads, makes up or predicts the base is told."""
        return {
            "storage": self.storage,
            "compute_dtype": DTYPES[self.compute_dtype],
            "task_type": self.task_type,
            "num_labels": self.num_labels,
            "attn_implementation": self.attn_implementation,
        }

    def attached_to(self, base: Any) -> Any:
        """Put the method's adapter on a base, with its ways to save memory: see ``attach``."""
        return attach(
            base,
            self.method,
            task_type=self.task_type,
            memory=self.memory,
            chunked_loss=self.chunked_loss,
        )

    @staticmethod
    def of_device(device: torch.device) -> dict[str, Any]:
        """Return the fields that follow from a device of this machine."""
        capable = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        return {"device_type": device.type, "bf16": capable}


def stored_as(reuse: str, resident: str) -> Literal["off", "trunk", "prefix"]:
    """Return what a step is predicted to read: ``auto`` takes prefixes where there are any."""
    if reuse == "trunk":
        return "trunk"
    return "off" if reuse == "off" and resident == "all" else "prefix"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How much goes through the model at once."""

    seq_len: int = 512
    """Tokens of prompt + response of the longest example."""
    response_len: int | None = None
    """Supervised tokens of it; default: half."""
    batch_size: int = 1
    """Examples per forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    padded: bool | None = None
    """Whether examples of one batch differ in length; default: if there are several."""
    max_new_tokens: int = 256
    """Tokens generated after a prompt, for the peak of generation."""

    @property
    def num_supervised(self) -> int:
        """Return ``response_len``, or its default."""
        return self.response_len or max(1, self.seq_len // 2)

    @property
    def is_padded(self) -> bool:
        """Return ``padded``, or its default."""
        return self.batch_size > 1 if self.padded is None else self.padded

    def make_batch(self, config: Any) -> dict[str, Tensor]:
        """Return a batch of random tokens for a model of this configuration: see ``make_batch``."""
        return make_batch(
            self.batch_size,
            self.seq_len,
            min(self.seq_len - 1, self.num_supervised),
            padded=self.is_padded,
            vocab_size=config.get_text_config().vocab_size,
        )


class Predictor:
    """Predicts the memory of one model in one setting, for any lengths and batch sizes.

    Args:
        config: The model's configuration (transformers); it is copied.
        setting: What is trained and how.

    Raises:
        InputError: The model, the method or a technique does not go with the others.
    """

    counter: type[LiveMemory] = LiveMemory  # or ``operators.Operators``, which times are made of

    def __init__(self, config: Any, setting: Setting) -> None:
        if setting.optim not in OPTIMIZERS:
            raise InputError(
                f"optim must be one of {', '.join(OPTIMIZERS)} to be predicted, got "
                f"{setting.optim!r}; choose one of these"
            )
        self.setting = setting
        self.config = copy.deepcopy(config)
        self._inputs: list[Tensor] = []
        self.model = self._build()
        self._optimizer = self._make_optimizer()
        with torch.no_grad():
            warm_up(self.model, self._optimizer)

    def _build(self) -> Any:
        setting = self.setting
        base: Any = base_on_meta(self.config, **setting.of_base())
        if not self._on_cuda:  # there is nowhere else to put anything
            setting = replace(setting, memory=replace(setting.memory, offload_activations=False))
        model = setting.attached_to(base)
        # After the tuner's own hook, which reads the values of the masks.
        base.register_forward_pre_hook(self._to_meta, with_kwargs=True)
        # Prompt learning embeds the tokens before it calls the base.
        base.get_input_embeddings().register_forward_pre_hook(_ids_to_meta)
        return model

    def _to_meta(
        self, _model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Move the batch to where the model is, but for labels, which the loss reads; hold it."""
        given = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        moved = {key: value.to("meta") for key, value in given.items() if not value.is_meta}
        self._inputs = list(moved.values())
        if "labels" in moved and moved["labels"].ndim > 1:
            del moved["labels"]
        return args, {**kwargs, **moved}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if self.setting.optim == "sgd":
            return torch.optim.SGD(trainable, lr=1e-3, foreach=self._on_cuda)
        # On CUDA torch updates all parameters together, which takes copies of some.
        foreach = self._on_cuda and self.setting.optim == "adamw_torch"
        return torch.optim.AdamW(trainable, lr=1e-3, foreach=foreach)

    @property
    def _on_cuda(self) -> bool:
        return self.setting.device_type == "cuda"

    @cached_property
    def trainable_parameters(self) -> int:
        """Return the number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def base_bytes(self) -> int:
        """Return the bytes of the base on the device: weights and quantization constants."""
        everything = self.held_bytes([self.model])
        if find_method(self.setting.method.method).family == "weights":  # trained, but its own
            everything += sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        if self.setting.resident == "all":
            return everything
        lower = lower_part(base_of(self.model), num_constant_blocks(self.model))
        return everything - self.held_bytes(lower)

    @cached_property
    def streamed_bytes(self) -> int:
        """Return the bytes of the block that is read while it runs; 0 if all are resident."""
        if self.setting.resident == "all":
            return 0
        blocks = find_blocks(base_of(self.model))[1]
        return max(self.held_bytes([block]) for block in blocks[: num_constant_blocks(self.model)])

    def held_bytes(self, modules: Iterable[nn.Module]) -> int:
        """Return the bytes that parts of the base have on the device: weights and constants."""
        memory = LiveMemory("meta", kernels=self._kernels(padded=False))
        self._hold(memory, modules)
        held = memory.by_category
        return held["weights"] + held["quantization_constants"]

    def host_bytes(self, num_tokens: int) -> int:
        """Return the host memory for ``num_tokens`` a forward pass instead of the device's."""
        moved = (m for m in self.model.modules() if isinstance(m, HostEmbedding))
        total = sum(int(module.weight.nbytes) for module in moved)
        if self.setting.memory.offload_activations:
            text = self.config.get_text_config()
            width = DTYPES[self.setting.compute_dtype].itemsize * text.hidden_size
            every = self.setting.memory.checkpoint_every
            total += -(-text.num_hidden_layers // every) * num_tokens * width
        return total

    @begins_step
    def training(self, lengths: Lengths, *, keep_timeline: bool = False) -> LiveMemory:
        """Run one optimizer step that is not the first; return the counter, with its ``peak``."""
        batch = self._batch(lengths)
        self.model.train()
        memory, kernels = self._count(lengths.is_padded, keep_timeline)
        labelled = gradients_labelled(memory, self.model.parameters())
        try:
            with labelled, kernels.imitated(), memory:
                training_step(
                    self.model,
                    batch,
                    self._optimizer,
                    memory=memory,
                    micro_batches=lengths.gradient_accumulation,
                    forward=self._reused_forward(batch, memory),
                )
        finally:
            self.model.zero_grad()
        return memory

    @begins_step
    def evaluation(self, lengths: Lengths) -> LiveMemory:
        """Score choices by their likelihood, as ``evaluate`` does: in one sequence, or two parts.

        In parts, the keys and values of prompts are there twice, once for all that is left to read.
        """
        batch = self._batch(lengths)
        self.model.eval()
        memory, kernels = self._count(lengths.is_padded)
        with kernels.imitated(), memory, torch.no_grad():
            if self.setting.task_type == "CAUSAL_LM":
                response_log_likelihood(self.model, batch)
                if continues_from_cache(self.model, lengths.seq_len):
                    self._score_in_parts(lengths)
            else:
                self.model(**batch)
        return memory

    def _score_in_parts(self, lengths: Lengths) -> None:
        """Score two choices of two tokens each: as much as can be is prompt, and is kept."""
        row = Shared([0] * max(1, lengths.seq_len - 2), [], [[0, 0], [1, 1]])
        ids = torch.tensor([row.prompt] * lengths.batch_size)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORED_LABEL),
        }
        rows = [row] * lengths.batch_size
        log_likelihoods_of_batch(self.model, batch, rows, batch_size=lengths.batch_size)

    @begins_step
    def generation(self, lengths: Lengths) -> LiveMemory:
        """Read ``seq_len`` tokens of a prompt, then make the last new one, with a cache.

        Virtual tokens count as tokens of the prompt, which PEFT puts before it.
        """
        self.model.eval()
        num_virtual = num_virtual_tokens(self.model)
        model = base_of(self.model) if num_virtual else self.model
        batch_size, prompt_len = lengths.batch_size, lengths.seq_len + num_virtual
        total_len = prompt_len + lengths.max_new_tokens
        memory, kernels = self._count(batch_size > 1)
        ids = torch.zeros(batch_size, prompt_len, dtype=torch.long)
        with kernels.imitated(), memory, torch.no_grad(), computed_once(self.model):
            base = base_of(self.model)
            cache = DynamicCache(config=base.config)
            arguments = {**with_cache(base, cache), "logits_to_keep": 1}
            mask = torch.ones_like(ids)
            model(input_ids=ids, attention_mask=mask, **arguments)
            for layer in cache.layers:
                if not isinstance(getattr(layer, "keys", None), torch.Tensor):
                    continue  # a recurrent state, which does not grow
                num_kept = total_len - 1
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length = num_kept
                    num_kept = min(num_kept, layer.sliding_window - 1)
                for name in ("keys", "values"):
                    held = getattr(layer, name)
                    shape = (*held.shape[:2], num_kept - held.shape[2], held.shape[3])
                    grown = torch.cat([held, held.new_empty(shape)], dim=2)
                    setattr(layer, name, grown)
                    del held, grown
            mask = torch.ones(batch_size, total_len, dtype=torch.long)
            model(input_ids=ids[:, :1], attention_mask=mask, **arguments)
        return memory

    def _reused_forward(
        self, batch: dict[str, Tensor], memory: LiveMemory
    ) -> Callable[[], Any] | None:
        """Return a forward pass from stored constants; None if the setting stores none.

        Raises:
            InputError: Nothing is constant.
        """
        if self.setting.reuse == "off":
            return None
        base, labels = base_of(self.model), batch["labels"]
        lengths = batch["attention_mask"].sum(1).tolist()
        examples: list[Example] = [
            {"input_ids": [0] * length, "labels": row[:length].tolist() if row.ndim else int(row)}
            for row, length in zip(labels, lengths, strict=True)
        ]
        try:
            split = find_constant(self.model, examples, prefix=self.setting.reuse == "prefix")
        except ReuseError as error:
            raise InputError(
                f"reuse must be off in this setting, got {self.setting.reuse!r}: {error}"
            ) from error
        edited = zip(split.first_edited, lengths, strict=True)
        shapes = [Shape(first, length - first) for first, length in edited]
        dtype = base.get_input_embeddings().weight.dtype
        layout = Layout.of(base, split.num_blocks, shapes, dtype)
        prefix, suffix = (max(s.prefix for s in shapes), max(s.suffix for s in shapes))
        arguments: dict[str, Any] = {"labels": labels}
        if labels.ndim > 1:  # no classes
            arguments = {"labels": aligned(shapes, labels.tolist(), IGNORED_LABEL)}
            if prefix:
                groups = groups_of(self.model, examples)
                arguments["groups"] = aligned(shapes, groups.tolist(), -1)
        if not is_causal(base):
            arguments["input_ids"] = torch.zeros(len(shapes), suffix, dtype=torch.long)

        def forward() -> Any:
            of_hidden = (len(shapes), suffix, layout.hidden_size)
            of_cache = (layout.num_cached_layers, len(shapes), layout.num_kv_heads, prefix)
            sizes = (of_hidden, *[(*of_cache, layout.head_dim)] * 2)
            stored = [torch.empty(size, dtype=dtype, device="meta") for size in sizes]
            for tensor in stored:
                memory.add(tensor, "store")
            hidden, keys, values = stored
            stacked = Stacked(shapes=shapes, hidden=hidden, keys=keys, values=values)
            return run_stacked(
                self.model,
                split.num_blocks,
                stacked,
                device_type=self.setting.device_type,
                **arguments,
            )

        return forward

    def _batch(self, lengths: Lengths) -> dict[str, Tensor]:
        batch = lengths.make_batch(self.config)
        if self.setting.task_type == "SEQ_CLS":
            batch["labels"] = torch.zeros(lengths.batch_size, dtype=torch.long)
        return batch

    def _count(self, padded: bool, keep_timeline: bool = False) -> tuple[LiveMemory, Kernels]:
        self._inputs.clear()  # of a pass before, which nobody counts
        kernels = self._kernels(padded)
        names = {module: name for name, module in base_of(self.model).named_modules()}
        memory = self.counter("meta", names=names, kernels=kernels, keep_timeline=keep_timeline)
        self._hold(memory, [self.model])
        if self.setting.resident == "upper":
            self._discard_lower(memory)
        for value in optimizer_tensors(self._optimizer):
            memory.add(value, "optimizer")
        memory.reset_peak()
        return memory, kernels

    def _kernels(self, padded: bool) -> Kernels:
        return Kernels(self.setting.device_type, bf16=self.setting.bf16, padded=padded)

    def _discard_lower(self, memory: LiveMemory) -> None:
        """Stop counting what ``--resident upper`` leaves out."""
        base = base_of(self.model)
        for part in lower_part(base, num_constant_blocks(self.model)):
            # What requires a gradient is an edit of the last of the blocks.
            frozen = (p for p in part.parameters() if not p.requires_grad)
            for tensor in (*frozen, *quantization_constants(part)):
                memory.discard(tensor)

    def _hold(self, memory: LiveMemory, modules: Iterable[nn.Module]) -> None:
        """Count what modules hold on the device."""
        for module in modules:
            label_model(memory, module)
            for part in module.modules():
                if isinstance(part, HostEmbedding) and self._on_cuda:
                    memory.discard(part.weight)


def _ids_to_meta(_embedding: Any, args: Any) -> Any:
    return tuple(value.to("meta") for value in args)
