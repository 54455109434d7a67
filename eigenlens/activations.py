"""What an edit does inside the model: activations before and after, on the same examples.

Every example is run twice, without and with the edit. Positions are counted from the end of the
prompt; means are over the tokens that are there. ``cosine`` is that of an activation with itself
after the edit, ``change`` is ``‖after − before‖ / ‖before‖``; both are means over examples.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.files import FileFormatError, load_tensors, save_tensors
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import WeightMatrix, weight_matrices
from eigenlens.metrics import answer_logits, check_eval_mode, precise
from eigenlens.passes import widened
from eigenlens.provenance import Provenance, data_hash
from eigenlens.tasks.batches import Batch, make_batches

_TABLES = ("residual", "heads", "mlp", "lens", "patterns")
_STATISTICS = ("norm_before", "norm_after", "cosine", "change")


@dataclass(frozen=True)
class ActivationChange:
    """Activations before and after an edit.

    Attributes:
        residual: ``depth, position`` and ``norm_before, norm_after, cosine, change`` of the
            residual stream; depth 0 enters the first block, depth l leaves block l − 1.
        heads: the same of each query head's output (``z W_O``) by ``layer, head, position``.
        mlp: the same of the MLP's output (``W_out`` and its bias) by ``layer, position``.
        lens: the logit lens at the last position of the prompt: for each ``depth``, the first
            answer token's mean log-probability ``logprob_before, logprob_after`` in nats, and the
            share of examples where it is the most likely token, ``top_before, top_after``.
        patterns: attention ``before`` and ``after`` from ``query`` to ``key`` positions by
            ``layer, head``, a mean over the examples that have a token at the query position.
        n_examples: examples run.
        provenance: model, data and versions.
    """

    residual: pd.DataFrame
    heads: pd.DataFrame
    mlp: pd.DataFrame
    lens: pd.DataFrame
    patterns: pd.DataFrame
    n_examples: int
    provenance: Provenance

    def _repr_html_(self) -> str:
        note = (
            f"Activations before and after the edit, {self.n_examples} examples. "
            "Logit lens of the right answer at the last position (nats, shares):"
        )
        return f"<p>{note}</p>{self.lens.to_html(index=False)}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, a tensor per column."""
        tensors = {
            f"{name}.{column}": torch.tensor(table[column].to_numpy())
            for name in _TABLES
            for table in [getattr(self, name)]
            for column in table
        }
        metadata = {"n_examples": self.n_examples, "provenance": self.provenance.model_dump()}
        save_tensors(path, "activation change", tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ActivationChange":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        tensors, metadata = load_tensors(path, "activation change")
        try:
            tables = {
                name: pd.DataFrame({c: tensors[f"{name}.{c}"].numpy() for c in columns})
                for name, columns in _COLUMNS.items()
            }
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error
        return _result(tables, metadata["n_examples"], Provenance(**metadata["provenance"]))


_COLUMNS = {
    "residual": ["depth", "position", *_STATISTICS],
    "heads": ["layer", "head", "position", *_STATISTICS],
    "mlp": ["layer", "position", *_STATISTICS],
    "lens": ["depth", "logprob_before", "logprob_after", "top_before", "top_after"],
    "patterns": ["layer", "head", "query", "key", "before", "after"],
}


def activation_change(
    model: TransformerBridge,
    frozen: FrozenSet,
    data: Dataset,
    *,
    last: int = 16,
    batch_size: int = 50,
    progress: bool = True,
) -> ActivationChange:
    """Run every example without and with an edit, and compare what happens inside.

    Args:
        model: the model that ``frozen`` was made for, in eval mode.
        frozen: the edit.
        data: examples with the columns ``prompt`` and ``answer``.
        last: keep this many positions at the end of the prompt, and all answer positions.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: ``last`` below 1; a model in training mode; a data set that is empty or does
            not fit.
        WrongModelError: ``frozen`` belongs to other weights.
    """
    if last < 1:
        raise ValueError(f"last={last}: keep at least one position.")
    check_eval_mode(model)
    edit = freeze(model, frozen)
    batches = make_batches(data, model, batch_size)
    sums = _Sums(model, _kept(batches, last))
    with torch.no_grad():
        for batch in tqdm(batches, desc="activations", unit="batch", disable=not progress):
            before = _record(model, batch, sums.outputs)
            with edit:
                after = _record(model, batch, sums.outputs)
            sums.add(batch, before, after)
    provenance = Provenance.of(model, task_hash=data_hash(data))
    return _result(sums.tables(), len(data), provenance)


def _result(
    tables: dict[str, pd.DataFrame], n_examples: int, provenance: Provenance
) -> ActivationChange:
    residual, heads, mlp, lens, patterns = (tables[name] for name in _TABLES)
    return ActivationChange(residual, heads, mlp, lens, patterns, n_examples, provenance)


def _kept(batches: Sequence[Batch], last: int) -> range:
    first = min(batch.positions.start for batch in batches)
    return range(max(first, -last), max(batch.positions.stop for batch in batches))


def _record(
    model: TransformerBridge, batch: Batch, outputs: Sequence[WeightMatrix]
) -> dict[str, Tensor]:
    """Residual streams, inputs of ``W_O``, outputs of ``W_out`` and attention patterns."""
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> None:
        kept[name] = value

    depth = len(model.blocks)
    points = {f"residual.{layer}": f"blocks.{layer}.hook_in" for layer in range(depth)}
    points[f"residual.{depth}"] = "ln_final.hook_in"
    points |= {f"patterns.{layer}": f"blocks.{layer}.attn.hook_pattern" for layer in range(depth)}
    for matrix in outputs:
        inner = matrix.kind == "W_O"
        name = f"{'heads' if inner else 'mlp'}.{matrix.layer}"
        points[name] = matrix.hook_in if inner else matrix.hook_out
    hooks = [(point, partial(keep, name=name)) for name, point in points.items()]
    with model.hooks(fwd_hooks=hooks):
        answer_logits(model, batch)
    return kept


class _Sums:
    """Sums over examples per position, and the tables that follow from them."""

    def __init__(self, model: TransformerBridge, positions: range) -> None:
        self.model = model
        self.positions = positions
        self.outputs = [m for m in weight_matrices(model) if m.kind in ("W_O", "W_out")]
        self.count = torch.zeros(len(positions), dtype=torch.float64)
        self.totals: dict[str, Tensor] = {}
        self.n_examples = 0

    def add(self, batch: Batch, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """Add a batch that was run twice."""
        skipped = max(0, self.positions.start - batch.positions.start)
        first = batch.positions.start + skipped - self.positions.start
        rows = slice(first, first + len(batch.positions) - skipped)
        mask = batch.attention_mask[:, skipped:]
        self.count[rows] += mask.sum(0).cpu()
        self.n_examples += len(batch)
        for name in before:
            kind, layer = name.split(".")
            one, two = before[name], after[name]
            if kind == "patterns":
                both = torch.stack([one, two], -1)[:, :, skipped:, skipped:]
                both = rearrange(both, "batch head query key side -> batch query key head side")
                self._put(name, (rows, rows), both, mask)
                continue
            if kind == "residual":
                self._put_lens(f"lens.{layer}", batch, one, two)
            one, two = (self._outputs(kind, int(layer), value[:, skipped:]) for value in (one, two))
            self._put(name, (rows,), _compared(one, two), mask)

    def _put(self, name: str, at: tuple[slice, ...], values: Tensor, mask: Tensor) -> None:
        """Add values ``[batch, pos, …]`` where the mask holds."""
        total = torch.where(widened(mask, values), values, 0).cpu().double().sum(0)
        if name not in self.totals:
            length = [len(self.positions)] * len(at)
            self.totals[name] = total.new_zeros(*length, *total.shape[len(at) :])
        self.totals[name][at] += total

    def _outputs(self, kind: str, layer: int, value: Tensor) -> Float[Tensor, "batch pos part d"]:
        if kind != "heads":
            return precise(value[:, :, None])
        (matrix,) = (m for m in self.outputs if m.kind == "W_O" and m.layer == layer)
        z = rearrange(value.flatten(2), "b p (h d) -> b p h d", h=matrix.n_heads)
        return einsum(z, matrix.weight.to(z), "b p h d, h d m -> b p h m")

    def _put_lens(self, name: str, batch: Batch, one: Tensor, two: Tensor) -> None:
        column = batch.n_prompt - 1
        values = [_lens(self.model, stream[:, column], batch) for stream in (one, two)]
        total = torch.cat(values, dim=-1).double().sum(0).cpu()
        self.totals[name] = self.totals.get(name, torch.zeros_like(total)) + total

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of :data:`_TABLES`."""
        seen = self.count > 0
        positions = torch.tensor(list(self.positions))[seen].tolist()
        parts: dict[str, list[pd.DataFrame]] = {kind: [] for kind in _TABLES}
        for name, total in self.totals.items():
            kind, layer = name.split(".")
            if kind == "lens":
                values = (total / self.n_examples)[None]
                labels: dict[str, list[int]] = {}
            else:
                shape = [len(self.count), *[1] * (total.ndim - 1)]
                values = (total / self.count.clamp_min(1).view(shape))[seen]
                labels = {"position": positions, "head": list(range(total.shape[1]))}
            if kind == "patterns":
                values = values[:, seen]
                heads = list(range(total.shape[2]))
                labels = {"query": positions, "key": positions, "head": heads}
            parts[kind].append(_long(kind, int(layer), values, labels))
        return {
            kind: pd.concat(tables, ignore_index=True)
            if tables
            else pd.DataFrame(columns=_COLUMNS[kind], dtype=float)  # models without MLPs
            for kind, tables in parts.items()
        }


def _compared(
    one: Float[Tensor, "batch pos part d"], two: Float[Tensor, "batch pos part d"]
) -> Float[Tensor, "batch pos part statistic"]:
    """The four statistics of each activation and itself after the edit."""
    norms = one.norm(dim=-1), two.norm(dim=-1)
    tiny = torch.finfo(one.dtype).tiny
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=-1)
    change = (two - one).norm(dim=-1) / norms[0].clamp_min(tiny)
    return torch.stack([*norms, cosine, change], dim=-1)


def _lens(
    model: TransformerBridge, stream: Float[Tensor, "batch d_model"], batch: Batch
) -> Float[Tensor, "batch 2"]:
    """Log-probability of the first answer token, and whether it is the most likely one."""
    logits = model.unembed(model.ln_final(stream[:, None]))[:, 0]
    logits = precise(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    answer = batch.answer[:, :1].to(logits.device)
    logprob = logits.log_softmax(-1).gather(-1, answer)
    return torch.cat([logprob, (logits.argmax(-1, keepdim=True) == answer).to(logprob)], dim=-1)


def _long(kind: str, layer: int, values: Tensor, labels: dict[str, list[int]]) -> pd.DataFrame:
    """One layer's values as rows, the last axis as columns."""
    columns = _COLUMNS[kind]
    flat = values.flatten(0, -2).numpy()
    if kind == "lens":
        table = pd.DataFrame(flat[:, [0, 2, 1, 3]], columns=columns[1:])
    else:
        index = pd.MultiIndex.from_product(list(labels.values()), names=list(labels)).to_frame(
            index=False
        )
        names = ["before", "after"] if kind == "patterns" else list(_STATISTICS)
        table = index.join(pd.DataFrame(flat, columns=names))
    table[columns[0]] = layer
    return table[columns]
