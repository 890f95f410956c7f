"""The loss on supervised tokens only against cross-entropy on the full logits in float64."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lowmem_reft import InputError
from lowmem_reft.base import loss, products
from lowmem_reft.base.loss import (
    Head,
    chunked_cross_entropy,
    find_head,
    supervised_head_arguments,
    use_chunked_loss,
)
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.reft.config import ReftConfig

VOCAB, HIDDEN = 97, 32
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=3.0),
    "granite": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "cohere": lambda: transformers.CohereConfig(**GROUPED, logit_scale=0.3),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(**COMMON, **GPT2_DROPOUT),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "opt": lambda: transformers.OPTConfig(
        **COMMON, ffn_dim=48, word_embed_proj_dim=HIDDEN, dropout=0.0
    ),
}
HEADS = {  # (bias, scale, softcap), as the models' own code has them
    "llama": (False, 1.0, None),
    "gemma2": (False, 1.0, 3.0),
    "granite": (False, 1 / 3, None),
    "cohere": (False, 0.3, None),
    "phi": (True, 1.0, None),
    "gpt2": (False, 1.0, None),
    "gpt_neox": (False, 1.0, None),
    "opt": (False, 1.0, None),
}
METHODS = ["reft", "lora"]

# Lengths of the three examples and of their supervised ends.
LENGTHS, SUPERVISED, SEQ = (12, 9, 7), (5, 2, 4), 12


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():  # at the usual 0.02 so small a model hardly reacts to its input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def adapt(base: Any, method: str) -> Any:
    torch.manual_seed(1)
    if method == "reft":
        return get_peft_model(
            base, ReftConfig(task_type="CAUSAL_LM", rank=2, positions="f2+l2", init="paper")
        ).train()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    return get_peft_model(base, config).train()


def make_batch(side: str = "right") -> dict[str, Tensor]:
    """Return three examples of unequal length with a supervised end each, padded on ``side``."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(3, SEQ, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (length, supervised) in enumerate(zip(LENGTHS, SUPERVISED, strict=True)):
        end = length if side == "right" else SEQ
        ids[row, end - length : end] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, end - length : end] = 1
        labels[row, end - supervised : end] = ids[row, end - supervised : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def embedded(base: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with a leaf of embeddings instead of ids."""
    embeds = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return {
        "inputs_embeds": embeds,
        "attention_mask": batch["attention_mask"],
        "labels": batch["labels"],
    }


def reference_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the summed cross-entropy, the logits of a token predicting the next label."""
    return F.cross_entropy(
        logits.double()[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=smoothing,
    )


def gradients(model: nn.Module) -> Tensor:
    """Return the gradients of all trained parameters as one vector, and clear them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    model.zero_grad()
    return torch.cat([grad.flatten() for grad in grads]).double()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Compare in the L2 norm, relative to what is wanted."""
    wanted = wanted.detach().double()
    error = (found.detach().double() - wanted).norm() / wanted.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


# The head by itself.

HEAD_KINDS = {
    "plain": (False, 1.0, None),
    "biased": (True, 1.0, None),
    "scaled": (False, 0.3, None),
    "capped": (False, 1.0, 2.0),
    "biased_scaled_capped": (True, 1.7, 4.0),
}
NUM_TOKENS = 17


def random_head(kind: str, dtype: torch.dtype = torch.float32) -> Head:
    biased, scale, softcap = HEAD_KINDS[kind]
    weight, bias = torch.randn(VOCAB, HIDDEN).to(dtype), torch.randn(VOCAB).to(dtype)
    return Head(weight, bias if biased else None, scale, softcap)


def reference_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the logits of the equation in ``Head``, in float64."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def random_hidden(
    tokens: int = NUM_TOKENS, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    hidden = (0.3 * torch.randn(tokens, HIDDEN)).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCAB, (tokens,))


@pytest.mark.parametrize("chunk_tokens", [1, 4, NUM_TOKENS, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_value_and_gradient_of_the_head_are_those_of_float64(
    kind: str, smoothing: float, chunk_tokens: int
) -> None:
    head, (hidden, targets) = random_head(kind), random_hidden()
    wanted = F.cross_entropy(
        reference_logits(hidden, head), targets, reduction="sum", label_smoothing=smoothing
    )
    (wanted_gradient,) = torch.autograd.grad(wanted, hidden)
    found = chunked_cross_entropy(
        hidden, head, targets, label_smoothing=smoothing, chunk_bytes=4 * VOCAB * chunk_tokens
    )
    found.backward()
    assert_close(found, wanted, 1e-6)
    assert_close(hidden.grad, wanted_gradient, 1e-6)


@pytest.mark.parametrize("rows", [1, 7, VOCAB])
def test_logits_are_the_same_in_parts_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(products, "PART_ROWS", rows)
    hidden, weight = torch.randn(5, HIDDEN), torch.randn(VOCAB, HIDDEN)
    assert_close(
        products.linear_in_parts(hidden, weight), hidden.double() @ weight.double().T, 1e-6
    )


def test_a_chunk_of_less_than_one_token_is_one_token() -> None:
    head, (hidden, targets) = random_head("plain"), random_hidden()
    found = chunked_cross_entropy(hidden, head, targets, chunk_bytes=1)
    wanted = F.cross_entropy(reference_logits(hidden, head), targets, reduction="sum")
    assert_close(found, wanted, 1e-6)


def test_logits_of_a_thousand_overflow_nowhere() -> None:
    head, (hidden, targets) = random_head("plain"), random_hidden()
    hidden = (1000 * hidden).detach().requires_grad_()
    found = chunked_cross_entropy(hidden, head, targets)
    found.backward()
    wanted = F.cross_entropy(reference_logits(hidden, head), targets, reduction="sum")
    assert wanted > 10_000
    assert_close(found, wanted, 1e-6)
    assert hidden.grad.isfinite().all()


def test_the_gradient_follows_the_factor_of_the_loss_and_can_be_asked_for_twice() -> None:
    head, (hidden, targets) = random_head("biased_scaled_capped"), random_hidden()
    value = 0.37 * chunked_cross_entropy(hidden, head, targets, chunk_bytes=4 * VOCAB * 5)
    (first,) = torch.autograd.grad(value, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(value, hidden)
    wanted = 0.37 * F.cross_entropy(reference_logits(hidden, head), targets, reduction="sum")
    assert_close(first, torch.autograd.grad(wanted, hidden)[0], 1e-6)
    assert torch.equal(first, second)


def test_hidden_vectors_without_a_gradient_give_the_same_value_and_no_graph() -> None:
    head, (hidden, targets) = random_head("capped"), random_hidden()
    with_graph = chunked_cross_entropy(hidden, head, targets)
    without = chunked_cross_entropy(hidden.detach(), head, targets)
    assert torch.equal(with_graph, without)
    assert not without.requires_grad


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_label_smoothing_that_is_no_share_is_refused(smoothing: float) -> None:
    head, (hidden, targets) = random_head("plain"), random_hidden()
    with pytest.raises(InputError, match=r"label_smoothing must be in \[0, 1\), got"):
        chunked_cross_entropy(hidden, head, targets, label_smoothing=smoothing)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_16_bit_head_gives_an_fp32_loss_and_a_16_bit_gradient(kind: str) -> None:
    head, (hidden, targets) = (
        random_head(kind, torch.bfloat16),
        random_hidden(dtype=torch.bfloat16),
    )
    found = chunked_cross_entropy(hidden, head, targets, chunk_bytes=4 * VOCAB * 5)
    found.backward()
    wanted = F.cross_entropy(reference_logits(hidden, head), targets, reduction="sum")
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert_close(found, wanted, 1e-2)
    assert_close(hidden.grad, torch.autograd.grad(wanted, hidden)[0], 1e-2)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["plain", "biased"])
def test_parity_with_torchs_own_linear_cross_entropy(kind: str, chunked: bool) -> None:
    head, (hidden, targets) = random_head(kind), random_hidden(64)
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    theirs = F.linear_cross_entropy(
        hidden,
        head.weight,
        targets,
        linear_bias=head.bias,
        reduction="sum",
        label_smoothing=0.0,
        options=options,
    )
    (their_gradient,) = torch.autograd.grad(theirs, hidden)
    ours = chunked_cross_entropy(hidden, head, targets, chunk_bytes=4 * VOCAB * 7)
    assert_close(ours, theirs, 1e-6)
    assert_close(torch.autograd.grad(ours, hidden)[0], their_gradient, 1e-6)


class VocabularyShapes(TorchDispatchMode):
    """Records the shapes of all tensors that operators return with the vocabulary as last axis."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[-1] == VOCAB:
                is_view_of_weight = leaf.data_ptr() == self.weight.data_ptr()
                if not is_view_of_weight:
                    self.shapes.append(tuple(leaf.shape))
        return out


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_no_logits_beyond_a_chunk_are_ever_formed(kind: str) -> None:
    head, (hidden, targets) = random_head(kind), random_hidden()
    with VocabularyShapes(head.weight) as recorded:
        chunked_cross_entropy(
            hidden, head, targets, label_smoothing=0.1, chunk_bytes=4 * VOCAB * 5
        ).backward()
    assert {shape[0] for shape in recorded.shapes} == {5, 2}  # 17 = 5 + 5 + 5 + 2


# Models.


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_of_a_known_architecture_is_described_as_its_code_has_it(name: str) -> None:
    base = tiny(name)
    head = find_head(base)
    assert head is not None
    assert head.weight is base.get_output_embeddings().weight
    assert (head.bias is not None, pytest.approx(head.scale), head.softcap) == HEADS[name]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_float64_on_the_models_full_logits(
    name: str, method: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny(name)
    model, batch = adapt(base, method), embedded(base, make_batch(side))
    embeds = batch["inputs_embeds"]
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / sum(SUPERVISED)
    wanted.backward()
    wanted_gradients, wanted_input_gradient, embeds.grad = gradients(model), embeds.grad, None

    in_chunks_of(4, monkeypatch)
    assert use_chunked_loss(model) is not None
    out = model(**batch)
    out.loss.backward()
    assert "logits" not in out
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, wanted, 1e-6)
    assert_close(embeds.grad, wanted_input_gradient, 1e-5)
    assert_close(gradients(model), wanted_gradients, 1e-5)


def in_chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(chunked_cross_entropy, chunk_bytes=4 * VOCAB * tokens)
    monkeypatch.setattr(loss, "chunked_cross_entropy", small)


@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_smoothing_and_number_of_items_are_those_of_cross_entropy(
    name: str, smoothing: float, num_items: Any
) -> None:
    model, batch = adapt(tiny(name), "lora"), make_batch()
    total = reference_loss(model(**batch).logits, batch["labels"], smoothing=smoothing)
    wanted = total / (sum(SUPERVISED) if num_items is None else num_items)
    wanted.backward()
    wanted_gradients = gradients(model)
    use_chunked_loss(model, label_smoothing=smoothing)
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    found = model(**batch, **extra).loss
    found.backward()
    assert_close(found, wanted, 1e-6)
    assert_close(gradients(model), wanted_gradients, 1e-5)


def test_ignored_labels_inside_the_response_do_not_count() -> None:
    model, batch = adapt(tiny("llama"), "lora"), make_batch()
    batch["labels"][0, 9] = batch["labels"][2, 4] = -100
    batch["labels"][1, 0] = 5  # the first token has nothing before it that could predict it
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / (sum(SUPERVISED) - 2)
    use_chunked_loss(model)
    assert_close(model(**batch).loss, wanted, 1e-6)


def test_a_batch_without_supervised_tokens_has_no_mean_as_in_torch() -> None:
    model, batch = adapt(tiny("llama"), "lora"), make_batch()
    batch["labels"].fill_(-100)
    assert model(**batch).loss.isnan()
    use_chunked_loss(model)
    assert model(**batch).loss.isnan()


@pytest.mark.parametrize("method", METHODS)
def test_no_logits_beyond_a_chunk_are_formed_in_a_training_step(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = adapt(tiny("gemma2"), method), make_batch()
    head = use_chunked_loss(model)
    in_chunks_of(4, monkeypatch)
    with VocabularyShapes(head.weight) as recorded:
        model(**batch).loss.backward()
    assert {shape[0] for shape in recorded.shapes} == {4, 3}  # 11 = 4 + 4 + 3


def test_the_loss_of_a_bf16_model_is_fp32_and_within_its_rounding() -> None:
    model, batch = adapt(tiny("llama").bfloat16(), "lora"), make_batch()
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / sum(SUPERVISED)
    wanted.backward()
    wanted_gradients = gradients(model)
    assert use_chunked_loss(model) is not None
    found = model(**batch).loss
    found.backward()
    assert found.dtype == torch.float32
    assert_close(found, wanted, 1e-3)
    assert_close(gradients(model), wanted_gradients, 3e-2)


def test_under_autocast_the_loss_is_fp32_and_within_the_rounding_of_16_bit() -> None:
    model, batch = adapt(tiny("llama"), "lora"), make_batch()
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / sum(SUPERVISED)
    use_chunked_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch).loss
    found.backward()
    assert found.dtype == torch.float32
    assert_close(found, wanted, 2e-2)
    assert gradients(model).isfinite().all()


class GradientAtStep(TrainerCallback):
    """Keeps the gradients with which the Trainer takes its first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters]).double()


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_in_the_trainer_gives_the_gradient_of_one_large_batch(
    method: str, tmp_path: Path
) -> None:
    model, batch = adapt(tiny("llama"), method), make_batch()
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / sum(SUPERVISED)
    wanted.backward()
    wanted_gradients = gradients(model)
    use_chunked_loss(model)
    examples = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    for batch_size in (1, 3):
        watch = GradientAtStep()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=3 // batch_size,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
            optim="sgd",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[watch]).train()
        assert_close(watch.gradient, wanted_gradients, 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_and_calls_without_labels_are_left_as_they_are(name: str) -> None:
    model, batch = adapt(tiny(name), "lora"), make_batch()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    trained, evaluated = model(**inputs).logits, model.eval()(**batch)
    use_chunked_loss(model)
    again = model(**batch)
    assert torch.equal(again.logits, evaluated.logits)
    assert torch.equal(again.loss, evaluated.loss)
    assert torch.equal(model.train()(**inputs).logits, trained)


def test_the_signature_that_trainers_and_tuners_read_stays() -> None:
    base = tiny("llama")
    before = inspect.signature(base.forward)
    use_chunked_loss(base)
    assert inspect.signature(base.forward) == before


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_can_be_put_on_afterwards_and_input_be_positional(method: str) -> None:
    batch = make_batch()
    ids = batch.pop("input_ids")
    model = adapt(tiny("llama"), method)
    wanted = reference_loss(model(ids, **batch).logits, batch["labels"]) / sum(SUPERVISED)
    base = tiny("llama")
    use_chunked_loss(base)
    later = adapt(base, method)
    assert_close(later.get_base_model()(ids, **batch).loss, wanted, 1e-6)


def test_switching_it_on_again_replaces_the_smoothing() -> None:
    model, batch = adapt(tiny("gemma2"), "lora"), make_batch()
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / sum(SUPERVISED)
    use_chunked_loss(model, label_smoothing=0.5)
    use_chunked_loss(model)
    assert_close(model(**batch).loss, wanted, 1e-6)


def test_a_deep_copy_computes_with_its_own_parameters() -> None:
    model, batch = adapt(tiny("llama"), "reft"), make_batch()
    use_chunked_loss(model)
    twin = copy.deepcopy(model)
    before = model(**batch).loss
    assert torch.equal(twin(**batch).loss, before)
    with torch.no_grad():
        twin.get_base_model().lm_head.weight.mul_(2)
    assert not torch.equal(twin(**batch).loss, before)
    assert torch.equal(model(**batch).loss, before)


# Models whose head is not a frozen linear layer that is known.


def with_trained_head(base: Any) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_lora_weights=False,
        modules_to_save=["lm_head"],
    )
    return get_peft_model(base, config).train()


def with_adapted_head(base: Any) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False
    )
    return get_peft_model(base, config).train()


def with_unfrozen_base(base: Any) -> Any:
    return base.requires_grad_(True).train()


def with_unknown_arithmetic(base: Any) -> Any:
    """Change what the model does after its head, which the proof by a probe must notice."""
    plain = base.forward

    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out["logits"] = out.logits + 0.1 * out.logits.sin()
        if labels is not None:
            out["loss"] = base.loss_function(out.logits, labels, VOCAB, **kwargs)
        return out

    forward.__signature__ = inspect.signature(plain)
    base.forward = forward
    return adapt(base, "lora")


UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "trained_head": with_trained_head,
    "adapted_head": with_adapted_head,
    "unfrozen_base": with_unfrozen_base,
    "unknown_arithmetic": with_unknown_arithmetic,
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_model_with_another_head_keeps_its_loss_on_supervised_positions(kind: str) -> None:
    model, batch = UNKNOWN[kind](tiny("llama")), make_batch()
    wanted = reference_loss(model(**batch).logits, batch["labels"]) / sum(SUPERVISED)
    wanted.backward()
    wanted_gradients = gradients(model)
    assert use_chunked_loss(model) is None
    out = model(**batch)
    out.loss.backward()
    kept = int((batch["labels"][:, 1:] != -100).any(0).sum())
    assert kept < SEQ
    assert out.logits.shape == (3, kept, VOCAB)
    assert_close(out.loss, wanted, 1e-6)
    assert_close(gradients(model), wanted_gradients, 1e-5)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_label_smoothing_is_refused_for_a_model_with_another_head(kind: str) -> None:
    model = UNKNOWN[kind](tiny("llama"))
    with pytest.raises(InputError, match=r"label_smoothing must be 0 for LlamaForCausalLM.*0\.1"):
        use_chunked_loss(model, label_smoothing=0.1)


def test_label_smoothing_is_refused_when_the_head_is_trained_later() -> None:
    base, batch = tiny("llama"), make_batch()
    use_chunked_loss(base, label_smoothing=0.1)
    model = with_trained_head(base)
    with pytest.raises(InputError, match="label_smoothing must be 0 for LlamaForCausalLM"):
        model(**batch)


def test_a_head_that_is_trained_later_gets_its_gradient() -> None:
    base, batch = tiny("llama"), make_batch()
    use_chunked_loss(base)
    model = with_trained_head(base)
    model(**batch).loss.backward()
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.grad.norm() > 0


def test_a_head_deep_inside_the_model_is_not_known() -> None:
    config = transformers.BertConfig(**COMMON, is_decoder=True)
    base = transformers.BertLMHeadModel(config).requires_grad_(False)
    assert find_head(base) is None


def test_a_model_with_a_loss_of_its_own_keeps_it() -> None:
    base, batch = tiny("llama"), make_batch()
    base.loss_function = lambda logits, labels, vocab_size, **_: logits.pow(2).mean()
    model = adapt(base, "lora")
    wanted = model(**batch)
    assert use_chunked_loss(model) is None
    out = model(**batch)
    assert torch.equal(out.loss, wanted.loss)
    assert out.logits.shape == (3, SEQ, VOCAB)


# Scoring.


def own_log_likelihoods(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return float64 sums over supervised tokens of the full logits, each example unpadded."""
    sums = []
    for row, supervised in enumerate(SUPERVISED):
        attended = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row, attended][None]
        prompt = torch.arange(ids.shape[1])[None] < ids.shape[1] - supervised
        extra = {"prompt_mask": prompt.long()} if hasattr(model, "peft_config") else {}
        log_probs = model(input_ids=ids, **extra).logits.double().log_softmax(-1)
        picked = log_probs[0, :-1].gather(1, ids[0, 1:, None])[-supervised:]
        sums.append(picked.sum())
    return torch.stack(sums)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_likelihoods_are_those_of_float64_on_full_logits(
    name: str, adapted: bool, chunk_tokens: int
) -> None:
    base = tiny(name)
    model = (adapt(base, "reft") if adapted else base).eval()
    batch = make_batch("left")
    with torch.no_grad():
        wanted = own_log_likelihoods(model, batch)
    sums, counts = response_log_likelihood(model, batch, chunk_bytes=4 * VOCAB * chunk_tokens)
    torch.testing.assert_close(sums.double(), wanted, rtol=2e-6, atol=0)
    assert counts == list(SUPERVISED)


@pytest.mark.parametrize("kind", ["trained_head", "adapted_head", "unknown_arithmetic"])
def test_log_likelihoods_of_a_model_with_another_head_are_those_of_its_logits(kind: str) -> None:
    model, batch = UNKNOWN[kind](tiny("llama")).eval(), make_batch("left")
    assert find_head(model.get_base_model()) is None
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    wanted = [-reference_loss(logits[row, None], batch["labels"][row, None]) for row in range(3)]
    sums, counts = response_log_likelihood(model, batch)
    torch.testing.assert_close(sums.double(), torch.stack(wanted), rtol=2e-6, atol=0)
    assert counts == list(SUPERVISED)


def test_scoring_forms_no_logits_beyond_a_chunk() -> None:
    model, batch = adapt(tiny("gemma2"), "reft").eval(), make_batch("left")
    head = find_head(model.get_base_model())
    with VocabularyShapes(head.weight) as recorded:
        response_log_likelihood(model, batch, chunk_bytes=4 * VOCAB * 4)
    assert {shape[0] for shape in recorded.shapes} == {4, 3}


def test_scoring_leaves_no_selection_of_positions_behind() -> None:
    model, batch = adapt(tiny("llama"), "reft").eval(), make_batch("left")
    response_log_likelihood(model, batch)
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.get_base_model().model(input_ids=batch["input_ids"])


def test_scoring_changes_no_later_result() -> None:
    model, batch = adapt(tiny("llama"), "lora").eval(), make_batch("left")
    before = model(**batch).logits
    response_log_likelihood(model, batch)
    assert torch.equal(model(**batch).logits, before)


# Logits of supervised positions only.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_items", [None, 40])
def test_loss_on_supervised_positions_is_that_of_the_full_logits(
    method: str, num_items: int | None
) -> None:
    model, batch = adapt(tiny("llama"), method), make_batch()
    extra = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    short = model(**batch, **extra, **supervised_head_arguments(model, batch["labels"]))
    short.loss.backward()
    found = gradients(model)
    total = reference_loss(model(**batch).logits, batch["labels"])
    wanted = total / (num_items or sum(SUPERVISED))
    wanted.backward()
    assert_close(short.loss, wanted, 1e-6)
    assert_close(found, gradients(model), 1e-5)


def test_no_logits_are_formed_for_positions_that_no_example_supervises() -> None:
    model, batch = adapt(tiny("llama"), "reft"), make_batch()
    shapes = []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model(**batch, **supervised_head_arguments(model, batch["labels"]))
    # Labels 3 to 11 are supervised in some example, so positions 2 to 10 predict one.
    assert shapes == [(3, 9, VOCAB)]


def test_a_model_with_a_loss_of_its_own_gets_no_arguments() -> None:
    base, batch = tiny("llama"), make_batch()
    base.loss_function = lambda *args, **kwargs: torch.tensor(0.0)
    assert supervised_head_arguments(base, batch["labels"]) == {}
