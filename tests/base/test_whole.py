"""A checkpoint that is not whole is refused, with its file: cut, missing, misshapen, not finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils.hub import cached_file

from lowmem_reft.base.loading import load_base
from lowmem_reft.base.stored import read_header
from lowmem_reft.errors import InputError

Tensors = dict[str, torch.Tensor]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1044992\n"
UP = "model.layers.3.mlp.up_proj.weight"
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"storage": "nf4", "compute_dtype": "fp32"},
    "int8": {"storage": "int8", "compute_dtype": "fp32"},
    "fp32": {"storage": "fp32"},
    "upper": {"storage": "nf4", "compute_dtype": "fp32", "resident": "upper"},
    "upper-fp32": {"storage": "fp32", "resident": "upper"},
}
every_way = pytest.mark.parametrize("way", WAYS)
whole_and_in_parts = pytest.mark.parametrize("way", ["nf4", "upper"])


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    whole = LlamaForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="100KB")
    return model


def load(directory: Path, way: str = "fp32", **options: Any) -> Any:
    base = load_base(directory, device="cpu", **{**WAYS[way], **options})
    if way.startswith("upper"):
        base.residency.restore()
    return base


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def refused(directory: Path, way: str, *said: str) -> None:
    with pytest.raises(InputError) as raised:
        load(directory, way)
    for words in (str(directory), *said):
        assert words in str(raised.value)


@every_way
def test_a_whole_checkpoint_is_loaded(sharded: Path, way: str) -> None:
    assert load(sharded, way).num_parameters() > 0


@every_way
@pytest.mark.parametrize("name", [UP, "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_missing_is_named(model: Path, name: str, way: str) -> None:
    change(model, lambda tensors: tensors.pop(name))
    refused(model, way, name.rpartition("layers.")[2].rpartition(".mlp")[2], "none")


@every_way
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_embedding_or_a_head_that_is_missing_is_named(model: Path, name: str, way: str) -> None:
    change(model, lambda tensors: tensors.pop(name))
    refused(model, way, "none")


@every_way
@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.bias", "new.weight"]
)
def test_a_weight_that_the_model_has_no_place_for_is_named(
    model: Path, name: str, way: str
) -> None:
    change(model, lambda tensors: tensors.update({name: torch.ones(128)}))
    refused(model, way, name, "no place for")


@every_way
@pytest.mark.parametrize("num_layers", [3, 6])
def test_blocks_that_config_and_weights_do_not_share_are_named(
    model: Path, num_layers: int, way: str
) -> None:
    change_json(model / "config.json", lambda c: c.update(num_hidden_layers=num_layers))
    refused(model, way, "config.json")


@every_way
def test_heads_of_other_tasks_are_left_alone(model: Path, way: str) -> None:
    change(model, lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))
    assert load(model, way).num_parameters() > 0


@every_way
def test_a_weight_of_another_shape_is_named(model: Path, way: str) -> None:
    change(model, lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}))
    refused(model, way, "mlp.up_proj.weight", "127")


@every_way
def test_a_config_of_another_width_is_refused(model: Path, way: str) -> None:
    change_json(model / "config.json", lambda c: c.update(intermediate_size=100))
    refused(model, way, "config.json", "128")


@every_way
def test_integers_that_nothing_explains_are_refused(model: Path, way: str) -> None:
    change(model, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))
    refused(model, way, UP, "I8")


@every_way
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (UP, math.nan),
        ("model.layers.0.mlp.up_proj.weight", math.inf),
        ("model.norm.weight", -math.inf),
        ("model.embed_tokens.weight", math.nan),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    model: Path, name: str, value: float, way: str
) -> None:
    change(model, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    refused(model, way, "model.safetensors", name)


def test_a_number_that_the_storage_cannot_hold_is_refused(model: Path) -> None:
    change(model, lambda tensors: tensors[UP].view(-1)[5:6].fill_(1e6))
    load(model, "nf4")
    refused(model, "int8", "too large")


def test_a_quantized_checkpoint_whose_constants_are_not_finite_is_refused(model: Path) -> None:
    saved = model.parent / "saved"
    load(model, "nf4").save_pretrained(saved)
    shutil.copy(model / "config.json", model.parent)
    load(saved, "nf4")
    name = "model.layers.3.mlp.up_proj.weight.nested_absmax"
    change(saved, lambda tensors: tensors[name].view(-1)[:1].fill_(math.nan))
    refused(saved, "nf4", name)


@whole_and_in_parts
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER.encode(), "git-LFS"),
        (b"", "empty"),
        (b"<html>not found</html>", "cut or damaged"),
        (b"\x05\x00", "cut or damaged"),
    ],
)
def test_what_is_no_safetensors_file_is_named(
    model: Path, content: bytes, said: str, way: str
) -> None:
    (model / "model.safetensors").write_bytes(content)
    refused(model, way, "model.safetensors", said, "download it again")


@whole_and_in_parts
@pytest.mark.parametrize("cut", [-10, 1000, 20])
def test_a_cut_file_is_named(sharded: Path, cut: int, way: str) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:cut])
    refused(sharded, way, file.name, "download it again")


@whole_and_in_parts
def test_a_file_that_the_index_names_and_that_is_gone_is_named(sharded: Path, way: str) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.unlink()
    refused(sharded, way, file.name)


def _index_without_a_tensor(content: dict[str, Any]) -> None:
    del content["weight_map"][UP]


def _index_with_a_tensor_too_many(content: dict[str, Any]) -> None:
    content["weight_map"]["model.layers.9.x"] = content["weight_map"][UP]


def _index_with_another_file(content: dict[str, Any]) -> None:
    files = content["weight_map"]
    files[UP] = next(file for file in files.values() if file != files[UP])


@whole_and_in_parts
@pytest.mark.parametrize(
    "edit", [_index_without_a_tensor, _index_with_a_tensor_too_many, _index_with_another_file]
)
def test_an_index_that_is_at_odds_with_its_files_is_refused(
    sharded: Path, edit: Callable[[dict[str, Any]], object], way: str
) -> None:
    change_json(sharded / "model.safetensors.index.json", edit)
    refused(sharded, way, "model.safetensors.index.json", ".safetensors, which")


@whole_and_in_parts
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": "b',
        POINTER,
    ],
)
def test_an_index_that_is_none_is_refused(sharded: Path, text: str, way: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, way, "model.safetensors.index.json", "download it again")


def test_a_second_checkpoint_beside_the_one_that_is_loaded_is_said_or_refused(
    sharded: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tiny_llama_dir / "model.safetensors", sharded)
    load(sharded)
    assert "model.safetensors is loaded, and not the files that" in caplog.text
    change_json(sharded / "model.safetensors.index.json", _index_without_a_tensor)
    refused(sharded, "fp32", "model.safetensors.index.json", "remove what is old")


def test_a_classifiers_head_is_new_or_whole(model: Path) -> None:
    options: dict[str, Any] = {"storage": "fp32", "task_type": "SEQ_CLS", "num_labels": 2}
    load_base(model, device="cpu", **options).save_pretrained(model.parent / "classifier")
    change(model, lambda tensors: tensors.pop(UP))
    with pytest.raises(InputError, match="up_proj"):
        load_base(model, device="cpu", **options)
    classifier = load_base(model.parent / "classifier", device="cpu", **options)
    assert classifier.score.weight.shape == (2, 64)
    with pytest.raises(InputError, match=r"score\.weight of shape \[3, 64\]"):
        load_base(model.parent / "classifier", device="cpu", **{**options, "num_labels": 3})


def test_the_header_of_a_file_is_read_without_its_tensors(model: Path) -> None:
    stored = read_header(model / "model.safetensors")
    assert (stored[UP].dtype, stored[UP].shape) == ("F32", (128, 64))


@pytest.fixture
def cached(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Snapshot of org/m in a cache of the hub that cannot be reached."""
    root = tmp_path / "hub" / "models--org--m"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(sharded, root / "snapshots" / ("a" * 40)))


@whole_and_in_parts
def test_what_is_of_the_hub_is_named_by_its_file_in_the_cache(
    cached: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = partial(cached_file, cache_dir=str(cached.parents[2]))
    monkeypatch.setattr("lowmem_reft.base.hub.cached_file", find)
    real = AutoModelForCausalLM.from_pretrained
    here = partial(real, cache_dir=str(cached.parents[2]))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", here)
    config = AutoConfig.from_pretrained(cached)

    def from_hub() -> Any:
        return load_base("org/m", device="cpu", config=config, **WAYS[way])

    from_hub()
    file = sorted(cached.glob("model-*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=rf"{file.name} must be a whole file of safetensors"):
        from_hub()
    file.write_bytes(whole)
    change_json(cached / "model.safetensors.index.json", _index_without_a_tensor)
    with pytest.raises(InputError, match=r"index\.json must say where each tensor is"):
        from_hub()
