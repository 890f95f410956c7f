"""The contracts that are also checked at run time, each broken once."""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lowmem_reft
from breaking import (
    doing_nothing,
    with_result,
    with_value,
    without,
    wrapped,
)
from lowmem_reft.machine.contracts import CONTRACTS
from lowmem_reft.machine.contracts.contract import Contract, apart

IMPORTED_AS = {"trl": "trl", "lm_eval": "lm_eval.models.huggingface", "ray": "ray"}
"""Of the optional libraries."""

LLAMA = "transformers.models.llama.modeling_llama:"
TUNER = "peft.tuners.tuners_utils:"
PEFT = "peft.peft_model:"


def _hidden_states_by_name(call: Any) -> Any:
    return lambda self, hidden, **kwargs: call(self, hidden_states=hidden, **kwargs)


def _other_partial(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Like partial, but the block is found where it was not and not where it was."""
    if args:  # since 5.23: the bare forward of a block
        return lambda *more: function(*args, *more, **kwargs)
    block = function.__self__
    return functools.partial(lambda _, *more: function(*more, **kwargs), block)


def _cache_is_copied(forward: Any) -> Any:
    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        for name, part in output.items():
            if hasattr(part, "get_seq_length"):
                output[name] = copy.copy(part)
        return output

    return changed


def _not_told_names(manager: Any) -> Any:
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("adapter_names", None)
        return manager(self, *args, **kwargs)

    return changed


def _not_nested(quantize: Any) -> Any:
    return lambda *args, **kwargs: quantize(*args, **{**kwargs, "compress_statistics": False})


BROKEN_BY = {
    "decoder blocks are one list, and take and return hidden states first": wrapped(
        f"{LLAMA}LlamaDecoderLayer.__call__", _hidden_states_by_name
    ),
    "a checkpointed block runs once, through its own checkpoint function": with_value(
        "transformers.modeling_layers:partial", _other_partial
    ),
    "every pass of generate goes through the model, with the one cache of its tokens": wrapped(
        f"{LLAMA}LlamaForCausalLM.forward", _cache_is_copied
    ),
    "tokens behind a cache are computed as in one pass, and it says their number": with_result(
        "transformers.cache_utils:DynamicCache.get_seq_length", lambda length: length + 1
    ),
    "PEFT puts an adapter into a model through the hooks of its tuner": doing_nothing(
        f"{TUNER}BaseTuner.inject_adapter"
    ),
    "PEFT switches, freezes and deletes an adapter in every layer of a tuner": doing_nothing(
        f"{TUNER}BaseTunerLayer.enable_adapters"
    ),
    "PEFT asks a tuner before it merges an adapter": wrapped(
        f"{TUNER}BaseTuner.merge_and_unload", lambda _: lambda self: self.unload()
    ),
    "forward and generate of PEFT enter the tuner's hooks with adapter_names": wrapped(
        f"{PEFT}PeftModel._enable_peft_forward_hooks", _not_told_names
    ),
    "a 4-bit weight holds its constants in quant_state": wrapped(
        "bitsandbytes.functional:quantize_4bit", _not_nested
    ),
    "a guarded 4-bit layer has right gradients after an evaluation": with_result(
        "bitsandbytes:matmul_4bit", lambda product: product.detach() + 0 * product
    ),
    "accelerate tells the mixed precision that was asked for": with_value(
        "accelerate.state:AcceleratorState.mixed_precision", "no"
    ),
    "TRL asks a model for its own loss by fused_lm_head": doing_nothing(
        "trl.trainer.utils:add_fused_lm_head"
    ),
    "the harness scores and generates through two methods that take tokens": wrapped(
        "lm_eval.models.huggingface:HFLM._model_generate",
        lambda _: lambda self, input_ids, max_length, stop: None,
    ),
    "Ray streams what a task yields": without("ray:ObjectRefGenerator"),
}


def checked(contract: Contract) -> None:
    for library in contract.libraries:
        if library in IMPORTED_AS:
            pytest.importorskip(IMPORTED_AS[library])
    with apart():
        contract.check()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.sentence)
def test_a_contract_holds(contract: Contract) -> None:
    checked(contract)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.sentence)
def test_a_contract_fails_with_a_broken_library(
    contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in contract.libraries:
        if library in IMPORTED_AS:
            pytest.importorskip(IMPORTED_AS[library])
    BROKEN_BY[contract.sentence](monkeypatch)
    with pytest.raises(Exception, match=r"\w"):
        checked(contract)


def test_every_contract_is_broken_once_and_names_files_that_are_there() -> None:
    assert {contract.sentence for contract in CONTRACTS} == set(BROKEN_BY)
    package = Path(lowmem_reft.__file__).parent
    named = {file for contract in CONTRACTS for file in contract.leaned_on_by}
    assert [file for file in sorted(named) if not (package / file).is_file()] == []


def test_libraries_of_contracts_are_requirements() -> None:
    versions = importlib.import_module("lowmem_reft.machine.contracts.versions")
    required = {canonicalize_name(Requirement(line).name) for line in versions._requirements()}
    named = {canonicalize_name(name) for contract in CONTRACTS for name in contract.libraries}
    assert named <= required
