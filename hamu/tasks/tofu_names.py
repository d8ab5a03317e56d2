"""The names of TOFU's metrics, for records. Torch-free."""

from __future__ import annotations

UTILITY_PARTS = ("retain", "real_authors", "world_facts")
PARTS = ("forget", *UTILITY_PARTS)
UTILITY_COLUMNS = tuple(f"tofu_{part}_{what}" for part in UTILITY_PARTS for what in ("probability", "rouge", "truth_ratio"))
"""The nine figures of the model utility."""

TOFU_COLUMNS = (
    *("tofu_forget_quality", "tofu_forget_quality_log10", "tofu_model_utility"),
    *("tofu_forget_probability", "tofu_forget_rouge", "tofu_forget_truth_ratio"),
    *UTILITY_COLUMNS,
)
"""Every name that `tofu_metrics` can give."""
