"""The README.md of a trained adapter: what it is, what it needs and what was measured.

It is written from the run itself, in the form that the hub reads, and replaces PEFT's template.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lowmem_reft.data.mixture import parts_of
from lowmem_reft.machine.devices import device_name, dtype_name
from lowmem_reft.machine.markdown import code, fenced, plain, table
from lowmem_reft.options import CHAT_TEMPLATE, TrainOptions, written

if TYPE_CHECKING:
    from lowmem_reft.methods.card import TrainingCard
    from lowmem_reft.options import TrainOptions
    from lowmem_reft.runs.resolve import Run

_TASKS = ("text-classification", "text-generation")
"""The hub's names: of other tasks, of a language model's."""

_UNSAID = {"json", "quiet", "resume", "overwrite"}
"""Options that say nothing about the adapter."""

_FILES = {"model", "validation_data", "eval_data"}
"""Options whose text may be a file or a folder; the others that name one hold a ``Path``."""

_SETTINGS = (
    *("rank", "r", "alpha", "lora_alpha", "layers", "positions", "tie", "component", "act", "init"),
    *("dropout", "lora_dropout", "num_virtual_tokens"),
)
"""Of the adapter's configuration, under PEFT's names or ours."""


def write_model_card(run: Run, result: dict[str, Any]) -> None:
    """Write ``README.md`` beside the adapter, from what ``run_training`` returns so far."""
    card, parts = run.card, parts_of(run.options.data.data)
    name = run.directory.resolve().name
    data = ModelCardData(
        base_model=None if Path(card.base).exists() else card.base,
        library_name="peft",
        pipeline_tag=_TASKS[card.task_type == "CAUSAL_LM"],
        tags=["lowmem-reft", str(card.method)],
        datasets=[part.source for part in parts if not Path(part.source).exists()] or None,
        model_name=name,
        eval_results=_eval_results(run, result),
    )
    text = "\n\n".join(_sections(run, result, name))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(run.adapter_dir / "README.md")


def command_of(options: TrainOptions, num_processes: int = 1) -> str:
    """Return the command that trains the same again, without the directories of this machine."""
    start = ["lowmem-reft"]
    if num_processes > 1:
        start = ["accelerate", "launch", "--num_processes", str(num_processes)]
        start += ["-m", "lowmem_reft.cli"]
    words = written.flags(options, without=_UNSAID, text=_shareable)
    return shlex.join([*start, "train", *words])


def _shareable(name: str, value: Any) -> str:
    if name == "data":
        return ",".join(
            _portable(part.source) + (f"@{part.weight:g}" if part.weight != 1 else "")
            for part in parts_of(value)
        )
    return _portable(value) if isinstance(value, Path) or name in _FILES else str(value)


def _portable(value: Any) -> str:
    """Leave out the directories above a file or folder that is named absolutely."""
    path = Path(str(value))
    return path.name if path.is_absolute() and path.name else str(value)


def _sections(run: Run, result: dict[str, Any], name: str) -> list[str]:
    options, card = run.options, run.card
    base, is_local = _portable(card.base), Path(card.base).exists()
    where = (
        f"a local directory named {code(base)}, which is not on the hub: say where it is from, and "
        "set `base_model_name_or_path` in `adapter_config.json`, before you share this"
        if is_local
        else f"[{code(base)}](https://huggingface.co/{quote(base)})"
    )
    launched = "; Accelerate's own configuration is not named" * (result["num_processes"] > 1)
    facts = [
        ("base", where),
        ("checkpoint digest", card.base_digest and code(card.base_digest)),
        ("stored as", f"`{card.storage}`, computed in `{dtype_name(run.compute_dtype)}`"),
        ("method", f"`{card.method}`, {result['num_trainable_params']:,} trained parameters"),
        ("settings", _settings(run.adapter_dir)),
        ("training", _training(run, result)),
        ("training rows", f"{result['num_examples']:,}, SHA-256 `{card.data_digest}`"),
        (
            "prompts",
            f"{_template(card)}, at most {card.max_length} tokens with the answer",
        ),
        ("seed", card.seed),
    ]
    return [
        f"# {plain(name)}",
        f"A `{card.method}` adapter, trained with lowmem-reft. On another base, or one that is "
        "stored otherwise, it may answer differently; loading it there says so.",
        _table(facts),
        "## Use",
        fenced(_usage(card, base, is_local=is_local), "python"),
        "The first line registers ReFT with PEFT, which without it ends in `KeyError: 'REFT'`.",
        "## Measured",
        _table([*_scores(result), *_costs(result)]),
        f"Trained on {plain(device_name(options.model.device))}.",
        "## Command",
        fenced(command_of(options, result["num_processes"]), "bash"),
        f"Absolute paths are shortened to their last part{launched}.",
        "## Versions",
        _table(list(result["versions"].items()), ("package", "version")),
    ]


def _template(card: TrainingCard) -> str:
    if card.template == CHAT_TEMPLATE:
        return "by the tokenizer's chat template"
    return code(repr(card.template))


def _settings(directory: Path) -> str:
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    given = {name: config[name] for name in _SETTINGS if config.get(name) not in (None, 0.0)}
    return ", ".join(f"{name} {code(value)}" for name, value in given.items())


def _training(run: Run, result: dict[str, Any]) -> str:
    optim = run.optim
    length = f"{optim.max_steps} steps" if optim.max_steps > 0 else f"{optim.epochs:g} epochs"
    if result.get("stopped_early"):
        length += f" (stopped early after {result['num_steps']} steps)"
    batch = f"{optim.batch_size} x {optim.gradient_accumulation} accumulation"
    if result["num_processes"] > 1:
        batch += f" x {result['num_processes']} processes"
    return (
        f"`{optim.optim}`, peak rate {optim.lr:g} ({optim.schedule}), {length}, batches of "
        f"{result['effective_batch']} ({batch})"
    )


def _usage(card: TrainingCard, base: str, *, is_local: bool) -> str:
    more = "" if card.compute_dtype == "auto" else f', compute_dtype="{card.compute_dtype}"'
    if card.task_type != "CAUSAL_LM":
        more += f', task_type="{card.task_type}"'
    if card.num_classes is not None:
        more += f", num_labels={card.num_classes}"
    where = f"PATH/TO/{base}" if is_local else base
    lines = [
        "import lowmem_reft as lr",
        "from peft import PeftModel",
        "",
        f'base = lr.load_base({json.dumps(where)}, storage="{card.storage}"{more})',
        'model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the hub',
    ]
    if card.method == "prefix":  # PEFT 0.21 names a cache otherwise than transformers 5.24 does
        lines.insert(1, "from lowmem_reft.methods.attach import complete")
        lines.append("complete(model)  # so that the base reads the prefix in generate, too")
    return "\n".join(lines)


def _scores(result: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("training loss", f"{result['train_loss']:.4g}")]
    if "validation_value" in result:
        best = next(e for e in result["validation"] if e["epoch"] == result["best_epoch"])
        value = f"{result['validation_value']:.4g}, epoch {result['best_epoch']:g} of the run"
        rows.append((f"validation {best['metric']}", value))
    if "eval" in result:
        score = result["eval"]
        rows.append((f"test {score['metric']}", f"{score['value']:.4g}"))
        if score["metric"] != "accuracy" and "accuracy" in score:
            rows.append(("test accuracy", f"{score['accuracy']:.4g}"))
        rows.append(("test rows", score["num_examples"]))
        if score["metric"] != "loss" and "loss" in score:
            rows.append(("test loss", f"{score['loss']:.4g}"))
    return rows


def _costs(result: dict[str, Any]) -> list[tuple[str, Any]]:
    peak, speed = result.get("peak_bytes"), result.get("tokens_per_s")
    return [
        ("peak memory of a step", peak and f"{peak / 2**20:,.1f} MiB"),
        ("speed", speed and f"{speed:,.0f} tokens/s"),
        ("optimizer steps", result["num_steps"]),
    ]


def _table(rows: list[tuple[str, Any]], head: tuple[str, str] = ("", "")) -> str:
    return table([(name, str(value)) for name, value in rows if value is not None], head)


def _eval_results(run: Run, result: dict[str, Any]) -> list[EvalResult] | None:
    """Return the test score in the form of the hub's model index."""
    held_out = run.options.held_out
    if "eval" not in result or held_out.eval_data is None:
        return None
    name, score = _portable(held_out.eval_data), result["eval"]
    score = EvalResult(
        task_type=_TASKS[run.card.task_type == "CAUSAL_LM"],
        dataset_type=name,
        dataset_name=name,
        dataset_split=held_out.eval_split,
        metric_type=score["metric"],
        metric_value=score["value"],
    )
    return [score]
