"""Reading and writing of single files: aside, fsync, rename; nothing but a plain file of the folder is ever read."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mffm.errors import InputError

MAX_JSON_BYTES = 32 * 2**20  # the provenance of a long chain of fine-tunings is 1 MB
DAMAGED_TENSORS = (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError)  # what the library raises


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal.

    Raises:
        InputError: the file does not exist.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the folder is incomplete")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plain(path: Path, limit: int | None = None, first: int = -1) -> bytes:
    """Return the bytes of a file that lies where it says: a link is not followed, a pipe or device not opened.

    Args:
        limit: bytes; more is refused before it is read.
        first: read so many bytes from the start; all where negative.

    Raises:
        InputError: missing, a symbolic link, not a plain file, too large (for memory, too), or not readable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block without the last
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the folder is incomplete") from error
    except OSError as error:
        if path.is_symlink():
            _refuse_link(path)
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a plain file; get the release again")
        if limit is not None and found.st_size > limit:
            raise InputError(f"{path}: {found.st_size:,} bytes, more than the {limit:,} that such a file may have")
        try:
            return file.read(first)
        except MemoryError as error:
            raise InputError(f"{path}: {found.st_size:,} bytes, more than memory holds; get it again") from error


def refuse_links(folder: Path) -> None:
    """Refuse a folder that holds a symbolic link: whatever reads or writes there would leave the folder.

    Raises:
        InputError: naming the link.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                _refuse_link(Path(entry.path))


def _refuse_link(path: Path) -> NoReturn:
    raise InputError(
        f"{path}: a symbolic link, which may lead out of the release; get the files themselves: "
        "copy the folder with cp -rL, or fetch it with mffm release --pull"
    )


def parse_json(data: bytes, place: str) -> dict[str, Any]:
    """Return the object in a JSON text.

    Raises:
        InputError: not UTF-8, not JSON, not an object, or a number that is not finite.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"the number {constant}")

    try:
        content = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{place}: not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(content).__name__}; copy it again")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file.

    Raises:
        InputError: missing or damaged.
    """
    return parse_json(read_plain(path, MAX_JSON_BYTES), str(path))


def json_text(content: Mapping[str, Any]) -> str:
    """Return JSON as ``write_json`` writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON aside, fsync, and rename; errors as ``write_bytes``."""
    write_text(path, json_text(content))


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 aside, fsync, and rename; errors as ``write_bytes``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes aside, fsync, and rename: what was there stays whole until the new file is.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        with aside.open("xb") as file:  # x: a link of this name is not written through
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); free some space; what was there is intact") from error


def parse_weights(data: bytes, place: str) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file.

    Raises:
        InputError: damaged.
    """
    try:
        return safetensors.torch.load(data)
    except DAMAGED_TENSORS as error:
        raise InputError(f"{place}: not a whole safetensors file ({error}); copy it again") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        InputError: missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the folder is incomplete")
    try:
        return safetensors.torch.load_file(path)
    except DAMAGED_TENSORS as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors wants them: on the CPU, contiguous, each filling its storage."""
    return {k: _alone(v.detach().cpu().contiguous()) for k, v in state.items()}


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that fills its storage: itself, or a copy of a part of another."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors aside, fsync, and rename: a half-written file never has the final name.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        aside.unlink(missing_ok=True)
        safetensors.torch.save_file(plain_tensors(state), aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); free some space; what was there is intact") from error


def tensor_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, hexadecimal: of names, dtypes, shapes and values, whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
