"""What decides a trajectory of molecular dynamics."""

from typing import Literal

from pydantic import Field

from mffm.config.base import Schema


class MdConfig(Schema):
    """Molecular dynamics of one structure; kept in its folder, so that the same trajectory goes on."""

    ensemble: Literal["nve", "nvt", "npt"] = Field(
        "nvt", description="constant energy; Langevin thermostat; with a Langevin barostat of the whole cell"
    )
    timestep: float = Field(1.0, gt=0, le=20, description="fs")
    temperature: float | None = Field(
        300.0, gt=0, description="K; of nve only the start's; null: momenta of the structure"
    )
    pressure: float = Field(0.0, description="GPa, of npt")
    thermostat_time: float = Field(100.0, gt=0, description="fs, of nvt and npt")
    barostat_time: float = Field(1000.0, gt=0, description="fs, of npt")
    volume_only: bool = Field(False, description="of npt: the cell keeps its shape")
    log_every: int = Field(10, ge=1, description="steps between rows of log.csv")
    save_every: int = Field(100, ge=1, description="steps between frames of the trajectory and saved states")
    seed: int = Field(0, ge=0, description="of the first momenta and of the noise")
