"""What a hub id or a directory holds, and what to say of one that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from lowmem_reft.base.stored import (
    INDEX,
    WHOLE,
    check_checkpoint,
    in_one_line,
    read_index,
    read_json_object,
)
from lowmem_reft.base.trust import check_config
from lowmem_reft.errors import InputError, is_of_the_machine


class ClosedError(InputError):
    """The hub cannot be reached, or keeps what is asked for to itself; ``why`` says which."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def load_config(model: str | Path, revision: str = "main") -> Any:
    """Read the configuration of a hub id or a directory.

    Raises:
        InputError: There is none (``ClosedError``: none can be had), it describes no model that
            transformers knows, it asks for code, or an adapter lies beside it.
    """
    check_path(model)
    if (Path(model) / "adapter_config.json").is_file():
        raise InputError(
            f"model must be a base, got {str(model)!r} with an adapter_config.json, which "
            "transformers would load as well; give the directory of the base alone"
        )
    if (path := Path(model) / CONFIG_NAME).is_file():
        read_json_object(path, "a JSON object that describes a model")
    try:
        # As transformers itself reads it, which may be another file than config.json.
        content, _ = transformers.PreTrainedConfig.get_config_dict(str(model), revision=revision)
        check_config(model, content)
        return transformers.AutoConfig.from_pretrained(
            str(model), revision=revision, trust_remote_code=False
        )
    except InputError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        if isinstance(error, OSError) and not Path(model).exists():
            raise _not_found(model, error) from error
        raise InputError(
            f"model must be a directory with a config.json or a hub id, got {str(model)!r}; check "
            f"what config.json says there ({in_one_line(error)})"
        ) from error


def num_blocks(config: Any) -> int:
    """Return how many transformer blocks a base has, by its configuration."""
    return int(config.get_text_config().num_hidden_layers)


def check_path(model: str | Path) -> None:
    """Refuse what is meant as a directory and is none."""
    if str(model).startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise InputError(
            f"model must be a hub id or an existing directory, got {str(model)!r}; check the path"
        )


def check_on_hub(model: str | Path, revision: str) -> None:
    """Refuse a hub id of which nothing can be had."""
    try:
        _find(model, CONFIG_NAME, revision)
    except OSError as error:
        raise _not_found(model, error) from error


def _not_found(model: str | Path, error: Exception) -> InputError:
    """Return what to say of a hub id, or a directory's name, that transformers does not find."""
    cause = error.__cause__ or error.__context__
    is_closed = isinstance(cause, LocalEntryNotFoundError | GatedRepoError)
    if isinstance(cause, LocalEntryNotFoundError):
        why = "the hub cannot be reached"
    elif isinstance(cause, GatedRepoError):
        why = "its repository on the hub is gated"
    elif isinstance(cause, RepositoryNotFoundError):
        why = "the hub has no such repository, or none that you may read"
    else:
        why = first_line(error)
    said = (
        f"model must be a directory with a config.json or a hub id, got {str(model)!r}: there is "
        f"no such directory, and {why}; check name, network and access rights"
    )
    return ClosedError(said, why) if is_closed else InputError(said)


def _find(model: str | Path, name: str, revision: str) -> Path | None:
    """Return where a file of a hub id or a directory lies; None if it has none of the name."""
    found = cached_file(
        str(model), name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def local_directory(model: str, revision: str | None) -> Path | None:
    """Return the directory of a model, that of the local cache for a hub id; None if none is here.

    A revision that is None is not known, which is no matter if there is only one in the cache.
    """
    if not model or Path(model).is_dir():
        return Path(model) if model else None
    try:
        found = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a name of the hub at all
        return None
    return None if revision is None and len(list(found.parent.iterdir())) > 1 else found


def weight_files(model: str | Path, revision: str) -> list[Path]:
    """Return the safetensors files of a hub id or a directory.

    Raises:
        InputError: There are none, not all that there should be, or one is not whole.
    """
    if Path(model).is_dir():
        check_checkpoint(Path(model))
    try:
        files = weights_among(lambda name: _find(model, name, revision))
    except OSError as error:
        raise InputError(
            f"model must have readable safetensors, got {str(model)!r}; check it "
            f"({first_line(error)})"
        ) from error
    found = [file for file in files if file is not None]
    if not files or len(found) < len(files):
        raise InputError(
            f"model must have all of its safetensors, got {str(model)!r}; convert or download it"
        )
    if not Path(model).is_dir():
        check_checkpoint(found[0].parent)
    return found


def files_in(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory that are there."""
    found = weights_among(lambda name: directory / name if (directory / name).is_file() else None)
    return [file for file in found if file is not None]


def weights_among(find: Callable[[str], Path | None]) -> list[Path | None]:
    """Return the files that transformers would load: the whole one, else those of the index.

    ``find`` tells where a file lies; None if it is not there.
    """
    whole = find(WHOLE)
    if whole is not None:
        return [whole]
    index = find(INDEX)
    return [] if index is None else [find(name) for name in sorted({*read_index(index).values()})]


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().split("\n")[0]
