"""Choices that share their prompt: each gets what it gets alone, unpadded and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

import lowmem_reft as lr
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.methods.choices import (
    Shared,
    choices_log_likelihood,
    continues_from_cache,
    shared_log_likelihood,
)
from lowmem_reft.methods.virtual_tokens import take_prefix_as_cache
from lowmem_reft.reft.lora_reft import LoraReftConfig
from tiny_models import ARCHITECTURES, SIZES

EOS = 2
ROWS: list[tuple[list[int], list[list[int]]]] = [
    ([11, 12, 13], [[5], [6], [7]]),  # one token each
    ([21, 22, 23, 24, 25, 26, 27, 28, 29], [[8], [9, 10, 11], [12, 13]]),
    ([31, 32, 33, 34, 35], [[20, 21, 22, EOS], [20, 21, 23, EOS], [20, 24, 25, 26, EOS]]),
    ([41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54], [[30, 31], [30, 32]]),
    ([61, 62], [[40, 41, 42]]),  # nothing to choose from
    ([71, 72, 73, 74], [[50, EOS], [51, 52, EOS], [51, 53, EOS], [54, 55, 56, 57, 58, EOS]]),
]
WINDOW = {**SIZES, "sliding_window": 4}
LOCAL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 4,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
KINDS: dict[str, dict[str, Any]] = {
    **{kind: ARCHITECTURES[kind] for kind in ("llama", "qwen3", "gpt2", "gpt_neox")},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "mistral": WINDOW,
    "gpt_neo": LOCAL,
}
REFT: dict[str, dict[str, Any]] = {
    "all": {"positions": "all"},
    "f2+l2": {"positions": "f2+l2", "tie": "positions"},
    "l1+response": {"positions": "l1+response"},
    "l1+response, apart": {"positions": "l1+response", "tie": "sides"},
    "f2+l2+response, apart": {"positions": "f2+l2+response", "tie": "positions"},
    "every": {"positions": "every"},
    "every, apart": {"positions": "every", "tie": "sides"},
    "response": {"positions": "response"},
    "red": {"intervention": "red", "positions": "every"},
    "bottleneck": {
        "intervention": "bottleneck",
        "positions": "response",
        "component": "mlp_output",
    },
}
MODULES = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}
LINEAR = ["q_proj", "v_proj"]


def base_of_kind(kind: str = "llama") -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    config.initializer_range = 0.2
    return base_with_random_weights(
        config, device=torch.device("cpu"), storage="fp32", compute_dtype=torch.float32
    )


def adapted(config: Any, kind: str = "llama") -> Any:
    """Return a tiny model under a random adapter; None adapts nothing."""
    base = base_of_kind(kind)
    if config is None:
        return base.eval()
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)
    use_chunked_loss(model)
    return model.eval()


def reft(name: str, kind: str = "llama") -> Any:
    fields = {"rank": 3, "layers": [1, 3], **REFT[name]}
    if fields.get("intervention") == "red":
        del fields["rank"]
    return adapted(lr.ReftConfig(task_type="CAUSAL_LM", **fields), kind)


def examples_of(prompt: list[int], choices: list[list[int]]) -> list[dict[str, Any]]:
    return [
        {"input_ids": prompt + choice, "labels": [-100] * len(prompt) + choice}
        for choice in choices
    ]


@torch.no_grad()
def is_greedy(model: Any, prompt: list[int], choice: list[int]) -> bool:
    """Tell whether a model that always takes the likeliest token would write the choice."""
    ids = torch.tensor([prompt + choice])
    labels = torch.tensor([[-100] * len(prompt) + choice])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
    return bool((logits[0, len(prompt) - 1 : -1].argmax(-1) == ids[0, len(prompt) :]).all())


@torch.no_grad()
def alone(model: Any, prompt: list[int], choice: list[int]) -> float:
    """Score a choice by all logits of its own sequence, as one that is trained on."""
    ids = torch.tensor([prompt + choice])
    labels = torch.tensor([[-100] * len(prompt) + choice])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
    # Trained tokens in front lengthen them.
    log_probs = logits[0, -ids.shape[1] :].double().log_softmax(-1)[len(prompt) - 1 : -1]
    return float(log_probs[torch.arange(len(choice)), choice].sum())


def check(model: Any, rows: Any = None, *, batch_size: int = 4) -> None:
    rows = ROWS if rows is None else rows
    found = choices_log_likelihood(
        model, [examples_of(*row) for row in rows], Padding(), batch_size=batch_size
    )
    wanted = [[alone(model, prompt, choice) for choice in choices] for prompt, choices in rows]
    assert [[count for _, count in row] for row in found] == [
        [len(choice) for choice in choices] for _, choices in rows
    ]
    for got, expected in zip(found, wanted, strict=True):
        assert [total for total, _ in got] == pytest.approx(expected, rel=1e-5, abs=1e-5)


class Padding:
    """A tokenizer whose padding is a token of the vocabulary."""

    pad_token_id = EOS


class Tokens:
    """Counts the sequences and the tokens that go through a module."""

    def __init__(self, module: nn.Module) -> None:
        self.passes: list[tuple[int, ...]] = []
        module.register_forward_hook(lambda _, args, output: self.passes.append(args[0].shape))


def embedding(model: Any) -> nn.Module:
    found: nn.Module = model.get_input_embeddings()
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("name", REFT)
def test_choices_get_what_each_gets_alone_whatever_is_edited(name: str, batch_size: int) -> None:
    model = reft(name)
    assert continues_from_cache(model)
    check(model, batch_size=batch_size)


@pytest.mark.parametrize("name", ["f2+l2", "l1+response, apart", "every"])
@pytest.mark.parametrize("kind", KINDS)
def test_choices_get_what_each_gets_alone_with_windows_and_absolute_positions(
    kind: str, name: str
) -> None:
    model = reft(name, kind)
    assert continues_from_cache(model)
    check(model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", ["base", "lora", "ia3", "prefix", "prompt"])
def test_choices_get_what_each_gets_alone_with_methods_of_peft(method: str, kind: str) -> None:
    modules = MODULES.get(kind, LINEAR)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    configs = {
        "base": None,
        "lora": LoraConfig(r=2, target_modules=modules, **common),
        "ia3": IA3Config(target_modules=modules, feedforward_modules=[], **common),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, **common),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, **common),
    }
    model = adapted(configs[method], kind)
    if method == "prefix":
        take_prefix_as_cache(model)
    assert continues_from_cache(model) == (method in ("base", "lora", "ia3"))
    # A prefix of PEFT's stands in front of the padding, which moves it out of a short window.
    check(model, batch_size=1 if (method, kind) == ("prefix", "gemma2") else 4)


def test_choices_of_a_head_that_is_not_recognized_get_the_same() -> None:
    model = reft("l1+response")
    model.get_base_model().lm_head.weight.requires_grad_(True)  # as if it were trained
    check(model)


def test_a_base_in_place_of_its_adapter_is_scored_as_the_base() -> None:
    model = reft("every")
    rows = [examples_of(*row) for row in ROWS]
    with model.disable_adapter():
        found = choices_log_likelihood(model, rows, Padding(), batch_size=4)
    base = base_of_kind().eval()
    assert found == choices_log_likelihood(base, rows, Padding(), batch_size=4)


def test_a_prompt_without_a_token_and_a_choice_without_one_are_scored_whole() -> None:
    model = reft("every")
    rows = [examples_of([], [[5, 6], [7, 8]]), examples_of([11, 12], [[5]]), *[
        examples_of(*row) for row in ROWS[:2]
    ]]  # fmt: skip
    found = choices_log_likelihood(model, rows, Padding(), batch_size=4)
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        logits = model(input_ids=ids, labels=ids).logits.double().log_softmax(-1)
    # Nothing tells of a first token.
    assert found[0][0] == (pytest.approx(float(logits[0, 0, 6]), rel=1e-5), 2)
    assert found[1][0][0] == pytest.approx(alone(model, [11, 12], [5]), rel=1e-5)


def test_a_prompt_is_read_once_for_all_choices() -> None:
    model = reft("l1+response")
    seen = Tokens(embedding(model))
    choices_log_likelihood(model, [examples_of(*ROWS[0])], Padding(), batch_size=4)
    assert seen.passes == [(1, 3)]


def test_longer_choices_are_read_behind_it_and_the_last_token_of_none() -> None:
    model = reft("l1+response")
    seen = Tokens(embedding(model))
    choices_log_likelihood(model, [examples_of(*ROWS[1])], Padding(), batch_size=4)
    assert seen.passes == [(1, 9), (2, 2)]
    seen.passes.clear()
    choices_log_likelihood(model, [examples_of(*ROWS[2])], Padding(), batch_size=4)
    assert seen.passes == [(1, 6), (3, 3)]


@pytest.mark.parametrize("is_recognized", [True, False])
def test_a_choice_is_greedy_where_every_token_is_the_most_likely_one(is_recognized: bool) -> None:
    model = reft("l1+response")
    model.get_base_model().lm_head.weight.requires_grad_(not is_recognized)
    wanted = []
    rows = []
    for prompt, choices in ROWS:
        written = [*prompt]
        for _ in range(4):
            ids = torch.tensor([written])
            mask = torch.tensor([[0] * (len(prompt)) + [1] * (len(written) - len(prompt))]) - 1
            # Positions 'l1+response': the last prompt token and every new one are edited.
            mask[0, len(prompt) - 1] = 0
            with torch.no_grad():
                logits = model(input_ids=ids, intervention_mask=mask).logits
            written.append(int(logits[0, -1].argmax()))
        best = written[len(prompt) :]
        # Of one token, of four, and two that part from the best at the first and at the last.
        choices = [best[:1], best, [*best[:3], (best[3] + 1) % 50], [(best[0] + 1) % 50, *best[1:]]]
        rows.append(Shared.of(prompt, choices))
        wanted.append([is_greedy(model, prompt, choice) for choice in choices])
        assert wanted[-1] == [True, True, False, False]
    found = shared_log_likelihood(model, rows, Padding(), batch_size=4)
    assert [[greedy for _, greedy in row] for row in found] == wanted


START = [70, 71, 72, 73, 74, 75, 76, 77, 78, 79]
BEGUN = [(START + prompt, choices) for prompt, choices in ROWS]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("name", REFT)
def test_what_prompts_begin_with_is_read_once_whatever_is_edited(
    name: str, batch_size: int
) -> None:
    model = reft(name)
    check(model, BEGUN, batch_size=batch_size)
    seen = Tokens(embedding(model))
    choices_log_likelihood(
        model, [examples_of(*row) for row in BEGUN], Padding(), batch_size=batch_size
    )
    assert seen.passes[0] == (1, len(START))
    assert max(length for _, length in seen.passes[1:]) == 15  # a prompt of 14, and what is common


@pytest.mark.parametrize("name", ["f2+l2", "every, apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_prompts_begin_with_is_read_once_with_absolute_positions_and_not_with_windows(
    kind: str, name: str
) -> None:
    model = reft(name, kind)
    check(model, BEGUN)
    seen = Tokens(embedding(model))
    choices_log_likelihood(model, [examples_of(*row) for row in BEGUN], Padding(), batch_size=4)
    assert (seen.passes[0] == (1, len(START))) == (KINDS[kind] not in (WINDOW, LOCAL))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_prompts_begin_with_is_read_once_with_lora_and_without_an_adapter(kind: str) -> None:
    modules = MODULES.get(kind, LINEAR)
    fan_in = kind == "gpt2"
    lora = LoraConfig(r=2, target_modules=modules, fan_in_fan_out=fan_in, task_type="CAUSAL_LM")
    for config in (None, lora):
        check(adapted(config, kind), BEGUN)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(("kind", "fields"), [
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    ("llama", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 16,
    }),
])  # fmt: skip
def test_keys_that_a_longer_row_would_have_otherwise_are_not_shared(
    kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, kind, {**SIZES, **fields})
    model = adapted(None, kind)
    # A prompt of 11 tokens and one of 24, which only its choices bring beyond 16 with the first.
    check(model, [BEGUN[0], BEGUN[3]], batch_size=1)
    prompt, choices = [*START, 91, 92, 93, 94, 95], [[5, 6, 7], [8, 9, 10]]
    check(model, [(prompt, choices)], batch_size=1)
    assert continues_from_cache(model, 16)
    check(model, [BEGUN[0], (START, [[5, 6], [7, 8]])], batch_size=1)


@pytest.mark.parametrize("is_recognized", [True, False])
def test_of_tokens_that_are_as_likely_one_is_greedy(is_recognized: bool) -> None:
    model = reft("l1+response").get_base_model()
    head = model.lm_head.weight
    head.requires_grad_(not is_recognized)
    prompt = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        best = int(model(input_ids=prompt).logits[0, -1].argmax())
        other = best + 1 if best < 255 else best - 1
        head[other] = head[best]
        first = int(model(input_ids=prompt).logits[0, -1].argmax())
    rows = [Shared.of([11, 12, 13], [[best], [other]])]
    (found,) = shared_log_likelihood(model, rows, Padding(), batch_size=4)
    assert [greedy for _, greedy in found] == [best == first, other == first]


def test_what_prompts_begin_with_is_read_once_under_lora_and_reft_together() -> None:
    model = adapted(LoraReftConfig(task_type="CAUSAL_LM", r=2, target_modules=LINEAR))
    check(model, BEGUN)
    with model.disable_adapter():
        check(model, BEGUN)


def test_what_prompts_begin_with_is_read_once_under_several_adapters() -> None:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "rank": 2, "positions": "f2+l2"}
    model = adapted(lr.ReftConfig(layers=[1], **common))
    model.add_adapter("other", lr.ReftConfig(layers=[2, 3], **common))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.4)
    check(model.eval(), BEGUN)


def test_a_beginning_ends_where_rows_are_edited_differently() -> None:
    model = reft("f2+l2")
    # The last two of the shorter prompt lie in what both begin with.
    rows = [(START[:9], [[5], [6]]), ([*START, 40, 41], [[7, 8], [9]])]
    check(model, rows)
    seen = Tokens(embedding(model))
    choices_log_likelihood(model, [examples_of(*row) for row in rows], Padding(), batch_size=4)
    assert all(length != 8 for _, length in seen.passes)  # 7 alike are too few for a pass
    longer = [([*START, 50], [[5], [6]]), ([*START, 50, 40, 41], [[7, 8], [9]])]
    check(model, longer)
    seen.passes.clear()
    choices_log_likelihood(model, [examples_of(*row) for row in longer], Padding(), batch_size=4)
    assert seen.passes[0] == (1, 9)


def test_no_pass_reads_more_sequences_than_a_batch_has() -> None:
    model = reft("l1+response")
    seen = Tokens(embedding(model))
    rows = [examples_of(*row) for row in ROWS]
    choices_log_likelihood(model, rows, Padding(), batch_size=2)
    assert max(batch for batch, _ in seen.passes) == 2


def test_adapters_that_name_the_answer_differently_are_scored_whole() -> None:
    model = reft("every")
    config = lr.ReftConfig(task_type="CAUSAL_LM", rank=3, layers=[1], positions="l1")
    model.add_adapter("other", config)
    assert not continues_from_cache(model)
    check(model)


@pytest.mark.parametrize(("kind", "fields"), [
    ("mamba", {"vocab_size": 256, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}),
    ("lfm2", {**SIZES, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
])  # fmt: skip
@pytest.mark.filterwarnings(
    "ignore:.*fallback.*", "ignore:.*is falling back.*", "ignore:Defining your `__torch_function__`"
)
def test_recurrent_states_are_not_gone_on_from(
    kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, kind, fields)
    model = adapted(None, kind)
    assert not continues_from_cache(model)
    check(model, [(prompt, choices) for prompt, choices in ROWS])
