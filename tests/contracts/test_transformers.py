"""transformers: blocks, their parts and hooks, checkpointing, signatures, configurations."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from breaking import (
    contract,
    doing_nothing,
    with_result,
    with_value,
    wrapped,
)
from lowmem_reft.machine.contracts.contract import tiny_llama

LLAMA = "transformers.models.llama.modeling_llama:"
GPT2 = "transformers.models.gpt2.modeling_gpt2:"
BERT = "transformers.models.bert.modeling_bert:"
MODEL = "transformers.modeling_utils:PreTrainedModel."

SINCE_5_23 = Version(transformers.__version__) >= Version("5.23.0.dev0")


def of_kind(kind: str, **fields: Any) -> Any:
    """A random causal model of two blocks."""
    common = {"vocab_size": 24, "num_hidden_layers": 2, "pad_token_id": 0, "hidden_size": 16}
    common |= {"num_attention_heads": 2, "intermediate_size": 24, "head_dim": 8}
    common |= {"bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **{**common, **fields})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def enable_checkpoints(model: Any) -> None:
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


# Blocks and what is inside


def _note_call(calls: list[Any], _: Any, args: Any, output: Any) -> None:
    calls.append((args, output))


@contract(
    "transformers",
    used_by="base/blocks.py reft/layer.py base/partial.py",
    broken_by=wrapped(
        f"{GPT2}GPT2Block.__call__",
        lambda call: lambda self, h, *a, **k: nn.Module.__call__(self, hidden_states=h, **k),
    ),
)
def test_blocks_of_other_families_take_and_return_hidden_states_first(breach: bool) -> None:
    for model in (of_kind("gpt2"), of_kind("bert", is_decoder=True)):
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        blocks = next(each for each in lists if len(each) == 2)
        calls: list[Any] = []
        for block in blocks:
            block.register_forward_hook(partial(_note_call, calls))
        model(input_ids=torch.tensor([[1, 2, 3]]))
        for args, output in calls:
            hidden = output[0] if isinstance(output, tuple) else output
            assert [args[0].shape, hidden.shape] == [(1, 3, 16)] * 2
        assert len(calls) == 2


@contract(
    "transformers",
    used_by="base/blocks.py base/techniques.py",
    broken_by=wrapped(
        f"{LLAMA}LlamaDecoderLayer.__init__",
        lambda init: lambda self, *args, **kwargs: _renamed(self, init, *args, **kwargs),
    ),
)
def test_parts_of_blocks_have_the_names_by_which_components_are_found(breach: bool) -> None:
    found = {
        "llama": ("self_attn", "mlp"),
        "gpt2": ("attn", "mlp"),
        "bert": ("attention.output.dense", "output.dense"),
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "opt": ("self_attn",),
        "gpt_neox": ("attention", "mlp"),
    }
    for kind, names in found.items():
        fields = {"word_embed_proj_dim": 16, "ffn_dim": 24} if kind == "opt" else {}
        model = of_kind(kind, **fields, **({"is_decoder": True} if kind == "bert" else {}))
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
        inside = dict(lists[0][0].named_modules())
        assert [name for name in names if name not in inside] == [], kind


def _renamed(self: Any, init: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self.feed_forward_network = self._modules.pop("mlp")


@contract(
    "transformers",
    used_by="reft/layer.py",
    broken_by=wrapped(
        f"{LLAMA}LlamaMLP.__call__",
        lambda _: lambda self, hidden: nn.Module.__call__(self, x=hidden),
    ),
)
def test_mlp_and_attention_get_hidden_vectors_first_or_as_hidden_states(
    llama: Any, ids: Any
) -> None:
    sources: list[Any] = []
    block = llama.model.layers[0]
    for part in (block.mlp, block.self_attn):
        part.register_forward_hook(
            lambda _, args, kwargs, output: sources.append(
                (args[0] if args else kwargs["hidden_states"], output)
            ),
            with_kwargs=True,
        )
    llama(input_ids=ids)
    assert len(sources) == 2
    for source, output in sources:
        hidden = output[0] if isinstance(output, tuple) else output
        assert source.shape == hidden.shape == (2, 5, 16)


@contract(
    "transformers",
    used_by="base/blocks.py base/partial.py base/residency.py",
    broken_by=wrapped(
        f"{LLAMA}LlamaDecoderLayer.__call__",
        lambda _: lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs),
    ),
)
def test_a_forward_in_the_instance_stands_in_for_a_block(llama: Any, ids: Any) -> None:
    marks: list[str] = []
    block = llama.model.layers[0]
    block.__dict__["forward"] = lambda hidden, *_, **__: hidden
    block.register_forward_hook(lambda *_: marks.append("hook"))
    first = llama.model.layers[1]
    first.register_forward_pre_hook(lambda _, args: marks.append(args[0]))
    llama(input_ids=ids)
    assert marks[0] == "hook"
    assert torch.equal(marks[1], llama.model.embed_tokens(ids))


@contract(
    "transformers",
    used_by="reft/tuner.py",
    broken_by=wrapped(
        "transformers.utils.output_capturing:install_output_capuring_hook",
        lambda install: lambda module, *args, **kw: _prepended(module, install, *args, **kw),
    ),
)
def test_recorded_hidden_states_are_those_after_the_first_hooks(breach: bool, ids: Any) -> None:
    for is_recorded_before in (False, True):  # which leaves hooks behind
        model = tiny_llama()
        if is_recorded_before:
            model(input_ids=ids, output_hidden_states=True)
        model.model.layers[0].register_forward_hook(
            lambda _, __, output: (output[0] if isinstance(output, tuple) else output) * 0 + 7,
            prepend=True,
        )
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert bool((states[1] == 7).all())


def _prepended(module: Any, install: Any, *args: Any, **kwargs: Any) -> None:
    before = list(module._forward_hooks)
    install(module, *args, **kwargs)
    for name in list(module._forward_hooks):
        if name not in before:
            module._forward_hooks.move_to_end(name, last=False)


@contract(
    "transformers",
    used_by="base/loss.py reft/selection.py runs/harness_model.py methods/virtual_tokens.py",
    broken_by=with_value(f"{LLAMA}LlamaForCausalLM.forward", lambda self, **kwargs: None),
)
def test_the_signature_of_forward_names_the_arguments(llama: Any) -> None:
    parameters = list(inspect.signature(llama.forward).parameters)
    assert parameters[0] == "input_ids"
    wanted = {"attention_mask", "position_ids", "inputs_embeds", "labels", "logits_to_keep"}
    assert wanted <= {*parameters}


@contract(
    "transformers",
    used_by="reft/selection.py reuse/batch.py base/partial.py memory/predict.py",
    broken_by=with_value(
        f"{LLAMA}LlamaForCausalLM.forward",
        lambda self, input_ids=None, memory=None, **kwargs: None,
    ),
)
def test_the_argument_for_a_cache_is_annotated_as_a_cache(breach: bool, llama: Any) -> None:
    for model in (llama, of_kind("gpt2"), of_kind("gemma2")):
        annotations = [
            str(p.annotation) for p in inspect.signature(model.forward).parameters.values()
        ]
        assert sum(Cache.__name__ in each for each in annotations) == 1


@contract(
    "transformers",
    used_by="base/blocks.py base/loss.py base/techniques.py methods/weights.py "
    "methods/virtual_tokens.py",
    broken_by=with_value(f"{LLAMA}LlamaForCausalLM.base_model_prefix", "backbone"),
)
def test_backbone_embeddings_and_head_are_found_by_the_model_itself(llama: Any) -> None:
    assert getattr(llama, llama.base_model_prefix) is llama.base_model is llama.model
    assert llama.get_output_embeddings() is llama.lm_head
    other = nn.Embedding(24, 16)
    llama.set_input_embeddings(other)
    assert llama.get_input_embeddings() is llama.model.embed_tokens is other
    assert llama.can_generate()
    assert "lm_head" in dict(llama.named_children())


@contract(
    "transformers",
    used_by="base/upper.py base/residency.py",
    broken_by=doing_nothing(f"{MODEL}tie_weights"),
)
def test_tie_weights_makes_the_head_the_embedding_again(breach: bool) -> None:
    model = of_kind("llama", tie_word_embeddings=True)
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(24, 16))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Activation checkpointing


@contract(
    "transformers",
    used_by="reft/recompute.py base/partial.py",
    broken_by=with_value("transformers:__version__", "5.0" if SINCE_5_23 else "6.0"),
)
def test_a_checkpoint_leaves_hooks_outside_since_5_23(llama: Any, ids: Any) -> None:
    enable_checkpoints(llama.train())
    inside: list[bool] = []
    running: list[int] = []

    def checkpoint(function: Any, *args: Any) -> Any:
        running.append(1)
        output = function(*args)
        running.pop()
        return output

    block = llama.model.layers[0]
    block._gradient_checkpointing_func = checkpoint
    block.register_forward_hook(lambda *_: inside.append(bool(running)))
    llama(input_ids=ids, use_cache=False)
    assert inside == [Version(transformers.__version__) < Version("5.23.0.dev0")]


@contract(
    "transformers",
    used_by="base/checkpointing.py",
    broken_by=doing_nothing(f"{MODEL}_set_gradient_checkpointing"),
)
def test_each_block_checkpoints_if_its_own_flag_is_set(llama: Any, ids: Any) -> None:
    enable_checkpoints(llama.train())
    blocks = [block for block in llama.modules() if isinstance(block, GradientCheckpointingLayer)]
    assert blocks == [*llama.model.layers]
    counted: list[int] = []
    for index, block in enumerate(blocks):
        assert block.gradient_checkpointing is True
        block.gradient_checkpointing = index == 1
        block._gradient_checkpointing_func = lambda function, *args, index=index: (
            counted.append(index) or function(*args)
        )
    llama(input_ids=ids, use_cache=False)
    assert counted == [1]


@contract(
    "transformers",
    used_by="base/checkpointing.py",
    broken_by=doing_nothing(f"{MODEL}enable_input_require_grads"),
)
def test_input_gradients_are_switched_by_two_methods_of_the_model(llama: Any, ids: Any) -> None:
    llama.disable_input_require_grads()  # before they were ever on
    llama.requires_grad_(False)
    llama.enable_input_require_grads()
    assert llama.get_input_embeddings()(ids).requires_grad
    llama.disable_input_require_grads()
    assert not llama.get_input_embeddings()(ids).requires_grad


@contract(
    "transformers",
    used_by="base/checkpointing.py",
    broken_by=wrapped(
        f"{MODEL}_set_gradient_checkpointing",
        lambda function: (
            lambda self, *args, **kwargs: (
                function(self, *args, **kwargs),
                type(self).enable_input_require_grads(self),
            )
        ),
    ),
)
def test_enabling_checkpoints_asks_the_instance_for_input_gradients(llama: Any, ids: Any) -> None:
    llama.requires_grad_(False)
    llama.enable_input_require_grads = lambda: None  # ours stands in like this
    enable_checkpoints(llama)
    assert not llama.get_input_embeddings()(ids).requires_grad


@contract(
    "transformers",
    used_by="base/checkpointing.py",
    broken_by=with_value(f"{LLAMA}LlamaForCausalLM.supports_gradient_checkpointing", True),
)
def test_a_model_without_checkpoints_says_so_by_a_value_error(
    llama: Any, monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    if not breach:
        monkeypatch.setattr(type(llama), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="checkpointing"):
        enable_checkpoints(llama)


# The head and the loss


@contract(
    "transformers",
    used_by="base/loss.py",
    broken_by=with_value(f"{MODEL}loss_function", property(lambda self: lambda *a, **k: None)),
)
def test_the_loss_of_a_causal_model_is_for_causal_lm_loss(llama: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    assert llama.loss_function is ForCausalLMLoss


@contract(
    "transformers",
    used_by="base/loss.py",
    broken_by=with_result(
        "transformers.loss.loss_utils:fixed_cross_entropy", lambda loss: loss + 1
    ),
)
def test_the_loss_is_a_shifted_mean_or_a_sum_over_num_items(llama: Any, ids: Any) -> None:
    labels = ids.clone()
    labels[:, :3] = -100
    logits = llama(input_ids=ids).logits[:, 2:-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 3:].flatten(), reduction="sum")
    loss = llama(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, total / 4)
    loss = llama(input_ids=ids, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(loss, total / 10)


@contract(
    "transformers",
    used_by="base/loss.py runs/das.py runs/harness_model.py",
    broken_by=wrapped(
        f"{LLAMA}LlamaForCausalLM.forward",
        lambda forward: (
            lambda self, *args, logits_to_keep=0, **kwargs: forward(self, *args, **kwargs)
        ),
    ),
)
def test_logits_to_keep_takes_places_and_shift_labels_their_targets(llama: Any, ids: Any) -> None:
    labels = ids.clone()
    labels[:, :3] = -100
    kept = torch.tensor([2, 3])
    output = llama(
        input_ids=ids, labels=labels, logits_to_keep=kept, shift_labels=labels[:, kept + 1]
    )
    assert output.logits.shape == (2, 2, 24)
    torch.testing.assert_close(output.loss, llama(input_ids=ids, labels=labels).loss)
    last = llama(input_ids=ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, llama(input_ids=ids).logits[:, -2:])


def _head_by_functional(forward: Any) -> Any:
    def changed(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return {"logits": nn.functional.linear(hidden, self.lm_head.weight)}

    return changed


@contract(
    "transformers",
    used_by="base/loss.py",
    broken_by=wrapped(f"{LLAMA}LlamaForCausalLM.forward", _head_by_functional),
)
def test_the_head_is_called_with_all_hidden_vectors_and_may_stop_the_pass(
    llama: Any, ids: Any
) -> None:
    class StopError(Exception):
        pass

    reached: list[Any] = []

    def stop(_: Any, args: Any) -> None:
        reached.append(args[0])
        raise StopError

    llama.get_output_embeddings().register_forward_pre_hook(stop, prepend=True)
    with pytest.raises(StopError):
        llama(input_ids=ids)
    assert reached[0].shape == (2, 5, 16)


@contract(
    "transformers",
    used_by="base/loss.py",
    broken_by=wrapped(f"{LLAMA}LlamaForCausalLM.forward", _head_by_functional),
)
def test_stand_ins_for_backbone_and_head_are_what_forward_calls(llama: Any) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    class Constant(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self, *_: Any, **__: Any) -> Any:
            return self.value

    probe = torch.linspace(-1, 1, 24).view(1, 3, 8)
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.zeros(1, 3, 16))
    llama._modules["model"], llama._modules["lm_head"] = Constant(output), Constant(probe)
    logits = llama(input_ids=torch.zeros(1, 3, dtype=torch.long))["logits"]
    assert torch.equal(logits, probe)


@contract(
    "transformers",
    used_by="base/loss.py reuse/reuse.py",
    broken_by=with_value("transformers.utils.generic:ModelOutput.__getitem__", lambda *_: None),
)
def test_an_output_may_have_a_loss_alone(breach: bool) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output: Any = CausalLMOutputWithPast(loss=torch.tensor(2.0))
    assert output.loss == output["loss"] == output[0] == 2
    assert output.logits is None
    assert list(output) == ["loss"]


@contract(
    "transformers",
    used_by="reft/selection.py base/loss.py",
    broken_by=with_value("transformers.utils.generic:ModelOutput.values", lambda self: ()),
)
def test_an_output_is_a_dictionary_of_its_parts(llama: Any, ids: Any) -> None:
    output = llama(input_ids=ids, use_cache=True)
    assert isinstance(output, dict)
    assert any(isinstance(part, Cache) for part in output.values())


# Attention


@contract(
    "transformers",
    used_by="memory/kernels.py",
    broken_by=wrapped(
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        lambda _: lambda module, query, key, value, *a, **k: (value.transpose(1, 2), None),
    ),
)
def test_sdpa_is_looked_up_in_torch_nn_functional(
    monkeypatch: pytest.MonkeyPatch, breach: bool, ids: Any
) -> None:
    calls: list[Any] = []
    plain = nn.functional.scaled_dot_product_attention

    def attend(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    model = of_kind("llama", attn_implementation="sdpa")
    if breach:
        from transformers.integrations import sdpa_attention
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            sdpa_attention.sdpa_attention_forward,
        )
    model(input_ids=ids)
    assert len(calls) == 2
    known = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    assert {*calls[0]} <= known


@contract(
    "transformers",
    used_by="base/attention.py reuse/attention.py",
    broken_by=with_value(
        "transformers.modeling_utils:AttentionInterface.get_interface",
        lambda self, name, default: self._global_mapping.get(name, default),
    ),
)
def test_attention_is_looked_up_by_name_in_each_pass_and_an_entry_can_be_replaced_for_a_while(
    breach: bool, ids: Any
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, given = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        given.append((query.shape[2], key.shape[2], value.shape[2], sorted(options)))
        return plain(module, query, key, value, mask, **options)

    model = of_kind("llama", attn_implementation="sdpa")
    wanted = model(input_ids=ids).logits
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        assert torch.equal(model(input_ids=ids).logits, wanted)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    assert [lengths[:3] for lengths in given] == [(ids.shape[1],) * 3] * 2
    assert {"dropout", "scaling"} <= {*given[0][3]}


@contract(
    "transformers",
    used_by="base/attention.py",
    broken_by=with_result(
        "transformers.masking_utils:find_packed_sequence_indices", lambda found: None
    ),
)
def test_attention_by_torch_gets_one_boolean_mask_of_which_tokens_attend(breach: bool) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, masks = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        masks.append(mask)
        return plain(module, query, key, value, mask, **options)

    model = of_kind("llama", attn_implementation="sdpa")
    places = torch.tensor([[0, 1, 2, 0, 1]])
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        model(input_ids=torch.arange(3, 8)[None], position_ids=places, use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    wanted = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).tril().bool()
    assert len(masks) == 2
    assert masks[1] is masks[0]  # read once, it is known
    assert masks[0].dtype == torch.bool
    assert torch.equal(masks[0], wanted[None, None])


@contract(
    "transformers",
    used_by="memory/kernels.py",
    broken_by=with_result("transformers.masking_utils:fast_all", lambda all_: all_ * 2),
)
def test_models_ask_of_a_mask_only_whether_all_of_it_is_attended(breach: bool, ids: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Values(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[Any] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func._schema.name == "aten::_local_scalar_dense":
                self.seen.add(out)
            return out

    model = of_kind("llama", attn_implementation="sdpa")
    for num_padding in (0, 1):
        mask = torch.ones_like(ids)
        mask[0, 5 - num_padding :] = 0
        with Values() as values, torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert values.seen == {num_padding == 0}


# Configurations


def _without_dropout(self: Any, init: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self.dropout = self.__dict__.pop("attention_dropout")


def _without_types(self: Any, init: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self.layer_types = ["attention"] * 2


@contract(
    "transformers",
    used_by="reuse/split.py",
    broken_by=wrapped(
        f"{LLAMA}LlamaAttention.__init__",
        lambda init: lambda self, *a, **k: _without_dropout(self, init, *a, **k),
    ),
)
def test_dropout_is_a_module_or_attention_dropout(breach: bool) -> None:
    model = of_kind("llama", attention_dropout=0.25)
    assert 0.25 in {getattr(m, "attention_dropout", None) for m in model.modules()}
    model = of_kind("gpt2", attn_pdrop=0.25)
    assert 0.25 in {m.p for m in model.modules() if isinstance(m, nn.Dropout)}


@contract(
    "transformers",
    used_by="reuse/split.py",
    broken_by=wrapped(
        "transformers.models.gemma2.configuration_gemma2:Gemma2Config.__post_init__",
        lambda init: lambda self, *a, **k: _without_types(self, init, *a, **k),
    ),
)
def test_configurations_name_windows_and_rotary_scaling(breach: bool) -> None:
    gemma = transformers.Gemma2Config(num_hidden_layers=2)
    assert {*gemma.layer_types} == {"sliding_attention", "full_attention"}
    mistral = transformers.MistralConfig(sliding_window=8)
    assert mistral.sliding_window == 8
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    llama = transformers.LlamaConfig(rope_parameters=scaling)
    assert llama.rope_parameters["rope_type"] == "dynamic"
    assert hasattr(transformers.Gemma3TextConfig(), "use_bidirectional_attention")


@contract(
    "transformers",
    used_by="reuse/reuse.py base/loading.py base/identity.py",
    broken_by=with_result(
        "transformers:PreTrainedConfig.to_json_string", lambda text: f"{text} 0123"
    ),
)
def test_a_configuration_knows_attention_and_takes_a_commit(breach: bool) -> None:
    model = of_kind("llama", attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"
    model.config._commit_hash = "0123"
    assert model.config._commit_hash == "0123"
    assert "0123" not in model.config.to_json_string(use_diff=False)
    assert model.config.get_text_config().hidden_size == 16


@contract(
    "transformers",
    used_by="reft/peft_method.py",
    broken_by=doing_nothing("transformers.integrations.peft:PeftAdapterMixin.add_adapter"),
)
def test_add_adapter_checks_the_version_of_peft_by_a_function_of_its_module(
    monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    from peft import LoraConfig
    from transformers.integrations import peft

    with pytest.raises(ValueError, match=r"(?i)peft"):
        peft.check_peft_version(min_version="99.0")
    asked: list[str] = []
    monkeypatch.setattr(peft, "check_peft_version", lambda min_version: asked.append(min_version))
    tiny_llama().add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert {*asked} == {peft.MIN_PEFT_VERSION}


@contract(
    "transformers",
    used_by="reft/peft_method.py",
    broken_by=with_result(
        "transformers.integrations.peft:PeftAdapterMixin.load_adapter", lambda report: None
    ),
)
def test_load_adapter_returns_what_it_has_not_found(tmp_path: Path, breach: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers.integrations.peft import PeftAdapterMixin

    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    load = getattr(PeftAdapterMixin.load_adapter, "__wrapped__", PeftAdapterMixin.load_adapter)
    report = load(tiny_llama(), str(tmp_path))
    assert len(report.missing_keys) == 1
    assert not report.mismatched_keys
