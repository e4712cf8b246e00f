"""What the docs tell users to type, and a laptop can do, is done, on tiny settings."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

import chattrain
from chattrain.config.compose import key_of
from chattrain.config.quoting import as_overrides
from tests.documented import PAGES, ROOT, blocks, typed_in, write_files
from tests.helpers import TINY, command_line, standing_in, train, write_talk

MEASURED = {
    "eval.max_problems": "eval.max_problems=4",
    "eval.max_reply_tokens": "eval.max_reply_tokens=8",
    "eval.max_tokens": "eval.max_tokens=512",
    "tracking": "tracking=none",
}
# Settings that make a training take a second; what a page types itself is kept, but for the length of the run.
SMALL = {o.partition("=")[0]: o for o in TINY if not o.startswith(("data", "eval", "tracking"))} | {
    **MEASURED,
    "train.max_steps": "train.max_steps=2",
    "eval.prompts": "eval.prompts=[]",
    "init.strict": "init.strict=false",
}
LENGTH = ("train.max_steps", "train.num_epochs", "train.max_tokens", "train.rows_per_step", "train.device_batch_size")


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """A folder as a user of the docs has it: conversations, own choices, and runs under the names that pages use."""
    folder = tmp_path_factory.mktemp("place")
    with standing_in(folder, cache):
        for name in ("talk.jsonl", "held_out.jsonl", "other.jsonl"):
            write_talk(folder, name, factor=len(name))
        (folder / "my_conf").mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        for stage, name in [("base", "farm"), ("mid", "farm"), ("sft", "farm"), ("sft", "field")]:
            train(stage, name, "train.max_steps=2")
        yield folder


@pytest.fixture
def own_place(place, tmp_path, cache):
    """A copy of it for one page."""
    folder = shutil.copytree(place, tmp_path / "place", symlinks=True)
    with standing_in(folder, cache), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield folder


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.runs for b in blocks(p, "bash", "sh", "python"))], ids=lambda p: p.stem
)
def test_what_a_page_says_can_be_done_is_done(page, own_place, capsys):
    write_files(page, own_place)
    names: dict = {}
    for block in blocks(page, "bash", "sh", "python"):
        if block.runs and block.language == "python":
            with small_by_default():
                exec(compile(block.text, str(page), "exec"), names)
        for arguments in typed_in(block.text) if block.runs and block.language != "python" else []:
            done = command_line(capsys, *small(arguments))
            assert done.status == 0, f"{arguments}\n{done.err}"


def small(arguments: list[str]) -> list[str]:
    """The command line with settings with which it takes a second."""
    given = {key_of(argument) for argument in arguments}
    command = next((a.partition("=")[2] for a in arguments if a.startswith("command=")), "train")
    if {"--help", "--cfg", "-sc"} & set(arguments):
        return arguments
    if command == "chat":
        more = ["chat.max_tokens=4", *([] if "chat.prompt" in given else ["chat.prompt=Hi"])]
    elif command == "evaluate":
        more = [o for key, o in MEASURED.items() if key not in given]
    elif command in ("train", "inspect", "plan", "verify_resume"):
        kept = [a for a in arguments if key_of(a) not in LENGTH]
        return [*kept, *(o for key, o in SMALL.items() if key not in {key_of(a) for a in kept})]
    else:
        more = []
    return [*arguments, *more]


@contextmanager
def small_by_default():
    """chattrain.run in a page of Python, with the same settings."""
    run = chattrain.run

    def run_small(overrides):
        return run(small(as_overrides(overrides) if isinstance(overrides, dict) else overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chattrain, "run", run_small)
        yield
