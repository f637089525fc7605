"""The model card: a Jinja template over measured numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined, TemplateError

from aat_hf.publish.errors import PublishError

TEMPLATE = "card.md"


def render_card(template: Path | None, values: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        template: A file; it may extend "card.md", the template of this package. None: that one.
        values: What the templates name.

    Raises:
        PublishError: The template is missing or wrong, or names a value that does not exist.
    """
    loaders: list[Any] = [PackageLoader("aat_hf.publish", ".")]
    if template is not None:
        loaders.insert(0, FileSystemLoader(template.parent))
    # A name without a value is an error, not an empty place.
    environment = Environment(
        loader=ChoiceLoader(loaders), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    name = TEMPLATE if template is None else template.name
    try:
        return environment.get_template(name).render(values).strip() + "\n"
    except TemplateError as error:
        raise PublishError(f"the template {template or name} cannot be rendered ({error}): mend it") from error
