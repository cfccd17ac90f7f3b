"""Releases: safetensors and JSON that hold everything a user of a potential needs, and no pickle.

``container`` says what a release consists of and reads it safely, ``upgrades`` brings older format versions to the
present one, ``loading`` makes a potential of it, ``saving`` writes one, ``outputs`` are the predictions that it is
checked against, ``hub`` exchanges it.

A run's folder keeps the same JSON files under ``potential/`` and its weights under ``weights/``, so that a run can be
evaluated or loaded as it stands.
"""

from mffm.release.card import licence_chain
from mffm.release.files import read_json, read_weights, sha256, write_json, write_text, write_weights
from mffm.release.loading import NOT_CONSERVATIVE, Loaded, load
from mffm.release.saving import folded, save
from mffm.release.spec import PotentialSpec, code_version
from mffm.release.systems import refit_references, same_systems, systems_at
from mffm.release.upgrades import FORMAT_VERSION

__all__ = [
    "FORMAT_VERSION",
    "NOT_CONSERVATIVE",
    "Loaded",
    "PotentialSpec",
    "code_version",
    "folded",
    "licence_chain",
    "load",
    "read_json",
    "read_weights",
    "refit_references",
    "same_systems",
    "save",
    "sha256",
    "systems_at",
    "write_json",
    "write_text",
    "write_weights",
]
