"""Refuses a base that its checkpoint does not fill: weights missing, unread, misshapen, not finite.

transformers gives what is missing random values, and what is not read a line in a report; a 4-bit
layer takes a weight of any shape; quantizing makes numbers of NaN. None of that is the model that
was asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes.functional
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_reft.base.heads import has_head, head_names
from lowmem_reft.base.stored import INDEX, WHOLE, Stored, are_finite, not_finite, some
from lowmem_reft.errors import InputError

_OTHER_PARTS = re.compile(
    r"head|score|classif|^cls\.|qa_|pool|^mtp|vision|visual|audio|image|speech|projector|connector"
)
"""Parts that a checkpoint may have beside what a task uses: other heads, and towers of wrappers."""

_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_sizes(config: Any, stored: Mapping[str, Stored] | None, model: str | Path) -> None:
    """Refuse a configuration of more layers or larger ones than a checkpoint has numbers for.

    A model of such sizes is not made at all: it may take hours, or all of the memory.

    Args:
        config: The base's.
        stored: The checkpoint's tensors; None: not known yet.
        model: Where both are, for the message.

    Raises:
        InputError: See above.
    """
    if not stored:
        return
    text = config.get_text_config()
    num_numbers = 2 * sum(math.prod(tensor.shape) for tensor in stored.values())  # 4-bit ones: 2
    most = {"num_hidden_layers": len(stored)}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"):
        most[name] = num_numbers
    for name, largest in most.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and size > largest:
            raise InputError(
                f"{model} must have weights for the {name} {size:,} of its config.json, got "
                f"{len(stored)} tensors; mend config.json, or download the model again"
            )


def check_keys(
    base: PreTrainedModel, differences: Mapping[str, Any], task_type: str, source: str
) -> None:
    """Refuse a checkpoint and a model that do not have the same weights.

    A new head of a classifier is no difference, nor are other heads and towers that the checkpoint
    has, nor the tied weights and buffers that transformers itself knows of.

    Args:
        base: The model that was loaded.
        differences: As ``from_pretrained`` tells them with ``output_loading_info``.
        task_type: The task that it was loaded for.
        source: Of the checkpoint, for the message.

    Raises:
        InputError: They differ.
    """
    heads = tuple(f"{name}." for name in head_names(base)) if has_head(task_type) else ()
    missing = set(differences["missing_keys"])
    own = {name for name, _ in base.named_parameters() if name.startswith(heads)} if heads else {}
    if missing >= set(own):
        missing -= set(own)
    missing = {name for name in missing if task_type == "CAUSAL_LM" or ".pooler." not in name}
    if missing:
        raise InputError(
            f"{source} must have all weights of {type(base).__name__}, got none for "
            f"{some(missing)}; download the model again, or mend its config.json"
        )
    check_read(base, differences, source)


def check_read(base: PreTrainedModel, differences: Mapping[str, Any], source: str) -> None:
    """Refuse weights that have another shape in the model or, but for other parts, no place there.

    Arguments are those of ``check_keys``.

    Raises:
        InputError: There are some.
    """
    if differences["mismatched_keys"]:
        name, stored, wanted = min(differences["mismatched_keys"])
        raise _misshapen(source, name, stored, wanted)
    prefix = f"{base.base_model_prefix}."
    backbone = tuple(f"{name}." for name, _ in base.base_model.named_children())
    unread = [
        name
        for name in differences["unexpected_keys"]
        if name.removeprefix(prefix).startswith(backbone) or not _OTHER_PARTS.search(name)
    ]
    if unread:
        raise InputError(
            f"{source} must have the weights of {type(base).__name__} alone, got {some(unread)}, "
            "which it has no place for; download the model again, or mend its config.json"
        )


def check_stored(
    base: nn.Module, stored: Mapping[str, Stored], *, is_quantized: bool, source: str
) -> None:
    """Refuse what is stored as integers and is none, and weights of other shapes than the model's.

    ``is_quantized`` says whether the checkpoint itself is.

    Raises:
        InputError: There is one.
    """
    for name, module in base.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, Linear4bit | Linear8bitLt) or weight is None or weight.is_meta:
            continue
        state = getattr(weight, "quant_state", None)
        found = tuple(weight.shape if state is None else state.shape)
        wanted = (module.out_features, module.in_features)
        if found != wanted:
            raise _misshapen(source, f"{name}.weight", found, wanted)
    names = {name for name, _ in base.named_parameters()}
    for name, tensor in stored.items() if not is_quantized else ():
        if tensor.dtype not in _FLOATS and name in names:
            raise InputError(
                f"{source} must hold floating-point weights, got {name} as {tensor.dtype} and no "
                "quantization_config in config.json that says what it stands for; download the "
                "model again"
            )


def _misshapen(source: str, name: str, stored: Any, wanted: Any) -> InputError:
    return InputError(
        f"{source} must have {name} of shape {list(wanted)}, as config.json says, got "
        f"{list(stored)}; download the model again, or mend its config.json"
    )


@contextmanager
def quantized_finite() -> Iterator[list[Tensor]]:
    """Look at every weight before it is quantized: NaN and infinity do not survive it.

    Yields:
        Grows by an entry for each weight that was not finite.
    """
    found: list[Tensor] = []

    def looked_at(function: Any) -> Any:
        def quantize(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not are_finite(weight):
                found.append(weight)
            return function(weight, *args, **kwargs)

        return quantize

    functions = bitsandbytes.functional
    with (
        mock.patch.object(functions, "quantize_4bit", looked_at(functions.quantize_4bit)),
        mock.patch.object(
            functions, "int8_vectorwise_quant", looked_at(functions.int8_vectorwise_quant)
        ),
    ):
        yield found


def check_finite(module: nn.Module, quantized: list[Tensor], files: Iterable[Path]) -> None:
    """Refuse weights that hold NaN or infinity, as they are stored.

    Args:
        module: The base, or a part of it that was read.
        quantized: What ``quantized_finite`` has found.
        files: Of the checkpoint: read again, whole, to say which weight it is.

    Raises:
        InputError: One does.
    """
    if not quantized and all(map(are_finite, _floats(module))):
        return
    files = list(files)
    found = not_finite(files)
    if found is not None:
        raise InputError(
            f"{found[0]} must hold finite numbers, got NaN or infinity in {found[1]}; download it "
            "again, or mend what saved it"
        )
    raise InputError(
        f"storage must be one that holds the numbers of {files[0] if files else 'the model'}, got "
        "one in which some are too large and become infinite; use bf16, nf4 or fp32, and "
        "compute_dtype bf16 or fp32"
    )


def _floats(module: nn.Module) -> Iterator[Tensor]:
    """Yield the numbers that weights are stored in, the constants of quantized ones included."""
    for parameter in module.parameters():
        if isinstance(parameter, Params4bit):
            state = getattr(parameter, "quant_state", None)
            nested = getattr(state, "state2", None)
            held = (getattr(state, "absmax", None), getattr(state, "offset", None))
            yield from (t for t in (*held, getattr(nested, "absmax", None)) if t is not None)
        elif isinstance(parameter, Int8Params):
            if parameter.SCB is not None:
                yield parameter.SCB
        else:
            yield parameter


def source_of(model: str | Path, directory: Path | None) -> str:
    """Return what a message calls the weights of a model: their file, or the index of their files.

    ``directory`` is where they lie; None: not known.
    """
    for name in (WHOLE, INDEX):
        if directory is not None and (directory / name).exists():
            return str(directory / name)
    return repr(str(model))
