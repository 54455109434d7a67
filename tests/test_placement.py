"""Models that accelerate places: the same numbers; what it keeps off its device is refused."""

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload
from tiny_models import EQUAL, in_families, word_tokenizer

import eigenlens as el
from eigenlens.models.placement import check_device_map

LAYERS = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "cpu"}, LAYERS], ids=str)
@in_families(["llama", "gpt2"])
def test_a_placed_model_gives_the_numbers_of_one_that_is_not(tiny_folder, family, device_map):
    if family == "gpt2" and len(device_map) > 1 and not isinstance(device_map, str):
        device_map = {"transformer": "cpu", "lm_head": "cpu"}
    if isinstance(device_map, str) and torch.cuda.is_available():
        pytest.skip("would be placed on the GPU")
    options = {"dtype": "float64"}
    plain = el.load_model(tiny_folder(family), device="cpu", **options)
    placed = el.load_model(tiny_folder(family), device_map=device_map, **options)
    assert torch.equal(placed("1 + 2 ="), plain("1 + 2 ="))
    found = []
    for model in (plain, placed):
        scores = el.score(model, el.decompose(model, progress=False), EQUAL, progress=False)
        with el.freeze(model, el.select(scores, 0.2)):
            found.append((scores.delta_loss, el.evaluate(model, EQUAL, progress=False).loss))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_layers_on_the_disk_are_refused_by_name_before_anything_is_loaded(tiny_folder):
    with pytest.raises(ValueError, match=r"model\.layers\.1 would be offloaded.*has room for it"):
        el.load_model("no such folder", device_map={**LAYERS, "model.layers.1": "disk"})
    more = {"model.layers.0": "disk", "model.layers.1": "disk"}
    with pytest.raises(ValueError, match=r"model\.layers\.0 and 1 more"):
        el.load_model(tiny_folder("llama"), device_map=LAYERS | more)


@pytest.mark.parametrize("kind", ["processor", "disk"])
def test_a_model_in_memory_that_is_offloaded_is_refused_by_name(tiny_folder, tmp_path, kind):
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    if kind == "disk":
        disk_offload(model, tmp_path)
    else:
        cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model\.embed_tokens and \d+ more would be offloaded"):
        el.load_model(model, word_tokenizer())


def test_what_a_map_cannot_be(tiny_folder, tiny):
    folder = tiny_folder("llama")
    for options, message in (
        ({"device_map": "everywhere"}, "Unknown device_map 'everywhere'"),
        ({"device_map": "auto", "device": "cpu"}, "give one of them"),
        ({"device_map": "auto", "merge_adapter": True}, "without adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            el.load_model(folder, **options)
    with pytest.raises(ValueError, match="The device_map is a int"):
        check_device_map(3, None)
    with pytest.raises(ValueError, match="dispatch_model"):
        el.load_model(tiny("llama"), device_map="auto")
