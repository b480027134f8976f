"""The table of docs/training-at-scale.md: the published models compiled for TPU pods.

    pip install 'vampnet-jax[train,tpu]'
    python recipes/full_size/pod_table.py                        # all of it
    python recipes/full_size/pod_table.py --presets coarse --topologies v5e:16x16 --batches 2048

Needs no TPU. Every row takes some minutes of one core; rows are printed as they are ready.
"""

import argparse
import sys
import time

GIB = 2**30


def row(preset: str, topology: str, batch: int, remat: str, mesh: str | None) -> tuple[str, bool]:
    """One line of the table, and whether the step fits."""
    from vampnet_jax.training import begin, pod_check
    from vampnet_jax.training.sharding import plan

    settings = {"batch_size": batch, "dtype": "bfloat16", "remat": remat}
    config, n_frames = begin.sizes(begin.Request(preset=preset, settings=settings))
    devices, chip = pod_check.devices_of(topology)
    layout = plan(config.model, batch, mesh, devices=devices)
    begin = f"| {preset} | {topology} | {batch} | {remat} |"
    start = time.perf_counter()
    try:
        compiled = pod_check.compile_step(config, layout, n_frames)
    except pod_check.DoesNotFit as error:
        return f"{begin} does not fit: {error} |", False
    report = pod_check.measure(compiled, config, n_frames, chip)
    sent = sum(item.sent for item in report.needs.collectives)
    fast, slow = report.seconds
    cells = [
        f"{report.needs.arguments / GIB:.2f}",
        f"{report.needs.temporaries / GIB:.2f}",
        f"{report.needs.memory / GIB:.2f} of {chip.memory / GIB:.2f}",
        f"{report.model_flops / 1e12:.2f}",
        f"{report.flops / 1e12:.2f}",
        f"{sent / 1e9:.2f}",
        f"{1e3 * fast:.0f} to {1e3 * slow:.0f}",
        f"{report.mfu(slow):.0%} to {report.mfu(fast):.0%}",
    ]
    print(f"{preset} {topology} {batch}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return f"{begin} {' | '.join(cells)} |", report.needs.memory <= chip.memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["coarse", "fine"])
    parser.add_argument("--topologies", nargs="+", default=["v5e:16x16", "v5p:8x8x4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 512, 2048])
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--mesh", default=None)
    args = parser.parse_args()

    from vampnet_jax import devices

    devices.select("cpu")
    print(
        "| model | pod | batch | remat | arguments GiB | temporaries GiB | memory GiB | "
        "model TFLOPs | program TFLOPs | sent GB | step ms | MFU |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    fit = True
    for preset in args.presets:
        for topology in args.topologies:
            for batch in args.batches:
                line, fits = row(preset, topology, batch, args.remat, args.mesh)
                print(line, flush=True)
                fit = fit and fits
    sys.exit(0 if fit else 1)


if __name__ == "__main__":
    main()
