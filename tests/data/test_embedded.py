import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_reft.base.loading import load_base
from lowmem_reft.data import embedded
from warm import warm_processes

ROOT = Path(__file__).parents[2]
SPLITS = {
    "train": embedded.task_files()[0],
    "validation": embedded.validation_file(),
    "test": embedded.task_files()[1],
}


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in SPLITS[split].read_text(encoding="utf-8").splitlines()]


def run_recipe(name: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "recipes" / name), *arguments]
    with warm_processes():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_shipped_stays_under_five_megabytes() -> None:
    folder = embedded.model_dir().parent
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert num_bytes <= 5e6


def test_finding_the_files_imports_no_torch() -> None:
    tree = ast.parse(Path(embedded.__file__).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "module", None) for node in imported} == {"__future__", "pathlib"}


def test_the_model_loads_in_nf4_and_predicts_documentation() -> None:
    model = load_base(str(embedded.model_dir()), storage="nf4", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir())
    ids = tokenizer("Return the name of the file.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 5.0  # a model that knows nothing has ln(vocabulary) = 7.6
    assert any("Linear4bit" in type(module).__name__ for module in model.modules())


def test_the_weights_are_stored_in_sixteen_bits_and_fit_blocks_of_64() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.model_dir())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(linear.in_features % 64 == 0 for linear in linears)


@pytest.mark.parametrize(
    "text", ["Return a list of *names*.\n    >>> x = 'ä'", "  two spaces\tand a tab ", "漢字 🐍"]
)
def test_the_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir())
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_two_splits_share_a_prompt() -> None:
    prompts = [row["prompt"] for split in SPLITS for row in read(split)]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_equally_frequent(split: str) -> None:
    rows = read(split)
    counts = Counter(row["answer"] for row in rows)
    assert set(counts.values()) == {len(rows) // len(rows[0]["choices"])}
    assert all(row["choices"] == rows[0]["choices"] for row in rows)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_short_and_end_without_a_space(split: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir())
    rows = read(split)
    assert max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows) <= 64
    assert all(row["prompt"] == row["prompt"].rstrip() for row in rows)


def test_the_pretraining_recipe_runs_end_to_end(tmp_path: Path) -> None:
    out = run_recipe(
        "pretrain_tiny.py", "--steps", "3", "--threads", "1", "--output-dir", str(tmp_path)
    )
    assert json.loads(out.splitlines()[-1])["held_out_loss"] < 8.0
    made, shipped = (
        AutoModelForCausalLM.from_pretrained(path).config.to_dict() | {"_name_or_path": ""}
        for path in (tmp_path / "model", embedded.model_dir())
    )
    assert made == shipped


def test_the_task_recipe_gives_the_same_rows_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run_recipe("embedded_task.py", "--output-dir", str(tmp_path / folder))
    for name, shipped in SPLITS.items():
        first, second = (tmp_path / folder / f"{name}.jsonl" for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        assert len(first.read_text().splitlines()) == len(shipped.read_text().splitlines())
