"""LoRA, PiSSA and IA3 through ``peft``, on the linear maps that eigenpruning edits.

peft builds its layers around twins of these maps, which share their weights, and the layers run in
the place of the maps while they are trained. For measuring, the adapter is merged into the model's
own weights, in the same harness as every other edit, and taken out again bit for bit.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import WeightEdit
from eigenlens.baselines.training import Trainable, Trained, replaced
from eigenlens.matrices import WeightMatrix, weight_matrices

ADAPTER = "default"


class LowRankEdit(WeightEdit):
    """Adds a matrix of low rank to each weight: ``W + reads @ writes``.

    ``tensors`` holds ``{name}.reads`` ``[all_in, k]`` and ``{name}.writes`` ``[k, all_out]``;
    ``settings["trained"]`` is how many numbers were trained.
    """

    @property
    def parameters_changed(self) -> int:
        """Entries of A and B, as peft counts them."""
        return self.settings["trained"]

    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Each adapted weight with the adapter merged."""
        for matrix in weight_matrices(model):
            if f"{matrix.name}.reads" in self.tensors:
                reads, writes = (self.tensors[f"{matrix.name}.{p}"] for p in ("reads", "writes"))
                weight = matrix.flat_weight
                yield weight, weight + (reads @ writes).to(weight)


class ScaleEdit(WeightEdit):
    """Scales inputs or outputs of linear maps: ``{name}.in`` or ``{name}.out``, ``[width]``."""

    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Each scaled weight, and the bias with its output."""
        for matrix in weight_matrices(model):
            weight, bias = matrix.flat_weight, matrix.bias
            inputs = self.tensors.get(f"{matrix.name}.in")
            outputs = self.tensors.get(f"{matrix.name}.out")
            if inputs is not None:
                yield weight, weight * inputs.to(weight)[:, None]
            if outputs is not None:
                yield weight, weight * outputs.to(weight)
                if bias is not None:
                    yield bias, bias * outputs.to(bias)


class Adapter(Trainable):
    """peft layers around linear maps."""

    def __init__(self, matrices: Sequence[WeightMatrix], config: Any, seed: int) -> None:
        from peft import get_peft_model

        twins = nn.ModuleDict({adapter_key(m): self.twin(m.module) for m in matrices})
        with _quiet(), torch.random.fork_rng(devices=[]):
            # peft draws on the CPU. torch.manual_seed would seed every GPU, too, for good.
            torch.default_generator.manual_seed(seed)
            get_peft_model(twins, config, ADAPTER)
        self.layers: dict[WeightMatrix, Any] = {m: twins[adapter_key(m)] for m in matrices}
        for parameter in self.parameters:
            # Adam's small steps would round to nothing in half precision.
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide)

    @staticmethod
    def twin(module: nn.Module) -> nn.Module:
        """A copy that shares the values of weight and bias, but not the parameters that hold them.

        PiSSA gives its base layer another weight: it must not be the model's.
        """
        kept = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
        return copy.deepcopy(module, memo=kept)

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What peft marked as trainable; what layers share is there once."""
        found = (p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad)
        return list({id(parameter): parameter for parameter in found}.values())

    @property
    def n_trained(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def live(self, model: TransformerBridge) -> AbstractContextManager[None]:
        """Run peft's layers, unmerged."""
        return replaced(model, self.layers)


class LowRankAdapter(Adapter):
    """LoRA or PiSSA layers."""

    def __init__(self, matrices: Sequence[WeightMatrix], config: Any, seed: int) -> None:
        super().__init__(matrices, config, seed)
        # PiSSA starts from a product that is not zero, taken off the weight of the twin.
        is_pissa = config.init_lora_weights == "pissa"
        self.start = {m: _factors(layer) for m, layer in self.layers.items()} if is_pissa else {}

    def edit(self) -> LowRankEdit:
        """The adapter as it is now, PiSSA's start taken off."""
        tensors: dict[str, Tensor] = {}
        for matrix, layer in self.layers.items():
            reads, writes = _factors(layer)
            if matrix in self.start:
                first_reads, first_writes = self.start[matrix]
                reads = torch.cat([reads, first_reads], 1)
                writes = torch.cat([writes, -first_writes])
            tensors |= {f"{matrix.name}.reads": reads, f"{matrix.name}.writes": writes}
        return LowRankEdit(tensors, {"trained": self.n_trained})


class ScaleAdapter(Adapter):
    """IA3 layers."""

    def edit(self) -> ScaleEdit:
        """The scales as they are now."""
        return ScaleEdit(
            {
                f"{matrix.name}.{'in' if layer.is_feedforward else 'out'}": layer.ia3_l[ADAPTER]
                .detach()
                .flatten()
                .clone()
                for matrix, layer in self.layers.items()
            }
        )


def _factors(layer: Any) -> tuple[Float[Tensor, "all_in k"], Float[Tensor, "k all_out"]]:
    """``A`` and ``B`` of a layer in ``x @ W`` orientation, the scaling in the second."""
    reads = layer.lora_A[ADAPTER].weight.detach().T.clone()
    writes = layer.lora_B[ADAPTER].weight.detach().T * layer.scaling[ADAPTER]
    return reads, writes


def adapter_key(matrix: WeightMatrix) -> str:
    """A name without dots, which a ``ModuleDict`` does not take."""
    return matrix.name.replace(".", "-")


@contextmanager
def _quiet() -> Iterator[None]:
    """GPT-2 has maps of either layout; peft warns each time it finds the other, and handles it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # BEFT says that it cannot be merged into a map without bias, and need not be.
        warnings.filterwarnings("ignore", message="Detected that the base layer has no bias term")
        yield


def no_float64(model: TransformerBridge, name: str) -> None:
    """Raise ``ValueError`` for a float64 model."""
    if next(model.parameters()).dtype == torch.float64:
        raise ValueError(f"peft's {name} takes no float64: load the model with dtype='float32'.")


@dataclass(frozen=True)
class Adapters(Trained):
    """What the adapters of peft have in common.

    Attributes:
        matrices: kinds to adapt; default all linear maps of the blocks.
    """

    matrices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{self.name} needs peft: pip install 'eigenlens[peft]'.") from error


@dataclass(frozen=True)
class Lora(Adapters):
    """LoRA (Hu et al., 2021): a trained product of rank r is added to each weight.

    Attributes:
        ranks: r, chosen on validation.
        alpha_per_rank: what the product is multiplied by.
    """

    ranks: tuple[int, ...] = (2, 8)
    alpha_per_rank: float = 2.0
    name: str = "LoRA"

    _start: ClassVar[bool | str] = True

    def parts(self, model: TransformerBridge) -> Sequence[Baseline]:
        """One for each learning rate and rank."""
        return [
            replace(self, learning_rates=(rate,), ranks=(r,))
            for rate in self.learning_rates
            for r in self.ranks
        ]

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """A fresh adapter per rank."""
        from peft import LoraConfig

        matrices = weight_matrices(search.model, self.matrices)
        for rank in self.ranks:
            config = LoraConfig(
                r=rank,
                lora_alpha=self.alpha_per_rank * rank,
                target_modules=[adapter_key(matrix) for matrix in matrices],
                init_lora_weights=self._start,
            )
            yield {"rank": rank}, LowRankAdapter(matrices, config, search.seed)


@dataclass(frozen=True)
class Pissa(Lora):
    """PiSSA (Meng et al., 2024): LoRA that starts from the r largest singular components."""

    alpha_per_rank: float = 1.0
    name: str = "PiSSA"

    _start: ClassVar[bool | str] = "pissa"

    def find(self, search: Search) -> None:
        """One run per learning rate and rank, one candidate per epoch.

        Raises:
            ValueError: a float64 model, which peft's PiSSA does not take.
        """
        no_float64(search.model, self.name)
        super().find(search)


@dataclass(frozen=True)
class Ia3(Adapters):
    """IA3 (Liu et al., 2022): trained scales of keys, values and inputs of ``W_out``."""

    learning_rates: tuple[float, ...] = (1e-2, 1e-1)
    matrices: tuple[str, ...] | None = ("W_K", "W_V", "W_out")
    name: str = "IA3"

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """A fresh adapter; outputs are scaled, but for ``W_out`` its inputs."""
        from peft import IA3Config

        matrices = weight_matrices(search.model, self.matrices)
        config = IA3Config(
            target_modules=[adapter_key(matrix) for matrix in matrices],
            feedforward_modules=[
                adapter_key(matrix) for matrix in matrices if matrix.kind == "W_out"
            ],
        )
        yield {}, ScaleAdapter(matrices, config, search.seed)
