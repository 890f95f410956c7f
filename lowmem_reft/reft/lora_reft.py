"""LoRA and ReFT together, trained at the same time, as one PEFT method: LORA_REFT.

PEFT's own way to join methods, ``PeftMixedModel``, neither saves nor trains what it loads. Here one
configuration holds both and one tuner attaches both, so that saving, loading, ``disable_adapter``
and generation are those of any PEFT model. LoRA changes what the base computes; ReFT edits hidden
vectors of the result at some prompt positions. Both keep their parameters in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lowmem_reft.base.identity import note_base
from lowmem_reft.errors import InputError
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.loaded import check_loaded
from lowmem_reft.reft.peft_method import peft_type, register
from lowmem_reft.reft.tuner import ReftModel

NAME = "LORA_REFT"


@dataclass
class LoraReftConfig(LoraConfig):
    """Fields of ``LoraConfig``, and in ``reft`` those of a ``ReftConfig``.

    Raises:
        InputError: A field of ``reft`` breaks its rule.
    """

    reft: dict[str, Any] = field(default_factory=dict)
    """Fields of the ``ReftConfig``; its ``task_type`` is that of this configuration."""
    base_storage: str | None = field(default=None, repr=False)
    """As in ``ReftConfig``."""
    base_digest: str | None = field(default=None, repr=False)
    """As in ``ReftConfig``."""

    def __post_init__(self) -> None:
        """Check both."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft_type(NAME)
        self.reft_config()

    def reft_config(self) -> ReftConfig:
        """Return the ReFT half."""
        return ReftConfig(task_type=self.task_type, inference_mode=self.inference_mode, **self.reft)


class LoraReftModel(LoraModel):
    """PEFT tuner that puts LoRA into linear layers and a ReFT layer on each edited module."""

    prefix = "lora_reft_"
    tuner_layer_cls: Any = BaseTunerLayer

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        note_base(config, model)
        # PEFT wants a prefix of its own for each method; LoRA's layers are found by theirs.
        self.prefix = LoraModel.prefix
        super()._pre_injection_hook(model, config, adapter_name)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach LoRA, then ReFT."""
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        config: Any = self.peft_config[adapter_name]
        reft = {adapter_name: config.reft_config()}
        if self._reft is None:
            # Not a submodule: the base's parameters would then have two names.
            self.__dict__["reft"] = ReftModel(model, reft, adapter_name, low_cpu_mem_usage)
        else:
            self._reft.peft_config.update(reft)
            self._reft.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)

    @property
    def _reft(self) -> Any:
        return self.__dict__.get("reft")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with (
            super()._enable_peft_forward_hooks(*args, **kwargs),
            self._reft._enable_peft_forward_hooks(*args, **kwargs),
        ):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active in both."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if self._reft is not None:
            self._reft.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from both."""
        super().delete_adapter(adapter_name)
        del self._reft.peft_config[adapter_name]
        self._reft.active_adapter = self.active_adapter

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: PEFT would sum the LoRA halves alone.

        Raises:
            InputError: always.
        """
        raise InputError(
            "adapters must be of REFT or of LORA to be summed, got LORA_REFT; make them active one "
            "after the other instead: model.base_model.set_adapter([...])"
        )

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base model as it was."""
        base: nn.Module = self._reft.unload()
        return base

    def _check_merge_allowed(self) -> None:
        self._reft._check_merge_allowed()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        one = ReftModel if ".reft_phi." in key else LoraModel
        return str(one._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        parent: Any = super()
        named: dict[str, Tensor] = parent._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_loaded(model, adapter_name, named)
        return named


register(NAME, LoraReftConfig, LoraReftModel)
