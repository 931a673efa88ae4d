"""Publishers: `op: <name>` under `publish:` is the module of that name here; modules with an underscore serve them."""
