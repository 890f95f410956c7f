"""The ten-example recipe trains, answers before and after, and says honestly what was learned."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lowmem_reft.errors import InputError


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("ten_examples")


def test_there_are_ten_rows_in_one_manner_and_no_paraphrase_is_among_them(
    recipe: ModuleType,
) -> None:
    assert len(recipe.ROWS) == 10
    assert len({prompt for prompt, _ in recipe.ROWS}) == 10
    assert all(recipe.is_in_manner(response) for _, response in recipe.ROWS)
    assert not {prompt for prompt, _ in recipe.ROWS} & set(recipe.PARAPHRASES)


def test_an_answer_ends_with_its_first_ending(recipe: ModuleType) -> None:
    assert recipe.up_to_the_end(" Oh no! He ran. The end. The end.") == "Oh no! He ran. The end."
    assert recipe.up_to_the_end("Oh no! He ran") == "Oh no! He ran"
    assert not recipe.is_in_manner(recipe.up_to_the_end("Oh no! He ran"))


def test_a_few_steps_leave_an_adapter_and_a_report(recipe: ModuleType, tmp_path: Path) -> None:
    result = recipe.main(recipe.Config(rank=4, epochs=2, device="cpu", output_dir=tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert [row["kind"] for row in result["answers"]] == ["trained"] * 10 + ["paraphrased"] * 3
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert result["adapter_bytes"] == weights.stat().st_size
    assert result["num_trainable_params"] == 6 * 4 * (2 * 128 + 1)  # R, W and b in six blocks
    assert result["peak_bytes"] > 0
    assert result["num_exact"]["before"] == 0


def test_a_run_with_other_settings_is_replaced_on_request(
    recipe: ModuleType, tmp_path: Path
) -> None:
    def main(seed: int, **more: bool) -> None:
        config = recipe.Config(rank=1, epochs=1, device="cpu", output_dir=tmp_path, seed=seed)
        recipe.main(replace(config, **more))

    main(0)
    with pytest.raises(InputError, match=r"finished run with other settings.*with --overwrite"):
        main(1)
    main(1, overwrite=True)


def test_rows_are_learned_by_heart(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "ROWS", recipe.ROWS[:2])
    config = recipe.Config(storage="fp32", epochs=80, device="cpu", output_dir=tmp_path)
    result = recipe.main(config)
    assert result["num_exact"] == {"before": 0, "after": 2}
    assert [row["after"] for row in result["answers"][:2]] == [text for _, text in recipe.ROWS]


def test_a_rank_of_nothing_is_refused(recipe: ModuleType) -> None:
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        recipe.Config(rank=0)
