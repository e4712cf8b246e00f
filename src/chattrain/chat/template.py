"""Conversations in the format of a model's own chat template, with a loss mask derived from the rendered text.

The template (Jinja, as in a Hugging Face tokenizer) decides what is rendered; finding.py finds the texts of the messages in it,
and marking.py what the model must generate itself: everything from the end of the generation prompt of an assistant's message up
to its end-of-turn token, which is included.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np

from chattrain.chat import marking
from chattrain.chat.finding import ANSWER, QUESTION, Finder
from chattrain.chat.format import DROPPED_THOUGHTS, ChatFormat, Encoded, Kind, Malformed, Segment, is_text
from chattrain.chat.jinja import render_template
from chattrain.chat.messages import conversation
from chattrain.errors import UserError
from chattrain.tokenizer.huggingface import HFTokenizer
from chattrain.tokenizer.unicode import well_formed

log = logging.getLogger("chattrain")


class ChatTemplate(ChatFormat):
    """Renders conversations with the chat template of one tokenizer.

    The constructor raises UserError for a template without an end-of-turn token: a model trained with it would never stop.
    """

    version = 1

    def __init__(self, tokenizer: HFTokenizer):
        self.tokenizer = tokenizer
        self.finder = Finder(tokenizer)
        self.ends: marking.Ends | None = None
        if tokenizer.chat_template is not None:
            self._probe()

    def _probe(self) -> None:
        """Render a question and an answer to find the end-of-turn token and the text that opens an assistant turn."""
        try:
            question, whole = (render_template(self.tokenizer, messages) for messages in ([QUESTION], [QUESTION, ANSWER]))
            prompt = render_template(self.tokenizer, [QUESTION], add_generation_prompt=True)
        except Malformed as error:
            raise UserError(f"the chat template of {self.tokenizer.source} refuses a question and its answer: {error}") from error
        generation_prompt = prompt.removeprefix(question) if prompt.startswith(question) else ""
        answer_at = whole.rfind("answer")
        # Text of the template between the generation prompt and the answer: the model must generate it.
        reply_prefix = whole[len(prompt) : answer_at] if whole.startswith(prompt) else ""
        tail = whole[answer_at + len("answer") :] if answer_at >= 0 else ""
        first_special = sorted((tail.index(token), -len(token), token) for token in self.tokenizer.special_texts if token in tail)
        if not first_special:
            raise UserError(
                f"the chat template of {self.tokenizer.source} ends an assistant turn without a special token: a "
                f"model trained on it would never stop. It renders {whole!r}"
            )
        end_of_turn = first_special[0][2]
        others = [text for text in self.tokenizer.eos_texts if text != end_of_turn]
        before = {"user": prompt.rpartition("question")[2]} if whole.startswith(prompt) else {}
        self.ends = marking.Ends(generation_prompt, before, reply_prefix, (end_of_turn, *others))
        if not whole.startswith(prompt):
            log.warning(
                "the chat template of %s prompts for a reply with %r, but renders a reply that was given as %r: what is "
                "trained on is not what the model will be prompted with",
                self.tokenizer.source,
                prompt[len(question) :],
                whole[len(question) :],
            )

    @property
    def stop_ids(self) -> set[int]:
        """The tokens of end of turn and end of text, and those of generation_config.json."""
        ends = {self.tokenizer.special(self.ends.stops[0])} if self.ends is not None else set()
        return ends | self.tokenizer.eos_ids

    def to_segments(self, document: dict[str, Any], left_out: Counter[str] | None = None) -> list[Segment]:
        """The segments of a conversation or of a text `{"text": ...}`. Raises Malformed that names the message."""
        if is_text(document):
            return self._text(well_formed(document["text"]))
        talk = conversation(document)
        found = self.finder.find(talk)
        if left_out is not None and found.dropped_thoughts:
            left_out[DROPPED_THOUGHTS] += found.dropped_thoughts
        assert self.ends is not None  # rendering refuses tokenizers without a template
        ends = self.ends
        if any(message.role == "tool" for message in talk.messages):
            prompt = self.finder.prompt_after_tool()
            ends = ends if prompt is None else ends._replace(before_reply={**ends.before_reply, "tool": prompt})
        blocks = marking.find_blocks(found.whole, talk.messages, found.pieces, found.spans, ends)
        return marking.to_segments(found.whole, talk.messages, found.pieces, found.spans, blocks)

    def prompt(self, asked: dict[str, Any]) -> list[int]:
        talk = conversation(asked)
        found = self.finder.find(talk)
        rendered = render_template(self.tokenizer, found.messages, talk.tools, True, found.keep_null)
        return self.tokenizer.encode_rendered([rendered])[0][0]

    def encode(self, documents: list[list[Segment]]) -> list[Encoded]:
        """The tokens of each document. A token is the assistant's if all of its characters are: the model never has to generate a
        token that begins in the context. It is off if one of its characters is, and belongs to the turn that it begins in."""
        rendered = []
        encoded = self.tokenizer.encode_rendered(["".join(segment.text for segment in document) for document in documents])
        for document, (ids, offsets) in zip(documents, encoded, strict=True):
            sizes = [len(segment.text) for segment in document]
            kinds = np.repeat([int(segment.kind) for segment in document], sizes)
            turns = np.repeat([segment.turn for segment in document], sizes)
            begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            replies = _count(kinds & Kind.ASSISTANT > 0, begin, end)
            is_reply, is_off = (end > begin) & (replies == end - begin), _count(kinds & Kind.OFF > 0, begin, end) > 0
            of_tokens = is_reply * int(Kind.ASSISTANT) + is_off * int(Kind.OFF)
            rendered.append(Encoded(ids, of_tokens.tolist(), turns[begin.clip(max=len(turns) - 1)].tolist()))
        return rendered

    def choices(self, asked: dict[str, Any], replies: list[str]) -> tuple[list[int], list[int]]:
        answered = [{**asked, "messages": [*asked["messages"], {"role": "assistant", "content": reply}]} for reply in replies]
        rendered = [encoded.ids for encoded in self.encode([self.to_segments(document) for document in answered])]
        at = next((i for i, tokens in enumerate(zip(*rendered, strict=False)) if len(set(tokens)) > 1), 0)
        tokens = [ids[at] for ids in rendered]
        if len(set(tokens)) != len(replies) or any(ids[at + 1 :] != rendered[0][at + 1 :] for ids in rendered):
            raise Malformed(f"each of {replies} must be one token of the tokenizer")
        return rendered[0][:at], tokens

    def _text(self, text: str) -> list[Segment]:
        """A plain text after BOS or, if the tokenizer has no BOS, before the end-of-text token."""
        self.finder.refuse_special_tokens("the text", text)
        bos, eos = self.tokenizer.bos_text, self.tokenizer.eos_text
        if bos is not None:
            return [Segment(bos, True, Kind.PROMPT), Segment(text, False, Kind.ASSISTANT)]
        return [Segment(text, False, Kind.ASSISTANT), *([Segment(eos, True, Kind.ASSISTANT)] if eos is not None else [])]


def _count(marked: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(tokens,): how many of the characters begin to end of each token are marked; `marked`: (characters,) bool."""
    before = np.concatenate([[0], np.cumsum(marked)])
    return before[end] - before[begin]
