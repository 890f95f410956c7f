"""One assumption on the inside of other libraries, and what its probe needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


class BrokenContractError(Exception):
    """A library is not what it was; the message says what was found."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One assumption."""

    sentence: str
    """What is assumed."""
    libraries: tuple[str, ...]
    """Those that can break it, by the names of their distributions."""
    leaned_on_by: tuple[str, ...]
    """Files of this package that go wrong without it."""
    check: Callable[[], None]
    """Raises whatever it meets where the assumption does not hold."""


def expect(holds: bool, found: str) -> None:
    """Say what was found, unless it is what is relied on.

    Raises:
        BrokenContractError: it is not.
    """
    if not holds:
        raise BrokenContractError(found)


@contextmanager
def apart() -> Iterator[None]:
    """Let a probe compute on the CPU and leave random numbers, modes and warnings as they were."""
    import torch

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


def tiny_llama() -> Any:
    """Return a random Llama of two blocks, in evaluation mode; it knows no end of a sequence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    kind: Any = LlamaConfig  # whose types leave out what all configurations take
    config = kind(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def some_tokens() -> Any:
    """Return (2, 5) different tokens of the tiny Llama; none of them pads."""
    import torch

    return torch.arange(1, 11).view(2, 5)
