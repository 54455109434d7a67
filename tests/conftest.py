"""Shapes and types are enforced on the whole package; no test reaches the network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

from eigenlens.double import StayDouble  # it asks who calls it: no wrapper between

# For the whole session, since modules are imported when they are first used. It takes two fifths of
# the time: `make test` goes without, `make test-all` and what is started by hand do not.
if os.environ.get("EIGENLENS_TYPES") != "unchecked":
    install_import_hook("eigenlens", "beartype.beartype")

import pytest
import torch
from tiny_models import write_tiny_model

import eigenlens as el

torch.set_num_threads(
    int(os.environ.get("OMP_NUM_THREADS", "2"))
)  # one where two tests run at once


def pytest_collection_modifyitems(items):
    """Tests that register a device for the whole process run last."""
    items.sort(key=lambda item: item.path.name == "test_devices.py")


def pytest_collection_finish():
    """What was imported stays: collecting garbage need not go through a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Decompositions of random models do not belong into the developer's cache."""
    if "EIGENLENS_TEST_CACHE" in os.environ:
        os.environ["EIGENLENS_CACHE"] = os.environ["EIGENLENS_TEST_CACHE"]
    else:
        os.environ["EIGENLENS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _stay_double():
    with StayDouble():
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny random model of a family, written by transformers on first use."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str):
        path = root / family
        if not path.exists():
            write_tiny_model(family, path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """A tiny float64 model of a family, loaded once."""
    loaded: dict[str, object] = {}

    def model(family: str):
        if family not in loaded:
            loaded[family] = el.load_model(tiny_folder(family), dtype=torch.float64, device="cpu")
        return loaded[family]

    return model
