"""What a run says before it begins: rows as the model sees them, method, steps and memory."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lowmem_reft.base.stored import in_one_line
from lowmem_reft.data.rows import also_trained
from lowmem_reft.data.texts import described
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import dtype_name
from lowmem_reft.machine.terminal import harmless
from lowmem_reft.memory.planner import GIB
from lowmem_reft.memory.verdict import gib
from lowmem_reft.methods.configs import build_peft_config
from lowmem_reft.methods.table import all_options
from lowmem_reft.options.groups import FEWEST_EPOCHS
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.lora_reft import LoraReftConfig
from lowmem_reft.runs.fitting import predicted
from lowmem_reft.runs.marked import end_ids_of, legend, marked, parts_of, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.row import Row
    from lowmem_reft.runs.checkpoints import Checkpoint
    from lowmem_reft.runs.duration import Duration
    from lowmem_reft.runs.resolve import Run

_MOST_CHARACTERS = 480
"""Of the first row, its beginning and its end together."""

_SETTINGS = {
    "rank": ("rank", "r"),
    "layers": ("layers",),
    "positions": ("positions",),
    "alpha": ("lora_alpha",),
    "num_virtual_tokens": ("num_virtual_tokens",),
}
"""What is said of a method, and what an adapter's configuration calls it."""


def say_before(
    run: Run,
    validation: Sequence[Row],
    held_out: Sequence[Row],
    *,
    begun: Checkpoint | None,
    duration: Duration | None,
) -> None:
    """Print it on standard error, unless the run is quiet.

    Args:
        run: The run.
        validation: Rows that are scored meanwhile.
        held_out: Rows that are scored after it.
        begun: The checkpoint that it goes on from; None begins.
        duration: How long it will take; None is not said.
    """
    if run.options.run.quiet:
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for line in (_rows(run), *_first_row(run), _method(run), _steps(run, begun)):
        console.print(line)
    console.print(_memory(run))
    if duration is not None:
        console.print(f"time: {duration}")
    if validation:
        console.print(_validation(run, len(validation)))
    for name, rows in (("validation_data", validation), ("eval_data", held_out)):
        if said := also_trained(rows, run.rows):
            console.print(f"{name}: {said}")


def _rows(run: Run) -> str:
    lengths = [len(example["input_ids"]) for example in run.examples]
    number, num_cut = len(lengths), run.encoded.num_cut_prompts
    what = f"{number:,} from {run.options.data.data}"
    if run.rows[0].messages:
        turns = sum(len(row.messages) for row in run.rows)
        trained = (
            "one for each answer of a chat"
            if run.options.prompts.turns == "all"
            else f"chats of {turns:,} messages, the last of each trained"
        )
        what += f" ({trained})"
    cut = f"{num_cut:,} cut ({num_cut / number:.1%})"
    if num_cut:
        cut += f" by {run.encoded.num_cut_tokens:,} tokens in all, the longest row had "
        cut += f"{run.encoded.longest:,}"
    return harmless(
        f"rows: {what}; tokens: median {statistics.median_low(lengths):,}, longest "
        f"{max(lengths):,} of max_length {run.card.max_length:,}; {cut}"
    )


def _first_row(run: Run) -> tuple[Text, Text]:
    """The first row as the model sees it, shortened in its middle."""
    end_ids = end_ids_of(run.tokenizer, run.config)
    parts = parts_of(run.rows[0], run.examples[0], run.tokenizer, _configs(run)[1], end_ids)
    text = shortened(marked(parts), _MOST_CHARACTERS)
    head = Text(f"first row ({harmless(parts['source'])}), prompt ").append(legend())
    if run.card.task_type == "CAUSAL_LM":
        head.append(harmless(f"({described(run.card.template, run.rows)})"))
    return head, text


def settings_of(run: Run) -> dict[str, Any]:
    """Return a method's settings by name: what was given, and what stands where nothing was."""
    adapter, edit = _configs(run)
    found = all_options(run.options.method)
    for name, names in _SETTINGS.items():
        values = [getattr(config, own, None) for config in (edit, adapter) for own in names]
        known = [value for value in values if value is not None]
        if known and name not in found:
            found[name] = known[0]
    return found


def _method(run: Run) -> str:
    settings = [f"{name} {value}" for name, value in settings_of(run).items() if value is not None]
    stored = f"base {run.card.storage} computed in {dtype_name(run.compute_dtype)}"
    rate = f"learning rate {run.optim.lr:.2g}"
    blocks = f"{run.num_layers} blocks"
    return f"method: {', '.join([str(run.card.method), *settings, rate])}; {stored}, {blocks}"


def _configs(run: Run) -> tuple[Any, ReftConfig | None]:
    """The adapter's configuration, and the one that says which tokens are edited, if any are."""
    adapter: Any = build_peft_config(
        run.options.method, task_type=run.card.task_type, num_layers=run.num_layers
    )
    if isinstance(adapter, LoraReftConfig):
        return adapter, adapter.reft_config()
    return adapter, adapter if isinstance(adapter, ReftConfig) else None


def _steps(run: Run, begun: Checkpoint | None) -> str:
    optim = run.optim
    few = run.options.optim.epochs is None and run.num_epochs > FEWEST_EPOCHS
    why = ", as the rows are few" if few else ""
    length = "" if optim.max_steps > 0 else f" ({optim.epochs:g} epochs{why})"
    on = "" if begun is None else f", on from step {begun.step}"
    rows = processes.effective_batch(optim)
    return f"steps: {run.num_steps:,} of {rows:,} rows{length}, {optim.schedule} schedule{on}"


def _memory(run: Run) -> str:
    if processes.num_processes() > 1:
        return "memory: not predicted for several processes"
    try:
        found = predicted(run)
    except Exception as error:  # of a kind of model that cannot be predicted, but may be trained
        return f"memory: not predicted ({harmless(in_one_line(error))})"
    there = found["memory_bytes"]
    free = "" if there is None else f" of {_size(there)}"
    return (
        f"memory: predicted peak of a step {_size(found['peak_bytes'])}; needs "
        f"{_size(found['required_bytes'])}{free} with loading and what is beside the tensors"
    )


def _size(num_bytes: int) -> str:
    return gib(num_bytes) if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def _validation(run: Run, number: int) -> str:
    every, patience = run.options.choosing.eval_steps, run.options.choosing.patience
    when = "after every epoch" if every is None else f"every {every:,} steps"
    stop = ""
    if patience is not None:
        scores = "1 score that is" if patience == 1 else f"{patience} scores in a row that are"
        stop = f"; {scores} no better end{'s' if patience == 1 else ''} the run"
    return f"validation: {number:,} rows {when}{stop}"
