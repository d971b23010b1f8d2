"""What eight ranks, two machines and a killed rank compute, at toy size on the CPU, beside one rank: prints a table.

    python experiments/ranks.py FOLDER_OF_IMAGES runs/shapes-vq/model.pt NEW_FOLDER
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

FLAGS = "--preset shapes --depth 1 --batch 16 --steps 6 --log-every 1 --save-every 2 --workers 0 --device cpu --resume"
MACHINE = ["--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29517", "--rdzv-id=1"]
RUNS = {"one rank": [[]], "eight ranks": [["--standalone", "--nproc-per-node=8"]], "two machines": [MACHINE, MACHINE],
        "one killed": [["--standalone", "--nproc-per-node=8", "--max-restarts=3"]]}

os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
data, tokenizer, folder = map(os.path.abspath, sys.argv[1:])
os.mkdir(folder)
for name, launches in RUNS.items():
    out = Path(folder, name.replace(" ", "-"))
    log = out / "log.jsonl"
    processes = []
    for flags in launches:
        launcher = ["-m", "torch.distributed.run", *flags] if flags else []
        command = [sys.executable, *launcher, "train_gen.py", *FLAGS.split(), "--data", data]
        command += ["--tokenizer", tokenizer, "--out", str(out)]
        with open(f"{out}.err", "a") as errors:
            processes.append(subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=errors, stderr=errors))
    while name == "one killed" and (not log.exists() or log.read_text().count('"loss"') < 3):
        time.sleep(0.1)
    if name == "one killed":
        ranks = subprocess.check_output(["pgrep", "-P", str(processes[0].pid)])
        os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    codes = [process.wait() for process in processes]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    weights = torch.load(out / "state.pt", weights_only=True)["modules"]["model"]
    digest = hashlib.sha256(torch.cat([weight.flatten() for weight in weights.values()]).numpy()).hexdigest()
    begun = sum("command" in record for record in records)
    if name == "one rank":
        one = losses
    difference = max(abs(losses[step] - one[step]) for step in one)
    print(f"{name:13} exit {codes}, begun {begun} times, {len(losses)} losses, {difference:.1e} at most "
          f"from one rank's, weights {digest[:8]}", flush=True)
