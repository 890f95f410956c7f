r"""Which of two models responds better: win rates by a judge that the user names.

Every pair of responses is shown in both orders, and what the judge says is averaged, so that a
judge who prefers the first place says nothing. A judge is a program that reads questions and writes
its preferences, or a causal language model whose likelihoods of "A" and "B" are compared.

Judges prefer long responses. The length-controlled win rate is the one that responses of equal
length would have, by a logistic regression (Dubois et al., arXiv 2404.04475):

    P(first is better) = σ(θ + φ tanh(Δ / std(Δ))),   length-controlled win rate = σ(θ),

with Δ the first response's length minus the second's, in characters. The paper's third term, how
hard an instruction is, is fitted over many models and left out; θ and φ have a weak normal prior,
so that they are finite where one side wins everything.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit  # type: ignore[import-untyped]

from lowmem_reft.data.rows import Row
from lowmem_reft.data.tasks.converters import refusing, text_of
from lowmem_reft.data.tasks.files import read_json
from lowmem_reft.data.tokens import Collator, encode_choices
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json
from lowmem_reft.machine.progress import progress
from lowmem_reft.options import JudgeOptions

PENALTY = 0.01
"""Inverse variance of the prior of θ and φ."""
NUM_RESAMPLES = 1000
"""Of the bootstrap, over instructions."""

MODEL_TEMPLATE = (
    "Below are an instruction and two responses, A and B. Say which response is better.\n\n"
    "### Instruction:\n{prompt}\n\n### Response A:\n{first}\n\n### Response B:\n{second}\n\n"
    "### Better response:"
)
"""What a language model is asked."""

_Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Two responses to an instruction, in the order in which the judge sees them."""

    prompt: str
    """The instruction."""
    first: str
    """A response."""
    second: str
    """Another one."""


Judge = Callable[[Sequence[Question]], Sequence[float]]
"""Gives for every question how much it prefers the first response: 1 wholly, 0.5 a tie, 0 not."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How often the first model's responses are better; 95 % intervals by the bootstrap."""

    num_examples: int
    """Instructions that both responded to."""
    wins: int
    """Instructions on which the first is preferred in the mean of both orders."""
    ties: int
    """Those on which neither is."""
    losses: int
    """Those on which the second is."""
    win_rate: float
    """Mean preference for the first; a tie counts half."""
    win_rate_interval: tuple[float, float]
    """Its interval."""
    length_controlled_win_rate: float
    """σ(θ): what is left of it at equal lengths."""
    length_controlled_interval: tuple[float, float]
    """Its interval."""
    mean_length_difference: float
    """Mean length of the first's responses minus that of the second's, in characters."""


def run_judge(options: JudgeOptions) -> dict[str, Any]:
    """Judge two files of responses; return the fields of ``Verdict``.

    Raises:
        InputError: As ``judge_files`` says, or there is no such model.
    """
    if options.command is not None:
        judge = command_judge(options.command)
    else:
        judge = model_judge(
            str(options.model),
            storage=options.storage,
            batch_size=options.batch_size,
            quiet=options.quiet,
        )
    return asdict(judge_files(options.first, options.second, judge))


def judge_files(first: str | Path, second: str | Path, judge: Judge) -> Verdict:
    """Compare two files of responses to the same prompts.

    Args:
        first: JSON lines with ``prompt`` (or ``messages``) and ``response``, as ``generate
            --output`` writes, or ``prediction_text`` (else ``prediction``), as ``evaluate
            --predictions`` does.
        second: The same of another model.
        judge: Who decides: ``command_judge`` or ``model_judge``.

    Raises:
        InputError: If a file is wrong, the prompts differ, or the judge's answer cannot be read.
    """
    left, right = _responses(Path(first)), _responses(Path(second))
    if [prompt for prompt, _ in left] != [prompt for prompt, _ in right]:
        raise InputError(
            f"both files must have the same prompts in the same order, got {len(left)} in "
            f"{str(first)!r} and {len(right)} others in {str(second)!r}; respond to the same rows"
        )
    pairs = [
        Question(prompt=prompt, first=ours, second=theirs)
        for (prompt, ours), (_, theirs) in zip(left, right, strict=True)
    ]
    swapped = [replace(pair, first=pair.second, second=pair.first) for pair in pairs]
    said = np.asarray(judge([*pairs, *swapped]), dtype=np.float64)
    preferences = (said[: len(pairs)] + 1 - said[len(pairs) :]) / 2
    lengths = np.array([len(q.first) - len(q.second) for q in pairs], dtype=np.float64)
    return verdict(preferences, lengths)


def verdict(preferences: _Floats, length_differences: _Floats, *, seed: int = 0) -> Verdict:
    """Compute win rates and their intervals.

    Args:
        preferences: For every instruction, that for the first response, 0 to 1.
        length_differences: Length of the first response minus that of the second.
        seed: Draws the resamples.
    """
    generator, size = np.random.default_rng(seed), len(preferences)
    draws = [generator.integers(size, size=size) for _ in range(NUM_RESAMPLES)]
    controlled = [
        length_controlled_win_rate(preferences[draw], length_differences[draw]) for draw in draws
    ]
    return Verdict(
        num_examples=size,
        wins=int((preferences > 0.5).sum()),
        ties=int((preferences == 0.5).sum()),
        losses=int((preferences < 0.5).sum()),
        win_rate=float(preferences.mean()),
        win_rate_interval=_interval([preferences[draw].mean() for draw in draws]),
        length_controlled_win_rate=length_controlled_win_rate(preferences, length_differences),
        length_controlled_interval=_interval(controlled),
        mean_length_difference=float(length_differences.mean()),
    )


def length_controlled_win_rate(preferences: _Floats, length_differences: _Floats) -> float:
    """Return σ(θ) of the regression in the module's description, fitted by Newton's method.

    Preferences between 0 and 1 are soft labels of its cross-entropy.
    """
    spread = length_differences.std()
    scaled = np.tanh(length_differences / spread) if spread else np.zeros(len(preferences))
    features = np.stack([np.ones(len(preferences)), scaled], axis=1)  # (examples, 2)
    weights = np.zeros(2)
    for _ in range(100):
        chances = expit(features @ weights)
        gradient = features.T @ (chances - preferences) + PENALTY * weights
        curvature = (features.T * (chances * (1 - chances))) @ features + PENALTY * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # A whole Newton step may overshoot where the curve is flat.
        weights = weights - step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return float(expit(weights[:1])[0])


def command_judge(command: str) -> Judge:
    """Return a judge that is a program, run once, without a shell.

    It reads JSON lines ``{"prompt": ..., "first": ..., "second": ...}`` and writes a line for each:
    ``{"preferred": "first"}``, "second" or "tie"; or ``{"probability": 0.8}`` that the first one is
    better.

    Raises:
        InputError: If the program cannot be run, fails, or writes something else.
    """

    def judge(questions: Sequence[Question]) -> list[float]:
        asked = "".join(json.dumps(asdict(question)) + "\n" for question in questions)
        try:
            finished = subprocess.run(
                shlex.split(command), input=asked, capture_output=True, text=True, check=True
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"judge must be a command that can be run, got {command!r} ({error}); correct it"
            ) from error
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"judge must exit with 0, got {error.returncode} from {command!r} "
                f"({error.stderr.strip()[-200:]}); correct it"
            ) from error
        lines = [line for line in finished.stdout.splitlines() if line.strip()]
        if len(lines) != len(questions):
            raise InputError(
                f"judge must write a line per question, got {len(lines)} from {command!r} for "
                f"{len(questions)}; correct it"
            )
        return [_preference(line, number) for number, line in enumerate(lines, start=1)]

    return judge


def model_judge(
    model: str | Path,
    *,
    storage: Any = "nf4",
    template: str = MODEL_TEMPLATE,
    max_length: int = 2048,
    batch_size: int = 8,
    quiet: bool = True,
) -> Judge:
    """Return a judge that is a causal language model: the likelihood of "A" against that of "B".

    Args:
        model: Hub id or directory.
        storage: How its weights are stored.
        template: What it is asked; holds ``{prompt}``, ``{first}`` and ``{second}``.
        max_length: Most tokens; longer questions are cut from the left.
        batch_size: Sequences per forward pass.
        quiet: No progress bar.

    Raises:
        InputError: If there is no such model.
    """
    missing = [name for name in ("{prompt}", "{first}", "{second}") if name not in template]
    if missing:
        raise InputError(f"template must contain {missing[0]}, got {template!r}; add it")

    def judge(questions: Sequence[Question]) -> list[float]:
        # A program that judges needs no torch, which takes seconds to import.
        import torch

        # Here, as a judge that is a program needs no torch.
        from lowmem_reft.base.limits import Limits
        from lowmem_reft.base.loading import load_base, load_tokenizer
        from lowmem_reft.methods.likelihood import check_finite, response_log_likelihood

        base, tokenizer = load_base(model, storage=storage), load_tokenizer(model)
        collate, limits = Collator(tokenizer, padding_side="left"), Limits.of(base, tokenizer)
        examples = []
        for number, question in enumerate(questions, start=1):
            text, source = _filled(template, question), f"question {number}"
            row = Row(source=source, prompt=text, choices=("A", "B"), answer=0)
            encoded = encode_choices(row, tokenizer, max_length=max_length).examples
            limits.check([source] * 2, [example["input_ids"] for example in encoded])
            examples += encoded
        sums: list[float] = []
        with torch.no_grad():
            starts = range(0, len(examples), batch_size)
            for start in progress(starts, "judging", quiet=quiet):
                batch = collate(examples[start : start + batch_size])
                sums += response_log_likelihood(base, batch)[0].tolist()
        for index, total in enumerate(sums):
            check_finite([total], f"question {index // 2 + 1}")
        both = np.array(sums, dtype=np.float64).reshape(-1, 2)  # (questions, A and B)
        return list(expit(both[:, 0] - both[:, 1]).tolist())

    return judge


def _filled(template: str, question: Question) -> str:
    # All at once: a response may hold "{second}" itself.
    values = asdict(question)
    return re.sub(r"\{(prompt|first|second)\}", lambda found: values[found[1]], template)


def _responses(path: Path) -> list[tuple[str, str]]:
    """(Prompt, response) of every line; a response may be empty."""
    found = []
    for place, record in read_json(path):
        if isinstance(record, dict) and "messages" in record:
            prompt = _conversation(record["messages"], place)
        else:
            with refusing(record, place, '{"prompt": "...", "response": "..."}'):
                prompt = text_of(record, "prompt")
        names = ("response", "prediction_text", "prediction")
        response = next((record[name] for name in names if name in record), None)
        if not isinstance(response, str):
            raise InputError(
                f"{place}: response must be a text, got {response!r}; generate the responses"
            )
        try:
            response.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which no judge can be shown
            raise InputError(
                f"{place}: response must be valid Unicode, got {error}; generate it again"
            ) from error
        found.append((prompt, response))
    if not found:
        raise InputError(f"responses must be at least one, got none in {str(path)!r}; add them")
    return found


def _conversation(messages: Any, place: str) -> str:
    """What was said before the response, each with its role."""
    try:
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{place}: messages must be a list of role and content, got {messages!r}; mend them"
        ) from error


def _preference(line: str, number: int) -> float:
    try:
        said = parse_json(line)
        if "probability" not in said:
            return {"first": 1.0, "tie": 0.5, "second": 0.0}[said["preferred"]]
        chance = float(said["probability"])
        if 0 <= chance <= 1:
            return chance
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(
        f'judge must write {{"preferred": "first", "second" or "tie"}} or {{"probability": 0 to 1}}'
        f", got {line!r} in line {number}; correct the program"
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
