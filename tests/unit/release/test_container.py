"""A release that was damaged, changed or made to reach out of its folder is refused with the file and the reason."""

import contextlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mffm.errors import InputError
from mffm.release import container, load
from mffm.release import save as save_release
from mffm.release.container import MANIFEST
from mffm.release.files import read_plain

GOLDEN = Path(__file__).parents[2] / "golden"
FORMS = ["folder", "single"]


@pytest.fixture
def copy(tiny_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_release, tmp_path / "copy"))


@pytest.fixture(scope="module")
def single(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_release(tiny_release, tmp_path_factory.mktemp("single") / "one.safetensors")


def edit(path: Path, change: Callable[[dict], None], seal: bool = True) -> None:
    """Change a JSON file of a release and, as a forger would, the manifest with it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if seal:
        manifest = path if path.name == MANIFEST else path.with_name(MANIFEST)
        stated = json.loads(manifest.read_text())
        if path.name != MANIFEST:
            data = path.read_bytes()
            stated["files"][path.name] = {"sha256": container.hashlib.sha256(data).hexdigest(), "size": len(data)}
        stated["own_sha256"] = container._seal(stated)
        manifest.write_text(json.dumps(stated))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "fidelities.json",
        "provenance.json",
        "metrics.json",
        "outputs.json",
        "model.safetensors",
        MANIFEST,
    ],
)
def test_a_file_cut_off_or_gone_is_named(copy: Path, name: str):
    os.truncate(copy / name, (copy / name).stat().st_size // 2)
    with pytest.raises(InputError, match=rf"{name}: .*(cut off|not valid JSON)"):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: no such file; the (folder|release) is incomplete"):
        load(copy)


def test_changed_weights_are_refused_however_well_the_forger_did(copy: Path):
    state = load_file(copy / "model.safetensors")
    key = next(k for k, v in state.items() if v.numel() > 1)
    state[key] = state[key] + 1e-3
    save_file(state, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors: .*differs from the manifest's"):
        load(copy)

    def restate(manifest: dict) -> None:
        data = (copy / "model.safetensors").read_bytes()
        manifest["files"]["model.safetensors"] = {
            "sha256": container.hashlib.sha256(data).hexdigest(), "size": len(data)
        }  # fmt: skip
        manifest["weights_sha256"] = container.tensor_digest(state)

    edit(copy / MANIFEST, restate)
    with pytest.raises(InputError, match="predictions differ from the reference outputs in it: structure"):
        load(copy)


def test_changed_references_and_changed_code_are_seen_in_the_outputs(copy: Path, monkeypatch: pytest.MonkeyPatch):
    edit(copy / "fidelities.json", lambda c: c["fidelities"][1]["references"].update(C=-1034.2))
    with pytest.raises(InputError, match=r"at 'pbe': energy differs by .* eV/atom, tolerance"):
        load(copy)


def test_newer_format_says_so(copy: Path, single: Path, tmp_path: Path):
    edit(copy / MANIFEST, lambda c: c.update(format_version=99), seal=False)
    with pytest.raises(InputError, match=r"format version 99; .* reads versions 1 to 2; install a newer mffm"):
        load(copy)
    data = single.read_bytes()
    newer = tmp_path / "newer.safetensors"
    newer.write_bytes(
        data.replace(b'\\"format_version\\": 2,\\n  \\"files', b'\\"format_version\\": 3,\\n  \\"files', 1)
    )
    assert newer.read_bytes() != data
    with pytest.raises(InputError, match=r"format version 3; .*install a newer mffm"):
        load(newer)


def test_not_a_release(tmp_path: Path):
    with pytest.raises(InputError, match="neither a release"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such release or run"):
        load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello, this is not a release")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(tmp_path / "text")
    save_file({"x": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match=r"without manifest.json in its metadata"):
        load(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", MANIFEST, "README.md", "evaluation-test.json"])
def test_a_symbolic_link_is_never_followed(copy: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    if (copy / name).exists():
        shutil.move(copy / name, outside)
    else:
        outside.write_text("{}")
    (copy / name).symlink_to(outside)
    with pytest.raises(InputError, match=rf"{name}: a symbolic link"):
        load(copy)


@pytest.mark.parametrize("channels", [12, 10**9])
def test_weights_of_another_shape_name_the_tensor_before_anything_is_allocated(copy: Path, channels: int):
    """10⁹ channels would be 10¹⁹ bytes: refused by shapes alone."""
    edit(copy / "config.json", lambda c: c["model"]["backbone"].update(channels=channels))
    with pytest.raises(InputError, match=r"does not fit its config\.json"):
        load(copy)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "weights/../../x", "a\\..\\b", "", ".", "x.json"])
def test_a_manifest_cannot_name_another_file(copy: Path, name: str):
    def add(manifest: dict) -> None:
        manifest["files"][name] = {"sha256": "0" * 64, "size": 1}

    edit(copy / MANIFEST, add)
    with pytest.raises(InputError, match="is not a part of a release"):
        load(copy)


def test_a_pipe_does_not_hang_the_loader(copy: Path):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    with pytest.raises(InputError, match=r"config.json: not a plain file"):
        load(copy)


def test_a_huge_or_deep_json_is_refused(copy: Path, tiny_release: Path, tmp_path: Path):
    with (copy / MANIFEST).open("wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(InputError, match=r"manifest.json: 1,000,000,000,000 bytes, more than"):
        load(copy)
    deep = tmp_path / "deep.safetensors"
    header = b'{"__metadata__":' + b"[" * 10**6
    deep.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="not valid JSON"):
        load(deep)
    deep.write_bytes((2**63).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(deep)


@pytest.mark.parametrize("size", ["12", None, True, 1.5, -1])
def test_a_size_that_is_none_is_refused(copy: Path, size: object):
    edit(copy / MANIFEST, lambda c: c["files"]["config.json"].update(size=size))
    with pytest.raises(InputError, match=r"manifest.json: no SHA-256 or size of config.json"):
        load(copy)


def test_tensors_larger_than_the_manifest_says_are_not_read(copy: Path, single: Path, tmp_path: Path):
    file = Path(shutil.copy(single, tmp_path / "large.safetensors"))
    for path, release in ((copy / "model.safetensors", copy), (file, file)):
        os.truncate(path, 10**12)  # sparse
        with pytest.raises(InputError, match=rf"{path.name}: 1,000,000,000,000 bytes, more than"):
            load(release)


def test_a_file_larger_than_memory_is_refused(tmp_path: Path):
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, 2**36)  # sparse
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    try:
        with pytest.raises(InputError, match=r"68,719,476,736 bytes, more than memory holds"):
            read_plain(file)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_an_edited_card_and_other_files_do_not_matter(copy: Path):
    (copy / "README.md").write_text("my own words")
    (copy / "evaluation-test.json").write_text("{}")
    contents = load(copy).contents
    assert contents.changed == ["README.md"]
    assert container.extra_files(contents) == ["evaluation-test.json"]


def test_hidden_tensors_of_a_single_file_are_refused(single: Path, tmp_path: Path):
    metadata = container._metadata(container._header(single), "")
    for name in ("uncertainty/x", "y"):
        path = tmp_path / "more.safetensors"
        path.write_bytes(save({**load_file(single), name: torch.zeros(2)}, metadata))
        with pytest.raises(InputError, match="SHA-256 differs from the manifest's"):
            load(path)


def fingerprint(path: Path) -> tuple:
    contents = container.read(path)
    return container.tensor_digest(contents.tensors), json.dumps(contents.documents, sort_keys=True)


@pytest.mark.parametrize("form", FORMS)
def test_fuzz_any_byte_of_any_file(copy: Path, single: Path, tmp_path: Path, form: str):
    """Flipped, cut, doubled, inserted: refused as bad input, or read as exactly what it was; never another error."""
    rng = random.Random(7)
    target = Path(shutil.copy(single, tmp_path / "fuzz.safetensors")) if form == "single" else copy
    files = [target] if form == "single" else [p for p in copy.iterdir() if p.name != "README.md"]
    truth, refused = fingerprint(target), 0
    for _ in range(400):
        file = rng.choice(files)
        before = file.read_bytes()
        # Half of the time near the start, where headers and lengths are.
        at = rng.randrange(min(len(before), rng.choice([64, len(before)])))
        data = bytearray(before)
        kind = rng.choice(["flip", "byte", "cut", "insert", "double"])
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            data[at] = rng.randrange(256)
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        else:
            data[at:at] = data[: rng.randrange(1, 64)]
        file.write_bytes(data)
        try:
            assert fingerprint(target) == truth, (file.name, kind, at)
        except InputError as error:
            assert str(target) in str(error)  # noqa: PT017
            refused += 1
        file.write_bytes(before)
    assert refused > 300


def test_fuzz_the_values_of_a_forged_release(copy: Path):
    """With a manifest that fits: whatever JSON says, the loader refuses it as bad input or makes a potential."""
    rng = random.Random(3)
    odd = [None, True, -1, 0, 1e300, 10**40, "", "pbe", "../x", [], {}, [[1]], {"name": "gfn2"}, "\ud800"]

    def mutate(node: object, depth: int) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))  # type: ignore[call-overload]
        if not keys:
            return
        key = rng.choice(keys)
        child = node[key]  # type: ignore[index]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            mutate(child, depth + 1)
        elif isinstance(node, dict) and rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(odd)  # type: ignore[index]

    names = ["config.json", "fidelities.json", "provenance.json", "metrics.json", "outputs.json", MANIFEST]
    originals = {name: (copy / name).read_text() for name in names}
    refused = 0
    for _ in range(70):
        edit(copy / rng.choice(names), lambda c: mutate(c, 0))
        try:
            load(copy)
        except InputError:
            refused += 1
        for name, text in originals.items():
            (copy / name).write_text(text)
    assert refused > 15


def test_fuzz_version_1(tmp_path: Path):
    """No manifest there: a changed number may pass, but nothing else than bad input is ever raised."""
    rng = random.Random(1)
    copy = Path(shutil.copytree(GOLDEN / "release-v1", tmp_path / "copy"))
    files = [p for p in copy.iterdir() if p.name != "README.md"]
    for _ in range(150):
        file = rng.choice(files)
        before = file.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        with contextlib.suppress(InputError):
            load(copy)
        file.write_bytes(before)


@pytest.mark.parametrize("field", ["model", "avg_neighbors", "scale"])
def test_a_field_that_is_missing_is_told(copy: Path, field: str):
    edit(copy / "config.json", lambda c: c.pop(field))
    with pytest.raises(InputError, match=rf"copy: config.json or fidelities.json lacks .*'{field}'"):
        load(copy)
