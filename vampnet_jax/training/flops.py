"""How much a training step computes, and how much the devices could compute."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vampnet_jax.config import ModelConfig
from vampnet_jax.training.config import TrainConfig

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}
"""`device_kind` → FLOP/s of dense bfloat16 (T4: float16) matrix products, by the makers' sheets."""
MEASURED_SIZE = 1024


class Peak(NamedTuple):
    """What the devices of a run could do together."""

    flops: float
    """FLOP/s."""
    source: str
    """Where the figure is from, for a person."""


def step_flops(config: TrainConfig, n_frames: int) -> float:
    """FLOPs of the matrix products of one step, by formula.

    Per frame and forward pass these are 2 (C·d·D + L·10·D² + D·Cp·V) and, for attention, 4·L·T·D;
    the backward pass costs twice as much (once, where the weights are not trained: LoRA). What
    rematerialisation computes again does not count, as usual in model FLOPs utilisation
    (Chowdhery et al. 2022, appendix B).

    Args:
      config: gives the model and the batch size.
      n_frames: T, frames per excerpt.
    """
    model = config.model
    width, layers = model.embedding_dim, model.n_layers
    weights = model.n_codebooks * model.latent_dim * width
    weights += layers * 10 * width**2
    weights += width * model.n_predicted_codebooks * model.vocab_size
    passes = 3 if config.lora is None else 2
    per_frame = passes * 2 * weights + 3 * 4 * layers * n_frames * width
    return float(config.batch_size * n_frames * per_frame)


def peak(config: TrainConfig, n_devices: int) -> Peak:
    """The peak of the devices that train: known by their kind, or measured here and now."""
    device = jax.local_devices()[0]
    known = PEAK_FLOPS.get(device.device_kind)
    if known is not None:
        source = f"{n_devices} × {known / 1e12:g} TFLOP/s ({device.device_kind}, data sheet)"
        return Peak(n_devices * known, source)
    # CPU devices of one process are not several: they share its cores.
    n = jax.process_count() if device.platform == "cpu" else n_devices
    rate = matmul_rate(config.model)
    return Peak(
        n * rate,
        f"{n} × {rate / 1e9:,.0f} GFLOP/s (measured at start: {config.model.dtype} matrix "
        f"products of size {MEASURED_SIZE})",
    )


def matmul_rate(model: ModelConfig, *, repeats: int = 6) -> float:
    """FLOP/s of the fastest of some matrix products on the first device, as the model does them."""
    shape = (MEASURED_SIZE, MEASURED_SIZE)
    a = jnp.ones(shape, model.product_dtype, device=jax.local_devices()[0])
    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=model.activation_dtype))
    jax.block_until_ready(multiply(a))
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        jax.block_until_ready(multiply(a))
        times.append(time.perf_counter() - before)
    return 2 * MEASURED_SIZE**3 / min(times)
