"""The loss of a causal model on supervised tokens only, without a matrix of logits.

On a prompt with a short response most logits belong to tokens that the loss ignores, and the
[batch, seq, vocab] matrix and its gradient are the largest tensors of a checkpointed step. Here the
head runs on the hidden vectors before supervised tokens alone, a few at a time, and leaves behind
one gradient per hidden vector (the idea of arXiv 2411.09009 and of torch's
``linear_cross_entropy``, which has neither soft-caps nor label smoothing, and gives a 16-bit base a
16-bit loss).

It serves every PEFT method that leaves the head frozen, so comparisons stay fair. A model whose
head is unknown keeps its own loss, on supervised positions if it takes ``logits_to_keep``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
)

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.ours import ours
from lowmem_reft.base.products import linear_in_parts
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError
from lowmem_reft.machine.marks import allocates
from lowmem_reft.machine.processes import whole

CHUNK_BYTES = 2**25
"""fp32 logits that exist at once: 262 tokens of a 32,000-word vocabulary, 65 of Llama 3's."""

# With these a model keeps its own loss; the last is TRL's, which has chunks too.
_GIVEN = frozenset(("shift_labels", "logits_to_keep", "fused_lm_head"))


@dataclass(frozen=True)
class Head:
    """What lies between the last hidden vector and the logits: cap · tanh(scale · (Wh + b) / cap).

    Source: Gemma 2 (arXiv 2408.00118) for the cap; Cohere and Granite for the scale.
    """

    weight: Tensor
    """(vocab, hidden), frozen."""
    bias: Tensor | None = None
    """(vocab,), frozen."""
    scale: float = 1.0
    """Factor of the logits."""
    softcap: float | None = None
    """Largest magnitude of a logit; None for no cap."""

    @allocates("loss")
    def transform(self, logits: Tensor) -> Tensor:
        """Apply scale and cap to the outputs of the linear head."""
        scaled = logits * self.scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()


@allocates("loss")
def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    targets: Int[Tensor, " tokens"],
    *,
    label_smoothing: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy of the head's logits, in fp32 whatever the base computes in.

    The products of the head run in the dtype of ``hidden``, all else in fp32. The gradient of
    ``hidden`` is made in the forward pass, so that each chunk's logits are formed once.

    Args:
        hidden: The vectors that predict the targets.
        head: The frozen head.
        targets: Indices into the vocabulary; none may be ignored (-100).
        label_smoothing: Share of the target's probability that is spread over the vocabulary.
        chunk_bytes: Bytes of fp32 logits that may exist at once.

    Raises:
        InputError: ``label_smoothing`` is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(
            f"label_smoothing must be in [0, 1), got {label_smoothing!r}; for example 0.1"
        )
    chunk_tokens = max(1, chunk_bytes // (4 * head.weight.shape[0]))
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, label_smoothing, chunk_tokens
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    r"""With p = softmax(z), ε the smoothing and V the vocabulary: ∂L/∂z = p − (1−ε)·1_t − ε/V.

    The chain goes on with cap' = 1 − (z/cap)², the scale and Wᵀ.
    """

    @staticmethod
    @allocates("loss")
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, smoothing: float, chunk_tokens: int
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            losses, logits_gradient, _ = _losses_of_chunk(
                hidden[part], head, targets[part], smoothing, gradient is not None
            )
            total += losses.sum()
            if gradient is not None and logits_gradient is not None:
                torch.mm(
                    logits_gradient.to(hidden.dtype),
                    head.weight.to(hidden.dtype),
                    out=gradient[part],
                )
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    @allocates("loss")
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.gradient is None:
            return None, None, None, None, None
        return (ctx.gradient * grads[0].to(ctx.gradient.dtype), None, None, None, None)


@allocates("loss")
def _losses_of_chunk(
    hidden: Tensor, head: Head, targets: Tensor, smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the losses (tokens,) of a chunk and the gradient of their sum by the head's output.

    Without a gradient there may be several targets for each token: losses are (tokens, targets)
    then, and so is which are the most likely tokens. All is in one [chunk, vocab] buffer, or two.
    """
    logits = linear_in_parts(hidden, head.weight.to(hidden.dtype)).float()
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1:
        logits *= head.scale
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits**2 if with_gradient else None
        logits *= head.softcap
    index = targets if targets.ndim == 2 else targets[:, None]
    picked = logits.gather(1, index)
    mean = logits.mean(1, keepdim=True) if smoothing else picked
    top = logits.amax(1, keepdim=True)
    # Of several as likely the first, as in generation.
    is_top = picked == top if with_gradient else index == logits.argmax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    losses = total.log() + top - (1 - smoothing) * picked - smoothing * mean
    losses = losses if targets.ndim == 2 else losses[:, 0]
    if not with_gradient:
        return losses, None, is_top
    gradient = logits.div_(total)
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    gradient.scatter_add_(1, index, torch.full_like(picked, smoothing - 1))
    if slope is not None:
        gradient *= slope
    if head.scale != 1:
        gradient *= head.scale
    return losses, gradient, is_top


def use_chunked_loss(model: nn.Module, *, label_smoothing: float = 0.0) -> Head | None:
    """Make a causal model compute its training loss with ``chunked_cross_entropy``.

    From then on a forward pass in training mode with ``labels`` returns the loss and no logits;
    without labels, or in evaluation mode, nothing changes. ``num_items_in_batch`` (gradient
    accumulation) divides the sum as in transformers' ``ForCausalLMLoss``.

    A model whose head is not recognized keeps its own loss; its logits are then formed for
    supervised positions only if it takes ``logits_to_keep``.

    Args:
        model: A causal language model, with or without an adapter.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.

    Returns:
        The head, or None if the model keeps its own loss.

    Raises:
        InputError: ``label_smoothing`` with a model that keeps its own loss.
    """
    base: Any = base_of(model)
    head = find_head(base)
    if head is None:
        _refuse_smoothing(base, label_smoothing)
    plain = ours(base).forward_with_logits = ours(base).forward_with_logits or base.forward
    ours(base).knows_head = head is not None
    # Not a bound method: its signature, which trainers and tuners read, would lose an argument.
    base.forward = functools.wraps(plain)(
        functools.partial(_training_forward, base, label_smoothing=label_smoothing)
    )
    return head


def needs_supervised_alone(base: Any, arguments: Iterable[str]) -> bool:
    """Return whether a pass with labels reads hidden vectors before targets alone."""
    is_ours = ours(base).knows_head and not _GIVEN.intersection(arguments)
    return bool(base.training) and is_ours and _describe_head(base) is not None


def _refuse_smoothing(base: Any, label_smoothing: float) -> None:
    if label_smoothing:
        raise InputError(
            f"label_smoothing must be 0 for {type(base).__name__}, whose head is not a frozen "
            f"linear layer that is known here, got {label_smoothing!r}; leave it out"
        )


def find_head(base: Any) -> Head | None:
    """Return the frozen head of a causal model; None if its logits are not what ``Head`` describes.

    Proof: the model's own forward is run with a stand-in for the backbone and given head outputs,
    and must return exactly what ``Head.transform`` makes of them.
    """
    head = _describe_head(base)
    if head is None:
        return None
    probe = torch.linspace(-40, 40, 24).view(1, 3, 8)
    try:
        logits = _logits_after_head(base, base.get_output_embeddings(), probe)
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, StopIteration):
        return None
    is_alike = isinstance(logits, Tensor) and logits.shape == probe.shape
    same = is_alike and torch.allclose(logits.float(), head.transform(probe))
    return head if same else None


def _describe_head(base: Any) -> Head | None:
    """Read a linear, frozen head and what the configuration says of scale and cap, unproven."""
    linear = base.get_output_embeddings()
    if getattr(base, "loss_function", None) is not ForCausalLMLoss or type(linear) is not nn.Linear:
        return None
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return None
    config = base.config.get_text_config()
    division = getattr(config, "logits_scaling", None)
    factor = getattr(base, "logit_scale", getattr(config, "lm_head_multiplier", 1.0))
    return Head(
        weight=linear.weight,
        bias=linear.bias,
        scale=1 / division if division else float(factor),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _logits_after_head(base: Any, linear: nn.Module, probe: Tensor) -> Tensor:
    """Return the logits that ``base.forward`` makes of ``probe``, the output of its linear head."""
    backbone_name = base.base_model_prefix
    head_name = next(name for name, child in base.named_children() if child is linear)
    backbone = getattr(base, backbone_name)
    hidden = torch.zeros(1, probe.shape[1], int(base.config.get_text_config().hidden_size))
    forward = ours(base).forward_with_logits or base.forward
    try:
        base._modules[backbone_name] = _Constant(
            BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden), backbone
        )
        base._modules[head_name] = _Constant(probe)
        with torch.no_grad():
            logits: Tensor = forward(input_ids=torch.zeros(1, probe.shape[1], dtype=torch.long))[
                "logits"
            ]
    finally:
        base._modules[backbone_name] = backbone
        base._modules[head_name] = linear
    return logits


class _Constant(nn.Module):
    """Stands in for a module and returns the same value whatever the input."""

    def __init__(self, value: Any, instead_of: nn.Module | None = None) -> None:
        super().__init__()
        self.value = value
        self.__dict__["instead_of"] = instead_of  # no child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            number = getattr(self.instead_of, name, None)
            if isinstance(number, float):  # as Falcon H1's factor of the logits
                return number
            return self  # a part of the backbone that is called by itself, as OPT's decoder


class _HeadReached(Exception):  # noqa: N818 - nothing is wrong
    """Carries the hidden vectors out of a forward pass that has come to its head.

    An ``Exception``, so that torch still runs the hooks that were asked to run always.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@allocates("loss")
def _training_forward(self: Any, *args: Any, label_smoothing: float, **kwargs: Any) -> Any:
    """Stand in for a causal model's forward; see ``use_chunked_loss``."""
    plain = ours(self).forward_with_logits
    assert plain is not None
    labels = kwargs.get("labels")
    if not self.training or labels is None or args[1:] or _GIVEN.intersection(kwargs):
        return plain(*args, **kwargs)
    head = _describe_head(self) if ours(self).knows_head else None
    if head is None:
        _refuse_smoothing(self, label_smoothing)
        return plain(*args, **kwargs, **supervised_head_arguments(self, labels))
    num_items = kwargs.pop("num_items_in_batch", None)
    hidden = _hidden_before_head(self, lambda: plain(*args, **{**kwargs, "labels": None}))
    rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    targets = labels[rows, columns + 1].to(hidden.device)
    selected = hidden[rows.to(hidden.device), columns.to(hidden.device)]  # (tokens, hidden)
    head = _gathered(head)
    total = chunked_cross_entropy(selected, head, targets, label_smoothing=label_smoothing)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    # Without supervised tokens the mean is 0 / 0, as in torch.
    return CausalLMOutputWithPast(loss=total / (len(rows) if num_items is None else num_items))


@allocates("loss")
def _gathered(head: Head) -> Head:
    """Return a head with its whole weights, where each process holds a part of them."""
    bias = None if head.bias is None else whole(head.bias)
    return replace(head, weight=whole(head.weight), bias=bias)


def _hidden_before_head(base: Any, run: Callable[[], Any]) -> Tensor:
    """Let ``run`` call the model up to its head; return the (batch, seq, hidden) input of that."""

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _HeadReached(inputs[0])

    handle = base.get_output_embeddings().register_forward_pre_hook(stop, prepend=True)
    try:
        run()
    except _HeadReached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass of {type(base).__name__} never came to its head")


@torch.no_grad()
@allocates("loss")
def log_likelihood_of(
    base: Any, labels: Tensor, run: Callable[..., Any], *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, list[int]]:
    """Return each example's summed log-likelihood of supervised tokens, (batch,), and their number.

    Only supervised tokens get logits, at most ``chunk_bytes`` of them at once; a model whose head
    is not recognized gives those of all positions that any example supervises. ``base`` is in
    evaluation mode, ``labels`` are (batch, seq), and ``run`` makes the forward pass, with the
    further arguments that it is given.
    """
    device = device_of(base)
    rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    targets = labels[rows, columns + 1][:, None]
    each, _ = log_likelihoods_at(base, rows, columns, targets, run, chunk_bytes=chunk_bytes)
    sums = torch.zeros(labels.shape[0], dtype=torch.float32, device=device)
    sums.index_add_(0, rows.to(device), each[:, 0])
    return sums, (labels != IGNORED_LABEL).sum(1).tolist()


@torch.no_grad()
@allocates("loss")
def log_likelihoods_at(
    base: Any,
    rows: Int[Tensor, " places"],
    columns: Int[Tensor, " places"],
    targets: Int[Tensor, "places targets"],
    run: Callable[..., Any],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Tensor, "places targets"], Bool[Tensor, "places targets"]]:
    """Return the log-probabilities of next tokens after some places of a batch, in fp32.

    And whether each of them is the most likely one there.

    Args:
        base: The causal model, in evaluation mode.
        rows: Of each place, its example.
        columns: Of each place, the token after which the targets come.
        targets: After each place, the tokens that are asked for.
        run: Makes the forward pass, with the further arguments that it is given.
        chunk_bytes: Bytes of fp32 logits that may exist at once, where the head is recognized.
    """
    device, head = device_of(base), find_head(base)
    targets = targets.to(device)
    if head is None:
        kept = columns.unique()
        logits = run(logits_to_keep=kept.to(device)).logits
        if logits.shape[1] == len(kept):  # else the model does not know logits_to_keep
            columns = torch.searchsorted(kept, columns)
        selected = logits[rows.to(device), columns.to(device)].float().log_softmax(-1)
        picked: Tensor = selected.gather(-1, targets)
        return picked, targets == selected.argmax(-1, keepdim=True)
    head = _gathered(head)
    selected = _hidden_before_head(base, run)[rows.to(device), columns.to(device)]
    found = torch.empty(targets.shape, dtype=torch.float32, device=device)
    is_top = torch.empty_like(targets, dtype=torch.bool)
    step = max(1, chunk_bytes // (4 * head.weight.shape[0]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        losses, _, is_top[part] = _losses_of_chunk(selected[part], head, targets[part], 0.0, False)
        found[part] = -losses
    return found, is_top


def supervised_head_arguments(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Return what to pass to ``model`` beside ``labels`` so that only supervised tokens get logits.

    Positions are kept for the whole batch, so examples of unequal length keep a few more. Loss and
    gradients are those of the full logits. Labels are (batch, seq), -100 where not supervised.

    Returns:
        ``logits_to_keep`` (kept,) and ``shift_labels`` (batch, kept); nothing if the model does not
        take them or has a loss of its own.
    """
    base: Any = base_of(model)
    takes = "logits_to_keep" in inspect.signature(base.forward).parameters
    if not takes or getattr(base, "loss_function", None) is not ForCausalLMLoss or labels.ndim != 2:
        return {}
    kept = (labels[:, 1:] != IGNORED_LABEL).any(0).nonzero()[:, 0]
    return {"logits_to_keep": kept, "shift_labels": labels[:, kept + 1]}
