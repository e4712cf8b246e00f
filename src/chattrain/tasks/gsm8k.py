"""Grade-school mathematics with calculator calls: openai/gsm8k (https://arxiv.org/abs/2110.14168)."""

import re

_CALL = re.compile(r"<<([^>]+)>>")


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
