"""``plan --fit`` and ``train`` agree: what is printed is what runs, in as much memory."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch

from lowmem_reft import cli
from lowmem_reft.data.tokens import EncodedRows
from lowmem_reft.errors import InputError
from lowmem_reft.memory import verdict
from lowmem_reft.memory.command import train_command
from lowmem_reft.memory.planner import Card, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Predictor, Setting
from lowmem_reft.memory.search import Candidate
from lowmem_reft.memory.shapes import HUB_IDS, SHAPES
from lowmem_reft.memory.upper import UpperFit, fit_upper
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.options import OptimOptions, PlanOptions, TrainOptions, written
from lowmem_reft.runs import fitting
from lowmem_reft.runs.resolve import Run

SHORT_NAMES = {hub_id: name for name, hub_id in HUB_IDS.items()}


def parsed(command: str) -> TrainOptions:
    words = shlex.split(command)
    assert words[:2] == ["lowmem-reft", "train"]
    options = cli._parse(words[1:])
    assert isinstance(options, TrainOptions)
    return options


FOUND = {
    ("llama-3.1-8b", "all"): {4: "fewer blocks", 8: "as asked"},
    ("llama-3.1-8b", None): {4: "upper blocks", 8: "as asked", 12: "as asked", 24: "as asked"},
    ("qwen3-14b", None): {4: "fewer blocks", 8: "upper blocks", 12: "as asked", 24: "as asked"},
    ("llama-3.3-70b", None): {**dict.fromkeys((4, 8, 12), "fewer blocks"), 24: "upper blocks"},
}
"""What is found for a model, layers and a card's GiB, with examples of 256 tokens, 128 of them
answer: what was asked for, the same with its upper blocks alone, or with fewer of them."""


def options_of(model: str, memory_gib: float, layers: str | None = None) -> PlanOptions:
    return written.build(
        PlanOptions,
        **{"model": model, "seq_len": 256, "batch_size": 1, "memory_gib": memory_gib},
        layers=layers,
        fit=True,
    )


def asked(options: PlanOptions, planner: Planner) -> tuple[Setting, Lengths]:
    lengths = verdict.lengths_of(options.lengths)
    lengths = Lengths(**{**vars(lengths), "response_len": 128, "padded": None})
    return verdict.setting_of(options, planner), lengths


def run_of(train: TrainOptions, config: Any) -> Run:
    """A run on one example, of a base that is a configuration alone."""
    example: dict[str, Any] = {"input_ids": [1] * 256, "labels": [-100] * 128 + [1] * 128}
    return Run(
        options=train,
        card=TrainingCard(base=train.model.model, storage=train.model.storage),
        config=config,
        compute_dtype=torch.bfloat16,
        tokenizer=None,
        encoded=EncodedRows(examples=[example], num_cut_prompts=0, num_cut_tokens=0),
    )


@pytest.fixture
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are predicted as on a GPU; models that were built for a prediction are kept."""
    monkeypatch.setattr(fitting, "resolve_device", lambda _: torch.device("cuda", 0))
    of_device = {"device_type": "cuda", "bf16": True}
    monkeypatch.setattr(Setting, "of_device", staticmethod(lambda _: of_device))
    built: dict[Any, Predictor] = {}

    def predictor(self: Planner, setting: Setting) -> Predictor:
        key = id(self.config), setting
        if key not in built:
            built[key] = Predictor(self.config, setting)
        return built[key]

    monkeypatch.setattr(Planner, "predictor", predictor)


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize(("model", "layers"), FOUND)
def test_the_printed_command_is_predicted_as_it_was_planned(model: str, layers: str | None) -> None:
    planner = Planner(read_config(model))  # one for all cards: what a setting takes is the same
    for memory_gib, found in FOUND[model, layers].items():
        options = options_of(model, memory_gib, layers)
        card = planner.card = Card.find(memory_gib=memory_gib)
        assert card is not None
        setting, lengths = asked(options, planner)
        said, shown, shown_lengths = verdict._search(options, planner, setting, lengths, print)
        upper: UpperFit | None = said["upper"]
        assert (said["train_command"] is None) == (found == "fewer blocks")
        assert (upper is None) == (found == "as asked")
        chosen = Candidate(setting=shown, lengths=shown_lengths, cost=0.0)
        if upper is not None:
            chosen = upper.candidate
        train = parsed(said["train_command"] or said["upper_command"])
        assert SHORT_NAMES[train.model.model] == model
        assert train.memory.memory_gib == memory_gib
        _, of_train, its_lengths = fitting.planned(run_of(train, planner.config), card)
        assert (of_train, its_lengths) == (chosen.setting, chosen.lengths)
        assert card.holds(planner.needed_bytes(of_train, its_lengths))


@pytest.mark.usefixtures("_on_cuda")
def test_what_plan_finds_nothing_for_is_refused_by_train() -> None:
    options = options_of("llama-3.1-8b", 1)
    card = Card.find(memory_gib=1)
    assert card is not None
    planner = Planner(read_config("llama-3.1-8b"), card)
    setting, lengths = asked(options, planner)
    said, *_ = verdict._search(options, planner, setting, lengths, print)
    assert said["nothing_fits"]
    train = parsed(train_command(options, Candidate(setting=setting, lengths=lengths, cost=0.0)))
    with pytest.raises(InputError, match="memory_gib must be at least"):
        fitting.fit_into_memory(run_of(train, planner.config))


def test_what_was_given_to_plan_and_train_needs_is_not_dropped() -> None:
    options = written.build(
        PlanOptions,
        model="Llama-3.3-70B",
        method="direft",
        layers="upper:0.25",
        rank=4,
        reuse="trunk",
        resident="upper",
        memory_gib=24.0,
        compute_dtype="fp32",
        optim="sgd",
        task_type="SEQ_CLS",
        device="cpu",
        mlp_tokens=512,
        data="my rows.jsonl",
        template="Q: {prompt}",
        max_length=300,
        turns="all",
    )
    setting = Setting(
        storage="int8", method=options.method, optim="sgd", resident="upper", memory=options.memory
    )
    chosen = Candidate(
        setting=setting, lengths=Lengths(batch_size=2, gradient_accumulation=4), cost=0
    )
    command = train_command(options, chosen)
    assert "--data 'my rows.jsonl'" in command
    given = written.given(parsed(command))
    assert {name: value for name, value in given.items() if name not in ("data", "output_dir")} == {
        "model": "meta-llama/Llama-3.3-70B-Instruct",
        "storage": "int8",
        "compute_dtype": "fp32",
        "device": "cpu",
        "task_type": "SEQ_CLS",
        "template": "Q: {prompt}",
        "max_length": 300,
        "turns": "all",
        "method": "direft",
        "layers": "upper:0.25",
        "rank": 4,
        "optim": "sgd",
        "batch_size": 2,
        "gradient_accumulation": 4,
        "mlp_tokens": 512,
        "memory_gib": 24.0,
        "reuse": "trunk",
        "resident": "upper",
    }


def test_every_short_name_has_a_name_that_train_takes() -> None:
    assert set(HUB_IDS) == set(SHAPES)


def test_plan_and_train_have_the_same_defaults() -> None:
    lengths = PlanOptions().lengths
    assert lengths.batch_size == OptimOptions().batch_size
    assert lengths.seq_len == TrainingCard(base="", storage=None).max_length


def test_upper_blocks_are_first_those_that_are_asked_for(config_file: Any) -> None:
    planner = Planner(read_config(config_file))
    half = written.changed(PlanOptions().method, layers="upper:0.5")
    setting, lengths = Setting(method=half), Lengths(seq_len=64)
    held = planner.predictor(setting).base_bytes
    # Embedding and two of four blocks can leave: more than a twentieth of the weights.
    planner.card = Card(name="", memory_bytes=round(0.95 * held), context_bytes=0)
    found = fit_upper(planner, setting, lengths)
    assert found is not None
    assert found.changed_blocks is None
    assert (found.candidate.setting.resident, found.candidate.setting.reuse) == ("upper", "trunk")
    every = Setting(method=written.changed(half, layers="all"))
    found = fit_upper(planner, every, lengths)
    assert found is not None
    assert found.changed_blocks == 2
    assert "only the upper half" in found.in_words
    qlora = Setting(method=written.changed(half, method="ia3", layers=None))
    assert fit_upper(planner, qlora, lengths) is None
