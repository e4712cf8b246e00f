"""ChatCORE, nanochat's one number for a chat model (chat_eval.py of December 2025), and accuracies by subject.

Each accuracy is centred on chance, (accuracy - chance) / (1 - chance), so that guessing gives 0 and perfection 1; ChatCORE is
their mean. It is given only where all its parts were measured: a mean of other parts is no ChatCORE.
"""

from __future__ import annotations

import math

CHANCE = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0, "spelling": 0.0}
NAME = "eval/chatcore"


def centred(accuracy: float, chance: float) -> float:
    """
    >>> centred(0.25, 0.25), centred(1.0, 0.25), centred(0.4, 0.0)
    (0.0, 1.0, 0.4)
    """
    return (accuracy - chance) / (1 - chance)


def chatcore(metrics: dict[str, float]) -> dict[str, float]:
    """{"eval/chatcore": its value}; {} where a part of it is not among the metrics.

    >>> accuracies = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.625, "gsm8k": 0.1, "humaneval": 0.0, "spelling": 0.4}
    >>> metrics = {f"eval/{name}_acc": accuracy for name, accuracy in accuracies.items()}
    >>> round(chatcore(metrics)["eval/chatcore"], 4), chatcore({"eval/mmlu_acc": 0.5})
    (0.1667, {})
    """
    accuracies = {name: metrics.get(f"eval/{name}_acc") for name in CHANCE}
    known = {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}
    if len(known) < len(CHANCE):
        return {}
    return {NAME: math.fsum(centred(accuracy, CHANCE[name]) for name, accuracy in known.items()) / len(CHANCE)}


def by_subject(answers: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy, standard error and number of questions of each subject of each set that has several: set -> subject -> acc,
    stderr, n.

    >>> answers = [{"set": "mmlu", "subject": s, "answer": 0, "choice": c} for s, c in (("law", 0), ("law", 1), ("art", 0))]
    >>> by_subject(answers)["mmlu"]["law"], list(by_subject(answers[:2]))
    ({'acc': 0.5, 'stderr': 0.3535533905932738, 'n': 2}, [])
    """
    right: dict[str, dict[str, list[bool]]] = {}
    for answer in answers:
        if answer.get("subject"):
            right.setdefault(answer["set"], {}).setdefault(answer["subject"], []).append(answer["choice"] == answer["answer"])
    return {
        name: {subject: _accuracy(judged) for subject, judged in sorted(subjects.items())}
        for name, subjects in right.items()
        if len(subjects) > 1
    }


def _accuracy(judged: list[bool]) -> dict[str, float]:
    n, accuracy = len(judged), sum(judged) / len(judged)
    return {"acc": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / n), "n": n}
