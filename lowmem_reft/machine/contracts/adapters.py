"""What is relied on inside PEFT: how it puts an adapter into a model, runs it and removes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from lowmem_reft.machine.contracts.contract import (
    BrokenContractError,
    expect,
    relied_on,
    some_tokens,
    tiny_llama,
)


@cache
def tuner_class() -> Any:
    """Return a tuner that puts a layer into a module and notes in ``called`` what PEFT calls."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from torch import nn

    class Layer(nn.Module, BaseTunerLayer):
        adapter_layer_names = ("probe_phi",)
        other_param_names = ("probe_options",)

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.probe_phi = nn.ModuleDict()
            self.probe_options: dict[str, int] = {}

    class Tuner(BaseTuner):
        prefix = "probe_"
        tuner_layer_cls = Layer
        target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

        def _pre_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
            self.__dict__["called"] = [f"before {adapter_name}"]

        def _post_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
            self.called.append(f"after {adapter_name}")

        def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
            self.called.append("configuration")
            peft_config.target_modules = r"model\.layers\.(1)"
            return peft_config

        def _create_and_replace(
            self,
            peft_config: Any,
            adapter_name: str,
            target: Any,
            target_name: str,
            parent: Any,
            current_key: str,
            parameter_name: str | None = None,
        ) -> None:
            is_target = target is parent[int(target_name)]
            self.called.append(f"{current_key}{'' if is_target else ', which is another module'}")
            layer = Layer()
            layer.probe_phi[adapter_name] = nn.Linear(2, 2)
            layer.probe_options[adapter_name] = 1
            target.add_module("probe", layer)

        def _check_merge_allowed(self) -> None:
            raise NotImplementedError

    return Tuner


def _tuner() -> Any:
    from peft import PeftConfig

    config: Any = PeftConfig()
    config.target_modules = None
    return tuner_class()(tiny_llama(), config, "default")


@relied_on(
    "peft", "transformers", leaned_on_by="reft/tuner.py methods/weights.py reft/lora_reft.py"
)
def _injects_through_hooks() -> None:
    """PEFT puts an adapter into a model through the hooks of its tuner."""
    tuner = _tuner()
    wanted = ["before default", "configuration", "model.layers.1", "after default"]
    expect(tuner.called == wanted, f"calls {tuner.called}")
    trained = [name for name, value in tuner.model.named_parameters() if value.requires_grad]
    prefix = "model.layers.1.probe.probe_phi.default."
    expect(trained == [f"{prefix}weight", f"{prefix}bias"], f"trained parameters {trained}")


@relied_on("peft", leaned_on_by="reft/tuner.py reft/layer.py methods/weights.py")
def _switches_layers() -> None:
    """PEFT switches, freezes and deletes an adapter in every layer of a tuner."""
    tuner = _tuner()
    layer = tuner.model.model.layers[1].probe
    states = [layer.disable_adapters]
    for switch in (tuner.disable_adapter_layers, tuner.enable_adapter_layers):
        switch()
        states.append(layer.disable_adapters)
    expect(states == [False, True, False], f"layers that are disabled {states}")
    tuner.set_adapter(["default"], inference_mode=True)
    is_trained = any(value.requires_grad for value in tuner.model.parameters())
    expect(not is_trained, "an adapter that is trained in inference mode")
    tuner.delete_adapter("default")
    left = [*layer.probe_phi, *layer.probe_options]
    expect(not left, f"a deleted adapter that left {left}")


@relied_on("peft", leaned_on_by="reft/tuner.py reft/lora_reft.py")
def _asks_before_merging() -> None:
    """PEFT asks a tuner before it merges an adapter."""
    tuner = _tuner()
    try:
        tuner.merge_and_unload()
    except NotImplementedError:
        is_there = hasattr(tuner.model.model.layers[1], "probe")
        expect(is_there, "a refused merge that removed the layers")
        return
    raise BrokenContractError("merge_and_unload that does not ask _check_merge_allowed")


@relied_on("peft", "transformers", leaned_on_by="reft/tuner.py reft/lora_reft.py")
def _enters_hooks() -> None:
    """forward and generate of PEFT enter the tuner's hooks with adapter_names."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).eval()
    entered: list[Any] = []
    running: list[bool] = []

    @contextmanager
    def hooks(*_: Any, **kwargs: Any) -> Iterator[None]:
        entered.append(kwargs.get("adapter_names"))
        running.append(True)
        yield
        running.pop()

    def before(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        expect(bool(running), "a pass outside of the hooks")
        expect("adapter_names" not in kwargs, "a model that is given adapter_names")

    tuner: Any = model.base_model
    tuner._enable_peft_forward_hooks = hooks
    tuner.model.register_forward_pre_hook(before, with_kwargs=True)
    names = ["default", "__base__"]
    for run in (model, partial(model.generate, max_new_tokens=1)):
        run(input_ids=some_tokens(), adapter_names=names)
    expect(entered == [names] * 2, f"hooks that were entered with {entered}")
