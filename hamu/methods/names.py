"""Names of the methods and of their choices, without torch: what a command line may say before anything heavy is imported."""

HAMU_METHODS = ("hamu-q", "hamu-u")
METHOD_NAMES = (*HAMU_METHODS, "ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad")

CONSTRAINT_SPLITS = ("grad_norm", "softmax_dp", "uniform")
"""How blocks can share a constraint; see `hardness.split_constraint`."""

STOPPING_RULES = ("aggregate", "feasible", "predicted")
"""Each has a margin in `Hardness.margins`; a rule fires where its margin is positive."""
