"""A base of which only upper blocks are loaded, against the whole base."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.identity import base_digest
from lowmem_reft.base.loading import load_base, save_base
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.ours import ours
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.errors import InputError
from lowmem_reft.methods.constant import find_first_resident
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reuse.proof import prove
from lowmem_reft.reuse.reuse import Reuse
from tiny_models import ARCHITECTURES, SIZES, adapted, make_examples, make_model, saved, stacked

NUM_BLOCKS = 5
FIRST = 3


def load(directory: Path, resident: Any, storage: Any = "fp32") -> Any:
    options: dict[str, Any] = {} if resident == "all" else {"first_resident": FIRST}
    return load_base(
        directory,
        storage=storage,
        compute_dtype="fp32",
        device="cpu",
        resident=resident,
        **options,
    )


def gradients(model: Any, reuse: Reuse) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(reuse.loss([0, 1, 2, 3]), trained))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_from_upper_blocks_gives_the_gradients_of_the_whole_base(
    tmp_path: Path, architecture: str
) -> None:
    directory, examples = saved(tmp_path / "model", architecture), make_examples()
    whole = adapted(load(directory, "all"))
    upper = adapted(load(directory, "upper"))
    one = gradients(whole, Reuse(whole, examples, tmp_path / "one"))
    reuse = Reuse(upper, examples, tmp_path / "two")
    for a, b in zip(one, gradients(upper, reuse), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp32"])
def test_lower_blocks_are_never_there_and_restored_ones_are_those_of_the_checkpoint(
    tmp_path: Path, storage: str
) -> None:
    directory = saved(tmp_path / "model")
    base = load(directory, "upper", storage)
    blocks = find_blocks(base)[1]
    assert all(p.is_meta for block in blocks[:FIRST] for p in block.parameters())
    assert base.get_input_embeddings().weight.is_meta
    assert not any(p.is_meta for block in blocks[FIRST:] for p in block.parameters())
    base.residency.restore()
    assert base_digest(base) == base_digest(load(directory, "all", storage))
    assert not any(p.requires_grad for p in base.parameters())


def test_blocks_are_found_anew_where_others_have_taken_their_place() -> None:
    base: Any = make_model().get_base_model()
    before = find_blocks(base)
    assert find_blocks(base)[1] is before[1]
    base.model.layers = type(before[1])(list(before[1])[::-1])
    assert find_blocks(base) == ("model.layers", base.model.layers)
    other = copy.deepcopy(base)
    assert find_blocks(other)[1] is other.model.layers


def test_a_whole_file_beside_an_index_is_what_is_read_in_parts_too(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model")
    shards = [load_file(path) for path in directory.glob("model-*.safetensors")]
    other = {name: 2 * tensor for shard in shards for name, tensor in shard.items()}
    save_file(other, directory / "model.safetensors", metadata={"format": "pt"})
    base = load(directory, "upper")
    base.residency.restore()
    assert base_digest(base) == base_digest(load(directory, "all"))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_checkpoints_are_read_in_parts_too(tmp_path: Path, storage: Any) -> None:
    save_base(load(saved(tmp_path / "model"), "all", storage), tmp_path / "quantized")
    examples = make_examples()
    whole = adapted(load(tmp_path / "quantized", "all", storage))
    upper = adapted(load(tmp_path / "quantized", "upper", storage))
    one = gradients(whole, Reuse(whole, examples, tmp_path / "one"))
    two = gradients(upper, Reuse(upper, examples, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# transformers before 5.20 takes the device of the first parameter, here one that streams in.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")
def test_streamed_blocks_give_the_logits_of_the_whole_base(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model")
    whole, upper = load(directory, "all", "nf4"), load(directory, "upper", "nf4")
    ids = torch.randint(3, 256, (2, 9))
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits
        with upper.residency.streaming():
            assert torch.equal(upper(input_ids=ids).logits, wanted)
            text = upper.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(text, whole.generate(ids, max_new_tokens=4, do_sample=False))
    assert all(p.is_meta for p in find_blocks(upper)[1][0].parameters())


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp32"])
def test_a_block_that_has_run_is_gone_at_once(tmp_path: Path, storage: str) -> None:
    residency = load(saved(tmp_path / "model"), "upper", storage).residency
    gc.collect()
    gc.disable()  # a cycle would keep the block until the next collection
    try:
        before = live_weights()
        with residency.loaded(1):
            assert live_weights() > before
        assert live_weights() == before
    finally:
        gc.enable()


def live_weights() -> int:
    return sum(
        issubclass(type(thing), torch.nn.Parameter) and not thing.is_meta
        for thing in gc.get_objects()
    )


def test_a_head_tied_to_the_embedding_keeps_it(tmp_path: Path) -> None:
    base = load(saved(tmp_path / "model", tie_word_embeddings=True), "upper")
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert not base.lm_head.weight.is_meta


def test_parameters_are_counted_as_if_they_were_there(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model")
    counts = [
        adapted(load(directory, resident, "nf4")).get_nb_trainable_parameters()
        for resident in ("all", "upper")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("positions", ["l1", "all"])
def test_an_edit_of_the_last_block_needs_no_block_at_all(tmp_path: Path, positions: str) -> None:
    base = load_base(
        saved(tmp_path / "model"),
        storage="nf4",
        compute_dtype="fp32",
        device="cpu",
        resident="upper",
        first_resident=NUM_BLOCKS,
    )
    model, examples = adapted(base, "4", positions), make_examples()
    reuse = Reuse(model, examples, tmp_path / "reuse")
    assert all(p.is_meta for p in find_blocks(base)[1].parameters() if not p.requires_grad)
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5


def test_lora_above_the_trunk_trains_from_upper_blocks(tmp_path: Path) -> None:
    directory, examples = saved(tmp_path / "model"), make_examples()
    base = load(directory, "upper", "nf4")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    config.layers_to_transform = [3, 4]
    model: Any = get_peft_model(base, config)
    use_chunked_loss(model)
    reuse = Reuse(model.train(), examples, tmp_path / "reuse")
    assert reuse.mode == "trunk"
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5


def test_a_killed_layer_by_layer_build_goes_on_with_the_block_it_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, examples = saved(tmp_path / "model"), make_examples()
    upper = adapted(load(directory, "upper"))
    checkpoint = upper.get_base_model().residency.checkpoint
    read, original = [], checkpoint.block

    def block(index: int) -> Any:
        read.append(index)
        if index == 2 and read.count(2) == 1:
            raise KeyboardInterrupt
        return original(index)

    monkeypatch.setattr(checkpoint, "block", block)
    with pytest.raises(KeyboardInterrupt):
        Reuse(upper, examples, tmp_path / "reuse")
    reuse = Reuse(upper, examples, tmp_path / "reuse")
    assert read == [0, 1, 2, 2]
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5
    assert len(list((tmp_path / "reuse").glob("trunk-*"))) == 1  # those of lower blocks are gone


def test_changed_weights_of_either_part_are_another_store(tmp_path: Path) -> None:
    directory, examples = saved(tmp_path / "model"), make_examples()
    first = Reuse(adapted(load(directory, "upper")), examples, tmp_path / "reuse")
    again = Reuse(adapted(load(directory, "upper")), examples, tmp_path / "reuse")
    assert again.store.directory == first.store.directory
    changed = adapted(load(directory, "upper"))
    with torch.no_grad():
        find_blocks(changed.get_base_model())[1][4].mlp.up_proj.weight.mul_(1.001)
    other = Reuse(changed, examples, tmp_path / "reuse")
    assert other.store.directory != first.store.directory
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.001)
        model.save_pretrained(directory, max_shard_size="100KB")
    below = Reuse(adapted(load(directory, "upper")), examples, tmp_path / "reuse")
    assert below.store.directory not in (first.store.directory, other.store.directory)


def test_a_classifier_keeps_its_embedding_and_gets_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    base = load_base(
        tmp_path / "model",
        storage="nf4",
        compute_dtype="fp32",
        device="cpu",
        task_type="SEQ_CLS",
        resident="upper",
        first_resident=FIRST,
    )
    assert not base.get_input_embeddings().weight.is_meta
    config = ReftConfig(task_type="SEQ_CLS", rank=2, layers="2;4", positions="all", init="paper")
    model: Any = get_peft_model(base, config)
    examples = [{**example, "labels": i % 2} for i, example in enumerate(make_examples())]
    reuse = Reuse(model.train(), examples, tmp_path / "reuse")
    batch = stacked([{**example, "labels": [0]} for example in examples])
    batch["labels"] = torch.tensor([0, 1, 0, 1])
    assert prove(reuse, [0, 1, 2, 3], batch) <= 1e-5


def test_dequantized_blocks_give_the_same_losses_and_are_put_back(tmp_path: Path) -> None:
    model = adapted(load(saved(tmp_path / "model"), "all", "nf4"))
    reuse = Reuse(model, make_examples(), tmp_path / "reuse")
    before, digest = gradients(model, reuse), base_digest(model)
    with reuse.dequantized() as size:
        assert size == 2 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
        for a, b in zip(before, gradients(model, reuse), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert base_digest(model) == digest


def test_a_saved_embedding_keeps_the_base_whole(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["embed_tokens"])
    config.layers_to_transform = [3, 4]
    shape = AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(InputError, match="resident must be all for a method that changes"):
        find_first_resident(shape, config, task_type="CAUSAL_LM")


def test_adapters_inside_missing_blocks_are_not_thrown_away(tmp_path: Path) -> None:
    base = load(saved(tmp_path / "model"), "upper", "nf4")
    config = ReftConfig(task_type="CAUSAL_LM", layers="1", component="mlp_output", positions="l1")
    get_peft_model(base, config)
    with pytest.raises(InputError, match="no adapter inside blocks that are missing"):
        base.residency.restore()


def test_a_part_of_a_base_is_not_saved_as_a_base(tmp_path: Path) -> None:
    base = load(saved(tmp_path / "model"), "upper", "nf4")
    with pytest.raises(InputError, match=r"call base.residency.restore\(\) first"):
        save_base(base, tmp_path / "saved")
    base.residency.restore()
    save_base(base, tmp_path / "saved")
    again = load(tmp_path / "saved", "all", "nf4")
    assert base_digest(again) == base_digest(base)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_made_up_base_can_be_saved_and_loaded(tmp_path: Path, storage: Any) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage=storage, compute_dtype=torch.float32
    )
    save_base(base, tmp_path / "saved")
    again = load(tmp_path / "saved", "all", storage)
    ids = torch.randint(3, 256, (1, 7))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, base.eval()(ids).logits)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model")
    for wrong in (0, NUM_BLOCKS + 1):
        with pytest.raises(InputError, match="first_resident must be from 1 to 5"):
            load_base(directory, storage="fp32", resident="upper", first_resident=wrong)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="model must have all of its safetensors"):
        load(directory, "upper")


def test_the_text_beside_a_vision_tower_is_read_in_parts_as_it_is_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=SIZES,
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=7,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options: dict[str, Any] = {"storage": "fp32", "compute_dtype": "fp32", "device": "cpu"}
    whole = load_base(tmp_path, **options)
    upper = load_base(tmp_path, **options, resident="upper", first_resident=FIRST)
    assert next(find_blocks(upper)[1][0].parameters()).is_meta
    residency = ours(upper).residency
    assert residency is not None
    residency.restore()
    ids = torch.tensor([[5, 9, 23]])
    with torch.no_grad():
        assert torch.equal(upper(input_ids=ids).logits, whole(input_ids=ids).logits)
