"""pyreft's checkpoints in and out. make_pyreft_fixtures.py says what tests/support/pyreft is.

With LOWMEM_REFT_PYREFT_PYTHON, the interpreter of an environment with pyreft 0.1.0, pyreft itself
also makes the fixtures anew and loads what was exported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import load_card
from lowmem_reft.methods.pyreft.exporting import run_export
from lowmem_reft.methods.pyreft.importing import run_import
from lowmem_reft.methods.pyreft.parameters import orthogonal_columns
from lowmem_reft.options import ExportPyreftOptions, ImportPyreftOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.positions import assign_groups, parse_positions

DATA = Path(__file__).parents[1] / "support" / "pyreft"
CASES = json.loads((DATA / "cases.json").read_text())
SIX = [f"{kind}_{tie}" for kind in ("loreft", "noreft", "direft") for tie in ("tied", "sides")]
SIX += [
    f"{kind}_{tie}" for kind in ("nodireft", "consreft", "lobireft") for tie in ("tied", "sides")
]
PYREFT_PYTHON = os.environ.get("LOWMEM_REFT_PYREFT_PYTHON")
needs_pyreft = pytest.mark.skipif(not PYREFT_PYTHON, reason="LOWMEM_REFT_PYREFT_PYTHON is not set")

LAYER_0 = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"


def options(fixture: Path, output: Path, **given: Any) -> ImportPyreftOptions:
    """Of a fixture: what its files do not say is given."""
    case = CASES[fixture.name]
    if case["class"] not in ("ConsreftIntervention", "LobireftIntervention"):
        given = {"act": case["act"], **given}
    return ImportPyreftOptions(
        **{"directory": fixture, "output_dir": output, "positions": case["positions"], **given}
    )


def import_case(name: str, output: Path, data: Path = DATA, **given: Any) -> dict[str, Any]:
    if name == "trainer":
        given = {"directory": data / name / "checkpoint-10", **given}
    if name == "classifier":
        given = {"task_type": "SEQ_CLS", **given}
    return run_import(options(data / name, output, **given))


def load(adapter: Path, base: Path = DATA / "base", **labels: int) -> Any:
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    return PeftModel.from_pretrained(auto.from_pretrained(base, **labels), str(adapter)).eval()


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


def check_logits(name: str, adapter: Path, data: Path = DATA) -> None:
    """The adapter's logits are pyreft's, and not the base's."""
    recorded = load_file(data / "logits.safetensors")
    model = load(adapter, data / "base", **({"num_labels": 4} if name == "classifier" else {}))
    logits = logits_of(model, recorded["input_ids"])
    torch.testing.assert_close(logits, recorded[name], atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert (logits_of(model, recorded["input_ids"]) - logits).abs().max() > 0.1


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / name, tmp_path / "copies" / name))


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors in a file of pyreft's; None takes one out."""
    held = {**torch.load(path, weights_only=True), **tensors}
    torch.save({name: tensor for name, tensor in held.items() if tensor is not None}, path)


@pytest.mark.filterwarnings("ignore:Some weights of:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_an_imported_adapter_gives_the_logits_of_pyreft(name: str, tmp_path: Path) -> None:
    result = import_case(name, tmp_path / "adapter")
    assert result["tie"] == CASES[name]["tie"]
    check_logits(name, tmp_path / "adapter")


@pytest.mark.parametrize("tie", ["tied", "sides"])
def test_the_positions_that_pyreft_was_told_to_edit_are_those_that_are_edited_here(
    tie: str,
) -> None:
    prompt = torch.ones(1, 9, dtype=torch.bool)
    groups = assign_groups(parse_positions("f2+l2"), tie, prompt)[0]
    locations = CASES[f"loreft_{tie}"]["locations"]
    assert [(groups == number).nonzero()[:, 0].tolist() for number in range(len(locations))] == (
        locations
    )


@pytest.mark.parametrize("name", ["loreft_sides", "loreft_paths"])
def test_old_keys_with_dots_say_the_same_as_new_ones(name: str, tmp_path: Path) -> None:
    old = copy_of(name, tmp_path)
    for path in old.glob("intkey_*.bin"):
        key = path.name.removeprefix("intkey_").removesuffix(".bin")
        path.rename(
            old / f"intkey_{key.replace('_', '.').replace('block.output', 'block_output')}.bin"
        )
    config = json.loads((old / "config.json").read_text())
    config["representations"] = [fields[:6] for fields in config["representations"]]
    config["sorted_keys"] = None
    (old / "config.json").write_text(json.dumps(config))
    run_import(options(old, tmp_path / "old"))
    import_case(name, tmp_path / "new")
    files = [tmp_path / which / "adapter_model.safetensors" for which in ("old", "new")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_with_the_base_the_adapter_has_a_card_and_its_name(tmp_path: Path) -> None:
    result = import_case("loreft_tied", tmp_path, model=str(DATA / "base"))
    card = load_card(tmp_path)
    assert (card.base, card.method) == (str(DATA / "base"), "loreft")
    assert not any("--model" in note for note in result["notes"])


def test_without_config_the_class_is_inferred_or_asked_for(tmp_path: Path) -> None:
    for name, said in (("consreft_tied", "Consreft"), ("noreft_tied", "Noreft")):
        directory = copy_of(name, tmp_path)
        (directory / "config.json").unlink()
        with pytest.raises(InputError, match=rf"intervention must be given .*{said}\w+ or "):
            run_import(options(directory, tmp_path / "out"))
        given = CASES[name]["class"]
        run_import(options(directory, tmp_path / name, intervention=given))
        check_logits(name, tmp_path / name)
    with pytest.raises(InputError, match=r"must hold rotate_layer.* for a LoreftIntervention"):
        run_import(options(directory, tmp_path / "out", intervention="LoreftIntervention"))


def test_a_class_of_somebody_else_is_not_imported_but_can_be_named(tmp_path: Path) -> None:
    directory = copy_of("loreft_tied", tmp_path)
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("pyreft.interventions", "antigravity"))
    with pytest.raises(InputError, match="got \"<class 'antigravity"):
        run_import(options(directory, tmp_path / "out"))
    run_import(options(directory, tmp_path / "out", intervention="LoreftIntervention"))
    check_logits("loreft_tied", tmp_path / "out")
    with pytest.raises(InputError, match="intervention must be LoreftIntervention, as"):
        import_case("loreft_tied", tmp_path / "other", intervention="NoreftIntervention")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("loreft_tied", {"act": None}, "act must be given for LoreftIntervention.*add --act none"),
        ("consreft_tied", {"act": "relu"}, "act must be left out for Consreft"),
        ("loreft_tied", {"tie": "sides"}, "tie must fit the 1 .* got 'sides'.*trained as tied"),
        ("loreft_sides", {"tie": "tied"}, "tie must fit the 2 .* got 'tied'.*trained as sides"),
        ("loreft_sides", {"positions": "f4"}, "tie must fit the 2 .*positions 'f4'"),
        ("loreft_tied", {"positions": "7"}, "positions must be 'all'"),
        ("noreft_bias", {"act": "relu"}, "must hold no proj_layer.bias together with act 'relu'"),
        ("classifier", {"task_type": "CAUSAL_LM"}, "no trained weights of the base .*score.weight"),
        ("loreft_tied", {"task_type": "SEQ_CLS"}, "which has no trained head"),
    ],
)
def test_what_the_files_cannot_tell_is_asked_for_and_contradictions_are_refused(
    name: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        import_case(name, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model must have vectors of 16 numbers .* with 64 and 4"):
        import_case("loreft_tied", tmp_path, model=str(tiny_llama_dir))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1044992\n"
HEAD = "pytorch_model.bin"


class _Code:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def _with_code(directory: Path) -> None:
    torch.save({"weight": _Code(directory / "ran")}, directory / LAYER_0)


def _truncated(directory: Path) -> None:
    path = directory / LAYER_0
    path.write_bytes(path.read_bytes()[:-500])


def _edit_config(**fields: Any) -> Any:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def _renamed(old: str, new: str) -> Any:
    return lambda directory: [
        path.rename(directory / path.name.replace(old, new))
        for path in directory.glob(f"*{old}*.bin")
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_with_code, r"#0\.bin must hold tensors only.*nothing of it was run"),
        (_truncated, r"#0\.bin must be a whole file of torch\.save"),
        (lambda d: (d / LAYER_0).write_text(POINTER), r"#0\.bin must be .*git-LFS.*git lfs pull"),
        (lambda d: (d / LAYER_0).write_bytes(b""), r"#0\.bin must be .*empty file"),
        (
            lambda d: torch.save({"score.weight": torch.full((2, 16), torch.inf)}, d / HEAD),
            r"pytorch_model\.bin must hold finite numbers, .*score\.weight",
        ),
        (lambda d: torch.save([1], d / LAYER_0), "must hold tensors by name, got list"),
        (lambda d: change(d / LAYER_0, bias=torch.ones(4)), r"bias of \[4\]"),
        (lambda d: change(d / LAYER_0, bias=None), "must hold rotate_layer, weight, bias for"),
        (
            lambda d: change(d / LAYER_0, bias=torch.full((3,), torch.nan)),
            "NaN or infinity in bias",
        ),
        (lambda d: change(d / LAYER_0, rotate_layer=torch.zeros(16, 3)), "under weight decay"),
        (
            lambda d: change(
                d / LAYER_0,
                weight=torch.ones(2, 16),
                bias=torch.ones(2),
                rotate_layer=torch.eye(16, 2),
            ),
            r"one rank and width .* 2 of 16 in .*layer_0.* 3 of 16 in .*layer_2",
        ),
        (lambda d: (d / LAYER_0).unlink(), f"fetch {LAYER_0} again"),
        (_edit_config(sorted_keys=None, representations=[[0]]), "each of the 1 representations"),
        (_edit_config(intervention_types=None), "must have the lists representations and"),
        (
            _edit_config(
                intervention_types=[
                    "<class 'pyreft.interventions.LoreftIntervention'>",
                    "<class 'pyreft.interventions.NoreftIntervention'>",
                ]
            ),
            "must name one intervention_type for all",
        ),
        (lambda d: (d / "config.json").write_text("{"), "config.json must be JSON"),
        (_renamed("nunit_1", "nunit_2"), "must edit single token positions"),
        (_renamed("intkey_layer", "intkey_block"), "must be named like"),
        (_renamed("layer_2_comp_block_output", "comp_model_layers[2]_input"), "the output of a"),
    ],
)
def test_a_checkpoint_that_is_damaged_or_too_different_is_refused_with_the_file_and_the_rule(
    damage: Any, message: str, tmp_path: Path
) -> None:
    directory = copy_of("loreft_tied", tmp_path)
    damage(directory)
    with pytest.raises(InputError, match=message):
        run_import(options(directory, tmp_path / "out"))
    assert not (directory / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0_comp_block", "0_comp_mlp", r"one component .*mlp_output in .*block_output in"),
        ("block_output", "attention_input", "must edit block_output, .*got 'attention_input'"),
        ("layer_0_comp_block", "comp_model_layers[0]_mlp_gate", "one component .*_mlp_gate in"),
        ("1#0", "1#1", r"as many interventions for every layer"),
    ],
)
def test_places_that_an_adapter_here_has_not_are_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    directory = copy_of("loreft_tied", tmp_path)
    (directory / "config.json").unlink()
    _renamed(old, new)(directory)
    with pytest.raises(InputError, match=message):
        run_import(options(directory, tmp_path / "out"))


def test_a_path_to_blocks_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    directory = copy_of("loreft_paths", tmp_path)
    _edit_config(sorted_keys=None)(directory)
    _renamed("model_layers", "transformer_h")(directory)
    with pytest.raises(InputError, match=r"blocks are at transformer_h, .*blocks at model\.layers"):
        run_import(options(directory, tmp_path / "out"))


def test_a_part_of_a_block_is_found_by_its_path_too(tmp_path: Path) -> None:
    directory = copy_of("loreft_null_rank", tmp_path)
    _edit_config(sorted_keys=None)(directory)
    _renamed("layer_1_comp_mlp_output", "comp_model_layers[1]_mlp_output")(directory)
    assert run_import(options(directory, tmp_path / "out"))["component"] == "mlp_output"
    check_logits("loreft_null_rank", tmp_path / "out")


def test_a_part_that_is_normed_before_it_is_edited_here_is_refused(tmp_path: Path) -> None:
    Gemma2Config(hidden_size=16, head_dim=8, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"block_output in Gemma2DecoderLayer, got 'mlp_output'"):
        import_case("loreft_null_rank", tmp_path / "out", model=str(tmp_path))


def test_the_same_place_in_both_styles_is_refused(tmp_path: Path) -> None:
    directory = copy_of("loreft_tied", tmp_path)
    dotted = "intkey_layer.0.comp.block_output.unit.pos.nunit.1#0.bin"
    shutil.copy(directory / LAYER_0, directory / dotted)
    with pytest.raises(InputError, match="the same place in the old and in the new style"):
        run_import(options(directory, tmp_path / "out"))


def test_an_interleaved_list_of_untied_sides_is_imported_with_a_note(tmp_path: Path) -> None:
    directory = copy_of("loreft_sides", tmp_path)
    keys = json.loads((directory / "config.json").read_text())["sorted_keys"]
    assert not any(
        "layer by layer" in note for note in import_case("loreft_sides", tmp_path / "a")["notes"]
    )
    _edit_config(sorted_keys=sorted(keys))(directory)
    notes = run_import(options(directory, tmp_path / "b"))["notes"]
    assert any("layer by layer" in note for note in notes)


def test_16_bit_tensors_and_a_second_bias_are_noted(tmp_path: Path) -> None:
    bf16 = import_case("direft_bf16", tmp_path / "a")["notes"]
    bias = import_case("noreft_bias", tmp_path / "b")["notes"]
    assert any("16 bit are widened" in note for note in bf16)
    assert any("subtracted from the bias" in note for note in bias)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_rotation_is_the_one_that_torch_computes(rank: int) -> None:
    layer = orthogonal(nn.Linear(rank, 16, bias=False))
    parametrization = layer.parametrizations.weight
    with torch.no_grad():
        parametrization.original.add_(torch.randn(16, rank).tril(-1) * 0.5)
    columns = orthogonal_columns(parametrization.original.detach(), parametrization[0].base)
    torch.testing.assert_close(columns, layer.weight.detach(), atol=1e-6, rtol=0)
    assert not torch.allclose(columns, parametrization[0].base[:, :rank], atol=0.1)


def test_missing_directories_and_trainer_folders_say_what_to_give(tmp_path: Path) -> None:
    several = copy_of("trainer", tmp_path)
    shutil.copytree(several / "checkpoint-10", several / "checkpoint-20")
    for directory, hint in (
        (tmp_path / "none", "that pyreft's save wrote"),
        (several, "checkpoint-10, .*checkpoint-20"),
    ):
        with pytest.raises(InputError, match=f"intkey_.*{hint}"):
            run_import(
                ImportPyreftOptions(directory=directory, positions="l1", output_dir=tmp_path / "o")
            )


def test_the_only_checkpoint_of_a_trainer_is_taken(tmp_path: Path) -> None:
    import_case("trainer", tmp_path / "adapter", directory=DATA / "trainer")
    check_logits("trainer", tmp_path / "adapter")


def test_sides_are_spoken_of_only_where_there_are_two(tmp_path: Path) -> None:
    for positions, is_said in (("f1", False), ("f1+l1", True)):
        done = import_case("loreft_tied", tmp_path / positions, positions=positions)
        assert any("one side alone" in note for note in done["notes"]) == is_said


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    import_case("loreft_tied", tmp_path / "adapter")
    with pytest.raises(InputError, match="output_dir must be a new or an empty directory"):
        import_case("loreft_relu", tmp_path / "adapter")
    with pytest.raises(InputError, match="output_dir must be a new or an empty directory"):
        run_export(ExportPyreftOptions(adapter_dir=tmp_path / "adapter", output_dir=tmp_path))


def test_the_commands_print_json_and_end_with_2_where_the_user_can_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, adapter, again = DATA / "loreft_tied", tmp_path / "adapter", tmp_path / "again"
    command = ["import-pyreft", str(source), "--positions", "f2+l2", "-o", str(adapter), "--json"]
    assert cli.main(command) == 2
    assert "act must be given" in capsys.readouterr().err
    assert cli.main([*command, "--act", "none"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layers"] == [0, 2]
    export = ["export-pyreft", str(adapter), "--output-dir", str(again), "--json"]
    assert cli.main(export) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_interventions"] == 2


@pytest.mark.parametrize("name", [*SIX, "classifier", "loreft_relu"])
def test_export_and_import_bring_an_adapter_back(name: str, tmp_path: Path) -> None:
    import_case(name, tmp_path / "adapter")
    run_export(ExportPyreftOptions(adapter_dir=tmp_path / "adapter", output_dir=tmp_path / name))
    run_import(
        options(
            tmp_path / name,
            tmp_path / "again",
            task_type="SEQ_CLS" if name == "classifier" else "CAUSAL_LM",
        )
    )
    before, after = (
        load_file(tmp_path / which / "adapter_model.safetensors") for which in ("adapter", "again")
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SIX)
def test_exported_files_are_like_those_that_pyreft_itself_writes(name: str, tmp_path: Path) -> None:
    import_case(name, tmp_path / "adapter")
    run_export(ExportPyreftOptions(adapter_dir=tmp_path / "adapter", output_dir=tmp_path / "o"))
    ours, theirs = (
        json.loads((where / "config.json").read_text()) for where in (tmp_path / "o", DATA / name)
    )
    assert ours == {key: theirs[key] for key in theirs if key != "transformers_version"}
    for path in (DATA / name).glob("*.bin"):
        shapes = [
            {key: t.shape for key, t in torch.load(where / path.name, weights_only=True).items()}
            for where in (tmp_path / "o", DATA / name)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ReftConfig(tie="positions", positions="f1+l1"), "tie must be tied or sides"),
        (ReftConfig(positions="every"), "positions must be of the prompt .* --positions all"),
        (ReftConfig(intervention="red"), "intervention must be one that pyreft has, got 'red'"),
        (ReftConfig(intervention="bottleneck", component="mlp_output"), "one that pyreft has"),
        (LoraConfig(target_modules=["q_proj"]), "must hold a ReFT adapter, got one of LORA; "),
    ],
)
def test_what_pyreft_cannot_express_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(DATA / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        run_export(ExportPyreftOptions(adapter_dir=tmp_path / "adapter", output_dir=tmp_path / "o"))


def test_a_damaged_adapter_is_refused_with_its_file(tmp_path: Path) -> None:
    import_case("loreft_tied", tmp_path / "a")
    exporting = ExportPyreftOptions(adapter_dir=tmp_path / "a", output_dir=tmp_path / "o")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="safetensors must be a whole file"):
        run_export(exporting)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json must be a PEFT configuration"):
        run_export(exporting)


# Runs the code of each README in its directory, then the adapted model, by pyreft.
LOAD_AND_RUN = """
import json, os, sys, torch, pyreft
from safetensors.torch import load_file, save_file
logits = {}
for name, case in json.load(open(sys.argv[1])).items():
    os.chdir(case["directory"])
    names = {}
    exec(case["code"], names)
    input_ids = torch.tensor(case["input_ids"])
    layers = len(names["representations"]) // len(case["locations"])
    where = [[at] * len(input_ids) for at in case["locations"] for _ in range(layers)]
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.no_grad():
        out = names["reft_model"](batch, unit_locations={"sources->base": (None, where)})[1]
    logits[name] = out.logits.contiguous()
    base = type(names["model"]).from_pretrained(case["base"], num_labels=4)
    try:
        loaded = pyreft.ReftModel.load(case["directory"], base)
    except KeyError as error:
        assert error.args == ("add_bias",), error
        assert case["by_load"] is False, name
    else:
        assert case["by_load"] is True, name
        for key, intervention in loaded.interventions.items():
            built, inputs = names["reft_model"].interventions[key], torch.randn(5, 16)
            rounded = intervention.float()(inputs)  # it has loaded its learned source in bf16
            if case["act"] == "none":  # which it does not know
                assert torch.allclose(rounded, built(inputs), atol=0.1), (name, key)
save_file(logits, sys.argv[2])
"""


@needs_pyreft
def test_pyreft_loads_what_was_exported_and_gives_the_same_logits(tmp_path: Path) -> None:
    input_ids = load_file(DATA / "logits.safetensors")["input_ids"]
    cases, ours = {}, {}
    for name in [*SIX, "loreft_relu", "loreft_null_rank", "classifier"]:
        adapter, exported = tmp_path / name / "adapter", tmp_path / name / "pyreft"
        import_case(name, adapter, model=str(DATA / "base"))
        run_export(ExportPyreftOptions(adapter_dir=adapter, output_dir=exported))
        readme = (exported / "README.md").read_text()
        labels = {"num_labels": 4} if name == "classifier" else {}
        ours[name] = logits_of(load(adapter, **labels), input_ids)
        cases[name] = {
            "directory": str(exported),
            "code": re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1],
            "input_ids": input_ids.tolist(),
            "locations": CASES[name]["locations"],
            "act": CASES[name]["act"],
            "base": str(DATA / "base"),
            "by_load": not name.startswith("no"),
        }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_pyreft("-c", LOAD_AND_RUN, str(tmp_path / "cases.json"), str(tmp_path / "out.safetensors"))
    theirs = load_file(tmp_path / "out.safetensors")
    assert theirs.keys() == ours.keys()
    for name, logits in theirs.items():
        torch.testing.assert_close(logits, ours[name], atol=1e-5, rtol=0)


@needs_pyreft
@pytest.mark.filterwarnings("ignore:Some weights of:UserWarning")
def test_checkpoints_that_pyreft_makes_now_are_imported_as_well(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "make_pyreft_fixtures.py"
    run_pyreft(str(script), str(tmp_path / "data"))
    for name in CASES:
        import_case(name, tmp_path / "adapters" / name, tmp_path / "data")
        check_logits(name, tmp_path / "adapters" / name, tmp_path / "data")


def run_pyreft(*arguments: str) -> None:
    finished = subprocess.run(
        [str(PYREFT_PYTHON), *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
