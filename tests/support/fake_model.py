"""A model directory of which only the configuration is read: nothing is loaded from it."""

from __future__ import annotations

from pathlib import Path


def config_alone(tmp_path: Path) -> Path:
    """Make ``model`` in a directory, with a configuration of the width of 7B models."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 4096}')
    return model
