"""Turn the records of a data set into documents: one small file for each schema and each generated task."""

from __future__ import annotations

from chattrain.chat.format import ChatFormat, Malformed, Segment
from chattrain.chat.native import to_segments
from chattrain.tasks import gsm8k, messages, multiple_choice, text

COLUMNS = {
    "messages": "messages",
    "multiple_choice": "question, choices, answer (or answerKey)",
    "gsm8k": "question, answer",
    "text": "text",
}
_TO_DOCUMENT = {  # schema -> function from a record to a conversation or text
    "messages": messages.conversation,
    "multiple_choice": multiple_choice.conversation,
    "gsm8k": gsm8k.conversation,
    "text": text.text,
}


def record_to_segments(record: dict, schema: str, chat_format: ChatFormat | None = None) -> list[Segment]:
    """The segments of one record in a chat format. None: chattrain's own format, which needs no tokenizer for this.

    Raises Malformed with the reason if the record does not fit the schema.
    """
    try:
        document = _TO_DOCUMENT[schema](record)
        return to_segments(document) if chat_format is None else chat_format.to_segments(document)
    except Malformed:
        raise
    except KeyError as error:
        raise Malformed(f"no column {error} (it has {', '.join(record)}); schema {schema} needs {COLUMNS[schema]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"does not fit schema {schema} ({COLUMNS[schema]}): {error}") from None
