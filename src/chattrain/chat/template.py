"""Conversations in the format of a model's own chat template, with a loss mask derived from the rendered text.

The template (Jinja, as in a Hugging Face tokenizer) is rendered twice: with the conversation, and with a placeholder for each
message's text. The second rendering shows which text comes from the template and which from a message. Filling the texts into it
must give the first rendering, or the conversation is refused. Supervised are the tokens that the model must generate itself:
everything from the end of the generation prompt of an assistant turn up to its end-of-turn token, which is included.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import numpy as np

from chattrain.chat.format import ChatFormat, Encoded, Kind, Malformed, Segment, check_turns, is_text, messages_of
from chattrain.errors import UserError
from chattrain.tokenizer.huggingface import HFTokenizer

log = logging.getLogger("chattrain")

PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
PLACEHOLDER = "\ue000{}\ue001"  # private-use characters of Unicode, which no template treats specially


class ChatTemplate(ChatFormat):
    """Renders conversations with the chat template of one tokenizer.

    The constructor raises UserError for a template without an end-of-turn token: a model trained with it would never stop.
    """

    version = 1

    def __init__(self, tokenizer: HFTokenizer):
        self.tokenizer = tokenizer
        self.end_of_turn: str | None = None
        if tokenizer.chat_template is not None:
            self._probe()

    def _probe(self) -> None:
        """Render a question and an answer to find the end-of-turn token and the text that opens an assistant turn."""
        try:
            question, whole = self._render(PROBE[:1]), self._render(PROBE)
            prompt = self._render(PROBE[:1], add_generation_prompt=True)
        except Malformed as error:
            raise UserError(f"the chat template of {self.tokenizer.source} refuses a question and its answer: {error}") from error
        self.generation_prompt = prompt.removeprefix(question) if prompt.startswith(question) else ""
        answer_at = whole.rfind("answer")
        # Text of the template between the generation prompt and the answer: the model must generate it.
        self.reply_prefix = whole[len(prompt) : answer_at] if whole.startswith(prompt) else ""
        tail = whole[answer_at + len("answer") :] if answer_at >= 0 else ""
        first_special = sorted((tail.index(token), -len(token), token) for token in self.tokenizer.special_texts if token in tail)
        if not first_special:
            raise UserError(
                f"the chat template of {self.tokenizer.source} ends an assistant turn without a special token: a "
                f"model trained on it would never stop. It renders {whole!r}"
            )
        self.end_of_turn = first_special[0][2]
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
        ends = {self.tokenizer.special(self.end_of_turn)} if self.end_of_turn is not None else set()
        return ends | self.tokenizer.eos_ids

    def to_segments(self, document: dict[str, Any]) -> list[Segment]:
        """The segments of a conversation or of a text `{"text": ...}`. Raises Malformed that names the message."""
        if is_text(document):
            return self._text(document["text"])
        messages = messages_of(document)
        first = int(messages[0]["role"] == "system")
        check_turns(messages[first:], first)
        parts = [_content_parts(message["content"], i) for i, message in enumerate(messages)]
        texts = ["".join(text for text, _ in message_parts) for message_parts in parts]
        self._refuse_special_tokens(texts)
        literals, starts, whole = self._locate_messages(messages, texts)
        kinds, turns = np.zeros(len(whole), dtype=np.uint8), np.zeros(len(whole), dtype=np.int64)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                self._mark_supervised(kinds, whole, literals, starts, i, parts[i], texts[i])
            elif i > first:
                turns[starts[i] - len(literals[i]) :] += 1
        return _to_segments(whole, kinds, turns)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        contents = ["".join(text for text, _ in _content_parts(m["content"], i)) for i, m in enumerate(messages)]
        self._refuse_special_tokens(contents)
        filled = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        return self.tokenizer.encode_rendered([self._render(filled, add_generation_prompt=True)])[0][0]

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

    def choices(self, messages: list[dict[str, Any]], replies: list[str]) -> tuple[list[int], list[int]]:
        rendered = [
            self.encode([self.to_segments({"messages": [*messages, {"role": "assistant", "content": reply}]})])[0].ids
            for reply in replies
        ]
        at = next((i for i, tokens in enumerate(zip(*rendered, strict=False)) if len(set(tokens)) > 1), 0)
        tokens = [ids[at] for ids in rendered]
        if len(set(tokens)) != len(replies) or any(ids[at + 1 :] != rendered[0][at + 1 :] for ids in rendered):
            raise Malformed(f"each of {replies} must be one token of the tokenizer")
        return rendered[0][:at], tokens

    def _text(self, text: str) -> list[Segment]:
        """A plain text after BOS or, if the tokenizer has no BOS, before the end-of-text token."""
        self._refuse_special_tokens([text])
        bos, eos = self.tokenizer.bos_text, self.tokenizer.eos_text
        if bos is not None:
            return [Segment(bos, True, Kind.PROMPT), Segment(text, False, Kind.ASSISTANT)]
        return [Segment(text, False, Kind.ASSISTANT), *([Segment(eos, True, Kind.ASSISTANT)] if eos is not None else [])]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.source} has no chat template, so conversations cannot be "
                "rendered; put a chat_template.jinja into that folder, or take the instruct model's"
            )
        try:
            return self.tokenizer.backend.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise Malformed(f"the chat template refuses it: {error}") from None

    def _refuse_special_tokens(self, texts: list[str]) -> None:
        """Raises Malformed for a message that contains the text of a special token: it would be encoded as that token."""
        for i, text in enumerate(texts):
            for token in self.tokenizer.special_texts:
                if token in text:
                    raise Malformed(f"message {i} holds the text {token!r}, which the tokenizer would take for the special token")

    def _locate_messages(self, messages: list[dict[str, Any]], texts: list[str]) -> tuple[list[str], list[int], str]:
        """(literals, starts, whole): the template's text before each message and after the last; the index in `whole` at which
        each message's text starts; the rendered conversation. Raises Malformed if the template changes or drops a text."""
        whole = self._render([{**m, "content": text} for m, text in zip(messages, texts, strict=True)])
        placeholders = [PLACEHOLDER.format(i) for i in range(len(messages))]
        skeleton = self._render([{**m, "content": placeholder} for m, placeholder in zip(messages, placeholders, strict=True)])
        literals = []
        for i, placeholder in enumerate(placeholders):
            literal, found, skeleton = skeleton.partition(placeholder)
            if not found:
                raise Malformed(f"the chat template leaves out message {i} ({messages[i]['role']}): {texts[i]!r:.200}")
            literals.append(literal)
        literals.append(skeleton)
        at, starts = 0, []
        for i, text in enumerate(texts):
            at += len(literals[i])
            as_rendered = next(
                (t for t in (text, text.strip(), text.rstrip(), text.lstrip()) if whole.startswith(t + literals[i + 1], at)), None
            )
            if as_rendered is not None and whole.startswith(literals[i], at - len(literals[i])):
                starts.append(at)
                at += len(as_rendered)
            else:
                raise Malformed(
                    f"the chat template changes message {i} ({messages[i]['role']}), so it cannot be located: {text!r:.200}"
                )
        if at + len(literals[-1]) != len(whole):
            raise Malformed(f"the chat template adds text after the last turn: {whole[at:]!r:.200}")
        return literals, starts, whole

    def _mark_supervised(
        self,
        kinds: np.ndarray,
        whole: str,
        literals: list[str],
        starts: list[int],
        i: int,
        parts: list[tuple[str, bool]],
        text: str,
    ) -> None:
        """Set `kinds` (characters of `whole`,) to ASSISTANT where the model must generate assistant message i.

        `parts`: the message as (text, supervised), which join to `text`. Raises Malformed if the turn has no end-of-turn token.
        """
        assert self.end_of_turn is not None  # `_render` refuses tokenizers without a template
        ends = literals[i + 1].find(self.end_of_turn)
        length = (starts[i + 1] if i + 1 < len(starts) else len(whole)) - len(literals[i + 1]) - starts[i]
        if ends < 0:
            raise Malformed(
                f"assistant turn {i} has no end-of-turn token {self.end_of_turn!r}: "
                f"{whole[starts[i] - len(literals[i]) : starts[i] + length + len(literals[i + 1])]!r}"
            )
        begins = starts[i] - len(literals[i]) + self._context_length(literals[i])
        kinds[begins : starts[i] + length + ends + len(self.end_of_turn)] = Kind.ASSISTANT
        stripped = text.find(whole[starts[i] : starts[i] + length])  # characters that the template removed at the start
        at = starts[i] - stripped
        for part, carries_loss in parts:
            if not carries_loss:
                kinds[max(at, starts[i]) : min(at + len(part), starts[i] + length)] = Kind.PROMPT
            at += len(part)

    def _context_length(self, literal: str) -> int:
        """How many characters of the template's text before a reply belong to the prompt. The model must generate the rest."""
        if self.generation_prompt and self.generation_prompt in literal:
            return literal.rindex(self.generation_prompt) + len(self.generation_prompt)
        return len(literal) - (len(self.reply_prefix) if literal.endswith(self.reply_prefix) else 0)


def _content_parts(content: Any, i: int) -> list[tuple[str, bool]]:
    """The content of message i as (text, supervised) parts. Python calls are written as in GSM8K: `<<12/60=0.2>>`."""
    if isinstance(content, str):
        return [(content, True)]
    if not isinstance(content, list) or not content:
        raise Malformed(f"message {i}: content must be a string or a list of parts")
    parts: list[tuple[str, bool]] = []
    for part, following in zip(content, [*content[1:], None], strict=True):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if not isinstance(text, str) or kind not in ("text", "python", "python_output"):
            raise Malformed(
                f"message {i}: a part must be {{'type': text, python or python_output, 'text': str}}, not {part!r:.80}"
            )
        if kind == "text":
            parts.append((text, True))
        elif kind == "python":
            answered = isinstance(following, dict) and following.get("type") == "python_output"
            parts.append((f"<<{text}=" if answered else f"<<{text}>>", True))
        else:
            parts += [(text, False), (">>", True)]
    return parts


def _to_segments(whole: str, kinds: np.ndarray, turns: np.ndarray) -> list[Segment]:
    """Split the text where its kind or its turn, each (characters,), changes.

    >>> [(s.text, s.kind, s.turn) for s in _to_segments("abcd", np.array([0, 1, 1, 0]), np.array([0, 0, 0, 1]))]
    [('a', <Kind.PROMPT: 0>, 0), ('bc', <Kind.ASSISTANT: 1>, 0), ('d', <Kind.PROMPT: 0>, 1)]
    """
    changes = (np.diff(kinds) != 0) | (np.diff(turns) != 0)
    cuts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(whole)]
    return [Segment(whole[a:b], False, Kind(int(kinds[a])), int(turns[a])) for a, b in pairwise(cuts)]


def _count(marked: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(tokens,): how many of the characters begin to end of each token are marked; `marked`: (characters,) bool."""
    before = np.concatenate([[0], np.cumsum(marked)])
    return before[end] - before[begin]
