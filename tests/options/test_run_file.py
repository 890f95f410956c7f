"""Options from a file: --config, and the file that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.machine.run_files import NAME, check_run_file, write_run_file
from lowmem_reft.options import (
    CompareOptions,
    DataOptions,
    GenerateOptions,
    ModelOptions,
    TrainOptions,
    written,
)

TRAIN = {
    "model": ModelOptions(model="m"),
    "data": DataOptions(data="d", limit=3, template="Q: {prompt}\nA:"),
    "rank": 2,
    "lr": 1e-3,
    "joint": "none",
    "reuse": "off",
    "dequantize_upper": "on",
    "activation_checkpointing": True,
    "output_dir": Path("a b"),
}


def parsed(tmp_path: Path, command: str, text: str, *words: str, name: str = "run.yaml") -> Any:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return cli._parse([command, "--config", str(path), *words])


@pytest.mark.parametrize(
    "options",
    [
        written.build(TrainOptions, **TRAIN),
        written.build(CompareOptions, model="m", methods="loreft[rank=8],qlora", quiet=True),
        written.build(GenerateOptions, model="m", prompt="yes", stop=("\\n", "### 'x'"), seed=3),
    ],
    ids=lambda options: type(options).__name__,
)
def test_what_is_written_is_read_as_it_was(tmp_path: Path, options: Any) -> None:
    command = type(options).__name__.removesuffix("Options").lower()
    write_run_file(tmp_path, command, options)
    path = tmp_path / NAME
    assert cli._parse([command, "--config", str(path)]) == options


def test_the_texts_of_yaml_are_taken_as_they_stand(tmp_path: Path) -> None:
    text = "model: m\ndata: d\noutput-dir: o\nlr: 1e-3\nreuse: off\njoint: none\nrank: null\n"
    text += 'template: "{prompt}\\n"\nquiet: yes\njson: no\n'
    options = parsed(tmp_path, "train", text)
    assert (options.optim.lr, options.reuse.reuse, options.prompts.joint) == (1e-3, "off", "none")
    assert (options.method.rank, options.data.template) == (None, "{prompt}\n")
    assert (options.run.quiet, options.run.json) == (True, False)


@pytest.mark.parametrize("flag", ["--lr", "--learning-rate"])
def test_flags_override_the_file(tmp_path: Path, flag: str) -> None:
    text = "model: m\ndata: d\noutput_dir: o\nlr: 1e-3\nquiet: true\nrank: 4\n"
    options = parsed(tmp_path, "train", text, flag, "2e-3", "--no-quiet")
    assert (options.optim.lr, options.run.quiet, options.method.rank) == (2e-3, False, 4)


@pytest.mark.parametrize(
    ("words", "is_private"),
    [
        ("", True),
        ("--hub-private-repo", True),
        ("--no-hub-private-repo", False),
        ("--hub-private-repo False", False),
        ("--no-hub-private-repo --hub-private-repo", True),
    ],
)
@pytest.mark.parametrize("said", ["", "hub_private_repo: false\n", "hub_private_repo: true\n"])
def test_a_switch_that_is_on_by_default_is_turned_off_and_back(
    tmp_path: Path, words: str, is_private: bool, said: str
) -> None:
    text = f"model: m\ndata: d\noutput_dir: o\npush_to_hub: me/a\n{said}"
    options = parsed(tmp_path, "train", text, *words.split())
    assert options.hub.hub_private_repo is (is_private if words else "false" not in said)
    flags = written.flags(options.hub)
    assert flags[2:] == ([] if options.hub.hub_private_repo else ["--no-hub-private-repo"])


def test_the_help_has_both_flags_of_a_switch_that_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._parse(["train", "--help"])
    assert "  --hub-private-repo, --no-hub-private-repo\n" in capsys.readouterr().out


def test_a_file_takes_the_other_names_of_an_option_too(tmp_path: Path) -> None:
    text = "model: m\ndata: d\noutput_dir: o\nlearning_rate: 1e-3\nnum-train-epochs: 2\n"
    options = parsed(tmp_path, "train", text, "--epochs", "5")
    assert (options.optim.lr, options.optim.epochs) == (1e-3, 5)
    with pytest.raises(InputError, match=r"run.yaml:6: lr must stand there once, got it again"):
        parsed(tmp_path, "train", text + "lr: 2e-3\n")


@pytest.mark.parametrize(
    ("words", "checkpointing"),
    [
        (["--gradient_checkpointing", "true"], True),
        (["--gradient-checkpointing=True"], True),
        (["--activation-checkpointing", "false"], False),
        (["--activation-checkpointing"], True),
        ([], True),
    ],
)
def test_a_switch_may_be_told_true_or_false(
    tmp_path: Path, words: list[str], checkpointing: bool
) -> None:
    text = "model: m\ndata: d\noutput_dir: o\nactivation_checkpointing: true\n"
    options = parsed(tmp_path, "train", text, *words, "--quiet", "--rank", "2")
    assert options.memory.activation_checkpointing is checkpointing
    assert (options.run.quiet, options.method.rank) == (True, 2)


def test_a_switch_that_is_told_false_is_off_without_a_file_too() -> None:
    words = ["train", "--model", "m", "--data", "d", "--output-dir", "o", "--quiet", "false"]
    assert cli._parse(words).run.quiet is False


def test_toml_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    text = 'model = "m"\nmethods = ["loreft", "qlora[rank=8]"]\nseeds = [0, 1]\nquiet = true\n'
    options = parsed(tmp_path, "compare", text, name="run.toml")
    assert (options.matrix.methods, options.matrix.seeds) == ("loreft,qlora[rank=8]", "0,1")
    assert options.quiet


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: m\nrnak: 3\n",
            ":2: rnak must be an option of train, got no such one",
        ),
        ("model: m\nrank: 3\nrank: 4\n", ":3: rank must stand there once"),
        ("rank: 3\nepochs: 0\n", ":2: epochs must be finite and above 0"),
        ("method:\n  rank: 3\n", ":1: method must be a value, got a group"),
        ("quiet: maybe\n", ":1: quiet must be true or false, got 'maybe'"),
        ("command: compare\n", ":1: command must be train, got 'compare'"),
        ("- rank\n", ":1: config must hold options"),
        ("rank: [1\n", ":2: config must be YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    rest = ["--model", "m", "--data", "d", "--output-dir", "o"]
    rest = rest[2:] if "model" in text else rest
    with pytest.raises(InputError, match="run.yaml" + said):
        parsed(tmp_path, "train", text, *rest)


def test_a_value_of_another_type_is_said_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parsed(tmp_path, "plan", "model: m\nrank: eight\n")
    assert left.value.code == 2
    assert "run.yaml:2: " in capsys.readouterr().err


def test_a_word_of_the_command_line_is_not_taken_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.yaml:1: data must be given on the command line"):
        parsed(tmp_path, "data", "data: d\nmodel: m\n")


@pytest.mark.parametrize("words", [["--config"], ["--config", "a.yaml", "--config=b.yaml"]])
def test_one_file_is_named(words: list[str]) -> None:
    with pytest.raises(InputError, match="config must be one YAML or TOML file"):
        cli._parse(["train", *words])


def test_a_command_of_several_actions_takes_a_file_after_the_action(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("command: reuse\nreuse_dir: stores\nall: true\n", encoding="utf-8")
    action = cli._parse(["reuse", "rm", "--config", str(path), "--no-all", "KEY"]).action
    assert (action.keys, action.all, action.reuse_dir) == (("KEY",), False, Path("stores"))
    with pytest.raises(InputError, match=r"run.yaml:3: all must be an option of reuse, got no"):
        cli._parse(["reuse", "ls", "--config", str(path)])


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config must be a file that can be read"):
        cli._parse(["train", "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "run.ini").write_text("")
    with pytest.raises(InputError, match=r"config must end in \.yaml"):
        cli._parse(["train", "--config", str(tmp_path / "run.ini")])


def test_a_file_of_options_that_no_run_wrote_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("model: m\n")
    with pytest.raises(InputError, match="output_dir must be a new file, or one that"):
        check_run_file(tmp_path)
    write_run_file(tmp_path, "generate", written.build(GenerateOptions, model="m"))
    check_run_file(tmp_path)


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_to_copy_are_read(path: Path) -> None:
    comment, command = path.read_text(), path.read_text().split("command: ")[1].split()[0]
    assert f"lowmem-reft {command} --config recipes/configs/{path.name} --data FILE" in comment
    words = ["--data", "d"] + (["--output-dir", "o"] if command == "train" else [])
    options = cli._parse([command, "--config", str(path), *words])
    assert written.given(options)["model"].startswith("meta-llama/")
