"""Powers that time and memory grow with: of chains that take a known time."""

import json
import math

import pytest

from eigenlens.bench import growth
from eigenlens.bench.stages import STAGES


def stand_in(config, out):
    """Takes width² × layers seconds, and 5 × tokens / examples bytes above the loaded model."""
    width, layers = map(int, out.parent.name.split("x"))
    taken = {"seconds": float(width**2 * layers), "loaded": 7}
    taken["peak"] = 7 + 5e6 * config.tokens / config.examples
    return {"stages": [{"stage": name, **taken} for name in STAGES]}


def test_powers_are_those_that_chains_grow_with(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "chain", stand_in)
    monkeypatch.setattr(growth, "make_model", lambda *given, **options: True)
    powers = growth.growth(tmp_path).set_index(["of", "measure", "stage"])["power"].sort_index()
    expected = {"seconds": (2, 1, 0, 0), "bytes": (0, 0, 1, -1)}
    for of, values in expected.items():
        for measure, value in zip(growth.SIZES, values, strict=True):
            assert powers.xs((of, measure)).to_dict() == pytest.approx(dict.fromkeys(STAGES, value))
    kept = json.loads((tmp_path / "growth.json").read_text())
    assert len(kept["sizes"]["size"]) == len(STAGES) * sum(map(len, growth.SIZES.values()))


def test_a_power_has_the_interval_of_its_slope():
    # By hand: through (0, 0), (1, 1), (2, 3) in powers of two, residuals 1/6, -1/3, 1/6.
    found = growth.fitted_power([1, 2, 4], [1, 2, 8])
    assert found["power"] == pytest.approx(1.5)
    # Standard error sqrt(Σr² / 1 / Σ(x - x̄)²) = sqrt((1/36 + 1/9 + 1/36) / 2) = 0.2887; t = 12.706.
    assert found["high"] - found["power"] == pytest.approx(12.7062 * 0.288675, rel=1e-4)
    assert found["power"] - found["low"] == pytest.approx(12.7062 * 0.288675, rel=1e-4)


def test_without_a_positive_value_there_is_no_power():
    found = growth.fitted_power([1, 2, 4], [1, 0, 8])
    assert all(math.isnan(value) for value in found.values())
