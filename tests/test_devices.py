"""The whole chain on a device that only pretends, alone and with half of the layers on the CPU.

Nothing is made on the CPU and mixed with what lives elsewhere, and nothing waits in inner loops.
"""

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import MIXED, word_tokenizer

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.gates import Gates
from eigenlens.refinement import integrated, refined
from eigenlens.scoring.accumulators import CrossSums, EffectSums
from eigenlens.search.gate_training import _Training
from eigenlens.tasks import make_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    # What comes back from a device without values is zeros: of no answer token a mean is taken.
    pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide"),
]
TRANSFORMERS_MASK = "eigenlens.metrics.answer_logits"  # transformers asks whether rows are padded


@pytest.fixture(
    params=[
        pytest.param(1, id="one device", marks=pytest.mark.slow),
        pytest.param(2, id="two devices"),
    ]
)
def device(request, tiny_folder):
    """A model without values, perhaps half of it on another device, and the mode it runs in."""
    # Imported here, since from then on the process knows another device.
    from fake_device import NAME, FakeDevice, on_devices

    core = tf.AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    # What accelerate leaves on the modules of a device_map.
    hooks = {
        module: AlignDevicesHook(execution_device="cpu")
        for module in (*core.model.layers, core.model.norm, core.lm_head)
    }
    for module, hook in hooks.items():
        add_hook_to_module(module, hook)
    model = el.load_model(core, word_tokenizer())
    late = torch.device(NAME if request.param == 1 else "cpu")

    def place(name):
        own = "layers.1." in name or "blocks.1." in name or "lm_head" in name or "unembed" in name
        last = name.split(".")[-2] == "norm" or "ln_final" in name
        return late if own or last else torch.device(NAME)

    task = el.load_task(
        "int_add", model.tokenizer, low=1, high=12, n_train=12, n_validation=6, n_test=6
    )
    # One thread: FakeTensorMode is not made for backward passes on two devices at once.
    with torch.autograd.set_multithreading_enabled(False), FakeDevice() as mode:
        on_devices(model, place)
        for module, hook in hooks.items():
            hook.execution_device = next(module.parameters()).device
        model.cfg.device = torch.device(NAME)
        yield model, task, mode


def spectra_of(model, basis="svd"):
    data = MIXED if basis == "pca" else None
    return el.decompose(model, basis=basis, data=data, cache=False, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "basis",
    [
        "svd",
        "qk_ov",
        "random",
        "neurons",
        "pca",
    ],
)
def test_every_basis_scores_where_its_layers_are(device, basis):
    model, task, _ = device
    on_cpu = any(p.device.type == "cpu" for p in model.parameters())
    if basis == "pca" and on_cpu:
        pytest.skip("the values of a pretending device have no covariance")
    spectra = spectra_of(model, basis)
    for s in spectra.values():
        assert s.device == s.site.find(model).flat_weight.device
        for sums in (CrossSums.zeros(s, whole=False), EffectSums.zeros(s, by_position=False)):
            assert {value.device for value in vars(sums).values() if value is not None} == {
                s.device
            }
    for criterion, reference, memory in (
        ("mean", "mean", None),
        ("mean", "resample", 0.0),
        ("margin", "shared", None),
        ("max", "zero", None),
    ):
        options = {"criterion": criterion, "reference": reference, "memory_gb": memory}
        scores = el.score(model, spectra, task.train, batch_size=5, progress=False, **options)
        assert len(scores) == spectra.n_components
    scores = el.score(model, spectra, task.train, progress=False)
    with el.freeze(model, el.select(scores, 0.3)), Gates(model, scores) as gates:
        for batch in make_batches(task.train, model, 6):
            gates.gradient(batch)


def test_searches_freezing_and_evaluation(device):
    model, task, _ = device
    scores = el.score(model, spectra_of(model), task.train, criterion="margin", progress=False)
    data = (model, scores, task.train, task.validation)
    with el.freeze(model, el.select(scores, 0.2)):
        assert el.evaluate(model, task.test, progress=False).n == 6
    protect = el.Protection(model, {"others": task.test})
    config = el.LearnedConfig(steps=2, every=1)
    assert len(el.learned(*data, config, protect=protect, progress=False).trace) == 3
    el.guarded(*data, el.GuardedConfig(steps=2, step=2), protect=protect, progress=False)
    el.iterative(*data, steps=2, progress=False)
    el.one_shot(model, scores, task.validation, fractions=(0.1,))


def test_estimates_circuits_and_activations(device):
    model, task, _ = device
    scores = el.score(model, spectra_of(model), task.train, criterion="margin", progress=False)
    rows = np.array([0, 50, 300])
    assert exact_effects(model, scores, rows, task.train, progress=False).shape == (3, 12)
    integrated(model, scores, task.train, steps=2, progress=False)
    refined(model, scores, task.train, count=3, progress=False)
    frozen = el.select(scores, count=3)
    found = el.circuit(model, scores, task.train, frozen, strongest=2, progress=False)
    assert len(found) >= 1  # without values, components of a head are one degenerate block
    assert el.activation_change(model, frozen, task.test).n_examples == 6


@pytest.mark.slow
@pytest.mark.parametrize("device", [1], indirect=True)
def test_inner_loops_do_not_wait_for_the_device(device):
    model, task, mode = device
    spectra = spectra_of(model)
    for criterion in ("mean", "margin"):
        waits = []
        for batch_size in (12, 3):
            mode.waits.clear()
            options = {"criterion": criterion, "batch_size": batch_size}
            scores = el.score(model, spectra, task.train, progress=False, **options)
            waits.append({k: n for k, n in mode.waits.items() if k != TRANSFORMERS_MASK})
        assert waits[0] == waits[1]
    with Gates(model, scores) as gates:
        free = torch.zeros(len(scores))
        run = _Training(gates, scores, task.train, el.LearnedConfig(batch_size=6), None, free, None)
        mode.waits.clear()
        for step in (1, 2, 3):
            run.step(step)
    assert set(mode.waits) <= {TRANSFORMERS_MASK}
