"""What a model folder says about how it was made: `record.json`, in JSON that every reader takes. Torch-free."""

from __future__ import annotations

from hamu.storage.plain_json import json_text, plain

__all__ = ["RECORD_NAME", "json_text", "plain"]

RECORD_NAME = "record.json"
