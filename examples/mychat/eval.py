"""A measure: called with the model at every evaluation. Here: how many replies to questions end as a sentence does."""

from chattrain.chat import chat_format, render_prompt
from chattrain.model.generate import generate_batch


class EndsWell:
    def __init__(self, tokenizer, ranks, questions: list[str], max_tokens: int = 32):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.prompts = [render_prompt({"messages": [{"role": "user", "content": text}]}, tokenizer) for text in questions]

    def __call__(self, model) -> dict[str, float]:
        replies = generate_batch(model, self.prompts, self.max_tokens, chat_format(self.tokenizer).stop_ids)
        return {"share": sum(self.tokenizer.decode(ids).endswith(".") for ids in replies) / len(replies)}
