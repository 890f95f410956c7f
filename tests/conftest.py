"""What all tests share: determinism and one tiny model with a tokenizer."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jinja2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import warm
from lowmem_reft.machine.notices import WARNED
from planned_llama import LLAMA
from shared_nursery import shared_nursery

# A shell starts background jobs with SIGINT ignored, which the processes of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB_SIZE = 128
TEXT = (
    "the quick brown fox jumps over the lazy dog. question: what is two and two? answer: four. "
    "is the film good or bad? label: good. once upon a time there was a little cat."
)


def pytest_configure(config: pytest.Config) -> None:
    """Let through warnings that dependencies draw from each other and nobody here can avoid."""
    for ignored in (
        *(f"ignore:{w.message}:{w.category.__name__}" for w in WARNED),  # which nobody is shown
        "ignore:`torch.jit.script`:DeprecationWarning",  # DeBERTa in older transformers
    ):
        config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_finish() -> None:
    """Have no test walk what the libraries and all tests have made, as no command does.

    ``track`` looks at every object that the collector knows, and each training collects.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let plugins that end now find what refers to what."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _templates_are_compiled_once() -> Iterator[None]:
    """PEFT writes a card into each checkpoint, and compiles the card's template for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", cache(jinja2.Environment.compile))
        yield


@pytest.fixture(autouse=True, scope="session")
def _shared_processes() -> Iterator[None]:
    with shared_nursery():
        yield
    warm.close()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random 4-layer fp32 Llama and its tokenizer; tests only read it."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # at the usual 0.02 so small a model hardly reacts to its input
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """File of eight equal rows with choices."""
    row = {"prompt": "is the film good? label:", "choices": ["good", "bad"], "answer": 1}
    path = tmp_path / "films.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 8)
    return path


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test that loads a base."""

    def load_base(*_: object, **__: object) -> None:
        pytest.fail("the base was loaded")

    monkeypatch.setattr("lowmem_reft.methods.loading.load_base", load_base)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of printable ASCII with <pad>, <s> and </s>; no token is unknown in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=["Ġ", "Ċ", *map(chr, range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A ``config.json`` without weights, of the Llama that tests plan for."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path
