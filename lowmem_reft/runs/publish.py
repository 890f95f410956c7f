"""The adapter of a run on the Hugging Face hub: ``train --push-to-hub``.

What can fail is tried before the training, as transformers' Trainer does: the repository is made.
An upload that fails loses nothing, as the adapter is saved by then.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, get_token

from lowmem_reft.base.stored import in_one_line
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from lowmem_reft.runs.resolve import Run


def check_repository(repo_id: str) -> None:
    """Refuse what is no name of a repository, and a hub that is not to be asked or knows no user.

    Raises:
        InputError: See above.
    """
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id, re.ASCII):
        raise InputError(
            f"push_to_hub must be the id of a repository, got {repo_id!r}; write NAME or USER/NAME"
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"push_to_hub must be left out offline, got {repo_id!r} with HF_HUB_OFFLINE set; unset "
            "it, or push the adapter later"
        )
    if get_token() is None:
        raise InputError(
            f"push_to_hub must come with a token of the hub, got {repo_id!r} without one; log in "
            "with hf auth login, or set HF_TOKEN"
        )


def make_repository(run: Run) -> None:
    """Make the run's repository, private or public, unless it is there.

    Raises:
        InputError: The hub does not answer, or does not let this user.
    """
    hub = run.options.hub
    repo_id = hub.push_to_hub
    if repo_id is None:
        return
    try:
        HfApi().create_repo(repo_id, private=hub.hub_private_repo, exist_ok=True)
    except Exception as error:  # of the network or of the hub, by whichever of its libraries
        raise InputError(
            f"push_to_hub must be a repository that this token may write to, got {repo_id!r}; "
            f"check name, network and access rights, or leave it out ({in_one_line(error)})"
        ) from error


def publish(run: Run) -> str:
    """Upload the folder of the run's adapter, its README.md included; return the address.

    Raises:
        InputError: It failed; the message says how to do it by hand.
    """
    repo_id = run.options.hub.push_to_hub
    assert repo_id is not None
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=run.adapter_dir, commit_message="Upload adapter"
        )
    except Exception as error:
        raise InputError(
            f"push_to_hub must be reachable after the training too, got {in_one_line(error)!r}; "
            f"the adapter is saved, push it with hf upload {repo_id} {run.adapter_dir}"
        ) from error
    return str(commit.repo_url)
