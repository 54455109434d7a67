"""Scores that the field compares with, for components.

All take ``δ_t = c̄_t − c_t``, how far the reference moves a coordinate, and a slope:

- ``grad_activation``: ``Σ_t −c_t s_t``, the coordinate times its gradient: the first-order effect
  of a coordinate that becomes zero. One forward and one backward pass.
- ``eap_ig_inputs``: ``Σ_t δ_t · mean_α s_t(α)``, slopes along the straight path of the *input
  embeddings* from their reference to the real ones (Hanna et al., arXiv 2403.17806). Embeddings'
  references are made as those of coordinates. A forward pass, and ``steps`` of each.
- ``eap_ig_activations``: the same along the path on which the coordinates of *this matrix* go from
  their references to what they are, one matrix at a time (Marks et al., arXiv 2403.19647).
  Complete: the scores of a matrix add up to what replacing all its components does. ``steps``
  forward and backward passes for each matrix.
- ``atp_qk``, ``atp_drop``, ``atp_star``: attribution patching (the criterion ``mean``) with the
  corrections of AtP* (Kramár et al., arXiv 2403.00745; :mod:`eigenlens.scoring.atp_star`).

Attribution patching itself is the criterion ``mean``.
"""

import torch
from torch import Tensor

from eigenlens.scoring.accumulators import Collected, ComponentSums
from eigenlens.scoring.atp_star import atp_star
from eigenlens.scoring.path_integrals import eap_ig_activations, eap_ig_inputs
from eigenlens.scoring.references import References
from eigenlens.scoring.running import Passes, Totals

_DROP = ("atp_drop", "atp_star")


def check_peer(criterion: str, n_layers: int, steps: int) -> None:
    """Raise ``ValueError`` for what a criterion cannot be computed with."""
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed.")
    if criterion in _DROP and n_layers < 2:
        raise ValueError(
            f"criterion={criterion!r} leaves out one layer at a time, and this model has only one: "
            "use 'atp_qk' or 'mean'."
        )


def peer_sums(
    passes: Passes, references: References, *, criterion: str, steps: int, start: Tensor | None
) -> Collected:
    """What :func:`peer_effects` needs, summed over examples.

    ``start`` is that of :func:`eigenlens.scoring.path_integrals.eap_ig_inputs`.
    """
    magnitude: Totals = {}
    if criterion == "eap_ig_inputs":
        signed = eap_ig_inputs(passes, references, steps=steps, start=start)
    elif criterion == "eap_ig_activations":
        signed = eap_ig_activations(passes, references, steps=steps)
    else:
        correct, drop = criterion in ("atp_qk", "atp_star"), criterion in _DROP
        signed, magnitude = atp_star(passes, references, correct=correct, drop=drop)
    return {
        what: {name: ComponentSums(total) for name, total in totals.items()}
        for what, totals in (("signed", signed), ("magnitude", magnitude))
    }


def peer_effects(found: Collected, criterion: str) -> Totals:
    """Scores summed over examples, in nats."""
    signed, magnitude = (
        {name: one.total for name, one in found[what].items() if isinstance(one, ComponentSums)}
        for what in ("signed", "magnitude")
    )
    if criterion not in _DROP:
        return signed
    return {name: torch.sign(signed[name]) * magnitude[name] for name in signed}
