"""`drop_towers`, and merging Gemma 4: names that differ, per-layer embeddings and buffers that must come through."""

import json

import pytest
import torch

from hubforge.errors import StepError
from hubforge.stages.apply import Apply
from hubforge.stages.drop_towers import DropTowers
from hubforge.stages.slerp import Slerp
from hubforge.tensors.towers import decoder_name

TARGETS = r"^(?:.*\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)$"


@pytest.fixture(scope="module")
def gemma_lora(tiny_gemma4, tmp_path_factory):
    from hubforge.lab.tiny import tiny_lora

    return tiny_lora(tmp_path_factory.mktemp("gemma") / "lora", tiny_gemma4, rank=4, seed=7, target_modules=TARGETS)


def logits(folder, cls):
    model, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        return model(torch.arange(6, 30)[None]).logits


def test_the_decoder_alone_has_the_same_logits(tiny_gemma4_multimodal, context, run_op):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM, Gemma4ForConditionalGeneration

    ctx = context(m=("model", tiny_gemma4_multimodal))
    metrics = run_op(DropTowers(model="m"), ctx)
    assert metrics["changed"] == 0
    assert isinstance(AutoModelForCausalLM.from_pretrained(ctx.out), Gemma4ForCausalLM)
    whole, text = logits(tiny_gemma4_multimodal, Gemma4ForConditionalGeneration), logits(ctx.out, Gemma4ForCausalLM)
    assert torch.equal(whole, text)
    assert AutoTokenizer.from_pretrained(ctx.out)("dawn").input_ids


def test_config_is_edited_not_written_anew(tiny_gemma4_multimodal, context, run_op):
    ctx = context(m=("model", tiny_gemma4_multimodal))
    run_op(DropTowers(model="m"), ctx)
    before = json.loads((tiny_gemma4_multimodal / "config.json").read_text())
    after = json.loads((ctx.out / "config.json").read_text())
    assert after["architectures"] == ["Gemma4ForCausalLM"]
    assert {key: after[key] for key in before["text_config"]} == before["text_config"]
    assert after["dtype"] == "bfloat16" and after["transformers_version"] == before["transformers_version"]
    assert not any("vision" in key or "audio" in key for key in after)


def test_names_of_either_age():
    for name in ("model.language_model.layers.0.layer_scalar", "language_model.model.layers.0.layer_scalar"):
        assert decoder_name(name) == "model.layers.0.layer_scalar"
    assert decoder_name("lm_head.weight") == decoder_name("language_model.lm_head.weight") == "lm_head.weight"
    assert decoder_name("model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight") is None
    assert decoder_name("multi_modal_projector.mm_input_projection_weight") is None


def test_a_model_without_towers_is_refused_before_anything_is_written(tiny_llama, context, run_op):
    ctx = context(m=("model", tiny_llama))
    with pytest.raises(StepError, match="has no towers to drop: its text_config has model_type None"):
        run_op(DropTowers(model="m"), ctx)
    assert not list(ctx.out.iterdir())


def test_gemma_merge_is_pefts_and_keeps_buffers(tiny_gemma4, gemma_lora, context, run_op, tensors_of):
    from peft import PeftModel
    from transformers import Gemma4ForCausalLM

    ctx = context(m=("model", tiny_gemma4), a=("adapter", gemma_lora))
    run_op(Apply(model="m", adapters=["a"]), ctx)
    found, before = tensors_of(ctx.out), tensors_of(tiny_gemma4)
    base = Gemma4ForCausalLM.from_pretrained(tiny_gemma4, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, gemma_lora).merge_and_unload().state_dict()
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, merged[name]), name
        if "proj.weight" not in name or "per_layer" in name:
            assert torch.equal(tensor, before[name]), name
    assert sum("layer_scalar" in name for name in found) == 4
    logits(ctx.out, Gemma4ForCausalLM)


def test_any_stage_can_drop_them(tiny_gemma4_multimodal, gemma_lora, context, run_op):
    """As a field of a merge: the same files as the merge and then `op: drop_towers`."""
    folded = context("folded", m=("model", tiny_gemma4_multimodal), a=("adapter", gemma_lora))
    run_op(Apply(model="m", adapters=["a"]), folded)
    after = context("after", m=("model", folded.out))
    run_op(DropTowers(model="m"), after)
    at_once = context("at_once", m=("model", tiny_gemma4_multimodal), a=("adapter", gemma_lora))
    run_op(Apply(model="m", adapters=["a"], drop_towers=True), at_once)
    files = [{path.name: path.read_bytes() for path in ctx.out.iterdir()} for ctx in (after, at_once)]
    assert files[0] == files[1]


def test_a_text_adapter_fits_the_multimodal_base(tiny_gemma4_multimodal, gemma_lora, context, run_op, tensors_of):
    """Folding before or after dropping the towers gives the same bytes."""
    first = context("dropped", m=("model", tiny_gemma4_multimodal))
    run_op(DropTowers(model="m"), first)
    after = context("after", m=("model", first.out), a=("adapter", gemma_lora))
    run_op(Apply(model="m", adapters=["a"]), after)
    folded = context("folded", m=("model", tiny_gemma4_multimodal), a=("adapter", gemma_lora))
    metrics = run_op(Apply(model="m", adapters=["a"]), folded)
    before = context("before", m=("model", folded.out))
    run_op(DropTowers(model="m"), before)
    assert metrics["changed"] > 20
    assert after.sha256 == before.sha256


def test_slerp_of_a_multimodal_model_with_a_text_model(
    tiny_gemma4_multimodal, tiny_gemma4, context, run_op, tensors_of
):
    ctx = context(m=("model", tiny_gemma4_multimodal), o=("model", tiny_gemma4))
    with pytest.raises(StepError, match=r"o has no tensor model\.audio_tower"):
        run_op(Slerp(model="m", to="o", t=1.0), ctx)
    run_op(Slerp(model="m", to="o", t=1.0, missing="base"), ctx)
    found, text, towers = tensors_of(ctx.out), tensors_of(tiny_gemma4), tensors_of(tiny_gemma4_multimodal)
    for name, tensor in found.items():
        short = name.replace("model.language_model.", "model.")
        assert torch.equal(tensor, text.get(short, towers[name])), name
