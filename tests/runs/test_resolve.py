"""A run is resolved once: the configuration is read once, and one function settles dtypes."""

from __future__ import annotations

import builtins
import json
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.base.hub import load_config
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import resolve_storage
from lowmem_reft.methods.card import load_card, merge_card
from lowmem_reft.options import (
    DataOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    PromptOptions,
    ReuseOptions,
    RunOptions,
    TrainOptions,
    written,
)
from lowmem_reft.runs.resolve import resolve
from lowmem_reft.runs.train import run_training

OF_LIBRARIES = {
    "peft/utils/save_and_load.py": "compares sizes of vocabularies whenever an adapter is saved",
    "transformers/generation/configuration_utils.py": "looks for settings of generation",
}
"""Who reads config.json again, and cannot be given what was read."""


@pytest.fixture
def options(tiny_llama_dir: Path, films: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        model=ModelOptions(model=str(tiny_llama_dir), storage="nf4", device="cpu"),
        data=DataOptions(data=str(films)),
        held_out=HeldOutOptions(eval_data=str(films), validation_data=str(films)),
        method=MethodOptions(rank=2, positions="f1+l2", layers="upper:0.5"),
        optim=OptimOptions(max_steps=2, batch_size=4),
        memory=MemoryOptions(memory_gib=4),
        run=RunOptions(output_dir=tmp_path / "run", quiet=True),
    )


@pytest.fixture
def readers(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files on the stack at each opening of the base's config.json."""
    path, found = Path(options.model.model) / "config.json", []
    opened = builtins.open

    def noted(file: Any, *arguments: Any, **more: Any) -> Any:
        if str(file) == str(path):
            found.append([frame.filename for frame in traceback.extract_stack()])
        return opened(file, *arguments, **more)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr("io.open", noted)  # pathlib's
    return found


@pytest.mark.parametrize(
    ("storage", "method", "resident"),
    [
        ("fp32", "loreft", "all"),
        ("nf4", "loreft", "all"),
        ("nf4", "loreft", "upper"),
        ("fp32", "full", "all"),
    ],
)
def test_one_training_reads_the_configuration_of_its_base_once(
    options: TrainOptions,
    readers: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    storage: Any,
    method: str,
    resident: Any,
) -> None:
    calls = []
    monkeypatch.setattr(
        "lowmem_reft.runs.resolve.load_config",
        lambda *given: calls.append(given) or load_config(*given),
    )
    if method != "loreft":
        options = replace(options, method=MethodOptions(method=method))
    options = replace(
        options,
        model=replace(options.model, storage=storage),
        reuse=ReuseOptions(resident=resident),
    )
    run_training(options)
    ours = [
        files for files in readers if not any(file.endswith(tuple(OF_LIBRARIES)) for file in files)
    ]
    # ``load_config`` looks at the file before transformers makes a configuration of it.
    places = {
        tuple(Path(file).name for file in files if "lowmem_reft/" in file)[:4] for files in ours
    }
    assert places == {("train.py", "resolve.py", "resolve.py", "hub.py")}
    assert len(calls) == 1


def test_a_run_is_settled_before_anything_is_loaded(options: TrainOptions) -> None:
    model = replace(options.model, storage=None, compute_dtype="fp32")
    run = resolve(replace(options, model=model))
    assert (run.card.storage, run.compute_dtype) == ("nf4", torch.float32)
    assert run.card.compute_dtype == "fp32"
    assert run.config.model_type == "llama"
    assert run.optim.lr is not None
    assert run.adapter_dir == options.run.output_dir / "adapter"


def test_what_a_base_computes_in_follows_from_storage_dtype_and_device() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    assert resolve_storage(None, "fp32", "cpu", default="int8") == ("int8", fp32)
    assert resolve_storage("bf16", "auto", "cpu", default="int8") == ("bf16", bf16)
    assert resolve_storage("nf4", bf16, "cpu") == ("nf4", bf16)
    with pytest.raises(InputError, match="compute_dtype must be auto or bf16 with storage bf16"):
        resolve_storage("bf16", "fp32", "cpu")
    with pytest.raises(InputError, match="storage must be bf16 or fp32 on a CPU"):
        resolve_storage("fp16", "auto", "cpu")
    # Of a card that is planned for, this machine is not asked.
    assert resolve_storage("nf4", "auto", has_bf16=True) == ("nf4", bf16)
    assert resolve_storage("nf4", "auto", has_bf16=False) == ("nf4", fp32)
    assert resolve_storage("fp16", "auto", has_bf16=False) == ("fp16", torch.float16)


def test_an_adapter_keeps_the_joint_it_was_trained_with(options: TrainOptions) -> None:
    run = resolve(replace(options, prompts=PromptOptions(joint="none")))
    run.card.save(options.run.output_dir)
    card = load_card(options.run.output_dir)
    assert card is not None
    given = {"template": None, "max_length": None}
    assert merge_card(card, options.model, **given).joint == "none"
    assert merge_card(card, options.model, **given, joint="space").joint == "space"
    assert resolve(options).card.joint == "auto"


def test_adapters_from_before_there_was_a_choice_were_trained_with_a_space(
    options: TrainOptions,
) -> None:
    directory = options.run.output_dir
    resolve(options).card.save(directory)
    path = directory / "training.json"
    content = json.loads(path.read_text())
    del content["joint"]
    path.write_text(json.dumps(content))
    card = load_card(directory)
    assert card is not None
    assert card.joint == "space"


@pytest.mark.parametrize("part", ["data", "validation_data", "eval_data"])
def test_rows_that_do_not_fit_are_told_before_the_training_and_left_out_on_request(
    options: TrainOptions, tmp_path: Path, part: str
) -> None:
    rows = [{"prompt": "was it", "choices": ["good", "bad"], "answer": i % 2} for i in range(4)]
    rows[2] = {"prompt": "what", "choices": ["good", "very " * 600], "answer": 0}
    if part == "data":
        rows[2] = {"prompt": "what", "choices": ["good " * 600, "bad"], "answer": 0}
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = written.changed(options, memory_gib=None, max_steps=1, **{part: str(path)})
    with pytest.raises(InputError, match=r"long\.jsonl:3: response must leave room"):
        run_training(options)
    options = replace(options, prompts=PromptOptions(long_rows="drop"))
    with pytest.warns(UserWarning, match=r"1 of 4 rows were left out, the first is .*jsonl:3"):
        result = run_training(options)
    if part == "eval_data":
        assert result["eval"]["num_examples"] == 3


@pytest.mark.parametrize("kind", ["choices", "response", "generated", "label"])
def test_no_prompt_is_cut_where_long_rows_are_left_out(
    options: TrainOptions, tmp_path: Path, kind: str
) -> None:
    prompts, answers = ["was it", "was it " * 400, "was", "what"], ["good", "bad"] * 2
    rows: list[dict[str, Any]]
    if kind == "choices":
        rows = [{"prompt": p, "choices": answers[:2], "answer": 0} for p in prompts]
    elif kind == "label":
        rows = [{"text": p, "label": a} for p, a in zip(prompts, answers, strict=True)]
    else:
        rows = [{"prompt": p, "response": a} for p, a in zip(prompts, answers, strict=True)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data": str(path), "validation_data": None, "eval_data": str(path)}
    options = written.changed(options, memory_gib=None, max_steps=1, long_rows="drop", **files)
    if kind == "label":
        options = written.changed(options, task_type="SEQ_CLS")
    if kind == "generated":
        options = written.changed(options, scoring="generation", max_new_tokens=2)
    with pytest.warns(UserWarning, match=r"1 of 4 rows were left out, the first is .*jsonl:2"):
        result = run_training(options)
    assert result["num_cut_prompts"] == result["eval"]["num_cut_prompts"] == 0
    assert result["eval"]["num_examples"] == 3
