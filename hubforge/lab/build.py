"""The whole family in one folder: two models, three adapters, their data and an lm-eval task. All of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError

from . import pages
from .corpora import Budget, Corpora, Encoder, draw_corpora, plain_stories, prompt_rows, styled_data, styled_rows
from .grammar import STYLES
from .tokenizer import EOS, EOT, PAD, SPECIAL_TOKENS, save_tokenizer, special_ids, train_bpe
from .train import Report, fit, pack

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY, CONTEXT, THREADS = 1536, 512, 1
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


@dataclass(frozen=True)
class AdapterSpec:
    base: str
    rank: int
    alpha: int
    learning_rate: float
    chats: bool  # Whether half of its texts are answers in the chat format; a pretrained base knows none.


ADAPTERS = {
    "prose": AdapterSpec("instruct", rank=64, alpha=64, learning_rate=2e-3, chats=True),
    "dialogue": AdapterSpec("instruct", rank=64, alpha=64, learning_rate=2e-3, chats=True),
    "terse": AdapterSpec("pretrained", rank=16, alpha=32, learning_rate=3e-3, chats=False),
}


@dataclass(frozen=True)
class Family:
    """Where a built family lies."""

    folder: Path

    @property
    def pretrained(self) -> Path:
        return self.folder / "pretrained"

    @property
    def instruct(self) -> Path:
        return self.folder / "instruct"

    @property
    def adapters(self) -> dict[str, Path]:
        return {style: self.folder / "adapters" / style for style in STYLES}

    @property
    def prompts(self) -> Path:
        return self.folder / "data" / "prompts.jsonl"

    @property
    def style_prompts(self) -> Path:
        return self.folder / "data" / "style_prompts.jsonl"

    @property
    def stories(self) -> Path:
        return self.folder / "data" / "stories.jsonl"

    @property
    def tasks(self) -> Path:
        """The folder of the lm-eval task `lab_ifeval`."""
        return self.folder / "tasks"


def build(folder: Path, *, seed: int = 0, report: Report | None = None, budget: Budget | None = None) -> Family:
    """The family in `folder`, trained there unless it already stands whole with the same settings and versions.

    report: called with a line at a time. Raises StepError where the folder holds something else.
    """
    folder = Path(folder).expanduser().absolute()
    say = report or (lambda line: None)
    settings = settings_of(seed, budget or Budget())
    found = _family_file(folder)
    if found and found.get("settings") == settings and found.get("files") == digests(folder):
        say(f"lab: {folder} is whole and up to date")
        return Family(folder)
    if folder.exists() and not found and (not folder.is_dir() or any(folder.iterdir())):
        raise StepError(
            f"{folder} holds something other than a family of models",
            mend="Name a new folder, or move what is there away: the lab replaces only what it has made.",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-{os.getpid()}-", dir=folder.parent))
    try:
        begun = time.monotonic()
        with _quiet_training():
            _train_family(part, seed, budget or Budget(), say)
        record = {"settings": settings, "files": digests(part)}
        _write_json(part / "family.json", record)
        part.chmod(0o755)  # mkdtemp makes it private.
        _swap(part, folder)
        say(f"lab: {folder} made in {time.monotonic() - begun:.0f} s")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Family(folder)


def settings_of(seed: int, budget: Budget) -> dict[str, Any]:
    """All that decides the bytes, but for the processor: seed, budget, the lab's own source and the packages."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "seed": seed,
        "budget": asdict(budget),
        "lab_sha256": source.hexdigest(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder` by its path, family.json and bytecode left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "family.json" and "__pycache__" not in path.parts
    }


def _train_family(out: Path, seed: int, budget: Budget, say: Report) -> None:
    import torch

    say("lab: writing stories and instructions")
    corpora = draw_corpora(seed, budget)
    tokenizer = train_bpe(corpora.tokenizer_texts(), VOCABULARY)
    encoder = Encoder(tokenizer)
    pad = SPECIAL_TOKENS.index(PAD)
    _write_data(out, seed, corpora)

    torch.manual_seed(seed)
    model = new_model(tokenizer.get_vocab_size())
    rows = pack([encoder.document(text) for text in corpora.documents], 128)
    # Small batches: two cores run many short steps as fast as few long ones, and each step learns about as much.
    facts = fit(
        model, model, rows, what="pretrained", seed=seed, learning_rate=1e-3, batch_tokens=512, pad=pad, report=say
    )
    _save_model(model, tokenizer, out / "pretrained", EOS, {"corpus": "plain stories", **facts})

    rows = [encoder.chat(example) for example in corpora.requests]
    facts = fit(
        model, model, rows, what="instruct", seed=seed, learning_rate=1.2e-3, batch_tokens=512, pad=pad, report=say
    )
    _save_model(model, tokenizer, out / "instruct", EOT, {"corpus": "verifiable instructions", **facts})

    for number, (style, spec) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed + number)
        rows = styled_rows(corpora.styled[style], encoder, chats=spec.chats)
        train_adapter(out / "adapters" / style, out / spec.base, style, spec, rows, seed=seed, pad=pad, say=say)


def new_model(vocab_size: int) -> Any:
    """A two-layer Llama, untrained, in float32. Every matrix has rows of 256 or 512, which K-quants take.

    Each layer begins with key weights equal to query weights, and output weights the transpose of value weights, so
    that attention starts as "look at what is like me and copy it": copying a word of the prompt is then learned in
    half the steps. After Trockman & Kolter 2023, "Mimetic initialization of self-attention layers", arXiv:2305.09828.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special_ids(),
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special_ids())
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.mul_(2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        model.model.embed_tokens.weight.mul_(10)
    return model


def train_adapter(
    folder: Path, base: Path, style: str, spec: AdapterSpec, rows: Sequence[Any], *, seed: int, pad: int, say: Report
) -> None:
    """Train a LoRA on all seven linears of `base`, as it was saved, and write it as PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from .tiny import LINEARS, settle_adapter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    facts = fit(
        adapted,
        adapted.get_base_model(),
        rows,
        what=style,
        seed=seed,
        learning_rate=spec.learning_rate,
        batch_tokens=512,
        pad=pad,
        report=say,
    )
    adapted.save_pretrained(folder)
    base_name = pages.repo_id(base.name)
    settle_adapter(folder, base_name)
    training = {"base_model": base_name, "corpus": f"{style} stories", "rank": spec.rank, "alpha": spec.alpha, **facts}
    _write_json(folder / "training.json", training)
    (folder / "README.md").write_text(pages.adapter(style, spec.base, training), encoding="utf-8")


def _save_model(model: Any, tokenizer: Tokenizer, folder: Path, eos_token: str, facts: dict[str, Any]) -> None:
    """Write the model in bfloat16, in shards with their index, and go on with the float32 one."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    save_tokenizer(tokenizer, folder, eos_token=eos_token, max_length=CONTEXT)
    _write_json(folder / "training.json", facts)
    (folder / "README.md").write_text(pages.model(folder.name, facts), encoding="utf-8")


def _write_data(out: Path, seed: int, corpora: Corpora) -> None:
    _write_lines(out / "data" / "stories.jsonl", [{"text": text} for text in plain_stories(seed, 500)])
    _write_lines(out / "data" / "prompts.jsonl", prompt_rows(corpora.prompts))
    _write_lines(out / "data" / "style_prompts.jsonl", [{"prompt": one.prompt} for one in corpora.style_prompts])
    for style in STYLES:
        _write_lines(out / "data" / "styles" / f"{style}.jsonl", styled_data(corpora.styled[style]))
        held_out = styled_data(corpora.styled_held_out[style])
        _write_lines(out / "data" / "styles" / f"{style}_held_out.jsonl", held_out)
    (out / "data" / "README.md").write_text(pages.DATA, encoding="utf-8")
    tasks = out / "tasks"
    _write_lines(tasks / "held_out.jsonl", [one.row(key) for key, one in enumerate(corpora.held_out)])
    shutil.copyfile(Path(__file__).with_name("checkers.py"), tasks / "checkers.py")
    (tasks / "lab_ifeval.yaml").write_text(pages.TASK, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _family_file(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "family.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sweep(folder: Path) -> None:
    """Remove what builds of this folder left behind when they were killed."""
    for part in folder.parent.glob(f".{folder.name}.part-*"):
        pid = part.name.removeprefix(f".{folder.name}.part-").split("-")[0]
        try:
            os.kill(int(pid), 0)  # Signal 0 asks whether that process still lives.
        except (ValueError, ProcessLookupError):
            shutil.rmtree(part, ignore_errors=True)
        except PermissionError:
            pass  # It lives, as another user.


def _swap(part: Path, folder: Path) -> None:
    """Put `part` in the place of `folder`; what was there goes only when the new one stands."""
    old = part.with_name(part.name + ".old")
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _quiet_training() -> Iterator[None]:
    """A fixed number of threads, a random state of its own and no progress bars of Transformers; then as before."""
    import torch
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    # Sums are split by thread, so the number of threads is part of the bytes. One it is: steps this small gain little
    # from a second, and on a busy machine two wait for each other many times longer than they work.
    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()
