"""generate() reads its arguments as model.generate does: names, defaults, precedence, prompts and masks."""

import numpy as np
import pytest
import stories260k
import torch
from api_models import BACKENDS, PROMPT, PROMPTS, assert_same, batch, compiled, ids, shared_model, tokenizer
from transformers import GenerationConfig


@pytest.fixture(scope="module", params=BACKENDS)
def fast(request):
    return compiled(request.param)


@pytest.fixture
def own():
    """A model whose generation_config a test may change, and its runtime."""
    model = stories260k.load()
    return model, compiled(model=model)


def new_tokens(fast, *args, **kwargs):
    """How many tokens a greedy call adds to the prompt."""
    return fast.generate(ids(), *args, **kwargs).shape[1] - ids().shape[1]


def greedy(count=30):
    """The model's own continuation of PROMPT, without the prompt."""
    return shared_model().generate(ids(), max_new_tokens=count)[0, ids().shape[1] :].tolist()


# --- how long


def test_twenty_new_tokens_are_the_default(fast):
    assert assert_same(fast, shared_model(), ids()).shape[1] == ids().shape[1] + 20


def test_the_default_stops_where_the_model_has_no_more_positions(fast):
    limit = shared_model().config.max_position_embeddings
    prompt = torch.full((1, limit - 5), 300)
    assert assert_same(fast, shared_model(), prompt).shape[1] == limit


def test_max_new_tokens_counts_without_the_prompt(fast):
    assert assert_same(fast, shared_model(), ids(), max_new_tokens=7).shape[1] == ids().shape[1] + 7


def test_max_length_counts_with_the_prompt(fast):
    assert assert_same(fast, shared_model(), ids(), max_length=17).shape[1] == 17


def test_max_length_counts_the_padding_of_a_batch(fast):
    assert assert_same(fast, shared_model(), **batch(), max_length=25).shape[1] == 25


def test_one_new_token_is_enough(fast):
    assert_same(fast, shared_model(), **batch(), max_new_tokens=1)


def test_max_new_tokens_beats_max_length(fast):
    assert_same(fast, shared_model(), ids(), max_new_tokens=5, max_length=100)


def test_max_length_none_is_unset(fast):
    assert_same(fast, shared_model(), ids(), max_length=None, max_new_tokens=4)


def test_whole_numbers_of_numpy_and_torch_are_taken(fast):
    assert new_tokens(fast, max_new_tokens=np.int64(3)) == 3
    assert new_tokens(fast, max_new_tokens=torch.tensor(4)) == 4


# --- precedence


def test_a_keyword_beats_generation_config(fast):
    assert_same(fast, shared_model(), ids(), GenerationConfig(max_new_tokens=9), max_new_tokens=4)


def test_generation_config_beats_the_models_own(own):
    model, fast = own
    model.generation_config.max_new_tokens = 9
    assert_same(fast, model, ids(), GenerationConfig(max_new_tokens=4))


def test_the_models_own_generation_config_beats_the_defaults(own):
    model, fast = own
    model.generation_config.max_new_tokens = 9
    assert assert_same(fast, model, ids()).shape[1] == ids().shape[1] + 9


def test_what_generation_config_leaves_unset_comes_from_the_models_own(own):
    model, fast = own
    model.generation_config.repetition_penalty = 1.4
    assert_same(fast, model, ids(), GenerationConfig(max_new_tokens=25))


def test_max_new_tokens_of_the_model_beats_a_max_length_keyword(own):
    model, fast = own  # Hugging Face's rule, and not what the precedence alone would say
    model.generation_config.max_new_tokens = 4
    assert_same(fast, model, ids(), max_length=30)


def test_max_length_of_the_model_is_used(own):
    model, fast = own
    model.generation_config.max_length = 19
    assert assert_same(fast, model, ids()).shape[1] == 19


def test_repetition_penalty_of_the_model_is_used(own):
    model, fast = own
    plain = fast.generate(ids(), max_new_tokens=40)
    model.generation_config.repetition_penalty = 1.5
    assert assert_same(fast, model, ids(), max_new_tokens=40).tolist() != plain.tolist()


def test_a_keyword_none_unsets_what_the_model_says(own):
    model, fast = own
    model.generation_config.eos_token_id = greedy()[3]
    assert_same(fast, model, ids(), eos_token_id=None)


def test_top_k_of_the_model_is_used(own):
    model, fast = own
    plain = fast.generate(ids(), max_new_tokens=20)
    model.generation_config.top_k = 1
    assert torch.equal(fast.generate(ids(), max_new_tokens=20, do_sample=True, seed=3), plain)


def test_do_sample_of_the_model_is_used(own):
    model, fast = own
    model.generation_config.do_sample = True
    sampled = {tuple(fast.generate(ids(), seed=seed)[0].tolist()) for seed in range(4)}
    assert len(sampled) > 1


def test_a_generation_config_works_after_save_and_load(fast, tmp_path):
    config = GenerationConfig(
        max_new_tokens=15,
        repetition_penalty=1.3,
        eos_token_id=[2, 400],
        pad_token_id=2,
        # as a list: transformers writes the dict form to JSON with keys that it then refuses
        sequence_bias=[[[300], 2.0], [[301, 302], -4.0]],
    )
    before = assert_same(fast, shared_model(), ids(), config)
    config.save_pretrained(tmp_path)
    after = assert_same(fast, shared_model(), ids(), GenerationConfig.from_pretrained(tmp_path))
    assert torch.equal(before, after)


def test_generation_config_may_be_given_by_keyword_and_is_not_changed(fast):
    config = GenerationConfig(max_new_tokens=6)
    before = config.to_dict()
    assert_same(fast, shared_model(), ids(), generation_config=config, repetition_penalty=1.2)
    assert config.to_dict() == before


# --- end of sequence and padding


@pytest.mark.parametrize(
    "form", [int, lambda t: [t], lambda t: [t, 400], torch.tensor, lambda t: torch.tensor([400, t])]
)
def test_eos_token_id_takes_a_number_a_list_or_a_tensor(fast, form):
    end = greedy()[6]
    answer = assert_same(fast, shared_model(), ids(), max_new_tokens=30, eos_token_id=form(end))
    assert answer[0, -1] == end and answer.shape[1] < ids().shape[1] + 30


def test_any_of_several_eos_tokens_ends_the_row(fast):
    tokens = greedy()
    assert_same(fast, shared_model(), ids(), max_new_tokens=30, eos_token_id=[tokens[9], tokens[5]])


def test_without_an_eos_token_nothing_ends_early(own):
    model, fast = own
    model.generation_config.eos_token_id = greedy()[4]
    assert assert_same(fast, model, ids(), eos_token_id=None).shape[1] == ids().shape[1] + 20


def test_a_negative_eos_token_means_none(fast):
    assert new_tokens(fast, eos_token_id=-1) == 20


def test_the_eos_token_at_the_first_step_ends_it(fast):
    assert assert_same(fast, shared_model(), ids(), eos_token_id=greedy()[0]).shape[1] == ids().shape[1] + 1


def rows_that_end_apart(**kwargs):
    """A batch and an EOS token that its rows reach at different steps."""
    return dict(batch(), max_new_tokens=30, eos_token_id=tokenizer()(".").input_ids[0], **kwargs)


def test_finished_rows_are_padded(fast):
    answer = assert_same(fast, shared_model(), **rows_that_end_apart(pad_token_id=7))
    assert (answer[:, -1] == 7).any() and (answer[:, -1] != 7).any()


def test_the_pad_token_is_the_models_own(fast):
    assert_same(fast, shared_model(), **rows_that_end_apart())


def test_without_a_pad_token_the_first_eos_token_pads(own):
    model, fast = own
    model.generation_config.pad_token_id = None
    call = rows_that_end_apart()
    answer = assert_same(fast, model, **call | {"eos_token_id": [call["eos_token_id"], 400]})
    assert (answer[:, -2:] == call["eos_token_id"]).all(1).any()


def test_a_single_row_may_have_a_pad_token_that_is_none(fast):
    assert_same(fast, shared_model(), ids(), pad_token_id=-1)


# --- prompts and masks


def test_the_prompt_may_be_positional_or_either_keyword(fast):
    expected = shared_model().generate(ids())
    for answer in (fast.generate(ids()), fast.generate(inputs=ids()), fast.generate(input_ids=ids())):
        assert torch.equal(answer, expected)


def test_what_a_tokenizer_returns_can_be_passed_whole(fast):
    assert_same(fast, shared_model(), **tokenizer()(PROMPT, return_tensors="pt"), max_new_tokens=10)


def test_without_a_prompt_it_starts_from_bos(fast):
    answer = assert_same(fast, shared_model(), max_new_tokens=30)
    assert answer[0, 0] == stories260k.BOS and len(answer) == 1


def test_without_a_prompt_the_bos_keyword_counts(fast):
    assert assert_same(fast, shared_model(), bos_token_id=300, max_new_tokens=5)[0, 0] == 300


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_may_be_int32_and_come_back_as_int64(fast, dtype):
    assert assert_same(fast, shared_model(), ids().to(dtype), max_new_tokens=5).dtype == torch.int64


def test_a_ragged_batch_padded_left_gives_what_hugging_face_gives(fast):
    assert_same(fast, shared_model(), **batch(), max_new_tokens=25)


def test_a_batch_padded_by_tokenizer_pad_works(fast):
    rows = [{"input_ids": tokenizer()(text).input_ids} for text in PROMPTS]
    padded = tokenizer().pad(rows, padding=True, return_tensors="pt")
    assert_same(fast, shared_model(), **padded, max_new_tokens=10)


def test_each_row_of_a_batch_gives_what_it_gives_alone(fast):
    together = fast.generate(**batch(), max_new_tokens=20, eos_token_id=None)
    for row, text in enumerate(PROMPTS):
        alone = fast.generate(ids(text), max_new_tokens=20, eos_token_id=None)
        assert together[row, -20:].tolist() == alone[0, -20:].tolist()


def test_more_padding_than_needed_changes_nothing(fast):
    call = batch()
    wider = {
        "input_ids": torch.cat([torch.full((3, 4), 2), call["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(3, 4, dtype=torch.int64), call["attention_mask"]], 1),
    }
    answer = assert_same(fast, shared_model(), **wider, max_new_tokens=10)
    assert torch.equal(answer[:, 4:], fast.generate(**call, max_new_tokens=10))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_the_mask_may_have_any_dtype(fast, dtype):
    call = batch()
    expected = fast.generate(**call, max_new_tokens=6)
    call["attention_mask"] = call["attention_mask"].to(dtype)
    assert torch.equal(fast.generate(**call, max_new_tokens=6), expected)


def test_without_a_mask_it_is_inferred_from_a_pad_token_that_is_not_eos(fast):
    call = batch()
    ids_ = call["input_ids"].masked_fill(call["attention_mask"] == 0, 3)
    answer = assert_same(fast, shared_model(), ids_, pad_token_id=3, max_new_tokens=12)
    assert torch.equal(answer[:, -12:], fast.generate(**call, max_new_tokens=12)[:, -12:])
    assert fast.last_run.prompt_tokens == tuple(call["attention_mask"].sum(1).tolist())


def test_without_a_mask_a_pad_token_that_is_eos_counts_as_a_token(fast):
    prompts = batch()["input_ids"]
    assert_same(fast, shared_model(), prompts, max_new_tokens=12)
    assert fast.last_run.prompt_tokens == (prompts.shape[1],) * 3


def test_a_given_mask_of_ones_makes_pad_tokens_count(fast):
    ids_ = torch.cat([torch.full((1, 3), 3), ids()], 1)
    assert_same(
        fast, shared_model(), ids_, attention_mask=torch.ones_like(ids_), pad_token_id=3, max_new_tokens=8
    )


def test_fewer_rows_than_batch_size_may_follow_each_other_in_any_number(fast):
    for texts in (PROMPTS, PROMPTS[:1], PROMPTS[:2], PROMPTS):
        assert_same(fast, shared_model(), **batch(*texts), max_new_tokens=6)


def test_num_return_sequences_repeats_each_prompt_in_place(fast):
    call = batch(*PROMPTS[:2])
    answer = fast.generate(**call, num_return_sequences=2, do_sample=True, seed=1, max_new_tokens=12)
    expected = shared_model().generate(**call, num_return_sequences=2, do_sample=True, max_new_tokens=12)
    width = call["input_ids"].shape[1]
    assert torch.equal(answer[:, :width], expected[:, :width])
    assert answer[0].tolist() != answer[1].tolist()


def test_options_of_beams_and_of_hugging_faces_caches_have_no_effect(fast):
    neutral = dict(num_beams=1, use_cache=True, length_penalty=1.0, early_stopping=False, guidance_scale=1.0)
    assert_same(fast, shared_model(), ids(), max_new_tokens=5, synced_gpus=False, **neutral)


def test_sampling_options_do_nothing_to_greedy_decoding(fast):
    assert_same(
        fast, shared_model(), ids(), max_new_tokens=10, temperature=0.3, top_k=3, top_p=0.5, min_p=0.2
    )
