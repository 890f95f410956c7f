"""The README keeps its promises: its example runs as written, its tables are those measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import lowmem_reft
from benchmarks.tables import BLOCK, PAGES, RESULTS, TABLES, render
from hooks import EVIDENCE
from lowmem_reft.base.blocks import find_blocks
from snippets import Runner, read_blocks

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
def test_the_example_trains_and_its_adapter_gives_the_same_logits_when_loaded(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "is the film good or bad? label:", "response": "good"}
    Path("train.jsonl").write_text((json.dumps(row) + "\n") * 4)
    example = next(b for b in read_blocks(ROOT / "README.md") if b.language == "python")
    runner = Runner({"meta-llama/Llama-3.1-8B": str(tiny_llama_dir)})
    runner.run(example)
    names = runner.names
    batch = {
        "input_ids": torch.randint(3, 128, (2, 20)),
        "attention_mask": torch.ones(2, 20, dtype=torch.long),
    }
    trained = names["model"].eval()
    assert len(find_blocks(trained)[1]) == 4
    again = PeftModel.from_pretrained(lowmem_reft.load_base(tiny_llama_dir), "adapter").eval()
    with torch.no_grad():
        assert torch.equal(trained(**batch).logits, again(**batch).logits)
        with trained.disable_adapter():
            assert not torch.equal(trained(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert render(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert links
    built = {f"evidence/{name}.html" for name in EVIDENCE}  # with the documentation
    missing = {link for link in links if not (page.parent / link).exists()}
    assert missing <= built


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_table_has_a_result_and_a_command_and_a_device(page: Path) -> None:
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        result = json.loads((RESULTS / f"{match['name']}.json").read_text())
        assert match["name"] in TABLES
        records = result if isinstance(result, list) else [result["environment"]]
        assert all(record["command"] for record in records)
        assert all(record["device"] for record in records if not record.get("error"))
