"""What the README shows works, and what it points to exists."""

import re
from pathlib import Path

import numpy as np
import pytest

from codec_bridge import audio

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((2, 44_100)).astype(np.float32)
    audio.write("loop.wav", audio.Audio(noise, 44_100))
    exec(compile(example, "README.md", "exec"), {})
    new = audio.read("new.wav")
    assert 0.9 < new.seconds < 1.2
    assert np.abs(new.samples).max() > 0.01


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target
