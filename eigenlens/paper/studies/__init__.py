"""The studies: each returns a table, a summary and a figure. One file each."""

from eigenlens.paper.studies import (
    ablations,
    adapters,
    ambiguous,
    architectures,
    bases,
    compare,
    constants,
    estimators,
    fraction,
    gates,
    harm,
    induction,
    means,
    monitors,
    multiplication,
    paper_table,
    peers,
    planted,
    searches,
    stories,
    sufficiency,
    suppressed,
    transfer,
)
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.study import Study

EXPERIMENTS: dict[str, Study] = {
    "ambiguous": ambiguous,
    "planted": planted,
    "estimators": estimators,
    "peers": peers,
    "searches": searches,
    "gates": gates,
    "bases": bases,
    "sufficiency": sufficiency,
    "means": means,
    "harm": harm,
    "constants": constants,
    "paper-table": paper_table,
    "multiplication": multiplication,
    "compare": compare,
    "adapters": adapters,
    "fraction": fraction,
    "ablations": ablations,
    "transfer": transfer,
    "architectures": architectures,
    "monitors": monitors,
    "suppressed": suppressed,
    "induction": induction,
    "stories": stories,
}

__all__ = ["EXPERIMENTS", "ExperimentResult", "Study"]
