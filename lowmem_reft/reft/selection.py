"""From the arguments of a forward pass to the tokens that each adapter edits.

Training: the prompt is what is attended and not supervised before the first supervised token, and
what is attended after it is the answer.
Generation: the prompt is everything attended at prefill, and what decode steps read is the answer.
Other tasks: every attended token is prompt. ``prompt_mask`` says instead which tokens are prompt;
``intervention_mask`` says which tokens are edited and overrides all of it. In a ``generate`` it
overrides what is edited of the prompt, and new tokens are edited if the positions have a response.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowmem_reft.errors import InputError
from lowmem_reft.reft.past import Branch, Generation, Place, place_by_hand, shape_of
from lowmem_reft.reft.positions import (
    find_prompt,
    has_later_prompt,
    packed_segments,
)

if TYPE_CHECKING:
    from lowmem_reft.reft.config import ReftConfig

OWN_ARGUMENTS = ("prompt_mask", "intervention_mask")

# Batch and sequence indices of tokens; None: all of them, so that nothing has to be gathered.
Tokens = tuple[Tensor, Tensor] | None
# For each adapter, for each of its φ: the tokens that φ edits.
Selection = dict[str, list[Tokens]]
_NOWHERE = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))


class Selector:
    """Turns masks into selections for every adapter of one model."""

    def __init__(self, model: nn.Module, configs: Mapping[str, ReftConfig]) -> None:
        self.configs = configs
        self.parameter_names = list(inspect.signature(model.forward).parameters)
        self.is_causal = bool(getattr(model, "can_generate", lambda: False)())
        self._adapter_names: Sequence[str] | None = None
        self._generation: Generation | None = None
        """The running ``generate``, whose passes are counted."""
        self._had_prompt = False
        """Some training batch had a prompt."""

    def place(self, args: Any, kwargs: dict[str, Any], *, training: bool) -> Place:
        """Return where the tokens of one pass through the base's forward stand: in a prompt or not.

        ``training`` is whether gradients will be taken.
        """
        call = self._by_name(args, kwargs)
        generation = self._generation
        is_its_own = generation is not None and generation.thread == threading.get_ident()
        # A pass with a choice of its own is none of generate's.
        if generation is not None and is_its_own and call.get("intervention_mask") is None:
            return generation.place(call)
        return place_by_hand(call, training=training)

    def select(
        self,
        active: list[str],
        args: Any,
        kwargs: dict[str, Any],
        *,
        training: bool,
        place: Place | None = None,
    ) -> tuple[Selection, dict[str, Any]]:
        """Return the selection of one forward pass and its keyword arguments without our own.

        Args:
            active: Adapters that edit every example, unless ``adapter_names`` says otherwise.
            args: Positional arguments of the base model's forward.
            kwargs: Its keyword arguments, perhaps with ``prompt_mask`` or ``intervention_mask``.
            training: Whether gradients will be taken, so that labels are needed to tell the prompt.
            place: Of its tokens, if it is known.

        Raises:
            InputError: No labels in training, or labels without a prompt from the first batch on,
                a mask of the wrong shape, or a past that cannot be told.
        """
        call = self._by_name(args, kwargs)
        place = place or self.place(args, kwargs, training=training)
        kwargs = {key: value for key, value in kwargs.items() if key not in OWN_ARGUMENTS}
        selection: Selection = {}
        if not active and self._adapter_names is None:
            return selection, kwargs
        chosen = self._examples(active, shape_of(call)[0])
        is_named = call.get("intervention_mask") is not None
        is_decoding = place.is_decoding and not is_named
        matters = not all(self.configs[name].edits_alike for name in chosen)
        if place.problem is not None and matters and not is_named:
            raise InputError(place.problem)
        for name, examples in chosen.items():
            config = self.configs[name]
            if is_decoding and examples is None:
                if config.where.response:
                    selection[name] = [*[_NOWHERE] * (config.num_groups - 1), None]
                continue
            groups = self._groups(config, call, place, training=training)
            if examples is not None:
                groups = torch.where(examples[:, None].to(groups.device), groups, -1)
            numbers = range(config.num_groups)
            tokens = [(groups == number).nonzero(as_tuple=True) for number in numbers]
            selection[name] = [(rows, columns) for rows, columns in tokens]
        return selection, kwargs

    def _by_name(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}

    @contextmanager
    def mixed(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Let each example be edited by its own adapter ("__base__": by none) for a while."""
        before, self._adapter_names = self._adapter_names, adapter_names
        try:
            yield
        finally:
            self._adapter_names = before

    @contextmanager
    def generation(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Fix the prompt of a ``generate`` call for a while; yield its arguments, mask included.

        Knowing the whole prompt beforehand is what makes chunked prefill, prepared 4-D masks,
        beams and speculative decoding come out right.

        Raises:
            InputError: Another thread is generating with this model, or there is a second prompt
                for an explicit ``intervention_mask``.
        """
        kwargs, before = dict(kwargs), self._generation
        if before is not None and before.thread != threading.get_ident():
            raise InputError(
                "one thread at a time can generate with an adapted model, got a second one; wait "
                "for the first, or give each its own model"
            )
        self._generation = _begin(model, args, kwargs)
        try:
            yield kwargs
        finally:
            self._generation = before

    def _examples(self, active: list[str], batch: int) -> dict[str, Tensor | None]:
        """Return for each adapter which examples it edits; None means all of them."""
        if self._adapter_names is None:
            return {name: None for name in active if name in self.configs}
        names = self._adapter_names
        if batch % len(names) or (self._generation is None and batch != len(names)):
            raise InputError(
                f"adapter_names must have one name per example ({batch}), got {len(names)}; "
                "use '__base__' for examples without an adapter"
            )
        # Beams and returned sequences repeat each example in place.
        names = [name for name in names for _ in range(batch // len(names))]
        return {
            name: torch.tensor([other == name for other in names])
            for name in dict.fromkeys(names)
            if name != "__base__"
        }

    def _groups(
        self, config: ReftConfig, call: dict[str, Any], place: Place, *, training: bool
    ) -> Tensor:
        """Return (batch, length): the index of the φ that edits each token, or -1."""
        batch, length = shape_of(call)
        branch, explicit = place.branch, call.get("intervention_mask")
        # What comes after the prompt in a generation.
        new = config.num_groups - 1 if config.where.response else -1
        if place.is_decoding and explicit is None:
            return torch.full((batch, length), new)
        if branch is not None and branch.mask is not None and explicit is None:
            groups = (
                config.groups(branch.mask.bool())
                if branch.choice is None
                else _explicit_groups(branch.choice, config, branch.mask.shape)
            )
            groups = groups.repeat_interleave(batch // groups.shape[0], 0)
            groups = groups[:, place.past : place.past + length]
            return torch.nn.functional.pad(groups, (0, length - groups.shape[1]), value=new)
        if explicit is not None:
            return _explicit_groups(explicit, config, (batch, length))
        mask = _attended(call, batch, length, place.past)
        prompt = call.get("prompt_mask")
        if prompt is not None:
            _check_shape("prompt_mask", prompt, (batch, length))
        if config.edits_alike:  # whatever is prompt
            return torch.where(mask.bool(), 0, -1)
        segments = packed_segments(call.get("position_ids"), mask)
        if prompt is not None:
            attended = mask.bool()
            return config.groups(attended & prompt.to(mask.device).bool(), segments, attended)
        causal = config.task_type == "CAUSAL_LM" or (config.task_type is None and self.is_causal)
        labels = call.get("labels") if causal else None
        if causal and labels is None and training:
            raise InputError(
                "labels must be given in training, because the prompt is what they do not "
                "supervise; pass labels or prompt_mask to the model (a trainer that takes the "
                "labels out, as label smoothing does, needs lowmem_reft.reuse.mixins.PromptMixin)"
            )
        prompt = find_prompt(mask, labels, segments)
        if labels is not None:
            _require_one_answer(config, prompt, mask, labels, segments)
            if training:
                self._require_prompt(config, prompt, call)
        return config.groups(prompt, segments, mask.bool())

    def _require_prompt(self, config: ReftConfig, prompt: Tensor, call: dict[str, Any]) -> None:
        """Say that a batch has no prompt, so that nothing of one is edited.

        Raises:
            InputError: It is the first batch, so the data are likely all like it.
        """
        where = config.where
        if config.edits_alike or not (where.prompt or where.first or where.last):
            return  # a text without a prompt is edited like any
        starts = call.get("position_ids")
        if starts is not None and starts.ndim == 2 and call.get("attention_mask") is None:
            # Collators without padding mask each sample's first label, which nothing predicts.
            prompt = prompt & (starts != 0).to(prompt.device)
        if bool(prompt.any()):
            self._had_prompt = True
        elif self._had_prompt:
            warnings.warn("a batch has no prompt, so nothing of one is edited", stacklevel=2)
        else:
            raise InputError(
                "labels must leave a prompt unsupervised (-100), got a batch in which all is "
                f"supervised; positions {config.positions!r} edit the prompt, so there is nothing "
                "to train there: give prompt and completion, or messages with "
                "assistant_only_loss=True, edit 'every' token, or pass intervention_mask"
            )


def _require_one_answer(
    config: ReftConfig, prompt: Tensor, mask: Tensor, labels: Tensor, segments: Tensor | None
) -> None:
    """Refuse several answers in one example, unless all are read after the same edits.

    They are where every token is edited alike, and where the first tokens alone are edited: those
    of the first prompt, which holds them.

    Raises:
        InputError: See above.
    """
    if config.edits_alike or not has_later_prompt(mask, labels, segments):
        return
    where = config.where
    is_first_only = where.first and not where.last and not where.response
    if is_first_only and segments is None and bool((prompt.sum(1) >= where.first).all()):
        return
    raise InputError(
        "labels must supervise one answer in an example, got several with prompts between them: "
        f"positions {config.positions!r} edit other tokens for each answer; split conversations "
        "with lowmem_reft.data.split_turns (train --turns all does it), edit 'every' token with "
        "tie='tied', or pass intervention_mask "
        "(samples packed into a row need position_ids that start again at 0, as TRL's "
        "packing_strategy 'bfd' gives and 'wrapped' does not)"
    )


def _attended(call: dict[str, Any], batch: int, length: int, past: int = 0) -> Tensor:
    """Return (batch, length): nonzero where one of the tokens of this call is attended.

    ``past`` tokens came before them, which a mask may have columns for.
    """
    mask: Tensor | dict[str, Tensor | None] | None = call.get("attention_mask")
    if isinstance(mask, dict):  # one per attention type
        mask = next((part for part in mask.values() if part is not None), None)
    if mask is None:
        inputs = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        device = "cpu" if inputs.is_meta else inputs.device
        return torch.ones(batch, length, dtype=torch.long, device=device)
    if mask.ndim == 4:
        # A prepared mask: a token that is attended attends at least to itself.
        past = past if mask.shape[3] >= past + length else 0
        mask = mask[:, 0, :, past : past + length].expand(-1, length, -1)
        own = mask.diagonal(dim1=-2, dim2=-1)
        own = own if own.dtype == torch.bool else own == 0
        return own.long().expand(batch, length)
    if mask.ndim != 2 or mask.shape[1] < length:
        raise InputError(
            f"attention_mask must have shape ({batch}, {length}), got {tuple(mask.shape)}; "
            "pass one row per example"
        )
    end = past + length
    return mask[:, past:end] if past and mask.shape[1] > end else mask[:, -length:]


def _explicit_groups(mask: Tensor, config: ReftConfig, shape: Sequence[int]) -> Tensor:
    """Check an ``intervention_mask`` and turn it into group indices."""
    _check_shape("intervention_mask", mask, shape)
    count = config.num_groups
    if mask.dtype == torch.bool:
        if count > 1:
            raise InputError(
                f"intervention_mask must hold the index of the φ (0 to {count - 1}) or -1 per "
                f"token when tie={config.tie!r}, got bool; pass integers"
            )
        return torch.where(mask, 0, -1)
    if mask.is_floating_point() or int(mask.max()) >= count:
        raise InputError(
            f"intervention_mask must be bool, or integers from -1 to {count - 1}, got {mask.dtype} "
            f"up to {mask.max().item()}; -1 leaves a token alone"
        )
    return mask.long()


def _check_shape(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    if tuple(mask.shape) != tuple(shape):
        raise InputError(
            f"{name} must have the shape of the input, {tuple(shape)}, got {tuple(mask.shape)}; "
            "give one entry per token"
        )


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    """Return the branches of a ``generate``; put the mask that it would infer into its arguments.

    Raises:
        InputError: There is a second prompt for an explicit ``intervention_mask``.
    """
    choice = kwargs.pop("intervention_mask", None)
    options = {"generation_config": args[1], **kwargs} if len(args) > 1 else kwargs
    first = args[0] if args else kwargs.get("inputs")
    given = {"input_ids": kwargs.get("input_ids"), "inputs_embeds": kwargs.get("inputs_embeds")}
    if first is not None:
        given["input_ids" if first.ndim == 2 else "inputs_embeds"] = first
    inputs = {name: value for name, value in given.items() if value is not None}
    mask = kwargs.get("attention_mask")
    if inputs and mask is None:
        if "input_ids" in inputs and "inputs_embeds" not in inputs:
            mask = _infer_mask(model, inputs["input_ids"], options)
            kwargs["attention_mask"] = mask
        else:
            mask = torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.long)
    branches = [Branch(inputs, mask, choice)]
    if _setting(model, options, "guidance_scale") not in (None, 1):
        if choice is not None:
            raise InputError(
                "intervention_mask must not be given with guidance_scale, which has a prompt of "
                "its own to steer away from; leave one of them out"
            )
        branches.append(_negative(inputs.get("input_ids"), kwargs))
    return Generation(*branches)


def _negative(input_ids: Tensor | None, kwargs: dict[str, Any]) -> Branch:
    """Return what classifier-free guidance steers away from; by default the last token alone."""
    ids = kwargs.get("negative_prompt_ids")
    if ids is None:
        ids = None if input_ids is None else input_ids[:, -1:]
    if ids is None:
        return Branch({}, None)
    mask = kwargs.get("negative_prompt_attention_mask")
    return Branch({"input_ids": ids}, torch.ones_like(ids) if mask is None else mask)


def _infer_mask(model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the mask that ``generate`` would infer: padding is masked where it is unambiguous."""
    pad, eos = (_setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if isinstance(eos, Tensor):
        eos = eos.tolist()
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(input_ids)
    attended: Tensor = input_ids != pad
    return attended.long()


def _setting(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """Return what a ``generate`` takes for one of its options; None if nothing says."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)
