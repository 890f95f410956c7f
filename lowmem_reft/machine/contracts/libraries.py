"""What is relied on inside bitsandbytes, accelerate, TRL, lm-eval and Ray."""

from __future__ import annotations

import inspect
from typing import Any

from lowmem_reft.machine.contracts.contract import expect, relied_on, some_tokens, tiny_llama


def _linear4bit() -> tuple[Any, Any]:
    """Return a quantized layer, and its weight dequantized."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight: Any = layer.weight.to("cpu")  # which quantizes
    layer.weight = weight
    return layer, dequantize_4bit(weight.data, weight.quant_state)


@relied_on(
    "bitsandbytes", "torch", leaned_on_by="base/quantization.py base/synthetic.py memory/live.py"
)
def _4bit_weights_hold_their_constants() -> None:
    """a 4-bit weight holds its constants in quant_state."""
    import torch

    layer, weight = _linear4bit()
    state = layer.weight.quant_state
    expect(layer.weight.numel() == 64 * 128 // 2, f"a weight of {layer.weight.numel()} bytes")
    found = (state.blocksize, str(state.quant_type), tuple(state.shape), state.nested)
    expect(found == (64, "nf4", (128, 64), True), f"a quant_state of {found}")
    constants = (state.absmax, state.code, state.offset, state.state2.absmax)
    sizes = [constant.numel() for constant in constants]
    expect(sizes == [128, 16, 1, 1], f"constants of {sizes} numbers")
    inputs = torch.randn(3, 64)
    difference = float((layer(inputs) - inputs @ weight.T).abs().max())
    expect(difference < 1e-4, f"a product that differs by {difference:.2g}")


@relied_on("bitsandbytes", "torch", leaned_on_by="base/quantization.py")
def _4bit_gradients_survive_an_evaluation() -> None:
    """a guarded 4-bit layer has right gradients after an evaluation."""
    import torch

    layer, weight = _linear4bit()
    expect(hasattr(layer, "support_avx512bf16_for_cpu"), "no switch for the packed weight")
    layer.support_avx512bf16_for_cpu = False
    stored = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    expect(torch.equal(layer.weight.data, stored), "bytes that an evaluation has changed")
    inputs = torch.randn(3, 64, requires_grad=True)
    layer.train()(inputs).sum().backward()
    expect(inputs.grad is not None, "no gradient")
    difference = float((torch.as_tensor(inputs.grad) - weight.sum(0)).abs().max())
    expect(difference < 1e-4, f"a gradient that differs by {difference:.2g}")


@relied_on("accelerate", leaned_on_by="machine/processes.py")
def _accelerate_tells_the_mixed_precision() -> None:
    """accelerate tells the mixed precision that was asked for."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    # Not made: it would settle device and processes for everybody.
    state: Any = object.__new__(AcceleratorState)
    vars(state).update(_mixed_precision="bf16", distributed_type=DistributedType.NO)
    expect(state.mixed_precision == "bf16", f"a mixed precision {state.mixed_precision!r}")
    shared = getattr(AcceleratorState, "_shared_state", None)
    expect(isinstance(shared, dict), f"a shared state {shared!r}")


@relied_on("trl", leaned_on_by="base/loss.py")
def _trl_asks_for_its_fused_head() -> None:
    """TRL asks a model for its own loss by fused_lm_head."""
    from trl.trainer.utils import add_fused_lm_head

    model, ids = tiny_llama().train(), some_tokens()
    add_fused_lm_head(model)
    output = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
    expect("log_probs" in output, f"an output of {list(output)}")


@relied_on("lm_eval", leaned_on_by="runs/harness_model.py")
def _the_harness_scores_and_generates_tokens() -> None:
    """the harness scores and generates through two methods that take tokens."""
    from lm_eval.models.huggingface import HFLM

    for name, wanted in (
        ("_loglikelihood_tokens", ["requests", "disable_tqdm", "override_bs"]),
        ("_model_generate", ["context", "max_length", "stop"]),
    ):
        parameters = list(inspect.signature(getattr(HFLM, name)).parameters)
        expect([p for p in parameters if p in wanted] == wanted, f"{name}({parameters})")
    for caller, name in (
        ("loglikelihood", "_loglikelihood_tokens"),
        ("loglikelihood_rolling", "_loglikelihood_tokens"),
        ("generate_until", "_model_generate"),
    ):
        methods = [vars(each)[caller] for each in HFLM.__mro__ if caller in vars(each)]
        called = {used for method in methods for used in method.__code__.co_names}
        expect(name in called, f"{caller} that does not call {name}")


@relied_on("ray", leaned_on_by="compare/engines/cluster.py")
def _ray_streams_what_a_task_yields() -> None:
    """Ray streams what a task yields."""
    import ray

    def numbers() -> Any:
        yield 1

    task: Any = ray.remote(num_returns="streaming", max_retries=0)(numbers)
    options = task.options(num_cpus=1, num_gpus=0)
    expect(hasattr(options, "remote"), "a task that cannot be started")
    expect(hasattr(ray.ObjectRefGenerator, "__next__"), "a stream that is no iterator")
