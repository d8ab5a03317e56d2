"""Names of the methods, without torch: what a command line may say before anything heavy is imported."""

HAMU_METHODS = ("hamu-q", "hamu-u")
METHOD_NAMES = (*HAMU_METHODS, "ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad")
