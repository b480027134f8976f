"""How fast sampling is: what `vampnet benchmark` measures and how."""
