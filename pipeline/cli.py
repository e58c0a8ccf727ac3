"""The command line: parses, calls the function of the same name, prints, exits. Everything else is in `api`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import pipeline
from pipeline import api
from pipeline.config import JobConfig, load_config
from pipeline.errors import ExitCode, PipelineError

app = typer.Typer(
    name="resnet-batch",
    help="Turn image collections into labels and embeddings with residual networks.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 complete · 1 failed · 2 bad usage or config · 3 incomplete, run again to go on.",
)
out = Console(soft_wrap=True)

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(help="A YAML file first, then any number of section.key=value.", metavar="[CONFIG] [key=value …]"),
]
OutputUrl = Annotated[str, typer.Argument(help="The dataset: a folder or s3://…", metavar="OUTPUT_URL")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Take the storage options from this config.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and all log messages.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"resnet-batch {pipeline.__version__}")
        raise typer.Exit


@app.command(
    epilog="`resnet-batch run nightly.yaml` · `resnet-batch run input.url=photos/ output.url=labels`"
    " · `resnet-batch run nightly.yaml --limit 5`"
)
def run(
    arguments: ConfigArguments = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Print the first N samples, commit nothing.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Label and embed what is new or changed."""
    with _reporting(debug):
        config = _config(arguments)
        if limit is not None:
            _print_rows(api.preview(config, limit), as_json)
            return
        from pipeline.report import summary

        report = api.run(config)
        _print(report, as_json, lambda: out.print(summary(report)))
        raise typer.Exit(report.exit_code)


@app.command(epilog="`resnet-batch plan nightly.yaml` · `resnet-batch plan nightly.yaml --json`")
def plan(arguments: ConfigArguments = None, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What would run: shards, bytes, already done, gone from the input. Computes nothing."""
    with _reporting(debug):
        found = api.plan(_config(arguments))
        result = {
            "todo": [task.shard.url for task in found.tasks],
            "bytes": found.num_bytes,
            "changed": found.changed,
            "done": len(found.done),
            "gone": found.gone,
        }
        rows = {
            "to do": f"{len(found.tasks)} shards, {found.num_bytes / 1e6:,.1f} MB ({len(found.changed)} changed)",
            "done": f"{len(found.done)} shards",
            "gone": f"{len(found.gone)} shards stand in the output and are no longer in the input",
        }
        _print(result, as_json, lambda: _print_table(rows))


@app.command(epilog="`resnet-batch status s3://bucket/labels`")
def status(
    url: OutputUrl, config: ConfigOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """What the dataset is, how much it holds, and its last runs."""
    with _reporting(debug):
        found = api.status(url, config)
        rows = {
            "dataset": found.url,
            "model": " · ".join(
                f"{name} {value}" for name, value in found.model.items() if name in ("name", "weights")
            ),
            "shards": f"{found.shards} complete, {len(found.incomplete)} to be done again",
            "rows": f"{found.predicted:,} predicted, {found.errors:,} errors, {found.num_bytes / 1e6:,.1f} MB",
        } | {run["run_id"]: f"{run['message']} ({run['seconds']} s)" for run in found.last_runs}
        _print(found, as_json, lambda: _print_table(rows))


@app.command(epilog="`resnet-batch verify s3://bucket/labels --sample 20 --config nightly.yaml`")
def verify(
    url: OutputUrl,
    sample: Annotated[int, typer.Option(min=0, help="Recompute this many rows from their source bytes.")] = 0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a dataset from the outside; names every offender and exits 1 if there is one."""
    with _reporting(debug):
        found = api.verify(url, sample, config)
        _print(found, as_json, lambda: out.print(str(found)))
        raise typer.Exit(ExitCode.COMPLETE if found.ok else ExitCode.FAILED)


@app.command(epilog="`resnet-batch submit nightly.yaml --address http://127.0.0.1:8265`")
def submit(
    arguments: ConfigArguments = None,
    address: Annotated[str, typer.Option(help="The Ray dashboard of the cluster.")] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Follow the log and exit as the job does.")] = True,
    submission_id: Annotated[str | None, typer.Option(help="A name for the job, to find it again.")] = None,
    debug: DebugOption = False,
) -> None:
    """The same run, as a Ray job on a cluster."""
    with _reporting(debug):
        result = api.submit(_config(arguments), address, wait, submission_id)
        if wait:
            raise typer.Exit(int(result))
        print(result)


@app.command(epilog="`resnet-batch demo` · `resnet-batch demo --pretrained`")
def demo(
    folder: Annotated[Path, typer.Argument(help="Where shards, rows and picture go.")] = Path("demo-output"),
    pretrained: Annotated[bool, typer.Option(help="ResNet-18 and ImageNet weights on photographs.")] = False,
    debug: DebugOption = False,
) -> None:
    """The whole path on real images in under a minute, nothing to configure."""
    with _reporting(debug):
        raise typer.Exit(api.demo(folder, pretrained).exit_code)


@app.command(epilog="`resnet-batch init nightly.yaml`")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("config.yaml"), debug: DebugOption = False
) -> None:
    """Write a commented config to start from."""
    with _reporting(debug):
        out.print(f"wrote {api.init(path)}: set input.url and output.url, then `resnet-batch plan {path}`")


def main() -> None:
    """The entry point of `resnet-batch` and of `python -m pipeline`."""
    app()


def _config(arguments: list[str] | None) -> JobConfig:
    """A first argument without `=` is the config file; all others are overrides."""
    words = list(arguments or [])
    path = words.pop(0) if words and "=" not in words[0] else None
    return load_config(path, words)


@contextmanager
def _reporting(debug: bool) -> Iterator[None]:
    """Logs go to stderr; an error is one sentence and an exit code, with a traceback only on request."""
    _log_to_stderr(debug)
    try:
        yield
    except PipelineError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
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


def _print(result: Any, as_json: bool, as_text: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(asdict(result) if is_dataclass(result) else result, ensure_ascii=False))  # type: ignore[arg-type]
    else:
        as_text()


def _print_table(rows: dict[str, str]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    out.print(table)


def _print_rows(rows: Any, as_json: bool) -> None:
    """The samples of a preview, a line each."""
    if as_json:
        print(json.dumps(rows.to_pylist(), ensure_ascii=False))
        return
    shown = [name for name in ("key", "label", "score", "width", "height", "error") if name in rows.column_names]
    table = Table(*shown, box=None)
    for row in rows.select(shown).to_pylist():
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    out.print(table)
