"""Edits of the answer's tokens: what is trained with labels is what generation computes.

The reference is a float64 copy of the base without any adapter, whose blocks are edited by a hook
of a few lines, from one pass over all tokens so far.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.caches import with_cache
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.reft import rotation
from lowmem_reft.reft.tuner import prompt_arguments
from tiny_models import ARCHITECTURES

KINDS = ("llama", "gpt2", "qwen3", "gemma")
SPECS = ("every", "l1+response", "f2+l2+response", "response")
LAYERS = (1, 3)
PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24])
NEW = 5
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def adapt(kind: str = "llama", **fields: Any) -> tuple[Any, Any]:
    """Return a tiny model under a random adapter, and a float64 copy of its base alone."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind])
    config.initializer_range = 0.2
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage="fp32", compute_dtype=torch.float32
    )
    exact = copy.deepcopy(base).double().eval()
    wanted = {"rank": 3, "layers": list(LAYERS), "positions": "every", **fields}
    model: Any = get_peft_model(base, lr.ReftConfig(task_type="CAUSAL_LM", **wanted))
    randomize(model)
    base.generation_config.pad_token_id = 0
    return model.eval(), exact


def randomize(model: Any, adapter: str = "default") -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if f".reft_phi.{adapter}." in name:
                tensor.normal_(0, 0.5)


def padded(rows: tuple[list[int], ...] = PROMPTS) -> dict[str, Tensor]:
    """Return prompts as generate takes them: padded on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


def edited(spec: str, num_prompt: int, num_response: int) -> list[bool]:
    """Return which tokens of one example are edited, written down part by part."""
    parts = ("all+response" if spec == "every" else spec).split("+")
    chosen = [False] * num_prompt
    for part in parts:
        if part == "all":
            chosen = [True] * num_prompt
        elif part[0] == "f":
            chosen[: int(part[1:])] = [True] * min(num_prompt, int(part[1:]))
        elif part[0] == "l":
            chosen[-int(part[1:]) :] = [True] * min(num_prompt, int(part[1:]))
    return chosen + ["response" in parts] * num_response


@contextmanager
def edited_where(model: Any, exact: Any, chosen: Tensor | bool) -> Iterator[None]:
    """Let the blocks of ``exact`` return h + Rᵀ(Wh + b − Rh) where ``chosen``, else h."""
    blocks, handles = find_blocks(exact)[1], []
    where = torch.as_tensor(chosen)[..., None]
    for layer in LAYERS:
        (phi,) = find_blocks(model.get_base_model())[1][layer].reft.reft_phi["default"]
        r, w, b = (t.double() for t in (phi.rotation(), phi.source.weight, phi.source.bias))

        def edit(_module: Any, _args: Any, output: Any, r: Any = r, w: Any = w, b: Any = b) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            new = torch.where(where, h + (h @ w.T + b - h @ r.T) @ r, h)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(blocks[layer].register_forward_hook(edit))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference(model: Any, exact: Any, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Return the float64 logits of all tokens, from one pass without a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with edited_where(model, exact, chosen):
        logits: Tensor = exact(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    return logits


def decoded(
    model: Any, exact: Any, spec: str, prompts: tuple[list[int], ...] = PROMPTS
) -> tuple[Tensor, Tensor]:
    """Return the sequences of greedy decoding by the reference, and the logits of each new token.

    Both are (batch, ...) and padded on the left; logits are (batch, new, vocab).
    """
    batch, found = padded(prompts), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for step in range(NEW):
        rows = [
            [False] * (ids.shape[1] - len(p) - step) + edited(spec, len(p), step) for p in prompts
        ]
        logits = reference(model, exact, ids, mask, torch.tensor(rows))[:, -1]
        found.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids, torch.stack(found, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_decoding_gives_the_logits_of_the_reference_and_of_training(kind: str, spec: str) -> None:
    model, exact = adapt(kind, positions=spec)
    ids, logits = decoded(model, exact, spec)
    out = model.generate(**padded(), **GREEDY)
    assert torch.equal(out.sequences, ids)
    assert_close(torch.stack(out.logits, 1), logits)
    labels, mask = ids.clone(), padded()["attention_mask"]
    labels[:, :-NEW] = -100
    mask = torch.nn.functional.pad(mask, (0, NEW), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        forced = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert_close(forced.logits[:, -NEW - 1 : -1], logits)


# Every way to generate.

WAYS: dict[str, dict[str, Any]] = {
    "no_cache": {"use_cache": False},
    "static_cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked_prefill": {"prefill_chunk_size": 3},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": "another"},
    "cache_of_the_caller": {"past_key_values": "empty"},
    "embeddings": {"inputs_embeds": "of the prompt"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_way_to_generate_gives_the_logits_of_the_reference(way: str, spec: str) -> None:
    model, exact = adapt(positions=spec)
    base = model.get_base_model()
    # Candidates are found where something comes again.
    prompts = ([11, 12, 13, 11, 12, 13, 11],) if way == "lookup" else PROMPTS[:1]
    ids, logits = decoded(model, exact, spec, prompts)
    more, inputs = dict(WAYS[way]), padded(prompts)
    if way == "assisted":
        more["assistant_model"] = copy.deepcopy(base)
    if way == "cache_of_the_caller":
        more = with_cache(base, DynamicCache(config=base.config))
    if way == "embeddings":
        more["inputs_embeds"] = base.get_input_embeddings()(inputs.pop("input_ids")).detach()
    out = model.generate(**inputs, **more, **GREEDY)
    assert torch.equal(out.sequences[:, -NEW:], ids[:, -NEW:])
    assert_close(torch.stack(out.logits, 1), logits)


SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "without_a_cache": {"num_beams": 3, "use_cache": False},
    "guided": {"guidance_scale": 1.7},
    "guided_away": {
        "guidance_scale": 1.7,
        "negative_prompt_ids": torch.tensor([[31, 32], [33, 34]]),
    },
    "guided_without_a_cache": {"guidance_scale": 1.7, "use_cache": False},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_goes_as_with_a_base_all_of_whose_vectors_are_edited(search: str) -> None:
    model, exact = adapt()
    exact.generation_config.pad_token_id = 0
    arguments = {**GREEDY, "output_logits": False, **SEARCHES[search]}
    arguments["return_dict_in_generate"] = False
    torch.manual_seed(5)
    found = model.generate(**padded(), **arguments)
    with edited_where(model, exact, True):
        torch.manual_seed(5)
        assert torch.equal(found, exact.generate(**padded(), **arguments))


def test_the_negative_prompt_ends_as_a_prompt_does() -> None:
    model, exact = adapt(positions="l1+response")
    away = [31, 32, 33]
    out = model.generate(
        **padded(PROMPTS[:1]),
        guidance_scale=1.7,
        negative_prompt_ids=torch.tensor([away]),
        **GREEDY,
    )
    new: list[int] = []
    for _ in range(NEW):
        wanted, unwanted = (
            reference(
                model,
                exact,
                torch.tensor([prompt + new]),
                torch.ones(1, len(prompt + new), dtype=torch.long),
                torch.tensor([edited("l1+response", len(prompt), len(new))]),
            )[0, -1].log_softmax(-1)
            for prompt in (PROMPTS[0], away)
        )
        new.append(int((1.7 * (wanted - unwanted) + unwanted).argmax()))
    assert out.sequences[0, -NEW:].tolist() == new


def test_tokens_by_hand_are_edited_one_by_one() -> None:
    model, exact = adapt(positions="l1+response")
    ids, logits = decoded(model, exact, "l1+response", PROMPTS[:1])
    cache = with_cache(model.get_base_model(), DynamicCache(config=model.config))
    found, start = [], 0
    with torch.no_grad():
        for stop in range(len(PROMPTS[0]), ids.shape[1]):
            found.append(model(input_ids=ids[:, start:stop], **cache).logits[:, -1])
            start = stop
    assert_close(torch.stack(found, 1), logits)


def test_parts_by_hand_need_no_names_where_every_token_is_edited_alike() -> None:
    model, exact = adapt()
    ids, _ = decoded(model, exact, "every", PROMPTS[:1])
    cache = with_cache(model.get_base_model(), DynamicCache(config=model.config))
    with torch.no_grad():
        parts = [model(input_ids=part, **cache).logits for part in ids.split([1, 3, 4, 4], 1)]
    ones = torch.ones_like(ids)
    assert_close(torch.cat(parts, 1), reference(model, exact, ids, ones, ones.bool()))
    untied, _ = adapt(tie="sides")
    cache = with_cache(untied.get_base_model(), DynamicCache(config=untied.config))
    untied(input_ids=ids[:, :4], **cache)
    with pytest.raises(InputError, match="prompt or of the answer"):
        untied(input_ids=ids[:, 4:], **cache)


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_rows_of_a_mixed_batch_keep_the_positions_of_their_adapters(way: dict[str, Any]) -> None:
    model, _ = adapt(positions="l1+response")
    for name, positions in (("prompt", "all"), ("whole", "every")):
        config = lr.ReftConfig(task_type="CAUSAL_LM", rank=2, layers="2;4", positions=positions)
        model.add_adapter(name, config)
        randomize(model, name)
    model.eval()
    names = ["whole", "__base__", "default", "prompt"]
    batch = padded(([3, 4, 5], [6, 7, 8, 9], [10, 11], [12, 13, 14]))
    arguments = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **way}
    together = model.generate(**batch, adapter_names=names, **arguments)
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**batch, **arguments)
        else:
            alone = model.generate(**batch, **arguments)
        assert torch.equal(together[row], alone[row])


def test_two_active_adapters_keep_their_positions() -> None:
    model, _ = adapt(positions="l1+response")
    model.add_adapter("prompt", lr.ReftConfig(task_type="CAUSAL_LM", rank=2, positions="all"))
    randomize(model, "prompt")
    model.base_model.set_adapter(["default", "prompt"])
    model.eval()
    assert torch.equal(
        model.generate(**padded(), **GREEDY).sequences,
        model.generate(**padded(), use_cache=False, **GREEDY).sequences,
    )


def test_an_explicit_mask_chooses_of_the_prompt_and_new_tokens_follow_the_positions() -> None:
    chosen = torch.zeros_like(padded()["input_ids"], dtype=torch.bool)
    chosen[:, -1] = True
    model, exact = adapt(positions="every")
    found = model.generate(**padded(), intervention_mask=chosen, **GREEDY).sequences
    assert torch.equal(found, decoded(model, exact, "l1+response")[0])
    model, exact = adapt(positions="all")
    found = model.generate(**padded(), intervention_mask=chosen, **GREEDY).sequences
    assert torch.equal(found, decoded(model, exact, "l1")[0])


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
@pytest.mark.filterwarnings("ignore")  # that fast kernels are not installed
def test_a_recurrent_model_reads_the_same_from_its_state(kind: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    if kind == "rwkv":
        sizes = {**sizes, "attention_hidden_size": 32}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    config = lr.ReftConfig(task_type="CAUSAL_LM", rank=2, positions="l1+response")
    model: Any = get_peft_model(base, config).eval()
    randomize(model)
    ids = torch.tensor([PROMPTS[0]])
    found, expected = (
        torch.stack(model.generate(input_ids=ids, use_cache=use_cache, **GREEDY).logits)
        for use_cache in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_step_is_compiled_anew() -> None:
    model, exact = adapt()
    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    way = {"cache_implementation": "static", "compile_config": compiled}
    found = model.generate(**padded(), **way, **GREEDY).sequences
    assert torch.equal(found, decoded(model, exact, "every")[0])
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1


@pytest.mark.parametrize("fields", [{"positions": "response"}, {"tie": "sides"}])
def test_an_answer_s_rotation_is_made_before_what_is_compiled(fields: dict[str, str]) -> None:
    model, _ = adapt(**fields)
    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.generate(**padded(), cache_implementation="static", compile_config=compiled, **GREEDY)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1


def test_training_inside_a_generation_is_seen_by_its_next_token() -> None:
    model, exact = adapt()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    class Trains(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == len(PROMPTS[0]) + NEW - 1:
                with torch.enable_grad():
                    model.train()
                    model(input_ids=input_ids).logits.square().mean().backward()
                    optimizer.step()
                    model.eval()
            return scores

    ids = torch.tensor([PROMPTS[0]])
    processors = LogitsProcessorList([Trains()])
    ways = {**GREEDY, "max_new_tokens": NEW + 1, "min_new_tokens": NEW + 1, "use_cache": False}
    found = model.generate(ids, logits_processor=processors, **ways)
    told = found.sequences[:, :-1]
    wanted = reference(model, exact, told, torch.ones_like(told), torch.tensor(True))
    torch.testing.assert_close(found.logits[-1].double(), wanted[:, -1], rtol=1e-4, atol=1e-4)


def test_parts_under_a_prepared_mask_are_edited_at_their_own_columns() -> None:
    model, exact = adapt()
    ids, mask = padded().values()
    width, positions = ids.shape[1], (mask.cumsum(1) - 1).clamp(min=0)
    causal = torch.ones(width, width).tril().bool() & mask.bool()[:, None, :]
    causal |= torch.eye(width).bool() & ~mask.bool()[:, None, :]  # padding attends to itself
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, end in ((0, 4), (4, width)):
            parts.append(
                model(
                    input_ids=ids[:, start:end],
                    attention_mask=causal[:, None, start:end, :end],
                    position_ids=positions[:, start:end],
                    **with_cache(model.get_base_model(), cache),
                ).logits
            )
    wanted = reference(model, exact, ids, mask, mask.bool())
    found = torch.cat(parts, 1).double()
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)


def test_every_token_is_edited_whatever_a_prompt_mask_says() -> None:
    model, exact = adapt()
    ids = torch.tensor([PROMPTS[0]])
    said = torch.tensor([[0, 0, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        found = model(input_ids=ids, prompt_mask=said).logits.double()
    wanted = reference(model, exact, ids, torch.ones_like(ids), torch.tensor(True))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="prompt_mask must have the shape"):
        model(input_ids=ids, prompt_mask=said[:, 1:])


class _Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model: Any) -> Counter[str]:
    """Return what is computed for the second new token."""
    cache = with_cache(model.get_base_model(), DynamicCache(config=model.config))
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPTS[0]]), **cache)
        with _Operations() as seen:
            model(input_ids=torch.tensor([[9]]), **cache)
    return seen.counts


def test_a_step_that_edits_gathers_nothing_and_one_that_does_not_computes_nothing_more() -> None:
    edits, _ = adapt()
    with edits.disable_adapter():
        base = operations_of_a_step(edits)
    more = operations_of_a_step(edits) - base
    assert more["aten.mm.default"] + more["aten.addmm.default"] > 0
    assert not [name for name in more if "index" in name or "nonzero" in name]
    assert operations_of_a_step(adapt(positions="all")[0]) == base


def test_a_rotation_is_made_once_in_a_generation_and_anew_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, exact = adapt()
    made: list[Tensor] = []
    plain = rotation.orthonormal_rows
    monkeypatch.setattr(rotation, "orthonormal_rows", lambda raw: (made.append(raw), plain(raw))[1])
    model.generate(**padded(), **GREEDY)
    assert len(made) == len(LAYERS)
    for layer in LAYERS:
        (phi,) = find_blocks(model.get_base_model())[1][layer].reft.reft_phi["default"]
        phi.rotation.raw.data.add_(torch.randn_like(phi.rotation.raw))
    found = model.generate(**padded(), **GREEDY).sequences
    assert torch.equal(found, decoded(model, exact, "every")[0])


# Training.


def labelled(
    rows: list[tuple[list[int], list[int]]], side: str, width: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch of prompts with answers, padded to ``width``, and where its tokens are."""
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        empty = width - len(prompt) - len(answer)
        for name, values, fill in (
            ("input_ids", [*prompt, *answer], 0),
            ("attention_mask", [1] * (len(prompt) + len(answer)), 0),
            ("labels", [*[-100] * len(prompt), *answer], -100),
        ):
            padding = [fill] * empty
            batch[name].append(padding + values if side == "left" else values + padding)
    found = {name: torch.tensor(values) for name, values in batch.items()}
    found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return found, found["attention_mask"].bool()


ROWS = [([11, 12, 13, 14, 15], [51, 52]), ([21, 22, 23], [61, 62, 63, 64])]


def one_by_one(model: Any, exact: Any, spec: str) -> Tensor:
    """Return the reference's logits of all tokens of ``ROWS``, one row after the other."""
    found = []
    for prompt, answer in ROWS:
        ids = torch.tensor([[*prompt, *answer]])
        chosen = torch.tensor([edited(spec, len(prompt), len(answer))])
        found.append(reference(model, exact, ids, torch.ones_like(ids), chosen)[0])
    return torch.cat(found)


@pytest.mark.parametrize("told_by", ["labels", "prompt_mask", "both"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", SPECS)
def test_padding_and_the_way_to_tell_the_prompt_change_nothing(
    spec: str, side: str, told_by: str
) -> None:
    model, exact = adapt(positions=spec)
    batch, attended = labelled(ROWS, side, 9)
    told = prompt_arguments(model, batch["labels"])
    if told_by == "prompt_mask":
        del batch["labels"]
    with torch.no_grad():
        logits = model(**batch, **({} if told_by == "labels" else told)).logits
    assert_close(logits[attended], one_by_one(model, exact, spec))


@pytest.mark.parametrize("spec", SPECS)
def test_packed_samples_are_edited_each_by_itself(spec: str) -> None:
    model, exact = adapt(positions=spec)
    parts = [labelled([row], "right", sum(map(len, row)))[0] for row in ROWS]
    packed = {
        name: torch.cat([part[name] for part in parts], 1)
        for name in ("input_ids", "labels", "position_ids")
    }
    with torch.no_grad():
        assert_close(model(**packed).logits[0], one_by_one(model, exact, spec))


def test_scores_of_choices_edit_the_choices() -> None:
    model, exact = adapt(positions="l1+response")
    batch, _ = labelled(ROWS, "right", 9)
    del batch["position_ids"]
    scores, counts = response_log_likelihood(model, batch)
    expected, start = [], 0
    for (prompt, answer), logits in zip(
        ROWS, one_by_one(model, exact, "l1+response").split([7, 7]), strict=True
    ):
        start = len(prompt) - 1
        each = logits.log_softmax(-1)[start : start + len(answer)]
        expected.append(each[torch.arange(len(answer)), answer].sum())
    assert counts == [2, 4]
    assert_close(scores, torch.stack(expected))


@pytest.mark.parametrize("packed", [False, True])
def test_several_answers_in_one_example_are_trained_at_once_where_all_is_edited_alike(
    packed: bool,
) -> None:
    model, exact = adapt()
    ids = torch.tensor([[11, 12, 13, 51, 52, 21, 22, 61, 62, 63]])
    labels = torch.where(torch.isin(ids, torch.tensor([51, 52, 61, 62, 63])), ids, -100)
    ones = torch.ones_like(ids)
    expected = reference(model, exact, ids, ones, ones.bool())[0]
    if packed:
        arguments = {
            "input_ids": ids.repeat(1, 2),
            "labels": labels.repeat(1, 2),
            "position_ids": torch.arange(10).repeat(2)[None],
        }
        expected = expected.repeat(2, 1)
    else:
        arguments = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        assert_close(model(**arguments).logits[0], expected)
    for fields in ({"positions": "response"}, {"positions": "f1+response"}, {"tie": "sides"}):
        with pytest.raises(InputError, match="edit 'every' token with tie='tied'"):
            adapt(**fields)[0](**arguments)


def test_text_without_a_prompt_trains_what_edits_its_tokens() -> None:
    ids = torch.tensor([[11, 12, 13, 14]])
    for spec in ("every", "response"):
        model, _ = adapt(positions=spec)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        (phi,) = find_blocks(model.get_base_model())[1][1].reft.reft_phi["default"]
        assert float(phi.source.weight.grad.abs().max()) > 0
    for fields in ({"positions": "l1+response"}, {"tie": "sides"}):
        model, _ = adapt(**fields)
        with pytest.raises(InputError, match=r"labels must leave a prompt.* edit 'every' token"):
            model.train()(input_ids=ids, labels=ids)


@pytest.mark.parametrize(("spec", "tie", "wanted"), [
    ("every", "sides", [0, 0, 0, 1, 1]),
    ("l1+response", "sides", [-1, -1, 0, 1, 1]),
    ("f1+l2+response", "sides", [0, 1, 1, 2, 2]),
    ("f1+l2+response", "positions", [0, 1, 2, 3, 3]),
])  # fmt: skip
def test_the_answer_has_parameters_of_its_own_unless_tied(
    spec: str, tie: str, wanted: list[int]
) -> None:
    model, _ = adapt(positions=spec, tie=tie)
    ids = torch.tensor([[11, 12, 13, 51, 52]])
    labels = torch.tensor([[-100, -100, -100, 51, 52]])
    with torch.no_grad():
        by_positions = model(input_ids=ids, labels=labels).logits
        assert torch.equal(
            model(input_ids=ids, intervention_mask=torch.tensor([wanted])).logits, by_positions
        )
        new = model.generate(input_ids=ids[:, :3], **GREEDY)
        whole = torch.tensor([wanted[:3] + wanted[-1:] * NEW])
        forced = model(input_ids=new.sequences, intervention_mask=whole).logits
    torch.testing.assert_close(torch.stack(new.logits, 1), forced[:, 2:-1], rtol=1e-4, atol=1e-4)


# Where there is no answer.


def test_a_classifier_edits_every_token_of_its_text_and_has_no_answer() -> None:
    config = AutoConfig.for_model("llama", **ARCHITECTURES["llama"], num_labels=3)
    ids = torch.tensor([PROMPTS[0]])
    found = []
    for spec in ("every", "all"):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_config(config)
        reft = lr.ReftConfig(task_type="SEQ_CLS", rank=2, layers="2;4", positions=spec)
        model: Any = get_peft_model(base, reft).eval()
        randomize(model)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
    assert torch.equal(*found)
    with pytest.raises(InputError, match="positions must edit the prompt with task_type SEQ_CLS"):
        lr.ReftConfig(task_type="SEQ_CLS", positions="response")
    with pytest.raises(InputError, match="tie must be 'tied' with positions='all'"):
        lr.ReftConfig(task_type="SEQ_CLS", positions="every", tie="sides")
    untold = lr.ReftConfig(positions="response")
    with pytest.raises(InputError, match="positions must edit the prompt of LlamaForSequence"):
        get_peft_model(AutoModelForSequenceClassification.from_config(config), untold)
