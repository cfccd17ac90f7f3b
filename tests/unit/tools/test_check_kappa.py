"""The table of conductivities, from the reference's own modes written as a benchmark's record."""

import gzip
import json
from pathlib import Path

import check_kappa
import pytest

from mffm.errors import InputError
from mffm.evaluate import published

MATERIAL = "mp-1265"


def folder_with(records: list[dict], folder: Path) -> Path:
    place = folder / "matbench-discovery" / "kappa103"
    place.mkdir(parents=True)
    (place / "structures.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_reference_itself_has_no_error(public_data: Path, tmp_path: Path):
    references = public_data / "kappa103" / "kappas_phononDB_PBE_noNAC.json.gz"
    columns = json.loads(gzip.decompress(references.read_bytes()))
    index = next(n for n, i in columns["mp_id"].items() if i == MATERIAL)
    result = {key: column[index] for key, column in columns.items()} | {"formula": "Mg4O4", "transport_type": "SMM19"}
    records = [{"id": MATERIAL, "result": result}, {"id": "mp-1138", "reason": "took more than 300 s"}]
    one, other = check_kappa.rows(folder_with(records, tmp_path), "chgnet-0.3.0", references)
    cells = [cell.strip() for cell in one.strip("| ").split("|")]
    assert cells[0] == f"Mg4O4 {MATERIAL}"
    theirs = published.kappa_103()
    place = theirs["_reference"]["material_ids"].index(MATERIAL)
    assert float(cells[2]) == pytest.approx(theirs["chgnet-0.3.0"]["kappa"][place], rel=1e-3)
    assert float(cells[1]) == pytest.approx(theirs["_reference"]["kappa"][place], rel=0.01)
    assert float(cells[4]) == 0
    assert "took more than 300 s" in other


def test_what_is_not_there(public_data: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no published κ"):
        check_kappa.rows(tmp_path, "no-such-model", public_data)
    references = public_data / "kappa103" / "kappas_phononDB_PBE_noNAC.json.gz"
    with pytest.raises(InputError, match="run `mffm benchmark"):
        check_kappa.rows(tmp_path, "chgnet-0.3.0", references)
