"""Commands, recipes and benchmarks say nothing of their own accord that is another library's."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lowmem_reft import InputError, cli, load_base
from lowmem_reft.base.ours import ours
from lowmem_reft.machine import notices
from lowmem_reft.options import DataOptions, EvaluateOptions, ModelOptions
from lowmem_reft.runs.evaluate import run_evaluation

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    path.stem: path
    for folder in ("recipes", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"tyro\.cli\(|run_recipe\(|ArgumentParser\(", path.read_text(encoding="utf-8"))
    and "__main__" in path.read_text(encoding="utf-8")
}

# Forks for each line of JSON that it reads, so that one import of torch serves all. What it imports
# says nothing and imports none of the libraries whose notices are hidden: a fork does that.
FORKING = """
import json, os, runpy, signal, sys, traceback
import datasets, scipy.stats, torch._inductor.compile_fx, transformers.quantizers.auto
import transformers.generation.utils, transformers.models.auto.modeling_auto
assert not {"bitsandbytes", "lowmem_reft", "peft"} & set(sys.modules)
for line in sys.stdin:
    job = json.loads(line)
    process = os.fork()
    if process == 0:
        signal.alarm(120)
        for number, name in enumerate(["/dev/null", job["stdout"], job["stderr"]]):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv[:], sys.path[0] = [job["run"], *job["arguments"]], job["path"]
        code = 1
        try:
            if job["run"].endswith(".py"):
                runpy.run_path(job["run"], run_name="__main__")
            else:
                runpy.run_module(job["run"], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
os._exit(0)
"""


class Fork:
    """Runs scripts and modules as their own processes do, but for the import of torch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def run(self, what: str, *arguments: str, path: Path = ROOT) -> tuple[str, str]:
        """Return what was written to standard output and to standard error."""
        job: dict[str, Any] = {"run": what, "path": str(path), "arguments": arguments}
        files = {name: self.directory / name for name in ("stdout", "stderr")}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job | {k: str(v) for k, v in files.items()}) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline().strip()
        out, err = (file.read_text(encoding="utf-8") for file in files.values())
        assert code == "0", out + err
        return out, err

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    started = Fork(tmp_path_factory.mktemp("fork"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def trained(
    fork: Fork, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A short training on 4 bits by the command line: its files, and what it wrote."""
    directory = tmp_path_factory.mktemp("trained")
    rows = directory / "rows.jsonl"
    row = {"prompt": "is the film good? label:", "choices": ["good", "bad"], "answer": 1}
    rows.write_text(f"{json.dumps(row)}\n" * 4)
    base = ("--model", str(tiny_llama_dir), "--device", "cpu")
    more = ("--batch-size", "2", "--epochs", "2", "--save-steps", "1", "--validation-data")
    out, err = fork.run(
        "lowmem_reft.cli",
        *("train", *base, "--data", str(rows), *more, str(rows), "--json"),
        *("--output-dir", str(directory / "run")),
    )
    adapter = json.loads(out)["adapter_dir"]
    return {"base": base, "rows": str(rows), "adapter": adapter, "written": (out, err)}


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = [{"text": "the film", "label": label} for label in ("good", "bad")]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def is_one_object(text: str) -> bool:
    return len(text.splitlines()) == 1 and isinstance(json.loads(text), dict)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_a_recipe_or_benchmark_is_nothing_but_its_help(name: str, fork: Fork) -> None:
    path = SCRIPTS[name]
    if path.parent.name == "recipes":
        out, err = fork.run(str(path), "--help", path=path.parent)
    else:
        out, err = fork.run(f"benchmarks.{name}", "--help")
    assert err == ""
    assert out.startswith("usage: ")


@pytest.mark.parametrize("name", [None, *cli._COMMANDS])
def test_the_help_of_a_command_is_nothing_but_its_help(
    name: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"] if name is None else [name, "--help"])
    assert left.value.code == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith("usage: lowmem-reft")


def test_training_says_nothing_of_its_own_accord(trained: dict[str, Any]) -> None:
    out, err = trained["written"]
    said = re.compile(
        r"(rows: .*|first row .*|\[.*[|].*|method: .*|steps: .*|memory: .*|time: .*"
        r"|validation: .*|reuse: .*"
        r"|validation_data: 4 of 4 of its rows are trained on too: .*"
        r"|epoch \d .*|step \d.*|\d+ % of \d+ computed tokens .*)"
    )
    assert [line for line in err.splitlines() if not said.fullmatch(line)] == []
    assert is_one_object(out)


def test_scoring_says_nothing_of_its_own_accord(fork: Fork, trained: dict[str, Any]) -> None:
    files = ("--adapter", trained["adapter"], "--data", trained["rows"])
    out, err = fork.run("lowmem_reft.cli", "evaluate", *trained["base"], *files, "--json")
    assert err == ""
    assert is_one_object(out)


def test_generation_says_nothing_but_its_figures(
    fork: Fork, trained: dict[str, Any], tmp_path: Path
) -> None:
    prompts = ("--adapter", trained["adapter"], "--input", trained["rows"])
    more = ("--max-new-tokens", "3", "--stop", "\n", "--output", str(tmp_path / "answers.jsonl"))
    out, err = fork.run("lowmem_reft.cli", "generate", *trained["base"], *prompts, *more, "--json")
    assert err == ""
    assert is_one_object(out)


def test_a_plan_says_nothing_but_the_plan(fork: Fork, tiny_llama_dir: Path) -> None:
    model = ("--model", str(tiny_llama_dir), "--seq-len", "32")
    out, err = fork.run("lowmem_reft.cli", "plan", *model, "--fit", "--memory-gib", "1")
    assert err == ""
    assert out.startswith(f"{tiny_llama_dir}, loreft on nf4: ")
    assert "Warning" not in out


def test_a_profile_says_nothing_but_the_profile(
    fork: Fork, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = ("--model", str(tiny_llama_dir), "--seq-len", "16", "--device", "cpu")
    out, err = fork.run(
        "lowmem_reft.cli", "profile", *model, "--output-dir", str(tmp_path), "--json"
    )
    assert err == ""
    assert is_one_object(out)


def test_a_comparison_says_nothing_but_its_cells_and_its_table(
    fork: Fork, tiny_llama_dir: Path, labels: Path, tmp_path: Path
) -> None:
    rows = [f"--{name}={labels}" for name in ("data", "validation-data", "eval-data")]
    run = ("--model", str(tiny_llama_dir), "--device", "cpu", "--output-dir", str(tmp_path / "out"))
    # A classifier, as that has one cell: a base whose head is new is not scored.
    more = ("--methods", "loreft", "--task-type", "SEQ_CLS", "--epochs", "1", "--json")
    out, err = fork.run("lowmem_reft.cli", "compare", *run, *rows, *more)
    assert is_one_object(out)
    # That the rows are the same; a cell; the table; the verdict.
    ours = re.compile(
        r"eval_data of .* are trained on too: .*|\[1/1\] loreft seed 0: accuracy .* s|( .*)?"
        r"|Take loreft: .*"
    )
    assert [line for line in err.splitlines() if not ours.fullmatch(line)] == []
    (log,) = (tmp_path / "out").glob("cells/*/log.txt")
    bar = re.compile(r"Loading weights: .*|progress: [a-z]+ \d+/\d+|")
    assert [line for line in log.read_text().splitlines() if not bar.fullmatch(line)] == []


class Shown(logging.Handler):
    """What a logger lets through."""

    def __init__(self, logger: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._logger = logging.getLogger(logger)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Shown:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)


@pytest.mark.parametrize("logged", notices.LOGGED, ids=lambda logged: logged.logger)
def test_of_a_logger_only_the_named_message_is_hidden(logged: notices.Logged) -> None:
    with Shown(logged.logger) as shown:
        for text in (f"{logged.message} and more", f"other than {logged.message}", "other"):
            logging.getLogger(logged.logger).warning(text)
    assert shown.texts == [f"other than {logged.message}", "other"]


@pytest.mark.parametrize("warned", notices.WARNED, ids=lambda warned: warned.message)
def test_of_a_class_of_warnings_only_the_named_message_is_hidden(warned: notices.Warned) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        notices.hide()
        for text in (f"{warned.message} and more", f"other than {warned.message}"):
            warnings.warn(text, warned.category, stacklevel=1)
        warnings.warn(warned.message, UserWarning, stacklevel=1)
    assert [str(w.message) for w in shown] == [f"other than {warned.message}", warned.message]


def test_hiding_twice_filters_once() -> None:
    logger = logging.getLogger(notices.LOGGED[0].logger)
    before = list(logger.filters)
    with warnings.catch_warnings():
        notices.hide()
    assert logger.filters == before


def test_of_what_native_code_writes_only_the_named_lines_are_hidden(
    capfd: pytest.CaptureFixture[str],
) -> None:
    start = b"USDT:2026-01-02 20:09:55 1:1 SyncActivityProfilerHandler.cpp:52] profiler_start\n"
    block = (
        b"[W102 20:09:55.676190082 CPUAllocator.cpp:245] Memory block of unknown size was "
        b"allocated before the profiling started, profiler results will not include it\n"
    )
    with pytest.raises(InputError), notices.written_hidden():  # noqa: PT012
        os.write(2, start + b"out of memory\n" + block + b"no end of line")
        raise InputError
    os.write(2, b", and after it\n")
    assert capfd.readouterr().err == "out of memory\nno end of line, and after it\n"


def test_a_message_that_is_held_is_logged_unless_it_is_dropped() -> None:
    logger = logging.getLogger("of.another.library")
    with Shown(logger.name) as shown:
        with notices.held(logger.name, "report") as records:
            logger.warning("a report of nothing")
            logger.warning("another message")
            records.clear()
        with pytest.raises(InputError), notices.held(logger.name, "report"):  # noqa: PT012
            logger.warning("a report of something")
            raise InputError
        logger.warning("a later report")
    assert shown.texts == ["another message", "a report of something", "a later report"]


def test_a_new_head_is_not_reported_but_a_hole_in_the_checkpoint_is_refused(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    broken = shutil.copytree(tiny_llama_dir, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights[lost]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with Shown("transformers.modeling_utils") as shown:
        whole = load_base(tiny_llama_dir, storage="fp32", task_type="SEQ_CLS")
        assert shown.texts == []
        for task_type in ("SEQ_CLS", "CAUSAL_LM"):
            with pytest.raises(InputError, match=lost):
                load_base(broken, storage="fp32", task_type=task_type)
    whole.save_pretrained(tmp_path / "with head")
    heads = [
        ours(load_base(directory, storage="fp32", task_type="SEQ_CLS")).has_new_head
        for directory in (tiny_llama_dir, tmp_path / "with head")
    ]
    assert heads == [True, False]


def test_scores_of_a_new_head_come_with_a_warning(
    tiny_llama_dir: Path, labels: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_evaluation(
        EvaluateOptions(
            model=ModelOptions(
                model=str(tiny_llama_dir), device="cpu", storage="fp32", task_type="SEQ_CLS"
            ),
            data=DataOptions(data=str(labels)),
            quiet=True,
        )
    )
    assert "it got a new one, of random weights, and its scores say nothing" in caplog.text
