"""Say of tokenised music that a codec with a tuned decoder made it (`tune_decoder.py`).

Only if that codec would have made the same tokens: all weights but the decoder's are alike.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import codec_bridge
from codec_bridge.atomic import atomic_write
from codec_bridge.codec import Codec
from vampnet_jax.training.tokens import write_codebooks


def makes_the_same_tokens(a: Codec, b: Codec) -> bool:
    """Whether two codecs differ in nothing but the weights of the decoder."""

    def others(codec: Codec) -> dict[str, np.ndarray]:
        return {n: t for n, t in codec.tensors.items() if not n.startswith("decoder.")}

    ours, theirs = others(a), others(b)
    if (a.kind, a.config) != (b.kind, b.config) or ours.keys() != theirs.keys():
        return False
    return all(np.array_equal(tensor, theirs[name]) for name, tensor in ours.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--codec", type=Path, default=Path("runs/tuned/codec.safetensors"))
    parser.add_argument("--tuned", type=Path, default=Path("runs/decoder-last/codec.safetensors"))
    a = parser.parse_args()
    codec, tuned = codec_bridge.load(a.codec), codec_bridge.load(a.tuned)
    if not makes_the_same_tokens(codec, tuned):
        sys.exit(f"{a.tuned} and {a.codec} differ in more than the decoder")
    path = a.tokens / "manifest.json"
    manifest = json.loads(path.read_text())
    if manifest["codec"]["fingerprint"] not in (codec.fingerprint, tuned.fingerprint):
        sys.exit(f"{a.tokens} was made by another codec than {a.codec}")
    manifest["codec"]["fingerprint"] = tuned.fingerprint
    write_codebooks(a.tokens, tuned.codebooks, tuned.fingerprint)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{a.tokens}: made by {tuned.fingerprint[:12]}")


if __name__ == "__main__":
    main()
