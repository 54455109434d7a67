"""AtP*: attribution patching with two corrections (Kramár et al., arXiv 2403.00745).

1. **QK correction.** A query or key acts through a softmax, which is not linear where attention is
   saturated. So for coordinates of queries and keys the attention of their layer is run again with
   the coordinate replaced, and its change is multiplied with the gradient: with the head's output
   ``z_t = Σ_s A_ts v_s``, ``Σ_t (z'_t − z_t) · ∂L/∂z_t`` is ``Σ_ts (A'_ts − A_ts) ∂L/∂A_ts``. Each
   costs a pass of one attention layer.
2. **GradDrop.** A direct effect and one through later layers may cancel in a gradient. So gradients
   are taken once for each layer, in which nothing flows back through that layer's attention and
   MLP, only past them, and the magnitudes of the effects are averaged:
   ``1/(L − 1) Σ_l |e_l|``, since an effect vanishes where its own layer is left out. A forward and
   a backward pass more for each layer.

The paper's score is that magnitude, a mean over examples, which says how important a component is.
Here it has the sign of the mean effect without GradDrop, so that a negative one predicts harm.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.copies import MOST_ROWS, CopyEdit, tiled_beside
from eigenlens.matrices import Site, map_of
from eigenlens.metrics import answer_logits
from eigenlens.passes import Activation, attention_calls, without_padding
from eigenlens.scoring.references import References
from eigenlens.scoring.running import Hooks, Passes, Totals
from eigenlens.spectra import Spectrum
from eigenlens.tasks.batches import Batch

_BEFORE_SOFTMAX = ("W_Q", "W_K", "QK")
Gradients = list[dict[int, Tensor]]  # by ∂z of each layer, for every backward pass


def atp_star(
    passes: Passes, references: References, *, correct: bool, drop: bool
) -> tuple[Totals, Totals]:
    """Effects with either correction, summed over examples: without GradDrop, and magnitudes."""
    n_layers = len(passes.model.blocks)
    dropped: list[Hooks] = [()]
    if drop:
        dropped += [_without_layer(passes.model, layer) for layer in range(n_layers)]
    signed, magnitude = passes.zeros(), passes.zeros()

    def count(name: str, number: int, effect: Float[Tensor, "batch ..."]) -> None:
        if number == 0:
            signed[name] += effect.sum(0)
        else:
            magnitude[name] += effect.abs().sum(0) / (n_layers - 1)

    for batch in passes.bar(references.batches, "atp"):
        moves = passes.moves(references, batch, references.swap(batch))
        attention = _Attention(passes, batch) if correct else None
        gradients: Gradients = []
        for number, hooks in enumerate(dropped):
            gradients.append({})

            def add(
                site: Site,
                h: Activation,
                g: Activation,
                values: Tensor,
                batch: Batch = batch,
                moves: dict[str, Tensor] = moves,
                attention: _Attention | None = attention,
                number: int = number,
                after: dict[int, Tensor] = gradients[-1],
            ) -> None:
                s = passes.spectra.get(site.name)
                if s is not None and (attention is None or site.kind not in _BEFORE_SOFTMAX):
                    count(site.name, number, (moves[site.name] * s.slopes(g.to(s.dtype))).sum(1))
                if attention is not None and site == attention.ends.get(site.layer):
                    after[site.layer] = without_padding(g, batch).flatten(2)

            sites = {s.name: s for s in passes.sites}
            if attention is not None:
                sites |= {s.name: s for s in attention.ends.values()}
            passes.differentiate(batch, add, list(sites.values()), hooks)
        for s in passes.spectra.values():
            if attention is not None and s.site.kind in _BEFORE_SOFTMAX:
                found = attention.effects(s, moves[s.name], gradients)
                for number, effect in enumerate(found):
                    count(s.name, number, effect)
    return signed, magnitude


def _without_layer(model: TransformerBridge, layer: int) -> Hooks:
    """Hooks through which no gradient flows back into a layer's attention and MLP."""

    def stop(value: Tensor, hook: Any) -> Tensor:
        return value.detach()

    names = (f"blocks.{layer}.{part}.hook_out" for part in ("attn", "mlp"))
    return [(name, stop) for name in names if name in model.hook_dict]


class _Attention:
    """The attention layers of a batch, to be run again under changed queries and keys.

    Attributes:
        ends: the input of ``W_O`` in each layer, where changes of attention meet the gradient.
    """

    def __init__(self, passes: Passes, batch: Batch) -> None:
        self._model = passes.model
        self._batch = batch
        layers = dict.fromkeys(s.layer for s in passes.sites if s.kind in _BEFORE_SOFTMAX)
        self.ends = {layer: map_of(self._model, layer, "W_O").site for layer in layers}
        run = partial(answer_logits, self._model, batch)
        self._inputs = attention_calls(self._model, layers, run)

    def effects(
        self, s: Spectrum, move: Float[Tensor, "batch pos head k"], gradients: Gradients
    ) -> Float[Tensor, "run batch head k"]:
        """``Σ_t (z'_t − z_t) · ∂L/∂z_t`` of every component, for the gradients of every pass."""
        layer = s.site.layer
        before = self._run(layer, 1, [])
        zero = torch.zeros_like(before[0])
        after = torch.stack([g.get(layer, zero) for g in gradients])  # zero: its layer is dropped
        heads, places = (x.flatten() for x in np.indices(tuple(s.sigma.shape)))
        goal = self._coordinates(s) + move
        chunk = max(1, MOST_ROWS // len(self._batch))
        parts = []
        for start in range(0, len(heads), chunk):
            head, index = heads[start : start + chunk], places[start : start + chunk]
            n = len(head)
            edit = CopyEdit(
                s, head, index, goal[:, :, head, index], copies=np.arange(n), n_copies=n
            )
            change = self._run(layer, n, [(s.site.hook, edit)]) - before
            parts.append(einsum(after, change, "run b p z, copy b p z -> run b copy"))
        return torch.cat(parts, dim=-1).unflatten(-1, tuple(s.sigma.shape))

    def _coordinates(self, s: Spectrum) -> Float[Tensor, "batch pos head k"]:
        seen: list[Tensor] = []

        def see(value: Tensor, hook: Any) -> None:
            seen.append(s.coordinates(s.site.split(value, self._batch.tokens.shape[1]).to(s.dtype)))

        self._run(s.site.layer, 1, [(s.site.hook, see)])
        return seen[0]

    def _run(self, layer: int, n_copies: int, hooks: Hooks) -> Float[Tensor, "copy batch pos z"]:
        """The attention of one layer over copies of a batch: its output before ``W_O``."""
        seen: list[Tensor] = []

        def see(value: Tensor, hook: Any) -> None:
            seen.append(value.reshape(n_copies, len(self._batch), self._batch.tokens.shape[1], -1))

        rows = len(self._batch)
        args, kwargs = self._inputs[layer]
        args = tiled_beside(args, n_copies, rows)
        kwargs = {name: tiled_beside(value, n_copies, rows) for name, value in kwargs.items()}
        both = [*hooks, (self.ends[layer].hook, see)]
        with torch.no_grad(), self._model.hooks(fwd_hooks=both):
            self._model.blocks[layer].attn(*args, **kwargs)
        return seen[0]
