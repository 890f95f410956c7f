"""TRL: what SFTTrainer and DPOTrainer do to a model and its batches."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from breaking import contract, doing_nothing, with_value, wrapped
from lowmem_reft.machine.contracts.contract import tiny_llama

trl = pytest.importorskip("trl")
sft = pytest.importorskip("trl.trainer.sft_trainer")

SFT = "trl.trainer.sft_trainer:SFTTrainer."

ROWS = [
    {"prompt": "a b", "completion": " c"},
    {"prompt": "c b a", "completion": " a b"},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # keeps TRL from reporting its use


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<p>": 0, "<e>": 1, "a": 2, "b": 3, "c": 4, "<u>": 5}, "<u>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<p>", eos_token="<e>", unk_token="<u>"
    )


def trainer(
    tokenizer: Any, directory: Path, kind: Any = None, model: Any = None, **fields: Any
) -> Any:
    common: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return (kind or trl.SFTTrainer)(
        model=model or tiny_llama(),
        args=trl.SFTConfig(output_dir=str(directory), **{**common, **fields}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )


def given_in_training(training: Any) -> list[dict[str, Any]]:
    """The arguments of every pass of the model."""
    given: list[dict[str, Any]] = []
    training.model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    training.train()
    return given


@contract(
    "trl",
    used_by="reft/selection.py base/loss.py",
    broken_by=wrapped(
        f"{SFT}compute_loss",
        lambda compute: (
            lambda self, model, inputs, *a, **k: compute(
                self, lambda fused_lm_head=False, **more: model(**more), inputs, *a, **k
            )
        ),
    ),
)
def test_sft_gives_the_model_labels_of_the_completion_and_asks_for_its_fused_head(
    tokenizer: Any, tmp_path: Path
) -> None:
    given = given_in_training(trainer(tokenizer, tmp_path))
    assert len(given) == 1
    assert given[0]["fused_lm_head"] is True
    assert given[0]["labels"].shape == given[0]["input_ids"].shape
    assert {-100} < {*given[0]["labels"].flatten().tolist()}
    assert given[0]["use_cache"] is False
    assert "attention_mask" in given[0]


@contract(
    "trl",
    used_by="reuse/mixins.py",
    broken_by=wrapped(
        f"{SFT}_set_signature_columns_if_needed",
        lambda _: lambda self: setattr(self, "_signature_columns", ("input_ids",)),
    ),
)
def test_sft_has_columns_to_keep_that_can_be_added_to(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Keeping(trl.SFTTrainer):
        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            if "number" not in self._signature_columns:
                self._signature_columns.append("number")

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs.pop("number"))
            return super().compute_loss(model, inputs, *args, **kwargs)

    training = trainer(tokenizer, tmp_path, Keeping)
    data = training.train_dataset
    assert {"input_ids", "labels"} <= {*data.column_names}
    assert "seq_lengths" not in data.column_names
    collate = training.data_collator
    training.train_dataset = data.add_column("number", [0, 1])
    training.data_collator = lambda rows: {
        **collate([{k: v for k, v in row.items() if k != "number"} for row in rows]),
        "number": torch.tensor([row["number"] for row in rows]),
    }
    training.train()
    assert sorted(seen[0].tolist()) == [0, 1]
    assert training._train_batch_size == 2


@contract(
    "trl",
    used_by="reuse/mixins.py",
    broken_by=wrapped(
        f"{SFT}__init__",
        lambda init: lambda self, *a, **k: (init(self, *a, **k), delattr(self, "padding_free"))[0],
    ),
)
def test_samples_that_are_packed_are_told_by_two_names(tokenizer: Any, tmp_path: Path) -> None:
    assert trainer(tokenizer, tmp_path).padding_free is False
    packed = trainer(tokenizer, tmp_path, packing=True, max_length=8)
    assert packed.padding_free is True
    assert "seq_lengths" in packed.train_dataset.column_names


@contract(
    "trl",
    used_by="base/checkpointing.py",
    broken_by=wrapped(
        f"{SFT}__init__",
        lambda init: (
            lambda self, *a, **k: (
                init(self, *a, **k),
                type(self.model).enable_input_require_grads(self.model),
            )[0]
        ),
    ),
)
def test_input_gradients_are_asked_of_the_instance(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.enable_input_require_grads = lambda: None
    training = trainer(
        tokenizer,
        tmp_path,
        model=model,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    training.train()
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


@contract(
    "trl",
    used_by="base/loss.py reuse/mixins.py reft/selection.py",
    broken_by=with_value(f"{SFT}compute_loss", lambda self, batch: None),
)
def test_compute_loss_has_the_arguments_of_the_trainer(breach: bool) -> None:
    for kind in (trl.SFTTrainer, trl.DPOTrainer):
        parameters = list(inspect.signature(kind.compute_loss).parameters)
        assert parameters == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


@contract(
    "trl",
    used_by="reuse/mixins.py",
    broken_by=with_value(f"{SFT}__init__", doing_nothing),
)
def test_the_trainers_take_a_quantized_model_and_a_configuration(breach: bool) -> None:
    for kind in (trl.SFTTrainer, trl.DPOTrainer):
        parameters = inspect.signature(kind.__init__).parameters
        assert {"model", "args", "train_dataset", "processing_class", "peft_config"} <= {
            *parameters
        }
