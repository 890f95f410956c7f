"""Several processes that train one adapter: started by ``accelerate launch`` or ``torchrun``.

Every process runs the whole program on its share of each batch. Here is what they have to say to
each other beside gradients, which are the Trainer's business: who writes, who goes first, what all
of them agree on. Communication is accelerate's; alone, a process does none of it.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from lowmem_reft.options import OptimOptions, TrainOptions

LONGEST_WAIT = timedelta(minutes=30)
"""After this, a process that waits gives up. One that dies is noticed at once, by its connection
or by the launcher; this is for a machine that falls silent."""

T = TypeVar("T")


def num_processes() -> int:
    """Return how many processes the launcher has started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    """Return the number of this process among all of them, from 0."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def is_main() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return process_index() == 0


def effective_batch(optim: OptimOptions) -> int:
    """Return the examples of an optimizer step, of all processes together."""
    return optim.batch_size * optim.gradient_accumulation * num_processes()


def shards_model() -> bool:
    """Return whether the launcher asks for FSDP, which shards the base between processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def start(device: str) -> None:
    """Join the other processes, if there are any; all but the first fall silent.

    Each takes the card of its number, so that ``device`` is auto, cpu or cuda.

    Raises:
        InputError: All processes would take the same card.
    """
    if num_processes() == 1:
        _say_that_nobody_joins()
        return
    from accelerate import PartialState

    # Here, since it imports torch, which one process alone may not need.
    from lowmem_reft.machine.devices import resolve_device

    if ":" in device:
        raise InputError(
            f"device must be auto, cpu or cuda with {num_processes()} processes, got {device!r}; "
            "each takes the card of its number"
        )
    PartialState(cpu=resolve_device(device).type == "cpu", timeout=LONGEST_WAIT)
    if not is_main():
        warnings.simplefilter("ignore")
        for name in ("lowmem_reft", "transformers", "accelerate", "bitsandbytes"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _say_that_nobody_joins() -> None:
    """Warn if ``accelerate launch`` was asked for several processes and has started one.

    So it does with ``--cpu``, and without cards and a configuration. It has set an address for the
    others, which some clusters set for all programs: therefore no refusal.
    """
    of_a_launcher = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    if of_a_launcher and "LOCAL_RANK" not in os.environ:
        warnings.warn(
            "accelerate launch has started one process; if --num_processes asked for more: without "
            "cards, or with --cpu, it starts them only by a configuration such as "
            "recipes/accelerate/cards.yaml (then --device cpu here), or use torchrun "
            "--nproc-per-node",
            stacklevel=3,
        )


def stop() -> None:
    """Leave the other processes, at the end of a run that all of them have finished."""
    if num_processes() > 1:
        _state().destroy_process_group()


def wait() -> None:
    """Wait until every process is here."""
    if num_processes() > 1:
        _state().wait_for_everyone()


def agree(value: T) -> T:
    """Return the first process's value; every process has to ask."""
    if num_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values: list[T] = [value]
    broadcast_object_list(values)
    return values[0]


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in any process; every process has to ask."""
    if num_processes() == 1:
        return flag
    import torch
    from accelerate.utils import reduce

    count: Any = reduce(torch.tensor(float(flag), device=_state().device))
    return bool(count.item())


def everyones(value: T) -> list[T]:
    """Return the values of all processes, the first one's first; every process has to ask."""
    if num_processes() == 1:
        return [value]
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values


@contextmanager
def main_first(lock: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a lock that all processes want; the first one gets it first.

    The others wait for it at the lock, however long that takes, and not in a communication.
    """
    if not is_main():
        wait()
    with lock:
        if is_main():
            wait()
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a plain one, any other as it is; every process has to ask."""
    gather = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if gather is None else gather()
    return full


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained, whole, by name; every process has to ask."""
    return {name: whole(parameter.detach()) for name, parameter in _trained(model).items()}


def set_trained_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set what is trained to the first process's values; every process has to ask."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    trained, values = _trained(model), agree(values)
    assert set(values) == set(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            value = values[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shard_on_cpu(arguments: Any) -> None:
    """Let accelerate shard between processes on CPUs, where it would leave the model whole.

    It looks for FSDP among the kinds of cards alone; torch shards with gloo as well. ``arguments``
    are ``transformers.TrainingArguments``, before a Trainer is made of them.
    """
    from accelerate.utils import DistributedType

    state = arguments.distributed_state
    if shards_model() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def check_sharded_run(options: TrainOptions, storage: str) -> None:
    """Refuse what a sharded base cannot be trained with, before it is loaded.

    Raises:
        InputError: A setting of the launcher or an option of ours does not go with FSDP.
    """
    if not shards_model():
        return
    for name, variable, default, wanted in (
        ("fsdp_version", "FSDP_VERSION", "1", "2"),
        ("fsdp_cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING", "false", "false"),
        ("mixed_precision", "ACCELERATE_MIXED_PRECISION", "no", "no"),
    ):
        value = os.environ.get(variable, default).lower()
        if value != wanted:
            raise InputError(
                f"{name} must be {wanted} here, got {value!r}; set it in the launcher's "
                "configuration, as recipes/accelerate/fsdp2.yaml does"
            )
    if storage == "int8":
        raise InputError(
            "storage must be nf4, fp4, bf16 or fp32 with FSDP, got 'int8', whose weights cannot be "
            "sharded; use another"
        )
    from accelerate.utils import compare_versions

    if options.run.resume and compare_versions("accelerate", "<", "1.15"):
        raise InputError(
            "resume must be left out with FSDP before accelerate 1.15, got it: the state of the "
            "optimizer would be lost; pip install 'accelerate>=1.15'"
        )
    for name, is_set in (
        ("resident", options.reuse.resident != "all"),
        ("dequantize_upper", options.reuse.dequantize_upper == "on"),
        ("embedding_on_host", options.memory.embedding_on_host),
    ):
        if is_set:
            raise InputError(
                f"{name} must be left out with FSDP, got it; it decides where the base lies, and "
                "so does FSDP"
            )


def refuse_casts() -> None:
    """Refuse mixed precision with FSDP, which casts what it gathers.

    Raises:
        InputError: Interventions would be 16-bit numbers, and packed weights no weights any more.
    """
    if not shards_model():
        return
    from accelerate.state import AcceleratorState

    precision = AcceleratorState._shared_state.get("_mixed_precision") or "no"
    if precision != "no":
        raise InputError(
            f"mixed_precision must be no with FSDP, got {precision!r}; leave bf16 and fp16 out of "
            "the training arguments: the base computes in the dtype it was loaded in"
        )


def _state() -> Any:
    from accelerate import PartialState

    return PartialState()


def lost_a_process(error: BaseException) -> bool:
    """Return whether an error says that another process does not answer any more."""
    message = str(error).lower()
    signs = ("closed by peer", "reset by peer", "gloo", "nccl", "broken pipe")
    return num_processes() > 1 and any(sign in message for sign in signs)
