"""TRL's trainers, and the stock one, take ``ReftConfig`` as it is: positions, precision, reuse."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

import lowmem_reft as lr
from lowmem_reft.base.identity import base_digest
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.data.tokens import Collator
from lowmem_reft.data.turns import split_turns
from lowmem_reft.errors import InputError
from lowmem_reft.memory import MemoryCallback
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reft.selection import Selector
from lowmem_reft.reuse.mixins import PromptMixin, ReuseMixin

trl = pytest.importorskip("trl", minversion="1.16")

pytestmark = [
    # TRL speaks transformers' older names.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' a:' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' u:' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' a:' }}{% endif %}"
)
PAIRS = [
    {"prompt": "is the film good or bad? label:", "completion": " good"},
    {"prompt": "two and two?", "completion": " four. is it?"},
    {"prompt": "the dog", "completion": " is lazy"},
]
PREFERENCES = [
    {"prompt": "is the film good or bad? label:", "chosen": " good", "rejected": " the lazy cat"},
    {"prompt": "two and two?", "chosen": " four.", "rejected": " a"},
]
CHATS = [
    [("user", "is it good?"), ("assistant", "good"), ("user", "and you?"), ("assistant", "bad")],
    [("user", "two and two?"), ("assistant", "four.")],
]
MESSAGES = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
ASKED = [
    "u:is it good? a:",
    "u:is it good? a:good</s> u:and you? a:",
    "u:two and two? a:",
]
ID_OF = {"good": 0, "bad": 1}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep TRL from reporting its use."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Any:
    found = lr.load_tokenizer(tiny_llama_dir)
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture
def base(tiny_llama_dir: Path) -> Any:
    """A 4-bit base, computing in fp32 so that equal means equal."""
    return nf4(tiny_llama_dir)


def nf4(directory: Path, **arguments: Any) -> Any:
    return lr.load_base(directory, storage="nf4", compute_dtype="fp32", device="cpu", **arguments)


def reft(**fields: Any) -> Any:
    defaults = {"task_type": "CAUSAL_LM", "rank": 2, "layers": "1;3", "positions": "f2+l2"}
    return lr.ReftConfig(**{**defaults, **fields})


def arguments_of(kind: Any, directory: Path, **fields: Any) -> Any:
    defaults = {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(**{**defaults, **fields})


def sft(
    base: Any,
    tokenizer: Any,
    directory: Path,
    *,
    rows: list[dict[str, Any]] = PAIRS,
    config: Any = None,
    kind: Any = None,
    more: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    return (kind or trl.SFTTrainer)(
        base,
        args=arguments_of(trl.SFTConfig, directory, **fields),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config or reft(),
        **(more or {}),
    )


def dpo(base: Any, tokenizer: Any, directory: Path, *, config: Any = None, **fields: Any) -> Any:
    return trl.DPOTrainer(
        base,
        args=arguments_of(trl.DPOConfig, directory, **fields),
        train_dataset=Dataset.from_list(PREFERENCES),
        eval_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=config or reft(),
    )


class Records(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def first_gradients(trainer: Any) -> dict[str, Tensor]:
    records = Records()
    trainer.add_callback(records)
    trainer.train()
    assert records.gradients[0]
    return records.gradients[0]


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every forward pass got, and which (row, column) its adapters edited."""
    calls: list[dict[str, Any]] = []
    select = Selector.select

    def record(self: Any, active: Any, args: Any, kwargs: Any, **more: Any) -> Any:
        selection, rest = select(self, active, args, kwargs, **more)
        tokens = [
            (row, column)
            for indices in selection.values()
            for rows, columns in indices
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
        calls.append({**kwargs, "edited": sorted(tokens), "training": more["training"]})
        return selection, rest

    monkeypatch.setattr(Selector, "select", record)
    return calls


def ends(prompt: int, start: int = 0) -> list[int]:
    """Columns that f2+l2 edits of a prompt of at least four tokens."""
    assert prompt >= 4
    return [start, start + 1, start + prompt - 2, start + prompt - 1]


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: Any) -> None:
    assert a
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=name, **{"rtol": 0, "atol": 0, **tolerance})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 15).view(1, 12)
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# Every trainer.


def build(name: str, directory: Path, tokenizer: Any, output: Path, **fields: Any) -> Any:
    torch.manual_seed(0)
    if name == "sft":
        return sft(nf4(directory), tokenizer, output, **fields)
    if name == "dpo":
        return dpo(nf4(directory), tokenizer, output, **fields)
    if name == "reward":
        return trl.RewardTrainer(
            nf4(directory, task_type="SEQ_CLS", num_labels=1),
            args=arguments_of(trl.RewardConfig, output, **fields),
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=tokenizer,
            peft_config=reft(task_type="SEQ_CLS"),
        )
    causal = name == "trainer"
    task: dict[str, Any] = {} if causal else {"task_type": "SEQ_CLS", "num_labels": 2}
    examples = plain_examples(tokenizer, causal=causal)
    return Trainer(
        get_peft_model(
            nf4(directory, **task), reft(**{k: v for k, v in task.items() if k == "task_type"})
        ),
        arguments_of(TrainingArguments, output, **{"remove_unused_columns": False, **fields}),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=Collator(tokenizer),
    )


def plain_examples(tokenizer: Any, *, causal: bool = True) -> Dataset:
    rows = []
    for pair in PAIRS[:2]:
        prompt, response = (tokenizer(pair[key])["input_ids"] for key in ("prompt", "completion"))
        labels = [-100] * len(prompt) + response if causal else len(rows)
        rows.append({"input_ids": prompt + response, "labels": labels})
    return Dataset.from_list(rows)


TRAINERS = ["sft", "dpo", "reward", "trainer", "classifier"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_loss_falls_in_fp32_on_a_4_bit_base_and_the_adapter_reloads(
    name: str, bf16: bool, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    fields = {"bf16": bf16, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    fields["per_device_train_batch_size"] = 4  # all rows in every step
    trainer = build(name, tiny_llama_dir, tokenizer, tmp_path, **fields)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    reft_state = [
        value
        for parameter, state in trainer.optimizer.state.items()
        if any(parameter is p for n, p in trainer.model.named_parameters() if "reft_phi" in n)
        for value in state.values()
    ]
    assert {value.dtype for value in reft_state} == {torch.float32}
    for folder in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        saved = load_file(folder / "adapter_model.safetensors")
        assert {v.dtype for k, v in saved.items() if "reft_phi" in k} == {torch.float32}
    trainer.save_model(str(tmp_path / "adapter"))
    task: dict[str, Any] = {}  # of a head over texts
    if name in ("reward", "classifier"):
        task = {"task_type": "SEQ_CLS", "num_labels": 1 if name == "reward" else 2}
    again = PeftModel.from_pretrained(nf4(tiny_llama_dir, **task), str(tmp_path / "adapter"))
    with torch.autocast("cpu", enabled=bf16):  # accelerate leaves it on the trained model
        assert torch.equal(logits(again).float(), logits(trainer.model))
        with again.disable_adapter():
            assert not torch.equal(logits(again).float(), logits(trainer.model))
    if not task:
        assert base_digest(trainer.model.unload()) == base_digest(nf4(tiny_llama_dir))


# Precision.


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_what_trl_casts_is_fp32_for_whoever_asks(
    name: str, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(name, tiny_llama_dir, tokenizer, tmp_path)
    expected = {n: p.clone() for n, p in trained(trainer.model).items()}
    assert {value.dtype for value in expected.values()} == {torch.float32}
    for cast in (trainer.model.state_dict, trainer.create_optimizer):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        cast()
        assert_same(trained(trainer.model), expected)
    assert {p.dtype for g in trainer.optimizer.param_groups for p in g["params"]} == {torch.float32}


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_an_adapter_saved_before_training_is_the_one_that_was_cast(
    name: str, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(name, tiny_llama_dir, tokenizer, tmp_path)
    trainer.save_model(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    named = {
        n.replace(".default", "").replace(".modules_to_save", ""): p
        for n, p in trained(trainer.model).items()
    }
    assert_same(saved, named)
    assert any(not torch.equal(p, p.bfloat16().float()) for p in named.values())


def test_ddp_reduces_gradients_in_fp32(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build("sft", tiny_llama_dir, tokenizer, tmp_path)
    ids = torch.arange(3, 15).view(1, 12)
    labels = ids.clone()
    labels[:, :6] = -100
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(trainer.model)
        wrapped(input_ids=ids, labels=labels).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    found = take_gradients(trainer.model)
    trainer.model(input_ids=ids, labels=labels).loss.backward()
    assert_same(found, take_gradients(trainer.model))


def take_gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_run_ends_with_bitwise_the_same_adapter(
    name: str, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(name, tiny_llama_dir, tokenizer, tmp_path, **fields)
    whole.train()
    rest = build(name, tiny_llama_dir, tokenizer, tmp_path, **fields)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(rest)) == 4
    assert_same(trained(rest.model), trained(whole.model))


# Positions, counted by hand.


def test_sft_edits_the_ends_of_each_prompt(
    base: Any, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    rows = PAIRS[:2]
    sft(base, tokenizer, tmp_path, rows=rows, max_steps=1).train()
    (call,) = edited
    prompts = {len(tokenizer(row["prompt"])["input_ids"]) for row in rows}
    assert len(prompts) == 2
    expected = []
    for number, labels in enumerate(call["labels"]):
        prompt = int((labels != -100).nonzero()[0])
        assert prompt in prompts
        prompts.remove(prompt)
        expected += [(number, column) for column in ends(prompt)]
    assert call["edited"] == expected


def test_each_answer_of_a_conversation_is_trained_after_its_own_prompt(
    base: Any, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    rows = split_turns([{"messages": chat} for chat in MESSAGES])
    sft(base, tokenizer, tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=3).train()
    (call,) = edited
    prompts = {tokenizer.decode(tokenizer(f" {text}")["input_ids"]) for text in ASKED}
    expected = []
    for number, (ids, labels) in enumerate(zip(call["input_ids"], call["labels"], strict=True)):
        size = int((labels != -100).nonzero()[0])
        prompts.remove(tokenizer.decode(ids[:size]))
        expected += [(number, column) for column in ends(size)]
    assert not prompts
    assert call["edited"] == expected


@pytest.mark.parametrize("positions", ["f2+l2", "all", "f99", "f2", "every", "response"])
def test_conversations_with_several_answers_need_edits_that_are_the_same_for_all(
    base: Any, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]], positions: str
) -> None:
    rows = [{"messages": chat} for chat in MESSAGES]
    config = reft(positions=positions)
    trainer = sft(
        base, tokenizer, tmp_path, rows=rows, config=config, max_steps=1, assistant_only_loss=True
    )
    if positions not in ("f2", "every"):
        with pytest.raises(InputError, match=r"must supervise one answer.*split_turns"):
            trainer.train()
        return
    trainer.train()
    if positions == "f2":
        assert edited[-1]["edited"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    else:
        assert edited[-1]["edited"] == attended(edited[-1])


def attended(call: dict[str, Any]) -> list[tuple[int, int]]:
    return [(row, column) for row, column in call["attention_mask"].nonzero().tolist()]


def test_what_edits_every_token_trains_on_text_and_on_what_is_packed_anyhow(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    text = [{"text": "once upon a time"}, {"text": "there was a little cat."}]
    for fields in (
        {"rows": text},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    ):
        edited.clear()
        config = reft(positions="every")
        sft(nf4(tiny_llama_dir), tokenizer, tmp_path, config=config, max_steps=1, **fields).train()
        (call,) = edited
        mask = torch.ones_like(call["input_ids"])
        assert call["edited"] == attended({"attention_mask": mask, **call})


def test_dpo_edits_every_token_of_each_answer(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    config = reft(positions="every")
    dpo(nf4(tiny_llama_dir), tokenizer, tmp_path, config=config, max_steps=1).train()
    policy, reference = edited
    assert policy["edited"] == attended(policy)
    assert reference["edited"] == []


def test_packed_samples_are_edited_and_trained_like_single_ones(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    single = sft(
        nf4(tiny_llama_dir), tokenizer, tmp_path, max_steps=1, per_device_train_batch_size=3
    )
    expected = first_gradients(single)
    edited.clear()
    packed = sft(nf4(tiny_llama_dir), tokenizer, tmp_path, max_steps=1, packing=True, max_length=64)
    assert len(packed.train_dataset) == 1
    found = first_gradients(packed)
    (call,) = edited
    assert call.get("attention_mask") is None
    assert call["input_ids"].shape[0] == 1
    columns, start = [], 0
    for size in packed.train_dataset[0]["seq_lengths"]:
        labels = call["labels"][0, start : start + size]
        columns += ends(int((labels != -100).nonzero()[0]), start)
        start += size
    assert start == call["input_ids"].shape[1]
    assert call["edited"] == [(0, column) for column in columns]
    assert_same(found, expected, rtol=1e-3, atol=1e-5)


def test_packing_that_hides_where_samples_begin_is_refused(
    base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = sft(
        base, tokenizer, tmp_path, packing=True, packing_strategy="wrapped", max_length=64
    )
    with pytest.raises(InputError, match=r"packed into a row.*'wrapped' does not"):
        trainer.train()


@pytest.mark.parametrize("packing", [False, True])
def test_text_without_a_prompt_is_refused(
    base: Any, tokenizer: Any, tmp_path: Path, packing: bool
) -> None:
    rows = [{"text": "once upon a time"}, {"text": "there was a little cat."}]
    trainer = sft(base, tokenizer, tmp_path, rows=rows, packing=packing, max_length=64)
    with pytest.raises(InputError, match="labels must leave a prompt unsupervised"):
        trainer.train()


def test_a_later_batch_without_a_prompt_is_told(base: Any) -> None:
    model = get_peft_model(base, reft()).train()
    ids = torch.arange(3, 13).view(1, 10)
    labels = ids.clone()
    labels[:, :4] = -100
    model(input_ids=ids, labels=labels)
    with pytest.warns(UserWarning, match="a batch has no prompt"):
        model(input_ids=ids, labels=ids)


def test_dpo_edits_each_sequences_own_prompt_and_the_reference_is_the_base(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    trainer = dpo(nf4(tiny_llama_dir), tokenizer, tmp_path, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    policy, reference = edited
    assert policy["training"]
    assert reference["edited"] == []
    assert torch.equal(policy["input_ids"], batch["input_ids"])
    assert trainer.ref_model is None
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum(1).tolist()
    assert len(prompts) == 4  # two chosen, then two rejected
    assert prompts[:2] == prompts[2:]
    assert policy["edited"] == [
        (row, column) for row, prompt in enumerate(prompts) for column in ends(prompt)
    ]
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    plain = nf4(tiny_llama_dir).eval()
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        scores = plain(**inputs).logits[:, :-1].log_softmax(-1)
    picked = scores.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (picked * batch["completion_mask"][:, 1:]).sum(1)
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not:UserWarning")  # 'reft_' has it
def test_dpo_of_a_trained_adapter_takes_a_copy_of_it_as_reference(
    base: Any, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = get_peft_model(base, reft())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "source.bias" in name:
                parameter.fill_(1.0)
    trainer = trl.DPOTrainer(
        model,
        args=arguments_of(trl.DPOConfig, tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )
    trainer.train()
    start, later = (entry for entry in trainer.state.log_history[:2])
    assert start["rewards/chosen"] == 0  # policy and reference are the same adapter
    assert later["rewards/chosen"] != 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nf4(tiny_llama_dir), str(tmp_path / "ref"), "ref")
    model.set_adapter("ref")
    assert torch.equal(logits(again), logits(model))
    model.set_adapter("default")
    assert not torch.equal(logits(again), logits(model))


def test_a_reward_model_is_edited_at_the_ends_of_the_whole_text_and_its_head_is_saved(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    trainer = build("reward", tiny_llama_dir, tokenizer, tmp_path, max_steps=1)
    head = "base_model.model.score.weight"
    before = trainer.model.state_dict()
    start = next(v.clone() for k, v in before.items() if "score.modules_to_save" in k)
    trainer.train()
    (call,) = edited
    sizes = call["attention_mask"].sum(1).tolist()
    assert len({*sizes}) > 1
    assert call["edited"] == [
        (row, column) for row, size in enumerate(sizes) for column in ends(size)
    ]
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved[head].dtype == torch.float32
    assert not torch.equal(saved[head], start)


# Checkpointing and evaluation inside a training.


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_checkpointing_changes_no_gradient(
    name: str, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    plain, checkpointed = (
        first_gradients(
            build(
                name, tiny_llama_dir, tokenizer, tmp_path, max_steps=1, gradient_checkpointing=way
            )
        )
        for way in (False, True)
    )
    assert_same(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_checkpointing_runs_the_blocks_below_the_first_intervention_once(
    base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    calls = [0] * 4
    for index, block in enumerate(base.model.layers):
        block.mlp.register_forward_pre_hook(partial(_count, calls, index))
    sft(base, tokenizer, tmp_path, config=reft(layers="1;3"), max_steps=1).train()
    # Block 1 is edited at its output, block 3 as well: what comes after an edit runs again.
    assert calls[0] == 1
    assert calls[2:] == [2, 2]


def _count(calls: list[int], index: int, *_: Any) -> None:
    calls[index] += 1


def test_reentrant_checkpointing_is_refused(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    kwargs = {"use_reentrant": True}
    trainer = sft(base, tokenizer, tmp_path, gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(InputError, match="'use_reentrant': False"):
        trainer.train()


@pytest.mark.parametrize("name", ["dpo", "trainer", "classifier"])
def test_evaluations_in_between_change_nothing(
    name: str, tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4}
    expected = build(name, tiny_llama_dir, tokenizer, tmp_path, **fields)
    expected.train()
    evaluated = build(
        name, tiny_llama_dir, tokenizer, tmp_path, eval_strategy="steps", eval_steps=1, **fields
    )
    evaluated.evaluate()
    evaluated.train()
    assert len([e for e in evaluated.state.log_history if "eval_loss" in e]) == 3
    assert_same(trained(evaluated.model), trained(expected.model))


# What callbacks and mixins add.


class ReusingSFT(ReuseMixin, trl.SFTTrainer):
    pass


class ReusingDPO(ReuseMixin, trl.DPOTrainer):
    pass


class ReusingTrainer(ReuseMixin, Trainer):
    pass


class PromptSFT(PromptMixin, trl.SFTTrainer):
    pass


def test_sft_with_the_chunked_loss_before_or_after_has_trls_own_loss_and_gradients(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    plain = sft(nf4(tiny_llama_dir), tokenizer, tmp_path, max_steps=1)
    expected = first_gradients(plain)
    for when in ("before", "after"):
        base = nf4(tiny_llama_dir)
        if when == "before":
            assert use_chunked_loss(base) is not None
        trainer = sft(base, tokenizer, tmp_path, max_steps=1)
        if when == "after":
            assert use_chunked_loss(trainer.model) is not None
        assert_same(first_gradients(trainer), expected)
        assert losses(trainer) == losses(plain)
    ours = get_peft_model(nf4(tiny_llama_dir), reft())
    use_chunked_loss(ours)
    batch = next(iter(plain.get_train_dataloader()))
    ours.load_state_dict({k: v for k, v in plain.model.state_dict().items() if "reft" in k}, False)
    loss = ours.train()(**batch).loss
    with torch.no_grad():
        torch.testing.assert_close(loss, plain.compute_loss(plain.model.train(), dict(batch)))


def test_memory_is_counted_in_sft(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    callback = MemoryCallback()
    trainer = sft(base, tokenizer, tmp_path, more={"callbacks": [callback]})
    trainer.train()
    assert callback.memory is not None
    assert callback.memory.peak.num_bytes > 0


def test_label_smoothing_needs_the_mixin_that_tells_the_prompt(
    tiny_llama_dir: Path, tokenizer: Any, tmp_path: Path, edited: list[dict[str, Any]]
) -> None:
    for kind, packing in ((trl.SFTTrainer, False), (PromptSFT, False), (PromptSFT, True)):
        with pytest.warns(FutureWarning, match="label_smoothing_factor"):
            trainer = sft(
                nf4(tiny_llama_dir),
                tokenizer,
                tmp_path,
                kind=kind,
                max_steps=1,
                label_smoothing_factor=0.1,
                packing=packing,
                max_length=64,
            )
        if kind is trl.SFTTrainer:
            with pytest.raises(InputError, match="PromptMixin"):
                trainer.train()
            continue
        edited.clear()
        trainer.train()
        smoothed, metrics = edited
        assert smoothed.get("labels") is None
        assert smoothed["edited"] == metrics["edited"]
        assert smoothed["edited"]


def reuse_in(directory: Path, mode: Any = "auto") -> dict[str, Any]:
    return {"reuse_options": ReuseOptions(reuse=mode, reuse_dir=directory / "store")}


@pytest.mark.parametrize(
    ("checkpointing", "bf16", "mode"),
    [(True, False, "trunk"), (True, True, "trunk"), (False, False, "prefix")],
)
def test_sft_with_reuse_ends_with_the_same_adapter(
    checkpointing: bool,
    bf16: bool,
    mode: str,
    tiny_llama_dir: Path,
    tokenizer: Any,
    tmp_path: Path,
    edited: list[dict[str, Any]],
) -> None:
    fields: dict[str, Any] = {
        "config": reft(layers="2;3", positions="l2"),
        "gradient_checkpointing": checkpointing,
        "bf16": bf16,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    evaluation = {"eval_dataset": Dataset.from_list(PAIRS)}
    plain = sft(nf4(tiny_llama_dir), tokenizer, tmp_path, more=evaluation, **fields)
    plain.train()
    more = {**evaluation, **reuse_in(tmp_path, mode)}
    base = nf4(tiny_llama_dir)
    trainer = sft(base, tokenizer, tmp_path, kind=ReusingSFT, more=more, **fields)
    trainer.train()
    assert trainer.reuse is not None
    assert trainer.reuse.mode == mode
    tolerance = 1e-2 if bf16 else 1e-4
    assert_same(trained(trainer.model), trained(plain.model), rtol=tolerance, atol=tolerance)
    for key in ("loss", "eval_loss", "mean_token_accuracy"):
        values = [
            [entry[key] for entry in one.state.log_history if key in entry]
            for one in (trainer, plain)
        ]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


def test_the_stock_trainer_with_the_mixin_runs_the_lower_blocks_only_to_store_them(
    base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    calls = [0] * 4
    for index, block in enumerate(base.model.layers):
        block.mlp.register_forward_pre_hook(partial(_count, calls, index))
    trainer = ReusingTrainer(
        get_peft_model(base, reft(layers="2;3")),
        arguments_of(TrainingArguments, tmp_path),
        train_dataset=plain_examples(tokenizer),
        data_collator=Collator(tokenizer),
        **reuse_in(tmp_path, "trunk"),
    )
    started: list[int] = []

    class Start(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            started.extend(calls)

    trainer.add_callback(Start())
    trainer.train()
    assert [after - before for after, before in zip(calls, started, strict=True)] == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("packing", "samples are packed"), ("dpo", "ReusingDPO has no input_ids"), ("layer", "first")],
)
def test_where_nothing_can_be_reused_a_note_says_why(
    name: str, reason: str, base: Any, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    if name == "dpo":
        trainer = ReusingDPO(
            base,
            args=arguments_of(trl.DPOConfig, tmp_path),
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=tokenizer,
            peft_config=reft(),
        )
    else:
        packing = {"packing": True, "max_length": 64} if name == "packing" else {}
        config = lora() if name == "layer" else reft()
        trainer = sft(base, tokenizer, tmp_path, kind=ReusingSFT, config=config, **packing)
    with caplog.at_level(logging.INFO, logger="lowmem_reft"):
        trainer.train()
    notes = [r.message for r in caplog.records if "no frozen computation is reused" in r.message]
    assert len(notes) == 1
    assert reason in notes[0]
    assert len(losses(trainer)) == 2


def lora() -> Any:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
