"""Recipes run end to end on tiny files and a tiny model."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lowmem_reft.data.rows import Row
from lowmem_reft.data.tasks.registry import find_task

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("text_classification")


def test_text_classification_chooses_on_validation_rows_alone(
    recipe: ModuleType, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    questions = [("NUM:count", "How many dogs ?"), ("LOC:city", "Where is the fox ?")]
    lines = [f"{label} {text} {i}\n" for i in range(10) for label, text in questions]
    (tmp_path / "TREC.train").write_text("".join(lines))
    result = recipe.main(
        recipe.Config(
            task="trec",
            source=tmp_path,  # no TREC.test: the search must not read it
            model=str(tiny_llama_dir),
            stage="search",
            methods="loreft[rank=2]",
            output_dir=tmp_path / "out",
            epochs=1,
        )
    )
    assert result["num_failed"] == 0
    held_out = (tmp_path / "out/trec/fold-0/validation.jsonl").read_text().splitlines()
    fitted = (tmp_path / "out/trec/fold-0/fit.jsonl").read_text().splitlines()
    assert len(held_out) == 2
    assert not set(held_out) & set(fitted)


def test_classes_can_be_called_by_words_of_one_token(recipe: ModuleType) -> None:
    row = Row(source="TREC:1", prompt="Who ?", choices=("human", "number"), answer=0)
    one = recipe.in_one_token(row)
    assert (one.choices, one.answer, one.prompt) == (("person", "number"), 0, "Who ?")
    assert recipe.in_one_token(replace(row, response="human")).response == "person"
    for task in recipe.PLANS:
        assert set(find_task(task).labels) <= recipe.WORDS.keys()
