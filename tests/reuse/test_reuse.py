"""Training from stored constants against the plain step; stores against damage and mix-ups."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import AutoConfig

from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.memory.measure import measure
from lowmem_reft.methods.constant import num_constant_blocks
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reuse.disk import NoRoomError, ReuseError
from lowmem_reft.reuse.layout import Layout, Shape
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.reuse.proof import prove, prove_scores
from lowmem_reft.reuse.reuse import FEW_TOKENS, Reuse
from lowmem_reft.reuse.split import find_constant
from lowmem_reft.reuse.store import CorruptShardError, Record, Store
from tiny_models import (
    ARCHITECTURES,
    GPT2,
    NEOX,
    SIZES,
    lora,
    make_examples,
    make_model,
    reft,
    stacked,
)

ON_THE_SUFFIX = ("l1", "l2", "response", "l1+response")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [*ON_THE_SUFFIX, "f2+l2", "all", "every", "lora"])
def test_losses_and_gradients_are_those_of_the_plain_step(
    tmp_path: Path, architecture: str, method: str
) -> None:
    model = make_model(
        architecture, peft_config=lora([2, 3, 4]) if method == "lora" else reft(method)
    )
    examples = make_examples()
    reuse = Reuse(model, examples, tmp_path)
    suffix_only = method in ON_THE_SUFFIX and architecture != "gemma2"
    assert reuse.mode == ("prefix" if suffix_only else "trunk")
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5
    assert prove(reuse, [3, 1], stacked([examples[3], examples[1]])) <= 1e-5


def test_tokens_after_the_last_target_do_not_run(tmp_path: Path) -> None:
    model, examples = make_model(peft_config=reft("l1")), make_examples()
    for example in examples:  # as a chat template ends a turn
        example["input_ids"] += [5, 6, 7]
        example["labels"] += [-100] * 3
    reuse = Reuse(model, examples, tmp_path)
    last = model.get_base_model().model.layers[-1]
    widths: list[int] = []
    last.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5
    assert prove(reuse, [0], stacked(examples[:1])) <= 1e-5
    answers = [len([label for label in e["labels"] if label != -100]) for e in examples]
    assert widths[1::2] == [max(answers), answers[0]]


def test_a_model_that_keeps_its_own_loss_gets_as_many_tokens_as_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage="fp32", compute_dtype=torch.float32
    )
    model: Any = get_peft_model(base, reft("l1")).train()
    examples = make_examples()
    assert prove(Reuse(model, examples, tmp_path), [0, 1], stacked(examples[:2])) <= 1e-5


@pytest.mark.parametrize("prompt", [24, 400])
def test_upper_blocks_may_stay_dequantized_where_that_takes_less_than_a_plain_step(
    tmp_path: Path, prompt: int
) -> None:
    model = make_model(storage="nf4", peft_config=reft("l1", layers="2"))
    ids = torch.randint(3, 256, (prompt + 4,)).tolist()
    examples = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}]
    reuse, batch = Reuse(model, examples, tmp_path), stacked(examples)
    assert not reuse.may_stay_dequantized(1)  # before the two were compared
    error = prove(reuse, [0], batch)
    assert reuse.may_stay_dequantized(1) == (prompt == 400)
    assert not reuse.may_stay_dequantized(FEW_TOKENS)  # dequantizing would be a small share

    def peak(loss: Any) -> int:
        run = lambda: torch.autograd.backward(loss())  # noqa: E731
        run()
        model.zero_grad()
        return measure(torch.device("cpu"), run).allocated_bytes

    plain = peak(lambda: model(**batch)["loss"])
    with reuse.dequantized() as num_bytes:
        assert prove(reuse, [0], batch) <= max(1e-5, error)
        reused = peak(lambda: reuse.loss([0])) + num_bytes
    if prompt == 400:
        assert reused <= plain


def test_blocks_that_are_not_quantized_have_nothing_to_dequantize(tmp_path: Path) -> None:
    examples = make_examples()
    reuse = Reuse(make_model(), examples, tmp_path)
    prove(reuse, [0, 1], stacked(examples[:2]))
    assert not reuse.may_stay_dequantized(1)


def test_all_but_the_answer_is_constant_where_nothing_else_is_edited() -> None:
    examples = make_examples()
    before = [example["labels"].count(-100) - 1 for example in examples]  # the last token predicts
    for positions in ("response", "l1+response"):
        constant = find_constant(make_model(peft_config=reft(positions)), examples, prefix=True)
        assert constant.first_edited == before
    for positions in ("every", "f1+response"):
        constant = find_constant(make_model(peft_config=reft(positions)), examples, prefix=True)
        assert constant.first_edited == [0] * len(examples)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS = {
    "bert": {**NEOX, **NO_DROPOUT},
    "roberta": {**NEOX, **NO_DROPOUT},
    "modernbert": {**NEOX, "cls_token_id": 1, "sep_token_id": 2, "reference_compile": False},
}


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_encoders_start_from_their_trunk(
    tmp_path: Path, architecture: str, task_type: str, storage: Any
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ENCODERS[architecture])
    base: Any = base_with_random_weights(
        config,
        device=torch.device("cpu"),
        storage=storage,
        compute_dtype=torch.float32,
        task_type=task_type,
        num_labels=3,
    )
    peft_config = ReftConfig(
        task_type=task_type, rank=2, layers="2;4", positions="f2", init="paper"
    )
    model: Any = get_peft_model(base, peft_config).train()
    examples = make_examples()
    for number, example in enumerate(examples):
        labels = [token % 3 for token in example["input_ids"]]
        example["labels"] = number % 3 if task_type == "SEQ_CLS" else labels
    whole = task_type == "SEQ_CLS"
    batch = stacked([{**e, "labels": [0]} if whole else e for e in examples])
    if whole:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    reuse = Reuse(model, examples, tmp_path)
    assert reuse.mode == "trunk"
    assert prove(reuse, [0, 1, 2, 3], batch) <= 1e-5


def test_blocks_that_return_more_than_hidden_vectors_train_the_plain_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("deberta-v2", **NEOX, **NO_DROPOUT, relative_attention=True)
    base: Any = base_with_random_weights(
        config,
        device=torch.device("cpu"),
        storage="fp32",
        compute_dtype=torch.float32,
        task_type="TOKEN_CLS",
        num_labels=3,
    )
    peft_config = ReftConfig(task_type="TOKEN_CLS", rank=2, layers="4", positions="all")
    model: Any = get_peft_model(base, peft_config).train()
    examples = make_examples()
    for example in examples:
        example["labels"] = [token % 3 for token in example["input_ids"]]
    options = ReuseOptions(reuse="trunk")
    found = prepare(model, examples, stacked, options, root=tmp_path, batch_size=4, epochs=3)
    assert found is None
    assert "DebertaV2ForTokenClassification cannot be fed stored hidden vectors" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_batch_padded_on_the_left_gives_the_same_gradients(
    tmp_path: Path, architecture: str
) -> None:
    model, examples = make_model(architecture), make_examples()
    right = stacked(examples)
    left = {name: torch.zeros_like(value) for name, value in right.items()}
    left["labels"] += -100
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        for name in right:
            left[name][row, -size:] = right[name][row, :size]
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert prove(Reuse(model, examples, tmp_path), [0, 1, 2, 3], left) <= 1e-5


def test_examples_that_begin_alike_share_what_is_stored(tmp_path: Path) -> None:
    examples = make_examples()
    system = list(range(10, 40))
    for example in examples:
        example["input_ids"] = system + example["input_ids"]
        example["labels"] = [-100] * len(system) + example["labels"]
    examples.append(dict(examples[0]))
    for method in ("l1", "all"):
        model = make_model(peft_config=reft(method))
        reuse = Reuse(model, examples, tmp_path)
        apart = sum(
            reuse.layout.hidden_bytes * shape.suffix + reuse.layout.kv_bytes * shape.prefix
            for shape in reuse.layout.shapes
        )
        saved = (reuse.layout.kv_bytes if method == "l1" else reuse.layout.hidden_bytes) * 30 * 3
        assert reuse.layout.total_bytes <= apart - saved
        written = sum(path.stat().st_size for path in reuse.store.directory.glob("shard-*"))
        assert written == reuse.layout.total_bytes
        assert prove(reuse, [0, 1, 2, 3, 4], stacked(examples)) <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["l1", "all", "l1+response", "every", "lora"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_scores_are_those_of_the_plain_pass(tmp_path: Path, architecture: str, method: str) -> None:
    model = make_model(
        architecture, peft_config=lora([2, 3, 4]) if method == "lora" else reft(method)
    )
    model.requires_grad_(False).eval()  # as PeftModel.from_pretrained loads it
    examples = make_examples()
    reuse = Reuse(model, examples, tmp_path, training=False)
    assert reuse.constant.num_blocks == (2 if method == "lora" else 3)
    assert prove_scores(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5
    plain, counts = response_log_likelihood(model, stacked(examples))
    scores, again = reuse.log_likelihood([0, 1, 2, 3])
    torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)
    assert counts == again


@pytest.mark.parametrize(
    ("storage", "dtype", "tolerance"),
    [
        ("nf4", torch.float32, 1e-5),
        ("int8", torch.float32, 1e-5),
        ("nf4", torch.bfloat16, 5e-2),
    ],
)
def test_quantized_bases_give_the_plain_gradients_also_after_an_evaluation(
    tmp_path: Path, storage: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, examples = make_model(storage=storage, dtype=dtype), make_examples()
    batch = stacked(examples)
    model.eval()
    with torch.no_grad():
        model(**{key: value for key, value in batch.items() if key != "labels"})
    model.train()
    assert prove(Reuse(model, examples, tmp_path), [0, 1, 2, 3], batch) <= tolerance


def test_accumulated_batches_divide_by_all_supervised_tokens(tmp_path: Path) -> None:
    model, examples = make_model(), make_examples()
    reuse = Reuse(model, examples, tmp_path)
    whole = reuse.loss([0, 1, 2, 3], torch.tensor(9))
    parts = [reuse.loss(part, torch.tensor(9)) for part in ([0, 1], [2, 3])]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recompute", [False, True])
def test_an_edit_of_the_last_block_alone_leaves_the_head_to_run(
    tmp_path: Path, architecture: str, recompute: bool
) -> None:
    model, examples = make_model(architecture, peft_config=reft("l1", "4")), make_examples()
    reuse = Reuse(model, examples, tmp_path, recompute=recompute)
    assert reuse.constant.num_blocks == 5
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", ["l1", "l2"])
def test_prefixes_can_be_recomputed_where_there_is_no_room_for_keys_and_values(
    tmp_path: Path, architecture: str, method: str
) -> None:
    model, examples = make_model(architecture, peft_config=reft(method)), make_examples()
    stored = Reuse(model, examples, tmp_path / "stored")
    reuse = Reuse(model, examples, tmp_path / "recomputed", recompute=True)
    assert reuse.mode == "prefix"
    trunk = Reuse(model, examples, tmp_path / "trunk", prefix=False)
    assert reuse.layout.total_bytes == trunk.layout.total_bytes
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5
    assert prove(reuse, [3, 1], stacked([examples[3], examples[1]])) <= 1e-5
    model.eval()
    for wanted, found in zip(
        stored.log_likelihood([0, 3]), reuse.log_likelihood([0, 3]), strict=True
    ):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted))


def test_a_limit_that_only_hidden_vectors_fit_recomputes_prefixes(tmp_path: Path) -> None:
    model, examples = make_model(peft_config=reft("l1", "1;4")), make_examples()
    for example in examples:
        example["input_ids"] = [9] * 100 + example["input_ids"]
        example["labels"] = [-100] * 100 + example["labels"]
        example["input_ids"][0] = 10 + example["labels"][-1] % 7  # nothing in common
    tokens = sum(len(example["input_ids"]) for example in examples)
    options = ReuseOptions(reuse_limit_gib=(tokens * 64 * 4 + 1) / 2**30)
    found = prepare(model, examples, stacked, options, root=tmp_path, batch_size=4, epochs=3)
    assert found is not None
    assert found.recompute
    assert found.mode == "prefix"


def test_batches_that_were_read_ahead_give_the_same_loss(tmp_path: Path) -> None:
    reuse = Reuse(make_model(), make_examples(), tmp_path)
    wanted = reuse.loss([0, 2]).item()
    for number in range(20):  # most are never asked for
        reuse.announce([number % 4, 1])
    reuse.announce([0, 2])
    assert reuse.loss([0, 2]).item() == wanted
    assert reuse.loss([0, 2]).item() == wanted  # it was taken, so it is read again


def test_a_damaged_shard_is_built_again_by_the_thread_that_trains(tmp_path: Path) -> None:
    model, examples = make_model(), make_examples()
    wanted = Reuse(model, examples, tmp_path).loss([0, 2]).item()
    again = Reuse(model, examples, tmp_path)
    shard = next(again.store.directory.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    again.announce([0, 2])
    assert again.loss([0, 2]).item() == wanted


def test_three_epochs_end_in_the_same_adapter(tmp_path: Path) -> None:
    examples = make_examples(8)
    finals = []
    for reused in (False, True):
        model = make_model()
        reuse = Reuse(model, examples, tmp_path) if reused else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(6):
            part = [(4 * step + i) % 8 for i in range(4)]
            batch = stacked([examples[i] for i in part])
            loss = reuse.loss(part) if reuse else model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        finals.append(torch.cat(trained))
    assert (finals[0] - finals[1]).norm() <= 1e-4 * finals[0].norm()


def test_constant_blocks_end_where_training_begins() -> None:
    assert num_constant_blocks(make_model(peft_config=reft("l1", layers="2;4"))) == 3
    assert num_constant_blocks(make_model(peft_config=reft("l1", layers="0"))) == 1
    assert num_constant_blocks(make_model(peft_config=lora([2, 4]))) == 2
    assert num_constant_blocks(make_model(peft_config=lora([0, 1, 2, 3, 4]))) == 0
    inside = ReftConfig(task_type="CAUSAL_LM", layers="2", positions="l1", component="mlp_output")
    assert num_constant_blocks(make_model(peft_config=inside)) == 2


def test_nothing_is_reused_where_nothing_is_constant(tmp_path: Path) -> None:
    examples = make_examples()
    with pytest.raises(ReuseError, match="the first block or the embedding is trained"):
        find_constant(make_model(peft_config=lora([0, 1])), examples, prefix=True)
    model = make_model()
    model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ReuseError, match="drops out activations"):
        Reuse(model, examples, tmp_path)


def test_checkpointed_blocks_read_no_cache_so_only_the_trunk_is_reused(tmp_path: Path) -> None:
    model, examples = make_model(), make_examples()
    enable_activation_checkpointing(model)
    reuse = Reuse(model, examples, tmp_path)
    assert reuse.mode == "trunk"
    assert prove(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5


def test_a_wrong_constant_is_found_by_the_proof_and_trains_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, examples = make_model(), make_examples()
    original = Reuse._compute

    def wrong(self: Reuse, *args: Any) -> list[Record]:
        return [
            Record(record.hidden * 1.1, record.keys, record.values)
            for record in original(self, *args)
        ]

    monkeypatch.setattr(Reuse, "_compute", wrong)
    options = ReuseOptions(reuse="prefix")
    found = prepare(model, examples, stacked, options, root=tmp_path, batch_size=4, epochs=3)
    assert found is None
    assert "gradients differ" in caplog.text
    assert "reft_phi" in caplog.text


def test_a_prefix_that_becomes_a_trunk_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, examples = make_model(peft_config=reft("all")), make_examples()
    options = ReuseOptions(reuse="prefix")
    found = prepare(model, examples, stacked, options, root=tmp_path, batch_size=4, epochs=3)
    assert found is not None
    assert found.mode == "trunk"
    assert "no keys and values are reused" in caplog.text


def test_auto_does_not_reuse_what_saves_little(tmp_path: Path) -> None:
    examples = make_examples()
    options = ReuseOptions()
    every = make_model(peft_config=reft("all", layers="all"))
    assert prepare(every, examples, stacked, options, root=tmp_path, batch_size=4, epochs=1) is None
    found = prepare(make_model(), examples, stacked, options, root=tmp_path, batch_size=4, epochs=3)
    assert found is not None


def test_a_second_run_builds_nothing_and_other_data_or_weights_build_anew(tmp_path: Path) -> None:
    examples = make_examples()
    first = Reuse(make_model(), examples, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in first.store.directory.glob("shard-*")}
    second = Reuse(make_model(), examples, tmp_path)
    assert second.store.directory == first.store.directory
    assert stamps == {p: p.stat().st_mtime_ns for p in second.store.directory.glob("shard-*")}
    edited = [dict(example) for example in examples]
    edited[0] = {**edited[0], "input_ids": [5, *edited[0]["input_ids"][1:]]}
    assert Reuse(make_model(), edited, tmp_path).store.directory != first.store.directory
    other = make_model()
    with torch.no_grad():
        other.get_base_model().model.layers[0].mlp.up_proj.weight.add_(1)
    assert Reuse(other, examples, tmp_path).store.directory != first.store.directory
    trained = make_model()  # another adapter on the same base shares the store
    with torch.no_grad():
        next(p for p in trained.parameters() if p.requires_grad).add_(1)
    assert Reuse(trained, examples, tmp_path).store.directory == first.store.directory


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_trained_norms_are_no_part_of_the_base(tmp_path: Path) -> None:
    norms = r".*layers\.[34]\.(input|post_attention)_layernorm"
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
    model, examples = make_model(peft_config=config), make_examples()
    key = Reuse(model, examples, tmp_path).store.key
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert Reuse(model, examples, tmp_path).store.key == key


def test_a_flipped_byte_is_found_and_built_again(tmp_path: Path) -> None:
    model, examples = make_model(), make_examples()
    reuse = Reuse(model, examples, tmp_path)
    good = reuse.read(0).hidden.clone()
    shard = next(reuse.store.directory.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    again = Reuse(model, examples, tmp_path)
    with pytest.raises(CorruptShardError, match="damaged"):
        again.store.read(0)
    assert torch.equal(again.read(0).hidden, good)
    assert torch.equal(Reuse(model, examples, tmp_path).store.read(0).hidden, good)


def small_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("lowmem_reft.reuse.layout.SHARD_BYTES", 300)
    layout = Layout(
        shapes=[Shape(2, 3), Shape(0, 4), Shape(5, 1)],
        hidden_size=8,
        num_cached_layers=2,
        num_kv_heads=1,
        head_dim=4,
        dtype="bf16",
    )
    return Store(root, "key", layout, {"made": "by hand"})


def record_of(store: Store, index: int) -> Record:
    generator = torch.Generator().manual_seed(index)
    shape = store.layout.shapes[index]
    kv = (2, 1, shape.prefix, 4)
    return Record(
        *(torch.randn(size, generator=generator).bfloat16() for size in ((shape.suffix, 8), kv, kv))
    )


def test_a_killed_build_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path, monkeypatch)
    with store.locked():
        assert store.missing_shards() == [0, 1]
        store.write(0, [record_of(store, index) for index in store.layout.shards[0]])
    again = small_store(tmp_path, monkeypatch)
    with again.locked():
        assert again.missing_shards() == [1]
        again.write(1, [record_of(again, index) for index in again.layout.shards[1]])
    for index in range(3):
        found, wanted = again.read(index), record_of(again, index)
        assert torch.equal(found.hidden, wanted.hidden)
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)


def test_a_truncated_shard_or_manifest_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path, monkeypatch)
    with store.locked():
        for shard, examples in enumerate(store.layout.shards):
            store.write(shard, [record_of(store, index) for index in examples])
    path = store.directory / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with store.locked():
        assert store.missing_shards() == [0]
    (store.directory / "manifest.json").write_text('{"shards": {"0"')
    with store.locked():
        assert store.missing_shards() == [0, 1]


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match="more than the limit"):
        Reuse(make_model(), make_examples(), tmp_path, limit_bytes=1000)
    assert not list(tmp_path.rglob("shard-*"))


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 2**28 + 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(NoRoomError, match="the disk has"):
        Reuse(make_model(), make_examples(), tmp_path)
    assert not list(tmp_path.rglob("shard-*"))


def _hold(root: Path, ready: Any, release: Any) -> None:
    layout = Layout(
        shapes=[Shape(0, 1)],
        hidden_size=1,
        num_cached_layers=0,
        num_kv_heads=1,
        head_dim=1,
        dtype="fp32",
    )
    with Store(root, "key", layout, {}).locked():
        ready.set()
        release.wait(20)


def test_two_processes_do_not_build_the_same_store_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    try:
        assert ready.wait(60)
        with (tmp_path / "trunk-key" / "lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        release.set()
        process.join()


def test_the_manifest_says_what_a_store_was_made_from(tmp_path: Path) -> None:
    reuse = Reuse(make_model(), make_examples(), tmp_path)
    manifest = json.loads((reuse.store.directory / "manifest.json").read_text())
    assert manifest["num_blocks"] == 3
    assert manifest["architecture"] == "LlamaForCausalLM"


def example_of(prompt: int, response: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 256, (prompt + response,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("indices", [[0, 1], [0, 2], [2, 3], [2]])
def test_prompts_without_a_prefix_come_out_right_beside_others_and_alone(
    tmp_path: Path, recompute: bool, indices: list[int]
) -> None:
    model = make_model(peft_config=reft("l4"))
    examples = [example_of(*sizes) for sizes in ((20, 3, 1), (15, 3, 2), (3, 2, 3), (2, 4, 4))]
    batch = stacked([examples[index] for index in indices])
    reuse = Reuse(model, examples, tmp_path, recompute=recompute)
    assert prove(reuse, indices, batch) <= 1e-5
    model.eval()
    scoring = Reuse(model, examples, tmp_path, recompute=recompute, training=False)
    assert prove_scores(scoring, indices, batch) <= 1e-5


def test_positions_of_padding_stay_inside_the_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **{**GPT2, "n_positions": 40})
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage="fp32", compute_dtype=torch.float32
    )
    model: Any = get_peft_model(base, reft("l1"))
    use_chunked_loss(model)
    examples = [example_of(36, 3, 1), example_of(2, 30, 2)]
    assert prove(Reuse(model.train(), examples, tmp_path), [0, 1], stacked(examples)) <= 1e-5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_embedding_that_an_adapter_changes_is_not_constant() -> None:
    tied = {**SIZES, "tie_word_embeddings": True}
    for changes, options in (
        (tied, {"trainable_token_indices": [2]}),
        (tied, {"modules_to_save": ["embed_tokens"], "inference_mode": True}),
        (SIZES, {"modules_to_save": ["embed_tokens"], "inference_mode": True}),
    ):
        torch.manual_seed(0)
        base: Any = base_with_random_weights(
            AutoConfig.for_model("llama", **changes),
            device=torch.device("cpu"),
            storage="fp32",
            compute_dtype=torch.float32,
        )
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
        config.layers_to_transform = [3, 4]
        assert num_constant_blocks(get_peft_model(base, config)) == 0


def test_edits_without_parameters_count(tmp_path: Path) -> None:
    config = ReftConfig(
        task_type="CAUSAL_LM", intervention="fixed_steering", layers="2", positions="l1"
    )
    model = make_model(peft_config=config).eval()
    for name, buffer in model.named_buffers():
        if "vector" in name:
            buffer.add_(torch.randn_like(buffer))
    assert num_constant_blocks(model) == 3
    examples = make_examples()
    reuse = Reuse(model, examples, tmp_path, training=False)
    assert prove_scores(reuse, [0, 1, 2, 3], stacked(examples)) <= 1e-5


def test_blocks_that_return_tuples_train_the_plain_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 64, "n_layer": 5, "n_head": 4}
    base: Any = base_with_random_weights(
        AutoConfig.for_model("bloom", **shape),
        device=torch.device("cpu"),
        storage="fp32",
        compute_dtype=torch.float32,
    )
    model: Any = get_peft_model(base, reft("l1")).train()
    examples, options = make_examples(), ReuseOptions(reuse="prefix")
    found = prepare(model, examples, stacked, options, root=tmp_path, batch_size=4, epochs=3)
    assert found is None
    assert "BloomForCausalLM cannot be fed" in caplog.text


def test_lengths_that_change_constants_are_refused() -> None:
    examples = [example_of(30, 3, 1)]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model()
    text = model.get_base_model().config
    text.rope_parameters, text.max_position_embeddings = rope, 32
    with pytest.raises(ReuseError, match="dynamic rotary scaling"):
        find_constant(model, examples, prefix=True)
    find_constant(model, [example_of(20, 3, 1)], prefix=True)


def test_a_window_shorter_than_the_examples_keeps_no_prefix(tmp_path: Path) -> None:
    model, examples = make_model(), [example_of(30, 3, 1), example_of(9, 2, 2)]
    model.get_base_model().config.sliding_window = 16
    assert not any(find_constant(model, examples, prefix=True).first_edited)


def test_what_was_frozen_stays_frozen_after_a_build(tmp_path: Path) -> None:
    model, examples = make_model(), make_examples()
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    Reuse(model, examples, tmp_path)
    assert [p.requires_grad for p in model.parameters()] == before


def test_few_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_reft.reuse.store.MOST_OPEN", 1)
    store = small_store(tmp_path, monkeypatch)
    with store.locked():
        for shard, examples in enumerate(store.layout.shards):
            store.write(shard, [record_of(store, index) for index in examples])
    kept = [store.read(index) for index in (0, 1, 2, 0)]
    assert len(store._maps) == 1
    assert torch.equal(kept[0].hidden, record_of(store, 0).hidden)
    assert torch.equal(kept[3].keys, record_of(store, 0).keys)


def test_constants_of_another_size_than_planned_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path, monkeypatch)
    records = [record_of(store, index) for index in store.layout.shards[0]]
    wrong = Record(records[0].hidden[:-1], records[0].keys, records[0].values)
    with store.locked(), pytest.raises(ValueError, match="constants have sizes"):
        store.write(0, [wrong, *records[1:]])
    assert not list(store.directory.glob("shard-*"))
