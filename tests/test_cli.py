"""The command line: flags and help come from the dataclasses; exit codes and streams are kept."""

import ast
import errno
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_reft import InputError, cli, options

COMMANDS = {
    "train": "TrainOptions",
    "evaluate": "EvaluateOptions",
    "generate": "GenerateOptions",
    "chat": "ChatOptions",
    "compare": "CompareOptions",
    "sweep": "SweepOptions",
    "plan": "PlanOptions",
    "profile": "ProfileOptions",
    "reuse ls": "ReuseListOptions",
}
TRAIN = ["train", "--model", "m", "--data", "d.jsonl", "--output-dir", "out"]
EVALUATE = ["evaluate", "--model", "m", "--data", "d.jsonl"]
GENERATE = ["generate", "--model", "m", "--prompt", "p"]

# A process whose training is the given code; `options` is what the command line was parsed to.
FAKE_TRAINING = """
import sys, types
from lowmem_reft import cli
def run_training(options):
    {body}
sys.modules["lowmem_reft.runs.train"] = types.SimpleNamespace(run_training=run_training)
sys.exit(cli.main({arguments!r}))
"""


def run_cli(*arguments, **kwargs):
    command = [sys.executable, "-m", "lowmem_reft.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def start_fake_training(body, *flags):
    script = FAKE_TRAINING.format(body=body, arguments=[*TRAIN, *flags])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)


@pytest.fixture
def fake_training(monkeypatch):
    """Replaces the training by a function, in this process."""

    def replace(function):
        module = SimpleNamespace(run_training=function)
        monkeypatch.setitem(sys.modules, "lowmem_reft.runs.train", module)

    return replace


def raising(error):
    def run_training(_options):
        raise error

    return run_training


def option_docstrings(class_name):
    """Flag and docstring of every field of an options class, groups included, from the source."""
    source = ast.parse(inspect.getsource(getattr(options, class_name)))
    (body,) = (n.body for n in source.body if isinstance(n, ast.ClassDef))
    fields = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        annotation = ast.unparse(node.annotation)
        if annotation.endswith("Options"):
            made = re.search(r"default_factory=(\w+Options)", ast.unparse(node.value or node))
            fields |= option_docstrings(annotation)
            fields |= option_docstrings(made[1]) if made else {}
        else:
            assert isinstance(following, ast.Expr), (
                f"{class_name}.{node.target.id} has no docstring"
            )
            fields[f"--{node.target.id.replace('_', '-')}"] = following.value.value
    return fields


def test_help_answers_within_a_second():
    durations_s = []
    for _ in range(3):
        started = time.perf_counter()
        assert run_cli("--help").returncode == 0
        durations_s.append(time.perf_counter() - started)
    assert min(durations_s) < 1.0  # the best of three: other processes may be using the machine


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_with_its_docstring(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*command.split(), "--help"])
    assert left.value.code == 0
    words = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for flag, docstring in option_docstrings(COMMANDS[command]).items():
        assert flag in words
        assert " ".join(docstring.split()) in words


def test_help_begins_with_what_must_be_given_and_what_most_runs_give(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith("usage: lowmem-reft train --model STR --data STR --output-dir PATH [")
    parts = {part.partition(":")[0]: part for part in said.split("\n\n")}
    assert list(parts)[3:7] == ["required", "often given", "model", "data"]
    flags = re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE)
    assert flags[:3] == ["--model", "--data", "--output-dir"]
    often = {"--method", "--storage", "--epochs", "--lr", "--batch-size", "--validation-data"}
    assert often < set(flags[3:10])
    assert all(f"\n  {flag}" in parts["often given"] for flag in flags[3:10])
    assert len(flags) == len(set(flags))
    assert re.search(r"dropout\.\s+\(default: 0\)", said)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_no_default_that_is_none(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert not re.search(r"default:[│\s]+None", capsys.readouterr().out)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version_is_printed(flag, capsys):
    assert cli.main([flag]) == 0
    assert re.fullmatch(r"lowmem-reft \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_flags_are_flat_and_reach_the_handler(fake_training):
    seen = []
    fake_training(lambda parsed: seen.append(parsed) or {})
    flags = (
        "--storage int8 --eval-data e.jsonl --method red --rank 2 --epochs 0.5 --lr 1e-3 "
        "--activation-checkpointing --seed 7 --quiet"
    )
    assert cli.main([*TRAIN, *flags.split()]) == 0
    (parsed,) = seen
    assert parsed == options.TrainOptions(
        model=options.ModelOptions(model="m", storage="int8"),
        data=options.DataOptions(data="d.jsonl"),
        held_out=options.HeldOutOptions(eval_data="e.jsonl"),
        method=options.MethodOptions(method="red", rank=2),
        optim=options.OptimOptions(epochs=0.5, lr=1e-3),
        memory=options.MemoryOptions(activation_checkpointing=True),
        run=options.RunOptions(output_dir=Path("out"), seed=7, quiet=True),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        TRAIN,
        ["plan"],
        ["profile", "--model", "m"],
        ["compare"],
    ],
)
def test_activation_checkpointing_has_a_short_name(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda _, parsed: seen.append(parsed) or {})
    for flag in ("--checkpointing", "--activation-checkpointing"):
        assert cli.main([*arguments, flag]) == 0
    short, long = seen
    assert short == long
    assert short.memory.activation_checkpointing


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "train"),
        (["trian"], "trian"),
        ([*TRAIN, "--rnak", "4"], "--rnak"),
        ([*TRAIN, "--rank", "two"], "--rank"),
        ([*TRAIN, "--storage", "nf5"], "nf5"),
        ([*EVALUATE, "--eval-data", "d.jsonl"], "--eval-data"),
        ([*EVALUATE, "--activation-checkpointing"], "--activation-checkpointing"),
        (["train", "--model", "m", "--data", "d"], "--output-dir"),
    ],
)
def test_wrong_arguments_exit_with_2_and_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TRAIN, "--lr", "-1"], "lr must be finite and above 0, got -1.0; change it"),
        (
            [*TRAIN, "--schedule", "lineal"],
            "schedule must be one of linear, cosine, cosine_with_restarts, polynomial, constant, "
            "constant_with_warmup, inverse_sqrt, got 'lineal'; choose one",
        ),
        ([*TRAIN, "--rank", "0"], "rank must be at least 1, got 0; raise it"),
        ([*EVALUATE, "--batch-size", "0"], "batch_size must be at least 1, got 0; raise it"),
        (
            [*GENERATE, "--temperature", "-1"],
            "temperature must be finite and at least 0, got -1.0; 0 is allowed",
        ),
        (["compare", "--workers", "0"], "workers must be at least 1, got 0; raise it"),
        (
            ["reuse", "rm", "--reuse-dir", "."],
            "keys must name what to remove, got none; give keys, --older-than-days or --all",
        ),
    ],
)
def test_a_value_that_breaks_its_rule_exits_with_2_and_its_message_alone(
    arguments, message, capsys
):
    assert cli.main([*arguments, "--json"]) == 2
    assert capsys.readouterr() == ("", f"lowmem-reft {arguments[0]}: error: {message}\n")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_missing_data_file_exits_with_2_and_is_named(command, tmp_path):
    missing = tmp_path / "no-such.jsonl"
    flags = ["--model", str(tmp_path), "--data", str(missing), "--json"]
    if command == "train":
        flags += ["--output-dir", str(tmp_path / "out")]
    finished = run_cli(command, *flags)
    assert finished.returncode == 2, finished.stderr
    assert str(missing) in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


def test_bad_input_exits_with_2_and_its_message_alone(fake_training, capsys):
    fake_training(raising(InputError("rank must be at least 1, got 0; give --rank 4")))
    assert cli.main(TRAIN) == 2
    expected = "lowmem-reft train: error: rank must be at least 1, got 0; give --rank 4\n"
    assert capsys.readouterr() == ("", expected)


def test_another_failure_exits_with_1_and_says_how_to_see_the_traceback(fake_training, capsys):
    fake_training(raising(RuntimeError("shapes do not match")))
    assert cli.main(TRAIN) == 1
    message = capsys.readouterr().err
    assert "error: RuntimeError: shapes do not match" in message
    assert "LOWMEM_REFT_DEBUG=1" in message
    assert "Traceback" not in message


def test_debug_shows_the_traceback(fake_training, capsys, monkeypatch):
    monkeypatch.setenv("LOWMEM_REFT_DEBUG", "1")
    fake_training(raising(RuntimeError("shapes do not match")))
    assert cli.main(TRAIN) == 1
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_names_the_setting_that_would_fit(
    fake_training, tiny_llama_dir, tmp_path, capsys
):
    fake_training(raising(MemoryError()))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a cat", "response": "runs"}\n' * 8)
    words = ["train", "--model", str(tiny_llama_dir), "--data", str(rows), "--storage", "fp32"]
    assert cli.main([*words, "--output-dir", str(tmp_path / "out")]) == 1
    assert "this would fit: --storage fp32 --batch-size" in capsys.readouterr().err


def test_a_plan_that_finds_nothing_exits_with_3(tiny_llama_dir, capsys):
    words = ["plan", "--model", str(tiny_llama_dir), "--seq-len", "64", "--device", "cpu", "--fit"]
    assert cli.main([*words, "--memory-gib", "0.0002"]) == 3
    assert cli.main([*words, "--memory-gib", "1"]) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "--batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (RuntimeError("I/O error: No space left on device"), "free some space"),
    ],
)
def test_an_exhausted_machine_exits_with_1_and_advice(error, said, fake_training, capsys):
    fake_training(raising(error))
    assert cli.main(TRAIN) == 1
    assert said in capsys.readouterr().err


def test_interruption_exits_with_130_and_says_what_is_kept(fake_training, capsys, tmp_path):
    fake_training(raising(KeyboardInterrupt()))
    arguments = [*TRAIN[:-1], str(tmp_path)]
    assert cli.main(arguments) == 130
    assert "no checkpoint" in capsys.readouterr().err
    (tmp_path / "checkpoint-5").mkdir()
    assert cli.main(arguments) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_comparison_with_failed_cells_prints_its_result_and_exits_with_1(monkeypatch, capfd):
    result = {"num_cells": 4, "num_failed": 1}
    module = SimpleNamespace(run_comparison=lambda _options: result)
    monkeypatch.setitem(sys.modules, "lowmem_reft.compare.matrix", module)
    assert cli.main(["compare", "--json"]) == 1
    captured = capfd.readouterr()
    assert json.loads(captured.out) == result
    assert "1 cells failed" in captured.err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_a_run(signum):
    body = "print('ready', flush=True); import time; time.sleep(60); return {}"
    process = start_fake_training(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_json_leaves_one_object_on_stdout_and_all_else_on_stderr():
    body = (
        "import os, pathlib; print('from python'); os.write(1, b'from C\\n');"
        "os.system('echo from a child');"
        "return {'adapter_dir': pathlib.Path('a'), 'loss': [1.5, float('nan')]}"
    )
    output, errors = start_fake_training(body, "--json").communicate()
    assert output.count("\n") == 1
    assert json.loads(output) == {"adapter_dir": "a", "loss": [1.5, None]}
    for line in ("from python", "from C", "from a child"):
        assert line in errors


def test_without_json_a_short_summary_is_plain_text(fake_training, capsys):
    long_path = "/".join(["directory"] * 20)
    result = {"adapter_dir": long_path, "peak_bytes": 3 * 2**20, "train_loss": 0.123456, "rows": []}
    fake_training(lambda _options: result)
    assert cli.main(TRAIN) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = [["adapter_dir", long_path], ["peak_bytes", "3.0", "MiB"], ["train_loss", "0.1235"]]
    assert lines == expected


def test_a_reader_that_leaves_is_not_a_traceback():
    process = start_fake_training("input(); return {'x': 1}")
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "lowmem_reft.cli"],
        ["-c", "import sys; from lowmem_reft.__main__ import main; sys.exit(main())"],
    ],
)
def test_ctrl_c_during_the_imports_is_no_traceback(start, tmp_path):
    # tyro is imported first of all that is large: here it interrupts, inside exec as it may happen.
    (tmp_path / "tyro.py").write_text(
        "import os, signal\nexec('os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(9): pass')\n"
    )
    finished = subprocess.run(
        [sys.executable, *start, "tasks"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(cli.__file__).parents[1]}"},
    )
    assert (finished.returncode, finished.stderr) == (130, "\nlowmem-reft: interrupted\n")


def test_a_reader_that_leaves_the_help_is_not_a_traceback():
    command = f"{sys.executable} -m lowmem_reft.cli train --help | true"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert finished.stderr == ""


def test_choices_are_shown_in_their_order_and_none_is_not_among_them(capsys):
    with pytest.raises(SystemExit):
        cli.main([*TRAIN, "--storage", "nf5"])
    said = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert "('nf4', 'fp4', 'int8', 'bf16', 'fp16', 'fp32')" in said


def test_a_typo_is_answered_with_options_of_the_same_subcommand(capsys):
    with pytest.raises(SystemExit):
        cli.main([*GENERATE, "--adaptr", "x"])
    said = capsys.readouterr().err
    assert said.count("--adapter;") == 1
    assert "lowmem-reft generate --help" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown command: trian; similar: train; see lowmem-reft --help"),
        (["qqq"], "unknown command: qqq; see lowmem-reft --help"),
        (["eval"], "unknown command: eval; here: evaluate; see lowmem-reft --help"),
        (["merge-lora"], "unknown command: merge-lora; here: PEFT's merge_and_unload, for "),
        (["export", "run.yaml"], "unknown command: export; here: PEFT's merge_and_unload, for "),
        (["push"], "unknown command: push; here: train --push-to-hub USER/NAME, or hf upload "),
        (["quantize"], "unknown command: quantize; here: train --storage nf4 (or int8), which "),
        (["serve"], "unknown command: serve; here: vLLM or SGLang, for lora and qlora adapters"),
        (["dpo"], "unknown command: dpo; here: TRL's trainers with ReftConfig, of which the "),
        (["lm_eval"], "unknown command: lm_eval; here: evaluate --lm-eval TASKS; see lowmem-reft "),
        (["train", "--modle", "m"], "unknown options: --modle; similar: --model; see"),
        ([*TRAIN, "--batchsize=3"], "unknown options: --batchsize; similar: --batch-size; see"),
        (
            ["compare", "--sead", "1", "--qqq"],
            "unknown options: --sead, --qqq; similar: --seeds; see",
        ),
        (
            [*TRAIN, "--learning-rat", "1"],
            "unknown options: --learning-rat; similar: --learning-rate",
        ),
        (
            [*TRAIN, "--adapter", "qlora", "--test_datasets", "d"],
            "unknown options: --adapter, --test-datasets; here: --method, --validation-data; see",
        ),
        ([*TRAIN, "--load_in_4bit"], "unknown options: --load-in-4bit; here: --storage nf4; see"),
        (
            [*TRAIN, "--lora_r=8", "--lora_alpha", "16", "--sead", "1"],
            "unknown options: --lora-r, --lora-alpha, --sead; here: --rank, --alpha; "
            "similar: --seed; see",
        ),
        (
            ["plan", "--max_seq_length", "64"],
            "unknown options: --max-seq-length; here: --max-length;",
        ),
        ([*TRAIN, "--assistant_only_loss"], "unknown options: --assistant-only-loss; see"),
        (["plan", "--wandb_project", "p"], "unknown options: --wandb-project; see"),
        ([*TRAIN, "--use_rslora"], "unknown options: --use-rslora; see"),
        ([*TRAIN, "--deepspeed", "c"], "unknown options: --deepspeed; see"),
    ],
)
def test_what_there_is_not_is_named_with_the_nearest_before_what_is_missing(
    arguments, said, capsys
):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_options_have_the_names_of_hugging_face_too(fake_training):
    seen = []
    fake_training(lambda parsed: seen.append(parsed) or {})
    theirs = (
        "--num_train_epochs 2 --learning-rate 1e-3 --per-device-train-batch-size 4 "
        "--gradient_accumulation_steps 2 --lr-scheduler-type cosine --gradient-checkpointing"
    )
    ours = (
        "--epochs 2 --lr 1e-3 --batch-size 4 --gradient-accumulation 2 --schedule cosine "
        "--activation-checkpointing"
    )
    for flags in (theirs, ours):
        assert cli.main([*TRAIN, *flags.split()]) == 0
    assert seen[0] == seen[1]
    assert seen[0].optim.lr == 1e-3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/file/b"),
        PermissionError(errno.EACCES, "Permission denied", "/srv/x"),
    ],
)
def test_a_path_that_the_system_refuses_is_bad_input_and_named(error, fake_training, capsys):
    fake_training(raising(error))
    assert cli.main(TRAIN) == 2
    said = capsys.readouterr().err
    assert error.filename in said
    assert said.count("\n") == 1


def test_a_name_of_an_output_that_is_too_long_is_bad_input(capsys):
    assert cli.main([*TRAIN[:-1], "n" * 300]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_message_of_many_lines_is_printed_on_one_and_shortened(fake_training, capsys):
    fake_training(raising(InputError("model must be whole,\n\ngot " + "x" * 10_000 + "; mend it")))
    assert cli.main(TRAIN) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2500
    assert said.endswith("; mend it\n")


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_called_that_whatever_library_says_it(words, fake_training, capsys):
    def run_training(_options):
        try:
            raise OSError(errno.EDQUOT, words)
        except OSError as error:
            raise RuntimeError("could not serialize the tensors") from error

    fake_training(run_training)
    assert cli.main(TRAIN) == 1
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TRAIN, "--device", "gpu"], "device must be"),
        ([*TRAIN, "--template", "no prompt"], "template must contain"),
        ([*TRAIN, "--answer-pattern", "("], "answer_pattern must be a regular expression"),
        ([*TRAIN, "--limit", "9" * 30], "limit must be at most"),
        ([*GENERATE, "--temperature", "1e-300"], "temperature must be 0 or at least 0.001"),
        (["plan", "--response-len", "4096"], "response_len must be at most seq_len"),
        (["plan", "--resident", "upper"], "reuse must be auto, prefix or trunk"),
        (["plan", "--methods", "lora"], "methods must come with table"),
        (["plan", "--max-new-tokens", "1000000000"], "max_new_tokens must be at most"),
        (["plan", "--seq-len", "1000000000"], "seq_len must be at most"),
        (["compare", "--seeds", str(2**32)], "seeds must be from 0"),
        (["compare", "--methods", "loreft[lr=nan]"], "'loreft[lr=nan]' of methods: lr must be"),
        (["compare", "--methods", ""], "methods must name at least one"),
        (["compare", "--metric", "zzz"], "metric must be one of"),
        (["compare", "--extractor", "zzz"], "extractor must be one of"),
        (["judge", "a", "b", "--command", " "], "command must be a program"),
    ],
)
def test_options_that_cannot_be_right_are_refused_before_the_work(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "--reuse-dir", ".", "zzz"], "Unrecognized options: zzz;"),
        (["ls", "--json"], "options must be given, got none of --reuse-dir;"),
        (["ls", "--reuse-dirs", "."], "unknown options: --reuse-dirs; similar: --reuse-dir;"),
        (["lss", "--reuse-dir", "."], "unknown command: lss; similar: ls;"),
    ],
)
def test_what_is_wrong_with_an_action_of_reuse_is_named(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reuse", *words])
    assert capsys.readouterr().err.startswith(f"lowmem-reft reuse: error: {message}")
