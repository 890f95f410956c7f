"""tyro, Optuna, Ray, plotly, datasets and the hub: what the package assumes beyond their pages."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from jinja2 import TemplateError

from breaking import contract, doing_nothing, with_result, with_value, without, wrapped


class InputError(ValueError):
    """Refuses a value, as ours does."""


@dataclass(frozen=True)
class Options:
    """Options that refuse a value."""

    rank: int = 4
    """Rank."""
    kind: Literal["b", "a"] | None = None
    """Kind."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError("rank must be at least 1")


def parse(arguments: list[str], **options: Any) -> Any:
    import tyro

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(Options, args=arguments, **options)


@contract(
    "tyro",
    used_by="cli.py",
    broken_by=wrapped(
        "tyro:cli", lambda cli: lambda *args, **kwargs: _leaving_without_a_cause(cli, args, kwargs)
    ),
)
def test_what_a_dataclass_refuses_is_behind_the_exit(breach: bool) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(["--rank", "0"])
    error: BaseException | None = raised.value
    causes = []
    while error is not None:
        causes.append(type(error))
        error = error.__context__
    assert InputError in causes


def _leaving_without_a_cause(cli: Any, args: Any, kwargs: Any) -> Any:
    try:
        return cli(*args, **kwargs)
    except SystemExit as error:
        error.__context__ = None
        raise


@contract(
    "tyro",
    used_by="cli.py",
    broken_by=doing_nothing("tyro.constructors:ConstructorRegistry.primitive_rule"),
)
def test_a_registry_of_our_own_says_how_a_choice_is_read(breach: bool) -> None:
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    asked: list[Any] = []

    def rule(info: Any) -> Any:
        asked.append(info.type)
        if info.type is int:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{b,a}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: value is None or value in ("b", "a"),
            str_from_instance=lambda value: [str(value)],
            choices=("b", "a"),
        )

    registry.primitive_rule(rule)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    assert parse(["--kind", "a"], registry=registry, config=config) == Options(kind="a")
    assert Literal["b", "a"] | None in asked


@contract(
    "optuna",
    used_by="compare/sweep/search.py",
    broken_by=wrapped(
        "optuna.samplers:RandomSampler.__init__", lambda init: lambda self, seed=None: init(self)
    ),
)
def test_a_random_draw_depends_on_the_seed_of_the_sampler_alone(breach: bool) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {
        "a": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "b": optuna.distributions.IntDistribution(1, 64),
        "c": optuna.distributions.CategoricalDistribution(("x", "y", "z")),
    }
    drawn = []
    for earlier in (0, 3):
        study = optuna.create_study(direction="maximize")
        for _ in range(earlier):
            study.tell(study.ask(distributions), 1.0)
        study.sampler = optuna.samplers.RandomSampler(seed=7)
        drawn.append(study.ask(distributions).params)
    assert drawn[0] == drawn[1]
    study.enqueue_trial(drawn[0])
    assert study.ask(distributions).params == drawn[0]


@contract(
    "optuna",
    used_by="compare/sweep/search.py",
    broken_by=without("optuna.importance:PedAnovaImportanceEvaluator"),
)
def test_a_study_takes_old_trials_prunes_and_knows_what_mattered(breach: bool) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {"a": optuna.distributions.FloatDistribution(0, 1)}
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    states = optuna.trial.TrialState
    for number in range(8):
        study.add_trial(
            optuna.trial.create_trial(
                state=states.COMPLETE,
                value=float(number),
                params={"a": number / 8},
                distributions=distributions,
                intermediate_values={1: float(number)},
            )
        )
    trial = study.ask(distributions)
    trial.report(-5.0, step=1)
    assert trial.should_prune()
    study.tell(trial, state=states.PRUNED)
    assert len(study.get_trials(deepcopy=False, states=(states.COMPLETE,))) == 8
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert importances == {"a": 1.0}
    assert issubclass(optuna.exceptions.ExperimentalWarning, Warning)


@contract("ray", used_by="compare/engines/cluster.py", broken_by=without("ray.exceptions:RayError"))
def test_ray_has_what_a_cluster_is_asked_by(breach: bool) -> None:
    import inspect

    import ray

    for name in ("init", "wait", "get", "put", "cancel", "nodes", "shutdown", "is_initialized"):
        assert callable(getattr(ray, name))
    known = inspect.signature(ray.init).parameters
    wanted = {"include_dashboard", "log_to_driver", "logging_level", "object_store_memory"}
    assert wanted <= {*known}
    assert issubclass(ray.exceptions.RayError, Exception)
    assert "force" in inspect.signature(ray.cancel).parameters


@contract(
    "ray",
    used_by="compare/engines/cluster.py",
    broken_by=with_value(f"{__name__}:_text_of_ray", lambda: ""),
)
def test_ray_reads_the_variables_that_quieten_it(breach: bool) -> None:
    text = _text_of_ray()
    for name in ("USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        assert name in text


def _text_of_ray() -> str:
    from ray._common.usage import usage_constants
    from ray._private.accelerators import accelerator

    modules = (accelerator, usage_constants)
    files = [Path(module.__file__) for module in modules]
    return "".join(file.read_text(encoding="utf-8") for file in files)


@contract(
    "plotly",
    used_by="memory/picture.py memory/chart.py",
    broken_by=with_result(
        "plotly.graph_objects:Figure.to_html", lambda page: f"{page}<script src='https://cdn'>"
    ),
)
def test_a_page_of_plotly_fetches_nothing(breach: bool) -> None:
    from plotly import graph_objects as objects

    trace = {"type": "scatter", "mode": "lines", "x": [0, 1], "y": [1, 2], "stackgroup": "1"}
    chart = objects.Figure([trace], {"hovermode": "x unified", "shapes": [], "annotations": []})
    page = chart.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="chart",
        default_height="90px",
        config={"responsive": True, "displayModeBar": False},
    )
    assert 'id="chart"' in page
    assert len(page) > 1_000_000, "with all of plotly.js inside"
    assert "<script src=" not in page


@contract(
    "datasets",
    used_by="reuse/mixins.py data/readers.py",
    broken_by=with_value("datasets:Dataset.add_column", lambda self, name, column: self),
)
def test_a_data_set_takes_a_column_and_gives_lists(breach: bool) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": [1, 2], "labels": [3, 4], "other": "a"}] * 2)
    more = data.add_column("number", [0, 1])
    assert more.column_names == ["input_ids", "labels", "other", "number"]
    rows = more.select_columns(["input_ids", "number"]).to_list()
    assert rows == [{"input_ids": [1, 2], "number": 0}, {"input_ids": [1, 2], "number": 1}]


@contract(
    "datasets",
    used_by="data/readers.py",
    broken_by=wrapped("datasets:load_dataset", lambda _: lambda *args, **kwargs: [{}]),
)
def test_a_data_set_that_cannot_be_had_is_an_error_that_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breach: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        datasets.load_dataset(str(tmp_path / "nothing"), split="train")


@contract(
    "huggingface_hub",
    used_by="runs/readme.py",
    broken_by=with_value("huggingface_hub:ModelCardData.to_yaml", lambda self: ""),
)
def test_a_model_card_has_a_head_that_the_hub_reads(tmp_path: Path) -> None:
    import huggingface_hub

    result = huggingface_hub.EvalResult(
        task_type="text-generation",
        dataset_type="rows",
        dataset_name="rows",
        dataset_split="test",
        metric_type="accuracy",
        metric_value=0.5,
    )
    data = huggingface_hub.ModelCardData(
        base_model="some/model",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lowmem-reft"],
        datasets=None,
        model_name="mine",
        eval_results=[result],
    )
    huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\ntext\n").save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    for words in ("base_model: some/model", "library_name: peft", "value: 0.5", "name: mine"):
        assert words in text


@contract(
    "jinja2",
    used_by="data/tokens.py",
    broken_by=with_value(f"{__name__}:TemplateError", KeyError),
)
def test_a_chat_template_refuses_by_a_template_error(breach: bool) -> None:
    import transformers
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), unk_token="a"
    )
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}"
    )
    asked = [{"role": "user", "content": "hello"}]
    options: dict[str, Any] = {"tokenize": False}
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options) == "hello:"
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}], **options)
