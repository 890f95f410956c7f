"""What a task is: where its rows come from, how prompts are written, what scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_reft.data.tasks.files import read_json

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Rule = Literal["own", "halved", "tail", "held_out", "held_out_twice"]
RULES: dict[Rule, str] = {
    "own": "the public validation rows",
    "halved": "a random half (1,000 rows where there are more than 5,000) of the public validation "
    "rows; the others are the test rows",
    "tail": "the last 300 public training rows",
    "held_out": "a tenth of the public training rows, by a hash of their content",
    "held_out_twice": "a tenth of the public training rows, by a hash of their content; a tenth of "
    "the others are the test rows",
}
"""How validation rows are made; those of "halved" and "tail" as in the paper (arXiv 2404.03592)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a record says, before it becomes a row for a language model or for a classifier."""

    source: str
    """``file:line``, or the place on the hub."""
    prompt: str
    """The prompt without template; both texts of a pair are written out."""
    text: str = ""
    """The text alone, for a classifier; none: it is the prompt."""
    text_pair: str | None = None
    """The second text of a pair."""
    choices: tuple[str, ...] = ()
    """Responses to choose from."""
    answer: int | None = None
    """Index of the right choice."""
    response: str | None = None
    """The response, where there are no choices."""
    label: str | None = None
    """Class name, for a classifier."""
    target: float | None = None
    """The number to predict, for a regression."""

    def __post_init__(self) -> None:
        """Take the prompt for the text where there is no other."""
        object.__setattr__(self, "text", self.text or self.prompt)


Read = Callable[[Path], Iterator[tuple[str, Any]]]
"""Yields (``file:line``, unchecked record)."""
Convert = Callable[[Any, str], Example]
"""Checks a record from a place."""


@dataclass(frozen=True, kw_only=True)
class LocalFiles:
    """The public files of a task, under the names they are published with."""

    directories: tuple[str, ...]
    """Where they may lie below a data directory; they may also lie in it directly."""
    convert: Convert
    """Makes examples of a file's records."""
    rule: Rule
    """How validation rows are made."""
    read: Read = read_json
    """Reads a file's records."""
    train: tuple[str, ...] = ()
    """Files of the public training rows."""
    validation: tuple[str, ...] = ()
    """Files of the public validation rows."""
    test: tuple[str, ...] = ()
    """Files of the public test rows with answers."""


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A task's data set on the Hugging Face hub."""

    id: str
    """``owner/name``."""
    convert: Convert
    """Makes examples of its records."""
    rule: Rule
    """How validation rows are made."""
    config: str | None = None
    """Configuration, where there are several."""
    revision: str | None = None
    """Branch, where the main one needs a script that ``datasets`` no longer runs."""
    train: tuple[str, ...] = ()
    """Names of the splits with the public training rows."""
    validation: tuple[str, ...] = ()
    """Those of the public validation rows."""
    test: tuple[str, ...] = ()
    """Those of the test rows with answers."""

    @property
    def name(self) -> str:
        """The id, with its configuration after a colon."""
        return self.id if self.config is None else f"{self.id}:{self.config}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the registry."""

    name: str
    """Its name on the command line."""
    family: str
    """Which of the paper's task families it belongs to."""
    about: str
    """One line."""
    template: str
    """How a prompt is written: ``{prompt}`` is replaced by it."""
    metric: str
    """Key in ``metrics.METRICS``."""
    scoring: Literal["likelihood", "generation"]
    """Whether choices (or, for the loss, responses) are scored or text is generated."""
    extra_metrics: tuple[str, ...] = ()
    """Further keys in ``metrics.METRICS`` that are usually reported."""
    answer: str | None = None
    """Key in ``answers.EXTRACTORS``: what finds the answer in generated text; None: all of it."""
    max_new_tokens: int = 32
    """Tokens generated per example."""
    labels: tuple[str, ...] = ()
    """Class names for a classifier in the order of their indices; none: they vary, or there are
    none."""
    local: tuple[LocalFiles, ...] = ()
    """The files it can be read from; the first that is there counts."""
    hub: HubSet | None = None
    """Where it is on the hub; None: nowhere with the same rows."""
