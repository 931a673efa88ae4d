"""One attack a kind of input: the good world, one part of it spoiled, and the real code that meets it.

`ATTACKS[kind](chance, world, hub)` runs one; it raises our errors where the input is refused. `world` is a fresh copy
of `world.build`; `hub` is an embedded Hub whose answers `hub.spoil` may rewrite.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from hubforge.errors import HubforgeError
from tests.hostile import drawing
from tests.hostile.spoiling import SpoilingHub
from tests.hostile.world import CARD, MERGEKIT, RECIPE

Attack = Callable[[random.Random, Path, SpoilingHub], None]
_OWNED = "owned"  # the file that pickles and templates try to make in the current folder


def hubforge(*words: str) -> str:
    """Run the command in this process; what it printed. Raises HubforgeError with what it said when it refuses."""
    import sys

    from hubforge import cli

    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["hubforge", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        said = err.getvalue()
        if "Traceback" in said or "a bug in hubforge" in said:
            raise AssertionError(said) from stop
        # `run` makes one of our errors of whatever a library raises: decent for a person, but we owe a better one.
        if "`--debug` shows the traceback" in said:
            raise AssertionError(said) from stop
        if stop.code:
            raise HubforgeError(said or f"exit {stop.code}") from stop
    finally:
        sys.argv = before
    return out.getvalue()


def recipe(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    (world / "recipe.yaml").write_bytes(drawing.text(chance, RECIPE))
    verb = chance.choice((["check"], ["plan"], ["plan", "--json"], ["check", "--json"]))
    hubforge("--store", str(world / "store"), *verb, str(world / "recipe.yaml"))


def lock(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    text = RECIPE.replace("./tuned", "me/tuned")
    (world / "recipe.yaml").write_text(text)
    file = {"path": "model.safetensors", "size": 3, "sha256": "a" * 64, "oid": "b" * 40}
    pinned = {"repo": "me/tuned", "repo_type": "model", "commit": "c" * 40, "license": "mit", "files": [file]}
    good = {"version": 1, "sources": {"tuned": pinned}, "packages": {"torch": "2.13.0"}}
    (world / "recipe.lock.json").write_bytes(drawing.as_json(chance, good))
    hubforge("--store", str(world / "store"), "plan", str(world / "recipe.yaml"))


def mergekit(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    (world / "mergekit.yml").write_bytes(drawing.text(chance, MERGEKIT))
    hubforge("import", str(world / "mergekit.yml"), str(world / "made.yaml"))
    hubforge("--store", str(world / "store"), "check", str(world / "made.yaml"))


def checkpoint(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A spoiled weight file, header or index of a model."""
    path = world / chance.choice(("base/model.safetensors", "tuned/model-00001-of-00002.safetensors"))
    if chance.random() < 0.3:
        path = world / "tuned" / "model.safetensors.index.json"
        path.write_bytes(drawing.as_json(chance, json.loads(path.read_bytes())))
    else:
        _spoil_safetensors(chance, path)
    _run(world)


def adapter(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    if chance.random() < 0.6:
        path = world / "style" / "adapter_config.json"
        path.write_bytes(drawing.as_json(chance, json.loads(path.read_bytes())))
    else:
        _spoil_safetensors(chance, world / "style" / "adapter_model.safetensors")
    _run(world)


def config(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A spoiled config or tokenizer file; the files that are not weights are copied through every merge."""
    names = ("config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    path = world / chance.choice(("base", "tuned")) / chance.choice(names)
    path.write_bytes(drawing.as_json(chance, json.loads(path.read_bytes())))
    if chance.random() < 0.2:
        link = world / "base" / chance.choice(("special_tokens_map.json", "vocab.json", "chat_template.jinja"))
        link.symlink_to(chance.choice(("/etc/passwd", "../../../../etc", "/dev/zero", "missing", link.name)))
    _run(world)


def mask(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    from hubforge import masks

    which = chance.randrange(4)
    if which == 0:
        path = world / "importance" / "layer_importance.json"
        path.write_bytes(drawing.as_json(chance, json.loads(path.read_bytes())))
    elif which == 1:
        path = world / "core" / "subspace.json"
        path.write_bytes(drawing.as_json(chance, json.loads(path.read_bytes())))
    else:
        path = world / chance.choice(("importance/fisher.safetensors", "core/subspace.safetensors"))
        _spoil_safetensors(chance, path)
    if chance.random() < 0.5:
        _run(world)
        return
    with masks.load(world / chance.choice(("importance", "core"))) as found:
        found.check(world / "base")
        for name in found:
            found[name]
        for name in found.matrices:
            found.directions(name, 1)


class _Command:
    """What unpickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (_OWNED, "w"))


def pickled(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A pytorch_model.bin that runs code, or that was spoiled."""
    import torch

    (world / "tuned" / "model.safetensors.index.json").unlink()
    for path in (world / "tuned").glob("*.safetensors"):
        path.unlink()
    path = world / "tuned" / "pytorch_model.bin"
    held: dict[str, Any] = {"model.norm.weight": torch.ones(8), "model.embed_tokens.weight": torch.ones(16, 8)}
    if chance.random() < 0.5:
        held[chance.choice(("x", "model.norm.weight"))] = _Command()
    if chance.random() < 0.3:
        path.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, path)
        if chance.random() < 0.3:
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(chance.choice(("../../outside", "/tmp/outside", "x" * 300)), b"x")
        else:
            path.write_bytes(drawing.raw(chance, path.read_bytes()))
    _run(world)


def gguf(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    from hubforge.llama_cpp.header import read_header

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    fields = [
        string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama"),
        string(b"n") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 0.5),
        string(b"words") + struct.pack("<IIQ", 9, 8, 20) + string(b"ab") * 20,
        string(b"nested") + struct.pack("<IIQIQ", 9, 9, 1, 4, 1) + struct.pack("<I", 3),
    ]
    infos = [string(b"a.weight") + struct.pack("<IQQIQ", 2, 256, 2, 14, 0)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(fields)) + b"".join(fields + infos)
    path = world / "x.gguf"
    path.write_bytes(drawing.raw(chance, head + bytes(-len(head) % 32) + bytes(420)))
    header = read_header(path)
    _ = header.parameters, header.bits_per_weight, header.count_types(), str(header.metadata)[:1000]


def dataset(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    from hubforge.rows import rows

    lines = [{"prompt": "a", "text": "b"}, {"messages": [{"role": "user", "content": "hi"}], "n": 1}]
    suffix = chance.choice((".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"))
    path = world / f"data{suffix}"
    if suffix == ".json":
        data = drawing.as_json(chance, lines)
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "n": [1, 2]}), path)
        data = drawing.raw(chance, path.read_bytes())
    elif suffix == ".jsonl.gz":
        import gzip

        bomb = b"\n" * (1 << 26) if chance.random() < 0.1 else b"\n".join(drawing.as_json(chance, one) for one in lines)
        data = gzip.compress(bomb, 1)
        data = drawing.raw(chance, data) if chance.random() < 0.5 else data
    else:
        data = b"\n".join(drawing.as_json(chance, one) for one in lines)
    path.write_bytes(data)
    found = rows(path, limit=100)
    _said(found)


def _said(found: list[dict[str, Any]]) -> None:
    """Through a chat template, as every op that reads text does it."""
    from hubforge.rows import texts

    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
            return [len(str(message["content"])) for message in messages]

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode("utf-8", "surrogatepass"))}

    texts(found, Tokenizer())  # type: ignore[arg-type]


def card(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A card as the Hub's page shows it: whatever is written in it, no script may come out."""
    from hubforge.front_matter import read_front_matter
    from hubforge.hub.pages.markdown import render
    from hubforge.hub.storage.front_matter import check_front_matter, read_card

    text = drawing.text(chance, CARD).decode("utf-8", "replace")
    with suppress(ValueError):  # what is wrong with it, which `verify` lists
        read_front_matter(text)
    errors, _ = check_front_matter(text)
    html = render(text if errors else read_card(text).body, "me/toy", "main").lower()
    for wrong in ("<script", "onerror=", "javascript:", "<iframe", "<style", "<form", "<object"):
        # In text and code it is escaped, and then has no bare bracket or no tag around it.
        at = html.find(wrong)
        while at >= 0:
            tag = html[html.rfind("<", 0, at + 1) : html.find(">", at) + 1]
            if (
                tag.startswith("<")
                and not tag.startswith("</")
                and html.rfind(">", 0, at + 1) < html.rfind("<", 0, at + 1)
            ):
                raise AssertionError(f"the page holds {tag[:200]!r}")
            at = html.find(wrong, at + 1)


TEMPLATES = (
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ release.__init__.__globals__ }}",
    "{{ release.model_dump.__func__.__globals__['__builtins__']['open']('owned', 'w') }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ lipsum.__globals__['os'].popen('touch owned').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% include '../../../../etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch owned') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 10**10 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{0.__class__}'.format(release) }}",
    "{{ 9**9**9 }}",
    "{{ 10**100000000 }}",
    "{{ [0] * 10**9 }}",
    "{% set x = 'aaaaaaaaaa' %}{% for i in range(40) %}{% set x = x ~ x %}{% endfor %}{{ x }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% extends 'model.md.j2' %}",
    "{% include 'sections/10-about.md.j2' %}",
    "{% include 'model.md.j2' %}",
    "{{ release.steps.__class__ }}",
    "{{ sections.__globals__ }}",
    "{{ undefined_thing.x }}",
    "{% if %}",
    "{{",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{{ release|map(attribute='__class__')|list }}",
    "{{ ''|format('%c' % 99999999999) }}",
    "{{ release.steps|tojson|length }}",
    "{% filter upper %}{{ release }}{% endfilter %}",
    "{{ 1/0 }}",
    "{{ release.name() }}",
    "{{ range(10**12)|list }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'|indent(10**10) }}",
    "{{ ('x'*1000000)|wordwrap(1) }}",
)


def template(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A template of somebody's: it runs in Jinja's sandbox, and may not take the machine with it."""
    from hubforge.cards import render

    folder = world / "templates"
    name = chance.choice(("model.md.j2", "sections/10-about.md.j2", "sections/99-mine.md.j2"))
    (folder / name).parent.mkdir(parents=True)
    text = chance.choice(TEMPLATES)
    if chance.random() < 0.3:
        text = drawing.raw(chance, (text + "\n" + chance.choice(TEMPLATES)).encode()).decode("utf-8", "replace")
    (folder / name).write_text(text, encoding="utf-8")
    render(hub.release, "weights", templates=folder)


def release_file(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A repository whose release file, sums or card were spoiled by whoever owns it: verify and reproduce."""
    path = chance.choice(("hubforge.release.json", "hubforge.release.json", "SHA256SUMS", "README.md"))
    whole = hub.file(path)
    if path.endswith(".json"):
        spoiled = drawing.as_json(chance, json.loads(whole))
    else:
        spoiled = drawing.text(chance, whole.decode())
    with hub.spoil(lambda asked, body: spoiled if asked.endswith(f"/{path}") else body):
        verb = chance.choice((["verify"], ["verify", "--deep"], ["reproduce", "--into", str(world / "again")]))
        hubforge("--store", str(world / "store"), "--offline", *verb, "me/toy", "--to", hub.endpoint)


def hub_answer(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A Hub that lies: any of its JSON answers mutated, while something is verified, locked, planned or pushed."""
    left = [chance.randrange(6)]

    def spoil(asked: str, body: bytes) -> bytes:
        left[0] -= 1
        if left[0] >= 0 and chance.random() < 0.5:
            return body
        try:
            return drawing.as_json(chance, json.loads(body))
        except ValueError:
            return drawing.raw(chance, body)

    (world / "recipe.yaml").write_text(RECIPE.replace("./tuned", "me/toy").replace(", license: mit", ""))
    with hub.spoil(spoil):
        hub.use(world, chance.choice(("verify", "lock", "reproduce", "push", "masks", "access")))


def header(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A Hub whose answers carry rude headers, or none."""

    def spoil(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        lengths = [pair for pair in headers if pair[0] in (b"content-length", b"transfer-encoding")]
        kept = [pair for pair in headers if pair not in lengths and chance.random() > 0.2]
        rude = (b"ratelimit", b"retry-after", b"etag", b"x-repo-commit", b"link", b"location", b"content-type",
                b"x-linked-etag", b"x-linked-size", b"x-error-code", b"x-error-message", b"x-hf-warning")  # fmt: skip
        words = ("", "0", "-1", "1e999", "9" * 400, "nan", "a" * 8000, "../../x", '"api";r=0;t=1', '"api";r=;t=x',
                 "<http://127.0.0.1:9/x>; rel=next", "\xff\xfe", "GatedRepo", "text/html; charset=utf-7")  # fmt: skip
        more = [(chance.choice(rude), chance.choice(words).encode("latin-1")) for _ in range(chance.randrange(1, 4))]
        return kept + more + lengths

    with hub.spoil(headers=spoil, status=chance.choice((None, None, 404, 403, 401, 400, 416, 301))):
        hub.use(world, chance.choice(("verify", "lock", "reproduce", "push", "masks", "access")))


def path_trick(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """A Hub that names files by paths that leave their folder, wherever it names one."""
    trick = chance.choice(drawing.PATHS)
    names = ("hubforge.release.json", "model.safetensors", "README.md", "SHA256SUMS", "config.json", "assets")
    old = chance.choice(names)

    def spoil(asked: str, body: bytes) -> bytes:
        try:
            json.loads(body)
        except ValueError:
            return body.replace(old.encode(), trick.encode("utf-8", "surrogatepass"))
        return body.replace(old.encode(), json.dumps(trick)[1:-1].encode())

    with hub.spoil(spoil):
        hub.use(world, chance.choice(("verify", "lock", "fetch", "reproduce", "push", "masks")))


def request(chance: random.Random, world: Path, hub: SpoilingHub) -> None:
    """Somebody who talks to the embedded Hub: nothing may break it, or write outside its folder."""
    import http.client

    rude = chance.choice(drawing.PATHS).encode("utf-8", "surrogatepass")
    quoted = "".join(f"%{byte:02x}" if chance.random() < 0.7 or not 33 < byte < 127 else chr(byte) for byte in rude)[
        :900
    ]
    rev = chance.choice(("main", "refs%2Fpr%2F1", quoted or "x", "a" * 40))
    commit = {"key": "header", "value": {"summary": "x", "description": ""}}
    file = {"key": "file", "value": {"content": "eA==", "path": chance.choice(drawing.PATHS), "encoding": "base64"}}
    large = {
        "key": "lfsFile",
        "value": {"path": chance.choice(drawing.PATHS), "algo": "sha256", "oid": "a" * 64, "size": 3},
    }
    gone = {"key": "deletedFolder", "value": {"path": chance.choice(drawing.PATHS)}}
    lines = [commit, *chance.sample([file, large, gone], chance.randrange(1, 4))]
    lines = [drawing.value(chance, one) if chance.random() < 0.4 else one for one in lines]
    batch = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [{"oid": "a" * 64, "size": 3}]}
    pre = {"files": [{"path": chance.choice(drawing.PATHS), "sample": "eA==", "size": 3}]}
    verb, path, body = chance.choice(
        (
            ("POST", f"/api/models/me/other/commit/{rev}", b"\n".join(json.dumps(one).encode() for one in lines)),
            ("POST", f"/api/models/me/other/preupload/{rev}", drawing.as_json(chance, pre)),
            ("POST", "/me/other.git/info/lfs/objects/batch", drawing.as_json(chance, batch)),
            (
                "POST",
                "/api/repos/create",
                drawing.as_json(chance, {"name": "x", "organization": "me", "type": "model"}),
            ),
            (
                "POST",
                "/api/repos/move",
                drawing.as_json(chance, {"fromRepo": "me/x", "toRepo": "me/y", "type": "model"}),
            ),
            (
                "PUT",
                "/api/models/me/other/settings",
                drawing.as_json(chance, {"gated": "auto", "visibility": "public"}),
            ),
            ("POST", "/api/models/me/other/tag/main", drawing.as_json(chance, {"tag": "v1", "message": "x"})),
            ("POST", f"/api/models/me/other/branch/{quoted}", drawing.as_json(chance, {"startingPoint": "main"})),
            ("POST", "/api/models/me/other/discussions", drawing.as_json(chance, {"title": "x", "pullRequest": True})),
            ("POST", "/api/collections", drawing.as_json(chance, {"title": "x", "namespace": "me", "private": False})),
            ("POST", "/api/validate-yaml", drawing.as_json(chance, {"content": CARD, "repoType": "model"})),
            ("POST", "/oauth/token", drawing.as_json(chance, {"grant_type": "x", "subject_token": "a.b.c"})),
            ("GET", f"/me/other/resolve/main/{quoted}", b""),
            ("GET", f"/me/other/blob/{rev}/{quoted}", b""),
            ("GET", f"/api/models/me/other/tree/{rev}/{quoted}?recursive=true&limit={quoted}&cursor={quoted}", b""),
            ("GET", f"/{quoted}/{quoted}", b""),
            ("GET", f"/api/models?search={quoted}&author={quoted}&limit={quoted}", b""),
            ("POST", f"/api/models/me/other/paths-info/{rev}", b"paths=" + quoted.encode() + b"&expand=x"),
            ("PUT", f"/_lfs/{quoted}", b"abc"),
            ("GET", f"/_lfs/{quoted}/1", b""),
        )
    )
    headers = {"Authorization": "Bearer local", "Content-Type": "application/json"}
    if chance.random() < 0.3:
        headers["Range"] = chance.choice(
            ("bytes=0-0", "bytes=-5", "bytes=9-1", "bytes=a-b", "bytes=0-" + "9" * 50, "x")
        )
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.endpoint.rpartition(":")[2]), timeout=5)
    try:
        connection.request(verb, path, body or None, headers)
        answer = connection.getresponse()
        answer.read()
    except http.client.InvalidURL:
        return
    finally:
        connection.close()
    if answer.status >= 500:
        raise AssertionError(f"{verb} {path} with {body[:300]!r}: HTTP {answer.status}")


def _spoil_safetensors(chance: random.Random, path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.5:
        path.write_bytes(drawing.raw(chance, data))
        return
    header = drawing.as_json(chance, json.loads(data[8 : 8 + length]))
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 1, 2**32, 2**63, 2**64 - 1))
    path.write_bytes(said.to_bytes(8, "little") + header + data[8 + length :])


def _run(world: Path) -> None:
    hubforge("--store", str(world / "store"), "--offline", "--quiet", "run", str(world / "recipe.yaml"), "healed")


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        recipe, lock, mergekit, checkpoint, adapter, config, mask, pickled, gguf, dataset, card, template,
        release_file, hub_answer, header, path_trick, request,
    )
}  # fmt: skip
