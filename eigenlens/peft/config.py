"""The configuration of an eigenpruning adapter: ``adapter_config.json``."""

from dataclasses import dataclass, field

from peft import PeftConfig

from eigenlens.position_means import Positions

# peft shows a name that it does not know, and nothing else, where the method is not imported.
METHOD = "EIGENPRUNE (INSTALL EIGENLENS AND IMPORT EIGENLENS.PEFT FIRST)"


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

    @property
    def rows(self) -> Positions:
        """Which positions have means of their own."""
        start, stop, bucketed = self.positions
        return Positions(start, stop, bucketed=bool(bucketed))
