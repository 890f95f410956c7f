"""A config.json that describes no model is refused, whoever reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft.base.hub import load_config
from lowmem_reft.base.loading import load_base
from lowmem_reft.cli import main
from lowmem_reft.errors import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1044992\n"


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', '{"model_type": "ll', POINTER, "<html>"])
def test_what_is_no_json_object_is_named(model: Path, text: str) -> None:
    path = model / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        load_config(model)
    assert f"{path} must be a JSON object" in str(raised.value)
    assert main(["plan", "--model", str(model), "--seq-len", "8", "--quiet"]) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": None},
        {"model_type": "llamax"},
        {"model_type": ["llama"]},
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"hidden_size": 63},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 5.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"vocab_size": 0},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}},
        {"rope_parameters": []},
        {"dtype": "float99"},
        {"quantization_config": "x"},
        {"pad_token_id": 99999},
        {"rms_norm_eps": "a"},
        {"tie_word_embeddings": "no"},
    ],
    ids=str,
)
def test_values_of_which_no_model_can_be_built_are_refused(
    model: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError):
        load_base(model, device="cpu")
    capsys.readouterr()  # bars of transformers, where it began to load
    code = main(["plan", "--model", str(model), "--seq-len", "8", "--gpu", "4090", "--quiet"])
    assert (code, len(capsys.readouterr().err.strip().splitlines())) == (2, 1)
