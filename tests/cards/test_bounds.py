"""A template of somebody's may not take the machine with it."""

from __future__ import annotations

import pytest

from hubforge.cards import bounds, render
from hubforge.errors import HubforgeError


def attempt(release, folder, text):
    (folder / "sections").mkdir(parents=True)
    (folder / "sections" / "99-mine.md.j2").write_text(text)
    return render(release, "weights", templates=folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 s"),
        ("{{ 'a' * 10**9 }}", "too much memory"),
        ("{{ '{:>9999999999}'.format(1) }}", "too much memory"),
        ("{{ 9**9999999 }}", "a number of [0-9]+ bits is too large"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
    ids=["loop", "text", "width", "power", "python"],
)
def test_a_template_that_asks_for_too_much_is_stopped(rich_release, tmp_path, monkeypatch, text, said):
    if "longer" in said:
        monkeypatch.setattr(bounds, "SECONDS", 0.2)
    with pytest.raises(HubforgeError, match=said) as caught:
        attempt(rich_release, tmp_path / "mine", text)
    assert "99-mine.md.j2:1" in caught.value.where


def test_the_bounds_are_gone_afterwards(rich_release, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    page = attempt(rich_release, tmp_path / "mine", "## Mine\n\n{{ 6 * 7 }} and {{ 2**10 }}")
    assert b"42 and 1024" in page["README.md"]
    assert resource.getrlimit(resource.RLIMIT_AS) == before
