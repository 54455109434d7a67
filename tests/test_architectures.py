"""The table of architectures: its oracles can fail, and the committed page is what they say."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny_models import word_tokenizer
from typer.testing import CliRunner

import eigenlens as el
from eigenlens.architectures import decoders, oracles, rows, table
from eigenlens.cli import app
from eigenlens.tasks import make_batches

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HANDFUL = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "OpenAIGPTLMHeadModel",
    "MixtralForCausalLM",
    "Lfm2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "MambaForCausalLM",
    "Florence2ForConditionalGeneration",
    "QwenForCausalLM",
]


def committed():
    """Cells of the page by architecture."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_page_has_every_decoder_and_enough_of_them():
    page = committed()
    assert list(page) == decoders()
    statuses = [row[0] for row in page.values()]
    assert sum(status in ("exact", "partly") for status in statuses) >= 60
    for name, (status, maps, note) in page.items():
        assert bool(maps) == (status in ("exact", "partly")), name
        assert note or status == "exact", name


@pytest.mark.parametrize(
    "name", [*HANDFUL[:4], *(pytest.param(name, marks=pytest.mark.slow) for name in HANDFUL[4:])]
)
def test_the_page_is_what_the_command_finds(name):
    row = table.tried(name)
    assert committed()[name] == [row.status, ", ".join(row.maps), row.note]


def test_the_command_writes_rows(tmp_path):
    out = tmp_path / "rows.json"
    done = CliRunner().invoke(app, ["architectures", "QwenForCausalLM", "--json", "--out", out])
    assert done.exit_code == 0, done.output
    assert [row["status"] for row in json.loads(out.read_text())] == ["not bootable"]
    wrong = CliRunner().invoke(app, ["architectures", "NoSuchModel"])
    assert wrong.exit_code == 2


def test_a_crash_or_a_hang_is_one_row(monkeypatch):
    names, own, threads = ["LlamaForCausalLM", "GPT2LMHeadModel"], torch.get_num_threads(), 2
    torch.set_num_threads(threads)  # one, as there may be, would prove nothing
    monkeypatch.setattr(table, "tried", lambda name: time.sleep(60))
    assert [row.note for row in rows(names, seconds=0.2)] == ["it takes too long"] * 2
    monkeypatch.setattr(table, "tried", lambda name: __import__("os")._exit(1))
    assert [row.note for row in rows(names)] == ["the process that tried it died"] * 2
    found = torch.get_num_threads()
    torch.set_num_threads(own)
    assert found == threads


def test_the_oracles_can_fail(tiny, monkeypatch):
    model, data = tiny("llama"), Dataset.from_list(table._EXAMPLES[:2])
    oracles.check_exact(model, data)
    with monkeypatch.context() as patch:
        patch.setattr(oracles, "freeze", lambda model, frozen: contextlib.nullcontext())
        with pytest.raises(oracles.Inexact, match="frozen and of edited weights"):
            oracles.check_exact(model, data)
    real = oracles.score
    monkeypatch.setattr(oracles, "score", lambda *a, **k: real(*a, **k | {"reference": "mean"}))
    with pytest.raises(oracles.Inexact, match="not −σ"):
        oracles.check_exact(model, data)


def gpt1():
    torch.manual_seed(0)
    config = tf.OpenAIGPTConfig(vocab_size=64, n_embd=24, n_layer=2, n_head=3, n_positions=32)
    return el.load_model(tf.OpenAIGPTLMHeadModel(config), word_tokenizer())


def test_where_padding_changes_the_model_nothing_is_padded(tiny):
    """GPT-1 counts positions from the first column, padding included."""
    data = Dataset.from_list(
        [{"prompt": f"{n} + 1 =" + " 2 +" * (n % 2), "answer": " 5"} for n in range(6)]
    )
    model = gpt1()
    assert not any(batch.is_padded for batch in make_batches(data, model, 6))
    alone, together = (el.evaluate(model, data, batch_size=size).examples for size in (1, 6))
    assert alone["loss"].to_numpy() == pytest.approx(together["loss"].to_numpy(), rel=1e-5)
    assert any(batch.is_padded for batch in make_batches(data, tiny("llama"), 6))
    with pytest.raises(ValueError, match="Padding changes what this model computes"):
        make_batches(data.select([0, 1]), model, 2, smallest=2)
