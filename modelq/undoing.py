"""Changes of a model that happen whole or not at all."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelq.model import Model


@contextmanager
def all_or_nothing(model: Model) -> Iterator[None]:
    """Put the model back as it was if the body raises, Ctrl-C included. Quantizers are put back, not what was found for them."""
    model.settle()
    before = dict(vars(model))
    try:
        yield
    except BaseException:
        model.disconnect()
        vars(model).update(before)
        model.connect()
        raise
