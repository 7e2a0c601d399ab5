"""The tag `{% generation %}` of chat templates, which stands around what the model writes."""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

BEGIN, END = "generation_begin", "generation_end"
"""Variables of a rendering: what to write before and after each such block; nothing where they are not given."""


class GenerationTag(Extension):
    """Renders the block as if the tag were not there, but between the texts that the rendering names."""

    tags = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of one block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in (BEGIN, END))
        return [begin, *body, end]
