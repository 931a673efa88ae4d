"""`op: gguf`: one conversion, a step per type, and no file that failed its checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hubforge.errors import SourceError, StepError
from hubforge.llama_cpp.header import read_header
from hubforge.llama_cpp.tree import Tree
from hubforge.op import Artifact, Context, GgufRef, Metrics, Settings
from hubforge.quantize.gguf import Check, Gguf


def gguf(*types: str, **fields: Any) -> Gguf:
    return Gguf.model_validate({"model": "m", "types": types, "name": "tiny", **fields})


def context(out: Path, model: Path, made: dict[str, Path] | None = None, settings: Settings | None = None) -> Context:
    """A context in which "m" is that model, and GGUF artifacts lie where `made` says."""
    inputs = {"m": Artifact("m", "model", "key", model)}
    for name, path in (made or {}).items():
        inputs[name] = Artifact(name, "gguf", "key", path, metrics={"converter": "llama.cpp b1"})
    out.mkdir(parents=True, exist_ok=True)
    return Context("quantize.test", out, inputs, settings or Settings(device="cpu"))


def facts(op: Gguf, ctx: Context) -> Metrics:
    op.preflight(ctx)
    return op.run(ctx)


def test_each_type_is_a_step_and_quantized_ones_share_the_unquantized_one() -> None:
    steps = gguf("Q8_0", "BF16", "Q6_K").expand("gguf")
    assert {name: (step.types, step.unquantized) for name, step in steps.items()} == {
        "gguf/BF16": (("BF16",), None),
        "gguf/Q8_0": (("Q8_0",), "gguf/BF16"),
        "gguf/Q6_K": (("Q6_K",), "gguf/BF16"),
    }


@pytest.mark.parametrize(
    ("types", "source"),
    [(("Q6_K",), "gguf/BF16"), (("Q6_K", "F16"), "gguf/F16"), (("F16", "F32", "Q6_K"), "gguf/F32")],
    ids=["none-is-added", "the-one-listed", "the-finer-of-two"],
)
def test_what_is_quantized_from(types: tuple[str, ...], source: str) -> None:
    steps = gguf(*types).expand("gguf")
    assert steps["gguf/Q6_K"].unquantized == GgufRef(source)
    assert steps[source].unquantized is None
    assert set(steps) == {f"gguf/{type_}" for type_ in types} | {source}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"types": ["Q6_K", "Q6_K"]}, "each type may be named once"),
        ({"types": ["Q6"]}, "Input should be"),
        ({"types": []}, "at least 1 item"),
        ({"metadata": {"licence": "mit"}}, "no key 'licence'; did you mean 'license'"),
        ({"name": "../x"}, "should match pattern"),
        ({"check": {"kl": 0}}, "greater than 0"),
    ],
    ids=["twice", "type", "none", "metadata", "name", "limit"],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gguf.model_validate({"model": "m", **fields})


def test_converts_checks_and_says_what_it_made(tiny_llama_256: Path, converter_tree: Tree, tmp_path: Path) -> None:
    op = gguf("BF16", metadata={"license": "mit", "base_model": ["someone/base"], "quantized_by": "us"})
    made = facts(op, context(tmp_path / "out", tiny_llama_256))
    path = tmp_path / "out" / "tiny-BF16.gguf"
    assert [one.name for one in path.parent.iterdir()] == [path.name] == [made["file"]]
    assert made["bytes"] == path.stat().st_size
    assert made["bits_per_weight"] == pytest.approx(16, abs=0.05)
    assert made["tensors"] == 12
    assert made["kl_mean"] < 1e-4
    assert made["top1"] > 0.98
    assert made["strings"] > 20
    assert made["pre_tokenizer"] == "llama-bpe"
    assert (made["converter"], made["converter_sha256"]) == (converter_tree.build, converter_tree.sha256)
    metadata = read_header(path).metadata
    assert metadata["general.license"] == "mit"
    assert metadata["general.quantized_by"] == "us"
    assert metadata["general.base_model.0.repo_url"].endswith("/someone/base")


def test_quantizes_the_sibling_and_inherits_its_converter(
    tiny_llama_256: Path, tiny_gguf: dict[str, Path], tmp_path: Path
) -> None:
    op = gguf("Q4_K_M").expand("gguf")["gguf/Q4_K_M"]
    assert isinstance(op, Gguf)
    made = facts(op, context(tmp_path / "out", tiny_llama_256, {"gguf/BF16": tiny_gguf["BF16"]}))
    assert (tmp_path / "out" / "tiny-Q4_K_M.gguf").read_bytes() == tiny_gguf["Q4_K_M"].read_bytes()
    assert made["type"] == "Q4_K_M"
    assert 4.5 < made["bits_per_weight"] < 6
    assert 0.001 < made["kl_mean"] < 0.05
    assert made["kl_p99"] > made["kl_mean"]
    assert made["converter"] == "llama.cpp b1"
    assert made["quantizer"] == made["runtime"]


def test_a_file_further_from_the_model_than_allowed_fails_the_step(
    tiny_llama_256: Path, tiny_gguf: dict[str, Path], tmp_path: Path
) -> None:
    op = gguf("Q4_K_M", unquantized="gguf/BF16", check={"kl": 1e-4, "passages": ["A passage of one's own."]})
    with pytest.raises(StepError, match=r"logits: the mean KL divergence .* and may be 0\.0001"):
        facts(op, context(tmp_path / "out", tiny_llama_256, {"gguf/BF16": tiny_gguf["BF16"]}))


def test_a_gguf_of_another_model_fails_the_step(tiny_llama: Path, tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    op = gguf("Q8_0", unquantized="gguf/BF16")
    with pytest.raises(StepError, match="logits: the mean KL divergence"):
        facts(op, context(tmp_path / "out", tiny_llama, {"gguf/BF16": tiny_gguf["BF16"]}))


def test_goes_on_from_the_file_a_killed_run_left_whole(
    tiny_llama_256: Path, tiny_gguf: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, out = gguf("Q8_0", unquantized="gguf/BF16"), tmp_path / "out"
    ctx = context(out, tiny_llama_256, {"gguf/BF16": tiny_gguf["BF16"]})
    with monkeypatch.context() as patch:
        patch.setattr(Gguf, "_check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            facts(op, ctx)
    (out / ".unfinished-abc.gguf").write_bytes(b"half")
    before = (out / "tiny-Q8_0.gguf").stat().st_mtime_ns
    made = facts(op, ctx)
    assert (out / "tiny-Q8_0.gguf").stat().st_mtime_ns == before
    assert [path.name for path in out.iterdir()] == ["tiny-Q8_0.gguf"]
    assert made["quantizer"]


def test_preflight_says_when_the_converter_is_missing_offline(tiny_llama_256: Path, tmp_path: Path) -> None:
    settings = Settings(offline=True, cache=tmp_path / "cache")
    with pytest.raises(SourceError, match="--offline forbids to fetch it"):
        gguf("BF16").preflight(context(tmp_path / "out", tiny_llama_256, settings=settings))
    gguf("Q8_0", unquantized="gguf/BF16").preflight(context(tmp_path / "out", tiny_llama_256, settings=settings))


def test_the_default_limits_rise_as_bits_fall() -> None:
    from hubforge.quantize.gguf import _limit

    limits = [_limit(type_) for type_ in ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")]
    assert limits == sorted(set(limits))
    assert _limit("IQ4_XS") == _limit("Q4_0")
    assert Check().kl is None
