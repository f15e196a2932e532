"""Functions on tensors that stand for a formula: what another library could compute as well.

They know no setting and no model, but for generation.py, which asks one for its caches and logits.
Each has an oracle among the tests.
"""
