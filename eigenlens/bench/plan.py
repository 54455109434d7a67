"""What the chain takes on a model, from its shapes alone: nothing is loaded.

The model is laid out on the meta device, wrapped, and taken through the very functions that run on
real ones (:class:`eigenlens.bench.on_paper.OnPaper`), which counts the bytes of their tensors:

- *weights*: all parameters, tied ones once.
- *bases*: the directions and singular values of all matrices.
- *sums*: what scoring adds up, whatever the number of examples.
- *work*: the rest at the highest moment of a stage: activations of a batch and their gradients, or
  the matrix that is being decomposed in float64.

The process with its libraries is measured here, by this process, which has imported the same.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eigenlens.bench import resident
from eigenlens.bench.making import byte_tokenizer, laid_out
from eigenlens.bench.on_paper import OnPaper
from eigenlens.bench.stages import FRACTION, STAGES, additions
from eigenlens.costs import measured
from eigenlens.decomposition import decompose
from eigenlens.evaluation import evaluate
from eigenlens.freezing import freeze
from eigenlens.models.special_tokens import kept_as_is, note_special_tokens
from eigenlens.models.upstream import no_installs, weights_on_paper
from eigenlens.models.wrapping import check_architecture
from eigenlens.scoring import score
from eigenlens.scoring.accumulators import ActivationSums, EffectSums
from eigenlens.search import LearnedConfig, learned
from eigenlens.selection import select
from eigenlens.spectra import Spectra
from eigenlens.tasks import make_batches

T = TypeVar("T")


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes, in bytes, and the passes over batches it makes."""

    stage: str
    weights: int
    bases: int
    sums: int
    work: int
    forward_passes: int = 0
    backward_passes: int = 0

    @property
    def tensors(self) -> int:
        """Of all tensors at the highest moment."""
        return self.weights + self.bases + self.sums + self.work


@dataclass(frozen=True)
class Plan:
    """What the chain takes.

    Attributes:
        stages: in their order.
        process: bytes of this process with its libraries.
        components: of all matrices.
        tokens: of a batch.
        n_layers: blocks that can be on several devices.
        ends: bytes of the weights outside of blocks.
    """

    stages: tuple[StagePlan, ...]
    process: int
    components: int
    tokens: int
    n_layers: int
    ends: int

    def peak(self, stage: str) -> int:
        """Highest resident memory of a stage in one process on the CPU."""
        return self.process + next(s.tensors for s in self.stages if s.stage == stage)

    def summary(self, devices: int = 1) -> dict[str, Any]:
        """All numbers, for a file."""
        stages = [
            {**asdict(s), "peak": self.peak(s.stage), "on_each_device": self.on_each(s, devices)}
            for s in self.stages
        ]
        return {**asdict(self), "stages": stages, "devices": devices}

    def on_each(self, stage: StagePlan, devices: int) -> int:
        """Bytes on the fullest of several devices with whole blocks, the ends on one of them.

        Weights, bases, sums and activations lie where their block is.
        """
        share = math.ceil(self.n_layers / devices) / self.n_layers
        return round((stage.tensors - self.ends) * share) + self.ends


def plan(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
    examples: int = 50,
    tokens: int | None = None,
    batch_size: int = 10,
) -> Plan:
    """Plan the chain of :mod:`eigenlens.bench.stages`.

    Args:
        config: of the model.
        dtype: of its weights.
        tokenizer: tells how long prompts are (default: one of bytes).
        examples: scored.
        tokens: of a prompt, at least.
        batch_size: examples per pass.

    Raises:
        UnsupportedModelError: TransformerLens has no bridge for it, or it is not dense.
    """
    words = tokenizer or byte_tokenizer(config.vocab_size)
    batch_size = min(batch_size, examples)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    with OnPaper() as paper:
        model = _bridge(config, dtype, words)
        process = resident.forget_peak()  # without what converting a model left behind
        traced = _Traced(paper, model, paper.now)
        task = additions(model, batch_size, tokens)
        traced.run("evaluate", lambda: evaluate(model, task.test, **options))
        spectra = traced.run("decompose", lambda: decompose(model, cache=False, progress=False))
        scores = traced.run(
            "score",
            lambda: score(
                model, spectra, task.train, criterion="margin", reference="shared", **options
            ),
            sums=_bytes_of_sums(paper, spectra),
            times=math.ceil(examples / batch_size),
        )
        traced.run("freeze", lambda: freeze(model, select(scores, FRACTION)).apply().undo())
        step = LearnedConfig(steps=1, every=1, batch_size=batch_size)
        splits = task.train, task.validation
        traced.run("learned", lambda: learned(model, scores, *splits, step, progress=False))
        return Plan(
            tuple(traced.stages[name] for name in STAGES),
            process,
            spectra.n_components,
            sum(batch.tokens.numel() for batch in make_batches(task.train, model, batch_size)),
            len(model.blocks),
            traced.weights - _bytes_of_blocks(model),
        )


class _Traced:
    """Stages that are run on paper, one after another."""

    def __init__(self, paper: OnPaper, model: TransformerBridge, weights: int) -> None:
        self.paper = paper
        self.model = model
        self.weights = weights
        self.bases = 0
        self.stages: dict[str, StagePlan] = {}

    def run(self, name: str, stage: Callable[[], T], *, sums: int = 0, times: int = 1) -> T:
        """Run a stage, note its highest moment, and hand out its result.

        Bases are what ``decompose`` leaves, for the stages after it, too; the passes are made
        ``times`` over in the chain.
        """
        self.paper.peak = before = self.paper.now
        with measured(self.model) as cost:
            found = stage()
        if name == "decompose":
            self.bases = self.paper.now - before
        work = self.paper.peak - self.weights - self.bases - sums
        passes = cost.forward_passes * times, cost.backward_passes * times
        self.stages[name] = StagePlan(name, self.weights, self.bases, sums, work, *passes)
        return found


def _bridge(
    config: PretrainedConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> TransformerBridge:
    """The bridge of a model on paper, ready but for what takes values to find out."""
    model = laid_out(config, dtype)
    config.architectures = [type(model).__name__]
    check_architecture(config)
    with kept_as_is(tokenizer), no_installs(), weights_on_paper():
        bridge = TransformerBridge.boot_transformers(
            type(model).__name__, hf_model=model, dtype=dtype, device="meta", tokenizer=tokenizer
        )
    bridge.eval()
    bridge.requires_grad_(False)
    note_special_tokens(bridge, None)
    bridge.cfg.device = torch.device("meta")
    return bridge


def _bytes_of_sums(paper: OnPaper, spectra: Spectra) -> int:
    """Of what scoring by ``margin`` adds up."""
    before = paper.now
    sums = [
        (EffectSums.zeros(s, by_position=False), ActivationSums.zeros(s, n_rows=1))
        for s in spectra.values()
    ]
    found = paper.now - before
    del sums
    return found


def _bytes_of_blocks(model: TransformerBridge) -> int:
    storages = (parameter.untyped_storage() for parameter in model.blocks.parameters())
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
