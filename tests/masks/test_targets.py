"""What a mask covers by default, counted on Gemma 4 as it is, built on the meta device."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hubforge.adapters._modules import LINEARS as PEFT_LINEARS
from hubforge.adapters._modules import select as adapted
from hubforge.errors import StepError
from hubforge.lab.gemma4 import PUBLISHED
from hubforge.masks._targets import grouped, select
from hubforge.tensors.towers import decoder_name

Shapes = dict[str, tuple[int, ...]]
E4B, B31, A4B = PUBLISHED.values()


def on_meta(model: type[PreTrainedModel], config: PretrainedConfig) -> Shapes:
    """The checkpoint's tensors: a tied head is not in it."""
    with torch.device("meta"):
        built = model(config)
    tied = set(built.all_tied_weights_keys) if built.config.get_text_config().tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if name not in tied}


def shapes_of(sizes: dict[str, Any]) -> Shapes:
    return on_meta(Gemma4ForCausalLM, Gemma4TextConfig(**sizes))


@pytest.mark.parametrize(
    ("sizes", "matrices", "gigabytes"),
    [(E4B, 258, 7.78), (B31, 410, 58.57), (A4B, 205, 3.29)],
    ids=["E4B", "31B", "26B-A4B"],
)
def test_gemma_4_has_as_many_targets_as_published(sizes: dict[str, Any], matrices: int, gigabytes: float) -> None:
    shapes = shapes_of(sizes)
    targets = select(shapes, sizes)
    assert len(targets.names) == matrices
    # A Fisher in bfloat16: two bytes for each weight.
    assert sum(2 * math.prod(shapes[name]) for name in targets.names) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_the_experts_are_sixty_tensors_of_three_dimensions() -> None:
    shapes = shapes_of(A4B)
    experts = select(shapes, A4B, r"\.experts\.")
    assert len(experts.names) == 60
    assert {shapes[name] for name in experts.names} == {(128, 1408, 2816), (128, 2816, 704)}
    assert select(shapes, A4B).left_out["model.layers.*.experts.down_proj"] == 30
    assert sum(math.prod(shapes[name]) for name in experts.names) / 1e9 == pytest.approx(22.8, abs=0.05)


def test_the_multimodal_e4b_has_the_same_targets_and_its_decoder_alone_is_the_text_model() -> None:
    config = Gemma4Config(text_config=E4B, audio_config={}, vision_config={"use_clipped_linears": True})
    shapes = on_meta(Gemma4ForConditionalGeneration, config)
    targets = select(shapes, {"text_config": E4B})
    assert len(targets.names) == 258 and all(name.startswith("model.language_model.") for name in targets.names)
    assert any(name.startswith("model.vision_tower.") for name in targets.left_out)
    assert any(name.startswith("model.audio_tower.") for name in targets.left_out)
    kept = {decoder_name(name): shape for name, shape in shapes.items()}
    del kept[None]
    assert kept == shapes_of(E4B)  # `layer_scalar` buffers and per-layer embeddings included
    weights = {name: math.prod(shape) for name, shape in kept.items() if "layer_scalar" not in str(name)}
    assert sum(weights.values()) / 1e9 == pytest.approx(7.463, abs=5e-4)
    assert sum("layer_scalar" in str(name) for name in kept) == 42
    assert tuple(name + ".weight" for name in adapted(modules(shapes), PEFT_LINEARS, 64)) == targets.names


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL)),
        (MistralForCausalLM, MistralConfig(**SMALL)),
        (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
        (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
        (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL)),
        (
            Gemma3ForConditionalGeneration,
            Gemma3Config(
                text_config=SMALL,
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
            ),
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_seven_linears_a_layer_for_masks_and_adapters_alike(
    model: type[PreTrainedModel], config: PretrainedConfig
) -> None:
    shapes = on_meta(model, config)
    targets = select(shapes, config.to_dict())
    kinds = {tuple(name.split(".")[-3:-1]) for name in targets.names}
    assert len(targets.names) == 3 * 7 and len(kinds) == 7
    assert not any("vision" in name for name in targets.names)
    assert tuple(name + ".weight" for name in adapted(modules(shapes), PEFT_LINEARS, 8)) == targets.names


def modules(shapes: Shapes) -> Shapes:
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}


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
