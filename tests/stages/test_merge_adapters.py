"""`merge_adapters`: by hand, its laws, and beside PEFT: the bits of its factors, the products of its SVDs."""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.errors import SourceError, StepError
from hubforge.stages.merge_adapters import Combination, MergeAdapters
from hubforge.tensors.adapter import delta, open_adapter
from hubforge.tensors.peft_merge import combine, drop, generator_for


def deltas(folder):
    with open_adapter(folder) as adapter:
        return {name: delta(module, *adapter.factors(name)) for name, module in adapter.modules.items()}


def fields(way, **more):
    """An op's fields of that way, with a density where it prunes."""
    return {"combination_type": way} | ({} if way in ("linear", "cat", "svd") else {"density": 0.5}) | more


def embeddings(folder, base, seed):
    """A random LoRA of rank 4 on the embeddings, which PEFT saves beside it."""
    from hubforge.lab.tiny import tiny_lora

    tiny_lora(folder, base, rank=4, target_modules=("embed_tokens",))
    generator, file = torch.Generator().manual_seed(seed), folder / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any("base_layer" in name for name in tensors)
    for name in [name for name in tensors if "lora_embedding" in name]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 0.1
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_llama, tiny_loras, tmp_path_factory):
    """`tiny_loras`, and adapters with rsLoRA and with patterns of rank and alpha."""
    from hubforge.lab.tiny import tiny_lora

    folder = tmp_path_factory.mktemp("more")
    return tiny_loras | {
        "rs8": tiny_lora(folder / "rs8", tiny_llama, rank=8, seed=11, use_rslora=True),
        "mixed": tiny_lora(
            folder / "mixed", tiny_llama, 4, 12, rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 3}
        ),
        "mixed2": tiny_lora(folder / "mixed2", tiny_llama, 4, 14, rank_pattern={"up_proj": 6}),
        "tokens": embeddings(folder / "tokens", tiny_llama, 15),
        "tokens2": embeddings(folder / "tokens2", tiny_llama, 16),
        "few": tiny_lora(folder / "few", tiny_llama, rank=8, seed=13, target_modules=("q_proj", "down_proj")),
    }


@pytest.fixture
def merged(adapters, context, run_op):
    """Merges adapters by their names; gives the context and the metrics."""

    def merge(names, **fields):
        ctx = context(**{name: ("adapter", adapters[name]) for name in names})
        return ctx, run_op(MergeAdapters(adapters=names, **fields), ctx)

    return merge


@pytest.fixture
def peft_model(adapters, tiny_llama):
    """PEFT's model with adapters by their names."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(names):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(adapters[name], adapter_name=name)
        return model

    return load


@pytest.fixture
def by_peft(peft_model, tmp_path):
    """The folder of what PEFT's add_weighted_adapter makes."""

    def merge(names, weights, **options):
        model = peft_model(names)
        model.add_weighted_adapter(names, weights, "merged", **options)
        model.save_pretrained(tmp_path / "peft", selected_adapters=["merged"])
        return tmp_path / "peft" / "merged"

    return merge


def weighted_sum(adapters, weights):
    found = {}
    for folder, weight in zip(adapters, weights, strict=True):
        for name, values in deltas(folder).items():
            found[name] = found.get(name, 0) + weight * values.double()
    return found


def test_ways_are_pefts():
    from peft import LoraModel

    assert set(get_args(Combination)) == set(
        get_args(get_type_hints(LoraModel.add_weighted_adapter)["combination_type"])
    )


def test_ties_and_magnitude_prune_by_hand():
    one, two = torch.tensor([4.0, -1.0, 2.0, 0.1]), torch.tensor([-1.0, -3.0, 4.0, 0.2])
    # Half of each is kept: (4, 0, 2, 0) and (0, -3, 4, 0). Both agree on the third alone: (2 + 4 * 2) / 2.
    assert combine("magnitude_prune", [one, two], [1.0, 2.0], 0.5).tolist() == [4.0, -6.0, 10.0, 0.0]
    assert combine("ties", [one, two], [1.0, 2.0], 0.5).tolist() == [4.0, -6.0, 5.0, 0.0]
    assert combine("linear", [one, two], [1.0, 2.0]).tolist() == pytest.approx([2.0, -7.0, 10.0, 0.5])


def test_what_dare_keeps_is_divided_by_the_density():
    kept = drop(torch.ones(10_000), 0.25, generator_for(0, "q"))
    assert kept.unique().tolist() == [0.0, 4.0]
    assert kept.mean().item() == pytest.approx(1.0, abs=0.07)  # Four standard deviations of .0173.


def test_svd_by_hand(adapter_folder, context, run_op):
    one = adapter_folder("one", {"l.0.q": (torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]))})
    two = adapter_folder("two", {"l.0.q": (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]))})
    ctx = context(a=("adapter", one), b=("adapter", two))
    # The sum is diag(2 * 4, 1 * 6): rank 1 keeps 64 of the energy of 100.
    metrics = run_op(MergeAdapters(adapters=["a", "b"], weights=[4.0, 6.0]), ctx)
    torch.testing.assert_close(deltas(ctx.out)["l.0.q"], torch.diag(torch.tensor([8.0, 0.0])))
    assert metrics["rank"] == 1 and metrics["energy"]["error"] == pytest.approx(0.6)
    assert json.loads((ctx.out / "ranks.json").read_text())["l.0.q"]["kept"] == pytest.approx(0.64)


@pytest.mark.parametrize(("way", "rank"), [("svd", 18), ("svd", 30), ("linear", 18), ("cat", None)])
def test_sums_are_the_weighted_sum_when_the_rank_suffices(way, rank, adapters, merged):
    names, weights = ["one", "mixed", "rs"], [0.5, -1.5, 2.0]
    ctx, metrics = merged(names, weights=weights, combination_type=way, svd_rank=rank)
    assert metrics["rank"] == 8 + 6 + 4
    found = deltas(ctx.out)
    for name, expected in weighted_sum([adapters[name] for name in names], weights).items():
        # Factors rounded to float32, products of up to 18 of them near 0.05.
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["svd", "linear"])
def test_the_error_of_a_lower_rank_is_the_optimum_of_float64(way, adapters, merged):
    ctx, metrics = merged(["one", "two"], combination_type=way)
    assert metrics["rank"] == 8
    found, facts = deltas(ctx.out), json.loads((ctx.out / "ranks.json").read_text())
    for name, values in weighted_sum([adapters["one"], adapters["two"]], [1.0, 1.0]).items():
        S = torch.linalg.svdvals(values)
        optimum = float((S[8:] ** 2).sum().sqrt())
        assert float((values - found[name]).norm()) == pytest.approx(optimum, rel=1e-5)
        assert facts[name]["error"] == pytest.approx(optimum / float(S.norm()), rel=1e-5)


@pytest.mark.parametrize("way", get_args(Combination))
def test_one_adapter_is_itself_where_nothing_is_pruned(way, adapters, merged):
    more = {} if way in ("linear", "cat", "svd") else {"density": 1}
    ctx, _ = merged(["rs"], combination_type=way, **more)
    found = deltas(ctx.out)
    for name, values in deltas(adapters["rs"]).items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("way", "names", "weights", "options"),
    [
        ("linear", ["one", "two"], [0.7, 0.3], {}),
        ("linear", ["one", "rs8"], [0.7, -0.3], {}),
        ("linear", ["rs8", "few"], [1.0, 1.0], {}),
        ("magnitude_prune", ["one", "two"], [0.4, 0.6], {"density": 0.3}),
        ("magnitude_prune", ["one", "two", "rs8"], [-0.4, 1.6, 1.0], {"density": 0.7}),
        ("ties", ["one", "two", "rs8"], [0.4, 0.3, 0.3], {"density": 0.2}),
        ("ties", ["one", "few"], [2.0, -0.7], {"density": 0.5, "majority_sign_method": "frequency"}),
        ("svd", ["one"], [0.7], {}),
    ],
)
def test_factors_have_the_bits_of_pefts(way, names, weights, options, merged, by_peft, tensors_of):
    ctx, _ = merged(names, weights=weights, combination_type=way, compatible="peft", **options)
    expected = tensors_of(by_peft(names, weights, combination_type=way, **options))
    found = tensors_of(ctx.out)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)), name


def test_cat_has_the_bits_of_pefts(merged, by_peft, tensors_of):
    names, weights = ["one", "rs8", "low"], [0.7, -0.3, 1.1]
    # PEFT stores what `cat` makes in the base's type, here bfloat16.
    ctx, _ = merged(names, weights=weights, combination_type="cat", dtype="bfloat16")
    expected, found = tensors_of(by_peft(names, weights, combination_type="cat")), tensors_of(ctx.out)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)), name


@pytest.mark.parametrize(
    ("way", "names", "options"),
    [
        ("svd", ["one", "low", "few"], {}),
        ("svd", ["one", "low"], {"svd_rank": 3}),
        ("ties_svd", ["one", "low", "rs8"], {"density": 0.3}),
        ("ties_svd", ["one", "two"], {"density": 0.6, "majority_sign_method": "frequency", "svd_rank": 12}),
        ("magnitude_prune_svd", ["one", "low"], {"density": 0.3}),
    ],
)
def test_svds_have_the_products_of_pefts(way, names, options, merged, by_peft, tensors_of):
    weights = [0.7, -0.3, 1.1][: len(names)]
    ctx, _ = merged(names, weights=weights, combination_type=way, **options)
    expected, found = tensors_of(by_peft(names, weights, combination_type=way, **options)), tensors_of(ctx.out)
    assert expected.keys() == found.keys()
    for name in expected:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            wanted = expected[other].float() @ expected[name].float()
            # PEFT's SVD is in float32.
            torch.testing.assert_close(found[other] @ found[name], wanted, rtol=1e-4, atol=1e-6)
            assert found[name].shape == expected[name].shape


@pytest.mark.parametrize("way", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_has_pefts_numbers_from_the_same_state_of_the_generator(way, merged, peft_model, tensors_of):
    names, weights = ["one", "two"], [0.7, -0.3]
    ctx, _ = merged(names, weights=weights, combination_type=way, density=0.4)
    tuner, found = peft_model(names).base_model, tensors_of(ctx.out)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        target = tuner.model.get_submodule(module)
        torch.default_generator.set_state(generator_for(0, module).get_state())
        a, b = (found[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        if way.endswith("svd"):
            options = (way, names, weights, 8, target, None, None, 0.4, "total")
            wanted_a, wanted_b = tuner._svd_generalized_task_arithmetic_weighted_adapter(*options)
            torch.testing.assert_close(b @ a, (wanted_b @ wanted_a).detach(), rtol=1e-4, atol=1e-6)
        else:
            options = (way, names, weights, target, 0.4, "total")
            wanted_a, wanted_b = tuner._generalized_task_arithmetic_weighted_adapter(*options)
            assert torch.equal(a, wanted_a) and torch.equal(b, wanted_b)


def test_dare_depends_on_the_seed_alone(adapters, context, tensors_of):
    def digest(out, seed):
        from dataclasses import replace

        ctx = context(out=out, a=("adapter", adapters["one"]), b=("adapter", adapters["two"]))
        ctx = replace(ctx, seed=seed)
        MergeAdapters(adapters=["a", "b"], combination_type="dare_ties", density=0.5, seed=seed).run(ctx)
        return ctx.sha256["adapter_model.safetensors"]

    assert digest("first", 1) == digest("again", 1) != digest("other", 2)


def test_dare_draws_anew_for_each_module(adapter_folder, context, run_op, tensors_of):
    modules = {f"l.{layer}.q": (torch.ones(4, 64), torch.ones(64, 4)) for layer in (0, 1)}
    ctx = context(a=("adapter", adapter_folder("a", modules)))
    run_op(MergeAdapters(adapters=["a"], combination_type="dare_linear", density=0.5), ctx)
    found = tensors_of(ctx.out)
    one, other = (found[f"base_model.model.l.{layer}.q.lora_A.weight"] for layer in (0, 1))
    assert one.unique().tolist() == other.unique().tolist() == [0.0, 2.0] and not torch.equal(one, other)


def test_no_rank_exceeds_the_sides_of_a_matrix(adapter_folder, context, run_op, tensors_of):
    wide, narrow = (torch.ones(4, 8), torch.ones(6, 4)), (torch.ones(4, 8), torch.ones(2, 4))
    ctx = context(a=("adapter", adapter_folder("a", {"l.0.q": wide, "l.0.k": narrow})))
    run_op(MergeAdapters(adapters=["a"], combination_type="svd"), ctx)
    shapes = {name.split(".")[4]: list(t.shape) for name, t in tensors_of(ctx.out).items() if "lora_A" in name}
    assert shapes == {"q": [4, 8], "k": [2, 8]}


@pytest.mark.parametrize("compatible", ["peft", "none"])
def test_rslora_is_scaled_once_or_as_peft_does(compatible, adapters, merged, by_peft, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = ["rs8", "few"]
    ctx, _ = merged(names, combination_type="magnitude_prune", density=1, compatible=compatible)
    config = json.loads((ctx.out / "adapter_config.json").read_text())
    folder = by_peft(names, [1.0, 1.0], combination_type="magnitude_prune", density=1.0)
    wanted, found = deltas(folder), deltas(ctx.out)
    scale = 1.0 if compatible == "peft" else 8**0.5  # PEFT's is √rank too large.
    for name, values in wanted.items():
        torch.testing.assert_close(found[name] * scale, values, rtol=1e-5, atol=1e-7)
    assert config["use_rslora"] == (compatible == "peft")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), ctx.out)
    name = "model.layers.0.mlp.up_proj"
    module = model.base_model.model.get_submodule(name)
    torch.testing.assert_close(module.get_delta_weight("default"), found[name])
    if compatible == "none":  # `few` has no up_proj, so this is the one adapter's own.
        torch.testing.assert_close(found[name], deltas(adapters["rs8"])[name], rtol=1e-5, atol=1e-7)


def test_pefts_linear_is_no_sum(adapters, merged):
    """A fact of PEFT that the docstring states: cross terms of one adapter's B and another's A."""
    ctx, _ = merged(["one", "two"], combination_type="linear", compatible="peft")
    wanted = weighted_sum([adapters["one"], adapters["two"]], [1.0, 1.0])
    found = deltas(ctx.out)
    cosines = [
        float(torch.nn.functional.cosine_similarity(found[n].double().flatten(), wanted[n].flatten(), 0))
        for n in wanted
    ]
    assert max(cosines) < 0.85


def test_patterns_of_ranks_reload(merged, tiny_llama):
    """PEFT's own merge of them does not."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ctx, _ = merged(["mixed", "mixed2"], combination_type="magnitude_prune", density=0.5)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), ctx.out)
    for name, values in deltas(ctx.out).items():
        module = model.base_model.model.get_submodule(name)
        assert module.r["default"] == (6 if name.endswith("up_proj") else 4)
        torch.testing.assert_close(module.get_delta_weight("default"), values)


@pytest.mark.parametrize("way", ["linear", "svd", "ties_svd", "dare_ties_svd"])
def test_embeddings_as_in_peft(way, adapters, merged, peft_model):
    names, weights = ["tokens", "tokens2"], [0.7, -0.3]
    ctx, _ = merged(names, weights=weights, compatible="peft", **fields(way))
    tuner, module = peft_model(names).base_model, "model.embed_tokens"
    target = tuner.model.get_submodule(module)
    torch.default_generator.set_state(generator_for(0, module).get_state())
    if way.endswith("svd"):
        options = (way, names, weights, 4, target, None, None, 0.5, "total")
        a, b = tuner._svd_generalized_task_arithmetic_weighted_adapter(*options)
    else:
        a, b = tuner._generalized_task_arithmetic_weighted_adapter(way, names, weights, target, None, None)
    torch.testing.assert_close(deltas(ctx.out)[module], (b @ a).T.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_factors_need_one_rank(way, merged, adapters, context):
    message = rf"{way} needs one rank, but that of .* is 8 in one, 4 in low\n.*_svd"
    with pytest.raises(StepError, match=message):
        merged(["one", "low"], **fields(way))
    ctx = context(**{name: ("adapter", adapters[name]) for name in ("one", "low")})
    with pytest.raises(StepError, match=message):
        MergeAdapters(adapters=["one", "low"], **fields(way)).preflight(ctx)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"modules_to_save": ("input_layernorm",)}, r"one with whole modules \(base_model.*layernorm.weight\)"),
    ],
)
def test_what_is_no_plain_lora_is_sent_to_apply(more, named, tiny_llama, tmp_path, context, run_op):
    from hubforge.lab.tiny import tiny_lora

    folder = tiny_lora(tmp_path / "a", tiny_llama, **more)
    with pytest.raises(SourceError, match=f"{named}.*\n.*`op: apply` folds it"):
        run_op(MergeAdapters(adapters=["a"]), context(a=("adapter", folder)))


@pytest.mark.parametrize("way", ["svd", "ties", "ties_svd", "cat"])
def test_a_damaged_adapter_is_named(way, adapter_folder, context, run_op):
    sound = adapter_folder("sound", {"l.0.q": (torch.ones(1, 2), torch.ones(3, 1))})
    broken = adapter_folder("broken", {"l.0.q": (torch.full((1, 2), torch.inf), torch.ones(3, 1))})
    ctx = context(a=("adapter", sound), b=("adapter", broken))
    message = r"/broken/adapter_model.safetensors: base_model.model.l.0.q.lora_A.weight holds NaN or infinity"
    with pytest.raises(SourceError, match=message):
        run_op(MergeAdapters(adapters=["a", "b"], **fields(way)), ctx)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"combination_type": "ties"}, "ties prunes, so it needs density"),
        ({"combination_type": "cat", "density": 0.5}, "cat prunes nothing, so it takes no density"),
        ({"combination_type": "cat", "svd_rank": 4}, "cat reduces no rank, so it takes no svd_rank"),
        ({"combination_type": "linear", "svd_rank": 4, "compatible": "peft"}, "linear reduces no rank"),
        ({"majority_sign_method": "frequency"}, "svd elects no signs"),
        ({"weights": [1.0]}, "weights has 1 entries for 2 adapters"),
    ],
)
def test_fields_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        MergeAdapters(adapters=["a", "b"], **wrong)
