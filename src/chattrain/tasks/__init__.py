"""Turn the records of a data set into documents: one small file for each schema and each generated task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chattrain.chat.fields import without_fields
from chattrain.chat.format import ChatFormat, Malformed, Segment
from chattrain.chat.native import to_segments
from chattrain.tasks.columns import check_characters, with_lists
from chattrain.tasks.schemas import SCHEMAS


def record_to_document(record: dict, schema: str) -> dict:
    """A record as a conversation `{"messages": [...]}`, perhaps with `tools`, or a text `{"text": ...}`.

    Raises Malformed with the reason if the record does not fit the schema.
    """
    try:
        document = SCHEMAS[schema].document(with_lists(record))
        check_characters(document)
    except Malformed:
        raise
    except KeyError as error:
        raise Malformed(
            f"no column {error} (it has {', '.join(record) or 'none'}); schema {schema} needs {SCHEMAS[schema]}"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"does not fit schema {schema} ({SCHEMAS[schema]}): {error}") from None
    except RecursionError:
        raise Malformed("its values are nested too deep") from None
    return document


def record_to_segments(
    record: dict,
    schema: str,
    chat_format: ChatFormat | None = None,
    ignore: Sequence[str] = (),
    left_out: Counter[str] | None = None,
) -> list[Segment]:
    """The segments of one record in a chat format. None: chattrain's own format, which needs no tokenizer for this.

    `ignore`: fields of messages, or `tools`, to leave out. These, and what the chat format leaves out by design, are counted in
    `left_out`. Raises Malformed with the reason if the record does not fit the schema.
    """
    document = record_to_document(record, schema)
    try:
        counts = Counter() if left_out is None else left_out
        document = without_fields(document, ignore, counts)
        return to_segments(document) if chat_format is None else chat_format.to_segments(document, counts)
    except (TypeError, ValueError, AttributeError) as error:
        raise error if isinstance(error, Malformed) else Malformed(f"does not fit schema {schema}: {error}") from None
    except RecursionError:
        raise Malformed("its values are nested too deep") from None
