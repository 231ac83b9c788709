"""A long run that is killed (SIGKILL) again and again and resumed: does it lose anything, does it keep getting better?

    python benchmarks/long_runs/killed_run.py --source ../shared/data/caltech101 --out runs/hour --kill-minutes 10

Prints the validations as a table, the means of the first and the last third, and the largest drop between neighbours.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean

from latentvae.training.run_dir import RunDirectory

POLL = 1.0  # seconds


def train(recipe: str, source: Path, out: Path, kill_after: float, settings: list[str]) -> bool:
    """Start or resume the run; True where it finished before it was to be killed."""
    overrides = [part for setting in [f"data.source={source}", *settings] for part in ("--set", setting)]
    resume = ["--resume", "auto"] if out.exists() else []
    command = [sys.executable, "-m", "latentvae", "train", "--recipe", recipe, "--out", str(out), *resume, *overrides]
    process = subprocess.Popen(command)
    began = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - began > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return False
        time.sleep(POLL)
    if process.returncode:
        raise SystemExit(f"training ended with {process.returncode}")
    return True


def report(run: RunDirectory) -> list[str]:
    """Markdown: every validation, then what the bar asks."""
    rows = [row for row in run.read_metrics() if "validation_psnr" in row]
    names = [name for name in ("validation_psnr", "validation_lpips") if name in rows[0]]
    lines = ["| images | " + " | ".join(name.removeprefix("validation_") for name in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    lines += [f"| {row['images_seen']} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |" for row in rows]
    third = max(len(rows) // 3, 1)
    for name in names:
        values = [row[name] for row in rows]
        first, last = mean(values[:third]), mean(values[-third:])
        lines.append(f"\n{name}: mean of the first third {first:.4f}, of the last {last:.4f}")
    values = [row["validation_psnr"] for row in rows]
    falls = [before - after for before, after in pairwise(values)]
    lines.append(f"\nlargest drop of PSNR between neighbours: {max([0.0, *falls]):.3f} dB over {len(rows)} validations")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="hour_cpu")
    parser.add_argument("--source", type=Path, default=Path("../shared/data/caltech101"))
    parser.add_argument("--out", type=Path, default=Path("runs/hour"))
    parser.add_argument("--kill-minutes", type=float, default=10.0)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    kills = []
    while not train(arguments.recipe, arguments.source, arguments.out, 60 * arguments.kill_minutes, arguments.settings):
        run = RunDirectory(arguments.out)
        found = run.all_checkpoints()
        seen = max((row["images_seen"] for row in run.read_metrics()), default=0)
        kills.append({"logged": seen, "resumed_from": int(found[-1].name) if found else 0})
        print(f"killed after {seen} logged images; resuming from {kills[-1]['resumed_from']}", flush=True)
    print(json.dumps({"kills": kills}))
    print("\n".join(report(RunDirectory(arguments.out))))


if __name__ == "__main__":
    main()
