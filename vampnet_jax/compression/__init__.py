"""Music as a small file: a few tokens, entropy-coded; the model generates the rest again.

compress → select what to keep → entropy-code it → `.vnt` file; decompress → decode → generate.
Source: VampNet, section 4 (compression prompts); docs/compression.md has the file format.
"""
