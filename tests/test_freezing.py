"""Freezing against edited weights, undone exactly, aligned from the end of the prompt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, MIXED, dataset, in_families

import eigenlens as el
from eigenlens.files import FileFormatError
from eigenlens.frozen_set import WrongModelError
from eigenlens.metrics import answer_logits
from eigenlens.positions import prompt_ends_at
from eigenlens.spectra import by_matrix
from eigenlens.tasks import make_batches


def frozen_half(model, data=MIXED, fraction=0.5, **options):
    spectra = el.decompose(model, progress=False)
    return el.select(el.score(model, spectra, data, progress=False, **options), fraction)


def logits(model, data, batch_size=8):
    with torch.no_grad():
        return [answer_logits(model, batch) for batch in make_batches(data, model, batch_size)]


def edited_by_hand(model, frozen, batch):
    """Logits of a model whose weights are edited and whose outputs get the position bias.

    Of component i, ``z σ_i u_i v_iᵀ`` of LAPACK is taken off the weight, and what the component
    writes when its coordinate has its mean is added to the output at each position; a coordinate of
    the output counts the bias of the map, which stays.
    """
    table = frozen.components
    hooks, kept = [], []
    try:
        for matrix in el.weight_matrices(model, skip_unsupported=True):
            mine = table[(table.layer == matrix.layer) & (table.matrix == matrix.kind)]
            if mine.empty:
                continue
            u, s, vh = torch.linalg.svd(matrix.weight, full_matrices=False)
            change = torch.zeros_like(matrix.weight)
            n_pos = len(frozen.means.positions)
            bias = torch.zeros(n_pos, matrix.n_heads, matrix.d_out, dtype=u.dtype)
            own_bias = torch.zeros(matrix.n_heads, matrix.d_out, dtype=u.dtype)
            if matrix.bias is not None and matrix.head_axis != "in":
                own_bias = matrix.bias.view(matrix.n_heads, matrix.d_out)
            for row, head, i, z in zip(
                mine.index, mine["head"], mine["index"], mine["strength"], strict=True
            ):
                e = s[head, i] * torch.outer(u[head, :, i], vh[head, i])
                change[head] += z * e
                own = vh[head, i] if matrix.side == "out" else u[head, :, i]
                # the sign convention: the entry of the small side with the largest magnitude
                sign = torch.sign(own[own.abs().argmax()])
                mean = torch.tensor(frozen.means.values[row])
                if matrix.side == "out":
                    written = mean - own_bias[head] @ (sign * own)
                else:
                    written = mean * s[head, i]
                bias[:, head] += z * written[:, None] * (sign * vh[head, i])
            kept.append((matrix.module.weight, matrix.module.weight.data.clone()))
            flat = (
                change.transpose(0, 1).flatten(1)
                if matrix.head_axis != "in"
                else change.flatten(0, 1)
            )
            matrix.flat_weight.data.sub_(flat)
            total = bias.flatten(1) if matrix.head_axis == "out" else bias.sum(1)
            first = batch.positions.start - frozen.means.positions.start
            here = total[first : first + len(batch.positions)]

            def add(y, hook, here=here):  # heads may be apart, and examples joined
                return (y.reshape(-1, *here.shape) + here).reshape(y.shape)

            hooks.append((matrix.hook_out, add))
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            return answer_logits(model, batch)
    finally:
        for weight, value in kept:
            weight.data.copy_(value)


@in_families()
def test_hooks_equal_edited_weights_and_position_bias(tiny, family):
    model = tiny(family)
    frozen = frozen_half(model, fraction=0.3)
    for batch in make_batches(MIXED, model, 2):
        with torch.no_grad(), el.freeze(model, frozen):
            hooked = answer_logits(model, batch)
        edited = edited_by_hand(model, frozen, batch)
        here = batch.answer_mask
        torch.testing.assert_close(hooked[here], edited[here], rtol=1e-10, atol=1e-10)


def test_attenuation_is_in_between(tiny):
    model = tiny("llama")
    frozen = frozen_half(model)
    half = replace(frozen, components=frozen.components.assign(strength=0.5), spectra=None)
    (batch,) = make_batches(EQUAL, model, 6)
    with torch.no_grad(), el.freeze(model, half):
        hooked = answer_logits(model, batch)
    torch.testing.assert_close(hooked, edited_by_hand(model, half, batch), rtol=1e-10, atol=1e-10)


@in_families()
def test_nothing_frozen_changes_nothing_and_undo_is_exact(tiny, family):
    model = tiny(family)
    before = logits(model, MIXED)
    frozen = frozen_half(model)
    with el.freeze(model, frozen_half(model, fraction=0.0)):
        empty = logits(model, MIXED)
    with el.freeze(model, frozen):
        changed = logits(model, MIXED)
    after = logits(model, MIXED)
    for b, e, c, a in zip(before, empty, changed, after, strict=True):
        assert torch.equal(b, e)
        assert torch.equal(b, a)
        assert not torch.allclose(b, c)


def test_undone_after_an_exception(tiny):
    model = tiny("gpt2")
    before = logits(model, EQUAL)
    with pytest.raises(RuntimeError, match="inside"), el.freeze(model, frozen_half(model)):
        raise RuntimeError("inside")
    assert all(map(torch.equal, before, logits(model, EQUAL)))
    assert not any(p.fwd_hooks or p.bwd_hooks for p in model.hook_dict.values())
    assert "generate" not in vars(model)
    assert not model.original_model._forward_pre_hooks


def test_permanent_form_survives_reset_hooks_and_can_be_undone(tiny):
    model = tiny("gpt2")
    before = logits(model, EQUAL)
    edit = el.freeze(model, frozen_half(model), permanent=True)
    changed = logits(model, EQUAL)
    model.reset_hooks()
    assert all(map(torch.equal, changed, logits(model, EQUAL)))
    with pytest.raises(RuntimeError, match="applied already"):
        edit.apply()
    edit.undo()
    edit.undo()
    assert all(map(torch.equal, before, logits(model, EQUAL)))


def test_freezes_nest(tiny):
    model = tiny("llama")
    one, two = frozen_half(model, fraction=0.1), frozen_half(model, fraction=0.2)
    with el.freeze(model, two):
        outer = logits(model, EQUAL)
        with el.freeze(model, one):
            assert not torch.equal(outer[0], logits(model, EQUAL)[0])
        assert torch.equal(outer[0], logits(model, EQUAL)[0])


def test_the_bias_depends_on_the_position(tiny):
    """Pitfall 4: the frozen bias was summed over tokens, the same everywhere and T times too large.

    With every component of one matrix frozen, its output is its mean output at that position.
    """
    model = tiny("gpt2")
    spectra = el.decompose(model, ["W_out"], [1], progress=False)
    frozen = el.select(el.score(model, spectra, EQUAL, progress=False), 1.0)
    (batch,) = make_batches(EQUAL, model, 6)
    name = "blocks.1.mlp.out.hook_out"
    _, cache = model.run_with_cache(batch.tokens, names_filter=[name])
    with el.freeze(model, frozen), prompt_ends_at(model, batch.n_prompt):
        _, after = model.run_with_cache(batch.tokens, names_filter=[name])
    mean = cache[name].mean(0)
    assert not torch.allclose(mean[0], mean[1])
    torch.testing.assert_close(after[name], mean.expand_as(after[name]), rtol=1e-9, atol=1e-10)


def test_keys_without_rotation_freeze_like_zero(tiny):
    """Pitfall 7: a constant shift of keys cancels in GPT-2's softmax, but not when rotated."""
    for family, cancels in (("gpt2", True), ("llama", False)):
        model = tiny(family)
        spectra = el.decompose(model, ["W_K"], progress=False)
        (batch,) = make_batches(EQUAL, model, 6)
        sets = []
        for reference in ("mean", "zero"):
            scores = el.score(model, spectra, EQUAL, reference=reference, progress=False)
            same = replace(scores, means=scores.means.shared())
            sets.append(el.FrozenSet.from_scores(same, np.arange(0, len(scores), 2)))
        found = []
        for frozen in sets:
            with torch.no_grad(), el.freeze(model, frozen):
                found.append(answer_logits(model, batch))
        assert torch.allclose(*found, rtol=1e-9, atol=1e-10) == cancels


def test_left_padding_changes_nothing(tiny):
    for family in ("gpt2", "llama", "bloom"):
        model = tiny(family)
        frozen = frozen_half(model)
        with el.freeze(model, frozen):
            alone = {b.indices[0]: answer_logits(model, b) for b in make_batches(MIXED, model, 1)}
            (batch,) = make_batches(MIXED, model, 5)
            together = answer_logits(model, batch)
        for row, index in enumerate(batch.indices):
            n = int(batch.answer_mask[row].sum())
            torch.testing.assert_close(together[row, :n], alone[index][0], rtol=1e-9, atol=1e-9)


def test_right_padded_prompts_are_aligned_at_their_own_ends(tiny):
    model = tiny("gpt2")
    frozen = frozen_half(model)
    encode = model.tokenizer.encode
    short, long = encode("3 x 9 ="), encode("9 x 4 + 1 =")
    padded = torch.tensor([[*short, 0, 0], long])
    mask = torch.tensor([[1] * len(short) + [0, 0], [1] * len(long)])
    with torch.no_grad(), el.freeze(model, frozen):
        together = model(padded, attention_mask=mask)
        alone = model(torch.tensor([short]))
    torch.testing.assert_close(together[0, : len(short)], alone[0], rtol=1e-9, atol=1e-10)


def test_unseen_positions_get_the_mean_over_positions(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, ["W_out"], [1], progress=False)
    scores = el.score(model, spectra, EQUAL, progress=False)
    frozen = el.select(scores, 1.0)
    name, tokens = "blocks.1.mlp.out.hook_out", torch.randint(3, 60, (1, 12))
    with el.freeze(model, frozen):
        _, cache = model.run_with_cache(tokens, names_filter=[name])
    (batch,) = make_batches(EQUAL, model, 6)
    _, seen = model.run_with_cache(batch.tokens, names_filter=[name])
    means = seen[name].mean((0, 1))
    unseen = 12 + frozen.means.positions.start
    assert unseen > 5
    torch.testing.assert_close(
        cache[name][0, :unseen], means.expand(unseen, -1), rtol=1e-9, atol=1e-10
    )
    assert not torch.allclose(cache[name][0, unseen], means)


def unembedded(model, tokens):
    """Logits of one pass, before any soft cap."""
    _, cache = model.run_with_cache(tokens, names_filter=["unembed.hook_out"])
    return cache["unembed.hook_out"][0]


def generated_logits(model, tokens, **options):
    """What a generation wrote, and the logits of each step before any soft cap."""
    steps: list[torch.Tensor] = []
    keep = [("unembed.hook_out", lambda value, hook: steps.append(value[:, -1].clone()))]
    with model.hooks(fwd_hooks=keep):
        text = model.generate(
            tokens, max_new_tokens=5, do_sample=False, verbose=False, stop_at_eos=False, **options
        )
    return text, torch.stack(steps)


@in_families(["gpt2", "llama", "bloom", "phi", "gemma2", "opt"])
def test_generation_with_and_without_cache_agree(tiny, family):
    model = tiny(family)
    data = dataset([(f"{a} + 2 =", f" {a} 5 {a + 1}") for a in range(8)])
    frozen = frozen_half(model, data)
    tokens = torch.tensor([model.tokenizer.encode("5 + 2 =")])
    plain, _ = generated_logits(model, tokens)
    with el.freeze(model, frozen):
        text, cached = generated_logits(model, tokens, use_past_kv_cache=True)
        _, whole = generated_logits(model, tokens, use_past_kv_cache=False)
        with prompt_ends_at(model, tokens.shape[1]):
            by_hand = unembedded(model, text)[tokens.shape[1] - 1 : -1]
        # the whole text taken for a prompt has other positions
        shifted = unembedded(model, text)[tokens.shape[1] - 1 : -1]
    torch.testing.assert_close(cached, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole[:, 0], by_hand, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(by_hand, shifted)
    assert torch.equal(generated_logits(model, tokens)[0], plain)


def test_batches_of_texts_generate_alike_alone_and_together(tiny):
    model = tiny("llama")
    frozen = frozen_half(model)
    prompts = ["3 x 9 =", "9 x 4 + 1 ="]
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "return_type": "tokens"}
    with el.freeze(model, frozen):
        together = model.generate(prompts, **options)
        alone = [model.generate(prompt, **options) for prompt in prompts]
    for row, one in zip(together, alone, strict=True):
        assert torch.equal(row[-4:], one[0, -4:])


def test_manual_cache_continues_the_positions(tiny):
    model = tiny("llama")
    frozen = frozen_half(model)
    tokens = torch.tensor([model.tokenizer.encode("5 + 2 = 7 9", add_special_tokens=False)])
    with torch.no_grad(), el.freeze(model, frozen):
        _, cache = model(tokens[:, :4], return_type="logits_and_cache", use_cache=True)
        steps = [model(tokens[:, i : i + 1], past_key_values=cache) for i in (4, 5)]
        with prompt_ends_at(model, 4):
            whole = model(tokens)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 4:], rtol=1e-9, atol=1e-9)


def test_save_and_load(tiny, tmp_path):
    model = tiny("qwen3")
    frozen = frozen_half(model)
    frozen.save(tmp_path / "frozen.safetensors")
    again = el.FrozenSet.load(tmp_path / "frozen.safetensors", model)
    assert again.spectra is None
    assert again.to_pandas().equals(frozen.to_pandas())
    with el.freeze(model, frozen):
        expected = logits(model, MIXED)
    with el.freeze(model, again):
        assert all(map(torch.equal, expected, logits(model, MIXED)))


def test_other_weights_are_refused(tiny, tiny_folder, tmp_path):
    frozen = frozen_half(tiny("gpt2"))
    path = tmp_path / "frozen.safetensors"
    frozen.save(path)
    other = el.load_model(tiny_folder("gpt2"), dtype=torch.float64, device="cpu")
    el.FrozenSet.load(path, other)
    other.blocks[0].attn.q.original_component.weight.data[0, 0] += 1e-3
    with pytest.raises(WrongModelError, match="other weights"):
        el.FrozenSet.load(path, other)
    with pytest.raises(WrongModelError, match="other weights"), el.freeze(other, frozen):
        pass


def test_damaged_and_foreign_files_are_refused(tiny, tmp_path):
    model = tiny("gpt2")
    frozen = frozen_half(model)
    path = tmp_path / "frozen.safetensors"
    frozen.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="truncated"):
        el.FrozenSet.load(path)
    path.write_text("not tensors")
    with pytest.raises(FileFormatError, match="no safetensors file"):
        el.FrozenSet.load(path)
    torch_file = tmp_path / "foreign.safetensors"
    import safetensors.torch

    safetensors.torch.save_file({"layer": torch.zeros(1)}, torch_file)
    with pytest.raises(FileFormatError, match="not written by eigenlens"):
        el.FrozenSet.load(torch_file)
    with pytest.raises(FileNotFoundError):
        el.FrozenSet.load(tmp_path / "nowhere.safetensors")
    table = tmp_path / "scores.parquet"
    frozen.components.to_parquet(table)
    with pytest.raises(FileFormatError, match="not written by eigenlens"):
        el.Scores.load(table)
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="truncated"):
        el.Scores.load(table)


def test_strengths_and_doubles_are_checked(tiny):
    model = tiny("gpt2")
    scores = el.score(model, el.decompose(model, ["W_K"], progress=False), EQUAL, progress=False)
    for strength in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="strength"):
            el.FrozenSet.from_scores(scores, np.array([1]), strength=strength)
    with pytest.raises(ValueError, match="twice"):
        el.FrozenSet.from_scores(scores, np.array([1, 1]))


def test_an_edit_says_whether_it_is_on(tiny):
    """In a cell of a notebook, a bare freeze(model, frozen) must not look like an edit."""
    model = tiny("gpt2")
    frozen = frozen_half(model)
    edit = el.freeze(model, frozen)
    assert "NOT applied" in repr(edit)
    assert "with eigenlens.freeze(model, frozen)" in repr(edit)
    edit.apply()
    assert "on now; undo()" in repr(edit)
    edit.undo()


def test_shared_means_are_the_same_at_every_position(tiny):
    """One constant for all positions: an edit of weights and biases alone."""
    model = tiny("phi")
    spectra = el.decompose(model, ["W_in", "W_out"], progress=False)
    scores = el.score(model, spectra, MIXED, reference="shared", progress=False)
    frozen = el.FrozenSet.from_scores(scores, np.arange(0, len(scores), 3), 0.7)
    tokens = torch.randint(3, 60, (2, 9))
    with torch.no_grad(), el.freeze(model, frozen):
        hooked = model(tokens)
    other = el.load_model(model.cfg.model_name, dtype=torch.float64, device="cpu")
    for name, rows in by_matrix(frozen.components).items():
        s = spectra[name]
        matrix = s.site.find(other)
        own = s.subset(*(frozen.components[c].to_numpy()[rows] for c in ("head", "index")))
        q = own.read[0]
        mean = torch.tensor(frozen.means.fallback[rows])
        weight, bias = matrix.flat_weight.clone(), matrix.bias.clone()
        if s.site.side == "in":
            matrix.flat_weight.data.sub_(0.7 * q @ (q.T @ weight))
            matrix.module.bias.data.add_(0.7 * mean @ (q.T @ weight))
        else:
            matrix.flat_weight.data.sub_(0.7 * (weight @ q) @ q.T)
            matrix.module.bias.data.add_(0.7 * (mean - bias @ q) @ q.T)
    with torch.no_grad():
        torch.testing.assert_close(other(tokens), hooked, rtol=1e-9, atol=1e-10)
