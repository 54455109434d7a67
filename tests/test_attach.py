"""Edits attached to plain transformers models, against the same edits on a bridge."""

import dataclasses

import pytest
import torch
import transformers as tf
from test_freezing import frozen_half
from tiny_models import MIXED, in_families, word_tokenizer
from tokenizers import models

import eigenlens as el
from eigenlens.frozen_set import WrongModelError
from eigenlens.positions import prompt_ends_at


def plain(folder, dtype=torch.float64):
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


TOKENS = torch.tensor([[8, 3, 9, 6, 20, 31], [12, 4, 40, 6, 11, 50]])


@in_families()
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_logits_are_those_of_the_bridge_and_undone_exactly(tiny, tiny_folder, family, dtype):
    own = getattr(torch, dtype)
    bridge = tiny(family)
    if dtype == "float32":
        bridge = el.load_model(tiny_folder(family), dtype=own, device="cpu")
    model = plain(tiny_folder(family), own)
    frozen = frozen_half(bridge, fraction=0.3)
    with torch.no_grad():
        before = model(TOKENS).logits
        with el.freeze(bridge, frozen), prompt_ends_at(bridge, 4):
            wanted = bridge(TOKENS)
        edit = el.attach(model, frozen)
        with prompt_ends_at(model, 4):
            found = model(TOKENS).logits
        edit.undo()
        after = model(TOKENS).logits
    tolerance = 1e-10 if dtype == "float64" else 1e-4
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert (wanted - before).abs().max() > 100 * tolerance
    assert torch.equal(before, after)
    assert "generate" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


PAD = 0
PROMPTS = [[12, 4, 40, 6], [8, 3, 9, 3, 20, 6]]
SHORT, LONG = (torch.tensor([prompt]) for prompt in PROMPTS)


def left_padded():
    width = max(map(len, PROMPTS))
    tokens = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    return tokens, (torch.arange(width) >= width - torch.tensor([[len(p)] for p in PROMPTS])).long()


def generate(model, tokens, mask=None, **options):
    """Six new tokens, no end of sequence."""
    torch.manual_seed(1)
    mask = torch.ones_like(tokens) if mask is None else mask
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    return model.generate(tokens, attention_mask=mask, **(given | options))


def teacher_forced(bridge, frozen, prompt, answer):
    """Log-probabilities of an answer's tokens on the bridge, and what it would choose."""
    with torch.no_grad(), el.freeze(bridge, frozen), prompt_ends_at(bridge, len(prompt)):
        logits = bridge(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(answer)[:, None]
    return logits.log_softmax(-1).gather(-1, chosen).sum(), logits


@pytest.fixture(scope="module")
def edited(tiny, tiny_folder):
    """Bridge, plain model and edit of a family, made once."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = (
                tiny(family),
                plain(tiny_folder(family)),
                frozen_half(tiny(family), fraction=0.4),
            )
        return made[family]

    return of


@in_families()
def test_greedy_text_is_that_of_the_bridge(edited, family):
    bridge, model, frozen = edited(family)
    before = generate(model, LONG)
    with el.attach(model, frozen):
        found = generate(model, LONG)
        without_cache = generate(model, LONG, use_cache=False)
    _, logits = teacher_forced(bridge, frozen, PROMPTS[1], found[0, 6:].tolist())
    assert torch.equal(logits.argmax(-1), found[0, 6:])
    assert torch.equal(found, without_cache)
    assert torch.equal(generate(model, LONG), before)


@in_families(["gpt2", "llama", "gemma3", "falcon"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_scores_of_a_padded_batch_are_the_bridges(edited, family, options):
    """The log-probability of each text written, whatever the way of decoding."""
    bridge, model, frozen = edited(family)
    tokens, mask = left_padded()
    with el.attach(model, frozen):
        out = generate(
            model, tokens, mask, return_dict_in_generate=True, output_logits=True,
            output_scores=True, length_penalty=0.0, **options,
        )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        answer = out.sequences[row, tokens.shape[1] :].tolist()
        wanted, logits = teacher_forced(bridge, frozen, prompt, answer)
        if "num_beams" in options:
            found = out.sequences_scores[row]
        else:
            steps = torch.stack(out.logits)[:, row].double()
            torch.testing.assert_close(steps, logits, rtol=1e-6, atol=1e-6)
            found = steps.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_guessed_tokens_that_are_taken_back_keep_their_positions(edited):
    """Prompt look-up verifies several tokens in one pass and drops the wrong ones."""
    _, model, frozen = edited("llama")
    prompt = torch.tensor([[8, 3, 9, 3, 20, 6, 8, 3, 9]])
    with el.attach(model, frozen):
        wanted = generate(model, prompt, max_new_tokens=12)
        found = generate(model, prompt, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(found, wanted)


def test_a_cache_by_hand_goes_on_counting_and_a_new_one_begins_again(edited):
    bridge, model, frozen = edited("llama")
    with torch.no_grad(), el.attach(model, frozen):
        for _ in range(2):
            past = model(LONG, use_cache=True).past_key_values
            steps = [model(torch.tensor([[t]]), past_key_values=past).logits[0, 0] for t in (7, 9)]
    _, logits = teacher_forced(bridge, frozen, PROMPTS[1], [7, 9, 0])
    torch.testing.assert_close(torch.stack(steps), logits[1:], rtol=1e-9, atol=1e-9)


def test_prompts_of_one_batch_may_end_in_different_columns(edited):
    bridge, model, frozen = edited("llama")
    tokens = torch.tensor([[12, 4, 40, 6, 11], [8, 3, 9, 11, 4]])
    ends = torch.tensor([[4], [3]])
    with torch.no_grad(), el.attach(model, frozen), prompt_ends_at(model, ends):
        found = model(tokens).logits
    for row, end in enumerate(ends[:, 0].tolist()):
        with torch.no_grad(), el.freeze(bridge, frozen), prompt_ends_at(bridge, end):
            wanted = bridge(tokens[row : row + 1])[0]
        torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-9)


def test_a_file_with_directions_needs_no_decomposition(edited, tmp_path, monkeypatch):
    bridge, model, frozen = edited("phi3")
    path = tmp_path / "frozen.safetensors"
    frozen.save(path, directions=True)
    again = el.FrozenSet.load(path)
    monkeypatch.setattr("eigenlens.frozen_set.decomposed_again", None)
    with torch.no_grad():
        with el.attach(model, again):
            found = model(LONG).logits
        with el.freeze(bridge, frozen):
            torch.testing.assert_close(found, bridge(LONG), rtol=1e-10, atol=1e-10)


def test_bases_that_write_where_they_do_not_read(edited):
    """Coordinates of joint maps, and neurons of the input of W_out."""
    bridge, model, _ = edited("phi3")
    for basis in ("qk_ov", "neurons"):
        spectra = el.decompose(bridge, basis=basis, progress=False)
        frozen = el.select(el.score(bridge, spectra, MIXED, progress=False), 0.3)
        with torch.no_grad(), el.freeze(bridge, frozen), el.attach(model, frozen):
            found, wanted = model(LONG).logits, bridge(LONG)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_attached_is_refused(edited, tiny_folder):
    bridge, _, frozen = edited("llama")
    other = plain(tiny_folder("llama"))
    other.lm_head.weight.data[0, 0] += 1e-3
    with pytest.raises(WrongModelError, match="other weights"):
        el.attach(other, frozen)
    with pytest.raises(WrongModelError, match="other weights"):
        el.attach(plain(tiny_folder("qwen3")), frozen)
    with pytest.raises(ValueError, match="use freeze for a bridge"):
        el.attach(bridge, frozen)
    with pytest.raises(ValueError, match="belongs to a bridge"):
        el.attach(bridge.original_model, frozen)
    assert not other._forward_pre_hooks


def test_attaching_disturbs_nothing(edited):
    """Neither the global random state nor the model's own modules and gradients."""
    _, model, frozen = edited("gpt2")
    before = {name: id(module) for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with el.attach(model, frozen):
        assert torch.equal(torch.rand(1), expected)
        assert {name: id(module) for name, module in model.named_modules()} == before
        assert all(parameter.requires_grad for parameter in model.parameters())
        model(LONG).logits.sum().backward()
    assert model.transformer.wte.weight.grad is not None
    model.zero_grad()


def test_another_dtype_of_the_same_weights_only_if_asked(tiny_folder, tmp_path):
    """float32 and bfloat16 copies of one file, both ways; compared as rounded."""
    for made, used in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        bridge = el.load_model(tiny_folder("llama"), dtype=made, device="cpu")
        frozen = frozen_half(bridge)
        path = tmp_path / f"{made}.safetensors"
        frozen.save(path, directions=True)
        other = el.load_model(tiny_folder("llama"), dtype=used, device="cpu")
        model = plain(tiny_folder("llama"), used)
        with pytest.raises(WrongModelError, match=r"made for these weights in .*allow_dtype=True"):
            el.freeze(other, frozen)
        with pytest.raises(WrongModelError, match=r"made for these weights in .*allow_dtype=True"):
            el.attach(model, frozen)
        again = el.FrozenSet.load(path, other, allow_dtype=True)
        with torch.no_grad():
            before = other(LONG)
            with el.freeze(bridge, frozen):
                wanted = bridge(LONG)
            with el.freeze(other, again, allow_dtype=True):
                frozen_logits = other(LONG)
            with el.attach(model, again, allow_dtype=True):
                found = model(LONG).logits
        spread = wanted.std()
        assert (
            (frozen_logits - wanted).abs().mean() < 0.05 * spread < (before - wanted).abs().mean()
        )
        assert (found - wanted).abs().mean() < 0.05 * spread
        other.blocks[0].attn.q.original_component.weight.data[0, 0] += 0.1
        with pytest.raises(WrongModelError, match="other weights"):
            el.freeze(other, again, allow_dtype=True)
        without = dataclasses.replace(frozen, spectra=None)
        with pytest.raises(ValueError, match="save this FrozenSet with directions=True"):
            el.attach(model, without, allow_dtype=True)


def test_another_tokenizers_ids_are_refused(edited):
    _, model, frozen = edited("llama")
    el.attach(model, frozen, tokenizer=word_tokenizer()).undo()
    core = word_tokenizer().backend_tokenizer
    words = core.get_vocab()
    words["+"], words["x"] = words["x"], words["+"]
    core.model = models.WordLevel(words, unk_token="?")
    other = tf.PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(WrongModelError, match="tokens have other ids"):
        el.attach(model, frozen, tokenizer=other)
