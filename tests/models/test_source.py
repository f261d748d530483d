"""Where weights come from: a model that somebody uses is left alone, one that nobody has is emptied as it is read."""

import pytest
import tiny_models
import torch

import d3rt
from d3rt import quantize
from d3rt.errors import UnsupportedModelError
from d3rt.kernels.packing import FORMATS, PackedMatrix, pack
from d3rt.models import family_of, source
from d3rt.models.source import OwnedModule, SharedModule


def held(model):
    """Bytes of the storages that a model's parameters lie in."""
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


class Watched(OwnedModule):
    """Notes how much of the model is there whenever something is taken."""

    def __init__(self, model):
        super().__init__(model)
        self.before = []

    def take(self, name, width):
        self.before.append(held(self.model))
        return super().take(name, width)


@pytest.mark.parametrize("width", ["int8", torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-window"])
def test_a_model_that_nobody_has_lets_go_of_each_parameter_as_it_is_taken(name, width):
    model = tiny_models.fresh(name, **tiny_models.PACKABLE)
    expected = family_of(model.config).weights(
        SharedModule(tiny_models.fresh(name, **tiny_models.PACKABLE)), width, width
    )
    watched = Watched(model)
    made = family_of(model.config).weights(watched, width, width)
    sizes = watched.before
    assert all(less < more for more, less in zip(sizes, sizes[1:], strict=False))
    assert held(model) == 0
    for ours, theirs in zip(made.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("width", ["int8", torch.bfloat16, torch.float32])
def test_weights_are_moved_to_another_device_one_by_one(monkeypatch, width):
    """The meta device stands for a GPU here."""
    model = tiny_models.fresh("llama-biases", **tiny_models.PACKABLE)
    kept, left = len(family_of(model.config).widths(model, width, width)), []

    def noting(matrix, device):
        left.append(held(model))
        return quantize.on_device(matrix, device)

    monkeypatch.setattr("d3rt.models.family.on_device", noting)
    made = family_of(model.config).weights(OwnedModule(model), width, width, "meta")
    assert {tensor.device.type for tensor in made.tensors()} == {"meta"}
    assert len(left) == kept and all(less < more for more, less in zip(left, left[1:], strict=False))


def test_a_model_may_be_where_its_weights_will_be_and_nowhere_else():
    model = tiny_models.fresh("llama").to("meta")
    SharedModule(model, "meta")
    with pytest.raises(UnsupportedModelError, match="on device 'meta'.*model.cpu()"):
        SharedModule(model)


@pytest.mark.parametrize("width", ["int4", torch.float16])
def test_a_model_that_somebody_uses_keeps_every_parameter(width):
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    d3rt.compile(model, weights=width)
    for name, parameter in model.named_parameters():
        address, values = before[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, values), name


def test_what_cannot_be_packed_is_refused_before_anything_is_taken():
    model = tiny_models.fresh("llama", **(tiny_models.PACKABLE | dict(intermediate_size=89)))
    before = held(model)
    with pytest.raises(UnsupportedModelError, match="down_proj.*89 columns"):
        family_of(model.config).weights(OwnedModule(model), "int8", "int8")
    assert held(model) == before


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_skeleton_has_the_names_shapes_and_ties_of_the_model_and_no_memory(name):
    model = tiny_models.make(name)
    made = source.skeleton(model.config)
    theirs, ours = source.parameters(model), source.parameters(made)
    assert {key: p.shape for key, p in ours.items()} == {key: p.shape for key, p in theirs.items()}
    assert source.is_tied(made) is source.is_tied(model)
    assert {p.device.type for p in ours.values()} == {"meta"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 37, 64, 100])
@pytest.mark.parametrize("values", [1, 40 * 64, 1 << 20], ids=["a tile", "some tiles", "all"])
def test_packing_in_slabs_gives_what_packing_at_once_gives(monkeypatch, format, rows, values):
    monkeypatch.setattr(quantize, "SLAB_VALUES", values)
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    slabs, whole = quantize.convert("w", weight, format), pack(weight, format)
    assert slabs.shape == whole.shape and (slabs.minima is None) is (whole.minima is None)
    for ours, theirs in zip(quantize.tensors_of(slabs), quantize.tensors_of(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("width", FORMATS)
def test_a_backend_that_packs_is_given_every_matrix_that_is_packed(width):
    model = tiny_models.fresh("llama", **tiny_models.PACKABLE)
    given = []

    def watched(weight, format):
        given.append((tuple(weight.shape), format))
        return quantize.pack_in_slabs(weight, format)

    made = family_of(model.config).weights(SharedModule(model), width, "int8", pack=watched)
    matrices = [part for layer in made.layers for part in layer.parts() if isinstance(part, PackedMatrix)]
    assert sorted(given) == sorted(
        [(m.shape, width) for m in matrices] + [(m.shape, "int8") for m in {made.embed, made.lm_head}]
    )
