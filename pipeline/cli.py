"""The command line: parses, calls the function of the same name, prints, exits. Everything else is in `api`."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline import api
from pipeline.config import JobConfig, load_config
from pipeline.errors import ExitCode, PipelineError, redact
from pipeline.report import facts, summary

NOT_A_TERMINAL = 10_000  # columns: a log or a pipe gets whole lines

app = typer.Typer(
    name="resnet-batch",
    help="Turn image collections into labels and embeddings with residual networks.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 complete · 1 failed · 2 bad usage or config · 3 incomplete, run again to go on.",
)

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(help="A YAML file first, then any number of section.key=value.", metavar="CONFIG|KEY=VALUE"),
]
OutputUrl = Annotated[str, typer.Argument(help="The dataset: a folder or s3://…", metavar="OUTPUT_URL")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Take the storage options from this config.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and all log messages.")]


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"- `resnet-batch {command}`" for command in commands)])


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"resnet-batch {pipeline.__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        "run nightly.yaml",
        "run nightly.yaml model.name=resnet18 model.weights=IMAGENET1K_V1",
        "run input.url=photos/ output.url=labels",
        "run nightly.yaml --limit 5",
    )
)
def run(
    arguments: ConfigArguments = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Print the first N samples, write nothing.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Label and embed what is new or changed."""
    with _reporting(debug) as out:
        config = _config(arguments)
        if limit is not None:
            rows = api.preview(config, limit)
            _print(rows.to_pylist(), as_json, out, lambda: _rows_table(rows))
            return
        report = api.run(config)
        _print(report, as_json, out, lambda: summary(report))
        raise typer.Exit(report.exit_code)


@app.command(epilog=_examples("plan nightly.yaml", "plan nightly.yaml --json"))
def plan(arguments: ConfigArguments = None, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What would run: shards, bytes, already done, gone from the input. Computes nothing."""
    with _reporting(debug) as out:
        found = api.plan(_config(arguments))
        result = {
            "todo": [redact(task.shard.url) for task in found.tasks],
            "bytes": found.num_bytes,
            "changed": [redact(url) for url in found.changed],
            "done": len(found.done),
            "gone": found.gone,
        }
        rows = {
            "to do": f"{len(found.tasks)} shards, {found.num_bytes / 1e6:,.1f} MB ({len(found.changed)} changed)",
            "done": f"{len(found.done)} shards",
            "gone": f"{len(found.gone)} shards stand in the output and are no longer in the input",
        }
        _print(result, as_json, out, lambda: facts(rows))


@app.command(epilog=_examples("status s3://bucket/labels", "status labels --json"))
def status(
    url: OutputUrl, config: ConfigOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """What the dataset is, how much it holds, and its last runs."""
    with _reporting(debug) as out:
        found = api.status(url, config)
        rows = {
            "dataset": found.url,
            "model": " · ".join(
                f"{name} {value}" for name, value in found.model.items() if name in ("name", "weights")
            ),
            "shards": f"{found.shards} complete, {len(found.incomplete)} to be done again",
            "rows": f"{found.predicted:,} predicted, {found.errors:,} errors, {found.num_bytes / 1e6:,.1f} MB",
        } | {run["run_id"]: f"{run['message']} ({run['seconds'] or 0:.0f} s)" for run in found.last_runs}
        _print(found, as_json, out, lambda: facts(rows))


@app.command(epilog=_examples("verify s3://bucket/labels", "verify labels --sample 20 --config nightly.yaml"))
def verify(
    url: OutputUrl,
    sample: Annotated[int, typer.Option(min=0, metavar="N", help="Recompute N rows from their source bytes.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="Recompute with this config instead of the last run's; storage too."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a dataset from the outside; names every offender and exits 1 if there is one."""
    with _reporting(debug) as out:
        found = api.verify(url, sample, config)
        _print(found, as_json, out, lambda: Text(str(found)))
        raise typer.Exit(ExitCode.COMPLETE if found.ok else ExitCode.FAILED)


@app.command(
    epilog=_examples(
        "submit nightly.yaml",
        "submit nightly.yaml --address http://head:8265 --no-wait --submission-id tonight",
    )
)
def submit(
    arguments: ConfigArguments = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="The Ray dashboard of the cluster.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Follow the log and exit as the job does.")] = True,
    submission_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name for the job, to find it again.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """The same run, as a Ray job on a cluster."""
    with _reporting(debug) as out:
        with redirect_stdout(out):  # the job's log is the result
            result = api.submit(_config(arguments), address, wait, submission_id)
        if wait:
            raise typer.Exit(int(result))
        print(result, file=out)


@app.command(epilog=_examples("demo", "demo my-demo --pretrained"))
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where shards, rows and picture go.")] = Path(
        "demo-output"
    ),
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="ResNet-18 and ImageNet weights on photographs.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """The whole path on real images in under a minute, nothing to configure."""
    with _reporting(debug) as out, redirect_stdout(out):
        raise typer.Exit(api.demo(folder, pretrained).exit_code)


@app.command(epilog=_examples("init", "init nightly.yaml"))
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("config.yaml"),
    debug: DebugOption = False,
) -> None:
    """Write a commented config to start from."""
    with _reporting(debug) as out:
        print(f"wrote {api.init(path)}: set input.url and output.url, then `resnet-batch plan {path}`", file=out)


def main() -> None:
    """The entry point of `resnet-batch` and of `python -m pipeline`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8; in JSON they stay valid
    app()


def _config(arguments: list[str] | None) -> JobConfig:
    """A first argument without `=` is the config file; all others are overrides."""
    words = list(arguments or [])
    path = words.pop(0) if words and "=" not in words[0] else None
    return load_config(path, words)


@contextmanager
def _reporting(debug: bool) -> Iterator[TextIO]:
    """Gives stdout, which is for the result alone: whatever else prints meanwhile (Ray shows what its workers print)
    goes to stderr, and so do logs. An error is one sentence and an exit code, with a traceback only on request."""
    _log_to_stderr(debug)
    out = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield out
    except PipelineError as error:
        if debug:
            traceback.print_exc()
        text = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True, soft_wrap=True).print(text)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INCOMPLETE) from None


def _log_to_stderr(debug: bool) -> None:
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pipeline").setLevel(logging.DEBUG if debug else logging.INFO)


def _print(result: Any, as_json: bool, out: TextIO, shown: Callable[[], RenderableType]) -> None:
    if as_json:
        plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(json.dumps(plain, ensure_ascii=False), file=out)
    else:
        Console(file=out, width=None if out.isatty() else NOT_A_TERMINAL, highlight=False).print(shown())


def _rows_table(rows: Any) -> Table:
    """The samples of a preview, a line each."""
    shown = [name for name in ("key", "label", "score", "width", "height", "error") if name in rows.column_names]
    table = Table(*shown, box=None)
    for row in rows.select(shown).to_pylist():
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
