"""The command line. Imports nothing heavy before a command runs: `--help` answers at once."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from perjac._version import __version__
from perjac.cli.screen import Screen, quiet
from perjac.errors import FileFormatError, InputError, PerjacError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Per-example Jacobians, gradients and saliency of Keras models.",
)

Model = Annotated[str, typer.Argument(help="A .keras or .h5 file, or a SavedModel.")]
DataPath = Annotated[str, typer.Argument(help=".npy, .npz, .csv, an image, or a folder of them.")]
Code = Annotated[
    bool,
    typer.Option("--allow-code", help="Run Python code stored in the model file: trust it first."),
]
Signature = Annotated[
    str | None, typer.Option(help="Which function of a SavedModel; its only one by default.")
]
Log = Annotated[str | None, typer.Option(help="Where TensorFlow's own messages go.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples at a time.")]
_STOPPING = "Stopping after these examples, to keep what is done. Ctrl-C again stops at once."
Raw = Annotated[bool, typer.Option("--raw", help="Keep images at 0 to 255, not 0 to 1.")]


def main() -> None:
    """Run the command line.

    Status 0: done; 1: verification failed; 2: bad input; 3: verification could not tell; 130:
    interrupted.
    """
    try:
        status = app(standalone_mode=False)
        if status == 130:  # Typer's own in place of a KeyboardInterrupt
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt) as stop:
        status = _stop(str(stop) or "Interrupted. What was finished is kept.", 130)
    except (PerjacError, OSError) as problem:
        status = _stop(f"Error: {problem}", 2)
    except Exception as problem:
        if not hasattr(problem, "show"):  # wrong usage, in Click's words, which it shows itself
            raise
        problem.show()  # type: ignore[attr-defined]
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _version(asked: bool) -> None:
    if asked:
        print(f"perjac {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="And stop.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _engine(
    model: str,
    signature: str | None,
    log: str | None,
    allow_code: bool,
    compiled: bool = False,
) -> Iterator[tuple[Screen, Any]]:
    """Load a model, with its loss if it is to be the one it was compiled with; keep quiet."""
    with quiet(log) as screen:
        from perjac import Engine
        from perjac._core.model.loading import load_model

        if allow_code:
            screen.complain("Warning: --allow-code runs the Python code stored in the model file.")
        yield screen, Engine(load_model(model, allow_code, signature, compiled))


def _read(screen: Screen, engine: Any, data: str, raw: bool) -> Any:
    from perjac.cli import data_files

    read = data_files.load_data(data, engine.expected, 1.0 if raw else 1 / 255)
    for note in read.notes:
        screen.say(note)
    return read


def _labels(labels: str, read: Any, data: str) -> Any:
    from perjac.cli import data_files

    y = data_files.load_labels(labels)
    if len(read) != len(y):
        raise InputError(
            f"Expected a label for each of the {len(read)} examples of {data}. "
            f"Received: {len(y)} in {labels}."
        )
    return y


@contextlib.contextmanager
def _batch(start: int) -> Iterator[None]:
    """Have errors say where the batch starts that they count examples in, and what is kept."""
    try:
        yield
    except PerjacError as problem:
        if start:
            problem.args = (
                f"{problem} Examples are counted from {start} here, where their batch starts; "
                "those before it are written.",
            )
        raise


def _folder(path: pathlib.Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileFormatError(f"{path} is a file. Give -o a folder.")
    path.mkdir(parents=True, exist_ok=True)


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder to write to.")] = pathlib.Path(
        "perjac-demo"
    ),
    log: Log = None,
) -> None:
    """Train a small net on real digits and show everything on it; ends with a report."""
    with quiet(log) as screen:
        _folder(out)
        from perjac.cli.demo import run

        run(out, screen.say)


@app.command()
def inspect(
    model: Model,
    batch_size: Batch = 32,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run it, and tell the time and memory it took.")
    ] = False,
    signature: Signature = None,
    allow_code: Code = False,
    log: Log = None,
) -> None:
    """Show each weight: where it meets the data, its rule, its path and why; and the cost."""
    with _engine(model, signature, log, allow_code) as (screen, engine):
        screen.say(str(engine.inspect(batch_size, measure=measure)))


@app.command()
def verify(
    model: Model,
    data: Annotated[str | None, typer.Argument(help="Examples; made up if left out.")] = None,
    raw: Raw = False,
    signature: Signature = None,
    allow_code: Code = False,
    log: Log = None,
) -> None:
    """Compare the Jacobian with the model's own gradients in float64.

    Exit status 1 if they differ, 3 if the examples do not tell.
    """
    with _engine(model, signature, log, allow_code) as (screen, engine):
        if data is None:
            from perjac.cli.verification import on_made_up

            report = on_made_up(engine, screen.say)
        else:
            report = engine.verify(_read(screen, engine, data, raw).part(0, 8))
        screen.say(str(report))
    if not report.passed:
        raise typer.Exit(1 if report.verdict == "failed" else 3)


@app.command()
def jacobian(
    model: Model,
    data: DataPath,
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="An .npz or .zarr.")],
    wrt: Annotated[str, typer.Option(help="weights, inputs, or a name.")] = "weights",
    of: Annotated[str | None, typer.Option(help="An output or layer, by name.")] = None,
    outputs: Annotated[str | None, typer.Option(help="Chosen outputs: 3,7")] = None,
    batch_size: Batch = 32,
    raw: Raw = False,
    signature: Signature = None,
    allow_code: Code = False,
    log: Log = None,
) -> None:
    """Write the per-example Jacobian: an array (N, *rows, *weight) for each key."""
    from perjac.cli.store import opened

    chosen = None if outputs is None else _numbers(outputs)
    with _engine(model, signature, log, allow_code) as (screen, engine), opened(out) as store:
        read = _read(screen, engine, data, raw)
        for start in screen.track(range(0, len(read), batch_size), "Batches"):
            part = read.part(start, start + batch_size)
            with _batch(start):
                store.add(engine.jacobian(part, wrt=wrt, of=of, outputs=chosen))
        store.describe(model=model, wrt=wrt, of=of or "", outputs=outputs or "all")
        screen.say(f"Wrote {len(read)} examples to {out}.")


@app.command()
def gradients(
    model: Model,
    data: DataPath,
    labels: Annotated[str, typer.Option(help=".npy, .npz (by output) or .csv.")],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="An .npz or .zarr.")],
    loss: Annotated[
        str | None, typer.Option(help="A Keras loss, by name; the compiled one by default.")
    ] = None,
    from_logits: Annotated[
        bool, typer.Option("--from-logits", help="The loss takes logits, not probabilities.")
    ] = False,
    keep: Annotated[str, typer.Option(help="full, norms, or project:512.")] = "full",
    seed: Annotated[int, typer.Option(help="Of the projection.")] = 0,
    kind: Annotated[
        str, typer.Option(help="Of the projection: gaussian, rademacher or sparse.")
    ] = "gaussian",
    batch_size: Batch = 32,
    raw: Raw = False,
    signature: Signature = None,
    allow_code: Code = False,
    log: Log = None,
) -> None:
    """Write the gradient of each example's loss, or its norm or projection."""
    from perjac.cli.store import opened

    if from_logits and loss is None:
        raise InputError("--from-logits goes with --loss: name the loss that takes logits.")
    with _engine(model, signature, log, allow_code, compiled=loss is None) as (screen, engine):
        from perjac.cli import losses
        from perjac.cli.keep import Keep, Summary

        kept = Keep.read(keep, seed, kind)
        objective = losses.named(engine, model, loss, from_logits)
        with opened(out) as store:
            read = _read(screen, engine, data, raw)
            y = _labels(labels, read, data)
            summary = Summary(read.names)
            store.describe(model=model, loss=loss or "compiled", from_logits=from_logits)
            for start in screen.track(range(0, len(read), batch_size), "Batches"):
                part, answers = (d.part(start, start + batch_size) for d in (read, y))
                with _batch(start):
                    grads = engine.gradients(part, answers, loss=objective)
                    store.add(kept.arrays(grads))
                    store.describe(**kept.facts(grads), **read.told(start + batch_size))
                    summary.add(grads)
        screen.say(f"Wrote {kept.told} of {len(read)} examples to {out}.")
        for line in summary.lines():
            screen.say(line)


@app.command()
def saliency(
    model: Model,
    data: DataPath,
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="Folder to write to.")],
    method: Annotated[
        str, typer.Option(help="One, or several: gradient,input_x_gradient")
    ] = "gradient",
    target: Annotated[str, typer.Option(help="predicted, all, or a number.")] = "predicted",
    of: Annotated[
        str | None, typer.Option(help="An output, by name; logits: before a final softmax.")
    ] = None,
    wrt: Annotated[
        str | None, typer.Option(help="inputs (all), or an input or layer by name.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of methods along a path.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of methods that draw.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of methods that draw.")] = None,
    layer: Annotated[str | None, typer.Option(help="Of methods that look at a layer.")] = None,
    background: Annotated[
        str | None, typer.Option(help="Data that expected_gradients compares with.")
    ] = None,
    channels: Annotated[
        str, typer.Option(help="In pictures: sum, mean, abs-max, l2 or none.")
    ] = "sum",
    batch_size: Batch = 32,
    raw: Raw = False,
    signature: Signature = None,
    allow_code: Code = False,
    log: Log = None,
) -> None:
    """Write a picture for each example and method, values.npz and index.html."""
    options = {"steps": steps, "samples": samples, "seed": seed, "layer": layer, "of": of}
    given = {name: value for name, value in options.items() if value is not None}
    wanted = target if target in ("predicted", "all") else _number(target)
    with _engine(model, signature, log, allow_code) as (screen, engine):
        from perjac.cli.gallery import write
        from perjac.saliency._pictures import check_channels
        from perjac.saliency._registry import choose, takes

        check_channels(channels)
        if wrt is not None:
            given["wrt"] = _looked_at(engine, wrt)
        if background is not None:
            given["background"] = _read(screen, engine, background, raw).inputs
        names = [name.strip() for name in method.split(",")]
        methods = choose(names, {"target": wanted, **given})
        for option in given:
            able = [name for name in names if takes(name, option)]
            if len(able) < len(names):
                screen.say(f"--{option} is for {', '.join(able)} alone.")
        read = _read(screen, engine, data, raw)
        _folder(out)
        starts = screen.track(range(0, len(read), batch_size), "Batches")
        gallery = write(engine, read, out, methods, starts, batch_size, channels)
        screen.say(f"Wrote {gallery.pictures} pictures, values.npz and index.html to {out}.")
        screen.say(f"Explained: {gallery.explained}.")
        if gallery.explained.startswith("probabilities"):
            screen.say(
                "Probabilities hardly move where the model is sure: "
                "--of logits explains what they are made of."
            )


@app.command()
def fisher(
    model: Model,
    data: DataPath,
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="An .npz.")],
    form: Annotated[
        str, typer.Option(help="diagonal, kronecker, eigenbasis, blocks, dense or spectrum.")
    ] = "diagonal",
    kind: Annotated[str, typer.Option(help="exact, sampled or empirical.")] = "exact",
    likelihood: Annotated[
        str | None, typer.Option(help="categorical (default), bernoulli, gaussian, a Keras loss.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help=".npy, .npz or .csv, where needed.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="Of the empirical kind; the compiled one by default.")
    ] = None,
    from_logits: Annotated[
        bool, typer.Option("--from-logits", help="The loss takes logits, not probabilities.")
    ] = False,
    variance: Annotated[str | None, typer.Option(help="The Gaussian's: 1, or fitted.")] = None,
    approximation: Annotated[str | None, typer.Option(help="KFAC's: expand or reduce.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of the sampled kind.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampled kind.")] = None,
    wrt: Annotated[str, typer.Option(help="weights (all), or a layer or weight.")] = "weights",
    of: Annotated[str | None, typer.Option(help="An output, by name.")] = None,
    reduction: Annotated[str, typer.Option(help="Over examples: mean or sum.")] = "mean",
    damping: Annotated[
        float | None, typer.Option(help="Tell the effective dimension and log-determinant with it.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Eigenvectors of a spectrum.")] = 10,
    figures: Annotated[str | None, typer.Option(help="Draw, too: png, pdf or svg.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what an interrupted run has kept.")
    ] = False,
    raw: Raw = False,
    signature: Signature = None,
    allow_code: Code = False,
    log: Log = None,
) -> None:
    """Write the Fisher information of data about the weights, in one of its forms."""
    compiled = kind == "empirical" and loss is None
    with _engine(model, signature, log, allow_code, compiled) as (screen, engine):
        from perjac.cli.checkpoint import Partial
        from perjac.cli.fisher import Found, Wanted
        from perjac.progress import stoppable

        wanted = Wanted(
            out, form, kind, likelihood, loss, from_logits, variance, approximation, samples, seed,
            wrt, of, reduction, damping, top, figures,
        )  # fmt: skip
        asked = wanted.asked(engine, model)
        if wanted.needs_labels and labels is None:
            raise InputError(f"{wanted.needs_labels} needs --labels, one for each example.")
        if labels is not None and not wanted.needs_labels:
            screen.say(f"--kind {kind} with --likelihood {wanted.law} makes no use of --labels.")
        read = _read(screen, engine, data, raw)
        pair = (
            (read.inputs,) if labels is None else (read.inputs, _labels(labels, read, data).inputs)
        )
        work: Any = None
        try:
            with stoppable(lambda: screen.complain(_STOPPING)):
                for _ in screen.track([form], form.capitalize(), "examples"):
                    information = engine.fisher(pair, **asked)
                    work = Partial(wanted, information, engine, pair)
                    if resume:
                        work.resume()
                        screen.say(f"Going on after {work.done:,} examples.")
                    found = Found.of(wanted, information, work.form())
        except KeyboardInterrupt:
            told = work.stopped() if work else f"Interrupted. Nothing is written to {out}."
            raise typer.Abort(told) from None
        found.write(model)
        work.finish()
        for line in found.lines():
            screen.say(line)
        if figures is not None:
            screen.say(f"Drew {', '.join(path.name for path in found.draw())} beside it.")


def _looked_at(engine: Any, name: str) -> Any:
    """Return what --wrt means: all inputs, one of them, or a layer's output."""
    from perjac import activation

    return name if name in ("inputs", *engine.input_names) else activation(name)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"Expected --target predicted, all or a number. Received: {text!r}."
        ) from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"Expected --outputs as a number, or numbers separated by commas. Received: {text!r}."
        ) from None
