"""What an adapter was trained on and how its prompts were written; saved beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowmem_reft.data.chosen import are_choices
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import fits, parse_json, write_json
from lowmem_reft.methods.trust import check_adapter_config
from lowmem_reft.options import (
    CHAT_TEMPLATE,
    ComputeDtype,
    Joint,
    ModelOptions,
    Storage,
    TaskType,
)

FILE_NAME = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingCard:
    """Facts that scoring and generation must share with training."""

    base: str
    """Hub id or directory of the base; empty: not known."""
    storage: Any
    """How the base was stored; None: not known."""
    compute_dtype: str = "auto"
    """Arithmetic of the base."""
    task_type: str = "CAUSAL_LM"
    """PEFT task type; empty: not known."""
    template: str = "{prompt}"
    """How a prompt was written; ``chat``: by the tokenizer's chat template, as the user's message;
    empty: not decided yet, see ``with_template``."""
    joint: Joint = "auto"
    """What was put between prompt and response."""
    max_length: int = 512
    """Tokens of prompt + response."""
    label_names: list[str] | None = None
    """Class names of text, label rows, in the order of their indices."""
    choices: list[str] | None = None
    """What every training row chose among, where that is the same few: a generated answer that is
    one of them ends there. None: rows had no choices or others each, or it is not known."""
    has_end: bool | None = None
    """Whether what ends a response was trained after each: not after choices, unless the chat
    template writes it. None: not known."""
    regression: bool = False
    """Whether the head predicts the rows' targets."""
    method: str | None = None
    """Name in the method table; None for the base alone."""
    data_digest: str | None = None
    """SHA-256 of the training rows."""
    seed: int | None = None
    """Seed of the run."""
    base_digest: str | None = None
    """Of the base's checkpoint, see ``identity.checkpoint_digest``."""
    vocabulary_digest: str | None = None
    """Of the tokenizer, see ``tokenizers.vocabulary_digest``."""
    template_digest: str | None = None
    """Of the chat template; None where none was trained through."""

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classification or regression head; None without one."""
        if self.regression:
            return 1
        names = self.label_names if self.task_type == "SEQ_CLS" else None
        return len(names) if names else None

    @property
    def prompts(self) -> dict[str, Any]:
        """How rows become prompts and responses: arguments of ``data.encode_rows``."""
        return {"template": self.template, "joint": self.joint, "max_length": self.max_length}

    def save(self, directory: Path) -> None:
        """Write ``training.json`` into the adapter's directory."""
        write_json(directory / FILE_NAME, asdict(self))


def load_card(directory: Path) -> TrainingCard | None:
    """Read the card of an adapter; without one, what its PEFT configuration knows of it.

    Returns:
        None if there is no adapter either.

    Raises:
        InputError: The file is there but is not a card.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return _card_of_config(directory)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        # What adapters were trained with before it was written.
        content.setdefault("joint", "space")
        known = {item.name for item in fields(TrainingCard)}
        card = TrainingCard(**{key: value for key, value in content.items() if key in known})
        _check_types(card)
        if not fits(card.task_type, TaskType):
            raise TypeError(f"task_type {card.task_type!r}")
        return card
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} must be a training card, got {error}; delete or restore it"
        ) from error


_TEXTS = ("base", "compute_dtype", "task_type", "template")
_TEXTS_OR_NONE = (
    *("storage", "method", "data_digest", "base_digest"),
    *("vocabulary_digest", "template_digest"),
)


def _check_types(card: Any) -> None:
    """Refuse values that no card has.

    Raises:
        TypeError: There is one.
    """
    names = card.label_names
    wrong = [name for name in _TEXTS if not isinstance(getattr(card, name), str)]
    wrong += [n for n in _TEXTS_OR_NONE if not isinstance(getattr(card, n), str | None)]
    chosen = {"joint": Joint, "compute_dtype": ComputeDtype, "storage": Storage | None}
    wrong += [name for name, hint in chosen.items() if not fits(getattr(card, name), hint)]
    if type(card.max_length) is not int or card.max_length < 1:
        wrong.append("max_length")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        wrong.append("label_names")
    if card.choices is not None and not (
        fits(card.choices, list[str]) and are_choices(card.choices)
    ):
        wrong.append("choices")
    if not isinstance(card.has_end, bool | None):
        wrong.append("has_end")
    if not isinstance(card.regression, bool):
        wrong.append("regression")
    if wrong:
        raise TypeError(f"{wrong[0]} {getattr(card, wrong[0])!r}")


def _card_of_config(directory: Path) -> TrainingCard | None:
    """Make a card for an adapter that a Trainer saved."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        card = TrainingCard(
            base=config.get("base_model_name_or_path") or "",
            storage=config.get("base_storage"),
            task_type=config.get("task_type") or "",
            base_digest=config.get("base_digest"),
        )
        _check_types(card)
        return card
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} must be a PEFT configuration, got {error}; save the adapter again"
        ) from error


def merge_card(
    trained: TrainingCard | None,
    model: ModelOptions,
    *,
    template: str | None,
    max_length: int | None,
    raw: bool = False,
    joint: Joint | None = None,
) -> TrainingCard:
    """What a run goes by: what is given, else what the adapter was trained with, else the defaults.

    Args:
        trained: The adapter's card; None without one.
        model: The base as the user gave it; ``compute_dtype`` auto counts as not given.
        template: How a prompt is written; None: not given. Without an adapter it is then not
            decided, as the tokenizer has a say in it: see ``with_template``.
        max_length: Tokens of prompt + response; None: not given.
        raw: The template is to be "{prompt}".
        joint: What is put between prompt and response; None: not given.

    Raises:
        InputError: The task type contradicts the card, or ``raw`` the template.
    """
    if raw and template not in (None, "{prompt}"):
        raise InputError(
            f"raw must be left out with template, got {template!r}; prompts are written by one of "
            "them"
        )
    card = trained or TrainingCard(base="", storage=None, template="")
    if trained is not None and card.task_type and model.task_type not in (None, card.task_type):
        raise InputError(
            f"task_type must be {card.task_type}, which the adapter was trained for, got "
            f"{model.task_type!r}; leave it out"
        )
    choices = {
        "storage": model.storage,
        "compute_dtype": None if model.compute_dtype == "auto" else model.compute_dtype,
        "task_type": model.task_type,
        "template": "{prompt}" if raw else template,
        "max_length": max_length,
        "joint": joint,
    }
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    defaults = {"base": model.model, "storage": "nf4", "task_type": "CAUSAL_LM"}
    unknown = {name: value for name, value in defaults.items() if not getattr(card, name)}
    return replace(card, **(unknown | given))


def with_template(card: TrainingCard, tokenizer: Any) -> TrainingCard:
    """Decide how prompts are written, where neither the user nor an adapter says it.

    A model with a chat template is asked through it; a classifier reads texts as they are.

    Raises:
        InputError: It is to be the chat template, and the tokenizer has none.
    """
    has_one = bool(tokenizer.chat_template)
    if card.template == CHAT_TEMPLATE and not has_one:
        raise InputError(
            f"template must be text with {{prompt}} where the tokenizer has no chat template, got "
            f"{CHAT_TEMPLATE!r}; give the tokenizer of the training, or --raw"
        )
    if card.template:
        return card
    is_asked = has_one and card.task_type == "CAUSAL_LM"
    return replace(card, template=CHAT_TEMPLATE if is_asked else "{prompt}")


def find_adapter(directory: Path) -> Path:
    """Return the directory that holds the adapter: the given one, or the folder of a run in it.

    A run has it in ``adapter``, a cell of a comparison in ``train/adapter``.

    Raises:
        InputError: None of these holds one, or it asks for code or files of others.
    """
    places = [directory / folder for folder in ("", "adapter", "train/adapter")]
    for path in places:
        if (path / "adapter_config.json").is_file():
            check_adapter_config(path)
            return path
    looked_for = ", ".join(str(path / "adapter_config.json") for path in places)
    raise InputError(
        f"adapter must be a directory with adapter_config.json, got {str(directory)!r} and none of "
        f"{looked_for}; give the adapter_dir that train printed"
    )
