"""Rows of a data set become documents to train on: one small file a schema or generated task."""


from chattrain.chat import Malformed, Piece, lay_out
from chattrain.tasks import gsm8k, messages, multiple_choice, text
from chattrain.tokenizer import Tokenizer

COLUMNS = {"messages": "messages", "multiple_choice": "question, choices, answer (or answerKey)",
           "gsm8k": "question, answer", "text": "text"}
_DOCUMENTS = {"messages": messages.conversation, "multiple_choice": multiple_choice.conversation,
              "gsm8k": gsm8k.conversation, "text": text.text}


def document(row: dict, schema: str, tokenizer: Tokenizer | None = None) -> list[Piece]:
    """The pieces of one row, laid out for the tokenizer (None: nanochat's format).

    Raises Malformed (with the reason) where the row does not fit the schema.
    """
    try:
        return lay_out(_DOCUMENTS[schema](row), tokenizer)
    except Malformed:
        raise
    except KeyError as error:
        raise Malformed(f"no column {error} (it has {', '.join(row)}); schema {schema} needs {COLUMNS[schema]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"does not fit schema {schema} ({COLUMNS[schema]}): {error}") from None
