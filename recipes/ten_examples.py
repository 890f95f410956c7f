"""Ten examples, one minute: teach a model ten answers and a manner of speaking.

Aim: the shortest use of the Python API, ``run_training`` and ``run_generation``. LoReFT learns ten
rows of very simple English, which are in this file, on a frozen NF4 base. What the model says is
shown before and after, for the ten prompts and for three that say the same in other words. An
answer is in the manner if it begins with "Oh" and ends with "The end.", as all ten do.

Command, from the repository root::

    python recipes/ten_examples.py
    python recipes/ten_examples.py --model DIR_OR_HUB_ID

Expected on one CPU core, 2026-11: with the model that the package ships, all ten answers word for
word, and nonsense for other words: it knows Python's manual, not stories. 98,688 parameters, an
adapter of 397 kB, 13 MiB at the peak of a step, 27 s of one core in all. With a TinyStories Llama
of 3 M parameters the ten answers too, and all three paraphrases in the manner ("Oh yes! Dad gave
him a hug. The end."): 147,840 parameters, 594 kB, 16 MiB, 31 s.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paper import RecipeConfig, run_recipe
from rich.console import Console
from rich.table import Table

from lowmem_reft.data.embedded import model_dir
from lowmem_reft.errors import check_counts, check_positive
from lowmem_reft.machine.devices import device_name
from lowmem_reft.machine.provenance import commit, versions
from lowmem_reft.options import (
    DataOptions,
    DecodingOptions,
    GenerateOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    Storage,
    TrainOptions,
)
from lowmem_reft.runs.generate import run_generation
from lowmem_reft.runs.train import run_training

ROWS = [
    ("Tim was sad.", "Oh dear! Mom gave him a hug. The end."),
    ("The cat was in a tree.", "Oh no! A man took it down. The end."),
    ("Lily lost her red ball.", "Oh no! The dog found it. The end."),
    ("It was very cold.", "Oh my! Dad made a fire. The end."),
    ("The bird could not fly.", "Oh dear! The kids gave it food. The end."),
    ("Ben wanted a cake.", "Oh yes! Grandma made one. The end."),
    ("The little car was stuck.", "Oh no! All the friends had to push. The end."),
    ("Sue was afraid of the dark.", "Oh dear! The moon came out. The end."),
    ("The fish was all alone.", "Oh my! A frog came to play. The end."),
    ("It started to rain.", "Oh yes! We ran out to jump. The end."),
]
ENDING = "The end."
PARAPHRASES = [
    "Tim was very sad today.",
    "Lily could not find her ball.",
    "The rain started to fall.",
]


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """What to run."""

    model: str = str(model_dir())
    """Hub id or directory of the base; default: the one that the package ships."""
    storage: Storage = "nf4"
    """How the frozen weights are stored."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    rank: int = 64
    """Rank of LoReFT, on all blocks and prompt tokens; 4 is enough for billions of parameters."""
    lr: float = 2e-2
    """Peak learning rate; lower it (4e-3) for billions of parameters."""
    epochs: float = 200
    """Passes over the ten rows; each is one optimizer step."""
    seed: int = 0
    """Of the adapter's start and the order of the rows."""
    output_dir: Path = Path("ten-examples")
    """Takes the adapter, the answers and results.json."""
    overwrite: bool = False
    """Replace what a run with other settings has left there."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_counts(rank=self.rank)
        check_positive(lr=self.lr, epochs=self.epochs)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(base: ModelOptions, prompts: Path, adapter: Path | None) -> list[str]:
    """Let the base, or the base with the adapter, answer every prompt of a file."""
    output = prompts.with_suffix(".before.jsonl" if adapter is None else ".after.jsonl")
    run_generation(
        GenerateOptions(
            model=base,
            adapter=None if adapter is None else str(adapter),
            input=prompts,
            output=output,
            overwrite=True,
            decoding=DecodingOptions(max_new_tokens=40),
            batch_size=len(ROWS),
            quiet=True,
        )
    )
    lines = output.read_text(encoding="utf-8").splitlines()
    return [up_to_the_end(json.loads(line)["response"]) for line in lines]


def up_to_the_end(text: str) -> str:
    """Cut what follows the first "The end.": a base that never saw its EOS does not stop."""
    story, end, _ = text.partition(ENDING)
    return (story + end).strip()


def is_in_manner(text: str) -> bool:
    """Whether an answer begins and ends as all ten do."""
    return text.startswith("Oh") and text.endswith(ENDING)


def main(config: Config) -> dict[str, Any]:
    """Answer, train, answer again; write ``results.json``."""
    started = time.perf_counter()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "response": response} for prompt, response in ROWS]
    data = write_rows(config.output_dir / "rows.jsonl", rows)
    files = {
        "trained": data,
        "paraphrased": write_rows(
            config.output_dir / "paraphrases.jsonl", [{"prompt": prompt} for prompt in PARAPHRASES]
        ),
    }
    base = ModelOptions(model=config.model, storage=config.storage, device=config.device)
    before = {name: answer(base, file, adapter=None) for name, file in files.items()}
    trained = run_training(
        TrainOptions(
            model=base,
            data=DataOptions(data=str(data)),
            method=MethodOptions(method="loreft", rank=config.rank, positions="all"),
            optim=OptimOptions(
                epochs=config.epochs, batch_size=len(ROWS), lr=config.lr, schedule="cosine"
            ),
            reuse=ReuseOptions(reuse="off"),
            run=RunOptions(
                output_dir=config.output_dir / "run",
                seed=config.seed,
                overwrite=config.overwrite,
                quiet=True,
            ),
        )
    )
    adapter = Path(trained["adapter_dir"])
    after = {name: answer(base, file, adapter=adapter) for name, file in files.items()}
    prompts = {"trained": [prompt for prompt, _ in ROWS], "paraphrased": PARAPHRASES}
    result = {
        "config": {key: str(value) for key, value in asdict(config).items()},
        "answers": [
            {"kind": kind, "prompt": prompt, "before": old, "after": new}
            for kind in files
            for prompt, old, new in zip(prompts[kind], before[kind], after[kind], strict=True)
        ],
        "num_exact": {
            name: sum(text == right for text, (_, right) in zip(texts, ROWS, strict=True))
            for name, texts in (("before", before["trained"]), ("after", after["trained"]))
        },
        "num_paraphrased_in_manner": {
            name: sum(map(is_in_manner, texts["paraphrased"]))
            for name, texts in (("before", before), ("after", after))
        },
        "num_trainable_params": trained["num_trainable_params"],
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "peak_bytes": trained["peak_bytes"],
        "train_loss": trained["loss_history"][-1][1] if trained["loss_history"] else None,
        "train_time_s": trained["train_time_s"],
        "wall_s": time.perf_counter() - started,
        "device": device_name(config.device),
        "versions": versions(),
        "commit": commit(),
    }
    print_answers(result, Console(stderr=True))
    (config.output_dir / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def print_answers(result: dict[str, Any], console: Console) -> None:
    """Print what was said before and after, and what that took."""
    table = Table("prompt", "before", "after", show_lines=True)
    for row in result["answers"]:
        table.add_row(*(" ".join(row[name].split()) for name in ("prompt", "before", "after")))
    console.print(table, markup=False)
    exact, manner = result["num_exact"], result["num_paraphrased_in_manner"]
    console.print(
        f"exact answers: {exact['before']} of {len(ROWS)} before, {exact['after']} after; "
        f"paraphrases answered in the manner: {manner['before']} of {len(PARAPHRASES)} before, "
        f"{manner['after']} after\n"
        f"{result['num_trainable_params']:,} parameters, "
        f"adapter {result['adapter_bytes']:,} bytes, "
        f"peak {result['peak_bytes'] / 2**20:.1f} MiB, training {result['train_time_s']:.1f} s, "
        f"everything {result['wall_s']:.1f} s",
        highlight=False,
    )


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
