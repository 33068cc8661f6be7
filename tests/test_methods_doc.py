"""The code in docs/methods.md runs, block after block."""

import re
import textwrap
from pathlib import Path

import numpy as np

TEXT = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()


def test_the_examples_run():
    blocks = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", TEXT, re.MULTILINE)
    examples = [textwrap.dedent(block) for block in blocks if "import " in block]
    assert len(examples) == 2
    names = {}
    for example in examples:
        exec(example, names)
    assert names["sim"].outputs.shape == (16, 64, 8)
    assert np.any(names["grads"])


def test_every_section_that_the_first_table_links_to_is_there():
    sections = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    linked = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert len(linked) >= 8
    assert set(linked) <= sections
