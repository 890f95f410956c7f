"""Pre-train the tiny Llama that the package ships, from text that every Python carries.

Aim: a real base model, small enough for the repository (3 MB in bf16), on which every method of
this package can be tried on a CPU in seconds. It writes nonsense in the voice of Python's manual.

Text: docstrings, comments, the help topics of ``pydoc`` and the licence of the running Python
(tests and installed packages left out), 1.1 M tokens, no network. Another Python version gives
slightly other text, and so other weights.

Command, from the repository root::

    python recipes/pretrain_tiny.py

Expected: held-out loss 3.73 nats per token; about 10 minutes on one idle CPU core (from the step
rate; the run that made the files shared its core), 2026-11.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NOT_DOCUMENTATION = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is made of.

    The input size of every linear layer is a multiple of NF4's block of 64 weights.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 4
    num_key_value_heads: int = 2
    context: int = 512
    """Longest sequence the configuration promises."""
    block: int = 128
    """Tokens of one training sequence."""
    batch_size: int = 16
    lr: float = 5e-3
    warmup_steps: int = 20
    held_out: float = 0.02
    """Share of the texts that only measures the loss."""


def read_documentation() -> list[str]:
    """Documentation of this Python, without duplicates, in a fixed order."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [topics[name] for name in sorted(topics)]
    texts += [
        path.read_text(encoding="utf-8") for path in [stdlib / "LICENSE.txt"] if path.exists()
    ]
    for path in sorted(stdlib.rglob("*.py")):
        if NOT_DOCUMENTATION & set(path.relative_to(stdlib).parts) or path.name == "topics.py":
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # templates and samples of broken code, not documentation
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = (
            ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)
        )
        texts += [text for text in docstrings if text]
        texts += comment_blocks(source)
    return list(dict.fromkeys(texts))


def comment_blocks(source: str) -> list[str]:
    """Runs of consecutive comment lines of at least three words, without their number signs."""
    blocks: list[list[str]] = [[]]
    for line in map(str.strip, source.splitlines()):
        if line.startswith("#"):
            blocks[-1].append(line.lstrip("#!").strip())
        elif blocks[-1]:
            blocks.append([])
    texts = ("\n".join(block).strip() for block in blocks)
    return [text for text in texts if len(text.split()) > 2]


def train_tokenizer(texts: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text survives a round trip; each text starts with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """One stream of tokens, <s> text </s> <s> text </s> ..."""
    ids = tokenizer([text + "</s>" for text in texts], verbose=False)["input_ids"]
    return torch.tensor([token for text in ids for token in text])


def learning_rate(step: int, num_steps: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    return settings.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor, block: int) -> float:
    """Cross-entropy in nats per token over the whole stream, cut into blocks."""
    blocks = stream[: len(stream) // block * block].view(-1, block)  # (num_blocks, block)
    losses = [
        model(input_ids=chunk, labels=chunk).loss.item() * len(chunk) for chunk in blocks.split(32)
    ]
    return sum(losses) / len(blocks)


def main() -> None:
    """Collect, tokenize, train, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("lowmem_reft/embedded"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    settings = Settings()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    # Text: shuffled, so that the held-out part is a sample of every module.
    texts = read_documentation()
    random.Random(arguments.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts, settings)
    num_held_out = int(len(texts) * settings.held_out)
    held_out, stream = (
        encode(texts[:num_held_out], tokenizer),
        encode(texts[num_held_out:], tokenizer),
    )
    print(f"{len(texts)} texts, {len(stream)} tokens to train on, {len(held_out)} held out")

    # Model.
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    # Muon for the matrices of the blocks learns from about half as many tokens as AdamW alone.
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.dim() < 2)]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=settings.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    # Training: blocks from anywhere in the stream.
    start = time.perf_counter()
    for step in range(arguments.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, arguments.steps, settings)
        offsets = torch.randint(len(stream) - settings.block, (settings.batch_size, 1))
        batch = stream[offsets + torch.arange(settings.block)]  # (batch, block)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(
                f"step {step} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s",
                flush=True,
            )

    # What is shipped: weights in bf16, tokenizer, and the licence of the text.
    folder = arguments.output_dir / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, arguments.output_dir / "LICENSE-PYTHON.txt")
    report = {
        "num_params": num_params,
        "train_tokens": len(stream),
        "held_out_loss": round(mean_loss(model.float(), held_out, settings.block), 4),
        "train_loss": round(mean_loss(model, stream[: len(held_out)], settings.block), 4),
        "wall_s": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
