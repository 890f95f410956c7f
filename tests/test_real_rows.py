"""The benchmark on real rows: what it draws, counts, compares, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real_rows import RealRowsBenchmark, described, ratios_of, verdicts
from benchmarks.real_rows_child import LOREFT, PACKED, PADDED, TRL, Watch
from benchmarks.real_rows_scoring import CHOICES, differences, emotion_rows
from benchmarks.real_rows_training import Training, fitting, lognormal_rows
from benchmarks.tables import real_rows
from made_tokenizers import byte_level_tokenizer
from warm import warm_processes

ROOT = Path(__file__).resolve().parent.parent


def test_the_record_names_no_directory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RealRowsBenchmark(model="/data/bases/smollm2", data_dir=Path("/data/sets"))
    arguments = ["--model", options.model, "--data-dir", "/data/sets"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/real_rows.py", *arguments])
    said = described(options)
    assert said["environment"]["command"] == (
        "python -m benchmarks.real_rows --model DIR/smollm2 --data-dir DIR"
    )
    assert "/home" not in json.dumps(said)


def test_rehearsal_scores_and_trains_in_every_way(tmp_path: Path) -> None:
    output = tmp_path / "real_rows.json"
    arguments = ("--small", "--json", "--repeats", "1", "--output", str(output))
    with warm_processes():
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.real_rows", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    result = json.loads(finished.stdout)  # nothing but the JSON line
    assert json.loads(output.read_text()) == result
    assert output.with_suffix(".png").stat().st_size > 0
    for item in result["results"]["scoring"].values():
        assert item["fp32"]["largest_relative_difference"] < 1e-5
        assert item["hflm"]["num_changed_picks"] == 0
        computed = {label: row["num_computed_tokens"] for label, row in item["rows"].items()}
        assert computed["prompt shared"] < computed["whole rows"]
    shares = [
        tuple(item["rows"][label]["real_share"] for label in (PADDED, LOREFT))
        for item in result["results"]["training"].values()
    ]
    assert any(padded < ours for padded, ours in shares), shares
    for item in result["results"]["training"].values():
        ours, padded, packed = (item["rows"][label] for label in (LOREFT, PADDED, PACKED))
        # The same rows, and at first the bare base on the same batch.
        assert len({row["num_real_tokens"] for row in item["rows"].values()}) == 1
        assert item["rows"].keys() == {LOREFT, *TRL}
        assert ours["first_loss"] == pytest.approx(padded["first_loss"], abs=1e-4)
        assert ours["packing"] == "on"
        assert padded["real_share"] <= ours["real_share"]
        assert packed["real_share"] == 1
        assert min(row["peak_over_weights_bytes"] for row in (ours, padded, packed)) > 0
    assert {
        "scoring_emotions_vs_whole_rows",
        "scoring_arc_vs_whole_rows",
        "scoring_emotions_vs_hflm",
        "scoring_arc_vs_hflm",
        "lognormal_vs_trl_best",
        "ultrafeedback_vs_trl_best",
        "share_of_real_tokens",
    } <= result["ratios"].keys()
    assert result["goals"].keys() <= result["ratios"].keys()
    assert "| lognormal | QLoRA r8, TRL packed |" in real_rows(result)


def test_made_up_rows_are_the_same_every_time_and_have_the_lengths_asked_for() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    part = Training(shortest=60, longest=500, median=150, sigma=0.5)
    rows = lognormal_rows(tokenizer, part, 60)
    assert rows == lognormal_rows(tokenizer, part, 60)
    limits = {"fewest": 60, "most": 500}
    kept = fitting(rows, tokenizer, "{prompt}", number=40, **limits)
    assert len(kept) == 40
    assert 60 <= min(kept.values()) < max(kept.values()) <= 500
    assert sorted(kept.values())[20] == pytest.approx(150, rel=0.25)
    with pytest.raises(RuntimeError, match="60 to 500 tokens, not 61"):
        fitting(rows, tokenizer, "{prompt}", number=61, **limits)


def test_emotions_have_six_choices_of_which_the_right_one_is_named() -> None:
    rows = emotion_rows(30)
    assert {row.choices for row in rows} == {CHOICES}
    assert {row.answer for row in rows} == set(range(6))
    assert all(row.response == row.choices[row.answer or 0] for row in rows)


def test_tokens_of_rows_are_told_from_padding_in_padded_and_in_packed_batches() -> None:
    watch = Watch()
    ids = torch.ones(2, 4, dtype=torch.long)
    watch.count({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])})
    assert (watch.num_real, watch.num_computed) == (6, 8)
    watch.count({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])})
    assert (watch.num_real, watch.num_computed) == (13, 16)


def test_log_likelihoods_are_compared_by_the_largest_difference_and_the_picks() -> None:
    found = differences([[-1.0, -2.0], [-3.0, -2.5]], [[-1.0, -2.0], [-2.4, -2.5]])
    assert found["largest_difference"] == pytest.approx(0.6)
    assert found["largest_relative_difference"] == pytest.approx(0.25)
    assert (found["num_rows"], found["num_changed_picks"]) == (2, 1)


def test_ratios_are_against_the_faster_of_trls_layouts_and_leave_out_what_failed() -> None:
    def row(tokens_per_s: float, peak: int) -> dict[str, Any]:
        return {"tokens_per_s": tokens_per_s, "peak_over_weights_bytes": peak, "real_share": 0.9}

    def way(seconds: float) -> dict[str, float]:
        return {"median_s": seconds, "cpu_s": 2 * seconds}

    ways = {
        "prompt shared": way(1.0),
        "whole rows": way(6.0),
        "prompt shared, bare base": way(1.0),
        "lm-eval HFLM, bare base": way(3.0),
    }
    scoring = {name: {"rows": ways} for name in ("emotions", "arc")}
    training = {
        "lognormal": {"rows": {LOREFT: row(30, 4), PADDED: row(10, 5), PACKED: row(20, 8)}},
        "ultrafeedback": {
            "rows": {LOREFT: row(30, 4), PADDED: {"error": "no"}, PACKED: row(25, 3)}
        },
    }
    ratios = ratios_of(scoring, training)
    assert ratios["scoring_arc_vs_whole_rows"] == 6
    assert ratios["scoring_arc_vs_hflm_cpu"] == 3
    assert ratios["lognormal_vs_trl_best"] == 1.5
    assert ratios["lognormal_peak_vs_trl_best"] == 0.5
    assert ratios["lognormal_peak_vs_trl_lowest"] == 0.8
    assert ratios["ultrafeedback_vs_trl_best"] == 1.2
    assert ratios["share_of_real_tokens"] == 0.9
    met = {name: entry["met"] for name, entry in verdicts(ratios).items()}
    assert met["lognormal_vs_trl_best"]
    assert met["lognormal_peak_vs_trl_best"]
    assert not met["ultrafeedback_vs_trl_best"]
    assert not met["ultrafeedback_peak_vs_trl_lowest"]
    assert not met["share_of_real_tokens"]
