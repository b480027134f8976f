"""Link the recordings of the test split into a folder of their own, for `vampnet evaluate`.

Links that an earlier split left there are removed.
"""

import argparse
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--out", type=Path, default=Path("data/test"))
    a = parser.parse_args()
    names = json.loads(a.split.read_text())["test"]
    missing = [name for name in names if not (a.music / f"{name}.wav").is_file()]
    if missing:
        parser.error(f"there is no {a.music / missing[0]}.wav; recipes/tiny/README.md makes it")
    for path in a.out.rglob("*.wav"):
        if path.is_symlink():
            path.unlink()
    for name in names:
        target = a.out / f"{name}.wav"
        if target.exists():
            parser.error(f"{target} is not a link that this script made; remove it or choose --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink((a.music / f"{name}.wav").absolute(), target)
    print(f"{a.out}: {len(names)} recordings")


if __name__ == "__main__":
    main()
