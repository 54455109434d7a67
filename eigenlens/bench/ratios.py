"""What a scoring pass and a step of gates cost, in units of a training step on the same batches.

The training step is the transformers model's forward pass with logits at every position and a
backward pass with the gradients of all weights, without an optimiser. A stricter row takes its
logits at the answer positions only, as scoring does. Repeats are interleaved, and the median of
each is reported; the rise of the resident memory is sampled in a run before, which is not timed.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.costs import now, peak_memory
from eigenlens.decomposition import decompose
from eigenlens.gates import Gates, faster_products
from eigenlens.matrices import weight_matrices
from eigenlens.metrics import answer_logits, answer_loss
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.provenance import versions
from eigenlens.scoring import score
from eigenlens.spectra import Spectra
from eigenlens.tasks import Batch, Task, make_batches


def benchmark(
    model: TransformerBridge,
    task: Task,
    *,
    batch_size: int = 50,
    repeats: int = 5,
    progress: bool = True,
) -> dict[str, Any]:
    """Time scoring of every component against training steps over ``task.train``.

    Returns:
        ``score_to_training_step`` (ratio of medians), ``score_to_lean_training_step`` (the same
        against training steps with logits at answer positions only), the ratios of scoring by
        ``margin`` and ``max``, of the gradients of activations without any sum
        (``gradients_alone``: the limit), and of training gates (in float32, and as ``learned``
        does), ``peak_memory_mb`` (resident memory above that before, while scoring),
        ``training_peak_memory_mb``, medians in seconds (a cold decomposition and LAPACK's SVD of
        the same weights in float32 among them) and what was run.
    """
    spectra = decompose(model, progress=progress)
    batches = make_batches(task.train, model, batch_size)
    base = score(model, spectra, task.train, batch_size=batch_size, progress=False)
    gates = Gates(model, base)
    jobs: dict[str, Callable[[], object]] = {
        "score": lambda: score(model, spectra, task.train, batch_size=batch_size, progress=False),
        "score_margin": lambda: score(
            model, spectra, task.train, criterion="margin", batch_size=batch_size, progress=False
        ),
        "score_max": lambda: score(
            model, spectra, task.train, criterion="max", batch_size=batch_size, progress=False
        ),
        "gradients_alone": lambda: _gradients(model, spectra, batches),
        "decompose": lambda: decompose(model, cache=False, progress=False),
        "decompose_by_lapack": lambda: _lapack(model),
        "gates": lambda: _train_gates(gates, batches, nullcontext),
        "gates_in_bfloat16": lambda: _train_gates(gates, batches, faster_products),
        "training": lambda: _train(model, batches, _all_logits),
        "lean_training": lambda: _train(model, batches, answer_logits),
        "forward": lambda: _forward(model, batches),
    }
    memory = {name: _peak_memory_mb(job) for name, job in jobs.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in tqdm(range(repeats), desc="bench", disable=not progress):
        for name, job in jobs.items():
            start = now()
            job()
            seconds[name].append(now() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "score_to_training_step": median["score"] / median["training"],
        "score_to_lean_training_step": median["score"] / median["lean_training"],
        "score_margin_to_training_step": median["score_margin"] / median["training"],
        "score_max_to_training_step": median["score_max"] / median["training"],
        "gradients_alone_to_training_step": median["gradients_alone"] / median["training"],
        "gates_to_training_step": median["gates"] / median["training"],
        "gates_in_bfloat16_to_training_step": median["gates_in_bfloat16"] / median["training"],
        "peak_memory_mb": memory["score"],
        "training_peak_memory_mb": memory["training"],
        "seconds": median,
        "all_seconds": seconds,
        "components": spectra.n_components,
        "examples": len(task.train),
        "batch_size": batch_size,
        "tokens_per_batch": batches[0].tokens.numel(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _all_logits(model: TransformerBridge, batch: Batch) -> torch.Tensor:
    mask = batch.attention_mask.long() if batch.is_padded else None
    logits = model.original_model(batch.tokens, attention_mask=mask, use_cache=False).logits
    return logits[:, -batch.answer.shape[1] :]


def _train(
    model: TransformerBridge,
    batches: list[Batch],
    logits_of: Callable[[TransformerBridge, Batch], torch.Tensor],
) -> None:
    """Forward and full backward over all batches; gradients are dropped after each."""
    model.requires_grad_(True)
    try:
        for batch in batches:
            with torch.enable_grad():
                logits = logits_of(model, batch)[batch.answer_mask]
                F.cross_entropy(logits, batch.answer[batch.answer_mask]).backward()
            for parameter in model.parameters():
                parameter.grad = None
    finally:
        model.requires_grad_(False)


def _train_gates(
    gates: Gates, batches: list[Batch], products: Callable[[], AbstractContextManager[None]]
) -> None:
    """The steps of ``learned``: a gradient by every gate, and Adam on their vector."""
    s = torch.zeros_like(gates.z).requires_grad_()
    adam = torch.optim.Adam([s])
    with gates, products():
        for batch in batches:
            with torch.enable_grad():
                z = torch.sigmoid(s)
            gates.z = z.detach()
            _, slope = gates.gradient(batch)
            adam.zero_grad()
            z.backward(slope)
            adam.step()


def _gradients(model: TransformerBridge, spectra: Spectra, batches: list[Batch]) -> None:
    """Forward and backward passes that hand out activations and gradients to nobody."""
    sites = [spectrum.site for spectrum in spectra.values()]
    finite = FiniteCheck()
    for batch in batches:
        forward_backward(model, sites, batch, answer_loss, lambda *given: None, finite)


def _lapack(model: TransformerBridge) -> None:
    """The singular value decompositions of all weights that LAPACK makes."""
    for matrix in weight_matrices(model):
        torch.linalg.svd(matrix.weight.float(), full_matrices=False)


def _forward(model: TransformerBridge, batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            answer_logits(model, batch)


def _peak_memory_mb(job: Callable[[], object]) -> float:
    """Rise of the resident memory while ``job`` runs, in MB."""
    with peak_memory() as peak:
        job()
    return peak.mb
