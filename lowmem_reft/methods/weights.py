"""Trains parameters of the base itself, in place, as an ordinary PEFT method: WEIGHTS.

Full fine-tuning, BitFit (biases only, arXiv 2106.10199) and a head alone have no adapter to put
beside the base, so here the promise that the base's bytes stay as they are does not hold: its own
tensors are overwritten. Saved and loaded are exactly the trained ones. There is no way back to the
base but to load it again: ``disable_adapter``, ``unload`` and a second adapter are refused.

Parameters are trained in the dtype that they are stored in; of 16 bit, AdamW's small updates are
mostly rounded away, so fp32 is what the method table asks for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.quantization import is_quantized
from lowmem_reft.errors import InputError
from lowmem_reft.options.values import check_choice
from lowmem_reft.reft.peft_method import find_best_of_named, peft_type, register

NAME = "WEIGHTS"

PARTS = ("all", "bias", "head")
"""What can be trained: every parameter, the bias terms (and a classifier's head), the head."""

_PREFIX_OF_BASE = "base_model.model."


@dataclass
class WeightsConfig(PeftConfig):
    """Configuration of training a part of the base in place.

    Raises:
        InputError: ``part`` is not known.
    """

    part: str = "all"
    """"all", "bias" or "head"."""
    target_modules: str | None = field(default=DUMMY_TARGET_MODULES, repr=False)
    """PEFT's word for a method that puts nothing into the base."""

    def __post_init__(self) -> None:
        """Check the part."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft_type(NAME)
        check_choice("part", self.part, PARTS)


def trained_names(base: Any, part: str) -> list[str]:
    """Return the names of the base's parameters that are trained; shared ones have one name.

    Raises:
        InputError: The base has no such part, or it is quantized or shared with another.
    """
    heads = _head_names(base)
    named = dict(base.named_parameters())
    if part == "all":
        names = list(named)
    elif part == "bias":
        biases = [name for name in named if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise InputError(
                f"method must not be bitfit for {type(base).__name__}, which has no bias terms to "
                "train; choose another method, for example ln_tuning"
            )
        classifier = [] if _is_causal(base) else heads
        names = list(dict.fromkeys(biases + classifier))
    else:
        names = heads
        if not names:
            raise InputError(
                f"method must not be head for {type(base).__name__}, which has no head outside its "
                "backbone; choose another method"
            )
        embedding = base.get_input_embeddings().weight
        if _is_causal(base) and embedding is base.get_output_embeddings().weight:
            raise InputError(
                f"method must not be head for {type(base).__name__} with tied embeddings: its head "
                "is the input embedding too; choose another method"
            )
    quantized = [name for name in names if is_quantized(named[name])]
    if quantized:
        what = "full" if part == "all" else "head"
        raise InputError(
            f"method must not be {what} on a quantized base: {len(quantized)} of the weights to "
            "train are 4- or 8-bit integers, which take no gradient; use storage fp32 or bf16, or "
            "the method qlora"
        )
    return names


def _is_causal(base: Any) -> bool:
    return base.get_output_embeddings() is not None


def _head_names(base: Any) -> list[str]:
    """Return the parameters of a language model's head, or of a classifier's."""
    named = base.named_parameters()
    if _is_causal(base):
        own = {id(parameter) for parameter in base.get_output_embeddings().parameters()}
        return [name for name, parameter in named if id(parameter) in own]
    return [name for name, _ in named if not name.startswith(f"{base.base_model_prefix}.")]


class WeightsLayer(nn.Module, BaseTunerLayer):
    """Holds nothing: PEFT asks layers whether an adapter is on, so there has to be one."""

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters = []


class WeightsModel(BaseTuner):
    """PEFT tuner that makes a part of the base trainable and adds no parameters."""

    prefix: str = "weights_"
    tuner_layer_cls = WeightsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def __init__(self, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, PeftConfig):  # of a PeftModel they come by name
            raise InputError(
                f"model must be a PeftModel to hold trained weights of its own, got "
                f"{type(model).__name__}, whose own load_adapter would not load them; use "
                "PeftModel.from_pretrained(model, directory)"
            )
        super().__init__(model, config, *args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        if len(self.peft_config) > 1:
            raise InputError(
                "adapters that train the base's own weights must be alone, got "
                f"{', '.join(self.peft_config)}; load the base again for another one"
            )

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        names = trained_names(model, config.part)
        named = dict(model.named_parameters())
        dtypes = {named[name].dtype for name in names} & {torch.float16, torch.bfloat16}
        if dtypes and not config.inference_mode:
            warnings.warn(
                f"the trained weights are {', '.join(map(str, dtypes))}: updates below a few "
                "thousandths of a weight are rounded away; storage fp32 keeps them",
                stacklevel=2,
            )

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if adapter_name != "default" and not config.inference_mode:
            find_best_of_named()
        model.add_module(NAME.lower(), WeightsLayer(adapter_name))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is put into the base")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        config: Any = self.peft_config[self.active_adapters[0]]
        trained = set() if config.inference_mode else set(trained_names(model, config.part))
        for name, parameter in model.named_parameters():
            # Integers, which a quantized base has, know no gradient: not even that they have none.
            if parameter.requires_grad != (name in trained):
                parameter.requires_grad_(name in trained)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Make the trained part trainable, or not."""
        config: Any = self.peft_config[self.active_adapters[0]]
        for name in trained_names(self.model, config.part):
            self.model.get_parameter(name).requires_grad_(requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if not enabled:
            raise InputError(
                "adapters that train the base's own weights must stay on: the weights that were "
                "there before are overwritten; load the base again to run it alone"
            )

    def unload(self) -> nn.Module:
        """Refuse: the base as it was is gone; ``merge_and_unload`` gives the trained one.

        Raises:
            InputError: always.
        """
        self._enable_adapter_layers(False)
        raise AssertionError("unreachable")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        names = set(trained_names(base_of(model), config.part))
        return {
            key: value
            for key, value in state_dict.items()
            if key.removeprefix(_PREFIX_OF_BASE) in names
        }

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # no name of a parameter holds the adapter's

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        wanted = set(trained_names(base_of(model), config.part))
        found = {key.removeprefix(_PREFIX_OF_BASE) for key in state_dict}
        if wanted != found:
            different = sorted(wanted ^ found)
            raise ValueError(  # PEFT would leave out what does not fit without a word
                f"{len(different)} trained weights of the adapter and of the base do not match, "
                f"for example {different[0]}"
            )
        return state_dict


register(NAME, WeightsConfig, WeightsModel)
