"""The engine's promises: the same bytes whatever happens, a folder that loads, and clear words when it cannot be."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from hubforge.errors import SourceError, StepError, StoreError
from hubforge.events import Progress, Warned
from hubforge.op import ModelRef, Place, TensorOp
from hubforge.stages.apply import Apply
from hubforge.stages.linear import Linear
from hubforge.tensors import targets
from hubforge.tensors.reader import open_checkpoint
from hubforge.tensors.writer import JOURNAL


class Half(TensorOp):
    """Half the model: changes every tensor."""

    model: ModelRef

    def changes(self, name, present):
        return True

    def tensor(self, w, at):
        return w[self.model] / 2


class Centred(TensorOp):
    """The model with each tensor's mean taken away: needs a sum over the whole tensor first."""

    model: ModelRef

    def changes(self, name, present):
        return True

    def measures(self):
        return 1

    def measure(self, w, at):
        return {"sum": float(w[self.model].double().sum())}

    def tensor(self, w, at):
        return w[self.model] - at.totals["sum"] / max(1, torch.Size(at.shape).numel())


class Standardised(Centred):
    """The same divided by its spread, which a second pass finds about the mean that the first found."""

    def measures(self):
        return 2

    def measure(self, w, at):
        if at.turn == 0:
            return super().measure(w, at)
        mean = at.totals["sum"] / torch.Size(at.shape).numel()
        return {"squares": float((w[self.model].double() - mean).square().sum())}

    def combine(self, found, at):
        return at.totals | super().combine(found, at)

    def tensor(self, w, at):
        spread = (at.totals["squares"] / torch.Size(at.shape).numel()) ** 0.5
        return super().tensor(w, at) / (spread or 1.0)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 elements, so that toy tensors have many."""
    monkeypatch.setattr(targets, "BLOCK", 64)
    monkeypatch.setattr(targets, "PIECE", 3)


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "model.embed_tokens.weight": numbers(0, 40, 8).bfloat16(),
    **{f"model.layers.{i}.mlp.up_proj.weight": numbers(i + 1, 24, 8).bfloat16() for i in range(11)},
    "model.norm.weight": numbers(20, 8).float(),
    "model.layer_scalar": numbers(21),
    "model.experts": numbers(22, 3, 4, 5).half(),
}


@pytest.mark.parametrize(
    "op",
    [Half(model="m"), Centred(model="m"), Standardised(model="m")],
    ids=["one pass", "measured", "measured twice"],
)
def test_same_bytes_for_any_threads_and_input_shards(op, small_blocks, checkpoint_folder, context, run_op):
    single = checkpoint_folder("single", TENSORS)
    sharded = checkpoint_folder("sharded", dict(reversed(TENSORS.items())), shards=5)
    seen = []
    for i, (folder, threads) in enumerate([(single, 1), (single, 2), (sharded, 1), (sharded, 4)]):
        ctx = context(f"out{i}", m=("model", folder))
        run_op(op.model_copy(update={"max_shard_size": 2e-6}), ctx, threads)
        seen.append(digests(ctx.out))
        assert ctx.sha256.items() <= seen[-1].items()
        assert {name for name in seen[-1] if "safetensors" in name} == set(ctx.sha256)
    assert len(seen[0]) > 6
    assert seen[1:] == seen[:1] * 3


def test_a_later_pass_knows_what_the_earlier_found(small_blocks, checkpoint_folder, context, run_op, tensors_of):
    ctx = context(m=("model", checkpoint_folder("m", TENSORS)))
    run_op(Standardised(model="m", dtype="float32"), ctx)
    for name, tensor in tensors_of(ctx.out).items():
        if tensor.numel() > 1:
            wide = TENSORS[name].double()
            expected = (wide - wide.mean()) / wide.std(correction=0)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_a_pickled_base_gives_the_bytes_of_a_safetensors_one(small_blocks, checkpoint_folder, context, run_op):
    safe, pickled = checkpoint_folder("safe", TENSORS), checkpoint_folder("pickled", TENSORS)
    (pickled / "model.safetensors").unlink()
    torch.save(TENSORS, pickled / "pytorch_model.bin")
    one, two = context("one", m=("model", safe)), context("two", m=("model", pickled))
    run_op(Half(model="m"), one)
    run_op(Half(model="m"), two)
    assert digests(one.out) == digests(two.out)


def test_code_that_the_config_names_is_warned_about(checkpoint_folder, context, run_op):
    events = []
    config = {"model_type": "toy", "auto_map": {"AutoModel": "modeling_toy.Toy"}}
    ctx = context(m=("model", checkpoint_folder("m", TENSORS, config=config)), report=events.append)
    run_op(Half(model="m"), ctx)
    assert ["auto_map" in event.text for event in events if isinstance(event, Warned)] == [True]


def test_memory_does_not_grow_with_the_model(small_blocks, checkpoint_folder, context, run_op, monkeypatch):
    """No more rows are held at once than the threads' blocks: counted, since RSS of a test process says little."""
    from hubforge.tensors.reader import Checkpoint

    asked = []
    read_bytes = Checkpoint.read_bytes

    def counting(self, name, first, last):
        data = read_bytes(self, name, first, last)
        asked.append(data.numel())
        return data

    monkeypatch.setattr(Checkpoint, "read_bytes", counting)
    big = {f"model.layers.{i}.up.weight": numbers(i, 64, 16).bfloat16() for i in range(30)}
    run_op(Half(model="m"), context(m=("model", checkpoint_folder("m", big))))
    assert len(asked) == 30 * 16 and max(asked) == 64 * 2


def test_values_survive_blocks_shards_and_mixed_dtypes(small_blocks, checkpoint_folder, context, run_op, tensors_of):
    ctx = context(m=("model", checkpoint_folder("m", TENSORS, shards=3)))
    run_op(Half(model="m", max_shard_size=1e-6), ctx)
    found = tensors_of(ctx.out)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor / 2)  # halving is exact
    with open_checkpoint(ctx.out) as checkpoint:
        sizes = {"BF16": 2, "F16": 2, "F32": 4}
        assert all(info.start % sizes[info.dtype] == 0 for info in checkpoint.tensors.values())
    index = json.loads((ctx.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_dtype_is_that_of_the_recipe_and_of_the_config(checkpoint_folder, context, run_op, tensors_of):
    config = {"zeta": 1, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "alpha": [1e-05]}
    ctx = context(m=("model", checkpoint_folder("m", TENSORS, config=config)))
    run_op(Half(model="m", dtype="float16"), ctx)
    assert {tensor.dtype for tensor in tensors_of(ctx.out).values()} == {torch.float16}
    found = json.loads((ctx.out / "config.json").read_text())
    assert list(found) == list(config)
    assert (found["torch_dtype"], found["text_config"]["dtype"]) == ("float16", "float16")


def test_metrics_and_progress(checkpoint_folder, context, run_op):
    events = []
    ctx = context(m=("model", checkpoint_folder("m", TENSORS)), report=events.append)
    metrics = run_op(Half(model="m"), ctx)
    elements = sum(t.numel() for t in TENSORS.values())
    assert metrics["parameters"] == elements
    assert metrics["bytes"] == (ctx.out / "model.safetensors").stat().st_size
    assert metrics["dtype"] == "bfloat16"
    assert metrics["largest_tensor"] == {"name": "model.embed_tokens.weight", "bytes": 640}
    assert (metrics["gain"]["min"], metrics["gain"]["median"]) == (1.0, 1.0)  # halving loses nothing
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert (last.done, last.total, last.unit) == (last.total, sum(t.nbytes for t in TENSORS.values()), "B")


def test_effective_gain_counts_what_rounding_kept(checkpoint_folder, adapter_folder, context, run_op):
    # Next to 1 bfloat16 has steps of 2^-7: of the changes 2^-7 and 2^-10 the first survives, the second does not.
    model = checkpoint_folder("m", {"model.layers.0.up.weight": torch.ones(2, 1).bfloat16()})
    step = torch.tensor([[2.0**-7], [2.0**-10]])
    adapter = adapter_folder("a", {"model.layers.0.up": (torch.ones(1, 1), step)})
    events = []
    ctx = context(m=("model", model), a=("adapter", adapter), report=events.append)
    gain = run_op(Apply(model="m", adapters=["a"]), ctx)["gain"]
    expected = 2.0**-14 / (2.0**-14 + 2.0**-20)
    assert gain["min"] == round(expected, 4)
    assert gain["worst"] == [["model.layers.0.up.weight", round(expected, 4)]]


KILLED = textwrap.dedent("""
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from hubforge.op import Artifact, Context, ModelRef, TensorOp
    from hubforge.tensors import engine, targets

    targets.BLOCK, targets.PIECE = 64, 3
    calls = []

    class Centred(TensorOp):
        model: ModelRef
        def changes(self, name, present):
            return True
        def measures(self):
            return 1
        def measure(self, w, at):
            return {"sum": float(w[self.model].double().sum())}
        def tensor(self, w, at):
            calls.append(at)
            if len(calls) == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return w[self.model] - at.totals["sum"]

    folder = Path(sys.argv[1])
    for out, die_after in json.loads(sys.argv[2]):
        recorded = Path(out, "journal.jsonl").read_text().count("piece") if Path(out, "journal.jsonl").exists() else 0
        if Path(out, "journal.jsonl").exists() and die_after < 0:
            with Path(out, "journal.jsonl").open("ab") as file:  # a line that the kill tore
                file.write(b'00000000 {"piece": "model.norm.weight/0", "sum": 0')
        if (pid := os.fork()) == 0:
            ctx = Context("s", Path(out), {"m": Artifact("m", "model", "key", folder)})
            metrics = engine.run_tensor_op(Centred(model="m", max_shard_size=2e-6), ctx, threads=2)
            print(json.dumps({"calls": len(calls), "recorded": recorded, "metrics": metrics}), flush=True)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
""")


def test_killed_and_resumed_gives_the_same_bytes_and_repeats_no_finished_piece(checkpoint_folder, tmp_path):
    folder = checkpoint_folder("m", TENSORS, shards=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    runs = [(str(whole), -1), (str(killed), 20), (str(killed), 15), (str(killed), -1)]
    command = [sys.executable, "-c", KILLED, str(folder), json.dumps(runs)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    undisturbed, resumed = json.loads(lines[0]), json.loads(lines[4])
    assert [lines[1], *lines[2:4], lines[5]] == ["0", "-9", "-9", "0"]
    assert resumed["recorded"] >= 8
    # A piece is one to three blocks.
    assert resumed["calls"] <= undisturbed["calls"] - resumed["recorded"]
    assert resumed["metrics"] == undisturbed["metrics"]
    assert digests(killed) == digests(whole)


def killed_folder(checkpoint_folder, context, run_op):
    """A context whose folder holds a run that failed half way."""

    class Failing(Half):
        def tensor(self, w, at):
            if at.name == "model.layers.9.mlp.up_proj.weight":
                raise RuntimeError("half way")
            return super().tensor(w, at)

    Failing.__module__, Failing.__qualname__ = Half.__module__, Half.__qualname__
    ctx = context(m=("model", checkpoint_folder("m", TENSORS)))
    with pytest.raises(RuntimeError, match="half way"):
        run_op(Failing(model="m"), ctx, 1)
    return ctx


def test_bytes_lost_after_they_were_recorded_are_written_again(
    small_blocks, checkpoint_folder, context, run_op, tensors_of
):
    ctx = killed_folder(checkpoint_folder, context, run_op)
    partial = ctx.out / "model.safetensors.partial"
    content = bytearray(partial.read_bytes())
    at = bytes(content).index((TENSORS["model.embed_tokens.weight"] / 2).view(torch.uint8).numpy().tobytes())
    content[at + 5] ^= 1
    partial.write_bytes(content)
    run_op(Half(model="m"), ctx)
    assert all(torch.equal(found, TENSORS[name] / 2) for name, found in tensors_of(ctx.out).items())


def test_what_another_recipe_left_behind_is_not_continued(checkpoint_folder, context, run_op, tensors_of):
    ctx = killed_folder(checkpoint_folder, context, run_op)
    (ctx.out / "leftover.txt").write_text("old")
    run_op(Half(model="m", dtype="float32"), ctx)
    assert not (ctx.out / "leftover.txt").exists()
    assert all(torch.equal(found, TENSORS[name].float() / 2) for name, found in tensors_of(ctx.out).items())


def test_a_full_disk_is_found_before_anything_is_computed(checkpoint_folder, context, run_op, monkeypatch):
    ctx = context(m=("model", checkpoint_folder("m", TENSORS)))
    usage = shutil.disk_usage(ctx.out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match=r"\d,\d\d\d bytes are needed and 1,000 are free"):
        run_op(Half(model="m"), ctx)


def test_a_disk_that_fills_up_on_the_way_can_be_resumed(checkpoint_folder, context, run_op, monkeypatch, tensors_of):
    ctx = context(m=("model", checkpoint_folder("m", TENSORS)))
    pwrite, written = os.pwrite, []

    def filling(descriptor, data, offset):
        written.append(offset)
        if len(written) == 9:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(StoreError, match="the disk is full"):
            run_op(Half(model="m"), ctx)
    assert not (ctx.out / "model.safetensors").exists()
    run_op(Half(model="m"), ctx)
    assert all(torch.equal(found, TENSORS[name] / 2) for name, found in tensors_of(ctx.out).items())


def test_nan_in_an_input_is_named(checkpoint_folder, context, run_op):
    bad = TENSORS | {"model.norm.weight": torch.tensor([1.0, float("nan")])}
    ctx = context(m=("model", checkpoint_folder("m", bad)))
    with pytest.raises(StepError, match=r"model\.norm\.weight of m \(.*model\.safetensors\) holds NaN or infinity"):
        run_op(Half(model="m"), ctx)


def test_infinite_bounds_of_the_base_are_kept(checkpoint_folder, context, run_op, tensors_of):
    bounds = torch.tensor([-float("inf"), 2.0, float("inf")])
    ctx = context(m=("model", checkpoint_folder("m", {"clip": bounds})))
    run_op(Half(model="m"), ctx)
    assert tensors_of(ctx.out)["clip"].tolist() == [-float("inf"), 1.0, float("inf")]


def test_overflow_of_the_output_type_is_named(checkpoint_folder, context, run_op):
    ctx = context(m=("model", checkpoint_folder("m", {"w": torch.tensor([1e30]).bfloat16()})))
    with pytest.raises(StepError, match="w does not fit into float16"):
        run_op(Half(model="m", dtype="float16"), ctx)


def test_quantised_weights_are_refused_by_name(checkpoint_folder, context, run_op):
    weight = {"qweight": torch.ones(4, 2, dtype=torch.int32), "norm": torch.ones(2)}
    config = {"model_type": "toy", "quantization_config": {"quant_method": "gptq"}}
    ctx = context(
        m=("model", checkpoint_folder("m", weight, config=config)),
        o=("model", checkpoint_folder("o", {"weight": torch.ones(32, 2), "norm": torch.ones(2)})),
    )
    message = r"m is quantised by gptq: qweight in .*/m/model.safetensors is I32, which cannot be merged"
    for op in (Half(model="m"), Linear(models=["m", "o"], missing="base"), Linear(models=["o", "m"], missing="skip")):
        with pytest.raises(StepError, match=message):
            run_op(op, ctx)


def test_integers_of_a_plain_model_are_refused_by_name(checkpoint_folder, context, run_op):
    ctx = context(m=("model", checkpoint_folder("m", {"w": torch.ones(4, dtype=torch.uint8)})))
    with pytest.raises(StepError, match=r"w in .* is U8, which cannot be merged"):
        run_op(Half(model="m"), ctx)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_file_is_named(file, checkpoint_folder, context, run_op):
    folder = checkpoint_folder("m", TENSORS)
    (folder / file).unlink()
    with pytest.raises(SourceError, match=rf"the tokenizer is incomplete: there is no {file}"):
        run_op(Half(model="m"), context(m=("model", folder)))


def test_a_missing_config_is_named(checkpoint_folder, context, run_op):
    folder = checkpoint_folder("m", TENSORS)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"/m: there is no config.json\n  A model's folder has it"):
        run_op(Half(model="m"), context(m=("model", folder)))


def test_side_files_are_copied_and_leftovers_are_not(checkpoint_folder, context, run_op):
    folder = checkpoint_folder("m", TENSORS)
    kept = ["tokenizer.model", "chat_template.jinja", "merges.txt", "vocab.json", "generation_config.json", "LICENSE"]
    kept += ["special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json"]
    left = ["README.md", "optimizer.pt", "trainer_state.json", "training_args.bin", "modeling_x.py", "x.gguf"]
    for name in kept + left:
        (folder / name).write_text(f"{name}: {{ }}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    config = '{"model_type":   "toy" }\n'
    (folder / "config.json").write_text(config)
    ctx = context(m=("model", folder))
    run_op(Half(model="m"), ctx)
    expected = {*kept, "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in ctx.out.iterdir()} == expected | {"additional_chat_templates"}
    assert (ctx.out / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    assert (ctx.out / "config.json").read_text() == config  # unchanged to the space
    assert all((ctx.out / name).read_bytes() == (folder / name).read_bytes() for name in kept)


def test_interrupting_leaves_a_folder_to_resume_from(small_blocks, checkpoint_folder, context, run_op, tensors_of):
    class Interrupting(Half):
        def tensor(self, w, at):
            time.sleep(0.02)
            return super().tensor(w, at)

    Interrupting.__module__, Interrupting.__qualname__ = Half.__module__, Half.__qualname__

    def interrupt(event):
        if event.done:
            raise KeyboardInterrupt

    ctx = context(m=("model", checkpoint_folder("m", TENSORS)), report=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_op(Interrupting(model="m"), ctx)
    assert (ctx.out / JOURNAL).exists() and not (ctx.out / "model.safetensors").exists()
    run_op(Half(model="m"), context(m=("model", ctx.inputs["m"].path)))
    assert all(torch.equal(found, TENSORS[name] / 2) for name, found in tensors_of(ctx.out).items())


def test_a_tensor_op_is_a_pure_function():
    w = {"m": torch.tensor([2.0])}
    assert Half(model="m").tensor(w, Place("x")).tolist() == [1.0]
    assert w["m"].tolist() == [2.0]
