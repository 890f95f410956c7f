"""Configurations that ask for code, or for files of others, are refused before all else."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import zlib
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft.base.hub import load_config
from lowmem_reft.base.loading import load_base, load_tokenizer
from lowmem_reft.base.trust import check_config
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import find_adapter

KERNEL = "someone/attention"


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model, on a machine without a network."""

    def connect(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def change(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    return path


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    "content",
    [
        {"_attn_implementation": KERNEL},
        {"attn_implementation": f"{KERNEL}@main:forward"},
        {"attn_implementation": {"": "sdpa", "text_config": KERNEL}},
        {"attn_implementation": f"paged|{KERNEL}"},
        {"text_config": {"_attn_implementation": KERNEL}},
        {"per_layer_config": {"0": {"attn_implementation": KERNEL}}},
        {"_experts_implementation": KERNEL},
        {"experts_implementation": "sonicmoe"},
        {"_attn_implementation_internal": KERNEL},
    ],
)
def test_kernels_of_the_hub_are_refused_by_every_command(
    model: Path, films: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = change(model / "config.json", **content)
    for words in (
        ["train", "--model", model, "--data", films, "--output-dir", model / "out"],
        ["evaluate", "--model", model, "--data", films],
        ["generate", "--model", model, "--prompt", "a"],
        ["plan", "--model", model],
        ["plan", "--model", config],
    ):
        assert cli.main(list(map(str, words))) == 2
        assert "must have a configuration that names no code to fetch" in capsys.readouterr().err


def test_kernels_are_found_in_the_file_that_transformers_reads(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    other = model / "config.4.0.0.json"
    other.write_text(json.dumps({**content, "_attn_implementation": KERNEL}))
    change(model / "config.json", configuration_files=["config.4.0.0.json"])
    with pytest.raises(InputError, match="names no code to fetch"):
        load_config(model)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", None])
def test_implementations_of_transformers_itself_are_accepted(name: str | None) -> None:
    check_config("a", {"_attn_implementation": name, "experts_implementation": "grouped_mm"})


def test_flash_attention_is_refused_where_it_would_come_from_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = {"_attn_implementation": "flash_attention_2"}
    there = {"kernels"}
    monkeypatch.setattr("lowmem_reft.base.trust.find_spec", lambda name: name in there or None)
    with pytest.raises(InputError, match="names no code to fetch"):
        check_config("a", content)
    there.add("flash_attn")
    check_config("a", content)


def test_an_adapter_beside_a_base_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    with pytest.raises(InputError, match="model must be a base"):
        load_config(model)


def test_code_in_a_checkpoint_is_never_run(model: Path) -> None:
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (model / f"{name}.py").write_text("raise SystemExit('run')")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text("raise SystemExit('run')")
    mapping = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    change(model / "config.json", auto_map=mapping)
    change(model / "tokenizer_config.json", auto_map=mapping)
    base = load_base(model, storage="fp32", device="cpu")
    load_tokenizer(model)
    assert type(base).__name__ == "LlamaForCausalLM"
    change(model / "config.json", model_type="x")
    with pytest.raises(InputError, match="model must be a directory"):
        load_base(model, storage="fp32", device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        {"peft_type": "XLORA", "adapters": {"a": "someone/adapter"}},
        {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "megatron.x"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
    ],
)
def test_adapters_that_ask_for_code_or_other_adapters_are_refused(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="must not ask for code or files of others"):
        find_adapter(tmp_path)


def test_adapters_with_patterns_that_do_not_end_are_refused(tmp_path: Path) -> None:
    pattern = r"(([a-z_]+|\.|\d)+)+!"
    for content in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="must name modules by patterns that end"):
            find_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": "("}))
    with pytest.raises(InputError, match="must name modules by regular expressions"):
        find_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": r".*\.(q|v)_proj"}))
    assert find_adapter(tmp_path) == tmp_path


class _Touch:
    """Pickled, it is a call of ``open``, which whoever loads it without care makes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def _note_again(checkpoint: Path) -> None:
    """Note the files as they are now, as whoever means harm would."""
    path = checkpoint / "whole.json"
    note = json.loads(path.read_text())
    for name in note["files"]:
        content = (checkpoint / name).read_bytes()
        note["files"][name] = [len(content), zlib.crc32(content)]
    del note["checksum"]
    path.write_text(json.dumps(note))


def test_objects_in_an_adapter_or_a_checkpoint_are_not_made(
    tiny_llama_dir: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, touched = tmp_path / "run", tmp_path / "touched"
    model = ["--model", tiny_llama_dir, "--storage", "fp32", "--device", "cpu", "--quiet"]
    words = [*model, "--data", films]
    train = ["train", *words, "--output-dir", run, "--batch-size", 8, "--save-steps", 1]
    assert cli.main(list(map(str, [*train, "--epochs", 1]))) == 0
    capsys.readouterr()
    [checkpoint] = run.glob("checkpoint-*")
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(_Touch(touched), 2))
    _note_again(checkpoint)
    assert cli.main(list(map(str, [*train, "--epochs", 2, "--resume"]))) == 2
    assert "resume must lead to files that hold tensors alone" in capsys.readouterr().err
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(_Touch(touched), 2))
    assert cli.main(list(map(str, ["evaluate", *words, "--adapter", run / "adapter"]))) == 2
    assert "a whole file of torch.save with tensors alone" in capsys.readouterr().err
    assert not touched.exists()
