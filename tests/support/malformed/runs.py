"""Directories of runs, comparisons and searches, files of answers, and places to write to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from malformed.commands import (
    PYREFT,
    TIE,
    compared,
    comparison,
    generate,
    importing,
    sweep,
    swept,
    valid,
)
from malformed.fault import Fault, Ran, Verdict
from malformed.values import ODD, broken_text, changed, cut, dumps, flipped
from malformed.world import World, replace


def _trained(directory: Path) -> Callable[[Ran], Any]:
    """Return what a training has left in a directory: weights, losses and epochs, but no times."""

    def result(_ran: Ran) -> Any:
        kept = json.loads((directory / "result.json").read_text())
        for line in kept.get("validation") or ():
            line.pop("train_time_s", None)
        weights = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
        return [weights, *(kept.get(name) for name in ("loss_history", "validation", "best_epoch"))]

    return result


def checkpoints(random: Random, world: World) -> Fault:
    """A run that is to go on has a broken directory; it ends as it would have, or is refused."""
    run = world.copied(world.resumable(), linked=False)
    (checkpoint,) = run.glob("checkpoint-*")
    files = [run / "run.json", run / "epochs.jsonl", run / "best.safetensors"]
    files += [path for path in checkpoint.iterdir() if path.is_file()]
    path = random.choice(sorted(files))
    what = random.choice(["cut", "empty", "flipped", "gone", "directory", "text", "field"])
    data = path.read_bytes()
    verdict: Verdict = "sound"
    if what == "cut":
        path.write_bytes(cut(random, data))
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "flipped":
        path.write_bytes(flipped(random, data, 20))
        verdict = "any" if path.suffix not in (".safetensors",) else "sound"
    elif what in ("gone", "directory"):
        path.unlink()
        if what == "directory":
            path.mkdir()
    elif path.suffix == ".json":
        content = json.loads(data)
        name = random.choice(list(content))
        how, odd = random.choice([*ODD, ("missing", ...)])
        verdict = "any"
        if what == "text":
            how, text = broken_text(random, data)
            path.write_bytes(text)
            name = "all of it"
        else:
            path.write_text(dumps(changed(content, (name,), odd)))
        what = f"{name} is {how}"
    else:
        path.write_bytes(random.randbytes(100))
    whole = world.undisturbed()
    return Fault(
        what=f"--resume: {path.relative_to(run)}: {what}",
        argv=world.resume(run),
        verdict=verdict,
        valid=_trained(whole)(Ran(code=0, out="", err="")),
        result=_trained(run),
        names=(run.name, path.name, "resume", "checkpoint"),
    )


def cells(random: Random, world: World) -> Fault:
    """The result of a cell is broken: the cell is run again."""
    path = _compared(world)
    results = sorted(path.glob("cells/*/result.json"))
    result = random.choice(results)
    content = json.loads(result.read_text())
    how, odd = random.choice([*ODD, ("missing", ...)])
    if random.random() < 0.4:
        how, text = broken_text(random, result.read_bytes())
        result.write_bytes(text)
    else:
        name = random.choice([*content, "value", "value", "metric", "key", "error"])
        result.write_text(dumps(changed(content, (name,), odd)))
        how = f"{name} is {how}"
    argv = comparison(world, path)
    return Fault(
        what=f"a cell's result.json: {how}",
        argv=argv,
        verdict="sound" if how[:5] in ("value", "metri", "key i") else "any",
        valid=_table(world.result(comparison(world, compared(world)))),
        result=lambda ran: _table(ran.figures()),
        names=(result.name, "output_dir", result.parent.name),
    )


def _table(figures: dict[str, Any]) -> list[Any]:
    """Return what a comparison says that does not depend on where it is."""
    return [[row[name] for name in ("method", "value_mean")] for row in figures["rows"]]


def _compared(world: World) -> Path:
    path = world.fresh() / "out"
    shutil.copytree(compared(world), path)
    return path


def searches(random: Random, world: World) -> Fault:
    """``sweep.json`` is broken."""
    path = world.fresh() / "out"
    shutil.copytree(swept(world), path)
    file = path / "sweep.json"
    content = json.loads(file.read_text())
    verdict: Verdict = "sound"
    if random.random() < 0.4:
        how, text = broken_text(random, file.read_bytes())
        file.write_bytes(text)
    else:
        place: tuple[Any, ...] = (random.choice(list(content)),)
        if random.random() < 0.7:
            searched = content["searches"][0]
            place = ("searches", 0, random.choice(list(searched)))
            if random.random() < 0.7:
                place = ("searches", 0, "trials", 0, random.choice(list(searched["trials"][0])))
        how, odd = random.choice([*ODD, ("missing", ...)])
        file.write_text(dumps(changed(content, place, odd)))
        how = f"{'.'.join(map(str, place))} is {how}"
        # Measurements are taken as they are written.
        verdict = "any"
    return Fault(
        what=f"sweep.json: {how}",
        argv=sweep(world, path),
        verdict=verdict,
        valid=world.result(sweep(world, swept(world)), of=_best),
        result=_best,
        names=("sweep.json", "output_dir"),
    )


def _best(ran: Ran) -> Any:
    return [(row["method"], row["value"]) for row in ran.figures()["best"]]


def reports(random: Random, world: World) -> Fault:
    """``results.json``, or a prediction, is broken."""
    path = _compared(world)
    file = path / "results.json"
    content = json.loads(file.read_text())
    verdict: Verdict = "any"
    number = random.randrange(len(content))
    if random.random() < 0.4:
        how, text = broken_text(random, file.read_bytes())
        file.write_bytes(text)
        verdict = "any" if how == "a number of 5,000 digits" else "refused"
    else:
        name = random.choice([*content[number], "method", "task", "seed", "value", "validation"])
        how, odd = random.choice([*ODD, ("missing", ...)])
        file.write_text(dumps(changed(content, (number, name), odd)))
        how = f"{name} is {how}"
        if name in ("method", "task", "seed") and odd is ...:
            verdict = "refused"
    return Fault(
        what=f"results.json: {how}",
        argv=["report", str(path), "--output-dir", str(path.parent / "page"), "--json", "--quiet"],
        verdict=verdict,
        names=("results.json",),
    )


def answers(random: Random, world: World) -> Fault:
    """A file of answers that is to be completed is broken, or another's."""
    output = world.fresh() / "answers.jsonl"
    asked = world.root / "response.jsonl"
    argv = ["generate", "--model", str(world.model), "--input", str(asked), "--output", str(output)]
    argv += ["--max-new-tokens", "4", "--storage", "fp32", "--device", "cpu", "--quiet", "--json"]
    done = world.root / "answers"
    if not done.is_dir():
        done.mkdir()
        place = argv.index("--output") + 1
        world.result([*argv[:place], str(done / "answers.jsonl"), *argv[place + 1 :]])
    good = (done / "answers.jsonl").read_bytes()
    for path in done.iterdir():
        shutil.copy2(path, output.parent)
    lines = good.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[: random.randrange(1, 4)]))
    path = random.choice([output, output.with_name("answers.jsonl.run.json")])
    data = path.read_bytes()
    what = random.choice(["cut", "flipped", "random", "gone", "directory", "field", "blank"])
    verdict: Verdict = "sound"
    if what == "cut":
        path.write_bytes(cut(random, data))
    elif what == "flipped":
        path.write_bytes(flipped(random, data, 3))
    elif what == "random":
        path.write_bytes(random.randbytes(50))
    elif what in ("gone", "directory"):
        path.unlink()
        if what == "directory":
            path.mkdir()
    elif what == "blank":
        path.write_bytes(b"\n" + data)
    elif path == output:
        how, odd = random.choice(ODD)
        first = json.loads(lines[0])
        text = dumps(changed(first, (random.choice(list(first)),), odd))
        path.write_bytes(text.encode() + b"\n")
        what = f"a field is {how}"
    else:
        content = json.loads(data)
        name = random.choice(list(content))
        how, odd = random.choice([*ODD, ("missing", ...)])
        path.write_text(dumps(changed(content, (name,), odd)))
        what = f"{name} is {how}"
        verdict = "sound"
    if path == output and ("field" in what or what == "flipped"):
        verdict = "any"  # an answer is a text like any other
    return Fault(
        what=f"{path.name}: {what}",
        argv=argv,
        verdict=verdict,
        valid=good,
        result=lambda _ran: output.read_bytes(),
        names=(output.name, "output"),
    )


def _outputs(world: World) -> list[tuple[str, str, list[str]]]:
    """Return commands with an option that names a place to write to, without it."""
    train = valid(world, "train")
    place = train.index("--output-dir")
    adapter = str(world.trained("loreft") / "adapter")
    return [
        ("train", "--output-dir", train[:place] + train[place + 2 :]),
        ("train", "--reuse-dir", [*train[:place], *train[place:], "--reuse", "trunk"]),
        ("evaluate", "--predictions", world.evaluate()),
        ("evaluate", "--reuse-dir", world.evaluate("--adapter", adapter, "--reuse", "trunk")),
        ("generate", "--output", generate(world)),
        ("compare", "--output-dir", _without(comparison(world, Path("x")), "--output-dir")),
        ("sweep", "--output-dir", _without(sweep(world, Path("x")), "--output-dir")),
        ("report", "--output-dir", ["report", str(compared(world)), "--json", "--quiet"]),
        ("profile", "--output-dir", _without(valid(world, "profile"), "--output-dir")),
        ("import-pyreft", "--output-dir", _without(importing(PYREFT, "x"), "--output-dir")),
        ("export-pyreft", "--output-dir", ["export-pyreft", adapter, "--json"]),
    ]


def _without(argv: list[str], flag: str) -> list[str]:
    place = argv.index(flag)
    return argv[:place] + argv[place + 2 :]


_FILES = ("--predictions", "--output")


def outputs(random: Random, world: World) -> Fault:
    """A place to write to cannot be written to."""
    command, option, argv = random.choice(_outputs(world))
    directory = world.fresh()
    is_file = option in _FILES
    (directory / "file").write_text("mine")
    (directory / "full").mkdir()
    (directory / "full" / "mine.txt").write_text("mine")
    wrong: dict[str, Path] = {
        "below a file": directory / "file" / "out",
        "a circle of links": directory / "loop",
        "a long name": directory / ("n" * 300),
        "a system's own": Path("/proc/out"),
        "of the system": Path("/sys/out/x"),
        "an empty text": Path(""),
    }
    (directory / "loop").symlink_to(directory / "loop")
    if is_file:
        wrong |= {"a directory": directory / "full", "a full disk": Path("/dev/full")}
    else:
        wrong |= {"a file": directory / "file", "a device": Path("/dev/null")}
    if command in ("import-pyreft", "export-pyreft"):
        wrong["a directory with files"] = directory / "full"
    what = random.choice(list(wrong))
    text = "" if what == "an empty text" else str(wrong[what])
    verdict: Verdict = {"an empty text": "any", "a full disk": "full"}.get(what, "refused")  # type: ignore[assignment]
    if command == "evaluate" and option == "--reuse-dir":
        argv = _without(argv, "--reuse-dir") if "--reuse-dir" in argv else argv
    return Fault(
        what=f"{command} {option} is {what}",
        argv=[*argv, option, text],
        verdict=verdict,
        names=(option[2:].replace("-", "_"), option, text, str(wrong[what].parent)),
    )


def inputs_as_outputs(random: Random, world: World) -> Fault:
    """What is to be written is what is read."""
    data = world.fresh() / "data.jsonl"
    shutil.copy2(world.root / "response.jsonl", data)
    way = random.choice(["same", "link", "hard link", "relative"])
    other = data
    if way == "link":
        other = data.with_name("link.jsonl")
        other.symlink_to(data)
    elif way == "hard link":
        other = data.with_name("hard.jsonl")
        os.link(data, other)
    elif way == "relative":
        other = data.parent / ".." / data.parent.name / data.name
    answering = [*_without(generate(world), "--prompt"), "--input", str(data)]
    argv = [
        world.evaluate("--max-new-tokens", "2", "--predictions", str(other), data=data),
        [*answering, "--output", str(other)],
        [*answering, "--output", str(other), "--overwrite"],
    ][random.randrange(3)]
    return Fault(
        what=f"{argv[0]} writes to what it reads: {way}",
        argv=argv,
        verdict="refused",
        names=("predictions", "output"),
    )


def judges(random: Random, world: World) -> Fault:
    """A judge says something else than preferences, or files do not belong together."""
    response, other = world.root / "response.jsonl", world.fresh() / "second.jsonl"
    rows = [json.loads(line) for line in response.read_text().splitlines()]
    commands = {
        "nothing": "true",
        "fails": "false",
        "unknown": "zzz-no-such-program",
        "an open quote": "sed 's/",
        "empty": "",
        "no JSON": "sed s/.*/x/",
        "a list": "sed 's/.*/[1]/'",
        "NaN": """sed 's/.*/{"probability": NaN}/'""",
        "2": """sed 's/.*/{"probability": 2}/'""",
        "a text": """sed 's/.*/{"probability": "x"}/'""",
        "third": """sed 's/.*/{"preferred": "third"}/'""",
        "null": """sed 's/.*/null/'""",
        "a list preferred": """sed 's/.*/{"preferred": []}/'""",
        "one line": "head -n 1",
        "no UTF-8": """sed 's/.*/\\xff/'""",
        "digits": f"""sed 's/.*/{{"probability": {"9" * 5000}}}/'""",
    }
    what = random.choice([*commands, "fewer rows", "other prompts", "no rows", "messages"])
    command = commands.get(what, TIE)
    if what == "fewer rows":
        rows = rows[:-1]
    elif what == "other prompts":
        rows[1]["prompt"] = "zzz"
    elif what == "no rows":
        rows = []
    elif what == "messages":
        rows[0] = {
            "messages": random.choice([[], None, "x", [1], [{"role": "user"}]]),
            "response": "x",
        }
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Fault(
        what=f"judge: {what}",
        argv=["judge", str(response), str(other), "--command", command],
        verdict="refused",
        names=("judge", "second.jsonl", "command"),
    )


def pyreft(random: Random, world: World) -> Fault:
    """A checkpoint of pyreft is broken."""
    directory = world.copied(PYREFT)
    path = random.choice(sorted(directory.iterdir()))
    data = path.read_bytes()
    verdict: Verdict = "refused"
    what = random.choice(["cut", "empty", "gone", "directory", "other"])
    if what == "cut":
        replace(path, cut(random, data))
    elif what == "empty":
        replace(path, b"")
    elif what in ("gone", "directory"):
        path.unlink()
        if what == "directory":
            path.mkdir()
    elif path.suffix == ".json":
        what, text = broken_text(random, data)
        replace(path, text)
    else:
        replace(path, random.choice([b"\x80\x04K\x01.", random.randbytes(99), b"PK\x03\x04"]))
    if path.suffix == ".json" and what in ("gone", "directory", "a number of 5,000 digits"):
        verdict = "any"
    output = str(world.fresh() / "out")
    argv = importing(directory, output)
    return Fault(
        what=f"pyreft: {path.name} is {what}",
        argv=argv,
        verdict=verdict,
        names=(str(directory), path.name, "directory"),
    )


KINDS = {
    "runs: --resume": (checkpoints, 90),
    "runs: answers": (answers, 110),
    "runs: judges": (judges, 60),
    "runs: outputs": (outputs, 160),
    "runs: inputs as outputs": (inputs_as_outputs, 30),
    "compare: cells": (cells, 60),
    "compare: searches": (searches, 80),
    "compare: reports": (reports, 90),
    "pyreft": (pyreft, 50),
}
