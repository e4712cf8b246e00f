"""The words that keys take, as enums that Hydra checks."""

from __future__ import annotations

from enum import Enum


def words(name: str, *members: str) -> type[Enum]:
    """An enum whose members have their names for values.

    Were the values numbers, OmegaConf would take `key=1` for the first member.
    """
    return Enum(name, {member: member for member in members}, module=__name__)


Command = words("Command", "train", "evaluate", "chat", "inspect", "plan", "report", "import", "export")
Format = words("Format", "hf")
Resume = words("Resume", "auto", "never", "must")
DType = words("DType", "auto", "bf16", "fp32")
Device = words("Device", "auto", "cuda", "mps", "cpu")
Strategy = words("Strategy", "ddp", "fsdp")
ActivationCheckpointing = words("ActivationCheckpointing", "none", "block", "selective")
Schema = words("Schema", "messages", "multiple_choice", "gsm8k", "text")
OnMalformed = words("OnMalformed", "refuse", "skip")
StateDType = words("StateDType", "fp32", "bf16")
# `plan.device=4090` arrives as a number.
PlanDevice = Enum("PlanDevice", {"h100": "h100", "h200": "h200", "a100": "a100", "4090": 4090, "3090": 3090, "custom": "custom"})
