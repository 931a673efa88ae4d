"""The Fisher of each weight is the mean of its squared per-example gradients: against a plain float64 loop."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hubforge.errors import SourceError, StepError
from hubforge.events import Event, Note, Progress, Warned
from hubforge.masks import _engine, _memory
from hubforge.masks import fisher as module
from hubforge.masks._engine import Run
from hubforge.masks._halves import reliability, spearman
from hubforge.masks._losses import Batch, Example, Losses, reply
from hubforge.masks._memory import Plan
from hubforge.masks.fisher import Fisher
from hubforge.models import load_model
from hubforge.op import Artifact, Context

LINES = [f"The {word} walked to the harbour and sat down." for word in ("cook", "old man", "lantern keeper", "cat")]


def context(out: Path, model: Path, lines: list[str] = LINES, report: Callable[[Event], None] = print) -> Context:
    data = out.parent / f"{out.name}.jsonl"
    data.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    out.mkdir(exist_ok=True)
    inputs = {"it": Artifact("it", "model", "k", model), "rows": Artifact("rows", "dataset", "k", data)}
    return Context("masks.importance", out, inputs, where="r.yaml:7", report=report)


def op(**fields: object) -> Fisher:
    return Fisher.model_validate({"model": "it", "data": "rows", "dtype": "float32"} | fields)


def loop(
    folder: Path, examples: list[list[int]], names: list[str], reduction: str, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """The definition: a batch of one, all gradients, squared, averaged in float64."""
    model = load_model(folder, dtype=dtype)
    sums = {
        name: torch.zeros_like(weight, dtype=torch.float64)
        for name, weight in model.named_parameters()
        if name in names
    }
    for ids in examples:
        model.zero_grad()
        tokens = torch.tensor([ids])
        logits = model(tokens).logits
        cross_entropy(logits[0, :-1], tokens[0, 1:], reduction=reduction).backward()
        for name, weight in model.named_parameters():
            if name in sums:
                sums[name] += weight.grad.double() ** 2
    return {name: total / len(examples) for name, total in sums.items()}


def fisher(
    model: torch.nn.Module, weights: dict[str, torch.nn.Parameter], examples: list[Example]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    found: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    run = Run(model, weights, Plan("device", 1, 0, 0, 0), examples, Losses())
    run.run(lambda name, sums, even, whole: found.update({name: (sums.clone(), even, whole)}))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multimodal_models_text_is_weighed_as_a_text_models(tiny_gemma4_multimodal: Path, dtype: torch.dtype) -> None:
    """The loop and we differ by the rounding of our float32 sums alone when both use the same precision."""
    examples = [torch.randint(5, 280, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 30, 17)]
    model = load_model(tiny_gemma4_multimodal, dtype=dtype)
    weights = {n: w for n, w in model.named_parameters() if "language_model.layers" in n and "_proj.weight" in n}
    found = fisher(model, weights, [Example(ids) for ids in examples])
    for name, expected in loop(tiny_gemma4_multimodal, examples, list(weights), "mean", dtype).items():
        error = (found[name][0].double() / len(examples) - expected).abs().max() / expected.max()
        assert error < 1e-6, name
        assert expected.max() > 0, name


def test_what_is_written_is_the_loop_rounded_to_bfloat16(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = op(chat_template=False).run(context(out, tiny_llama))
    from hubforge.models import load_tokenizer, texts

    ids = texts([{"prompt": line} for line in LINES], load_tokenizer(tiny_llama), chat_template=False)
    written = load_file(out / "fisher.safetensors")
    expected = loop(tiny_llama, ids, list(written), "mean")
    assert len(written) == 14 == metrics["tensors"]
    for name, values in written.items():
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.double(), expected[name], rtol=2**-8, atol=1e-6 * expected[name].max().item())
    assert metrics["tokens"] == sum(len(row) - 1 for row in ids)
    assert sorted(path.name for path in out.iterdir()) == ["fisher.safetensors", "layer_importance.json"]


def test_layer_importance_adds_up(tiny_llama: Path, tmp_path: Path) -> None:
    metrics = op().run(context(tmp_path / "out", tiny_llama))
    written = load_file(tmp_path / "out" / "fisher.safetensors")
    facts = json.loads((tmp_path / "out" / "layer_importance.json").read_text())
    for layer in ("0", "1"):
        mine = [values.double() for name, values in written.items() if f"layers.{layer}." in name]
        count = sum(values.numel() for values in mine)
        assert facts["layers"][layer]["count"] == count
        # The sums are of the float32 values; the file holds them rounded to 8 bits.
        assert facts["layers"][layer]["sum"] == pytest.approx(sum(float(v.sum()) for v in mine), rel=1e-3)
        assert facts["layers"][layer]["mean"] == pytest.approx(facts["layers"][layer]["sum"] / count)
    assert facts["total"]["sum"] == pytest.approx(sum(entry["sum"] for entry in facts["layers"].values()))
    assert [entry["layer"] for entry in metrics["layers"]] == [0, 1]
    zeros = sum(int((values == 0).sum()) for values in written.values())
    assert sum(facts["log10_histogram"].values()) + zeros == metrics["parameters"]
    assert facts["zeros"] == zeros
    assert facts["reliability"] == metrics["reliability"] and 0 < facts["reliability"] < 1
    assert facts["left_out"] == {"lm_head.weight": 1, "model.embed_tokens.weight": 1}


def test_gemma_leaves_out_towers_per_layer_embeddings_and_dead_keys(
    tiny_gemma4_multimodal: Path, tmp_path: Path
) -> None:
    metrics = op().run(context(tmp_path / "out", tiny_gemma4_multimodal))
    names = set(load_file(tmp_path / "out" / "fisher.safetensors"))
    assert len(names) == metrics["tensors"] == 4 * 7 - 2 * 2  # two layers share their keys and values
    assert all(name.startswith("model.language_model.layers.") and "per_layer" not in name for name in names)
    assert not any("layers.3.self_attn.k_proj" in name for name in names)


class Killed(BaseException):
    pass


def killed() -> None:
    raise Killed


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(_engine, "SAVE_SHARE", float("inf"))
    seen: list[Event] = []

    def kill_at_three(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 3:
            raise Killed

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sampled = op(labels="sampled")
    undisturbed = sampled.run(context(whole, tiny_llama))
    with pytest.raises(Killed):
        sampled.run(context(cut, tiny_llama, report=kill_at_three))
    assert not (cut / "fisher.safetensors").exists()
    resumed = sampled.run(context(cut, tiny_llama, report=seen.append))
    assert [event.done for event in seen if isinstance(event, Progress)] == [4]
    assert any(isinstance(event, Note) and event.text == "resumed after 3 of 4 samples" for event in seen)
    assert {p.name: p.read_bytes() for p in cut.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    del undisturbed["seconds_per_sample"], resumed["seconds_per_sample"]
    assert resumed == undisturbed


def kill_at_the_end(fisher: Fisher, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is in the saved state, and nothing was handed over."""
    with monkeypatch.context() as patch:
        patch.setattr(_engine, "SAVE_EVERY", 0.0)
        patch.setattr(Run, "_hand_over", lambda *_: killed())
        with pytest.raises(Killed):
            fisher.run(ctx)


def test_a_state_of_other_targets_is_not_taken(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at_the_end(op(targets="mlp"), context(tmp_path / "out", tiny_llama), monkeypatch)
    assert (tmp_path / "out" / "state").is_dir()
    assert op(targets="self_attn").run(context(tmp_path / "out", tiny_llama))["samples"] == 4


def test_a_state_of_another_plan_is_not_taken_and_that_is_said(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when other memory is free the second time; set by hand here."""
    kill_at_the_end(op(batch_size=2), context(tmp_path / "out", tiny_llama), monkeypatch)
    seen: list[Event] = []
    op(batch_size=4).run(context(tmp_path / "out", tiny_llama, report=seen.append))
    (said,) = [event.text for event in seen if isinstance(event, Note) and event.text.startswith("begun anew")]
    assert "of another plan (engine: device, batch_size: 2)" in said


def losses(model: object, example: Example, number: int = 0, **how: object) -> torch.Tensor:
    return Losses(**how).of(model, Batch((example,), (number,)), "cpu")[0]  # type: ignore


def test_sampled_labels_follow_the_models_predictions(tiny_llama: Path) -> None:
    """Averaged over draws the loss is the entropy of the predictions, whatever the text's own labels are."""
    model = load_model(tiny_llama, dtype=torch.float32)
    example = Example(torch.randint(5, 280, (40,), generator=torch.Generator().manual_seed(0)).tolist())
    with torch.no_grad():
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        drawn = torch.stack([losses(model, example, number, sampled=True) for number in range(100)])
        text = losses(model, example)
    # 100 draws of 39 labels: the standard error is the spread of the draws' means over 10.
    assert abs(drawn.mean() - entropy) < 4 * drawn.std() / 10
    assert (text - entropy).abs() > 8 * drawn.std() / 10


def test_a_batch_draws_the_labels_that_its_examples_draw_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, dtype=torch.float32)
    batch = Batch((Example([5, 6, 7, 8]), Example([9, 10])), (3, 7))
    with torch.no_grad():
        together = Losses(sampled=True, reduction="sum").of(model, batch, "cpu")
        alone = [
            losses(model, e, n, sampled=True, reduction="sum") for e, n in zip(batch.examples, (3, 7), strict=True)
        ]
    torch.testing.assert_close(together, torch.stack(alone))


def test_a_reply_is_what_greedy_decoding_says_and_the_loss_is_on_it_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, dtype=torch.float32)
    prompt = [3, 50, 61, 72]
    said = reply(model, prompt, 5, "cpu")
    ids = list(prompt)
    for token in said:
        logits = model(torch.tensor([ids])).logits[0, -1]
        assert token == int(logits.argmax())
        ids.append(token)
    logits = model(torch.tensor([ids])).logits[0]
    expected = cross_entropy(logits[3:-1], torch.tensor(said))
    torch.testing.assert_close(losses(model, Example(ids, 4)), expected)


def test_the_responses_are_weighed(tiny_llama: Path, tmp_path: Path) -> None:
    metrics = op(labels="response", max_new_tokens=6).run(context(tmp_path / "out", tiny_llama))
    assert 4 <= metrics["tokens"] <= 4 * 6


def test_long_samples_are_cut_counted_and_reported(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    lines = ["Short.", "Long " * 40]
    metrics = op(max_length=12, chat_template=False).run(context(tmp_path / "o", tiny_llama, lines, seen.append))
    assert metrics["truncated"] == 1
    assert any(isinstance(event, Warned) and "1 of 2 samples are cut to 12 tokens" in event.text for event in seen)
    assert metrics["tokens"] <= 2 * 11


def test_samples_are_drawn_by_the_seed(tiny_llama: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        op(samples=2, seed=seed).run(context(tmp_path / name, tiny_llama))
        return (tmp_path / name / "fisher.safetensors").read_bytes()

    assert made("a", 1) == made("b", 1)
    assert made("a", 1) != made("c", 2)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 99], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # ranks 1, 2.5, 2.5, 4 by hand: 4.5 / sqrt(4.5 * 5)
    ],
    ids=["same", "reversed", "ties"],
)
def test_spearman_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_reliability_is_the_correlation_of_the_halves(tiny_llama: Path) -> None:
    """By hand: a Fisher of the even examples, one of the odd ones, and the correlation of their ranks."""
    model = load_model(tiny_llama, dtype=torch.float32)
    weights = {name: weight for name, weight in model.named_parameters() if "mlp" in name}
    draw = torch.Generator().manual_seed(0)
    examples = [Example(torch.randint(5, 280, (12,), generator=draw).tolist()) for _ in range(5)]
    halves = [
        torch.cat([sums.view(-1) for sums, *_ in fisher(model, weights, examples[i::2]).values()]) for i in (0, 1)
    ]
    even, whole = (torch.cat([parts[at] for parts in fisher(model, weights, examples).values()]) for at in (1, 2))
    assert reliability(even, whole, 5) == pytest.approx(spearman(*halves), abs=1e-6)
    assert reliability(even, whole, 1) is None


def test_same_halves_are_perfectly_reliable(tiny_llama: Path, tmp_path: Path) -> None:
    metrics = op().run(context(tmp_path / "out", tiny_llama, ["The sea was calm."] * 4))
    assert metrics["reliability"] == pytest.approx(1.0, abs=1e-4)


def test_a_weight_that_nothing_depends_on_is_named_after_one_sample(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, dtype=torch.float32)
    weights = {"model.layers.1.mlp.up_proj.weight": model.model.layers[1].mlp.up_proj.weight}
    weights["model.unused"] = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(StepError, match=r"no gradient reaches model\.unused"):
        fisher(model, weights, [Example([3, 4, 5]), Example([6, 7])])


def test_a_tower_is_refused_before_the_model_is_loaded(
    tiny_gemma4_multimodal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(StepError, match=r"r.yaml:7: targets match model\.\w+_tower\..* no gradient of a text reaches"):
        op(targets="q_proj").run(context(tmp_path / "out", tiny_gemma4_multimodal))


def test_a_damaged_weight_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for shard in folder.glob("*.safetensors"):
        weights = load_file(shard)
        for name in weights:
            if "layers.1.mlp.up_proj" in name:
                weights[name][0, 0] = float("nan")
        save_file(weights, shard)
    with pytest.raises(StepError, match=r"the loss of sample 1 is nan"):
        op().run(context(tmp_path / "out", folder))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"column": "promt"}, SourceError, r"Columns: prompt. Did you mean 'prompt'?"),
        (
            {"targets": "k_porj"},
            StepError,
            r"r.yaml:7: no matrix of the model matches targets 'k_porj'\n  Matrices: lm_h",
        ),
        ({"targets": "embed_tokens|k_proj"}, None, ""),
    ],
    ids=["column", "targets", "embeddings"],
)
def test_wrong_fields_are_named(
    tiny_llama: Path, tmp_path: Path, fields: dict[str, str], error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert op(**fields).run(context(tmp_path / "out", tiny_llama))["tensors"] == 3
        return
    with pytest.raises(error, match=message):
        op(**fields).run(context(tmp_path / "out", tiny_llama))


def test_a_pattern_that_is_none_is_refused_by_the_field() -> None:
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        op(targets="(")


def test_the_preflight_finds_a_missing_column(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no column 'question'"):
        op(column="question").preflight(context(tmp_path / "out", tiny_llama))


def test_the_preflight_finds_that_no_column_is_one_of_the_usual(tiny_llama: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path / "out", tiny_llama)
    ctx.path("rows").write_text('{"body": "The sea was calm."}\n')
    with pytest.raises(SourceError, match=r"out\.jsonl row 1: none of the columns .*\n  Columns: body. Name one with"):
        op().preflight(ctx)


def test_a_row_without_a_prompt_is_named_by_its_place_in_the_data(tiny_llama: Path, tmp_path: Path) -> None:
    """Not by its place among the samples, which are in random order."""
    ctx = context(tmp_path / "out", tiny_llama, [*LINES, *LINES, "", *LINES])
    with pytest.raises(SourceError, match=r"out\.jsonl row 9: none of the columns"):
        op(seed=3).run(ctx)


def test_the_preflight_finds_that_there_is_no_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    ctx = context(tmp_path / "out", folder)
    with pytest.raises(SourceError, match=r"model: the tokenizer has no chat template\n  Set `chat_template: false`"):
        op().preflight(ctx)
    op(chat_template=False).preflight(ctx)


def test_too_little_memory_is_said_before_the_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memory, "free", lambda device, folder: _memory.Room(6e8, None, 1e12))
    monkeypatch.setattr(_memory, "_RESERVE", 575_900_000)
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(StepError, match=r"r.yaml:7: .* of the device's memory are needed .*, and 600 MB are free"):
        op().run(context(tmp_path / "out", tiny_llama))


@pytest.mark.parametrize("engine", ["device", "groups", "host", "disk"])
def test_every_engine_writes_the_same_mask(tiny_llama: Path, tmp_path: Path, engine: str) -> None:
    notes: list[Event] = []
    plain = op().run(context(tmp_path / "plain", tiny_llama))
    given = op(engine=engine, batch_size=2, pt=True).run(context(tmp_path / "out", tiny_llama, report=notes.append))
    assert (given["engine"], given["batch_size"]) == (engine, 2)
    said = next(event.text for event in notes if isinstance(event, Note) and "engine:" in event.text)
    assert said.startswith(f"Fisher of 14 tensors, 73.7 k weights; engine: {engine}, 2 of 4 samples at a time")
    written, expected = (load_file(tmp_path / name / "fisher.safetensors") for name in ("out", "plain"))
    for name, values in written.items():
        # Both are rounded to 8 bits, so where they differ it is by one of the last of them.
        torch.testing.assert_close(values, expected[name], rtol=2**-7, atol=1e-5 * float(expected[name].max()))
    assert given["reliability"] == pytest.approx(plain["reliability"], abs=1e-4)
    pickled = torch.load(tmp_path / "out" / "fisher.pt", weights_only=True)
    assert pickled.keys() == written.keys() and all(torch.equal(pickled[name], written[name]) for name in written)
    left = {"fisher.safetensors", "fisher.pt", "layer_importance.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == left


def test_fields_that_change_no_result_are_not_in_the_key() -> None:
    assert {"engine", "batch_size"} <= set(Fisher.unkeyed)
    assert "estimator" not in Fisher.unkeyed


def test_a_pt_file_is_a_mask(tiny_llama: Path, tmp_path: Path) -> None:
    """As a file, in a folder under any name, and for those who load it: always with weights_only."""
    from hubforge.masks import load
    from hubforge.tensors.reader import open_checkpoint

    folder = tmp_path / "mask"
    folder.mkdir()
    values = torch.rand(3, 2)
    torch.save({"model.layers.0.mlp.up_proj.weight": values}, folder / "fisher.pt")
    for place in (folder, folder / "fisher.pt"):
        with open_checkpoint(place, stem="fisher") as found:
            assert torch.equal(found.read("model.layers.0.mlp.up_proj.weight"), values)
    with load(folder) as mask:
        assert torch.equal(mask["model.language_model.layers.0.mlp.up_proj.weight"], values)
    (folder / "fisher.pt").rename(folder / "g4_fisher.pt")
    with open_checkpoint(folder, stem="fisher") as found:
        assert list(found) == ["model.layers.0.mlp.up_proj.weight"]
    torch.save({"a": Killed}, folder / "fisher.pt")
    with pytest.raises(SourceError, match="weights_only"):
        open_checkpoint(folder, stem="fisher")


def test_the_replies_are_kept_for_a_run_that_goes_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = op(labels="response", max_new_tokens=3)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "run", lambda *_: killed())
        with pytest.raises(Killed):
            responses.run(context(tmp_path / "out", tiny_llama))
    monkeypatch.setattr("hubforge.masks._losses.reply", lambda *_: pytest.fail("asked again"))
    assert responses.run(context(tmp_path / "out", tiny_llama))["samples"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fisher.safetensors", "layer_importance.json"]


def test_a_fisher_that_is_no_number_is_named(tiny_llama: Path) -> None:
    """A finite loss whose gradient is not: the square root of a score that is exactly zero."""
    model = load_model(tiny_llama, dtype=torch.float32)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(StepError, match=r"the Fisher of up is not finite after 1 samples"):
        fisher(model, {"up": weight}, [Example([3, 4, 5])])


def test_a_fisher_of_zeros_is_named(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, dtype=torch.float32)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(StepError, match=r"the Fisher of up is zero after 1 samples"):
        fisher(model, {"up": weight}, [Example([3, 4, 5])])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"estimator": "token", "targets": "embed_tokens"}, "estimator: token, but model.embed_tokens.weight is not"),
        ({"engine": "groups", "targets": "lm_head"}, "engine: groups covers weights of decoder layers only"),
        ({"batch_size": 2, "targets": "embed_tokens"}, "batch_size is 2, but not every target is the weight of a lin"),
    ],
    ids=["token", "groups", "batch"],
)
def test_what_cannot_go_together_is_said_before_the_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(StepError, match=f"r.yaml:7: {message}"):
        op(**fields).run(context(tmp_path / "out", tiny_llama))


def test_the_preflight_finds_targets_that_match_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"r.yaml:7: no matrix of the model matches targets 'q_porj'"):
        op(targets="q_porj").preflight(context(tmp_path / "out", tiny_llama))


def test_a_merge_that_damps_layers_needs_more_than_the_tensors(tmp_path: Path) -> None:
    from hubforge.stages.apply import Apply

    torch.save({"model.layers.0.mlp.up_proj.weight": torch.rand(3, 2)}, tmp_path / "fisher.pt")
    inputs = {"old": Artifact("old", "mask", "k", tmp_path / "fisher.pt")}
    ctx = Context("stages.styled", tmp_path, inputs, where="r.yaml:9")
    fields = {"model": "base", "adapters": ["style"], "importance": "old"}
    with pytest.raises(StepError, match=r"r.yaml:9: old has no layer_importance.*\n  Set `layer_damping: false`"):
        Apply.model_validate(fields).preflight(ctx)
    Apply.model_validate({**fields, "layer_damping": False}).preflight(ctx)


def test_the_layers_of_a_multimodal_model_are_taken_in_groups_too(tiny_gemma4_multimodal: Path, tmp_path: Path) -> None:
    op().run(context(tmp_path / "plain", tiny_gemma4_multimodal))
    op(engine="groups").run(context(tmp_path / "out", tiny_gemma4_multimodal))
    written, expected = (load_file(tmp_path / name / "fisher.safetensors") for name in ("out", "plain"))
    assert len(written) == 24
    for name, values in written.items():
        torch.testing.assert_close(values, expected[name], rtol=2**-7, atol=1e-5 * float(expected[name].max()))
