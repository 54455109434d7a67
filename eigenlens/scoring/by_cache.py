"""The readable way to the same scores: cache everything, then sum.

One example at a time through ``run_with_cache(incl_bwd=True)``, every activation kept. The
streaming passes of :mod:`eigenlens.scoring.scorer` are tested against this; use it to see what
they compute, not on large data.
"""

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.positions import prompt_ends_at
from eigenlens.spectra import Spectra
from eigenlens.tasks.batches import make_batches


def _differentiate_from_here(value: Tensor, hook: object) -> Tensor:
    return value.detach().requires_grad_()


Effects = dict[str, Float[Tensor, "example pos head rank"]]


def effects_by_cache(
    model: TransformerBridge, spectra: Spectra, data: Dataset, *, reference: str = "mean"
) -> Effects:
    """``(ā_t − a_bt) g_bt`` of every component, example and position, by matrix name.

    Args:
        model: in eval mode.
        spectra: its decomposition.
        data: examples whose prompts, and whose answers, have equal numbers of tokens.
        reference: ``"mean"`` (per position) or ``"zero"``.

    Raises:
        ValueError: examples of different lengths, which this simple form does not align.
    """
    batches = sorted(make_batches(data, model, 1), key=lambda batch: batch.indices[0])
    if len({(batch.n_prompt, batch.answer.shape[1]) for batch in batches}) > 1:
        raise ValueError("effects_by_cache needs prompts and answers of equal lengths.")
    hooks = [name for m in spectra.matrices for name in (m.hook_in, m.hook_out)]
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
        for name, spectrum in spectra.items():
            x = cache[spectrum.matrix.hook_in].flatten(2)[:, :-1]
            g = cache[f"{spectrum.matrix.hook_out}_grad"].flatten(2)[:, :-1]
            activations[name].append(spectrum.reads(x.to(spectrum.u)))
            # The bridge's loss is a mean over the answer tokens; ours is their sum.
            gradients[name].append(spectrum.writes(g.to(spectrum.u)) * batch.answer.shape[1])
    effects = {}
    for name in spectra:
        a, g = torch.cat(activations[name]), torch.cat(gradients[name])
        mean = a.mean(0, keepdim=True) if reference == "mean" else torch.zeros_like(a[:1])
        effects[name] = (mean - a) * g
    return effects
