"""Which base an adapter belongs to: a digest of its checkpoint, noted when it is trained."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_reft.base.identity import checkpoint_digest, storage_of
from lowmem_reft.base.loading import load_base
from lowmem_reft.methods.card import TrainingCard, load_card
from lowmem_reft.methods.several import find_adapters, load_together
from lowmem_reft.options import BesideOptions, DataOptions, EvaluateOptions, ModelOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.lora_reft import LoraReftConfig
from lowmem_reft.runs import evaluate
from lowmem_reft.runs.evaluate import run_evaluation


@pytest.fixture
def other_base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The same architecture with one linear layer scaled, as a merged LoRA would."""
    directory = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def base_in_fp32(directory: str | Path, **more: Any) -> Any:
    return load_base(directory, storage="fp32", device="cpu", **more)


def save_reft(directory: Path, base: Path, *, storage: Any = "fp32", **fields: Any) -> Path:
    """An adapter as any Trainer saves it: without a training.json."""
    config = ReftConfig(task_type="CAUSAL_LM", positions="f1", **fields)
    loaded = load_base(base, storage=storage, device="cpu")
    get_peft_model(loaded, config).save_pretrained(directory)
    return directory


def save_lora(directory: Path, base: Path) -> Path:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(base_in_fp32(base), config).save_pretrained(directory)
    return directory


def noted(directory: Path) -> tuple[str, str, str]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["base_storage"], config["base_digest"]


def test_the_digest_is_that_of_the_weights_however_they_are_sharded(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert checkpoint_digest(tmp_path) == checkpoint_digest(tiny_llama_dir)


def test_files_that_are_not_loaded_are_not_in_the_digest(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    assert checkpoint_digest(tmp_path) == checkpoint_digest(tiny_llama_dir)


def test_an_edit_of_some_rows_of_one_large_matrix_is_seen(tmp_path: Path) -> None:
    weights = {f"layers.{i}.weight": torch.zeros(512, 1024) for i in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    before = checkpoint_digest(tmp_path)
    weights["layers.3.weight"][10:200] = 1.0
    save_file(weights, tmp_path / "model.safetensors")
    assert checkpoint_digest(tmp_path) != before


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "last value"])
def test_names_shapes_dtypes_and_last_values_are_in_the_digest(change: str, tmp_path: Path) -> None:
    tensor = torch.zeros(300, 200)
    save_file({"a.weight": tensor}, tmp_path / "model.safetensors")
    before = checkpoint_digest(tmp_path)
    if change == "last value":
        tensor[-1, -1] = 1.0
    changed = {
        "name": {"b.weight": tensor},
        "shape": {"a.weight": tensor.reshape(200, 300)},
        "dtype": {"a.weight": tensor.view(torch.int32)},
        "last value": {"a.weight": tensor},
    }
    save_file(changed[change], tmp_path / "model.safetensors")
    assert checkpoint_digest(tmp_path) != before


def test_of_a_large_tensor_only_a_little_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a.weight": torch.zeros(4096, 1024)}, tmp_path / "model.safetensors")  # 16 MiB
    num_bytes = []
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = real(path, *args, **kwargs)

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def read(self, size: int) -> bytes:
                num_bytes.append(size)
                return file.read(size)

            def seek(self, offset: int) -> int:
                return file.seek(offset)

        return Counted()

    monkeypatch.setattr(Path, "open", opened)
    assert checkpoint_digest(tmp_path) is not None
    assert 0 < sum(num_bytes) < 2**16


@pytest.mark.parametrize("broken", ["bin", "short", "no header", "missing shard"])
def test_a_checkpoint_that_cannot_be_read_has_no_digest(broken: str, tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    if broken == "bin":
        torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    elif broken == "short":
        whole.write_bytes(b"abc")
    elif broken == "no header":
        whole.write_bytes(b"\xff" * 64)
    else:
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_digest(tmp_path) is None


@pytest.fixture
def hub(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A cache of the hub that holds two revisions of org/m."""
    root = tmp_path / "hub" / "models--org--m"
    for name, commit, source in (
        ("main", "a" * 40, tiny_llama_dir),
        ("v2", "b" * 40, other_base),
    ):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / name).write_text(commit)
        shutil.copytree(source, root / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_revision_that_was_loaded_is_noted(
    hub: Path, tiny_llama_dir: Path, other_base: Path, tmp_path: Path
) -> None:
    assert checkpoint_digest("org/m") == checkpoint_digest(tiny_llama_dir)
    assert checkpoint_digest("org/m", revision="v2") == checkpoint_digest(other_base)
    options = {"cache_dir": str(hub)}
    for name, like in (("main", tiny_llama_dir), ("v2", other_base)):
        base = AutoModelForCausalLM.from_pretrained("org/m", revision=name, **options)
        base.config._commit_hash = (hub / "models--org--m/refs" / name).read_text()
        model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM"))
        assert model.peft_config["default"].base_digest == checkpoint_digest(like)


def test_of_an_unknown_revision_nothing_is_noted(hub: Path, tiny_llama_dir: Path) -> None:
    def digest() -> str | None:
        base = AutoModelForCausalLM.from_pretrained("org/m", cache_dir=str(hub))
        base.config._commit_hash = None
        config = ReftConfig(task_type="CAUSAL_LM")
        found: Any = get_peft_model(base, config).peft_config["default"]
        assert found.base_storage == "fp32"
        return found.base_digest

    assert digest() is None
    shutil.rmtree(hub / "models--org--m" / "snapshots" / ("b" * 40))  # only one is left
    assert digest() == checkpoint_digest(tiny_llama_dir)


def test_load_base_says_which_revision_it_loaded(
    hub: Path, other_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.hub as of_transformers

    monkeypatch.setattr(of_transformers.constants, "HF_HUB_CACHE", str(hub))
    adapter = tmp_path / "adapter"
    model = get_peft_model(base_in_fp32("org/m", revision="v2"), ReftConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(adapter, save_embedding_layers=False)  # else PEFT asks the hub
    assert noted(adapter) == ("org/m", "fp32", checkpoint_digest(other_base))
    with pytest.warns(UserWarning, match="another checkpoint of that name"):
        PeftModel.from_pretrained(base_in_fp32("org/m"), adapter)
    PeftModel.from_pretrained(base_in_fp32("org/m", revision="v2"), adapter)


def test_a_saved_configuration_used_for_a_new_training_is_of_the_new_base(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path
) -> None:
    config = ReftConfig.from_pretrained(str(save_reft(tmp_path / "first", tiny_llama_dir)))
    config.inference_mode = False  # else nothing of it is trained
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*base_model_name_or_path", UserWarning)
        model = get_peft_model(base_in_fp32(other_base), config)
    model.save_pretrained(tmp_path / "second")
    assert noted(tmp_path / "second")[2] == checkpoint_digest(other_base)
    PeftModel.from_pretrained(base_in_fp32(other_base), tmp_path / "second")
    with pytest.warns(UserWarning, match="the adapter was trained on"):
        PeftModel.from_pretrained(base_in_fp32(tiny_llama_dir), tmp_path / "second")


def test_going_on_with_the_training_on_another_base_warns_and_is_noted(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path
) -> None:
    first = save_reft(tmp_path / "first", tiny_llama_dir)
    with pytest.warns(UserWarning, match="the adapter was trained on"):
        model = PeftModel.from_pretrained(base_in_fp32(other_base), first, is_trainable=True)
    model.save_pretrained(tmp_path / "second")
    assert noted(tmp_path / "second") == (str(other_base), "fp32", checkpoint_digest(other_base))


def test_an_adapter_that_is_saved_again_keeps_the_base_of_its_training(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path
) -> None:
    first = save_reft(tmp_path / "first", tiny_llama_dir)
    with pytest.warns(UserWarning, match="the adapter was trained on"):
        model = PeftModel.from_pretrained(base_in_fp32(other_base), first)
    model.save_pretrained(tmp_path / "again")
    assert noted(tmp_path / "again") == noted(first)


def test_lora_reft_knows_its_base_too(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path
) -> None:
    config = LoraReftConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], reft={"positions": "f1"}
    )
    get_peft_model(base_in_fp32(tiny_llama_dir), config).save_pretrained(tmp_path / "adapter")
    assert noted(tmp_path / "adapter")[1:] == ("fp32", checkpoint_digest(tiny_llama_dir))
    PeftModel.from_pretrained(base_in_fp32(tiny_llama_dir), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the adapter was trained on"):
        PeftModel.from_pretrained(base_in_fp32(other_base), tmp_path / "adapter")


def test_without_a_training_card_the_adapters_configuration_is_one(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    reft = load_card(save_reft(tmp_path / "reft", tiny_llama_dir))
    assert reft == TrainingCard(
        base=str(tiny_llama_dir), storage="fp32", base_digest=checkpoint_digest(tiny_llama_dir)
    )
    lora = load_card(save_lora(tmp_path / "lora", tiny_llama_dir))
    assert lora == TrainingCard(base=str(tiny_llama_dir), storage=None)
    assert load_card(tmp_path) is None


def test_without_a_training_card_the_base_is_stored_as_in_the_training(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reft = save_reft(tmp_path / "reft", tiny_llama_dir)
    lora = save_lora(tmp_path / "lora", tiny_llama_dir)
    for adapter, storage in ((reft, "fp32"), (lora, "nf4")):
        options = ModelOptions(model=str(tiny_llama_dir), device="cpu")
        adapters = find_adapters(str(adapter), options, template=None, max_length=None)
        assert storage_of(load_together(options, adapters)[0].get_base_model()) == storage
    assert "the adapter was trained on" not in caplog.text
    options = ModelOptions(model=str(other_base), device="cpu")
    adapters = find_adapters(str(reft), options, template=None, max_length=None)
    load_together(options, adapters)
    assert caplog.text.count("the adapter was trained on") == 1


def test_without_a_training_card_evaluate_scores_on_the_storage_of_the_training_too(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    row = {"prompt": "is it good? label:", "choices": ["good", "bad"], "answer": 1}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    results = [
        run_evaluation(
            EvaluateOptions(
                model=ModelOptions(model=str(tiny_llama_dir), storage="nf4", device="cpu"),
                data=DataOptions(data=str(tmp_path / "rows.jsonl")),
                adapter=save(tmp_path / save.__name__, tiny_llama_dir),
                quiet=True,
            )
        )
        for save in (save_reft, save_lora)
    ]
    assert results[0]["trained_storage"] == "fp32"
    assert "trained_storage" not in results[1]  # nobody knows


def test_every_adapter_of_several_is_compared_with_the_base(
    tiny_llama_dir: Path, other_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, base in (("a", tiny_llama_dir), ("b", other_base)):
        directory = save_lora(tmp_path / name, tiny_llama_dir)
        digest = checkpoint_digest(base)
        TrainingCard(base=str(tiny_llama_dir), storage="fp32", base_digest=digest).save(directory)
    options = ModelOptions(model=str(tiny_llama_dir), device="cpu")
    given = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    load_together(options, find_adapters(given, options, template=None, max_length=None))
    assert caplog.text.count("the adapter was trained on") == 1


@pytest.fixture
def evaluation(tiny_llama_dir: Path, films: Path, tmp_path: Path) -> EvaluateOptions:
    """Scores an adapter that was made on nf4 on just that."""
    save_reft(tmp_path / "adapter", tiny_llama_dir, storage="nf4", init="paper")
    return EvaluateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), storage="nf4", device="cpu"),
        data=DataOptions(data=str(films)),
        adapter=tmp_path / "adapter",
        quiet=True,
    )


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "bf16", "fp32"])
def test_the_storage_of_a_loaded_base_is_known(tiny_llama_dir: Path, storage: Any) -> None:
    assert storage_of(load_base(tiny_llama_dir, storage=storage, device="cpu")) == storage


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "bf16"])
def test_the_storage_of_a_base_in_part_is_that_of_the_blocks_that_are_there(
    tiny_llama_dir: Path, storage: Any
) -> None:
    base = load_base(tiny_llama_dir, storage=storage, device="cpu", resident="upper")
    assert storage_of(base) == storage


def test_the_digest_tells_checkpoints_apart(tiny_llama_dir: Path, other_base: Path) -> None:
    assert checkpoint_digest(tiny_llama_dir) == checkpoint_digest(str(tiny_llama_dir))
    assert checkpoint_digest(tiny_llama_dir) != checkpoint_digest(other_base)
    assert checkpoint_digest("no-such/model") is None
    assert checkpoint_digest("") is None


def test_peft_warns_when_an_adapter_is_loaded_on_another_base_or_storage(
    evaluation: EvaluateOptions, tiny_llama_dir: Path, other_base: Path
) -> None:
    directory = str(evaluation.adapter)
    config = PeftConfig.from_pretrained(directory)
    assert (config.base_storage, config.base_digest) == ("nf4", checkpoint_digest(tiny_llama_dir))
    PeftModel.from_pretrained(load_base(tiny_llama_dir, storage="nf4", device="cpu"), directory)
    with pytest.warns(UserWarning, match="trained on a base stored as nf4 and is loaded on fp32"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), directory)
    with pytest.warns(UserWarning, match=f"and is loaded on '{re.escape(str(other_base))}'"):
        PeftModel.from_pretrained(load_base(other_base, storage="nf4", device="cpu"), directory)


def test_a_configuration_that_is_used_again_is_of_the_base_it_is_used_on(
    tiny_llama_dir: Path, other_base: Path
) -> None:
    config = ReftConfig(task_type="CAUSAL_LM")
    for directory in (tiny_llama_dir, other_base):
        base = AutoModelForCausalLM.from_pretrained(directory)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*base_model_name_or_path", UserWarning)
            model = get_peft_model(base, config)
        assert model.peft_config["default"].base_digest == checkpoint_digest(directory)


def test_evaluate_warns_of_another_storage_and_scores_on_both(
    evaluation: EvaluateOptions, caplog: pytest.LogCaptureFixture
) -> None:
    own = run_evaluation(evaluation)
    assert "trained_storage" not in own
    assert "the adapter was trained on" not in caplog.text
    model = replace(evaluation.model, storage="fp32")
    both = run_evaluation(replace(evaluation, model=model))
    assert "stored as nf4 and is loaded on fp32" in caplog.text
    assert (both["storage"], both["trained_storage"]) == ("fp32", "nf4")
    assert both["accuracy_trained_storage"] == own["accuracy"]
    assert both["loss_trained_storage"] == pytest.approx(own["loss"])
    assert both["loss"] != own["loss"]
    alone = run_evaluation(
        replace(evaluation, model=model, beside=BesideOptions(only_given_storage=True))
    )
    assert alone["loss"] == both["loss"]
    assert "accuracy_trained_storage" not in alone


def test_a_score_is_not_lost_if_the_storage_of_the_training_does_not_fit(
    evaluation: EvaluateOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = evaluate.load_adapted

    def load(options: Any, adapter: Any, card: Any, **more: Any) -> Any:
        if card.storage == "nf4":
            raise RuntimeError("CUDA out of memory")
        return real(options, adapter, card, **more)

    monkeypatch.setattr(evaluate, "load_adapted", load)
    evaluation = replace(evaluation, model=replace(evaluation.model, storage="fp32"))
    result = run_evaluation(evaluation)
    assert "not scored on nf4: out of memory" in caplog.text
    alone = run_evaluation(replace(evaluation, beside=BesideOptions(only_given_storage=True)))
    assert result == alone | {"trained_storage": "nf4"}


def test_evaluate_warns_of_another_base(
    evaluation: EvaluateOptions, other_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = replace(evaluation.model, model=str(other_base))
    run_evaluation(replace(evaluation, model=model))
    assert caplog.text.count("the adapter was trained on") == 1
    assert f"loaded on '{other_base}'" in caplog.text
