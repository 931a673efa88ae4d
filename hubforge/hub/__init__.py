"""The embedded Hub: the Hugging Face Hub's protocol on a folder, for trying, staging and testing.

The real client talks to it with `HF_ENDPOINT` set to its address and `HF_HUB_DISABLE_XET=1`:

```python
with LocalHub(folder) as hub:
    hub.api(token="any").create_repo("me/model")
```
"""

from __future__ import annotations

from hubforge.hub.config import read_settings, read_tokens
from hubforge.hub.server import LocalHub, ensure_running, serve, stop_running
from hubforge.hub.settings import HubSettings, Quota
from hubforge.hub.storage.garbage import Collected, collect
from hubforge.hub.storage.scans import set_scan
from hubforge.hub.tokens import Publisher, Scope, Token

__all__ = [
    "Collected",
    "HubSettings",
    "LocalHub",
    "Publisher",
    "Quota",
    "Scope",
    "Token",
    "collect",
    "ensure_running",
    "read_settings",
    "read_tokens",
    "serve",
    "set_scan",
    "stop_running",
]
