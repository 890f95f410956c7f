"""Branches that ask for a CUDA device, with a stand-in for it; the docs say which have none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_reft.base.checkpointing import OffloadedCheckpoint, _to_host
from lowmem_reft.machine.devices import device_name
from lowmem_reft.memory.available import free_card
from lowmem_reft.memory.cards import CONTEXT_BYTES
from lowmem_reft.memory.measure import Measured, measure
from lowmem_reft.memory.predict import Setting
from lowmem_reft.memory.profile import measure_step
from lowmem_reft.reuse import proof, reuse
from lowmem_reft.runs.fit import _StepWatch
from lowmem_reft.runs.spent import Spent
from tiny_models import make_examples, make_model, reft, stacked

ROOT = Path(__file__).parent.parent
CARD = torch.device("cuda", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of a second card, of 16 GiB: 9 are free, and torch holds 3, of which it uses 2."""
    made: list[str] = []
    gib = 2**30
    answers = {
        "mem_get_info": (9 * gib, 16 * gib),
        "memory_allocated": 2 * gib,
        "memory_reserved": 3 * gib,
        "max_memory_allocated": 5 * gib,
        "max_memory_reserved": 6 * gib,
        "get_device_properties": SimpleNamespace(name="Stand-in", total_memory=16 * gib),
        "get_device_capability": (7, 5),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats")),
    }

    def stand_in(name: str) -> Any:
        def call(*device: torch.device) -> Any:
            assert device == (() if name == "empty_cache" else (CARD,))
            made.append(name)
            return answers[name]

        return call

    for name in answers:
        monkeypatch.setattr(torch.cuda, name, stand_in(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return made


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of tensors that were asked for in pinned memory, which needs a card."""
    shapes: list[tuple[int, ...]] = []
    with torch.device("cpu"):  # once, with torch's own: it remembers whom it gives a device
        torch.empty(0)

    def without_card(plain: Any) -> Any:
        def make(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            tensor: torch.Tensor = plain(*size, **options)
            if pin_memory:
                shapes.append(tuple(tensor.shape))
            return tensor

        return make

    monkeypatch.setattr(torch, "zeros", without_card(torch.zeros))
    monkeypatch.setattr(torch, "empty", without_card(torch.empty))
    return shapes


class OnCard(torch.Tensor):
    """Says that it is on a card."""

    is_cuda = True


def test_the_name_of_a_card_comes_with_its_memory(calls: list[str]) -> None:
    assert device_name("cuda:1") == "Stand-in, 16.0 GiB"


def test_what_torch_holds_and_does_not_use_counts_as_free(calls: list[str]) -> None:
    card = free_card(CARD)
    assert card is not None
    assert (card.name, card.memory_bytes) == ("cuda:1", 10 * 2**30)
    assert card.context_bytes == CONTEXT_BYTES // 2


def test_a_peak_is_measured_from_an_empty_cache_to_the_end_of_the_work(calls: list[str]) -> None:
    held: Any = None
    measured, on_top = measure_step(CARD, held, held, held, lambda: calls.append("run"))
    assert (measured, on_top) == (Measured(5 * 2**30, 6 * 2**30), 0)
    begin = ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert calls == [*begin, "run", "synchronize", "max_memory_allocated", "max_memory_reserved"]
    assert measure(CARD, lambda: None) == measured


def test_a_card_without_bf16_is_predicted_as_one(calls: list[str]) -> None:
    assert Setting.of_device(CARD) == {"device_type": "cuda", "bf16": False}


def test_steps_are_timed_from_when_the_card_has_done_its_work(calls: list[str]) -> None:
    watch = _StepWatch(CARD, Spent())
    watch.on_step_begin(None, None, None)
    assert calls == ["synchronize"]
    watch.on_step_end(None, None, SimpleNamespace())
    assert calls == ["synchronize"] * 2


def test_inputs_of_blocks_wait_in_pinned_memory_and_come_back(
    pinned: list[tuple[int, ...]],
) -> None:
    held = torch.arange(6.0).view(2, 3)
    device, host = _to_host(held.as_subclass(OnCard))
    assert (device, host.tolist(), pinned) == (held.device, held.tolist(), [(2, 3)])

    inputs = torch.randn(2, 3).as_subclass(OnCard).requires_grad_()
    run = OffloadedCheckpoint(lambda function, *args: function(*args))
    run(lambda x: (x * x).sum(), inputs).backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, 2 * inputs.detach())
    assert (2, 3) in pinned[1:]


def test_stored_batches_for_a_card_are_stacked_in_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: list[tuple[int, ...]]
) -> None:
    built = reuse.Reuse(make_model(peft_config=reft("l1")), make_examples(), tmp_path)
    monkeypatch.setattr(reuse, "device_of", lambda _: CARD)
    built.announce([0, 1])
    taken = built._ahead.take([0, 1])
    assert taken is not None
    parts = (taken.hidden, taken.keys, taken.values)
    assert pinned == [tuple(part.shape) for part in parts]


def test_a_proof_draws_the_same_numbers_on_the_card_for_both_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = []

    @contextlib.contextmanager
    def fork_rng(devices: Any) -> Iterator[None]:
        forked.append(devices)
        yield

    examples = make_examples()
    built = reuse.Reuse(make_model(peft_config=reft("l1")), examples, tmp_path)
    monkeypatch.setattr(proof, "device_of", lambda _: CARD)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    assert proof.prove(built, [0, 1], stacked(examples[:2])) <= 1e-5
    assert forked == [[CARD], [CARD]]


ASKS = re.compile(r"torch\.cuda\.|[=!]= \"cuda\"|is_cuda|pin_memory|pinned=|_on_cuda")


def test_the_documentation_names_every_module_that_asks_for_a_card() -> None:
    package = ROOT / "lowmem_reft"
    asking = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if ASKS.search(path.read_text(encoding="utf-8"))
    }
    page = (ROOT / "docs/reference/versions.md").read_text(encoding="utf-8")
    _, _, never = page.partition("## What has never been run")
    rows = [line for line in never.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])}
    assert named == asking
