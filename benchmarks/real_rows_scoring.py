"""Scoring, for ``benchmarks.real_rows``: choices that share their prompt, whole rows, lm-eval."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import get_peft_model
from transformers import AutoTokenizer

from benchmarks.common import say, summarize
from lowmem_reft import ReftConfig, load_base
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.row import Row
from lowmem_reft.data.tasks.registry import load_task
from lowmem_reft.data.tokens import encode_all_choices
from lowmem_reft.methods.choices import choices_log_likelihood
from lowmem_reft.methods.likelihood import each_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED, WHOLE, HFLM_BARE = "prompt shared", "whole rows", "lm-eval HFLM, bare base"
SHARED_BARE = "prompt shared, bare base"
EMOTIONS, ARC = "emotions", "arc"

CHOICES = ("joy", "sadness", "anger", "fear", "love", "surprise")
_BEGINNINGS = ("i feel", "today i was", "it left me", "honestly i am", "right now i am", "she felt")
_STATES = ("so glad", "close to tears", "furious", "really scared", "so fond of him", "stunned")
_REASONS = (
    "because the train was late again and nobody said a word about it",
    "after the phone call from my sister this morning",
    "since they told us what had happened at work",
    "and i cannot stop thinking about how the evening ended",
    "when the results came in the post",
    "although it was only a small thing that nobody else would have seen",
)

Likelihoods = list[list[float]]
"""Of each row the log-likelihood of each choice."""
Encoded = list[list[dict[str, Any]]]
"""Of each row the examples of its choices."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is scored."""

    emotion_rows: int = 64
    """Made-up sentences with six choices."""
    arc_rows: int = 32
    """Questions of ARC-Easy."""
    arc_task: str = "arc-easy-cloze"
    """arc-easy-cloze (the answers' texts are the choices) or arc-easy (their numbers)."""
    scoring_batch: int = 16
    """Sequences per forward pass."""
    fp32_rows: int = 16
    """Rows of each kind whose log-likelihoods are compared on a base in fp32, too."""


def emotion_rows(number: int, seed: int = 0) -> list[Row]:
    """Return made-up sentences of a tweet's length, each with six emotions to choose from."""
    draw = random.Random(seed)
    rows = []
    for index in range(number):
        answer = draw.randrange(len(CHOICES))
        reasons = draw.sample(_REASONS, draw.randint(0, 3))
        text = " ".join([draw.choice(_BEGINNINGS), _STATES[answer], *reasons])
        rows.append(
            Row(
                source=f"emotions:{index + 1}",
                prompt=f"Sentence: {text}\nEmotion:",
                response=CHOICES[answer],
                choices=CHOICES,
                answer=answer,
            )
        )
    return rows


def measure_scoring(
    model: str, data_dir: Path | None, part: Scoring, *, repeats: int
) -> dict[str, dict[str, Any]]:
    """Score both kinds of rows in each way, the ways taking turns; the figures of each kind."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = {
        EMOTIONS: emotion_rows(part.emotion_rows),
        ARC: load_task(part.arc_task, "train", data_dir=data_dir, limit=part.arc_rows),
    }
    kinds = {
        name: [row.examples for row in encode_all_choices(rows, tokenizer)]
        for name, rows in read.items()
    }
    adapted, bare = adapted_base(model, "nf4"), load_base(model, compute_dtype="fp32").eval()
    ways = Ways(adapted, bare, tokenizer, part.scoring_batch)
    found = {name: in_turns(ways, examples, name, repeats) for name, examples in kinds.items()}
    ways = Ways(adapted_base(model, "fp32"), bare, tokenizer, part.scoring_batch)
    for name, examples in kinds.items():
        some = examples[: part.fp32_rows]
        found[name]["fp32"] = differences(ways.shared(some), ways.whole(some))
    return found


def adapted_base(model: str, storage: Any) -> Any:
    """Return the base with LoReFT r8 of random values on all layers and prompt tokens."""
    torch.manual_seed(0)
    config = ReftConfig(task_type="CAUSAL_LM", rank=8, layers="all", positions="all", init="paper")
    return get_peft_model(load_base(model, storage=storage, compute_dtype="fp32"), config).eval()


@dataclass(frozen=True)
class Ways:
    """The ways to score rows: of each row's choices the log-likelihoods."""

    adapted: Any
    bare: Any
    tokenizer: Any
    batch_size: int

    def shared(self, rows: Encoded) -> Likelihoods:
        """Score as ``evaluate``, ``train`` and ``compare`` do: each prompt is read once."""
        return self._shared(self.adapted, rows)

    def shared_bare(self, rows: Encoded) -> Likelihoods:
        """Score the base without adapter so, which is what the harness scores."""
        return self._shared(self.bare, rows)

    def _shared(self, model: Any, rows: Encoded) -> Likelihoods:
        found = choices_log_likelihood(model, rows, self.tokenizer, batch_size=self.batch_size)
        return [[total for total, _ in row] for row in found]

    def whole(self, rows: Encoded) -> Likelihoods:
        """Score prompt and choice in one sequence, for each choice."""
        flat = [example for row in rows for example in row]
        found = each_log_likelihood(self.adapted, flat, self.tokenizer, batch_size=self.batch_size)
        rest = iter(found)
        return [[next(rest)[0] for _ in row] for row in rows]

    def harness(self, rows: Encoded) -> Likelihoods:
        """Score with the harness's own model class, which is given the same tokens."""
        requests = []
        for index, row in enumerate(rows):
            for number, example in enumerate(row):
                start = example["labels"].count(IGNORED_LABEL)
                ids = example["input_ids"]
                requests.append(((f"{index}", f"{number}"), ids[:start], ids[start:]))
        level = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            harness = HFLM(
                pretrained=self.bare,
                backend="causal",
                tokenizer=self.tokenizer,
                batch_size=self.batch_size,
            )
            found = iter(harness._loglikelihood_tokens(requests, disable_tqdm=True))
        finally:
            logging.getLogger("lm_eval").setLevel(level)
        return [[next(found)[0] for _ in row] for row in rows]


def in_turns(ways: Ways, examples: Encoded, name: str, repeats: int) -> dict[str, Any]:
    """Score rows in each way, forwards and backwards in turn; the first rows are a warm-up."""
    methods: dict[str, Callable[[Encoded], Likelihoods]] = {
        SHARED: ways.shared,
        WHOLE: ways.whole,
        SHARED_BARE: ways.shared_bare,
        HFLM_BARE: ways.harness,
    }
    answers: dict[str, Likelihoods] = {}
    wall: dict[str, list[float]] = {label: [] for label in methods}
    cpu: dict[str, list[float]] = {label: [] for label in methods}
    computed: dict[str, int] = {}
    for method in methods.values():
        method(examples[:4])
    for number in range(repeats):
        say(f"scoring {name}, round {number + 1} of {repeats}")
        for label in methods if number % 2 == 0 else reversed(methods):
            with _tokens_read(ways) as count:
                started, started_cpu = time.perf_counter(), time.process_time()
                answers[label] = methods[label](examples)
                wall[label].append(time.perf_counter() - started)
                cpu[label].append(time.process_time() - started_cpu)
            computed[label] = sum(count)
    rows = {
        label: {
            **summarize(wall[label]),
            "cpu_s": statistics.median(cpu[label]),
            "min_cpu_s": min(cpu[label]),
            "max_cpu_s": max(cpu[label]),
            "num_computed_tokens": computed[label],
        }
        for label in methods
    }
    return {
        "num_rows": len(examples),
        "num_choices": sum(map(len, examples)),
        "num_prompt_tokens": sum(row[0]["labels"].count(IGNORED_LABEL) for row in examples),
        "rows": rows,
        "nf4": differences(answers[SHARED], answers[WHOLE]),
        "hflm": differences(answers[SHARED_BARE], answers[HFLM_BARE]),
    }


def differences(ours: Likelihoods, theirs: Likelihoods) -> dict[str, Any]:
    """How far log-likelihoods are apart at most (nats), and how many rows' picks change."""
    pairs = list(zip(ours, theirs, strict=True))
    totals = [both for one, two in pairs for both in zip(one, two, strict=True)]
    return {
        "num_rows": len(pairs),
        "largest_difference": max(abs(a - b) for a, b in totals),
        "largest_relative_difference": max(abs(a - b) / abs(b) for a, b in totals),
        "num_changed_picks": sum(_pick(one) != _pick(two) for one, two in pairs),
    }


def _pick(totals: Sequence[float]) -> int:
    return max(range(len(totals)), key=totals.__getitem__)


@contextmanager
def _tokens_read(ways: Ways) -> Iterator[list[int]]:
    """Collect how many tokens, with padding, each pass of either model reads."""
    counts: list[int] = []
    handles = [
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: counts.append(args[0].numel())
        )
        for model in (ways.adapted, ways.bare)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
