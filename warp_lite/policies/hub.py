"""What is named by the hub: found in a folder first, else reached quickly or refused in one line.

The libraries retry for the better part of a minute before they say that a hub cannot be reached, and
so does a misspelt folder's name, which looks like a hub's. One request with a short limit goes first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
TIME_LIMIT = 5.0  # seconds that the hub has to answer the first request


def local(name: str) -> str:
    """The folder that stands for a repository's name: $WARP_LITE_HUB/NAME where there is one, else the name.

    $WARP_LITE_HUB is a folder of repositories of the hub's structure, for machines without a network.
    """
    mirror = os.environ.get("WARP_LITE_HUB")
    if mirror and HUB_NAME.fullmatch(name) and (Path(mirror) / name).is_dir():
        return str(Path(mirror) / name)
    return name


def reach(name: str, kind: str = "model") -> dict:
    """Options with which the libraries load a folder or a repository of the hub without waiting in vain.

    kind: "model" or "dataset". A folder, and a repository that answers, need none; where the hub does
    not answer but its cache has the repository, `local_files_only` is set.
    Raises ValueError in one line when the repository is gated, is not there or cannot be reached.
    """
    if Path(name).exists():
        return {}
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    words = {"model": "model", "dataset": "data set"}[kind]
    try:
        if kind == "dataset":
            HfApi().dataset_info(name, timeout=TIME_LIMIT)
        else:  # a file: the facts of a gated repository are public, its files are not
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIME_LIMIT)
    except GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        raise ValueError(f"{name!r} is gated: accept its terms at {page}, then run `hf auth login` or set "
                         "HF_TOKEN to a token of that account") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"there is no folder {name!r}, and no {words} of that name on the hub that this account "
                         "may read") from error
    except EntryNotFoundError as error:
        raise ValueError(f"the {words} {name!r} on the hub has no config.json") from error
    except Exception as error:  # no network, offline by choice, a proxy's page, a fault of the hub's
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise ValueError(f"the hub refuses {name!r}: HTTP {error.response.status_code}") from error
        if is_cached(name, kind):
            return {"local_files_only": True}
        from huggingface_hub import is_offline_mode

        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"the hub cannot be reached ({type(error).__name__})"
        raise ValueError(f"there is no folder {name!r}, and {why}, nor is a {words} of that name in its cache") \
            from error
    return {}


def is_cached(name: str, kind: str = "model") -> bool:
    """Whether the hub's cache on this machine has something of the repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())
