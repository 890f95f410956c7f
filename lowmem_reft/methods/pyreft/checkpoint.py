"""Reads a directory that pyreft saved. No code in it is run, and no class it names is imported.

``save`` writes ``config.json`` and one ``intkey_{key}.bin`` per intervention; the Trainer's
checkpoints have the ``.bin`` files alone, in ``intervenable_model``. Keys, the older ones with dots
for underscores:

    layer_15_comp_block_output_unit_pos_nunit_1#0
    comp_model_layers[15]_output_unit_pos_nunit_1#0

The number at the end counts the interventions at one place: with untied sides, #0 edits the first
tokens of the prompt and #1 the last ones.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_reft.base.stored import are_finite, is_pointer, not_whole, some
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json
from lowmem_reft.methods.pyreft.parameters import KINDS, check_tensors, fitting_classes

CONFIG = "config.json"
WEIGHTS_OF_BASE = "pytorch_model.bin"

_KEY = re.compile(
    r"(?:layer_(?P<layer>\d+)_)?(?:comp|repr)_(?P<component>.+)_unit_(?P<unit>.+)_nunit_"
    r"(?P<num_units>.+)#(?P<group>\d+)"
)
_PATH = re.compile(r"(?P<blocks>.+?)(?:\[(?P<index>\d+)\]|_(?P<number>\d+))(?P<below>_.+)?_output")
_CLASS = re.compile(r"(?:<class ')?(?P<module>\w+(?:\.\w+)*)\.(?P<name>\w+)(?:'>)?")


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where one intervention edits, as its key says."""

    layer: int
    """0-based block."""
    group: int
    """Which of the interventions at this place."""
    component: str
    """Name of pyreft's, or the path below the block ("" or "_mlp") where ``blocks`` is given."""
    blocks: str | None = None
    """Path of the list of blocks, with underscores for dots; None: the key names no path."""


@dataclass(frozen=True, kw_only=True)
class PyreftCheckpoint:
    """What a directory of pyreft's holds, checked."""

    class_name: str
    """Of all its interventions, a key of ``parameters.KINDS``."""
    interventions: dict[Location, dict[str, Tensor]]
    """Tensors of each."""
    rank: int
    """Of all of them."""
    hidden_size: int
    """Width of the vectors that they edit."""
    base_weights: dict[str, Tensor]
    """Weights of the base that were trained beside them, by name."""
    is_interleaved: bool
    """Whether config.json lists an untied layer's interventions one after the other."""
    files: dict[Location, str]
    """Where each was read from, for messages."""

    @property
    def layers(self) -> list[int]:
        """The blocks that are edited."""
        return sorted({place.layer for place in self.interventions})

    @property
    def num_groups(self) -> int:
        """Interventions per layer."""
        return len({place.group for place in self.interventions})


def read_checkpoint(directory: Path, class_name: str | None = None) -> PyreftCheckpoint:
    """Read what pyreft, or its Trainer, saved; ``class_name`` is for where that cannot be told.

    Raises:
        InputError: There is no such directory, a file is missing or damaged, it would run code, or
            its interventions are too different from each other for one adapter.
    """
    directory = _find(directory)
    config = _load_config(directory)
    files = {_location(path): path for path in sorted(directory.glob("intkey_*.bin"))}
    keys = _expected_keys(config, directory, files)
    tensors = {place: load_tensors(path) for place, path in files.items()}
    class_name = _class_name(config, directory, class_name, tensors, files)
    sizes = {
        place: check_tensors(class_name, held, str(files[place])) for place, held in tensors.items()
    }
    _check_alike(sizes, files)
    rank, hidden_size = next(iter(sizes.values()))
    weights = directory / WEIGHTS_OF_BASE
    groups = [int(key.rpartition("#")[2]) for key in keys]
    return PyreftCheckpoint(
        class_name=class_name,
        interventions=tensors,
        rank=rank,
        hidden_size=hidden_size,
        base_weights=load_tensors(weights) if weights.is_file() else {},
        is_interleaved=groups != sorted(groups),
        files={place: str(path) for place, path in files.items()},
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of ``torch.save`` that holds tensors by name.

    Raises:
        InputError: It is damaged, holds something else or NaN, or would run code.
    """
    if path.is_file() and (is_pointer(path) or not path.stat().st_size):
        raise not_whole(path, "a whole file of torch.save", ValueError())
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} must hold tensors only, got a pickle that would run code or is damaged; "
            "nothing of it was run: have it saved again by pyreft, from where it comes"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} must be a whole file of torch.save, got a damaged one "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); fetch it "
            "again"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} must hold tensors by name, got {type(content).__name__}; is it a file that "
            "pyreft saved?"
        )
    tensors = {
        str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)
    }
    wrong = [name for name, value in tensors.items() if not are_finite(value)]
    if wrong:
        raise InputError(
            f"{path} must hold finite numbers, got NaN or infinity in {some(wrong)}; train it "
            "again, or fetch it again"
        )
    return tensors


def _find(directory: Path) -> Path:
    for path in (directory, directory / "intervenable_model"):
        if any(path.glob("intkey_*.bin")):
            return path
    checkpoints = sorted(
        path.parent for path in directory.glob("checkpoint-*/intervenable_model") if path.is_dir()
    )
    if len(checkpoints) == 1:
        return _find(checkpoints[0])
    hint = (
        f"give one of {', '.join(map(str, checkpoints))}"
        if checkpoints
        else "give the directory that pyreft's save wrote, or a checkpoint-N of its Trainer"
    )
    raise InputError(
        f"directory must hold intkey_*.bin files of pyreft, got {str(directory)!r}; {hint}"
    )


def _load_config(directory: Path) -> dict[str, Any] | None:
    path = directory / CONFIG
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} must be JSON, got {error}; fetch it again") from error
    lists = ("representations", "intervention_types")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in lists):
        raise InputError(
            f"{path} must have the lists {' and '.join(lists)}, as pyreft writes them; fetch it "
            "again, or move it away to go by the .bin files alone"
        )
    return content


def _location(path: Path) -> Location:
    key = path.name.removeprefix("intkey_").removesuffix(".bin")
    match = _KEY.fullmatch(key.replace(".", "_"))
    if match is None:
        raise InputError(
            f"{path} must be named like intkey_layer_15_comp_block_output_unit_pos_nunit_1#0.bin, "
            "as pyreft names it; give it its name back"
        )
    if (match["unit"], match["num_units"]) != ("pos", "1"):
        raise InputError(
            f"{path} must edit single token positions (unit_pos_nunit_1), got unit "
            f"{match['unit']!r} and {match['num_units']} at once, which ReFT here does not do; "
            "train it again on positions"
        )
    group = int(match["group"])
    if match["layer"] is not None:
        return Location(layer=int(match["layer"]), group=group, component=match["component"])
    where = _PATH.fullmatch(match["component"])
    if where is None:
        raise InputError(
            f"{path} must edit the output of a block or of a part of one, got "
            f"{match['component']!r}; it cannot be an adapter here"
        )
    return Location(
        layer=int(where["index"] or where["number"]),
        group=group,
        component=where["below"] or "",
        blocks=where["blocks"],
    )


def _expected_keys(
    config: dict[str, Any] | None, directory: Path, files: Mapping[Location, Path]
) -> list[str]:
    """Check that every file is there; return the keys in the order of config.json, if it says."""
    present = {path.name for path in files.values()}
    if len(files) != len(list(directory.glob("intkey_*.bin"))):
        raise InputError(
            f"{directory} must hold one file per intervention, got the same place in the old and "
            f"in the new style: {', '.join(sorted(present))}; remove one of the two"
        )
    groups = {group: {p.layer for p in files if p.group == group} for group in range(len(files))}
    groups = {group: layers for group, layers in groups.items() if layers}
    layers = {place.layer for place in files}
    if len(groups) * len(layers) != len(files) or list(groups) != list(range(len(groups))):
        raise InputError(
            f"{directory} must hold as many interventions for every layer, got "
            f"{', '.join(sorted(present))}; one adapter ties all layers alike: fetch what is "
            "missing"
        )
    if config is None:
        return []
    keys = [str(key) for key in config.get("sorted_keys") or []]
    missing = [f"intkey_{key}.bin" for key in keys if f"intkey_{key}.bin" not in present]
    if missing or len(files) != len(config["representations"]):
        raise InputError(
            f"{directory} must hold a file for each of the {len(config['representations'])} "
            f"representations of {CONFIG}, got {len(files)}; fetch "
            f"{', '.join(missing) or 'them all'} again"
        )
    return keys


def _class_name(
    config: dict[str, Any] | None,
    directory: Path,
    given: str | None,
    tensors: Mapping[Location, Mapping[str, Tensor]],
    files: Mapping[Location, Path],
) -> str:
    """Say which class all interventions are of: by config.json, the user, or the tensors."""
    said = [] if config is None else list(dict.fromkeys(map(str, config["intervention_types"])))
    if len(said) > 1:
        raise InputError(
            f"{directory / CONFIG} must name one intervention_type for all, got "
            f"{', '.join(said)}; one adapter here has one intervention"
        )
    if said:
        match = _CLASS.fullmatch(said[0])
        known = match is not None and match["module"].split(".")[0] == "pyreft"
        if match is not None and known and match["name"] in KINDS:
            if given not in (None, match["name"]):
                raise InputError(
                    f"intervention must be {match['name']}, as {directory / CONFIG} says, got "
                    f"{given!r}; leave it out"
                )
            return match["name"]
        if given is None:
            raise InputError(
                f"{directory / CONFIG} must name one of pyreft's {', '.join(KINDS)}, got "
                f"{said[0]!r}; if that computes what one of these does, say which with "
                "--intervention"
            )
    if given is not None:
        return given
    first = next(iter(files))
    fitting = fitting_classes(tensors[first])
    if len(fitting) == 1:
        return fitting[0]
    found = " or ".join(fitting) or "no intervention of pyreft's"
    raise InputError(
        f"intervention must be given for {directory}, which has no {CONFIG}: the tensors of "
        f"{files[first].name} are those of {found}; add --intervention with pyreft's class"
    )


def _check_alike(sizes: Mapping[Location, tuple[int, int]], files: Mapping[Location, Path]) -> None:
    """Refuse interventions that one configuration cannot describe."""
    first = next(iter(sizes))
    for place, size in sizes.items():
        facts = {
            "component": [f"{at.blocks or ''}{at.component}" for at in (first, place)],
            "rank and width": [" of ".join(map(str, pair)) for pair in (sizes[first], size)],
        }
        for name, (one, other) in facts.items():
            if one != other:
                raise InputError(
                    f"{files[place].parent} must have one {name} for all interventions, got "
                    f"{one} in {files[first].name} and {other} in {files[place].name}; one adapter "
                    "here has one, so import them apart, as two adapters"
                )
