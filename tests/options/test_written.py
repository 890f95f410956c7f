"""Options are written and read by the names of their values, whatever groups they stand in."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft import options as all_options
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import plain
from lowmem_reft.options import (
    CompareOptions,
    DataOptions,
    GenerateOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    PlanOptions,
    ReuseOptions,
    RunOptions,
    TrainOptions,
    written,
)

CHANGED: list[Any] = [
    written.build(
        TrainOptions,
        **{"model": ModelOptions(model="m"), "data": DataOptions(data="d", limit=3)},
        **{"rank": 2, "act": "relu", "optim": "sgd", "memory_gib": 1.5, "reuse": "trunk"},
        **{"activation_checkpointing": True, "output_dir": Path("a b"), "quiet": True},
    ),
    written.build(
        CompareOptions,
        **{"model": "m", "tasks": "trec", "methods": "loreft[rank=8]", "workers": "ray"},
        **{"optim": OptimOptions(epochs=1.5), "reuse_limit_gib": 5.0, "eval_limit": 2},
    ),
    written.build(PlanOptions, model="m", layers="upper:0.5", reuse="trunk", fit=True, json=True),
    written.build(GenerateOptions, model=ModelOptions(model="m"), prompt="p", temperature=0.5),
]
BY_NAME = pytest.mark.parametrize("options", CHANGED, ids=lambda options: type(options).__name__)


@BY_NAME
def test_the_command_line_says_the_same_again(options: Any) -> None:
    name = type(options).__name__.removesuffix("Options").lower()
    words = shlex.split(shlex.join([name, *written.flags(options)]))
    assert cli._parse(words) == options


@BY_NAME
def test_json_says_the_same_again_with_groups_and_without(options: Any) -> None:
    for content in (asdict(options), {**vars(options)}):
        assert written.build(type(options), **content) == options
    assert written.build(type(options), **json.loads(json.dumps(plain(asdict(options))))) == options


def test_what_is_the_default_of_a_subcommand_is_not_written() -> None:
    assert CompareOptions().reuse == ReuseOptions(reuse="off")
    assert written.flags(CompareOptions()) == []
    assert written.flags(CompareOptions(reuse=ReuseOptions())) == ["--reuse", "auto"]


def test_a_value_is_changed_where_it_stands_and_a_group_as_a_whole() -> None:
    options = written.changed(CompareOptions(), limit=3, optim="sgd", json=True)
    assert (options.rows.limit, options.optim.optim, options.json) == (3, "sgd", True)
    whole = written.changed(options, optim=OptimOptions(epochs=1.0), max_length=9)
    assert (whole.optim, whole.rows.limit) == (OptimOptions(epochs=1.0), 3)
    assert whole.rows.max_length == 9


def test_a_name_that_nothing_has_and_a_value_that_breaks_its_rule_are_refused() -> None:
    for function in (lambda **new: written.changed(CompareOptions(), **new), build_comparison):
        with pytest.raises(TypeError, match="nonsense"):
            function(nonsense=1)
        with pytest.raises(InputError, match="limit must be at least 1, got 0"):
            function(limit=0)


def build_comparison(**content: Any) -> CompareOptions:
    return written.build(CompareOptions, **content)


def test_names_are_those_of_the_flags_and_stand_once_in_each_class() -> None:
    assert written.types(MethodOptions)["rank"] == int | None
    for name, kind in vars(all_options).items():
        if is_dataclass(kind) and name != "ReuseCommandOptions":  # whose action is one of two
            leaves = list(written.types(kind))
            assert len(leaves) == len(set(leaves))
            assert len(fields(kind)) <= 12, name


def test_a_run_has_its_directory_back_as_a_path() -> None:
    assert written.build(RunOptions, output_dir="runs/a").output_dir == Path("runs/a")
