"""Releases on a model hub, through huggingface_hub (``pip install 'mffm[hub]'``); HF_ENDPOINT names another server.

Only the files of a release travel, by their names; whatever else a repository holds is neither fetched nor read.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mffm.errors import InputError
from mffm.release import container
from mffm.release.loading import load


def push(path: Path, repository: str, public: bool = False, revision: str | None = None) -> str:
    """Upload a release in its folder form as one commit; return the commit's address.

    Args:
        repository: ``owner/name``; made where there is none, private unless ``public``.
        revision: branch; the main one where not given.

    Raises:
        InputError: not a whole release, huggingface_hub is not installed, or the hub refuses.
    """
    loaded = load(path)
    if loaded.contents is None or loaded.contents.is_single_file or loaded.contents.version < container.FORMAT_VERSION:
        raise InputError(f"{path}: a hub takes the folder form of the present version: write one with mffm release")
    digest = loaded.contents.manifest["own_sha256"]
    with _told(repository) as hub:
        api = hub.HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        names = [name for name in container.FILES if (path / name).is_file()]
        commit = api.create_commit(  # one commit: nobody sees half a release
            repository,
            [hub.CommitOperationAdd(name, path / name) for name in names],
            commit_message=f"mffm release {digest[:12]}",
            revision=revision,
        )
    return str(commit.commit_url)


def pull(repository: str, target: Path, revision: str | None = None) -> Path:
    """Download a release into a new folder; it is checked before it gets its name.

    Raises:
        InputError: the target is named like a single file, or exists, huggingface_hub is not installed, the hub has no
            such repository or revision, or what it has is not a whole release.
    """
    if target.suffix == container.SINGLE_SUFFIX:
        folder = target.with_suffix("")
        raise InputError(
            f"{target}: a pull writes a folder; name one, then make the file with mffm release {folder} {target}"
        )
    container.refuse_existing(target)
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _told(repository) as hub:
            hub.snapshot_download(repository, revision=revision, local_dir=aside, allow_patterns=list(container.FILES))
        if not (aside / container.MANIFEST).is_file():
            raise InputError(f"{repository}: not a release of mffm: no {container.MANIFEST} in it")
        load(aside)
        container.put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


@contextmanager
def _told(repository: str) -> Iterator[Any]:
    """Give huggingface_hub; turn what goes wrong in it into bad input."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{repository}: huggingface_hub is not installed ({error}): pip install 'mffm[hub]'"
        ) from error
    try:
        yield huggingface_hub
    except Exception as error:  # those of its transport come through: requests, httpx or httpx2 by its version
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{repository}: the hub refused or was not reached ({type(error).__name__}: {reason[:300]}); check the "
            "name, `hf auth login` or HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT"
        ) from error
