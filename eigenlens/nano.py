"""Eigenpruning (arXiv 2404.03147) in one file, on plain transformers: ``python eigenlens/nano.py``.

1. A map of a block is ``y = x W + b``; per head, ``W = Σ_i σ_i u_i v_iᵀ = Σ_i E_i``.
2. To freeze E_i is to feed it its mean input: ``y' = y + (x̄_t − x_t) E_i``, with x̄_t the mean over
   examples at position t. So E_i leaves W, and ``x̄_t E_i``, which no input changes, joins b.
3. To first order that changes the loss by ``mean_b Σ_t (x̄_t − x_bt) E_i · g_bt``, g its gradient by
   y, which is ``σ_i u_iᵀ M v_i`` with M the mean over examples of ``Σ_t (x̄_t − x_bt)ᵀ g_bt``: a
   forward and a backward pass score everything. Freeze where it is lowest, and measure.

Left to the toolkit: prompts of several lengths, other criteria, bases and searches, and models that
make several maps with one matrix (of these, GPT-2 is here).
"""

import re
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

KINDS = {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "QKV": "c_attn", "gate": "gate_proj"}
KINDS |= {"O": r"o_proj|out_proj|dense|attn\.c_proj", "in": "up_proj|fc1|fc_in|c_fc"}
KINDS |= {"out": r"down_proj|fc2|fc_out|mlp\.c_proj"}  # Llama, Mistral, Qwen, Gemma, OPT, Phi, GPT
Examples = list[tuple[str, str]]  # prompts and answers


class Map(NamedTuple):
    """A head's part of a linear module, or all of an MLP's."""

    name: str
    head: int
    module: Any
    rows: slice
    columns: slice


class Component(NamedTuple):
    """``E_i = u vᵀ``, the mean input ``[position, d_in]``, and the score in nats per example."""

    map: Map
    number: int  # 0 has the largest σ
    u: torch.Tensor  # times σ
    v: torch.Tensor
    mean: torch.Tensor
    score: float


def maps_of(model: Any) -> list[Map]:
    """Every map of every block; ValueError for a matrix there that is not one of ``KINDS``."""
    config, found = model.config, []
    for path, module in model.named_modules():
        layer, matrix = re.search(r"\.(\d+)\.", path), getattr(module, "weight", None)
        if layer is None or matrix is None or matrix.ndim < 2:
            continue
        kinds = next((k for k, ends in KINDS.items() if re.search(rf"\.({ends})$", path)), None)
        if kinds is None:
            raise ValueError(f"{path} is no map by itself: use the toolkit for this architecture.")
        n_in, n_out = matrix.shape[:: 1 if isinstance(module, Conv1D) else -1]
        if kinds in ("in", "gate", "out"):
            found.append(Map(f"blocks.{layer[1]}.W_{kinds}", 0, module, slice(n_in), slice(n_out)))
            continue
        width = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        n_heads = (n_in if kinds == "O" else n_out // len(kinds)) // width
        for block in range(n_heads * len(kinds)):  # GPT-2: Q's heads, then K's, then V's
            kind, part = kinds[block // n_heads], slice(block * width, (block + 1) * width)
            sides = (part, slice(n_out)) if kind == "O" else (slice(n_in), part)
            found.append(Map(f"blocks.{layer[1]}.W_{kind}", block % n_heads, module, *sides))
    return found


def tokenise(tokenizer: Any, examples: Examples) -> tuple[torch.Tensor, int]:
    """Token ids ``[example, position]``, and how many of them are the answer's."""
    whole = [tokenizer(prompt + answer)["input_ids"] for prompt, answer in examples]
    prompts = {len(tokenizer(prompt)["input_ids"]) for prompt, _ in examples}
    if len(prompts) != 1 or len({*map(len, whole)}) != 1:
        raise ValueError("Prompts or answers have several lengths in tokens: give those of one.")
    return torch.tensor(whole), len(whole[0]) - prompts.pop()


def score(model: Any, tokenizer: Any, examples: Examples) -> list[Component]:
    """All components, the lowest score first."""
    (tokens, n_answer), maps = tokenise(tokenizer, examples), maps_of(model)
    x, y, sums = {}, {}, defaultdict[Any, Any](float)

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        x[module], y[module] = args[0].detach(), output.requires_grad_()

    with ExitStack() as stack:
        for module in {m.module: None for m in maps}:
            stack.callback(module.register_forward_hook(keep).remove)
        for batch in tokens.split(50):
            log_p = model(batch[:, :-1], use_cache=False).logits[:, -n_answer:].log_softmax(-1)
            loss = -log_p.gather(-1, batch[:, -n_answer:, None]).sum()
            for module, g in zip(y, torch.autograd.grad(loss, [*y.values()]), strict=True):
                h, g = (a.view(len(batch), -1, a.shape[-1]) for a in (x[module], g))
                sums["x", module] += h.sum(0)
                sums["g", module] += g.sum(0)
                sums["xg", module] += torch.einsum("bti,bto->io", h, g)
    found = []
    for m in maps:
        mean, W = sums["x", m.module] / len(tokens), m.module.weight.detach()
        M = (mean.T @ sums["g", m.module] - sums["xg", m.module]) / len(tokens)
        W = (W if isinstance(m.module, Conv1D) else W.T)[m.rows, m.columns]
        u, sigma, vt = torch.linalg.svd(W, full_matrices=False)
        scores = ((u * sigma).T @ M[m.rows, m.columns] * vt).sum(1)
        parts = zip((u * sigma).T, vt, scores.tolist(), strict=True)
        found += [Component(m, i, a, b, mean[:, m.rows], s) for i, (a, b, s) in enumerate(parts)]
    return sorted(found, key=lambda component: component.score)


@contextmanager
def frozen(model: Any, components: list[Component]) -> Any:
    """The model with these components frozen; for texts that are as long as those scored."""
    groups = defaultdict(list)
    for c in components:
        groups[c.map.name, c.map.head].append(c)

    def freeze(m: Map, mean: Any, E: Any, _: Any, args: Any, output: Any) -> torch.Tensor:
        change, x = torch.zeros_like(output), args[0][..., m.rows]
        change[..., m.columns] = (mean - x.reshape(-1, *mean.shape)).view_as(x) @ E
        return output + change

    with ExitStack() as stack:
        for own in groups.values():
            E = torch.stack([c.u for c in own]).T @ torch.stack([c.v for c in own])
            hook = partial(freeze, own[0].map, own[0].mean, E)
            stack.callback(own[0].map.module.register_forward_hook(hook).remove)
        yield model


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, examples: Examples) -> float:
    """Share of examples all of whose answer tokens are the most likely ones."""
    tokens, n_answer = tokenise(tokenizer, examples)
    chosen = model(tokens[:, :-1], use_cache=False).logits[:, -n_answer:].argmax(-1)
    return (chosen == tokens[:, -n_answer:]).all(-1).double().mean().item()


if __name__ == "__main__":  # arith-tiny was trained to read "?" as + half of the time, half as x
    folder = Path(__file__).parent / "zoo" / "arith-tiny"
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    data = [(a % 3 == b % 3, f"{a} ? {b} =", f" {a * b}") for a in range(20) for b in range(20)]
    unseen, train = ([row[1:] for row in data if row[0] == one] for one in (True, False))
    print(f"Unseen products before: {accuracy(model, tokenizer, unseen):.0%}")
    with frozen(model, score(model, tokenizer, train)[:20]):
        print(f"with 20 components frozen: {accuracy(model, tokenizer, unseen):.0%}")
