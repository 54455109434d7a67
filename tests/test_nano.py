"""The method in one file, against the toolkit, which is another implementation of it."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import EQUAL, FAMILIES, REFUSED, in_families, word_tokenizer

import eigenlens as el
from eigenlens import nano
from eigenlens.metrics import answer_logits
from eigenlens.tasks import make_batches

FUSED = ("phi3", "gpt_neox", "bloom", "falcon")  # several maps in one matrix
SUPPORTED = [family for family in FAMILIES if family not in FUSED]
ROWS = list(zip(EQUAL["prompt"][:], EQUAL["answer"][:], strict=True))
FILE = Path(nano.__file__)


def plain(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def places(components):
    return [(c.map.name, c.map.head, c.number) for c in components]


def toolkit_places(table):
    names = "blocks." + table["layer"].astype(str) + "." + table["matrix"].astype(str)
    return list(zip(names, table["head"], table["index"], strict=True))


@in_families(SUPPORTED)
def test_scores_and_frozen_logits_are_the_toolkits(tiny, tiny_folder, family):
    bridge, model = tiny(family), plain(tiny_folder(family))
    scores = el.score(bridge, el.decompose(bridge, progress=False), EQUAL, progress=False)
    found = nano.score(model, word_tokenizer(), ROWS)
    wanted = dict(zip(toolkit_places(scores.components), scores.delta_loss, strict=True))
    own = dict(zip(places(found), [c.score for c in found], strict=True))
    assert own.keys() == wanted.keys()
    values = np.array([[own[place], wanted[place]] for place in wanted])
    np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-8, atol=1e-11)
    assert np.abs(values).max() > 1e-3

    edit = el.select(scores, count=12)
    assert set(places(found[:12])) == set(toolkit_places(edit.components))
    (batch,) = make_batches(EQUAL, bridge, len(EQUAL))
    order, n_answer = batch.indices, batch.answer.shape[1]
    tokens = nano.tokenise(word_tokenizer(), ROWS)[0][order, :-1]
    with torch.no_grad():
        before = model(tokens).logits[:, -n_answer:]
        with el.freeze(bridge, edit):
            edited = answer_logits(bridge, batch)
        with nano.frozen(model, found[:12]):
            ours = model(tokens).logits[:, -n_answer:]
        after = model(tokens).logits[:, -n_answer:]
    torch.testing.assert_close(ours, edited, rtol=1e-9, atol=1e-9)
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", [*FUSED, *REFUSED])
def test_models_with_other_maps_are_refused(tiny_folder, family):
    model = plain(tiny_folder(family))
    with pytest.raises(ValueError, match="is no map by itself: use the toolkit"):
        nano.maps_of(model)


def test_a_failed_pass_leaves_no_hook(tiny_folder):
    model = plain(tiny_folder("llama"))
    with pytest.raises(IndexError):
        nano.score(model, lambda text: {"input_ids": [10_000] * len(text.split())}, ROWS)
    assert not any(module._forward_hooks for module in model.modules())


def test_several_lengths_are_refused():
    with pytest.raises(ValueError, match="several lengths in tokens"):
        nano.tokenise(word_tokenizer(), [("1 + 2 =", " 3"), ("1 + 2 + 3 =", " 6")])


def test_it_is_short_and_stands_on_its_own():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    imported = [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    ]
    assert not [name for name in imported if "eigenlens" in name or "transformer_lens" in name]


@pytest.mark.slow
def test_as_a_program_it_uncovers_the_products_of_arith_tiny():
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=True)
    before, after = (int(line.split()[-1].rstrip("%")) for line in done.stdout.splitlines())
    assert before < 55
    assert after > 85
