"""The memory tables of docs/fine-tuning.md: LoRA on one accelerator, official sizes.

    python recipes/full_size/lora_memory.py --state           # seconds
    pip install 'vampnet-jax[train,tpu]'
    python recipes/full_size/lora_memory.py                   # minutes a row
    python recipes/full_size/lora_memory.py --stages coarse --batches 8 --remats dots --full

--state adds up the arrays that stay on the device between steps. Without it the real training step
is compiled for one TPU chip of ample memory, without a TPU, and what the compiler reserves is
printed: the state and the batch (arguments), everything in between (temporaries). A GPU needs
about as much; its own compiler decides.
"""

import argparse

GIB = 2**30
CHIP = "v5p:2x2x1"


def state(stage: str, rank: int | None) -> str:
    """One line of the table of states."""
    import jax

    from vampnet_jax.training import begin
    from vampnet_jax.training.step import abstract_state

    settings = {"dtype": "bfloat16"}
    config, _ = begin.sizes(begin.Request(preset=stage, settings=settings, lora={"rank": rank}))
    kept = abstract_state(config)

    def gib(tree: object) -> str:
        return f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / GIB:.2f}"

    trained = (kept.params, kept.ema, kept.moments)
    what = "all" if rank is None else f"rank {rank}"
    return f"| {stage} | {what} | {gib(kept.frozen)} | {gib(trained)} | {gib(kept)} |"


def row(stage: str, batch: int, remat: str, rank: int | None) -> str:
    """One line of the table; without a rank all parameters are trained."""
    import jax

    from vampnet_jax.training import begin, pod_check
    from vampnet_jax.training.sharding import plan
    from vampnet_jax.training.step import abstract_state

    settings = {"batch_size": batch, "dtype": "bfloat16", "remat": remat}
    request = begin.Request(preset=stage, settings=settings, lora={"rank": rank})
    config, n_frames = begin.sizes(request)
    trained = sum(x.size for x in jax.tree.leaves(abstract_state(config).params))
    devices, chip = pod_check.devices_of(CHIP)
    layout = plan(config.model, batch, None, devices=devices[:1])
    compiled = pod_check.compile_step(config, layout, n_frames)
    report = pod_check.measure(compiled, config, n_frames, chip)
    what = "all" if rank is None else f"rank {rank}"
    return (
        f"| {stage} | {what} | {trained / 1e6:.1f} M | {batch} | {remat} | "
        f"{report.needs.arguments / GIB:.2f} | {report.needs.temporaries / GIB:.2f} | "
        f"{report.needs.memory / GIB:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=["coarse", "fine"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--remats", nargs="+", default=["none", "dots", "full"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="also with all parameters trained")
    parser.add_argument("--state", action="store_true", help="compile nothing")
    args = parser.parse_args()

    from vampnet_jax import devices

    devices.select("cpu")
    if args.state:
        print("| stage | trained | frozen | trained, average, moments | GiB in all |")
        print("|---|---|---|---|---|")
        for stage in args.stages:
            for rank in (args.rank, None):
                print(state(stage, rank))
        return
    print("| stage | trained | parameters | batch | remat | arguments | temporaries | GiB in all |")
    print("|---|---|---|---|---|---|---|---|")
    for stage in args.stages:
        for batch in args.batches:
            for remat in args.remats:
                for rank in [args.rank, None] if args.full else [args.rank]:
                    print(row(stage, batch, remat, rank), flush=True)


if __name__ == "__main__":
    main()
