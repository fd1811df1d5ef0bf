"""A run's folder made by hand, for tests of what reads one: every figure of it is chosen here."""

import json
from pathlib import Path

import numpy as np

CHAIN, DIRECT, TA = "teacher>ta>student", "teacher>student", "teacher>ta"
ITEMS = 12
NASTY = "a | b\n```python\nx = `1`\n```\n# head *star* <b>\x07"
CONFIG = """
name = "demo"
seed = 3
[models]
teacher = { source = "some_model|x", precision = "int8" }
ta = { from = "teacher", layers = 22, precision = "int8" }
student = { from = "teacher", layers = 16, precision = "int8" }
[chain]
paths = [["teacher", "ta", "student"], ["teacher", "student"]]
[[phases]]
objective = "kd"
steps = 24
batch_size = 8
lr = 0.0003
[[phases]]
objective = "minillm"
steps = 32
batch_size = 8
rollouts = 16
max_new_tokens = 32
include_current = false
"""


def evaluation(path, *, kl, nll, rouge, length, agree=0.6, seed=0, items=ITEMS):
    """An evaluation whose means are about as given; `kl` by teacher. The noise of an item is the same in every file."""
    noise = np.random.default_rng(1).normal(size=ITEMS)
    own = np.random.default_rng(seed).normal(size=ITEMS)
    lines = []
    for i in range(items):
        line = {
            "item": i,
            "seed": 10,
            "prompt": f"Shared preamble.\n### Instruction:\nTask {i}",
            "references": [f"ref {i}"],
        }
        line |= {
            "answer": NASTY if i == 0 else f"{path.parent.name} answers {i}",
            "rouge_l": rouge + noise[i] + own[i] / 2,
        }
        line |= {"nll": nll * (5 + i), "tokens": 5 + i, "answer_tokens": length + i % 3 - 1}
        line["reverse_kl"] = {t: v + 0.3 * noise[i] + 0.01 * own[i] for t, v in kl.items()}
        lines.append(line | {"agreement": dict.fromkeys(kl, agree)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


def metrics(folder, level):
    rng = np.random.default_rng(sum(folder.name.encode()))
    lines = []
    for step in range(1, 57):
        kd = step <= 24
        line = {"step": step, "phase_step": step if kd else step - 24, "objective": "kd" if kd else "minillm"}
        line["train/loss"] = (
            float(level * (2 * np.exp(-step / 10) + 1 + 0.1 * rng.normal())) if kd else 0.1 * rng.normal()
        )
        line["train/forward_kl" if kd else "train/reverse_kl"] = float(level * (1 - step / 150 + 0.05 * rng.normal()))
        lines.append(line)
    lines[30]["train/loss"] = None
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 57, "tor')


def make_run(folder: Path) -> Path:
    """A finished run as the chain leaves it: chain and direct hop, kd then minillm, evaluated at every stage."""
    out = folder / "out"
    directory = out / "runs" / "demo"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(CONFIG)
    stages = {
        ("teacher", "initial"): dict(kl={"teacher": 0.0}, nll=2.5, rouge=30, length=40, agree=1.0),
        ("ta", "initial"): dict(kl={"teacher": 3.0}, nll=4.0, rouge=10, length=48),
        ("student", "initial"): dict(kl={"teacher": 5.0}, nll=6.7, rouge=3, length=48),
        (TA, "after kd"): dict(kl={"teacher": 0.9}, nll=3.30, rouge=24, length=44),
        (TA, "final"): dict(kl={"teacher": 0.7}, nll=3.33, rouge=25, length=40),
        (CHAIN, "after kd"): dict(kl={"teacher": 1.2, "ta": 0.8}, nll=3.9, rouge=20, length=44),
        (CHAIN, "final"): dict(kl={"teacher": 1.0, "ta": 0.5}, nll=4.0, rouge=21, length=40, agree=0.55),
        (DIRECT, "after kd"): dict(kl={"teacher": 1.3}, nll=4.1, rouge=19, length=44),
        (DIRECT, "final"): dict(kl={"teacher": 1.1}, nll=4.05, rouge=23, length=30, agree=0.5),
    }
    evals = []
    for number, ((node, stage), values) in enumerate(stages.items()):
        file = f"evals/{number:016d}/data-quick-1234.jsonl"
        evaluation(out / file, **values, seed=number + 2)
        evals.append({"node": node, "stage": stage, "file": file, "label": f"{node} {stage}"})
    nodes = {
        "teacher": dict(kind="model", dir="models/teacher-a", seconds=0.0, parameters=134_515_008, phases=[]),
        "ta": dict(kind="model", dir="models/ta-b", seconds=0.0, parameters=106_200_000, phases=[]),
        "student": dict(kind="model", dir="models/student-c", seconds=0.0, parameters=84_900_000, phases=[]),
        TA: dict(kind="hop", teacher="teacher", student="ta", dir="hops/ta-1", seconds=360.0, parameters=106_200_000),
        CHAIN: dict(kind="hop", teacher=TA, student="student", dir="hops/s-2", seconds=300.0, parameters=84_900_000),
        DIRECT: dict(
            kind="hop", teacher="teacher", student="student", dir="hops/s-3", seconds=330.0, parameters=84_900_000
        ),
    }
    for key, node in nodes.items():
        node["name"] = key.split(">")[-1]
        if node["kind"] == "hop":
            node["phases"] = ["kd", "minillm"]
            metrics(out / node["dir"], 1.0 + 0.2 * len(key) / 18)
            done = {"tokens": 1000 * len(key), "seconds": node["seconds"], "hardware": "Some CPU", "processes": 2}
            (out / node["dir"] / "done.json").write_text(json.dumps(done))
    index = {
        "name": "demo",
        "paths": [["teacher", "ta", "student"], ["teacher", "student"]],
        "nodes": nodes,
        "evals": evals,
        "protocol": {
            "protocol": "quick", "quick": True, "seeds": [10], "max_new_tokens": 48, "sample": True,
            "temperature": 1.0, "top_p": 1.0, "no_repeat_ngram_size": 0,
        },
        "data": {"source": "demo", "train": 250, "test": 50},
        "hardware": {
            "name": "CPU, 2 threads", "device": "cpu", "memory_bytes": "25276063744", "capability": "None",
            "reasons": "{'long': 'text'}",
        },
        "versions": {"mskd": "0.1.0", "torch": "2.13.0"},
        "date": "2025-01-02",
    }  # fmt: skip
    (directory / "index.json").write_text(json.dumps(index))
    return directory


def file_of(run, node, stage):
    index = json.loads((run / "index.json").read_text())
    return run.parent.parent / next(e["file"] for e in index["evals"] if (e["node"], e["stage"]) == (node, stage))


def change_index(run, change):
    index = json.loads((run / "index.json").read_text())
    change(index)
    (run / "index.json").write_text(json.dumps(index))


SIZES = {"teacher": 1_000_000, "big": 800_000, "small": 600_000, "student": 500_000}
ALL_PATHS = [
    ["teacher", "student"],
    ["teacher", "big", "student"],
    ["teacher", "small", "student"],
    ["teacher", "big", "small", "student"],
]


def make_sweep(folder: Path, seeds=(0, 1, 2), grid=({},), paths=ALL_PATHS, sizes=SIZES) -> Path:
    """A finished sweep over `paths`: a cell for every seed and grid value. A chain is better by 0.1 a hop."""
    out = folder / "out"
    directory = out / "runs" / "sweep"
    cells = [
        _cell(out, seed, values, f"{seed}-{number}", paths, sizes)
        for seed in seeds
        for number, values in enumerate(grid)
    ]
    protocol = {"protocol": "quick", "quick": True, "seeds": [10], "max_new_tokens": 8}
    index = {"name": "sweep", "paths": paths, "protocol": protocol, "hardware": {"name": "GPU X", "device": "cuda"}}
    index |= {"nodes": cells[0]["nodes"], "evals": cells[0]["evals"]}
    directory.mkdir(parents=True)
    (directory / "index.json").write_text(json.dumps(index | ({"cells": cells} if len(cells) > 1 else {})))
    (directory / "config.toml").write_text(CONFIG.replace('"demo"', '"sweep"'))
    return directory


def _cell(out, seed, grid, label, paths, sizes):
    nodes, evals = {}, []
    for path in paths:
        for length in range(1, len(path) + 1):
            key = ">".join(path[:length])
            if key in nodes:
                continue
            node = {"kind": "hop", "name": path[length - 1], "dir": f"hops/{key.replace('>', '-')}-{label}"}
            node |= {"parameters": sizes[node["name"]], "seconds": 0.0 if length == 1 else 600.0, "phases": []}
            if length == 1:
                node["kind"] = "model"
            else:
                if path[length - 1] not in nodes:
                    nodes[path[length - 1]] = {**node, "kind": "model", "seconds": 0.0, "hash": f"start {label}"}
                    file = f"evals/{path[length - 1]}-{label}/set.jsonl"
                    evaluation(out / file, kl={"teacher": 9.0}, nll=7, rouge=1, length=7)
                    evals.append({"node": path[length - 1], "stage": "initial", "file": file, "label": "start"})
                node |= {"phases": ["minillm"], "teacher": ">".join(path[: length - 1]), "student": path[length - 1]}
                (out / node["dir"]).mkdir(parents=True)
                done = {"tokens": 2000, "processes": 2, "device": "cuda", "hardware": "GPU X"}
                (out / node["dir"] / "done.json").write_text(json.dumps(done))
            nodes[key] = node
            file = f"evals/{key.replace('>', '-')}-{label}/set.jsonl"
            worse = 3.5 - sizes[node["name"]] / 400_000 - 0.1 * length + 0.02 * seed
            values = {"kl": {"teacher": worse}, "nll": 2 + worse, "rouge": 20 - 4 * worse, "length": 7}
            evaluation(out / file, **values, seed=len(evals) + 100 * seed)
            evals.append({"node": key, "stage": "initial" if length == 1 else "final", "file": file, "label": key})
    return {"seed": seed, "grid": grid, "label": label, "nodes": nodes, "evals": evals}
