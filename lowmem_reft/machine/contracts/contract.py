"""One assumption on the inside of other libraries, and what its probe needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def relied_on(*libraries: str, leaned_on_by: str) -> Callable[[Callable[[], None]], Contract]:
    """Make a contract of a probe, whose docstring is its sentence, in lower case as it is quoted.

    Args:
        libraries: As in the contract.
        leaned_on_by: The files, with spaces between.
    """
    return lambda check: Contract(
        sentence=(check.__doc__ or "").removesuffix("."),
        libraries=libraries,
        leaned_on_by=tuple(leaned_on_by.split()),
        check=check,
    )


def expect(holds: bool, found: str) -> None:
    """Say what was found, unless it is what is relied on.

    Raises:
        BrokenContractError: It is not.
    """
    if not holds:
        raise BrokenContractError(found)


@contextmanager
def apart() -> Iterator[None]:
    """Let a probe compute on the CPU and leave random numbers, modes and warnings as they were."""
    import torch

    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")
        yield


def tiny_llama() -> Any:
    """Return a random Llama of two blocks, in evaluation mode; it knows no end of a sequence."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(
        "llama",
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
