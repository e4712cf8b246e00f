"""The check of sources."""

from __future__ import annotations

import json
from typing import Any

from chattrain.chat import Malformed
from chattrain.parts.contracts import Source, require
from chattrain.tasks import record_to_segments
from chattrain.tasks.schemas import SCHEMAS, no_schema, told_by

SAMPLE = 1000  # records that are rendered


def check_source(source: Source, split: str = "train", schema: str = "auto") -> None:
    """Raises ContractBroken unless the source gives the same records of this schema at every call. auto: that which the columns
    of the first record tell."""
    records = list(source(split))
    require(bool(records), f"there is no record for split={split!r}")
    for i, record in enumerate(records):
        require(isinstance(record, dict), f"record {i} is a {type(record).__name__}, not a dict")
    _require_json(records)
    told = told_by(records[0]) if schema == "auto" else schema
    require(told in SCHEMAS, no_schema(records[0]))
    for i, record in enumerate(records[:SAMPLE]):
        try:
            record_to_segments(record, str(told))
        except Malformed as error:
            require(False, f"record {i} is none of schema {told}: {error}")
    require(list(source(split)) == records, "the records are others when asked again: seed what is random")


def _require_json(records: list[dict[str, Any]]) -> None:
    for i, record in enumerate(records):
        try:
            same = json.loads(json.dumps(record)) == record
        except (TypeError, ValueError) as error:
            require(False, f"record {i} cannot be written as JSON: {error}")
        else:
            require(same, f"record {i} is another one once it was written as JSON and read, as where a key is no text")
