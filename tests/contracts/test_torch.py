"""torch: hooks, checkpoints, dispatch, storages, autograd's numbers, kernels and counters."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from breaking import contract, doing_nothing, with_result, with_value, without, wrapped

MODULE = "torch.nn.modules.module:Module."


class Seen(TorchDispatchMode):
    """Notes operators, and calls ``then`` after each."""

    def __init__(self, then: Any = lambda func, out: None) -> None:
        super().__init__()
        self.names: list[str] = []
        self.then = then

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        out = func(*args, **(kwargs or {}))
        self.then(func, out)
        return out


# Modules and their hooks


@contract(
    "torch",
    used_by="reft/tuner.py reft/layer.py base/loss.py base/partial.py",
    broken_by=wrapped(
        f"{MODULE}register_forward_hook",
        lambda register: lambda self, hook, *, prepend=False, **k: register(self, hook, **k),
    ),
)
def test_a_prepended_hook_runs_first_and_may_replace_the_output(breach: bool) -> None:
    order: list[str] = []
    layer = nn.Identity()
    layer.register_forward_hook(lambda *_: order.append("second"))
    layer.register_forward_hook(
        lambda _, args, kwargs, output: (order.append("first"), output + 1)[1],
        prepend=True,
        with_kwargs=True,
    )
    assert layer(torch.zeros(1)) == 1
    assert order == ["first", "second"]


@contract(
    "torch",
    used_by="reft/tuner.py methods/attach.py memory/predict.py",
    broken_by=wrapped(
        f"{MODULE}register_forward_pre_hook",
        lambda register: (
            lambda self, hook, *, prepend=False, with_kwargs=False: register(
                self, lambda module, args: (hook(module, args, {}), None)[1]
            )
        ),
    ),
)
def test_a_pre_hook_may_take_arguments_away_by_name(breach: bool) -> None:
    class Layer(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    layer = Layer()
    layer.register_forward_pre_hook(lambda _, args, kwargs: ((), {"b": args[0]}), with_kwargs=True)
    assert layer(1, c=2) == ((), {"b": 1})


@contract(
    "torch",
    used_by="reft/tuner.py base/loss.py",
    broken_by=wrapped(
        f"{MODULE}register_forward_hook",
        lambda register: lambda self, hook, *, always_call=False, **k: register(self, hook, **k),
    ),
)
def test_a_hook_that_is_always_called_runs_after_an_exception(breach: bool) -> None:
    class Layer(nn.Module):
        def forward(self) -> None:
            raise KeyError

    outputs: list[Any] = []
    layer = Layer()
    layer.register_forward_hook(lambda _, __, output: outputs.append(output), always_call=True)
    with pytest.raises(KeyError):
        layer()
    assert outputs == [None]


@contract(
    "torch",
    used_by="reft/tuner.py base/loss.py base/residency.py",
    broken_by=with_value("torch.utils.hooks:RemovableHandle.remove", lambda self: None),
)
def test_hooks_and_submodules_go_without_a_trace(breach: bool) -> None:
    layer = nn.Linear(2, 2)
    before = set(layer.__dict__)
    calls: list[int] = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer.add_module("reft", nn.Identity())
    handle.remove()
    delattr(layer, "reft")
    layer(torch.zeros(1, 2))
    assert calls == []
    assert dict(layer.named_children()) == {}
    assert set(layer.__dict__) == before


@contract(
    "torch",
    used_by="base/quantization.py base/residency.py base/synthetic.py base/loss.py memory/live.py "
    "memory/kernels.py",
    broken_by=with_value(f"{MODULE}__getattr__", lambda self, name: None),
)
def test_modules_parameters_and_buffers_are_dictionaries_to_write_to(breach: bool) -> None:
    outer = nn.Sequential(nn.Linear(2, 2))
    outer._modules["0"] = nn.Identity()
    assert type(outer[0]) is nn.Identity
    layer = nn.BatchNorm1d(2)
    other = nn.Parameter(torch.zeros(2))
    layer._parameters["weight"] = other
    layer._buffers["running_mean"] = torch.full((2,), 3.0)
    assert layer.weight is other
    assert layer.running_mean.tolist() == [3, 3]
    layer._parameters.update({"bias": None})
    assert layer.bias is None


@contract(
    "torch",
    used_by="base/blocks.py base/techniques.py base/loss.py",
    broken_by=wrapped(
        f"{MODULE}_call_impl",
        lambda _: lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs),
    ),
)
def test_a_call_runs_the_forward_of_the_instance_with_hooks(breach: bool) -> None:
    layer = nn.Identity()
    layer.register_forward_hook(lambda _, __, output: output + 1)
    layer.__dict__["forward"] = lambda x: x * 10
    assert layer(torch.ones(1)) == 11
    del layer.__dict__["forward"]
    assert layer(torch.ones(1)) == 2


@contract(
    "torch",
    used_by="base/techniques.py",
    broken_by=wrapped(
        f"{MODULE}_apply",
        lambda apply: (
            lambda self, fn, recurse=True: (
                [setattr(p, "data", fn(p.data)) for p in self.parameters()] and self
            )
        ),
    ),
)
def test_moving_and_casting_go_through_apply_of_each_module(breach: bool) -> None:
    class Fixed(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    outer = nn.Sequential(Fixed(2, 2), nn.Linear(2, 2)).to(torch.float64)
    assert outer[0].weight.dtype == torch.float32
    assert outer[1].weight.dtype == torch.float64


@contract(
    "torch",
    used_by="reft/composition.py",
    broken_by=doing_nothing(f"{MODULE}_save_to_state_dict"),
)
def test_a_state_dict_is_written_by_each_module(breach: bool) -> None:
    class Noting(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            with torch.no_grad():
                self.weight.fill_(7)
            super()._save_to_state_dict(destination, prefix, keep_vars)

    state = nn.Sequential(Noting(2, 2)).state_dict()
    assert bool((state["0.weight"] == 7).all())


# Checkpoints, gradients, optimizers


@contract(
    "torch",
    used_by="base/checkpointing.py",
    broken_by=with_value(f"{__name__}:checkpoint", lambda run, x, use_reentrant: run(x)),
)
def test_hooks_around_a_checkpoint_see_its_inputs_alone(breach: bool) -> None:
    packed: list[Tensor] = []
    x = torch.randn(3, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out = checkpoint(lambda t: (t * t).exp().sin(), x, use_reentrant=False)
    assert [tensor is x or tensor.data_ptr() == x.data_ptr() for tensor in packed] == [True]
    out.sum().backward()


@contract(
    "torch",
    used_by="memory/kernels.py base/techniques.py reft/layer.py",
    broken_by=wrapped(
        "torch.utils.checkpoint:checkpoint",
        lambda function: (
            lambda run, *args, **k: function(run, *args, **{**k, "preserve_rng_state": False})
        ),
    ),
)
def test_a_checkpoint_asks_torch_for_the_state_of_random_numbers(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    import torch.utils.checkpoint as module

    asked: list[int] = []
    plain = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: asked.append(1) or plain())
    x = torch.randn(3, requires_grad=True)
    module.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    assert asked


@contract(
    "torch",
    used_by="memory/live.py",
    broken_by=doing_nothing("torch:Tensor.register_post_accumulate_grad_hook"),
)
def test_a_hook_tells_when_a_gradient_was_accumulated(breach: bool) -> None:
    grads: list[Any] = []
    x = nn.Parameter(torch.ones(2))
    x.register_post_accumulate_grad_hook(lambda p: grads.append(p.grad.clone()))
    (x * 3).sum().backward()
    assert grads[0].tolist() == [3, 3]


@contract(
    "torch",
    used_by="reft/interventions.py",
    broken_by=with_value(
        "torch.optim.optimizer:register_optimizer_step_post_hook",
        lambda hook: RemovableHandle(OrderedDict()),
    ),
)
def test_every_optimizer_step_is_told_to_one_hook(breach: bool) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        x = nn.Parameter(torch.ones(2))
        x.grad = torch.ones(2)
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            kind([x], lr=0.1).step()
    finally:
        handle.remove()
    assert steps == [1, 1]


@contract(
    "torch",
    used_by="reft/interventions.py",
    broken_by=with_value("torch:Tensor._version", property(lambda self: 0)),
)
def test_the_version_of_a_tensor_counts_writes_in_place(breach: bool) -> None:
    x = nn.Parameter(torch.ones(2))
    before = x._version
    with torch.no_grad():
        x.add_(1)
    assert x._version > before
    before, address = x._version, x.data_ptr()
    x.data = torch.zeros(2)
    assert (x._version, x.data_ptr()) != (before, address)


# What dispatch modes and autograd tell


@contract(
    "torch",
    used_by="memory/live.py",
    broken_by=with_value("torch:Tensor.untyped_storage", lambda self: torch.UntypedStorage(8)),
)
def test_views_share_a_storage_that_tells_when_it_is_freed(breach: bool) -> None:
    x = torch.ones(8)
    freed: list[int] = []
    storage = x.untyped_storage()
    reference = weakref.ref(storage, lambda _: freed.append(1))
    assert x[2:].untyped_storage()._cdata == storage._cdata
    assert x.clone().untyped_storage()._cdata != storage._cdata
    assert storage.nbytes() == 32
    del storage
    view = x[:1]
    del x
    assert freed == []
    del view
    gc.collect()
    assert freed == [1]
    assert reference() is None


@contract(
    "torch",
    used_by="memory/live.py",
    broken_by=with_value("torch._C:_current_graph_task_id", lambda: -1),
)
def test_a_backward_pass_has_a_number(breach: bool) -> None:
    numbers = [torch._C._current_graph_task_id()]
    mode = Seen(lambda func, out: numbers.append(torch._C._current_graph_task_id()))
    x = torch.ones(2, requires_grad=True)
    with mode:
        y = (x * 2).sum()
        forward = numbers[:]
        del numbers[:]
        y.backward()
    assert {*forward} == {-1}
    assert any(number != -1 for number in numbers)


@contract(
    "torch",
    used_by="memory/live.py",
    broken_by=with_value("torch._C._autograd:_get_sequence_nr", lambda: 1),
)
def test_a_node_of_the_backward_pass_has_the_number_of_its_operator(breach: bool) -> None:
    made: dict[str, int] = {}
    ran: dict[str, int] = {}

    def note(func: Any, out: Any) -> None:
        node = torch._C._current_autograd_node()
        name = func._schema.name
        if torch._C._current_graph_task_id() == -1:
            made[name] = torch._C._autograd._get_sequence_nr() - 1
        elif node is not None:
            ran[f"{type(node).__name__}"] = node._sequence_nr()

    x = torch.ones(2, requires_grad=True)
    with Seen(note):
        (x.sin() * x.exp()).sum().backward()
    assert made["aten::sin"] == ran["SinBackward0"]
    assert made["aten::exp"] == ran["ExpBackward0"]
    assert made["aten::mul"] == ran["MulBackward0"]


class EnteredOnce(TorchDispatchMode):
    """A mode that does not see what runs where it is entered again."""

    depth = 0

    def __enter__(self) -> Any:
        self.depth += 1
        return super().__enter__() if self.depth == 1 else self

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            super().__exit__(*error)


@contract(
    "torch",
    used_by="memory/live.py memory/kernels.py",
    broken_by=with_value(f"{__name__}:TorchDispatchMode", EnteredOnce),
)
def test_a_mode_may_enter_itself_again_in_its_own_dispatch(breach: bool) -> None:
    class Nested(TorchDispatchMode):
        seen: Any = []  # noqa: RUF012

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(func._schema.name)
            if func._schema.name == "aten::tanh":
                with self:
                    return args[0].exp() / args[0].cosh()
            return func(*args, **(kwargs or {}))

    mode = Nested()
    with mode:
        torch.ones(2).tanh()
    assert mode.seen[-4:] == ["aten::tanh", "aten::exp", "aten::cosh", "aten::div"]


@contract(
    "torch",
    used_by="memory/outputs.py",
    broken_by=with_value(f"{__name__}:_schema", lambda name: torch.ops.aten.view.default._schema),
)
def test_a_schema_tells_views_writes_and_kinds(breach: bool) -> None:
    product, view, in_place = _schema("mm"), _schema("view"), _schema("add_.Tensor")
    assert [value.type.kind() for value in product.returns] == ["TensorType"]
    assert not any(v.alias_info for v in (*product.arguments, *product.returns))
    assert any(v.alias_info for v in (*view.arguments, *view.returns))
    assert in_place.is_mutable
    assert not product.is_mutable
    unsafe = _schema("_unsafe_view")
    assert unsafe.name == "aten::_unsafe_view"
    assert not any(v.alias_info for v in unsafe.returns), "it does not say that it is a view"


def _schema(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")._schema


@contract(
    "torch",
    used_by="memory/kernels.py",
    broken_by=with_value("torch:_fused_sdp_choice", lambda *_, **__: 7),
)
def test_torch_tells_the_kernel_of_attention_by_a_number(breach: bool) -> None:
    query = torch.zeros(1, 2, 4, 8)
    choices = {
        int(torch._fused_sdp_choice(query, query, query, mask, 0.0, False, enable_gqa=False))
        for mask in (None, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    }
    assert choices <= {0, 1}
    assert 1 in choices, "flash, on a CPU"


@contract(
    "torch",
    used_by="memory/kernels.py",
    broken_by=with_value(f"{__name__}:_arguments", lambda name: []),
)
def test_kernels_of_attention_take_the_arguments_that_they_are_given(breach: bool) -> None:
    common = ["query", "key", "value"]
    assert _arguments("_scaled_dot_product_attention_math")[:6] == [
        *(*common, "attn_mask", "dropout_p", "is_causal")
    ]
    flash = _arguments("_scaled_dot_product_flash_attention_for_cpu")
    assert flash[:5] == [*common, "dropout_p", "is_causal"]
    assert {"attn_mask", "scale"} <= {*flash}
    assert _arguments("_scaled_dot_product_flash_attention")[:5] == [
        *(*common, "dropout_p", "is_causal")
    ]
    efficient = _arguments("_scaled_dot_product_efficient_attention")
    assert efficient[:7] == [*common, "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"]
    for name in ("flash_attention", "efficient_attention", "flash_attention_for_cpu"):
        backward = _arguments(f"_scaled_dot_product_{name}_backward")
        assert backward[1:3] == ["query", "key"]


def _arguments(name: str) -> list[str]:
    schema = getattr(torch.ops.aten, name).default._schema
    return [argument.name for argument in schema.arguments]


@contract(
    "torch",
    used_by="memory/kernels.py",
    broken_by=with_value(f"{__name__}:Seen.__torch_dispatch__", lambda self, func, *a, **k: None),
)
def test_reading_a_number_on_the_meta_device_is_one_operator(breach: bool) -> None:
    class Answering(Seen):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func._schema.name == "aten::_local_scalar_dense":
                return True
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Answering():
        assert bool(torch.ones(2, device="meta").all())


@contract(
    "torch",
    used_by="memory/measure.py",
    broken_by=with_value("torch.profiler:profile.__init__", lambda self, **_: None),
)
def test_the_profiler_notes_each_allocation_of_the_cpu(breach: bool) -> None:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        x = torch.empty(1_000_000, dtype=torch.uint8)
        del x
    inner: Any = profiler.profiler
    sizes = [
        event.nbytes()
        for event in sorted(inner.kineto_results.events(), key=lambda event: event.start_ns())
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    large = [size for size in sizes if abs(size) >= 1_000_000]
    assert [size > 0 for size in large] == [True, False]
    assert sum(large) == 0


# Machine, files, processes


@contract(
    "torch",
    used_by="machine/devices.py",
    broken_by=with_value("torch.cpu:get_capabilities", lambda: {"avx512_vnni": True}),
)
def test_a_cpu_says_whether_it_computes_in_bf16(breach: bool) -> None:
    import inspect

    names = {*torch.cpu.get_capabilities()}
    assert {"avx512_bf16", "amx_bf16"} <= names or "bf16" in names
    parameters = inspect.signature(torch.cuda.is_bf16_supported).parameters
    assert "including_emulation" in parameters


@contract(
    "torch",
    used_by="errors.py",
    broken_by=with_value("torch:empty", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no"))),
)
def test_too_little_memory_is_said_in_known_words(breach: bool) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    assert any(word in str(raised.value).lower() for word in words)


@contract(
    "torch",
    used_by="methods/pyreft/checkpoint.py",
    broken_by=wrapped(
        "torch:load", lambda load: lambda path, **k: load(path, **{**k, "weights_only": False})
    ),
)
def test_loading_weights_runs_no_code(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    path = tmp_path / "weights.bin"
    torch.save({"a": Code()}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, map_location="cpu", weights_only=True)
    torch.save({"a": torch.ones(2)}, path)
    assert torch.load(path, map_location="cpu", weights_only=True)["a"].tolist() == [1, 1]


@contract(
    "torch",
    used_by="machine/processes.py",
    broken_by=without("torch.distributed.tensor:DTensor.full_tensor"),
)
def test_a_sharded_tensor_can_be_made_whole_and_shared_out_again(breach: bool) -> None:
    import inspect

    from torch.distributed.tensor import DTensor, distribute_tensor

    assert callable(DTensor.full_tensor)
    assert hasattr(DTensor, "device_mesh")
    assert hasattr(DTensor, "placements")
    names = list(inspect.signature(distribute_tensor).parameters)
    assert names[:3] == ["tensor", "device_mesh", "placements"]


@contract(
    "torch",
    used_by="base/loss.py",
    broken_by=with_value("torch:mm", lambda a, b, out=None: a @ b),
)
def test_a_product_can_be_written_into_a_part_of_a_tensor(breach: bool) -> None:
    out = torch.zeros(4, 3)
    torch.mm(torch.ones(2, 5), torch.ones(5, 3), out=out[1:3])
    assert out.sum(1).tolist() == [0, 15, 15, 0]


@contract(
    "torch",
    used_by="memory/outputs.py",
    broken_by=with_result("torch:empty_strided", lambda out: out.contiguous()),
)
def test_a_strided_tensor_on_meta_has_a_storage_of_its_size(breach: bool) -> None:
    out = torch.empty_strided((2, 3), (1, 4), dtype=torch.float32, device="meta")
    assert out.stride() == (1, 4)
    assert out.untyped_storage().nbytes() == 4 * (1 + 1 + 2 * 4)


@contract(
    "torch",
    used_by="memory/live.py memory/outputs.py",
    broken_by=with_value("torch.utils._pytree:tree_leaves", lambda tree: [tree]),
)
def test_leaves_of_nested_outputs_come_in_a_list(breach: bool) -> None:
    from torch.utils import _pytree

    a, b = torch.zeros(1), torch.ones(1)
    leaves = _pytree.tree_leaves((a, [b, 3]))
    assert len(leaves) == 3
    assert leaves[0] is a
    assert leaves[1] is b


@contract(
    "torch",
    used_by="reuse/attention.py",
    broken_by=with_value("torch:_softmax_backward_data", lambda grad, out, dim, dtype: grad * out),
)
def test_the_gradient_of_a_softmax_is_formed_from_its_output(breach: bool) -> None:
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights, grad = scores.softmax(-1), torch.randn(3, 4, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(weights, scores, grad)
    found = torch._softmax_backward_data(grad, weights.detach(), -1, grad.dtype)
    assert torch.allclose(found, wanted)
