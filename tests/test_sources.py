"""Local sources: what is no folder of the kind that the recipe says gets the way out."""

import re

import pytest

from hubforge.errors import SourceError
from hubforge.sources import HashCache, SourceSpec, resolve_local


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ({"model": "m/model.safetensors"}, r"Name its folder, where config and tokenizer are: .*/m\."),
        ({"model": "a"}, r"It is an adapter: write \{adapter: a\}"),
        ({"adapter": "m"}, r"It is a model: write \{model: m\}"),
    ],
    ids=["a file", "an adapter as a model", "a model as an adapter"],
)
def test_a_source_of_another_kind_is_told(given, mend, tmp_path):
    for folder, files in {"m": ["config.json", "model.safetensors"], "a": ["adapter_config.json"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("{}")
    hashes = HashCache(tmp_path / "hashes")
    with pytest.raises(SourceError, match=r"r.yaml:3: source 's': .* is no (model|adapter)") as caught:
        resolve_local("s", SourceSpec(**given), tmp_path, hashes, "r.yaml:3")
    assert re.match(mend, caught.value.mend)
