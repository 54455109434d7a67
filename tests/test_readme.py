"""The README's example runs as it is written."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_python_examples_run_one_after_another():
    blocks = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        assert names["after"].accuracy > names["before"].accuracy


def test_every_accuracy_with_an_interval_is_on_a_page_of_figures():
    """The README repeats what the studies measured; a study that is run anew must not leave it."""
    pages = "".join(p.read_text(encoding="utf-8") for p in (README.parent / "figures").glob("*.md"))
    stated = re.findall(r"\d+\.\d% \(\d+\.\d% … \d+\.\d%\)", README.read_text(encoding="utf-8"))
    assert len(stated) > 5
    assert [cell for cell in stated if cell not in pages] == []
