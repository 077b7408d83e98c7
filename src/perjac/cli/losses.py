"""The loss that the command line's options mean."""

from __future__ import annotations

from inspect import signature
from typing import Any

import keras

from perjac._core.model.compiled_loss import compiled
from perjac.errors import InputError, UnknownNameError, nearest


def named(engine: Any, model: str, name: str | None, from_logits: bool) -> Any:
    """Return the loss that a user means: by its name, taking logits, or the compiled one.

    Parameters
    ----------
    engine : Engine
        Of the model.
    model : str
        Its file, for messages.
    name : str, optional
        A Keras loss's; None for the one that the model was compiled with.
    from_logits : bool
        Whether it takes logits.

    Returns
    -------
    str, keras.Loss or None
        None for the compiled one.

    Raises
    ------
    InputError
        If the file keeps no loss.
    UnknownNameError
        If no loss of that name takes logits.
    """
    if name is None:
        try:
            compiled(engine.model)
        except InputError:
            raise InputError(
                f"{model} keeps no loss. Name one, for example --loss mse, or "
                "--loss sparse_categorical_crossentropy --from-logits."
            ) from None
        return None
    if not from_logits:
        return name
    taking = {
        name.lower(): kind
        for name, kind in vars(keras.losses).items()
        if isinstance(kind, type) and "from_logits" in signature(kind).parameters
    }
    kind = taking.get(name.lower().replace("_", ""))
    if kind is None:
        known = [fn for fn in vars(keras.losses) if fn.islower() and fn.replace("_", "") in taking]
        raise UnknownNameError(
            f"No Keras loss {name!r} takes --from-logits. {nearest(name, known)}"
        )
    return kind(from_logits=True)
