"""Adapters of few numbers through ``peft``: VeRA, TinyLoRA, UniLoRA, PSOFT and BEFT.

What they add to a weight is a product of a few trained numbers with matrices that nobody has to
keep: drawn from a seed (VeRA, UniLoRA), taken from the singular vectors of the weight (PSOFT) or
both (TinyLoRA). Their files hold the trained numbers alone, and whoever reads one makes the rest
again, so that the size of the file is what the edit has to say.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from eigenlens.baselines.adapters import ADAPTER, Adapter, Adapters, adapter_key, no_float64
from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import StoredEdit, WeightEdit, adding
from eigenlens.baselines.training import Trainable
from eigenlens.matrices import WeightMatrix, weight_matrices


class CompactAdapter(Adapter):
    """peft layers whose change of a weight follows from ``settings`` and the trained numbers.

    Attributes:
        settings: name of peft's configuration (``config``), its ``options``, the ``matrices`` and
            the ``seed``; with the model's weights they make the same layers again.
    """

    def __init__(self, matrices: Sequence[WeightMatrix], settings: Mapping[str, Any]) -> None:
        import peft

        self.settings = settings
        targets = [adapter_key(matrix) for matrix in matrices]
        config = getattr(peft, settings["config"])(target_modules=targets, **settings["options"])
        super().__init__(matrices, config, settings["seed"])
        # Layers may share what is trained: it belongs to the first.
        self._trained = {
            f"{matrix.name}.{name}": parameter
            for matrix, layer in reversed(self.layers.items())
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        owners = {id(parameter): name for name, parameter in self._trained.items()}
        self._trained = {n: p for n, p in self._trained.items() if owners[id(p)] == n}

    @staticmethod
    def twin(module: nn.Module) -> nn.Module:
        """As for other adapters, with the weights of GPT-2 turned: PSOFT knows linear maps only."""
        twin = Adapter.twin(module)
        if not isinstance(twin, Conv1D):
            return twin
        n_in, n_out = twin.weight.shape
        linear = nn.Linear(n_in, n_out, bias=False, device="meta")
        linear.weight = nn.Parameter(twin.weight.detach().T, requires_grad=False)
        linear.bias = twin.bias
        return linear

    def edit(self) -> "CompactEdit":
        """The trained numbers as they are now."""
        values = {name: p.detach().clone() for name, p in self._trained.items()}
        return CompactEdit(values, self.settings, self)

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the layers have these numbers inside the block."""
        kept = {name: parameter.data for name, parameter in self._trained.items()}
        try:
            for name, parameter in self._trained.items():
                parameter.data = values[name].to(parameter)
            yield
        finally:
            for name, parameter in self._trained.items():
                parameter.data = kept[name]


@dataclass(frozen=True)
class CompactEdit(WeightEdit):
    """The change of each weight that a :class:`CompactAdapter` with these numbers makes.

    ``tensors`` are the trained numbers, ``settings`` those of the adapter.
    """

    adapter: CompactAdapter | None = field(default=None, repr=False, compare=False)

    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Each adapted weight with the adapter merged."""
        adapter = self.adapter
        if adapter is None:
            names = self.settings["matrices"]
            matrices = [m for m in weight_matrices(model) if m.name in names]
            adapter = CompactAdapter(matrices, self.settings)
        with adapter.holding(self.tensors):
            for matrix, layer in adapter.layers.items():
                change = layer.get_delta_weight(ADAPTER).detach()
                weight = matrix.flat_weight
                yield weight, weight + change.T.to(weight)


class BiasesEdit(StoredEdit):
    """Adds a vector at each of several hooks, by whose names ``tensors`` holds them."""

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Add the vectors inside the block."""
        with ExitStack() as stack:
            for hook, bias in self.tensors.items():
                stack.enter_context(adding(model, hook, bias))
            yield


class BiasAdapter(Adapter):
    """BEFT layers: a vector added to the output of a map, which need not have a bias."""

    def edit(self) -> BiasesEdit:
        """The vectors as they are now."""
        return BiasesEdit(
            {
                matrix.hook_out: layer.beft_bias[ADAPTER].detach().flatten().clone()
                for matrix, layer in self.layers.items()
            }
        )


@dataclass(frozen=True)
class Compact(Adapters):
    """What adapters of few numbers have in common: one setting, three learning rates."""

    learning_rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)

    _config: ClassVar[str]

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Of peft's configuration."""

    def find(self, search: Search) -> None:
        """One run per learning rate, one candidate per epoch.

        Raises:
            ValueError: a float64 model, for which peft computes in part in float32.
        """
        no_float64(search.model, self.name)
        super().find(search)

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """A fresh adapter."""
        matrices = weight_matrices(search.model, self.matrices)
        settings = {
            "config": self._config,
            "options": self.options(),
            "matrices": [matrix.name for matrix in matrices],
            "seed": search.seed,
        }
        yield {}, CompactAdapter(matrices, settings)


@dataclass(frozen=True)
class Vera(Compact):
    """VeRA (Kopiczko et al., 2024): scales between two random matrices that all weights share.

    Attributes:
        rank: of these matrices.
    """

    rank: int = 64
    name: str = "VeRA"

    _config: ClassVar[str] = "VeraConfig"

    def options(self) -> dict[str, Any]:
        """The projections are drawn from peft's own key."""
        return {"r": self.rank}


@dataclass(frozen=True)
class TinyLora(Compact):
    """TinyLoRA (arXiv 2602.04118): a few coefficients of random matrices between singular vectors.

    Attributes:
        rank: how many of the largest singular components of a weight are mixed.
        coefficients: trained numbers of a weight.
    """

    rank: int = 4
    coefficients: int = 8
    name: str = "TinyLoRA"

    _config: ClassVar[str] = "TinyLoraConfig"

    def options(self) -> dict[str, Any]:
        """The random matrices are drawn from peft's own seed."""
        return {"r": self.rank, "u": self.coefficients}


@dataclass(frozen=True)
class UniLora(Compact):
    """UniLoRA: the entries of all A and B of LoRA are drawn from one short trained vector.

    Attributes:
        rank: of A and B.
        length: of the vector.
    """

    rank: int = 4
    length: int = 256
    name: str = "UniLoRA"

    _config: ClassVar[str] = "UniLoraConfig"

    def options(self) -> dict[str, Any]:
        """Which entry is where is drawn from peft's own seed."""
        return {"r": self.rank, "theta_d_length": self.length}


@dataclass(frozen=True)
class Psoft(Compact):
    """PSOFT: the largest singular components of a weight, rotated and scaled among each other.

    Attributes:
        rank: how many.
    """

    rank: int = 8
    name: str = "PSOFT"

    _config: ClassVar[str] = "PsoftConfig"

    def options(self) -> dict[str, Any]:
        """The scale cancels against that of the singular vectors."""
        return {"r": self.rank, "psoft_alpha": self.rank}


@dataclass(frozen=True)
class Beft(Compact):
    """BEFT: a trained bias of the values, where the architecture has none, too."""

    matrices: tuple[str, ...] | None = ("W_V",)
    name: str = "BEFT"

    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """A fresh bias of each map, zero at first."""
        from peft import BeftConfig

        matrices = weight_matrices(search.model, self.matrices)
        config = BeftConfig(target_modules=[adapter_key(matrix) for matrix in matrices])
        yield {}, BiasAdapter(matrices, config, search.seed)
