"""Tiny Hugging Face models and tokenizers from a config, offline; chat templates in the styles that are in use."""

from __future__ import annotations

from pathlib import Path

TEXTS = [
    "What is 12 + 34? The answer is 46. Choose A, B, C or D. ",
    "user assistant system question answer\n",
    "if x:\n\n        A  = 12\n\n\n\n" + "\n\n " * 9,
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A default system turn, and text without the space around it.
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
# Llama 3: BOS, a header a turn, content stripped.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|body|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}"
)
# Llama 2: the system text inside the first user turn, no generation prompt, roles checked.
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Qwen 3: an empty thought before the last answer alone, so that a turn is rendered otherwise once another follows.
THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen 3: tools in the system turn, calls in tags, results in a user's turn, thoughts of the replies to the last user alone.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '') }}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif m['role'] == 'tool' %}{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}{% set thought = m['reasoning_content'] or '' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > last.user and thought %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{{ ARGUMENTS }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What stands for ARGUMENTS there, by the form in which the template wants them.
ARGUMENTS = {
    "either": "call['arguments'] if call['arguments'] is string else call['arguments'] | tojson",
    "object": "call['arguments'] | tojson",
    "text": "'' + call['arguments']",
    "printed": "call['arguments']",
}
# DeepSeek V3: calls where the content is null alone, and another prompt of a reply behind a result.
NULL_CONTENT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|head|>' + m['content'] }}"
    "{% elif m['role'] == 'tool' %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
    "{% elif m['content'] is none %}{{ '<|body|>' }}{% for call in m['tool_calls'] %}"
    "{{ call['type'] + ':' + call['function']['name'] + call['function']['arguments'] }}{% endfor %}{{ '<|eot|>' }}"
    "{% elif loop.index0 and messages[loop.index0 - 1]['role'] == 'tool' %}{{ m['content'] + '<|eot|>' }}"
    "{% else %}{{ '<|body|>' + m['content'] + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}{{ '<|body|>' }}{% endif %}"
)
# DeepSeek R1: the thought of every reply is taken away.
NO_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>", "<|eot|>")


def write_tokenizer(
    folder: Path,
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    bos: str | None = "<|bos|>",
    special: tuple[str, ...] = SPECIAL,
    trim_offsets: bool = False,
) -> Path:
    """A byte-level BPE tokenizer as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if trim_offsets:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=special[0], bos_token=bos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(kind: str, **changes):
    """A random model of three layers. Heads: a cap (`gemma2`), a factor (`cohere`, `granite`), a bias (`phi`), or neither."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 340, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
    others = {
        "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16, "sliding_window": 16},
        "granite": {"logits_scaling": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3},
        "cohere": {"logit_scale": 0.25},
        "mistral": {"sliding_window": 16},
    }
    grouped = {} if kind == "gpt2" else {"intermediate_size": 96, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes | special | grouped | others.get(kind, {}) | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            if p.ndim == 1:  # norms and biases
                p.data.add_(0.1 * torch.randn_like(p))
    return model


def write_model(folder: Path, kind: str = "llama", **tokenizer) -> Path:
    """A folder as from_pretrained wants it: `llama` (untied, grouped queries) or `qwen` (tied, biases, a padded vocabulary)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    write_tokenizer(folder, **tokenizer)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            LlamaForCausalLM(LlamaConfig(vocab_size=340, **sizes))
            if kind == "llama"
            else Qwen2ForCausalLM(Qwen2Config(vocab_size=352, tie_word_embeddings=True, **sizes))
        )
    model.generation_config.eos_token_id = 4
    model.save_pretrained(folder)
    return folder
