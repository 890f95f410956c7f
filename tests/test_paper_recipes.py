"""The recipes of the paper: a few steps on tiny models, and its figures beside what they print."""

from __future__ import annotations

import gc
import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import RobertaConfig, RobertaForMaskedLM

from lowmem_reft.compare.child import run_cell
from lowmem_reft.data.tasks.answers import find_extractor
from lowmem_reft.data.tasks.registry import load_task
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import write_json
from lowmem_reft.memory import track
from lowmem_reft.methods.entries import parse_methods

TABLES = ("commonsense", "arithmetic", "instruct", "glue")
SMALL = "loreft[rank=2,layers=0;2,positions=f2+l2,lr=1e-2]"

Recipe = Callable[[str], ModuleType]


@pytest.fixture
def recipe() -> Recipe:
    """Import a recipe by its name, as a script's neighbours are imported."""
    return importlib.import_module


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process, which has torch loaded already."""

    def run_cells(cells: Any, *, observer: Any, **_: Any) -> list[dict[str, Any]]:
        results = []
        for cell in cells:
            observer.started(cell)
            results.append(run_cell(cell))
            write_json(cell.result_path, results[-1])
            observer.finished(cell, results[-1], skipped=False)
        return results

    monkeypatch.setattr("lowmem_reft.compare.matrix.run_cells", run_cells)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Public files with a few rows each."""
    directory = tmp_path / "public"

    def choices(question: str, labels: tuple[str, ...], number: int) -> dict[str, str]:
        label = labels[number % len(labels)]
        instruction = f"{question} {number}?\n\nAnswer format: {'/'.join(labels)}"
        return {
            "instruction": instruction,
            "output": f"the correct answer is {label}",
            "answer": label,
        }

    truth, answers = ("true", "false"), ("answer1", "answer2", "answer3", "answer4")
    mix = [choices("is it", truth, n) for n in range(20)]
    mix += [choices("which one", answers, n) for n in range(20)]
    rows: dict[str, Any] = {
        "commonsense_170k/commonsense_170k.json": mix,
        "boolq/train.json": [choices("train: is it", truth, n) for n in range(4)],
        "boolq/test.json": [choices("test: is it", truth, n) for n in range(4)],
        "math_10k/math_10k.json": [
            {
                "instruction": f"what is {n} and 2?",
                "output": f"{n} + 2 = {n + 2}. The answer is {n + 2}.",
                "answer": f"{n + 2}.0",
            }
            for n in range(40)
        ],
        **{
            f"mawps/{part}set.json": [
                {"original_text": f"{part} {n} and 2 ?", "equation": f"x={n}+2", "ans": n + 2.0}
                for n in range(6)
            ]
            for part in ("train", "valid", "test")
        },
        "SVAMP/test.json": [
            {"instruction": f"what is {n} and 9?", "answer": f"{n + 9}.0"} for n in range(4)
        ],
        "ultrafeedback_1k/ultrafeedback_1k.json": [
            {
                "instruction": f"name fox {n}",
                "input": "",
                "output": f"fox {n} is the quick fox" + " and the dog" * (90 if n % 7 == 0 else 0),
            }
            for n in range(60)
        ],
    }
    for name, content in rows.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    (directory / "RTE").mkdir()
    for name, count in (("train", 16), ("dev", 8)):
        lines = [
            f"{n}\tthe {name} dog {n}\tthe cat\t{('entailment', 'not_entailment')[n % 2]}\n"
            for n in range(count)
        ]
        text = "index\tsentence1\tsentence2\tlabel\n" + "".join(lines)
        (directory / f"RTE/{name}.tsv").write_text(text)
    return directory


@pytest.fixture(scope="session")
def tiny_roberta_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random 2-layer RoBERTa with the tiny Llama's tokenizer."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tiny_roberta")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.add_special_tokens({"sep_token": "</s>", "cls_token": "<s>"})
    tokenizer.save_pretrained(directory)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=130,
        type_vocab_size=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    RobertaForMaskedLM(config).save_pretrained(directory)
    return directory


def brief(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let a recipe generate four tokens."""
    scoring = replace(recipe.SETTING.scoring, max_new_tokens=4)
    setting = replace(recipe.SETTING, scoring=scoring, **changes)
    monkeypatch.setattr(recipe, "SETTING", setting)


def test_the_rows_of_the_paper_add_up_to_their_means(recipe: Recipe) -> None:
    for name in TABLES:
        for row in recipe(name).PAPER:
            if row.values and None not in row.values:
                mean = sum(row.values) / len(row.values)
                assert mean == pytest.approx(row.mean, abs=0.1), (name, row)


@pytest.mark.usefixtures("_one_process")
def test_commonsense_trains_once_on_the_mix_and_shows_the_papers_figures(
    recipe: Recipe,
    tiny_llama_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commonsense = recipe("commonsense")
    brief(commonsense, monkeypatch)
    result = commonsense.main(
        commonsense.Config(
            model=str(tiny_llama_dir),
            data_dir=data_dir,
            tasks="boolq",
            methods=SMALL,
            seeds="0",
            epochs=1,
            limit=4,
            storage="fp32",
            output_dir=tmp_path / "out",
        )
    )
    assert result["num_failed"] == 0
    base, tuned = result["rows"]
    assert (base["method"], base["task"]) == ("base[storage=fp32]", "boolq")
    assert "epochs=1" in tuned["method"]
    shown = capsys.readouterr().err
    for figure in ("69.3", "80.2", "86.6", "measured here"):
        assert figure in shown
    config = json.loads((tmp_path / "out/results.json").read_text())[1]["config"]
    assert config["optim"]["batch_size"] * config["optim"]["gradient_accumulation"] == 32
    assert (config["scoring"]["scoring"], config["validation_scoring"]["extractor"]) == (
        "generation",
        "choice_or_truth",
    )


@pytest.mark.usefixtures("_one_process")
def test_arithmetic_says_that_loreft_loses(
    recipe: Recipe,
    tiny_llama_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arithmetic = recipe("arithmetic")
    brief(arithmetic, monkeypatch)
    result = arithmetic.main(
        arithmetic.Config(
            model=str(tiny_llama_dir),
            data_dir=data_dir,
            tasks="svamp",
            methods=SMALL,
            seeds="0",
            epochs=1,
            limit=4,
            storage="fp32",
            output_dir=tmp_path / "out",
        )
    )
    assert result["num_failed"] == 0
    shown = capsys.readouterr().err
    for words in ("46.9", "42.6", "LoReFT loses to LoRA"):
        assert words in shown


@pytest.mark.usefixtures("_one_process")
def test_instruct_keeps_win_rates_apart_from_what_it_measures(
    recipe: Recipe,
    tiny_llama_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instruct = recipe("instruct")
    brief(instruct, monkeypatch, max_length=200)
    result = instruct.main(
        instruct.Config(
            model=str(tiny_llama_dir),
            data_dir=data_dir,
            methods="loreft[rank=2,layers=0;2,positions=f2+l2,tie=sides,lr=1e-2]",
            seeds="0",
            epochs=1,
            limit=3,
            storage="fp32",
            output_dir=tmp_path / "out",
        )
    )
    assert result["num_failed"] == 0
    tuned = result["rows"][1]
    assert result["num_left_out"] == 9
    assert tuned["task"] == "ultrafeedback1k"
    assert (tuned["metric"], tuned["num_trainable_params"]) == ("overlap", 2 * 2 * (2 * 2 * 64 + 2))
    shown = capsys.readouterr().err
    for words in ("85.60", "81.91", f"{tuned['loss']:.3f}", "neither is a win rate"):
        assert words in shown


@pytest.mark.usefixtures("_one_process")
def test_glue_takes_the_settings_of_the_set_and_counts_the_head_apart(
    recipe: Recipe,
    tiny_roberta_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    glue = recipe("glue")
    result = glue.main(
        glue.Config(
            model=str(tiny_roberta_dir),
            data_dir=data_dir,
            tasks="rte",
            methods="loreft,direft",
            seeds="0",
            epochs=1,
            output_dir=tmp_path / "out",
        )
    )
    assert result["size"] == "base"
    assert result["num_head_params"] == {"rte": 32 * 32 + 32 + 2 * 32 + 2}
    assert [row["method"] for row in result["rows"]] == ["loreft", "direft"]
    # p3 is one side: one intervention per layer, however many positions.
    assert result["rows"][0]["num_trainable_params"] == 2 * (2 * 32 + 1)
    loreft, direft = json.loads((tmp_path / "out/rte/results.json").read_text())
    assert loreft["config"]["method"]["positions"] == "f3"
    assert loreft["config"]["optim"]["lr"] == 9e-4
    assert (direft["config"]["optim"]["batch_size"], direft["config"]["method"]["dropout"]) == (
        8,
        0,
    )
    shown = capsys.readouterr().err
    for words in ("84.2", "79.0", "88.2", "not counted above: rte 1,122"):
        assert words in shown


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("name", "options", "task", "metric"),
    [
        ("commonsense", {"tasks": "boolq"}, "boolq", "accuracy"),
        ("arithmetic", {"tasks": "mawps"}, "mawps", "accuracy"),
        ("instruct", {}, "ultrafeedback1k", "loss"),
        ("glue", {"tasks": "rte"}, "rte", "accuracy"),
    ],
)
def test_a_small_base_gets_small_settings_and_is_told_apart_from_the_papers(
    recipe: Recipe,
    tiny_llama_dir: Path,
    tiny_roberta_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    task: str,
    metric: str,
) -> None:
    module = recipe(name)
    # The tiny models have four layers, and few positions.
    methods = module.SMALL.methods.replace("3;9;18;24", "1;3")
    changes = {"methods": methods, "max_length": 120 if name == "glue" else 200}
    monkeypatch.setattr(module, "SMALL", replace(module.SMALL, **changes))
    model = tiny_roberta_dir if name == "glue" else tiny_llama_dir
    common = {"model": str(model), "data_dir": data_dir, "storage": "fp32", "limit": 4}
    out = {"output_dir": tmp_path / "out", "small": True}
    result = module.main(module.Config(**common, **out, **options))
    rows = result["rows"]
    assert {(row["task"], row["metric"], row["num_seeds"]) for row in rows} == {(task, metric, 1)}
    assert [row["method"].partition("[")[0] for row in rows][-2:] == [
        "loreft",
        "lora" if name == "glue" else "qlora",
    ]
    assert not any(row["errors"] for row in rows)
    shown = " ".join(capsys.readouterr().err.split())  # long lines are folded
    for words in ("paper", "measured here", "--small: another base", "one seed"):
        assert words in shown


def test_glue_has_settings_for_every_set(recipe: Recipe) -> None:
    glue = recipe("glue")
    for size in ("base", "large"):
        for task in glue.TASKS:
            methods = glue.task_methods("loreft,direft,lora", task, size)
            specs = parse_methods(methods)
            assert [spec.name for spec in specs] == ["loreft", "direft", "lora"]
            assert specs[0].options.rank == specs[1].options.rank == 1
            assert specs[0].optim_overrides["weight_decay"] == 0
    assert glue.settings("direft", "rte", "large")["weight_decay"] == "6e-3"


@pytest.fixture
def one_card_options(tiny_llama_dir: Path, tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "rows.jsonl"
    row = {"prompt": "is the film good or bad? " * 3, "choices": ["good", "bad"], "answer": 0}
    data.write_text((json.dumps(row) + "\n") * 8)
    return {
        "model": str(tiny_llama_dir),
        "data": str(data),
        "eval_data": str(data),
        "seeds": "0",
        "epochs": 1,
        "batch_size": 2,
        "storage": "fp32",
        "output_dir": tmp_path / "out",
    }


@pytest.mark.usefixtures("_one_process")
def test_one_card_trains_what_fits_as_predicted_and_refuses_what_does_not(
    recipe: Recipe, one_card_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    one_card = recipe("loreft_vs_qlora_one_card")
    options = {**one_card_options, "memory_gib": 1e-6, "methods": "lora[rank=64]"}
    with pytest.raises(InputError, match="memory_gib must be at least") as caught:
        one_card.main(one_card.Config(**options))
    least_for_lora = float(str(caught.value).split("at least ")[1].split()[0])
    options |= {"memory_gib": 0.98 * least_for_lora, "methods": "loreft[rank=2],lora[rank=64]"}
    gc.collect()
    with track("cpu") as others:  # what other tests have left in this process
        pass
    result = one_card.main(one_card.Config(**options))
    fits = {name.partition("[")[0]: plan["fits"] for name, plan in result["plans"].items()}
    assert fits == {"loreft": True, "lora": False}
    assert result["num_failed"] == 0
    _, tuned = result["rows"]
    predicted = result["plans"][tuned["method"]]["peak_bytes"]
    measured = tuned["peak_bytes"] - others.current_bytes
    assert 0.9 * predicted < measured <= predicted <= options["memory_gib"] * 2**30
    shown = capsys.readouterr().err
    for words in ("refused", "predicted MiB", "measured on a CPU"):
        assert words in shown


def test_a_plan_for_a_card_loads_nothing(
    recipe: Recipe, tiny_llama_dir: Path, no_base: None, capsys: pytest.CaptureFixture[str]
) -> None:
    one_card = recipe("loreft_vs_qlora_one_card")
    config = one_card.Config(gpu="a10", model=str(tiny_llama_dir), max_length=64, plan_only=True)
    result = one_card.main(config)
    assert all(plan["fits"] for plan in result["plans"].values())
    assert "A10 24 GB" in capsys.readouterr().err


def test_the_a10_recipe_measures_every_way_beside_its_plan(
    recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a10 = recipe("a10_llama3_8b")
    config = a10.Config(
        model=str(tiny_llama_dir),
        layers="2",
        storages="fp32",
        epochs=1,
        limit=4,
        device="cpu",
        output_dir=tmp_path,
    )
    result = a10.main(config)
    plain, reused, upper = result["measured"]
    assert [run["reuse"] for run in result["measured"]] == ["off", "prefix", "prefix"]
    assert plain["num_steps"] == reused["num_steps"] == 2
    assert upper["peak_bytes"] < reused["peak_bytes"] <= plain["peak_bytes"]
    assert reused["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    assert upper["train_loss"] == reused["train_loss"]
    peaks = [plan["peak_bytes"] for plan in result["plans"]]
    assert peaks[2] < peaks[1] <= peaks[0]
    shown = capsys.readouterr().err
    for words in ("13 m 44 s", "A10 24 GB", "data size not published", "this is a processor's"):
        assert words in shown


def test_the_a10_recipe_says_what_it_cannot_measure(
    recipe: Recipe,
    tiny_llama_dir: Path,
    tmp_path: Path,
    no_base: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a10 = recipe("a10_llama3_8b")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = a10.Config(model=str(tiny_llama_dir), layers="2", storages="nf4", output_dir=tmp_path)
    result = a10.main(config)
    assert result["measured"] is None
    assert "not measured: there is no CUDA device here" in capsys.readouterr().err
    assert "need --model" in a10.not_measured(a10.Config(output_dir=tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("commonsense", {"train_task": "commonsense"}, "task must be one of"),
        ("commonsense", {"methods": "loreftt"}, "method must be one of"),
        ("arithmetic", {"tasks": "gsm8k"}, "data_dir must hold the files of gsm8k"),
        ("arithmetic", {"seeds": "a"}, "seeds must be"),
        ("instruct", {"task": "alpaca"}, "data_dir must hold the files of alpaca"),
        ("instruct", {"limit": 0}, "limit must be at least 1"),
        ("glue", {"tasks": "rte,boolq"}, "tasks must be among mnli"),
    ],
)
def test_wrong_arguments_of_the_tables_are_refused(
    recipe: Recipe,
    tiny_llama_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    message: str,
) -> None:
    module = recipe(name)
    common = {"model": str(tiny_llama_dir), "data_dir": data_dir, "output_dir": tmp_path / "out"}
    with pytest.raises(InputError, match=message):
        module.main(module.Config(**{**common, **options}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loreft_vs_qlora_one_card", {}, "gpu must be given"),
        ("loreft_vs_qlora_one_card", {"gpu": "a11"}, "gpu must be a card that is known"),
        ("loreft_vs_qlora_one_card", {"gpu": "a10", "batch_size": 0}, "batch_size must be at"),
        ("a10_llama3_8b", {"storages": "nf5"}, "storages must be among"),
        ("a10_llama3_8b", {"data": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_wrong_arguments_of_the_plans_are_refused(
    recipe: Recipe, name: str, options: dict[str, Any], message: str
) -> None:
    module = recipe(name)
    with pytest.raises(InputError, match=message):
        module.main(module.Config(**options))


def test_overrides_take_the_place_of_a_methods_own(recipe: Recipe) -> None:
    with_overrides = recipe("paper").with_overrides
    methods = "loreft[rank=8,epochs=6],qlora"
    assert with_overrides(methods, epochs=None, storage=None) == methods
    assert with_overrides(methods, epochs=1, storage="nf4") == (
        "loreft[rank=8,epochs=1,storage=nf4],qlora[epochs=1,storage=nf4]"
    )


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("huggyllama/llama-7b", {"LLaMA-7B"}),
        ("meta-llama/Llama-2-7b-hf", {"Llama-2-7B"}),
        ("meta-llama/Meta-Llama-3-8B", {"Llama-3-8B"}),
        ("somewhere/other", {"ChatGPT", "LLaMA-7B", "LLaMA-13B", "Llama-2-7B", "Llama-3-8B"}),
    ],
)
def test_the_papers_rows_are_those_of_the_same_model(
    recipe: Recipe, model: str, shown: set[str]
) -> None:
    rows = recipe("paper").rows_of_model(recipe("commonsense").PAPER, model)
    assert {row.model for row in rows} == shown


def test_answers_of_the_mixes_are_read_whatever_set_a_row_is_from(data_dir: Path) -> None:
    read = find_extractor("choice_or_truth")
    for row in load_task("commonsense170k", "train", data_dir=data_dir):
        assert row.response == f"the correct answer is {read(row.response)}"
    read = find_extractor("number_or_letter")
    assert read("3 + 5 = 8. The answer is 8.") == "8"
    assert read("It takes 3 h, so 18 km. The answer is (B).") == "B"
    assert read("The answer is a dog.") is None


def test_a_recipe_refuses_on_the_command_line_without_a_traceback(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_card = recipe("loreft_vs_qlora_one_card")
    monkeypatch.setattr("sys.argv", ["one_card", "--plan-only"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        recipe("paper").run_recipe(one_card.Config, one_card.main, one_card.__doc__)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: gpu must be given")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_recipe_prints_json_where_it_is_asked_for(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    config = recipe("text_classification").Config
    monkeypatch.setattr(
        "sys.argv", ["recipe", "--task", "trec", "--source", "x", "--model", "m", *words]
    )
    recipe("paper").run_recipe(config, lambda chosen: {"task": chosen.task}, "About.")
    printed = capsys.readouterr().out
    assert (json.loads(printed) if words else printed) == ({"task": "trec"} if words else "")
