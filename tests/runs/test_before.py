"""What a run says before it begins, on standard error."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    ChoosingOptions,
    MethodOptions,
    ReuseOptions,
    TrainOptions,
    written,
)
from lowmem_reft.runs.train import run_training
from small_runs import small_run, with_optim, with_run
from written import json_lines

CHAT = [
    {"role": "user", "content": "is the film good?"},
    {"role": "assistant", "content": "good"},
]


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainOptions:
    """A run that ends where its base would be loaded."""

    def begun(*_: object) -> None:
        raise InputError("begun")

    monkeypatch.setattr("lowmem_reft.runs.train._attach", begun)
    run = with_run(small_run(tiny_llama_dir, tmp_path, validated=True), quiet=False)
    new = [{"prompt": f"is film {i} good?", "response": "good"} for i in range(4)]
    path = json_lines(tmp_path / "new.jsonl", *new)
    return replace(run, held_out=replace(run.held_out, validation_data=str(path)))


def said(options: TrainOptions, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(InputError, match="begun"):
        run_training(options)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_rows_that_are_trained_and_scored_are_counted(
    options: TrainOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = Path(options.data.data)
    rows = [
        *trained.read_text().splitlines(),
        '{"prompt": "new?", "choices": ["a", "b"], "answer": 0}',
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows) + "\n")
    held_out = replace(options.held_out, validation_data=str(other), eval_data=str(trained))
    *_, validation, scored = said(replace(options, held_out=held_out), capsys)
    wanted = "{0} of its rows are trained on too: their score says nothing of new rows"
    assert validation == f"validation_data: {wanted.format('4 of 5')}"
    assert scored == f"eval_data: {wanted.format('4 of 4')}"


def test_rows_first_row_method_and_steps_are_said(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = replace(options, choosing=ChoosingOptions(eval_steps=2, patience=3))
    rows, first, tokens, method, steps, _, time, validation = said(chosen, capsys)
    data = options.data.data
    wanted = rf"rows: 4 from {re.escape(data)}; tokens: median \d+, longest \d+ of max_length 512; "
    assert re.fullmatch(wanted + r"0 cut \(0\.0%\)", rows)
    assert first.startswith(f"first row ({data}:1), prompt [edited]  {{supervised}}  <<end>>")
    assert time.startswith("time: about ")
    assert tokens.startswith("is|·the|")
    assert re.search(r"\[:\] \{.*good.*\}", tokens)  # l1: the last token of the prompt
    assert re.fullmatch(
        r"method: loreft, positions l1, rank 2, layers all, learning rate 0\.01; "
        r"base fp32 computed in fp32, \d+ blocks",
        method,
    )
    assert steps == "steps: 4 of 2 rows (2 epochs), constant schedule"
    assert validation == (
        "validation: 4 rows every 2 steps; 3 scores in a row that are no better end the run"
    )


def test_more_epochs_of_few_rows_are_said_with_why_and_written_into_the_run_file(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    unsaid = with_optim(options, epochs=None)
    few = "steps: 20 of 2 rows (10 epochs, as the rows are few), constant schedule"
    assert few in said(unsaid, capsys)
    assert run_training(written.changed(unsaid, dry_run=True))["options"]["epochs"] == 10
    bounded = with_optim(unsaid, max_steps=5)
    assert "steps: 5 of 2 rows, constant schedule" in said(bounded, capsys)


def test_the_memory_that_is_said_is_that_of_the_dry_run(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = written.changed(options, memory_gib=4.0, reuse="off", checkpoint_every=1)
    line = said(options, capsys)[-3]
    found = run_training(written.changed(options, dry_run=True))
    peak, needed = (found[name] / 2**20 for name in ("peak_bytes", "required_bytes"))
    assert line == (
        f"memory: predicted peak of a step {peak:.1f} MiB; needs {needed:.1f} MiB of 4.00 GiB "
        "with loading and what is beside the tensors"
    )


def test_memory_that_cannot_be_predicted_is_said_to_be(
    options: TrainOptions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(_: object) -> None:
        raise NotImplementedError("no such operator on the meta device")

    monkeypatch.setattr("lowmem_reft.runs.before.predicted", predicted)
    wanted = "memory: not predicted (NotImplementedError: no such operator on the meta device)"
    assert said(options, capsys)[-3] == wanted
    monkeypatch.setattr("lowmem_reft.machine.processes.num_processes", lambda: 2)
    assert said(options, capsys)[-3] == "memory: not predicted for several processes"


def test_cut_rows_are_a_share_and_a_long_row_is_shortened(
    options: TrainOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "is the film good? " * 60, "response": "bad"}
    data = json_lines(tmp_path / "long.jsonl", long, {"prompt": "good?", "response": "good"})
    options = replace(
        options, data=replace(options.data, data=str(data), max_length=200), method=MethodOptions()
    )
    rows, _, tokens, *_ = said(options, capsys)
    wanted = (
        r"longest 200 of max_length 200; 1 cut \(50\.0%\) by (\d+) tokens in all, the longest row "
    )
    found = re.search(wanted + r"had (\d+)$", rows)
    assert found
    assert int(found[2]) == 200 + int(found[1])
    assert len(tokens) < 540
    assert re.search(r" \.\.\. \([\d,]+ characters left out\) \.\.\. ", tokens)
    assert tokens.endswith("?] {·b|ad} <<</s>>> ")


def test_of_a_method_without_positions_no_token_is_marked_as_edited(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(replace(options, method=MethodOptions(method="lora")), capsys)
    assert "[" not in lines[2]
    assert lines[3].startswith("method: lora, rank 16, ")
    both = said(replace(options, method=MethodOptions(method="lora_reft", positions="l1")), capsys)
    assert "[:]" in both[2]


@pytest.mark.parametrize("method", ["loreft", "red", "lora", "ln_tuning"])
def test_blocks_that_are_not_there_are_refused_before_anything_is_said(
    options: TrainOptions, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    with pytest.raises(InputError, match="layers must be below 4, the number of blocks"):
        run_training(replace(options, method=MethodOptions(method=method, layers="99")))
    assert "layers" not in "".join(capsys.readouterr())


def test_quiet_says_nothing_of_it(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(with_run(options, quiet=True), capsys) == []


def test_a_run_says_why_nothing_is_reused(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = with_optim(small_run(tiny_llama_dir, tmp_path), max_steps=1)
    options = with_run(options, quiet=False, overwrite=True)
    edited_first = replace(options, method=MethodOptions(rank=2, positions="f1"))
    run_training(edited_first)
    assert re.search(r"^reuse: off, \w+", capsys.readouterr().err, re.MULTILINE)
    run_training(replace(edited_first, reuse=ReuseOptions(reuse="off")))
    assert "reuse: off, --reuse off\n" in capsys.readouterr().err
