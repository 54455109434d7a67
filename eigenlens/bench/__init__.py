"""What eigenlens takes: against a training step, on models of real sizes, and on paper.

- :mod:`eigenlens.bench.ratios`: scoring and gates in units of a training step.
- :mod:`eigenlens.bench.making`: models of real sizes with random weights.
- :mod:`eigenlens.bench.chain`: time and memory of every stage on one of them.
- :mod:`eigenlens.bench.plan`: the same from shapes alone.
"""
