"""Puts a saved adapter on a base, and refuses one that is not loaded whole.

PEFT warns of weights that the file lacks and is silent about those that it has no place for: the
configuration may be of another method, rank or layers than the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.heads import head_names
from lowmem_reft.base.ours import ours
from lowmem_reft.base.stored import are_finite, not_whole, read_header, read_json_object, some
from lowmem_reft.errors import InputError, is_of_the_machine
from lowmem_reft.machine.files import fits
from lowmem_reft.reft.peft_method import type_of

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which PEFT looks for them."""

_OF_BASE = "base_model.model."


def read_config(directory: Path) -> Any:
    """Read the PEFT configuration of an adapter.

    Raises:
        InputError: It is none, or a field of ours breaks its rule.
    """
    path = directory / CONFIG
    fields = read_json_object(path, "a PEFT configuration")
    tokens: Any = fields.get("alora_invocation_tokens")
    if not fits(tokens, list[int] | None) or any(not 0 <= token < 2**31 for token in tokens or ()):
        raise InputError(
            f"{path} must have token ids as alora_invocation_tokens, got {shortened(tokens)}; save "
            "the adapter again"
        )
    try:
        return PeftConfig.from_pretrained(str(directory))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} must be a PEFT configuration, got one of peft_type "
            f"{fields.get('peft_type')!r} that cannot be read ({type(error).__name__}: {said}); "
            "save the adapter again, or upgrade peft"
        ) from error


def weights_file(directory: Path) -> Path:
    """Return the file of an adapter's weights.

    Raises:
        InputError: There is none.
    """
    for name in WEIGHTS:
        if (directory / name).exists():
            return directory / name
    raise InputError(
        f"{directory / WEIGHTS[0]} must be there beside {CONFIG}, got no such file; save or "
        "download the adapter again"
    )


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors by name; all of their numbers are looked at.

    Raises:
        InputError: The file is missing, not whole, or holds NaN or infinity.
    """
    path = weights_file(directory)
    if path.suffix == ".safetensors":
        shapes = {name: tensor.shape for name, tensor in read_header(path).items()}
        with safe_open(path, framework="pt", backend="pread") as file:
            wrong = next((name for name in shapes if not are_finite(file.get_tensor(name))), None)
    else:
        try:
            tensors = load_peft_weights(str(directory), device="cpu")
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise not_whole(path, "a whole file of torch.save with tensors alone", error) from error
        wrong = next((name for name, tensor in tensors.items() if not are_finite(tensor)), None)
    if wrong is not None:
        raise InputError(
            f"{path} must hold finite numbers, got NaN or infinity in {wrong}; train it again, "
            "with a smaller learning rate, or download it again"
        )
    return shapes


def put_on(model: Any, directory: Path, name: str = "default") -> Any:
    """Load an adapter onto a base, or beside the adapters of a PeftModel, and return the PeftModel.

    Raises:
        InputError: The adapter is not whole, or its weights and its configuration do not fit each
            other or the base.
    """
    shapes, path = read_shapes(directory), weights_file(directory)
    _check_sizes(directory, shapes)
    _fit_vocabulary(model, shapes, path)
    try:
        with warnings.catch_warnings():
            # It is refused below, in more words.
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            if isinstance(model, PeftModel):
                model.load_adapter(str(directory), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(directory), adapter_name=name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:  # PEFT looks for what is trained whole, as a head, by its name
        raise InputError(
            f"{path} must have the weights that {CONFIG} beside it describes, got none for "
            f"{error.args[0] if error.args else error}; save or download the adapter again"
        ) from error
    _check_keys(model, shapes, directory, name)
    return model


def _check_sizes(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a rank that no tensor has, before PEFT makes as many numbers.

    Raises:
        InputError: There is one.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    fields = read_json_object(directory / CONFIG, "a PEFT configuration")
    for name in ("r", "rank"):
        size = fields.get(name)
        if isinstance(size, int) and shapes and size > largest:
            raise InputError(
                f"{directory / CONFIG} must describe the weights beside it, got {name} {size}, "
                "which none of their sizes is; save or download the adapter again"
            )


def _check_keys(model: Any, shapes: Mapping[str, Any], directory: Path, name: str) -> None:
    """Refuse an adapter whose weights and configuration are not of each other."""
    config, path = model.peft_config[name], weights_file(directory)
    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    of_base = {f"{_OF_BASE}{key}" for key, _ in base_of(model).named_parameters()}
    missing, unread = {*saved} - {*shapes}, {*shapes} - {*saved} - of_base
    if unread and not config.is_prompt_learning:  # PEFT adds these where it was resized
        unread -= {*get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)}
    if (missing or unread) and not config.is_prompt_learning:
        # Names may be those of older versions, which PEFT converts: it knows what it could not.
        found = model.load_adapter(str(directory), adapter_name=name)
        missing, unread = {*found.missing_keys}, {*found.unexpected_keys}
    for names, what in ((missing, "none for"), (unread, "also")):
        if names:
            raise InputError(
                f"{path} must have the weights that {CONFIG} beside it describes "
                f"({type_of(config)}), got {what} {some(names)}: they are not of each other; "
                "save or download the adapter again"
            )
    base = base_of(model)
    heads = head_names(base)
    if ours(base).has_new_head and not any(
        not {*heads}.isdisjoint(key.split(".")) for key in shapes
    ):
        raise InputError(
            f"{path} must hold the head that was trained with it, as the base has none of its own, "
            f"got no weights of {', '.join(heads)}; save the adapter again with modules_to_save"
        )


def holds_base_weights(directory: Path, base: Any) -> bool:
    """Return whether loading an adapter overwrites weights of the base, as of its embedding."""
    own = {f"{_OF_BASE}{key}" for key, _ in base_of(base).named_parameters()}
    return not own.isdisjoint(read_shapes(directory))


def _fit_vocabulary(model: Any, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Make a base's vocabulary as large as that of an adapter that holds the embeddings.

    Raises:
        InputError: The adapter does not hold all that depends on the vocabulary.
    """
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    modules = {id(module): name for name, module in base.named_modules()}
    rows: dict[str, int] = {}
    for module in (embedding, head):
        name = modules.get(id(module))
        for key, shape in shapes.items() if name else ():
            if key.startswith(f"{_OF_BASE}{name}.") and key.endswith(".weight") and shape:
                rows[str(name)] = max(shape[0], rows.get(str(name), 0))
    size = embedding.weight.shape[0]
    wanted = max(rows.values(), default=size)
    if wanted == size or not rows:
        return
    tied = head is None or head.weight is embedding.weight
    lacking = [
        str(modules[id(module)])
        for module in (embedding, None if tied else head)
        if module is not None and rows.get(str(modules[id(module)])) != wanted
    ]
    if ours(base).residency is not None or lacking or model is not base:
        named = f", and has no {' and no '.join(lacking)} of that size" if lacking else ""
        raise InputError(
            f"model must have a vocabulary of {wanted} tokens, as {path} has{named}, got one of "
            f"{size}; resize the base as before the training (resize_token_embeddings), save it "
            "with its tokenizer and give that directory as --model"
        )
    base.resize_token_embeddings(wanted, mean_resizing=False)
    base.requires_grad_(False)
