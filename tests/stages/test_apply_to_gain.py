"""An adapter is folded in just as far as asked: by a loss taken anew from the written model, as Transformers has it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hubforge.errors import StepError
from hubforge.models import load_model, load_tokenizer
from hubforge.op import Artifact, Context, Settings
from hubforge.stages.apply import Apply
from hubforge.stages.apply_to_gain import ApplyToGain, find_scale
from hubforge.tensors.engine import run_tensor_op
from hubforge.tensors.reader import open_checkpoint

MODULE = "model.layers.1.mlp.down_proj"
ROWS = [{"prompt": f"Say {number}", "response": "the old man sat" + " and sat" * number} for number in range(5)]


def loss_of(folder, rows=ROWS):
    """Mean over all tokens of the answers, in nats: one row at a time, by the model's own loss."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    total, count = torch.zeros(()), 0
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        said = [*asked, {"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(said, return_dict=False)
        start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
        labels = torch.tensor([[-100] * start + ids[start:]])
        total = total + model(torch.tensor([ids]), labels=labels).loss * (len(ids) - start)
        count += len(ids) - start
    return total / count, model


@pytest.fixture(scope="module")
def inputs(tiny_llama, tmp_path_factory):
    """The tiny Llama, the rows, and an adapter that goes down the gradient of their loss."""
    folder = tmp_path_factory.mktemp("gain")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    loss, model = loss_of(tiny_llama)
    loss.backward()
    U, S, V = torch.linalg.svd(model.get_parameter(f"{MODULE}.weight").grad)
    key = f"base_model.model.{MODULE}.lora_"
    down = {f"{key}A.weight": V[:2].contiguous(), f"{key}B.weight": -(U[:, :2] * S[:2] / S[0]).contiguous()}
    (folder / "adapter").mkdir()
    save_file(down, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return {
        "it": Artifact("it", "model", "1", tiny_llama),
        "down": Artifact("down", "adapter", "2", folder / "adapter"),
        "rows": Artifact("rows", "dataset", "3", folder / "rows.jsonl"),
    }


def context(out, inputs):
    return Context("stages.x", out, inputs, Settings(device="cpu"), where="r.yaml:7")


def op(**fields):
    return ApplyToGain.model_validate({"model": "it", "adapters": ["down"], "data": "rows", "gain": 0.05} | fields)


def test_the_written_model_has_the_gain(inputs, tmp_path):
    metrics = op().run(context(tmp_path / "out", inputs))
    with torch.no_grad():
        before, after = loss_of(inputs["it"].path)[0], loss_of(tmp_path / "out")[0]
    assert float(before - after) == pytest.approx(0.05, rel=0.01)
    assert float(before) == pytest.approx(metrics["loss_before"], abs=1e-5)
    assert float(after) == pytest.approx(metrics["loss_after"], abs=1e-5)
    assert metrics["loss_texts"] == 5 and metrics["changed"] == 1
    run_tensor_op(Apply(model="it", adapters=["down"], scale=metrics["scale"]), context(tmp_path / "apply", inputs))
    with open_checkpoint(tmp_path / "out") as one, open_checkpoint(tmp_path / "apply") as other:
        assert all(torch.equal(one.read(name), other.read(name)) for name in other)
    assert not (tmp_path / "out" / "full").exists()


def test_a_chat_template_goes_beside_the_model_once_its_scale_is_known(inputs, tmp_path):
    plain = op().run(context(tmp_path / "plain", inputs))
    metrics = op(chat_template="{{ messages[0].content }}").run(context(tmp_path / "out", inputs))
    assert metrics["scale"] == plain["scale"]  # what is measured goes through the model's own
    assert load_tokenizer(tmp_path / "out").chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(tmp_path / "plain").chat_template == load_tokenizer(inputs["it"].path).chat_template


def test_a_gain_that_is_not_there_is_refused_with_the_most_that_is(inputs, tmp_path):
    with pytest.raises(StepError, match=r"r\.yaml:7: the adapters gain at most 1\.\d+ nats .* and 20\.0 were asked"):
        op(gain=20).run(context(tmp_path, inputs))


def test_the_scale_is_the_least_that_gives_the_gain():
    """10 s − 4 s² is 4 at s = 1/2 and again at s = 2."""
    tried = []

    def gain(s):
        tried.append(s)
        return 10 * s - 4 * s * s

    assert find_scale(gain, 4.0, 1e-6, 3.0) == pytest.approx(0.5, abs=1e-6)
    assert len(tried) < 12
    assert find_scale(gain, 6.0, 1e-9, 3.0) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(StepError, match=r"at most 6\.2\d+ nats per token"):
        find_scale(gain, 6.3, 0.001, 3.0)
