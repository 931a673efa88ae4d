"""Training in several processes: the same factors as in one, whatever else is asked for."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hubforge.adapters._modules import LINEARS
from hubforge.adapters._trainer import newest_checkpoint, reaches_all
from hubforge.errors import StepError
from hubforge.events import Event, Note, Progress
from hubforge.models import load_model
from hubforge.op import Artifact, Settings
from tests.adapters.conftest import TWO, lora, make_mask
from tests.adapters.test_lora import RESUMED, Stop, broken, same, stopped_after_training, stopping_at, weights


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal up to the order of float32 sums."""
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


# By plain descent: Adam would turn the rounding of a gradient near zero into a full step. Nine steps of four samples
# are an epoch, so that three are of the next.
DESCENT = {"protect": "core", "optim": "sgd", "learning_rate": 1.0, "target_modules": TWO, "max_steps": 12}
DESCENT |= {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "eval_share": 0.1, "eval_steps": 4}


def test_two_processes_are_one_that_accumulates_twice(prepare, capfd):
    said: list[Event] = []
    one, two = prepare("one"), prepare("two", report=said.append)
    alone = lora(**DESCENT, gradient_accumulation_steps=2).run(one)
    together = lora(**DESCENT, num_processes=2).run(two)
    assert close(weights(one), weights(two))
    assert max(tensor.abs().max() for name, tensor in weights(one).items() if "lora_B" in name) > 1e-2
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert len(together["eval_curve"]) == 3 and together["best_step"] == alone["best_step"]
    assert together["leak"]["worst"] <= 1e-6 and together["leak"]["matrices"] == alone["leak"]["matrices"] == 4
    assert sorted(path.name for path in two.out.iterdir()) == sorted(path.name for path in one.out.iterdir())

    steps = [event for event in said if isinstance(event, Progress) and event.unit == "step"]
    assert [event.done for event in steps] == list(range(1, 13)) and "leak" in steps[-1].what
    assert capfd.readouterr() == ("", "")


def losses(ctx) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, and the losses on what is held out."""
    found = json.loads((ctx.out / "loss.json").read_text())
    return [
        *((row["loss"], row["grad_norm"]) for row in found["train"]),
        *((row["loss"], 0.0) for row in found["eval"]),
    ]


# Whatever changes how a step is taken, at once.
EVERYTHING = RESUMED | {
    "packing": True,
    "max_length": 128,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "bf16": True,
    "eval_share": 0.2,
    "eval_steps": 3,
    "early_stopping_patience": 5,
    "importance": "layers",
    "importance_floor": 0.5,
    "num_processes": 2,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # Six processes, which import and load for ten seconds each on an idle machine.
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma4"])
def test_a_stopped_run_of_two_ends_with_the_bits_of_an_undisturbed_one(request, prepare, tmp_path, model):
    folder = request.getfixturevalue(model)
    facts = {"layers": {str(layer): {"importance": layer % 2} for layer in range(8)}}
    (tmp_path / "layers.json").write_text(json.dumps(facts))
    more = {"layers": Artifact("layers", "mask", "k", tmp_path), "model": folder}
    more["mask"] = make_mask(tmp_path / "mask", folder)
    op = lora(**EVERYTHING)
    whole, stopped = prepare("whole", **more), prepare("stopped", report=stopping_at(8), **more)
    undisturbed = op.run(whole)
    assert undisturbed["leak"]["worst"] <= 1e-6 and len(undisturbed["eval_curve"]) == 3
    with pytest.raises(Stop):
        op.run(stopped)
    newest = newest_checkpoint(stopped.out / "state")
    assert newest.name == "checkpoint-6" and {"rng_state_0.pth", "rng_state_1.pth"} <= {
        p.name for p in newest.iterdir()
    }
    said: list[Event] = []

    def report(event: Event) -> None:
        said.append(event)
        stopped_after_training(event)

    with pytest.raises(Stop):
        op.run(prepare("stopped", report=report, **more))
    assert [event.text for event in said if isinstance(event, Note)].count("resumed after step 6") == 1
    again = prepare("stopped", report=said.append, **more)
    taken = len(said)
    resumed = op.run(again)  # Nothing is left to train, so nothing is started.
    assert not any(isinstance(event, Progress) and event.unit == "step" for event in said[taken:])
    assert same(weights(whole), weights(again))
    for name in ("loss.json", "leak.json"):
        assert (whole.out / name).read_bytes() == (again.out / name).read_bytes()
    for metrics in (undisturbed, resumed):
        metrics.pop("seconds_per_step")
    assert undisturbed == resumed


class Mixture(torch.nn.Module):
    """Two experts, of which the second is chosen by no token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(2, 4).requires_grad_(False)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.experts[0](self.embed(input_ids)))


def test_factors_that_no_gradient_reaches_are_found():
    mixture = Mixture()
    assert not reaches_all(mixture)
    assert all(parameter.grad is None for parameter in mixture.parameters())
    mixture.experts[1].requires_grad_(False)
    assert reaches_all(mixture)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma4", "tiny_gemma4_multimodal"])
def test_gradients_reach_all_factors_of_the_usual_models(request, model):
    """Gemma 4's last layers have no keys and values of their own, and its towers no factors."""
    from peft import LoraConfig, get_peft_model

    base = load_model(request.getfixturevalue(model))
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=LINEARS, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).train()
    state = torch.get_rng_state()
    assert reaches_all(adapted) and adapted.training
    assert torch.equal(state, torch.get_rng_state())


DEVICES = [
    ("cuda", 3, "num_processes is 4, but 3 GPUs are visible", "Set `num_processes: 3`, or"),
    ("cuda", 1, "num_processes is 4, but 1 GPU is visible", "`num_processes: 1` with `gradient_accumulation_steps: 8`"),
    ("cuda", 0, "num_processes is 4, but 0 GPUs are visible", "Set `num_processes: 1`, or"),
    ("cuda:1", 8, "num_processes is 4, but cuda:1 is one device", "run with `--device cuda`"),
]


@pytest.mark.parametrize(("device", "seen", "what", "mend"), DEVICES)
def test_more_processes_than_gpus_are_refused_before_anything_is_loaded(prepare, monkeypatch, device, seen, what, mend):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    ctx = replace(prepare(), settings=Settings(device=device))
    op = lora(num_processes=4, gradient_accumulation_steps=2)
    for refuse in (op.preflight, op.run):
        with pytest.raises(StepError, match=rf"r\.yaml:9: {what}") as caught:
            refuse(ctx)
        assert mend in caught.value.mend


def test_as_many_processes_as_gpus_are_not_refused(prepare, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    lora(num_processes=2).preflight(replace(prepare(), settings=Settings(device="cuda")))


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_is_the_one_error_of_them_all(prepare, tiny_llama, tmp_path):
    ctx = prepare(model=broken(tiny_llama, tmp_path / "broken"))
    with pytest.raises(StepError, match=r"^the loss is nan at step 1") as caught:
        lora(num_processes=2, target_modules=TWO).run(ctx)
    assert "Lower `learning_rate`" in caught.value.mend


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_that_accumulates_twice(prepare):
    cuda = Settings(device="cuda")
    one, two = replace(prepare("one"), settings=cuda), replace(prepare("two"), settings=cuda)
    lora(**DESCENT, gradient_accumulation_steps=2).run(one)
    together = lora(**DESCENT, num_processes=2).run(two)
    assert close(weights(one), weights(two)) and together["leak"]["worst"] <= 1e-6
