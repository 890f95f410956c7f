"""Examples one after the other in rows: what is computed, of which bases, and what a run says."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_reft.base.attention import within_examples
from lowmem_reft.base.heads import freeze
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.data.packing import PAIRS_FOR_TOKEN, is_of_rows, packed_rows, token_ids
from lowmem_reft.data.tokens import Collator
from lowmem_reft.errors import InputError
from lowmem_reft.memory.live import track
from lowmem_reft.memory.planner import with_margin
from lowmem_reft.memory.predict import Lengths, Predictor, Setting
from lowmem_reft.options import MethodOptions, TrainOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reuse.reuse import Reuse
from lowmem_reft.runs.packing import why_not
from lowmem_reft.runs.train import run_training
from small_runs import small_run, with_optim, with_run
from tiny_models import ARCHITECTURES, SIZES, lora, make_examples, make_model

ADAPTERS = {
    "f2+l2": ("loreft", "f2+l2"),
    "all": ("loreft", "all"),
    "every": ("loreft", "every"),
    "l1+response": ("loreft", "l1+response"),
    "red": ("red", "every"),
    "lora": None,
}


PACK = partial(packed_rows, pairs_for_token=PAIRS_FOR_TOKEN)


class Pad:
    pad_token_id = 0


def adapter_config(name: str) -> Any:
    chosen = ADAPTERS[name]
    if chosen is None:
        return lora([1, 3])
    intervention, positions = chosen
    more: dict[str, Any] = {} if intervention == "red" else {"rank": 2, "init": "paper"}
    return ReftConfig(
        task_type="CAUSAL_LM",
        intervention=intervention,
        layers="1;3",
        positions=positions,
        tie="positions" if positions == "f2+l2" else "tied",
        **more,
    )


def gradients(model: Any, *batches: dict[str, Any], num_items: int) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=torch.tensor(num_items)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    a, b = (torch.cat([each[name].flatten() for name in one]) for each in (one, other))
    assert a.norm() > 0
    return float((a - b).norm() / a.norm())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_packed_padded_and_single_rows_are_equal(
    architecture: str, adapter: str
) -> None:
    model = make_model(architecture, peft_config=adapter_config(adapter))
    nn.Module.to(model, torch.float64)
    examples = make_examples(6)
    num_items = sum(label != -100 for example in examples for label in example["labels"])
    packed = Collator(Pad(), pack=packed_rows)(examples)
    assert "attention_mask" not in packed
    assert packed["labels"].shape[0] < 6
    padded = Collator(Pad())(examples)
    # Counted as the Trainer counts them.
    for batch in (packed, padded):
        assert int(batch["labels"][:, 1:].ne(-100).sum()) == num_items
    wanted = gradients(
        model, *[Collator(Pad())([example]) for example in examples], num_items=num_items
    )
    # RMSNorm, the rotary tables and the loss are in fp32 whatever the model is in.
    for batch in (packed, padded):
        assert difference(wanted, gradients(model, batch, num_items=num_items)) < 2e-6
    in_one_row = Collator(Pad(), pack=PACK)(examples)
    assert in_one_row["labels"].shape[0] == 1
    with within_examples():
        for batch in (packed, in_one_row):
            assert difference(wanted, gradients(model, batch, num_items=num_items)) < 2e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_packed_batch_from_a_store_has_the_gradients_of_the_padded_one(
    architecture: str, tmp_path: Path
) -> None:
    model = make_model(architecture, peft_config=adapter_config("all"))
    examples = make_examples(6)
    reuse = Reuse(model, examples, tmp_path)
    assert reuse.mode == "trunk"
    indices = [5, 2, 0, 3, 1]
    padded = Collator(Pad())([examples[index] for index in indices])
    num_items = int(padded["labels"].ne(-100).sum())
    wanted = gradients(model, padded, num_items=num_items)
    reuse.pack = packed_rows
    model.zero_grad()
    assert reuse._stack(indices, reuse.read).hidden.shape[0] < 5
    reuse.loss(indices, num_items_in_batch=torch.tensor(num_items)).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert difference(wanted, found) < 1e-5


def test_a_layout_holds_every_example_and_never_more_tokens_or_pairs_than_padding() -> None:
    draw = random.Random(0)
    shares = []
    for _ in range(300):
        lengths = [draw.randrange(2, 200) for _ in range(draw.randrange(1, 20))]
        number, longest = len(lengths), max(lengths)
        rows = packed_rows(lengths)
        if rows is None:
            continue
        assert sorted(index for row in rows for index in row) == list(range(number))
        width = max(sum(lengths[index] for index in row) for row in rows)
        assert len(rows) * width < number * longest
        assert len(rows) * width**2 <= number * longest**2
        if number >= 8:
            shares.append(sum(lengths) / (len(rows) * width))
    assert len(shares) > 150
    assert sum(shares) / len(shares) > 0.95  # of those padded it would be half


def test_where_only_a_mask_has_them_pairs_are_cheaper_than_padding() -> None:
    # One row has four and a half times the pairs of the padded batch, and half of its tokens.
    lengths = [90, *[40] * 8]
    assert packed_rows(lengths) is not None
    assert len(packed_rows(lengths) or []) > 1
    assert len(PACK(lengths) or []) == 1
    # A mask of 33 million pairs would be more than the 4,096 tokens that are spared.
    long = [4096, *[2048] * 2]
    assert len(PACK(long) or []) == 2
    assert PACK([7, 7, 7]) is None


def test_examples_of_one_length_or_alone_stay_as_they_are() -> None:
    assert packed_rows([7, 7, 7]) is None
    assert packed_rows([7]) is None
    assert packed_rows([9, 8]) is None  # one row would have nearly twice the pairs


def test_the_tokens_of_a_packed_batch_are_told_from_its_padding() -> None:
    examples = make_examples(5)
    batch = Collator(Pad(), pack=packed_rows)(examples)
    assert int(is_of_rows(batch).sum()) == sum(len(e["input_ids"]) for e in examples)
    assert batch["input_ids"].numel() > int(is_of_rows(batch).sum())
    wanted = sorted(tuple(example["input_ids"]) for example in examples)
    assert sorted(token_ids(batch)) == wanted == sorted(token_ids(Collator(Pad())(examples)))


def base_of_kind(architecture: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **fields)
    base = AutoModelForCausalLM.from_config(config)
    freeze(base, "CAUSAL_LM")
    return base


SMALL = {**SIZES, "num_hidden_layers": 2}
WINDOW = {**SMALL, "sliding_window": 3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_examples_of_a_causal_model_with_positions_can_be_packed(architecture: str) -> None:
    assert why_not(make_model(architecture)) is None


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("mistral", WINDOW),
        ("gemma3_text", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
        ("phi3", SMALL),
    ],
)
def test_windows_of_attention_begin_anew_with_each_example(
    architecture: str, fields: dict[str, Any]
) -> None:
    assert why_not(base_of_kind(architecture, **fields)) is None


@pytest.mark.parametrize(
    ("architecture", "fields", "reason"),
    [
        (
            "bloom",
            {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
            "position_ids",
        ),
        ("mamba", {**SMALL, "state_size": 4}, "position_ids"),
        ("bert", {**SMALL, "is_decoder": False}, "beside it"),
        ("opt", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 64}, "beside it"),
        ("lfm2", {**SMALL, "layer_types": ["conv", "full_attention"]}, "beside it"),
    ],
)
def test_what_looks_at_all_that_precedes_is_not_packed(
    architecture: str, fields: dict[str, Any], reason: str
) -> None:
    assert reason in str(why_not(base_of_kind(architecture, **fields)))


def test_a_cache_which_hides_where_examples_begin_is_noticed() -> None:
    model = make_model("llama")
    model.base_model.model.config.use_cache = True
    assert "beside it" in str(why_not(model))


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    options = small_run(tiny_llama_dir, tmp_path, validated=True)
    rows = [
        {"prompt": "cat " * (1 + 7 * (i % 5)), "response": "dog" + " fox" * (i % 3)}
        for i in range(40)
    ]
    Path(options.data.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = with_optim(options, batch_size=8, gradient_accumulation=2, lr=1e-3)
    return replace(options, method=MethodOptions(positions="all", layers="upper:0.5", rank=2))


@pytest.mark.parametrize("reuse", ["off", "trunk"])
def test_a_packed_run_takes_the_steps_of_the_padded_one_and_computes_less(
    options: TrainOptions, tmp_path: Path, reuse: str
) -> None:
    results, losses = {}, {}
    for packing in ("off", "auto"):
        changed = replace(options, reuse=replace(options.reuse, reuse=reuse))
        changed = with_optim(changed, packing=packing)
        result = run_training(with_run(changed, output_dir=tmp_path / packing))
        assert (result["reuse"], result["packing"]) == (reuse, "off" if packing == "off" else "on")
        (*_, last) = result["validation"]
        share = 100 * last["num_real_tokens"] / last["num_computed_tokens"]
        assert result["real_percent"] == pytest.approx(share)
        results[packing] = result
        losses[packing] = [loss for _, loss in result["loss_history"]]
    assert results["off"]["real_percent"] < 70
    assert results["auto"]["real_percent"] > 98
    assert results["auto"]["num_steps"] == results["off"]["num_steps"] == len(losses["off"])
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-5)


def test_packing_that_is_asked_for_and_cannot_be_is_refused(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = with_optim(options, packing="on")
    with pytest.raises(InputError, match=r"packing must be auto or off .* trained tokens before"):
        run_training(replace(asked, method=MethodOptions(method="prompt")))
    assert not options.run.output_dir.exists()
    prefix = replace(options.reuse, reuse="prefix")
    asked = replace(asked, reuse=prefix, method=MethodOptions(positions="l1", rank=2))
    with pytest.raises(InputError, match=r"packing must .* keys and values .* --reuse trunk"):
        run_training(asked)
    auto = with_run(with_optim(asked, packing="auto"), quiet=False, overwrite=True)
    assert run_training(auto)["packing"] == "off"
    assert "packing: off, keys and values of prefixes" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_step_never_takes_more_memory_than_was_predicted(
    checkpointing: bool,
) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    method = MethodOptions(positions="all", rank=2)
    memory = replace(Setting().memory, activation_checkpointing=checkpointing)
    setting = Setting(
        storage="fp32", compute_dtype="fp32", method=method, memory=memory, device_type="cpu"
    )
    lengths = [150, 149, *(100 - 5 * index for index in range(6))]
    draw = torch.Generator().manual_seed(0)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 256, (length,), generator=draw).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (length - 5) + ids[-5:]})
    asked = Lengths(seq_len=150, response_len=5, batch_size=8)
    predicted = Predictor(config, setting).training(asked).peak_bytes
    base = base_with_random_weights(config, device=torch.device("cpu"), **setting.of_base())
    model: Any = setting.attached_to(base).train()
    peaks = []
    for pack in (packed_rows, PACK, None):
        batch = Collator(Pad(), pack=pack)(examples)
        assert ("attention_mask" in batch) == (pack is None)
        own = [*model.parameters(), *model.buffers(), *batch.values()]
        attention = within_examples() if pack is PACK else nullcontext()
        with attention, track("cpu", model=model) as counted:
            others = counted.current_bytes - sum(each.nbytes for each in own)  # of other tests
            loss = model(**batch).loss
            loss.backward()
            del loss
        model.zero_grad()
        counted.end()
        peaks.append(counted.peak_bytes - others)
    assert peaks[1] < peaks[0] < peaks[2]
    assert peaks[0] <= with_margin(predicted)
