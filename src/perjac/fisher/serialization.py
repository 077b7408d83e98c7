"""Forms of the Fisher information → .npz files, and back. Knows arrays; must not know models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from perjac.errors import FileFormatError, InputError
from perjac.fisher._columns import Columns
from perjac.fisher.blocks import Block, BlockForm, Dense, Diagonal
from perjac.fisher.form import Form
from perjac.fisher.kronecker import Eigenbasis, Kronecker

_KINDS: dict[str, type[Block]] = {
    "dense": Dense, "diagonal": Diagonal, "kronecker": Kronecker, "eigenbasis": Eigenbasis
}  # fmt: skip


def save(form: Form, path: str | pathlib.Path, **facts: Any) -> None:
    """Write a form made of blocks to an .npz file, which `load` reads back.

    Parameters
    ----------
    form : BlockForm
        As `Fisher.diagonal`, `blocks`, `dense`, `kronecker` and `eigenbasis` give it.
    path : str or Path
        The file, replaced as a whole once all is written.
    **facts
        Numbers, texts or arrays to keep beside it, as "about/…".

    Raises
    ------
    InputError
        If the form is not made of blocks.
    FileFormatError
        If the path does not end in .npz, or its folder does not exist.

    Notes
    -----
    The file holds, in float64 and by the names that `numpy.load` gives:

    ==========================  ====================================================================
    diagonal/KEY                a weight's entries on the diagonal, of the weight's shape
    dense/BLOCK                 a block as a matrix (p, p); its weights one after another, flat
    kronecker/KEY/FIELD         KFAC's sides of a weight, left (G, I, I) and right (G, O, O), or
                                their diagonals, and what else `Kronecker` is made of
    eigenbasis/KEY/FIELD        likewise EKFAC's vectors and values, as in `Eigenbasis`
    about/weights (W,)          the keys, in the order of the P numbers
    about/shapes (W,)           the weights' shapes, as JSON
    about/blocks                the names of the blocks: a weight's, its layer's, or "all"
    about/kinds                 their kinds
    about/members               the keys of each one's weights, in their order there, as JSON
    about/examples              N
    about/reduction             "mean", where it was divided by N, or "sum"
    ==========================  ====================================================================

    Examples
    --------
    Two machines, each with half of the data:

    >>> import pathlib, tempfile, keras, numpy as np, perjac as pj
    >>> from perjac import fisher
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> engine, here = pj.Engine(model), pathlib.Path(tempfile.mkdtemp())
    >>> x = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    >>> fisher.save(engine.fisher(x[:4]).diagonal(), here / "a.npz")
    >>> fisher.save(engine.fisher(x[4:]).diagonal(), here / "b.npz")
    >>> whole = fisher.load(here / "a.npz").merge(fisher.load(here / "b.npz"))
    >>> whole.examples, np.allclose(whole.trace(), engine.fisher(x).trace())
    (10, True)
    """
    write(path, arrays(form), facts)


def load(path: str | pathlib.Path) -> BlockForm:
    """Read a form that `save` or `perjac fisher` wrote.

    Parameters
    ----------
    path : str or Path
        An .npz file.

    Returns
    -------
    BlockForm
        To ask, and to `merge` with the same form of other examples. For kind="sampled" give the
        parts seeds of their own: an example's draws depend on its number in its part.

    Raises
    ------
    FileFormatError
        If there is no such file, or it holds no form.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {name: archive[name] for name in archive.files}
    except Exception as failure:  # a bad zip file, a pickle, a truncated array
        raise FileFormatError(f"Cannot read {path}: {failure}") from failure
    if "about/members" not in held:
        told = "a spectrum, which numpy.load reads" if "eigenvalues" in held else "something else"
        raise FileFormatError(f"Expected a form, as perjac.fisher.save writes it. {path}: {told}.")
    try:
        return _form(held)
    except (KeyError, TypeError, ValueError) as failure:
        raise FileFormatError(f"{path} is damaged: {failure}") from failure


def arrays(form: Form) -> dict[str, np.ndarray]:
    """Return what `save` writes of a form, by name."""
    if not isinstance(form, BlockForm):
        raise InputError(
            "Expected a form made of blocks: a diagonal, KFAC, its eigenbasis, blocks or a matrix. "
            f"Received: {type(form).__name__}, which holds rows; write its eigsh() instead."
        )
    columns, names = form.columns, _names(form)
    found: dict[str, Any] = {}
    for name, (keys, block) in zip(names, form.blocks.items(), strict=True):
        parts = _parts(block)
        if isinstance(block, Diagonal) and len(keys) == 1:
            parts = {"entries": block.entries.reshape(columns.shape(keys[0]))}
        alone = len(parts) == 1
        for field, value in parts.items():
            found[f"{_kind(block)}/{name}" + ("" if alone else f"/{field}")] = value
    return found | {
        "about/weights": np.array(columns.keys),
        "about/shapes": np.array([json.dumps(shape) for shape in columns.shapes]),
        "about/blocks": np.array(names),
        "about/kinds": np.array([_kind(block) for block in form.blocks.values()]),
        "about/members": np.array([json.dumps(keys) for keys in form.blocks]),
        "about/examples": np.array(form.examples),
        "about/reduction": np.array(form.reduction),
    }


def write(path: str | pathlib.Path, held: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write arrays, and facts as "about/…", to an .npz file, replaced as a whole or not at all."""
    path = pathlib.Path(path)
    check_path(path)
    facts = {f"about/{name}": np.asarray(fact) for name, fact in facts.items()}
    taken = sorted(facts.keys() & held.keys())
    if taken:
        raise InputError(f"Expected facts by other names than the form's own. Received: {taken}.")
    with _whole(path) as part, part.open("wb") as file:
        np.savez(file, **held, **facts)  # type: ignore[arg-type]


def check_path(path: pathlib.Path) -> None:
    """Raise for what is no .npz in a folder that exists."""
    if path.suffix != ".npz":
        raise FileFormatError(f"Expected the path of a form to end in .npz. Received: {path}.")
    if not path.parent.is_dir():
        raise FileFormatError(f"There is no folder {path.parent} to write {path.name} to.")


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a file beside `path` that takes its place when the block ends well."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _parts(block: Block) -> dict[str, np.ndarray]:
    """Return the fields of a block that are there."""
    fields = dataclasses.fields(block)  # type: ignore[arg-type]
    held = {field.name: getattr(block, field.name) for field in fields}
    return {name: np.asarray(value) for name, value in held.items() if value is not None}


def _names(form: BlockForm) -> list[str]:
    """Return what each block is called: its weight, its layer, or "all"."""
    if len(form.blocks) == 1 and len(form.keys) > 1:
        return ["all"]
    names = []
    for keys in form.blocks:
        layers = {key.rpartition("/")[0] or key for key in keys}
        names.append(keys[0] if len(keys) == 1 else "+".join(sorted(layers)))
    if len(set(names)) < len(names):  # a layer in several blocks
        names = [f"{n}:{name}" for n, name in enumerate(names)]
    return names


def _form(held: Mapping[str, np.ndarray]) -> BlockForm:
    keys = [str(key) for key in held["about/weights"]]
    shapes = [tuple(json.loads(str(shape))) for shape in held["about/shapes"]]
    columns = Columns(tuple(keys), tuple(shapes))
    blocks = {}
    described = (held[f"about/{name}"] for name in ("blocks", "kinds", "members"))
    for name, kind, members in zip(*described, strict=True):
        mine = tuple(json.loads(str(members)))
        block = _block(_KINDS[str(kind)], f"{kind}/{name}", held)
        if block.size != columns.only(mine).count:
            raise ValueError(f"{kind}/{name} has {block.size} rows")
        blocks[mine] = block
    return BlockForm(columns, int(held["about/examples"]), blocks, str(held["about/reduction"]))


def _block(kind: type[Block], place: str, held: Mapping[str, np.ndarray]) -> Block:
    if kind is Diagonal:
        return Diagonal(np.ravel(held[place]))
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if place in held:
        return kind(held[place])  # type: ignore[call-arg]
    parts = {name: held.get(f"{place}/{name}") for name in names}  # None: was None
    if all(part is None for part in parts.values()):
        raise ValueError(f"{place} is missing")
    return kind(**{name: v.item() if v is not None and v.ndim == 0 else v
                   for name, v in parts.items()})  # fmt: skip
