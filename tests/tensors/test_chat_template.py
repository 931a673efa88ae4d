"""The chat template of a merge: whose it is, in which file, and through a pass of several stages."""

import json

import pytest
import torch

from hubforge.op import Context, Fused
from hubforge.stages.linear import Linear
from hubforge.stages.passthrough import Passthrough
from hubforge.stages.slerp import Slerp
from hubforge.tensors.chat_template import chosen_template, template_of

ONE, TWO = "{{ messages[0] }} one", "{{ messages[0] }} two"


@pytest.fixture
def folder(checkpoint_folder):
    """A model with that template, in today's file."""

    def make(name, template):
        made = checkpoint_folder(name, {"w": torch.ones(2, dtype=torch.bfloat16)})
        if template:
            (made / "chat_template.jinja").write_text(template)
        return made

    return make


def files(folder):
    return {path.name for path in folder.glob("*template*")}


def test_by_default_the_files_of_the_base_stay(folder, context, run_op):
    base = folder("a", None)
    config = json.dumps({"chat_template": ONE, "bos_token": "<s>"})
    (base / "tokenizer_config.json").write_text(config)
    ctx = context(a=("model", base), b=("model", folder("b", TWO)))
    run_op(Linear(models=["a", "b"]), ctx)
    assert files(ctx.out) == set() and (ctx.out / "tokenizer_config.json").read_text() == config
    assert template_of(ctx.out) == ONE


def test_a_text_replaces_every_template_that_is_there(folder, context, run_op):
    base = folder("a", ONE)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": ONE}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text(ONE)
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": ONE, "bos_token": "<s>"}))
    ctx = context(a=("model", base), b=("model", folder("b", ONE)))
    run_op(Linear(models=["a", "b"], chat_template=TWO), ctx)
    assert files(ctx.out) == {"chat_template.jinja"} and template_of(ctx.out) == TWO
    assert json.loads((ctx.out / "tokenizer_config.json").read_text()) == {"chat_template": TWO, "bos_token": "<s>"}


def test_transformers_finds_it(tiny_llama, tiny_llama_other, context, run_op):
    from transformers import AutoTokenizer

    ctx = context(a=("model", tiny_llama), b=("model", tiny_llama_other))
    run_op(Slerp(model="a", to="b", t=0.5, chat_template="{{ messages[0]['content'] }}!"), ctx)
    tokenizer = AutoTokenizer.from_pretrained(ctx.out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "Hello!"


def test_of_two_that_are_as_common_the_bases_counts(folder, context):
    ctx = context(a=("model", folder("a", ONE)), b=("model", folder("b", TWO)))
    assert chosen_template(Linear(models=["a", "b"], chat_template="auto"), ctx) == ONE
    assert chosen_template(Linear(models=["b", "a"], chat_template="auto"), ctx) == TWO


def test_stacked_layers_take_one_too(tiny_llama, context, run_op):
    ctx = context(a=("model", tiny_llama))
    run_op(Passthrough(slices=[{"model": "a", "layers": [0, 1]}], chat_template=TWO), ctx)
    assert template_of(ctx.out) == TWO
    run_op(Passthrough(slices=[{"model": "a", "layers": [0, 1]}], chat_template="auto"), ctx)
    assert template_of(ctx.out) == template_of(tiny_llama).strip()


def test_a_stage_without_files_hands_its_template_on(folder, context):
    ctx = context(a=("model", folder("a", ONE)), b=("model", folder("b", None)), c=("model", folder("c", ONE)))

    def over(inner, op):
        fused = Fused(inner, ctx)
        outer = Context(name="stages.outer", out=ctx.out, inputs=ctx.inputs, fused={"inner": fused})
        return chosen_template(op, outer)

    told = Linear(models=["a", "b"], chat_template=TWO)
    silent = Linear(models=["b", "a"])
    assert over(told, Slerp(model="inner", to="c", t=0.5)) == TWO
    assert over(told, Slerp(model="c", to="inner", t=0.5)) is None  # The other model's: the base's files stay.
    assert over(told, Slerp(model="inner", to="c", t=0.5, chat_template=ONE)) == ONE
    assert over(told, Linear(models=["inner", "a", "c"], chat_template="auto")) == ONE
    assert over(silent, Linear(models=["inner", "b"], chat_template="auto")) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatml", "'chatml' is no template: give `auto`, or the text of one in Jinja"),
        ("{% for x in messages %}\n{{ x }", "is no template that Jinja reads: .* \\(line 2 of it\\)"),
    ],
)
def test_what_is_no_template(template, message):
    with pytest.raises(ValueError, match=message):
        Linear(models=["a", "b"], chat_template=template)


def test_transformers_own_tags_are_known():
    text = "{% for m in messages %}{%- generation -%}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    assert Linear(models=["a", "b"], chat_template=text).chat_template == text
