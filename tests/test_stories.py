"""Groups of an edit, frozen alone and left out: against evaluations under sets made by hand."""

import numpy as np
import pytest
import yaml

import eigenlens as el
from eigenlens.paper.studies import stories
from eigenlens.paper.studies.config import StudyConfig
from eigenlens.paper.studies.grid import Bench, cells
from eigenlens.paper.studies.parts import Parts

SIZES = {"n_train": 40, "n_validation": 20, "n_test": 30}
STUDY = {
    "models": ["arith-tiny"],
    "tasks": {"product": {"task": "ambiguous", "arguments": {"reading": "product", **SIZES}}},
    "methods": {
        "learned": {
            "kind": "learned",
            "arguments": {"reference": "shared", "attenuate": True, "options": {"steps": 40}},
        }
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    found = stories.run(config=folder / "study.yaml", parts=folder / "stories")
    return folder, found


def test_what_groups_do_is_what_freezing_them_does(measured):
    folder, found = measured
    (cell,) = cells(StudyConfig.read(folder / "study.yaml"))
    bench = Bench(Parts(folder / "cells"), folder / "cells", share_scores=False)
    frozen = bench.frozen(cell)
    loaded = bench.loaded("arith-tiny")
    task, model = loaded.task(cell.setting, 0), loaded.model
    options = {"count": stories.COUNT, "progress": False}
    members = el.groups(model, loaded.spectra, frozen, task.train, **options).members["group"]

    def loss(rows):
        with el.freeze(model, frozen.part(np.flatnonzero(rows))):
            return el.evaluate(model, task.test, progress=False).loss

    before, whole = el.evaluate(model, task.test, progress=False).loss, loss(members > 0)
    assert found.table["components"].sum() == len(frozen) > stories.COUNT
    for row in found.table.itertuples():
        own = members == row.group
        assert own.sum() == row.components
        assert row.alone == pytest.approx(loss(own) - before, abs=1e-5)
        assert row.missing == pytest.approx(loss(~own) - whole, abs=1e-5)
        assert row.together == pytest.approx(whole - before, abs=1e-5)


def test_a_part_that_is_done_is_not_measured_again(measured, monkeypatch):
    folder, found = measured
    monkeypatch.setattr(stories, "_measure", lambda *given: pytest.fail("measured again"))
    again = stories.run(config=folder / "study.yaml", parts=folder / "stories")
    assert again.table.equals(found.table)
    assert again.text == found.text
