"""The tuner: which modules get eigenpruning layers, and what must hold before they are merged."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigenlens.export.refusals import PositionBiasError
from eigenlens.export.weights import give_biases, linear_at
from eigenlens.peft.config import EigenpruneAdapterConfig
from eigenlens.peft.layer import EigenpruneLinear
from eigenlens.peft.tensors import check_tensors
from eigenlens.positions import PositionTracker, attach_tracker
from eigenlens.provenance import same_when_rounded, tensor_hash


class EigenpruneModel(BaseTuner):
    """A base model with eigenpruning adapters."""

    prefix = "eigenprune_"
    tuner_layer_cls = EigenpruneLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft's own declaration
    _tracking: tuple[PositionTracker, Callable[[], None]] | None = None

    def _prepare_model(self, peft_config: EigenpruneAdapterConfig, model: nn.Module) -> None:
        """Check that the base is that of the adapter, before anything is replaced."""
        if not peft_config.shapes:
            raise ValueError("Eigenpruning adapters are made by eigenlens.peft.to_peft.")
        modules = dict(model.named_modules())
        for path, shape in peft_config.shapes.items():
            if path not in modules:
                raise ValueError(f"The base model has no {path}: the adapter is for another one.")
            _check_base(path, linear_at(model, path), shape, peft_config.weights[path])

    def _create_and_replace(
        self,
        peft_config: EigenpruneAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, EigenpruneLinear):
            if self._tracking is None:
                self._tracking = attach_tracker(self.model)
            layer = EigenpruneLinear(target, self._tracking[0])
            layer.set_adapter(self.active_adapters)
        shape, inference = peft_config.shapes[current_key], peft_config.inference_mode
        layer.add(adapter_name, shape, peft_config.rows, inference=inference)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: EigenpruneAdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Peft's own, of tensors that are all there: it would leave zeros for those that are not.

        Raises:
            FileFormatError: tensors are missing, unknown, of another shape, or no finite numbers.
        """
        check_tensors(config, state_dict)
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return found

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put adapters into the weights; ``unmerge_adapter`` puts back what was there.

        Raises:
            PositionBiasError: means by position.
            UnsupportedModelError: a map needs a bias and the architecture has none.
        """
        self._prepare_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, adapter_names: list[str] | None = None, **options: Any
    ) -> nn.Module:
        if merge:
            self._prepare_merge(adapter_names)
        model = super()._unload_and_optionally_merge(
            merge=merge, adapter_names=adapter_names, **options
        )
        if self._tracking is not None:
            self._tracking[1]()
            self._tracking = None
        return model

    def _prepare_merge(self, names: list[str] | None) -> None:
        """Give the biases that merging needs, or say why it cannot be."""
        names = names or self.active_adapters
        for name in names:
            if len(self.peft_config[name].rows):
                raise PositionBiasError(
                    f"The adapter {name!r} cannot be merged: weights have one bias for all "
                    "positions, and this edit has means by position. Write it anew with "
                    "to_peft(model, frozen.shared(), folder), or better search with "
                    "reference='shared'."
                )
        give_biases(
            self.model,
            [
                path
                for path, layer in self.model.named_modules()
                if isinstance(layer, EigenpruneLinear)
                for name in names
                if name in layer.eigenprune_down and layer.change(name).bias.any()
            ],
        )


def _check_base(path: str, base: nn.Module, shape: list[int], hashes: dict[str, str]) -> None:
    """Raise ``ValueError`` unless a module is the one that the adapter was made for."""
    if not isinstance(base, nn.Linear | Conv1D) or not base.weight.is_floating_point():
        raise ValueError(f"{path} of the base model is no linear map of floating point numbers.")
    here = base.weight.shape if isinstance(base, Conv1D) else base.weight.T.shape
    if list(here) != [shape[0], shape[2]]:
        raise ValueError(
            f"{path} is {here[0]} x {here[1]} in the base model and {shape[0]} x {shape[2]} in the "
            "adapter: it was made for another model."
        )
    if not same_when_rounded(hashes, *hashed_weight(base)):
        raise ValueError(
            f"{path} holds other weights than those that the adapter was made for: give its own "
            "base model."
        )


def hashed_weight(module: nn.Module) -> tuple[Callable[[torch.dtype], str], torch.dtype]:
    """Hash of the weight of a map in any type, and its own type."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return lambda dtype: tensor_hash(weight.detach().to(dtype)), weight.dtype
