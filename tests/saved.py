"""Checkpoints for tests: a small state, and what might be wrong with a folder."""

import json

import torch

from esam_dist.checksum import sha256


def state(step):
    weights = {"weights": torch.full((3,), float(step)), "seen": torch.tensor(step)}
    momentum = {"weights": {"momentum_buffer": torch.ones(3)}}
    return {"engine": {"model": weights, "optimizer": momentum}, "train": {"step": step, "samples_seen": 8 * step}}


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sealed(folder, step, content):
    """A checkpoint of `content` whose checksum fits: what an older or another program might have left."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    torch.save(content, path / "state.pt")
    (path / "metadata.json").write_text(
        json.dumps({"step": step, "accuracy": 0.9, "sha256": sha256(path / "state.pt")})
    )
    return path


def without(content, *keys):
    part = content
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return content


def with_value(content, value, *keys):
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return content


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.all()]
