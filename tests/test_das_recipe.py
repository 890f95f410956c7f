"""The DAS recipe finds the subspace that it planted; its controls and its pairs are fair."""

from __future__ import annotations

import importlib
import json
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data.embedded import model_dir
from lowmem_reft.errors import InputError
from lowmem_reft.runs.das import random_subspace


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("das_alignment")


def test_das_finds_the_planted_subspace_and_a_random_one_is_near_chance(recipe: ModuleType) -> None:
    result = recipe.run_planted(recipe.Config())
    iia, angles = result["iia"], result["angles_degrees"]
    assert result["task_accuracy"] >= 0.95
    assert iia["planted"] >= 0.95
    assert iia["learned"] >= 0.95
    assert abs(iia["random"] - result["chance"]) < 0.08
    assert iia["whole"] < 0.5
    assert max(angles["learned"]) < 35
    assert max(angles["random"]) > 70


def test_up_to_the_last_lower_block_the_value_is_in_the_subspace_and_nowhere_else(
    recipe: ModuleType,
) -> None:
    planted = recipe.plant()
    outside = torch.eye(64) - planted.subspace.T @ planted.subspace
    # The same filler; one shift or two, two values.
    one, other_value, other_shift = planted.prompts[[3, 3 + recipe.NUM_VALUES, 4]]
    hidden = planted.model(
        input_ids=torch.stack([one, other_value, other_shift]), output_hidden_states=True
    ).hidden_states[recipe.NUM_LOWER]
    key = recipe.PLANTED_POSITION
    by_value, by_shift = hidden[1] - hidden[0], hidden[2] - hidden[0]
    assert (by_value[key] @ planted.subspace.T).norm() > 1
    assert (by_value @ outside).abs().max() < 1e-5
    assert by_value[[0, 1, 3]].abs().max() < 1e-5
    # What the lower blocks do with the rest is not nothing.
    assert by_shift[3].abs().max() > 1e-2
    assert (by_shift @ planted.subspace.T).abs().max() < 1e-5


def test_exchanging_the_planted_subspace_gives_the_run_of_a_prompt_with_the_other_value(
    recipe: ModuleType,
) -> None:
    planted = recipe.plant()
    runs = recipe.planted_interchanges(planted, torch.arange(len(planted.prompts)), 32)
    exact = random_subspace(planted.model, recipe.PLANTED_RANK)
    exact.rotation.raw.data.copy_(planted.subspace)
    # The answers are (source's value + base's shift); the base's prompt tells its own shift.
    shift = (runs.ids[:, 2] - 2 - recipe.NUM_FILLERS) % recipe.NUM_VALUES
    wanted = runs.ids.clone()
    wanted[:, 2] = (
        2 + recipe.NUM_FILLERS + (runs.answers - shift) % recipe.NUM_VALUES * recipe.NUM_VALUES
    ) + shift
    with torch.no_grad():
        torch.testing.assert_close(
            runs.logits(exact, torch.arange(32)),
            recipe.answer_logits(planted.model, wanted, planted.choices),
            rtol=1e-3,
            atol=1e-4,
        )


def solve(recipe: ModuleType, words: list[int], question: int) -> int:
    """The causal model, in plain words."""
    first, last = words[0] == words[1], words[2] == words[3]
    return int([first, last, first and last, first or last][question])


def test_pairs_have_the_answers_of_the_causal_model_and_are_balanced(recipe: ModuleType) -> None:
    names = recipe.Words(
        0, torch.arange(10, 16), torch.tensor([20, 21, 22, 23]), torch.tensor([30, 31])
    )
    fit, held_out = recipe.split_words()
    pairs = recipe.draw_pairs(names, held_out, 4000)
    combinations = torch.zeros(2, 2)
    trained = {tuple(words) for pool in fit for words in pool.tolist()}
    for base, source, answer in zip(
        pairs.base.tolist(), pairs.source.tolist(), pairs.answers.tolist(), strict=True
    ):
        question = base[5] - 20
        own = solve(recipe, base[1:5], question)
        # The first variable is the source's: let the base's first two words be the source's.
        assert answer == solve(recipe, source[1:3] + base[3:5], question)
        assert (
            not {tuple(token - 10 for token in prompt[1:5]) for prompt in (base, source)} & trained
        )
        combinations[own, answer] += 1
    assert (combinations / 4000 - 0.25).abs().max() < 0.04


def test_tasks_have_the_right_answers_and_every_way_to_choose_four_words_is_in_one_split(
    recipe: ModuleType,
) -> None:
    names = recipe.Words(
        0, torch.arange(10, 16), torch.tensor([20, 21, 22, 23]), torch.tensor([30, 31])
    )
    fit, held_out = recipe.split_words()
    prompts, answers = recipe.draw_tasks(names, fit, 500)
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        assert answer == solve(recipe, prompt[1:5], prompt[5] - 20)
    everything = [tuple(words) for pool in (*fit, *held_out) for words in pool.tolist()]
    assert sorted(everything) == list(product(range(recipe.NUM_WORDS), repeat=4))


def test_shuffling_keeps_every_tensor_s_entries(recipe: ModuleType) -> None:
    layer = torch.nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    recipe.shuffle_weights(layer)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight.flatten().sort().values, before.flatten().sort().values)


def test_words_are_single_tokens_of_the_model(recipe: ModuleType, tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir())
    words = recipe.find_words(tokenizer)
    ids = torch.cat([words.words, words.questions, words.choices]).tolist()
    assert len(set(ids)) == 12
    assert all(
        tokenizer.encode(tokenizer.decode([i]), add_special_tokens=False) == [i] for i in ids
    )
    with pytest.raises(InputError, match="12 tokens that are words"):
        recipe.find_words(load_tokenizer(tiny_llama_dir))


def test_a_few_steps_of_both_experiments_run_on_a_quantized_base(
    recipe: ModuleType, tmp_path: Path
) -> None:
    config = recipe.Config(quick=True, storage="nf4", device="cpu", output_dir=tmp_path)
    result = recipe.main(config)
    assert json.loads((tmp_path / "results.json").read_text())["real"] == result["real"]
    for cells in result["real"]["grids"].values():
        assert [cell["position"] for cell in cells] == list(recipe.POSITIONS[1:])
        assert all(0 <= cell[name] <= 1 for cell in cells for name in ("learned", "random"))
    assert result["real"]["best"].keys() == {"tuned", "shuffled"}
    assert set(result["planted"]["iia"]) == {"planted", "learned", "random", "whole"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rank": 0}, "rank must be at least 1"), ({"layers": "two"}, "layers must be 'all'")],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(
    recipe: ModuleType, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        recipe.Config(**wrong)
