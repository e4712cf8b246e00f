"""What the help cannot read from the schema: examples, and the keys that each command reads."""

from __future__ import annotations

from dataclasses import dataclass, field

Example = tuple[str, str]  # what is typed after `python -m chattrain`, and what it does

EXAMPLES: tuple[Example, ...] = (
    ("-m stage=base,mid,sft experiment=quickstart", "from nothing to a chat model on generated data: minutes on a laptop"),
    ("command=chat stage=sft", "talk to the newest one"),
    ("stage=sft data=local data.train_path=talk.jsonl", "train on your own conversations"),
    ("-m stage=sft optimizer.lr_scale=1,3,6,10,20,30", "a sweep: a run for each value, then which is best"),
    ("stage=sft model=hf init.from=./Qwen3-0.6B data=local data.train_path=talk.jsonl", "start from a Hugging Face model"),
)

WHICH_RUN = ("run.name", "run.dir", "init.from")


@dataclass(frozen=True)
class Page:
    """What the page of a command lists: keys one by one, sections and groups by name alone, and examples."""

    keys: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    examples: tuple[Example, ...] = field(default=())


COMMANDS = {
    "train": Page(
        whole=(
            *("stage", "model", "data", "collator", "loss", "optimizer", "schedule", "eval", "tracking", "experiment"),
            *("run", "init", "train", "tokenizer", "checkpoint", "log", "distributed", "sweep"),
        ),
        examples=(
            ("stage=mid", "from your newest finished base run"),
            ("stage=sft optimizer=adamw train.max_steps=200 run.name=short", "another optimizer, 200 steps, into runs/sft/short"),
        ),
    ),
    "evaluate": Page(
        keys=(*WHICH_RUN, "init.pick", "runs"),
        whole=("eval", "data"),
        examples=(
            ("command=evaluate run.name=farm stage=sft", "runs/sft/farm, with its own data and settings"),
            ('command=evaluate "runs=[sft/farm,sft/field]"', "is the difference of two runs more than noise?"),
            ("command=evaluate init.from=sft/farm eval=full", "on all suites whose data is known"),
        ),
    ),
    "chat": Page(
        keys=(*WHICH_RUN, "init.pick"),
        examples=(
            ("command=chat stage=sft", "talk to the newest sft run"),
            (
                "command=chat init.from=sft/farm chat.temperature=0.7 \"chat.prompt=['Hi','Who are you?']\"",
                "two prompts, sampled",
            ),
        ),
    ),
    "serve": Page(
        keys=(*WHICH_RUN, "init.pick"),
        examples=(
            ("command=serve stage=sft", "the newest sft run at http://127.0.0.1:8000, with a page to chat"),
            (
                "command=serve init.from=sft/farm serve.host=0.0.0.0 'serve.api_key=${oc.env:SERVE_KEY}'",
                "for other machines, with the key in $SERVE_KEY",
            ),
        ),
    ),
    "inspect": Page(
        whole=("stage", "data", "collator", "loss"),
        examples=(
            ("command=inspect stage=sft", "the first rows of the first step, the mixture, and what the audit finds"),
            ("command=inspect stage=mid inspect.step=3 inspect.source=spelling", "rows of step 3 that hold a source"),
        ),
    ),
    "plan": Page(
        whole=("stage", "model", "data", "train", "distributed"),
        examples=(
            ("command=plan stage=mid model=d20 plan.world_size=8", "the demo's data on 8 H100"),
            (
                "command=plan stage=sft data=local data.train_path=talk.jsonl plan.price_per_gpu_hour=2.5",
                "your data, and its price",
            ),
        ),
    ),
    "verify_resume": Page(
        examples=(
            ("command=verify_resume stage=sft", "20 steps twice, once killed and resumed"),
            ("command=verify_resume stage=mid verify.steps=40", "the same over 40 steps"),
        ),
    ),
    "reproduce": Page(
        keys=(*WHICH_RUN, "init.pick", "distributed.nproc", "train.device"),
        examples=(
            ("command=reproduce init.from=sft/farm", "train it again and compare"),
            ("command=reproduce init.from=sft/farm data.train_path=/new/place/talk.jsonl", "where the data has moved"),
        ),
    ),
    "lineage": Page(
        keys=WHICH_RUN,
        examples=(
            ("command=lineage stage=sft", "of the newest sft run"),
            ("command=lineage init.from=sft/farm", "of a run that is named"),
        ),
    ),
    "report": Page(
        keys=(*WHICH_RUN, "runs", "sweep.name"),
        examples=(
            ('command=report "runs=[sft/a,sft/b]"', "runs over each other, what differs first"),
            ("command=report sweep.name=rates", "the table and the answer of a sweep"),
        ),
    ),
    "import": Page(
        keys=("stage", "init.from", "tokenizer.path", "run.name"),
        examples=(
            ("command=import stage=base init.from=nanochat/base_checkpoints/d20", "a checkpoint of nanochat"),
            ("command=import stage=sft init.from=./exported run.name=farm", "a folder of its architecture, into runs/sft/farm"),
        ),
    ),
    "export": Page(
        keys=("format", *WHICH_RUN, "init.pick"),
        examples=(
            ("command=export format=hf stage=sft", "a folder for transformers"),
            ("command=export format=mlflow init.from=sft/farm export.dir=served", "a folder for mlflow models serve"),
        ),
    ),
    "sync": Page(
        keys=(*WHICH_RUN, "tracking.uri"),
        examples=(
            ("command=sync", "all runs and sweeps that lack something"),
            ("command=sync run.name=farm stage=sft", "one run"),
        ),
    ),
}
