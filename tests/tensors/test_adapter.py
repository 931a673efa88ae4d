"""Reading adapters: names across prefixes, scalings, and everything that is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hubforge.errors import SourceError
from hubforge.tensors.adapter import delta, dora_delta, open_adapter
from hubforge.tensors.names import canonical, layer_of, natural_order
from hubforge.tensors.reader import open_checkpoint

A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0], [100.0]])  # rank 1, 2 -> 3


def only_delta(folder, **rows):
    with open_adapter(folder) as adapter:
        (name,) = adapter.modules
        return delta(adapter.modules[name], *adapter.factors(name), **rows)


def test_delta_is_the_scaled_product(adapter_folder):
    folder = adapter_folder("a", {"layers.0.q": (A, B)}, lora_alpha=3)
    assert only_delta(folder).tolist() == [[3, 6], [30, 60], [300, 600]]
    assert only_delta(folder, first=1, last=2).tolist() == [[30, 60]]


def test_conv1d_layers_store_the_transpose(adapter_folder):
    folder = adapter_folder("a", {"h.0.c_attn": (A, B)}, fan_in_fan_out=True)
    assert only_delta(folder).tolist() == [[1, 10, 100], [2, 20, 200]]
    assert only_delta(folder, first=1, last=2).tolist() == [[2, 20, 200]]


@pytest.mark.parametrize("flag", [True, False])
def test_the_base_tells_which_layers_are_transposed(flag, adapter_folder, checkpoint_folder):
    shapes = {"h.0.c_attn": (2, 3), "h.0.c_proj": (3, 3), "lm_head": (3, 3), "score": (3, 2)}
    inputs = {"h.0.c_attn": 2, "h.0.c_proj": 3, "lm_head": 3, "score": 2}
    modules = {name: (torch.ones(1, size), torch.ones(3, 1)) for name, size in inputs.items()}
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    config = {"model_type": "gpt2", "dtype": "float32"}
    folder = checkpoint_folder("m", tensors, config=config)
    # The flag of an adapter that PEFT made for both kinds is that of the last of them.
    with open_checkpoint(folder) as base, open_adapter(adapter_folder("a", modules, fan_in_fan_out=flag)) as adapter:
        found = {name: module.transposed for name, module in adapter.on(base).items()}
    assert found == {name: name.startswith("h.") for name in tensors}


def test_embeddings_are_transposed_too(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{key}A": A, f"{key}B": B}, tmp_path / "adapter_model.safetensors")
    assert only_delta(tmp_path).tolist() == [[1, 10, 100], [2, 20, 200]]


def test_dora_gives_each_output_its_magnitude():
    base, change = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    by_row = dora_delta(base, change, torch.tensor([10.0, 2.0]))
    assert (base + by_row).tolist() == [[6, 8], [0, 2]]
    # Stored transposed, the outputs are columns: of length 3, and the root of 17.
    by_column = dora_delta(base, change, torch.tensor([6.0, 17.0**0.5]), torch.tensor([3.0, 17.0**0.5]))
    assert (base + by_column).tolist() == [[6, 4], [0, 1]]


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.1\..*": 2}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.0.self_attn.q_proj": 1.0}}, 0.25),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"self_attn.q_proj": 4}}, 2.0),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 4.0),
    ],
)
def test_scaling(config, scaling, adapter_folder):
    factors = torch.ones(4, 2), torch.ones(3, 4)
    with open_adapter(adapter_folder("a", {"model.layers.0.self_attn.q_proj": factors}, **config)) as adapter:
        assert adapter.modules["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(scaling)


@pytest.mark.parametrize("trained_on", ["model.", "model.language_model.", "language_model.model.", ""])
@pytest.mark.parametrize("base_prefix", ["model.", "model.language_model.", "language_model.model."])
def test_names_match_across_prefixes(trained_on, base_prefix, adapter_folder, checkpoint_folder):
    tensors = {
        f"{base_prefix}layers.0.q.weight": torch.zeros(3, 2),
        "model.vision_tower.encoder.layers.0.q.weight": torch.zeros(5, 5),
    }
    with (
        open_checkpoint(checkpoint_folder("m", tensors)) as base,
        open_adapter(adapter_folder("a", {f"{trained_on}layers.0.q": (A, B)})) as adapter,
    ):
        assert list(adapter.on(base)) == [f"{base_prefix}layers.0.q.weight"]


def test_a_module_the_base_lacks(adapter_folder, checkpoint_folder):
    with open_checkpoint(checkpoint_folder("m", {"model.layers.0.q.weight": torch.zeros(3, 2)})) as base:
        folder = adapter_folder("a", {"model.layers.7.q": (A, B)}, base_model_name_or_path="org/other")
        with (
            open_adapter(folder) as adapter,
            pytest.raises(SourceError, match=r"changes model\.layers\.7\.q, but .*\n.*trained on org/other"),
        ):
            adapter.on(base)
        with (
            open_adapter(adapter_folder("b", {"lm_head": (A, B)})) as adapter,
            pytest.raises(SourceError, match="output head is tied to the embeddings"),
        ):
            adapter.on(base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": "yes"}, "use_dora is 'yes', not true or false"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list of names"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is .1, 2., which is not supported"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is 'pissa_niter_16': it was trained beside a base",
        ),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"r": 0}, "r is 0, not a positive whole number"),
        ({"r": True}, "r is True, not a positive whole number"),
        ({"r": "8"}, "r is '8', not a positive whole number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', not true or false"),
        ({"rank_pattern": [1]}, "rank_pattern is not a map"),
        ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\] is 1.5"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a regular expression"),
        ({"r": 2}, r"layers\.0\.q: lora_A is \[1, 2\] and lora_B \[3, 1\], but adapter_config.json gives rank 2"),
    ],
)
def test_configs_that_are_refused(config, message, adapter_folder):
    with pytest.raises(SourceError, match=message):
        _ = open_adapter(adapter_folder("a", {"layers.0.q": (A, B)}, **config)).modules


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.lora_A.weight": A}, "x has no lora_B"),
        (
            {"x.lora_A.weight": A, "x.lora_B.weight": B, "x.lora_magnitude_vector": B},
            "x.lora_magnitude_vector' is no LoRA",
        ),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B, "norm.weight": B}, "norm.weight' is no LoRA factor"),
        ({"x.lora_A.weight": torch.ones(1, 2, 3, 3), "x.lora_B.weight": B}, "not convolutions"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B, "y.base_layer.weight": B}, "base's weights of y, but no LoRA"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B, "x.base_layer.weight": B}, r"F32 \[3, 1\], but its delta is"),
        ({"x.lora_A.weight": A.int(), "x.lora_B.weight": B}, "is I32, not a float"),
        ({}, "the adapter has no tensors"),
    ],
)
def test_tensors_that_are_refused(tensors, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    save_file(
        {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(SourceError, match=message):
        _ = open_adapter(tmp_path).modules


def test_a_pickled_adapter_is_read_with_weights_only(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    key = "base_model.model.layers.0.q.lora_{}.weight"
    torch.save({key.format("A"): A, key.format("B"): B}, tmp_path / "adapter_model.bin")
    assert only_delta(tmp_path).tolist() == [[1, 2], [10, 20], [100, 200]]


def test_no_adapter(tmp_path):
    with pytest.raises(SourceError, match="no such adapter folder"):
        open_adapter(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(SourceError, match="is not a JSON object"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"the adapter has no adapter_model\.safetensors"):
        open_adapter(tmp_path)


def test_names():
    assert canonical("model.language_model.layers.0.q.weight") == canonical("language_model.model.layers.0.q.weight")
    assert canonical("lm_head.weight") == "lm_head.weight"
    assert layer_of("model.language_model.layers.12.mlp.up_proj.weight") == 12
    of_layer_3 = ["transformer.h.3.attn.c_attn.weight", "gpt_neox.layers.3.mlp.dense_h_to_4h.bias"]
    of_layer_3 += ["backbone.layers.3.mixer.A_log", "transformer.encoder.layers.3.input_layernorm.weight"]
    of_layer_3 += [f"{model}encoder.layer.3.attention.self.query.weight" for model in ("", "bert.", "roberta.")]
    of_layer_3 += ["distilbert.transformer.layer.3.ffn.lin1.weight", "model.decoder.layers.3.fc1.weight"]
    of_layer_3 += ["encoder.block.3.layer.0.SelfAttention.q.weight", "h.3.ln_1.bias", "model.encoder.layers.3.fc1.bias"]
    assert {layer_of(name) for name in of_layer_3} == {3}
    towers = [
        "visual.blocks.3.norm1.weight",
        "model.vision_model.encoder.layers.3.fc1.bias",
        "audio_tower.layers.3.fc1",
    ]
    assert {layer_of(name) for name in towers} == {None}
    assert layer_of("model.vision_tower.encoder.layers.3.mlp.up_proj.weight") is None
    assert layer_of("model.embed_tokens.weight") is None
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed", "layers.2"]
    assert sorted(names, key=natural_order) == ["embed", "layers.2", "layers.2.a", "layers.2.b", "layers.10.a"]
