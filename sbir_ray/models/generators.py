"""The generator that the settings ask for."""

from __future__ import annotations

from sbir_ray.config import GeneratorConfig
from sbir_ray.models.generator import Generator
from sbir_ray.models.paper import PaperGenerator
from sbir_ray.models.pen import PenGenerator


def make_generator(config: GeneratorConfig) -> Generator:
    """A new generator of ``config.kind``, with random weights behind its backbone.

    Raises:
        UserError: the backbone or its weights cannot be had.
    """
    kinds = {"paper": PaperGenerator, "pen": PenGenerator}
    return kinds[config.kind](config)
