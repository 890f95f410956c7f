"""A conversation in the terminal, and through a pipe."""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_reft import cli
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.runs.chat import _Streamer

if TYPE_CHECKING:
    from collections.abc import Callable

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "base"
    shutil.copytree(tiny_llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters, "one" and "two", trained through the chat template."""
    return save_adapters(tiny_llama_dir, tmp_path_factory.mktemp("adapters"), "chat")


@pytest.fixture(scope="module")
def questioned(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained with a template."""
    return save_adapters(tiny_llama_dir, tmp_path_factory.mktemp("adapters"), "question: {prompt}")


def save_adapters(tiny_llama_dir: Path, directory: Path, template: str) -> Path:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = ReftConfig(task_type="CAUSAL_LM", positions="f1+l2", init="paper")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), config)
        model.save_pretrained(directory / name)
        card = TrainingCard(base="b", storage="fp32", template=template)
        card.save(directory / name)
    return directory


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Run ``chat`` with lines on standard input; both outputs."""

    def run(model: Path, *flags: str, say: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(say))
        command = f"chat --model {model} --device cpu --storage fp32 --max-new-tokens 6"
        capsys.readouterr()  # bars of what the test itself has loaded
        assert cli.main([*command.split(), *flags]) == 0
        out, err = capsys.readouterr()
        return out, err

    return run


def continued(model: Path, adapter: Path | None, text: str, num: int = 6) -> str:
    """What greedy decoding makes of a text, by transformers and PEFT alone."""
    base: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter is not None:
        from peft import PeftModel

        base = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer(text.rstrip(" "), add_special_tokens=False)["input_ids"]])
    out = base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num,
        do_sample=False,
        use_cache=True,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def shown(*answers: str) -> str:
    return "".join(answer + "\n" for answer in answers)


def test_a_pipe_is_answered_line_by_line_with_nothing_but_answers(
    talk: Any, chat_dir: Path
) -> None:
    out, err = talk(chat_dir, say="is it good?\n\nthe lazy dog\n/quit\nnot read\n")
    first = continued(chat_dir, None, "u: is it good?\na:")
    whole = f"u: is it good?\na: {first}\nu: the lazy dog\na:"
    assert out == shown(first, continued(chat_dir, None, whole))
    assert err == ""


def test_adapters_take_turns_and_the_base_answers_beside_them(
    talk: Any, chat_dir: Path, adapters: Path
) -> None:
    given = ["--adapter", f"{adapters}/one,{adapters}/two"]
    say = "a fox\n/base\n/reset\n/adapter two\na fox\n/reset\n/adapter __base__\na fox\n"
    out, err = talk(chat_dir, *given, say=say)
    prompt = "u: a fox\na:"
    names = (adapters / "one", None, adapters / "two", None)
    answers = [continued(chat_dir, name, prompt) for name in names]
    assert out == shown(*answers)
    assert len(set(answers)) == 3
    assert "__base__:" in err
    assert "written" not in err


def test_what_the_base_says_beside_an_adapter_is_not_remembered(
    talk: Any, chat_dir: Path, adapters: Path
) -> None:
    given = ["--adapter", f"{adapters}/one"]
    with_base, _ = talk(chat_dir, *given, say="a fox\n/base\nthe dog\n")
    without, _ = talk(chat_dir, *given, say="a fox\nthe dog\n")
    beside = shown(continued(chat_dir, None, "u: a fox\na:"))
    assert beside in with_base
    assert with_base.replace(beside, "") == without


def test_the_system_message_starts_the_conversation(talk: Any, chat_dir: Path) -> None:
    say = "a fox\n/system be bad\na fox\n/system\na fox\n"
    out, _ = talk(chat_dir, "--system", "be good", say=say)
    starts = ("s: be good\n", "s: be bad\n", "")
    assert out == shown(*(continued(chat_dir, None, f"{start}u: a fox\na:") for start in starts))


def test_without_a_chat_template_messages_are_written_as_in_training(
    talk: Any, tiny_llama_dir: Path, questioned: Path
) -> None:
    given = ["--adapter", f"{questioned}/two"]
    out, err = talk(tiny_llama_dir, *given, say="a fox\n/base\na cat\n")
    asked = [("two", "a fox"), (None, "a fox"), ("two", "a cat")]
    assert out == shown(
        *(
            continued(tiny_llama_dir, name and questioned / name, f"question: {text}")
            for name, text in asked
        )
    )
    assert err.count("written as 'question: {prompt}' and answered on its own") == 1
    assert "__base__, asked as the adapter is: 'question: {prompt}':" in err
    _, err = talk(tiny_llama_dir, *given, say="/adapter __base__\n")
    assert "__base__, asked as the adapter is: 'question: {prompt}'" in err


def test_a_token_that_ends_a_turn_is_not_shown_although_it_is_not_special(
    chat_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = _Streamer(AutoTokenizer.from_pretrained(chat_dir), (), ends=[11])
    for ids in ([11, 11], [20], [11]):
        streamer.put(torch.tensor([ids] if len(ids) > 1 else ids))
    streamer.end()
    assert capsys.readouterr().out == streamer.tokenizer.decode([20]) + "\n"


@pytest.fixture
def unlike(questioned: Path, tmp_path: Path) -> str:
    """Three adapters, of which the last was trained with another template."""
    shutil.copytree(questioned, tmp_path, dirs_exist_ok=True)
    shutil.copytree(questioned / "one", tmp_path / "three")
    TrainingCard(base="b", storage="fp32", template="label: {prompt}").save(tmp_path / "three")
    return ",".join(str(tmp_path / name) for name in ("one", "two", "three"))


def test_how_messages_are_written_is_said_again_where_the_next_adapter_has_another_template(
    talk: Any, tiny_llama_dir: Path, chat_dir: Path, unlike: str
) -> None:
    for model in (tiny_llama_dir, chat_dir):
        _, err = talk(model, "--adapter", unlike, say="/adapter two\n/adapter three\n")
        assert err.count("written as 'question: {prompt}' and") == 1
        assert err.count("written as 'label: {prompt}' and") == 1


def test_an_adapter_that_was_trained_without_the_chat_template_is_asked_so(
    talk: Any, chat_dir: Path, questioned: Path
) -> None:
    one = questioned / "one"
    out, err = talk(chat_dir, "--adapter", str(one), say="a fox\n/base\na cat\n")
    asked = [(one, "a fox"), (None, "a fox"), (one, "a cat")]
    assert out == shown(*(continued(chat_dir, who, f"question: {text}") for who, text in asked))
    assert "as in the training, each message is written as 'question: {prompt}' and" in err
    assert "--template chat" in err
    out, err = talk(chat_dir, "--adapter", str(one), "--template", "chat", say="a fox\n")
    assert (out, err) == (shown(continued(chat_dir, one, "u: a fox\na:")), "")


@pytest.mark.parametrize(
    ("card", "prompt"),
    [
        ({"template": "chat", "method": "loreft"}, "u: a fox\na:"),
        ({"template_digest": "of chats", "method": "loreft"}, "u: a fox\na:"),
        ({"method": "loreft"}, "a fox"),  # trained as they are
        ({}, "u: a fox\na:"),  # by another trainer, which does not say
    ],
)
def test_messages_are_written_as_the_adapters_card_says(
    talk: Any, chat_dir: Path, adapters: Path, tmp_path: Path, card: dict, prompt: str
) -> None:
    one = tmp_path / "one"
    shutil.copytree(adapters / "one", one)
    TrainingCard(**{"base": "b", "storage": "fp32", **card}).save(one)
    out, _ = talk(chat_dir, "--adapter", str(one), "--quiet", say="a fox\n")
    assert out == shown(continued(chat_dir, one, prompt))


def test_raw_messages_are_answered_on_their_own(talk: Any, chat_dir: Path) -> None:
    out, err = talk(chat_dir, "--raw", say="a fox\na cat\n")
    assert out == shown(*(continued(chat_dir, None, text) for text in ("a fox", "a cat")))
    assert err.startswith("each message is written as '{prompt}' and answered on its own")


def test_a_template_can_be_chosen_instead_of_the_chat_template(talk: Any, chat_dir: Path) -> None:
    out, err = talk(chat_dir, "--template", "label: {prompt}", say="a fox\n")
    assert out == shown(continued(chat_dir, None, "label: a fox"))
    assert "written as 'label: {prompt}'" in err


def test_the_oldest_messages_give_way(talk: Any, chat_dir: Path) -> None:
    out, err = talk(chat_dir, "--max-length", "24", say="the lazy dog jumps over\na fox\n")
    assert out.endswith("\n" + shown(continued(chat_dir, None, "u: a fox\na:")))
    assert "the first 2 messages do not fit 24 tokens any more" in err
    say = "the lazy dog jumps over " * 4 + "\n"
    _, err = talk(chat_dir, "--max-length", "16", say=say)
    assert "the message is cut, to 16 tokens with what is around it" in err
    assert talk(chat_dir, "--max-length", "16", "--quiet", say=say)[1] == ""


def test_commands_that_cannot_be_obeyed_say_why(talk: Any, chat_dir: Path, adapters: Path) -> None:
    say = "/base\n/nothing\n/adapter three\n/adapter\n/help\n//help\n"
    out, err = talk(chat_dir, "--adapter", f"{adapters}/one", say=say)
    assert out == shown(continued(chat_dir, adapters / "one", "u: /help\na:"))
    for words in (
        "there is none yet",
        "/nothing is no command; /help lists them",
        "three is not loaded; there are one, __base__",
        "* one\n  __base__",
        "Ctrl-C stops an answer",
    ):
        assert words in err


def test_a_chat_template_that_refuses_a_message_ends_nothing(
    talk: Any, chat_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(chat_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    out, err = talk(tmp_path / "base", "--system", "s", say="a fox\n/system\na fox\n")
    assert "messages must suit the chat template, got no system" in err
    assert out == shown(continued(chat_dir, None, "u: a fox\na:"))


def test_ctrl_c_stops_the_answer_and_not_the_program(
    talk: Any, chat_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = continued(chat_dir, None, "u: a fox\na:")
    put, seen = _Streamer.put, []

    def interrupted(self: Any, value: Any) -> None:
        put(self, value)
        seen.append(value)
        if len(seen) == 4:  # the prompt and three tokens
            raise KeyboardInterrupt

    monkeypatch.setattr(_Streamer, "put", interrupted)
    out, err = talk(chat_dir, say="a fox\nthe dog\n")
    first = continued(chat_dir, None, "u: a fox\na:", num=3)
    assert first != whole
    assert out == shown(first, continued(chat_dir, None, f"u: a fox\na: {first}\nu: the dog\na:"))
    assert "stopped" in err


@pytest.mark.parametrize("stop", ["lazy", "y dog and", "the", "never"])
def test_a_stop_text_is_never_shown(
    stop: str, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "a fox the lazy dog and a cat"
    streamer = _Streamer(tokenizer, [stop])
    streamer.put(torch.tensor([1]))
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    expected = text.partition(stop)[0]
    assert capsys.readouterr().out == expected + "\n"
    assert streamer.visible == expected


def read_until(terminal: int, text: str, timeout_s: float = 60) -> str:
    seen, until = "", time.monotonic() + timeout_s
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, until - time.monotonic()))
        assert ready, f"{text!r} did not come after {seen!r}"
        seen += os.read(terminal, 4096).decode()
    return seen


def test_a_byte_that_is_no_utf_8_does_not_end_a_pipe(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As Python opens standard input where the locale says nothing of an encoding.
    said = io.BytesIO(b"caf\xe9 \xff\n/reset\na fox\n")
    stdin = io.TextIOWrapper(said, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    command = f"chat --model {chat_dir} --device cpu --storage fp32 --max-new-tokens 6"
    assert cli.main(command.split()) == 0
    answers = [continued(chat_dir, None, f"u: {text}\na:") for text in ("caf� �", "a fox")]
    assert capsys.readouterr().out == shown(*answers)


def test_in_a_terminal_there_is_a_prompt_and_ctrl_c_and_ctrl_d_work(
    chat_dir: Path, adapters: Path
) -> None:
    terminal, other_end = pty.openpty()
    command = f"chat --model {chat_dir} --device cpu --storage fp32 --max-new-tokens 6"
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem_reft.cli", *command.split(), "--adapter", adapters / "one"],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )
    os.close(other_end)
    try:
        read_until(terminal, "one> ")
        os.write(terminal, b"a fox\n")
        assert continued(chat_dir, adapters / "one", "u: a fox\na:") in read_until(
            terminal, "\none> "
        ).replace("\r\n", "\n")
        os.write(terminal, b"half a line")
        read_until(terminal, "half a line")
        # Python may miss a signal that comes before it waits for the next key.
        while not select.select([terminal], [], [], 0.5)[0]:
            process.send_signal(signal.SIGINT)
        read_until(terminal, "Ctrl-D or /quit leaves")
        # The terminal drops a key that comes while nobody waits for one.
        until = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < until:
            os.write(terminal, b"\x04")
            time.sleep(0.5)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
