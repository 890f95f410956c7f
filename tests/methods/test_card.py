"""What scoring and generation go by: what is given, else the adapter's card, else the defaults."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard, load_card, merge_card, with_template
from lowmem_reft.options import ModelOptions

TRAINED = TrainingCard(
    base="base",
    storage="fp32",
    compute_dtype="fp32",
    task_type="SEQ_CLS",
    template="Q: {prompt}",
    max_length=64,
    label_names=["bad", "good"],
)


def test_what_is_not_given_is_the_adapters_own() -> None:
    assert merge_card(TRAINED, ModelOptions(model="m"), template=None, max_length=None) == TRAINED


def test_what_is_given_goes_before_the_adapters_own() -> None:
    model = ModelOptions(model="m", storage="nf4", compute_dtype="bf16", task_type="SEQ_CLS")
    card = merge_card(TRAINED, model, template="{prompt}", max_length=8)
    assert (card.storage, card.compute_dtype, card.template, card.max_length) == (
        *("nf4", "bf16", "{prompt}"),
        8,
    )
    assert card.label_names == TRAINED.label_names


def test_without_an_adapter_there_are_defaults() -> None:
    card = merge_card(None, ModelOptions(model="m"), template=None, max_length=None)
    assert card == TrainingCard(base="m", storage="nf4", task_type="CAUSAL_LM", template="")
    assert card.max_length == 512


@pytest.mark.parametrize(
    ("given", "has_one", "decided"),
    [
        ({}, True, "chat"),
        ({}, False, "{prompt}"),
        ({"raw": True}, True, "{prompt}"),
        ({"raw": True, "template": "{prompt}"}, True, "{prompt}"),
        ({"template": "Q: {prompt}"}, True, "Q: {prompt}"),
        ({"template": "chat"}, True, "chat"),
    ],
)
def test_a_model_with_a_chat_template_is_asked_through_it_unless_told_otherwise(
    given: dict, has_one: bool, decided: str
) -> None:
    tokenizer = SimpleNamespace(chat_template="{{ messages }}" if has_one else None)
    given = {"template": None, **given}
    card = merge_card(None, ModelOptions(model="m"), max_length=None, **given)
    assert with_template(card, tokenizer).template == decided
    classifier = ModelOptions(model="m", task_type="SEQ_CLS")
    card = merge_card(None, classifier, template=None, max_length=None)
    assert with_template(card, tokenizer).template == "{prompt}"


def test_an_adapter_keeps_the_way_it_was_trained_in(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    for template in ("chat", "{prompt}", "Q: {prompt}"):
        TrainingCard(base="m", storage="nf4", template=template).save(tmp_path)
        card = merge_card(
            load_card(tmp_path), ModelOptions(model="m"), template=None, max_length=None
        )
        assert with_template(card, tokenizer).template == template
    (tmp_path / "training.json").write_text('{"base": "m", "storage": "nf4"}')
    old = load_card(tmp_path)
    assert old is not None
    assert with_template(old, tokenizer).template == "{prompt}"


def test_a_chat_template_that_there_is_not_and_two_ways_at_once_are_refused() -> None:
    model = ModelOptions(model="m")
    card = merge_card(None, model, template="chat", max_length=None)
    with pytest.raises(InputError, match=r"template must be text with \{prompt\} where the token"):
        with_template(card, SimpleNamespace(chat_template=None))
    with pytest.raises(InputError, match=r"raw must be left out with template, got 'chat'"):
        merge_card(None, model, template="chat", max_length=None, raw=True)


def test_a_task_type_that_contradicts_the_card_is_refused() -> None:
    model = ModelOptions(model="m", task_type="CAUSAL_LM")
    with pytest.raises(InputError, match=r"task_type must be SEQ_CLS.*got 'CAUSAL_LM'; leave it"):
        merge_card(TRAINED, model, template=None, max_length=None)


def test_what_neither_the_user_nor_the_adapter_says_is_a_default() -> None:
    unknown = TrainingCard(base="", storage=None, task_type="")
    for task_type in (None, "SEQ_CLS"):
        model = ModelOptions(model="m", task_type=task_type)
        card = merge_card(unknown, model, template=None, max_length=None)
        assert card == TrainingCard(base="m", storage="nf4", task_type=task_type or "CAUSAL_LM")


def test_a_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in ("[]", "{"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match=r"adapter_config\.json must be a PEFT configuration"):
            load_card(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"base": 5, "storage": "fp32"}',
        '{"base": "a", "storage": 4}',
        '{"base": "a", "storage": null, "template": null}',
        '{"base": "a", "storage": null, "max_length": "512"}',
        '{"base": "a", "storage": null, "max_length": 0}',
        '{"base": "a", "storage": null, "label_names": "good"}',
        '{"base": "a", "storage": null, "label_names": [1]}',
        '{"base": "a", "storage": null, "choices": "good"}',
        '{"base": "a", "storage": null, "choices": [1]}',
        '{"base": "a", "storage": null, "choices": []}',
        '{"base": "a", "storage": null, "choices": [""]}',
        '{"base": "a", "storage": null, "choices": ["a", "a"]}',
        '{"base": "a", "storage": null, "has_end": 1}',
    ],
)
def test_a_card_with_values_that_no_card_has_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(InputError, match=r"training\.json must be a training card"):
        load_card(tmp_path)
