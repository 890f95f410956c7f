"""Recipes run end to end on tiny files and a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = RECIPES / "text_classification.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


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
    held_out = (tmp_path / "out/trec/validation.jsonl").read_text().splitlines()
    fitted = (tmp_path / "out/trec/fit.jsonl").read_text().splitlines()
    assert len(held_out) == 2
    assert not set(held_out) & set(fitted)
