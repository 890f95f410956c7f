"""The frozen base: storage, arithmetic, guards against known traps, saving and refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lowmem_reft.base.caches import caches_in
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.identity import base_digest
from lowmem_reft.base.loading import load_base, load_tokenizer, save_base
from lowmem_reft.base.quantization import guard_linear4bit
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import resolve_compute_dtype, resolve_device
from reference import dequantized_copy, relative_error

QUANTIZED = ("nf4", "fp4", "int8")
CPU_STORAGES = (*QUANTIZED, "bf16", "fp32")
# fp32 arithmetic on 4 blocks; the fp32 base itself is 7e-7 from the reference.
TOLERANCE = 1e-5


def token_ids(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def add_offset(model: PreTrainedModel, layer: int = 1) -> nn.Parameter:
    """Make one vector trainable, added to the output of a block, as an intervention would be."""
    offset = nn.Parameter(torch.zeros(64))
    model.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: output + offset.to(output.dtype)
    )
    return offset


def gradient(model: PreTrainedModel, offset: nn.Parameter) -> Tensor:
    offset.grad = None
    model(input_ids=token_ids()).logits.log_softmax(-1)[..., 0].mean().backward()
    return offset.grad.clone()


def reference_gradient(model: PreTrainedModel, layer: int = 1) -> Tensor:
    twin = dequantized_copy(model).train()
    return gradient(twin, add_offset(twin, layer))


def evaluate(model: PreTrainedModel) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def count_block_forwards(model: PreTrainedModel) -> list[int]:
    """Return a list that counts the runs of every block's MLP from now on, recomputed ones too."""
    counts = [0] * len(model.model.layers)

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[index] += 1

        return count

    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(counter(index))
    return counts


# Storage and arithmetic


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_four_bit_storage_is_double_quantized_and_spares_embeddings_norms_and_head(
    tiny_llama_dir: Path, storage: str
) -> None:
    base = load_base(tiny_llama_dir, storage=storage, compute_dtype="bf16")
    quantized = [module for module in base.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 4 * 7
    assert all(module.weight.quant_state.nested for module in quantized)
    assert {module.weight.quant_type for module in quantized} == {storage}
    assert {module.compute_dtype for module in quantized} == {torch.bfloat16}
    assert type(base.lm_head) is nn.Linear


@pytest.mark.parametrize("storage", CPU_STORAGES)
def test_nothing_is_cast_up_to_fp32(tiny_llama_dir: Path, storage: str) -> None:
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    compute_dtype = "auto" if storage in ("bf16", "fp32") else "bf16"
    base = load_base(tiny_llama_dir, storage=storage, compute_dtype=compute_dtype)
    kept = {p.dtype for p in base.parameters() if p.is_floating_point()}
    assert kept == {dtype}
    assert evaluate(base).dtype == dtype


@pytest.mark.parametrize("storage", CPU_STORAGES)
def test_no_parameter_of_the_base_requires_a_gradient(tiny_llama_dir: Path, storage: str) -> None:
    assert not any(p.requires_grad for p in load_base(tiny_llama_dir, storage=storage).parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "fp32"])
def test_logits_equal_those_of_the_dequantized_weights(
    tiny_llama_dir: Path, storage: str, attention: str
) -> None:
    base = load_base(
        tiny_llama_dir, storage=storage, compute_dtype="fp32", attn_implementation=attention
    ).train()  # int8 would quantize activations in evaluation mode
    assert base.config._attn_implementation == attention
    ids = token_ids()
    assert relative_error(base(ids).logits, dequantized_copy(base)(ids).logits) < TOLERANCE


def test_four_bit_logits_do_not_depend_on_train_or_evaluation_mode(tiny_llama_dir: Path) -> None:
    base = load_base(tiny_llama_dir, compute_dtype="fp32")
    assert torch.equal(evaluate(base), base.train()(input_ids=token_ids()).logits)


def test_generate_uses_a_cache_although_training_does_not(tiny_llama_dir: Path) -> None:
    base = load_base(tiny_llama_dir, compute_dtype="fp32")
    assert caches_in(base(token_ids()).values()) == []
    output = base.generate(
        token_ids(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    assert len(caches_in(output.values())) == 1


def test_weights_that_cannot_be_quantized_are_warned_of(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot be stored as nf4.*experts"):
        load_base(tmp_path)


# Classifiers and encoders

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
DECODER = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
ENCODER = {**SMALL, "intermediate_size": 128, "pad_token_id": 0}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**DECODER),
    "qwen2": transformers.Qwen2Config(**DECODER),
    "gpt2": transformers.GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=64),
    "gpt_neox": transformers.GPTNeoXConfig(**ENCODER),
    "bert": transformers.BertConfig(**ENCODER),
    "roberta": transformers.RobertaConfig(**ENCODER),
    "deberta-v2": transformers.DebertaV2Config(
        **ENCODER, pooler_hidden_size=64, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "modernbert": transformers.ModernBertConfig(
        **ENCODER, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_of_a_classifier_is_fp32_and_trainable_on_a_quantized_backbone(
    tmp_path: Path, architecture: str, task_type: str
) -> None:
    transformers.AutoModel.from_config(ARCHITECTURES[architecture]).save_pretrained(tmp_path)
    base = load_base(tmp_path, task_type=task_type, compute_dtype="bf16", num_labels=3)
    backbone = base.base_model
    assert any(isinstance(module, Linear4bit) for module in backbone.modules())
    assert torch.bfloat16 in {p.dtype for p in backbone.parameters()}
    inside = {id(p) for p in backbone.parameters()}
    head = [p for p in base.parameters() if id(p) not in inside]
    assert head
    assert {p.dtype for p in head} == {torch.float32}
    for parameter in head:
        parameter.requires_grad_(True)
    logits = base(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    assert logits.dtype == torch.float32
    assert logits.shape == ((1, 3) if task_type == "SEQ_CLS" else (1, 4, 3))
    logits.sum().backward()
    assert all(p.grad is not None for p in head)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_feature_extraction_loads_the_backbone(tmp_path: Path, architecture: str) -> None:
    transformers.AutoModel.from_config(ARCHITECTURES[architecture]).save_pretrained(tmp_path)
    base = load_base(tmp_path, task_type="FEATURE_EXTRACTION", compute_dtype="fp32")
    output = base(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    assert output.shape == (1, 3, 64)


def test_a_classifier_without_a_pad_token_pads_with_eos_as_its_tokenizer_does(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    for name, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        content = json.loads((directory / name).read_text())
        content.pop(key)
        (directory / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(directory)
    base = load_base(directory, task_type="SEQ_CLS")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == base.config.pad_token_id


# Compute dtype and device


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, real_bf16: bool, count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or real_bf16,
    )


def test_auto_is_fp32_on_a_gpu_that_only_emulates_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, real_bf16=False)
    assert resolve_compute_dtype("auto", "cuda") == torch.float32
    with pytest.warns(UserWarning, match="emulated"):
        assert resolve_compute_dtype("bf16", "cuda") == torch.bfloat16


def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, real_bf16=True)
    assert resolve_compute_dtype(None, "cuda:0") == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_f": True}, torch.float32)],
)
def test_auto_on_a_cpu_follows_its_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_compute_dtype("auto", "cpu") == dtype


def test_fp16_arithmetic_warns_on_a_gpu_and_is_refused_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path
) -> None:
    with pytest.raises(InputError, match="compute_dtype must be bf16 or fp32 on a CPU"):
        load_base(tiny_llama_dir, compute_dtype="fp16", device="cpu")
    with pytest.raises(InputError, match="storage must be bf16 or fp32 on a CPU"):
        load_base(tiny_llama_dir, storage="fp16", device="cpu")
    pretend_cuda(monkeypatch, real_bf16=True)
    with pytest.warns(UserWarning, match="overflow"):
        assert resolve_compute_dtype(torch.float16, "cuda") == torch.float16


def test_cuda_without_an_index_is_the_device_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_cuda(monkeypatch, real_bf16=True, count=2)
    assert resolve_device("cuda") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device(None) == torch.device("cuda:1")
    with pytest.raises(InputError, match="one of 2 CUDA devices"):
        resolve_device("cuda:2")


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="device must be one that torch can use, got 'cuda'"):
        resolve_device("cuda")


@pytest.mark.parametrize("device", ["mps", "gpu", "cuda:x", "meta"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or cuda:N"):
        resolve_device(device)


# Guards


def unguard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = has_avx512bf16()


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "fp32"])
def test_gradients_after_an_evaluation_equal_those_of_the_dequantized_weights(
    tiny_llama_dir: Path, storage: str
) -> None:
    base = load_base(tiny_llama_dir, storage=storage, compute_dtype="fp32")
    expected = reference_gradient(base)
    offset = add_offset(base)
    before = gradient(base.train(), offset)
    evaluate(base)
    assert torch.equal(gradient(base.train(), offset), before)
    assert relative_error(before, expected) < TOLERANCE


@pytest.mark.skipif(not has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack the weight")
def test_without_the_guard_gradients_after_an_evaluation_are_wrong(tiny_llama_dir: Path) -> None:
    base = load_base(tiny_llama_dir, compute_dtype="fp32")
    expected = reference_gradient(base)
    offset = add_offset(base)
    unguard(base)
    evaluate(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch says that gemv_4bit has no backward pass
        assert relative_error(gradient(base.train(), offset), expected) > 0.1
    with pytest.raises(InputError, match=r"repacked weight in 'model\.layers\.0"):
        guard_linear4bit(base)


def test_an_evaluation_leaves_the_bytes_of_the_base_alone(tiny_llama_dir: Path) -> None:
    base = load_base(tiny_llama_dir)
    before = base_digest(base)
    evaluate(base)
    assert base_digest(base) == before


def test_a_model_loaded_otherwise_can_be_guarded(tiny_llama_dir: Path) -> None:
    base = load_base(tiny_llama_dir)
    unguard(base)
    guard_linear4bit(base)
    guarded = [m.support_avx512bf16_for_cpu for m in base.modules() if isinstance(m, Linear4bit)]
    assert guarded
    assert not any(guarded)


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "fp32"])
def test_checkpointing_leaves_gradients_bitwise_the_same(
    tiny_llama_dir: Path, storage: str
) -> None:
    base = load_base(tiny_llama_dir, storage=storage, compute_dtype="fp32")
    offset = add_offset(base)
    expected = gradient(base.train(), offset)
    enable_activation_checkpointing(base)
    counts = count_block_forwards(base)
    assert torch.equal(gradient(base, offset), expected)
    assert counts == [1, 1, 2, 2]


def test_checkpointing_int8_is_right_with_the_kernel_that_quantizes_activations(
    tiny_llama_dir: Path,
) -> None:
    """That kernel is the one of CUDA; a CPU uses it for layers in evaluation mode."""
    gradients = []
    for activation_checkpointing in (False, True):
        base = load_base(
            tiny_llama_dir,
            storage="int8",
            compute_dtype="fp32",
            activation_checkpointing=activation_checkpointing,
        ).train()
        for module in base.modules():
            if isinstance(module, Linear8bitLt):
                module.eval()
        expected = reference_gradient(base)
        offset = add_offset(base)
        counts = count_block_forwards(base)
        gradients.append(gradient(base, offset))
        assert counts[-1] == 1 + activation_checkpointing
    assert torch.equal(*gradients)
    assert relative_error(gradients[0], expected) < 0.1  # activations have 8 bits


@pytest.mark.parametrize("storage", QUANTIZED)
def test_frozen_blocks_below_the_first_trainable_parameter_see_no_backward_pass(
    tiny_llama_dir: Path, storage: str
) -> None:
    base = load_base(tiny_llama_dir, storage=storage, activation_checkpointing=True).train()
    offset = add_offset(base, layer=2)
    backwards: list[int] = []
    for index, block in enumerate(base.model.layers):
        block.mlp.register_forward_hook(
            lambda module, inputs, output, index=index: (
                output.requires_grad
                and output.register_hook(lambda grad: backwards.append(index))
                and None
            )
        )
    counts = count_block_forwards(base)
    gradient(base, offset)
    assert counts[:2] == [1, 1]
    assert counts[3] == 2
    assert set(backwards) == {3}


def test_every_second_block_can_be_checkpointed(tiny_llama_dir: Path) -> None:
    base = load_base(tiny_llama_dir).train()
    offset = add_offset(base, layer=0)
    expected = gradient(base, offset)
    enable_activation_checkpointing(base, every_n_layers=2)
    counts = count_block_forwards(base)
    assert torch.equal(gradient(base, offset), expected)
    assert counts[1:] == [1, 2, 1]
    with pytest.raises(InputError, match="every_n_layers must be at least 1"):
        enable_activation_checkpointing(base, every_n_layers=0)


def test_checkpointing_that_trainer_switches_on_spares_frozen_blocks_too(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base = load_base(tiny_llama_dir, compute_dtype="fp32")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["down_proj"], layers_to_transform=[2]
    )
    model = get_peft_model(base, lora)
    counts = count_block_forwards(base)
    ids = token_ids()[0]
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    switch = f"{'activation' if 'activation_checkpointing' in names else 'gradient'}_checkpointing"
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            **{switch: True},
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}],
    ).train()
    assert counts == [1, 1, 2, 2]


def test_reentrant_checkpointing_is_refused_since_it_would_train_nothing(
    tiny_llama_dir: Path,
) -> None:
    base = load_base(tiny_llama_dir)
    name = "activation_checkpointing_enable"
    enable = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
    with pytest.raises(InputError, match="'use_reentrant': False"):
        enable({"use_reentrant": True})


# Digest, saving, already quantized checkpoints


@pytest.mark.parametrize("storage", CPU_STORAGES)
def test_a_saved_base_comes_back_with_the_same_bytes_and_logits(
    tiny_llama_dir: Path, tmp_path: Path, storage: str
) -> None:
    base = load_base(tiny_llama_dir, storage=storage)
    logits = evaluate(base)
    save_base(base, tmp_path, load_tokenizer(tiny_llama_dir))
    again = load_base(tmp_path, storage=storage)
    assert base_digest(again) == base_digest(base)
    assert torch.equal(evaluate(again), logits)
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(tiny_llama_dir).get_vocab()
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("storage", QUANTIZED)
def test_a_quantized_checkpoint_takes_the_compute_dtype_and_task_that_are_asked_for(
    tiny_llama_dir: Path, tmp_path: Path, storage: str
) -> None:
    save_base(load_base(tiny_llama_dir, storage=storage, compute_dtype="bf16"), tmp_path)
    base = load_base(tmp_path, storage=storage, compute_dtype="fp32", task_type="SEQ_CLS")
    assert evaluate(base).dtype == torch.float32
    assert {p.dtype for p in base.parameters() if p.is_floating_point()} == {torch.float32}
    assert type(base.score) is nn.Linear
    expected = reference_gradient(base)
    assert relative_error(gradient(base.train(), add_offset(base)), expected) < TOLERANCE


@pytest.mark.parametrize(("held", "asked"), [("nf4", "int8"), ("int8", "nf4"), ("fp4", "bf16")])
def test_a_quantized_checkpoint_is_not_stored_otherwise(
    tiny_llama_dir: Path, tmp_path: Path, held: str, asked: str
) -> None:
    save_base(load_base(tiny_llama_dir, storage=held), tmp_path)
    with pytest.raises(InputError, match=f"storage must be {held} .* got '{asked}'"):
        load_base(tmp_path, storage=asked)


def test_a_checkpoint_of_another_quantizer_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unquantized or quantized by bitsandbytes.*'gptq'"):
        load_base(tmp_path)


@pytest.mark.parametrize("storage", QUANTIZED)
def test_the_digest_sees_weights_and_their_constants_but_no_excluded_adapter(
    tiny_llama_dir: Path, storage: str
) -> None:
    base = load_base(tiny_llama_dir, storage=storage)
    before = base_digest(base)
    assert base_digest(load_base(tiny_llama_dir, storage=storage)) == before
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2))
    assert base_digest(model) != before
    assert base_digest(model, exclude=lambda name: "lora_" in name) == before
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    constants = weight.SCB if storage == "int8" else weight.quant_state.absmax
    constants[0] += 1
    assert base_digest(model, exclude=lambda name: "lora_" in name) != before


def test_a_base_with_an_adapter_is_not_saved_as_a_base(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = get_peft_model(load_base(tiny_llama_dir), LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(InputError, match="base must be a model without an adapter"):
        save_base(model, tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "int4"}, "storage must be one of nf4, fp4, int8, bf16, fp16, fp32"),
        ({"task_type": "QA"}, "task_type must be one of CAUSAL_LM, SEQ_CLS"),
        ({"compute_dtype": "fp8"}, "compute_dtype must be auto, bf16, fp16 or fp32"),
        ({"storage": "fp32", "compute_dtype": "bf16"}, "compute_dtype must be auto or fp32"),
        ({"num_labels": 2}, "num_labels must be left out with task_type CAUSAL_LM"),
        ({"task_type": "SEQ_CLS", "num_labels": 0}, "num_labels must be positive"),
        ({"attn_implementation": "guess"}, "model must be one that .* loads .*guess"),
    ],
)
def test_wrong_options_are_named(
    tiny_llama_dir: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_base(tiny_llama_dir, **options)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hub id or an existing directory, got '.*nowhere'"):
        load_base(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        (LocalEntryNotFoundError("no connection"), "the hub cannot be reached"),
        (
            RepositoryNotFoundError("404", response=MagicMock()),
            "the hub has no such repository, or none that you may read",
        ),
        (GatedRepoError("403", response=MagicMock()), "its repository on the hub is gated"),
        (None, "We couldn't connect"),
    ],
)
def test_a_hub_id_that_cannot_be_had_is_asked_for_once_and_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, cause: Exception | None, why: str
) -> None:
    asked = []

    def unreachable(name: str, *args: object, **kwargs: object) -> None:
        asked.append(name)
        raise OSError("We couldn't connect\nand much more") from cause

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", unreachable)
    monkeypatch.setattr("lowmem_reft.base.hub.cached_file", unreachable)
    for load in (load_base, load_tokenizer):
        with pytest.raises(
            InputError, match=rf"'some/model': there is no such directory, and {why}; check name"
        ):
            load("some/model")
    assert asked == ["some/model"] * 2


def test_a_directory_without_a_model_or_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model must be a directory with a config\.json"):
        load_base(tmp_path)
    with pytest.raises(InputError, match="model must have a tokenizer"):
        load_tokenizer(tmp_path)


def test_pickled_weights_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    weights = directory / "model.safetensors"
    torch.save({}, directory / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="AutoModelForCausalLM loads from safetensors"):
        load_base(directory)


def test_code_of_the_checkpoint_is_not_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(InputError, match="model must be a directory with a config"):
        load_base(tmp_path)
