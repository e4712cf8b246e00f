"""What a user tests of their own parts: that each keeps its contract."""

from functools import partial

from mychat.collator import ShortFirst
from mychat.model import swiglu
from mychat.optimizer import lion
from mychat.schedule import stairs
from mychat.source import switches

from chattrain.parts import check_collator, check_model, check_optimizer, check_schedule, check_source


def test_the_parts_keep_their_contracts():
    check_source(switches)
    check_source(switches, split="test")
    check_schedule(stairs)
    check_optimizer(lion)
    check_collator(ShortFirst)
    check_model(partial(swiglu, n_layer=2, n_embd=32, n_head=2))
