"""A training run, resolved once: everything that must be known before its base is loaded.

What trains, keeps the directory, writes the adapter's README or tells trackers is given the `Run`;
none of them works out a storage, a dtype or a configuration again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowmem_reft.base.hub import load_config, num_blocks
from lowmem_reft.base.identity import checkpoint_digest
from lowmem_reft.base.limits import Limits
from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data.chosen import shared_choices
from lowmem_reft.data.cutting import encode_those_that_fit
from lowmem_reft.data.mixture import load_mixture
from lowmem_reft.data.rows import as_choices, label_names, rows_digest
from lowmem_reft.data.texts import unused_arguments
from lowmem_reft.data.tokens import EncodedRows, encode_labelled, encode_rows
from lowmem_reft.data.turns import of_turns
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import dtype_name, resolve_storage
from lowmem_reft.methods.attach import check_run, check_target_modules
from lowmem_reft.methods.card import TrainingCard, merge_card, with_template
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.methods.entries import resolve_learning_rate
from lowmem_reft.methods.table import all_options, find_method, for_base
from lowmem_reft.methods.tokenizers import template_digest, vocabulary_digest
from lowmem_reft.options import CHAT_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import LongRows, OptimOptions, TrainOptions


_OF_THE_CARD = ("storage", "task_type", "template", "joint", "max_length")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run."""

    options: TrainOptions
    """What the user chose."""
    card: TrainingCard
    """What the adapter is trained on: base, storage, task, labels, prompts, digests."""
    config: Any
    """The base's configuration (transformers), as it was read; nobody writes to it."""
    compute_dtype: torch.dtype
    """What the base computes in."""
    tokenizer: Any
    """The base's tokenizer."""
    encoded: EncodedRows
    """The rows to train on, as tokens."""
    rows: Sequence[Row] = ()
    """The rows that these are of."""

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The tokenized rows."""
        return self.encoded.examples

    @cached_property
    def limits(self) -> Limits:
        """The tokens and positions that the base has."""
        return Limits.of(self.config, self.tokenizer, task_type=self.card.task_type)

    @property
    def num_layers(self) -> int:
        """The blocks of the base."""
        return num_blocks(self.config)

    @property
    def num_virtual(self) -> int:
        """Trained tokens that the method puts before each example."""
        options, task_type = self.options.method, self.card.task_type
        adapter: Any = build_peft_config(options, task_type=task_type, num_layers=None)
        return int(adapter.num_virtual_tokens) if adapter.is_prompt_learning else 0

    @property
    def optim(self) -> OptimOptions:
        """How it is optimized: with what learning rate and epochs stand for if none are given."""
        optim = resolve_learning_rate(
            self.options.method,
            self.options.optim,
            lambda: self.config.get_text_config().hidden_size,
            lambda: self.num_layers,
        )
        number = processes.num_processes()
        return replace(optim, epochs=optim.num_epochs(len(self.examples), num_processes=number))

    @property
    def num_steps(self) -> int:
        """The optimizer steps that it takes."""
        number = processes.num_processes()
        return self.optim.num_steps(len(self.examples), num_processes=number)

    @property
    def num_epochs(self) -> float:
        """How often it goes through the examples, also where ``max_steps`` says how far."""
        optim = self.optim
        if optim.max_steps > 0:
            return optim.max_steps * processes.effective_batch(optim) / len(self.examples)
        assert optim.epochs is not None
        return optim.epochs

    @property
    def as_resolved(self) -> dict[str, Any]:
        """What options stand for that name no value, by their names: for the run's own file."""
        return {
            **{name: getattr(self.card, name) for name in _OF_THE_CARD},
            "compute_dtype": dtype_name(self.compute_dtype),
            "lr": self.optim.lr,
            "epochs": self.optim.epochs,
            **all_options(self.options.method),
            # What it chose is written out, and how a run goes on is not a setting.
            **dict.fromkeys(("memory_gib", "resume", "overwrite", "dry_run")),
        }

    @property
    def directory(self) -> Path:
        """Where checkpoints and results go."""
        return self.options.run.output_dir

    @property
    def adapter_dir(self) -> Path:
        """Where the adapter goes."""
        return self.directory / "adapter"

    @property
    def reuse_dir(self) -> Path:
        """Where what is constant is kept."""
        return self.options.reuse.reuse_dir or self.directory / "reuse"


def resolve(options: TrainOptions) -> Run:
    """Read rows, configuration and tokenizer, and settle all that follows from them.

    Raises:
        InputError: An option, a file or a row is wrong, or does not go with the others.
    """
    model, data = options.model, options.data
    prompts = options.prompts
    rows = load_mixture(data.data, split=data.split, limit=data.limit, seed=options.run.seed)
    rows = of_turns(rows, prompts.turns)
    card = merge_card(
        None,
        model,
        template=data.template,
        max_length=data.max_length,
        raw=prompts.raw,
        joint=prompts.joint,
    )
    kind = rows[0].kind
    if (card.task_type == "SEQ_CLS" and kind not in ("label", "target")) or (
        card.task_type == "CAUSAL_LM" and kind == "target"
    ):
        wanted = "text, label or text, target" if card.task_type == "SEQ_CLS" else "other"
        raise InputError(
            f"data must hold {wanted} rows for task_type {card.task_type}, got {kind} rows; "
            "convert them or change the task type"
        )
    build_peft_config(options.method, task_type=card.task_type, num_layers=None)
    storage, dtype = resolve_storage(
        model.storage,
        card.compute_dtype,
        model.device,
        default=find_method(options.method.method).storage,
    )
    card = replace(
        card,
        storage=storage,
        label_names=label_names(rows) if kind == "label" else None,
        regression=kind == "target",
        method=options.method.method,
        seed=options.run.seed,
        base_digest=checkpoint_digest(model.model),
    )
    config = _check(options, card)
    options = replace(
        options,
        method=for_base(
            options.method,
            task_type=card.task_type,
            num_layers=lambda: num_blocks(config),
        ),
    )
    tokenizer = load_tokenizer(model.model, config=config)
    card = with_template(card, tokenizer)
    through_chat = kind == "messages" or card.template == CHAT_TEMPLATE
    card = replace(
        card,
        vocabulary_digest=vocabulary_digest(tokenizer),
        template_digest=template_digest(tokenizer) if through_chat else None,
        **_end_of_answers(rows, card, through_chat=through_chat),
    )
    if unused := unused_arguments(rows, tokenizer):
        warnings.warn(
            f"{', '.join(unused)} beside the messages of {data.data} are not used: the chat "
            "template does not ask for them",
            stacklevel=2,
        )
    rows, encoded = encode_those_that_fit(
        rows,
        lambda some: _encode(some, tokenizer, card, prompts.long_rows),
        long_rows=prompts.long_rows,
    )
    run = Run(
        options=options,
        card=replace(card, data_digest=rows_digest(rows)),
        config=config,
        compute_dtype=dtype,
        tokenizer=tokenizer,
        encoded=encoded,
        rows=rows,
    )
    ids = [example["input_ids"] for example in run.examples]
    run.limits.check([row.source for row in rows], ids, virtual=run.num_virtual)
    return run


def _check(options: TrainOptions, card: TrainingCard) -> Any:
    """Refuse what the base has not got; return its configuration."""
    config = load_config(options.model.model)
    check_target_modules(options.method, config, task_type=card.task_type, storage=card.storage)
    check_run(options.method, options.memory, resume=options.run.resume)
    processes.check_sharded_run(options, card.storage)
    return config


def _end_of_answers(
    rows: Sequence[Row], card: TrainingCard, *, through_chat: bool
) -> dict[str, Any]:
    """Return what the card remembers of where an answer ends."""
    if card.task_type != "CAUSAL_LM":
        return {}
    rows = as_choices(rows, card.label_names)
    has_end = through_chat or not any(row.choices for row in rows)
    return {"choices": shared_choices(rows), "has_end": has_end}


def _encode(
    rows: Sequence[Row], tokenizer: Any, card: TrainingCard, long_rows: LongRows
) -> EncodedRows:
    """Tokenize the rows as the task wants them."""
    if card.task_type == "SEQ_CLS":
        return encode_labelled(
            rows,
            tokenizer,
            max_length=card.max_length,
            label_names=card.label_names,
            long_rows=long_rows,
        )
    rows = as_choices(rows, card.label_names)
    return encode_rows(rows, tokenizer, **card.prompts, long_rows=long_rows)
