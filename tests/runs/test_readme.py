"""What a trained adapter says about itself, and what is said when it is put on another base."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lowmem_reft import cli
from lowmem_reft.base.identity import checkpoint_digest
from lowmem_reft.data.tokens import EncodedRows
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import resolve_compute_dtype
from lowmem_reft.methods.card import TrainingCard, load_card
from lowmem_reft.options import (
    DataOptions,
    EvaluateOptions,
    HeldOutOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    TrainOptions,
)
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.readme import command_of, write_model_card
from lowmem_reft.runs.resolve import Run
from lowmem_reft.runs.train import run_training


@pytest.fixture
def options(tiny_llama_dir: Path, films: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        model=ModelOptions(model=str(tiny_llama_dir), storage="nf4", device="cpu"),
        data=DataOptions(data=str(films)),
        held_out=HeldOutOptions(eval_data=str(films), validation_data=str(films)),
        method=MethodOptions(rank=2, positions="f1+l2"),
        optim=OptimOptions(max_steps=2, batch_size=4),
        run=RunOptions(output_dir=tmp_path / "film-adapter", quiet=True),
    )


def run_of(options: TrainOptions, card: TrainingCard) -> Run:
    """What a README is written from: nothing but options, card and dtype."""
    return Run(
        options=options,
        card=card,
        config=LlamaConfig(),
        compute_dtype=resolve_compute_dtype(card.compute_dtype, "cpu"),
        tokenizer=None,
        encoded=EncodedRows(examples=[], num_cut_prompts=0, num_cut_tokens=0),
    )


@pytest.fixture
def trained(options: TrainOptions) -> tuple[Path, dict[str, Any]]:
    result = run_training(options)
    return Path(result["adapter_dir"]), result


def test_the_folder_is_ready_to_be_shared(
    trained: tuple[Path, dict[str, Any]], options: TrainOptions, tiny_llama_dir: Path
) -> None:
    directory, result = trained
    names = {path.name for path in directory.iterdir()}
    files = {"adapter_model.safetensors", "adapter_config.json", "training.json", "README.md"}
    assert names == files
    card = ModelCard.load(directory / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lowmem-reft", "loreft"]
    assert card.data.base_model is None  # a local directory
    (score,) = card.data.eval_results
    assert (score.metric_type, score.metric_value) == ("accuracy", result["eval"]["value"])
    kept = load_card(directory)
    assert kept is not None
    assert kept.base_digest == checkpoint_digest(tiny_llama_dir)
    for said in (
        "a local directory named",
        str(kept.base_digest),
        "`nf4`",
        "rank `2`",
        "positions `f1+l2`",
        str(kept.data_digest),
        f"{result['peak_bytes'] / 2**20:,.1f} MiB",
        f"{result['tokens_per_s']:,.0f} tokens/s",
        "| validation accuracy |",
        "| test accuracy |",
        f"| torch | {torch.__version__} |",
        "--max-steps 2",
        "computed in `fp32`" if resolve_compute_dtype("auto") == torch.float32 else "in `bf16`",
    ):
        assert said in card.text
    assert str(tiny_llama_dir) not in card.content
    assert str(options.run.output_dir.parent) not in card.content


def test_the_loading_code_of_the_card_runs_in_the_folder_once_the_base_is_filled_in(
    trained: tuple[Path, dict[str, Any]], tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = trained
    text = (directory / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    placeholder = f'"PATH/TO/{tiny_llama_dir.name}"'
    assert placeholder in code
    monkeypatch.chdir(directory)
    names: dict[str, Any] = {}
    exec(code.replace(placeholder, repr(str(tiny_llama_dir))), names)
    assert names["model"].peft_config["default"].positions == "f1+l2"
    assert "without it ends in `KeyError: 'REFT'`" in text


def test_the_loading_code_of_a_prefix_generates_with_it(
    options: TrainOptions, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = MethodOptions(method="prefix", num_virtual_tokens=4)
    directory = Path(run_training(replace(options, method=method))["adapter_dir"])
    text = (directory / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(directory)
    names: dict[str, Any] = {}
    exec(code.replace(f'"PATH/TO/{tiny_llama_dir.name}"', repr(str(tiny_llama_dir))), names)
    model = names["model"].eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 2)
    ids = torch.arange(3, 11)[None]
    new = model.generate(
        input_ids=ids, attention_mask=ids > 0, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    with torch.no_grad():
        whole = model(input_ids=new[:, :-1], attention_mask=new[:, :-1] > 0).logits
    assert torch.equal(whole[:, 7:].argmax(-1), new[:, 8:])


def test_an_adapter_for_a_base_of_another_shape_is_refused_with_both_shapes(
    trained: tuple[Path, dict[str, Any]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    config = AutoConfig.from_pretrained(tiny_llama_dir)
    config.hidden_size, config.head_dim = 32, 8
    AutoModelForCausalLM.from_config(config).save_pretrained(narrow)
    for path in tiny_llama_dir.glob("tokenizer*"):
        (narrow / path.name).write_bytes(path.read_bytes())
    evaluation = EvaluateOptions(
        model=ModelOptions(model=str(narrow), device="cpu"),
        data=DataOptions(data=str(tmp_path / "films.jsonl")),
        adapter=trained[0],
        quiet=True,
    )
    made_for = f"give the base that it was made for {str(tiny_llama_dir)!r} \\(size mismatch for .*"
    shapes = r"(?:\[64, 2\].*\[32, 2\]|\[2, 64\].*\[2, 32\])"
    with pytest.raises(InputError, match=made_for + shapes):
        run_evaluation(evaluation)
    (trained[0] / "training.json").unlink()
    config_path = trained[0] / "adapter_config.json"
    known = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(known | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="that it was made for, which it does not name \\(size"):
        run_evaluation(evaluation)


def test_no_local_path_is_in_the_folder_where_the_base_is_a_hub_id(
    trained: tuple[Path, dict[str, Any]], options: TrainOptions
) -> None:
    directory, result = trained
    kept = load_card(directory)
    assert kept is not None
    model = replace(options.model, model="maker/tiny")
    write_model_card(
        run_of(replace(options, model=model), replace(kept, base="maker/tiny")), result
    )
    card = ModelCard.load(directory / "README.md")
    assert card.data.base_model == "maker/tiny"
    assert "https://huggingface.co/maker/tiny" in card.text
    assert str(options.run.output_dir.parent) not in card.content
    replace(kept, base="maker/tiny").save(directory)
    assert str(options.run.output_dir.parent) not in (directory / "training.json").read_text()


def test_the_command_in_the_card_is_parsed_to_the_same_settings(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, data=replace(options.data, template="Q: {prompt} A:"))
    words = shlex.split(command_of(options))
    assert words[:2] == ["lowmem-reft", "train"]
    seen: list[Any] = []
    monkeypatch.setattr(cli, "_run", lambda _, parsed: seen.append(parsed) or {})
    assert cli.main(words[1:]) == 0
    assert (seen[0].method, seen[0].optim) == (options.method, options.optim)
    assert seen[0].data == replace(options.data, data="films.jsonl")


def test_only_what_names_files_is_shortened_in_the_command(options: TrainOptions) -> None:
    template = "/inst {prompt}"
    options = replace(options, data=replace(options.data, template=template))
    words = shlex.split(command_of(options))
    assert words[words.index("--template") + 1] == template
    for option in ("--model", "--data", "--eval-data", "--validation-data", "--output-dir"):
        assert not Path(words[words.index(option) + 1]).is_absolute()


def test_several_processes_are_in_the_command_and_in_the_batch(
    trained: tuple[Path, dict[str, Any]], options: TrainOptions
) -> None:
    directory, result = trained
    kept = load_card(directory)
    assert kept is not None
    alone = (directory / "README.md").read_text()
    assert "lowmem-reft train" in alone
    assert "batches of 4 (4 x 1 accumulation)" in alone
    result = {**result, "num_processes": 3, "effective_batch": 12}
    write_model_card(run_of(options, kept), result)
    said = (directory / "README.md").read_text()
    assert "accelerate launch --num_processes 3 -m lowmem_reft.cli train --model" in said
    assert "batches of 12 (4 x 1 accumulation x 3 processes)" in said


def test_the_use_names_the_dtype_that_was_asked_for(
    trained: tuple[Path, dict[str, Any]], options: TrainOptions
) -> None:
    directory, result = trained
    kept = load_card(directory)
    assert kept is not None
    assert "compute_dtype=" not in (directory / "README.md").read_text()
    write_model_card(run_of(options, replace(kept, compute_dtype="fp32")), result)
    assert 'storage="nf4", compute_dtype="fp32")' in (directory / "README.md").read_text()
