"""What mkdocstrings shows of a docstring: one-line sections and examples, which its parser leaves out or takes apart.

mkdocs.yml names this file as an extension of griffe.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Returns|Raises|Reference): (.+)")


class Sections(griffe.Extension):
    """Returns, Raises and Reference are paragraphs, and lines with >>> a block of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(docstring: str) -> str:
    """The docstring with its sections and examples in Markdown."""
    made: list[str] = []
    within = ""  # the section that indented lines go on with, or ">>>"
    for line in docstring.splitlines():
        section = SECTION.fullmatch(line)
        if within == ">>>" and not line.startswith((">>> ", "... ")):
            made += ["```", ""]
            within = ""
        if section:
            within = section[1]
            made += ["", f"**{within}:** {section[2]}"]
        elif line.startswith(">>> ") and within != ">>>":
            within = ">>>"
            made += ["", "```python", line[4:]]
        elif within == ">>>":
            made.append(line[4:])
        elif within and line.startswith("    "):
            made[-1] += " " + line.strip()
        else:
            within = ""
            made.append(line)
    return "\n".join(made + ["```"] * (within == ">>>"))
