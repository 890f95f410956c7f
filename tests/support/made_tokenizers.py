"""Small tokenizers of each kind, made here: byte-level, Metaspace (SentencePiece), words, slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "Question: was it the good film?\nAnswer: positive",
    "Question: is {x: 1} a set, or not?\nAnswer: negative",
    "<|user|>hello there<|end|>\n<|assistant|>what a day<|end|>\n",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = "Question: {prompt}\\nAnswer:"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def wrapped(
    tokenizer: Tokenizer, *, bos: bool, pad: str = "<pad>", eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def byte_level_tokenizer(*, bos: bool, **special: str) -> PreTrainedTokenizerFast:
    """GPT-2's kind: a space is the start of the next token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, bos=bos, **special)


def metaspace_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Llama 2's kind: text starts with a space of the tokenizer's own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "0123456789"], trainer)
    return wrapped(tokenizer, bos=bos)


def word_level_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, bos=bos)


class SlowTokenizer(PreTrainedTokenizer):
    """One token per character, in Python, so without offsets."""

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: byte_level_tokenizer(bos=False),
    "byte-level, BOS": lambda: byte_level_tokenizer(bos=True),
    "byte-level, BOS, pad == eos": lambda: byte_level_tokenizer(bos=True, pad="</s>"),
    "byte-level, BOS == eos": lambda: byte_level_tokenizer(bos=True, eos="<s>"),
    "metaspace": lambda: metaspace_tokenizer(bos=False),
    "metaspace, BOS": lambda: metaspace_tokenizer(bos=True),
    "words": lambda: word_level_tokenizer(bos=False),
    "words, BOS": lambda: word_level_tokenizer(bos=True),
    "slow": lambda: SlowTokenizer(eos_token="</s>", pad_token="<pad>"),
}


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's other kind: unigrams, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    learned = json.loads(tokenizer.to_str())
    vocab = [*learned["model"]["vocab"], *[[f"<0x{byte:02X}>", -20.0] for byte in range(256)]]
    learned["model"] |= {"vocab": vocab, "byte_fallback": True}
    return wrapped(Tokenizer.from_str(json.dumps(learned)), bos=True)
