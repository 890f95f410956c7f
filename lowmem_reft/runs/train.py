"""One fine-tuning run: rows, a frozen base and a named method go in, an adapter comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import set_seed

from lowmem_reft.data.rows import load_rows
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.files import write_json
from lowmem_reft.machine.provenance import versions
from lowmem_reft.machine.run_files import write_run_file
from lowmem_reft.methods.attach import attach
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.methods.loading import load_frozen
from lowmem_reft.runs.before import say_before
from lowmem_reft.runs.directory import held, prepare_directory, save_whole
from lowmem_reft.runs.dry_run import dry_run
from lowmem_reft.runs.duration import predict_duration
from lowmem_reft.runs.finite import check_score
from lowmem_reft.runs.fit import fit
from lowmem_reft.runs.fitting import fit_into_memory
from lowmem_reft.runs.outputs import check_training
from lowmem_reft.runs.packing import refuse_early
from lowmem_reft.runs.publish import check_repository, make_repository, publish
from lowmem_reft.runs.readme import write_model_card
from lowmem_reft.runs.resolve import resolve
from lowmem_reft.runs.score import ScoringSettings, check_scoring, rows_to_score, score
from lowmem_reft.runs.tracking import Trackers
from lowmem_reft.runs.validation import BestEpoch

if TYPE_CHECKING:
    from pathlib import Path

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import TrainOptions
    from lowmem_reft.runs.checkpoints import Checkpoint
    from lowmem_reft.runs.resolve import Run


def run_training(options: TrainOptions) -> dict[str, Any]:
    """Train one adapter, save it to ``output_dir/adapter`` and write ``output_dir/result.json``.

    Returns:
        ``adapter_dir``, ``train_loss`` (mean over the steps of all processes),
        ``num_trainable_params``, ``trainable_percent``, ``num_steps``, ``step_time_s`` (median),
        ``tokens_per_s``, ``packing`` (on or off), ``real_percent`` (of the tokens that were
        computed, those of rows), ``peak_bytes`` (live storages of a step on the longest
        examples; on CUDA the most that was allocated), ``breakdown_bytes`` (of that step, by
        category), ``reserved_bytes`` (CUDA), ``rss_bytes`` (peak of the process),
        ``loss_history`` ([step, loss] pairs), ``num_cut_prompts``, ``reuse`` (the mode used),
        ``store_bytes``, ``build_time_s``, ``stopped_early`` (before its last step, by
        ``patience``), ``versions``; with
        ``validation_data`` ``validation`` (a score per epoch, or every ``eval_steps``),
        ``best_epoch``, whose weights the adapter has, and ``validation_value``; with ``eval_data``
        ``eval`` and ``eval_accuracy`` (None where nothing but the loss was asked for); with
        ``push_to_hub`` ``hub_url``. With
        ``dry_run`` what ``dry_run.dry_run`` says instead, with ``predicted_s`` and
        ``time`` (the same in words, or why it is None); nothing is loaded or written.

    Raises:
        InputError: An option, a file or a row is wrong.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved and ``--resume`` goes on from it.
    """
    processes.start(options.model.device)
    if not processes.is_main():
        options = replace(options, run=replace(options.run, quiet=True))
    else:
        check_training(options)
        if options.hub.push_to_hub is not None:
            check_repository(options.hub.push_to_hub)
    set_seed(options.run.seed)
    run = resolve(options)
    check_scoring(options.scoring)
    refuse_early(run)
    validation, held_out = _read_held_out(run, "validation"), _read_held_out(run, "eval")
    run = fit_into_memory(run)
    if options.run.dry_run:
        duration = predict_duration(run, validation, held_out, _scoring_settings(run))
        say_before(run, validation, held_out, begun=None, duration=duration)
        return {**dry_run(run), "predicted_s": duration.predicted_s, "time": str(duration)}
    with held(run):
        run_id, begun = prepare_directory(run, validation)
        if processes.is_main():
            write_run_file(run.directory, "train", run.options, **run.as_resolved)
            make_repository(run)
        if not run.options.run.quiet:
            scoring = _scoring_settings(run)
            duration = predict_duration(run, validation, held_out, scoring, begun=begun)
            say_before(run, validation, held_out, begun=begun, duration=duration)
        return _train(run, validation, held_out, run_id, begun)


def _train(
    run: Run,
    validation: list[Row],
    held_out: list[Row],
    run_id: str,
    begun: Checkpoint | None,
) -> dict[str, Any]:
    """Train in a directory that nobody else writes to; see ``run_training``."""
    model, settings = _attach(run), _scoring_settings(run)

    def scored(rows: list[Row], of: str) -> dict[str, Any]:
        summary = score(model, run.tokenizer, rows, run.card, settings).summary()
        check_score(summary, of, run)
        return summary

    best = None
    if validation:
        best = BestEpoch(
            model,
            lambda: scored(validation, "validation_data"),
            run.directory,
            begun,
            run.options.choosing,
        )
    with Trackers(run) as trackers:
        result = fit(model, run, best, trackers, run_id=run_id, begun=begun)
        _save_adapter(model, run)
        result = {"adapter_dir": str(run.adapter_dir), **result, "versions": versions()}
        _record(run, result)
        if held_out and (processes.is_main() or processes.shards_model()):
            result["eval"] = scored(held_out, "eval_data")
            result["eval_accuracy"] = result["eval"].get("accuracy")
            _record(run, result)
        trackers.log(result)
    if run.options.hub.push_to_hub is not None and processes.is_main():
        result["hub_url"] = publish(run)
    return result


def _read_held_out(run: Run, kind: str) -> list[Row]:
    """Read rows to score before the training, so that a wrong file does not cost the run."""
    chosen = vars(run.options.held_out)
    source, split, limit = (chosen[f"{kind}_{name}"] for name in ("data", "split", "limit"))
    rows = [] if source is None else load_rows(source, split=split, limit=limit)
    return rows_to_score(
        rows,
        run.tokenizer,
        run.card,
        _scoring_settings(run),
        run.options.prompts,
        run.limits,
        num_virtual=run.num_virtual,
    )


def _attach(run: Run) -> PeftModel:
    """Load the base and put the method's adapter on it."""
    options, task_type = run.options, run.card.task_type
    upper_for = None
    if options.reuse.resident == "upper":
        upper_for = build_peft_config(
            options.method, task_type=task_type, num_layers=run.num_layers
        )
    base = load_frozen(
        options.model, run.card, run.tokenizer, config=run.config, upper_for=upper_for
    )
    # The adapter's start depends on the seed alone, not on what loading the base drew.
    set_seed(options.run.seed)
    model = attach(
        base, options.method, task_type=task_type, memory=options.memory, chunked_loss=True
    )
    assert isinstance(model, PeftModel)
    if model.get_nb_trainable_parameters()[0] == 0:
        raise InputError(
            f"method must have something to train, got {options.method.method!r}; choose another"
        )
    return model


def _scoring_settings(run: Run) -> ScoringSettings:
    options = run.options
    reuse, kept = options.reuse, options.reuse.reuse_dir
    if processes.shards_model():  # a store is made of a whole base
        reuse, kept = replace(reuse, reuse="off"), None
    elif reuse.resident == "upper":
        kept = run.reuse_dir
    return ScoringSettings(
        **vars(options.scoring), quiet=options.run.quiet, reuse=reuse, reuse_dir=kept
    )


def _save_adapter(model: PeftModel, run: Run) -> None:
    """Write the adapter and its card, from the first process alone."""
    state = None
    if processes.shards_model():
        state = {**model.state_dict(), **processes.trained_values(model)}

    def write(directory: Path) -> None:
        model.save_pretrained(str(directory), state_dict=state)
        run.card.save(directory)

    if processes.is_main():
        save_whole(run.directory, write)


def _record(run: Run, result: dict[str, Any]) -> None:
    """Write the adapter's README.md and ``result.json``, which marks the run as finished."""
    if processes.is_main():
        write_model_card(run, result)
        write_json(run.directory / "result.json", result)
