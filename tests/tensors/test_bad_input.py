"""What bad input gets: an error that names it, as early as can be, and nothing half-written taken for whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hubforge import catalog
from hubforge.errors import HubforgeError, SourceError, StepError
from hubforge.events import Warned
from hubforge.op import Artifact
from hubforge.stages._models import Models
from hubforge.stages.apply import Apply
from hubforge.stages.linear import Linear
from hubforge.stages.slerp import Slerp

NAME = "model.layers.0.mlp.up_proj.weight"
MEAN = Linear(models=["m", "o"])


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(checkpoint_folder, context):
    """pair(tensors of m, tensors of o, shards): a context with both."""

    def make(one, two, shards=1):
        folders = {"m": checkpoint_folder("one", one), "o": checkpoint_folder("two", two, shards=shards)}
        return context(**{name: ("model", folder) for name, folder in folders.items()})

    return make


def cut_a_shard(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def lose_a_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def edit_index(change):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def double_a_tensor(folder):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_a_shard, r"two/model-00002-of-00002.safetensors: the tensors end at byte \d+, but the file has \d+ .*'b'"),
        (lose_a_shard, r"index.json: shard model-00002-of-00002.safetensors is missing"),
        (edit_index(lambda found: found.pop("c")), "00001-of-00002.safetensors holds tensor 'c', which is not listed"),
        (edit_index(lambda found: found.pop("b")), r"index.json: lists nothing of model-00002-of-00002.safetensors"),
        (
            edit_index(lambda found: found.update(c="model-00002-of-00002.safetensors")),
            "tensor 'c' is not in model-00002-of-00002.safetensors",
        ),
        (double_a_tensor, "tensor 'a' is in model-00001-of-00002.safetensors and again in model-00002"),
    ],
    ids=[
        "truncated shard",
        "missing shard",
        "missing index entry",
        "missing last index entry",
        "wrong index entry",
        "tensor twice",
    ],
)
def test_damaged_checkpoints(damage, message, pair, run_op):
    tensors = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    ctx = pair(tensors, tensors, shards=2)
    damage(ctx.inputs["o"].path)
    with pytest.raises(SourceError, match=message):
        MEAN.preflight(ctx)  # Before any step of the recipe is begun.
    with pytest.raises(SourceError, match=message) as caught:
        run_op(MEAN, ctx)
    assert caught.value.exit_code == 4 and "fetch" in caught.value.mend.lower()
    assert not list(ctx.out.iterdir())  # Nothing was begun.


def test_shapes_that_differ_are_named_with_both_files(pair, run_op):
    ctx = pair({"a": torch.ones(2, 3)}, {"a": torch.ones(3, 2)})
    for step in (MEAN.preflight, lambda ctx: run_op(MEAN, ctx)):
        with pytest.raises(
            StepError, match=r"a is \[2, 3\] in .*one/model.safetensors, but a is \[3, 2\] in .*two/model"
        ):
            step(ctx)
    assert not list(ctx.out.iterdir())


def test_vocabularies_of_two_sizes_get_the_way_out(pair, run_op):
    ctx = pair({"model.embed_tokens.weight": torch.ones(3, 2)}, {"model.embed_tokens.weight": torch.ones(4, 2)})
    with pytest.raises(StepError, match=r"(?s)\[3, 2\].*\[4, 2\].*`tokenizer: base` \(or union\)"):
        run_op(MEAN, ctx)


def test_tokens_numbered_otherwise_are_warned_about(checkpoint_folder, context, run_op):
    said, folders = [], {}
    for name, vocab in {"m": {"a": 0, "b": 1, "c": 2}, "o": {"b": 0, "a": 1, "c": 2}}.items():
        folders[name] = checkpoint_folder(name, {"a": torch.ones(1)})
        (folders[name] / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    run_op(MEAN, context(report=said.append, **{name: ("model", folder) for name, folder in folders.items()}))
    texts = [event.text for event in said if isinstance(event, Warned)]
    assert texts[0] == "o numbers 2 of m's 3 tokens otherwise; `tokenizer: base` matches them by their text"


METHODS = [name for name in catalog.names("stages") if issubclass(catalog.find("stages", name), Models)]
FIELDS = {
    "slerp": {"model": "m", "to": "o", "t": 0.5},
    "task_arithmetic": {"model": "m", "models": ["o", "p"]},
    "nearswap": {"base_model": "m", "models": ["o"], "t": 0.01},
    "arcee_fusion": {"base_model": "m", "models": ["o"]},
    "nuslerp": {"models": ["m", "o"]},
    "ties_models": {"base_model": "m", "models": ["o", "p"], "density": 0.3},
    "sce": {"base_model": "m", "models": ["o", "p"], "select_topk": 0.3},
}


def method(name):
    """An op that reads m and o, and p if it can."""
    fields = catalog.find("stages", name).model_fields
    of_base = "base_model" in fields and fields["base_model"].is_required()
    given = {"base_model": "m", "models": ["o", "p"]} if of_base else {"models": ["m", "o", "p"]}
    if "density" in fields:
        given["density"] = 0.3
    return catalog.find("stages", name)(**FIELDS.get(name, given))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("ref", ["m", "o"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "fisher_average"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_or_infinity_in_an_input_is_named_by_every_method(name, ref, value, checkpoint_folder, context, run_op):
    base = numbers(0, 8, 16)
    tensors = {"m": base, "o": base + 0.1 * numbers(1, 8, 16), "p": base + 0.1 * numbers(2, 8, 16)}
    tensors[ref] = tensors[ref].clone()
    tensors[ref][3, 5] = value
    ctx = context(**{n: ("model", checkpoint_folder(n, {NAME: tensor})) for n, tensor in tensors.items()})
    with pytest.raises(StepError, match=rf"{NAME} of {ref} \(.*/{ref}/model.safetensors\) holds NaN or infinity"):
        run_op(method(name), ctx, 1)
    assert not (ctx.out / "model.safetensors").exists()


def test_nan_may_be_kept(pair, run_op, tensors_of):
    ctx = pair({"a": torch.tensor([1.0, float("nan")])}, {"a": torch.tensor([3.0, 1.0])})
    run_op(MEAN.model_copy(update={"nan": "keep"}), ctx)
    assert str(tensors_of(ctx.out)["a"].tolist()) == "[2.0, nan]"


@pytest.mark.parametrize("name", ["linear", "slerp", "ties_models", "task_arithmetic"])
def test_infinities_that_all_share_stay(name, checkpoint_folder, context, run_op, tensors_of):
    inf = float("inf")
    ctx = context(**{n: ("model", checkpoint_folder(n, {"clip": torch.tensor([-inf, 1.0, inf])})) for n in "mop"})
    run_op(method(name), ctx)
    assert tensors_of(ctx.out)["clip"].tolist() == [-inf, 1.0, inf]


def adapted(context, checkpoint_folder, adapter_folder, shape, base_name, said):
    adapter = adapter_folder("lora", {"layer": (numbers(0, 2, 4), numbers(1, 4, 2))}, base_model_name_or_path=base_name)
    ctx = context(
        m=("model", checkpoint_folder("m", {"layer.weight": torch.ones(shape)})),
        a=("adapter", adapter),
        report=said.append,
    )
    found = ctx.inputs["m"]
    ctx.inputs["m"] = Artifact(found.name, found.kind, found.key, found.path, origin={"repo": "org/this"})
    return ctx


def test_an_adapter_of_a_model_of_other_shapes(context, checkpoint_folder, adapter_folder, run_op):
    ctx = adapted(context, checkpoint_folder, adapter_folder, (4, 5), "org/that", [])
    message = r"(?s)the delta of layer is \[4, 4\], but layer.weight in .* is \[4, 5\].*trained on org/that"
    op = Apply(model="m", adapters=["a"])
    for step in (op.preflight, lambda ctx: run_op(op, ctx)):
        with pytest.raises(HubforgeError, match=message):
            step(ctx)


@pytest.mark.parametrize(
    ("base_name", "warned"), [("org/that", True), ("ORG/this", False), ("./out/that", False), ("", False)]
)
def test_an_adapter_of_a_model_of_another_name(base_name, warned, context, checkpoint_folder, adapter_folder, run_op):
    said = []
    ctx = adapted(context, checkpoint_folder, adapter_folder, (4, 4), base_name, said)
    run_op(Apply(model="m", adapters=["a"]), ctx)
    texts = [event.text for event in said if isinstance(event, Warned)]
    assert ("a was trained on org/that, and is applied to m, which is org/this" in texts) == warned


def test_a_model_whose_tensors_are_all_elsewhere(pair, run_op):
    ctx = pair({"a": torch.ones(2)}, {"b": torch.ones(2)})
    with pytest.raises(StepError, match=r"o has no tensor a, which m has|o has tensor b, which .* lacks"):
        run_op(Slerp(model="m", to="o", t=0.5), ctx)


def test_inputs_that_are_still_to_be_made_are_not_looked_at(pair):
    ctx = pair({"a": torch.ones(2, 3)}, {"a": torch.ones(3, 2)})
    del ctx.inputs["o"]
    MEAN.preflight(ctx)


def test_a_head_of_its_own_beside_a_base_that_ties_it(pair, run_op):
    embeddings = {"model.embed_tokens.weight": torch.ones(3, 2)}
    ctx = pair(embeddings, embeddings | {"lm_head.weight": torch.zeros(3, 2)})
    with pytest.raises(StepError, match=r"o has tensor lm_head.weight, which .* lacks\n  Name o first"):
        run_op(MEAN, ctx)
