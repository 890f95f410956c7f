"""Bases whose files are broken, changed or missing."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file, save_file

from malformed.commands import generate, plan
from malformed.fault import Fault, Verdict
from malformed.values import LFS_POINTER, ODD, broken_text, changed, cut, dumps, flipped
from malformed.world import World, replace

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "head_dim"),
)
_OTHER_FIELDS = (
    *("model_type", "architectures", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache"),
    *("attention_dropout", "transformers_version", "quantization_config", "layer_types"),
    *("num_labels", "id2label", "auto_map", "text_config"),
)


def _fault(
    random: Random,
    world: World,
    model: Path,
    what: str,
    verdict: Verdict,
    *,
    generates: bool = False,
    plans: bool = False,
) -> Fault:
    """Make a fault of a command that loads the model."""
    if generates:
        argv, good = generate(world, model=model), generate(world)
    elif plans:
        argv, good = plan(world, model), plan(world)
    else:
        argv, good = world.evaluate(model=model), world.evaluate()
    return Fault(
        what=f"model: {what}",
        argv=argv,
        verdict=verdict,
        names=(str(model), "model"),
        valid=world.result(good) if verdict in ("same", "sound") else None,
    )


def sizes(random: Random, world: World) -> Fault:
    """A size in config.json is not that of the weights, or no size."""
    model = world.copied(world.model)
    config = json.loads((model / "config.json").read_text())
    name = random.choice(_SIZES)
    odd: Any
    if random.random() < 0.4:
        before = config[name]
        odd = random.choice([before + 1, before * 2, before - 1, 10**9, before // 2 or 7])
        what = f"{name} is {odd}"
    else:
        what, odd = random.choice([*ODD, ("missing", ...)])
        what = f"{name} is {what}"
    replace(model / "config.json", dumps(changed(config, (name,), odd)))
    plans = random.random() < 0.3 and odd != 10**9
    # A prediction knows no weights, so another size is another model; several defaults are right.
    whole = type(odd) is int and odd > 0
    verdict: Verdict = "any" if plans and (whole or odd in (..., None)) else "sound"
    if not plans and whole and name != "num_attention_heads":
        verdict = "refused"
    return _fault(random, world, model, what, verdict, plans=plans)


def fields(random: Random, world: World) -> Fault:
    """Another field of config.json has a value that it must not have, or is missing."""
    model = world.copied(world.model)
    config = json.loads((model / "config.json").read_text())
    name = random.choice(_OTHER_FIELDS)
    what, odd = random.choice([*ODD, ("missing", ...)])
    if odd is ... and name not in config:
        odd, what = {"zzz": 1}, "an object"
    replace(model / "config.json", dumps(changed(config, (name,), odd)))
    # Many of these mean something, and then another result is right.
    return _fault(random, world, model, f"{name} is {what}", "any", plans=random.random() < 0.2)


_JSONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def texts(random: Random, world: World) -> Fault:
    """A JSON file of the model is no such file."""
    model, name = world.copied(world.model), random.choice(_JSONS)
    what, data = broken_text(random, (model / name).read_bytes())
    replace(model / name, data)
    # What is not needed to score may be left out, but not be read wrongly.
    verdict: Verdict = "refused" if name in ("config.json", "tokenizer.json") else "sound"
    if name in ("config.json", "tokenizer.json") and what == "a number of 5,000 digits":
        verdict = "sound"
    generates = name == "generation_config.json"
    return _fault(random, world, model, f"{name} is {what}", verdict, generates=generates)


def tokenizers(random: Random, world: World) -> Fault:
    """A field of the tokenizer's files is wrong, or files are missing or those of another one."""
    model = world.copied(world.model)
    name = random.choice(["tokenizer.json", "tokenizer_config.json"])
    content = json.loads((model / name).read_text())
    what = random.choice(["field", "gone", "directory", "field", "vocabulary", "merges"])
    verdict: Verdict = "any"
    if what == "gone":
        (model / name).unlink()
        verdict = "refused" if name == "tokenizer.json" else "any"
    elif what == "directory":
        (model / name).unlink()
        (model / name).mkdir()
        verdict = "refused" if name == "tokenizer.json" else "any"
    elif what == "vocabulary":
        name, content = "tokenizer.json", json.loads((model / "tokenizer.json").read_text())
        word = random.choice(list(content["model"]["vocab"]))
        content["model"]["vocab"][word] = random.choice([10**6, 10**12, -1, 1.5, None, "x", 127])
        replace(model / name, dumps(content))
        what += f" {word!r}"
    elif what == "merges":
        name, content = "tokenizer.json", json.loads((model / "tokenizer.json").read_text())
        content["model"]["merges"] = random.choice([[], None, "x", [["zzz", "yyy"]], [1], {}])
        replace(model / name, dumps(content))
    else:
        path: tuple[Any, ...] = (random.choice(list(content)),)
        value = content[path[0]]
        if isinstance(value, dict) and value and random.random() < 0.7:
            path = (*path, random.choice(list(value)))
        what, odd = random.choice([*ODD, ("missing", ...)])
        replace(model / name, dumps(changed(content, path, odd)))
        what = f"{'.'.join(map(str, path))} is {what}"
    return _fault(random, world, model, f"{name}: {what}", verdict)


def weights(random: Random, world: World) -> Fault:
    """The weights are cut, damaged, incomplete, or no weights."""
    model = world.copied(world.model)
    path = model / "model.safetensors"
    data, tensors = path.read_bytes(), load_file(path)
    name = random.choice(sorted(tensors))
    verdict: Verdict = "refused"
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
            "length",
            "directory",
            "pickle",
            "zeros",
            "tail",
            "dtype",
            "offsets",
            "long",
        ]
    )
    if what == "cut":
        replace(path, cut(random, data))
    elif what == "header":
        (size,) = struct.unpack("<Q", data[:8])
        replace(path, data[:8] + flipped(random, data[8 : 8 + size], 30) + data[8 + size :])
    elif what in ("pointer", "empty", "pickle", "zeros", "long"):
        whole = {"pointer": LFS_POINTER, "empty": b"", "pickle": b"\x80\x04K\x01.", "long": b"\xff"}
        replace(path, whole.get(what, b"\0" * len(data)) * (64 if what == "long" else 1))
    elif what == "gone":
        path.unlink()
    elif what == "directory":
        path.unlink()
        path.mkdir()
    elif what == "tail":
        replace(path, data + random.randbytes(64))
    elif what == "length":
        replace(path, struct.pack("<Q", random.choice([0, 1, 2**40, 2**63])) + data[8:])
    elif what == "offsets":
        replace(path, data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1))
    else:
        verdict = _changed_tensors(random, tensors, name, what)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    return _fault(random, world, model, f"weights: {what} ({name})", verdict)


def _changed_tensors(random: Random, tensors: dict[str, Any], name: str, what: str) -> Verdict:
    tensor = tensors[name]
    if what == "missing":
        del tensors[name]
    elif what == "renamed":
        tensors[name + random.choice(["_zzz", ".weight"])] = tensors.pop(name)
    elif what == "shape":
        tensors[name] = random.choice([tensor[:-1], tensor[None], tensor.flatten()[:-1]]).clone()
    elif what in ("NaN", "Inf"):
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[random.randrange(tensor.numel())] = float(what)
    elif what == "dtype":
        tensors[name] = tensor.double()
        return "same"
    elif what == "more":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
    return "refused"


def shards(random: Random, world: World) -> Fault:
    """The index of several files of weights is wrong, or one of them is."""
    model = world.copied(world.model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number, file in enumerate(files):
        own = names[number::2]
        save_file({name: tensors[name] for name in own}, model / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(own, file)
    verdict: Verdict = "refused"
    what = random.choice(
        [
            "file gone",
            "file cut",
            "not JSON",
            "no map",
            "wrong file",
            "missing",
            "swapped",
            "valid",
            "outside",
            "map of lists",
            "unknown tensor",
            "pointer",
        ]
    )
    name = random.choice(names)
    if what == "file gone":
        (model / files[1]).unlink()
    elif what == "file cut":
        replace(model / files[0], cut(random, (model / files[0]).read_bytes()))
    elif what == "pointer":
        replace(model / files[0], LFS_POINTER)
    elif what == "no map":
        del index["weight_map"]
    elif what == "wrong file":
        index["weight_map"][name] = "model-00003-of-00002.safetensors"
    elif what == "missing":
        del index["weight_map"][name]
        verdict = "sound"
    elif what == "swapped":
        index["weight_map"][name] = files[files[0] == index["weight_map"][name]]
        verdict = "sound"
    elif what == "outside":
        index["weight_map"][name] = "../../../etc/hostname"
    elif what == "map of lists":
        index["weight_map"] = random.choice([[], None, 3, {name: 3}, {name: [files[0]]}])
    elif what == "unknown tensor":
        index["weight_map"]["model.zzz"] = files[0]
        verdict = "sound"
    elif what == "valid":
        verdict = "same"
    text = json.dumps(index)
    if what == "not JSON":
        text = text[: random.randrange(1, len(text) - 2)]
    (model / "model.safetensors.index.json").write_text(text)
    return _fault(random, world, model, f"shards: {what} ({name})", verdict)


_TEMPLATES: tuple[tuple[str, str, Verdict], ...] = (
    ("an open block", "{% for m in messages %}{{ m['content'] }}", "refused"),
    ("an unknown filter", "{{ messages | zzz }}", "refused"),
    ("an unknown call", "{{ zzz(messages) }}", "refused"),
    ("raises", "{{ raise_exception('only for adults') }}", "refused"),
    ("divides by 0", "{{ 1 / 0 }}", "refused"),
    ("imports", "{% import 'os' as os %}{{ os }}", "refused"),
    ("escapes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused"),
    ("no text", "{{ messages[9]['content']['zzz'] }}", "refused"),
    ("empty", "", "any"),
    ("a constant", "hello", "any"),
    ("a wrong key", "{{ messages[0]['zzz'] + 1 }}", "refused"),
    ("a text and a number", "{{ messages[0]['content'] + 1 }}", "refused"),
)


def templates(random: Random, world: World) -> Fault:
    """The chat template cannot be used."""
    model = world.copied(world.model)
    what, text, verdict = random.choice(_TEMPLATES)
    config = json.loads((model / "tokenizer_config.json").read_text())
    if random.random() < 0.5:
        config["chat_template"] = text
    else:
        del config["chat_template"]
        (model / "chat_template.jinja").write_text(text)
    replace(model / "tokenizer_config.json", json.dumps(config))
    data = world.root / "messages.jsonl"
    argv = world.evaluate("--max-new-tokens", "2", model=model, data=data)
    if random.random() < 0.5:
        argv = world.train(world.fresh() / "out", "--data", str(data), model=model)
    return Fault(
        what=f"chat template: {what}",
        argv=argv,
        verdict=verdict,
        names=("template", "messages.jsonl", str(model)),
    )


_GENERATION: tuple[tuple[str, Any], ...] = (
    ("max_new_tokens", 0),
    ("max_length", 1),
    ("eos_token_id", "x"),
    ("eos_token_id", 10**9),
    ("eos_token_id", [[2]]),
    ("pad_token_id", -5),
    ("bos_token_id", None),
    ("temperature", -1),
    ("temperature", "hot"),
    ("top_k", "x"),
    ("num_beams", 0),
    ("num_beams", "x"),
    ("num_return_sequences", 4),
    ("return_dict_in_generate", True),
    ("cache_implementation", "zzz"),
    ("suppress_tokens", [10**9]),
    ("max_time", -1),
    ("zzz", {"a": [1]}),
    ("transformers_version", 3),
    ("stop_strings", 5),
    ("penalty_alpha", 0.6),
    ("use_cache", "no"),
)


def generation(random: Random, world: World) -> Fault:
    """A field of generation_config.json is wrong; greedy answers do not depend on it."""
    model = world.copied(world.model)
    config = json.loads((model / "generation_config.json").read_text())
    name, value = random.choice(_GENERATION)
    replace(model / "generation_config.json", json.dumps({**config, name: value}))
    # Where an answer ends is the configuration's business, so that another end is another answer.
    verdict: Verdict = "any" if name == "eos_token_id" else "sound"
    what = f"generation_config.json: {name} is {value!r}"
    return _fault(random, world, model, what, verdict, generates=True)


KINDS = {
    "models: sizes": (sizes, 120),
    "models: fields": (fields, 110),
    "models: texts": (texts, 70),
    "models: tokenizers": (tokenizers, 100),
    "models: weights": (weights, 140),
    "models: shards": (shards, 60),
    "models: chat templates": (templates, 50),
    "models: generation": (generation, 50),
}
