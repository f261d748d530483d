"""How many launches a decode step takes: each is a node of the step's graph, and costs its gap."""

import pytest
import step_launches

import d3rt
from d3rt.kernels.cases import MODEL_SHAPES
from d3rt.plan import Plan

pytest.importorskip("triton", reason="triton is not installed")

LAYERS = {"SmolLM2-135M": 30, "Llama-3.2-1B": 16, "Llama-2-7B": 32}
PER_LAYER, PER_STEP = 5, 5
each_model = pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
each_policy = pytest.mark.parametrize("policy", [d3rt.FullDepth(), d3rt.D3(alpha=0.99, start=0.5)], ids=str)


def nodes(shape, plan: Plan) -> list[str]:
    return [launch.op for launch in step_launches.collect(80, shape, plan, "float16", 64).launches]


@each_policy
@each_model
def test_a_step_is_5_nodes_a_retained_layer_and_4_more(shape, policy):
    sets = policy.schedule(LAYERS[shape.name], 64).distinct
    assert len(sets) == 1 if isinstance(policy, d3rt.FullDepth) else len(sets) > 4
    for layer_set in sets:
        retained = len(layer_set.layers)
        assert (
            len(nodes(shape, Plan.of(layer_set)))
            == PER_LAYER * retained + 4
            <= PER_LAYER * retained + PER_STEP
        )


@each_model
def test_filling_a_window_of_skipped_layers_is_one_node_more(shape):
    layers = LAYERS[shape.name]
    for layer_set in d3rt.D3(alpha=0.99, start=0.5).schedule(layers, 64).distinct:
        skipped = [layer for layer in range(layers) if layer not in layer_set.layers]
        made = nodes(shape, Plan.of(layer_set, fill=skipped))
        assert made.count("kv_fill") == bool(skipped)
        assert len(made) <= PER_LAYER * len(layer_set.layers) + PER_STEP


@pytest.mark.parametrize("arch", [70, 75, 80, 86, 89, 90])
@pytest.mark.parametrize("width", ["float16", "int8", "int4 with minima"])
def test_so_it_is_on_every_architecture_and_at_every_width(arch, width):
    plan = Plan.of(d3rt.plan.LayerSet.of([0, 2], 3), fill=[1])
    shape = MODEL_SHAPES[0]
    assert [launch.op for launch in step_launches.collect(arch, shape, plan, width, 64).launches] == [
        *("embed", "norm_qkv_rope", "attention", "proj_add", "norm_gate_up", "proj_add", "kv_fill"),
        *("norm_qkv_rope", "attention", "proj_add", "norm_gate_up", "proj_add"),
        *("norm_logits", "sample", "advance"),
    ]
