"""Adapters and stores whose files are broken, changed or missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace as replaced
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file, save_file

from malformed.commands import generate
from malformed.fault import Fault, Verdict
from malformed.values import LFS_POINTER, ODD, broken_text, changed, cut, dumps, flipped
from malformed.world import World, replace

_WEIGHTS = "adapter_model.safetensors"
_DECIDES = {
    "loreft": ("peft_type", "rank", "layers", "positions", "tie", "component", "init", "act"),
    "lora": (
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "use_dora",
        "fan_in_fan_out",
    ),
}


def _of(random: Random, world: World) -> tuple[str, Path]:
    method = random.choice(["loreft", "lora"])
    return method, world.copied(world.trained(method) / "adapter")


def _fault(
    random: Random, world: World, method: str, adapter: Path, what: str, verdict: Verdict
) -> Fault:
    good = str(world.trained(method) / "adapter")
    if random.random() < 0.3:
        argv = generate(world, "--adapter", str(adapter))
        valid = generate(world, "--adapter", good)
    else:
        argv, valid = world.evaluate("--adapter", str(adapter)), world.evaluate("--adapter", good)
    return Fault(
        what=f"{method}: {what}",
        argv=argv,
        verdict=verdict,
        names=(str(adapter), "adapter"),
        valid=world.result(valid) if verdict in ("same", "sound") else None,
    )


def configs(random: Random, world: World) -> Fault:
    """A field of adapter_config.json has a value that it must not have, or is missing."""
    method, adapter = _of(random, world)
    content = json.loads((adapter / "adapter_config.json").read_text())
    decides = random.random() < 0.5
    name = random.choice(_DECIDES[method] if decides else list(content))
    what, odd = random.choice([*ODD, ("missing", ...)])
    if odd is ... and name not in content:
        odd, what = "zzz", "a text"
    replace(adapter / "adapter_config.json", dumps(changed(content, (name,), odd)))
    # A default or an unused field may have the value; what decides the edit is another adapter.
    return _fault(random, world, method, adapter, f"{name} is {what}", "any")


def shapes(random: Random, world: World) -> Fault:
    """adapter_config.json says another shape than the weights have."""
    method, adapter = _of(random, world)
    content = json.loads((adapter / "adapter_config.json").read_text())
    wrong: dict[str, tuple[Any, ...]] = {
        "loreft": (
            *(("rank", 1), ("rank", 3), ("rank", 10**9), ("layers", [0]), ("layers", [0, 1, 9])),
            *(("tie", "sides"), ("positions", "f0"), ("positions", "zzz"), ("layers", [])),
            *(("peft_type", "LORA"), ("peft_type", "IA3"), ("peft_type", "ZZZ"), ("tie", "zzz")),
            *(("component", "zzz"), ("intervention", "zzz"), ("act", "zzz")),
        ),
        "lora": (
            *(("r", 1), ("r", 3), ("r", 10**6), ("target_modules", ["zzz"]), ("use_dora", True)),
            *(("target_modules", ["q_proj"]), ("target_modules", []), ("peft_type", "REFT")),
            *(("peft_type", "IA3"), ("peft_type", "ADALORA"), ("r", -2), ("bias", "zzz")),
            *(("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 1})),
        ),
    }
    name, value = random.choice(wrong[method])
    replace(adapter / "adapter_config.json", json.dumps({**content, name: value}))
    verdict: Verdict = "refused"
    return _fault(random, world, method, adapter, f"{name} is {value!r}", verdict)


def texts(random: Random, world: World) -> Fault:
    """A JSON file of the adapter is no such file."""
    method, adapter = _of(random, world)
    name = random.choice(["adapter_config.json", "training.json"])
    what, data = broken_text(random, (adapter / name).read_bytes())
    replace(adapter / name, data)
    verdict: Verdict = "sound" if what == "a number of 5,000 digits" else "refused"
    return _fault(random, world, method, adapter, f"{name} is {what}", verdict)


def cards(random: Random, world: World) -> Fault:
    """A field of training.json has a value that it must not have, or is missing."""
    method, adapter = _of(random, world)
    content = json.loads((adapter / "training.json").read_text())
    name = random.choice(list(content))
    what, odd = random.choice([*ODD, ("missing", ...)])
    replace(adapter / "training.json", dumps(changed(content, (name,), odd)))
    kind = {"template": str, "max_length": int, "task_type": str, "storage": str}.get(name)
    kind = {"compute_dtype": str}.get(name, kind)
    wrong = kind is not None and odd is not ... and odd is not None and type(odd) is not kind
    verdict: Verdict = "refused" if wrong and name != "storage" else "any"
    if name in ("task_type", "template") and odd == "zzz":
        verdict = "refused"
    if name == "max_length" and type(odd) is int and odd < 1:
        verdict = "refused"
    return _fault(random, world, method, adapter, f"training.json: {name} is {what}", verdict)


def ends(random: Random, world: World) -> Fault:
    """What training.json says of where an answer ends is what no training writes."""
    method, adapter = _of(random, world)
    content = json.loads((adapter / "training.json").read_text())
    wrong: tuple[tuple[str, Any], ...] = (
        *(("choices", odd) for odd in ("good", 5, True, {}, [], [5], [None], [["good"]])),
        *(("choices", odd) for odd in ([""], [" "], [" good"], ["good", "good"], ["g" * 101])),
        ("choices", [f"{number}" for number in range(65)]),
        *(("has_end", odd) for odd in ("yes", 1, 0.5, [], {})),
    )
    name, value = random.choice(wrong)
    replace(adapter / "training.json", json.dumps({**content, name: value}))
    what = f"training.json: {name} is {str(value)[:40]}"
    return replaced(
        _fault(random, world, method, adapter, what, "refused"), names=("training.json", name)
    )


def weights(random: Random, world: World) -> Fault:
    """The adapter's weights are cut, damaged, incomplete, or no weights."""
    method, adapter = _of(random, world)
    path = adapter / _WEIGHTS
    data, tensors = path.read_bytes(), load_file(path)
    name = random.choice(sorted(tensors))
    tensor, verdict = tensors[name], "refused"
    what = random.choice(
        [
            "cut",
            "header",
            "pointer",
            "empty",
            "gone",
            "missing",
            "renamed",
            "shape",
            "NaN",
            "Inf",
            "more",
            "directory",
            "tail",
            "dtype",
            "all renamed",
            "none",
            "other method",
            "layer",
        ]
    )
    if what == "cut":
        replace(path, cut(random, data))
    elif what == "header":
        replace(path, data[:8] + flipped(random, data[8:200], 20) + data[200:])
    elif what in ("pointer", "empty"):
        replace(path, LFS_POINTER if what == "pointer" else b"")
    elif what == "tail":
        replace(path, data + random.randbytes(16))
    elif what in ("gone", "directory"):
        path.unlink()
        if what == "directory":
            path.mkdir()
    elif what == "other method":
        other = world.trained("lora" if method == "loreft" else "loreft") / "adapter" / _WEIGHTS
        replace(path, other.read_bytes())
    else:
        if what == "missing":
            del tensors[name]
        elif what == "renamed":
            tensors[name + "_zzz"] = tensors.pop(name)
        elif what == "all renamed":
            tensors = {f"zzz.{key}": value for key, value in tensors.items()}
        elif what == "none":
            tensors = {}
        elif what == "layer":
            tensors = {key.replace("layers.0", "layers.9"): v for key, v in tensors.items()}
            tensors = {key.replace("reft_phi.0", "reft_phi.9"): v for key, v in tensors.items()}
            if name in tensors and all(key in load_file(path) for key in tensors):
                del tensors[name]
        elif what == "shape":
            tensors[name] = random.choice([tensor[:-1], tensor[None], tensor.flatten()]).clone()
            if tensors[name].shape == tensor.shape:
                tensors[name] = tensor[:-1].clone()
        elif what in ("NaN", "Inf"):
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[random.randrange(tensor.numel())] = float(what)
        elif what == "dtype":
            tensors[name], verdict = tensor.double(), "same"
        elif what == "more":
            tensors["base_model.model.zzz"] = tensor.clone()
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    return _fault(random, world, method, adapter, f"weights: {what} ({name})", verdict)  # type: ignore[arg-type]


def stores(random: Random, world: World) -> Fault:
    """A store is damaged: it is built again, or not used; listing and removing it work."""
    root = world.copied(world.store, linked=False)
    (store,) = (path for path in root.iterdir() if path.is_dir())
    what = _damage(random, store)
    command = random.choice(["use", "use", "ls", "rm"])
    if command == "use":
        argv, verdict = world.evaluate(*world.from_store(root)), "same"
        valid = world.result(world.evaluate(*world.from_store(world.store)))
    else:
        argv, verdict, valid = ["reuse", command, "--reuse-dir", str(root), "--json"], "any", None
        argv += ["--all"] if command == "rm" else []
    if what in ("a file instead", "a manifest that is a directory"):
        verdict, valid = "any", None
    return Fault(
        what=f"store: {what}, {command}",
        argv=argv,
        verdict=verdict,  # type: ignore[arg-type]
        valid=valid,
        names=("reuse", str(root)),
    )


def _damage(random: Random, store: Path) -> str:
    manifest, shards = store / "manifest.json", sorted(store.glob("shard-*.bin"))
    shard = random.choice(shards)
    what = random.choice(["shard", "manifest", "field", "field", "text", "place"])
    if what == "shard":
        how, data = random.choice(
            [
                ("cut", cut(random, shard.read_bytes())),
                ("flipped", flipped(random, shard.read_bytes())),
                ("empty", b""),
                ("longer", shard.read_bytes() + b"\x00" * 16),
                ("zeros", b"\x00" * shard.stat().st_size),
            ]
        )
        shard.write_bytes(data)
        return f"shard {how}"
    if what == "text":
        how, data = broken_text(random, manifest.read_bytes())
        manifest.write_bytes(data)
        return f"manifest is {how}"
    if what == "place":
        how = random.choice(["gone", "a shard gone", "a file instead"])
        if how == "gone":
            manifest.unlink()
        elif how == "a shard gone":
            shard.unlink()
        else:
            shutil.rmtree(store)
            store.write_text("zzz")
        return how
    content: dict[str, Any] = json.loads(manifest.read_text())
    path: tuple[Any, ...] = (random.choice(list(content)),)
    if what == "field" and random.random() < 0.6:
        path = ("shards", random.choice(list(content["shards"])))
    how, odd = random.choice([*ODD, ("missing", ...)])
    manifest.write_text(dumps(changed(content, path, odd)))
    return f"manifest: {'.'.join(path)} is {how}"


KINDS = {
    "adapters: configs": (configs, 110),
    "adapters: shapes": (shapes, 80),
    "adapters: texts": (texts, 50),
    "adapters: training.json": (cards, 80),
    "adapters: ends of answers": (ends, 40),
    "adapters: weights": (weights, 110),
    "stores": (stores, 110),
}
