"""What several options take: names of formats, optimizers and trackers, and the checks of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lowmem_reft.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What every subcommand takes whose result is figures."""

    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bars, tables or notes."""


Storage = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]

QUANTIZED = ("nf4", "fp4", "int8")
"""Storages whose weights bitsandbytes holds."""

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]

Tie = Literal["tied", "sides", "positions"]

Component = Literal["block_output", "mlp_output", "attention_output"]

Scoring = Literal["auto", "likelihood", "generation"]

Joint = Literal["auto", "space", "none"]

Turns = Literal["last", "all"]

LongRows = Literal["cut", "drop"]

Workers = int | Literal["ray"]

CHAT_TEMPLATE = "chat"
"""The template that stands for the tokenizer's own chat template."""

PyreftClass = Literal[
    "LoreftIntervention",
    "NoreftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
]

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Those of transformers that need no arguments of their own and no evaluation during training."""

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "adafactor",
    "adagrad",
    "sgd",
)
"""Those of transformers that need no package beside torch and bitsandbytes."""

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Those of transformers, with the modules of which each needs one."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        InputError: It is not.
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}; choose one")


def check_tracker(name: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed.

    Raises:
        InputError: It is one of these.
    """
    if name == "none":
        return
    if name not in TRACKERS:
        raise InputError(
            f"report_to must be none, all or names among {', '.join(TRACKERS)}, got {name!r}; "
            "change it"
        )
    modules = TRACKERS[name]
    if modules and not any(map(find_spec, modules)):
        raise InputError(
            f"report_to must name trackers that are installed, got {name!r}; install "
            f"{' or '.join(modules)}, or leave it out"
        )


def check_device(device: str) -> None:
    """Refuse a device that no machine has; whether this one has it is seen when it is used.

    Raises:
        InputError: It is not auto, cpu, cuda or cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}; use auto")


def check_template(template: str | None) -> None:
    """Refuse a template that leaves the prompt out; ``chat`` stands for the tokenizer's own.

    Raises:
        InputError: It does.
    """
    if template not in (None, CHAT_TEMPLATE) and "{prompt}" not in str(template):
        raise InputError(
            f"template must contain {{prompt}}, got {template!r}; write 'Question: {{prompt}}', or "
            "chat for the tokenizer's chat template"
        )


def check_pattern(pattern: str | None) -> None:
    """Refuse what is no regular expression.

    Raises:
        InputError: It is none.
    """
    if pattern is None:
        return
    if not pattern:
        raise InputError("answer_pattern must be a regular expression, got ''; leave it out")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"answer_pattern must be a regular expression, got {pattern!r} ({error}); correct it"
        ) from error


def check_directory(name: str, path: Path | None) -> None:
    """Refuse a path at which there is a file, or that no directory can have.

    Raises:
        InputError: It is one of these.
    """
    try:
        is_file = path is not None and path.exists() and not path.is_dir()
    except OSError as error:  # its name is too long, or it may not be looked at
        raise InputError(
            f"{name} must be a directory, got {str(path)!r} ({error.strerror}); choose another"
        ) from error
    if is_file:
        raise InputError(f"{name} must be a directory, got the file {str(path)!r}; choose another")


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuse a seed that numpy would not take, by the name of its option.

    Raises:
        InputError: It is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"{name} must be from 0 to {2**32 - 1}, got {seed!r}; for example 0")


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers.

    Raises:
        InputError: Something is no number of 32 bits, or is there twice, or there is nothing.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise InputError(
            f"seeds must be different non-negative integers, got {text!r}; write for example 0,1,2"
        )
    seeds = [int(word) for word in words]
    for seed in seeds:
        check_seed(seed, "seeds")
    return seeds
