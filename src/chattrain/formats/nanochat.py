"""nanochat's model folders (December 2025): weights, sizes and tokenizer, without unpickling anything freely.

    model_021400.pt  meta_021400.json  tokenizer.pkl  token_bytes.pt

The tokenizer lies in the folder itself (as on the hub), in its tokenizer/, or in nanochat's base directory beside
base_checkpoints/.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from chattrain.errors import UserError
from chattrain.formats import Foreign
from chattrain.tokenizer import Tokenizer

MODEL_FILE = re.compile(r"model_(\d+)\.pt")
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")  # what model_config holds
STAGES = {"base_checkpoints": "base", "mid_checkpoints": "mid", "chatsft_checkpoints": "sft"}
# Tensors of later versions, which compute something else.
NEWER = {"value_embeds.": "value embeddings", "ve_gate": "gates of value embeddings", "resid_lambdas": "residual scalars",
         "x0_lambdas": "scalars of the first embedding", "smear": "smeared embeddings", "backout": "a backed-out residual"}
EXACT = (torch.float32, torch.bfloat16, torch.float16)  # formats of weights that fp32 holds exactly


def holds(folder: Path) -> bool:
    """Is there a `model_NNNNNN.pt`?"""
    return bool(_model_files(folder))


def stage_of(folder: Path) -> str | None:
    """base, mid or sft by nanochat's own folder names; None where they say nothing."""
    return next((STAGES[part] for part in reversed(folder.resolve().parts) if part in STAGES), None)


def tokenizer_folder(folder: Path) -> Path | None:
    """Where the tokenizer of a model folder lies, or None."""
    return next((place for place in _places(folder) if (place / "tokenizer.pkl").is_file()), None)


def read(folder: Path, tokenizer_dir: Path | None = None) -> Foreign:
    """The newest step of the folder. Raises UserError for files that are missing, broken, or of another architecture.

    The weights are fp32: bf16 and fp16 exactly, fp32 as it lies in the file, which is mapped and not copied.
    """
    if not holds(folder):
        raise UserError(f"{folder} holds no model_NNNNNN.pt; give a folder that nanochat saved a model in")
    file = _model_files(folder)[-1]
    number = MODEL_FILE.fullmatch(file.name)[1]
    meta = file.with_name(f"meta_{number}.json")
    config, weights = _read_config(meta), _read_weights(file)
    _refuse_newer(file, config, weights)
    sizes = _sizes(meta, config)
    if sizes["n_layer"] > len(weights) or sizes["n_embd"] > sum(t.numel() for t in weights.values()):
        raise UserError(f"{file} does not fit the model: n_layer={sizes['n_layer']}, n_embd={sizes['n_embd']} of {meta.name} "
                        f"are too large for its {len(weights)} tensors; take the two files from one place")
    seq_len = sizes.pop("sequence_len")
    place = tokenizer_dir or tokenizer_folder(folder)
    if place is None:
        raise UserError(f"{folder} has no tokenizer: no tokenizer.pkl in {', '.join(map(str, _places(folder)))}; name its "
                        "folder with tokenizer.path=<folder>")
    tokenizer = read_tokenizer(place) if (place / "tokenizer.pkl").is_file() else Tokenizer.load(place)
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise UserError(f"the tokenizer in {place} has {tokenizer.vocab_size} tokens, the model in {file} "
                        f"{sizes['vocab_size']}; name the right one with tokenizer.path=<folder>")
    model = Foreign(sizes, weights, tokenizer, int(number), seq_len)
    model.check(str(file))
    return model


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the folder that holds `tokenizer.pkl`. Raises UserError where it is broken or asks for more than a
    tokenizer needs, and where `token_bytes.pt` belongs to another."""
    file = folder / "tokenizer.pkl"
    encoding = _encoding(file, _unpickle(file))
    try:
        tokenizer = Tokenizer(encoding)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if (folder / "token_bytes.pt").is_file():
        _check_token_bytes(folder / "token_bytes.pt", tokenizer)
    return tokenizer


# --- weights ---------------------------------------------------------------------------------------------------------


def _model_files(folder: Path) -> list[Path]:
    """By step, oldest first."""
    found = [f for f in folder.glob("model_*.pt") if MODEL_FILE.fullmatch(f.name)]
    return sorted(found, key=lambda f: int(MODEL_FILE.fullmatch(f.name)[1]))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model_config"]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; it belongs to the weights of the same number") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} holds no model_config: {error!r}; take the one that nanochat wrote with the weights") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no model_config but a {type(config).__name__}; take the one that nanochat wrote with the "
                        "weights")
    return config


def _refuse_newer(file: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises UserError that names all that the architecture of December 2025 does not have, settings and tensors."""
    found = {kind: name for name in reversed(sorted(weights)) for mark, kind in NEWER.items() if mark in name}
    news = [f"{kind} ({name})" for kind, name in found.items()]
    if unknown := sorted(config.keys() - set(SIZES)):
        news.append(f"its model_config has {', '.join(unknown)}")
    if news:
        raise UserError(f"{file} is of a newer nanochat: {', '.join(news)}. chattrain reads the architecture of December 2025")


def _sizes(file: Path, config: dict[str, Any]) -> dict[str, int]:
    if missing := [name for name in SIZES if name not in config]:
        raise UserError(f"{file}: model_config lacks {', '.join(missing)}; take the one that nanochat wrote with the weights")
    if wrong := [f"{name}={value!r}" for name, value in config.items() if type(value) is not int or value < 1]:
        raise UserError(f"{file}: {', '.join(wrong)} in model_config must be whole numbers above 0")
    n_embd, n_head, n_kv_head = config["n_embd"], config["n_head"], config["n_kv_head"]
    if n_embd % (2 * n_head) or n_head % n_kv_head:
        raise UserError(f"{file}: n_embd={n_embd} must be a multiple of 2 x n_head={n_head}, and n_head of "
                        f"n_kv_head={n_kv_head}")
    return dict(config)


def _read_weights(file: Path) -> dict[str, Tensor]:
    state = _load(file)
    if not isinstance(state, dict) or not all(_is_plain(tensor) for tensor in state.values()):
        raise UserError(f"{file} holds no weights: a dictionary of dense tensors by name is wanted, as nanochat saves it")
    weights = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    if len(weights) < len(state):
        raise UserError(f"{file} holds a tensor twice, with and without _orig_mod. before its name; save one of them")
    if wrong := [f"{name} is {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in EXACT]:
        raise UserError(f"{file}: {wrong[0]}, not a floating-point format that fp32 holds exactly; save it as fp32, bf16 or fp16")
    return {name: tensor.float() for name, tensor in weights.items()}


def _is_plain(value: Any) -> bool:
    """A tensor whose numbers are there, one after the other: not sparse, nested or without data."""
    return (type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
            and not value.is_nested)


def _load(file: Path) -> Any:
    """torch.load of tensors and plain values, nothing else; a zip file, as torch.save writes it, is mapped."""
    if zipfile.is_zipfile(file) and (bad := _damaged(file)):
        raise UserError(f"{file} is damaged: {bad} has another checksum; fetch it anew")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of zip files, of pickles, of the disk: many kinds, one meaning
        # torch's own message is left out: it advises to load the file with weights_only=False.
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{file} asks for more than tensors, {asked[1]}: refused; save it anew with tensors alone") from error
        raise UserError(f"{file} cannot be read as tensors ({type(error).__name__}): it is damaged or no file of torch.save; "
                        "fetch it anew") from error


def _damaged(file: Path) -> str | None:
    """The first part of a zip file whose checksum is wrong, which torch does not look at."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return f"its directory ({error})"


# --- tokenizer -------------------------------------------------------------------------------------------------------


class _Recorded:
    """Stands in for tiktoken's Encoding: keeps the state it is given, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Latin1:
    """Stands in for `_codecs.encode`, by which pickles of protocol 2 write bytes: does that alone, and cannot be changed."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise ValueError("_codecs.encode of anything but bytes written as latin1")
        return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Admits an Encoding (as _Recorded) and plain values; any other class or function is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")):
            return _Recorded
        if (module, name) == ("_codecs", "encode"):
            return _Latin1()
        raise UserError(f"asks for {module}.{name}, which a tokenizer does not need: refused")

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("asks for an object outside the file, which a tokenizer does not need: refused")


def _unpickle(file: Path) -> Any:
    """The state of the Encoding in a pickle."""
    try:
        raw = file.read_bytes()
        _scan(raw)
        found = _Unpickler(io.BytesIO(raw)).load()
    except UserError as error:
        raise UserError(f"{file} {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; name the tokenizer's folder with tokenizer.path=<folder>"
                        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{file} is no pickle of a tokenizer: {error!r}; take the one that nanochat saved") from error
    if type(found) is not _Recorded:
        raise UserError(f"{file} holds no tokenizer but a {type(found).__name__}")
    return found.state


def _scan(raw: bytes) -> None:
    """Refuses what the unpickler does without asking: extension codes come from its cache, past find_class, and memory is
    taken up to any place that an object is kept at."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name.startswith("EXT"):
            raise UserError("asks for an extension code, which a tokenizer does not need: refused")
        if "PUT" in opcode.name and argument > len(raw):
            raise ValueError(f"an object is kept at place {argument}")


def _encoding(file: Path, state: Any) -> tiktoken.Encoding:
    """A fresh Encoding from plain values that are checked one by one."""
    if isinstance(state, str):
        raise UserError(f"{file} names tiktoken's encoding {state!r} instead of holding one; save the encoding itself")
    if not isinstance(state, dict) or not {"pat_str", "mergeable_ranks", "special_tokens"} <= state.keys():
        raise UserError(f"{file} holds no pattern, ranks and special tokens")
    pattern, ranks, special = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
    if not isinstance(pattern, str) or not _is_table(ranks, bytes) or not _is_table(special, str):
        raise UserError(f"{file}: pattern, ranks or special tokens are of another type than a tokenizer's")
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) != len(ids) or min(ids, default=0) < 0:
        raise UserError(f"{file}: two tokens have one id, or an id is below 0")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{file}: {len(missing)} of the 256 single bytes have no token")
    try:
        return tiktoken.Encoding(name="chattrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # of the regular expression, mostly
        raise UserError(f"{file}: tiktoken refuses it: {error}") from error


def _is_table(table: Any, key: type) -> bool:
    return isinstance(table, dict) and all(type(k) is key and type(v) is int for k, v in table.items())


def _check_token_bytes(file: Path, tokenizer: Tokenizer) -> None:
    """nanochat counts the bytes of the decoded token, 3 for each U+FFFD that stands for part of a character, and 0 where the
    text is a special token's."""
    saved = _load(file)
    if not _is_plain(saved) or saved.dtype not in (torch.int32, torch.int64) or saved.shape != (tokenizer.vocab_size,):
        raise UserError(f"{file} holds no {tokenizer.vocab_size} whole numbers, one a token: it belongs to another tokenizer")
    counts = [0] * tokenizer.vocab_size
    for token in tokenizer.encoding._mergeable_ranks.values():
        text = tokenizer.decode([token])
        counts[token] = 0 if text in tokenizer.encoding._special_tokens else len(text.encode())
    if saved.tolist() != counts:
        raise UserError(f"{file} counts other bytes than the tokens beside it have: it belongs to another tokenizer")


def _places(folder: Path) -> list[Path]:
    return [folder, folder / "tokenizer", folder.resolve().parent.parent / "tokenizer"]
