"""Which modules are adapted, what is refused, and the learning rate of each layer."""

import pytest

from hubforge.adapters._modules import LINEARS, in_checkpoint, in_model, rates, select
from hubforge.errors import StepError
from hubforge.models import load_model, read_config

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(("model", "count"), [("tiny_llama", 14), ("tiny_gemma4", 24), ("tiny_gemma4_multimodal", 24)])
def test_the_default_takes_the_decoder_linears_and_no_tower(request, model, count):
    """Gemma 4: 4 layers x 7, less keys and values of the two layers that share an earlier one's."""
    folder = request.getfixturevalue(model)
    found = select(in_model(load_model(folder)), LINEARS, 4)
    assert len(found) == count
    assert set(found) <= set(select(in_checkpoint(folder, read_config(folder)), LINEARS, 4))
    assert not any("tower" in name for name in found)


@pytest.mark.parametrize(
    "shapes",
    [lambda folder: in_checkpoint(folder, {}), lambda folder: in_model(load_model(folder))],
    ids=["file", "model"],
)
def test_a_list_of_seven_names_hits_the_towers_of_gemma4(tiny_gemma4_multimodal, shapes):
    with pytest.raises(StepError, match=r"r\.yaml:2: target_modules hits model\.\w+_tower.*: a tower") as caught:
        select(shapes(tiny_gemma4_multimodal), SEVEN, 4, "r.yaml:2")
    assert "from the start of the name" in caught.value.mend


def test_a_name_that_no_module_has_is_an_error_with_a_guess(tiny_llama):
    with pytest.raises(StepError, match="'q_project', which no module") as caught:
        select(in_checkpoint(tiny_llama, {}), ["q_project", "v_proj"], 4)
    assert "Did you mean 'q_proj'?" in caught.value.mend
    with pytest.raises(StepError, match="fits no module"):
        select(in_checkpoint(tiny_llama, {}), r"transformer\.h\..*", 4)


def test_heads_norms_and_too_high_a_rank_are_refused(tiny_llama):
    shapes = in_checkpoint(tiny_llama, {})
    with pytest.raises(StepError, match="lm_head; embeddings and heads"):
        select(shapes, ["lm_head"], 4)
    with pytest.raises(StepError, match=r"input_layernorm.*no linear layer"):
        select(shapes, ["input_layernorm"], 4)
    with pytest.raises(StepError, match=r"rank 40 is larger than .*k_proj, which is \[32, 64\]") as caught:
        select(shapes, LINEARS, 40)
    assert "at most 32" in caught.value.mend


FACTS = {"layers": {"0": {"sum": 1.0}, "1": {"sum": 2.0}, "2": {"sum": 5.0}}}
NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]


def test_learning_rates_by_hand():
    assert list(rates(FACTS, NAMES, 0.0).values()) == [1.0, 0.75, 0.0]
    assert list(rates(FACTS, NAMES, 0.1).values()) == [1.0, 0.75, 0.1]


def test_what_the_layers_op_found_is_taken_as_it_is():
    """Not stretched to [0, 1] again: a layer of importance .5 learns at half the rate though none has more."""
    facts = {"layers": {str(layer): {"sum": 9, "importance": value} for layer, value in enumerate((0.2, 0.5, 0.4))}}
    assert list(rates(facts, NAMES, 0.0).values()) == [0.8, 0.5, 0.6]
    with pytest.raises(StepError, match="outside"):
        rates({"layers": {"0": {"importance": 1.5}}}, NAMES[:1], 0.0)


def test_a_layer_without_importance_is_an_error():
    with pytest.raises(StepError, match="nothing for layer 3"):
        rates(FACTS, ["model.layers.3.mlp.up_proj"], 0.0)
    with pytest.raises(StepError, match="no number for each layer"):
        rates({"layers": {"0": 1}}, NAMES, 0.0)
    with pytest.raises(StepError, match="zero in every layer"):
        rates({"layers": {"0": {"sum": 0.0}}}, NAMES[:1], 0.0)
