"""Link the recordings of the test split into a folder of their own, for `vampnet evaluate`."""

import argparse
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--music", type=Path, default=Path("data/music"))
    parser.add_argument("--split", type=Path, default=Path(__file__).parent / "split.json")
    parser.add_argument("--out", type=Path, default=Path("data/test"))
    a = parser.parse_args()
    linked = 0
    for name in json.loads(a.split.read_text())["test"]:
        source, target = a.music / f"{name}.wav", a.out / f"{name}.wav"
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.symlink(source.absolute(), target)
            linked += 1
    print(f"{a.out}: {linked} recordings")


if __name__ == "__main__":
    main()
