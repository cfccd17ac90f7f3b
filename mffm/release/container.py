"""A release on disk: a folder, or one safetensors file that holds the same; read and checked before anything is built.

    model.safetensors        weights
    config.json              format version, model configuration, normalisation constants
    fidelities.json          per fidelity: level of theory, element references with their report, label counts
    provenance.json          data fingerprints, sources with licences, code version, recipe, base, the release itself
    metrics.json             errors per split, fidelity and property
    outputs.json             reference outputs: predictions for ten structures
    uncertainty.safetensors  last-layer uncertainty, where it was fitted; uncertainty.json says how
    README.md                the card, generated from the rest
    manifest.json            format version, SHA-256 and size of every other file, and of itself

The single-file form is ``model.safetensors`` with the text files in its metadata. A safetensors file has no paths and
runs no code, and every tool that reads safetensors still finds the weights; a zip would bring member names that may
leave the folder, links and compression bombs. ``weights_sha256`` of the manifest covers tensors, not a file, so one
manifest serves both forms.

The digests show damage and stray edits. Against someone who rewrites the manifest too, compare its ``own_sha256`` with
one from a trusted place (``mffm inspect`` prints it).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from mffm.errors import InputError, known
from mffm.release.files import (
    MAX_JSON_BYTES,
    json_text,
    parse_json,
    parse_weights,
    plain_tensors,
    read_plain,
    refuse_links,
    tensor_digest,
    write_bytes,
)
from mffm.release.spec import SPEC_FILES
from mffm.release.upgrades import FORMAT_VERSION, Documents, checked_version, upgraded

MANIFEST, CARD = "manifest.json", "README.md"
WEIGHTS, UNCERTAINTY = "model.safetensors", "uncertainty.safetensors"
JSON_FILES = (*SPEC_FILES, "metrics.json", "outputs.json", "uncertainty.json")
TEXT_FILES = (*JSON_FILES, CARD)
TENSOR_FILES = (WEIGHTS, UNCERTAINTY)
FILES = (*TEXT_FILES, *TENSOR_FILES, MANIFEST)  # all that a release may consist of
SINGLE_SUFFIX = ".safetensors"
_SINGLE_UNCERTAINTY = "uncertainty/"  # prefix of its tensors in the single-file form
_MAX_HEADER = len(JSON_FILES) * MAX_JSON_BYTES
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Contents:
    """What a release holds, checked and of the present format version.

    Attributes:
        version: of the format as found, before upgrades.
        changed: text files that nothing computes with (the card) and that differ from the manifest.
    """

    path: Path
    version: int
    documents: Documents
    tensors: dict[str, Tensor]
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    card: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    @property
    def is_single_file(self) -> bool:
        return self.path.is_file()


def is_release(path: Path) -> bool:
    """Return whether a path looks like a release: a file, or a folder with a manifest or a config.json."""
    return path.is_file() or (path / MANIFEST).exists() or (path / "config.json").exists()


def read(path: Path) -> Contents:
    """Return the contents of a release of any version.

    Raises:
        InputError: a file is missing, damaged, changed, too large or a link; a newer version.
    """
    contents = _read_single(path) if path.is_file() else _read_folder(path)
    contents.documents = upgraded(contents.documents, contents.version, str(path))
    return contents


def _read_folder(folder: Path) -> Contents:
    refuse_links(folder)
    if not (folder / MANIFEST).exists():
        return _read_version_1(folder)
    manifest = _checked_manifest(read_plain(folder / MANIFEST, MAX_JSON_BYTES), str(folder / MANIFEST))
    found: dict[str, bytes] = {}
    changed = []
    for name, entry in manifest["files"].items():
        if name == CARD and not (folder / name).exists():
            changed.append(name)
            continue
        data = read_plain(folder / name, MAX_JSON_BYTES if name in TEXT_FILES else entry["size"])
        if name == CARD:  # people edit cards, on a hub for example; nothing is computed from one
            changed += [name] if _differs(data, entry) else []
        elif len(data) != entry["size"]:
            raise InputError(
                f"{folder / name}: {len(data):,} bytes, {entry['size']:,} in the manifest; it was cut off or changed, "
                "get it again"
            )
        elif _differs(data, entry):
            raise InputError(
                f"{folder / name}: its SHA-256 differs from the manifest's; it is damaged or was changed, get it again"
            )
        found[name] = data
    tensors = parse_weights(found[WEIGHTS], str(folder / WEIGHTS))
    _check_tensors(tensors, manifest, str(folder / WEIGHTS))
    return Contents(
        path=folder,
        version=manifest["format_version"],
        documents={n: parse_json(found[n], str(folder / n)) for n in JSON_FILES if n in found},
        tensors=tensors,
        uncertainty=parse_weights(found[UNCERTAINTY], str(folder / UNCERTAINTY)) if UNCERTAINTY in found else {},
        card=found.get(CARD, b"").decode(errors="replace"),
        manifest=manifest,
        changed=changed,
    )


def _read_version_1(folder: Path) -> Contents:
    """Version 1 has no manifest; its config.json holds the SHA-256 of the weights."""
    config = parse_json(read_plain(folder / "config.json", MAX_JSON_BYTES), str(folder / "config.json"))
    version = checked_version(config.get("format_version"), str(folder / "config.json"))
    if version > 1:
        raise InputError(f"{folder / MANIFEST}: no such file; the release is incomplete, get it again")
    weights = read_plain(folder / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != config.get("weights_sha256"):
        raise InputError(
            f"{folder / WEIGHTS}: its SHA-256 differs from the one in config.json; the release is damaged or was "
            "changed, get it again"
        )
    others = ("fidelities.json", "provenance.json", "metrics.json")
    documents = {n: parse_json(read_plain(folder / n, MAX_JSON_BYTES), str(folder / n)) for n in others}
    return Contents(
        path=folder,
        version=version,
        documents={"config.json": config, **documents},
        tensors=parse_weights(weights, str(folder / WEIGHTS)),
        card=read_plain(folder / CARD, MAX_JSON_BYTES).decode(errors="replace") if (folder / CARD).exists() else "",
    )


def _read_single(path: Path) -> Contents:
    header = _header(path)
    texts = _metadata(header, str(path))
    if MANIFEST not in texts:
        raise InputError(
            f"{path}: a file without {MANIFEST} in its metadata: not a release in the single-file form; a release in a "
            "folder is given as the folder"
        )
    manifest = _checked_manifest(texts[MANIFEST].encode(), f"{path}: {MANIFEST}")
    changed = []
    for name, entry in manifest["files"].items():
        if name in TENSOR_FILES:
            continue
        text = texts.get(name)
        if name == CARD:
            changed += [name] if text is None or _differs(text.encode(), entry) else []
        elif text is None:
            raise InputError(f"{path}: lacks {name}; get it again")
        elif _differs(text.encode(), entry):
            raise InputError(f"{path}: {name}: its SHA-256 differs from the manifest's; it is damaged or was changed")
    # Tensors take as much here as in files of their own, which have headers besides.
    stated = sum(entry["size"] for name, entry in manifest["files"].items() if name in TENSOR_FILES)
    everything = parse_weights(read_plain(path, len(header) + stated), str(path))
    own = {k: v for k, v in everything.items() if not k.startswith(_SINGLE_UNCERTAINTY)}
    further = {k.removeprefix(_SINGLE_UNCERTAINTY): v for k, v in everything.items() if k not in own}
    _check_tensors(own, manifest, str(path))
    if (further or UNCERTAINTY in manifest["files"]) and tensor_digest(further) != manifest.get("uncertainty_sha256"):
        raise InputError(f"{path}: the uncertainty's SHA-256 differs from the manifest's; it is damaged or was changed")
    return Contents(
        path=path,
        version=manifest["format_version"],
        documents={n: parse_json(texts[n].encode(), f"{path}: {n}") for n in JSON_FILES if n in manifest["files"]},
        tensors=own,
        uncertainty=further,
        card=texts.get(CARD, ""),
        manifest=manifest,
        changed=changed,
    )


def _header(path: Path) -> bytes:
    """Return a safetensors file up to its tensors: 8 bytes of length, little-endian, then a JSON header."""
    start = read_plain(path, first=8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > path.stat().st_size - 8:
        raise InputError(f"{path}: not a whole safetensors file; it was cut off, or is something else")
    if length > _MAX_HEADER:
        raise InputError(f"{path}: a header of {length:,} bytes, more than the {_MAX_HEADER:,} that it may have")
    return read_plain(path, first=8 + length)


def _metadata(header: bytes, place: str) -> dict[str, str]:
    metadata = parse_json(header[8:], place).get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{place}: metadata that is no text; it is damaged, get it again")
    for name, text in metadata.items():
        if len(text) > MAX_JSON_BYTES:
            raise InputError(f"{place}: {name} has {len(text):,} characters, more than the {MAX_JSON_BYTES:,} allowed")
        if not _is_utf8(text):
            raise InputError(f"{place}: {name} is not UTF-8; it is damaged, get it again")
    return metadata


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone half of a surrogate pair, which JSON can write
        return False
    return True


def _checked_manifest(data: bytes, place: str) -> dict[str, Any]:
    """Return a manifest that is whole and names no file but those of a release.

    Raises:
        InputError: damaged, of a newer version, or with a name that a release does not have.
    """
    manifest = parse_json(data, place)
    checked_version(manifest.get("format_version"), place)  # a newer one may be sealed in another way
    if manifest.get("own_sha256") != _seal(manifest):
        raise InputError(f"{place}: its SHA-256 differs from the one written in it; it is damaged or was changed")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {*SPEC_FILES, WEIGHTS} <= set(files):
        raise InputError(f"{place}: does not list the files of a release; get it again")
    for name, entry in files.items():
        if name not in FILES or name == MANIFEST:
            raise InputError(f"{place}: lists {name!r}, which is not a part of a release; its parts: {known(FILES)}")
        if not (
            isinstance(entry, dict)
            and _SHA256.fullmatch(str(entry.get("sha256")))
            and type(entry.get("size")) is int  # True is an int, too
            and entry["size"] >= 0
        ):
            raise InputError(f"{place}: no SHA-256 or size of {name}; get it again")
    return manifest


def _seal(manifest: Mapping[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "own_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differs(data: bytes, entry: Mapping[str, Any]) -> bool:
    return hashlib.sha256(data).hexdigest() != entry["sha256"]


def _check_tensors(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], place: str) -> None:
    if tensor_digest(tensors) != manifest.get("weights_sha256"):
        raise InputError(f"{place}: the weights' SHA-256 differs from the manifest's; they are damaged or were changed")


def extra_files(contents: Contents) -> list[str]:
    """Return what lies in a release's folder and is not in its manifest: evaluations, say; never read."""
    if contents.is_single_file:
        return []
    return sorted(
        p.name for p in contents.path.iterdir() if p.name not in {*contents.manifest.get("files", ()), MANIFEST}
    )


def write(
    target: Path,
    documents: Documents,
    tensors: Mapping[str, Tensor],
    card: str,
    uncertainty: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a release as a folder or, where the name ends in ``.safetensors``, as a single file; whole or not at all.

    Raises:
        InputError: the target exists, or cannot be written.
    """
    refuse_existing(target)
    texts = {**{name: json_text(content).encode() for name, content in documents.items()}, CARD: card.encode()}
    tensors, uncertainty = plain_tensors(tensors), plain_tensors(uncertainty or {})
    blobs = {WEIGHTS: safetensors.torch.save(tensors)}
    if uncertainty:
        blobs[UNCERTAINTY] = safetensors.torch.save(uncertainty)
    manifest = _manifest({**texts, **blobs}, tensors, uncertainty)
    if target.suffix == SINGLE_SUFFIX:
        metadata = {name: text.decode() for name, text in texts.items()} | {MANIFEST: manifest.decode()}
        everything = {**tensors, **{_SINGLE_UNCERTAINTY + k: v for k, v in uncertainty.items()}}
        write_bytes(target, safetensors.torch.save(everything, metadata))
        return target
    _write_folder(target, {**texts, **blobs, MANIFEST: manifest})
    return target


def refuse_existing(target: Path) -> None:
    """Refuse to write over something.

    Raises:
        InputError: the target is a file, a link, or a folder that is not empty.
    """
    if target.is_symlink() or target.is_file() or (target.exists() and any(target.iterdir())):
        raise InputError(f"{target}: exists and is not empty; give another name or remove it")


def _manifest(files: Mapping[str, bytes], tensors: Mapping[str, Tensor], uncertainty: Mapping[str, Tensor]) -> bytes:
    content: dict[str, Any] = {
        "format": "mffm release",
        "format_version": FORMAT_VERSION,
        "files": {n: {"sha256": hashlib.sha256(d).hexdigest(), "size": len(d)} for n, d in sorted(files.items())},
        "weights_sha256": tensor_digest(tensors),
    }
    if uncertainty:
        content["uncertainty_sha256"] = tensor_digest(uncertainty)
    return json_text({**content, "own_sha256": _seal(content)}).encode()


def _write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    aside = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a write that was killed
        aside.mkdir(parents=True)
        for name, data in files.items():
            write_bytes(aside / name, data)
        put_in_place(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"{target}: cannot be written ({error})") from error


def put_in_place(aside: Path, target: Path, keep: Iterable[str] = FILES) -> None:
    """Give a folder its final name; what is not named is removed first (the book-keeping of a download)."""
    names = set(keep)
    for path in aside.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if target.exists():
        target.rmdir()
    os.replace(aside, target)
