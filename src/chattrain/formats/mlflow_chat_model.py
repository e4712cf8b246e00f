"""The chat model that `command=export format=mlflow` writes: MLflow copies this file and runs it where the model is loaded.

It answers OpenAI's Responses format: `{"input": [{"role": "user", "content": "Hello"}]}`, with `max_output_tokens` and
`temperature` as options, and `{"custom_inputs": {"top_k": 50, "seed": 1}}`. No pickle: the weights are the checkpoint's.
Nothing in chattrain imports this file, as it imports MLflow.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import ResponsesAgent
from mlflow.types.responses import ResponsesAgentRequest, ResponsesAgentResponse

from chattrain.chat import Malformed, chat_format, render_prompt
from chattrain.chat.reply import reply_text
from chattrain.chat.tools import tool_of
from chattrain.config.commands import ChatConfig
from chattrain.config.instantiate import instantiate_config
from chattrain.config.targets import current_target
from chattrain.config.words import Device, DType
from chattrain.device import autocast, pick_device, use_bf16
from chattrain.formats.mlflow_model import as_message
from chattrain.model.generate import generate_batch
from chattrain.tokenizer import Tokenizer


class ChatModel(ResponsesAgent):
    """Continues a conversation with the model of a checkpoint, as `command=chat` does: greedy unless a temperature is given."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["checkpoint"])
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        config = saved["model"] | {"_target_": current_target(saved["model"]["_target_"])}
        self.tokenizer = Tokenizer.load(folder)
        model = instantiate_config(config, vocab_size=self.tokenizer.vocab_size, start=folder, seed=0)
        self.model = model.to(pick_device(Device.auto)).eval()
        self.bf16 = use_bf16(DType[(saved.get("train") or {}).get("dtype") or "auto"], self.model.lm_head.weight.device)

    def predict(self, request: ResponsesAgentRequest) -> ResponsesAgentResponse:
        """One assistant message. A conversation that cannot be rendered is the caller's mistake (HTTP status 400)."""
        custom, defaults = request.custom_inputs or {}, ChatConfig()
        try:
            messages = [as_message(item.model_dump()) for item in request.input]
            prompt = render_prompt({"messages": messages}, self.tokenizer)
        except Malformed as error:
            raise MlflowException.invalid_parameter_value(f"the conversation cannot be rendered: {error}") from error
        with autocast(self.bf16, self.model.lm_head.weight.device):
            (reply,) = generate_batch(
                self.model,
                [prompt],
                request.max_output_tokens or defaults.max_tokens,
                chat_format(self.tokenizer).stop_ids,
                request.temperature or defaults.temperature,
                custom.get("top_k", defaults.top_k),
                custom.get("seed", 0),
                tool_of(self.tokenizer),
            )
        item = self.create_text_output_item(reply_text(self.tokenizer, reply), id=f"msg_{uuid.uuid4().hex}")
        return ResponsesAgentResponse.model_validate({"output": [item]})


set_model(ChatModel())
