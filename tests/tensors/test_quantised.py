"""8-bit floats with their scales: the values that Transformers gives them, and a plain model out of them."""

import json

import pytest
import torch

from hubforge.errors import SourceError
from hubforge.stages.linear import Linear
from hubforge.tensors.quantised import open_model

FP8 = torch.float8_e4m3fn


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(folder_of, weight, scale, suffix="_scale_inv", **settings):
    config = {"model_type": "toy", "dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"} | settings}
    folder = folder_of(
        "q", {"x.weight": weight, f"x.weight{suffix}": scale, "x.input_scale": torch.ones(1)}, config=config
    )
    return open_model(folder)


def test_by_hand(checkpoint_folder):
    weight = torch.tensor([[1.0, 2.0, 4.0], [8.0, -1.0, 0.5]]).to(FP8)
    with opened(checkpoint_folder, weight, torch.tensor([[10.0, 100.0]]), weight_block_size=[2, 2]) as found:
        assert list(found) == ["x.weight"]
        assert found.info("x.weight").dtype == "BF16"
        assert found.read("x.weight").tolist() == [[10.0, 20.0, 400.0], [80.0, -10.0, 50.0]]


@pytest.mark.parametrize("blocks", [(2, 2), (4, 1), (1, 1)], ids=str)
def test_blocks_as_transformers_reads_them(blocks, checkpoint_folder):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = numbers(0, 256, 384).to(FP8), numbers(1, *blocks).abs()
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.float32)
    with opened(checkpoint_folder, weight, scale) as found:
        assert torch.equal(found.read("x.weight"), expected)
        rows = [found.read_rows("x.weight", first, min(first + 100, 256)) for first in range(0, 256, 100)]
        assert torch.equal(torch.cat(rows), expected)
        as_bytes = found.read_bytes("x.weight", 3, 5).view(torch.bfloat16)
        assert torch.equal(as_bytes, expected[3:5].bfloat16().flatten())


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)], ids=str)
def test_one_scale_for_a_tensor_or_for_each_row(shape, checkpoint_folder):
    weight, scale = numbers(0, 6, 4).to(FP8), numbers(1, *shape).abs()
    expected = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))
    with opened(checkpoint_folder, weight, scale, "_scale") as found:
        assert torch.equal(torch.cat([found.read_rows("x.weight", 0, 4), found.read_rows("x.weight", 4, 6)]), expected)


def test_the_last_block_may_be_cut_off_and_experts_have_their_own(checkpoint_folder):
    weight, scale = numbers(0, 3, 200, 130).to(FP8), numbers(1, 3, 2, 2).abs()
    expected = weight.float().clone()
    for expert in range(3):
        for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            expected[expert, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[expert, i, j]
    with opened(checkpoint_folder, weight, scale, weight_block_size=[128, 128]) as found:
        assert torch.equal(torch.cat([found.read_rows("x.weight", i, i + 1) for i in range(3)]), expected)


def test_a_merge_of_them_is_a_plain_model(checkpoint_folder, context, run_op, tensors_of):
    weight, other = numbers(0, 4, 4).to(FP8), numbers(1, 4, 4).bfloat16()
    config = {"model_type": "toy", "dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    one = checkpoint_folder("one", {"x.weight": weight, "x.weight_scale": torch.tensor(0.5)}, config=config)
    two = checkpoint_folder("two", {"x.weight": other})
    ctx = context(m=("model", one), o=("model", two))
    run_op(Linear(models=["m", "o"]), ctx)
    found = tensors_of(ctx.out)
    assert torch.equal(found["x.weight"], ((weight.float() * 0.5 + other.float()) / 2).bfloat16())
    assert list(found) == ["x.weight"]
    assert json.loads((ctx.out / "config.json").read_text()) == {"model_type": "toy", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.weight": torch.ones(4, 4).to(FP8)}, "'x.weight' is F8_E4M3 and has no weight_scale"),
        (
            {"x.weight": torch.ones(4, 4).to(FP8), "x.weight_scale": torch.ones(3, 1)},
            r"'x.weight_scale' is F32 \[3, 1\], which does not fit 'x.weight' \[4, 4\]",
        ),
        (
            {"x.weight": torch.ones(4, 4).to(FP8), "x.weight_scale": torch.ones(4, 1, dtype=torch.uint8)},
            "'x.weight_scale' is U8",
        ),
    ],
)
def test_scales_that_do_not_fit(tensors, message, checkpoint_folder):
    with pytest.raises(SourceError, match=message):
        open_model(checkpoint_folder("q", tensors))


def test_scales_in_eight_bits_of_packed_weights_are_named_by_their_method(checkpoint_folder):
    tensors = {"x.weight_packed": torch.ones(4, 8, dtype=torch.uint8), "x.weight_scale": torch.ones(4, 1).to(FP8)}
    config = {"model_type": "toy", "quantization_config": {"quant_method": "compressed-tensors"}}
    message = "'x.weight_scale' is F8_E4M3 and has no .*; its model is quantised by compressed-tensors"
    with pytest.raises(SourceError, match=message):
        open_model(checkpoint_folder("nvfp4", tensors, config=config))
