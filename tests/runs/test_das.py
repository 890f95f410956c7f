"""DAS: interchanges equal those of a plain run with a hook; R is learned and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.identity import base_digest
from lowmem_reft.base.loading import load_base
from lowmem_reft.runs.das import (
    Interchanges,
    Pairs,
    learn_subspace,
    principal_angles,
    random_subspace,
    whole_vector,
)

CHOICES = torch.tensor([5, 6, 7])
LAST = 3
POSITION = 4


@pytest.fixture
def base(tiny_llama_dir: Path) -> Any:
    return load_base(tiny_llama_dir, storage="fp32", device="cpu")


@pytest.fixture
def pairs() -> Pairs:
    ids = torch.randint(3, 128, (2, 6, 7))
    return Pairs(ids[0], ids[1], torch.randint(3, (6,)))


def logits_with_hook(base: Any, pairs: Pairs, phi: Any, layer: int) -> torch.Tensor:
    """The definition: two whole runs, a hook in the second."""
    block = find_blocks(base)[1][layer]
    seen = []
    handle = block.register_forward_hook(lambda _block, _args, hidden: seen.append(hidden))
    base(input_ids=pairs.source)
    handle.remove()

    def exchange(_block: Any, _args: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        vectors = hidden[:, POSITION]
        hidden[:, POSITION] = vectors + phi(vectors, seen[0][:, POSITION])
        return hidden

    handle = block.register_forward_hook(exchange)
    logits = base(input_ids=pairs.base).logits[:, -1, CHOICES]
    handle.remove()
    return logits


@pytest.mark.parametrize("layer", range(LAST + 1))
def test_an_interchange_gives_the_logits_of_a_whole_run_with_a_hook(
    base: Any, pairs: Pairs, layer: int
) -> None:
    runs = Interchanges(base, pairs, choices=CHOICES, layer=layer, position=POSITION)
    phi = random_subspace(base, 8)
    rows = torch.arange(6)
    with torch.no_grad():
        expected = logits_with_hook(base, pairs, phi, layer)
        torch.testing.assert_close(runs.logits(phi, rows), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(runs.logits(phi, rows[2:4]), expected[2:4], rtol=1e-4, atol=1e-5)
    if layer < LAST:  # above it, only the last token counts
        untouched = base(input_ids=pairs.base).logits[:, -1, CHOICES]
        assert not torch.allclose(expected, untouched, atol=1e-4)


def test_the_whole_vector_of_the_last_token_brings_the_source_s_answer(
    base: Any, pairs: Pairs
) -> None:
    runs = Interchanges(base, pairs, choices=CHOICES, layer=LAST, position=6)
    with torch.no_grad():
        expected = base(input_ids=pairs.source).logits[:, -1, CHOICES]
        torch.testing.assert_close(
            runs.logits(whole_vector, torch.arange(6)), expected, rtol=1e-4, atol=1e-5
        )


def test_the_accuracy_is_the_share_of_wanted_answers(base: Any, pairs: Pairs) -> None:
    with torch.no_grad():
        given = base(input_ids=pairs.source).logits[:, -1, CHOICES].argmax(1)
    answers = torch.where(torch.arange(6) < 4, given, (given + 1) % 3)
    wanted = Pairs(pairs.base, pairs.source, answers)
    runs = Interchanges(base, wanted, choices=CHOICES, layer=LAST, position=6)
    assert runs.accuracy(whole_vector) == pytest.approx(4 / 6)


def test_another_position_takes_the_same_runs(base: Any, pairs: Pairs) -> None:
    first = Interchanges(base, pairs, choices=CHOICES, layer=1, position=POSITION)
    second = first.at(2)
    anew = Interchanges(base, pairs, choices=CHOICES, layer=1, position=2)
    assert second.base is first.base
    assert first.position == POSITION
    phi, rows = random_subspace(base, 8), torch.arange(6)
    assert torch.equal(second.logits(phi, rows), anew.logits(phi, rows))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_learning_lowers_the_loss_and_leaves_the_model_as_it_was(
    tiny_llama_dir: Path, pairs: Pairs, storage: Any
) -> None:
    base = load_base(tiny_llama_dir, storage=storage, compute_dtype="fp32", device="cpu")
    before = base_digest(base)
    runs = Interchanges(base, pairs, choices=CHOICES, layer=1, position=POSITION)
    rows = torch.arange(6)

    def loss(phi: Any) -> float:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(runs.logits(phi, rows), runs.answers).item()

    torch.manual_seed(0)
    start = loss(random_subspace(base, 8))
    torch.manual_seed(0)
    phi = learn_subspace(runs, rank=8, num_steps=20)
    assert loss(phi) < start - 0.01
    rotation = phi.rotation()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), rtol=0, atol=1e-5)
    assert base_digest(base) == before
    assert all(parameter.grad is None for parameter in base.parameters())


def test_angles_are_those_between_subspaces_and_not_between_their_bases() -> None:
    basis = torch.eye(6)
    turn = torch.linalg.qr(torch.randn(2, 2)).Q
    assert principal_angles(basis[:2], turn @ basis[:2]) == pytest.approx([0, 0], abs=0.1)
    assert principal_angles(basis[:2], basis[2:4]) == pytest.approx([90, 90])
    half = torch.stack([basis[0], (basis[1] + basis[2]) / 2**0.5])
    assert principal_angles(basis[:2], half) == pytest.approx([0, 45], abs=0.1)
