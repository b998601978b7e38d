"""Create, build, run, inspect, export: the commands as a user gives them, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from cli_process import environment

import mxcompile as package
from mxcompile.cli.main import cli
from mxcompile.loading import load


def json_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_create_is_deterministic_and_verifies(mxcompile, tmp_path):
    for name in "ab":
        made = json_of(
            mxcompile("checkpoint", "create", "--preset", "tiny", "--seed", 7, "-o", tmp_path / name, "--json")
        )
        assert made["parameters"] == 4534144
    assert (
        json_of(mxcompile("inspect", tmp_path / "a", "--json"))["fingerprint"]
        == (json_of(mxcompile("inspect", tmp_path / "b", "--json"))["fingerprint"])
    )
    assert json_of(mxcompile("checkpoint", "verify", tmp_path / "a", "--values", "--json")) == {
        "ok": True,
        "tensors": 251,
        "ignored": 0,
        "problems": [],
    }


def test_create_replaces_checkpoints_only(mxcompile, tmp_path):
    target = tmp_path / "c"
    target.mkdir()
    (target / "letter.txt").write_text("keep")
    create = ("checkpoint", "create", "--preset", "tiny", "-o", target)
    done = mxcompile(*create, "--force")
    assert (done.returncode, "is not a checkpoint" in done.stderr) == (2, True)
    assert (target / "letter.txt").read_text() == "keep"
    (target / "letter.txt").unlink()
    assert mxcompile(*create).returncode == 0
    done = mxcompile(*create, "--seed", 1)
    assert (done.returncode, "already exists" in done.stderr) == (2, True)
    assert mxcompile(*create, "--seed", 1, "--force").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_verify_names_every_problem(mxcompile, tiny_checkpoint, tmp_path):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    shards = sorted(broken.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    done = mxcompile("checkpoint", "verify", broken)
    assert done.returncode == 2
    assert f"missing shard: shard {shards[0].name} is missing" in done.stdout
    assert f"truncated shard: shard {shards[1].name} is truncated" in done.stdout
    build = mxcompile("build", broken, "-o", tmp_path / "e")
    assert build.returncode == 2
    assert shards[0].name in build.stderr
    assert build.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_build_reports_what_it_did(mxcompile, tiny_checkpoint, tmp_path):
    (tmp_path / "build.toml").write_text("max-seq-len = 50\nlayers = 1\nthreads = 2\n")
    command = ("build", tiny_checkpoint, "-o", tmp_path / "e", "--config", tmp_path / "build.toml", "--json", "-v")
    done = mxcompile(*command)
    summary = json_of(done)
    assert (summary["layers"], summary["max_seq_len"], summary["max_batch_size"]) == (1, 50, 8)
    assert list(summary["seconds"]) == ["read", "trace", "lower", "bind weights", "build", "verify"]
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == list(summary["seconds"])
    on_disk = sum(file.stat().st_size for file in (tmp_path / "e").iterdir() if file.name != "config.json")
    assert summary["sizes"]["total"] == on_disk
    assert summary["peak_memory"] > 10**8
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in (tmp_path / "e").iterdir()}
    again = mxcompile(*command)
    assert (again.returncode, "--force" in again.stderr) == (2, True)


def test_a_summary_for_people(tiny_checkpoint, tmp_path, capsys):
    cli.main(["build", str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--layers", "1"], standalone_mode=False)
    out = capsys.readouterr().out
    for words in ("onnxruntime, float32", "1 layers", "batch 8, 4096 tokens", "weights", "trace", "peak memory"):
        assert words in out


def test_run_streams_what_json_and_the_library_say(mxcompile, tiny_engine):
    prompt = ("run", tiny_engine, "--prompt", "The lightning layers", "--max-new-tokens", 30, "--threads", 2)
    found = json_of(mxcompile(*prompt, "--json"))
    streamed, whole = mxcompile(*prompt), mxcompile(*prompt, "--no-stream")
    assert streamed.stdout == whole.stdout == found["text"] + "\n"
    assert "tokens/s (length)" in streamed.stderr
    result = load(tiny_engine, threads=2).generate("The lightning layers", max_new_tokens=30)
    assert (found["tokens"], found["text"]) == (result.tokens, result.text)
    assert len(found["tokens"]) == 30


def test_run_with_sampling_repeats_by_seed_and_stops(mxcompile, tiny_engine):
    base = ("run", tiny_engine, "--prompt", "x", "--json", "--temperature", 1.5, "--top-p", 0.9, "--top-k", 100)
    first = json_of(mxcompile(*base, "--seed", 5, "--max-new-tokens", 20, "--logprobs", 2))
    assert json_of(mxcompile(*base, "--seed", 5, "--max-new-tokens", 20))["tokens"] == first["tokens"]
    assert json_of(mxcompile(*base, "--seed", 6, "--max-new-tokens", 20))["tokens"] != first["tokens"]
    assert [len(entry["top"]) for entry in first["logprobs"]] == [2] * len(first["tokens"])
    stop = first["text"][4:6]
    stopped = json_of(mxcompile(*base, "--seed", 5, "--max-new-tokens", 20, "--stop", stop))
    assert stopped["text"] == first["text"][: first["text"].index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)


def test_run_takes_text_from_a_file_or_a_pipe(mxcompile, tiny_engine, tmp_path):
    (tmp_path / "p.txt").write_text("Größe\n", encoding="utf-8")
    run = ("run", tiny_engine, "--json", "--max-new-tokens", 4)
    expected = load(tiny_engine).generate("Größe\n", max_new_tokens=4).tokens
    assert json_of(mxcompile(*run, "--prompt-file", tmp_path / "p.txt"))["tokens"] == expected
    assert json_of(mxcompile(*run, "--prompt-file", "-", input="Größe\n"))["tokens"] == expected
    (tmp_path / "p.txt").write_bytes(b"a\xff")
    done = mxcompile(*run, "--prompt-file", tmp_path / "p.txt")
    assert (done.returncode, "is not UTF-8 text (byte 1)" in done.stderr) == (2, True)


def test_chat_renders_the_template(mxcompile, tiny_engine):
    chat = ("run", tiny_engine, "--json", "--max-new-tokens", 4, "--chat", "--prompt", "Hi", "--system")
    engine = load(tiny_engine)
    text = "<beginning_of_sentence>{}<end_of_sentence>\n"
    opening = text.format("system ai_setting=assistant\nBe brief.") + text.format("user name=user\nHi")
    prompt = opening + "<beginning_of_sentence>ai name=assistant\n"
    found = json_of(mxcompile(*chat, "Be brief."))
    assert found["tokens"] == engine.generate(prompt, max_new_tokens=4).tokens
    assert found["prompt_tokens"] == len(engine.tokenizer.encode(prompt))
    without = json_of(mxcompile(*chat, ""))
    assert without["prompt_tokens"] < found["prompt_tokens"]


def test_a_conversation_of_turns_equals_the_whole_at_once(tiny_engine, monkeypatch, capsys):
    """The state that stays between turns must hold what prefilling the conversation from the start gives."""
    from engines.generation import Generation
    from mxcompile.cli import chat_loop

    lines = iter(["one", "two", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    batches = []
    start = Generation.__init__
    monkeypatch.setattr(
        Generation,
        "__init__",
        lambda self, session, prompts, *a, **k: batches.append(prompts) or start(self, session, prompts, *a, **k),
    )
    engine = load(tiny_engine)
    settings = {"max_new_tokens": 3}
    chat_loop.talk_in_turns(engine, "", settings)
    shown = capsys.readouterr().out.splitlines()
    (first,), (second,) = batches
    answers = engine.generate([first], **settings)[0]
    fed = answers.tokens[: len(answers.tokens) - len(answers.unfed_tokens)]
    assert shown[1] == engine.generate([[*first, *fed, *second]], **settings)[0].text


def test_without_a_tokenizer_ids_go_in_and_out(mxcompile, tiny_engine, tmp_path):
    """Also: what the engine directory lists is what it must hold, so the copy's list is cut too."""
    bare = shutil.copytree(tiny_engine, tmp_path / "e")
    config = json.loads((bare / "config.json").read_text())
    for name in [name for name in config["files"] if not name.startswith("rank")]:
        (bare / name).unlink()
        del config["files"][name]
    (bare / "config.json").write_text(json.dumps(config))
    done = mxcompile("run", bare, "--tokens", "1,2,3", "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    expected = load(tiny_engine).generate([[1, 2, 3]], max_new_tokens=5)[0].tokens
    assert [int(part) for part in done.stdout.split()] == expected
    for arguments in (["--prompt", "x"], ["--chat", "--prompt", "x"]):
        refused = mxcompile("run", bare, *arguments)
        assert (refused.returncode, "has no tokenizer" in refused.stderr) == (2, True)


def test_inspect_counts_the_same_everywhere(mxcompile, tiny_checkpoint, tiny_engine, tmp_path):
    export = json_of(mxcompile("export", tiny_checkpoint, "-o", tmp_path / "x.onnx", "--json"))
    assert export["derived_bytes"] + export["referenced_bytes"] >= 4 * 4534144
    engine, checkpoint, onnx = (
        json_of(mxcompile("inspect", path, "--json")) for path in (tiny_engine, tiny_checkpoint, tmp_path / "x.onnx")
    )
    assert (engine["kind"], checkpoint["kind"], onnx["kind"]) == ("engine", "checkpoint", "onnx")
    assert engine["architecture"] == checkpoint["architecture"]
    assert engine["parameters"] == checkpoint["parameters"]
    del engine["parameters"]["active per token"]
    assert onnx["parameters"] == engine["parameters"]
    assert onnx["operators"]["LinearAttention"] == 7
    assert engine["operators"]["com.microsoft::MoE"] == 8
    assert engine["limits"] == {"max_batch_size": 4, "max_seq_len": 96, "prefill_chunk": 96}
    # 7 lightning layers of 4 heads of 64 x 64, and one softmax layer of 2 key and value heads of 64, all fp32.
    assert engine["state"] == {"bytes per sequence": 7 * 4 * 64 * 64 * 4, "bytes per token": 2 * 2 * 64 * 4}
    assert onnx["inputs"]["input_ids"] == "int64 [batch, tokens]"
    tables = mxcompile("inspect", tiny_engine, "--verify").stdout
    assert engine["files"]["rank0.onnx"]["sha256"] in tables
    for title in ("Architecture", "Parameters", "State", "Operators", "Inputs", "Outputs", "Files"):
        assert title in tables
    assert mxcompile("export", tiny_checkpoint, "-o", tmp_path / "x.onnx").returncode == 2


def test_export_of_a_preset_needs_no_weights(mxcompile, tmp_path):
    made = json_of(mxcompile("export", "--preset", "tiny", "--layers", 1, "-o", tmp_path / "x.onnx", "--json"))
    assert (made["layers"], made["derived_bytes"]) == (1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    done = mxcompile("export", "--preset", "huge", "-o", tmp_path / "y.onnx")
    assert (done.returncode, "unknown preset 'huge'" in done.stderr) == (2, True)


def test_plugins_are_listed(mxcompile):
    names = {operator["name"] for operator in json_of(mxcompile("plugins", "list", "--json"))}
    assert {"LinearAttention", "MoE"} <= names
    assert "LinearAttention: lightning attention" in mxcompile("plugins", "list").stdout


def test_the_facade_builds_loads_and_generates(tiny_checkpoint, tmp_path):
    summary = package.build(tiny_checkpoint, tmp_path / "e", layers=1, max_seq_len=32, max_batch_size=2)
    assert summary.layers == 1
    engine = package.load(tmp_path / "e")
    state = engine.new_state(2)
    logits_BN = engine.prefill([[5, 6, 7], [8]], state)
    assert logits_BN.shape == (2, 512)
    assert list(state.lengths) == [3, 1]
    tokens = logits_BN.argmax(-1)
    results = engine.generate([[5, 6, 7], [8]], max_new_tokens=2, stop_token_ids=())
    assert [result.tokens[0] for result in results] == list(tokens)
    assert [result.tokens[1] for result in results] == list(engine.decode(tokens, state).argmax(-1))
    np.testing.assert_array_equal(state.lengths, [4, 2])
    assert package.generate(tmp_path / "e", "hi", max_new_tokens=2).text is not None
    assert package.inspect(tmp_path / "e")["kind"] == "engine"


def test_a_ragged_batch_on_an_engine_gives_each_row_what_it_gets_alone(tiny_engine):
    """Rows finish at different times; the fp32 logits of a batch may differ in their last bits, the tokens may not."""
    from engines.generation import GenerationConfig, generate

    session = load(tiny_engine, threads=2).session
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8] * 5, [9, 10], [11] * 17]
    configs = [
        GenerationConfig(max_new_tokens=20, temperature=1.0, seed=3),
        GenerationConfig(max_new_tokens=3),
        GenerationConfig(max_new_tokens=11, repetition_penalty=1.3),
        GenerationConfig(max_new_tokens=1),
    ]
    together = generate(session, prompts, configs)
    alone = [generate(session, [prompt], config)[0] for prompt, config in zip(prompts, configs, strict=True)]
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    assert [len(result.tokens) for result in together] == [20, 3, 11, 1]


def test_output_survives_a_terminal_without_the_characters(mxcompile, tiny_engine):
    done = mxcompile(
        "run", tiny_engine, "--prompt", "x", "--max-new-tokens", 40, env=environment(PYTHONIOENCODING="ascii")
    )
    assert done.returncode == 0, done.stderr


def test_loading_and_running_needs_neither_torch_nor_onnx(tiny_engine):
    script = f"""
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers"):
    sys.modules[name] = None
import mxcompile
print(len(mxcompile.load({str(tiny_engine)!r}).generate("hello", max_new_tokens=3).tokens))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True, env=environment()
    )
    assert done.stdout == "3\n"


@pytest.mark.parametrize("missing", ["torch", "onnx"])
def test_building_without_a_library_says_what_to_install(tiny_checkpoint, tmp_path, missing):
    script = f"""
import sys
sys.modules[{missing!r}] = None
from mxcompile.cli.main import main
main(["build", {str(tiny_checkpoint)!r}, "-o", {str(tmp_path / "e")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False, env=environment()
    )
    assert done.returncode == 3
    assert "pip install 'mxcompile[build]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
