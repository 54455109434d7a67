"""The readable way to the same scores: cache everything, then sum.

One example at a time through ``run_with_cache(incl_bwd=True)``, every activation kept. The
streaming passes of :mod:`eigenlens.scoring.scorer` are tested against this; use it to see what
they compute, not on large data.
"""

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.far_side import zero_coordinates
from eigenlens.positions import prompt_ends_at
from eigenlens.spectra import Spectra
from eigenlens.tasks.batches import make_batches


def _differentiate_from_here(value: Tensor, hook: object) -> Tensor:
    return value.detach().requires_grad_()


Effects = dict[str, Float[Tensor, "example pos head k"]]


def effects_by_cache(
    model: TransformerBridge, spectra: Spectra, data: Dataset, *, reference: str = "mean"
) -> Effects:
    """``(c̄_t − c_bt) s_bt`` of every component, example and position, by matrix name.

    Args:
        model: in eval mode.
        spectra: its decomposition.
        data: examples whose prompts, and whose answers, have equal numbers of tokens.
        reference: ``"mean"`` (per position), ``"shared"`` or ``"zero"``.

    Raises:
        ValueError: examples of different lengths, which this simple form does not align.
    """
    batches = sorted(make_batches(data, model, 1), key=lambda batch: batch.indices[0])
    if len({(batch.n_prompt, batch.answer.shape[1]) for batch in batches}) > 1:
        raise ValueError("effects_by_cache needs prompts and answers of equal lengths.")
    hooks = [s.site.hook for s in spectra.values()]
    activations: dict[str, list[Tensor]] = {name: [] for name in spectra}
    gradients: dict[str, list[Tensor]] = {name: [] for name in spectra}
    for batch in batches:
        tokens = torch.cat([batch.tokens, batch.answer[:, -1:]], dim=1)
        labels = tokens.clone()
        labels[:, : batch.n_prompt] = -100
        with (
            torch.enable_grad(),
            prompt_ends_at(model, batch.n_prompt),
            model.hooks(fwd_hooks=[("blocks.0.hook_in", _differentiate_from_here)]),
        ):
            _, cache = model.run_with_cache(
                tokens, return_type="loss", labels=labels, names_filter=hooks, incl_bwd=True
            )
        for name, s in spectra.items():
            n_pos = tokens.shape[1]
            h = s.site.split(cache[s.site.hook], n_pos)[:, :-1]
            g = s.site.split(cache[f"{s.site.hook}_grad"], n_pos)[:, :-1]
            activations[name].append(s.coordinates(h.to(s.dtype)))
            # The bridge's loss is a mean over the answer tokens; ours is their sum.
            gradients[name].append(s.slopes(g.to(s.dtype)) * batch.answer.shape[1])
    effects = {}
    for name, s in spectra.items():
        c, slope = torch.cat(activations[name]), torch.cat(gradients[name])
        if reference == "zero":
            mean = zero_coordinates(model, s)
        else:
            mean = c.mean((0, 1) if reference == "shared" else 0, keepdim=True)
        effects[name] = (mean - c) * slope
    return effects
