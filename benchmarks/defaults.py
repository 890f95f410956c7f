"""What is lost by giving no options: training as it comes beside a search, on three sets.

``python -m benchmarks.defaults --model DIR --data-dir DIR --output-dir OUT --output FILE`` searches
LoReFT (three multiples of its rate at each of three places) and QLoRA (three multiples) on
validation rows of each set, then trains what ``lowmem-reft train`` takes by itself and what was the
best there, three seeds each, and scores both on test rows. Of these the search chooses by none, and
reads one, as a comparison must. Sets: TREC, SST-2, and made-up sentences with six emotions.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import environment
from lowmem_reft.compare import run_comparison
from lowmem_reft.compare.lr_search import best_of
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import write_json, write_text_whole
from lowmem_reft.options import CompareOptions, Workers, written

ENTRIES = {
    "loreft": (
        "loreft",
        "loreft[positions=all,layers=upper:0.5]",
        "loreft[positions=all,layers=all]",
    ),
    "qlora": ("qlora",),
}
"""What is searched for each method, as it comes first. What comes by itself may be one of these."""

MULTIPLES = "0.3,1,3"

EMOTIONS = "emotions"
SETS = (EMOTIONS, "sst2", "trec")

_CUES = {
    "anger": (
        "shouted at the man who broke the fence",
        "slammed the door and would not speak",
        "was cheated by the shop again",
        "could not forgive what had been said",
        "kicked the chair across the room",
        "told them all to get out",
    ),
    "fear": (
        "heard steps in the dark house",
        "hid under the bed until morning",
        "did not dare to open the letter",
        "was shaking when the storm came near",
        "ran from the big dog",
        "could not sleep for thinking of the test",
    ),
    "joy": (
        "laughed and danced all evening",
        "won the race at last",
        "sang on the way home",
        "got the puppy that was promised",
        "smiled at the sunny morning",
        "had the best birthday of all",
    ),
    "love": (
        "kissed the baby good night",
        "held her hand for a long time",
        "missed him every hour of the day",
        "wrote a tender letter to his wife",
        "hugged mom and did not let go",
        "will always care for the old cat",
    ),
    "sadness": (
        "cried when the bird died",
        "sat alone and did not eat",
        "lost the toy that grandpa had made",
        "said goodbye for ever",
        "wept over the old pictures",
        "had nobody to play with",
    ),
    "surprise": (
        "had never expected the visit",
        "stared at the huge box with open mouth",
        "did not believe what was in the bag",
        "gasped when the light went on",
        "found a coin in the bread",
        "woke up and there was snow in May",
    ),
}
_WHO = ("I", "She", "He", "Tom", "Lily", "The girl", "My friend", "The old man")
_WHEN = ("today", "last night", "after school", "in the end", "as we all know", "by the river")
_OTHER = ("while the others", "and nobody saw that the neighbour", "though her brother")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run."""

    model: str
    """Hub id or directory of the base."""
    data_dir: Path | None = None
    """Directory with the public files; default: their hub ids."""
    sets: tuple[str, ...] = SETS
    """Sets, of these three."""
    limit: int = 240
    """Training rows."""
    validation_limit: int = 200
    """Validation rows, by which the search chooses."""
    eval_limit: int = 200
    """Test rows."""
    seeds: str = "0,1,2"
    """Of what is scored; the search takes the first one."""
    workers: Workers = 1
    """Cells that run at the same time."""
    output_dir: Path = Path("defaults")
    """A directory per set; finished cells there are not run again."""
    output: Path | None = None
    """File for the JSON, in which other bases and sets stay; default: the standard output alone."""


def main(config: Config) -> int:
    """Search, train and score on each set; print and keep one JSON object per set and method."""
    record = environment()
    found = [{**line, **record} for name in config.sets for line in measure(config, name)]
    print(json.dumps(found, indent=1))
    if config.output is not None:
        kept = _read(config.output) if config.output.exists() else []
        measured = {(line["model"], line["set"]) for line in found}
        others = [line for line in kept if (line["model"], line["set"]) not in measured]
        write_json(config.output, [*others, *found])
    return 0


def measure(config: Config, name: str) -> list[dict[str, Any]]:
    """Return a line per method: what it had as it comes, and as the search would have it."""
    folder = config.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows_of(config, name, folder)
    common = {
        "model": config.model,
        "limit": config.limit,
        "validation_limit": config.validation_limit,
        "workers": config.workers,
        "quiet": True,
        **rows,
    }
    run_comparison(
        written.build(
            CompareOptions,
            **common,
            methods=",".join(entry for entries in ENTRIES.values() for entry in entries),
            lr_search=MULTIPLES,
            seeds=config.seeds.split(",")[0],
            eval_limit=1,  # a comparison must have one
            output_dir=folder / "search",
        )
    )
    trials = _trials(_read(folder / "search" / "results.json"))
    chosen = {method: best(tried) for method, tried in trials.items()}
    run_comparison(
        written.build(
            CompareOptions,
            **common,
            methods=",".join(dict.fromkeys([*ENTRIES, *chosen.values()])),
            seeds=config.seeds,
            eval_limit=config.eval_limit,
            output_dir=folder / "scored",
        )
    )
    scored = _read(folder / "scored" / "results.json")
    return [
        {
            "model": Path(config.model).name,
            "set": name,
            "method": method,
            "as_it_comes": _figures(scored, method),
            "searched": _figures(scored, chosen[method]),
            "trials": trials[method],
        }
        for method in ENTRIES
    ]


def best(trials: list[dict[str, Any]]) -> str:
    """Return the entry of the trial that ``--lr-search`` would choose among all of a method."""
    chosen = best_of(trials)
    if chosen is None:
        raise InputError(f"every trial failed, the last one by: {trials[-1]['error']}")
    return str(chosen["entry"])


def emotion_rows(number: int, seed: int, *, trained: bool) -> list[dict[str, Any]]:
    """Return rows of a made-up sentence with six emotions to choose from.

    Who a sentence is about does what tells the emotion; in half of them somebody else does
    something that tells another one. What they do is of one half of the list where the rows are
    ``trained`` on and of the other where not, so that words that were seen tell nothing.
    """
    draw = random.Random(seed)
    emotions = list(_CUES)
    half = slice(None, None, 2) if trained else slice(1, None, 2)
    cues = {name: acts[half] for name, acts in _CUES.items()}
    rows = []
    for _ in range(number):
        emotion, other = draw.sample(emotions, 2)
        text = f"{draw.choice(_WHO)} {draw.choice(cues[emotion])} {draw.choice(_WHEN)}"
        if draw.random() < 0.5:
            text += f", {draw.choice(_OTHER)} {draw.choice(cues[other])}"
        prompt = f"Sentence: {text}.\nEmotion:"
        answer = emotions.index(emotion)
        rows.append({"prompt": prompt, "choices": emotions, "answer": answer})
    return rows


def _rows_of(config: Config, name: str, folder: Path) -> dict[str, Any]:
    """The options of a comparison that say which rows it reads."""
    if name != EMOTIONS:
        return {"tasks": name, "data_dir": config.data_dir}
    sizes = {
        "data": config.limit,
        "validation_data": config.validation_limit,
        "eval_data": config.eval_limit,
    }
    for seed, (part, number) in enumerate(sizes.items()):
        made = emotion_rows(number, seed, trained=part == "data")
        rows = (json.dumps(row) for row in made)
        write_text_whole(folder / f"{part}.jsonl", "\n".join([*rows, ""]))
    return {part: str(folder / f"{part}.jsonl") for part in sizes}


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _trials(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each method's trials, with the entry that repeats each: at its own rate, it names none."""
    own = MULTIPLES.split(",").index("1")
    searched = iter([row["lr_search"] for row in results if row["lr_search"]])
    return {
        method: [
            {**trial, "entry": entry if index == own else trial["method"]}
            for entry in entries
            for index, trial in enumerate(next(searched))
        ]
        for method, entries in ENTRIES.items()
    }


def _figures(results: list[dict[str, Any]], method: str) -> dict[str, Any]:
    rows = [row for row in results if row["method"] == method]
    first = rows[0]
    return {
        "entry": method,
        "values": [row["value"] for row in rows],
        "mean": statistics.fmean(row["value"] for row in rows),
        "metric": first["metric"],
        **{name: first[name] for name in ("num_trainable_params", "peak_bytes", "command")},
    }


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
