"""Configurations of mergekit as recipes: what each becomes, that it loads and runs, and what is said to be lost."""

import json
from pathlib import Path

import jinja2
import pytest
import torch
import yaml

from hubforge.errors import RecipeError
from hubforge.mergekit import import_mergekit
from hubforge.recipe import load
from hubforge.session import write_import
from hubforge.tensors.schedule import value_at


def imported(text, tmp_path):
    """Sources, stages and losses; the recipe is one that `hubforge check` takes."""
    recipe, losses = import_mergekit(text)
    (tmp_path / "recipe.yaml").write_text(recipe)
    load(tmp_path / "recipe.yaml")
    data = yaml.safe_load(recipe)
    return data["sources"], data["stages"], losses


def test_ties_as_in_mergekits_readme(tmp_path):
    sources, stages, losses = imported(
        """
        models:
          - model: psmathur/orca_mini_v3_13b
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: garage-bAInd/Platypus2-13B
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: WizardLM/WizardMath-13B-V1.0@v2
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: TheBloke/Llama-2-13B-fp16
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
        tmp_path,
    )
    assert sources["WizardMath-13B-V1.0"] == {"model": "WizardLM/WizardMath-13B-V1.0", "revision": "v2"}
    assert stages == {
        "merged": {
            "op": "ties_models",
            "base_model": "Llama-2-13B-fp16",
            "models": ["orca_mini_v3_13b", "Platypus2-13B", "WizardMath-13B-V1.0"],
            "weights": [1.0, [0, 0.3, 0.7, 1], {"*mlp*": 0.5, "default": 0}],
            "density": [[1, 0.7, 0.1], 0.5, 0.33],
            "normalize": True,
            "dtype": "float16",
        }
    }
    assert losses == []


def test_slerp_with_filters_and_gradients(tmp_path):
    _, stages, losses = imported(
        """
        slices:
          - sources:
              - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 40]}
              - {model: garage-bAInd/Platypus2-13B, layer_range: [0, 40]}
        merge_method: slerp
        base_model: psmathur/orca_mini_v3_13b
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5 # fallback for rest of tensors
        dtype: bfloat16
        """,
        tmp_path,
    )
    t = {"*self_attn*": [0, 0.5, 0.3, 0.7, 1], "*mlp*": [1, 0.5, 0.7, 0.3, 0], "default": 0.5}
    ends = {"model": "orca_mini_v3_13b", "to": "Platypus2-13B"}
    assert stages == {"merged": {"op": "slerp", **ends, "t": t, "dtype": "bfloat16"}}
    assert losses == ["layer_range [0, 40] is taken to be all layers"]


def test_layers_stacked(tmp_path):
    _, stages, losses = imported(
        """
        slices:
          - sources:
            - model: psmathur/orca_mini_v3_13b
              layer_range: [0, 24]
          - sources:
            - model: garage-bAInd/Platypus2-13B
              layer_range: [20, 40]
              parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}
        merge_method: passthrough
        dtype: float16
        """,
        tmp_path,
    )
    assert stages["merged"]["slices"] == [
        {"model": "orca_mini_v3_13b", "layers": [0, 24]},
        {"model": "Platypus2-13B", "layers": [20, 40], "scale": {"*o_proj*": 0.0, "default": 1.0}},
    ]
    assert losses == []


def test_slices_of_merges(tmp_path):
    _, stages, _ = imported(
        """
        merge_method: linear
        slices:
          - sources: [{model: a/a, layer_range: [0, 4], parameters: {weight: 1}}]
          - sources:
              - {model: a/a, layer_range: [4, 8], parameters: {weight: 1}}
              - {model: b/b, layer_range: [4, 8], parameters: {weight: 3}}
        """,
        tmp_path,
    )
    assert list(stages) == ["merged-2", "merged"]
    assert stages["merged-2"] == {"op": "linear", "models": ["a", "b"], "weights": [1, 3]}
    assert stages["merged"]["slices"] == [{"model": "a", "layers": [0, 4]}, {"model": "merged-2", "layers": [4, 8]}]


def test_slices_of_other_places_and_gradients_over_a_slice_are_cut_out_first(tmp_path):
    _, stages, losses = imported(
        """
        merge_method: linear
        slices:
          - sources: [{model: a/a, layer_range: [0, 4]}]
          - sources:
              - {model: a/a, layer_range: [4, 8], parameters: {weight: [1, 0]}}
              - {model: b/b, layer_range: [2, 6], parameters: {weight: 3}}
        """,
        tmp_path,
    )
    assert stages["a-4-8"] == {"op": "passthrough", "slices": [{"model": "a", "layers": [4, 8]}]}
    assert stages["merged-2"] == {"op": "linear", "models": ["a-4-8", "b-2-6"], "weights": [[1, 0], 3]}
    assert stages["merged"]["slices"] == [{"model": "a", "layers": [0, 4]}, {"model": "merged-2", "layers": [0, 4]}]
    assert losses == []


@pytest.mark.parametrize(
    ("method", "parameters", "weight"),
    [
        ("passthrough", "{scale: [{filter: o_proj, value: 0}, {value: 1}]}", {"*o_proj*": 0, "default": 1}),
        ("passthrough", "{scale: [0, 2]}", [0, 2]),
        ("passthrough", "{}", None),
        ("linear", "{weight: 3}", None),
        ("linear", "{weight: 3, normalize: false}", 3),
    ],
)
def test_a_single_model(method, parameters, weight, tmp_path):
    text = f"merge_method: {method}\nmodels: [{{model: o/a}}]\nparameters: {parameters}\n"
    _, stages, losses = imported(text, tmp_path)
    copied = {"op": "passthrough", "slices": [{"model": "a"}]}
    scaled = {"op": "linear", "models": ["a"], "weights": [weight], "normalize": False}
    assert stages["merged"] == (copied if weight is None else scaled) and losses == []


def test_a_single_model_with_other_tokens(tmp_path):
    text = "merge_method: passthrough\nmodels: [{model: o/a}]\ntokenizer_source: o/g\n"
    _, stages, losses = imported(text, tmp_path)
    expected = {"op": "linear", "models": ["a"], "weights": [1.0], "normalize": False, "tokenizer": "g"}
    assert stages["merged"] == expected and losses == []


def test_a_base_that_is_no_model_of_a_mean_is_one_more_as_in_mergekit(tmp_path):
    text = "merge_method: linear\nbase_model: o/m\nmodels: [{model: o/a}, {model: o/b}]\nparameters: {weight: 1}\n"
    assert imported(text, tmp_path)[1]["merged"]["models"] == ["m", "a", "b"]


@pytest.mark.parametrize(
    ("written", "fields"),
    [
        ("tokenizer_source: union", {"tokenizer": "union"}),
        ("tokenizer_source: base", {"tokenizer": "base"}),
        ("tokenizer_source: o/a", {"tokenizer": "a"}),
        ("tokenizer_source: model:o/a", {"tokenizer": "a"}),
        ("tokenizer: {pad_to_multiple_of: 64}", {"tokenizer": "union", "pad_to_multiple_of": 64}),
        (
            "tokenizer: {source: base, tokens: {<s>: {source: o/a, force: true}, <t>: {source: {kind: zero}}, "
            "<u>: {source: {kind: model_token, model: o/a, token_id: 7}}, <v>: {}}}",
            {
                "tokenizer": "base",
                "tokens": {"<s>": {"model": "a", "force": True}, "<t>": {}, "<u>": {"model": "a", "token_id": 7}},
            },
        ),
    ],
)
def test_tokenizers(written, fields, tmp_path):
    text = f"merge_method: task_arithmetic\n{MODELS}]\n{written}\n"
    merged = imported(text, tmp_path)[1]["merged"]
    assert {name: merged[name] for name in ("tokenizer", "tokens", "pad_to_multiple_of") if name in merged} == fields


def test_layers_of_a_model_at_hand_are_counted(tiny_llama, tmp_path):
    def text(last):
        source = f"{{model: {tiny_llama}, layer_range: [0, {last}]}}"
        return f"merge_method: passthrough\nslices: [{{sources: [{source}]}}]\n"

    _, whole, losses = imported(text(2), tmp_path)
    assert whole["merged"]["slices"] == [{"model": "tiny-llama"}] and losses == []
    assert imported(text(1), tmp_path)[1]["merged"]["slices"] == [{"model": "tiny-llama", "layers": [0, 1]}]


def test_modules_that_are_merged_alike_are_the_model(tmp_path):
    module = "{models: [{model: o/a}, {model: o/b}], parameters: {weight: 1}}"
    text = f"merge_method: linear\nmodules: {{text: {module}, vision: {module}}}\n"
    assert imported(text, tmp_path)[1]["merged"] == {"op": "linear", "models": ["a", "b"], "weights": [1, 1]}
    with pytest.raises(RecipeError, match="modules can only be merged alike"):
        import_mergekit(text.replace("weight: 1}", "weight: 2}", 1))


def test_documents_that_need_one_another(tmp_path):
    sources, stages, _ = imported(
        """
merge_method: dare_ties
base_model: org/base
models:
  - {model: half-way, parameters: {weight: 0.4, density: 0.2}}
  - {model: org/three+org/lora, parameters: {weight: 0.6, density: 0.2}}
parameters: {lambda: 0.5}
---
name: half-way
merge_method: slerp
base_model: org/one
models: [{model: org/one}, {model: org/two}]
parameters: {t: 0.5}
""",
        tmp_path,
    )
    assert list(stages) == ["half-way", "three-lora", "merged"]
    assert stages["half-way"] == {"op": "slerp", "model": "one", "to": "two", "t": 0.5}
    assert stages["merged"]["models"][0] == "half-way"
    assert stages["merged"]["density"] == 0.2 and stages["merged"]["scale"] == 0.5
    lora = next(stage for stage in stages.values() if stage["op"] == "apply")
    assert sources[lora["adapters"][0]] == {"adapter": "org/lora"}


MODELS = "base_model: o/m\nmodels: [{model: o/m}, {model: o/a, parameters: {weight: 0.3}}"


@pytest.mark.parametrize(
    ("method", "parameters", "op", "fields"),
    [
        ("task_arithmetic", "{}", "task_arithmetic", {"model": "m", "weights": [0.3]}),
        ("task_arithmetic", "{normalize: true}", "dare_linear", {"density": 1.0, "normalize": True}),
        ("dare_linear", "{density: 0.3, rescale: false}", "dare_linear", {"density": 0.3, "rescale": False}),
        ("della", "{density: 0.5, epsilon: 0.1, lambda: 1.1}", "della", {"epsilon": 0.1, "scale": 1.1}),
        ("breadcrumbs", "{density: 0.9, gamma: 0.02}", "breadcrumbs", {"density": 0.9, "gamma": 0.02}),
        ("ties", "{}", "ties_models", {"density": 1.0}),
        ("ties", "{density: 0.3, rescale: true}", "ties_models", {"density": 0.3, "rescale": True}),
        ("task_arithmetic", "{rescale: true}", "task_arithmetic", {"model": "m", "weights": [0.3]}),
        ("sce", "{select_topk: 0.1}", "sce", {"select_topk": 0.1}),
        ("nearswap", "{t: 1e-3}", "nearswap", {"t": 0.001}),
        ("arcee_fusion", "{}", "arcee_fusion", {"base_model": "m", "models": ["a"]}),
        ("ram", "{epsilon: 1e-4}", "ram", {"epsilon": 1e-4}),
        ("ramplus_tl", "{r: 0.2}", "ramplus_tl", {"r": 0.2}),
    ],
)
def test_methods_from_a_base(method, parameters, op, fields, tmp_path):
    _, stages, _ = imported(f"merge_method: {method}\n{MODELS}]\nparameters: {parameters}\n", tmp_path)
    assert stages["merged"]["op"] == op
    assert {name: stages["merged"][name] for name in fields} == fields


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("linear", "{weight: 1}", {"op": "linear", "models": ["a", "b"], "weights": [1, 1]}),
        ("multislerp", "{weight: 1}", {"op": "multislerp", "models": ["a", "b"], "weights": [1, 1]}),
        ("karcher", "{max_iter: 5}", {"op": "karcher", "models": ["a", "b"], "max_iter": 5}),
        (
            "nuslerp",
            "{weight: 1, nuslerp_flatten: false, nuslerp_row_wise: true}",
            {"op": "nuslerp", "models": ["a", "b"], "weights": [1, 1], "along": "columns"},
        ),
        (
            "linear",
            "{weight: [0, 1]}",
            {"op": "linear", "models": ["a", "b"], "weights": [[0, 1], [0, 1]]},
        ),
    ],
)
def test_methods_without_a_base(method, parameters, expected, tmp_path):
    text = f"merge_method: {method}\nmodels: [{{model: o/a}}, {{model: o/b}}]\nparameters: {parameters}\n"
    assert imported(text, tmp_path)[1] == {"merged": expected}


def test_the_first_filter_wins_there_and_the_longest_here(tmp_path):
    text = """
merge_method: nearswap
base_model: o/m
models: [{model: o/a}]
parameters:
  t: [{filter: mlp, value: 1}, {filter: layers.1., value: 2}, {filter: up_proj, value: 3}, {value: 4}]
"""
    schedule = imported(text, tmp_path)[1]["merged"]["t"]
    names = {"layers.1.mlp.up_proj": 1, "layers.1.norm": 2, "layers.11.norm": 4, "layers.2.up_proj": 3, "norm": 4}
    assert {name: value_at(schedule, f"model.{name}.weight", 0.0) for name in names} == names


def test_what_the_filters_of_a_scope_leave_open_comes_from_the_one_around_it(tmp_path):
    text = """
merge_method: ties
base_model: o/m
models:
  - {model: o/a, parameters: {density: [{filter: mlp, value: 0.5}], weight: 1}}
  - {model: o/b, parameters: {weight: [{filter: mlp, value: 0.2}]}}
parameters: {density: [{filter: q_proj, value: 0.1}], weight: [0.7, 0.1], lambda: [{filter: mlp, value: 2}]}
"""
    merged = imported(text, tmp_path)[1]["merged"]
    assert merged["density"] == [{"*mlp*****": 0.5, "*q_proj*": 0.1, "default": 1.0}, {"*q_proj*": 0.1, "default": 1.0}]
    assert merged["weights"] == [1, {"*mlp*": 0.2, "default": [0.7, 0.1]}]
    assert merged["scale"] == {"*mlp*": 2, "default": 1.0}


def test_a_slice_of_one_layer_takes_the_end_of_a_gradient(tmp_path):
    one = "{sources: [{model: o/a, layer_range: [2, 3]}, {model: o/b, layer_range: [2, 3]}]}"
    whole = "{sources: [{model: o/a, layer_range: [0, 2]}]}"
    t = "[{filter: mlp, value: [0, 0.6]}, {value: [0.1, 0.9]}]"
    text = f"merge_method: slerp\nbase_model: o/a\nslices: [{whole}, {one}]\nparameters: {{t: {t}}}\n"
    schedule = imported(text, tmp_path)[1]["merged-2"]["t"]
    names = {"model.layers.2.mlp.up_proj.weight": 0.6, "model.layers.2.input_layernorm.weight": 0.9}
    names |= {"model.norm.weight": 0.1, "lm_head.weight": 0.1}  # mergekit: the first value around the layers
    assert {name: value_at(schedule, name, 0.5) for name in names} == names


def test_what_yaml_1_1_has_and_1_2_has_not(tmp_path):
    text = """
given: &given {weight: 0.5, density: 0.3}
name: x
merge_method: ties
base_model: o/m
models:
  - {model: o/a, parameters: *given}
  - model: o/b
    parameters: {<<: *given, weight: 1}
parameters: {normalize: no}
--- # and another
merge_method: nuslerp
models: [{model: o/a}, {model: o/b}]
parameters: {weight: 1, nuslerp_flatten: off}
"""
    _, stages, losses = imported(text, tmp_path)
    found = list(stages.values())
    assert found[0]["weights"] == [0.5, 1] and found[0]["density"] == 0.3 and found[0]["normalize"] is False
    assert found[1]["along"] == "rows"
    assert losses == ["given: mergekit itself does not know it"]


def test_paths_are_found_from_where_the_recipe_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)  # which could be a repository, too: mergekit takes the folder
    models = ["models/mine", "./models/other", "../out", "/abs", "org/name"]
    text = (
        f"merge_method: linear\nmodels: [{', '.join(f'{{model: {m}}}' for m in models)}]\nparameters: {{weight: 1}}\n"
    )
    text += "dtype: torch.bfloat16\n"
    (tmp_path / "mergekit.yml").write_text(text)
    recipe, losses = write_import(Path("mergekit.yml"), Path("recipes/my.yaml"), force=False, must_write=True)
    found = [source["model"] for source in yaml.safe_load(recipe)["sources"].values()]
    assert found == ["../models/mine", "../models/other", "../../out", "/abs", "org/name"]
    assert yaml.safe_load(recipe)["stages"]["merged"]["dtype"] == "bfloat16" and losses == []
    beside = [source["model"] for source in yaml.safe_load(import_mergekit(text)[0])["sources"].values()]
    assert beside[:3] == ["./models/mine", "./models/other", "../out"]


def test_the_document_without_a_name_is_the_last_stage(tmp_path):
    text = "merge_method: slerp\nbase_model: o/m\nmodels: [{model: one}]\nparameters: {t: 0.5}\n---\n"
    text += "name: one\nmerge_method: linear\nmodels: [{model: o/a}, {model: o/b}]\nparameters: {weight: 1}\n---\n"
    text += "name: two\nmerge_method: linear\nmodels: [{model: o/a}, {model: o/c}]\nparameters: {weight: 1}\n"
    recipe, _ = import_mergekit(text)
    assert list(yaml.safe_load(recipe)["stages"]) == ["one", "two", "merged"]
    assert yaml.safe_load(recipe)["name"] == "merged"


def test_names_of_models_become_names_of_a_recipe(tmp_path):
    text = "merge_method: linear\nmodels: [{model: x/模型}, {model: ./-été-}]\nparameters: {weight: 1}\n"
    assert list(imported(text, tmp_path)[0]) == ["model", "t"]


def test_a_filter_by_a_layers_number_in_slices_is_named(tmp_path):
    slices = [
        f"{{sources: [{{model: o/a, layer_range: {r}}}, {{model: o/b, layer_range: {r}}}]}}" for r in ([0, 2], [1, 3])
    ]
    t = "[{filter: layers.2., value: 1}, {filter: mlp, value: 0.3}, {value: 0.5}]"
    text = f"merge_method: slerp\nbase_model: o/a\nslices: [{', '.join(slices)}]\nparameters: {{t: {t}}}\n"
    assert imported(text, tmp_path)[2] == ["the filter 'layers.2.' of t: in a slice, layers may have other numbers"]


def test_what_mergekit_does_not_look_at_is_named(tmp_path):
    one = "{sources: [{model: o/a, layer_range: [0, 4], lora: o/l}], residual_weight: 0.5}"
    losses = imported(f"merge_method: passthrough\nslices: [{one}, {one}]\n", tmp_path)[2]
    assert [loss.partition(":")[0] for loss in losses] == ["residual_weight of a slice", "lora of a model"]


def test_what_is_lost_is_named(tmp_path):
    text = f"""
merge_method: ties
{MODELS}]
parameters: {{rescale: true, colour: blue}}
tokenizer_source: union
dtype: float64
"""
    losses = imported(text, tmp_path)[2]
    assert [loss.partition(":")[0] for loss in losses] == [
        "dtype float64",
        "parameter colour",
    ]


@pytest.mark.parametrize("template", ["auto", "{{ bos_token }}\n{% for m in messages %}\"'{{ m }}\n\n{% endfor %}"])
def test_a_chat_template_is_carried_over(template, tmp_path):
    text = f"merge_method: ties\n{MODELS}]\nchat_template: {json.dumps(template)}\n"
    _, stages, losses = imported(text, tmp_path)
    assert stages["merged"]["chat_template"] == template and losses == []


NAMED = {  # what mergekit's own texts give of `TALK`
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nYes?"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "    [|system|]Be brief.\n        [|endofturn|]\n\n    [|user|]Hi \n        \n\n    [|assistant|]Yes?\n"
    "        [|endofturn|]\n\n    [|user|]Bye\n        \n\n    [|assistant|]\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\n<|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHi  [/INST] Yes?</s> [INST] Bye [/INST]",
}
TALK = [("system", "Be brief."), ("user", "Hi "), ("assistant", "Yes?"), ("user", "Bye")]


@pytest.mark.parametrize("name", NAMED)
def test_a_chat_template_that_mergekit_has_by_name(name, tmp_path):
    _, stages, losses = imported(f"merge_method: ties\n{MODELS}]\nchat_template: {name}\n", tmp_path)
    assert losses == []
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(stages["merged"]["chat_template"])
    talk = [{"role": role, "content": content} for role, content in TALK]
    assert template.render(messages=talk, add_generation_prompt=True, bos_token="<s>", eos_token="</s>") == NAMED[name]


def test_a_chat_template_of_stacked_layers(tmp_path):
    one = "{sources: [{model: o/a, layer_range: [0, 4]}]}"
    two = "{sources: [{model: o/a, layer_range: [4, 8]}, {model: o/b, layer_range: [4, 8]}]}"
    text = f"merge_method: linear\nslices: [{one}, {two}]\nparameters: {{weight: 1}}\nchat_template: auto\n"
    _, stages, losses = imported(text, tmp_path)
    assert stages["merged"]["chat_template"] == "auto" and "chat_template" not in stages["merged-2"]
    assert [loss.partition(":")[0] for loss in losses] == ["chat_template auto"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: linear\nmodels: [{model: a/a}]\nchat_template: vicuna\n", "chat_template is 'vicuna'"),
        ("models: []\n", "has no merge_method"),
        ("merge_method: linear\nmodels: [{<<: 3, model: a/a}]\n", "<< is 3, not a mapping"),
        ("---\n".join(["merge_method: linear\nmodels: [{model: a/a}]\n"] * 2), "two documents are called 'merged'"),
        ("merge_method: frankenstein\nmodels: [{model: a/a}]\n", "merge_method is 'frankenstein'"),
        ("merge_method: ties\nmodels: [{model: a/a}]\n", "ties needs a base_model"),
        ("merge_method: linear\nmodels: 3\n", "does not have the form"),
        ("merge_method: linear\nmodels: [\n", "mergekit.yml:"),
        ("", "holds no merge configuration"),
        ("name: a\nmerge_method: linear\nmodels: [{model: a}, {model: b/b}]\n", "a needs itself: a -> a"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a/a, layer_range: [0, 2]}, {model: b/b, layer_range: "
            "[1, 4]}]}]\n",
            "merges different numbers of layers",
        ),
    ],
)
def test_what_no_recipe_can_follow(text, message):
    with pytest.raises(RecipeError, match=message):
        import_mergekit(text)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    config = tmp_path / "mergekit.yml"
    config.write_text("merge_method: linear\n" + "# wide\n" * 40_000)
    with pytest.raises(RecipeError, match=r"mergekit\.yml: is 280021 bytes; hubforge reads at most 262144"):
        write_import(config, None, force=False, must_write=False)


def test_errors_of_later_documents_have_their_lines():
    text = "name: a\nmerge_method: linear\nmodels: [{model: x/x}]\n---\nmerge_method: linear\nmodels: [\n"
    with pytest.raises(RecipeError, match=r"mergekit\.yml:7: is not valid YAML"):
        import_mergekit(text)


def test_a_merge_that_was_imported_runs(tiny_llama, tiny_llama_other, tmp_path, context, run_op, tensors_of):
    text = f"""
merge_method: linear
models:
  - {{model: {tiny_llama}, parameters: {{weight: [1, 0]}}}}
  - {{model: {tiny_llama_other}, parameters: {{weight: [0, 1]}}}}
"""
    recipe, _ = import_mergekit(text)
    (tmp_path / "recipe.yaml").write_text(recipe)
    nodes = load(tmp_path / "recipe.yaml").nodes
    sources = yaml.safe_load(recipe)["sources"]
    ctx = context(**{name: ("model", Path(spec["model"])) for name, spec in sources.items()})
    run_op(nodes["stages.merged"].op, ctx)
    one, two, found = tensors_of(tiny_llama), tensors_of(tiny_llama_other), tensors_of(ctx.out)
    for name in found:
        assert torch.equal(found[name], (two if ".layers.1." in name else one)[name]), name
