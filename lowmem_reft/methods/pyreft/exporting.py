"""``lowmem-reft export-pyreft``: an adapter becomes a folder that pyreft 0.1.0 loads."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights
from torch import Tensor

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import write_json, write_text_whole
from lowmem_reft.machine.markdown import code
from lowmem_reft.methods.card import find_adapter, load_card
from lowmem_reft.methods.pyreft.checkpoint import CONFIG, WEIGHTS_OF_BASE
from lowmem_reft.methods.pyreft.importing import check_empty
from lowmem_reft.methods.pyreft.notes import export_notes
from lowmem_reft.methods.pyreft.parameters import KINDS, to_pyreft
from lowmem_reft.methods.saved import read_config, read_shapes, weights_file
from lowmem_reft.options import ExportPyreftOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.peft_method import type_of

README = "README.md"

_CLASSES = {kind.name: class_name for class_name, kind in KINDS.items()}
_KEY = re.compile(
    r"base_model\.model\.\D*?(?P<layer>\d+)(?P<path>\..*)?\.reft\.reft_phi\.(?P<group>\d+)\."
    r"(?P<name>.+)"
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter folder holds."""

    config: ReftConfig
    """Its configuration."""
    interventions: dict[tuple[int, int], dict[str, Tensor]]
    """Parameters by name, of each group and layer, in the order that pyreft lists them in."""
    heads: dict[str, Tensor]
    """Weights of the base that are saved with it, by the base's names."""
    base: str | None
    """The base's name, if it is written down."""


def run_export(options: ExportPyreftOptions) -> dict[str, Any]:
    """Write ``config.json``, the ``.bin`` files and a README with what pyreft does not store.

    Returns:
        ``output_dir``, ``intervention`` (pyreft's class), ``rank``, ``num_interventions``,
        ``readme`` and ``notes``, a list of sentences.

    Raises:
        InputError: The adapter cannot be read, or pyreft cannot express it.
    """
    check_empty(options.output_dir)
    adapter = _read(find_adapter(options.adapter_dir))
    config = adapter.config
    class_name = _CLASSES[config.intervention]
    written = {
        f"layer_{layer}_comp_{config.component}_unit_pos_nunit_1#{group}": to_pyreft(
            class_name, parameters
        )
        for (group, layer), parameters in adapter.interventions.items()
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for key, tensors in written.items():
        torch.save(tensors, options.output_dir / f"intkey_{key}.bin")
    if adapter.heads:
        torch.save(adapter.heads, options.output_dir / WEIGHTS_OF_BASE)
    first = next(iter(adapter.interventions.values()))
    width = next(tensor.shape[1] for tensor in first.values() if tensor.ndim == 2)
    pyreft_config = _config(adapter, class_name, list(written), width)
    write_json(options.output_dir / CONFIG, pyreft_config)
    notes = export_notes(config)
    readme = options.output_dir / README
    write_text_whole(readme, _readme(adapter, class_name, width, notes))
    for note in () if options.quiet else notes:
        print(f"note: {note}", file=sys.stderr)
    return {
        "output_dir": str(options.output_dir),
        "intervention": class_name,
        "rank": config.rank,
        "num_interventions": len(written),
        "readme": str(readme),
        "notes": notes,
    }


def _read(directory: Path) -> Adapter:
    """Read an adapter and refuse what pyreft cannot express.

    Raises:
        InputError: It cannot be read or expressed.
    """
    config = read_config(directory)
    _check_expressible(config)
    path = weights_file(directory)
    read_shapes(directory)
    tensors = load_peft_weights(str(directory), device="cpu")
    interventions: dict[tuple[int, int], dict[str, Tensor]] = {}
    heads = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            heads[key.removeprefix("base_model.model.")] = tensor
            continue
        if "norm" in (match["path"] or ""):
            raise InputError(
                f"component must be block_output to be exported from {directory}, got "
                f"{config.component!r}: this base norms it first, and pyreft edits it before that; "
                "train one on block_output"
            )
        place = int(match["group"]), int(match["layer"])
        interventions.setdefault(place, {})[match["name"]] = tensor
    if not interventions:
        raise InputError(f"{path} must hold interventions, got none; save the adapter again")
    card = load_card(directory)
    base = card.base if card is not None else config.base_model_name_or_path
    return Adapter(
        config=config, interventions=dict(sorted(interventions.items())), heads=heads, base=base
    )


def _check_expressible(config: Any) -> None:
    if not isinstance(config, ReftConfig):
        raise InputError(
            f"adapter_dir must hold a ReFT adapter, got one of {type_of(config)}; pyreft has "
            "interventions only"
        )
    if config.intervention not in _CLASSES:
        raise InputError(
            f"intervention must be one that pyreft has, got {config.intervention!r}; those are "
            f"{', '.join(_CLASSES)}"
        )
    if config.where.response:
        raise InputError(
            f"positions must be of the prompt to be exported, got {config.positions!r}: pyreft "
            "edits what it reads first and no new token, so the answers would be those of another "
            "adapter; train with --positions all"
        )
    if config.tie == "positions":
        raise InputError(
            "tie must be tied or sides, got 'positions': pyreft has one intervention per side of "
            "the prompt and none per token; train with --tie sides"
        )


def _config(adapter: Adapter, class_name: str, keys: list[str], width: int) -> dict[str, Any]:
    """Return what pyvene writes for such interventions, all of whose fields are positional."""
    num = len(keys)
    config = adapter.config
    return {
        "intervention_constant_sources": [True] * num,
        "intervention_dimensions": [width] * num,
        "intervention_types": [f"<class 'pyreft.interventions.{class_name}'>"] * num,
        "mode": "parallel",
        "representations": [
            [layer, config.component, "pos", 1, config.rank, *[None] * 9]
            for _, layer in adapter.interventions
        ],
        "sorted_keys": keys,
    }


def _readme(adapter: Adapter, class_name: str, width: int, notes: list[str]) -> str:
    config, base = adapter.config, json.dumps(adapter.base or "BASE")
    auto = "AutoModelForSequenceClassification" if adapter.heads else "AutoModelForCausalLM"
    head = (
        f'\nmodel.load_state_dict(torch.load("{WEIGHTS_OF_BASE}", weights_only=True), strict=False)'
        if adapter.heads
        else ""
    )
    act = "None" if config.act is None else json.dumps(config.act)
    labels = next((f", num_labels={t.shape[0]}" for t in adapter.heads.values()), "")
    groups = (
        "the first half of the interventions (`#0`) edits the first tokens of the prompt, the "
        "second half (`#1`) the last ones"
        if len({group for group, _ in adapter.interventions}) == 2
        else "every intervention edits all of them"
    )
    facts = "\n".join(f"- {note}" for note in notes)
    return f"""# {class_name}, exported from lowmem_reft for pyreft 0.1.0

Positions: {code(config.positions)} of the prompt, tie: {code(config.tie)}; {groups}.

{facts}

Load it, in this directory:

```python
import json

import pyreft
import torch
from transformers import {auto}

model = {auto}.from_pretrained({base}, torch_dtype=torch.float32{labels})
with open("config.json") as file:
    representations = [
        {{
            "layer": layer,
            "component": component,
            "low_rank_dimension": rank,
            "intervention": pyreft.{class_name}(
                embed_dim={width}, low_rank_dimension=rank, dtype=torch.float32,
                act_fn={act}, dropout={config.dropout!r}, add_bias=False,
            ),
        }}
        for layer, component, _, _, rank, *_ in parse_json(file.read())["representations"]
    ]
reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
for key, intervention in reft_model.interventions.items():
    tensors = torch.load(f"intkey_{{key}}.bin", weights_only=True)
    intervention.load_state_dict(tensors)
    intervention.eval(){head}
```
"""
