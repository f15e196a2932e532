"""Functions on tensors that stand for a formula: what another library could compute as well.

They know no setting and no model, and each has an oracle among the tests.
"""
