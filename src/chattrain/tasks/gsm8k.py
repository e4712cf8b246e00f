"""Grade-school mathematics with calculator calls: openai/gsm8k (https://arxiv.org/abs/2110.14168)."""

import re

_CALL = re.compile(r"<<([^>]+)>>")
_MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def conversation(record: dict) -> dict:
    """A conversation in which `<<12/60=0.2>>` in the answer becomes a Python call `12/60` and its output `0.2`.

    >>> conversation({"question": "Q?", "answer": "It is <<1+1=2>>2.\\n#### 2"})["messages"][1]["content"]
    [{'type': 'text', 'text': 'It is '}, {'type': 'python', 'text': '1+1'}, {'type': 'python_output', 'text': '2'}, \
{'type': 'text', 'text': '2.\\n#### 2'}]
    """
    parts = []
    for i, text in enumerate(_CALL.split(record["answer"])):
        if i % 2 == 0:
            if text:
                parts.append({"type": "text", "text": text})
        else:
            expression, _, result = text.rpartition("=") if "=" in text else (text, "", "")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    return {"messages": [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": parts}]}


def marked_answer(text: str) -> str | None:
    """The number behind the first `####`, without commas: what nanochat and the authors of GSM8K compare. None: there is none.

    >>> marked_answer("So 2 x 600 = 1,200.\\n#### 1,200"), marked_answer("It is 1,200.")
    ('1200', None)
    """
    found = _MARKED.search(text)
    return found.group(1).replace(",", "") if found else None


def last_number(text: str) -> str | None:
    """The last number of a text, as the LM Evaluation Harness compares it (gsm8k, filter flexible-extract): without commas,
    dollar signs and a full stop at the end. None: there is none.

    >>> last_number("6 x $200 = $1,200."), last_number("#### 18"), last_number("None.")
    ('1200', '18', None)
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = next(part for part in found[-1] if part).strip()
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))
