"""Functions on tensors that stand for a formula: what another library could compute as well.

They know no setting and no model, but for generation.py, which asks one for its caches and logits,
and sharding.py, which shares the work of an update rule among the ranks. Each has an oracle among
the tests.
"""
