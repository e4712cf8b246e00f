"""result.md of command=evaluate: what was measured, on how many questions, how sure it is, and some replies."""

from __future__ import annotations

from chattrain.tracking.chatcore import CHANCE, NAME, centred
from chattrain.tracking.metrics import is_detail
from chattrain.tracking.sweep_table import markdown
from chattrain.tracking.table_evaluations import PARTS, label, questions_of

REPLIES = 5  # of a suite, that are shown


def result_page(result: dict, answers: list[dict]) -> str:
    """The Markdown text. `answers`: the lines of answers.jsonl."""
    metrics, measured = result["metrics"], result.get("validation")
    parts = [f"# {label(result)}\n", f"Checkpoint `{result['checkpoint']}`, {PARTS[result['part']]}.\n"]
    if measured:
        parts.append(f"Validation: {measured['label']}.\n")
    rows = [_row(name, result) for name in metrics if not is_detail(name)]
    parts.append(markdown(["measure", "value", "standard error", "questions", "replies that end"], rows))
    if NAME in metrics:
        parts.append(_chatcore(metrics))
    for name, subjects in result.get("subjects", {}).items():
        table = [[subject, f"{of['acc']:.1%}", f"{of['stderr']:.1%}", f"{of['n']:,}"] for subject, of in subjects.items()]
        parts += [f"## {name} by subject\n", markdown(["subject", "accuracy", "standard error", "questions"], table)]
    for name in dict.fromkeys(answer["set"] for answer in answers if "reply" in answer):
        parts.append(_replies(name, [answer for answer in answers if answer["set"] == name]))
    return "\n".join(parts)


def _row(name: str, result: dict) -> list[str]:
    metrics, stem = result["metrics"], name.removesuffix("_acc")
    if stem == name:
        return [name, f"{metrics[name]:.4f}", "", "", ""]
    ended = metrics.get(f"{stem}_ended")
    shown = [f"{metrics[name]:.1%}", f"{metrics[f'{stem}_stderr']:.1%}", questions_of(name, result)]
    return [name, *shown, "" if ended is None else f"{ended:.1%}"]


def _chatcore(metrics: dict[str, float]) -> str:
    rows = [
        [part, f"{(accuracy := metrics[f'eval/{part}_acc']):.1%}", f"{chance:.0%}", f"{centred(accuracy, chance):.4f}"]
        for part, chance in CHANCE.items()
    ]
    table = markdown(["part", "accuracy", "chance", "centred"], [*rows, ["**mean**", "", "", f"{metrics[NAME]:.4f}"]])
    return f"## ChatCORE\n\nThe mean of (accuracy - chance) / (1 - chance), as in nanochat.\n\n{table}"


def _replies(name: str, answers: list[dict]) -> str:
    shown = [
        f"{number}. {'right' if answer['right'] else 'wrong'}{'' if answer['ended'] else ', cut off'}\n\n"
        f"{_block(answer['question'])}\n\n{_block(answer['reply'])}\n"
        for number, answer in enumerate(answers[:REPLIES], start=1)
    ]
    return f"## {name}: the first replies\n\n" + "\n".join(shown)


def _block(text: str) -> str:
    """Text as it is, in Markdown: lines that begin with four blanks."""
    return "\n".join(f"        {line}" for line in text.splitlines() or [""])
