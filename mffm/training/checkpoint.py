"""Checkpoints in one portable format, whatever the ZeRO stage or world size: full tensors in safetensors, and JSON.

    checkpoints/step-00000200/
        model.safetensors      raw weights, float32 masters
        ema.safetensors        moving average
        optimizer.safetensors  <state>/<parameter>
        state.json             TrainState, format version, SHA-256 of the three
    checkpoints/latest         name of the newest one, moved last

DeepSpeed's own formats are not general across world sizes and stages; this one holds full tensors.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from mffm import distributed
from mffm.config.recipe import OptimConfig
from mffm.errors import InputError
from mffm.optim import MovingAverage, state_shapes
from mffm.release import read_json, read_weights, sha256, write_json, write_weights
from mffm.training import sharding
from mffm.training.state import TrainState

FORMAT_VERSION = 2
TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def save(folder: Path, engine: Any, module: nn.Module, ema: MovingAverage, state: TrainState, keep: int) -> Path:
    """Write a checkpoint. Every rank must call this; rank 0 writes.

    A half-written one keeps its ``.partial`` name and is never loaded; ``latest`` moves last.
    """
    weights, moments = sharding.master_weights(engine, module), sharding.moments(engine, module)
    average = sharding.whole(module, ema.weights)
    path = folder / f"step-{state.step:08d}"
    if distributed.ranks_from_environment().is_main:
        aside = path.with_name(path.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            with ThreadPoolExecutor(1) as pool:  # hashes a file while the next is written; it takes about as long
                hashing = {}
                for name, tensors in zip(TENSOR_FILES, (weights, average, moments), strict=True):
                    write_weights(aside / name, tensors)
                    hashing[name] = pool.submit(sha256, aside / name)
            digests = {name: result.result() for name, result in hashing.items()}
            content = {"format_version": FORMAT_VERSION, "sha256": digests, "state": state.to_dict()}
            write_json(aside / "state.json", {**content, "own_sha256": _digest(content)})
        except (OSError, InputError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"{path}: cannot write the checkpoint: {error}; earlier checkpoints are intact") from error
        _sync_folder(aside)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        _sync_folder(folder)
        _point_latest(folder, path.name)
        there = sorted(folder.glob("step-*[0-9]"))
        # Later ones are damaged: the run went on from before them. Half-written ones are from a kill.
        superseded = [p for p in there if p.name > path.name]
        older = [p for p in there if p.name <= path.name][:-keep]
        for old in (*superseded, *older, *folder.glob("step-*.partial")):
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return path


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_latest(folder: Path, name: str) -> None:
    aside = folder / "latest.partial"
    with aside.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / "latest")


def newest_whole(folder: Path) -> tuple[Path, TrainState, list[str]] | None:
    """Return the newest checkpoint whose files are whole, its state, and a warning for each damaged one passed over.

    The one that ``latest`` names is looked at first, then older ones. None where there is no checkpoint.

    Raises:
        InputError: there are checkpoints, but each is damaged or of another format; or ``latest`` names a missing one
            and there is no other.
    """
    pointer = folder / "latest"
    names = [p.name for p in sorted(folder.glob("step-*[0-9]"), reverse=True)]
    first = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if first in names:
        names = [first, *(n for n in names if n < first)]
    elif first and not names:
        raise InputError(f"{folder}: latest names {first[:40]!r}, which is not there; restore it, or start a new run")
    warnings: list[str] = []
    for name in names:
        try:
            return folder / name, read_state(folder / name), warnings
        except InputError as error:
            warnings.append(str(error))
    if names:
        raise InputError(f"{folder}: no whole checkpoint\n" + "\n".join(f"  {w}" for w in warnings))
    return None


def read_state(path: Path) -> TrainState:
    """Return the state of a checkpoint after its files were verified.

    Raises:
        InputError: another format version, a missing file, or one whose SHA-256 differs.
    """
    try:
        content = read_json(path / "state.json")
        version = content.get("format_version")
        own = content.pop("own_sha256", None)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path / 'state.json'}: damaged, not the JSON that was written: {error}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    if own != _digest(content):
        raise InputError(f"{path / 'state.json'}: damaged, its SHA-256 differs from the one written with it")
    for name, digest in content["sha256"].items():
        if sha256(path / name) != digest:
            raise InputError(f"{path / name}: damaged, its SHA-256 differs from the one written with it")
    return TrainState.from_dict(content["state"], str(path / "state.json"))


def restore(
    path: Path, engine: Any, module: nn.Module, ema: MovingAverage, state: TrainState, optim: OptimConfig
) -> None:
    """Put weights, optimiser state and moving average back; every rank calls this. Restoring is strict.

    Raises:
        InputError: the tensors are of another model, or of another optimiser than ``optim``'s.
    """
    weights = read_weights(path / "model.safetensors")
    moments = read_weights(path / "optimizer.safetensors")
    names = {name for name, _ in module.named_parameters()}
    if differing := set(weights) ^ names:
        raise InputError(f"{path}: its tensors are of another model; first differing one: {min(differing)}")
    if differing := set(moments) ^ set(state_shapes(module, optim)):
        raise InputError(
            f"{path}: its optimiser state is not of this recipe's optim.kind: {optim.kind}; first differing tensor: "
            f"{min(differing)}; set optim as it was, or start a new run from these weights with start_from"
        )
    sharding.set_weights(engine, module, weights)
    sharding.set_moments(engine, module, moments, state.step)
    ema.load(sharding.shards(module, read_weights(path / "ema.safetensors")), state.ema_updates)
