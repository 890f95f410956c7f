"""Does it fit, and if not, what would? Predicted peaks against the memory of a card."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lowmem_reft.base.hub import ClosedError, load_config
from lowmem_reft.base.stored import in_one_line
from lowmem_reft.base.trust import check_config
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json
from lowmem_reft.memory.cards import CONTEXT_BYTES, FRAGMENTATION, find_gpu
from lowmem_reft.memory.kernels import num_quantized
from lowmem_reft.memory.predict import Lengths, Predictor, Setting
from lowmem_reft.memory.reuse import ReusePlan, plan_reuse
from lowmem_reft.memory.shapes import config_of, config_of_hub_id, nearest_names
from lowmem_reft.options import OptimOptions

GIB = 2**30

MARGIN = 0.005
"""Added to a counted peak: buffers inside kernels that no operator returns (measured: under 0.4 %
on shapes of real size; ``benchmarks/results/memory.json``)."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """The memory to fit into."""

    name: str
    """For people."""
    memory_bytes: int
    """All of it."""
    bf16: bool = True
    """Whether it computes in bf16 and has flash attention."""
    context_bytes: int = CONTEXT_BYTES
    """What the driver takes before the first tensor."""

    @classmethod
    def find(cls, gpu: str | None = None, memory_gib: float | None = None) -> Card | None:
        """Return the card of a name, of a size in GiB, or None if neither is given.

        Raises:
            InputError: Both are given, the name is unknown or the size is not positive.
        """
        if gpu is not None and memory_gib is not None:
            raise InputError(
                f"gpu must be given without memory_gib, got {gpu!r} and {memory_gib!r}; drop one"
            )
        if gpu is not None:
            found = find_gpu(gpu)
            return cls(name=found.name, memory_bytes=found.torch_bytes, bf16=found.has_bf16)
        if memory_gib is None:
            return None
        if not memory_gib > 0:
            raise InputError(f"memory_gib must be above 0, got {memory_gib!r}; for example 8")
        return cls(name=f"{memory_gib:g} GiB", memory_bytes=round(memory_gib * GIB))

    def required_bytes(self, peak_bytes: int) -> int:
        """Return what must be free on the card for a peak of tensors: context and gaps included."""
        return int(peak_bytes * (1 + FRAGMENTATION)) + self.context_bytes

    def holds(self, peak_bytes: int) -> bool:
        """Return whether it has room for a peak of tensors."""
        return self.required_bytes(peak_bytes) <= self.memory_bytes


_FIGURES = (
    *("peak_bytes", "breakdown_bytes", "fits", "fits_dequantized", "required_bytes", "peak_place"),
    *("largest", "loading_peak_bytes", "evaluation_peak_bytes", "generation_peak_bytes"),
    *("host_bytes", "num_trainable_params"),
)
"""What ``--json`` gives of a plan as it is."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one setting needs."""

    peak_bytes: int
    """Tensors alive at the worst moment of a training step."""
    breakdown_bytes: dict[str, int]
    """The same by category; sums to ``peak_bytes``."""
    peak_place: str
    """The operator, module and line that cause the peak."""
    largest: list[dict[str, Any]]
    """The largest storages that the step itself has made by then."""
    loading_peak_bytes: int
    """Tensors alive at the worst moment of loading the base."""
    evaluation_peak_bytes: int
    """The same while choices are scored, with the batch size of training."""
    generation_peak_bytes: int | None
    """The same while generating with a cache; None for classifiers."""
    host_bytes: int
    """Host memory for what was moved there: embedding and offloaded inputs of blocks."""
    num_trainable_params: int
    """Trained parameters."""
    reuse: ReusePlan | None
    """What ``train --reuse`` would store and save; None if nothing is constant."""
    card: Card | None
    """The card asked about."""
    setting: Setting
    """What is trained and how."""
    lengths: Lengths
    """How much goes through at once."""

    @property
    def worst_bytes(self) -> int:
        """Return the tensors alive at the worst moment of loading and training.

        With ``resident upper`` the store is built by a pass through all blocks, one after the
        other, which takes no more than scoring.
        """
        building = self.evaluation_peak_bytes if self.setting.resident == "upper" else 0
        return max(self.peak_bytes, self.loading_peak_bytes, building)

    @property
    def required_bytes(self) -> int:
        """Return what the card must hold for them."""
        return self.worst_bytes if self.card is None else self.card.required_bytes(self.worst_bytes)

    @property
    def fits(self) -> bool | None:
        """Return whether the card holds it; None without a card."""
        return None if self.card is None else self.card.holds(self.worst_bytes)

    @property
    def fits_dequantized(self) -> bool | None:
        """Return whether ``--dequantize-upper`` fits; None without a card or anything to reuse."""
        if self.card is None or self.reuse is None:
            return None
        return self.card.holds(self.peak_bytes + self.reuse.dequantized_bytes)

    def as_json(self) -> dict[str, Any]:
        """Return the figures for ``--json``."""
        card, overhead = self.card, {"context": 0, "fragmentation": 0}
        if card is not None:
            without_context = self.required_bytes - card.context_bytes
            overhead = {
                "context": card.context_bytes,
                "fragmentation": without_context - round(without_context / (1 + FRAGMENTATION)),
            }
        return {
            **{name: getattr(self, name) for name in _FIGURES},
            "overhead_bytes": overhead,
            "card": None if card is None else card.name,
            "card_bytes": None if card is None else card.memory_bytes,
            "reuse": None if self.reuse is None else self.reuse.as_json(),
        }


def read_config(model: str | Path) -> Any:
    """Return the configuration of a hub id, a directory, a config.json or a short name.

    Of a hub id that has a short name, where the hub cannot be reached or its repository is gated,
    that is what the short name stands for; a warning says so.

    Raises:
        InputError: There is none, or it lacks what sizes depend on.
    """
    named = config_of(str(model))
    if named is not None:
        return named
    path = Path(model)
    if (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        return check_sizes(_read_config_file(path), model)
    try:
        config = load_config(model)
    except InputError as error:
        if path.exists() or str(model).startswith(("/", ".", "~")):
            raise
        found = config_of_hub_id(str(model))
        if found is not None and isinstance(error, ClosedError):
            short, known = found
            said = f"{model} is planned by the shape that is known as {short}"
            warnings.warn(f"{error.why}: {said}", stacklevel=2)
            return known
        names = ", ".join(nearest_names(str(model)))
        raise InputError(f"{error}, or take a short name: {names}") from error
    return check_sizes(config, model)


def check_sizes(config: Any, model: str | Path) -> Any:
    """Return a model's configuration, which must have what sizes depend on.

    Raises:
        InputError: It lacks some of that.
    """
    text = config.get_text_config()
    missing = [
        name
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        if not isinstance(size := getattr(text, name, None), int) or size < 1
    ]
    if missing:
        raise InputError(
            f"model must have a configuration with {', '.join(missing)}, got {str(model)!r} without"
            "; complete config.json"
        )
    return config


def _read_config_file(path: Path) -> Any:
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"model must be a config.json that can be read, got {str(path)!r}; correct the path "
            f"({error})"
        ) from error
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{path}{line}: model must be a JSON object, got {str(error)!r}; mend the file"
        ) from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise InputError(
            f"{path}: model must name its architecture in model_type, got none; add it, for "
            'example "model_type": "llama"'
        )
    check_config(path, fields)
    # A class's defaults would stand for sizes that are missing, and predict another model.
    own = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("vocab_size",)
    missing = [names[0] for names in own if not any(name in fields for name in names)]
    if missing and "text_config" not in fields:
        raise InputError(f"{path}: model must give {', '.join(missing)}, got none; add them")
    try:
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # whatever it raises, it has only read the file
        raise InputError(
            f"{path}: model must be one that transformers {transformers.__version__} knows, got "
            f"{in_one_line(error)}; correct it, or upgrade transformers"
        ) from error


class Planner:
    """Plans for one model; the model of the last setting and all training peaks are kept."""

    def __init__(self, config: Any, card: Card | None = None) -> None:
        self.config = config
        self.card = card
        self._predictor: Predictor | None = None
        self._known: dict[tuple[str, Setting, Lengths], int] = {}

    def predictor(self, setting: Setting) -> Predictor:
        """Return the predictor of a setting; asked twice in a row, the same one.

        Raises:
            InputError: The model, the method or a technique does not go with the others.
        """
        if self._predictor is None or self._predictor.setting != setting:
            self._predictor = Predictor(self.config, setting)
        return self._predictor

    def training_peak_bytes(self, setting: Setting, lengths: Lengths) -> int:
        """Return the predicted peak of a training step, margin included."""
        key = ("training", setting, lengths)
        if key not in self._known:
            self._known[key] = with_margin(self.predictor(setting).training(lengths).peak_bytes)
        return self._known[key]

    def evaluation_peak_bytes(self, setting: Setting, lengths: Lengths) -> int:
        """Return the predicted peak of scoring choices, margin included."""
        key = ("evaluation", setting, lengths)
        if key not in self._known:
            predictor = self.predictor(setting)
            counted = predictor.evaluation(lengths).peak_bytes + predictor.streamed_bytes
            self._known[key] = with_margin(counted)
        return self._known[key]

    def needed_bytes(self, setting: Setting, lengths: Lengths) -> int:
        """Return the most that a training needs, from loading its base on: `Plan.worst_bytes`."""
        loading = with_margin(loading_peak_bytes(self.predictor(setting)))
        building = 0
        if setting.resident == "upper":
            building = self.evaluation_peak_bytes(setting, lengths)
        return max(self.training_peak_bytes(setting, lengths), loading, building)

    def reuse(self, setting: Setting, lengths: Lengths, num_examples: int) -> ReusePlan | None:
        """Return what training could reuse; None if nothing is constant."""
        return plan_reuse(self.predictor(setting), lengths, num_examples)

    def plan(self, setting: Setting, lengths: Lengths, *, num_examples: int = 1000) -> Plan:
        """Predict loading, training, evaluation and generation, and what could be reused."""
        predictor = self.predictor(setting)
        peak = predictor.training(lengths).peak
        peak_bytes = with_margin(peak.num_bytes)
        breakdown = dict(peak.breakdown_bytes)
        breakdown["workspace"] = breakdown.get("workspace", 0) + peak_bytes - peak.num_bytes
        streamed = predictor.streamed_bytes
        generation = None
        if setting.task_type == "CAUSAL_LM":
            generation = with_margin(predictor.generation(lengths).peak_bytes + streamed)
        return Plan(
            peak_bytes=peak_bytes,
            breakdown_bytes=breakdown,
            peak_place=str(peak.place),
            largest=[storage.as_json() for storage in peak.largest],
            loading_peak_bytes=with_margin(loading_peak_bytes(predictor)),
            evaluation_peak_bytes=self.evaluation_peak_bytes(setting, lengths),
            generation_peak_bytes=generation,
            host_bytes=predictor.host_bytes(lengths.batch_size * lengths.seq_len),
            num_trainable_params=predictor.trainable_parameters,
            reuse=self.reuse(setting, lengths, num_examples),
            card=self.card,
            setting=setting,
            lengths=lengths,
        )


def with_margin(counted_bytes: int) -> int:
    """Return a counted peak with what kernels may need inside themselves."""
    return round(counted_bytes * (1 + MARGIN))


def loading_peak_bytes(predictor: Predictor) -> int:
    """Return the most that is alive while a base is loaded: all of it, and one matrix twice.

    Matrices are read and quantized one after the other; the one at hand is there as it was stored
    (16 bit) and as a copy on the device.
    """
    widest = max(2 * num_quantized(module) for module in predictor.model.modules())
    return predictor.base_bytes + predictor.streamed_bytes + 2 * widest


def plan(
    model: str | Path,
    *,
    gpu: str | None = None,
    memory_gib: float | None = None,
    lengths: Lengths | None = None,
    num_examples: int = 1000,
    **setting: Any,
) -> Plan:
    """Predict the memory of fine-tuning a model; nothing is loaded and no GPU is needed.

    Args:
        model: Hub id, directory, config.json or a short name (``shapes.SHAPES``).
        gpu: A card's name (``cards.GPUS``).
        memory_gib: The memory of a card in GiB instead.
        lengths: Tokens and examples; default: those of ``train``, 8 examples of 512 tokens.
        num_examples: Examples of the data set, for what could be reused.
        setting: Fields of ``Setting``: storage, method, memory, ...

    Raises:
        InputError: The model, the card or the setting is not known or impossible.
    """
    card = Card.find(gpu, memory_gib)
    if card is not None:
        setting = {"bf16": card.bf16, **setting}
    planner = Planner(read_config(model), card)
    lengths = lengths or Lengths(batch_size=OptimOptions().batch_size)
    return planner.plan(Setting(**setting), lengths, num_examples=num_examples)
