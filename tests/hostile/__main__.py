"""Hostile inputs, and a table of what became of them. `python -m tests.hostile 10000`, `--only card:17 card mask`."""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path

from tests.hostile.attacks import ATTACKS
from tests.hostile.test_hostile import prepare, run
from tests.hostile.watching import Verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=10_000, help="in all, shared by the kinds")
    parser.add_argument("--only", nargs="+", metavar="KIND[:NUMBER]", help="these kinds, or single inputs")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = [word.partition(":") for word in options.only or ATTACKS]
    each = -(-options.inputs // len(wanted))
    broken: dict[str, tuple[str, ...]] = {}
    print(f"{'kind':14} {'inputs':>7} {'refused':>8} {'broken':>7} {'slowest s':>10} {'most MB':>8}")
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        root = Path(folder).resolve()
        good, hub = prepare(root)
        totals: collections.Counter[str] = collections.Counter()
        for kind, _, number in wanted:
            found: list[Verdict] = []
            for one in [int(number)] if number else range(each):
                verdict = run(kind, one, good, hub, root / "work")
                found.append(verdict)
                if verdict.faults:
                    broken[f"{kind}:{one}"] = verdict.faults
                    print(
                        f"{kind}:{one}: {verdict.faults[0].strip().splitlines()[-1][:200]}", file=sys.stderr, flush=True
                    )
                if number:
                    print(verdict.refused or "taken")
            bad, refused = sum(bool(v.faults) for v in found), sum(bool(v.refused) for v in found)
            slowest, most = max(v.seconds for v in found), max(v.bytes for v in found) / 1e6
            print(f"{kind:14} {len(found):7} {refused:8} {bad:7} {slowest:10.2f} {most:8.0f}", flush=True)
            totals.update(inputs=len(found), broken=bad)
        hub.close()
    print(f"{totals['inputs']} inputs, {totals['broken']} broken")
    seen: collections.Counter[str] = collections.Counter()
    for name, faults in broken.items():
        alike = faults[0].strip().splitlines()[-1][:60]
        seen[alike] += 1
        if seen[alike] <= 2:
            print(f"\n{name}: " + "\n".join(faults))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
