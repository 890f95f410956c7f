"""Named methods: the grammar of --methods and the PEFT configuration behind each name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.cli import main
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import attach, check_target_modules
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.methods.entries import expand_methods, parse_methods, resolve_learning_rate
from lowmem_reft.methods.table import DEFAULT_RANK, METHODS, PROFILES, find_method
from lowmem_reft.options import MemoryOptions, MethodOptions, OptimOptions, written
from lowmem_reft.reft.config import ReftConfig, resolve_layers
from lowmem_reft.reft.interventions import intervention_options


def test_overrides_are_split_outside_brackets_only() -> None:
    specs = parse_methods("loreft[rank=8,positions=f7+l7], qlora[lr=1e-3,epochs=2] ,lora")
    assert [spec.label for spec in specs] == [
        "loreft[rank=8,positions=f7+l7]",
        "qlora[lr=1e-3,epochs=2]",
        "lora",
    ]
    assert specs[0].options == MethodOptions(method="loreft", rank=8, positions="f7+l7")
    assert specs[1].optim_overrides == {"lr": 1e-3, "epochs": 2.0}


def test_r_is_short_for_rank_and_storage_belongs_to_the_base() -> None:
    (spec,) = parse_methods("loreft[r=2,storage=bf16]")
    assert spec.options.rank == 2
    assert spec.storage == "bf16"


def test_the_storage_is_the_methods_own_by_default() -> None:
    assert [spec.storage for spec in parse_methods("loreft,lora,qlora")] == ["nf4", "bf16", "nf4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one method"),
        ("lorefd", "method must be one of loreft"),
        ("loreft,loreft", "twice"),
        ("loreft[rank=eight]", "rank in .* must be a whole number"),
        ("loreft[lr=fast]", "lr in .* must be a number"),
        ("loreft[rnak=8]", "rnak=8"),
        ("loreft[rank]", "got 'rank'"),
        ("loreft[rank=8", "must look like name"),
        ("loreft[storage=q4]", "storage in .* must be one of nf4"),
        ("lora[positions=l1]", "positions must not be given with method 'lora'"),
        ("loreft[alpha=2]", "alpha must not be given with method 'loreft'"),
        ("prefix[rank=2]", "rank must not be given with method 'prefix'; it takes num_virtual_tok"),
        ("loreft[num_virtual_tokens=9]", "num_virtual_tokens must not be given with method"),
        ("prompt[num_virtual_tokens=0]", "num_virtual_tokens must be at least 1, got 0"),
        ("ia3[layers=1]", "layers must not be given with method 'ia3'; it takes no options"),
        ("full[storage=nf4]", "storage must be fp32, bf16 or fp16 for method 'full', got 'nf4'"),
        ("all", "method must be one of loreft"),  # of comparisons, which expand it
    ],
)
def test_a_wrong_methods_entry_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_methods(text)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_configuration(name: str) -> None:
    config = build_peft_config(MethodOptions(method=name), task_type="CAUSAL_LM", num_layers=4)
    assert config.task_type == "CAUSAL_LM"


def test_layers_of_lora_are_resolved_against_the_base() -> None:
    options = MethodOptions(method="qlora", rank=8, layers="upper:0.5")
    config = build_peft_config(options, task_type="CAUSAL_LM", num_layers=6)
    assert config.layers_to_transform == [3, 4, 5]
    assert (config.r, config.lora_alpha) == (8, 16)


def test_reft_options_reach_the_configuration() -> None:
    options = written.build(
        MethodOptions, method="loreft", rank=2, positions="l1", tie="tied", dropout=0.1
    )
    config = build_peft_config(options, task_type="CAUSAL_LM", num_layers=6)
    assert isinstance(config, ReftConfig)
    assert (config.rank, config.positions, config.dropout) == (2, "l1", 0.1)


def test_options_that_an_intervention_does_not_read_are_refused() -> None:
    with pytest.raises(InputError, match="rank must not be given with method 'red'"):
        build_peft_config(MethodOptions(method="red", rank=8), task_type="CAUSAL_LM", num_layers=4)


def test_the_learning_rate_is_the_methods_own_unless_given() -> None:
    options = MethodOptions(method="qlora")
    assert (
        resolve_learning_rate(options, OptimOptions(), lambda: 4096).lr == find_method("qlora").lr
    )
    assert resolve_learning_rate(options, OptimOptions(lr=0.5), lambda: 4096).lr == 0.5


@pytest.mark.parametrize(("hidden_size", "rank"), [(64, 1), (576, 4), (576, 8), (4096, 32)])
def test_a_step_at_the_default_rate_moves_an_edit_as_far_on_every_base(
    hidden_size: int, rank: int
) -> None:
    options = MethodOptions(method="loreft", rank=rank)
    rate = resolve_learning_rate(options, OptimOptions(), lambda: hidden_size).lr
    assert rate is not None
    # Adam's first step: every entry by the rate, in the direction that moves Wh the most.
    hidden = torch.rand(hidden_size, dtype=torch.float64) + 0.5
    moved = (rate * torch.ones(rank, hidden_size, dtype=torch.float64)) @ hidden
    assert float(moved.norm() / hidden.norm()) == pytest.approx(0.16, rel=0.08)


def test_edits_of_all_blocks_together_move_as_far_at_the_default_rate_however_many_there_are() -> (
    None
):
    def moved(num_layers: int, **given: Any) -> float:
        """The length of the sum of the blocks' edits, in independent directions."""
        options = MethodOptions(**given)
        rate = resolve_learning_rate(options, OptimOptions(), lambda: 576, lambda: num_layers).lr
        layers = build_peft_config(options, task_type="SEQ_CLS", num_layers=num_layers).layers
        assert rate is not None
        return rate * len(resolve_layers(layers, num_layers)) ** 0.5

    at_16 = moved(16)
    for num_layers, layers in ((6, "all"), (30, "all"), (30, "upper:0.5"), (12, "0;3;6;9")):
        assert moved(num_layers, layers=layers) == pytest.approx(at_16, rel=0.05)
    assert moved(30, layers="29") < at_16  # one alone bears no rate that grows without bounds
    assert find_method("red").rate(576, 1, 6) == find_method("red").rate(576, 1, 30)


def test_the_rank_of_a_profile_counts_for_the_default_rate() -> None:
    assert ReftConfig().rank == DEFAULT_RANK
    rates = [
        resolve_learning_rate(options, OptimOptions(), lambda: 256).lr
        for options in (
            MethodOptions(profile="balanced"),
            MethodOptions(rank=16),
            MethodOptions(profile="balanced", rank=DEFAULT_RANK),
            MethodOptions(),
        )
    ]
    assert rates[0] == rates[1] != rates[2] == rates[3]


def attach_lora(
    targets: str | None, architecture: str = "llama", num_layers: int = 2, **options: Any
) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2}
    sizes["num_hidden_layers"] = num_layers
    if architecture == "llama":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    base = base_with_random_weights(
        AutoConfig.for_model(architecture, **sizes),
        device=torch.device("cpu"),
        storage="fp32",
        compute_dtype=torch.float32,
    )
    method = MethodOptions(**{"method": "lora", "target_modules": targets, **options})
    return attach(base, method, task_type="CAUSAL_LM", memory=MemoryOptions(), chunked_loss=True)


@pytest.mark.parametrize("targets", ["nothing", "q_proj,nothing", "self_attn", "q_proj,"])
def test_target_modules_that_are_no_linear_layers_are_refused(targets: str) -> None:
    wrong = targets.rpartition(",")[2]
    message = rf"^target_modules must name linear layers .*, got '{wrong}'; .* k_proj, .* q_proj"
    with pytest.raises(InputError, match=message):
        attach_lora(targets)


def test_target_modules_are_those_trained_with_blanks_or_without() -> None:
    model = attach_lora("q_proj, v_proj")
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    assert len(trained) == 4


@pytest.mark.parametrize("method", ["lora", "dora", "lora_reft"])
@pytest.mark.parametrize("num_layers", [2, 3])  # of fewer than 20 names PEFT keeps each in full
def test_layers_are_those_trained_however_few_there_are(method: str, num_layers: int) -> None:
    model = attach_lora(None, num_layers=num_layers, method=method, layers="1")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".layers.1." in name for name in trained)


def test_names_of_all_layers_are_left_to_peft_where_it_looks_at_layers() -> None:
    config = attach_lora(None, num_layers=3, layers="1").peft_config["default"]
    suffixes = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (config.target_modules, config.layers_to_transform) == (suffixes, [1])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT sets it
def test_target_modules_of_gpt2_are_linear_layers_too() -> None:
    assert attach_lora("c_attn", "gpt2").get_nb_trainable_parameters()[0] > 0


def test_target_modules_are_checked_before_weights_are_loaded(
    tiny_llama_dir: Path, no_base: None
) -> None:
    model = str(tiny_llama_dir)
    for targets in (None, "q_proj,down_proj"):
        options = MethodOptions(method="qlora", target_modules=targets)
        check_target_modules(options, model, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="got 'nothing'; choose among down_proj"):
        check_target_modules(
            MethodOptions(method="qlora", target_modules="nothing"), model, task_type="SEQ_CLS"
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_says_where_to_edit_unless_the_user_does(profile: Any) -> None:
    def build(**options: Any) -> Any:
        chosen = MethodOptions(profile=profile, **options)
        return build_peft_config(chosen, task_type="CAUSAL_LM", num_layers=4)

    config = build()
    assert {name: getattr(config, name) for name in PROFILES[profile]} == PROFILES[profile]
    assert build(positions="f2").positions == "f2"
    assert build(rank=3).rank == 3
    assert build(method="red").positions == PROFILES[profile]["positions"]  # which has no rank
    with pytest.raises(InputError, match="profile must not be given with method 'qlora'"):
        build(method="qlora")


def edited(num_layers: int, task_type: str = "CAUSAL_LM", **given: Any) -> tuple[Any, str]:
    config: Any = build_peft_config(
        MethodOptions(**given), task_type=task_type, num_layers=num_layers
    )
    return config.layers, config.positions


def test_a_deep_causal_base_is_edited_above_and_at_the_end_unless_the_user_says_where() -> None:
    assert edited(11) == ("all", "all")
    assert edited(12) == ("upper:0.5", "l3")
    assert edited(12, rank=2) == ("upper:0.5", "l3")
    assert edited(12, layers="all") == ("all", "all")
    assert edited(12, positions="f1") == ("all", "f1")
    assert edited(12, profile="paper") == ("all", "f7+l7")
    assert edited(12, "SEQ_CLS") == ("all", "all")
    assert edited(12, method="red") == ("all", "every")


def test_lora_stands_where_loreft_edits_beside_it() -> None:
    chosen = MethodOptions(method="lora_reft")
    deep: Any = build_peft_config(chosen, task_type="CAUSAL_LM", num_layers=12)
    assert (deep.r, deep.layers_to_transform) == (1, [6, 7, 8, 9, 10, 11])
    assert (deep.reft["layers"], deep.reft["positions"]) == ("upper:0.5", "l3")
    shallow: Any = build_peft_config(chosen, task_type="CAUSAL_LM", num_layers=6)
    assert (shallow.layers_to_transform, shallow.reft["positions"]) == (None, "all")


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(InputError, match="profile must be one of fast, balanced, paper, got 'x'"):
        parse_methods("loreft[profile=x]")


# The table.


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_table_names_options_that_exist_and_that_the_method_reads(name: str) -> None:
    method = METHODS[name]
    assert set(method.options) <= set(written.types(MethodOptions)) - {"method"}
    assert method.size is None or method.size in method.options
    assert set(method.defaults) <= set(method.options)
    assert method.about
    assert method.source
    if method.family == "reft":
        read = set(intervention_options(method.fixed["intervention"]))
        assert read == set(method.options) & {"rank", "act", "init", "alpha"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_of_a_method_can_be_given_and_reaches_its_configuration(name: str) -> None:
    values = {
        **{"rank": 3, "lora_rank": 5, "num_virtual_tokens": 7, "alpha": 3.0, "dropout": 0.25},
        **{"layers": "1;2", "positions": "f1", "tie": "positions", "component": "attention_output"},
        **{"act": "tanh", "init": "paper", "profile": "fast", "target_modules": "q_proj"},
    }

    def build(**options: Any) -> Any:
        chosen = written.build(MethodOptions, method=name, **options)
        return build_peft_config(chosen, task_type="CAUSAL_LM", num_layers=4)

    for option in METHODS[name].options:
        others = {"positions": "f2"} if option == "tie" else {}  # several φ need several tokens
        changed = build(**{option: values[option]}, **others)
        assert changed != build(**others), option


def test_overrides_of_both_halves_reach_lora_and_reft() -> None:
    options = MethodOptions(method="lora_reft", rank=2, lora_rank=8, positions="l1", dropout=0.1)
    config: Any = build_peft_config(options, task_type="CAUSAL_LM", num_layers=6)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    reft = config.reft_config()
    assert (reft.intervention, reft.rank, reft.positions, reft.dropout) == ("loreft", 2, "l1", 0.1)


def test_prompt_learning_takes_a_number_of_virtual_tokens() -> None:
    (spec,) = parse_methods("p_tuning[num_virtual_tokens=4,rank=16]")
    config: Any = build_peft_config(spec.options, task_type="CAUSAL_LM", num_layers=6)
    assert (config.num_virtual_tokens, config.encoder_hidden_size) == (4, 16)


def test_all_is_every_method_with_what_suits_the_tiny_model_there() -> None:
    assert expand_methods("all", embedded=False) == ",".join(METHODS)
    specs = parse_methods(expand_methods(" all ", embedded=True))
    assert [spec.name for spec in specs] == list(METHODS)
    assert specs[0].label == "loreft[rank=8,lr=4e-3]"
    text = "qlora,loreft[lr=1e-3,rank=2],bitfit"
    assert expand_methods(text, embedded=False) == text
    assert (
        expand_methods(text, embedded=True) == "qlora[rank=8,lr=2e-3],loreft[lr=1e-3,rank=2],bitfit"
    )


# The command.


def test_the_methods_are_listed_as_json_at_once_and_without_torch() -> None:
    code = (
        "import sys; from lowmem_reft.cli import main; code = main(['methods', '--json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    listed = json.loads(finished.stdout.splitlines()[-1])["methods"]
    assert [method["name"] for method in listed] == list(METHODS)
    for method in listed:
        assert {"family", "about", "storage", "lr", "options", "defaults"} <= set(method)
    by_name = {method["name"]: method for method in listed}
    assert by_name["prefix"]["options"] == ["num_virtual_tokens"]
    assert by_name["red"]["defaults"] == {"positions": "every"}


def test_the_methods_are_listed_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name in METHODS:  # as they have to be written, also on a narrow terminal
        assert f" {name} " in shown
