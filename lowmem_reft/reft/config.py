"""``ReftConfig``: everything that determines what a ReFT adapter computes, saved with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Bool, Int
from peft.config import PeftConfig
from torch import Tensor

from lowmem_reft.errors import InputError
from lowmem_reft.options.values import check_choice
from lowmem_reft.reft.interventions import ACTIVATIONS, READS_INPUT, intervention_options
from lowmem_reft.reft.peft_method import NAME, peft_type
from lowmem_reft.reft.positions import (
    EVERY,
    Positions,
    assign_groups,
    num_groups,
    parse_positions,
)

COMPONENTS = ("block_output", "mlp_output", "attention_output")
LAYERS_GRAMMAR = "'all', 0-based indices such as '8;12;16' or [8, 12, 16], or 'upper:0.5'"


@dataclass
class ReftConfig(PeftConfig):
    """Configuration of a ReFT adapter, to be passed to ``peft.get_peft_model``.

    Source: arXiv 2404.03592. Every field is written to ``adapter_config.json``.

    Raises:
        InputError: A field breaks its rule; the message names the field.
    """

    intervention: str = "loreft"
    """Φ: a name in ``lowmem_reft.reft.interventions.INTERVENTIONS``."""
    rank: int = 8
    """Dimension of the edited subspace."""
    layers: str | list[int] = "all"
    """L: "all", 0-based block indices ("8;12;16" or a list), or "upper:F" for the upper share F."""
    positions: str = "all"
    """P: prompt tokens that are edited: "all", "f7+l7", "f3" or "l1"; with "+response" those of the
    answer too; "response" alone, or "every" token."""
    tie: str = "tied"
    """One φ per layer ("tied"), one per side ("sides") or one per position ("positions"); sides are
    the prompt's start, its end and the answer."""
    component: str = "block_output"
    """Hidden vector that is edited: "block_output", "mlp_output" or "attention_output"."""
    act: str | None = None
    """Non-linearity on the learned source: relu, gelu, silu or tanh; default: none."""
    dropout: float = 0.0
    """Dropout on the edit, never on the hidden vector itself."""
    init: str | None = None
    """Start: "identity" (no edit) or "paper" (random); default: identity, or paper with ``act``."""
    alpha: float = 1.0
    """Strength of a steering vector, fixed or learned."""
    modules_to_save: list[str] | None = None
    """Base modules, such as a classification head, that are trained and saved whole."""
    target_modules: str | None = field(default=None, repr=False)
    """Derived from ``layers`` and ``component``: a regular expression over module names."""
    base_storage: str | None = field(default=None, repr=False)
    """How the base was stored in training; noted when the adapter is put on it."""
    base_digest: str | None = field(default=None, repr=False)
    """Of the base's checkpoint, noted likewise; another one is warned of when it is loaded."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft_type(NAME)
        reads = intervention_options(self.intervention)
        if self.init is None:
            self.init = "paper" if self.act else "identity"
        _ = self.num_groups  # which checks positions and tie
        if parse_positions(self.positions) == parse_positions(EVERY):
            self.positions = EVERY  # one word for it, so that adapters can be compared by it
        check_layers(self.layers)
        if not isinstance(self.layers, str):
            self.layers = list(self.layers)  # a range or a tuple would not come back from the file
        check_choice("component", self.component, COMPONENTS)
        if self.component == "block_output" and self.intervention in READS_INPUT:
            raise InputError(
                f"component must be mlp_output or attention_output for {self.intervention}, which "
                "reads what goes into a sub-layer, got 'block_output'; choose one"
            )
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(
                f"rank must be a whole number of at least 1, got {self.rank!r}; for example 4"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout!r}; for example 0.05")
        if self.init not in ("identity", "paper"):
            raise InputError(f"init must be 'identity' or 'paper', got {self.init!r}; choose one")
        if self.act is not None and ("act" not in reads or self.act not in ACTIVATIONS):
            raise InputError(
                f"act must be one of {', '.join(ACTIVATIONS)} and belong to an intervention with a "
                f"learned source, got {self.act!r} for {self.intervention}; leave it out"
            )

    @property
    def where(self) -> Positions:
        """What ``positions`` says; only a causal language model has answers.

        Raises:
            InputError: The grammar is broken, or nothing is left to edit.
        """
        positions = parse_positions(self.positions)
        if self.task_type in (None, "CAUSAL_LM") or not positions.response:
            return positions
        positions = replace(positions, response=False)
        if positions == Positions():
            raise InputError(
                f"positions must edit the prompt with task_type {self.task_type}, which has no "
                f"answers, got {self.positions!r}; for example 'all'"
            )
        return positions

    @property
    def num_groups(self) -> int:
        """How many φ a layer has: 1, one per side, or one per position."""
        return num_groups(self.where, self.tie)

    @property
    def edits_alike(self) -> bool:
        """Whether one φ edits every token, so that it does not matter what is prompt or answer."""
        return self.where.prompt and self.where.response and self.tie == "tied"

    def groups(
        self,
        prompt: Bool[Tensor, "batch seq"],
        segments: Int[Tensor, "batch seq"] | None = None,
        attended: Bool[Tensor, "batch seq"] | None = None,
    ) -> Int[Tensor, "batch seq"]:
        """Return for each token the index of the φ that edits it, or -1; see ``assign_groups``."""
        return assign_groups(self.where, self.tie, prompt, segments, attended)

    def fields(self) -> dict[str, Any]:
        """Return the fields that interventions may read, for ``build_intervention``."""
        return {"rank": self.rank, "act": self.act, "init": self.init, "alpha": self.alpha}


def check_layers(layers: str | Sequence[int]) -> None:
    """Check the grammar of a layer specification without knowing the model.

    Raises:
        InputError: It does not follow the grammar, which the message shows.
    """
    resolve_layers(layers, num_layers=None)


def resolve_layers(layers: str | Sequence[int], num_layers: int | None) -> list[int]:
    """Return the sorted 0-based block indices that ``layers`` names.

    Args:
        layers: "all", "8;12;16", a list of indices, or "upper:F" with 0 < F <= 1 (rounded, at
            least one).
        num_layers: Blocks in the model; None checks the grammar alone.

    Raises:
        InputError: The grammar is broken, or an index is out of range.
    """
    count = num_layers or 1
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str):
        upper = re.fullmatch(r"upper:(0?\.\d+|1(?:\.0*)?)", layers.strip())
        if upper and float(upper[1]) > 0:
            return list(range(count - max(1, round(float(upper[1]) * count)), count))
        parts = [part.strip() for part in layers.split(";")]
        if not all(part.isdecimal() for part in parts):
            raise InputError(
                f"layers must be {LAYERS_GRAMMAR}, got {layers!r}; blocks are counted from 0"
            )
        layers = [int(part) for part in parts]
    given = list(layers) if isinstance(layers, Iterable) else []
    indices = sorted({index for index in given if type(index) is int and index >= 0})
    if not indices or len(indices) != len(given):
        raise InputError(
            f"layers must be {LAYERS_GRAMMAR}, each once, got {layers!r}; blocks are counted from 0"
        )
    if num_layers is not None and indices[-1] >= num_layers:
        raise InputError(
            f"layers must be below {num_layers}, the number of blocks of this model, got "
            f"{indices[-1]}; the last block is {num_layers - 1}"
        )
    return indices
