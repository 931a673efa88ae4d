"""The op on tiny models: what it writes, what it leaks, and that a killed run ends as an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from hubforge.adapters._trainer import WHOLE, newest_checkpoint
from hubforge.errors import SourceError, StepError
from hubforge.events import Event, Note, Progress, Warned
from hubforge.models import load_model
from hubforge.op import Artifact, Context
from hubforge.tensors.adapter import delta, open_adapter
from hubforge.tensors.projection import Subspaces, leak
from tests.adapters.conftest import TWO, lora, make_mask

WEIGHTS = "adapter_model.safetensors"


def weights(ctx: Context) -> dict[str, torch.Tensor]:
    return load_file(ctx.out / WEIGHTS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_hundred_steps_of_adamw_leak_less_than_a_millionth(prepare):
    """Measured again from the files, with the product formed: not what the op says of itself."""
    ctx = prepare()
    metrics = lora(protect="core", max_steps=200, target_modules=TWO, weight_decay=0.01).run(ctx)
    mask = Subspaces(ctx.path("core"))
    with open_adapter(ctx.out) as adapter:
        assert len(adapter.modules) == metrics["leak"]["matrices"] == 4
        for name, module in adapter.modules.items():
            a, b = adapter.factors(name)
            found = leak(b.double() @ a.double() * module.scaling, mask.read(f"{name}.weight"))
            assert found.worst <= 1e-6
    assert metrics["leak"]["worst"] <= 1e-6
    assert metrics["loss"] < 0.8 * metrics["curve"][0][1]  # and it did learn


@pytest.mark.slow
def test_a_thousand_steps_of_adamw_leak_less_than_a_millionth(prepare):
    metrics = lora(protect="core", max_steps=1000).run(prepare())
    assert metrics["leak"]["matrices"] == 14 and metrics["leak"]["worst"] <= 1e-6


def test_the_published_hook_leaks_and_so_does_none(prepare):
    leaks = {}
    for how in ("published", "none"):
        metrics = lora(protect="core", projection=how, max_steps=20, target_modules=TWO).run(prepare(how))
        leaks[how] = metrics["leak"]
    assert leaks["published"]["mean_left"] > 0.05 and leaks["published"]["mean_right"] > 0.1
    assert leaks["none"]["mean_left"] > leaks["published"]["mean_left"]


def test_core_leaks_on_either_side_and_not_on_both(prepare):
    said: list[Event] = []
    metrics = lora(protect="core", projection="core", max_steps=20, target_modules=TWO).run(prepare(report=said.append))
    assert metrics["leak"]["mean_left"] > 0.1 and metrics["leak"]["mean_right"] > 0.1
    assert metrics["leak"]["worst_core"] < 2e-7
    told = [event.what for event in said if isinstance(event, Progress) and "leak" in event.what]
    assert all(float(what.rpartition(" ")[2]) < 2e-7 for what in told)  # It shows what the projection holds.


def test_what_is_written(prepare):
    from peft import PeftModel

    ctx = prepare()
    metrics = lora(protect="core").run(ctx)
    assert sorted(path.name for path in ctx.out.iterdir()) == [
        "adapter_config.json", WEIGHTS, "leak.json", "loss.json", "training.json",
    ]  # fmt: skip
    config = ctx.artifact("it").path
    assert str(config.parent) not in (ctx.out / "adapter_config.json").read_text()
    config = json.loads((ctx.out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", "c" * 40)
    training = json.loads((ctx.out / "training.json").read_text())
    assert {name: training[name] for name in ("corpus", "samples", "steps", "base", "projection")} == {
        "corpus": "rows", "samples": 40, "steps": 4, "base": "me/tiny", "projection": "two_sided",
    }  # fmt: skip
    assert training["tokens"] == metrics["tokens"] > training["loss_tokens"] > 0
    loss = json.loads((ctx.out / "loss.json").read_text())
    assert [row["step"] for row in loss["train"]] == [1, 2, 3, 4] == [step for step, _ in metrics["curve"]]
    leaks = json.loads((ctx.out / "leak.json").read_text())
    assert len(leaks["by_matrix"]) == 14 and leaks["worst"] == metrics["leak"]["worst"]
    # The first step's learning rate is 0, as warm-ups go, and B with it.
    assert [entry["step"] for entry in leaks["while_training"]] == [2, 3, 4]
    assert all(tensor.dtype == torch.float32 for tensor in weights(ctx).values())

    # PEFT's product on the model, and ours folded in, are the same function.
    base = ctx.path("it")
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), ctx.out)(ids).logits
        plain = load_model(base, dtype=torch.float32)
        before = plain(ids).logits
        with open_adapter(ctx.out) as adapter:
            for name, module in adapter.modules.items():
                plain.get_parameter(f"{name}.weight").add_(delta(module, *adapter.factors(name)))
        torch.testing.assert_close(plain(ids).logits, adapted, rtol=0, atol=1e-4)
    assert (before - adapted).abs().max() > 0.05


def test_hubforge_folds_the_adapter_in(prepare, tmp_path):
    from hubforge.run import execute
    from hubforge.stages.apply import Apply

    ctx = prepare()
    lora(target_modules=TWO).run(ctx)
    out = tmp_path / "folded"
    adapter = Artifact("chat", "adapter", "k", ctx.out)
    execute(Apply(model="it", adapters=["chat"]), Context("stages.tuned", out, {**ctx.inputs, "chat": adapter}))
    assert load_model(out).config.model_type == "llama"


def test_a_smaller_file_is_measured_as_it_is_stored(prepare):
    ctx = prepare()
    metrics = lora(protect="core", save_dtype="bfloat16", use_rslora=True).run(ctx)
    assert {tensor.dtype for tensor in weights(ctx).values()} == {torch.bfloat16}
    assert 1e-4 < metrics["leak"]["worst"] < 1e-2  # bfloat16 keeps 8 bits
    assert json.loads((ctx.out / "adapter_config.json").read_text())["use_rslora"] is True


class Stop(BaseException):
    """What a test raises in the middle of a run: nothing in the run may catch it."""


def stopping_at(step: int, said: list[Event] | None = None):
    def report(event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "step" and event.done == step:
            raise Stop

    return report


RESUMED = {
    "protect": "core",
    "dropout": 0.2,
    "max_steps": 9,
    "save_steps": 3,
    "target_modules": TWO,
    "warmup_ratio": 0.3,
}


@pytest.mark.parametrize("projection", ["two_sided", "scale"])
def test_a_stopped_run_ends_with_the_bits_of_an_undisturbed_one(prepare, projection):
    op = lora(**RESUMED, projection=projection, strength=0.5 if projection == "scale" else 1.0)
    whole, stopped = prepare("whole"), prepare("stopped", report=stopping_at(8))
    undisturbed = op.run(whole)
    with pytest.raises(Stop):
        op.run(stopped)
    assert newest_checkpoint(stopped.out / "state").name == "checkpoint-6"
    said: list[Event] = []
    again = prepare("stopped", report=said.append)
    resumed = op.run(again)
    assert any(isinstance(event, Note) and event.text == "resumed after step 6" for event in said)
    assert same(weights(whole), weights(again))
    assert (whole.out / "loss.json").read_bytes() == (again.out / "loss.json").read_bytes()
    assert (whole.out / "leak.json").read_bytes() == (again.out / "leak.json").read_bytes()
    for metrics in (undisturbed, resumed):
        metrics.pop("seconds_per_step")
    assert undisturbed == resumed


def stopped_after_training(event: Event) -> None:
    if isinstance(event, Note) and event.text.startswith("leak:"):
        raise Stop


def test_a_run_stopped_after_its_last_step_trains_no_more(prepare):
    whole, stopped = prepare("whole"), prepare("stopped", report=stopped_after_training)
    lora(**RESUMED).run(whole)
    with pytest.raises(Stop):
        lora(**RESUMED).run(stopped)
    said: list[Event] = []
    again = prepare("stopped", report=said.append)
    metrics = lora(**RESUMED).run(again)
    assert not any(isinstance(event, Progress) and event.unit == "step" for event in said)
    assert same(weights(whole), weights(again)) and metrics["steps"] == 9 and metrics["seconds_per_step"] is None
    assert (whole.out / "loss.json").read_bytes() == (again.out / "loss.json").read_bytes()


def test_a_checkpoint_that_a_kill_cut_short_is_not_taken_for_whole(tmp_path):
    for step, whole in ((3, True), (6, True), (9, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    assert newest_checkpoint(tmp_path).name == "checkpoint-6"
    assert not (tmp_path / "checkpoint-9").exists()
    assert newest_checkpoint(tmp_path / "nowhere") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from hubforge.events import Progress
from hubforge.op import Artifact, Context
from tests.adapters.conftest import lora
from tests.adapters.test_lora import RESUMED
def report(event):
    if isinstance(event, Progress) and event.unit == "step" and event.done == 8:
        os.kill(os.getpid(), signal.SIGKILL)
out, *paths = map(Path, sys.argv[1:])
names = zip(["it", "rows", "core"], ["model", "dataset", "mask"], paths)
inputs = {name: Artifact(name, kind, "k", path, origin={"repo": "me/tiny"}) for name, kind, path in names}
lora(**RESUMED).run(Context("adapters.chat", out, inputs, report=report))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_another_goes_on_from(prepare):
    whole, killed = prepare("whole"), prepare("killed")
    lora(**RESUMED).run(whole)
    paths = [killed.out, *(killed.path(name) for name in ("it", "rows", "core"))]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, paths)], cwd=root, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    lora(**RESUMED).run(killed)
    assert same(weights(whole), weights(killed))


def test_accumulating_gradients_is_a_larger_batch(prepare):
    """By plain descent: Adam would turn the rounding of a gradient near zero into a full step."""
    fields = {"protect": "core", "optim": "sgd", "learning_rate": 1.0, "target_modules": TWO}
    at_once, in_parts = prepare("at_once"), prepare("in_parts")
    lora(**fields, per_device_train_batch_size=4).run(at_once)
    lora(**fields, per_device_train_batch_size=1, gradient_accumulation_steps=4).run(in_parts)
    one, other = weights(at_once), weights(in_parts)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 1e-3


def test_checkpointing_and_autocast_leak_no_more(prepare):
    fields = {"protect": "core", "target_modules": TWO, "dtype": "auto"}
    metrics = lora(**fields, gradient_checkpointing=True, bf16=True, gradient_accumulation_steps=2).run(prepare())
    assert metrics["leak"]["worst"] < 2e-7


def test_packed_samples_do_not_see_one_another(prepare, chats):
    """One step by plain descent on packed rows moves the factors as on the samples in a batch of their own."""
    fields = {"optim": "sgd", "learning_rate": 1.0, "target_modules": TWO, "max_steps": 1, "warmup_ratio": 0.0}
    packed, alone = prepare("packed", chats[:8]), prepare("alone", chats[:8])
    lora(**fields, packing=True, max_length=256, per_device_train_batch_size=8).run(packed)
    lora(**fields, per_device_train_batch_size=8).run(alone)
    one, other = weights(packed), weights(alone)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 1e-3


def test_a_layer_learns_at_its_own_rate(prepare, tmp_path):
    """By a Fisher mask, and by what `op: layers` makes of it."""
    from hubforge.masks.layers import Layers

    masks = {name: tmp_path / name for name in ("fisher", "depth")}
    for folder in masks.values():
        folder.mkdir()
    facts = {str(layer): {"sum": total, "mean": total, "count": 1} for layer, total in ((0, 1), (1, 9))}
    (masks["fisher"] / "layer_importance.json").write_text(json.dumps({"layers": facts}))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(1)}, masks["fisher"] / "fisher.safetensors")
    fisher = Artifact("fisher", "mask", "k", masks["fisher"])
    Layers(mask="fisher").run(Context("masks.depth", masks["depth"], {"fisher": fisher}))

    found = []
    for name, folder in masks.items():
        ctx = prepare(name, **{name: Artifact(name, "mask", "k", folder)})
        lora(importance=name, target_modules=TWO).run(ctx)
        found.append(weights(ctx))
        moved = {key: float(tensor.abs().max()) for key, tensor in weights(ctx).items() if "lora_B" in key}
        assert all((size > 0) == (".layers.0." in key) for key, size in moved.items())
    assert same(*found)


def test_samples_that_are_cut_are_counted_and_told(prepare):
    said: list[Event] = []
    metrics = lora(target_modules=TWO, max_steps=1, max_length=30).run(prepare(report=said.append))
    warned = [event.text for event in said if isinstance(event, Warned)]
    assert metrics["truncated"] > 0 and metrics["longest"] > 30
    assert warned[0] == (
        f"{metrics['truncated']} of 40 samples are cut to 30 tokens (the longest has {metrics['longest']})"
    )


def letters() -> list[dict[str, str]]:
    """Strings of random letters: first one learns which letters there are, then the very strings, no help to others."""
    draw = random.Random(0)
    return [{"text": "".join(draw.choices("abcdefgh", k=12))} for _ in range(12)]


EARLY = {"target_modules": TWO, "learning_rate": 0.1, "lr_scheduler_type": "constant", "protect": "core"}
EARLY |= {"eval_share": 0.25, "eval_steps": 3}


def test_training_stops_when_what_is_held_out_gets_no_better_and_keeps_the_best(prepare):
    stopped, ending_there = prepare("stopped", letters()), prepare("ending_there", letters())
    metrics = lora(**EARLY, early_stopping_patience=2, max_steps=90).run(stopped)
    losses = [row["loss"] for row in json.loads((stopped.out / "loss.json").read_text())["eval"]]
    assert metrics["held_out"] == 3 and metrics["samples"] == 9
    assert metrics["stopped_early"] and metrics["steps"] < 90
    assert metrics["eval_loss"] == min(losses) == losses[-3] and metrics["best_step"] == metrics["steps"] - 6
    lora(**EARLY, max_steps=metrics["best_step"]).run(ending_there)
    assert same(weights(stopped), weights(ending_there))

    # Killed while its patience ran out, and again when all was trained: the same factors, and no step more.
    last = metrics["steps"]
    for report in (stopping_at(last - 1), stopped_after_training, lambda event: None):
        killed = prepare("killed", letters(), report=report)
        try:
            resumed = lora(**EARLY, early_stopping_patience=2, max_steps=90).run(killed)
        except Stop:
            continue
    assert (resumed["steps"], resumed["best_step"]) == (last, metrics["best_step"])
    assert same(weights(stopped), weights(killed))
    assert (stopped.out / "loss.json").read_bytes() == (killed.out / "loss.json").read_bytes()


def broken(model: Path, folder: Path) -> Path:
    """A copy of a model in which one weight is not a number."""
    shutil.copytree(model, folder)
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    tensors = load_file(folder / shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_a_number_stops_the_run(prepare, tiny_llama, tmp_path):
    ctx = prepare(model=broken(tiny_llama, tmp_path / "broken"))
    with pytest.raises(StepError, match="the loss is nan at step 1") as caught:
        lora(target_modules=TWO).run(ctx)
    assert "learning_rate" in caught.value.mend
    assert not (ctx.out / WEIGHTS).exists()


def test_it_is_silent_and_leaves_the_generators_alone(prepare, capfd):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    said: list[Event] = []
    lora(protect="core", target_modules=TWO, eval_share=0.1, eval_steps=2).run(prepare(report=said.append))
    assert torch.equal(torch.rand(1), expected)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    steps = [event for event in said if isinstance(event, Progress) and event.unit == "step"]
    assert [event.done for event in steps] == [1, 2, 3, 4] and "leak" in steps[-1].what


def test_the_seed_decides(prepare):
    runs = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        ctx = prepare(name)
        lora(target_modules=TWO, seed=seed, max_steps=2).run(ctx)
        runs[name] = weights(ctx)
    assert same(runs["one"], runs["same"]) and not same(runs["one"], runs["other"])


@pytest.mark.parametrize("model", ["tiny_gemma4", "tiny_gemma4_multimodal"])
def test_gemma_4_under_a_mask(request, prepare, tmp_path, model):
    folder = request.getfixturevalue(model)
    ctx = prepare(model=folder, mask=make_mask(tmp_path / "mask", folder))
    metrics = lora(protect="core", max_steps=3, per_device_train_batch_size=2).run(ctx)
    assert metrics["modules"] == metrics["leak"]["matrices"] == 24 and metrics["leak"]["worst"] < 2e-7


def test_dead_keys_and_values_need_no_protection(prepare, tiny_gemma4, tmp_path):
    """As E4B's files have them: in the checkpoint, in no mask, and not in the model that is trained."""
    folder, mask = tmp_path / "dead", make_mask(tmp_path / "mask", tiny_gemma4)
    shutil.copytree(tiny_gemma4, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    dead = {f"model.layers.{n}.self_attn.{part}_proj.weight": torch.ones(32, 64) for n in (2, 3) for part in "kv"}
    save_file(dead, folder / "dead.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(dead, "dead.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ctx = prepare(model=folder, mask=mask)
    lora(protect="core").preflight(ctx)
    assert lora(protect="core", max_steps=2).run(ctx)["modules"] == 24


def test_a_mask_that_the_subspace_op_made(prepare, tiny_llama, tiny_llama_other, tmp_path):
    from hubforge.masks.subspace import Subspace

    mask = tmp_path / "mask"
    mask.mkdir()
    inputs = {
        name: Artifact(name, "model", name, folder) for name, folder in (("a", tiny_llama), ("b", tiny_llama_other))
    }
    Subspace(instruct="b", pretrained="a", rank=8).run(Context("masks.core", mask, inputs))
    op, ctx = lora(protect="core", target_modules=TWO, max_steps=2), prepare(mask=mask)
    op.preflight(ctx)
    metrics = op.run(ctx)
    assert metrics["leak"]["matrices"] == 4 and metrics["leak"]["worst"] < 2e-7


def test_preflight_finds_a_mask_of_another_model(prepare, tiny_llama_256, tmp_path):
    ctx = prepare(mask=make_mask(tmp_path / "mask", tiny_llama_256))
    with pytest.raises(StepError, match=r"r\.yaml:9: model\.layers\.0\.\S+ is \[.*\] in the model, but"):
        lora(protect="core").preflight(ctx)


def test_preflight_finds_a_missing_column_and_a_tower(prepare, tiny_gemma4_multimodal):
    with pytest.raises(SourceError, match="no column 'story'"):
        lora(dataset_text_field="story").preflight(prepare())
    with pytest.raises(StepError, match="a tower"):
        lora(target_modules=["q_proj"]).preflight(prepare(model=tiny_gemma4_multimodal))
    with pytest.raises(StepError, match="rank 40 is larger"):
        lora(rank=40).preflight(prepare())
    lora(protect="core").preflight(prepare())


def test_preflight_finds_layers_of_another_model(prepare, tmp_path):
    (tmp_path / "layers.json").write_text('{"layers": {"0": {"sum": 1.0, "importance": 0.0}}}')
    ctx = prepare(depth=Artifact("depth", "mask", "d", tmp_path))
    with pytest.raises(StepError, match=r"r\.yaml:9: the importance mask has nothing for layer 1 \(model\.layers\.1"):
        lora(importance="depth").preflight(ctx)


def test_preflight_finds_a_mask_that_says_nothing_of_layers(prepare, tmp_path):
    (tmp_path / "fisher.pt").touch()
    for path in (tmp_path, tmp_path / "fisher.pt"):
        ctx = prepare(depth=Artifact("depth", "mask", "d", path))
        with pytest.raises(
            StepError, match=r"r\.yaml:9: depth has no layer_importance.*\n  Make its layers with `op: lay"
        ):
            lora(importance="depth").preflight(ctx)


def test_preflight_finds_that_there_is_no_chat_template(prepare, tiny_llama, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink()
    ctx = prepare(model=folder, instruct=Artifact("instruct", "model", "i", tiny_llama))
    with pytest.raises(SourceError, match="plain: the tokenizer has no chat template"):
        lora().preflight(ctx)
    lora(tokenizer="instruct").preflight(ctx)


def test_a_tokenizer_of_another_vocabulary_is_refused(prepare, tiny_gemma4):
    ctx = prepare(other=Artifact("other", "model", "o", tiny_gemma4))
    for refuse in (lora(tokenizer="other").preflight, lora(tokenizer="other").run):
        with pytest.raises(SourceError, match=r"another tokenizer than .*: \d+ tokens differ.*\n  Name a model"):
            refuse(ctx)


LAUNCHED = [
    ("WORLD_SIZE", "2", "starts its processes itself", "set `num_processes`"),
    ("ACCELERATE_USE_FSDP", "true", "under FSDP", "no slice can be projected"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "under DeepSpeed", "no slice can be projected"),
]


@pytest.mark.parametrize(("variable", "value", "what", "why"), LAUNCHED)
def test_several_processes_are_refused_with_the_reason(prepare, monkeypatch, variable, value, what, why):
    monkeypatch.setenv(variable, value)
    for refuse in (lora().preflight, lora().run):
        with pytest.raises(StepError, match=what) as caught:
            refuse(prepare())
        assert why in caught.value.mend


REFUSED = [
    ({"use_dora": True}, "DoRA rescales each column"),
    ({"modules_to_save": ["lm_head"]}, "would train lm_head whole"),
    ({"projection": "core", "protect": "core", "rank": 1}, "rank must be at least 2"),
    ({"projection": "twosided", "protect": "core"}, r"1 validation error for Lora\nprojection"),
    ({"projection": "left"}, "projection: left without `protect`: name the subspace mask"),
    ({"importance_floor": 0.1}, "importance_floor without `importance`"),
    ({"strength": 0.5}, "strength is for `projection: scale`"),
    ({"early_stopping_patience": 2}, "set eval_share"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ValidationError, match=message):
        lora(**fields)
