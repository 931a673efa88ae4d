"""What a mask covers by default, counted on Gemma 4 as it is, built on the meta device."""

import math
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from hubforge.errors import StepError
from hubforge.masks._targets import grouped, select

Shapes = dict[str, tuple[int, ...]]
E4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "hidden_size_per_layer_input": 256,
}
B31 = {
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}


def shapes_of(sizes: dict[str, Any]) -> Shapes:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma4TextConfig(
        vocab_size=262144,
        vocab_size_per_layer_input=262144,
        head_dim=256,
        global_head_dim=512,
        layer_types=kinds * (sizes["num_hidden_layers"] // 6),
        **sizes,
    )
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("sizes", "matrices", "gigabytes"), [(E4B, 258, 7.78), (B31, 410, 58.57)], ids=["E4B", "31B"])
def test_gemma_4_has_as_many_targets_as_published(sizes: dict[str, Any], matrices: int, gigabytes: float) -> None:
    shapes = shapes_of(sizes)
    targets = select(shapes, sizes)
    assert len(targets.names) == matrices
    # A Fisher in bfloat16: two bytes for each weight.
    assert sum(2 * math.prod(shapes[name]) for name in targets.names) / 1e9 == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_dead_keys_and_values_are_left_out_and_listed(prefix: str) -> None:
    """The Hub's E4B still holds them: 18 layers' k_proj and v_proj that nothing reads."""
    shapes = {name.replace("model.", prefix, 1): shape for name, shape in shapes_of(E4B).items()}
    for layer in range(24, 42):
        for kind in "kv":
            shapes[f"{prefix}layers.{layer}.self_attn.{kind}_proj.weight"] = (512, 2560)
    targets = select(shapes, {"text_config": E4B})
    assert len(targets.names) == 258
    assert targets.left_out[f"{prefix}layers.*.self_attn.k_proj.weight"] == 18
    assert targets.left_out[f"{prefix}layers.*.per_layer_input_gate.weight"] == 42
    # Nor does a pattern of one's own bring them back.
    assert len(select(shapes, {"text_config": E4B}, r"k_proj").names) == 24


def test_towers_experts_and_heads_are_not_linears_of_a_layer() -> None:
    shapes: Shapes = {
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": (8, 8),
        "model.vision_tower.encoder.layers.0.mlp.up_proj.weight": (8, 8),
        "model.language_model.layers.0.experts.gate_up_proj": (4, 8, 8),
        "model.language_model.layers.0.mlp.up_proj.weight": (8, 8),
        "model.language_model.layers.0.input_layernorm.weight": (8,),
        "lm_head.weight": (9, 8),
    }
    assert select(shapes, {}).names == ("model.language_model.layers.0.mlp.up_proj.weight",)
    assert select(shapes, {}, "experts").names == ("model.language_model.layers.0.experts.gate_up_proj",)


def test_layers_come_in_the_order_of_their_numbers() -> None:
    shapes: Shapes = {f"model.layers.{n}.mlp.up_proj.weight": (2, 2) for n in (10, 9, 2)}
    assert [name.split(".")[2] for name in select(shapes, {}).names] == ["2", "9", "10"]


def test_names_that_differ_by_numbers_are_counted_together() -> None:
    assert grouped(["a.2.b.10.w", "a.3.b.0.w", "c1.w"]) == {"a.*.b.*.w": 2, "c1.w": 1}


def test_nothing_to_cover_says_which_matrices_there_are() -> None:
    with pytest.raises(StepError, match=r"r.yaml:7: no matrix .* 'q_porj'\n  Matrices: a\.\*\.q_proj\.weight\."):
        select({"a.0.q_proj.weight": (2, 2), "norm": (2,)}, {}, "q_porj", "r.yaml:7")
