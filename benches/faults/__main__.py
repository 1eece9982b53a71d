"""``python -m benches.faults [R6 R7 ...] [--short]``: injects faults and prints what held, as a table.

Full runs are kept in ``benches/faults/results.json``, from which ``docs/generate.py`` writes ``docs/reliability.md``.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import vqrs

from . import Fault, faults

RESULTS = Path(__file__).with_name("results.json")


def machine() -> str:
    """The machine in a few words."""
    return f"{os.cpu_count()} cores, {vqrs.hardware()['simd']}, {platform.system()} {platform.machine()}"


def measure(fault: Fault, count: int, seed: int) -> dict:
    """Runs one fault; returns its record."""
    record = {
        "fault": fault.fault,
        "holds": fault.holds,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }
    reason = fault.needs()
    if reason:
        return {**record, "missing": reason}
    folder = Path(tempfile.mkdtemp(prefix="vqrs-faults-"))
    begin = time.perf_counter()
    try:
        outcome = fault.run(count, np.random.default_rng(seed), folder)
    except Exception as error:
        return {**record, "failures": [f"{type(error).__name__}: {error}"], "tried": 0, "held": 0}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record |= {"tried": outcome.tried, "held": outcome.held, "seconds": round(time.perf_counter() - begin, 1)}
    return record | {"note": outcome.note, "failures": outcome.failures}


def main() -> int:
    """Returns 1 if anything did not hold."""
    parser = argparse.ArgumentParser(prog="python -m benches.faults", description=__doc__)
    parser.add_argument("ids", nargs="*", help="rows of the table, for example R6; all where none is given")
    parser.add_argument("--short", action="store_true", help="as often as the tests do; nothing is kept")
    parser.add_argument("--count", type=int, help="as often as this; kept with --keep alone")
    parser.add_argument("--keep", action="store_true", help="keep the result of --count, which it tells")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    known = faults()
    wanted = [fault for fault in known if not arguments.ids or {fault.id, fault.key} & set(arguments.ids)]
    if unknown := set(arguments.ids) - {name for fault in known for name in (fault.id, fault.key)}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(fault.key for fault in known)}")
    lost = False
    for fault in wanted:
        count = arguments.count or (fault.short if arguments.short else fault.full)
        record = measure(fault, count, arguments.seed)
        if "missing" in record:
            answer = f"not on this machine: {record['missing']}"
        else:
            answer = f"{record['held']:,} of {record['tried']:,} held, {record.get('seconds', 0)} s"
            answer += f" ({record.get('note')})" * bool(record.get("note"))
            lost |= bool(record["failures"]) or record["tried"] == 0
        print(f"{fault.key:14} {fault.fault}\n{'':14} {answer}", flush=True)
        for failure in record.get("failures", []):
            print(f"{'':14} FAILED: {failure}", flush=True)
        if arguments.keep or not (arguments.short or arguments.count):
            kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            kept[fault.key] = record
            RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
