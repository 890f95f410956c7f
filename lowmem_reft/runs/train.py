"""One fine-tuning run: rows, a frozen base and a named method go in, an adapter comes out."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lowmem_reft.base.blocks import device_of
from lowmem_reft.base.identity import checkpoint_digest
from lowmem_reft.base.loading import load_config, load_tokenizer
from lowmem_reft.data.rows import as_choices, label_names, load_rows, rows_digest
from lowmem_reft.data.tokens import (
    IGNORED_LABEL,
    Collator,
    EncodedRows,
    encode_labelled,
    encode_rows,
)
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.files import write_json
from lowmem_reft.machine.progress import counter
from lowmem_reft.machine.provenance import versions
from lowmem_reft.memory import peak_rss_bytes, track
from lowmem_reft.memory.step import optimizer_tensors
from lowmem_reft.memory.verdict import fit_into_memory
from lowmem_reft.methods.attach import attach, check_run, check_target_modules
from lowmem_reft.methods.card import TrainingCard, merge_card
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.methods.entries import resolve_learning_rate
from lowmem_reft.methods.loading import load_frozen
from lowmem_reft.methods.table import find_method
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.positions import num_groups, parse_positions
from lowmem_reft.reuse.mixins import ReuseTrainer
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.reuse.reuse import Reuse
from lowmem_reft.runs.directory import last_checkpoint, prepare_directory
from lowmem_reft.runs.evaluate import ScoringSettings, check_rows, check_scoring, score
from lowmem_reft.runs.readme import write_model_card
from lowmem_reft.runs.tracking import RunArguments, Trackers
from lowmem_reft.runs.validation import BestEpoch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import TrainOptions

logger = logging.getLogger(__name__)

NUM_WARMUP_STEPS = 2
"""Steps that are left out of the timing."""


def run_training(options: TrainOptions) -> dict[str, Any]:
    """Train one adapter, save it to ``output_dir/adapter`` and write ``output_dir/result.json``.

    Returns:
        ``adapter_dir``, ``train_loss`` (mean over the steps of this process),
        ``num_trainable_params``, ``trainable_percent``, ``num_steps``, ``step_time_s`` (median),
        ``tokens_per_s``, ``peak_bytes`` (live storages of a step on the longest examples; on CUDA
        the most that was allocated), ``breakdown_bytes`` (of that step, by category),
        ``reserved_bytes`` (CUDA), ``rss_bytes`` (peak of the
        process), ``loss_history`` ([step, loss] pairs), ``num_cut_prompts``, ``reuse`` (the mode
        used), ``store_bytes``, ``build_time_s``, ``versions``; with
        ``validation_data`` ``validation`` (a score per epoch), ``best_epoch``, whose weights the
        adapter has, and ``validation_value``; with ``eval_data`` ``eval_accuracy`` and ``eval``.

    Raises:
        InputError: an option, a file or a row is wrong.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved and ``--resume`` goes on from it.
    """
    processes.start(options.model.device)
    if not processes.is_main():
        options = replace(options, run=replace(options.run, quiet=True))
    set_seed(options.run.seed)
    rows = load_rows(options.data.data, split=options.data.split, limit=options.data.limit)
    card = _training_card(options, rows)
    # Refuses wrong options of the method before the base is loaded.
    build_peft_config(options.method, task_type=card.task_type, num_layers=None)
    check_target_modules(
        options.method, options.model.model, task_type=card.task_type, storage=card.storage
    )
    check_run(options.method, options.memory, resume=options.run.resume)
    processes.check_sharded_run(options, card.storage)
    tokenizer = load_tokenizer(options.model.model)
    encoded = _encode(rows, tokenizer, card)
    check_scoring(options.scoring)
    chosen = options.held_out
    validation = _read_held_out(
        chosen.validation_data, chosen.validation_split, chosen.validation_limit, card
    )
    held_out = _read_held_out(chosen.eval_data, chosen.eval_split, chosen.eval_limit, card)
    options = fit_into_memory(options, card, encoded.examples)
    prepare_directory(options, card, validation, num_examples=len(encoded.examples))
    model = _attach(options, card, tokenizer)
    settings = _scoring_settings(options)
    best = None
    if validation:
        best = BestEpoch(
            model,
            lambda: score(model, tokenizer, validation, card, settings).summary(),
            options.run.output_dir,
            resume=options.run.resume,
        )
    adapter_dir = options.run.output_dir / "adapter"
    with Trackers(options, card) as trackers:
        result = fit(model, tokenizer, encoded, options, best, trackers)
        _save_adapter(model, card, adapter_dir)
        result = {"adapter_dir": str(adapter_dir), **result, "versions": versions()}
        _record(options, card, result)
        if held_out and (processes.is_main() or processes.shards_model()):
            result["eval"] = score(model, tokenizer, held_out, card, settings).summary()
            result["eval_accuracy"] = result["eval"]["accuracy"]
            _record(options, card, result)
        trackers.log(result)
    return result


def _save_adapter(model: PeftModel, card: TrainingCard, directory: Path) -> None:
    """Write the adapter and its card, from the first process alone."""
    state = None
    if processes.shards_model():
        state = {**model.state_dict(), **processes.trained_values(model)}
    if processes.is_main():
        model.save_pretrained(str(directory), state_dict=state)
        card.save(directory)


def _record(options: TrainOptions, card: TrainingCard, result: dict[str, Any]) -> None:
    """Write the adapter's README.md and ``result.json``."""
    if processes.is_main():
        write_model_card(options.run.output_dir / "adapter", options, card, result)
    write_result(options, result)


def write_result(options: TrainOptions, result: dict[str, Any]) -> None:
    """Write ``output_dir/result.json``, which marks the run as finished."""
    if not processes.is_main():
        return
    write_json(options.run.output_dir / "result.json", result)


def _read_held_out(
    source: str | None, split: str, limit: int | None, card: TrainingCard
) -> list[Row]:
    """Read rows to score before the training, so that a wrong file does not cost the run."""
    if source is None:
        return []
    rows = load_rows(source, split=split, limit=limit)
    check_rows(rows, card)
    return rows


def _scoring_settings(options: TrainOptions) -> ScoringSettings:
    reuse, kept = options.reuse, options.reuse.reuse_dir
    if processes.shards_model():  # a store is made of a whole base
        reuse, kept = replace(reuse, reuse="off"), None
    elif kept is None and reuse.resident == "upper":
        kept = _reuse_directory(options)
    return ScoringSettings(
        **vars(options.scoring), quiet=options.run.quiet, reuse=reuse, reuse_dir=kept
    )


def fit(
    model: PeftModel,
    tokenizer: Any,
    encoded: EncodedRows,
    options: TrainOptions,
    best: BestEpoch | None = None,
    trackers: Trackers | None = None,
) -> dict[str, Any]:
    """Train the adapter of ``model`` in place with the stock Trainer.

    Args:
        model: the base with its adapter.
        tokenizer: the base's tokenizer.
        encoded: the rows to train on.
        options: of the run.
        best: keeps the weights of the best epoch; None keeps those of the last.
        trackers: told the facts of the run and kept open; None leaves them to the Trainer.

    Returns:
        The measured part of ``run_training``'s result.

    Raises:
        InputError: ``--resume`` without a checkpoint.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    device = device_of(model)
    watch = _StepWatch(device)
    trainable, total = model.get_nb_trainable_parameters()  # of the base before it is sharded
    _say_effective_batch(options, len(encoded.examples))
    collator = Collator(tokenizer)
    reuse = _prepare_reuse(model, collator, encoded, options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    checkpoint = None
    if options.run.resume:
        checkpoint = str(last_checkpoint(options.run.output_dir))
    callbacks: list[TrainerCallback] = [watch] if best is None else [watch, best]
    trainer = _build_trainer(model, collator, encoded, options, reuse, callbacks)
    if trackers is not None:
        trackers.hold(trainer)
    with ExitStack() as stack:
        stack.enter_context(_stop_at_a_step(watch))
        if options.reuse.dequantize_upper == "on":
            held_bytes = 0 if reuse is None else stack.enter_context(reuse.dequantized())
            if not held_bytes:
                logger.warning(
                    "dequantize_upper has no effect: %s",
                    "nothing is reused" if reuse is None else "the base has no 4-bit layers",
                )
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        peak = _cuda_peak(device)
        peak = {**_peak_of_a_step(trainer, collator, encoded.examples, reuse), **peak}
    if watch.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(
            f"a checkpoint of step {trainer.state.global_step} is in {options.run.output_dir}; "
            "add --resume to go on"
        )
    return {
        "train_loss": outcome.training_loss,
        "num_trainable_params": trainable,
        "trainable_percent": 100 * trainable / total,
        "num_steps": trainer.state.global_step,
        **_speed(watch, encoded, options),
        **peak,
        "rss_bytes": peak_rss_bytes(),
        "loss_history": [
            [entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry
        ],
        "num_examples": len(encoded.examples),
        "num_cut_prompts": encoded.num_cut_prompts,
        "num_cut_tokens": encoded.num_cut_tokens,
        "reuse": "off" if reuse is None else reuse.mode,
        "store_bytes": 0 if reuse is None else reuse.layout.total_bytes,
        "build_time_s": 0.0 if reuse is None else reuse.build_time_s,
        **_restore_best(best),
    }


def _build_trainer(
    model: PeftModel,
    collator: Collator,
    encoded: EncodedRows,
    options: TrainOptions,
    reuse: Reuse | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The stock Trainer, or the one whose batches begin behind what is constant."""
    arguments = _training_arguments(options)
    if _edits_in_every_batch(model.peft_config["default"], encoded.examples):
        arguments.ddp_find_unused_parameters = False  # there are none
    processes.shard_on_cpu(arguments)
    kind = Trainer if reuse is None else partial(ReuseTrainer, reuse=reuse)
    trainer = kind(
        model=model,
        args=arguments,
        callbacks=callbacks,
        train_dataset=encoded.examples,
        data_collator=collator,
    )
    if trainer.pop_callback(PrinterCallback) is not None and not options.run.quiet:
        trainer.add_callback(_LossLines())
    return trainer


def _speed(watch: _StepWatch, encoded: EncodedRows, options: TrainOptions) -> dict[str, Any]:
    """How long steps took, and how many tokens of how many examples they had."""
    num_examples = len(encoded.examples)
    per_step = processes.effective_batch(options.optim)
    tokens = sum(len(example["input_ids"]) for example in encoded.examples)
    step_time = watch.step_time_s()
    return {
        "num_processes": processes.num_processes(),
        "effective_batch": per_step,
        "step_time_s": step_time,
        "tokens_per_s": tokens / num_examples * min(per_step, num_examples) / step_time
        if step_time
        else None,
        "train_time_s": watch.total_s,
    }


def _restore_best(best: BestEpoch | None) -> dict[str, Any]:
    """Put the weights of the best epoch back, if epochs were scored."""
    if best is None or best.best is None:
        return {}
    best.restore()
    return {
        "validation": best.epochs,
        "best_epoch": best.best["epoch"],
        "validation_value": best.best["value"],
    }


def _say_effective_batch(options: TrainOptions, num_examples: int) -> None:
    """Say how several processes share the examples of an optimizer step."""
    optim, number = options.optim, processes.num_processes()
    if number > 1 and processes.is_main():
        line = (
            f"effective batch: {optim.batch_size} examples x {optim.gradient_accumulation} "
            f"accumulation x {number} processes = {processes.effective_batch(optim)}"
        )
        repeated = -num_examples % (optim.batch_size * number)
        if repeated:
            line += f"; each epoch ends with {repeated} repeated rows, so that all have as many"
        print(line, file=sys.stderr)


def _prepare_reuse(
    model: PeftModel, collator: Collator, encoded: EncodedRows, options: TrainOptions
) -> Reuse | None:
    """Store what is constant, or say why nothing is."""
    chosen, optim = options.reuse, options.optim
    epochs = optim.epochs
    if optim.max_steps > 0:
        epochs = optim.max_steps * processes.effective_batch(optim) / len(encoded.examples)
    root = _reuse_directory(options)

    with counter("computing what is constant", quiet=options.run.quiet) as report:
        reuse = prepare(
            model,
            encoded.examples,
            collator,
            chosen,
            root=root,
            batch_size=optim.batch_size,
            epochs=epochs,
            report=report,
        )
    if reuse is not None and not options.run.quiet:
        print(f"reuse: {reuse.describe()}", file=sys.stderr)
    return reuse


def _reuse_directory(options: TrainOptions) -> Path:
    return options.reuse.reuse_dir or options.run.output_dir / "reuse"


def read_examples(options: TrainOptions) -> tuple[TrainingCard, list[dict[str, Any]]]:
    """Return a run's card and its tokenized training rows, for a prediction of its memory.

    Raises:
        InputError: the rows or the model cannot be read.
    """
    rows = load_rows(options.data.data, split=options.data.split, limit=options.data.limit)
    card = _training_card(options, rows)
    return card, _encode(rows, load_tokenizer(options.model.model), card).examples


def _training_card(options: TrainOptions, rows: list[Row]) -> TrainingCard:
    kind = rows[0].kind
    card = merge_card(
        None,
        options.model,
        template=options.data.template,
        max_length=options.data.max_length,
    )
    if (card.task_type == "SEQ_CLS" and kind not in ("label", "target")) or (
        card.task_type == "CAUSAL_LM" and kind == "target"
    ):
        wanted = "text, label or text, target" if card.task_type == "SEQ_CLS" else "other"
        raise InputError(
            f"data must hold {wanted} rows for task_type {card.task_type}, got {kind} rows; "
            "convert them or change the task type"
        )
    return replace(
        card,
        storage=options.model.storage or find_method(options.method.method).storage,
        label_names=label_names(rows) if kind == "label" else None,
        regression=kind == "target",
        method=options.method.method,
        data_digest=rows_digest(rows),
        seed=options.run.seed,
        base_digest=checkpoint_digest(options.model.model),
    )


def _encode(rows: list[Row], tokenizer: Any, card: TrainingCard) -> EncodedRows:
    """Tokenize the rows as the task wants them."""
    if card.task_type == "SEQ_CLS":
        return encode_labelled(
            rows, tokenizer, max_length=card.max_length, label_names=card.label_names
        )
    rows = as_choices(rows, card.label_names)
    return encode_rows(rows, tokenizer, template=card.template, max_length=card.max_length)


def _attach(options: TrainOptions, card: TrainingCard, tokenizer: Any) -> PeftModel:
    """Load the base and put the method's adapter on it."""
    upper_for = None
    if options.reuse.resident == "upper":
        num_layers = load_config(options.model.model).get_text_config().num_hidden_layers
        upper_for = build_peft_config(
            options.method, task_type=card.task_type, num_layers=num_layers
        )
    base = load_frozen(options.model, card, tokenizer, upper_for=upper_for)
    # The adapter's start depends on the seed alone, not on what loading the base drew.
    set_seed(options.run.seed)
    model = attach(
        base,
        options.method,
        task_type=card.task_type,
        memory=options.memory,
        chunked_loss=True,
    )
    assert isinstance(model, PeftModel)
    if model.get_nb_trainable_parameters()[0] == 0:
        raise InputError(
            f"method must have something to train, got {options.method.method!r}; choose another"
        )
    return model


def _training_arguments(options: TrainOptions) -> TrainingArguments:
    optim, run = resolve_learning_rate(options.method, options.optim), options.run
    assert optim.lr is not None
    arguments = RunArguments(
        output_dir=str(run.output_dir),
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.gradient_accumulation,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.schedule,
        # A float below 1 is a share of the steps; 1 would be one step.
        warmup_steps=min(optim.warmup_ratio, math.nextafter(1.0, 0.0)),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optim=optim.optim,
        seed=run.seed,
        data_seed=run.seed,
        save_strategy="steps" if run.save_steps else "epoch",
        save_steps=run.save_steps or 500,
        save_total_limit=1,
        logging_steps=run.logging_steps,
        report_to=[name for name in run.report_to.split(",") if name != "none"],
        disable_tqdm=run.quiet or not sys.stderr.isatty(),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=options.model.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # The Trainer would split batches over all GPUs that it sees (DataParallel); the base is on one.
    # Asking for the number first makes it final.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _edits_in_every_batch(config: Any, examples: Sequence[dict[str, Any]]) -> bool:
    """Return whether each parameter is sure to have a gradient in each batch of each process.

    ReFT's do if no prompt is too short for all of a layer's interventions. Of other methods, which
    may reach into experts that no token is sent to, it is not known.
    """
    if not isinstance(config, ReftConfig):
        return False
    needed = num_groups(parse_positions(config.positions), config.tie)  # a token for each
    return all(_num_prompt_tokens(example) >= needed for example in examples)


def _num_prompt_tokens(example: dict[str, Any]) -> int:
    labels = example["labels"]
    if not isinstance(labels, list):  # of a classifier, all of whose tokens are prompt
        return len(example["input_ids"])
    return next(i for i, label in enumerate(labels) if label != IGNORED_LABEL)


def _cuda_peak(device: torch.device) -> dict[str, Any]:
    """The most that was allocated and reserved on the device during the run; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _peak_of_a_step(
    trainer: Trainer, collator: Collator, examples: list[dict[str, Any]], reuse: Reuse | None
) -> dict[str, Any]:
    """Measure one more step on the longest examples: live storages, and what they are for.

    It changes nothing: its gradients are dropped and no optimizer step is taken.
    """
    if processes.shards_model():  # weights come and go, and cannot be told from activations
        return {"peak_bytes": None, "reserved_bytes": None, "breakdown_bytes": None}
    model: Any = trainer.model
    device = device_of(model)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    longest = order[: trainer.args.per_device_train_batch_size]
    batch = collator([examples[index] for index in longest])
    model.train()
    model.zero_grad()
    with track(device.type, model=model) as memory:
        assert trainer.optimizer is not None
        for tensor in optimizer_tensors(trainer.optimizer):
            memory.add(tensor, "optimizer")
        if reuse is not None:
            loss = reuse.loss(longest)
        else:
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        del loss
    model.zero_grad()
    return {
        "peak_bytes": memory.peak_bytes,
        "reserved_bytes": None,
        "breakdown_bytes": memory.peak.breakdown_bytes,
    }


class _LossLines(TrainerCallback):
    """Prints a line for each loss report where there is no terminal to show a bar on."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print it."""
        if logs and "loss" in logs and state.is_world_process_zero:
            print(
                f"step {state.global_step}/{state.max_steps}  epoch {logs['epoch']:.2f}  "
                f"loss {logs['loss']:.4g}  learning rate {logs['learning_rate']:.3g}",
                file=sys.stderr,
            )


@dataclass
class _StepWatch(TrainerCallback):
    """Times optimizer steps; stops the run at the end of a step after Ctrl-C."""

    device: torch.device
    interrupted: bool = False
    total_s: float = 0.0
    _started: float = 0.0
    _steps: list[float] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._synchronize()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock and, after Ctrl-C, the run."""
        self._synchronize()
        self._steps.append(time.perf_counter() - self._started)
        self.total_s += self._steps[-1]
        # All processes stop after the same step, whichever heard of it first.
        self.interrupted = processes.any_of(self.interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def step_time_s(self) -> float | None:
        """Return the median seconds per optimizer step, without the first ones."""
        steps = self._steps[NUM_WARMUP_STEPS:] or self._steps
        return statistics.median(steps) if steps else None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _stop_at_a_step:  # noqa: N801 - used as a context manager, like a function
    """Let the first Ctrl-C end the run after the current step; a second one ends it at once."""

    def __init__(self, watch: _StepWatch) -> None:
        self.watch = watch

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self.watch.interrupted = True
        signal.signal(signal.SIGINT, self._before)

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._on_interrupt)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)
