"""The prediction on the meta device against what the allocator sees when the step really runs."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.techniques import save_memory
from lowmem_reft.memory.live import CATEGORIES
from lowmem_reft.memory.measure import measure
from lowmem_reft.memory.outputs import KnownOutputs
from lowmem_reft.memory.planner import with_margin
from lowmem_reft.memory.predict import Lengths, Predictor, Setting
from lowmem_reft.memory.step import make_batch, training_step, warm_up
from lowmem_reft.methods.choices import choices_log_likelihood
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.options import MemoryOptions, MethodOptions
from lowmem_reft.reuse.reuse import Reuse
from scratch import most_scratch

VOCAB, NUM_LAYERS, RESPONSE = 2048, 4, 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 256,
    "n_layer": NUM_LAYERS,
    "n_head": 8,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=32),
}
METHODS = {
    "f7+l7": MethodOptions(method="loreft", positions="f7+l7"),
    "all": MethodOptions(method="loreft", positions="all"),
    "l1+response": MethodOptions(method="loreft", positions="l1+response"),
    "red": MethodOptions(method="red", positions="every"),
    "red_loreft": MethodOptions(method="red_loreft"),
    "qlora": MethodOptions(method="qlora"),
}


@dataclass(frozen=True)
class Case:
    """One configuration of the comparison."""

    name: str
    storage: str
    compute_dtype: str
    method: str
    memory: MemoryOptions
    batch_size: int
    seq_len: int

    @property
    def setting(self) -> Setting:
        return Setting(
            storage=self.storage,  # type: ignore[arg-type]
            compute_dtype=self.compute_dtype,
            method=METHODS[self.method],
            memory=self.memory,
            device_type="cpu",
        )

    def predictor(self) -> Predictor:
        return Predictor(CONFIGS[self.name](), self.setting)

    def __str__(self) -> str:
        memory = self.memory
        ways = [
            "checkpointing" if memory.activation_checkpointing else "",
            f"every{memory.checkpoint_every}" if memory.checkpoint_every > 1 else "",
            f"mlp{memory.mlp_tokens}" if memory.mlp_tokens else "",
            "offload" if memory.offload_activations else "",
        ]
        parts = (self.name, self.storage, self.compute_dtype, self.method, *filter(None, ways))
        return "-".join((*parts, f"{self.batch_size}x{self.seq_len}"))


def case(words: str, **memory: Any) -> Case:
    """Read "llama nf4 fp32 f7+l7 ckpt 1x512"; keywords are options of MemoryOptions."""
    name, storage, compute_dtype, method, *ckpt, shape = words.split()
    batch_size, seq_len = map(int, shape.split("x"))
    options = MemoryOptions(activation_checkpointing=bool(ckpt), **memory)
    return Case(name, storage, compute_dtype, method, options, batch_size, seq_len)


CASES = [
    case("llama nf4 fp32 f7+l7 1x512"),
    case("llama nf4 bf16 all ckpt 4x128"),
    case("llama nf4 bf16 red_loreft ckpt 4x128"),
    case("gemma2 nf4 fp32 red_loreft 1x512"),
    case("llama fp32 fp32 qlora ckpt 1x512"),
    case("llama int8 fp32 qlora 4x128"),
    case("llama int8 fp32 f7+l7 ckpt 4x128"),
    case("llama nf4 bf16 qlora ckpt 4x128"),
    case("gpt2 nf4 bf16 f7+l7 ckpt 1x512"),
    case("gpt2 nf4 fp32 qlora 4x128"),
    case("gpt2 fp32 fp32 all 1x512"),
    case("gpt2 int8 fp32 all ckpt 4x128"),
    case("gpt2 nf4 bf16 qlora ckpt 1x512"),
    case("gemma2 nf4 bf16 all 1x512"),
    case("gemma2 nf4 fp32 f7+l7 ckpt 4x128"),
    case("gemma2 fp32 fp32 f7+l7 4x128"),
    case("gemma2 int8 fp32 all ckpt 4x128"),
    case("gemma2 nf4 fp32 qlora ckpt 1x512"),
    case("llama nf4 bf16 f7+l7 ckpt 4x128", checkpoint_every=2),
    case("llama nf4 fp32 all ckpt 4x128", mlp_tokens=100),
    case("gpt2 nf4 fp32 f7+l7 1x512", mlp_tokens=100),
    # Many small parts: the generator's state that each keeps (5 KB) counts.
    case("llama nf4 fp32 f7+l7 1x512", mlp_tokens=8),
    case("llama nf4 fp32 all 4x128", mlp_tokens=16),
    case("llama nf4 fp32 all ckpt 4x128", mlp_tokens=50),
    case("llama bf16 bf16 qlora ckpt 1x512"),
    case("llama nf4 bf16 l1+response ckpt 4x128"),
    case("gpt2 nf4 fp32 l1+response 1x512"),
    case("llama nf4 fp32 red 1x512"),
    case("gemma2 nf4 bf16 red ckpt 4x128"),
    case("gpt2 int8 bf16 f7+l7 ckpt 1x512"),
    case("llama nf4 fp32 f7+l7 ckpt 1x512", offload_activations=True, embedding_on_host=True),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of random fp32 models; only read."""
    directories = {}
    for name, config in CONFIGS.items():
        directories[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(directories[name])
    return directories


@pytest.fixture
def load(checkpoints: dict[str, Path]) -> Callable[[Case], Any]:
    """Return what loads the base of a case."""

    def load_base(case: Case) -> Any:
        return lr.load_base(
            checkpoints[case.name],
            storage=case.storage,
            compute_dtype=case.compute_dtype,
            device="cpu",
        )

    return load_base


# The independent measure.


def attached_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """Yield what lies in memory before a step: weights with their constants, adapter, optimizer."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor
                yield from _constants(tensor)
        state = vars(module).get("state")
        yield from _constants(state)
    for values in optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def _constants(holder: Any) -> Iterable[Tensor]:
    """Yield the constants of quantization: absmax and code books, or row scales."""
    state = getattr(holder, "quant_state", None)
    while state is not None:
        held = (state.absmax, state.code, state.offset)
        yield from (tensor for tensor in held if isinstance(tensor, Tensor))
        state = state.state2
    scales = getattr(holder, "SCB", None)
    if isinstance(scales, Tensor):
        yield scales


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def measured_peak_bytes(case: Case, base: Any) -> int:
    """Run the step under torch's profiler and add up the events of the allocator."""
    adapter = build_peft_config(case.setting.method, task_type="CAUSAL_LM", num_layers=NUM_LAYERS)
    model = get_peft_model(base, adapter).train()
    save_memory(model, case.memory)
    use_chunked_loss(model)
    batch = make_batch(
        case.batch_size, case.seq_len, RESPONSE, padded=case.batch_size > 1, vocab_size=VOCAB
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    warm_up(model, optimizer)
    held = storage_bytes([*attached_tensors(model, optimizer), *batch.values()])
    return held + allocated_peak_bytes(lambda: training_step(model, batch, optimizer))


def allocated_peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most that something has allocated at once, by torch's profiler."""
    gc.collect()
    gc.disable()  # what it frees at a random moment would blur the peak
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
            acc_events=True,
        ) as profiler:
            run()
    finally:
        gc.enable()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    current = peak = 0
    for _, change in sorted(events):
        current += change
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_predicted_peak_is_what_the_allocator_sees(
    case: Case, load: Callable[[Case], Any]
) -> None:
    memory = case.predictor().training(
        Lengths(seq_len=case.seq_len, batch_size=case.batch_size, response_len=RESPONSE)
    )
    predicted, measured = memory.peak_bytes, measured_peak_bytes(case, load(case))
    said = f"predicted {predicted:,} measured {measured:,} ratio {predicted / measured:.4f}"
    assert measured <= 1.01 * predicted, said
    assert predicted <= 1.03 * measured + most_scratch(case.setting.compute_dtype), said


def test_without_avx512_the_peak_is_lower_and_the_batch_is_a_part_of_it(
    load: Callable[[Case], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The peak is then in the backward pass of a norm, where the batch is alive as well.
    capabilities = {**torch.cpu.get_capabilities(), "avx512_f": False, "avx512_bf16": False}
    capabilities |= {"amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    of = case("llama nf4 bf16 all ckpt 4x128")
    predicted = of.predictor().training(
        Lengths(seq_len=of.seq_len, batch_size=of.batch_size, response_len=RESPONSE)
    )
    torch._C._set_mkldnn_enabled(False)
    try:
        measured = measured_peak_bytes(of, load(of))
    finally:
        torch._C._set_mkldnn_enabled(True)
    # What is left are the coordinates of the edited tokens (16 bytes each).
    assert measured <= 1.001 * predicted.peak_bytes <= 1.02 * measured


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scoring_choices_that_share_their_prompt_takes_no_more_than_is_predicted(
    name: str, load: Callable[[Case], Any]
) -> None:
    of = case(f"{name} nf4 fp32 f7+l7 4x128")
    predicted = of.predictor().evaluation(Lengths(seq_len=128, batch_size=4, response_len=8))
    adapter = build_peft_config(of.setting.method, task_type="CAUSAL_LM", num_layers=NUM_LAYERS)
    model = get_peft_model(load(of), adapter).eval()
    use_chunked_loss(model)
    rows = []
    for length in (96, 120, 126, 125):
        prompt = list(range(3, 3 + length - 60)) + [5] * 60
        choices = [[7, 8], [9, *[4] * (127 - length)]]
        rows.append([
            {"input_ids": prompt + choice, "labels": [-100] * len(prompt) + choice}
            for choice in choices
        ])  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    held = storage_bytes(attached_tensors(model, torch.optim.AdamW(trained)))
    held += 2 * sum(p.nbytes for p in trained)  # an optimizer's moments
    tokenizer = SimpleNamespace(pad_token_id=0)
    measured = held + allocated_peak_bytes(
        lambda: choices_log_likelihood(model, rows, tokenizer, batch_size=4)
    )
    assert measured <= 1.01 * predicted.peak_bytes


# What is counted.


# PEFT says so of LoRA on an unquantized GPT-2.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("storage", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("method", ["f7+l7", "qlora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_on_the_meta_device_is_made_as_the_loaded_one(
    name: str, method: str, storage: str, load: Callable[[Case], Any]
) -> None:
    case = Case(name, storage, "bf16", method, MemoryOptions(), 1, 16)
    adapter = build_peft_config(case.setting.method, task_type="CAUSAL_LM", num_layers=NUM_LAYERS)
    loaded, predicted = get_peft_model(load(case), adapter), case.predictor().model
    assert classes(predicted) == classes(loaded)
    assert shapes(predicted) == shapes(loaded)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def shapes(model: nn.Module) -> dict[str, Any]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


# What the counter says.


@pytest.mark.parametrize("case", CASES[1::4], ids=str)
def test_the_categories_add_up_to_the_peak(case: Case) -> None:
    peak = case.predictor().training(Lengths(seq_len=case.seq_len, batch_size=case.batch_size)).peak
    assert sum(peak.breakdown_bytes.values()) == peak.num_bytes
    assert set(peak.breakdown_bytes) <= set(CATEGORIES)
    assert all(size > 0 for size in peak.breakdown_bytes.values())


@pytest.mark.parametrize(
    ("storage", "compute_dtype"),
    [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "bf16"), ("bf16", "bf16")],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_constants_are_the_bytes_of_the_loaded_base(
    name: str, storage: str, compute_dtype: str, load: Callable[[Case], Any]
) -> None:
    case = Case(name, storage, compute_dtype, "f7+l7", MemoryOptions(), 1, 16)
    base = load(case)
    weights = storage_bytes([*base.parameters(), *base.buffers()])
    constants = storage_bytes(
        constant
        for module in base.modules()
        for holder in (*module._parameters.values(), vars(module).get("state"))
        for constant in _constants(holder)
    )
    predictor = case.predictor()
    breakdown = predictor.training(Lengths(seq_len=16)).peak.breakdown_bytes
    assert breakdown["weights"] == weights
    assert breakdown.get("quantization_constants", 0) == constants
    assert predictor.base_bytes == weights + constants


@pytest.mark.parametrize("method", METHODS)
def test_adapter_and_optimizer_are_the_bytes_of_the_trained_parameters(method: str) -> None:
    predictor = case(f"llama nf4 bf16 {method} 1x64").predictor()
    trained = [p for p in predictor.model.parameters() if p.requires_grad]
    size = 4 * sum(p.numel() for p in trained)
    breakdown = predictor.training(Lengths(seq_len=64)).peak.breakdown_bytes
    assert breakdown["adapter"] == size
    assert breakdown["optimizer"] == 2 * size  # AdamW's two moments
    assert predictor.trainable_parameters == size // 4


@pytest.mark.parametrize("method", ["f7+l7", "qlora"])
def test_gradient_accumulation_adds_the_gradients(method: str) -> None:
    predictor = case(f"llama nf4 bf16 {method} 1x512").predictor()
    size = 4 * predictor.trainable_parameters
    one, two, eight = (
        predictor.training(Lengths(seq_len=512, gradient_accumulation=number)).peak
        for number in (1, 2, 8)
    )
    assert two.breakdown_bytes["gradients"] == size
    assert two.num_bytes == eight.num_bytes
    assert one.num_bytes < two.num_bytes <= one.num_bytes + size


def test_a_prediction_leaves_nothing_behind() -> None:
    predictor = case("gpt2 nf4 bf16 f7+l7 ckpt 1x64").predictor()
    sizes = {"seq_len": 64, "batch_size": 2}
    first = predictor.training(Lengths(**sizes))
    predictor.evaluation(Lengths(**sizes, response_len=8))
    predictor.generation(Lengths(seq_len=64, max_new_tokens=8, batch_size=2))
    second = predictor.training(Lengths(**sizes))
    assert second.peak_bytes == first.peak_bytes
    assert second.peak.breakdown_bytes == first.peak.breakdown_bytes
    assert all(p.grad is None for p in predictor.model.parameters())


@pytest.mark.parametrize("case", [*CASES[::4], CASES[2]], ids=str)
def test_the_peaks_place_names_a_module_and_a_line(case: Case) -> None:
    predictor = case.predictor()
    peak = predictor.training(Lengths(seq_len=case.seq_len, batch_size=case.batch_size)).peak
    assert peak.place is not None
    assert re.fullmatch(r"\w+\.py:\d+", peak.place.line)
    assert peak.place.module in dict(predictor.model.get_base_model().named_modules())
    assert peak.place.module or peak.place.line.startswith("loss.py")  # it is in no module
    assert peak.place.line in str(peak.place)
    assert peak.place.module in str(peak.place)
    for block in peak.largest[:5]:
        assert block.place is not None
        assert re.fullmatch(r"\w+\.py:\d+", block.place.line)


def test_a_full_sliding_window_takes_no_more_memory_with_more_new_tokens() -> None:
    def peak(sliding_window: int | None, num_new_tokens: int) -> int:
        config = transformers.MistralConfig(**COMMON, sliding_window=sliding_window)
        predictor = Predictor(config, Setting(method=METHODS["f7+l7"], device_type="cpu"))
        memory = predictor.generation(
            Lengths(seq_len=8, max_new_tokens=num_new_tokens, batch_size=1)
        )
        return memory.peak_bytes

    assert peak(32, 40) < peak(None, 40)
    windowed, full = (peak(window, 512) - peak(window, 256) for window in (32, None))
    per_token = 2 * NUM_LAYERS * 4 * 32 * 2  # keys and values, blocks, heads, width, bytes
    assert windowed < 256 * per_token / 8  # masks and positions
    assert full >= 256 * per_token


# Answers from memory.


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ATEN = torch.ops.aten
CALLS = [
    (ATEN.mm.default, (meta(2, 3), meta(3, 4))),
    (ATEN.mm.default, (meta(2, 3), meta(4, 3).t())),
    (ATEN.add.Tensor, (meta(2, 3), 1)),
    (ATEN.add.Tensor, (meta(2, 3, dtype=torch.int64), 1)),
    (ATEN.add.Tensor, (meta(2, 3, dtype=torch.int64), 1.0)),
    (ATEN.add.Tensor, (meta(2, 3, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float64))),
    (ATEN.add.Tensor, (meta(2, 3, dtype=torch.bfloat16), meta(1, dtype=torch.float64))),
    (ATEN.add.Tensor, (meta(2, 3, dtype=torch.bfloat16), meta(dtype=torch.float64))),
    (ATEN.neg.default, (meta(3, 2).t(),)),
    (ATEN.cat.default, ([meta(2, 3), meta(2, 1)], 1)),
    (ATEN.cat.default, ([meta(2, 3), meta(2, 3)], 0)),
    (ATEN.sum.dim_IntList, (meta(2, 3), [1])),
    (ATEN.sum.dim_IntList, (meta(2, 3), [1], True)),
]


def test_a_like_call_is_answered_as_the_operator_answers() -> None:
    known = KnownOutputs()
    for _ in range(3):
        for operator, args in CALLS:
            plain, out = operator(*args), known.call(operator, args, {})
            assert (out.shape, out.stride(), out.dtype, out.device) == (
                plain.shape,
                plain.stride(),
                plain.dtype,
                plain.device,
            ), operator
            assert out.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


def test_like_calls_do_not_share_a_storage_and_views_do() -> None:
    known, tensor = KnownOutputs(), meta(2, 3)

    def storages(operator: Any, *args: Any) -> set[int]:
        outputs = [known.call(operator, (tensor, *args), {}) for _ in range(3)]
        return {out.untyped_storage()._cdata for out in (tensor, *outputs)}

    assert len(storages(ATEN.neg.default)) == 4
    for view in (
        (ATEN.t.default,),
        (ATEN._unsafe_view.default, [6]),
        (ATEN.add_.Tensor, 1),
        (ATEN.alias.default,),
    ):
        assert len(storages(*view)) == 1


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_answers_from_memory_change_no_byte_at_any_moment(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timeline() -> Any:
        sizes = {"seq_len": case.seq_len, "batch_size": case.batch_size}
        return case.predictor().training(Lengths(**sizes), keep_timeline=True).timeline

    answered = timeline()
    monkeypatch.setattr(KnownOutputs, "call", lambda _, function, args, kw: function(*args, **kw))
    assert timeline() == answered


PREDICT_8B = """
import resource, sys
import transformers
from lowmem_reft.memory.live import CATEGORIES
from lowmem_reft.memory.predict import Lengths, Predictor, Setting
from lowmem_reft.options import MemoryOptions

def rss():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def predict(**sizes):
    config = transformers.LlamaConfig(num_key_value_heads=8, tie_word_embeddings=False, **sizes)
    memory = MemoryOptions(activation_checkpointing=True)
    return Predictor(config, Setting(memory=memory)).training(Lengths(seq_len=2048)).peak

predict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=32)  # imports
before = rss()
peak = predict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_attention_heads=32)
print(rss() - before, peak.num_bytes, peak.breakdown_bytes["weights"])
"""


def test_a_model_of_8_billion_parameters_is_predicted_without_memory_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREDICT_8B], check=True, capture_output=True, text=True, timeout=300
    )
    grown, peak, weights = map(int, done.stdout.split())
    assert grown < 50 * 2**20
    # Untied 16-bit embeddings and head, 4-bit matrices of the blocks, norms: by hand.
    hidden, inner, layers, vocab, kv = 4096, 14336, 32, 128256, 1024
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    norms = (2 * layers + 1) * hidden
    by_hand = matrices // 2 + 2 * (2 * vocab * hidden + norms)
    assert by_hand <= weights <= by_hand + 4096  # and rotary frequencies
    assert weights < peak < 2 * weights


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"optim must be one of adamw_torch, .* got 'adafactor'"):
        Predictor(CONFIGS["llama"](), Setting(optim="adafactor"))


# Steps from stored constants.


@pytest.mark.parametrize(
    ("name", "storage", "compute_dtype", "method", "layers", "shape", "reuse", "resident"),
    [
        ("llama", "nf4", "fp32", "l1", "1", (1, 512), "prefix", "all"),
        ("llama", "nf4", "bf16", "l1", "2", (4, 128), "prefix", "upper"),
        ("gpt2", "nf4", "fp32", "l1", "2", (4, 128), "prefix", "all"),
        ("llama", "nf4", "fp32", "response", "2", (4, 128), "prefix", "all"),
        ("llama", "nf4", "bf16", "every", "upper:0.5", (4, 128), "trunk", "upper"),
        ("llama", "int8", "fp32", "all", "upper:0.5", (4, 128), "trunk", "upper"),
        ("gemma2", "nf4", "bf16", "all", "upper:0.5", (4, 128), "trunk", "all"),
        ("llama", "nf4", "fp32", "qlora", "3", (4, 128), "trunk", "upper"),
    ],
)
def test_a_reused_step_takes_what_is_predicted(
    tmp_path: Path,
    checkpoints: dict[str, Path],
    name: str,
    storage: Any,
    compute_dtype: str,
    method: str,
    layers: str,
    shape: tuple[int, int],
    reuse: Any,
    resident: Any,
) -> None:
    options = MethodOptions(method="loreft", positions=method, layers=layers)
    if method == "qlora":
        options = MethodOptions(method="qlora", layers=layers)
    setting = Setting(
        storage=storage,
        compute_dtype=compute_dtype,
        method=options,
        device_type="cpu",
        reuse=reuse,
        resident=resident,
    )
    (batch_size, seq_len), upper = shape, {"resident": resident, "first_resident": 3}
    predicted = with_margin(
        Predictor(CONFIGS[name](), setting)
        .training(Lengths(seq_len=seq_len, batch_size=batch_size, response_len=RESPONSE))
        .peak_bytes
    )
    base: Any = lr.load_base(
        checkpoints[name],
        storage=storage,
        compute_dtype=compute_dtype,
        device="cpu",
        **(upper if resident == "upper" else {}),  # type: ignore[arg-type]
    )
    adapter = build_peft_config(options, task_type="CAUSAL_LM", num_layers=NUM_LAYERS)
    model = get_peft_model(base, adapter).train()
    use_chunked_loss(model)
    batch = make_batch(batch_size, seq_len, RESPONSE, padded=batch_size > 1, vocab_size=VOCAB)
    lengths = batch["attention_mask"].sum(1).tolist()
    stored = Reuse(
        model,
        [
            {"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()}
            for ids, labels, length in zip(
                batch["input_ids"], batch["labels"], lengths, strict=True
            )
        ],
        tmp_path,
        prefix=reuse == "prefix",
    )
    assert stored.mode == reuse

    def forward() -> Any:
        return SimpleNamespace(loss=stored.loss(range(batch_size)))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    warm_up(model, optimizer)
    training_step(model, batch, optimizer, forward=forward)  # opens the store
    attached = [tensor for tensor in attached_tensors(model, optimizer) if not tensor.is_meta]
    held = storage_bytes([*attached, *batch.values()])
    measured = measure(
        torch.device("cpu"), lambda: training_step(model, batch, optimizer, forward=forward)
    )
    least = held + measured.allocated_bytes
    assert least <= predicted <= 1.03 * least + most_scratch(compute_dtype)
