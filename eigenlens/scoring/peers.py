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

from collections.abc import Sequence

from eigenlens.scoring.atp_star import atp_star
from eigenlens.scoring.path_integrals import eap_ig_activations, eap_ig_inputs
from eigenlens.scoring.references import References
from eigenlens.scoring.running import Passes, Totals
from eigenlens.tasks.batches import Batch


def check_peer(criterion: str, n_layers: int, steps: int) -> None:
    """Raise ``ValueError`` for what a criterion cannot be computed with."""
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed.")
    if criterion in ("atp_drop", "atp_star") and n_layers < 2:
        raise ValueError(
            f"criterion={criterion!r} leaves out one layer at a time, and this model has only one: "
            "use 'atp_qk' or 'mean'."
        )


def peer_effects(
    passes: Passes, references: References, batches: Sequence[Batch], criterion: str, steps: int
) -> Totals:
    """Scores summed over examples, in nats."""
    if criterion == "eap_ig_inputs":
        return eap_ig_inputs(passes, references, batches, steps)
    if criterion == "eap_ig_activations":
        return eap_ig_activations(passes, references, batches, steps)
    return atp_star(
        passes,
        references,
        batches,
        correct=criterion in ("atp_qk", "atp_star"),
        drop=criterion in ("atp_drop", "atp_star"),
    )
