"""A tokenizer that is not whole is refused, with the file that is at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.base.tokenizer_files import check_tokenizer_files
from lowmem_reft.errors import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1044992\n"


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def refused(directory: Path, *said: str) -> None:
    with pytest.raises(InputError) as raised:
        load_tokenizer(directory)
    for words in said:
        assert words in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "5", '{"a": ', POINTER, "<html>"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_file_that_is_no_json_object_is_named(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    refused(model, name, "download it again")


@pytest.mark.parametrize("text", ["[]", '{"a": ', POINTER])
def test_a_large_file_is_named_too(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text + " " * (1 << 20))
    refused(model, str(model / "tokenizer.json"), "download it again")


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "tokenizer.model"])
def test_a_pointer_that_stands_for_another_file_is_named(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    refused(model, name, "git lfs pull")


def test_text_of_another_encoding_is_named(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    refused(model, "chat_template.jinja")


def _without_model(content: dict[str, Any]) -> None:
    del content["model"]


def _without_tokens(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {}


@pytest.mark.parametrize("edit", [_without_model, _without_tokens, dict.clear])
def test_a_tokenizer_that_lacks_what_it_needs_is_refused(
    model: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    edit(content)
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(model, str(model), "tokenizer.json")


@pytest.mark.parametrize(
    "fields", [{"tokenizer_class": 5}, {"eos_token": 5}, {"added_tokens_decoder": {"x": 1}}]
)
def test_a_configuration_with_other_values_is_refused(model: Path, fields: dict[str, Any]) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(model, str(model), "tokenizer_config.json")


def test_a_tokenizer_without_its_tokens_is_not_taken_for_one(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    path = model / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    path.write_text(json.dumps(content))
    refused(model, "tokenizer.json")


def test_a_tokenizer_of_bytes_needs_no_file_of_tokens(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    check_tokenizer_files(tmp_path)
    assert load_tokenizer(tmp_path)("a").input_ids
