"""Several adapters at once: stacked, summed, in disjoint subspaces, on top of LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import lowmem_reft as lr
from lowmem_reft.errors import InputError
from lowmem_reft.reft.composition import RotationBeside, low_rank, weighted_sum
from lowmem_reft.reft.interventions import (
    INTERVENTIONS,
    DiReft,
    LoReft,
    build_intervention,
)
from lowmem_reft.reft.lora_reft import LoraReftConfig
from lowmem_reft.reft.rotation import Rotation, orthonormal_rows
from snippets import read_blocks

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))
NAMES = ("one", "two")  # of one letter, PEFT takes them for parts of its own names

SUMMABLE: list[dict[str, Any]] = [
    {"intervention": "loreft"},
    {"intervention": "noreft"},
    {"intervention": "direft"},
    {"intervention": "orthogonal_direft"},
    {"intervention": "consreft"},
    {"intervention": "lobireft"},
    {"intervention": "steering", "alpha": 0.7},
    {"intervention": "fixed_steering", "alpha": 0.7},
]
WITH_ACTIVATION: list[dict[str, Any]] = [
    {"intervention": "direft", "act": "relu"},
    {"intervention": "orthogonal_direft", "act": "relu"},
]
NOT_SUMMABLE: list[dict[str, Any]] = [
    {"intervention": "red"},
    {"intervention": "red_loreft"},
    {"intervention": "bottleneck", "component": "mlp_output"},
    {"intervention": "parallel_bottleneck", "component": "mlp_output"},
    {"intervention": "loreft", "act": "relu"},
    {"intervention": "noreft", "act": "relu"},
]


def randomize(module: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return module


def exact(fields: dict[str, Any], seed: int = 0, hidden: int = 16) -> nn.Module:
    """An intervention of random values in float64."""
    fields = {"rank": 3, "init": "paper", "alpha": 1.0, "act": None, **fields}
    phi = build_intervention(fields.pop("intervention"), hidden, **fields)
    phi = randomize(phi.double(), seed)
    return phi.eval()


@pytest.fixture
def base(tiny_llama_dir: Path) -> Any:
    return lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")


def reft(**fields: Any) -> lr.ReftConfig:
    fields = {"task_type": "CAUSAL_LM", "rank": 3, "layers": "1", "positions": "f2+l1", **fields}
    return lr.ReftConfig(**fields)


def adapt(base: Any, *configs: Any) -> Any:
    """A model with adapters "one" and "two" of random values."""
    model: Any = None
    for index, config in enumerate(configs):
        name = NAMES[index]
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for key, value in (*model.named_parameters(), *model.named_buffers()):
                if f".{name}." in f"{key}.":
                    value.copy_(torch.randn(value.shape, generator=generator) / 4)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    result: Tensor = model(input_ids=ids, **arguments).logits
    return result


def edit_at(model: Any, layer: int) -> Tensor:
    """What the active adapters add to what leaves a block (the last one excepted)."""
    with torch.no_grad():
        edited = model(input_ids=IDS, output_hidden_states=True).hidden_states[layer + 1]
        with model.disable_adapter():
            before = model(input_ids=IDS, output_hidden_states=True).hidden_states[layer + 1]
    return edited - before


# The weighted sum.


def test_an_intervention_built_on_another_is_not_summed_as_that_one() -> None:
    class Gated(LoReft):
        """Its change is scaled, which the form of LoReFT does not say."""

    with pytest.raises(InputError, match="must be low-rank edits to be summed, got Gated"):
        low_rank(Gated(8, rank=2))


@pytest.mark.parametrize("fields", [*SUMMABLE, *WITH_ACTIVATION], ids=str)
def test_an_intervention_in_low_rank_form_is_the_same_function(fields: dict[str, Any]) -> None:
    phi, hidden = exact(fields), torch.randn(5, 16, dtype=torch.float64)
    form = low_rank(phi)
    edit = hidden @ form.read.T + form.bias
    edit = torch.relu(edit) if "act" in fields else edit
    torch.testing.assert_close(edit @ form.write, phi(hidden), rtol=1e-12, atol=1e-12)


def test_every_intervention_can_be_summed_or_is_refused() -> None:
    tried = {fields["intervention"] for fields in (*SUMMABLE, *NOT_SUMMABLE)}
    assert tried == set(INTERVENTIONS)


@pytest.mark.parametrize("family", [SUMMABLE, WITH_ACTIVATION], ids=["linear", "relu"])
def test_a_sum_is_the_weighted_sum_of_the_edits_of_the_same_vector(family: list[Any]) -> None:
    phis = [exact(fields, seed) for seed, fields in enumerate(family)]
    weights = [0.5, -1.0, 2.0, 1.0, 0.25, -0.5, 1.5, 3.0][: len(phis)]
    parts = [low_rank(phi) for phi in phis]
    rank = sum(len(part.write) for part in parts)
    act = family[0].get("act")
    into = DiReft(16, rank=rank + 2, act=act, init="paper").double()  # two rows stay empty
    weighted_sum([*parts, None], [*weights, 1.0], into)
    hidden = torch.randn(5, 16, dtype=torch.float64)
    expected = sum(w * phi(hidden) for w, phi in zip(weights, phis, strict=True))
    torch.testing.assert_close(into(hidden), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tie", ["tied", "positions"])
def test_a_summed_adapter_edits_by_the_weighted_sum(base: Any, tie: str) -> None:
    model = adapt(base, reft(tie=tie), reft(tie=tie, intervention="consreft", rank=2))
    edits = []
    for name in NAMES:
        model.set_adapter(name)
        edits.append(edit_at(model, 1))
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    model.set_adapter("sum")
    assert model.peft_config["sum"].rank == 5
    edit = edit_at(model, 1)
    assert edit[:, 2:-1].abs().max() == 0
    torch.testing.assert_close(edit, 0.5 * edits[0] - 2.0 * edits[1], rtol=1e-4, atol=1e-5)


def test_adapters_on_other_layers_are_summed_where_each_one_is(base: Any) -> None:
    model = adapt(base, reft(layers="0;1"), reft(layers="1;3", rank=2))
    model.set_adapter("one")
    at_0, only_a = edit_at(model, 0), logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "first")
    model.set_adapter("sum")
    assert model.peft_config["sum"].layers == [0, 1, 3]
    torch.testing.assert_close(edit_at(model, 0), at_0, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), only_a, atol=1e-2)
    model.set_adapter("first")
    torch.testing.assert_close(logits(model), only_a, rtol=1e-4, atol=1e-4)


def test_a_sum_is_saved_loaded_and_mixed_like_any_adapter(
    base: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = adapt(base, reft(), reft(rank=2))
    model.add_weighted_adapter(["one", "two"], [1.0, -1.0], "sum")
    model.set_adapter("sum")
    expected = logits(model)
    mixed = logits(model, adapter_names=["sum", "one"])
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "sum")), expected)


@pytest.mark.parametrize("fields", NOT_SUMMABLE, ids=str)
def test_an_edit_of_another_form_is_not_summed_but_stacked_and_mixed(
    base: Any, fields: dict[str, Any]
) -> None:
    model = adapt(base, reft(**fields), reft(**fields))
    with pytest.raises(InputError, match=r"low-rank edits to be summed, got .*set_adapter\("):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"one", "two"}
    alone = {}
    for name in NAMES:
        model.set_adapter(name)
        alone[name] = logits(model)
    mixed = logits(model, adapter_names=["two", "one"])
    for row, name in enumerate(("two", "one")):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["one", "two"])
    assert not any(torch.allclose(logits(model), each, atol=1e-4) for each in alone.values())


def test_a_sum_edits_the_answer_as_its_parts_do(base: Any) -> None:
    model = adapt(base, reft(positions="every"), reft(positions="all+response"))
    model.add_weighted_adapter(["one", "two"], [0.5, -1.0], "sum")
    assert model.peft_config["sum"].positions == "every"
    edits = {}
    for name in (*NAMES, "sum"):
        model.set_adapter(name)
        edits[name] = edit_at(model, 1)
    expected = 0.5 * edits["one"] - edits["two"]
    torch.testing.assert_close(edits["sum"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "f2"}, r"positions must be the same .* 'f2\+l1' \(one\), 'f2' \(two\)"),
        ({"tie": "sides"}, "tie must be the same"),
        ({"component": "mlp_output"}, "component must be the same"),
        ({"modules_to_save": ["lm_head"]}, "no modules_to_save to be summed, got two"),
    ],
)
def test_adapters_that_have_no_sum_are_refused(
    base: Any, fields: dict[str, Any], message: str
) -> None:
    model = adapt(base, reft(), reft(**fields))
    with pytest.raises(InputError, match=message):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"one", "two"}


@pytest.mark.parametrize(
    ("adapters", "weights", "name"),
    [
        (["one", "three"], [1, 1], "s"),
        (["one"], [1, 2], "s"),
        (["one", "one"], [1, 1], "s"),
        ([], [], "s"),
    ],
)
def test_a_sum_needs_adapters_and_a_weight_for_each(
    base: Any, adapters: list[str], weights: list[float], name: str
) -> None:
    model = adapt(base, reft(), reft())
    with pytest.raises(InputError, match="adapters must be loaded adapters, each once"):
        model.add_weighted_adapter(adapters, weights, name)
    with pytest.raises(InputError, match="adapter_name must be new, got 'two'"):
        model.add_weighted_adapter(["one"], [1.0], "two")


# The stack.


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_stacked_adapters_edit_one_after_the_other(base: Any, order: list[str]) -> None:
    model = adapt(base, reft(positions="all"), reft(positions="all", intervention="red"))
    phis = {name: model.get_base_model().model.layers[1].reft.reft_phi[name][0] for name in NAMES}
    with model.disable_adapter(), torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[2].double()
    before = hidden.clone()
    for name in order:
        hidden = hidden + copy.deepcopy(phis[name]).double()(hidden.flatten(0, 1)).view_as(hidden)
    model.base_model.set_adapter(order)
    torch.testing.assert_close(edit_at(model, 1).double(), hidden - before, rtol=1e-4, atol=1e-4)


# Disjoint subspaces of one R.


def rotation_of(model: Any, name: str) -> Any:
    return model.get_base_model().model.layers[1].reft.reft_phi[name][0].rotation


def test_a_rotation_beside_others_is_the_rest_of_one_larger_rotation() -> None:
    own, first, second = (Rotation(16, rank).double() for rank in (3, 2, 4))
    for index, each in enumerate((own, first, second)):
        randomize(each, index)
    beside = RotationBeside(own, [first, second])  # in training it makes the parameter R itself
    beside.eval()
    fixed = torch.cat([first(), second()])
    whole = orthonormal_rows(torch.cat([fixed, own.raw]))
    assert torch.equal(beside(), whole[6:])
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(beside() @ beside().T, identity, rtol=1e-12, atol=1e-12)
    assert (beside() @ fixed.T).abs().max() < 1e-12
    rows = beside().detach()
    torch.testing.assert_close(beside.train()(), rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.raw.detach(), rows, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_rotation_beside_others_is_that_of_autograd() -> None:
    own, other = Rotation(7, 2).double(), Rotation(7, 3).double()
    beside = RotationBeside(own, [other])
    beside.eval()

    def rows(raw: Tensor) -> Tensor:
        beside.raw.data = raw.detach()
        rest = other().detach()
        kept = raw - raw @ rest.T @ rest
        return torch.linalg.cholesky(kept @ kept.T).inverse() @ kept

    target = torch.randn(2, 7, dtype=torch.float64)
    raw = own.raw.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((rows(raw) * target).sum(), raw)
    (got,) = torch.autograd.grad((beside() * target).sum(), beside.raw)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    loss = (beside() * target).sum()
    assert torch.autograd.grad(loss, other.raw, allow_unused=True) == (None,)


def test_the_sum_of_orthogonal_parts_is_one_loreft_of_all_rows() -> None:
    parts = [exact({"intervention": "loreft"}, seed) for seed in range(2)]
    parts[1].rotation = RotationBeside(parts[1].rotation, [parts[0].rotation])
    whole = LoReft(16, rank=6).double().eval()
    with torch.no_grad():
        whole.rotation.raw.copy_(torch.cat([part.rotation() for part in parts]))
        whole.source.weight.copy_(torch.cat([part.source.weight for part in parts]))
        whole.source.bias.copy_(torch.cat([part.source.bias for part in parts]))
    hidden = torch.randn(5, 16, dtype=torch.float64)
    summed = DiReft(16, rank=6).double()
    weighted_sum([low_rank(part) for part in parts], [1.0, 1.0], summed)
    torch.testing.assert_close(summed(hidden), whole(hidden), rtol=1e-12, atol=1e-12)


def train(model: Any, name: str) -> None:
    model.set_adapter(name)
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    labels = IDS.clone()
    labels[:, :5] = -100
    for _ in range(5):
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_a_part_that_is_trained_stays_orthogonal_and_leaves_the_other_alone(
    base: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = get_peft_model(base, reft(), adapter_name="one")
    model.add_adapter("two", reft(rank=4))
    untuned = logits(model)
    lr.keep_orthogonal(model, "two", to=["one"])
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), untuned, rtol=1e-5, atol=1e-5)  # still no edit
    train(model, "one")
    rows_a, of_a = rotation_of(model, "one")().detach(), logits(model)
    start = rotation_of(model, "two")().detach()
    train(model, "two")
    rows_b, of_b = rotation_of(model, "two")().detach(), logits(model)
    assert not torch.allclose(start, rows_b, atol=1e-3)
    assert (rows_a @ rows_b.T).abs().max() < 1e-6
    model.set_adapter("one")
    assert torch.equal(logits(model), of_a)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    model.set_adapter("both")
    both = logits(model)
    assert not torch.allclose(both, of_a, atol=1e-4)
    assert not torch.allclose(both, of_b, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
    loaded = PeftModel.from_pretrained(again, tmp_path / "two", adapter_name="two")
    torch.testing.assert_close(logits(loaded), of_b, rtol=1e-5, atol=1e-5)
    assert type(rotation_of(loaded, "two")) is Rotation
    torch.testing.assert_close(rotation_of(loaded, "two")(), rows_b, rtol=1e-5, atol=1e-6)


def test_a_part_whose_training_was_interrupted_ends_as_it_would_have(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    labels = IDS.clone()
    labels[:, :6] = -100

    def start() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        base = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
        model = get_peft_model(base, reft(), adapter_name="one")
        model.add_adapter("two", reft())
        lr.keep_orthogonal(model, "two", to=["one"])
        model.set_adapter("two")
        trained = [p for p in model.parameters() if p.requires_grad]
        return model.train(), torch.optim.AdamW(trained, lr=0.05)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model, optimizer = start()
    for _ in range(3):
        step(model, optimizer)
    weights = get_peft_model_state_dict(model, adapter_name="two")
    weights = {name: value.clone() for name, value in weights.items()}
    moments = copy.deepcopy(optimizer.state_dict())
    expected = [step(model, optimizer) for _ in range(3)]
    again, optimizer = start()
    set_peft_model_state_dict(again, weights, adapter_name="two")
    optimizer.load_state_dict(moments)
    resumed = [step(again, optimizer) for _ in range(3)]
    assert expected[-1] < expected[0]
    assert resumed == pytest.approx(expected, rel=1e-6)


def test_a_copy_of_a_model_keeps_its_own_parts_orthogonal(base: Any) -> None:
    model = adapt(base, reft(), reft())
    lr.keep_orthogonal(model, "two", to=["one"])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        rotation_of(model, "one").raw.normal_()
    rows = [rotation_of(copied, name)() for name in NAMES]
    assert (rows[0] @ rows[1].T).abs().max() < 1e-6


def test_the_example_of_the_documentation_composes_two_adapters(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "adapters.md"
    (block,) = (block for block in read_blocks(page) if "keep_orthogonal" in block.code)
    monkeypatch.chdir(tmp_path)
    config = reft(layers="all", positions="all", init="paper")  # as the page's first adapter
    model = get_peft_model(base, config, adapter_name="first").eval()
    of_first = logits(model)
    exec(block.code, {"model": model, "lr": lr})
    torch.testing.assert_close(logits(model), of_first)  # "third" is not trained yet
    rows = [rotation_of(model, name)() for name in ("first", "third")]
    assert (rows[0] @ rows[1].T).abs().max() < 1e-6
    assert (tmp_path / "composed" / "apart" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("configs", "to", "message"),
    [
        (
            [reft(), reft()],
            "three",
            "edit the same vectors, got 'two' and three",
        ),
        ([reft(), reft(layers="2")], "one", "edit the same vectors"),
        ([reft(), reft(intervention="red")], "one", "got Red and LoReft; use loreft"),
        ([reft(rank=40), reft(rank=30)], "one", "at most 64, the hidden size, together, got 70"),
    ],
    ids=["unknown", "elsewhere", "red", "no room"],
)
def test_parts_that_cannot_be_orthogonal_are_refused(
    base: Any, configs: list[Any], to: str, message: str
) -> None:
    model = adapt(base, *configs)
    with pytest.raises(InputError, match=message):
        lr.keep_orthogonal(model, "two", to=[to])


# What combines with what: the table of docs/how-to/adapters.md, cell by cell.

LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
KINDS: dict[str, Any] = {
    "reft": lambda: reft(),
    "lora": lambda: LoraConfig(**LORA),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "lora_reft": lambda: LoraReftConfig(**LORA, reft={"rank": 2, "layers": "1"}),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", ["reft", "lora", "dora", "lora_reft", "ia3"])
def test_two_of_one_kind_can_be_active_together(base: Any, kind: str) -> None:
    model = adapt(base, KINDS[kind](), KINDS[kind]())
    alone = []
    for name in NAMES:
        model.set_adapter(name)
        alone.append(logits(model))
    model.base_model.set_adapter(["one", "two"])
    assert not any(torch.allclose(logits(model), each, atol=1e-4) for each in alone)


@pytest.mark.parametrize("kind", ["reft", "lora", "lora_reft"])
def test_two_of_one_kind_mix_in_a_batch(base: Any, kind: str) -> None:
    model = adapt(base, KINDS[kind](), KINDS[kind]())
    mixed = logits(model, adapter_names=["two", "one"])
    for row, name in enumerate(("two", "one")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model)[row], rtol=1e-4, atol=1e-4)


def test_dora_does_not_mix_in_a_batch(base: Any) -> None:
    model = adapt(base, KINDS["dora"](), KINDS["dora"]())
    with pytest.raises(ValueError, match="DoRA"):
        logits(model, adapter_names=["two", "one"])


def test_lora_is_summed_by_peft(base: Any) -> None:
    model = adapt(base, KINDS["lora"](), KINDS["lora"]())
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    summed = logits(model)
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(logits(model), summed, rtol=1e-4, atol=1e-4)


def test_lora_reft_is_not_summed(base: Any) -> None:
    model = adapt(base, KINDS["lora_reft"](), KINDS["lora_reft"]())
    with pytest.raises(InputError, match="REFT or of LORA to be summed, got LORA_REFT"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")


@pytest.mark.parametrize("other", ["lora", "lora_reft", "ia3", "prefix"])
def test_one_model_holds_adapters_of_one_type(base: Any, other: str) -> None:
    model = get_peft_model(base, reft())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", KINDS[other]())


def test_pefts_mixed_model_refuses_reft(base: Any) -> None:
    with pytest.raises(ValueError, match="'REFT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, reft(), mixed=True)


def test_reft_is_trained_on_top_of_a_frozen_lora(
    base: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    untuned = logits(base)
    adapt(copy.deepcopy(base), KINDS["lora"]()).save_pretrained(tmp_path / "lora")

    def with_lora() -> Any:
        base = lr.load_base(tiny_llama_dir, storage="fp32", device="cpu")
        return PeftModel.from_pretrained(base, tmp_path / "lora" / "one")

    lora = with_lora()
    of_lora = logits(lora)
    with pytest.warns(UserWarning, match=r"second time|Already found"):
        model = get_peft_model(lora.get_base_model(), reft(init="paper"))
    train(model, "default")
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert all(".reft_phi." in name for name in trained)
    of_both = logits(model)
    assert not torch.allclose(of_both, of_lora, atol=1e-4)
    with model.disable_adapter():  # PEFT switches off whatever is in the base
        assert torch.equal(logits(model), untuned)
    model.save_pretrained(tmp_path / "reft")
    with pytest.warns(UserWarning, match=r"second time|Already found"):
        loaded = PeftModel.from_pretrained(with_lora().get_base_model(), tmp_path / "reft")
    assert torch.equal(logits(loaded), of_both)
    tokens = loaded.generate(input_ids=IDS, attention_mask=IDS > 0, max_new_tokens=3)
    assert tokens.shape[1] > IDS.shape[1]
