"""Ways to need less memory, switched on by ``MemoryOptions``.

To add one: write a function that changes a model in place and leaves losses and gradients as they
are, give it an option in ``options.MemoryOptions``, and call it from ``save_memory``. The
prediction (``memory.predict``) runs the same model, so it knows of it at once; ``plan --fit`` tries
it once ``memory.search`` has it in ``memory_ladder`` and its price in ``estimated_cost``. What it
does not go with is refused in ``attach.check_run`` and, sharded, in ``machine.processes``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_reft.base.blocks import base_of, find_blocks
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.ours import ours
from lowmem_reft.errors import InputError
from lowmem_reft.options import MemoryOptions

MLP_NAMES = ("mlp", "feed_forward", "ffn")
"""What architectures call the part of a block that treats every token by itself."""


def save_memory(model: Any, options: MemoryOptions) -> None:
    """Switch on what the options name, on a base or a PeftModel that is on its device.

    Raises:
        InputError: The architecture does not allow it, or an option needs another one.
    """
    if options.offload_activations and not options.activation_checkpointing:
        raise InputError(
            "offload_activations must go with activation_checkpointing, got it alone; "
            "add --activation-checkpointing"
        )
    if options.mlp_tokens is not None:
        chunk_mlps(model, options.mlp_tokens)
    if options.activation_checkpointing:
        enable_activation_checkpointing(
            model, options.checkpoint_every, offload=options.offload_activations
        )
    if options.embedding_on_host:
        keep_embedding_on_host(model)


def chunk_mlps(model: Any, num_tokens: int) -> None:
    """Run every block's MLP on at most ``num_tokens`` tokens at a time, recomputing each part.

    The inner width of an MLP is three to four times the hidden size, so its activations are the
    largest of a block. The parts are recomputed one by one in the backward pass (as in Arctic long
    sequence training, arXiv 2506.13996); losses and gradients are the same. Tokens are those of all
    examples together.

    Raises:
        InputError: Not a positive number, or the blocks have no MLP that is known here.
    """
    if num_tokens < 1:
        raise InputError(f"mlp_tokens must be at least 1, got {num_tokens!r}; for example 2048")
    base = base_of(model)
    for block in find_blocks(base)[1]:
        mlp = next((getattr(block, name) for name in MLP_NAMES if hasattr(block, name)), None)
        if not isinstance(mlp, nn.Module) or isinstance(mlp, nn.ModuleList):
            raise InputError(
                f"mlp_tokens must be left out for {type(base).__name__}, got {num_tokens!r}; its "
                f"blocks have no module named {', '.join(MLP_NAMES)}"
            )
        held = ours(mlp)
        held.forward_of_all_tokens = held.forward_of_all_tokens or mlp.forward
        # Not a bound method: pickle would look it up by its name in the class.
        mlp.forward = functools.partial(_forward_in_chunks, mlp, num_tokens=num_tokens)


def _forward_in_chunks(self: Any, hidden: Tensor, *, num_tokens: int) -> Tensor:
    """Stand in for an MLP's forward; ``hidden`` is (batch, seq, hidden)."""
    plain = ours(self).forward_of_all_tokens
    assert plain is not None
    if hidden.ndim != 3 or hidden.shape[0] * hidden.shape[1] <= num_tokens:
        out: Tensor = plain(hidden)
        return out
    # As one example: parts are contiguous, which some layers ask for (GPT-2's Conv1D).
    parts = hidden.flatten(0, 1)[None].split(num_tokens, dim=1)
    if torch.is_grad_enabled():
        outputs = [checkpoint(plain, part, use_reentrant=False) for part in parts]
    else:
        outputs = [plain(part) for part in parts]
    if not isinstance(outputs[0], Tensor):  # routers of some mixtures of experts
        raise InputError(
            f"mlp_tokens must be left out for {type(self).__name__}, which returns more than "
            f"hidden vectors, got {num_tokens!r}; leave it out"
        )
    return torch.cat(outputs, dim=1).view_as(hidden)


class HostEmbedding(nn.Module):
    """An embedding whose table stays in host memory; only the rows that are read travel.

    It does not follow ``model.to(device)``.
    """

    def __init__(self, embedding: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.embedding = embedding if device.type == "meta" else embedding.to("cpu")
        self.device = device

    @property
    def weight(self) -> Any:
        """Return the (vocab, hidden) table."""
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of ``input_ids``, (batch, seq, hidden), on the model's device."""
        if self.device.type == "meta":
            out: Tensor = self.embedding(input_ids)
            return out
        rows: Tensor = self.embedding(input_ids.to("cpu"))
        return rows.to(self.device, non_blocking=True)

    def _apply(self, fn: Any, recurse: bool = True) -> HostEmbedding:
        return self


def keep_embedding_on_host(model: Any) -> None:
    """Keep the input embedding in host memory, if the output head does not share it.

    Raises:
        InputError: The head is the same matrix, which every step multiplies with.
    """
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embedding, HostEmbedding):
        return
    if head is not None and head.weight is embedding.weight:
        raise InputError(
            f"embedding_on_host must be left out for {type(base).__name__}, whose head is the same "
            "matrix, got True; leave it out"
        )
    device = next(find_blocks(base)[1].parameters()).device
    base.set_input_embeddings(HostEmbedding(embedding, device))
