"""accelerate: what its launcher says in the environment, its states, and how it shards."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
)

from breaking import contract, with_value, without, wrapped

STATE = "accelerate.state:"


@contract(
    "accelerate",
    used_by="machine/processes.py",
    broken_by=wrapped(
        "accelerate.utils:FullyShardedDataParallelPlugin.__post_init__",
        lambda init: lambda self: (init(self), setattr(self, "fsdp_version", 1))[0],
    ),
)
@pytest.mark.filterwarnings("ignore:sync_module_states cannot be False")  # told, and meant
def test_the_plugin_of_fsdp_reads_the_variables_that_are_checked(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_SYNC_MODULE_STATES", "false")  # else it looks for a card
    for version in ("2", "1"):
        monkeypatch.setenv("FSDP_VERSION", version)
        assert str(FullyShardedDataParallelPlugin().fsdp_version) == version
    monkeypatch.delenv("FSDP_VERSION")
    plugin = FullyShardedDataParallelPlugin()
    assert str(plugin.fsdp_version) == "1"
    assert plugin.cpu_ram_efficient_loading is False
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    if torch.cuda.is_available():
        assert FullyShardedDataParallelPlugin().cpu_ram_efficient_loading is True
        return
    with pytest.raises(RuntimeError, match="no available devices"):
        FullyShardedDataParallelPlugin()  # it is read, and wants a card


@pytest.fixture
def fresh_states() -> Any:
    """States as in a new process; those of this one come back."""
    kinds = (PartialState, AcceleratorState)
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    yield
    for kind, old in zip(kinds, before, strict=True):
        kind._shared_state.clear()
        kind._shared_state.update(old)


@contract(
    "accelerate",
    used_by="machine/processes.py",
    broken_by=wrapped(
        f"{STATE}AcceleratorState.__init__",
        lambda init: (
            lambda self, *a, **k: (
                init(self, *a, **k),
                vars(self).update(precision=vars(self).pop("_mixed_precision")),
            )[1]
        ),
    ),
)
def test_mixed_precision_is_in_the_shared_state_whoever_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, fresh_states: None, breach: bool
) -> None:
    assert AcceleratorState._shared_state.get("_mixed_precision") is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState(cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    assert AcceleratorState._shared_state["_mixed_precision"] == "bf16"


@contract(
    "accelerate",
    used_by="machine/processes.py runs/fit.py",
    broken_by=without(f"{STATE}PartialState.wait_for_everyone"),
)
def test_a_state_is_of_one_process_without_a_launcher(fresh_states: None) -> None:
    state: Any = PartialState(cpu=True, timeout=timedelta(minutes=1))
    assert state.distributed_type == DistributedType.NO
    assert state.num_processes == 1
    assert state.device.type == "cpu"
    state.wait_for_everyone()
    state.distributed_type = DistributedType.MULTI_GPU  # ours changes it for CPUs
    assert PartialState().distributed_type == DistributedType.MULTI_GPU
    assert callable(state.destroy_process_group)


@contract(
    "accelerate",
    used_by="machine/processes.py",
    broken_by=wrapped(
        f"{STATE}AcceleratorState.__init__",
        lambda init: (
            lambda self, *a, **k: (
                init(self, *a, **k),
                setattr(self, "distributed_type", DistributedType.NO),
            )[0]
        ),
    ),
)
def test_fsdp_is_looked_for_among_kinds_of_cards_alone(
    monkeypatch: pytest.MonkeyPatch, fresh_states: None, breach: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_SYNC_MODULE_STATES", "false")
    kinds = []
    for kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        AcceleratorState._shared_state.clear()
        PartialState(cpu=True).distributed_type = kind
        state = AcceleratorState(
            cpu=True,
            dynamo_plugin=TorchDynamoPlugin(),
            fsdp_plugin=FullyShardedDataParallelPlugin(),
            _from_accelerator=True,
        )
        kinds.append(state.distributed_type)
    assert kinds == [DistributedType.MULTI_CPU, DistributedType.FSDP]


@contract(
    "accelerate",
    used_by="machine/processes.py",
    broken_by=with_value("accelerate.utils:compare_versions", lambda *_: True),
)
def test_values_are_shared_and_versions_compared_by_three_functions(
    fresh_states: None, breach: bool
) -> None:
    from accelerate import utils

    PartialState(cpu=True)
    values = [{"a": 1}]
    assert utils.broadcast_object_list(values) == values == [{"a": 1}]
    assert utils.reduce(torch.tensor(2.0)).item() == 2
    assert utils.compare_versions("accelerate", ">=", "1.0")
    assert not utils.compare_versions("accelerate", "<", "1.0")


@contract(
    "accelerate",
    used_by="base/quantization.py",
    broken_by=with_value(f"{__name__}:_source_of_fsdp2", lambda: ""),
)
def test_fsdp2_shards_packed_weights_only_where_they_are_floating_point(breach: bool) -> None:
    """It needs several processes, so this goes by the source."""
    if tuple(map(int, _version().split(".")[:2])) < (1, 15):
        pytest.skip("older versions shard every Params4bit")
    source = _source_of_fsdp2()
    assert 'param.__class__.__name__ == "Params4bit"' in source
    assert "not param.is_floating_point()" in source


def _source_of_fsdp2() -> str:
    from accelerate.utils import fsdp_utils

    return inspect.getsource(fsdp_utils.fsdp2_prepare_model)


def _version() -> str:
    import accelerate

    return accelerate.__version__
