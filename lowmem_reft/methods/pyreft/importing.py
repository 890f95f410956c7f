"""``lowmem-reft import-pyreft``: a checkpoint of pyreft becomes an ordinary adapter folder.

pyreft saves tensors, layers and a class name. The token positions, the non-linearity and the
dropout are not in its files, so they are asked for. The adapter's names and shapes come from our
own tuner on an empty model of the base's architecture: no weights of the base are read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from lowmem_reft.base.blocks import component_path, find_blocks, hidden_size
from lowmem_reft.base.heads import from_config
from lowmem_reft.base.hub import load_config
from lowmem_reft.errors import InputError
from lowmem_reft.machine.destinations import check_directory
from lowmem_reft.methods.attach import peft_notices_hidden
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.methods.pyreft.checkpoint import WEIGHTS_OF_BASE, PyreftCheckpoint, read_checkpoint
from lowmem_reft.methods.pyreft.notes import import_notes
from lowmem_reft.methods.pyreft.parameters import KINDS, from_pyreft
from lowmem_reft.options import ImportPyreftOptions
from lowmem_reft.reft.config import COMPONENTS, ReftConfig
from lowmem_reft.reft.positions import num_groups, parse_positions


def run_import(options: ImportPyreftOptions) -> dict[str, Any]:
    """Write the adapter, and print what the user should know about it.

    Returns:
        ``adapter_dir``, ``intervention``, ``rank``, ``layers``, ``component``, ``positions``,
        ``tie``, ``act``, ``num_interventions`` and ``notes``, a list of sentences.

    Raises:
        InputError: An option or the checkpoint is wrong, or ours cannot hold what it does.
    """
    parse_positions(options.positions)
    check_empty(options.output_dir)
    checkpoint = read_checkpoint(options.directory, options.intervention)
    act = _act(options, checkpoint)
    tie = _tie(options, checkpoint)
    base = _empty_base(options, checkpoint)
    component = _component(base, checkpoint, options)
    heads = _heads(base, checkpoint, options)
    config = ReftConfig(
        task_type=options.task_type,
        intervention=KINDS[checkpoint.class_name].name,
        rank=checkpoint.rank,
        layers=checkpoint.layers,
        positions=options.positions,
        tie=tie,
        component=component,
        act=act,
        modules_to_save=heads or None,
    )
    tensors, notes = _convert(base, config, checkpoint)
    notes += import_notes(config, model=options.model, is_interleaved=checkpoint.is_interleaved)
    _save(options, config, tensors)
    for note in () if options.quiet else notes:
        print(f"note: {note}", file=sys.stderr)
    return {
        "adapter_dir": str(options.output_dir),
        "intervention": config.intervention,
        "rank": config.rank,
        "layers": checkpoint.layers,
        "component": component,
        "positions": options.positions,
        "tie": tie,
        "act": act or "none",
        "num_interventions": len(checkpoint.interventions),
        "notes": notes,
    }


def check_empty(directory: Path) -> None:
    """Refuse to write where something is, or where nothing can be written.

    Raises:
        InputError: The directory has files in it, is a file, or cannot be made.
    """
    check_directory("output_dir", directory)
    if directory.exists() and any(directory.iterdir()):
        raise InputError(
            f"output_dir must be a new or an empty directory, got {str(directory)!r}; choose "
            "another or remove what is there"
        )


def _act(options: ImportPyreftOptions, checkpoint: PyreftCheckpoint) -> str | None:
    if not KINDS[checkpoint.class_name].has_act:
        if options.act not in (None, "none"):
            raise InputError(
                f"act must be left out for {checkpoint.class_name}, which has no non-linearity, "
                f"got {options.act!r}"
            )
        return None
    if options.act is None:
        raise InputError(
            f"act must be given for {checkpoint.class_name}, got nothing: pyreft's files do not "
            "say with which act_fn it was trained, and another one gives other logits; add --act "
            "none if the intervention was made without act_fn, else --act relu, gelu, silu or tanh"
        )
    return None if options.act == "none" else options.act


def _tie(options: ImportPyreftOptions, checkpoint: PyreftCheckpoint) -> str:
    groups = checkpoint.num_groups
    tie = options.tie or ("tied" if groups == 1 else "sides")
    needed = num_groups(parse_positions(options.positions), tie)
    if groups != needed:
        what = "tied" if groups == 1 else "sides" if groups == 2 else "fewer of them"
        raise InputError(
            f"tie must fit the {groups} interventions per layer in {options.directory}, got "
            f"{tie!r} with positions {options.positions!r}, which needs {needed}; they were "
            f"trained as {what}" + (", one for fN and one for lM" if groups == 2 else "")
        )
    return tie


def _empty_base(options: ImportPyreftOptions, checkpoint: PyreftCheckpoint) -> Any:
    """Return the base's modules without weights; of a Llama if it is not said which base."""
    if options.model is not None:
        config = load_config(options.model)
    else:
        config = LlamaConfig(
            hidden_size=checkpoint.hidden_size,
            num_hidden_layers=checkpoint.layers[-1] + 1,
            intermediate_size=8,
            vocab_size=8,
            num_attention_heads=1,
        )
    if options.task_type == "SEQ_CLS":
        matrices = [t for t in checkpoint.base_weights.values() if t.ndim == 2]
        if not matrices:
            raise InputError(
                f"task_type must be CAUSAL_LM for {options.directory}, which has no trained head "
                f"in a {WEIGHTS_OF_BASE}, got 'SEQ_CLS'; have pyreft save it with include_model"
            )
        config.num_labels = matrices[-1].shape[0]
    with torch.device("meta"):
        base: Any = from_config(config, options.task_type)
    blocks, width = len(find_blocks(base)[1]), hidden_size(base)
    if (width, blocks > checkpoint.layers[-1]) != (checkpoint.hidden_size, True):
        raise InputError(
            f"model must have vectors of {checkpoint.hidden_size} numbers and more than "
            f"{checkpoint.layers[-1]} blocks, which {options.directory} edits, got "
            f"{options.model!r} with {width} and {blocks}; give the base that it was trained on"
        )
    return base


def _component(base: Any, checkpoint: PyreftCheckpoint, options: ImportPyreftOptions) -> str:
    """Return our name of what is edited, by pyreft's name or the path that it gives."""
    place = next(iter(checkpoint.interventions))
    name, blocks = find_blocks(base)
    if place.blocks is None:
        component = place.component
    elif place.blocks != name.replace(".", "_"):
        raise InputError(
            f"model must be the base that {options.directory} was trained on, whose blocks are at "
            f"{place.blocks}, got {options.model!r} with blocks at {name}; change --model"
        )
    else:
        paths = {f"_{path}" if path else "": one for one, path in _paths(blocks[0]).items()}
        component = paths.get(place.component, place.component)
    if component not in COMPONENTS:
        raise InputError(
            f"{options.directory} must edit {', '.join(COMPONENTS)}, got {component!r}; ReFT here "
            "has no such component"
        )
    if "norm" in component_path(blocks[0], component):
        raise InputError(
            f"component must be block_output in {type(blocks[0]).__name__}, got {component!r}: "
            "pyreft edits it before its norm and we do after, which is not the same; there is no "
            "adapter that holds both"
        )
    return component


def _paths(block: Any) -> dict[str, str]:
    paths = {}
    for component in COMPONENTS:
        try:
            paths[component] = component_path(block, component).replace(".", "_")
        except InputError:
            continue  # this architecture has no such part
    return paths


def _heads(base: Any, checkpoint: PyreftCheckpoint, options: ImportPyreftOptions) -> list[str]:
    """Return the modules that were trained whole, if those are a classifier's head."""
    if not checkpoint.base_weights:
        return []
    names = {name.partition(".")[0] for name in checkpoint.base_weights}
    backbone = base.base_model_prefix
    heads = {name for name, module in base.named_children() if name != backbone}
    if options.task_type == "SEQ_CLS" and names <= heads:
        return sorted(names)
    shown = ", ".join(list(checkpoint.base_weights)[:3])
    raise InputError(
        f"{options.directory} must hold no trained weights of the base but a classifier's head "
        f"(with --task-type SEQ_CLS), got {len(checkpoint.base_weights)} in {WEIGHTS_OF_BASE}: "
        f"{shown}; an adapter here leaves the base as it is: without them the interventions do "
        "not do what they were trained to, but to import those alone, move that file away"
    )


def _convert(
    base: Any, config: ReftConfig, checkpoint: PyreftCheckpoint
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the adapter's tensors under the names that PEFT saves them by, and notes."""
    name, _ = find_blocks(base)
    start = f"base_model.model.{name}."
    with torch.device("meta"), peft_notices_hidden():
        expected = get_peft_model_state_dict(
            get_peft_model(base, config), save_embedding_layers=False
        )
    notes: set[str] = set()
    held: dict[tuple[int, int], dict[str, Tensor]] = {}
    for place, tensors in checkpoint.interventions.items():
        where = checkpoint.files[place]
        ours, said = from_pyreft(checkpoint.class_name, tensors, config.act, where)
        held[place.layer, place.group] = ours
        notes |= said
    result = {}
    for key, like in expected.items():
        place_of, is_ours, rest = key.partition(".reft_phi.")
        if is_ours:
            group, _, parameter = rest.partition(".")
            layer = int(place_of.removeprefix(start).partition(".")[0])
            tensor = held[layer, int(group)][parameter]
        else:
            tensor = _head_tensor(key, checkpoint)
        if tensor.shape != like.shape:
            raise InputError(
                f"{key} must be of shape {list(like.shape)} in the base, got {list(tensor.shape)}; "
                "give the base that it was trained on with --model"
            )
        result[key] = tensor
    return result, sorted(notes)


def _head_tensor(key: str, checkpoint: PyreftCheckpoint) -> Tensor:
    name = key.removeprefix("base_model.model.")
    if name not in checkpoint.base_weights:
        raise InputError(
            f"{WEIGHTS_OF_BASE} must hold the whole head, got {', '.join(checkpoint.base_weights)} "
            f"without {name}; have pyreft save it again, with all of the head trained"
        )
    return checkpoint.base_weights[name].float().contiguous()


def _save(options: ImportPyreftOptions, config: ReftConfig, tensors: dict[str, Tensor]) -> None:
    """Write what PEFT's ``save_pretrained`` writes, and the card where the base is known."""
    config.base_model_name_or_path = options.model
    config.inference_mode = True
    options.output_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.output_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(options.output_dir))
    if options.model is not None:
        card = TrainingCard(
            base=options.model,
            storage="bf16",
            task_type=options.task_type,
            method=config.intervention,
        )
        card.save(options.output_dir)
