"""PEFT: how a method becomes one of its own, where its tuner is asked, how it is saved."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    mapping_func,
)
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    ModulesToSaveWrapper,
    PeftType,
    get_peft_model_state_dict,
    register_peft_method,
    set_peft_model_state_dict,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from breaking import contract, doing_nothing, with_result, with_value, wrapped
from lowmem_reft.machine.contracts.adapters import tuner_class
from lowmem_reft.machine.contracts.contract import tiny_llama

TUNERS = "peft.tuners.tuners_utils:"
MODEL = "peft.peft_model:PeftModel."
CAUSAL = "peft.peft_model:PeftModelForCausalLM."
SAVE = "peft.utils.save_and_load:"


Probe: Any = tuner_class()


class Layer(Probe.tuner_layer_cls):
    def __init__(self) -> None:
        super().__init__()
        self.moved: list[str] = []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        self.moved.append(adapter_name)


@dataclass
class Config(PeftConfig):
    target_modules: Any = field(default=None)
    modules_to_save: Any = field(default=None)
    part: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PROBE")


class Tuner(Probe):
    """Puts a layer beside one module, or nothing anywhere, and notes what it is asked."""

    tuner_layer_cls = Layer
    asked: Any = []  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        peft_config.target_modules = peft_config.target_modules or r"model\.layers\.(1)\.mlp"
        return peft_config

    def _check_new_adapter_config(self, config: Any) -> None:
        self.asked.append("new configuration")

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.asked.append(f"create {kwargs['current_key']}")
        layer = getattr(target, "probe", None) or Layer()
        layer.probe_phi[adapter_name] = nn.Linear(2, 2)
        layer.probe_options[adapter_name] = 1
        target.add_module("probe", layer)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        self.asked.append("mark")
        super()._mark_only_adapters_as_trainable(model)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.asked.append(f"enabled {enabled}")
        super()._enable_adapter_layers(enabled)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        self.asked.append(f"gradient {requires_grad}")
        super().set_requires_grad(adapter_names, requires_grad)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append("generate")
        return self.model.generate(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> Any:
        cls.asked.append("choose")
        return super()._get_adapter_state_dict(*args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".probe_phi.{adapter_name}.", ".probe_phi.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, *args: Any, **kwargs: Any) -> Any:
        cls.asked.append("remap")
        return super()._remap_adapter_state_dict_for_load(*args, **kwargs)


@pytest.fixture
def method(breach: bool) -> Any:
    """A method that PEFT did not know, for the length of a test."""
    lists = (PeftType._member_names_, PeftType._member_map_, PeftType._value2member_map_)
    before = [each.copy() for each in lists]
    member: Any = str.__new__(PeftType, "PROBE")
    member._name_ = member._value_ = "PROBE"
    PeftType._member_names_.append("PROBE")
    PeftType._member_map_["PROBE"] = PeftType._value2member_map_["PROBE"] = member
    type.__setattr__(PeftType, "PROBE", member)
    Tuner.asked = []
    try:
        register_peft_method(name="probe", config_cls=Config, model_cls=Tuner)
        yield Tuner
    finally:
        for mapping in (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
        ):
            mapping.pop(member, None)
        for each, old in zip(lists, before, strict=True):
            each.clear()
            each.extend(old) if isinstance(each, list) else each.update(old)
        type.__delattr__(PeftType, "PROBE")


def adapted(config: Any = None, **options: Any) -> Any:
    return get_peft_model(tiny_llama(), config or Config(task_type="CAUSAL_LM"), **options)


def layer_of(model: Any) -> Any:
    return model.base_model.model.model.layers[1].mlp.probe


# A method of our own


@contract(
    "peft",
    used_by="reft/peft_method.py",
    broken_by=with_value(f"{__name__}:PeftType", enum.Enum("PeftType", ["LORA"])),
)
def test_methods_are_members_of_an_enum_of_strings(breach: bool) -> None:
    assert issubclass(PeftType, str)
    assert type(PeftType) is type(enum.Enum)
    assert PeftType._member_map_["LORA"] is PeftType._value2member_map_["LORA"] is PeftType.LORA
    assert "LORA" in PeftType._member_names_
    assert PeftType.LORA == "LORA"


@contract(
    "peft",
    used_by="reft/peft_method.py reft/config.py",
    broken_by=with_value(f"{__name__}:register_peft_method", lambda **_: None),
)
def test_a_new_method_is_found_by_its_name_in_a_file(method: Any, tmp_path: Path) -> None:
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("PROBE")] is Tuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING["PROBE"] == "probe_"
    Config(task_type="CAUSAL_LM", part="bias").save_pretrained(str(tmp_path))
    found: Any = PeftConfig.from_pretrained(str(tmp_path))
    assert type(found) is Config
    assert (found.part, found.task_type, found.peft_type) == ("bias", "CAUSAL_LM", "PROBE")
    assert not found.is_prompt_learning


@contract(
    "peft",
    used_by="reft/tuner.py methods/weights.py",
    broken_by=doing_nothing(f"{TUNERS}BaseTuner.set_adapter"),
)
def test_a_tuner_is_asked_before_it_is_injected_and_marks_what_is_trained(method: Any) -> None:
    model = adapted()
    assert method.asked == ["new configuration", "create model.layers.1.mlp", "mark"]
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(".probe_phi.default." in name for name in trained)
    assert len(trained) == 2
    model.add_adapter("other", Config(task_type="CAUSAL_LM"))
    assert layer_of(model).probe_options == {"default": 1, "other": 1}
    model.set_adapter("other", inference_mode=True)
    assert layer_of(model).active_adapters == ["other"]
    assert not any(value.requires_grad for value in model.parameters())


@contract(
    "peft",
    used_by="reft/tuner.py",
    broken_by=with_value(
        f"{TUNERS}check_target_module_exists",
        lambda config, key: key.startswith(str(config.target_modules)),
    ),
)
def test_a_target_is_an_expression_for_whole_names(method: Any) -> None:
    adapted(Config(target_modules=r"model\.layers\.(0|1)\.mlp"))
    created = [each for each in method.asked if each.startswith("create")]
    assert created == ["create model.layers.0.mlp", "create model.layers.1.mlp"]


@contract(
    "peft",
    used_by="methods/weights.py",
    broken_by=with_value(f"{TUNERS}DUMMY_TARGET_MODULES", "another word"),
)
def test_a_method_may_put_nothing_into_the_base(method: Any) -> None:
    adapted(Config(target_modules=DUMMY_TARGET_MODULES))
    assert method.asked == ["new configuration", "mark"]


@contract(
    "peft",
    used_by="base/identity.py",
    broken_by=wrapped("peft.mapping_func:get_peft_model", lambda make: _keeping_the_name(make)),
)
def test_the_base_of_a_configuration_is_replaced_before_the_tuner_sees_it(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    before = Tuner._pre_injection_hook

    def noted(self: Any, model: Any, config: Any, name: str) -> None:
        seen.append(config.base_model_name_or_path)
        before(self, model, config, name)

    monkeypatch.setattr(Tuner, "_pre_injection_hook", noted)
    base = tiny_llama()
    base.name_or_path = "some/base"
    with pytest.warns(UserWarning, match="renamed from 'another/base' to 'some/base'"):
        mapping_func.get_peft_model(base, Config(base_model_name_or_path="another/base"))
    assert seen == ["some/base"]


def _keeping_the_name(make: Any) -> Any:
    def changed(model: Any, config: Any) -> Any:
        model.name_or_path = config.base_model_name_or_path
        return make(model, config)

    return changed


@contract(
    "peft",
    used_by="methods/weights.py reft/tuner.py reft/layer.py",
    broken_by=doing_nothing(f"{TUNERS}BaseTuner.disable_adapter_layers"),
)
def test_disable_adapter_reaches_the_tuner_its_layers_and_a_flag(method: Any) -> None:
    model = adapted()
    assert model._adapters_disabled is False
    del method.asked[:]
    with model.disable_adapter():
        assert layer_of(model).disable_adapters
        assert model._adapters_disabled is True
    assert not layer_of(model).disable_adapters
    assert model._adapters_disabled is False
    assert method.asked == ["enabled False", "enabled True"]


@contract(
    "peft",
    used_by="reuse/build.py",
    broken_by=wrapped(
        f"{TUNERS}BaseTunerLayer.enable_adapters",
        lambda _: lambda self, enabled: setattr(self, "_disable_adapters", not enabled),
    ),
)
def test_disable_adapter_changes_what_requires_a_gradient(method: Any) -> None:
    model = adapted()
    model.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert any(value.requires_grad for value in model.parameters()), "nothing has to be put back"


@contract(
    "peft",
    used_by="reft/tuner.py reft/lora_reft.py",
    broken_by=wrapped(
        f"{CAUSAL}generate",
        lambda _: lambda self, *args, **kwargs: self.get_base_model().generate(*args, **kwargs),
    ),
)
def test_generate_is_the_tuners_own(method: Any, ids: Any) -> None:
    model = adapted().eval()
    del method.asked[:]
    model.generate(input_ids=ids, max_new_tokens=1)
    assert method.asked == ["generate"]


@contract(
    "peft",
    used_by="reft/tuner.py methods/weights.py reft/lora_reft.py",
    broken_by=wrapped(
        f"{TUNERS}BaseTuner._get_adapter_state_dict",
        lambda _: lambda cls, **kwargs: kwargs["state_dict"],
    ),
)
def test_what_is_saved_has_no_name_of_an_adapter_and_comes_back(method: Any) -> None:
    model = adapted()
    model.add_adapter("other", Config(task_type="CAUSAL_LM"))
    state = get_peft_model_state_dict(model, adapter_name="default")
    prefix = "base_model.model.model.layers.1.mlp.probe.probe_phi."
    assert {*state} == {f"{prefix}weight", f"{prefix}bias"}
    changed = {key: value + 1 for key, value in state.items()}
    set_peft_model_state_dict(model, changed, adapter_name="other")
    assert torch.equal(layer_of(model).probe_phi["other"].weight, changed[f"{prefix}weight"])
    assert {"choose", "remap"} <= {*method.asked}


@contract(
    "peft",
    used_by="reft/layer.py",
    broken_by=wrapped(
        "peft.peft_model:set_peft_model_state_dict",
        lambda load: lambda *args, **kwargs: load(*args, **{**kwargs, "low_cpu_mem_usage": False}),
    ),
)
@pytest.mark.filterwarnings("ignore:for base_model")  # of torch, where it is broken
def test_layers_are_told_to_move_an_adapter_that_was_loaded_onto_meta(
    method: Any, tmp_path: Path
) -> None:
    adapted().save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert layer_of(model).moved == ["default"]
    assert not any(value.is_meta for value in model.parameters())


@contract(
    "peft",
    used_by="reft/tuner.py reft/lora_reft.py",
    broken_by=doing_nothing(f"{TUNERS}BaseTuner._unload_and_optionally_merge"),
)
def test_unload_gives_the_base_with_its_own_head(method: Any) -> None:
    model = adapted(Config(modules_to_save=["lm_head"]))
    assert isinstance(model.base_model.model.lm_head, ModulesToSaveWrapper)
    delattr(model.base_model.model.model.layers[1].mlp, "probe")
    base = model.base_model.unload()
    assert base is model.base_model.model
    assert type(base.lm_head) is nn.Linear


@contract(
    "peft",
    used_by="reft/tuner.py reuse/split.py",
    broken_by=wrapped(
        "peft.utils.other:ModulesToSaveWrapper.update",
        lambda update: lambda self, name, **k: _as_list(self, update, name, **k),
    ),
)
def test_a_trained_head_is_a_wrapper_with_the_original_and_a_copy_for_each_adapter(
    method: Any,
) -> None:
    model = adapted(Config(modules_to_save=["lm_head"]))
    wrapper = model.base_model.model.lm_head
    assert isinstance(wrapper, AuxiliaryTrainingWrapper)
    assert {*wrapper.modules_to_save} == {"default"}
    copy, original = wrapper.modules_to_save["default"], wrapper.original_module
    assert torch.equal(copy.weight, original.weight)
    assert copy.weight is not original.weight
    assert isinstance(wrapper.modules_to_save, nn.Module)
    assert copy.weight.requires_grad
    assert not original.weight.requires_grad


def _as_list(self: Any, update: Any, name: str, **kwargs: Any) -> None:
    update(self, name, **kwargs)
    self.copies, self.modules_to_save = self._modules.pop("modules_to_save"), None


@contract(
    "peft",
    used_by="reft/tuner.py",
    broken_by=wrapped(
        "peft.utils.other:AuxiliaryTrainingWrapper.forward",
        lambda _: lambda self, *args, **kwargs: self.original_module(*args, **kwargs),
    ),
)
def test_a_wrapper_takes_the_names_of_adapters_by_example(method: Any) -> None:
    model = adapted(Config(modules_to_save=["lm_head"]))
    wrapper = model.base_model.model.lm_head.eval()
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.zero_()
        out = wrapper(torch.ones(2, 16), adapter_names=["default", "__base__"])
    assert bool((out[0] == 0).all())
    assert bool((out[1] != 0).any())


@contract(
    "peft",
    used_by="reft/composition.py reft/lora_reft.py",
    broken_by=with_value(f"{TUNERS}BaseTuner.active_adapters", property(lambda self: ["default"])),
)
def test_active_adapters_of_a_tuner_follow_an_attribute(method: Any) -> None:
    tuner = adapted().base_model
    assert tuner.active_adapters == ["default"]
    tuner.active_adapter = ["a", "b"]
    assert tuner.active_adapters == ["a", "b"]


# LoRA and the others


@contract(
    "peft",
    used_by="reft/lora_reft.py",
    broken_by=with_value("peft.tuners.lora:LoraModel.prefix", "lo_"),
)
def test_lora_has_a_prefix_hooks_and_keys_that_can_be_inherited(breach: bool) -> None:
    import inspect

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert isinstance(model.base_model, LoraModel)
    assert LoraModel.prefix == "lora_"
    assert list(inspect.signature(LoraModel.inject_adapter).parameters)[1:6] == [
        "model",
        "adapter_name",
        "autocast_adapter_dtype",
        "low_cpu_mem_usage",
        "state_dict",
    ]
    for name in ("_pre_injection_hook", "_enable_peft_forward_hooks", "_check_merge_allowed"):
        assert callable(getattr(LoraModel, name))
    key = "base_model.model.q_proj.lora_A.default.weight"
    removed = LoraModel._remove_adapter_name_from_key(key, "default")
    assert removed == "base_model.model.q_proj.lora_A.weight"


@contract(
    "peft",
    used_by="methods/configs.py methods/attach.py",
    broken_by=wrapped(
        f"{TUNERS}_maybe_include_all_linear_layers",
        lambda include: lambda config, model: _forgetting_layers(include(config, model)),
    ),
)
def test_all_linear_leaves_the_head_and_layers_can_be_chosen_afterwards(breach: bool) -> None:
    base_config = tiny_llama().config
    base_config.num_hidden_layers = 3  # of fewer than 20 names PEFT keeps each, whatever its layer
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    config.layers_to_transform = [1]
    model = get_peft_model(LlamaForCausalLM(base_config), config)
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert len(layers) == 7
    assert all(".layers.1." in name for name in layers)


def _forgetting_layers(config: Any) -> Any:
    config.layers_to_transform = None
    return config


@contract("peft", used_by="methods/attach.py", broken_by=with_value(f"{__name__}:IA3Layer", int))
def test_layers_of_ia3_are_ia3_layers(breach: bool) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = get_peft_model(tiny_llama(), config)
    assert sum(isinstance(module, IA3Layer) for module in model.modules()) == 2


@contract(
    "peft",
    used_by="methods/attach.py",
    broken_by=with_value("peft.tuners.ln_tuning.layer:warnings.warn", lambda *_, **__: None),
)
def test_ln_tuning_warns_of_norms_by_one_sentence(breach: bool) -> None:
    with pytest.warns(UserWarning, match="Unsupported layer type .*Norm"):
        get_peft_model(tiny_llama(), LNTuningConfig(target_modules=["norm"]))


@contract(
    "peft",
    used_by="methods/virtual_tokens.py",
    broken_by=with_result(f"{MODEL}get_prompt", lambda prompts: prompts[:1]),
)
def test_virtual_tokens_are_embeddings_that_a_prompt_gives(breach: bool, ids: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(tiny_llama(), config)
    active = model.active_peft_config
    assert active.is_prompt_learning
    assert active.num_virtual_tokens == 3
    assert active.peft_type != "PREFIX_TUNING"
    assert model.word_embeddings is model.get_base_model().get_input_embeddings()
    assert model.get_prompt(batch_size=2).shape == (2, 3, 16)
    assert not model._adapters_disabled
    with model.disable_adapter():
        assert model._adapters_disabled


@contract(
    "peft",
    used_by="methods/virtual_tokens.py",
    broken_by=wrapped(
        f"{MODEL}get_prompt", lambda function: lambda self, **k: function(self, **k).flip(1)
    ),
)
def test_virtual_tokens_stand_in_front_of_the_padding(breach: bool, ids: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(tiny_llama(), config).eval()
    given: list[Any] = []
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model(input_ids=ids, attention_mask=mask)
    weight = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(given[0]["inputs_embeds"][0, :3], weight)
    assert torch.equal(given[0]["attention_mask"][:, 3:], mask)
    assert given[0].get("position_ids") is None


@contract(
    "peft",
    used_by="methods/attach.py",
    broken_by=wrapped(
        "peft.tuners.cartridge.utils:initialize_kv_prefix_from_past_key_values",
        lambda _: lambda model, **kwargs: None,
    ),
)
def test_a_prefix_is_keys_and_values_that_can_be_taken_from_a_cache(breach: bool) -> None:
    from peft.tuners.cartridge import utils

    from lowmem_reft.machine.contracts.models import cache_parameter

    base = tiny_llama()
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        output = base(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)
    cache = output[cache_parameter(base)]
    utils.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    keys = model.get_prompt(batch_size=2).layers[0].keys
    torch.testing.assert_close(keys[:1].detach(), cache.layers[0].keys)


@contract(
    "peft",
    used_by="base/quantization.py",
    broken_by=wrapped(
        f"{MODEL}get_nb_trainable_parameters",
        lambda _: lambda self: (0, sum(p.numel() for p in self.parameters())),
    ),
)
def test_packed_weights_count_as_the_numbers_that_they_hold(method: Any) -> None:
    from bitsandbytes.nn.modules import Params4bit

    base = tiny_llama()
    before = adapted().get_nb_trainable_parameters()[1]
    layer = base.model.layers[0].mlp.up_proj
    packed = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
    layer.weight = Params4bit(packed, requires_grad=False, bnb_quantized=True)
    model = get_peft_model(base, Config())
    assert model.get_nb_trainable_parameters()[1] == before


@contract(
    "peft",
    used_by="methods/virtual_tokens.py",
    broken_by=wrapped(
        "peft.peft_model:PeftModelForCausalLM.forward",
        lambda _: lambda self, **kwargs: self.get_base_model()(**kwargs),
    ),
)
def test_a_prefix_is_handed_to_the_base_as_past_key_values(breach: bool, ids: Any) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(tiny_llama(), config).eval()
    given: list[Any] = []
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert isinstance(given[0]["past_key_values"], Cache)
    assert given[0]["attention_mask"].shape == (2, 8)


@contract(
    "peft",
    used_by="methods/virtual_tokens.py",
    broken_by=wrapped(
        f"{CAUSAL}prepare_inputs_for_generation",
        lambda prepare: lambda self, *a, **k: {**prepare(self, *a, **k), "past_key_values": None},
    ),
)
def test_a_step_of_generate_has_its_cache_as_past_key_values(breach: bool, ids: Any) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(tiny_llama(), config).eval()
    prefix = model.prepare_inputs_for_generation(ids)["past_key_values"]
    assert prefix.get_seq_length() == 3
    plain = model.base_model_prepare_inputs_for_generation
    model.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: {
        **plain(*args, **kwargs),
        "past_key_values": prefix,
    }
    step = model.prepare_inputs_for_generation(ids, next_sequence_length=1)
    assert step["past_key_values"] is prefix
