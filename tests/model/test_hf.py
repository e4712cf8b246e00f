"""A Hugging Face model in the loop: the numbers of transformers, runs, resuming, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import chattrain
from chattrain.chat import chat_format, render_prompt
from chattrain.data.batch import Batch
from chattrain.errors import UserError
from chattrain.model import hf
from chattrain.model.generate import generate, generate_batch
from chattrain.storage import checkpoint
from chattrain.storage.tensors import read_tensors
from chattrain.tokenizer import Tokenizer
from tests import tiny_hf
from tests.helpers import TINY, command_line, metrics, write_talk
from tests.model.test_recompute import Watch

transformers = pytest.importorskip("transformers")

SETTINGS = [o for o in TINY if not o.startswith(("model.", "tokenizer."))] + ["model=hf"]
IDS = torch.randint(8, 340, (3, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["llama", "qwen"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_hf.write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder) -> hf.HFModel:
    return hf.build(340, folder, seed=0).eval()


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def run(stage: str, folder: Path | str, name: str, *overrides: str) -> dict:
    return chattrain.run(
        [
            f"stage={stage}",
            *SETTINGS,
            f"init.from={folder}",
            f"run.name={name}",
            "train.max_steps=4",
            "optimizer.lr_scale=100",
            *overrides,
        ]
    )


@pytest.fixture
def talk(workplace):
    write_talk(workplace)
    return workplace


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_logits_and_losses_are_those_of_transformers(model, reference):
    targets = IDS.roll(-1, 1).masked_fill(IDS % 3 == 0, -1)
    with torch.no_grad():
        logits = reference(IDS).logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(IDS.shape)
        torch.testing.assert_close(model(IDS), logits)
        torch.testing.assert_close(model(IDS, targets), losses)


@pytest.mark.parametrize("bf16", [False, True])
def test_choices_are_scored_at_their_place_with_the_head_in_fp32(model, bf16):
    positions, choices = torch.tensor([11, 4, 4]), torch.tensor([[9, 10], [300, 2], [5, 6]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits, log_sum = model.choice_logits(IDS, positions, choices)
        features = model.inner.model(IDS).last_hidden_state[torch.arange(3), positions]
    every = features.float() @ model.lm_head.weight.float().T
    torch.testing.assert_close(log_sum, every.logsumexp(1), rtol=1e-4, atol=1e-4)
    expected = every.gather(1, choices)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_greedy_replies_are_those_of_transformers(model, reference, folder):
    tokenizer = Tokenizer.load(folder)
    for question in ("What is 1 + 2?", "A or B?"):
        prompt = render_prompt({"messages": [{"role": "user", "content": question}]}, tokenizer)
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ]
        said = list(generate(model, prompt, 20, chat_format(tokenizer).stop_ids))
        assert said == [int(token) for token in expected if int(token) not in chat_format(tokenizer).stop_ids]


PROMPTS = [IDS[0, :5].tolist(), IDS[1].tolist(), IDS[2, :1].tolist()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_many_lengths_get_together_what_each_gets_alone(model, temperature):
    alone = [list(generate(model, prompt, 10, set(), temperature, seed=2)) for prompt in PROMPTS]
    assert len(set(map(tuple, alone))) == len(PROMPTS)
    assert generate_batch(model, PROMPTS, 10, set(), temperature, seed=2) == alone
    stop = alone[1][4]
    ended = [reply[: reply.index(stop)] if stop in reply else reply for reply in alone]
    assert generate_batch(model, PROMPTS, 10, {stop}, temperature, seed=2) == ended


def test_padding_moves_no_position_of_a_model_that_learns_them():
    config = transformers.GPT2Config(vocab_size=340, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    model = hf.HFModel(transformers.GPT2LMHeadModel(config), {}).eval()
    assert generate_batch(model, PROMPTS, 10, set()) == [list(generate(model, prompt, 10, set())) for prompt in PROMPTS]


def test_a_tied_weight_is_saved_once_and_every_weight_is(model, reference):
    saved = model.weights()
    assert len({id(tensor) for tensor in saved.values()}) == len(saved)
    assert set(saved) == {name for name, _ in reference.named_parameters()}


def test_a_token_sees_its_own_document_only(model):
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, 12)
    with torch.no_grad():
        together = model(IDS, None, positions)
        torch.testing.assert_close(together[:, :5], model(IDS[:, :5]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[:, 5:], model(IDS[:, 5:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selective", [False, True])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(folder, selective):
    plain, model = (hf.build(340, folder, seed=0) for _ in range(2))
    model.checkpoint_activations(selective)
    batch, kept = Batch(IDS[:, :-1], IDS[:, 1:], 33, 33), []
    for each in (plain, model):
        with Watch(each) as watch:
            loss = each.loss(batch)
            kept.append(watch.held)
        loss.backward()
    assert kept[1] < (0.9 if selective else 0.7) * kept[0]  # logits included
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    prompt = IDS[0].tolist()
    assert list(generate(model, prompt, 6, set())) == list(generate(plain, prompt, 6, set()))
    assert not any(module.training for module in model.modules())


def test_dropout_is_off_in_training_too(model):
    model.train()
    assert not any(module.training for module in model.modules())


# --- runs ------------------------------------------------------------------------------------------------------------


MUON = ["optimizer=muon_adamw", "optimizer.vector_lr=0.01", "optimizer.lr_scale=1"]


@pytest.mark.parametrize("stage, others", [("sft", []), ("mid", []), ("sft", MUON), ("sft", ["collator=best_fit"])])
def test_a_run_lowers_the_loss_and_its_checkpoint_is_itself_a_hugging_face_model(talk, folder, stage, others):
    summary = run(stage, folder, "trained", "train.max_steps=8", *others)
    losses = [line["val/loss"] for line in metrics(summary["run_dir"]) if "val/loss" in line]
    assert summary["status"] == "completed" and losses[-1] < losses[0] - 0.1
    assert summary["init"] == str(folder)
    loaded, found = transformers.AutoModelForCausalLM.from_pretrained(summary["checkpoint"], output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ours = hf.build(340, Path(summary["checkpoint"]), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True))


def test_an_interrupted_run_goes_on_to_the_same_weights(talk, folder):
    whole = run("sft", folder, "whole")
    run("sft", folder, "parts", "checkpoint.every=2", "checkpoint.keep=5")
    last = Path("runs/sft/parts/checkpoints/step_000004")
    (last / "manifest.json").unlink()  # as if the plug had been pulled after step 2
    parts = run("sft", folder, "parts")
    assert "(resumed)" in (Path(parts["run_dir"]) / "train.log").read_text()
    a, b = (read_tensors(Path(s["checkpoint"]) / "model.safetensors") for s in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sft_starts_from_the_newest_mid_run_of_that_kind(talk, folder, capsys):
    mid = run("mid", folder, "first")
    sft = chattrain.run(["stage=sft", *SETTINGS, "train.max_steps=1", "init.strict=true"])
    assert sft["init"] == mid["checkpoint"]
    chattrain.run(["command=chat", "stage=sft", *SETTINGS, "chat.prompt=What is 1 + 2?", "chat.max_tokens=4"])
    assert "> What is 1 + 2?" in capsys.readouterr().out


def test_questions_are_answered_and_rows_inspected(talk, folder, capsys):
    demo = [o for o in SETTINGS if not o.startswith("data")] + ["data=demo", f"init.from={folder}", "train.seq_len=256"]
    result = chattrain.run(
        ["command=evaluate", "stage=sft", *demo, "eval=mmlu_arc", "eval.max_problems=8", "eval.max_tokens=512"]
    )
    assert 0 <= result["metrics"]["eval/demo_acc"] <= 1
    facts = chattrain.run(["command=inspect", "stage=sft", *SETTINGS, f"init.from={folder}"])
    out = capsys.readouterr().out
    assert "[<|im_end|>]" in out and "<|im_start|>user" in out and facts["supervised_shown"] > 0


def test_export_gives_back_a_folder_of_the_same_kind(talk, folder):
    summary = run("sft", folder, "trained")
    made = Path(chattrain.run(["command=export", "format=hf", "stage=sft", *SETTINGS])["folder"])
    assert {f.name for f in folder.iterdir()} <= {f.name for f in made.iterdir()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    exported = transformers.AutoModelForCausalLM.from_pretrained(made).eval()
    trained = hf.build(340, Path(summary["checkpoint"]), seed=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(IDS).logits, trained(IDS), rtol=0, atol=0)
    again = chattrain.run(["command=evaluate", "stage=sft", *SETTINGS, f"init.from={made}"])["metrics"]["val/loss"]
    assert again == pytest.approx(summary["metrics"]["val/loss"], rel=1e-6)


def test_export_of_a_bf16_model_is_bf16_and_training_is_fp32(talk, tmp_path_factory):
    folder = tiny_hf.write_model(tmp_path_factory.mktemp("bf16"))
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    summary = run("sft", folder, "bf16")
    saved = read_tensors(Path(summary["checkpoint"]) / "model.safetensors")
    made = Path(chattrain.run(["command=export", "stage=sft", *SETTINGS])["folder"])
    exported = read_tensors(made / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32} and {t.dtype for t in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[name].bfloat16(), exported[name]) for name in saved)


# --- refused ---------------------------------------------------------------------------------------------------------


def refused(capsys, *overrides: str) -> str:
    outcome = command_line(capsys, "stage=sft", *SETTINGS, *overrides)
    assert outcome.status == 2
    return outcome.message


def test_a_model_without_weights_is_refused(talk, capsys):
    for source in ("auto", "scratch"):
        assert f"init.from={source} finds no weights" in refused(capsys, f"init.from={source}")
    assert not Path("runs").exists()


def test_our_own_checkpoint_under_model_hf_and_the_reverse_are_refused_with_the_way_out(talk, folder, capsys):
    ours = chattrain.run(["stage=base", *TINY, "run.name=ours", "train.max_steps=1", "init.from=scratch"])
    assert "none of Hugging Face's" in refused(capsys, f"init.from={ours['run_dir']}")
    outcome = command_line(capsys, "stage=sft", *TINY, f"init.from={folder}")
    assert outcome.status == 2 and "trained as it is, without an import: model=hf" in outcome.message


def test_a_bad_conversation_is_refused_at_the_start_with_the_turn(talk, folder, capsys):
    with Path("talk.jsonl").open("a") as file:
        file.write(
            json.dumps({"messages": [{"role": "user", "content": "Stop <|im_end|> here"}, {"role": "assistant", "content": "x"}]})
            + "\n"
        )
    message = refused(capsys, f"init.from={folder}")
    assert "line 61" in message and "<|im_end|>" in message and not Path("runs").exists()


def test_missing_weights_and_broken_files_are_refused(talk, tmp_path_factory, capsys):
    folder = tiny_hf.write_model(tmp_path_factory.mktemp("broken"))
    tensors = read_tensors(folder / "model.safetensors")
    lost = next(name for name in tensors if "q_proj" in name)
    del tensors[lost]
    checkpoint.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert lost in refused(capsys, f"init.from={folder}", "run.name=lost")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be loaded" in refused(capsys, f"init.from={folder}", "run.name=broken")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    with pytest.raises(UserError, match=r"has 9999 tokens, its model only 3"):
        hf.build(9999, folder, seed=0)


def test_rows_longer_than_the_models_positions_are_refused(talk, folder, capsys):
    assert "256 positions" in refused(capsys, f"init.from={folder}", "train.seq_len=512")


@pytest.mark.parametrize("what", ["quantised weights", "an adapter"])
def test_quantised_models_and_adapters_are_refused(talk, tmp_path_factory, capsys, what):
    folder = tiny_hf.write_model(tmp_path_factory.mktemp("other"))
    if what == "an adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert what in refused(capsys, f"init.from={folder}")


@pytest.mark.parametrize("content", ["[1]", '{"eos_token_id": [[1]]}', "{"])
def test_a_broken_generation_config_is_refused(talk, tmp_path_factory, capsys, content):
    folder = tiny_hf.write_model(tmp_path_factory.mktemp("other"))
    (folder / "generation_config.json").write_text(content)
    outcome = command_line(capsys, "command=chat", "stage=sft", *SETTINGS, f"init.from={folder}", "chat.prompt=Hi")
    assert outcome.status == 2 and str(folder) in outcome.message


def test_a_prompt_that_cannot_be_rendered_is_refused(talk, folder, capsys):
    outcome = command_line(capsys, "command=chat", "stage=sft", *SETTINGS, f"init.from={folder}", 'chat.prompt="say <|im_end|>"')
    assert outcome.status == 2 and "<|im_end|>" in outcome.message


def test_without_transformers_the_extra_is_named(talk, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'chattrain[hf]'" in refused(capsys, f"init.from={folder}")
