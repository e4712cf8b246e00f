"""Python functions to complete, with tests: openai/openai_humaneval (https://arxiv.org/abs/2107.03374).

A reply is judged as in nanochat: its first block of code, or all of it, behind the imports of the prompt.
"""

from __future__ import annotations

import re

from chattrain.tasks.columns import text_of

_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def conversation(record: dict) -> dict:
    """A user turn with the beginning of the function, and an assistant turn with all of it.

    >>> record = {"prompt": "def one():\\n", "canonical_solution": "    return 1\\n", "test": "", "entry_point": "one"}
    >>> [message["content"] for message in conversation(record)["messages"]]
    ['def one():\\n', 'def one():\\n    return 1\\n']
    """
    prompt = text_of(record, "prompt")
    solution = prompt + record["canonical_solution"]
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": solution}]}


def program(record: dict, reply: str) -> str:
    """The program that ends without an error where the reply is right: its code, the tests, and the call of the tests.

    >>> record = {"prompt": "import math\\ndef one():\\n", "test": "def check(f): assert f() == 1", "entry_point": "one"}
    >>> print(program(record, "Sure:\\n```python\\ndef one(): return 1\\n```"))
    import math
    <BLANKLINE>
    def one(): return 1
    <BLANKLINE>
    def check(f): assert f() == 1
    check(one)
    """
    return f"{imports(record['prompt'])}\n\n{code(reply)}\n\n{record['test']}\ncheck({record['entry_point']})"


def code(reply: str) -> str:
    """The first block of code of a reply; all of it where there is none."""
    block = _BLOCK.search(reply)
    return (block.group(1) if block else reply).strip()


def imports(prompt: str) -> str:
    """The import statements at the beginning of a prompt."""
    found = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            found.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(found)
