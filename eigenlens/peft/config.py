"""The configuration of an eigenpruning adapter: ``adapter_config.json``."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eigenlens.errors import problems
from eigenlens.files import FileFormatError
from eigenlens.models.peft_adapters import CONFIG, WEIGHTS
from eigenlens.models.weight_files import check_file, refuse_pickle
from eigenlens.position_means import Positions

# peft shows a name that it does not know, and nothing else, where the method is not imported.
METHOD = "EIGENPRUNE (INSTALL EIGENLENS AND IMPORT EIGENLENS.PEFT FIRST)"

_Size = Annotated[int, Field(gt=0)]


@dataclass
class EigenpruneAdapterConfig(PeftConfig):
    """Written by :func:`eigenlens.peft.to_peft`, not by hand.

    Attributes:
        target_modules: paths of the edited modules.
        exclude_modules: peft expects this field.
        shapes: inputs, coordinates and outputs of each of them.
        weights: hashes of each of their weights, by type.
        positions: first and last position with means of their own, and whether the first stands
            for all earlier ones.
    """

    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    positions: list[int] = field(default_factory=lambda: [0, 0, 0])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD
        try:
            _Checked.model_validate(vars(self))
        except ValidationError as error:
            raise ValueError(
                f"This is no configuration that eigenlens.peft.to_peft wrote ({problems(error)}): "
                "write or copy it again."
            ) from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read the configuration; in a local folder, the file of the tensors must be whole.

        Raises:
            FileFormatError: it is truncated, damaged, a pickle, or not there.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG).is_file():
            refuse_pickle(folder, "adapter_model")
            if not (folder / WEIGHTS).is_file():
                raise FileFormatError(f"{folder} lacks {WEIGHTS}: copy or make the adapter again.")
            check_file(folder / WEIGHTS)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    @property
    def rows(self) -> Positions:
        """Which positions have means of their own."""
        start, stop, bucketed = self.positions
        return Positions(start, stop, bucketed=bool(bucketed))


class _Checked(BaseModel):
    """What :func:`eigenlens.peft.to_peft` writes."""

    model_config = ConfigDict(extra="ignore")

    task_type: Annotated[str | None, Field(pattern="^CAUSAL_LM$")]
    shapes: dict[str, tuple[_Size, _Size, _Size]]
    weights: dict[str, Annotated[dict[str, str], Field(min_length=1)]]
    positions: tuple[int, int, Annotated[int, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _fits(self) -> "_Checked":
        start, stop, _ = self.positions
        if start > stop:
            raise ValueError(f"positions end at {stop}, before they begin at {start}")
        if set(self.weights) != set(self.shapes):
            raise ValueError("weights are not of the modules that have shapes")
        return self
