"""A saved adapter is loaded whole or refused, with its file and the weight that is wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lowmem_reft as lr
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import attach
from lowmem_reft.methods.card import load_card, merge_card
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.methods.several import find_adapters, load_together
from lowmem_reft.options import MemoryOptions, MethodOptions, ModelOptions

Tensors = dict[str, torch.Tensor]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1044992\n"
KINDS = ("loreft", "lora", "lora_reft", "ia3", "ln_tuning", "prompt", "prefix", "p_tuning")
FILE = "adapter_model.safetensors"
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def kept(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of adapters of several kinds."""
    directory = tmp_path_factory.mktemp("kept")
    for kind in KINDS:
        options = MethodOptions(method=kind)
        model = attach(
            base(tiny_llama_dir),
            options,
            task_type="CAUSAL_LM",
            memory=MemoryOptions(),
            chunked_loss=False,
        )
        model.save_pretrained(directory / kind)
    return directory


@pytest.fixture
def adapter(kept: Path, tmp_path: Path, kind: str) -> Path:
    return Path(shutil.copytree(kept / kind, tmp_path / kind))


def base(directory: Path, **options: Any) -> Any:
    return lr.load_base(directory, storage="fp32", device="cpu", **options)


def load(model: Path, adapter: Path, **options: Any) -> Any:
    chosen = ModelOptions(model=str(model), storage="fp32", device="cpu")
    card = merge_card(load_card(adapter), chosen, template=None, max_length=None)
    return load_adapted(chosen, adapter, card, **options)[0]


def refused(model: Path, adapter: Path, *said: str) -> None:
    with pytest.raises(InputError) as raised:
        load(model, adapter)
    for words in (str(adapter), *said):
        assert words in str(raised.value)


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / FILE).items()}
    edit(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@every_kind
def test_an_adapter_as_it_was_saved_is_loaded(tiny_llama_dir: Path, adapter: Path) -> None:
    assert isinstance(load(tiny_llama_dir, adapter), PeftModel)


@every_kind
def test_a_weight_that_an_adapter_lacks_is_named(tiny_llama_dir: Path, adapter: Path) -> None:
    change(adapter, lambda tensors: tensors.pop(next(iter(tensors))))
    refused(tiny_llama_dir, adapter, FILE, "none for")


@every_kind
def test_a_weight_without_a_place_is_named(tiny_llama_dir: Path, adapter: Path) -> None:
    change(adapter, lambda tensors: tensors.update({"base_model.model.more.weight": torch.ones(2)}))
    refused(tiny_llama_dir, adapter, FILE, "more.weight")


@every_kind
def test_a_weight_that_is_not_finite_is_named(tiny_llama_dir: Path, adapter: Path) -> None:
    name = next(iter(load_file(adapter / FILE)))
    change(adapter, lambda tensors: tensors[name].view(-1)[:1].fill_(math.nan))
    refused(tiny_llama_dir, adapter, FILE, name)


@every_kind
def test_a_weight_of_another_shape_is_named(tiny_llama_dir: Path, adapter: Path) -> None:
    name = next(iter(load_file(adapter / FILE)))
    change(adapter, lambda tensors: tensors.update({name: torch.ones(3, 3)}))
    refused(tiny_llama_dir, adapter, "[3, 3]")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("loreft", {"rank": 2}),
        ("loreft", {"layers": [0, 1]}),
        ("loreft", {"layers": [0, 1, 2], "positions": "f1", "tie": "tied"}),
        ("loreft", {"tie": "sides"}),
        ("loreft", {"intervention": "nodireft"}),
        ("loreft", {"component": "mlp_output"}),
        ("loreft", {"peft_type": "LORA"}),
        ("loreft", {"peft_type": "LORA_REFT", "target_modules": "all-linear"}),
        ("lora", {"r": 3}),
        ("lora", {"target_modules": ["q_proj"]}),
        ("lora", {"target_modules": ["q_proj"], "peft_type": "LORA_REFT", "reft": {"rank": 1}}),
        ("lora", {"peft_type": "REFT", "target_modules": None}),
        ("lora", {"peft_type": "IA3"}),
        ("lora", {"layers_to_transform": [1], "layers_pattern": "layers"}),
        ("lora", {"use_dora": True}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("lora_reft", {"reft": {"rank": 2}}),
        ("lora_reft", {"reft": {"layers": [0]}}),
        ("lora_reft", {"peft_type": "LORA"}),
        ("ia3", {"peft_type": "LORA"}),
        ("prompt", {"num_virtual_tokens": 5}),
        ("prefix", {"peft_type": "PROMPT_TUNING"}),
        ("prefix", {"num_virtual_tokens": 5}),
    ],
)
def test_a_configuration_of_other_weights_is_refused(
    tiny_llama_dir: Path, adapter: Path, fields: dict[str, Any]
) -> None:
    change_config(adapter, **fields)
    refused(tiny_llama_dir, adapter)


@pytest.mark.parametrize("kind", ["loreft", "lora"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(POINTER.encode(), "git-LFS"), (b"", "empty"), (b"\x09" * 50, "cut or damaged")],
)
def test_what_is_no_file_of_weights_is_named(
    tiny_llama_dir: Path, adapter: Path, content: bytes, said: str
) -> None:
    path = adapter / FILE
    path.write_bytes(content)
    refused(tiny_llama_dir, adapter, FILE, said, "download it again")
    path.rename(adapter / "adapter_model.bin")
    refused(tiny_llama_dir, adapter, "adapter_model.bin", said.split()[0])
    (adapter / "adapter_model.bin").unlink()
    refused(tiny_llama_dir, adapter, FILE, "no such file")


@pytest.mark.parametrize("kind", ["lora"])
def test_pickled_weights_are_looked_at_like_others(tiny_llama_dir: Path, adapter: Path) -> None:
    tensors = load_file(adapter / FILE)
    (adapter / FILE).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    load(tiny_llama_dir, adapter)
    tensors[next(iter(tensors))].view(-1)[:1].fill_(math.inf)
    torch.save(tensors, adapter / "adapter_model.bin")
    refused(tiny_llama_dir, adapter, "adapter_model.bin", next(iter(tensors)))


@pytest.mark.parametrize("kind", ["loreft"])
@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", POINTER, "{}", '{"peft_type": "X"}', '{"peft_type": 5}']
)
def test_a_configuration_that_is_none_is_named(
    tiny_llama_dir: Path, adapter: Path, text: str
) -> None:
    (adapter / "adapter_config.json").write_text(text)
    refused(tiny_llama_dir, adapter, "adapter_config.json")


@pytest.mark.parametrize("kind", ["loreft", "lora_reft"])
def test_peft_itself_refuses_our_adapters_that_are_not_whole(
    tiny_llama_dir: Path, adapter: Path
) -> None:
    whole = load_file(adapter / FILE)
    first = next(name for name in whole if ".reft_phi." in name)
    edits: dict[str, Callable[[Tensors], object]] = {
        "none for": lambda tensors: tensors.pop(first),
        "no place": lambda tensors: tensors.update({f"{first}x": torch.ones(1)}),
        "NaN or infinity": lambda tensors: tensors[first].view(-1)[:1].fill_(math.nan),
    }
    for said, edit in edits.items():
        save_file(whole, adapter / FILE, metadata={"format": "pt"})
        change(adapter, edit)
        with pytest.raises(InputError, match=said):
            PeftModel.from_pretrained(base(tiny_llama_dir), adapter)


def test_an_adapter_of_a_method_that_is_not_ours_is_checked_too(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    config = OFTConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], oft_block_size=0)
    get_peft_model(base(tiny_llama_dir), config).save_pretrained(tmp_path)
    load(tiny_llama_dir, tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    refused(tiny_llama_dir, tmp_path, "none for")


@pytest.mark.parametrize("kind", ["loreft", "lora"])
def test_a_second_adapter_is_looked_at_like_the_first(
    tiny_llama_dir: Path, adapter: Path, kind: str, tmp_path: Path
) -> None:
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    change(second, lambda tensors: tensors.pop(next(iter(tensors))))
    options = ModelOptions(model=str(tiny_llama_dir), storage="fp32", device="cpu")
    found = find_adapters(f"{adapter},{second}", options, template=None, max_length=None)
    with pytest.raises(InputError, match="none for") as raised:
        load_together(options, found)
    assert str(second) in str(raised.value)


def test_a_classifiers_adapter_without_its_head_is_refused(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    task: dict[str, Any] = {"task_type": "SEQ_CLS", "num_labels": 2}
    config = lr.ReftConfig(task_type="SEQ_CLS", rank=2, modules_to_save=["score"])
    get_peft_model(base(tiny_llama_dir, **task), config).save_pretrained(tmp_path)
    load(tiny_llama_dir, tmp_path)
    change(tmp_path, lambda tensors: tensors.pop("base_model.model.score.weight"))
    refused(tiny_llama_dir, tmp_path, FILE, "score")
    change_config(tmp_path, modules_to_save=None)
    refused(tiny_llama_dir, tmp_path, FILE, "score")


def _resized(model: Path, config: Any) -> Any:
    resized = base(model)
    resized.resize_token_embeddings(131, mean_resizing=False)
    resized.requires_grad_(False)
    return get_peft_model(resized, config).eval()


CONFIGS: dict[str, Callable[..., Any]] = {
    "loreft": lambda **more: lr.ReftConfig(task_type="CAUSAL_LM", rank=2, init="paper", **more),
    "lora": lambda **more: LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False, **more
    ),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_that_holds_a_larger_vocabulary_gives_the_same_logits(
    tiny_llama_dir: Path, tmp_path: Path, method: str, saved: list[str] | None
) -> None:
    trained = _resized(tiny_llama_dir, CONFIGS[method](modules_to_save=saved))
    trained.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 129, 130, 7]])
    again = load(tiny_llama_dir, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_larger_vocabulary_that_an_adapter_holds_in_part_is_refused(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    _resized(tiny_llama_dir, CONFIGS["loreft"]()).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    refused(tiny_llama_dir, tmp_path, "lm_head", "resize", "131", "128")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_that_overwrites_the_embedding_answers_alone(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        _resized(tiny_llama_dir, CONFIGS["loreft"]()).save_pretrained(tmp_path / name)
    options = ModelOptions(model=str(tiny_llama_dir), storage="fp32", device="cpu")
    for others in (str(tmp_path / "second"), "__base__"):
        found = find_adapters(
            f"{tmp_path / 'first'},{others}", options, template=None, max_length=None
        )
        with pytest.raises(InputError, match="weights of the base"):
            load_together(options, found)
