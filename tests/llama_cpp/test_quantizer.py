"""Quantizing: sizes by hand, loss in the order of the types, and no way for a crash to reach us."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hubforge.errors import SourceError, StepError
from hubforge.llama_cpp.fidelity import measure
from hubforge.llama_cpp.header import read_header
from hubforge.llama_cpp.quantizer import quantize
from hubforge.llama_cpp.runtime import GgufModel
from hubforge.processes import child_environment


def test_q8_0_takes_34_bytes_for_32_weights(tiny_gguf: dict[str, Path]) -> None:
    tensors = {tensor.name: tensor for tensor in read_header(tiny_gguf["Q8_0"]).tensors}
    weight = tensors["blk.0.ffn_up.weight"]
    assert (weight.type, weight.shape) == ("Q8_0", (256, 256))
    assert weight.size == 256 * 256 // 32 * 34
    assert tensors["output_norm.weight"].type == "F32"


def test_the_fewer_bits_the_further_from_the_model(tiny_gguf: dict[str, Path], tiny_llama_256: Path) -> None:
    import torch

    from hubforge.models import load_model, load_tokenizer

    model, tokenizer = load_model(tiny_llama_256, dtype=torch.float32), load_tokenizer(tiny_llama_256)
    distances = {}
    for type_, path in tiny_gguf.items():
        with GgufModel(path, context=256) as gguf:
            distances[type_] = measure(model, tokenizer, gguf)
    kl = [distances[type_].kl_mean for type_ in ("BF16", "Q8_0", "Q6_K", "Q4_K_M")]
    assert kl == sorted(kl)
    assert kl[0] < 2e-5 < kl[1] * 10 < kl[2] * 10
    assert kl[2] * 2 < kl[3] < 0.05
    assert distances["BF16"].top1 > 0.98 > distances["Q4_K_M"].top1 > 0.5
    assert distances["BF16"].kl_p99 > kl[0]


def test_rows_that_are_no_multiple_of_256_are_named(
    tiny_gguf: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(tiny_gguf["BF16"], tmp_path / "whole.gguf", "Q4_K_M")
    assert whole.fallbacks == ()
    assert "llama.cpp" in whole.library or "llama-cpp-python" in whole.library
    # The same file with the rows of one matrix said to be twice 128 long: still as many bytes.
    narrow = tmp_path / "narrow.gguf"
    data = bytearray(tiny_gguf["BF16"].read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4
    data[at : at + 16] = (128).to_bytes(8, "little") + (512).to_bytes(8, "little")
    narrow.write_bytes(data)
    made = quantize(narrow, tmp_path / "fallback.gguf", "Q4_K_M")
    assert made.fallbacks == ("blk.0.ffn_up.weight (Q5_0)",)
    assert quantize(narrow, tmp_path / "q8.gguf", "Q8_0").fallbacks == ()


def test_progress_rises_to_one(tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    seen: list[float] = []
    quantize(tiny_gguf["BF16"], tmp_path / "x.gguf", "Q8_0", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) == len(read_header(tiny_gguf["BF16"]).tensors)


def test_what_llama_cpp_cannot_quantize_is_told_and_leaves_no_file(tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "strange.gguf"
    source.write_bytes(tiny_gguf["BF16"].read_bytes().replace(b"llama", b"lamma"))
    with pytest.raises(
        StepError, match=r"(?s)making Q8_0, ended with exit code 1.*unknown model architecture: 'lamma'"
    ):
        quantize(source, tmp_path / "x.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["strange.gguf"]


def test_a_truncated_source_is_refused(tiny_gguf: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "cut.gguf"
    source.write_bytes(tiny_gguf["BF16"].read_bytes()[:-1])
    with pytest.raises(SourceError, match="ends at byte"):
        quantize(source, tmp_path / "x.gguf", "Q8_0")


@pytest.fixture
def fake_cyllama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cyllama that children of ours import instead of the real one; returns its module, to be written."""
    module = tmp_path / "fake" / "cyllama" / "llama" / "llama_cpp.py"
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").touch()
    (module.parent.parent / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    return module


def test_a_crash_of_the_quantizer_is_an_error_with_the_signal(
    tiny_gguf: dict[str, Path], tmp_path: Path, fake_cyllama: Path
) -> None:
    fake_cyllama.write_text("import os, sys\nprint('GGML_ASSERT(no) failed', file=sys.stderr)\nos.abort()\n")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(StepError, match=r"(?s)making Q8_0, ended with SIGABRT.*GGML_ASSERT\(no\) failed"):
        quantize(tiny_gguf["BF16"], out / "x.gguf", "Q8_0")
    assert list(out.iterdir()) == []


def test_a_failure_on_a_full_disk_is_told_as_one(
    tiny_gguf: dict[str, Path], tmp_path: Path, fake_cyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cyllama.write_text("raise RuntimeError('iostream error')\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError) as caught:
        quantize(tiny_gguf["BF16"], tmp_path / "x.gguf", "Q8_0")
    assert caught.value.errno == errno.ENOSPC


def test_when_we_are_killed_the_quantizer_ends_too(
    tiny_gguf: dict[str, Path], tmp_path: Path, fake_cyllama: Path
) -> None:
    pid_file = tmp_path / "pid"
    fake_cyllama.write_text(f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    call = f"quantize(Path({str(tiny_gguf['BF16'])!r}), Path({str(tmp_path / 'x.gguf')!r}), 'Q8_0')"
    code = f"from pathlib import Path; from hubforge.llama_cpp.quantizer import quantize; {call}"
    with subprocess.Popen([sys.executable, "-c", code], env=child_environment()) as parent:
        child = int(wait_for(lambda: pid_file.read_text() if pid_file.is_file() else ""))
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: "" if is_running(child) else "gone")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.is_file() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(find: object, seconds: float = 10) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():  # type: ignore[operator]
            return str(found)
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")
