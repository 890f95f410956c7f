"""What differs between pyreft and here although the numbers are the same, said on the way over."""

from __future__ import annotations

from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.positions import parse_positions

_DATA_SETS = "ReftGenerationDataset, ReftSupervisedDataset and ReftClassificationDataset"
_NEEDS_ADD_BIAS = ("noreft", "direft")
_ROUNDED = ("loreft", "orthogonal_direft")


def import_notes(config: ReftConfig, *, model: str | None, is_interleaved: bool) -> list[str]:
    """Return what the user of an imported adapter should know."""
    positions = parse_positions(config.positions)
    notes = [
        "pyreft's files hold no dropout: it is 0 here, which only further training would notice"
    ]
    if is_interleaved:
        notes.append(
            "config.json lists the interventions layer by layer; pyreft's data sets give the first "
            "half of that list the first tokens, so unless its locations were made by hand, it was "
            "trained on other tokens than are edited here"
        )
    if positions.first and positions.last:
        notes.append(
            f"where a prompt is too short for {config.positions}, each of its tokens is edited "
            "once here, also by one side alone; pyreft's sides edit at most half of a prompt each"
        )
    if positions.last:
        notes.append(
            f"lN ends with the last token of the prompt here; pyreft's {_DATA_SETS} leave that one "
            "out, so an adapter from there was trained on tokens one further left"
        )
    if model is not None:
        notes.append(
            f"training.json says that {model} is stored in bf16, as pyreft's scripts load it, and "
            "that a prompt is written as it is; change it where that is not so"
        )
        return notes
    notes.append(
        "no --model was given: the adapter is for bases whose blocks are called model.layers "
        "(Llama, Mistral, Qwen, Gemma, OLMo); for another, import it again with --model"
    )
    if config.component != "block_output":
        notes.append(
            f"in Gemma 2 and OLMo 2 {config.component} is another vector here than in pyreft; give "
            "--model to have that checked"
        )
    return notes


def export_notes(config: ReftConfig) -> list[str]:
    """Return what pyreft's files do not hold, and what its own loading does to them."""
    positions = parse_positions(config.positions)
    notes = [
        f"pyreft stores neither positions ({config.positions}) nor act_fn ({config.act}) nor "
        f"dropout ({config.dropout}): pass them yourself, as the README shows"
    ]
    if config.dropout:
        notes.append("pyreft's dropout falls on the whole edited vector, not on the edit alone")
    if positions.prompt:
        notes.append("pyreft has no word for all positions: list every token of the prompt")
    if positions.last:
        notes.append(
            f"the last token of the prompt is edited; pyreft's {_DATA_SETS} leave it out: list the "
            "locations"
        )
    if config.intervention in _NEEDS_ADD_BIAS:
        notes.append(
            "pyreft's ReftModel.load fails on this class, also on what pyreft saved itself, "
            "because its files do not say add_bias; the README builds the interventions instead"
        )
    elif config.intervention in _ROUNDED:
        notes.append(
            "pyreft's ReftModel.load rounds the learned source to bf16 and drops act_fn; the "
            "README builds the interventions in fp32 instead"
        )
    return notes
