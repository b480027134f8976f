"""Time and memory of the original's full-size model, with random weights.

    python recipes/full_size/measure.py FOLDER

writes checkpoints in the official shapes to FOLDER (3 GB, and as much again for the model made of
them), then runs, each in a process of its own: reading one file, `vampnet import`, loading the
model, and vamping 10 s of audio. Prints a line per step. Needs Linux, for the memory.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FULL_SIZE = {
    "coarse": {"n_heads": 20, "n_layers": 20, "embedding_dim": 1280, "vocab_size": 1024},
    "c2f": {"n_heads": 20, "n_layers": 16, "embedding_dim": 1280, "vocab_size": 1024},
    "codec": {"encoder_dim": 64, "decoder_dim": 1536, "codebook_size": 1024},
}


def make(folder: Path) -> None:
    """Write `coarse.pth`, `c2f.pth` and `codec.pth` unless they are there."""
    import torch

    torch.manual_seed(0)
    shapes = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for name, sizes in FULL_SIZE.items():
        if (folder / f"{name}.pth").exists():
            continue
        metadata = torch.load(GOLDEN / f"{name}.pth", weights_only=True)["metadata"]
        metadata["kwargs"] |= sizes
        state = {key: tensor(key, shape) for key, shape in shapes[name].items()}
        torch.save({"state_dict": state, "metadata": metadata}, folder / f"{name}.pth")


def tensor(key: str, shape: list[int]):
    """Random values of about the size that training leaves."""
    import torch

    if key.endswith(("norm_1.weight", "norm_3.weight", "transformer.norm.weight", "alpha")):
        return torch.ones(shape)
    if key.endswith("bias"):
        return torch.zeros(shape)
    if key.endswith("weight_g"):
        return torch.full(shape, 0.5)
    if "codebook" in key or "MASK" in key:
        return torch.randn(shape)
    return torch.randn(shape) * math.prod(shape[1:]) ** -0.5 * (0.1 if "lora_B" in key else 1)


def read(folder: Path) -> None:
    """Peak memory of reading the coarse checkpoint, above what the process had before."""
    import vampnet_jax as vampnet

    vampnet.from_torch(GOLDEN / "coarse.pth", GOLDEN / "codec.pth")  # load all libraries
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    path = folder / "coarse.pth"
    vampnet.from_torch(path, folder / "codec.pth")
    seconds = time.perf_counter() - start
    ratio = (memory("VmHWM") - before) / path.stat().st_size
    print(f"from_torch of coarse.pth: {seconds:.1f} s, peak {ratio:.2f} x the file above before")


def vamp(folder: Path) -> None:
    """Load the model and vamp 10 s, with the time of each part."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import vampnet_jax as vampnet

    clock = [time.perf_counter()]

    def lap(what: str) -> None:
        clock.append(time.perf_counter())
        print(f"  {what}: {clock[-1] - clock[-2]:.1f} s", flush=True)

    model = vampnet.load(folder / "model")
    lap("load")
    seconds = np.arange(10 * model.codec.sample_rate) / model.codec.sample_rate
    audio = 0.3 * np.sin(2 * np.pi * 220 * seconds * (1 + 0.1 * np.sin(seconds)))
    tokens = model.codec.encode(jnp.asarray(audio[None], jnp.float32))
    lap("encode")
    mask = vampnet.masks.periodic(tokens.shape, period=7)
    options = {
        "coarse": vampnet.SamplingOptions(steps=24),
        "fine": vampnet.SamplingOptions(steps=2),
    }
    tokens = vampnet.vamp(model, tokens, mask, jax.random.key(0), **options)
    jax.block_until_ready(tokens)
    lap("vamp, 24 coarse and 2 fine steps, with compilation")
    out = np.asarray(model.codec.decode(tokens))
    lap("decode")
    assert np.isfinite(out).all()
    assert out.shape[-1] >= audio.size


def memory(field: str) -> int:
    """Resident memory, now (VmRSS) or at most so far (VmHWM), in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def run(what: str, command: list[str]) -> None:
    """Run a step in a process of its own and report its time and peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    busy = usage.ru_utime + usage.ru_stime
    gigabytes = usage.ru_maxrss * 1024 / 1e9
    print(f"{what}: {seconds:.1f} s ({busy:.1f} s of CPU), peak {gigabytes:.2f} GB", flush=True)
    if status:
        sys.exit(f"{what} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", choices=("read", "vamp"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.step:
        {"read": read, "vamp": vamp}[args.step](folder)
        return
    make(folder)
    this = [sys.executable, str(Path(__file__).resolve()), str(folder), "--step"]
    run("read", [*this, "read"])
    vampnet = [sys.executable, "-c", "from vampnet_jax.cli import main; main()"]
    files = ["--coarse", str(folder / "coarse.pth"), "--fine", str(folder / "c2f.pth")]
    files += ["--codec", str(folder / "codec.pth")]
    run("import", [*vampnet, "import", str(folder / "model"), *files, "--overwrite"])
    run("load and vamp 10 s", [*this, "vamp"])


if __name__ == "__main__":
    main()
