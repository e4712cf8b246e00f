"""The words that keys accept, as enums: Hydra checks them by name.

The values repeat the names. If they were numbers, OmegaConf would accept `key=1` as the first member.
"""

from __future__ import annotations

from enum import Enum

# By a call, since `import` is a Python keyword and cannot be a name in a class body.
Command = Enum(
    "Command",
    {
        "train": "train",
        "evaluate": "evaluate",
        "chat": "chat",
        "serve": "serve",
        "inspect": "inspect",
        "plan": "plan",
        "verify_resume": "verify_resume",
        "reproduce": "reproduce",
        "lineage": "lineage",
        "report": "report",
        "import": "import",
        "export": "export",
        "sync": "sync",
    },
)
# Commands that read a run.
READING = (
    Command.chat,
    Command.evaluate,
    Command.export,
    Command.lineage,
    Command.report,
    Command.reproduce,
    Command.serve,
    Command.sync,
)


class Format(Enum):
    hf = "hf"
    mlflow = "mlflow"


class Direction(Enum):
    auto = "auto"
    minimize = "minimize"
    maximize = "maximize"


class Resume(Enum):
    auto = "auto"
    never = "never"
    must = "must"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


class Pick(Enum):
    last = "last"
    best = "best"


class DType(Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Compile(Enum):
    auto = "auto"
    true = True  # YAML and Hydra read the words as booleans, so those are the values
    false = False


class Device(Enum):
    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


class Strategy(Enum):
    ddp = "ddp"
    fsdp = "fsdp"


class ActivationCheckpointing(Enum):
    none = "none"
    block = "block"
    selective = "selective"


class Supervise(Enum):
    auto = "auto"
    all = "all"
    assistant = "assistant"
    last_assistant = "last_assistant"


class WeightBy(Enum):
    documents = "documents"
    tokens = "tokens"


class Schema(Enum):
    auto = "auto"  # told by the columns
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    multiple_choice = "multiple_choice"
    gsm8k = "gsm8k"
    humaneval = "humaneval"
    text = "text"


class Part(Enum):
    val = "val"
    test = "test"


class Audit(Enum):
    warn = "warn"
    refuse = "refuse"


class OnMalformed(Enum):
    refuse = "refuse"
    skip = "skip"


class StateDType(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


# By a call, since a number cannot be a name in a class body. `plan.device=4090` arrives as a number, so that is its value.
PlanDevice = Enum("PlanDevice", {"h100": "h100", "h200": "h200", "a100": "a100", "4090": 4090, "3090": 3090, "custom": "custom"})
