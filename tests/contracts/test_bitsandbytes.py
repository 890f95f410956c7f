"""bitsandbytes: quantized layers, their constants, their kernels and what they are made of."""

from __future__ import annotations

import copy
import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.autograd import _functions
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
)
from bitsandbytes.nn import modules
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

from breaking import contract, doing_nothing, with_result, with_value, without, wrapped

MODULES = "bitsandbytes.nn.modules:"
FUNCTIONS = "bitsandbytes.autograd._functions:"


class _Otherwise:
    """bitsandbytes with functions that are found elsewhere."""

    def __init__(self) -> None:
        names = vars(modules.bnb.functional)
        self.functional = SimpleNamespace(**names)


def linear4bit(width: int = 64, **options: Any) -> Any:
    common = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
    layer: Any = Linear4bit(width, 128, **{**common, **options})
    layer.weight = layer.weight.to("cpu")
    return layer


def linear8bit() -> Any:
    layer: Any = Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    layer.weight = layer.weight.to("cpu")
    return layer


@contract(
    "bitsandbytes",
    used_by="base/quantization.py",
    broken_by=wrapped(
        f"{MODULES}Linear4bit.forward",
        lambda forward: (
            lambda self, x: (
                modules._convert_weight_packed_for_cpu(self.weight.data, self.weight.quant_state),
                forward(self, x),
            )[1]
        ),
    ),
)
def test_linear4bit_repacks_in_eval_on_avx512_bf16_if_a_flag_of_the_layer_is_set(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    packed: list[bool] = []

    def convert(data: Any, state: Any) -> Any:
        packed.append(layer.support_avx512bf16_for_cpu)
        return data, state

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", convert)
    layer = linear4bit().eval()
    inputs = torch.randn(2, 64)
    for supported in (False, True):
        layer.support_avx512bf16_for_cpu = supported
        layer(inputs)
    assert packed == [True]
    layer.train()(inputs)
    assert packed == [True]


@contract(
    "bitsandbytes",
    used_by="base/whole.py",
    broken_by=with_value("bitsandbytes.nn.modules:bnb", _Otherwise()),
)
def test_weights_are_quantized_by_two_functions_that_are_given_them_first(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    import bitsandbytes.functional

    given: list[tuple[str, Any]] = []

    def noting(name: str) -> Any:
        function = getattr(bitsandbytes.functional, name)

        def note(weight: Any, *args: Any, **kwargs: Any) -> Any:
            given.append((name, tuple(weight.shape)))
            return function(weight, *args, **kwargs)

        return note

    for name in ("quantize_4bit", "int8_vectorwise_quant"):
        monkeypatch.setattr(bitsandbytes.functional, name, noting(name))
    linear4bit()
    linear8bit()
    assert given == [("quantize_4bit", (128, 64)), ("int8_vectorwise_quant", (128, 64))]


@contract(
    "bitsandbytes",
    used_by="base/quantization.py",
    broken_by=wrapped(
        f"{MODULES}_convert_weight_packed_for_cpu", lambda _: lambda data, state: (data, state)
    ),
)
def test_a_repacked_weight_is_told_by_its_state(breach: bool) -> None:
    layer = linear4bit()
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    _, state = modules._convert_weight_packed_for_cpu(
        layer.weight.data.clone(), copy.deepcopy(layer.weight.quant_state)
    )
    assert state.packing_format_for_cpu is True


@contract(
    "bitsandbytes",
    used_by="base/residency.py",
    broken_by=wrapped(
        f"{MODULES}Params4bit.__new__",
        lambda new: lambda cls, data=None, requires_grad=False, **_: new(cls, data, requires_grad),
    ),
)
def test_a_4bit_parameter_is_made_again_from_what_it_holds(breach: bool) -> None:
    layer = linear4bit()
    weight = layer.weight
    assert weight.module is layer
    again = type(weight)(torch.empty_like(weight.data), requires_grad=False, **vars(weight))
    assert vars(again).keys() == vars(weight).keys()
    assert again.quant_state is weight.quant_state
    assert (again.quant_type, again.bnb_quantized, again.module) == ("nf4", True, layer)
    weight.module = None  # which frees the layer
    assert layer(torch.randn(1, 64)).shape == (1, 128)


@contract(
    "bitsandbytes",
    used_by="base/synthetic.py",
    broken_by=wrapped(
        "bitsandbytes.functional:QuantState.__init__",
        lambda init: (
            lambda self, absmax, shape=None, code=None, **more: init(
                self, absmax, shape=shape, code=None, **more
            )
        ),
    ),
)
def test_a_quant_state_is_made_of_its_constants(breach: bool) -> None:
    layer = linear4bit()
    known = layer.weight.quant_state
    nested = QuantState(
        absmax=known.state2.absmax,
        code=create_dynamic_map(),
        blocksize=known.state2.blocksize,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=known.absmax,
        shape=torch.Size((128, 64)),
        code=get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
        offset=known.offset,
        state2=nested,
    )
    expected = dequantize_4bit(layer.weight.data, known)
    torch.testing.assert_close(dequantize_4bit(layer.weight.data, state), expected)
    assert known.state2.blocksize == 256
    weight = Params4bit(
        layer.weight.data,
        requires_grad=False,
        quant_state=state,
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.weight = weight
    inputs = torch.randn(2, 64)
    torch.testing.assert_close(layer(inputs), inputs @ expected.T)


@contract(
    "bitsandbytes",
    used_by="base/quantization.py",
    broken_by=doing_nothing(f"{MODULES}fix_4bit_weight_quant_state_from_module"),
)
def test_a_layer_gives_its_constants_to_a_weight_that_has_lost_them(breach: bool) -> None:
    layer = linear4bit()
    inputs = torch.randn(2, 64)
    expected = layer(inputs)
    layer.quant_state = layer.weight.quant_state
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP2 does
    torch.testing.assert_close(layer(inputs), expected)


@contract(
    "bitsandbytes",
    used_by="base/quantization.py",
    broken_by=wrapped(
        "bitsandbytes:matmul_4bit",
        lambda product: lambda x, weight, **k: product(x, weight.to(torch.uint8), **k),
    ),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_bytes_may_be_held_as_floating_point_numbers(
    breach: bool, dtype: torch.dtype
) -> None:
    layer = linear4bit()
    inputs = torch.randn(2, 64, requires_grad=True)
    expected = layer(inputs)
    gradient = torch.autograd.grad(expected.sum(), inputs)[0]
    weight = layer.weight
    weight.data = weight.data.flatten().view(dtype)[:, None]
    weight.quant_storage = layer.quant_storage = dtype
    torch.testing.assert_close(layer(inputs), expected)
    torch.testing.assert_close(torch.autograd.grad(layer(inputs).sum(), inputs)[0], gradient)


@contract(
    "bitsandbytes",
    used_by="base/quantization.py memory/live.py base/identity.py",
    broken_by=with_result(f"{MODULES}Params4bit._quantize", lambda weight: weight.data),
)
def test_quantizing_keeps_the_class_and_the_kind(breach: bool) -> None:
    for kind in ("nf4", "fp4"):
        layer = linear4bit(quant_type=kind)
        assert isinstance(layer.weight, Params4bit)
        assert layer.weight.quant_type == layer.weight.quant_state.quant_type == kind
        assert layer.weight.dtype == torch.uint8
        assert type(layer).__name__ == "Linear4bit"


@contract(
    "bitsandbytes",
    used_by="memory/live.py base/synthetic.py",
    broken_by=wrapped(
        f"{MODULES}Int8Params._quantize",
        lambda quantize: lambda self, device: _without_scales(quantize(self, device)),
    ),
)
def test_an_8bit_weight_has_row_scales_in_parameter_or_state(breach: bool) -> None:
    layer = linear8bit()
    weight = layer._parameters["weight"]
    assert isinstance(weight, Int8Params)
    assert weight.dtype == torch.int8
    assert weight.SCB.shape == (128,)
    assert type(layer).__name__ == "Linear8bitLt"
    layer(torch.randn(2, 64))  # which may move them into the state
    holders = (layer._parameters["weight"], layer.__dict__["state"])
    scales = [s for holder in holders if (s := getattr(holder, "SCB", None)) is not None]
    assert [tuple(s.shape) for s in scales if s is not None]
    again = Int8Params(weight.data, requires_grad=False, CB=weight.data, SCB=scales[0])
    assert again.SCB is scales[0]
    layer.state.CB, layer.state.SCB = weight.data, scales[0]


def _without_scales(weight: Any) -> Any:
    weight.scales, weight.SCB = weight.SCB, None
    return weight


@contract(
    "bitsandbytes",
    used_by="memory/kernels.py",
    broken_by=with_value(f"{FUNCTIONS}MatMul8bitFp", _functions.MatMul8bitLt),
)
def test_on_a_cpu_8bit_layers_train_by_dequantizing(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    called: list[str] = []
    for name in ("MatMul8bitFp", "MatMul8bitLt"):
        kind = getattr(_functions, name)
        apply = kind.apply
        monkeypatch.setattr(_functions, name, _noting(called, name, apply))
    if breach:
        monkeypatch.setattr(_functions, "MatMul8bitFp", _functions.MatMul8bitLt)
    linear8bit().train()(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert called == ["MatMul8bitFp"]


def _noting(called: list[str], name: str, apply: Any) -> Any:
    def noted(*args: Any) -> Any:
        called.append(name)
        return apply(*args)

    return type(name, (), {"apply": staticmethod(noted)})


def _schema(name: str) -> list[str]:
    operator = getattr(torch.ops.bitsandbytes, name).default
    return [argument.name for argument in operator._schema.arguments]


@contract(
    "bitsandbytes",
    used_by="memory/kernels.py memory/live.py",
    broken_by=with_value(f"{__name__}:_schema", lambda name: ["A", "B"]),
)
def test_operators_have_the_arguments_of_the_functions_that_stand_for_them(breach: bool) -> None:
    assert _schema("gemm_4bit") == [
        *("A", "B", "shapeB", "absmax", "blocksize", "quant_type"),
        *("bias", "absmax_8bit", "absmax_code", "absmax_offset"),
    ]
    assert _schema("dequantize_4bit") == [
        *("A", "absmax", "blocksize", "quant_type", "shape", "dtype")
    ]
    assert _schema("dequantize_blockwise") == ["A", "absmax", "code", "blocksize", "dtype"]
    assert _schema("int8_vectorwise_quant") == ["A", "threshold"]
    assert _schema("int8_mixed_scaled_mm") == [
        *("A", "CA", "CB", "SCA", "SCB", "outlier_cols", "bias")
    ]


@contract(
    "bitsandbytes",
    used_by="memory/kernels.py memory/predict.py",
    broken_by=with_value(f"{__name__}:META", "cpu"),
)
def test_operators_run_on_the_meta_device(breach: bool) -> None:
    data = torch.empty(4096, 1, dtype=torch.uint8, device=META)
    absmax = torch.empty(128, dtype=torch.float32, device=META)
    full = torch.ops.bitsandbytes.dequantize_4bit(
        data, absmax, 64, "nf4", (128, 64), torch.bfloat16
    )
    assert full.is_meta
    assert (full.shape, full.dtype) == ((128, 64), torch.bfloat16)
    product = torch.ops.bitsandbytes.gemm_4bit(
        torch.empty(2, 64, device=META), data, (128, 64), absmax, 64, "nf4"
    )
    assert product.is_meta
    assert product.shape == (2, 128)
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        torch.empty(128, dtype=torch.uint8, device=META),
        torch.empty(1, device=META),
        torch.empty(256, device=META),
        256,
        torch.float32,
    )
    assert scales.is_meta


META = "meta"


@contract(
    "bitsandbytes",
    used_by="memory/kernels.py memory/live.py",
    broken_by=with_value(
        "bitsandbytes:matmul_4bit",
        lambda x, weight, bias=None, quant_state=None, **_: x @ x.new_zeros(64, 128),
    ),
)
def test_a_4bit_product_is_one_operator_or_dequantizes_the_weight(breach: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    layer = linear4bit().train()
    inputs = torch.randn(2, 64, requires_grad=True)
    with Names():
        layer(inputs).sum().backward()
    own = [name.removeprefix("bitsandbytes::") for name in seen if "bitsandbytes" in name]
    known = {"gemm_4bit", "dequantize_4bit", "dequantize_blockwise"}
    assert own
    assert {*own} <= known


@contract(
    "bitsandbytes",
    used_by="base/quantization.py",
    broken_by=with_value(f"{FUNCTIONS}logger", logging.getLogger("bitsandbytes.other")),
)
def test_the_notice_of_a_cast_comes_from_one_logger(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    monkeypatch.setattr(_functions.logger, "filters", [])  # of ours
    state = _functions.MatmulLtState()
    weight = linear8bit().weight
    state.CB, state.SCB, state.has_fp16_weights = weight.CB, weight.SCB, False
    with caplog.at_level(logging.WARNING):
        _functions.MatMul8bitLt.apply(torch.randn(2, 64), weight, None, None, state)
    notices = [r for r in caplog.records if "inputs will be cast from" in r.getMessage()]
    assert [record.name for record in notices] == ["bitsandbytes.autograd._functions"]


@contract(
    "bitsandbytes",
    used_by="cli.py",
    broken_by=without("bitsandbytes.backends.cpu.ops:logger"),
)
def test_the_notice_of_a_missing_kernel_comes_from_one_logger(breach: bool) -> None:
    from bitsandbytes.backends.cpu import ops

    assert ops.logger.name == "bitsandbytes.backends.cpu.ops"


@contract(
    "bitsandbytes",
    used_by="base/quantization.py",
    broken_by=with_value(f"{MODULES}Linear4bit.__init__", torch.nn.Linear.__init__),
)
def test_a_bias_and_the_sizes_are_those_of_a_linear_layer(breach: bool) -> None:
    layer = linear4bit(bias=True)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 128)
    assert layer.bias.shape == (128,)
    assert "compute_dtype" in inspect.signature(Linear4bit.__init__).parameters


@contract(
    "bitsandbytes",
    used_by="cli.py",
    broken_by=wrapped(
        "bitsandbytes.backends.default.ops:_try_torch_compile",
        lambda _: lambda function=None, **options: function or (lambda other: other),
    ),
)
def test_optimizers_for_the_cpu_are_compiled_where_they_are_defined(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    from bitsandbytes.backends.default import ops

    asked: list[Any] = []

    def leave(function: Any = None, **options: Any) -> Any:
        asked.append(options)
        return leave if function is None else function

    monkeypatch.setattr(torch, "compile", leave)
    assert ops._try_torch_compile(dynamic=False)(lambda: 3)() == 3
    assert asked == [{"dynamic": False}]
