"""The commands as functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lowmem_reft
from lowmem_reft import api
from lowmem_reft.errors import InputError
from lowmem_reft.options import CompareOptions, written
from small_runs import ROWS

SMALL = {
    "storage": "fp32",
    "compute_dtype": "fp32",
    "device": "cpu",
    "quiet": True,
}
TRAINED = {"rank": 2, "positions": "l1", "epochs": 1, "batch_size": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lowmem_reft.train(
        model=str(tiny_llama_dir),
        data=ROWS,
        output_dir=tmp_path_factory.mktemp("run") / "out",
        **SMALL,
        **TRAINED,
    )


def test_rows_become_an_adapter_that_is_scored_and_answers(
    tiny_llama_dir: Path, trained: Any
) -> None:
    adapter = trained.adapter_dir
    assert trained.num_steps == trained["num_steps"] == 2
    assert "num_steps" in dir(trained)
    scored = lowmem_reft.evaluate(model=str(tiny_llama_dir), data=ROWS, adapter=adapter, **SMALL)
    assert (scored.metric, scored.num_examples) == ("accuracy", len(ROWS))
    asked = lowmem_reft.generate(
        model=str(tiny_llama_dir),
        adapter=adapter,
        input=[{"prompt": row["prompt"]} for row in ROWS],
        max_new_tokens=2,
        **SMALL,
    )
    assert [answer["prompt"] for answer in asked.answers] == [row["prompt"] for row in ROWS]
    one = lowmem_reft.generate(
        model=str(tiny_llama_dir),
        adapter=adapter,
        prompt=ROWS[0]["prompt"],
        max_new_tokens=2,
        **SMALL,
    )
    assert one.response == asked.answers[0]["response"] == one.answers[0]["response"]
    assert one.output is None


def test_quiet_is_without_the_bars_of_transformers_which_are_there_again_after_it(
    tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

    enable_progress_bar()
    lowmem_reft.evaluate(model=str(tiny_llama_dir), data=ROWS, **SMALL)
    assert capfd.readouterr().err == ""
    assert is_progress_bar_enabled()


def test_what_was_trained_is_loaded(trained: Any) -> None:
    model, tokenizer = trained.load()
    assert model.peft_config["default"].rank == 2
    assert not model.training
    assert tokenizer("a")["input_ids"]


def test_what_was_trained_is_loaded_without_bars_where_quiet_is_asked_for(
    trained: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    trained.load(quiet=True)
    assert capfd.readouterr().err == ""
    trained.load()
    assert "Loading weights" in capfd.readouterr().err


def test_a_plan_is_figures() -> None:
    found = lowmem_reft.plan(model="llama-3.2-1b", memory_gib=8, seq_len=64, batch_size=1)
    assert found.fits
    assert found.peak_bytes > 2**29


def test_the_package_of_comparisons_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import lowmem_reft.compare.matrix as matrix

    seen: list[CompareOptions] = []
    monkeypatch.setattr(matrix, "run_comparison", lambda options: seen.append(options) or {"a": 1})
    found = lowmem_reft.compare(
        output_dir="o", methods=["loreft[rank=8]", "qlora"], seeds=[0, 1], quiet=True
    )
    assert found.a == 1
    assert written.given(seen[0]) == {
        **{"methods": "loreft[rank=8],qlora", "seeds": "0,1", "quiet": True},
        "output_dir": Path("o"),
    }


def test_nothing_heavy_is_imported_for_the_names() -> None:
    code = (
        "import lowmem_reft, sys; lowmem_reft.compare; lowmem_reft.train;"
        "assert 'torch' not in sys.modules and callable(lowmem_reft.compare)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rnak": 3}, "rnak must be an option of train, got no such one; similar: rank"),
        ({"lora_r": 8}, "lora_r must be an option of train, got no such one; here: rank;"),
        ({"rank": "8"}, "rank must be int | None, got '8'"),
        ({"rank": True}, "rank must be int | None, got True"),
        ({"storage": "nf5"}, "storage must be .*nf4.*, got 'nf5'"),
        ({"epochs": 0}, "epochs must be finite and above 0"),
        (
            {"data": {"prompt": "a"}},
            "data must be a file, a datasets id or a list of rows",
        ),
        ({"data": [{"prompt": {1}}]}, r"data\[0\] must be a dictionary of texts"),
    ],
)
def test_what_is_wrong_is_an_input_error(tmp_path: Path, options: Any, said: str) -> None:
    given = {"model": "m", "data": "d", "output_dir": tmp_path / "out", **options}
    with pytest.raises(InputError, match=said):
        api.train(**given)
