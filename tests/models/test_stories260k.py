"""The 260k-parameter test model is read right: everything that uses it for exactness tests leans on that."""

import stories260k
import torch

# The beginning that greedy decoding from BOS must give, by the checkpoint's source.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


def greedy(model, new_tokens):
    bos = torch.tensor([[stories260k.BOS]])
    return model.generate(
        bos, attention_mask=torch.ones_like(bos), max_new_tokens=new_tokens, do_sample=False
    )


def test_greedy_text_from_bos_is_the_known_story():
    text = stories260k.decode(greedy(stories260k.load(), 100)[0])
    assert text.startswith(STORY)


def test_the_model_has_the_published_number_of_parameters():
    assert sum(weight.numel() for weight in stories260k.load().parameters()) == 260_032


def test_there_is_one_vocabulary_entry_per_embedding_row():
    model = stories260k.load()
    assert (
        len(stories260k.vocabulary())
        == model.config.vocab_size
        == model.get_input_embeddings().num_embeddings
    )


def test_the_classifier_is_the_embedding():
    model = stories260k.load()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_it_loads_in_bfloat16_too():
    model = stories260k.load(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert stories260k.decode(greedy(model, 20)[0]).startswith("Once upon a time")
