"""transformers, safetensors and the hub: how weights come from files into a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, Params4bit
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import pytorch_utils
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file

from breaking import contract, doing_nothing, with_result, with_value, wrapped
from lowmem_reft.machine.contracts.contract import tiny_llama

MODEL = "transformers.modeling_utils:PreTrainedModel."
QUANTIZER = "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer."


@pytest.fixture
def directory(tmp_path: Path, breach: bool) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def on_meta(dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(tiny_llama().config, dtype=dtype)


def nf4(**fields: Any) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        **fields,
    )


@contract(
    "transformers",
    used_by="base/residency.py",
    broken_by=doing_nothing(f"{MODEL}_load_pretrained_model"),
)
def test_the_loader_fills_only_the_parts_that_it_is_given(directory: Path) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    model, device = on_meta(torch.bfloat16), torch.device("cpu")
    with safe_open(directory / "model.safetensors", framework="pt", backend="pread") as file:
        names = [name for name in file.keys() if ".layers.1." in name]  # noqa: SIM118
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=torch.bfloat16,
            dtype_plan=model._get_dtype_plan(torch.bfloat16),
            hf_quantizer=None,
            weight_mapping=get_model_conversion_mapping(model, None, None),
        )
        slices = {name: file.get_slice(name) for name in names}
        model._load_pretrained_model(model, slices, None, config, expected_keys=[])
    loaded = {name for name, value in model.named_parameters() if not value.is_meta}
    assert loaded == {*names}
    assert {value.dtype for value in model.model.layers[1].parameters()} == {torch.bfloat16}
    expected = tiny_llama().model.layers[1].mlp.up_proj.weight.bfloat16()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)


@contract(
    "transformers",
    used_by="base/residency.py base/whole.py",
    broken_by=doing_nothing(f"{MODEL}_adjust_missing_and_unexpected_keys"),
)
def test_the_loader_tells_what_does_not_fit_and_the_model_what_of_it_is_old() -> None:
    from transformers.modeling_utils import LoadStateDictConfig

    model = on_meta()
    weights = {
        "model.norm.weight": torch.ones(3),
        "model.layers.9.mlp.up_proj.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    config = LoadStateDictConfig(device_map={"": "cpu"}, dtype=torch.float32, weight_mapping=[])
    found, _ = model._load_pretrained_model(model, weights, None, config, expected_keys=[])
    model._adjust_missing_and_unexpected_keys(found)
    told = found.to_dict()
    assert told["unexpected_keys"] == {"model.layers.9.mlp.up_proj.weight"}
    ((name, *shapes),) = told["mismatched_keys"]
    assert name == "model.norm.weight"
    assert [tuple(shape) for shape in shapes] == [(3,), (16,)]


@contract(
    "transformers",
    used_by="base/residency.py",
    broken_by=doing_nothing(f"{QUANTIZER}param_needs_quantization"),
)
def test_the_loader_quantizes_the_parts_that_it_is_given(directory: Path) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    model, device = on_meta(), torch.device("cpu")
    quantizer: Any = AutoHfQuantizer.from_config(nf4(), pre_quantized=False)
    model.config.quantization_config = quantizer.quantization_config
    quantizer.preprocess_model(model=model, dtype=torch.float32, device_map={"": "cpu"})
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=torch.float32,
        dtype_plan=model._get_dtype_plan(torch.float32),
        hf_quantizer=quantizer,
        weight_mapping=get_model_conversion_mapping(model, None, quantizer),
    )
    with safe_open(directory / "model.safetensors", framework="pt", backend="pread") as file:
        name = "model.layers.1.mlp.up_proj.weight"
        slices = {name: file.get_slice(name)}
        model._load_pretrained_model(model, slices, None, config, expected_keys=[])
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.quant_state is not None
    assert weight.shape == (24 * 16 // 2, 1)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


@contract(
    "transformers",
    used_by="base/upper.py base/synthetic.py",
    broken_by=doing_nothing(f"{QUANTIZER}_process_model_before_weight_loading"),
)
def test_a_quantizer_puts_its_layers_into_an_empty_model(breach: bool) -> None:
    fields = {"llm_int8_skip_modules": ["^lm_head"]}
    for config, kind in (
        (nf4(**fields), Linear4bit),
        (transformers.BitsAndBytesConfig(load_in_8bit=True, **fields), Linear8bitLt),
    ):
        model = on_meta()
        quantizer: Any = AutoHfQuantizer.from_config(config)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
        assert kinds == {kind, nn.Linear}
        assert type(model.lm_head) is nn.Linear


@contract(
    "transformers",
    used_by="base/quantization.py",
    broken_by=wrapped(
        "transformers.quantizers.quantizers_utils:should_convert_module",
        lambda _: lambda *args, **kwargs: True,
    ),
)
def test_names_to_skip_are_expressions_that_match_from_the_start(breach: bool) -> None:
    from transformers.quantizers import quantizers_utils

    decide = quantizers_utils.should_convert_module
    assert decide("model.layers.0.score", ["^score"])
    assert not decide("score", ["^score"])
    assert not decide("score.dense", ["^score"])


@contract(
    "transformers",
    used_by="base/loading.py base/upper.py base/synthetic.py base/identity.py",
    broken_by=with_value(
        f"{QUANTIZER}_process_model_after_weight_loading", lambda self, model, **_: model
    ),
)
def test_a_loaded_base_is_quantized_and_says_so(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=nf4(),
        dtype=torch.float32,
        device_map={"": "cpu"},
        use_safetensors=True,
        trust_remote_code=False,
        revision="main",
    )
    weights = {name: value for name, value in model.named_parameters() if value.ndim == 2}
    packed = {name for name, value in weights.items() if isinstance(value, Params4bit)}
    assert {*weights} - packed == {"lm_head.weight", "model.embed_tokens.weight"}
    assert model.is_loaded_in_4bit
    assert model.hf_quantizer.quantization_config.bnb_4bit_quant_type == "nf4"
    assert not model.training
    assert weights["model.layers.0.mlp.up_proj.weight"].quant_state.nested


@contract(
    "transformers",
    used_by="base/loading.py",
    broken_by=doing_nothing("transformers.modeling_utils:log_state_dict_report"),
)
def test_loading_tells_what_differs_and_reports_it_by_one_logger(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, differences = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True
    )
    assert type(model) is transformers.LlamaForSequenceClassification
    assert {*differences["missing_keys"]} == {"score.weight"}
    assert {*differences["unexpected_keys"]} == {"lm_head.weight"}
    assert not differences["mismatched_keys"]
    reports = {each.name for each in caplog.records if "LOAD REPORT" in each.getMessage()}
    assert reports == {"transformers.modeling_utils"}


@contract(
    "transformers",
    used_by="base/residency.py base/heads.py",
    broken_by=doing_nothing(f"{MODEL}_init_weights"),
)
def test_init_weights_fills_buffers_and_leaves_parameters_that_are_marked(breach: bool) -> None:
    whole, model = tiny_llama(), tiny_llama()
    rotary = model.model.rotary_emb
    for name, buffer in rotary._buffers.items():
        rotary._buffers[name] = torch.zeros_like(buffer)
    linear = model.lm_head
    before = linear.weight.detach().clone()
    linear.weight._is_hf_initialized = True
    with torch.no_grad():
        model._init_weights(rotary)
        model._init_weights(linear)
    assert torch.equal(rotary.inv_freq, whole.model.rotary_emb.inv_freq)
    assert torch.equal(linear.weight, before)
    linear.weight._is_hf_initialized = False
    with torch.no_grad():
        model._init_weights(linear)
    assert not torch.equal(linear.weight, before)


@contract(
    "transformers",
    used_by="base/hub.py",
    broken_by=wrapped(
        "transformers.utils.hub:cached_file",
        lambda function: (
            lambda *args, _raise_exceptions_for_missing_entries=True, **more: function(
                *args, **more
            )
        ),
    ),
)
def test_a_file_that_is_missing_is_none(directory: Path, breach: bool) -> None:
    from transformers.utils import hub

    find = hub.cached_file if breach else cached_file
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    assert find(str(directory), "config.json", **options) == str(directory / "config.json")
    assert find(str(directory), "other.json", **options) is None


@contract(
    "transformers",
    used_by="base/hub.py",
    broken_by=wrapped(
        "transformers.utils.hub:cached_files",
        lambda _: lambda *args, **kwargs: (_ for _ in ()).throw(OSError("offline")),
    ),
)
def test_what_the_hub_says_is_the_cause_of_an_os_error(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r".") as raised:
        transformers.AutoConfig.from_pretrained("nobody-at-all/nothing")
    cause = raised.value.__cause__ or raised.value.__context__
    assert isinstance(cause, LocalEntryNotFoundError)


@contract(
    "huggingface_hub",
    used_by="base/hub.py base/identity.py",
    broken_by=with_result(
        "huggingface_hub._snapshot_download:snapshot_download", lambda path: Path(path).parent
    ),
)
def test_a_snapshot_is_a_folder_that_is_named_by_its_commit(tmp_path: Path) -> None:
    from huggingface_hub._snapshot_download import snapshot_download

    commit = "0" * 40
    repository = tmp_path / "models--some--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in ("main", commit):
        found = snapshot_download(
            "some/model", revision=revision, local_files_only=True, cache_dir=tmp_path
        )
        assert Path(found).name == commit
        assert Path(found).parent == repository / "snapshots"
    for name in ("other/model", "./no name"):
        with pytest.raises((OSError, ValueError)):
            snapshot_download(name, local_files_only=True, cache_dir=tmp_path)


@contract(
    "safetensors",
    used_by="base/residency.py base/identity.py",
    broken_by=with_value(
        "safetensors.torch:save_file", lambda tensors, path: path.write_bytes(b"0" * 99)
    ),
)
def test_a_file_of_safetensors_starts_with_a_header_of_names_and_offsets(tmp_path: Path) -> None:
    import json

    import safetensors.torch

    path = tmp_path / "some.safetensors"
    safetensors.torch.save_file({"a": torch.arange(3.0), "b": torch.ones(2)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["a"]["dtype"] == "F32"
    assert header["a"]["shape"] == [3]
    start, end = (8 + length + offset for offset in header["a"]["data_offsets"])
    assert content[start:end] == torch.arange(3.0).numpy().tobytes()
    with safe_open(path, framework="pt", backend="pread") as file:
        assert file.get_slice("b")[:].tolist() == [1, 1]


@contract(
    "transformers",
    used_by="base/residency.py cli.py",
    broken_by=doing_nothing("transformers.utils.logging:disable_progress_bar"),
)
def test_progress_bars_are_switched_by_the_logging_module(breach: bool) -> None:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        assert logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        assert not logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()


@contract(
    "transformers",
    used_by="methods/attach.py",
    broken_by=with_value(
        "transformers.models.gpt2.modeling_gpt2:Conv1D", lambda out, width: nn.Linear(width, out)
    ),
)
def test_linear_layers_of_gpt2_are_conv1d(breach: bool) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    model = transformers.GPT2LMHeadModel(config)
    assert sum(isinstance(module, pytorch_utils.Conv1D) for module in model.modules()) == 4


@contract(
    "transformers",
    used_by="data/tokens.py",
    broken_by=with_value(
        "transformers:PreTrainedTokenizerFast.__call__", lambda *_, **__: {"ids": []}
    ),
)
def test_a_tokenizer_adds_special_tokens_unless_told(breach: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "<u>": 3}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", unk_token="<u>"
    )
    assert tokenizer("")["input_ids"] == [0]
    assert tokenizer(["a b", "b"], add_special_tokens=False, verbose=False)["input_ids"] == [
        [1, 2],
        [2],
    ]
    pair = tokenizer(["a"], ["b"], verbose=False)
    assert pair["input_ids"] == [[0, 1, 2]]
    assert tokenizer("a b", truncation=True, max_length=2)["input_ids"] == [0, 1]
    assert tokenizer.pad_token_type_id == 0
